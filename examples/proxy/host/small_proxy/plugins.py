"""The plugins of the proxy: found among the installed distributions, loaded if they are allowed."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.metadata import entry_points

from silbo import AsyncEventDispatcher
from silbo.plugins.order import load_order
from silbo.plugins.plugin import as_plugin, open_plugin

__all__ = ["GROUP", "load_plugins"]

GROUP = "small_proxy.plugins"
VERSION = "1.0"


@asynccontextmanager
async def load_plugins(dispatcher: AsyncEventDispatcher, allow: Sequence[str]) -> AsyncGenerator[None]:
    """Load the plugins that are allowed. No other distribution is imported."""
    found = entry_points(group=GROUP)
    plugins = [as_plugin(found[name].load(), name=name) for name in allow]
    async with AsyncExitStack() as stack:
        for plugin in load_order(plugins, host_version=VERSION):
            settings = None if plugin.settings is None else plugin.settings()
            await stack.enter_async_context(open_plugin(plugin, dispatcher, settings))
        yield
