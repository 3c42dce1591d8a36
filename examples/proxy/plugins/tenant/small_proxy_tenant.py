"""A plugin that enriches: a function that takes the dispatcher, with settings."""

from dataclasses import dataclass

from small_proxy.events import REQUEST, RESPONSE, ProxyRequest, ProxyResponse

from silbo import AsyncEventDispatcher, Plugin


@dataclass
class Settings:
    """The settings of the plugin, which the host may give."""

    tenant: str = "acme"


def add_tenant(dispatcher: AsyncEventDispatcher, settings: Settings) -> None:
    """Add both listeners."""

    @dispatcher.listen(REQUEST)
    async def to_upstream(event: ProxyRequest) -> None:
        event.headers = {**event.headers, "x-tenant": settings.tenant}

    @dispatcher.listen(RESPONSE)
    async def to_client(event: ProxyResponse) -> None:
        event.headers = {**event.headers, "x-served-for": settings.tenant}


plugin = Plugin(add_tenant, name="tenant", host_version=">=1,<2", settings=Settings)
