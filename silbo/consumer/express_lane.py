"""The express lane of a consumer: first attempts of a batch right after one another, as long as nothing is in the way.

A delivery that waits, fails, or is in any way special leaves the lane, and goes the long way of :mod:`silbo.consumer.attempts`.
"""

from __future__ import annotations

import asyncio
from contextvars import copy_context
from typing import Any, Final, NamedTuple

from silbo._causes import cause
from silbo._host_code import Begun
from silbo._message_observers import find_observers
from silbo.consumer.acknowledgements import Acknowledgements
from silbo.consumer.handling_options import HandlingOptions
from silbo.consumer.heard_names import Heard
from silbo.consumer.keyed_queue import KeyedQueue, QueuedBatch, QueuedDelivery
from silbo.consumer.run_state import RunState
from silbo.consumer.shared_lock import SharedLock
from silbo.dispatch.dispatcher import has_own_adispatch
from silbo.dispatch.received_event import Received
from silbo.event import set_mark
from silbo.message import Origin
from silbo.protocols import Receiver
from silbo.wire.encode import MAX_SIZE
from silbo.wire.formats import open_envelope

__all__ = ["BegunDispatch", "ExpressLane"]


_DONE: Final = object()


class BegunDispatch(NamedTuple):
    """A dispatch that has made its first step.

    Attributes:
        dispatch: The dispatch.
        heard: The answer to the question if somebody hears the name.
        publication: The publication to be remembered when the delivery is handled; empty for none.
    """

    dispatch: Begun
    heard: Heard
    publication: str


class Left(NamedTuple):
    """A delivery that has left the lane.

    Attributes:
        queued: The delivery; it is in work.
        begun: Its dispatch; None if it is for the long way.
        began_at: The loop's time when its turn came.
    """

    queued: QueuedDelivery
    begun: BegunDispatch | None
    began_at: float


