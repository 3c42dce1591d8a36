"""The simplest container that fits the protocol, for tests that hold for all containers."""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any


class SimpleScope:
    """A scope: makes each class once, and knows when it is over."""

    def __init__(self, container: SimpleContainer) -> None:
        self.container = container
        self.made: dict[type, Any] = {}
        self.closed = False
        self.error: BaseException | None = None

    async def resolve(self, cls: type[Any], /) -> Any:
        assert not self.closed
        self.container.asked.append(cls)
        if cls not in self.made or cls in self.container.transient:
            made = self.container.factories.get(cls, cls)()
            self.made[cls] = await made if inspect.isawaitable(made) else made
        return self.made[cls]


class SimpleContainer:
    """A container."""

    def __init__(self) -> None:
        self.factories: dict[type, Callable[[], Any]] = {}
        self.transient: set[type] = set()
        self.asked: list[type] = []
        self.scopes: list[SimpleScope] = []
        self.closing: Callable[[], Awaitable[object]] | None = None

    @asynccontextmanager
    async def scope(self) -> AsyncGenerator[SimpleScope]:
        opened = SimpleScope(self)
        self.scopes.append(opened)
        try:
            yield opened
        except BaseException as error:
            opened.error = error
            raise
        finally:
            opened.closed = True
            if self.closing is not None:
                await self.closing()
