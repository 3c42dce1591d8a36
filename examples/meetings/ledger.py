"""A file of the events that were handled. It survives a kill of its program. An application would use a database."""

import time
from pathlib import Path
from typing import Any

import msgspec

from examples.meetings.events import EVENTS
from silbo import FIRST, LAST, ECSTEvent, IAsyncEventDispatcher, NotificationEvent, on


class Line(msgspec.Struct):
    """One event that was handled."""

    name: str
    event_id: str
    happened: float
    written: float
    fields: dict[str, Any] = {}
    again: bool = False
    """It came once more, after it was done; nothing was done then."""


class Ledger:
    """A subscriber with two listeners: one runs first, one last. The last one writes each event down, when all others have run.

    The first one stops an event that is in the file already, so that it has no second effect. Here each event is dispatched
    once, so its id identifies it.
    """

    def __init__(self, path: Path) -> None:
        # Without a buffer, each line is in the operating system when it is written, and survives a `kill -9`.
        # It does not survive a power cut; os.fsync() would.
        self._file = path.open("ab+", buffering=0)
        self._lines = read(path)
        self._file.truncate(sum(len(_encode(line)) for line in self._lines))  # remove a line that was cut off
        self._done = {line.event_id for line in self._lines}

    async def replay(self, dispatcher: IAsyncEventDispatcher) -> None:
        """Dispatch the events that earlier processes handled, so that the listeners of this one know them.

        Call it before this subscriber and a bridge are added: both have had these events already.
        """
        classes = {str(name): name.cls for name in EVENTS}
        for line in self._lines:
            if (cls := classes[line.name]) is not None and not line.again:
                await dispatcher.adispatch(line.name, cls(**line.fields))

    @on("meeting.*", priority=FIRST)
    async def only_once(self, event: NotificationEvent | ECSTEvent) -> None:
        """Stop an event that was handled before."""
        if str(event.event_id) in self._done:
            self._write(event, again=True)
            event.stop_propagation()

    @on("meeting.*", priority=LAST)
    async def write_down(self, event: NotificationEvent | ECSTEvent) -> None:
        """Write the event into the file, before anybody learns that it was handled."""
        self._done.add(str(event.event_id))
        self._write(event, fields=msgspec.to_builtins(event))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, event: NotificationEvent | ECSTEvent, **more: Any) -> None:
        happened = event.event_timestamp.timestamp()
        line = Line(str(event.name), str(event.event_id), happened, time.time(), **more)
        self._file.write(_encode(line))


def read(path: Path) -> list[Line]:
    """Return the complete lines of a ledger."""
    return [msgspec.json.decode(line, type=Line) for line in path.read_bytes().split(b"\n")[:-1]]


def _encode(line: Line) -> bytes:
    return msgspec.json.encode(line) + b"\n"
