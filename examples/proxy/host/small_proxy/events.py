"""The extension points of the proxy: the names of its events, each with its class."""

from dataclasses import dataclass

from silbo import Event, EventName, Policy

__all__ = ["ADMIT", "REQUEST", "RESPONSE", "Admission", "ProxyRequest", "ProxyResponse"]


@dataclass
class Admission(Event):
    """The question if a request may pass. A listener that says no sets the reason and stops the event."""

    method: str
    path: str
    headers: dict[str, str]
    reason: str = ""


@dataclass
class ProxyRequest(Event):
    """A request on its way to the upstream. Listeners may assign to its attributes."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class ProxyResponse(Event):
    """An answer on its way to the client. Listeners may assign to its attributes."""

    request: ProxyRequest
    status: int
    headers: dict[str, str]
    body: bytes


ADMIT = EventName(
    "proxy.admit",
    Admission,
    description="may this request pass? Without an answer of every listener it may not",
    policy=Policy(on_failure="refuse"),
)
REQUEST = EventName(
    "proxy.request",
    ProxyRequest,
    description="a request goes to the upstream, also if a listener fails",
    policy=Policy(on_failure="ignore"),
)
RESPONSE = EventName(
    "proxy.response",
    ProxyResponse,
    description="an answer goes to the client, also if a listener fails",
    policy=Policy(on_failure="ignore"),
)
