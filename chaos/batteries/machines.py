"""The state machines of the test suite, with more examples, on the memory broker and on Redis."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from contextlib import suppress

from chaos.stage import ROOT, Stage
from tools.redis_binary import find_binary

OUTBOX, CONSUMER = "tests/outbox/test_outbox_machine.py", "tests/consumer/test_consumer_machine.py"


async def machines(stage: Stage, *, outbox: int = 500, consumer: int = 50) -> None:
    """See above: so many random histories of each, on each broker."""
    stage.note("histories of an outbox on each broker", outbox)
    stage.note("histories of consumers on each", consumer)
    stage.note("brokers:", f"memory, {find_binary()}")
    await asyncio.gather(_play(stage, "outbox", OUTBOX, outbox), _play(stage, "consumer", CONSUMER, consumer))


async def _play(stage: Stage, name: str, machine: str, examples: int, within: float = 1_200.0) -> None:
    command = [sys.executable, "-m", "pytest", machine, "-q", "-p", "no:cacheprovider", "--timeout=0"]
    seed = stage.random.getrandbits(32)
    log = stage.folder / f"{name}.log"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *command,
            "--numprocesses=3",
            f"--hypothesis-seed={seed}",
            cwd=ROOT,
            env=os.environ | {"SILBO_MACHINE_EXAMPLES": str(examples)},
            stdout=output,
            stderr=asyncio.subprocess.STDOUT,
        )
    try:
        with suppress(TimeoutError):
            async with asyncio.timeout(within):
                await process.wait()
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
    told = log.read_text(errors="replace")
    passed = re.search(r"(\d+) passed", told)
    how = f"all of them, exit code {process.returncode}:\n{told[-6000:]}"
    stage.must(f"{name} machines passed", int(passed[1]) if passed else 0, process.returncode == 0, how)
