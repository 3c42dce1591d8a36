"""A real RabbitMQ for the tests, gone when its owner is gone; started from the programs that this machine has.

    with RabbitMQServer() as server:            # a server of one's own, on a free port
        connection = await aio_pika.connect_robust(server.url)
        server.kill(); server.restart()         # a crash on demand

    python -m tools.rabbitmq                    # one in the foreground, until Ctrl-C

Data, log, cookie and the port mapper (epmd) are its own, in a temporary folder. A supervisor process holds a pipe to the
owner: when the owner ends, even by `kill -9`, the supervisor ends the server and removes the folder. As root it runs as
another user.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Self

__all__ = ["RabbitMQFailed", "RabbitMQNotFound", "RabbitMQServer", "find_rabbitmq"]

ROOT: Final = Path(__file__).resolve().parent.parent
START_SECONDS: Final = 60.0
INSTALL: Final = "install it: sudo apt-get install rabbitmq-server (Debian, Ubuntu), brew install rabbitmq (macOS)"


class RabbitMQNotFound(RuntimeError):
    """No RabbitMQ to run; the text says what to install."""


class RabbitMQFailed(RuntimeError):
    """The server did not start, or was asked for what cannot be done; the text says why."""


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


class RabbitMQServer:
    """A RabbitMQ of one's own, on 127.0.0.1. Entering the `with` starts it; leaving ends it and drops its data."""

    def __init__(self) -> None:
        self._supervisor: subprocess.Popen[str] | None = None
        self._folder: Path | None = None
        self._port = 0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def folder(self) -> Path:
        """Where data and log are, until `stop()`."""
        if self._folder is None:
            raise RabbitMQFailed("the server is not running: use it inside its `with`, or call start()")
        return self._folder

    @property
    def url(self) -> str:
        """For `aio_pika.connect_robust`; the same before and after a `restart()`."""
        return f"amqp://guest:guest@127.0.0.1:{self._port}/"

    def start(self) -> None:
        """Start one; returns when it answers."""
        if self._supervisor is not None:
            raise RabbitMQFailed("the server is started already; after kill() it is restart()")
        script = find_rabbitmq()
        self._folder = Path(tempfile.mkdtemp(prefix="silbo-rabbit-", dir="/tmp"))  # short, and open to another user
        self._port = _free_port()
        command = [sys.executable, "-S", "-E", "-m", "tools.rabbitmq", "--supervise", str(self._folder), str(script)]
        self._supervisor = subprocess.Popen(
            [*command, str(self._port)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the owner, who ends us in good order
        )
        try:
            self._ask("start")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End it and remove its folder. May be called twice."""
        supervisor, self._supervisor, self._folder = self._supervisor, None, None
        if supervisor is None:
            return
        assert supervisor.stdin
        assert supervisor.stdout
        with contextlib.suppress(BrokenPipeError):
            supervisor.stdin.close()
        supervisor.wait()
        supervisor.stdout.close()

    def kill(self) -> None:
        """End all its processes, as a crash would, and return when they are gone. The folder stays."""
        self._ask("kill")

    def restart(self) -> None:
        """Start it again on the same address and data; killed first if it still runs."""
        self.kill()
        self._ask("start")

    def pause(self) -> None:
        """Freeze all its processes: connections stay open, nothing is answered (SIGSTOP)."""
        self._ask("pause")

    def resume(self) -> None:
        """End a `pause()`."""
        self._ask("resume")

    def _ask(self, order: str) -> None:
        supervisor = self._supervisor
        if supervisor is None:
            raise RabbitMQFailed("the server is not running: use it inside its `with`, or call start()")
        assert supervisor.stdin
        assert supervisor.stdout
        with contextlib.suppress(BrokenPipeError):
            supervisor.stdin.write(order + "\n")
            supervisor.stdin.flush()
        answer = supervisor.stdout.readline()
        if not answer:
            raise RabbitMQFailed("the supervisor of RabbitMQ is gone")
        if failed := json.loads(answer):
            raise RabbitMQFailed(f"RabbitMQ did not start:\n{failed}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# The supervisor: a process of its own, with nothing but the standard library.


class _Server:
    """The server and its port mapper, as their supervisor sees them."""

    def __init__(self, folder: Path, script: str, port: int) -> None:
        self.folder, self.script, self.port = folder, script, port
        self.mapper: subprocess.Popen[Any] | None = None
        self.process: subprocess.Popen[Any] | None = None
        self.user: dict[str, Any] = {}
        if os.geteuid() == 0:
            user = _ordinary_user()
            self.user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
            os.chown(folder, user.pw_uid, user.pw_gid)
        (folder / "plugins").write_text("[].\n")
        self.mapper_port = _free_port()
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("RABBITMQ_", "ERL_"))},
            "HOME": str(folder),  # the cookie
            "ERL_EPMD_PORT": str(self.mapper_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": "silbo@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(port),
            "RABBITMQ_DIST_PORT": str(_free_port()),
            "RABBITMQ_MNESIA_BASE": str(folder / "data"),
            "RABBITMQ_LOG_BASE": str(folder / "log"),
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq"),
            "RABBITMQ_CONF_ENV_FILE": str(folder / "none"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 2:2 -kernel inet_dist_use_interface {127,0,0,1}",
        }

    def start(self) -> str | None:
        """None when it answers, else what went wrong."""
        if self.mapper is None:
            self.mapper = self._run("epmd", "-address", "127.0.0.1", "-port", str(self.mapper_port))
        self.process = server = self._run(self.script)
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and server.poll() is None:
            if self._answers():
                return None
            time.sleep(0.05)
        return "\n".join((self.folder / "output").read_text(errors="replace").splitlines()[-30:]) or "no answer"

    def _run(self, *command: str) -> subprocess.Popen[Any]:
        with (self.folder / "output").open("ab") as output:
            return subprocess.Popen(
                command,
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # the script's children are in its group
                **self.user,
            )

    def signal(self, sign: signal.Signals) -> None:
        """Send it to all processes of the server."""
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, sign)

    def kill(self) -> None:
        """End it, and wait until it is gone."""
        if self.process is not None:
            self.signal(signal.SIGKILL)
            self.process.wait()
            while self._is_held():  # the script is gone, the machine that it ran may take a moment
                time.sleep(0.01)

    def end(self) -> None:
        """End it and its port mapper, and remove their folder."""
        self.kill()
        if self.mapper is not None:
            self.mapper.kill()
            self.mapper.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _is_held(self) -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", self.port)) == 0

    def _answers(self) -> bool:
        """Whether it takes clients: the answer to AMQP's greeting."""
        with socket.socket() as client, contextlib.suppress(OSError):
            client.settimeout(1.0)
            client.connect(("127.0.0.1", self.port))
            client.sendall(b"AMQP\0\0\x09\x01")
            return client.recv(1) == b"\1"  # a method's frame: connection.start
        return False


def _ordinary_user() -> pwd.struct_passwd:
    for name in ("rabbitmq", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise SystemExit("no user 'rabbitmq' or 'nobody' to run RabbitMQ as")


def _supervise(server: _Server) -> None:
    """Serve the owner's orders on stdin, one JSON line each, until the owner closes it or is gone."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        for order in sys.stdin:
            failed = None
            if order == "start\n":
                failed = server.start()
            elif order == "kill\n":
                server.kill()
            elif order == "pause\n":
                server.signal(signal.SIGSTOP)
            elif order == "resume\n":
                server.signal(signal.SIGCONT)
            with contextlib.suppress(BrokenPipeError):
                print(json.dumps(failed), flush=True)
    finally:
        server.end()


def main() -> int | str:
    """Run one server in the foreground."""
    argparse.ArgumentParser(
        prog="python -m tools.rabbitmq",
        description="Start a RabbitMQ for development, print its URL, and end it with Ctrl-C. Its data are gone then.",
    ).parse_args()
    try:
        with RabbitMQServer() as server:
            print(server.url, flush=True)
            ends = {signal.SIGINT, signal.SIGTERM}
            signal.pthread_sigmask(signal.SIG_BLOCK, ends)
            signal.sigwait(ends)
    except (RabbitMQNotFound, RabbitMQFailed) as error:
        return str(error)
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--supervise"]:
        _supervise(_Server(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])))
    else:
        sys.exit(main())
