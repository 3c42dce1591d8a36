"""One trace over two processes: an outbox, a relay and Redis between them, and OTLP to the test."""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from silbo.instrumentation.opentelemetry import SCHEMA_URL

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Collector:
    """An OTLP receiver.

    Attributes:
        endpoint: Where spans are sent to.
        spans: What has come, each with the name of its service and the schema URL of its scope.
    """

    endpoint: str
    spans: list[tuple[str, str, Span]]

    def one(self, service: str, name: str) -> Span:
        found = self.of(service, name)
        assert len(found) == 1, (service, name, [(of, span.name) for of, _, span in self.spans])
        return found[0]

    def of(self, service: str, name: str) -> list[Span]:
        found = [span for of, _, span in self.spans if (of, span.name) == (service, name)]
        return sorted(found, key=lambda span: span.start_time_unix_nano)


@pytest.fixture
def collector() -> Iterator[Collector]:
    spans: list[tuple[str, str, Span]] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                [service] = [a.value.string_value for a in resource.resource.attributes if a.key == "service.name"]
                for scope in resource.scope_spans:
                    spans.extend((service, scope.schema_url, span) for span in scope.spans)
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield Collector(f"http://127.0.0.1:{server.server_port}/v1/traces", spans)
        finally:
            server.shutdown()
            thread.join()


async def run(role: str, *arguments: str) -> None:
    command = [sys.executable, "-m", "tests.support.traced_shop_process", role, *arguments]
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stderr=asyncio.subprocess.PIPE)
    try:
        _, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, errors.decode()


@pytest.mark.long
async def test_one_trace_shows_the_request_and_the_listener_of_the_other_process(
    collector: Collector, redis_url: str, prefix: str, tmp_path: Path
) -> None:
    """From the request over the outbox, the relay and Redis to the query of the listener, and its retry."""
    arguments = (redis_url, prefix, str(tmp_path / "outbox.db"), collector.endpoint)
    async with asyncio.timeout(50), asyncio.TaskGroup() as group:
        _ = group.create_task(run("web", *arguments))
        _ = group.create_task(run("billing", *arguments))
    way = [
        collector.one("web", "POST /users"),
        collector.one("web", "dispatch user.joined"),
        collector.one("web", "store user.joined"),
        collector.of("billing", "process user.joined")[1],
        collector.of("billing", "dispatch user.joined")[1],
        collector.of("billing", "listener billing.<locals>.open_account")[1],
        collector.one("billing", "INSERT accounts"),
    ]
    assert not way[0].parent_span_id
    for parent, span in itertools.pairwise(way):
        assert span.parent_span_id == parent.span_id, span.name
        assert span.trace_id == way[0].trace_id, span.name
    first = collector.of("billing", "process user.joined")[0]
    assert first.parent_span_id == way[2].span_id
    assert collector.one("billing", "retry user.joined").parent_span_id == first.span_id
    for service, name in (("web", "relay"), ("billing", "receive")):
        batch = collector.one(service, name)
        assert not batch.parent_span_id and [link.span_id for link in batch.links] == [way[2].span_id]
    own = [url for _, url, span in collector.spans if span.name not in ("POST /users", "INSERT accounts")]
    assert set(own) == {SCHEMA_URL}
