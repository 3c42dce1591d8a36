"""The tasks of a consumer or relay, and the host's code in them: what that does to its task ends with it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import pytest

from silbo import _host_code
from silbo._host_code import HostCode, OwnTasks
from silbo.errors import CircularWait, StopIncomplete

Code = Callable[[], Awaitable[object]]


@dataclass
class Stats:
    slow: int = 0


class Tasks(OwnTasks):
    def __init__(self) -> None:
        self.stopping = asyncio.Event()
        super().__init__("consumer", stopping=self.stopping, on_failure=self.stopping.set, stats=Stats())
        self.runner = asyncio.current_task()

    async def run(self, code: Code) -> Any:
        """Run code of a host in a task, which must be able to go on afterwards."""
        answers: list[Any] = []

        async def work() -> None:
            try:
                answers.append(await self.isolate(code(), "a listener"))  # type: ignore[arg-type]
            except Exception as error:
                answers.append(error)
            task = asyncio.current_task()
            assert task is not None
            assert task.cancelling() == 0
            for _ in range(3):
                await asyncio.sleep(0)
            await asyncio.wait([asyncio.create_task(asyncio.sleep(0))])
            self.stopping.set()

        task = self.start(work())
        await asyncio.wait([task], timeout=30)
        self.raise_error()
        (answer,) = answers
        return answer


def this_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task


# -- cancellations that are left behind ---------------------------------------------------------------------


async def cancels_and_returns() -> str:
    this_task().cancel()
    return "done"


async def cancels_and_catches() -> str:
    this_task().cancel()
    with suppress(asyncio.CancelledError):
        await asyncio.sleep(30)
    return "done"


async def cancels_three_times() -> str:
    for _ in range(3):
        this_task().cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(30)
    this_task().cancel()
    return "done"


async def cancels_and_takes_back() -> str:
    """Python 3.11 and 3.12 raise it at the next await all the same."""
    this_task().cancel()
    this_task().uncancel()
    return "done"


async def times_out_as_async_timeout_4_0_2() -> str:
    """It cancels the task, and never calls uncancel()."""
    handle = asyncio.get_running_loop().call_soon(this_task().cancel)
    try:
        await asyncio.sleep(30)
    except asyncio.CancelledError:
        return "done"
    finally:
        handle.cancel()
    raise AssertionError


LEAVING = [
    cancels_and_returns,
    cancels_and_catches,
    cancels_three_times,
    cancels_and_takes_back,
    times_out_as_async_timeout_4_0_2,
]


@pytest.mark.parametrize("code", LEAVING)
async def test_cancellation_that_code_leaves_behind_is_taken_back(code: Code) -> None:
    """The code has succeeded, and the task goes on."""
    assert await Tasks().run(code) == "done"


@pytest.mark.parametrize("code", LEAVING)
async def test_error_of_code_that_leaves_a_cancellation_is_raised_as_it_is(code: Code) -> None:
    async def fails() -> None:
        await code()
        raise ValueError("no stock")

    error = await Tasks().run(fails)
    assert isinstance(error, ValueError)


async def cancels_itself() -> None:
    this_task().cancel()
    await asyncio.sleep(30)


async def raises_cancelled() -> None:
    raise asyncio.CancelledError


async def is_cancelled_together_with_a_failure() -> None:
    """As concurrent listeners raise it."""
    raise BaseExceptionGroup("two failed", [ValueError("no stock"), asyncio.CancelledError()])


async def awaits_a_cancelled_task() -> None:
    other = asyncio.create_task(asyncio.sleep(30))
    other.cancel()
    await other


CANCELLED = [cancels_itself, raises_cancelled, is_cancelled_together_with_a_failure, awaits_a_cancelled_task]


@pytest.mark.parametrize("code", CANCELLED)
async def test_code_that_is_cancelled_but_not_by_the_owner_has_failed(code: Code) -> None:
    """An error as others: the attempt has failed, and no task ends in silence."""
    error = await Tasks().run(code)
    assert isinstance(error, RuntimeError)
    assert str(error) == "a listener was cancelled, but not by its consumer"


async def test_owner_that_ends_a_task_ends_the_code_in_it() -> None:
    tasks = Tasks()
    begun = asyncio.Event()
    seen: list[BaseException] = []

    async def code() -> None:
        begun.set()
        try:
            await asyncio.sleep(3600)
        except BaseException as error:
            seen.append(error)
            raise

    async def work() -> None:
        await tasks.isolate(code(), "a listener")

    task = tasks.start(work())
    await begun.wait()
    await tasks.end([task], 0)
    assert task.cancelled()
    assert [type(error) for error in seen] == [asyncio.CancelledError]
    tasks.raise_error()


async def test_cancellation_of_all_tasks_is_none_that_code_has_left() -> None:
    """As ``asyncio.run`` ends: the owner hears of it in the same turn of the loop, and the code has not failed."""
    answers: list[BaseException] = []
    begun = asyncio.Event()

    async def code() -> None:
        begun.set()
        await asyncio.sleep(3600)

    async def own() -> None:
        tasks = Tasks()

        async def work() -> None:
            try:
                await tasks.isolate(code(), "a listener")
            except BaseException as error:
                answers.append(error)
                raise

        _ = tasks.start(work())
        try:
            await tasks.stopping.wait()
        finally:
            await tasks.end_all()

    owner = asyncio.create_task(own())
    await begun.wait()
    mine = asyncio.current_task()
    for task in asyncio.all_tasks() - {mine}:
        task.cancel()
    await asyncio.wait([owner], timeout=30)
    assert [type(error) for error in answers] == [asyncio.CancelledError]


async def test_swallowed_cancellation_is_met_at_the_next_turn() -> None:
    """As ``asyncio.wait_for`` may do on 3.11: without this, a loop would run on for ever."""
    tasks = Tasks()
    turns = 0
    begun = asyncio.Event()

    async def loop() -> None:
        nonlocal turns
        while True:
            tasks.check_cancelled()
            turns += 1
            begun.set()
            with suppress(asyncio.CancelledError):
                await asyncio.Event().wait()

    task = tasks.start(loop())
    await begun.wait()
    await asyncio.wait_for(tasks.end([task], 0), 30)
    assert turns == 1


# -- context ------------------------------------------------------------------------------------------------

tenant: ContextVar[str] = ContextVar("tenant", default="none")


async def test_code_runs_in_a_context_of_its_own() -> None:
    """A variable is seen by the code that has set it, also after an await, and by nobody else."""
    tasks = Tasks()
    seen: list[str] = []

    async def code() -> None:
        seen.append(tenant.get())
        tenant.set("a")
        await asyncio.sleep(0)
        seen.append(tenant.get())
        with pytest.raises(ValueError, match="away"):
            await fails()
        seen.append(tenant.get())

    async def fails() -> None:
        await asyncio.sleep(0)
        raise ValueError("away")

    async def twice() -> None:
        tenant.set("outer")
        await tasks.isolate(code(), "a listener")
        await tasks.isolate(code(), "a listener")
        seen.append(tenant.get())

    await tasks.run(twice)
    assert seen == ["outer", "a", "a", "outer", "a", "a", "outer"]


# -- the end of a task --------------------------------------------------------------------------------------


async def returns() -> None:
    pass


async def fails() -> None:
    raise KeyError("bug")


class Exit(BaseException):
    pass


async def exits() -> None:
    raise Exit


@pytest.mark.parametrize(
    ("work", "error"),
    [(returns, RuntimeError), (fails, KeyError), (exits, Exit), (raises_cancelled, RuntimeError)],
)
async def test_task_that_ends_before_the_stop_is_an_error(work: Callable[[], Any], error: type[BaseException]) -> None:
    tasks = Tasks()
    others = tasks.start(asyncio.Event().wait())  # type: ignore[arg-type]
    _ = tasks.start(work())
    await asyncio.wait_for(tasks.stopping.wait(), 30)
    with pytest.raises(error):
        tasks.raise_error()
    await tasks.end_all()
    assert others.cancelled()


# -- circles ------------------------------------------------------------------------------------------------


async def test_code_that_awaits_what_waits_for_it_gets_an_error() -> None:
    tasks = Tasks()
    runner = asyncio.current_task()
    assert runner is not None

    async def code() -> None:
        await runner

    error = await tasks.run(code)
    assert isinstance(error, CircularWait)
    assert "run() of that consumer" in str(error)


async def ends_in_a_circle(code: Callable[[asyncio.Task[Any]], Awaitable[object]]) -> BaseException | None:
    """Run code that waits for the run that ends it; the error of the run."""
    begun = asyncio.Event()

    async def run() -> None:
        tasks = Tasks()
        runner = this_task()

        async def work() -> None:
            async def host() -> None:
                begun.set()
                await code(runner)

            await tasks.isolate(host(), "a listener")

        task = tasks.start(work())
        await begun.wait()
        await tasks.end([task], 0.01)
        tasks.raise_error()

    running = asyncio.create_task(run())
    await asyncio.wait([running], timeout=30)
    assert running.done()
    if left_behind := asyncio.all_tasks() - {this_task()}:
        await asyncio.wait(left_behind, timeout=30)
    return None if running.cancelled() else running.exception()


async def ignores_cancellation(_: object) -> None:
    for _ in range(100):
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("code", [asyncio.gather, ignores_cancellation])
async def test_code_that_does_not_end_is_left_behind_and_named(
    code: Callable[[asyncio.Task[Any]], Awaitable[object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However it waits for its own end: the stop ends, with an error that says where it hangs."""
    monkeypatch.setattr(_host_code, "ENDS_WITHIN", 0.1)
    error = await ends_in_a_circle(code)
    assert isinstance(error, StopIncomplete)
    assert "ends_in_a_circle.<locals>.run.<locals>.work.<locals>.host" in str(error)
    assert f"{__file__}:" in str(error)


