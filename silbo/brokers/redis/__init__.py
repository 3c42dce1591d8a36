"""Redis as a broker: Streams keep what was published, Pub/Sub does not.

``client`` is the program's own ``redis.asyncio.Redis``, however it was made: URL, TLS, ACL user, unix socket, Sentinel.
silbo opens connections of its own from the client's settings and closes only those: one for each broker that publishes,
another if the broker is behind an outbox, two for each consumer of Streams and one for each of Pub/Sub.

A user that may do no more than silbo needs, with the default prefix::

    ACL SETUSER streams on >password resetkeys ~silbo:* resetchannels -@all
        +ping +eval +evalsha +time +xadd +xgroup +xinfo +xread +xreadgroup +xack +xautoclaim +xpending
        +hget +hmget +hset +hdel +xlen +xrange +xrevrange +xclaim +xdel
        +zscore +zadd +zremrangebyscore +zremrangebyrank +zrange +zrem +pexpire +type +xtrim +memory|usage

    ACL SETUSER pubsub on >password resetkeys resetchannels &silbo:* -@all
        +ping +eval +evalsha +publish +subscribe +psubscribe

    ACL SETUSER operator on >password resetkeys ~silbo:* resetchannels &silbo:* -@all
        +ping +eval +evalsha +time +type +scan +xinfo +xlen +xrange +xrevrange +xpending +xread
        +hget +hmget +zscore +subscribe +psubscribe +info +config|get +memory|usage +acl|whoami +acl|dryrun

(``operator`` is for ``silbo groups``, ``why``, ``tail``, ``top`` and ``doctor``, which write nothing. Each in one line; another ``db`` than 0 needs ``+select`` too, a ``client_name`` ``+client|setname``, and Diator's
format ``&python_diator_channel:*``). Redis 6.2 or later, Valkey; on Redis Cluster
``client`` is a ``redis.asyncio.RedisCluster``, there are as many connections as nodes and streams, and the users need
``+cluster|slots +asking`` (``operator`` also ``+cluster|info``; sharded channels ``+spublish +ssubscribe``).
"""

from silbo.brokers.redis.dead_letters import DeadLetter, DeadLetters, Retried
from silbo.brokers.redis.inbox import RedisInbox
from silbo.brokers.redis.pubsub import RedisPubSub
from silbo.brokers.redis.retention import RetentionPolicy
from silbo.brokers.redis.streams import RedisStreams

__all__ = ["DeadLetter", "DeadLetters", "RedisInbox", "RedisPubSub", "RedisStreams", "RetentionPolicy", "Retried"]
