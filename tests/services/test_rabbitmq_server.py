"""The launcher: with a killed owner goes all that a RabbitMQ consists of."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools import rabbitmq
from tools.rabbitmq import RabbitMQServer
from tools.server import ROOT, free_port

pytestmark = pytest.mark.rabbitmq

OWNER = """
import time
from tools.rabbitmq import RabbitMQServer
server = RabbitMQServer()
server.start()
print(server.pid, server.folder, flush=True)
time.sleep(600)
"""


def group(leader: int) -> list[str]:
    """What runs in the leader's group of processes."""
    told = subprocess.run(["ps", "-A", "-o", "pgid=,stat=,comm="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(maxsplit=2) for line in told.splitlines()]
    return [name for number, state, name in rows if int(number) == leader and not state.startswith("Z")]


def test_server_mapper_and_folder_go_with_a_killed_owner() -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER], cwd=ROOT, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        told, folder = owner.stdout.readline().split()
        running = " ".join(group(int(told)))
        assert "epmd" in running
        assert "beam" in running
        owner.kill()
    deadline = time.monotonic() + 10
    while group(int(told)) or Path(folder).exists():
        assert time.monotonic() < deadline, "still there"
        time.sleep(0.05)


def test_port_between_nodes_that_another_took_is_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as another:
        ports = iter([free_port(), int(another.getsockname()[1])])
        monkeypatch.setattr(rabbitmq, "free_port", lambda: next(ports, 0) or free_port())
        with RabbitMQServer() as server:
            assert server.pid
    assert next(ports, None) is None
