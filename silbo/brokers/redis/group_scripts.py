"""What runs inside Redis for a consumer group: whatever must not be half done."""

from __future__ import annotations

from typing import Any, Final

from silbo.brokers.redis.connection import Connection, Refused, packed
from silbo.brokers.redis.scripts import Script

__all__ = ["ACK", "BURY", "CLAIM", "COUNT", "CREATE", "KEEP", "LEAVE", "LOOK", "TIDY", "call"]

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