class ExpressLane:
    """The express lane of one worker: it runs in the worker's task.

    Nothing else of the loop runs meanwhile. So what can't change without that is looked at once in a run, which takes a turn
    of the loop at most.

    Attributes:
        received: The worker's object for the event in work.
    """

    def __init__(
        self,
        options: HandlingOptions,
        *,
        receiver: Receiver,
        queue: KeyedQueue,
        acks: Acknowledgements,
        run: RunState,
        lock: SharedLock,
    ) -> None:
        self.received: Final = Received(None, None, options.listener_timeout)
        self._options = options
        self._skips_own_instance = receiver.skips_own_instance
        self._queue = queue
        self._acks = acks
        self._run_state = run
        self._lock = lock
        self._time = asyncio.get_running_loop().time
        # Of the dispatch that was begun last:
        self._coroutine: Any = None
        self._key: str | None = None
        self._heard = Heard.BY_NOBODY
        self._publication = ""
        self._address = ""  # of the batch
        self._epoch: int | None = None  # of the batch
        # Of the last message:
        self._origin = Origin("", "")
        self._is_unwanted = self._options.rebuilder.is_unwanted(
            self._origin, skips_own_instance=self._skips_own_instance
        )
        self._find_direct = options.rebuilder.find_direct
        self._recent = options.heard.recent

    def run(self, queued: QueuedBatch, now: float) -> Left | None:
        """Attempt the next deliveries of the first batch in the queue.

        Returns:
            The delivery that has left the lane; None if the batch is done, the turn is over, or a delivery waits for others
            of its key.
        """
        batch, first = queued.batch, queued.position
        raws, ids, end = batch.raws, batch.ids, len(batch)
        self._address = batch.address
        self._epoch = batch.epoch
        # Without ids nothing is in hand, and an address may be one of Pub/Sub's channels, of which there is no end.
        held = self._acks.list_at(batch.address) if ids else {}
        time, ends_at = self._time, self._run_state.turns.ends_at
        stats, received, step = self._run_state.stats, self.received, self._step
        known = self._run_state.known
        task: Any = asyncio.current_task()
        position = first
        began_at = now
        begun: Begun | None = None
        leaves = not self._is_open()
        try:
            while position < end and not leaves:
                if ids and held.get(ids[position]) is not batch:  # another consumer has it
                    leaves = True
                    break
                context = copy_context()
                self._coroutine = awaited = error = None
                try:
                    awaited = context.run(step, raws[position])
                except BaseException as raised:  # noqa: BLE001  # it goes on with the delivery
                    error = raised
                if self._coroutine is None:
                    if error is not None and not isinstance(error, Exception | asyncio.CancelledError):
                        raise error
                    leaves = True
                elif (
                    awaited is _DONE
                    and received.isolated is None
                    and not task.cancelling()
                    and not getattr(task, "_must_cancel", False)
                ):
                    if received.once is not None:
                        received.end(done=True)
                    received.name = None  # what a task that a listener has left behind dispatches is not this dispatch
                    if self._heard is Heard.ON_PURPOSE:  # a call would take longer
                        stats.handled += 1
                    else:
                        stats.unheard += 1
                        self._run_state.missed += 1  # only names in events= take the lane
                    if known is not None and self._publication:
                        known.note_handled(self._publication)
                    position += 1
                    began_at = time()
                    if began_at >= ends_at:
                        break
                else:
                    begun = Begun(self._coroutine, context, awaited, StopIteration() if awaited is _DONE else error)
                    leaves = True
        finally:
            error = None  # or it would hold itself
            if position > first:
                self._acks.acknowledge_part(batch, first, position)
                self._queue.leave(queued, position - first)
                self._run_state.pace.note(began_at - now, position - first)
        return self._leave(queued, begun, began_at) if leaves else None

    def _is_open(self) -> bool:
        """Return True if deliveries may take the lane now."""
        options = self._options
        return (
            (options.inbox is None or self._run_state.known is not None)
            and has_own_adispatch(options.dispatcher)
            and not find_observers(options.dispatcher)
            and not self._lock.is_held_alone()
            and self._acks.is_certain()
        )

    def _step(self, raw: bytes) -> Any:
        """Make the event of a message, and begin its dispatch: in the context of the delivery.

        Returns:
            What the dispatch waits for; or _DONE. If there is no coroutine, the message has to go the long way.

        Raises:
            BaseException: A listener's; or the class's, if there is no coroutine.
        """
        try:
            envelope = open_envelope(raw)
        except Exception:  # noqa: BLE001  # the long way knows what is wrong
            return None
        headers = envelope.headers
        get = headers.get
        direct = self._find_direct(envelope.message_name)
        if direct is None or get("version", "1") != "1" or len(raw) > MAX_SIZE:
            return None
        key = get("key")
        if key is None:
            if self._options.needs_keys or direct.takes_key:
                return None
        elif key in self._queue.keys:
            return None
        origin = self._origin
        app = get("app")
        if app != origin[0] or get("instance", "") != origin[1]:
            origin = self._origin = Origin("", "") if app is None else Origin(app, get("instance", ""))
            self._is_unwanted = self._options.rebuilder.is_unwanted(origin, skips_own_instance=self._skips_own_instance)
        if self._is_unwanted:
            return None
        name = direct.name
        known = self._run_state.known
        # Where nothing but the counts depends on it, the listeners as they were at the last read will do. An inbox does: what
        # nobody has heard is not remembered, and what a new listener hears is.
        heard = self._recent(name) if known is None else None
        if heard is None:
            heard = self._options.heard[name]
        event = direct.read(bytes(envelope.payload))
        if event is None:
            return None
        self._publication = ""
        if known is not None and heard:
            publication = get("publication", "")
            if not publication or not known.use_answer(publication):  # a further delivery of it, or the inbox is away
                return None
            self._publication = known.label(publication, self._address, self._epoch)
        origin = tuple.__new__(Origin, origin)
        origin._message = envelope  # noqa: SLF001  # its headers, which are made when a listener reads them
        if self._epoch is not None:
            origin.epoch = self._epoch
        if getattr(event, "__silbo_direct__", None) is type(event):  # what set_mark would find out again
            event.origin = origin
        else:
            set_mark(event, "origin", origin)
        cause.set(envelope)
        self.received.begin(event, name)
        self._key = key
        self._heard = heard
        coroutine = self._coroutine = self._options.dispatcher.adispatch(name, event)
        try:
            return coroutine.send(None)
        except StopIteration:
            return _DONE

    def _leave(self, queued: QueuedBatch, begun: Begun | None, began_at: float) -> Left | None:
        """Let the next delivery leave the lane. None if it has to wait for others of its key."""
        delivery = self._acks.single_out(queued.batch, queued.position)
        self._queue.leave(queued, 1)
        if begun is not None:
            single = self._queue.put_in_work(delivery, None, self._key)
            assert single is not None  # its key was free
            return Left(single, BegunDispatch(begun, self._heard, self._publication), began_at)
        single = self._queue.put_in_work(
            delivery, *self._options.rebuilder.examine(delivery, skips_own_instance=self._skips_own_instance)
        )
        return None if single is None else Left(single, None, began_at)
