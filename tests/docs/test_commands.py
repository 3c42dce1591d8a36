"""The commands that a page shows with their output, on the program that the page has written.

In a ```console block a line that begins with ``$`` is a command of silbo's, and the lines up to the next are all that it prints,
on stdout and stderr. Files are the page's own ```python blocks whose first line names one. Spaces don't count.
"""

from __future__ import annotations

import asyncio
import re
import shlex
from contextlib import suppress
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from silbo.cli.main import COMMANDS, make_parser
from tests.support.app_files import write
from tests.support.command_line import SILBO, silbo
from tests.support.snippets import snippets

ROOT = Path(__file__).resolve().parents[2]


def shown(page: Path) -> list[tuple[str, list[str]]]:
    """The commands of a page, each with its lines of output."""
    found: list[tuple[str, list[str]]] = []
    for token in MarkdownIt().parse(page.read_text()):
        if token.type == "fence" and token.info.strip() == "console":
            for line in token.content.splitlines():
                if line.startswith("$ silbo "):
                    found.append((line.removeprefix("$ silbo "), []))
                else:
                    found[-1][1].append(line)
    return found


def squeezed(lines: list[str]) -> list[str]:
    return sorted(" ".join(line.split()) for line in lines if not re.fullmatch(r"─*", line))


@pytest.mark.parametrize("name", ["howto/look.md"])
async def test_command_prints_what_the_page_says(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = ROOT / "docs" / name
    files = {snippet.file: snippet.code for snippet in snippets(page.read_text()) if snippet.file}
    monkeypatch.chdir(write(tmp_path, files))
    commands = shown(page)
    assert commands
    done = await asyncio.gather(*(silbo(*shlex.split(command), command=SILBO) for command, _ in commands))
    for (command, lines), each in zip(commands, done, strict=True):
        assert squeezed([*each.out.splitlines(), *each.err.splitlines()]) == squeezed(lines), command


def test_command_lines_of_all_pages_have_options_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    """An option that a command does not have, or a word too many, is found before a reader tries the line."""
    refused: list[str] = []
    parsers = {name: make_parser(name) for name in COMMANDS}
    lines = [
        words
        for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
        for words in find_command_lines(page.read_text())
        if words[0] in COMMANDS
    ]
    for words in lines:
        with suppress(SystemExit):
            _ = parsers[words[0]].parse_args(words)
        if "unrecognized" in (why := capsys.readouterr().err) or "there is no command" in why:
            refused.append(f"silbo {shlex.join(words)}")
    assert len(lines) > 20 and refused == []


def find_command_lines(text: str) -> list[list[str]]:
    """Return the words of each whole command of silbo's in the text, but for the name of a command alone, as in a sentence."""
    inside: list[str] = []
    for token in MarkdownIt().parse(text):
        if token.type == "fence" and token.info.strip() in ("", "console", "sh", "bash"):
            inside += token.content.replace("\\\n", " ").splitlines()
        inside += [child.content for child in token.children or () if child.type == "code_inline"]
    found: list[list[str]] = []
    for line in inside:
        line = line.removeprefix("$ ")
        if not line.startswith("silbo ") or re.search(r"\.\.\.|…|[|<\[]", line.partition(" #")[0]):
            continue
        words = shlex.split(line, comments=True)[1:]
        if any(word.startswith("-") for word in words):
            found.append(words)
    return found
