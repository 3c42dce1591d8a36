"""The Lua scripts that silbo runs in Redis, and the calls of them."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha1
from typing import Any, Final

from silbo.brokers.redis.connection import Connection, Refused, packed

__all__ = [
    "ACK",
    "ADD",
    "ADD_SEQUENCED",
    "BURY",
    "CLAIM",
    "COUNT",
    "CREATE",
    "KEEP",
    "LEAVE",
    "LOOK",
    "PUBLISH",
    "PURGE",
    "REMEMBER",
    "RETRY",
    "TIDY",
    "Script",
    "call",
]

# Both answer with what failed: {position, error, ...}, counted from 1; empty when all went well. When nothing went well
# the answer is the first error itself, so that it reaches redis-py as one. pcall, because a call that fails in mid-batch
# would end the script with an error, as if nothing had been done; and Redis 6.2 would hide its code in a longer text.
_FAILURES: Final = """
local failed = {}
local function plain(err) return (string.gsub(err, '^@user_script: %d+: %-?', '')) end
local function check(position, reply)
  if type(reply) == 'table' and reply.err then
    failed[#failed + 1] = position
    failed[#failed + 1] = plain(reply.err)
  end
end
local function result(count)
  if count > 0 and #failed == 2 * count then return {err = failed[2]} end
  return failed
end
"""

# Once per call the XADD itself trims. An XTRIM ahead of it would be a write that is allowed above maxmemory, after which
# Redis lets the script go on whatever the memory; one behind it could fail when all is added.
_ADD: Final = """
-- KEYS[1]: the stream. ARGV[1]: milliseconds to keep, or nothing; then the messages.
local first = 2
if ARGV[1] ~= '' then
  local now = redis.call('TIME')
  local oldest = string.format('%.0f', math.max(0, now[1] * 1000 + math.floor(now[2] / 1000) - ARGV[1]))
  check(1, redis.pcall('XADD', KEYS[1], 'MINID', '~', oldest, '*', 'message', ARGV[2]))
  first = 3
end
for i = first, #ARGV do
  check(i - 1, redis.pcall('XADD', KEYS[1], '*', 'message', ARGV[i]))
end
return result(#ARGV - 1)
"""

# Answers with {newest epoch, last sequence before, number added, error where it stopped at one}; the error itself where
# nothing was added. The first HSET is there to fail: after it, neither a key of another type, nor memory, nor a missing
# permission can keep the last one from recording what was added. Unlike an XTRIM, it is refused above maxmemory.
_ADD_SEQUENCED: Final = """
-- KEYS: the stream, the hash. ARGV: milliseconds to keep or nothing, source, epoch; then sequence, message, ...
local source, epoch = ARGV[2], tonumber(ARGV[3])
local record = redis.pcall('HGET', KEYS[2], source)
if type(record) == 'table' then return {err = plain(record.err) .. ' (' .. KEYS[2] .. ')'} end
local newest, last = 0, 0
if record then
  newest, last = string.match(record, '^(%d+):(%d+)$')
  newest, last = tonumber(newest), tonumber(last)
  if not newest then return {err = 'ERR not a record of an outbox: ' .. KEYS[2] .. ' ' .. source} end
end
if newest > epoch then return {newest, last, 0} end
local function note(sequence)
  return redis.pcall('HSET', KEYS[2], source, string.format('%.0f:%.0f', epoch, sequence))
end
local first = 4
while first <= #ARGV and tonumber(ARGV[first]) <= last do first = first + 2 end
if first > #ARGV and epoch == newest then return {epoch, last, 0} end
local noted = note(last)
if type(noted) == 'table' then return {err = plain(noted.err)} end
local reached, added, failure = last, 0, nil
for i = first, #ARGV, 2 do
  local reply
  if added == 0 and ARGV[1] ~= '' then
    local now = redis.call('TIME')
    local oldest = string.format('%.0f', math.max(0, now[1] * 1000 + math.floor(now[2] / 1000) - ARGV[1]))
    reply = redis.pcall('XADD', KEYS[1], 'MINID', '~', oldest, '*', 'message', ARGV[i + 1])
  else
    reply = redis.pcall('XADD', KEYS[1], '*', 'message', ARGV[i + 1])
  end
  if type(reply) == 'table' and reply.err then
    failure = plain(reply.err)
    break
  end
  reached, added = tonumber(ARGV[i]), added + 1
end
if added > 0 then note(reached) end
if failure and added == 0 then return {err = failure} end
return {epoch, last, added, failure}
"""

_PUBLISH: Final = """
-- ARGV: channel, message, channel, message, ...
for i = 1, #ARGV, 2 do
  check((i + 1) / 2, redis.pcall('PUBLISH', ARGV[i], ARGV[i + 1]))
end
return result(#ARGV / 2)
"""

# Answers with what became of each. An entry that is deleted can't be claimed; TIME 0 makes it look idle for longer than any
# consumer waits before it takes over another's.
_RETRY: Final = """
-- KEYS: the stream, its dead letters. ARGV: 1 to add anew what is gone from the stream, or nothing; then ids.
local outcomes = {}
local function retry(id)
  local found = redis.call('XRANGE', KEYS[2], id, id)[1]
  if not found then return 'missing' end
  local letter = {}
  for i = 1, #found[2], 2 do letter[found[2][i]] = found[2][i + 1] end
  if not (letter.group and letter.message and string.match(letter.id or '', '^%d+%-%d+$')) then return 'foreign' end
  local forgotten = redis.pcall('HDEL', KEYS[1] .. ':attempts:' .. letter.group, letter.id)
  if type(forgotten) == 'table' then return {err = plain(forgotten.err)} end
  local claimed = redis.pcall(
    'XCLAIM', KEYS[1], letter.group, 'silbo-retry', 0, letter.id, 'TIME', 0, 'FORCE', 'JUSTID')
  if claimed.err then
    local why = plain(claimed.err)
    if string.sub(why, 1, 7) == 'NOGROUP' then return 'no group' end
    return {err = why}
  end
  if #claimed == 0 then
    if ARGV[1] == '' then return 'expired' end
    redis.call('XADD', KEYS[1], '*', 'message', letter.message)
  end
  redis.call('XDEL', KEYS[2], id)
  return 'returned'
end
for i = 2, #ARGV do
  local outcome = retry(ARGV[i])
  if type(outcome) == 'table' then return outcome end
  outcomes[i - 1] = outcome
end
return outcomes
"""

_PURGE: Final = """
-- KEYS[1]: dead letters. ARGV: the last millisecond, how many at most.
local found = redis.call('XRANGE', KEYS[1], '-', ARGV[1], 'COUNT', ARGV[2])
for i = 1, #found do
  local deleted = redis.pcall('XDEL', KEYS[1], found[i][1])
  if type(deleted) == 'table' then return {err = plain(deleted.err)} end
end
return #found
"""

# ZADD first: it is what is refused above maxmemory; after another write Redis would let it pass.
_REMEMBER: Final = """
-- KEYS[1]: what a group has handled. ARGV: one more, milliseconds to keep, how many at most.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local function at(milliseconds) return string.format('%.0f', milliseconds) end
local added = redis.pcall('ZADD', KEYS[1], at(now), ARGV[1])
if type(added) == 'table' then return {err = plain(added.err)} end
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', at(now - ARGV[2]))
redis.call('ZREMRANGEBYRANK', KEYS[1], 0, -1 - ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return added
"""


class Script:
    """A script, by its digest; by its source where Redis has forgotten it."""

    def __init__(self, source: str) -> None:
        text = (_FAILURES + source).encode()
        digest = sha1(text, usedforsecurity=False).hexdigest().encode()  # Redis's name for it
        self._by_digest, self._by_source = packed([b"EVALSHA", digest]), packed([b"EVAL", text])

    def call(self, keys: Sequence[bytes], arguments: bytes, count: int, *, by_source: bool = False) -> bytes:
        """The command, given ``count`` arguments that are packed already."""
        head = self._by_source if by_source else self._by_digest
        return b"*%d\r\n%b%b%b" % (
            3 + len(keys) + count,
            head,
            packed([b"%d" % len(keys), *keys]),
            arguments,
        )


ADD: Final = Script(_ADD)
"""One key: the stream. Arguments: milliseconds to keep or nothing, then each message."""
ADD_SEQUENCED: Final = Script(_ADD_SEQUENCED)
"""Two keys: the stream, and its hash. Arguments: milliseconds to keep or nothing, source, epoch; then sequence and message,
again and again."""
RETRY: Final = Script(_RETRY)
"""Two keys: the stream, its dead letters. Arguments: 1 or nothing, then ids."""
PURGE: Final = Script(_PURGE)
"""One key: dead letters. Arguments: the last millisecond, most at once."""
REMEMBER: Final = Script(_REMEMBER)
"""One key: what a group has handled. Arguments: one more, milliseconds to keep, how many at most."""
PUBLISH: Final = Script(_PUBLISH)
"""No key. Arguments: channel and message, again and again."""


# Replies of XINFO come as name, value, name, value, ...
_MAPPING: Final = """
local function mapping(flat)
  local found = {}
  for i = 1, #flat, 2 do found[flat[i]] = flat[i + 1] end
  return found
end
"""

# In hundreds: Lua's unpack has a limit of some thousands.
_ACK: Final = """
for first = 2, #ARGV, 100 do
  local last = math.min(first + 99, #ARGV)
  redis.call('XACK', KEYS[1], ARGV[1], unpack(ARGV, first, last))
  redis.call('HDEL', KEYS[2], unpack(ARGV, first, last))
end
return 1
"""

# Absent is what nobody has in hand. That is so where another consumer took it over and has done it, and where the group
# was deleted: ARGV[3] says, by the time, that the first can't be. What is gone from the stream too, nobody else can have.
_KEEP: Final = """
local lost = {}
for i = 4, #ARGV do
  local id = ARGV[i]
  local row = redis.call('XPENDING', KEYS[1], ARGV[1], id, id, 1)[1]
  if row and row[2] == ARGV[2] then
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, id, 'JUSTID')
  elseif row then
    lost[#lost + 1] = id
  elseif #redis.call('XRANGE', KEYS[1], id, id) > 0 then
    if ARGV[3] == '1' then
      redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, id, 'FORCE', 'JUSTID')
    else
      lost[#lost + 1] = id
    end
  end
end
return lost
"""

# JUSTID, because what is deleted from the stream comes without its id otherwise on Redis 6.2. Redis 7 leaves it out and
# tells it apart.
_CLAIM: Final = """
local reply = redis.call('XAUTOCLAIM', KEYS[1], ARGV[1], ARGV[2], ARGV[3], ARGV[4], 'COUNT', ARGV[5], 'JUSTID')
local taken, attempts, gone = {}, {}, reply[3] or {}
for _, id in ipairs(reply[2]) do
  local entry = redis.call('XRANGE', KEYS[1], id, id)[1]
  if entry then
    taken[#taken + 1] = entry
    attempts[#taken] = tonumber(redis.call('HGET', KEYS[2], id) or 0)
  else
    redis.call('XACK', KEYS[1], ARGV[1], id)
    gone[#gone + 1] = id
  end
end
for _, id in ipairs(gone) do redis.call('HDEL', KEYS[2], id) end
return {reply[1], taken, attempts, #gone}
"""

# Set, not added to: so it can be repeated.
_COUNT: Final = """
local known = tonumber(redis.call('HGET', KEYS[2], ARGV[1]) or 0)
if not ARGV[2] then return known end
if known >= tonumber(ARGV[2]) then return known end
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
redis.call('PEXPIRE', KEYS[2], ARGV[3])
return tonumber(ARGV[2])
"""

_BURY: Final = """
if #redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1, ARGV[2]) == 0 then return 0 end
local now = redis.call('TIME')
local time = now[1] * 1000 + math.floor(now[2] / 1000)
redis.call('XADD', KEYS[3], 'MINID', '~', string.format('%.0f', math.max(0, time - ARGV[4])), '*',
  'message', ARGV[5], 'group', ARGV[1], 'stream', KEYS[1], 'id', ARGV[3], 'error', ARGV[6], 'attempts', ARGV[7],
  'app', ARGV[8], 'consumer', ARGV[2], 'time', string.format('%.0f', time))
redis.call('XACK', KEYS[1], ARGV[1], ARGV[3])
redis.call('HDEL', KEYS[2], ARGV[3])
return 1
"""

# Redis 7 counts what a group has read, from a number that only we can tell: how many entries are before its start.
_CREATE: Final = (
    _MAPPING
    + """
redis.call('XGROUP', 'CREATE', KEYS[1], ARGV[1], ARGV[2], 'MKSTREAM')
local stream = mapping(redis.call('XINFO', 'STREAM', KEYS[1]))
local added = stream['entries-added']
if added and ARGV[2] == '0' then added = added - stream['length'] end
if added and (ARGV[2] == '0' or ARGV[2] == '$') then
  redis.call('XGROUP', 'SETID', KEYS[1], ARGV[1], ARGV[2], 'ENTRIESREAD', string.format('%.0f', added))
end
return 1
"""
)

# A group that has been given everything, or still has an entry that it was given in front of it, has missed nothing. Else
# Redis 7 knows how many; before it, that the last one given is so old is all that there is to see. The group is set to just
# before the first entry, so that this is told once. Deletion of single entries is not looked for.
_LOOK: Final = (
    _MAPPING
    + """
local stream, group = mapping(redis.call('XINFO', 'STREAM', KEYS[1])), nil
for _, row in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  local one = mapping(row)
  if one['name'] == ARGV[1] then group = one end
end
if not group then return {0, -1} end
local last = group['last-delivered-id']
local nextup = redis.call('XRANGE', KEYS[1], '(' .. last, '+', 'COUNT', 1)[1]
local first = stream['first-entry'] and stream['first-entry'][1]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local age = nextup and now - tonumber(string.match(nextup[1], '%d+')) or -1
if last == '0-0' or last == stream['last-generated-id'] or (first and not (nextup and nextup[1] == first)) then return {0, age} end
local added, read, missed = stream['entries-added'], group['entries-read'], 0
if added and read then
  missed = math.max(0, added - stream['length'] - read)
elseif ARGV[2] ~= '' and now - tonumber(string.match(last, '%d+')) > tonumber(ARGV[2]) then
  missed = -1
end
if missed == 0 then return {0, age} end
local before = stream['last-generated-id']
if first then
  local ms, sequence = string.match(first, '(%d+)-(%d+)')
  if sequence ~= '0' then
    before = ms .. '-' .. string.format('%.0f', sequence - 1)
  else
    before = string.format('%.0f', ms - 1) .. '-18446744073709551615'
  end
end
if added then
  local counted = string.format('%.0f', added - stream['length'])
  redis.call('XGROUP', 'SETID', KEYS[1], ARGV[1], before, 'ENTRIESREAD', counted)
else
  redis.call('XGROUP', 'SETID', KEYS[1], ARGV[1], before)
end
return {missed, age}
"""
)

_TIDY: Final = (
    _MAPPING
    + """
local removed = 0
for _, row in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  local one = mapping(row)
  if one['pending'] == 0 and one['idle'] > tonumber(ARGV[3]) and one['name'] ~= ARGV[2] then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], one['name'])
    removed = removed + 1
  end
end
return removed
"""
)

_LEAVE: Final = """
local rows = redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 1000, ARGV[2])
for _, row in ipairs(rows) do
  redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, row[1], 'IDLE', ARGV[3], 'JUSTID')
end
if #rows == 0 and ARGV[4] == '1' then redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2]) end
return #rows
"""

ACK: Final = Script(_ACK)
"""Two keys: the stream, the attempts. Arguments: group, then ids."""
KEEP: Final = Script(_KEEP)
"""One key: the stream. Arguments: group, consumer, 1 to take back what nobody has, then ids. Answers with those lost."""
CLAIM: Final = Script(_CLAIM)
"""Two keys: the stream, the attempts. Arguments: group, consumer, idle milliseconds, cursor, most at once. Answers with the
cursor, entries, the attempts of each that are known, and how many other entries were gone."""
COUNT: Final = Script(_COUNT)
"""Two keys: the stream, the attempts. Arguments: id, and to set it: number, milliseconds to keep them all."""
BURY: Final = Script(_BURY)
"""Three keys: the stream, the attempts, the dead letters. Arguments: group, consumer, id, milliseconds to keep dead letters,
message, error, attempts, app. Answers with 0 where the consumer does not have it."""
CREATE: Final = Script(_CREATE)
"""One key: the stream. Arguments: group, start."""
LOOK: Final = Script(_LOOK)
"""One key: the stream. Arguments: group, milliseconds that entries are kept, or nothing where the group surely has missed
none. Answers with how many it has missed (-1: some) and how old the next one is, in milliseconds (-1: there is none)."""
TIDY: Final = Script(_TIDY)
"""One key: the stream. Arguments: group, consumer, idle milliseconds. Answers with how many consumers were removed."""
LEAVE: Final = Script(_LEAVE)
"""One key: the stream. Arguments: group, consumer, milliseconds after which others claim, 1 to remove the consumer where it
has nothing in hand."""


async def call(connection: Connection, script: Script, keys: list[bytes], *arguments: bytes) -> Any:
    """The script's reply; by its source where Redis has forgotten it.

    Raises:
        Lost: the connection broke.
        Refused: Redis's answer is an error.
    """
    words = packed(arguments)
    await connection.write(script.call(keys, words, len(arguments)))
    try:
        return await connection.read()
    except Refused as refusal:
        if refusal.code != "NOSCRIPT":
            raise
    await connection.write(script.call(keys, words, len(arguments), by_source=True))
    return await connection.read()
