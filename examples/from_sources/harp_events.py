"""What can be heard of this component: the class of its events, and their name as a constant."""

from silbo import Event, EventName


class MyEvent(Event):
    """An envelope: what it carries can be read and changed by whoever hears it."""

    def __init__(self, context: dict[str, object]) -> None:
        self.context = context


MY_EVENT = EventName("my.event", MyEvent)  # the string "my.event", which type checkers know more about
