"""`python -m chaos`: play batteries of faults, and say what was found."""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import secrets
import sys
import time
from pathlib import Path
from typing import Any

from chaos.batteries import BATTERIES
from chaos.stage import NotInTime, Stage


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m chaos", description=__doc__)
    parser.add_argument("batteries", nargs="*", metavar="BATTERY", help=f"all, or some of: {', '.join(BATTERIES)}")
    parser.add_argument("--seed", type=int, default=None, help="of what chance decides; another one each time")
    parser.add_argument("--short", action="store_true", help="as in the test suite: few events, few faults")
    parser.add_argument("--json", type=Path, help="write the findings of the one battery to this file")
    options = parser.parse_args()
    seed = secrets.randbelow(1_000_000) if options.seed is None else options.seed
    names = options.batteries or ["all"]
    if unknown := set(names) - BATTERIES.keys() - {"all"}:
        parser.error(f"no such battery: {', '.join(sorted(unknown))}")
    try:
        found = [asyncio.run(play(name, seed, short=options.short)) for name in names]
    except KeyboardInterrupt:
        return 130
    if options.json:
        options.json.write_text(json.dumps(found[0]))
    return int(any(one["wrong"] for one in found))


async def play(name: str, seed: int, *, short: bool = False) -> dict[str, Any]:
    """Play one battery; what it found."""
    battery, began = BATTERIES[name], time.monotonic()
    say(f"{name} seed {seed}, Python {platform.python_version()}: {battery.title}")
    async with Stage(name, seed, say) as stage:
        try:
            await battery.run(stage, **(battery.short if short else {}))
        except (NotInTime, TimeoutError, ExceptionGroup) as error:
            stage.wrong.append(str(error) or repr(error))
        for worker in stage.workers:
            if stage.wrong and (log := worker.log):
                say(f"-- {worker.name}:\n{log[-3000:]}")
    figures = ", ".join(f"{key} {value}" for key, value in stage.figures.items())
    say(f"{name} {'FAILED' if stage.wrong else 'passed'} in {time.monotonic() - began:.0f} s, seed {seed}: {figures}")
    for wrong in stage.wrong:
        say(f"{name} WRONG {wrong}")
    return {"battery": name, "seed": seed, "figures": stage.figures, "wrong": stage.wrong}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
