"""A reference leads to the objects of a program, or says what is wrong with it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from silbo import AsyncEventDispatcher
from silbo.errors import AppFailed, AppInvalid
from silbo.operations.app import open_app
from tests.support.app_files import write

APPS = """
from collections.abc import Mapping
from contextlib import asynccontextmanager
from functools import partial

import rodi
from fastapi import FastAPI
from shop.web import dispatcher
from silbo import AsyncEventDispatcher, Consumer, Mediator, Outbox, RequestMap
from silbo.brokers.memory import MemoryBroker
from silbo.containers.rodi import RodiContainer
from silbo.stores.memory import MemoryStore

entered = []

web = FastAPI()
web.state.dispatcher = dispatcher
empty = FastAPI()
outbox = Outbox(MemoryStore(), MemoryBroker(app="shop"))
storing = FastAPI()
storing.state.outbox = outbox


@asynccontextmanager
async def lifespan(app):
    entered.append("started")
    app.state.events = dispatcher
    yield
    entered.append("ended")


living = FastAPI(lifespan=lifespan)
mediator = Mediator(request_map=RequestMap(), dispatcher=dispatcher, container=RodiContainer(rodi.Container()))


class Store(Mapping):
    def __getitem__(self, key): raise RuntimeError("a read of the store")
    __iter__ = __len__ = __getitem__


class Host:
    __slots__ = ("events", "store")

    def __init__(self) -> None:
        self.store = Store()  # a mapping that is no dict may read from a disk
        self.events = dispatcher


host = Host()


def make() -> FastAPI:
    return web


async def make_later() -> dict[str, object]:
    return {"events": dispatcher}


made = partial(lambda dispatcher: [dispatcher], dispatcher)


@asynccontextmanager
async def opened():
    entered.append("in")
    yield dispatcher
    entered.append("out")


def needs(settings: str) -> object: ...


def fails() -> object:
    raise KeyError("no such setting")


@asynccontextmanager
async def fails_at_start():
    raise OSError("no such file")
    yield


async def forgotten():
    yield dispatcher


def leaves() -> None:
    raise SystemExit(3)


def two() -> list[object]:
    return [dispatcher, AsyncEventDispatcher()]


def consumers() -> list[object]:
    memory = MemoryBroker(app="shop")
    return [Consumer(dispatcher, memory.group(name, start="new")) for name in ("one", "two")]


