"""The HARP page's components, in a rodi container with silbo's dispatcher."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import rodi

import silbo
from examples.harp_page import MY_EVENT, MyEventEmittingService, MyEventListener
from silbo.containers.rodi import register_dispatcher

ROOT = Path(__file__).resolve().parents[2]


def test_the_example_runs() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "examples.harp_page"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "{'foo': 'bar'}\n", "")


async def test_service_and_listener_get_the_containers_dispatcher_and_hear_each_other(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Both only name `IAsyncEventDispatcher` in their constructors."""
    container = rodi.Container()
    dispatcher = register_dispatcher(container)
    container.add_singleton(MyEventEmittingService)
    container.add_singleton(MyEventListener)

    listener = container.resolve(MyEventListener)
    service = container.resolve(MyEventEmittingService)
    assert listener.dispatcher is service.dispatcher is dispatcher
    assert isinstance(dispatcher, silbo.AsyncEventDispatcher)

    await service.handle()
    assert capsys.readouterr().out == "{'foo': 'bar'}\n"

    dispatcher.remove_listener(MY_EVENT, listener.handle)
    await service.handle()
    assert capsys.readouterr().out == ""
