"""A listener under a policy of the host: that of its plugin, that of the dispatched name, or both."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable, Generator
from copy import copy
from functools import partial
from time import perf_counter
from types import CoroutineType
from typing import TYPE_CHECKING, Any, Final

from silbo._reports import note_plugin
from silbo.dispatch.event_state import State, has_slots, keep_state, put_back
from silbo.dispatch.on_loop import OnLoop
from silbo.dispatch.options import ErrorPolicy, Listener, Options
from silbo.dispatch.owner import Run
from silbo.dispatch.running import ConfiguredListener, Observe, fail_delivery
from silbo.dispatch.source import describe_listener
from silbo.errors import ListenerTimeout, PluginOff, PluginUnloaded
from silbo.event import Refusal, set_mark
from silbo.policy import Policy

if TYPE_CHECKING:
    from silbo.dispatch.owner import Owner

__all__ = ["PolicyListener"]

logger = logging.getLogger(__name__)

HEEDS_WITHIN: Final = 1.0
"""Seconds after its time limit in which a listener must have ended; after that it is reported that it has not."""
_UNWATCHED = OnLoop()
"""Marks the listeners that belong to no plugin; nobody looks at it."""


class PolicyListener(ConfiguredListener):
    """A listener that runs under a policy.

    It runs its coroutine by hand: so the time that it holds the event loop is known, and a time limit costs nothing before
    the listener waits for something.

    Args:
        target: The callable that is run.
        options: The options of its registration.
        on_error: The effect of its errors if no policy says it: its own ``on_error``, else the dispatcher's.
        rank: The priority, as it is compared.
        unregister: Removes the registration.
        owner: The plugin; None for a listener of the host.
        policy: The policy of the name, of the plugin, or both.
        report: The dispatcher's hook for errors; None if it has none.

    Attributes:
        owner: The plugin.
    """

    __slots__ = (  # the attributes that each run reads: this is faster than __dict__, which functools.update_wrapper has filled
        "_is_once",
        "_keeps_state",
        "_limit",
        "_on_failure",
        "_on_loop",
        "_report",
        "_report_after",
        "_slotless",
        "_target",
        "owner",
    )

    def __init__(
        self,
        target: Listener,
        options: Options,
        on_error: ErrorPolicy,
        *,
        rank: object,
        unregister: Callable[[], None],
        owner: Owner | None,
        policy: Policy | None,
        report: Callable[[Exception, Any, Listener], object] | None,
    ) -> None:
        super().__init__(target, options, on_error, rank=rank, unregister=unregister)
        self.owner = owner
        self._target = target
        self._on_loop = _UNWATCHED if owner is None else owner.on_loop
        self._report = report
        self._is_once = options.once
        self._slotless: type | None = None  # the last class of events that has no slots
        policy = policy or Policy()
        limits = [limit for limit in (options.timeout, policy.timeout) if limit is not None]
        self._limit: float | None = min(limits, default=None)
        self._report_after = policy.report_after
        self._on_failure: object = on_error if policy.on_failure is None else policy.on_failure
        if policy.on_failure == "collect":
            self._policy = "collect"
        self._keeps_state = self._on_failure != "raise" and not options.concurrent
        self.plain = not options.concurrent and self._on_failure != "collect" and self.container is None

    def share_runs(self, other: ConfiguredListener) -> None:
        """Count a run of another listener as one of this: both are one registration."""
        self._registered = other.registered()

    def limited(self, timeout: float) -> PolicyListener:
        """Return this listener with a time limit in seconds, unless it has one."""
        if self._limit is not None:
            return self
        limited = copy(self)
        limited.share_runs(self)
        limited._limit = timeout  # noqa: SLF001  # a copy of this object
        return limited

    async def __call__(self, event: Any, *, listener: Listener | None = None, observe: Observe | None = None) -> None:
        """Run the target, or another listener in its place, under the policy."""
        if observe is None and listener is None:
            await self.run(event)
            return
        owner = self.owner
        if owner is not None and owner.is_off():
            self._pass_over(owner, event)
            return
        if self._is_once and not self.begin_once(event):
            return
        state = self._keep(event) if self._keeps_state else None
        run = partial(self._run, self.target if listener is None else listener)
        try:
            await (run(event) if observe is None else observe(run, event))
        except Exception as error:  # the policy decides; a cancellation passes through
            if self._raises(error):
                raise
            await self._handle(error, event, state)

    async def run(self, event: Any) -> None:
        """Run the target under the policy. A dispatch calls this method itself, which is faster than to call the object."""
        owner = self.owner
        if owner is not None and (owner.off or owner.has_ended) and owner.is_off():
            self._pass_over(owner, event)
            return
        if self._is_once and not self.begin_once(event):
            return
        state: State | None = None
        if self._keeps_state:
            state = event.__dict__.copy() if type(event) is self._slotless else self._keep(event)
        try:
            # This is _run() with step() in it: without these two calls it takes a third less time. The first step is that of a
            # loop, which ends without a StopIteration: a further eighth less.
            target = self._target
            coroutine: Any = target(event)
            if type(coroutine) is not CoroutineType:
                await self._run_awaitable(coroutine)
                return
            on_loop = self._on_loop
            around = on_loop.coroutine
            around_listener = on_loop.listener
            since = on_loop.since
            on_loop.coroutine = coroutine
            on_loop.listener = self
            on_loop.since = started = perf_counter()
            try:
                for awaited in coroutine.__await__():  # noqa: B007  # read below
                    break
                else:
                    return
            finally:
                now = perf_counter()
                if owner is not None:
                    took = now - (started if started > on_loop.since else on_loop.since)
                    owner.held = held = owner.held + took
                    if held >= owner.held_limit:
                        owner.check_held(self, coroutine, started, took, now)
                on_loop.coroutine = around
                on_loop.listener = around_listener
                if around is not None:
                    on_loop.since = since + now - started
                    on_loop.forget_ended()
            await self._wait(coroutine, awaited, started)
        except Exception as error:  # the policy decides; a cancellation passes through
            if self._raises(error):
                raise
            await self._handle(error, event, state)

    def _keep(self, event: Any) -> State:
        cls = type(event)
        if not has_slots(cls):
            self._slotless = cls
        return keep_state(event)

    # -- the run --------------------------------------------------------------------------------------------

    async def _run(self, listener: Listener, event: Any) -> None:
        await self._run_awaitable(listener(event))

    async def _run_awaitable(self, awaitable: Any) -> None:
        coroutine = as_coroutine(awaitable)
        started = perf_counter()
        try:
            awaited = self.step(coroutine.send, None, coroutine)
        except StopIteration:
            return
        await self._wait(coroutine, awaited, started)

    def step(self, advance: Callable[[Any], Any], value: Any, coroutine: Any) -> Any:
        """Run the coroutine to its next wait or to its end, and count its time on the loop, without that of listeners inside of it."""
        owner = self.owner
        on_loop = self._on_loop
        around = on_loop.coroutine
        around_listener = on_loop.listener
        since = on_loop.since
        on_loop.coroutine = coroutine
        on_loop.listener = self
        on_loop.since = started = perf_counter()
        try:
            return advance(value)
        finally:
            now = perf_counter()
            if owner is not None:
                took = now - max(started, on_loop.since)  # another thread may have written it
                owner.held += took
                if owner.held >= owner.held_limit:
                    owner.check_held(self, coroutine, started, took, now)
            on_loop.coroutine = around
            on_loop.listener = around_listener
            if around is not None:  # its time is not that of the listener around it
                on_loop.since = since + now - started
                on_loop.forget_ended()

    async def _wait(self, coroutine: Any, awaited: Any, started: float) -> None:
        """Run the rest of a coroutine that waits for something."""
        owner, limit, report_after = self.owner, self._limit, self._report_after
        loop = asyncio.get_running_loop()
        waited = perf_counter() - started
        long = None
        if report_after is not None:
            long = loop.call_later(max(0.0, report_after - waited), self._report_long, report_after)
        stubborn = None
        if limit is not None:
            stubborn = loop.call_later(max(0.0, limit - waited) + HEEDS_WITHIN, self._report_stubborn, limit)
        scope = asyncio.timeout(None if limit is None else max(0.0, limit - waited))
        task: Any = asyncio.current_task()
        run = Run(self.__wrapped__, coroutine, scope, task)
        requests = task.cancelling() - task._must_cancel  # noqa: SLF001  # a cancellation that comes with the next wait
        try:
            async with scope:
                if owner is not None:
                    owner.begin_run(run)
                await _Rest(self, coroutine, awaited)
        except TimeoutError:
            if not scope.expired():
                raise
        except asyncio.CancelledError as error:
            if task.cancelling() > requests:
                raise
            text = f"{describe_listener(self.__wrapped__)} was cancelled, but not by its caller"
            raise RuntimeError(text) from error
        except Exception as error:
            if task.cancelling() > requests and not scope.expired():
                raise asyncio.CancelledError from error  # its clean-up has failed: the caller is cancelled all the same
            raise
        finally:
            if long is not None:
                long.cancel()
            if stubborn is not None:
                stubborn.cancel()
            if owner is not None:
                owner.end_run(run)
        if scope.expired():  # also if the listener has caught the cancellation and returned
            if run.is_expired and owner is not None:
                raise PluginUnloaded(owner.name, "it was unloaded while this listener ran")
            if limit is not None:
                raise ListenerTimeout(self.__wrapped__, limit)

    def _report_long(self, after: float) -> None:
        registered = self.registered()
        if registered.was_long:
            return
        registered.was_long = True
        text = f"{describe_listener(self.__wrapped__)} still runs after {after:g} s"
        if self.owner is not None:
            self.owner.report("long", text, listener=self.__wrapped__, error=None)
        else:
            logger.warning("listener runs long: %s", text)

    def _report_stubborn(self, limit: float) -> None:
        text = f"{describe_listener(self.__wrapped__)} does not end, though it was cancelled after its {limit:g} s"
        if self.owner is not None:
            self.owner.report("long", text, listener=self.__wrapped__, error=None)
        else:
            logger.warning("listener runs long: %s", text)

    # -- the end --------------------------------------------------------------------------------------------

    def _raises(self, error: Exception) -> bool:
        """Name the plugin in an error. True if the dispatch raises it, and it is counted already."""
        if self.owner is not None:
            note_plugin(error, self.owner.name, describe_listener(self.__wrapped__))
        if self._on_failure != "raise":
            return False
        self._count_failure()
        return True

    async def _handle(self, error: Exception, event: Any, state: State | None) -> None:
        """Give an error its effect: the dispatch goes on, with the event as it was before the listener ran."""
        try:
            await self._take_effect(error, event, state)
        finally:
            self._count_failure()  # last: a host is told of the failure before the plugin is switched off for it

    def _count_failure(self) -> None:
        if self.owner is not None:
            self.owner.count_failure()

    async def _take_effect(self, error: Exception, event: Any, state: State | None) -> None:
        _drop_own_frames(error)
        if state is not None:
            put_back(event, state)
        if self._on_failure == "refuse":
            self._refuse(event, error)
        if self._on_failure in ("ignore", "refuse"):
            await self._tell(error, event)
        else:
            await self._apply_policy(error, event)

    def _refuse(self, event: Any, error: Exception) -> None:
        plugin = None if self.owner is None else self.owner.name
        set_mark(event, "propagation_stopped", Refusal(plugin=plugin, listener=self.__wrapped__, error=error))

    async def _tell(self, error: Exception, event: Any) -> None:
        """Tell the host of an error that the dispatch does not raise."""
        if self._report is not None:
            answer = self._report(error, event, self.__wrapped__)
            if inspect.isawaitable(answer):
                await answer
        elif self.owner is not None:
            self.owner.report("failed", f"a listener of {event.name!r}", listener=self.__wrapped__, error=error)
        else:
            logger.error("listener failed", exc_info=error, extra={"event_name": str(event.name)})
        fail_delivery(error, event)

    def _pass_over(self, owner: Owner, event: Any) -> None:
        """Leave the listener out, as its plugin is switched off, or was unloaded while the dispatch went on."""
        if owner.off:
            error: Exception = PluginOff(owner.name, owner.off, pause=owner.seconds_off())
        else:
            error = PluginUnloaded(owner.name, "it was unloaded")
        refuses = self._on_failure == "refuse"
        if refuses:
            self._refuse(event, error)
        if refuses or (owner.off and not owner.is_off_by_host):  # a received event is tried again
            fail_delivery(error, event)


class _Rest:
    """The rest of a coroutine that waits for something; to be awaited once."""

    __slots__ = ("_awaited", "_coroutine", "_listener")

    def __init__(self, listener: PolicyListener, coroutine: Any, awaited: Any) -> None:
        self._listener = listener
        self._coroutine = coroutine
        self._awaited = awaited

    def __await__(self) -> Generator[Any, Any, None]:
        step, coroutine, awaited = self._listener.step, self._coroutine, self._awaited
        while True:
            try:
                answer = yield awaited
            except GeneratorExit:
                coroutine.close()
                raise
            except BaseException as thrown:  # noqa: BLE001  # the coroutine decides
                advance, value = coroutine.throw, thrown
            else:
                advance, value = coroutine.send, answer
            try:
                awaited = step(advance, value, coroutine)
            except StopIteration:
                return


def _drop_own_frames(error: Exception) -> None:
    """Begin an error's traceback at the listener: an error that somebody keeps must not keep the listener of an unloaded plugin."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    BaseException.with_traceback(error, trace)  # also of a frozen class


def as_coroutine(awaitable: Any) -> Any:
    """Return an object with ``send`` and ``throw`` that runs an awaitable."""
    return awaitable if hasattr(awaitable, "throw") else awaitable.__await__()
