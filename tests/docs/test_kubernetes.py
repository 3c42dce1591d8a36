"""The manifests of the page on Kubernetes: their commands, run with their environment, answer their probes and end at SIGTERM."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from markdown_it import MarkdownIt

from silbo.cli.main import make_parser
from tests.support.app_files import write
from tests.support.snippets import snippets
from tools.redis_server import RedisServer

ROOT = Path(__file__).resolve().parents[2]
HOWTO = ROOT / "docs" / "howto"
PAGE = HOWTO.joinpath("kubernetes.md").read_text()
MANIFESTS: list[dict[str, Any]] = [
    yaml.safe_load(token.content)
    for token in MarkdownIt().parse(PAGE)
    if token.type == "fence" and token.info.strip() == "yaml"
]
PODS = {
    each["metadata"]["name"]: each["spec"]["template"]["spec"] for each in MANIFESTS if each["kind"] == "Deployment"
}


def container(pod: str) -> dict[str, Any]:
    (only,) = PODS[pod]["containers"]
    return only


@pytest.mark.parametrize("pod", PODS)
def test_probes_and_times_fit_the_command(pod: str) -> None:
    """A probe that asks another port or path would restart the fleet; a pod that is killed too soon does work twice."""
    command = container(pod)["command"]
    port = int(command[command.index("--port" if pod == "shop-web" else "--health-port") + 1])
    for probe, path in (("livenessProbe", "/livez"), ("readinessProbe", "/readyz")):
        assert container(pod)[probe]["httpGet"] == {"path": path, "port": port}
    (metrics,) = container(pod)["ports"]
    assert command[command.index("--port" if pod == "shop-web" else "--metrics-port") + 1] == str(
        metrics["containerPort"]
    )
    ends_within = 15.0 if pod == "shop-web" else getattr(make_parser().parse_args(command[1:]), "drain", 10.0)
    assert PODS[pod]["terminationGracePeriodSeconds"] > ends_within + 5
    assert container(pod)["envFrom"] == [{"secretRef": {"name": "shop"}}]


def files(redis: RedisServer) -> dict[str, str]:
    """The files of the page on FastAPI, with what the page on Kubernetes adds to them."""
    pages = HOWTO.joinpath("fastapi.md").read_text(), PAGE
    found = {each.file: each.code for each in snippets(pages[0]) if each.file}
    (routes,) = [each.code for each in snippets(pages[1])]
    found["shop/web.py"] += routes.replace("app = FastAPI()\n", "")
    return {name: code.replace("Redis()", f"Redis.from_url({redis.url!r})") for name, code in found.items()}


@pytest.mark.long
async def test_pods_answer_their_probes_and_end_in_time(tmp_path: Path, own_redis: RedisServer) -> None:
    folder = write(tmp_path, files(own_redis))
    (secret,) = (each["stringData"] for each in MANIFESTS if each["kind"] == "Secret")
    environment = {
        **os.environ,
        **secret,
        "SILBO_REDIS_URL": own_redis.url,
        "SILBO_STORE": "sqlite+aiosqlite:///shop.db",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}",
    }

    async def run(pod: str) -> None:
        ports = asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
        async with await ports as free:
            port = str(free.sockets[0].getsockname()[1])
        command = [
            re.sub(r"^80[08]0$", port, word).replace("0.0.0.0", "127.0.0.1").replace("9464", "0")
            for word in container(pod)["command"]
        ]
        process = await asyncio.create_subprocess_exec(sys.executable, "-m", *command, cwd=folder, env=environment)
        try:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as probe:
                await until_ready(probe, process)
                assert (await probe.get("/livez")).status_code == 200
            process.terminate()
            async with asyncio.timeout(PODS[pod]["terminationGracePeriodSeconds"]):
                assert await process.wait() in {0, -15}  # uvicorn ends by the signal once it has shut down
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    await run("shop-web")  # it makes the tables
    await asyncio.gather(run("billing"), run("shop-relay"))


async def until_ready(probe: httpx.AsyncClient, process: asyncio.subprocess.Process) -> None:
    async with asyncio.timeout(30):
        while process.returncode is None:
            try:
                answer = await probe.get("/readyz")
            except httpx.TransportError:
                answer = None
            if answer is not None and answer.status_code == 200:
                return
            await asyncio.sleep(0.05)
    raise AssertionError(f"ended with {process.returncode}")
