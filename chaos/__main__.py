"""Play batteries of faults on real programs and servers, and say what was found."""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import secrets
import signal
import sys
import time
from pathlib import Path
from typing import Any

import silbo
from chaos.batteries import BATTERIES
from chaos.stage import NotInTime, Stage, phrase
from chaos.table import DOCS, write
from chaos.together import play_all


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m chaos", description=__doc__)
    parser.add_argument("battery", nargs="?", default="all", help=f"all, or one of: {', '.join(BATTERIES)}")
    parser.add_argument("--seed", type=int, help="of what chance decides; another one each time")
    parser.add_argument("--short", action="store_true", help="as in the test suite: few events, few faults")
    parser.add_argument("--json", type=Path, help="write what one battery found to this file")
    parser.add_argument("--write-docs", action="store_true", help=f"write what was found to {DOCS}")
    options = parser.parse_args()
    seed = secrets.randbelow(1_000_000) if options.seed is None else options.seed
    if options.battery not in ("all", *BATTERIES):
        parser.error(f"no such battery: {options.battery}")
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell started us in the background
    try:
        if options.battery == "all":
            found = asyncio.run(play_all(seed, short=options.short))
        else:
            found = [asyncio.run(play(options.battery, seed, short=options.short))]
    except KeyboardInterrupt:
        return 130
    if options.json:
        options.json.write_text(json.dumps(found[0]))
    failed = any(one["wrong"] for one in found)
    if options.write_docs and failed:
        print(f"{DOCS} stays as it is: something failed")
    elif options.write_docs:
        write(found)
    return int(failed)


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
    took = time.monotonic() - began
    figures = ", ".join(phrase(key, value) for key, value in (stage.done | stage.kept).items())
    say(f"{name} {'FAILED' if stage.wrong else 'passed'} in {took:.0f} s, seed {seed}: {figures}")
    for wrong in stage.wrong:
        say(f"{name} WRONG {wrong}")
    return {
        "battery": name,
        "seed": seed,
        "python": platform.python_version(),
        "silbo": str(Path(silbo.__file__).parent),
        "seconds": took,
        "done": stage.done,
        "kept": stage.kept,
        "wrong": stage.wrong,
    }


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
