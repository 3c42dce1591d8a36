"""The events of this component: their class, and their name as a constant."""

from silbo import Event, EventName


class MyEvent(Event):
    """An envelope: each listener can read and change its content."""

    def __init__(self, context: dict[str, object]) -> None:
        self.context = context


MY_EVENT = EventName("my.event", MyEvent)  # the string "my.event"; type checkers also know its class
