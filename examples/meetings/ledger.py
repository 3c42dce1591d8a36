"""A file that remembers what was done, whatever kills its program. In an application a database has this place."""

import time
from pathlib import Path
from typing import Any

import msgspec

from examples.meetings.events import EVENTS
from silbo import FIRST, LAST, ECSTEvent, IAsyncEventDispatcher, NotificationEvent, on


class Line(msgspec.Struct):
    """One event, as it was done."""

    name: str
    event_id: str
    happened: float
    written: float
    fields: dict[str, Any] = {}
    again: bool = False
    """It came once more, after it was done; nothing was done then."""


class Ledger:
    """A subscriber with two listeners, around all others: the last one writes each event down, when all is done.

    The first one stops an event that is in the file already, so it has no second effect. Here each event is dispatched
    once, and its id names it.
    """

    def __init__(self, path: Path) -> None:
        # Without a buffer: each line is with the system when it is written, and a `kill -9` takes nothing back from
        # there. A power cut does; against that there is os.fsync().
        self._file = path.open("ab+", buffering=0)
        self._lines = read(path)
        self._file.truncate(sum(len(_encode(line)) for line in self._lines))  # a line that was cut off was not written
        self._done = {line.event_id for line in self._lines}

    async def replay(self, dispatcher: IAsyncEventDispatcher) -> None:
        """Dispatch all that was done by those before us, so that our listeners know it, too.

        Before this subscriber and a bridge are added: they have had it.
        """
        classes = {str(name): name.cls for name in EVENTS}
        for line in self._lines:
            if (cls := classes[line.name]) is not None and not line.again:
                await dispatcher.adispatch(line.name, cls(**line.fields))

    @on("meeting.*", priority=FIRST)
    async def only_once(self, event: NotificationEvent | ECSTEvent) -> None:
        """Nobody after this listener hears an event that is done."""
        if str(event.event_id) in self._done:
            self._write(event, again=True)
            event.stop_propagation()

    @on("meeting.*", priority=LAST)
    async def write_down(self, event: NotificationEvent | ECSTEvent) -> None:
        """Whoever is told that the event is done, is told after this."""
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
    """The lines of a ledger that are there as a whole."""
    return [msgspec.json.decode(line, type=Line) for line in path.read_bytes().split(b"\n")[:-1]]


def _encode(line: Line) -> bytes:
    return msgspec.json.encode(line) + b"\n"
