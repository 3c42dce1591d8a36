"""The Lua scripts that silbo runs in Redis."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from hashlib import sha1
from typing import Final

from silbo.brokers.redis.connection import pack_words

__all__ = [
    "ACK",
    "ADD",
    "ADD_SEQUENCED",
    "ADOPT",
    "BEAT",
    "BURY",
    "CLAIM",
    "COUNT",
    "COUNTS",
    "COUNT_AFTER",
    "CREATE",
    "FIX_SHARDS",
    "GIVE_WAY",
    "HANDLED",
    "KEEP",
    "LEAVE",
    "LOOK",
    "OFFER",
    "PUBLISH",
    "PURGE",
    "READ",
    "REDATE",
    "RELEASE",
    "REMEMBER",
    "RENEW",
    "RETRY",
    "SIGN",
    "TAKE",
    "TIDY",
    "TRIM",
    "Script",
]

# For scripts that carry out a batch: result() is an array of what failed, {position, error, ...}, positions from 1; empty
# when all went well. When everything failed it is the first error itself, so that redis-py gets it as an error. They use
# pcall, because a call that fails in mid-batch would end the script with an error, as if nothing had been done; and Redis
# 6.2 would hide its code in a longer text.
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

# Replies of XINFO come as name, value, name, value, ...
_MAPPING: Final = """
local function mapping(flat)
  local found = {}
  for i = 1, #flat, 2 do found[flat[i]] = flat[i + 1] end
  return found
end
"""


# Attempts are kept in a key that anybody may write: what is no count there, or no hash, is none. An error may follow the count.
_COUNT_OF: Final = """
local function count_of(key, id)
  local found = redis.pcall('HGET', key, id)
  local count = type(found) == 'string' and string.match(found .. ' ', '^(%d+) ')
  if not count or #count >= 10 then return 0, nil end
  return tonumber(count), string.match(found, ' .*')
end
"""

_FIND_GROUP: Final = """
local function find_group(key, name)
  local rows = redis.pcall('XINFO', 'GROUPS', key)
  for _, row in ipairs(rows.err and {} or rows) do
    local group = mapping(row)
    if group['name'] == name then return group end
  end
end
local function whole(number) return string.format('%.0f', number) end
"""

# Redis 7 counts the entries that a group has read (entries-read). Until 7.4 the count is wrong after a restart and on a promoted
# replica: XREADGROUP is replayed without it. So a note beside the stream holds an id that the group was given, and the number
# of entries that had been added up to it; and '?' in front if the count has since been found to be too low. Then it is not
# believed before the group has been given everything: from that point on the number is known again, and Redis is told.
_CHECK_GIVEN: Final = """
local function check_given(stream, group)
  local name, added, read, last = group['name'], stream['entries-added'], group['entries-read'], group['last-delivered-id']
  if not added then return nil, 0 end
  local noted, doubt, id, least = redis.pcall('HGET', KEYS[2], name), '', nil, 0
  if type(noted) == 'string' then
    doubt, id, least = string.match(noted, '^(%??)(%d+%-%d+):(%d+)$')
    least = tonumber(least) or 0
  end
  local given
  if last == stream['last-generated-id'] then given = added
  elseif id == last and doubt == '' then given = least
  elseif read and doubt ~= '?' and read >= least then given = read end
  if given and given ~= read then
    redis.call('XGROUP', 'SETID', KEYS[1], name, last, 'ENTRIESREAD', whole(given))
  end
  local note = given and last .. ':' .. whole(given) or '?' .. (id or '0-0') .. ':' .. whole(least)
  if note ~= noted then redis.pcall('HSET', KEYS[2], name, note) end
  return given, least
end
"""

# The largest id below that of the first entry; of an empty stream its last id.
_BEFORE: Final = """
local function find_before(first, stream)
  if not first then return stream['last-generated-id'] end
  local ms, sequence = string.match(first, '(%d+)-(%d+)')
  if sequence ~= '0' then return ms .. '-' .. whole(sequence - 1) end
  return whole(ms - 1) .. '-18446744073709551615'
end
"""

# Sets a group to an id, in front of which so many entries have been removed, if Redis counts them.
_SKIP: Final = """
local function skip(name, id, removed)
  if removed then
    redis.pcall('XGROUP', 'SETID', KEYS[1], name, id, 'ENTRIESREAD', whole(removed))
    redis.pcall('HSET', KEYS[2], name, id .. ':' .. whole(removed))
  else
    redis.pcall('XGROUP', 'SETID', KEYS[1], name, id)
  end
end
"""

# Ids are two numbers of up to 64 bits, which Lua's numbers can't tell apart.
_LESS: Final = """
local function less(one, other)
  local ms, sequence = string.match(one, '(%d+)-(%d+)')
  local other_ms, other_sequence = string.match(other, '(%d+)-(%d+)')
  if ms == other_ms then ms, other_ms = sequence, other_sequence end
  if #ms ~= #other_ms then return #ms < #other_ms end
  return ms < other_ms
