"""What a user writes with plain strings type-checks. Read by mypy and pyright, never run."""

from silbo import AsyncEventDispatcher, Event


class UserJoined(Event):
    """An event of the user's own."""

    def __init__(self, user_id: int) -> None:
        self.user_id = user_id


async def enrich(event: UserJoined) -> None:
    event.user_id += 1
    event.stop_propagation()


async def host() -> None:
    dispatcher = AsyncEventDispatcher()
    dispatcher.add_listener("user.joined", enrich, priority=-10)
    dispatcher.remove_listener("user.joined", enrich)
    await dispatcher.adispatch("user.joined", UserJoined(1))
