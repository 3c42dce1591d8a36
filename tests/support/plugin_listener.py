"""One dispatch to one listener of a plugin."""

from __future__ import annotations

from typing import Any

from silbo import AsyncEventDispatcher
from silbo.dispatch.on_loop import OnLoop
from silbo.dispatch.owner import Owner


async def run_as(plugin: str, on_loop: OnLoop, listener: Any, *, container: Any = None) -> None:
    """Dispatch an event to a listener of a plugin, which marks its steps on ``on_loop``."""
    dispatcher = AsyncEventDispatcher(container=container)
    owner = Owner(
        plugin,
        policy=None,
        place=dispatcher._listeners.next_place(),
        on_loop=on_loop,
        report=lambda *_, **__: None,
    )
    with dispatcher._listeners.adding_for(owner):
        dispatcher.add_listener("checked", listener)
    await dispatcher.adispatch("checked")
