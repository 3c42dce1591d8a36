"""The plugin: a subscriber that refuses requests, changes the others, and hears what becomes of them."""

from harp.http import HttpResponse
from harp_apps.proxy.events import ProxyFilterEvent, TransactionEvent

from examples.harp_plugin.events import REQUEST, RESPONSE
from silbo import LAST, on


class HouseRules:
    """The listeners of the plugin."""

    @on(REQUEST, priority=-10)
    async def refuse_admin(self, event: ProxyFilterEvent) -> None:
        """Answer in the upstream's place, before HARP's own rules run."""
        if event.request.path.startswith("/admin"):
            event.set_response(HttpResponse("not through this proxy", status=403, content_type="text/plain"))
            event.stop_propagation()

    @on(REQUEST, priority=10)
    async def add_tenant(self, event: ProxyFilterEvent) -> None:
        """Add a header to the request that goes to the upstream."""
        event.request.headers["x-tenant"] = "acme"

    @on(RESPONSE, priority=LAST)
    async def sign(self, event: ProxyFilterEvent) -> None:
        """Add a header to every answer, a refusal included."""
        event.response.headers["x-house-rules"] = "applied"

    @on("proxy.transaction.*")
    async def follow(self, event: TransactionEvent) -> None:
        """Print each step of a transaction."""
        print(event.name, event.transaction.id, flush=True)
