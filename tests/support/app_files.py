"""Programs of a user's, as files in a folder, for commands and functions that are given ``module:attribute``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import dedent

from tests.support.snippets import forget_modules

EVENTS = """
from dataclasses import dataclass

from silbo import DomainEvent, EventName, NotificationEvent


@dataclass
class OrderPaid(NotificationEvent):
    order: int
    tags: list[str] | None = None


@dataclass
class CartEmptied(DomainEvent):
    cart: str


ORDER_PAID = EventName("order.paid", OrderPaid, key="order", description="an order was paid")
CART_EMPTIED = EventName("cart.emptied", CartEmptied, version=2, upcast={1: dict}, deprecated="say cart.left")
"""

WEB = """
from contextlib import asynccontextmanager
from dataclasses import dataclass

from shop import events
from silbo import AsyncEventDispatcher, Bridge, Budget, EventName, Plugin, Plugins, Policy
from silbo.brokers.memory import MemoryBroker

dispatcher = AsyncEventDispatcher(names=events, unknown="allow")


@dispatcher.listen("order.*", priority=5, once=True)
async def log_order(event) -> None: ...


@dispatcher.listen(events.ORDER_PAID, priority=-10, timeout=5)
async def invoice(event) -> None: ...


@dispatcher.listen("order.payed", on_error="collect")
async def misspelt(event) -> None: ...


dispatcher.add_subscriber(Bridge(MemoryBroker(app="shop")))


def family():
    other = AsyncEventDispatcher(names=[EventName("order.sent")], unknown="allow")
    other.add_listener("order.send", misspelt)
    return other


@dataclass
class AuditSettings:
    token: str = "secret"


def audit(dispatcher, settings) -> None:
    async def note(event) -> None: ...

    dispatcher.add_listener(events.ORDER_PAID, note)


@asynccontextmanager
async def opened():
    async with Plugins(dispatcher, policy=Policy(timeout=3, budget=Budget(failures=2))) as plugins:
        await plugins.load(Plugin(audit, version="1.2", settings=AuditSettings, host_version=None))
        yield plugins


@asynccontextmanager
async def switched_off():
    async with opened() as plugins:
        plugins.switch_off("audit", "too slow")
        yield dispatcher
"""

SHOP = {"shop/__init__.py": "", "shop/events.py": EVENTS, "shop/web.py": WEB}


def write(folder: Path, files: dict[str, str]) -> Path:
    """Write files into a folder, by their path; return the folder."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text))
    return folder


@contextmanager
def imports_undone(folder: Path) -> Iterator[None]:
    """Take back what the block imports from a folder, and what it does to ``sys.path``."""
    path, modules = list(sys.path), set(sys.modules)
    try:
        yield
    finally:
        forget_modules(folder, set(sys.modules) - modules)
        sys.path[:] = path
        for name in [name for name in sys.path_importer_cache if name.startswith(str(folder))]:
            del sys.path_importer_cache[name]
