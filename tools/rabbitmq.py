"""A real RabbitMQ for the tests, gone when its owner is gone; started from the programs that this machine has.

    with RabbitMQServer() as server:            # a server of one's own, on a free port
        connection = await aio_pika.connect_robust(server.url)
        server.kill(); server.restart()         # a crash on demand

    python -m tools.rabbitmq                    # one in the foreground, until Ctrl-C

How it runs, and that nothing stays behind: tools/server.py. Cookie and port mapper (epmd) are its own. As root it runs as
another user.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tools.server import Server, ServerFailed, free_port, in_foreground
from tools.supervisor import Program

__all__ = ["RabbitMQNotFound", "RabbitMQServer", "find_rabbitmq"]

INSTALL: Final = "install it: sudo apt-get install rabbitmq-server (Debian, Ubuntu), brew install rabbitmq (macOS)"


class RabbitMQNotFound(ServerFailed):
    """No RabbitMQ to run; the text says what to install."""


def find_rabbitmq() -> Path:
    """The script `rabbitmq-server`: Debian's own one for any user, Homebrew's, one on the PATH.

    Raises:
        RabbitMQNotFound: There is none, or no Erlang.
    """
    for script in _scripts():
        if script.exists() and shutil.which("epmd"):
            return script
    raise RabbitMQNotFound(f"No RabbitMQ server (rabbitmq-server, and Erlang's epmd) found here; {INSTALL}")


def _scripts() -> Iterator[Path]:
    yield Path("/usr/lib/rabbitmq/bin/rabbitmq-server")  # the one on Debian's PATH is for root and rabbitmq alone
    for cellar in ("/opt/homebrew/opt", "/usr/local/opt"):
        yield Path(cellar, "rabbitmq/sbin/rabbitmq-server")
    if found := shutil.which("rabbitmq-server"):
        yield Path(found)


class RabbitMQServer(Server):
    """A RabbitMQ of one's own, on 127.0.0.1. Entering the `with` starts it; leaving ends it and drops its data."""

    users = ("rabbitmq", "nobody")

    @property
    def url(self) -> str:
        """For `aio_pika.connect_robust`; the same before and after a `restart()`."""
        return f"amqp://guest:guest@127.0.0.1:{self._port}/"

    def _program(self) -> Program:
        script, folder, mapper = find_rabbitmq(), self.folder, free_port()
        (folder / "plugins").write_text("[].\n")
        settings = {
            "HOME": folder,  # the cookie
            "ERL_EPMD_PORT": mapper,
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": "silbo@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": self._port,
            "RABBITMQ_DIST_PORT": free_port(),
            "RABBITMQ_MNESIA_BASE": folder / "data",
            "RABBITMQ_LOG_BASE": folder / "log",
            "RABBITMQ_CONFIG_FILE": folder / "rabbitmq",
            "RABBITMQ_CONF_ENV_FILE": folder / "none",
            "RABBITMQ_ENABLED_PLUGINS_FILE": folder / "plugins",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 2:2 -kernel inet_dist_use_interface {127,0,0,1}",
        }
        foreign = [name for name in os.environ if name.startswith(("RABBITMQ_", "ERL_"))]
        environment = [f"-u{name}" for name in foreign] + [f"{name}={value}" for name, value in settings.items()]
        both = f"epmd -address 127.0.0.1 -port {mapper} & {shlex.quote(str(script))}; kill $!"
        return Program(
            name="RabbitMQ",
            command=["env", *environment, "sh", "-c", both],
            address=self._port,
            greeting="AMQP\0\0\x09\x01",
            answers=["\1"],  # a method's frame: connection.start
        )


def main() -> int | str:
    """Run one server in the foreground."""
    argparse.ArgumentParser(
        prog="python -m tools.rabbitmq",
        description="Start a RabbitMQ for development, print its URL, and end it with Ctrl-C. Its data are gone then.",
    ).parse_args()
    return in_foreground(RabbitMQServer())


if __name__ == "__main__":
    sys.exit(main())
