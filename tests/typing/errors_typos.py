"""Misspelt names are errors: Whistle ships no types, and silbo must not be `Any` for that.

Read by mypy and pyright, never run. Each wrong line carries the error it must give, for both; where it gave none,
the comment itself would be the error (warn_unused_ignores, reportUnnecessaryTypeIgnoreComment).
"""

from silbo import AsyncEventDispatcher, Event


async def event(event: Event) -> None:
    event.typo  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    event.stop_propogation()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


async def dispatcher(dispatcher: AsyncEventDispatcher) -> None:
    dispatcher.add_listner("name", event)  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
