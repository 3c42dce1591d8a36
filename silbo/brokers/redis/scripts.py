"""What runs inside Redis: one call for a whole batch."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha1
from typing import Final

from silbo.brokers.redis.connection import packed

__all__ = ["ADD", "PUBLISH", "Script"]

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

_PUBLISH: Final = """
-- ARGV: channel, message, channel, message, ...
for i = 1, #ARGV, 2 do
  check((i + 1) / 2, redis.pcall('PUBLISH', ARGV[i], ARGV[i + 1]))
end
return result(#ARGV / 2)
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
PUBLISH: Final = Script(_PUBLISH)
"""No key. Arguments: channel and message, again and again."""