async def test_code_that_waits_for_its_run_with_asyncio_wait_ends_with_its_cancellation() -> None:
    async def waits(runner: asyncio.Task[Any]) -> None:
        await asyncio.wait([runner])

    assert await ends_in_a_circle(waits) is None


async def test_call_that_waits_for_the_end_is_refused_in_a_task_of_the_run_only() -> None:
    tasks = Tasks()

    async def calls() -> None:
        tasks.refuse_circle("aclose()")

    error = await tasks.run(calls)
    assert isinstance(error, CircularWait)
    tasks.refuse_circle("aclose()")


# -- slow code ----------------------------------------------------------------------------------------------


async def test_slow_code_is_reported_counted_and_forgotten() -> None:
    tasks = Tasks()
    goes_on = asyncio.Event()
    reported: asyncio.Queue[tuple[HostCode[Any], float, str]] = asyncio.Queue()

    async def code() -> None:
        await goes_on.wait()

    async def work() -> None:
        await tasks.isolate(code(), "a listener", "delivery 7")
        await asyncio.Event().wait()

    def report(slow: HostCode[Any], seconds: float) -> None:
        reported.put_nowait((slow, seconds, slow.place()))

    _ = tasks.start(work())
    _ = tasks.start(tasks.watch(0.02, report))
    for times in (1, 2, 4):
        slow, seconds, place = await asyncio.wait_for(reported.get(), 30)
        assert seconds >= 0.02 * times
        assert (slow.what, slow.about) == ("a listener", "delivery 7")
        line = code.__code__.co_firstlineno
        where = f"{code.__qualname__} ({__file__}:{line}), now in line {line + 1}"
        assert place == where
        assert tasks.stats.slow == 1
    goes_on.set()
    for _ in range(5):
        await asyncio.sleep(0)
    assert tasks.stats.slow == 0
    await tasks.end_all()
