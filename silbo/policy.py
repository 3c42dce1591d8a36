"""The policy of a host: the time that a listener may take, and the effect of its failure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, get_args

__all__ = ["Budget", "OnFailure", "Policy", "combine_policies"]

OnFailure: TypeAlias = Literal["raise", "collect", "ignore", "refuse"]
"""The effect of a failed listener.

``"raise"``: the error ends the dispatch. ``"collect"``: the other listeners run, then the errors are raised as one
``ExceptionGroup``. ``"ignore"``: the error is reported, and the dispatch goes on. ``"refuse"``: the error is reported, and the
event is stopped with a :class:`~silbo.event.Refusal`."""

_ON_FAILURE: Final = get_args(OnFailure)


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The most that a plugin may use. A plugin that uses more time, or fails more often, is switched off, with one report.

    Attributes:
        loop_time: Seconds on the event loop in each second, above 0 and at most 1; what the plugin awaits does not count. None for no limit.
        failures: Failed runs of its listeners within ``window`` seconds; one more switches it off. None for no limit.
        window: Seconds in which failures are counted.
        pause: Seconds after which the plugin is switched on again; None: only by hand.
        threads: Threads of its ``in_thread`` listeners, all together. Nothing is switched off for these: a further run waits for
            a free one.
    """

    loop_time: float | None = None
    failures: int | None = None
    window: float = 60.0
    pause: float | None = 60.0
    threads: int = 4

    def __post_init__(self) -> None:
        _check_seconds("loop_time", self.loop_time)
        if self.loop_time is not None and self.loop_time > 1:
            raise ValueError(f"loop_time is seconds in a second, so at most 1, not {self.loop_time!r}")
        _check_seconds("window", self.window)
        _check_seconds("pause", self.pause)
        if self.failures is not None:
            _check_count("failures", self.failures, 0)
        _check_count("threads", self.threads, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The limits of the listeners of a name or of a plugin; None where the policy says nothing.

    Attributes:
        timeout: Seconds after which a listener is cancelled; it has then failed with a :class:`~silbo.errors.ListenerTimeout`.
        on_failure: The effect of a failed listener.
        report_after: Seconds after which a listener that still runs is reported, once for each listener.
        budget: The most that a plugin may use up; a name has none.
    """

    timeout: float | None = None
    on_failure: OnFailure | None = None
    report_after: float | None = None
    budget: Budget | None = None

    def __post_init__(self) -> None:
        _check_seconds("timeout", self.timeout)
        _check_seconds("report_after", self.report_after)
        if self.on_failure is not None and self.on_failure not in _ON_FAILURE:
            raise ValueError(f"on_failure is one of {', '.join(map(repr, _ON_FAILURE))}, not {self.on_failure!r}")
        if self.budget is not None and not isinstance(self.budget, Budget):
            raise TypeError(f"budget is a silbo.Budget, not {self.budget!r}")


def combine_policies(name: Policy | None, plugin: Policy | None) -> Policy | None:
    """Return the policy of a plugin's listener under a name: the shorter times of both, and the name's ``on_failure`` first."""
    if name is None or plugin is None:
        return plugin if name is None else name
    return Policy(
        timeout=_shorter(name.timeout, plugin.timeout),
        on_failure=plugin.on_failure if name.on_failure is None else name.on_failure,
        report_after=_shorter(name.report_after, plugin.report_after),
        budget=plugin.budget,
    )


def _shorter(one: float | None, other: float | None) -> float | None:
    return min((seconds for seconds in (one, other) if seconds is not None), default=None)


def _check_seconds(option: str, seconds: object) -> None:
    if seconds is None:
        return
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise TypeError(f"{option} is a number of seconds, not {seconds!r}")
    if not seconds > 0:
        raise ValueError(f"{option} is a number of seconds above 0, not {seconds!r}")


def _check_count(option: str, count: object, least: int) -> None:
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"{option} is a whole number, not {count!r}")
    if count < least:
        raise ValueError(f"{option} is a whole number, {least} or more, not {count!r}")
