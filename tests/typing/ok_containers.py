"""Listener classes and containers type-check. Read by mypy and pyright, never run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import assert_type

import dependency_injector.containers
import di
import dishka
import rodi

import silbo.containers.dependency_injector
import silbo.containers.di
import silbo.containers.rodi
from silbo import AsyncEventDispatcher, DomainEvent, EventName
from silbo.containers.dependency_injector import DependencyInjectorContainer
from silbo.containers.di import DIContainer
from silbo.containers.dishka import DishkaContainer, dispatcher_provider
from silbo.containers.rodi import RodiContainer
from silbo.protocols import Container


class UserJoined(DomainEvent): ...


class Api: ...


class Handler:
    def __init__(self, api: Api) -> None: ...

    async def handle(self, event: UserJoined) -> int:
        return 1


class Callee:
    def __init__(self, api: Api, more: int) -> None: ...

    async def __call__(self, event: UserJoined) -> None: ...


class Interface(ABC):
    @abstractmethod
    async def handle(self, event: UserJoined) -> None: ...


class Host(AsyncEventDispatcher): ...


USER_JOINED = EventName("user.joined", UserJoined)


def classes(dispatcher: AsyncEventDispatcher) -> None:
    for name in ("user.*", USER_JOINED):
        dispatcher.add_listener(name, Handler, once=True)
        dispatcher.add_listener(name, Callee, priority=3)
        dispatcher.add_listener(name, Interface)
        dispatcher.remove_listener(name, Handler)

    @dispatcher.listen(USER_JOINED, timeout=1)
    class Listener:
        def __init__(self, api: Api) -> None: ...

        async def handle(self, event: UserJoined) -> None: ...

    @dispatcher.listen("user.joined")
    class Other:
        async def __call__(self, event: UserJoined) -> None: ...

    assert_type(Listener(Api()), Listener)
    assert_type(Other(), Other)


async def scope(container: Container) -> None:
    async with container.scope() as scope:
        assert_type(await scope.resolve(Handler), Handler)


def containers(app: dishka.AsyncContainer, services: dependency_injector.containers.Container) -> list[Container]:
    return [
        RodiContainer(rodi.Container()),
        DIContainer(di.Container(), scopes=("app", "request"), state=di.ScopeState()),
        DependencyInjectorContainer(services),
        DishkaContainer(app, scope=dishka.Scope.ACTION),
    ]


def registered(services: dependency_injector.containers.Container) -> None:
    assert_type(silbo.containers.rodi.register_dispatcher(rodi.Container()), AsyncEventDispatcher)
    assert_type(silbo.containers.rodi.register_dispatcher(rodi.Container(), Host()), Host)
    assert_type(silbo.containers.di.register_dispatcher(di.Container()), AsyncEventDispatcher)
    assert_type(silbo.containers.di.register_dispatcher(di.Container(), Host()), Host)
    assert_type(silbo.containers.dependency_injector.register_dispatcher(services), AsyncEventDispatcher)
    assert_type(silbo.containers.dependency_injector.register_dispatcher(services, Host(), name="events"), Host)
    dishka.make_async_container(dispatcher_provider(), dispatcher_provider(Host()), dispatcher_provider(Host))
