"""The way of a request: through the extension points to the upstream and back."""

from collections.abc import Mapping

import httpx
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from silbo import AsyncEventDispatcher
from small_proxy.events import ADMIT, REQUEST, RESPONSE, Admission, ProxyRequest, ProxyResponse

__all__ = ["Proxy"]

OF_ONE_CONNECTION = (
    "connection",
    "content-length",
    "host",
    "keep-alive",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
)


class Proxy:
    """Passes requests on to one upstream."""

    def __init__(self, dispatcher: AsyncEventDispatcher, upstream: httpx.AsyncClient) -> None:
        self._dispatcher = dispatcher
        self._upstream = upstream

    async def pass_on(self, request: Request) -> Response:
        """Return the answer of the upstream to a request, or a refusal."""
        path, headers = request.url.path, dict(request.headers)
        admission = await self._dispatcher.adispatch(ADMIT, Admission(request.method, path, headers))
        if admission.refusal is not None:  # a listener failed, so nobody knows
            return PlainTextResponse(f"no decision: {admission.refusal}", 503)
        if admission.propagation_stopped:
            return PlainTextResponse(admission.reason, 403)
        event = ProxyRequest(request.method, path, headers, await request.body())
        await self._dispatcher.adispatch(REQUEST, event)
        answer = await self._upstream.request(
            event.method,
            event.path,
            params=request.url.query,
            headers=_passed_on(event.headers),
            content=event.body,
        )
        headers = _passed_on(answer.headers)
        headers.pop("content-encoding", None)  # httpx has decoded the body
        reply = ProxyResponse(event, answer.status_code, headers, answer.content)
        await self._dispatcher.adispatch(RESPONSE, reply)
        return Response(reply.body, reply.status, reply.headers)


def _passed_on(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name not in OF_ONE_CONNECTION}