number = 7
"""


@pytest.fixture
def apps(folder: Path) -> Path:
    runs = "import asyncio\nasync def main(): ...\nwork = main()\ntry: asyncio.run(work)\nfinally: work.close()\n"
    return write(folder, {"apps.py": APPS, "runs.py": runs})


@pytest.mark.parametrize(
    "attribute", ["web", "web.state.dispatcher", "mediator", "host", "Host", "make", "make_later", "made", "opened"]
)
async def test_all_that_may_lead_to_a_dispatcher(apps: Path, attribute: str) -> None:
    async with open_app(f"apps:{attribute}", app_dir=str(apps)) as app:
        import shop.web  # type: ignore[import-not-found]  # the folder's

        assert app.dispatcher is shop.web.dispatcher and app.consumers == app.plugins == ()


async def test_context_manager_is_open_for_the_block(apps: Path) -> None:
    async with open_app("apps:opened", app_dir=str(apps)):
        import apps as module  # type: ignore[import-not-found]  # the folder's

        assert module.entered == ["in"]
    assert module.entered == ["in", "out"]


async def test_lifespan_runs_where_it_is_asked_for_alone(apps: Path) -> None:
    """It may start consumers and a relay."""
    with pytest.raises(AppInvalid, match="before its lifespan has run"):
        async with open_app("apps:living", app_dir=str(apps)):
            pass
    async with open_app("apps:living", app_dir=str(apps), lifespan=True) as app:
        import apps as module  # type: ignore[import-not-found]  # the folder's

        assert module.entered == ["started"] and app.dispatcher is module.dispatcher
    assert module.entered == ["started", "ended"]
    async with open_app("apps:web", app_dir=str(apps), lifespan=True) as app:
        assert app.dispatcher is module.dispatcher


async def test_lifespan_that_has_run_is_not_advised_again(apps: Path) -> None:
    with pytest.raises(AppInvalid, match="its lifespan has run and left none of silbo's objects") as caught:
        async with open_app("apps:empty", app_dir=str(apps), lifespan=True):
            pass
    assert "--lifespan" not in str(caught.value)


@pytest.mark.parametrize("attribute", ["storing", "outbox"])
async def test_outbox_alone_counts_and_is_not_opened(apps: Path, attribute: str) -> None:
    """An open one would send. What needs a dispatcher says so."""
    async with open_app(f"apps:{attribute}", app_dir=str(apps)) as app:
        (outbox,) = app.outboxes
        assert not app.dispatchers and outbox.open_store is None
        with pytest.raises(AppInvalid, match="it has an outbox or a relay, and no dispatcher"):
            _ = app.dispatcher


async def test_plugins_are_found_by_their_dispatcher(apps: Path) -> None:
    async with open_app("shop.web:switched_off", app_dir=str(apps)) as app:
        (plugins,) = app.plugins
        assert plugins.dispatcher is app.dispatcher and list(plugins) == ["audit"]


async def test_consumers_bring_their_dispatcher(apps: Path) -> None:
    async with open_app("apps:consumers", app_dir=str(apps)) as app:
        assert len(app.consumers) == 2 and isinstance(app.dispatcher, AsyncEventDispatcher)


@pytest.mark.parametrize(
    ("reference", "problem"),
    [
        ("shop.wbe:dispatcher", "there is no module 'shop.wbe' in {folder}/shop; did you mean 'shop.web'?"),
        ("shp.web:dispatcher", "there is no module 'shp' in {folder}; did you mean 'shop'?"),
        ("nowhere_at_all:x", "there is no module 'nowhere_at_all' in {folder}; --app-dir says where else it is"),
        ("shop.web:dispatchr", "shop.web has no attribute 'dispatchr'; did you mean 'dispatcher'?"),
        ("shop.web:q", "shop.web has no attribute 'q'; shop.web has dispatcher"),
        (
            "shop.web:dispatcher.q",
            "a silbo.dispatch.dispatcher.AsyncEventDispatcher has no attribute 'q'; shop.web has",
        ),
        ("shop.web", "write module:attribute, as shop.web:dispatcher; shop.web has dispatcher"),
        ("shop.web:", "write module:attribute, as shop.web:dispatcher; shop.web has dispatcher"),
        (":dispatcher", "'' is no name of a module: write module:attribute"),
        ("shop/web.py:dispatcher", "'shop/web.py' is no name of a module: write module:attribute"),
        ("apps:needs", "this one can't be (missing a required argument: 'settings')"),
        ("apps:number", "it is 7, and has none of silbo's objects: name a dispatcher"),
        ("apps:empty", "holds none of silbo's objects before its lifespan has run"),
        ("runs:main", "runs runs a program when it is imported: write asyncio.run(...) under `if __name__"),
        ("apps:forgotten", "put @contextlib.asynccontextmanager above"),
    ],
)
async def test_reference_that_leads_nowhere_says_what_is_meant(apps: Path, reference: str, problem: str) -> None:
    with pytest.raises(AppInvalid) as caught:
        async with open_app(reference, app_dir=str(apps)):
            pass
    assert problem.format(folder=apps) in str(caught.value) and caught.value.reference == reference
    assert str(copy.copy(caught.value)) == str(caught.value)


async def test_path_of_a_file_is_told_as_a_module(apps: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(apps)
    with pytest.raises(AppInvalid, match=r"did you mean shop\.web:dispatcher\?"):
        async with open_app("shop/web.py", app_dir="."):
            pass


async def test_one_of_several_dispatchers_has_to_be_named(apps: Path) -> None:
    async with open_app("apps:two", app_dir=str(apps)) as app:
        with pytest.raises(AppInvalid, match=r"2 dispatchers, apps:two\[0\], apps:two\[1\]"):
            _ = app.dispatcher


async def test_dispatcher_of_whistles_own_is_refused(folder: Path) -> None:
    write(folder, {"stock.py": "import whistle\ndispatcher = whistle.AsyncEventDispatcher()\n"})
    with pytest.raises(AppInvalid, match=r"silbo\.AsyncEventDispatcher"):
        async with open_app("stock:dispatcher", app_dir=str(folder)):
            pass


@pytest.mark.parametrize(
    ("reference", "step", "error"),
    [
        ("needs_more:app", "its import", ModuleNotFoundError),
        ("torn:app", "its import", SyntaxError),
        ("ends:app", "its import", SystemExit),
        ("apps:fails", "its call", KeyError),
        ("apps:leaves", "its call", SystemExit),
        ("apps:fails_at_start", "its start", OSError),
    ],
)
async def test_error_of_the_programs_own_is_told_as_such(
    apps: Path, reference: str, step: str, error: type[BaseException]
) -> None:
    """A module that imports one that is missing is not taken for missing itself."""
    write(apps, {"needs_more.py": "import nothing_of_the_kind", "torn.py": "def (", "ends.py": "raise SystemExit(1)"})
    with pytest.raises(AppFailed, match=f"{step} failed: {error.__name__}") as caught:
        async with open_app(reference, app_dir=str(apps)):
            pass
    assert isinstance(caught.value.__cause__, error) and caught.value.error is caught.value.__cause__


async def test_nothing_else_is_imported(folder: Path) -> None:
    """Not the package's other modules, and the error about a missing one looks only at their names."""
    write(folder, {"shop/other.py": "raise RuntimeError('imported')"})
    async with open_app("shop.web:dispatcher", app_dir=str(folder)):
        pass
    with pytest.raises(AppInvalid, match=r"did you mean 'shop\.other'"):
        async with open_app("shop.othr:x", app_dir=str(folder)):
            pass


async def test_without_a_folder_the_path_stays_as_it_is(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(AppInvalid, match="there is no module 'shop'"):
        async with open_app("shop.web:dispatcher"):
            pass
