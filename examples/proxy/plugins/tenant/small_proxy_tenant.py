"""A plugin that enriches: an async function that takes the dispatcher, with settings."""

import asyncio
from dataclasses import dataclass

from small_proxy.events import REQUEST, RESPONSE, ProxyRequest, ProxyResponse

from silbo import AsyncEventDispatcher, Plugin


@dataclass
class Settings:
    """The settings of the plugin, which the host may give."""

    tenant: str = "acme"


async def add_tenant(dispatcher: AsyncEventDispatcher, settings: Settings) -> None:
    """Add both listeners, as soon as the tenant is known."""
    await asyncio.sleep(0.02)  # in place of a question to a directory of tenants

    @dispatcher.listen(REQUEST)
    async def to_upstream(event: ProxyRequest) -> None:
        event.headers = {**event.headers, "x-tenant": settings.tenant}

    @dispatcher.listen(RESPONSE)
    async def to_client(event: ProxyResponse) -> None:
        event.headers = {**event.headers, "x-served-for": settings.tenant}


plugin = Plugin(add_tenant, name="tenant", host_version=">=1,<2", settings=Settings)
