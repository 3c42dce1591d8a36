"""What was found, as the table of docs/explanation/reliability.md."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from chaos.batteries import BATTERIES
from chaos.stage import phrase

__all__ = ["DOCS", "make_table", "write"]

DOCS: Final = Path("docs/explanation/reliability.md")
BEGIN, END = "<!-- {}: begin -->\n", "<!-- {}: end -->"


def write(found: Sequence[Mapping[str, Any]]) -> None:
    """Put it between the markers: of all batteries, or of the soak, where all of them passed."""
    soak = [one["battery"] for one in found] == ["soak"]
    path = Path(__file__).resolve().parent.parent / DOCS
    text, mark = path.read_text(), "soak" if soak else "chaos"
    begin, end = BEGIN.format(mark), END.format(mark)
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    path.write_text(f"{before}{begin}{make_table(found)}{end}{after}")


def make_table(found: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows of batteries, and a line that names the machine and the servers."""
    rows = ["| battery | what was done | what was found |", "|---|---|---|"]
    for one in found:
        name = one["battery"]
        done, kept = (
            ", ".join(phrase(*item) for item in one[part].items() if item[0] != "server") for part in ("done", "kept")
        )
        rows.append(f"| `{name}`: {BATTERIES[name].title} | {done} | {kept} |")
    seeds = ", ".join(sorted({str(one["seed"]) for one in found}))
    servers = ", ".join(sorted({one["done"]["server"] for one in found if "server" in one["done"]}))
    where = f"Python {platform.python_version()}, {servers}, {os.cpu_count()} cores"
    return "\n".join([*rows, "", f"{where}, seed {seeds}: every promise held.", ""])
