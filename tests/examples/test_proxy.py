"""A host with plugins in wheels of their own: built, installed into an environment of their own, and asked over HTTP."""

from __future__ import annotations

import fcntl
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import venv
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import HTTPServer
from pathlib import Path
from typing import IO, Any

import httpx
import pytest

from examples.harp_plugin.upstream import Echo
from tools.server import ROOT

pytestmark = [pytest.mark.timeout(120), pytest.mark.long]  # builds wheels, and an environment for them

EXAMPLE = ROOT / "examples" / "proxy"
DISTRIBUTIONS = ["host", "plugins/tenant", "plugins/gate", "plugins/unruly"]


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The Python of the environment with the wheels. All workers of a run share it."""
    folder = tmp_path_factory.getbasetemp()
    if worker_id != "master":
        folder = folder.parent
    environment = folder / "proxy-environment"
    with (folder / "proxy-environment.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not environment.exists():
            install(build_wheels(folder / "proxy-build"), folder / "unfinished")
            (folder / "unfinished").rename(environment)
    return environment / "bin" / "python"


BUILD = """
import os, sys
from setuptools import build_meta
wheels, *folders = sys.argv[1:]
for folder in folders:
    os.chdir(folder)
    build_meta.build_wheel(wheels)
"""


def build_wheels(folder: Path) -> list[Path]:
    """Build the host and each plugin, as pip would, in one process for all."""
    shutil.copytree(EXAMPLE, folder)  # a build leaves files behind
    run(sys.executable, "-c", BUILD, str(folder), *(str(folder / one) for one in DISTRIBUTIONS))
    return sorted(folder.glob("*.whl"))


def install(wheels: list[Path], environment: Path) -> None:
    """Install wheels into a new environment. silbo and the host's libraries are those of the tests."""
    venv.create(environment, symlinks=True)
    site = next(environment.glob("lib/python*/site-packages"))
    (site / "shared.pth").write_text(f"{ROOT}\n{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin" / "python")]
    run(*pip, "install", "--no-deps", "--no-index", "--no-compile", *map(str, wheels))


def run(*command: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def upstream() -> Iterator[str]:
    class OwnEcho(Echo):
        requests = 0

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), OwnEcho) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


class Proxy:
    """A running proxy: a client of it, and at its end what it has logged."""

    def __init__(self, client: httpx.Client, output: IO[str]) -> None:
        self.client = client
        self.output = output
        self.log = ""

    def get(self, path: str, mischief: str = "") -> httpx.Response:
        return self.client.get(path, headers={"x-mischief": mischief} if mischief else {})

    def plugins(self) -> dict[str, Any]:
        return self.get("/-/plugins").json()  # type: ignore[no-any-return]

    def listeners(self) -> list[tuple[str, str]]:
        return [(row["name"], row["plugin"]) for row in self.get("/-/listeners").json()]


