"""What runs inside Redis: one call for a whole batch."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha1
from typing import Final

from silbo.brokers.redis.connection import packed

__all__ = ["ADD", "ADD_SEQUENCED", "PUBLISH", "PURGE", "REMEMBER", "RETRY", "Script"]

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
