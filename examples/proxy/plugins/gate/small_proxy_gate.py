"""A plugin that refuses: a subscriber class."""

from small_proxy.events import ADMIT, Admission

from silbo import Plugin, on


class Gate:
    """Lets nobody to /admin."""

    @on(ADMIT)
    async def refuse_admin(self, event: Admission) -> None:
        if event.path.startswith("/admin"):
            event.reason = "nobody may pass to /admin"
            event.stop_propagation()


plugin = Plugin(Gate, name="gate")
