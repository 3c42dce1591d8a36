"""A watchdog: its thread names the listener of a plugin that holds the event loop for too long."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

from silbo._checks import check_seconds
from silbo.dispatch.source import describe_listener
from silbo.plugins.under_way import DISPATCHES

if TYPE_CHECKING:
    from silbo.dispatch.on_loop import OnLoop
    from silbo.dispatch.options import Listener

__all__ = ["Blocked", "Watchdog"]

logger = logging.getLogger(__name__)

LOOKS: Final = 4
"""Looks at the loop in ``slow_after`` seconds."""
LEAST_SHARE: Final = 1 / 8
"""The part of a gap between two looks that the process must have been on a processor for, or it stood still."""
ENDS_WITHIN: Final = 1.0
"""Seconds that :meth:`Watchdog.close` waits for its thread, which a hook may hold."""
STACK_DEPTH: Final = 50
"""Most frames of a reported stack, the innermost."""
REMEMBERED: Final = 1000
"""Most slow steps, and most gaps between two looks, that a watchdog remembers."""
_SILBO: Final = str(Path(__file__).parents[1]) + os.sep
_DEBUGGERS: Final = frozenset({"bdb.py", "pydevd.py"})
"""The files in which debuggers written in Python wait; pdb, ipdb and pudb wait inside of bdb."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocked:
    """A listener of a plugin that held the event loop for too long, without a wait. Its ``str`` is a sentence for people.

    Attributes:
        plugin: The name of the plugin.
        listener: The listener.
        duration: Seconds, without those in which the whole process stood still.
        now_at: ``file:line`` that the listener has reached; empty if it has ended.
        stack: The stack from the listener inwards, as in a traceback; empty if it has ended.
    """

    plugin: str
    listener: Listener
    duration: float
    now_at: str = ""
    stack: str = ""

    def __str__(self) -> str:
        listener = describe_listener(self.listener)
        if not self.stack:
            return f"{listener} held the event loop for {self.duration:.3g} s"
        return f"{listener} holds the event loop, for {self.duration:.3g} s by now; it is at {self.now_at}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _SlowStep:
    """A step of a listener that took too long, and has ended. ``coroutine`` and ``thread`` are their identities."""

    listener: Any
    coroutine: int
    thread: int
    began: float
    ended: float
    took: float


