"""Requests, responses and events as dataclasses, attrs classes, pydantic models and msgspec Structs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import attrs
import msgspec
import pydantic
import pytest

from silbo import Bridge, DomainEvent, EventHandler, NotificationEvent, Request, RequestHandler, Response
from tests.support.mediator import Collects, World


@dataclass(frozen=True, kw_only=True, slots=True)
class DataAsk(Request["DataAnswer"]):
    user_id: int = 1


@dataclass(frozen=True, kw_only=True)
class DataAnswer(Response):
    label: int


@dataclass(frozen=True, kw_only=True)
class DataHappened(DomainEvent):
    label: int


@dataclass(frozen=True, kw_only=True)
class DataTold(NotificationEvent):
    label: int


@attrs.frozen
class AttrsAsk(Request["AttrsAnswer"]):
    user_id: int = 1


@attrs.frozen
class AttrsAnswer(Response):
    label: int


@attrs.frozen(slots=False)
class AttrsHappened(DomainEvent):
    label: int


@attrs.frozen(slots=False)
class AttrsTold(NotificationEvent):
    label: int


class ModelAsk(Request["ModelAnswer"], pydantic.BaseModel, frozen=True):
    user_id: int = 1


class ModelAnswer(Response, pydantic.BaseModel):
    label: int


class ModelHappened(DomainEvent, pydantic.BaseModel, frozen=True):
    label: int


class ModelTold(NotificationEvent, pydantic.BaseModel, frozen=True):
    label: int


class StructAsk(Request["StructAnswer"], msgspec.Struct, frozen=True):
    user_id: int = 1


class StructAnswer(Response, msgspec.Struct):
    label: int


class StructHappened(DomainEvent, msgspec.Struct, frozen=True):
    label: int


class StructTold(NotificationEvent, msgspec.Struct, frozen=True):
    label: int


@pytest.mark.parametrize(
    ("ask", "answer", "happened", "told"),
    [
        (DataAsk, DataAnswer, DataHappened, DataTold),
        (AttrsAsk, AttrsAnswer, AttrsHappened, AttrsTold),
        (ModelAsk, ModelAnswer, ModelHappened, ModelTold),
        (StructAsk, StructAnswer, StructHappened, StructTold),
    ],
    ids=["dataclass", "attrs", "pydantic", "msgspec"],
)
async def test_every_sort_of_class_will_do(ask: Any, answer: Any, happened: Any, told: Any) -> None:
    heard: list[object] = []

    class Asks(Collects, RequestHandler[Any, Any]):
        async def handle(self, request: Any) -> Any:
            self._events += [happened(label=request.user_id), told(label=request.user_id)]
            return answer(label=request.user_id)

    class Hears(EventHandler[Any]):
        async def handle(self, event: Any) -> None:
            heard.append(event)

    world = World()
    world.requests.bind(ask, Asks)
    world.events.bind(happened, Hears)
    world.dispatcher.add_subscriber(Bridge(world.broker))
    assert await world.mediator.send(ask(user_id=7)) == answer(label=7)
    assert heard == [happened(label=7)] and world.broker.got == [7]
    assert isinstance(answer(label=7), Response) and isinstance(ask(), Request)


@pytest.mark.parametrize("base", [DomainEvent, Request, Response])
def test_keywords_of_a_dataclass_are_told_where_they_belong(base: Any) -> None:
    """Each who comes from python-cqrs writes them once behind the class."""
    with pytest.raises(
        TypeError, match=r"Frozen takes no class keywords: put @dataclass\(frozen=True, kw_only=True\) above it$"
    ):

        class Frozen(base, frozen=True, kw_only=True): ...

    with pytest.raises(TypeError, match="takes no keyword arguments$"):

        class Other(base, flavour="sweet"): ...

    class Takes:
        def __init_subclass__(cls, frozen: bool) -> None:
            flavours.append(frozen)

    flavours: list[bool] = []

    class Own(base, Takes, frozen=True): ...

    assert flavours == [True]
