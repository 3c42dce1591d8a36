"""The dashboard and the alert rules name only what a running program shows, and the page has every rule."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from silbo.instrumentation.metrics import BUCKETS
from tests.support.command_line import environment
from tests.support.redis_streams import eventually

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = ROOT / "examples" / "dashboards" / "grafana.json"
RULES = ROOT / "examples" / "dashboards" / "alerts.yml"
ALARMS = ROOT / "docs" / "howto" / "alarms.md"


def expressions() -> list[str]:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    shown = [target["expr"] for panel in panels for target in panel["targets"]]
    return [*shown, *re.findall(r"expr: >-\n\s+(.*)\n", RULES.read_text())]


@asynccontextmanager
async def measured(redis_url: str, prefix: str, folder: Path) -> AsyncGenerator[str]:
    """The URL of the metrics of a program in which everything happens."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.support.measured_process", redis_url, prefix, str(folder)),
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=environment({}),
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        async with asyncio.timeout(30):
            port = (await process.stdout.readline()).decode().strip()
        assert port, "it did not start"
        yield f"http://127.0.0.1:{port}/metrics"
        process.stdin.close()
        async with asyncio.timeout(30):
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def scrape(url: str) -> list[Sample]:
    async with httpx.AsyncClient(timeout=30, trust_env=False, verify=False) as client:
        text = (await client.get(url)).text
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


def value(samples: Sequence[Sample], name: str, **labels: str) -> float:
    return sum(sample.value for sample in samples if sample.name == name and labels.items() <= sample.labels.items())


async def test_each_figure_comes_from_a_running_program(redis_url: str, prefix: str, tmp_path: Path) -> None:
    """Every metric, with every attribute and value that the dashboard or a rule asks for, and the figures are right."""
    async with measured(redis_url, prefix, tmp_path) as url:
        samples: list[Sample] = []

        async def has_settled() -> bool:
            samples[:] = await scrape(url)
            return (
                value(samples, "silbo_consumer_dead_total") == 1
                and value(samples, "silbo_consumer_handled_total") == 1
                and value(samples, "silbo_outbox_rows", silbo_state="sent") == 2
                and value(samples, "silbo_ready") == 3
                and any(sample.name == "silbo_lag" and sample.labels["silbo_part"] == "consumer" for sample in samples)
            )

        await eventually(has_settled)
    found: dict[str, list[dict[str, str]]] = {}
    for sample in samples:
        found.setdefault(sample.name, []).append(sample.labels)
    asked = 0
    for expression in expressions():
        labels = {label for part in re.findall(r"\bby \(([^)]*)\)", expression) for label in part.split(", ")} - {"le"}
        metrics = set(re.findall(r"silbo_\w+", re.sub(r"\{[^}]*\}|\b(by|on) \([^)]*\)", "", expression)))
        assert metrics, expression
        for metric in metrics:
            asked += 1
            assert metric in found, f"{metric} is not shown: {expression}"
            assert any(labels <= each.keys() for each in found[metric]), f"{labels} of {metric}: {expression}"
        for metric, matchers in re.findall(r"\b(silbo_\w+)\{([^}]*)\}", expression):
            for label, operator, wanted in re.findall(r'(\w+)(=~|!~|!=|=)"([^"]*)"', matchers):
                values = {each.get(label, "") for each in found[metric]}
                expected = set(wanted.split("|")) - {"relay", "cancelled"}  # an outbox with a relay shows itself
                assert expected <= values, f"{label}{operator}{wanted!r}, there is {values}: {expression}"
    assert asked > 30
    assert value(samples, "silbo_publish_duration_seconds_count", silbo_outcome="published") == 2
    assert value(samples, "silbo_publish_duration_seconds_count", silbo_outcome="refused") == 1
    assert value(samples, "silbo_consumer_failed_total", silbo_name="billing") == 2
    assert value(samples, "silbo_consumer_retried_total", silbo_name="billing") == 1
    assert value(samples, "silbo_relay_sent_total", silbo_name="shop") == 2
    bounds = {sample.labels["le"] for sample in samples if sample.name == "silbo_listener_duration_seconds_bucket"}
    assert {float(bound) for bound in bounds} == {*BUCKETS, float("inf")}
    assert {sample.labels["silbo_event_name"] for sample in samples if sample.name.startswith("silbo_dispatch")} == {
        *("order.paid", "other")
    }


def test_the_page_explains_each_rule() -> None:
    rules = re.findall(r"- alert: (\w+)", RULES.read_text())
    table = ALARMS.read_text().partition("<!-- alarms -->")[2].partition("<!-- /alarms -->")[0]
    assert rules and re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == rules