class Watchdog:
    """A watchdog over the listeners of plugins. It has one thread, between :meth:`start` and :meth:`close`.

    A dispatch inside of a step is not the listener's own time: who blocks there is told for himself, or is the host's.

    A listener that holds the loop for ``slow_after`` seconds is reported once for each such step: while it runs, with its line and
    stack, if other threads can run meanwhile. A call that keeps the GIL is seen when it returns, or else the step is reported
    after its end, with its time.

    Not reported is a step that is long only because the whole process stood still (the machine slept, SIGSTOP, a native
    debugger), nor a step in which a Python debugger was seen. A call that keeps the GIL and yet does not use the processor
    looks as if the process stood still, so it is not reported either.

    Args:
        on_loop: The mark of the listeners.
        slow_after: Seconds.
        report: Called with each report, in the watchdog's thread.
    """

    def __init__(self, on_loop: OnLoop, *, slow_after: float, report: Callable[[Blocked], object]) -> None:
        self._on_loop = on_loop
        self._unwatched = on_loop.on_slow
        self._slow_after = check_seconds("slow_after", slow_after)
        self._interval = slow_after / LOOKS
        self._hook = report
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._slow: deque[_SlowStep] = deque(maxlen=REMEMBERED)  # to be judged, which nobody does in a forked child
        # Slow steps, and dispatches seen inside of a step: thread, beginning, seconds.
        self._own: deque[tuple[int | None, float, float]] = deque(maxlen=REMEMBERED)
        self._named: deque[tuple[int, float]] = deque(maxlen=REMEMBERED)  # coroutine, and when it got the loop
        self._gaps: deque[tuple[float, float, float]] = deque(maxlen=REMEMBERED)  # beginning, end, seconds that count
        self._debugger_at = float("-inf")
        self._alive_at = 0.0
        self._looked_at = 0.0
        self._used = 0.0
        on_loop.slow_after = slow_after  # the owners that are made from now on tell of slow steps

    def start(self) -> None:
        """Start the thread, unless it runs."""
        if self._thread is not None and self._thread.is_alive():  # it is not in a forked child
            return
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(self._closing,), name="silbo-watchdog", daemon=True)
        self._thread.start()
        self._on_loop.on_slow = self._note_slow
        atexit.register(self.close)  # or the end of the program would cut a report off

    def close(self) -> None:
        """End the thread. Steps that have ended are reported before. May be called twice, and by the hook."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._on_loop.on_slow = self._unwatched
        atexit.unregister(self.close)
        if thread.is_alive():  # not in a forked child
            self._closing.set()
            if thread is not threading.current_thread():
                thread.join(ENDS_WITHIN)

    def _note_slow(self, listener: Any, coroutine: Any, began: float, took: float) -> None:
        """Leave a slow step to the watchdog's thread. Called by the thread of the step."""
        self._slow.append(
            _SlowStep(
                listener=listener,
                coroutine=id(coroutine),
                thread=threading.get_ident(),
                began=began,
                ended=perf_counter(),
                took=took,
            )
        )

    # -- the thread -----------------------------------------------------------------------------------------

    def _watch(self, closing: threading.Event) -> None:
        self._mark_alive()
        is_closing = False
        while not is_closing:
            is_closing = closing.wait(self._interval)
            self._note_gap()
            self._judge_ended()
            self._look()
            self._looked_at = perf_counter()

    def _mark_alive(self) -> None:
        self._alive_at = perf_counter()
        self._used = process_time()

    def _note_gap(self) -> None:
        """Note how much of the time since this thread last ran counts, if that is far longer than it should be.

        If something kept the GIL, the time on the processor counts; if the process stood still, nothing counts. A short time may
        also come from a busy machine: as much counts as this thread may be late.
        """
        alive_at, used = self._alive_at, self._used
        self._mark_alive()
        gap = self._alive_at - alive_at
        if gap > 2 * self._interval:
            counts = min(gap, self._used - used)
            if counts < gap * LEAST_SHARE:
                counts = 0.0
            if gap <= self._slow_after:
                counts = max(counts, 2 * self._interval)
            self._gaps.append((alive_at, self._alive_at, counts))

    def _held(self, began: float, ended: float, thread: int | None = None) -> float:
        """Return the seconds between two times, without those in which the process stood still.

        Args:
            began: The first time.
            ended: The last time.
            thread: Leave out also the slow steps of this thread that lie in between, those of the listeners inside of a step, and the
                dispatches that were seen inside of it.
        """
        held = ended - began
        for gap_began, gap_ended, counts in self._gaps:
            overlap = min(ended, gap_ended) - max(began, gap_began)
            held -= max(0.0, overlap - counts)
        return held - sum(own for other, inside, own in self._own if other == thread and inside >= began)

    def _look(self) -> None:
        """Report the listener that holds the loop now, if it does so for too long."""
        on_loop = self._on_loop
        coroutine, listener, since = on_loop.coroutine, on_loop.listener, on_loop.since
        if coroutine is None or since <= self._debugger_at or (id(coroutine), since) in self._named:
            return
        now = perf_counter()
        if self._held(since, now) < self._interval:
            return
        thread, frames = _running_frames(coroutine)
        if any(os.path.basename(frame.f_code.co_filename) in _DEBUGGERS for frame in frames):
            self._debugger_at = now
            return
        if any(frame.f_code in DISPATCHES for frame in frames):  # by the listener: what holds the loop is another's
            began = max(since, self._looked_at)
            self._own.append((thread, began, self._held(began, now)))
            return
        duration = self._held(since, now, thread)
        if frames and duration >= self._slow_after:
            now_at, stack = _describe(frames)
            if on_loop.since == since:  # else the step has ended, and the stack may be that of another
                self._named.append((id(coroutine), since))
                self._tell(listener, duration, now_at, stack)

    def _judge_ended(self) -> None:
        """Report the slow steps that have ended, unless something else made them slow."""
        for _ in range(len(self._slow)):
            step = self._slow.popleft()
            duration = min(step.took, self._held(step.began, step.ended, step.thread))
            self._own.append((step.thread, step.began, duration))
            if any(one == step.coroutine and step.began <= since <= step.ended for one, since in self._named):
                continue
            if duration >= self._slow_after and not step.began <= self._debugger_at <= step.ended:
                self._tell(step.listener, duration)

    def _tell(self, listener: Any, duration: float, now_at: str = "", stack: str = "") -> None:
        blocked = Blocked(
            plugin=listener.owner.name,
            listener=listener.__wrapped__,
            duration=duration,
            now_at=now_at,
            stack=stack,
        )
        try:
            self._hook(blocked)
        except Exception:
            logger.exception("a blocked event loop could not be reported", extra={"plugin": blocked.plugin})
        self._mark_alive()  # a long report is no gap


def _running_frames(coroutine: Any) -> tuple[int | None, list[FrameType]]:
    """Return the thread that runs a coroutine, and the frames from the coroutine inwards; no frames if no thread runs it."""
    own = getattr(coroutine, "cr_frame", None) or getattr(coroutine, "gi_frame", None)
    for thread, innermost in sys._current_frames().items():  # noqa: SLF001  # documented, in spite of its name
        frame: FrameType | None = innermost
        frames = []
        while frame is not None:
            frames.append(frame)
            if frame is own:
                return thread, frames[::-1]
            frame = frame.f_back
    return None, []


def _describe(frames: list[FrameType]) -> tuple[str, str]:
    """Return the ``file:line`` that a listener has reached, and its stack as text."""
    while len(frames) > 1 and frames[0].f_code.co_filename.startswith(_SILBO):  # silbo's wrapper of the listener
        frames = frames[1:]
    innermost = [(frame, frame.f_lineno) for frame in frames[-STACK_DEPTH:]]
    stack = "".join(traceback.StackSummary.extract(iter(innermost), lookup_lines=False).format())
    return f"{frames[0].f_code.co_filename}:{frames[0].f_lineno}", stack
