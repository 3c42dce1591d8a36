"""The Lua scripts with which this package looks into Redis. All but REWIND and SET_POLICY only read, so they run on a replica too."""

from __future__ import annotations

from typing import Final

from silbo.brokers.redis.scripts import Script

__all__ = ["COUNT_DEAD", "FIND", "FIND_IN", "READ_DEAD_ERRORS", "READ_OFFERED", "REWIND", "SET_POLICY"]

COUNT_DEAD: Final = Script("""
local found = redis.call('XRANGE', KEYS[1], ARGV[1], '+', 'COUNT', ARGV[2])
local counts, reply = {}, {#found > 0 and found[#found][1] or ''}
for _, entry in ipairs(found) do
  local fields = entry[2]
  for i = 1, #fields, 2 do
    if fields[i] == 'group' then counts[fields[i + 1]] = (counts[fields[i + 1]] or 0) + 1 end
  end
end
for group, count in pairs(counts) do
  reply[#reply + 1] = group
  reply[#reply + 1] = count
end
return reply
""")
"""Counts the dead letters of each group, a page at a time.

Key: the dead letters. Arguments: the first id, the most letters of the page. Reply: the last id, or nothing if there is no letter;
then group and number, again and again.
"""

READ_DEAD_ERRORS: Final = Script("""
local found, errors = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', ARGV[2]), {}
for _, entry in ipairs(found) do
  local fields = {}
  for i = 1, #entry[2], 2 do fields[entry[2][i]] = entry[2][i + 1] end
  if fields.group == ARGV[1] then errors[#errors + 1] = string.sub(fields.error or '', 1, 200) end
end
return errors
""")
"""Reads the errors of a group's dead letters, the newest first, 200 bytes of each.

Key: the dead letters. Arguments: the group, the most letters to look at. Reply: the errors.
"""

READ_OFFERED: Final = Script("""
local times = {}
for i = 1, #ARGV do
  local time = redis.pcall('ZSCORE', KEYS[1], ARGV[i])
  times[i] = type(time) == 'string' and time or ''
end
return times
""")
"""Reads since when entries are left to the group's other consumers.

Key: the offered. Arguments: ids. Reply: for each id the time in milliseconds; nothing where it is not left, or the user may not look.
"""

_HAS: Final = """
local function has(fields, text)
  for i = 2, #fields, 2 do
    if string.find(fields[i], text, 1, true) then return true end
  end
  return false
end
"""

FIND: Final = Script(
    _HAS
    + """
local found = redis.call(ARGV[1], KEYS[1], ARGV[2], ARGV[3], 'COUNT', ARGV[4])
local hits = {}
for _, entry in ipairs(found) do
  if has(entry[2], ARGV[5]) then hits[#hits + 1] = entry end
end
return {#found, #found > 0 and found[#found][1] or '', hits}
"""
)
"""Looks for the entries that contain a text, a page at a time.

Key: a stream. Arguments: XRANGE or XREVRANGE, the two ends, the most entries of the page, the text. Reply: the number of entries, the
last one's id, and those that contain the text.
"""

FIND_IN: Final = Script(
    _HAS
    + """
local hits = {}
for i = 2, #ARGV do
  local entry = redis.call('XRANGE', KEYS[1], ARGV[i], ARGV[i])[1]
  if entry and has(entry[2], ARGV[1]) then hits[#hits + 1] = entry end
end
return hits
"""
)
"""Looks for the entries among those of some ids that contain a text.

Key: a stream. Arguments: the text, then ids. Reply: the entries.
"""

# SETID without ENTRIESREAD: Redis counts anew when the group has caught up, and does so after a restart as well. The note of
# what the group was given is forgotten, as for a new group.
REWIND: Final = Script("""
local live = {}
for _, row in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  local consumer = {}
  for i = 1, #row, 2 do consumer[row[i]] = row[i + 1] end
  if consumer.idle <= tonumber(ARGV[3]) and consumer.name ~= ARGV[4] then live[#live + 1] = consumer.name end
end
if #live > 0 then return live end
redis.call('XGROUP', 'SETID', KEYS[1], ARGV[1], ARGV[2])
redis.pcall('HDEL', KEYS[2], ARGV[1])
return live
""")
"""Sets a group back, unless one of its consumers lives.

Keys: the stream, the notes of what its groups were given. Arguments: group, the id after which it goes on, milliseconds after which a
consumer counts as gone, the name of a consumer that does not count. Reply: the consumers that live; if there are any, nothing was done.
"""

SET_POLICY: Final = Script("""
local kept = redis.call('HGET', KEYS[1], 'policy')
if kept == ARGV[1] then return 0 end
if kept then redis.call('HSET', KEYS[1], 'before', kept) end
redis.call('HSET', KEYS[1], 'policy', ARGV[1])
return 1
""")
"""Keeps another retention policy beside a stream, and the one before it.

Key: the retention of the stream. Argument: the policy. Reply: 0 if it is kept already, else 1.
"""
