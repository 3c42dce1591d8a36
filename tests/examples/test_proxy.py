"""A host with plugins in wheels of their own: built, installed into an environment of their own, and asked over HTTP."""

from __future__ import annotations

import fcntl
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import HTTPServer
from pathlib import Path

import httpx
import pytest

from examples.harp_plugin.upstream import Echo
from tools.server import ROOT

pytestmark = pytest.mark.timeout(120)

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
    venv.create(environment)
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

    def __init__(self, client: httpx.Client) -> None:
        self.client = client
        self.log = ""

    def get(self, path: str, mischief: str = "") -> httpx.Response:
        return self.client.get(path, headers={"x-mischief": mischief} if mischief else {})


@contextmanager
def running(python: Path, upstream: str, *plugins: str) -> Iterator[Proxy]:
    """The program with these plugins. It must end well."""
    options = [option for plugin in plugins for option in ("--plugin", plugin)]
    command: Sequence[str] = [str(python), "-m", "small_proxy", upstream, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            url = process.stdout.readline().strip()
            if not url:
                pytest.fail(process.communicate()[1])
            with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
                proxy = Proxy(client)
                yield proxy
            process.send_signal(signal.SIGINT)
            _, proxy.log = process.communicate(timeout=30)
            assert process.returncode == 0, proxy.log
        finally:
            process.kill()


def test_wheels_enrich_and_refuse(python: Path, upstream: str) -> None:
    """What is not asked for is not even imported: the third wheel is installed, too."""
    with running(python, upstream, "tenant", "gate") as proxy:
        first = proxy.get("/hello?to=you&to=me")
        assert (first.json()["path"], first.json()["headers"]["x-tenant"]) == ("/hello?to=you&to=me", "acme")
        assert first.headers["x-served-for"] == "acme"

        refused = proxy.get("/admin/users")
        assert (refused.status_code, refused.text) == (403, "nobody may pass to /admin")
        assert proxy.get("/hello", "raise").json()["requests"] == first.json()["requests"] + 1

        rows = proxy.get("/-/listeners").json()
        assert [(row["name"], row["plugin"]) for row in rows] == [
            ("proxy.request", "small_proxy_tenant"),
            ("proxy.response", "small_proxy_tenant"),
            ("proxy.admit", "small_proxy_gate"),
        ]
        assert all(str(python.parent.parent) in row["at"] for row in rows), "they come out of the wheels"
    assert proxy.log == ""


def test_plugin_that_fails_changes_nothing_and_decides_nothing(python: Path, upstream: str) -> None:
    """A request goes on as if the plugin was not there; but where it is asked if a request may pass, none passes."""
    with running(python, upstream, "tenant", "gate", "unruly") as proxy:
        for mischief, error in [("raise", "RuntimeError"), ("half", "RuntimeError"), ("hang", "ListenerTimeout")]:
            passed = proxy.get("/hello", f"{mischief}@proxy.request")
            assert (passed.status_code, passed.json()["path"]) == (200, "/hello"), mischief
            assert passed.json()["headers"]["x-tenant"] == "acme", mischief

            undecided = proxy.get("/hello", f"{mischief}@proxy.admit")
            assert undecided.status_code == 503, mischief
            assert undecided.text.startswith(f"no decision: {error}: "), undecided.text
        assert proxy.get("/hello").json()["requests"] == 4, "a request without a decision went to the upstream"
    assert proxy.log.count("listener failed") == 6
    assert proxy.log.count("small_proxy_unruly.py") >= 4
