"""A broker inside one process: groups, acknowledgement and redelivery like Redis Streams, and no server.

What is published crosses bytes, so a program that works here works across processes too. It is gone with the process.
"""

from silbo.brokers.memory.broker import MemoryBroker
from silbo.brokers.memory.groups import DeadLetter

__all__ = ["DeadLetter", "MemoryBroker"]
