"""`python -m chaos.mutants`: take a safeguard out of a copy of silbo, and see a battery go red. All of them, one by one.

A battery that stays green without a safeguard proves nothing about it. Each is played on an untouched copy first, where it
must be green.
"""

from __future__ import annotations

import argparse
import json
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
COPIED: Final = ("silbo", "chaos", "tools", "requirements")


class PatchFailed(Exception):
    """The text to be taken out is not there just once: the mutant has to follow the code."""


@dataclass(frozen=True)
class Mutant:
    """One safeguard, the exact text of it, and what stands there without it."""

    name: str
    battery: str
    path: str
    safeguard: str
    without: str

    def apply(self, tree: Path) -> None:
        """Take it out.

        Raises:
            PatchFailed: the text is not there, or more than once.
        """
        file = tree / self.path
        text = file.read_text()
        if (found := text.count(self.safeguard)) != 1:
            raise PatchFailed(f"{self.name}: found {found} times in {self.path}, not once:\n{self.safeguard}")
        file.write_text(text.replace(self.safeguard, self.without))


MUTANTS: Final = [
    Mutant(
        "the sequence check, in a cluster",
        "cluster",
        "silbo/brokers/redis/scripts.py",
        "while first <= #ARGV and tonumber(ARGV[first]) <= last do first = first + 2 end\n",
        "",
    ),
    Mutant(
        "following slots that have moved",
        "cluster",
        "silbo/brokers/redis/calls.py",
        'if reply.code in ("MOVED", "ASK"):',
        'if reply.code == "ASK":',
    ),
    Mutant(
        "the sequence check",
        "replies",
        "silbo/brokers/redis/scripts.py",
        "while first <= #ARGV and tonumber(ARGV[first]) <= last do first = first + 2 end\n",
        "",
    ),
    Mutant(
        "the fence",
        "fence",
        "silbo/brokers/redis/scripts.py",
        "if newest > epoch then return {newest, last, 0} end\n",
        "",
    ),
    Mutant(
        "the reading of own pending entries",
        "replies",
        "silbo/brokers/redis/group.py",
        'self._reread_after = {key: b"0" for key in self._upkeep if key not in self._aside}',
        "self._reread_after = {}",
    ),
    Mutant(
        "the acknowledgement after the listeners",
        "storm",
        "silbo/consumer/attempts.py",
        "            error = await self._attempt(queued)\n",
        "            self._acks.acknowledge(delivery)\n            error = await self._attempt(queued)\n",
    ),
    Mutant(
        "the heartbeat",
        "patience",
        "silbo/consumer/consumer.py",
        "if receiver.keep_every is not None:",
        "if False:",
    ),
    Mutant(
        "the inbox",
        "storm",
        "silbo/stores/sqlalchemy/inbox.py",
        ".rowcount == 1",
        ".rowcount < 2",
    ),
    Mutant(
        "the taking back of cancellations",
        "strays",
        "silbo/_host_code.py",
        "            yield from self._end_cancelled(task, error)\n",
        "            pass\n",
    ),
    Mutant(
        "the refusal of a second loop",
        "loops",
        "silbo/_loops.py",
        "if self._process == os.getpid() and self._is_held(other):",
        "if False:",
    ),
    Mutant(
        "the bound of a lease",
        "clocks",
        "silbo/stores/sqlite/statements.py",
        "        if until > end:\n",
        "        if False:\n",
    ),
    Mutant(
        "the bound of a next attempt",
        "clocks",
        "silbo/outbox/rows.py",
        "state_at <= now < next_attempt_at",
        "now < next_attempt_at",
    ),
    Mutant(
        "the setting aside of rows that can't be read",
        "data",
        "silbo/outbox/rows.py",
        '        return UnreadableMessage("", "(unreadable)", "", {}, problem=str(error))\n',
        "        raise\n",
    ),
    Mutant(
        "the telling apart of refused data and an outage",
        "data",
        "silbo/stores/sqlalchemy/inbox.py",
        'if step == "enter" and is_refusal_of_data(error):',
        "if False:",
    ),
    Mutant(
        "the mending of a group's count",
        "restarts",
        "silbo/brokers/redis/scripts.py",
        "if given and given ~= read then\n",
        "if false then\n",
    ),
    Mutant(  # the others of shards: tests/simulation
        "the lease of a shard",
        "shards",
        "silbo/brokers/redis/scripts.py",
        "if lease[1] ~= ARGV[1] and ends > now then\n",
        "if false then\n",
    ),
    Mutant(
        "the reading of what a shard's last leader had in hand",
        "shards",
        "silbo/brokers/redis/shard_receiver.py",
        "                self._last_given[key] = given.decode()\n            return reply\n",
        "                self._last_given[key] = given.decode()\n            return None\n",
    ),
]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m chaos.mutants", description=__doc__)
    parser.add_argument("--seed", type=int, default=None)
    seed = parser.parse_args().seed
    seed = secrets.randbelow(1_000_000) if seed is None else seed
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return _play_all(seed)
    except KeyboardInterrupt:
        return 130


