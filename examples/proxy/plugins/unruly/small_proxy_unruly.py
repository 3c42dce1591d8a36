"""A plugin that misbehaves: it does what the header `x-mischief` of a request asks for, at every extension point.

`raise`, `hang` and `block`, or `half`: it fails after the first half of a change. `raise@proxy.admit` does it there alone.
"""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from small_proxy.events import ADMIT, REQUEST, Admission, ProxyRequest

from silbo import AsyncEventDispatcher, Plugin

SECONDS_OF_BLOCKING = 0.6


async def misbehave(event: Admission | ProxyRequest) -> None:
    """Do what the request asks for."""
    mischief, _, place = event.headers.get("x-mischief", "").partition("@")
    if place not in {"", event.name}:
        return
    if mischief == "raise":
        raise RuntimeError("unruly, as asked")
    if mischief == "hang":
        print("unruly hangs", flush=True)
        await asyncio.Event().wait()
    if mischief == "block":
        time.sleep(SECONDS_OF_BLOCKING)  # noqa: ASYNC251  # that is the mischief
    if mischief == "half":
        event.path = "/half-made"
        raise RuntimeError("unruly in the middle of a change")


@asynccontextmanager
async def unruly(dispatcher: AsyncEventDispatcher) -> AsyncGenerator[None]:
    """Misbehave as long as it is loaded."""
    dispatcher.add_listener(ADMIT, misbehave)
    dispatcher.add_listener(REQUEST, misbehave)
    yield


plugin = Plugin(unruly, name="unruly")
