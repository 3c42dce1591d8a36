"""The HARP proxy on silbo's dispatcher: real programs, real requests, and a plugin in the middle. See `make test-harp`."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tools.server import ROOT, free_port

pytestmark = [pytest.mark.harp, pytest.mark.timeout(120)]

PYTHON = ROOT / ".venv" / "harp" / "bin" / "python"
"""Python 3.13 with HARP and this silbo: HARP installs on no other, and not beside the tools of the tests."""


@contextmanager
def program(python: str | Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A program of the examples, with one stream for what it prints and logs. It must end well on Ctrl-C."""
    with subprocess.Popen(
        [str(python), "-m", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(30)
            finally:
                process.kill()


def read_until(process: subprocess.Popen[str], text: str) -> list[str]:
    """The lines up to the one with this text."""
    assert process.stdout
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line.rstrip())
        if text in line:
            return lines
    pytest.fail(f"ended before {text!r}:\n" + "\n".join(lines))


@pytest.fixture(scope="module")
def upstream() -> Iterator[str]:
    with program(sys.executable, "examples.harp_plugin.upstream") as process:
        yield read_until(process, "http://")[-1]


class Proxy:
    def __init__(self, url: str, process: subprocess.Popen[str], started: list[str]) -> None:
        self.url, self.process, self.started = url, process, started


@pytest.fixture(scope="module")
def proxy(upstream: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    assert PYTHON.exists(), f"{PYTHON} is missing: `make test-harp` makes it"
    url = f"http://127.0.0.1:{free_port()}"
    settings = (ROOT / "examples" / "harp_plugin" / "harp.yml").read_text()
    settings = settings.replace("http://127.0.0.1:4001", upstream).replace(
        "port: 4000", f"port: {url.rpartition(':')[2]}"
    )
    file = tmp_path_factory.mktemp("harp") / "harp.yml"
    file.write_text(settings)
    with program(PYTHON, "examples.harp_plugin", str(file)) as process:
        yield Proxy(url, process, read_until(process, "Running on"))
    assert process.returncode == 0


def get(proxy: Proxy, path: str) -> tuple[httpx.Response, list[str]]:
    """The answer to a request, and the steps of its transaction that the plugin heard."""
    with httpx.Client(trust_env=False, timeout=60) as client:
        response = client.get(proxy.url + path)
    lines = read_until(proxy.process, "proxy.transaction.ended")
    return response, [line.split()[0] for line in lines if line.startswith("proxy.transaction.")]


STEPS = [f"proxy.transaction.{step}" for step in ("started", "message", "message", "ended")]


def test_plugin_changes_requests_and_refuses_some(proxy: Proxy) -> None:
    """HARP's own listeners run on the same dispatcher: the rules have set their header, too."""
    first, steps = get(proxy, "/hello?to=you")
    assert first.status_code == 200
    assert first.headers["x-house-rules"] == "applied"
    assert first.json()["path"] == "/hello?to=you"
    assert first.json()["headers"].items() >= {"x-tenant": "acme", "x-rule": "applied"}.items()
    assert steps == STEPS

    refused, steps = get(proxy, "/admin/users")
    assert (refused.status_code, refused.text) == (403, "not through this proxy")
    assert refused.headers["x-house-rules"] == "applied", (
        "what stopped the request must not stop the response's listeners"
    )
    assert steps == STEPS

    last, _ = get(proxy, "/hello")
    assert last.json()["requests"] == first.json()["requests"] + 1, "the refused request went to the upstream"


def test_describe_shows_the_plugin_among_harps_own_listeners(proxy: Proxy) -> None:
    rows = [line for line in proxy.started if line.startswith("proxy.filter.request: ")]
    plugin = "examples.harp_plugin.house_rules"
    assert rows == [
        f"proxy.filter.request: HouseRules.refuse_admin of {plugin}, priority -10",
        "proxy.filter.request: RulesSubscriber.on_filter_event of harp_apps.rules.subscribers, priority 0",
        f"proxy.filter.request: HouseRules.add_tenant of {plugin}, priority 10",
    ]
    assert any(re.match(r"core\.request: on_health_request of harp\.", line) for line in proxy.started)
    assert f"proxy.transaction.*: HouseRules.follow of {plugin}, priority 0" in proxy.started


ATTRIBUTE_ON_THE_CLASS = """
import asyncio
from functools import partial
from harp.config import ConfigurationBuilder
from harp.config.builders.system import SystemBuilder
from harp.event_dispatcher import LoggingAsyncEventDispatcher
from silbo import AsyncEventDispatcher, Event

class Logged(LoggingAsyncEventDispatcher, AsyncEventDispatcher):
    pass

async def fail(event): raise ValueError(event.name)

def report(error, event, listener): print("reported", error)

async def main():
    SystemBuilder.AsyncEventDispatcherType = {kind}
    applications = ["http_client", "proxy", "examples.harp_plugin"]
    configuration = ConfigurationBuilder({{"applications": applications}}, use_default_applications=False)
    system = await configuration.abuild_system()
    for row in system.dispatcher.describe("proxy.filter.response"):
        print(row.plugin, row.listener.__name__)
    system.dispatcher.add_listener("my.event", fail)
    try:
        await system.dispatcher.adispatch("my.event", Event())
    except ValueError as error:
        print("raised", error)
    await system.dispose()

asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("kind", "logs", "told"),
    [
        ("AsyncEventDispatcher", False, "raised my.event"),
        ("partial(AsyncEventDispatcher, on_error=report)", False, "reported my.event"),
        ("Logged", True, "raised my.event"),
    ],
    ids=["plain", "with options", "with HARP's log"],
)
def test_other_ways_to_replace_it(kind: str, *, logs: bool, told: str) -> None:
    """The ways that the page names: on HARP's class, with options, and behind HARP's own dispatcher that logs."""
    assert PYTHON.exists(), f"{PYTHON} is missing: `make test-harp` makes it"
    code = ATTRIBUTE_ON_THE_CLASS.format(kind=kind)
    done = subprocess.run([PYTHON, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert "examples.harp_plugin.house_rules sign" in lines
    assert told in lines
    assert ("[DispatchOne] listener: <function fail" in done.stdout) is logs
