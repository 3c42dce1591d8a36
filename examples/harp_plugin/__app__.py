"""The HARP application that adds the plugin. HARP loads it under the name `examples.harp_plugin`."""

from harp.config import Application
from harp.config.events import OnBoundEvent, OnShutdownEvent

from examples.harp_plugin.house_rules import HouseRules

house_rules = HouseRules()


async def on_bound(event: OnBoundEvent) -> None:
    event.dispatcher.add_subscriber(house_rules)


async def on_shutdown(event: OnShutdownEvent) -> None:
    event.dispatcher.remove_subscriber(house_rules)


application = Application(dependencies=["proxy"], on_bound=on_bound, on_shutdown=on_shutdown)