def _play_all(seed: int) -> int:
    """0 where each battery is green with all safeguards, and red without its own."""
    unnoticed: list[str] = []
    with tempfile.TemporaryDirectory(prefix="silbo-mutants-") as folder:
        for mutant in MUTANTS:  # all of them first: a patch that does not fit is found at once
            mutant.apply(copy_tree(Path(folder, "try")))
        for battery in dict.fromkeys(mutant.battery for mutant in MUTANTS):
            wrong = _play(copy_tree(Path(folder, "whole")), battery, seed)
            unnoticed += [f"{battery} is red with all safeguards: {one}" for one in wrong]
        for mutant in MUTANTS:
            tree = copy_tree(Path(folder, "mutant"))
            mutant.apply(tree)
            wrong = _play(tree, mutant.battery, seed)
            print(
                f"without {mutant.name}: {mutant.battery} {'is red: ' + '; '.join(wrong) if wrong else 'stays GREEN'}"
            )
            if not wrong:
                unnoticed.append(f"{mutant.battery} does not notice that {mutant.name} is gone")
    for one in unnoticed:
        print(f"FAILED {one}")
    print(f"{len(MUTANTS)} safeguards taken out, seed {seed}: {'FAILED' if unnoticed else 'each was missed'}")
    return int(bool(unnoticed))


def copy_tree(tree: Path) -> Path:
    """Copy what the batteries need to `tree`, in place of what was there."""
    shutil.rmtree(tree, ignore_errors=True)
    for name in COPIED:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    if (servers := ROOT / ".venv" / "redis").exists():  # fetched already
        (tree / ".venv").mkdir()
        (tree / ".venv" / "redis").symlink_to(servers)
    return tree


def _play(tree: Path, battery: str, seed: int) -> list[str]:
    """What a battery found wrong in a tree."""
    findings = tree / "findings.json"
    command = [sys.executable, "-m", "chaos", battery, "--short", "--seed", str(seed), "--json", str(findings)]
    # The copy's own silbo, whatever is installed: the folder comes first for `python -m`, and for its programs.
    with subprocess.Popen(command, cwd=tree, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            told, _ = process.communicate()
        except BaseException:
            process.send_signal(signal.SIGINT)
            process.wait()
            raise
    if not findings.exists():
        raise RuntimeError(f"{battery} did not come to an end:\n{told[-4000:]}")
    found: dict[str, Any] = json.loads(findings.read_text())
    if found["silbo"] != str(tree / "silbo"):
        raise RuntimeError(f"{battery} was played on {found['silbo']}, not on the copy in {tree}")
    return [line.splitlines()[0] for line in found["wrong"]]


if __name__ == "__main__":
    sys.exit(main())