end
"""


# The number of shards is fixed in a key beside each shard, and in one beside the stream that the address has without shards: the last
# key of the script. The latter is looked at only before the first message of a stream, and is asked for then with DECLARE: while a slot
# moves, a cluster refuses a script one of whose keys does not exist.
_CHECK_SHARDS: Final = """
local function check_shards(said)
  if said == '0' then said = '' end
  local key = KEYS[#KEYS]
  if key ~= KEYS[1] .. ':shards' then return {err = 'DECLARE ' .. KEYS[1] .. ':shards'} end
  local fixed = redis.pcall('HGET', key, 'shards') or ''
  if type(fixed) == 'table' then
    if said == '' then return end
    return {err = plain(fixed.err)}
  end
  if fixed == '' and said ~= '' then return {err = 'SHARDS are not fixed any more, as after FLUSHALL; safe to repeat'} end
  if fixed ~= said then return {err = 'SHARDS ' .. fixed} end
end
"""

# The leader of a shard is its lease's owner, in its epoch. This comes in front of every script that the leader calls, so that
# one that was frozen meanwhile, or cut off, reads and settles nothing.
_CHECK_LEASE: Final = """
do
  local epoch, member = table.remove(ARGV), table.remove(ARGV)
  local lease = redis.call('HMGET', table.remove(KEYS), 'owner', 'epoch')
  if lease[1] ~= member or lease[2] ~= epoch then return {err = 'FENCED ' .. (lease[2] or 0)} end
end
"""


# The lease is in another slot than the inbox. So the inbox remembers the newest epoch of each shard that it has seen, in the same set
# and above all times.
_CHECK_EPOCHS: Final = """
do
  local leads = {}
  for _ = 1, tonumber(table.remove(ARGV)) do
    local epoch = tonumber(table.remove(ARGV))
    local member = 'epoch:' .. table.remove(ARGV)
    local newest = tonumber(redis.call('ZSCORE', KEYS[1], member) or 0) - 4503599627370496
    if newest > epoch then return {err = 'FENCED ' .. string.format('%.0f', newest)} end
    if newest < epoch then leads[member] = string.format('%.0f', 4503599627370496 + epoch) end
  end
  for member, score in pairs(leads) do redis.pcall('ZADD', KEYS[1], score, member) end
end
"""


class Script:
    """A script, called by its digest, or by its source if Redis does not know the digest.

    Every key that it uses is declared. A script that only finds out which keys it needs replies with the error ``DECLARE`` and these
    keys, and has done nothing: then it is called again with them behind its other keys.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        text = (_FAILURES + source).encode()
        digest = sha1(text, usedforsecurity=False).hexdigest().encode()  # Redis's name for it
        self._by_digest = pack_words([b"EVALSHA", digest])
        self._by_source = pack_words([b"EVAL", text])

    @cached_property
    def fenced(self) -> Script:
        """This script as the leader of a shard calls it.

        After its keys comes the shard's lease; after its arguments the member and its epoch. If the lease has another owner or
        epoch, the reply is the error ``FENCED``, with the lease's epoch, and nothing is done.
        """
        return Script(_CHECK_LEASE + self._source)

    @cached_property
    def led(self) -> Script:
        """This script of an inbox as the leader of shards calls it.

        After its arguments come, for each shard, its key and the epoch; then their number. If the inbox has seen a newer epoch of
        one of them, the reply is the error ``FENCED``, and nothing is done.
        """
        return Script(_CHECK_EPOCHS + self._source)

    def pack_call(self, keys: Sequence[bytes], arguments: bytes, count: int, *, by_source: bool) -> bytes:
        """Return the command as the Redis protocol writes it; ``arguments`` are ``count`` packed words."""
        head = self._by_source if by_source else self._by_digest
        return b"*%d\r\n%b%b%b" % (
            3 + len(keys) + count,
            head,
            pack_words([b"%d" % len(keys), *keys]),
            arguments,
        )


# -- publishing ---------------------------------------------------------------------------------------------

# The first XADD trims as well. An XTRIM ahead of it would be a write that is allowed above maxmemory, after which Redis
# lets the script go on whatever the memory; one behind it could fail when all is added.
ADD: Final = Script(
    _CHECK_SHARDS
    + """
if ARGV[2] ~= '' or redis.call('XLEN', KEYS[1]) == 0 then
  local differ = check_shards(ARGV[2])
  if differ then return differ end
end
local first = 3
if ARGV[1] ~= '' then
  local now = redis.call('TIME')
  local oldest = string.format('%.0f', math.max(0, now[1] * 1000 + math.floor(now[2] / 1000) - ARGV[1]))
  check(1, redis.pcall('XADD', KEYS[1], 'MINID', '~', oldest, '*', 'message', ARGV[3]))
  first = 4
end
for i = first, #ARGV do
  check(i - 2, redis.pcall('XADD', KEYS[1], '*', 'message', ARGV[i]))
end
return result(#ARGV - 2)
"""
)
"""Adds messages to a stream, or to a shard.

Keys: the stream; for a shard, and if it asks for it, the hash with their number. Arguments: milliseconds to keep entries or nothing, the number of shards
of its address, or nothing, or 0 for a stream that may not be a shard; then each message. Reply: what failed; or the error ``SHARDS``, with the number that is fixed, if any: nothing was added then.
"""

# The first HSET is there to fail: after it, neither a key of another type, nor memory, nor a missing permission can keep
# the last one from recording what was added. Unlike an XTRIM, it is refused above maxmemory.
ADD_SEQUENCED: Final = Script(
    _CHECK_SHARDS
    + """
if ARGV[4] ~= '' or redis.call('XLEN', KEYS[1]) == 0 then
  local differ = check_shards(ARGV[4])
  if differ then return differ end
end
local source, epoch = ARGV[2], tonumber(ARGV[3])
local record = redis.pcall('HGET', KEYS[2], source)
if type(record) == 'table' then return {err = plain(record.err)} end
local newest, last = 0, 0
if record then
  newest, last = string.match(record, '^(%d+):(%d+)$')
  newest, last = tonumber(newest), tonumber(last)
  -- 2^53: greater numbers are not exact, and no store gives them.
  if not newest or newest > 9007199254740992 or last > 9007199254740992 then return {err = 'ERR not a record of an outbox: ' .. KEYS[2] .. ' ' .. source} end
end
if newest > epoch then return {newest, last, 0} end
local function note(sequence)
  return redis.pcall('HSET', KEYS[2], source, string.format('%.0f:%.0f', epoch, sequence))
end
local first = 5
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
)
"""Adds the messages of an outbox's partition to a stream, or to a shard, without those that it has already.

Keys: the stream, its hash of ``epoch:last sequence`` by source; for a shard, and if it asks for it, the hash with their number. Arguments: milliseconds to keep entries or nothing, source,
epoch, the number of shards of its address or nothing; then sequence and message, again and again. Reply: newest epoch, last
sequence before the call, number of messages added, and the error where it stopped at one; the error alone if nothing was added,
as ``SHARDS``: see ADD.
"""

PUBLISH: Final = Script("""
for i = 1, #ARGV, 2 do
  check((i + 1) / 2, redis.pcall('PUBLISH', ARGV[i], ARGV[i + 1]))
end
return result(#ARGV / 2)
""")
"""Publishes messages to channels.

No key. Arguments: channel and message, again and again. Reply: what failed.
"""

# -- dead letters and the inbox -------------------------------------------------------------------------------

# An entry that is deleted can't be claimed. TIME 0 makes an entry look idle for longer than any consumer waits before it
# takes over another's.
RETRY: Final = Script("""
local outcomes = {}
local function fits(part) return #part < 20 or (#part == 20 and part <= '18446744073709551615') end
local function is_id(text)
  local ms, sequence = string.match(text, '^(%d+)%-(%d+)$')
  return ms and fits(ms) and fits(sequence)
end
-- A key of another type holds no attempts, and does not keep the group from getting its messages.
local function is_wrong_type(reply) return string.find(plain(reply.err), '^WRONGTYPE') end
local function is_own(letter)
  return letter.message and string.find(letter.group or '', '^[%w._-]+$') and is_id(letter.id or '')
end
local function attempts_of(letter) return KEYS[1] .. ':attempts:' .. letter.group end

local letters, declared, wanted = {}, {}, {}
for i = 3, #KEYS do declared[KEYS[i]] = KEYS[i] end
for i = 3, #ARGV do
  local found = redis.call('XRANGE', KEYS[2], ARGV[i], ARGV[i])[1]
  if found then
    local letter = {}
    for j = 1, #found[2], 2 do letter[found[2][j]] = found[2][j + 1] end
    letters[ARGV[i]] = letter
    if is_own(letter) and not declared[attempts_of(letter)] then wanted[#wanted + 1] = attempts_of(letter) end
  end
end
if #wanted > 0 then return {err = 'DECLARE ' .. table.concat(wanted, ' ')} end

local function retry(id)
  local letter = letters[id]
  if not letter then return 'missing' end
  if not is_own(letter) then return 'foreign' end
  local forgotten = redis.pcall('HDEL', declared[attempts_of(letter)], letter.id)
  if type(forgotten) == 'table' and not is_wrong_type(forgotten) then return {err = plain(forgotten.err)} end
  local claimed = redis.pcall(
    'XCLAIM', KEYS[1], letter.group, ARGV[2], 0, letter.id, 'TIME', 0, 'FORCE', 'JUSTID')
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
for i = 3, #ARGV do
  local outcome = retry(ARGV[i])
  if type(outcome) == 'table' then return outcome end
  outcomes[i - 2] = outcome
end
return outcomes
""")
"""Gives dead letters back to their groups.

Keys: the stream, its dead letters, and the attempts of their groups, as it asks for them. Arguments: 1 to add anew what is gone from the stream, or nothing; the consumer that holds
what is given back; then ids. Reply: the outcome of each: ``returned``, ``missing``, ``foreign``, ``no group`` or ``expired``.
"""

PURGE: Final = Script("""
local found = redis.call('XRANGE', KEYS[1], '-', ARGV[1], 'COUNT', ARGV[2])
for i = 1, #found do
  local deleted = redis.pcall('XDEL', KEYS[1], found[i][1])
  if type(deleted) == 'table' then return {err = plain(deleted.err)} end
end
return #found
""")
"""Deletes the oldest dead letters.

Key: the dead letters. Arguments: the last millisecond to delete, the most at once. Reply: how many were deleted.
"""

# One ZSCORE for each: users that were given the rights of silbo's manual may not run ZMSCORE.
HANDLED: Final = Script("""
local found = {}
for i = 1, #ARGV do
  local score = redis.pcall('ZSCORE', KEYS[1], ARGV[i])
  if type(score) == 'table' and score.err then return {err = plain(score.err)} end
  if score then found[#found + 1] = i end
end
return found
""")
"""Finds the publications that a group has handled.

Key: the group's sorted set. Arguments: digests of publications. Reply: the positions, from 1, of those that are remembered.
"""

# ZADD first: it is the command that is refused above maxmemory; after another write Redis would let it pass.
REMEMBER: Final = Script("""
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local function at(milliseconds) return string.format('%.0f', milliseconds) end
local added, score, length = {}, at(now), 0
for i = 3, #ARGV do
  added[length + 1], added[length + 2] = score, ARGV[i]
  length = length + 2
  if length == 200 or i == #ARGV then
    local reply = redis.pcall('ZADD', KEYS[1], unpack(added, 1, length))
    if type(reply) == 'table' then return {err = plain(reply.err)} end
    length = 0
  end
end
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', at(now - ARGV[1]))
redis.call('ZREMRANGEBYRANK', KEYS[1], 0, -1 - ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return 1
""")
"""Remembers publications as handled by a group.

Key: the group's sorted set. Arguments: milliseconds to keep all of them, the most to keep, then digests of publications.
"""

# -- groups -------------------------------------------------------------------------------------------------

# In hundreds: Lua's unpack has a limit of some thousands.
# The attempts are housekeeping: a key that is no hash must not keep the rest from being acknowledged.
ACK: Final = Script("""
for first = 2, #ARGV, 100 do
  local last = math.min(first + 99, #ARGV)
  redis.call('XACK', KEYS[1], ARGV[1], unpack(ARGV, first, last))
  redis.pcall('HDEL', KEYS[2], unpack(ARGV, first, last))
end
return 1
""")
"""Acknowledges entries, and forgets their attempts.

Keys: the stream, the attempts. Arguments: group, then ids.
"""

# An entry without a row in XPENDING is in nobody's hand: another consumer took it over and has done it, or the group was
# deleted. ARGV[3] is 1 if the former is impossible, as too little time has passed. An entry that is gone from the stream as
# well is not reported: nobody else can have it. Redis's count of deliveries, which silbo does not need, counts how often an
# entry was kept as the oldest: so a group's status shows a listener that hangs.
KEEP: Final = Script("""
local lost = {}
for i = 5, #ARGV do
  local id = ARGV[i]
  local row = redis.call('XPENDING', KEYS[1], ARGV[1], id, id, 1)[1]
  if row and row[2] == ARGV[2] then
    local count = row[4] + (id == ARGV[4] and 1 or 0)
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, id, 'RETRYCOUNT', count, 'JUSTID')
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
""")
"""Resets the idle time of entries that a consumer has in hand.

Key: the stream. Arguments: group, consumer, 1 to take back what nobody has in hand or nothing, the id of the oldest in hand or nothing,
then ids. Reply: the ids that another consumer has taken over, or has done.
"""

# An entry counts as idle for long enough, and stays its consumer's until another claims it. LT keeps the first time, unless the
# clock has been set back to before it.
OFFER: Final = Script("""
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', string.format('%.0f', now - ARGV[4]))
local offered = {}
for i = 5, #ARGV do
  local id, age = ARGV[i], -1
  if #redis.call('XPENDING', KEYS[1], ARGV[1], id, id, 1, ARGV[2]) > 0 then
    redis.call('ZADD', KEYS[2], 'LT', string.format('%.0f', now), id)
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, id, 'IDLE', ARGV[3], 'JUSTID')
    age = math.max(0, now - tonumber(redis.call('ZSCORE', KEYS[2], id)))
  end
  offered[#offered + 1] = age
end
redis.call('PEXPIRE', KEYS[2], ARGV[4])
return offered
""")
"""Lets other consumers claim entries at once that a consumer has in hand.

Keys: the stream, the offered. Arguments: group, consumer, milliseconds after which others claim, milliseconds to keep the offered,
then ids. Reply: for each id the milliseconds since it was first offered; -1 if the consumer does not have it.
"""

# JUSTID, because on Redis 6.2 an entry that is deleted from the stream comes without its id otherwise. Redis 7 leaves it
# out and lists it apart.
CLAIM: Final = Script(
    _COUNT_OF
    + """
local reply = redis.call('XAUTOCLAIM', KEYS[1], ARGV[1], ARGV[2], ARGV[3], ARGV[4], 'COUNT', ARGV[5], 'JUSTID')
local taken, attempts, gone = {}, {}, reply[3] or {}
for _, id in ipairs(reply[2]) do
  local entry = redis.call('XRANGE', KEYS[1], id, id)[1]
  if entry then
    taken[#taken + 1] = entry
    attempts[#taken] = count_of(KEYS[2], id)
  else
    redis.call('XACK', KEYS[1], ARGV[1], id)
    gone[#gone + 1] = id
  end
end
for _, id in ipairs(gone) do redis.pcall('HDEL', KEYS[2], id) end
local time = redis.call('TIME')
return {reply[1], taken, attempts, #gone, time[1] * 1000 + math.floor(time[2] / 1000)}
"""
)
"""Takes over entries of silent consumers.

Keys: the stream, the attempts. Arguments: group, consumer, idle milliseconds, cursor, the most at once. Reply: the next cursor,
entries, the attempts counted of each, how many other entries were gone from the stream, and Redis's time in milliseconds.
"""

# Redis shows an entry that it gave out at a time to come with the idle time 0. Such an entry stays its consumer's, and gets the
# present time; one that Redis really gave out in this millisecond has it already. What is gone from the stream is left to CLAIM,
# which tells: from Redis 7 on XCLAIM would drop it.
REDATE: Final = Script("""
local rows = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[2], '+', 100)
for _, row in ipairs(rows) do
  if row[3] == 0 and #redis.call('XRANGE', KEYS[1], row[1], row[1]) > 0 then
    redis.call('XCLAIM', KEYS[1], ARGV[1], row[2], 0, row[1], 'JUSTID')
  end
end
return rows[100] and '(' .. rows[100][1] or ''
""")
"""Lets entries be idle from now on that Redis gave out at a time to come: its clock has been set back since.

Key: the stream. Arguments: group, where to begin. Reply: where to go on, or nothing.
"""

# The number is set and not added to, so that the call can be repeated.
COUNT: Final = Script(
    _COUNT_OF
    + """
local known, noted = count_of(KEYS[2], ARGV[1])
if not ARGV[2] then return known end
if known >= tonumber(ARGV[2]) then return known end
if ARGV[4] ~= '' then noted = ' ' .. ARGV[4] end
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2] .. (noted or ''))
redis.call('PEXPIRE', KEYS[2], ARGV[3])
return tonumber(ARGV[2])
"""
)
"""Reads or raises the number of attempts of one entry.

Keys: the stream, the attempts. Arguments: id; to raise it also the new number, milliseconds to keep all attempts, and the error
of the attempt or nothing, which leaves the last one noted. Reply: the number.
"""

COUNTS: Final = Script(
    _COUNT_OF
    + """
local counts = {}
for i = 1, #ARGV do counts[i] = count_of(KEYS[1], ARGV[i]) end
return counts
"""
)
"""Reads the numbers of attempts of entries.

Key: the attempts. Arguments: ids. Reply: a number for each.
"""

BURY: Final = Script("""
if #redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1, ARGV[2]) == 0 then return 0 end
local now = redis.call('TIME')
local time = now[1] * 1000 + math.floor(now[2] / 1000)
redis.call('XADD', KEYS[3], 'MINID', '~', string.format('%.0f', math.max(0, time - ARGV[4])), '*',
  'message', ARGV[5], 'group', ARGV[1], 'stream', KEYS[1], 'id', ARGV[3], 'error', ARGV[6], 'attempts', ARGV[7],
  'app', ARGV[8], 'consumer', ARGV[9], 'time', string.format('%.0f', time))
redis.call('XACK', KEYS[1], ARGV[1], ARGV[3])
redis.pcall('HDEL', KEYS[2], ARGV[3])
redis.pcall('ZADD', KEYS[4], 'XX', 0, ARGV[3])
return 1
""")
"""Makes an entry a dead letter, and acknowledges it.

Keys: the stream, the attempts, the dead letters, the offered: a dead letter that is retried is offered anew. Arguments: group,
consumer, id, milliseconds to keep dead letters, message, error, attempts, app, the consumer's name for people. Reply: 0 if the consumer does not have the entry in hand, else 1.
"""

# XGROUP CREATE is refused above maxmemory, also for a group that exists: so that is looked at first. Redis 7 can't know how
# many entries were before a group that begins at the end; the script can.
CREATE: Final = Script(
    _MAPPING
    + _FIND_GROUP
    + """
if find_group(KEYS[1], ARGV[1]) then return 0 end
redis.call('XGROUP', 'CREATE', KEYS[1], ARGV[1], ARGV[2], 'MKSTREAM')
local stream = mapping(redis.call('XINFO', 'STREAM', KEYS[1]))
local added = stream['entries-added']
redis.pcall('HDEL', KEYS[2], ARGV[1])
if added and added > 0 and ARGV[2] == '$' then
  redis.call('XGROUP', 'SETID', KEYS[1], ARGV[1], '$', 'ENTRIESREAD', whole(added))
  redis.pcall('HSET', KEYS[2], ARGV[1], stream['last-generated-id'] .. ':' .. whole(added))
end
return 1
"""
)
"""Makes a group, and its stream if there is none.

Keys: the stream, the notes of what its groups were given. Arguments: group, start (an id, ``$`` or ``0``). Reply: 0 if the
group exists.
"""

# A group has missed nothing if it has been given everything, or if an entry that it was given is still in the stream, in
# front of the next one, or if no entry can be between the last one given and the first. Else Redis 7 knows how many it missed;
# before Redis 7, and while the count is in doubt, the age of the last one given is all that there is to go by. The group is
# set to just before the first entry, so that the gap is reported once (Redis 6.2 refuses that above maxmemory: the caller
# remembers the last id, too). Deleted single entries are not looked for.
LOOK: Final = Script(
    _MAPPING
    + _FIND_GROUP
    + _CHECK_GIVEN
    + _BEFORE
    + _SKIP
    + _LESS
    + """
local stream, group = mapping(redis.call('XINFO', 'STREAM', KEYS[1])), find_group(KEYS[1], ARGV[1])
if not group then return {0, -1, '0-0', 1} end
local added, last = stream['entries-added'], group['last-delivered-id']
local nextup = redis.call('XRANGE', KEYS[1], '(' .. last, '+', 'COUNT', 1)[1]
local first = stream['first-entry'] and stream['first-entry'][1]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local age = nextup and now - tonumber(string.match(nextup[1], '%d+')) or -1
local noted, missed = redis.pcall('HGET', KEYS[3], 'missed ' .. ARGV[1]), 0
if type(noted) == 'string' then
  redis.pcall('HDEL', KEYS[3], 'missed ' .. ARGV[1])
  missed = tonumber(noted) or -1
end
if last == '0-0' then return {missed, age, last, 1} end
local given, least = check_given(stream, group)
local known = (given or not added) and 1 or 0
if last == stream['last-generated-id'] or (first and not (nextup and nextup[1] == first)) then return {missed, age, last, known} end
local before = find_before(first, stream)
local done = redis.pcall('HGET', KEYS[3], 'acknowledged')
if type(done) ~= 'string' then done = nil end
if last == before or (done and first and not less(done, first)) then return {missed, age, last, known} end
local removed, lost = added and added - stream['length'], 0
if given and not (done and less(last, done)) then
  lost = math.max(0, removed - given)
elseif given or ((not added or removed > least) and ARGV[2] ~= '' and now - tonumber(string.match(last, '%d+')) > tonumber(ARGV[2])) then
  lost = -1
end
if lost == 0 then return {missed, age, last, known} end
skip(ARGV[1], before, removed)
if lost > 0 and missed >= 0 then missed = missed + lost else missed = -1 end
return {missed, age, last, 1}
"""
)
"""Looks for entries that the retention removed before the group was given them; notes what it was given.

Keys: the stream, the notes of what its groups were given, its retention. Arguments: group, milliseconds that entries are kept, or
nothing if the group surely has missed none. Reply: how many it has missed (-1: an unknown number), the age of the next entry in
milliseconds (-1: there is none, or no group), the last id that the group was given before the call, and 0 if Redis's count is in doubt.
"""

# A program that states no policy takes the one beside the stream. The one before it is accepted as well, so that a policy can be
# changed while programs run. Every entry below what a group has in hand, and below the last one that it was given, is acknowledged by
# that group; the last one itself stays, so that LOOK finds no gap. What the caps and the time remove may be unread: the group is set
# to just before the first entry that is left, and what it has missed is noted for LOOK. XTRIM is allowed above maxmemory. MEMORY USAGE
# counts the first 1,000 nodes of the stream, and takes the others to be as large: so the cap in bytes removes few at a time.
TRIM: Final = Script(
    _MAPPING
    + _FIND_GROUP
    + _CHECK_GIVEN
    + _BEFORE
    + _SKIP
    + _LESS
    + """
local stored = redis.pcall('HGET', KEYS[3], 'policy')
if type(stored) == 'table' then return {err = plain(stored.err)} end
if ARGV[1] ~= '' and stored ~= ARGV[1] then
  if not stored then
    redis.pcall('HSET', KEYS[3], 'policy', ARGV[1])
    stored = ARGV[1]
  elseif redis.call('HGET', KEYS[3], 'before') ~= ARGV[1] then
    return {1, stored}
  end
end
if not stored then return {0, ''} end
local function setting(name) return tonumber(string.match(stored, name .. '=(%d+)')) end
local by_need = string.find(stored, 'trim=acknowledged', 1, true)
local most, most_bytes = setting('max_messages'), setting('max_bytes')
local reply = redis.pcall('XINFO', 'STREAM', KEYS[1])
if reply.err or not (by_need or most or most_bytes) then return {0, stored} end
local stream, groups, least, deserted = mapping(reply), {}, nil, {}
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local function at(milliseconds) return whole(math.max(0, milliseconds)) .. '-0' end

for i, row in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  local group = mapping(row)
  local held = group['last-delivered-id']
  if held ~= stream['last-generated-id'] then
    local nextup = redis.call('XRANGE', KEYS[1], '(' .. held, '+', 'COUNT', 1)[1]
    group.nextup = nextup and nextup[1]
  end
  local waits = group.nextup
  local oldest = group['pending'] > 0 and redis.call('XPENDING', KEYS[1], group['name'], '-', '+', 1)[1]
  if oldest and not less(held, oldest[1]) then held, waits = oldest[1], oldest[1] end
  if not least or less(held, least) then least = held end
  groups[i] = group
  local age = waits and now - string.match(waits, '%d+') or 0
  if by_need and age > tonumber(ARGV[2]) then
    local lives = false
    for _, consumer in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], group['name'])) do
      lives = lives or mapping(consumer)['idle'] <= tonumber(ARGV[2])
    end
    if not lives then
      deserted[#deserted + 1] = group['name']
      deserted[#deserted + 1] = age
    end
  end
end

local limit, removed, more = 100000, 0, 0
local function trim(strategy, threshold, at_once)
  local gone = redis.call('XTRIM', KEYS[1], strategy, '~', threshold, 'LIMIT', at_once)
  removed = removed + gone
  return gone
end
if by_need and least then
  local young = at(now - setting('keep_at_least'))
  if less(young, least) then least = young end
  local gone = trim('MINID', least, limit)
  if gone > limit / 2 then more = 1 end
  local done = redis.pcall('HGET', KEYS[3], 'acknowledged')
  if gone > 0 and not (type(done) == 'string' and less(least, done)) then redis.pcall('HSET', KEYS[3], 'acknowledged', least) end
end
if setting('retain') and trim('MINID', at(now - setting('retain')), limit) > limit / 2 then more = 1 end
if most then
  local surplus = redis.call('XLEN', KEYS[1]) - most
  if surplus > limit then
    trim('MAXLEN', most, limit)
    more = 1
  elseif surplus > 0 then
    removed = removed + redis.call('XTRIM', KEYS[1], 'MAXLEN', '=', most)
  end
end
for turn = 1, most_bytes and 10 or 0 do
  local size, length = redis.call('MEMORY', 'USAGE', KEYS[1], 'SAMPLES', 1000), redis.call('XLEN', KEYS[1])
  if size <= most_bytes or length == 0 then break end
  local surplus = math.min(math.ceil(length * (1 - most_bytes / size)), 10000)
  if trim('MAXLEN', length - surplus, 10000) == 0 then break end
  if turn == 10 then more = 1 end
end

if removed > 0 then
  local left = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)[1]
  local first, length = left and left[1], redis.call('XLEN', KEYS[1])
  for _, group in ipairs(groups) do
    if group.nextup and not (first and not less(group.nextup, first)) then
      local given = group['last-delivered-id'] ~= '0-0' and check_given(stream, group)
      local before = stream['entries-added'] and stream['entries-added'] - length
      local missed, noted = given and before - given or -1, redis.pcall('HGET', KEYS[3], 'missed ' .. group['name'])
      if type(noted) == 'string' then missed = missed > 0 and tonumber(noted) > 0 and missed + noted or -1 end
      skip(group['name'], find_before(first, stream), before)
      redis.pcall('HSET', KEYS[3], 'missed ' .. group['name'], whole(missed))
    end
  end
end
return {0, stored, more, unpack(deserted)}
"""
)
"""Trims a stream by the policy that is kept beside it; keeps the policy there if there is none.

Keys: the stream, the notes of what its groups were given, its retention. Arguments: the policy that the program states or nothing,
milliseconds without a call after which a consumer counts as gone. Reply: 1 if the stream has another policy (then nothing was done), the
policy of the stream; 1 if more is to be removed at once; then the name and the age in milliseconds of what waits, for each group without
a consumer that holds the stream back.
"""

# The time is Redis's: after a fail-over an older mark may come back, and it is no sign of life.
SIGN: Final = Script("""
local time = redis.call('TIME')
local now = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
local found, another, other = redis.pcall('HGET', KEYS[1], ARGV[1]), 0, ''
if type(found) == 'string' and ARGV[3] ~= '' then
  local who, at = string.match(found, '^(%S+) (%d+)$')
  if who and who ~= ARGV[2] and tonumber(at) >= tonumber(ARGV[3]) then another, other = 1, who end
end
if another == 1 then
  redis.pcall('HSET', KEYS[1], '!' .. ARGV[1], now, '! ' .. ARGV[1], now .. ' ' .. ARGV[2] .. ' ' .. other)
end
local signed = redis.pcall('HSET', KEYS[1], ARGV[1], ARGV[2] .. ' ' .. now)
if type(signed) == 'table' then return {another, ARGV[3], plain(signed.err)} end
redis.call('PEXPIRE', KEYS[1], ARGV[4])
return {another, now}
""")
"""Puts a consumer's sign of life under its name; under ``!`` and the name, the time at which a second consumer was last noticed;
under ``!``, a space and the name, that time and both of them.

Key: the signs of the group. Arguments: consumer, who this one is, the time of its last sign or nothing, milliseconds to keep all
signs. Reply: 1 if another consumer has put its own sign there since, and the time of the sign; the error if it could not be
put there.
"""

# Redis 6.2 refuses XGROUP DELCONSUMER above maxmemory: then they are removed later.
TIDY: Final = Script(
    _MAPPING
    + """
local removed = 0
for _, row in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  local one = mapping(row)
  if one['pending'] == 0 and one['idle'] > tonumber(ARGV[3]) and one['name'] ~= ARGV[2] then
    local gone = redis.pcall('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], one['name'])
    if type(gone) == 'table' then break end
    redis.pcall('HDEL', KEYS[2], one['name'], '!' .. one['name'], '! ' .. one['name'])
    removed = removed + 1
  end
end
return removed
"""
)
"""Removes silent consumers without entries in hand.

Keys: the stream, the signs of the group. Arguments: group, consumer (never removed), idle milliseconds. Reply: how many were removed.
"""

LEAVE: Final = Script(
    _MAPPING
    + _FIND_GROUP
    + _CHECK_GIVEN
    + """
local rows = redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 1000, ARGV[2])
for _, row in ipairs(rows) do
  redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, row[1], 'IDLE', ARGV[3], 'JUSTID')
end
local sign = redis.pcall('HGET', KEYS[3], ARGV[2])
if type(sign) == 'string' and string.match(sign, '^%S+') == ARGV[5] then redis.pcall('HDEL', KEYS[3], ARGV[2]) end
if #rows == 0 and ARGV[4] == '1' then redis.pcall('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2]) end
local group = find_group(KEYS[1], ARGV[1])
if group and group['last-delivered-id'] ~= '0-0' then
  check_given(mapping(redis.call('XINFO', 'STREAM', KEYS[1])), group)
end
return #rows
"""
)
"""Lets other consumers claim at once what a consumer has in hand; notes what the group was given.

Keys: the stream, the notes of what its groups were given, the signs of the group. Arguments: group, consumer, milliseconds after
which others claim, 1 to remove the consumer if it has nothing in hand, who this consumer is. Reply: how many entries it has in
hand, at most 1000.
"""

COUNT_AFTER: Final = Script("""
local found = redis.call('XRANGE', KEYS[1], '(' .. ARGV[1], ARGV[3] or '+', 'COUNT', ARGV[2])
return {#found, #found > 0 and found[#found][1] or ARGV[1]}
""")
"""Counts entries, a page at a time.

Key: the stream. Arguments: the id after which to begin, the most entries of the page, the last id or nothing. Reply:
their number, the last one's id.
"""

# -- shards ---------------------------------------------------------------------------------------------------

# A stream that a group alone has made, before the first message, gives way to shards. Its groups are made on the shards first, and then
# they end here: so it is done again by the next program if this one ends in between.
FIX_SHARDS: Final = Script(
    _MAPPING
    + """
local fixed, reply = redis.call('HGET', KEYS[1], 'shards'), {}
local stream = KEYS[2] and redis.pcall('XINFO', 'STREAM', KEYS[2]) or {err = ''}
if not stream.err then
  if mapping(stream)['last-generated-id'] ~= '0-0' then return {fixed or '1'} end
  for _, row in ipairs(redis.call('XINFO', 'GROUPS', KEYS[2])) do
    local group = mapping(row)
    reply[#reply + 1] = group['name']
    reply[#reply + 1] = group['last-delivered-id']
  end
end
if not fixed then
  redis.call('HSET', KEYS[1], 'shards', ARGV[1])
  fixed = ARGV[1]
end
return {fixed, unpack(reply)}
"""
)
"""Fixes the number of shards of an address, unless it is fixed.

Keys: the hash beside a shard; or the hash beside the stream that the address has without shards, and that stream. Argument: the
number. Reply: the number that is fixed now: ``1`` if there is a stream without shards, ``0`` while the number is being changed; then the
groups of such a stream to which nothing was ever added, and the last id that each was given.
"""

GIVE_WAY: Final = Script(
    _MAPPING
    + """
local stream = redis.pcall('XINFO', 'STREAM', KEYS[1])
if stream.err or mapping(stream)['last-generated-id'] ~= '0-0' then return 0 end
for _, row in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  redis.call('XGROUP', 'DESTROY', KEYS[1], mapping(row)['name'])
end
redis.pcall('DEL', KEYS[1])
return 1
"""
)
"""Ends the groups of a stream to which nothing was ever added, and the stream if the user may.

Key: the stream. Reply: 0 if there is no such stream.
"""

# The times are Redis's. A time to come was written before its clock was set back: it counts as now, or a member that was killed
# would be one for as long as the clock needs to catch up.
BEAT: Final = Script("""
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local function text(number) return string.format('%.0f', number) end
redis.call('ZADD', KEYS[1], text(now), ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', text(now - ARGV[2]))
local rows, members = redis.call('ZRANGE', KEYS[1], 0, -1, 'WITHSCORES'), {}
for i = 1, #rows, 2 do
  local age = now - rows[i + 1]
  if age < 0 then
    redis.call('ZADD', KEYS[1], text(now), rows[i])
    age = 0
  end
  members[i], members[i + 1] = rows[i], age
end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return {redis.call('HGET', KEYS[2], 'shards') or '', members}
""")
"""Notes that a member of a group lives, and forgets those that were silent.

Keys: the members of the group, the hash with the number of shards. Arguments: member, milliseconds of silence after which one is
forgotten. Reply: the number of shards or nothing; then each member and the milliseconds since its last sign.
"""

# An epoch is no smaller than Redis's clock in milliseconds, so that it grows also after Redis has lost its data, or was rolled
# back to before the last epoch. A lease that would end later than one taken now was given by a clock that was ahead.
TAKE: Final = Script("""
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local lease = redis.call('HMGET', KEYS[1], 'owner', 'epoch', 'until')
local ends = tonumber(lease[3] or 0)
if lease[1] ~= ARGV[1] and ends > now then
  if ends > now + ARGV[2] then
    ends = now + ARGV[2]
    redis.call('HSET', KEYS[1], 'until', string.format('%.0f', ends))
  end
  return {0, ends - now}
end
local epoch = math.max(tonumber(lease[2] or 0) + 1, now)
redis.call('HSET', KEYS[1], 'owner', ARGV[1], 'epoch', string.format('%.0f', epoch),
  'until', string.format('%.0f', now + ARGV[2]))
return {1, epoch}
""")
"""Takes the lease of a shard, in a new epoch, unless another member's runs.

Key: the lease. Arguments: member, milliseconds of the lease. Reply: 1 and the epoch; or 0 and the milliseconds until the other
lease ends.
"""

# A renewal may be carried out late, after the release, over another connection: then nobody could take the shard for a whole lease.
RENEW: Final = Script("""
local lease = redis.call('HMGET', KEYS[1], 'owner', 'epoch', 'until')
if lease[1] ~= ARGV[1] or lease[2] ~= ARGV[2] or lease[3] == '0' then return 0 end
local time = redis.call('TIME')
redis.call('HSET', KEYS[1], 'until', string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000) + ARGV[3]))
return 1
""")
"""Renews the lease of a shard, also one that is over if nobody has taken it, but none that was released.

Key: the lease. Arguments: member, epoch, milliseconds of the lease. Reply: 0 if it was released or has another owner or epoch by now, else 1.
"""

RELEASE: Final = Script("""
local lease = redis.call('HMGET', KEYS[1], 'owner', 'epoch')
if lease[1] ~= ARGV[1] or lease[2] ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[1], 'until', '0')
return 1
""")
"""Ends the lease of a shard, so that another member can take it at once. The epoch stays.

Key: the lease. Arguments: member, epoch. Reply: 0 if it has another owner or epoch by now, else 1.
"""

ADOPT: Final = Script(
    _COUNT_OF
    + _MAPPING
    + """
local taken, attempts, gone = {}, {}, 0
for _, row in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  local other = mapping(row)
  local room = tonumber(ARGV[5]) - #taken
  if other['name'] ~= ARGV[2] and other['pending'] > 0 and room > 0 then
    for _, pending in ipairs(redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', room, other['name'])) do
      local id = pending[1]
      local entry = redis.call('XRANGE', KEYS[1], id, id)[1]
      if entry then
        redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, id, 'JUSTID')
        taken[#taken + 1] = entry
        attempts[#taken] = count_of(KEYS[2], id)
      else
        redis.call('XACK', KEYS[1], ARGV[1], id)
        redis.pcall('HDEL', KEYS[2], id)
        gone = gone + 1
      end
    end
  end
end
local time = redis.call('TIME')
return {'0-0', taken, attempts, gone, time[1] * 1000 + math.floor(time[2] / 1000)}
"""
)
"""Takes over the entries of all other consumers at once: a shard has one that reads, and others are left from before, or were made
by hand, or hold the dead letters that are tried again.

Keys, arguments and reply are those of CLAIM; the idle time and the cursor are not looked at.
"""

# A read whose reply was lost may be carried out late, after its reader has connected anew and looked for what it was given: then the
# group was given more than the reader knows.
READ: Final = Script(
    _MAPPING
    + _FIND_GROUP
    + """
local group = find_group(KEYS[1], ARGV[1])
local last = group and group['last-delivered-id'] or ''
if ARGV[5] and group and last ~= ARGV[5] then return {last, false} end
local reply = redis.call('XREADGROUP', 'GROUP', ARGV[1], ARGV[2], 'COUNT', ARGV[3], 'STREAMS', KEYS[1], ARGV[4])
return {last, reply}
"""
)
"""Reads entries for a group, and does not wait: in a script that can check the lease.

Key: the stream. Arguments: group, consumer, the most entries, ``>`` or an id; with ``>`` also the last id that the group was given, as
far as its reader knows: if it is another, nothing is read. Reply: the last id that the group had been given, and the reply of XREADGROUP.
"""