@contextmanager
def running(python: Path, upstream: str, *plugins: str, patience: float = 30, **options: object) -> Iterator[Proxy]:
    """The program with these plugins and options. It must end well."""
    arguments = [upstream, *(part for plugin in plugins for part in ("--plugin", plugin)), f"--patience={patience}"]
    arguments += [f"--{option}={value}" for option, value in options.items()]
    with subprocess.Popen(
        [python, "-m", "small_proxy", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout
            url = process.stdout.readline().strip()
            if not url:
                pytest.fail(process.communicate()[1])
            with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
                proxy = Proxy(client, process.stdout)
                yield proxy
            process.send_signal(signal.SIGINT)
            _, proxy.log = process.communicate(timeout=30)
            assert process.returncode == 0, proxy.log
        finally:
            process.kill()


def test_wheels_enrich_and_refuse(python: Path, upstream: str, tmp_path: Path) -> None:
    """A plugin that is not asked for is not even imported: the third wheel is installed, too."""
    settings = tmp_path / "plugins.toml"
    settings.write_text('[tenant]\ntenant = "blue"\n')
    with running(python, upstream, "tenant", "gate", settings=settings) as proxy:
        first = proxy.get("/hello?to=you&to=me")
        assert (first.json()["path"], first.json()["headers"]["x-tenant"]) == ("/hello?to=you&to=me", "blue")
        assert first.headers["x-served-for"] == "blue"

        refused = proxy.get("/admin/users")
        assert (refused.status_code, refused.text) == (403, "nobody may pass to /admin")
        assert proxy.get("/hello", "raise").json()["requests"] == first.json()["requests"] + 1

        assert {name: row["version"] for name, row in proxy.plugins().items()} == {"tenant": "1.2", "gate": "1.0"}
        rows = proxy.get("/-/listeners").json()
        assert [(row["name"], row["plugin"]) for row in rows] == [
            ("proxy.request", "tenant"),
            ("proxy.response", "tenant"),
            ("proxy.admit", "gate"),
        ]
        assert all(str(python.parent.parent) in row["at"] for row in rows), "they come out of the wheels"
    assert proxy.log == ""


def test_plugin_that_fails_changes_nothing_and_decides_nothing(python: Path, upstream: str) -> None:
    """A request goes on as if the plugin was not there; but where it is asked if a request may pass, none passes."""
    with running(python, upstream, "tenant", "gate", "unruly", patience=0.5) as proxy:
        for mischief, error in [("raise", "RuntimeError"), ("half", "RuntimeError"), ("hang", "ListenerTimeout")]:
            passed = proxy.get("/hello", f"{mischief}@proxy.request")
            assert (passed.status_code, passed.json()["path"]) == (200, "/hello"), mischief
            assert passed.json()["headers"]["x-tenant"] == "acme", mischief

            undecided = proxy.get("/hello", f"{mischief}@proxy.admit")
            assert undecided.status_code == 503, mischief
            assert undecided.text.startswith(f"no decision: plugin 'unruly': {error}: "), undecided.text
        assert proxy.get("/hello").json()["requests"] == 4, "a request without a decision went to the upstream"
        assert proxy.plugins()["unruly"]["failures"] == 6
    assert proxy.log.count("plugin unruly: ") == 6
    assert "small_proxy_unruly.py" in proxy.log


def test_plugin_that_blocks_is_named_with_file_and_line(python: Path, upstream: str) -> None:
    """While it blocks, or afterwards where the watching thread gets no turn in time."""
    with running(python, upstream, "unruly") as proxy:
        assert proxy.get("/hello", "block@proxy.request").status_code == 200
        assert proxy.get("/hello").status_code == 200
    assert re.match(r"plugin unruly: blocked: misbehave \(.*small_proxy_unruly\.py:\d+\) h[eo]ld", proxy.log), proxy.log
    assert proxy.log.count("blocked") == 1


def test_others_go_on_while_a_plugin_hangs(python: Path, upstream: str) -> None:
    """The listener that hangs is cancelled when its plugin is unloaded, long before its time is over."""
    with running(python, upstream, "tenant", "unruly", patience=1000) as proxy, ThreadPoolExecutor(1) as thread:
        hanging = thread.submit(proxy.get, "/slow", "hang@proxy.request")
        assert proxy.output.readline() == "unruly hangs\n"
        assert proxy.get("/hello").json()["requests"] == 1
        assert not hanging.done()
        assert proxy.client.delete("/-/plugins/unruly").status_code == 204
        assert hanging.result(60).json()["path"] == "/slow"
        assert proxy.listeners() == [("proxy.request", "tenant"), ("proxy.response", "tenant")]
        assert proxy.client.delete("/-/plugins/unruly").status_code == 404


def test_plugin_that_keeps_failing_is_switched_off_until_it_is_unloaded(python: Path, upstream: str) -> None:
    """Switched off, it decides nothing either: the host has to say that it can do without."""
    with running(python, upstream, "gate", "unruly") as proxy:
        for _ in range(11):
            assert proxy.get("/hello", "raise@proxy.request").status_code == 200
        assert proxy.plugins()["unruly"]["state"] == "off"
        undecided = proxy.get("/hello")
        assert (undecided.status_code, "PluginOff" in undecided.text) == (503, True), undecided.text
        assert proxy.client.delete("/-/plugins/unruly").status_code == 204
        assert proxy.get("/hello").status_code == 200
        assert proxy.get("/admin").status_code == 403
    assert proxy.log.count("its budget is 10") == 1


def test_no_request_is_without_the_plugin_while_it_is_reloaded(python: Path, upstream: str) -> None:
    """Under load, and nothing of the older generations is left."""
    with running(python, upstream, "tenant", "gate", "unruly") as proxy, ThreadPoolExecutor(3) as threads:
        ended = threading.Event()

        def ask() -> int:
            asked = 0
            while not ended.is_set():
                assert proxy.get("/hello").json()["headers"]["x-tenant"] == "acme"
                assert proxy.get("/admin").status_code == 403
                asked += 1
            return asked

        askers = [threads.submit(ask) for _ in range(3)]
        before = proxy.listeners()
        try:
            for _ in range(20):
                for name in ("tenant", "gate", "unruly"):
                    assert proxy.client.post(f"/-/plugins/{name}/reload").status_code == 204
        finally:
            ended.set()
        assert all(asker.result(60) for asker in askers)
        assert sorted(proxy.listeners()) == sorted(before)
        assert {row["tasks"] for row in proxy.plugins().values()} == {0}
    assert proxy.log == ""
