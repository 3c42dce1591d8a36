"""A process in which listeners of plugins hold the event loop. Run by tests/plugins/test_watchdog.py.

python -m tests.support.blocked_process SCENARIO

It prints each report; after the scenario, the plugin "control" blocks until it is reported, so that silence has a meaning.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from typing import Any

from silbo.dispatch.on_loop import OnLoop
from silbo.plugins.watchdog import Blocked, Watchdog
from tests.support.plugin_listener import run_as

on_loop = OnLoop()
reported = threading.Event()


def report(blocked: Blocked) -> None:
    print(f"{blocked.plugin} {'blocks' if blocked.stack else 'blocked'}", flush=True)
    reported.set()


watchdog = Watchdog(on_loop, slow_after=0.25, report=report)


def stop_process() -> None:
    """Stand still until the parent sends SIGCONT."""
    os.kill(os.getpid(), signal.SIGSTOP)


async def stops() -> None:
    async def twice(_event: object) -> None:
        stop_process()
        looked_at = watchdog._alive_at
        while watchdog._alive_at == looked_at:
            time.sleep(0.001)
        stop_process()

    async def between_steps(_event: object) -> None:
        asyncio.get_running_loop().call_soon(stop_process)
        await asyncio.sleep(0)

    async def inner(_event: object) -> None:
        time.sleep(0.4)

    async def outer(_event: object) -> None:
        await run_as("inner", on_loop, inner)
        stop_process()

    await run_as("twice", on_loop, twice)
    await run_as("between_steps", on_loop, between_steps)
    await run_as("outer", on_loop, outer)


async def is_debugged() -> None:
    async def listener(_event: object) -> None:
        breakpoint()
        time.sleep(0.3)

    await run_as("debugged", on_loop, listener)


async def leaves_a_report_unfinished() -> None:
    async def listener(_event: object) -> None:
        reported.wait(30)

    def slow_report(blocked: Blocked) -> None:
        reported.set()
        time.sleep(0.3)
        print("told", flush=True)

    watchdog._hook = slow_report
    await run_as("plugin", on_loop, listener)
    sys.exit()


async def forks() -> None:
    other = Watchdog(OnLoop(), slow_after=0.25, report=report)
    other.start()
    lock: Any = other._closing._cond  # type: ignore[attr-defined]
    lock.acquire()  # as if its thread held it: in the child nobody releases it
    child = os.fork()
    if child:
        lock.release()
        os.waitpid(child, 0)
        other.close()
        return
    other.close()
    watchdog.start()
    await run_as("child", on_loop, blocks_until_reported)
    watchdog.close()
    os._exit(0)


async def does_nothing() -> None: ...


async def blocks_until_reported(_event: object) -> None:
    assert reported.wait(30)


async def main(scenario: str) -> None:
    watchdog.start()
    await globals()[scenario]()
    reported.clear()
    await run_as("control", on_loop, blocks_until_reported)
    watchdog.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
