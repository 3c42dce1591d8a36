"""The part that all programs share: read the settings, report when ready, end when the starter ends.

A program ends when its standard input ends. Its starter closes a pipe to end it. When the starter is killed, the
system closes that pipe. So no program is left behind.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

SECONDS_TO_END = 5.0


@dataclass(frozen=True)
class Settings:
    """The URL of Redis, the prefix of the keys and channels there, and the folder for files."""

    redis_url: str
    prefix: str
    folder: Path

    @classmethod
    def from_environment(cls) -> "Settings":
        """Read the environment, not the command line: a URL may contain a password, and `ps` shows command lines."""
        if not (redis_url := os.environ.get("SILBO_REDIS_URL")):
            sys.exit("Set SILBO_REDIS_URL to say where Redis is, for example redis://localhost:6379/3")
        prefix, folder = (
            os.environ.get("MEETINGS_PREFIX", "meetings"),
            os.environ.get("MEETINGS_FOLDER", "meetings-data"),
        )
        # Not its parents: when those are gone, whoever started this is gone with all of it, and nothing is to come back.
        Path(folder).mkdir(exist_ok=True)
        return cls(redis_url, prefix, Path(folder))


def ready(**facts: object) -> None:
    """Print the first line of output, which tells the starter that the program is ready."""
    with suppress(BrokenPipeError):  # it is gone already
        print(json.dumps(facts), flush=True)


def when_input_ends(stop: Callable[[], object]) -> None:
    """Call `stop` (in another thread) when standard input ends; end the process if it then goes on too long."""

    def watch() -> None:
        while os.read(0, 1024):
            pass
        stop()
        time.sleep(SECONDS_TO_END)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def serve(app: Callable[..., object]) -> None:
    """Serve an ASGI application on a free port of this machine."""
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready(url=f"http://127.0.0.1:{port}")

    config = uvicorn.Config(app, lifespan="on", log_level="warning", access_log=False, timeout_graceful_shutdown=3)
    server = Server(config)
    when_input_ends(lambda: setattr(server, "should_exit", True))
    with socket.create_server(("127.0.0.1", 0)) as listening, suppress(KeyboardInterrupt):
        port = listening.getsockname()[1]
        server.run(sockets=[listening])
