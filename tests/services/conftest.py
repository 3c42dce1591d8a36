"""Real servers, and a browser, that pip can't bring. A module says by its mark which it needs: `postgresql`, `rabbitmq` or `chromium`.

Where a server is missing, its tests are left out, and the end of the run says so; with `SILBO_LEAVE_OUT=nothing`, and where
all are missing, that is a failure.

postgres         a server shared by the tests of one worker; `engine` has a schema of its own on it
own_postgres     a server that this test alone may kill, with every commit on its disk
browser          a Chromium shared by the tests of one worker
"""

from __future__ import annotations

import os
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Final

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from silbo.stores.sqlalchemy import SQLAlchemyStore
from tools.chromium import find_chromium, open_browser
from tools.postgres import PostgresServer, find_postgres
from tools.rabbitmq import find_rabbitmq
from tools.server import ServerFailed

SERVERS: Final[dict[str, Callable[[], object]]] = {
    "postgresql": find_postgres,
    "rabbitmq": find_rabbitmq,
    "chromium": find_chromium,
}
LEFT_OUT: Final = "left out: "


def look(server: str) -> str:
    """Return the place of the server, or what to install, after `LEFT_OUT`."""
    try:
        return str(SERVERS[server]())
    except ServerFailed as error:
        return f"{LEFT_OUT}{error}"


def missing() -> dict[str, str]:
    """The servers that are not here, each with the line to install it."""
    return {server: told for server in SERVERS if (told := look(server)).startswith(LEFT_OUT)}


def pytest_configure(config: pytest.Config) -> None:
    for server in SERVERS:
        config.addinivalue_line("markers", f"{server}: needs this server; left out where it is missing")
    absent = missing()
    if len(absent) == len(SERVERS) or (absent and os.environ.get("SILBO_LEAVE_OUT") == "nothing"):
        raise pytest.UsageError("\n".join(absent.values()))


def pytest_report_header() -> list[str]:
    return [f"{server}: {look(server)}" for server in SERVERS]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    absent = missing()
    for item in items:
        if not item.nodeid.startswith("tests/services/"):
            continue
        needed = [server for server in SERVERS if item.get_closest_marker(server)]
        if not needed:
            raise pytest.UsageError(f"{item.nodeid}: give its module the mark of the server that it needs")
        for server in needed:
            if server in absent:
                item.add_marker(pytest.mark.skip(reason=absent[server]))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    yield  # all other parts of the summary come before
    told = [str(report.longrepr) for report in terminalreporter.stats.get("skipped", [])]
    for server, why in missing().items():
        many = sum(why in text for text in told)
        terminalreporter.write_sep("!", f"{many} TESTS OF {server.upper()} LEFT OUT", red=True, bold=True)
        terminalreporter.write_line(why.removeprefix(LEFT_OUT), red=True, bold=True)


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    with PostgresServer(fsync=False, config={"track_commit_timestamp": "on"}) as server:
        yield server


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    with open_browser() as browser:
        yield browser


@pytest.fixture
def own_postgres() -> Iterator[PostgresServer]:
    with PostgresServer() as server:
        yield server


@pytest.fixture
async def schema(postgres: PostgresServer) -> AsyncIterator[str]:
    """Fresh in every test."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    engine = create_async_engine(postgres.url)
    async with engine.begin() as connection:
        await connection.execute(text(f"CREATE SCHEMA {name}"))
    yield name
    async with engine.begin() as connection:
        await connection.execute(text(f"DROP SCHEMA {name} CASCADE"))
    await engine.dispose()


@pytest.fixture
async def make_engine(postgres: PostgresServer, schema: str) -> AsyncIterator[Callable[..., AsyncEngine]]:
    """Engines on the schema, as several processes have each their own."""
    engines: list[AsyncEngine] = []

    def make(**options: object) -> AsyncEngine:
        settings = {"server_settings": {"search_path": schema}}
        engines.append(create_async_engine(postgres.url, connect_args=settings, **options))
        return engines[-1]

    yield make
    for engine in engines:
        await engine.dispose()


@pytest.fixture
async def engine(make_engine: Callable[..., AsyncEngine]) -> AsyncEngine:
    """The host's, with silbo's tables."""
    engine = make_engine()
    await SQLAlchemyStore(engine).create()
    return engine
