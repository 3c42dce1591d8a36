"""The state machines of the test suite, with more examples, on the memory broker and each Redis found."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from pathlib import Path

from chaos.stage import ROOT, Stage
from tools.redis_binary import find_binaries

MACHINES = ("tests/stores/test_outbox_machine.py", "tests/test_consumer_machine.py")


async def machines(stage: Stage, *, examples: int = 300, within: float = 240.0) -> None:
    """See above."""
    there = [machine for machine in MACHINES if Path(ROOT, machine).exists()]
    stage.same("state machines", len(there), len(MACHINES))
    stage.note("examples of each", examples)
    stage.note("on", ", ".join(["memory", *map(str, find_binaries())]))
    command = [sys.executable, "-m", "pytest", *there, "-q", "-p", "no:cacheprovider", "--timeout=0"]
    log = stage.folder / "machines.log"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *command,
            "--numprocesses=2",
            f"--hypothesis-seed={stage.random.getrandbits(32)}",
            cwd=ROOT,
            env=os.environ | {"SILBO_MACHINE_EXAMPLES": str(examples)},
            stdout=output,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            async with asyncio.timeout(within):
                code = await process.wait()
        finally:
            if process.returncode is None:
                process.terminate()
                await process.wait()
    told = log.read_text(errors="replace")
    passed = re.search(r"(\d+) passed", told)
    stage.must("machines passed", int(passed[1]) if passed else 0, code == 0, f"all:\n{told[-4000:]}")
