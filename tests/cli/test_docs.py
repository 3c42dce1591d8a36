"""The commands that the pages show are commands, and the reference has every option."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from silbo.cli.main import make_parser
from tests.support.command_line import ROOT

REFERENCE = ROOT / "docs/reference/cli.md"
PAGES = sorted([ROOT / "README.md", *ROOT.joinpath("docs").rglob("*.md")])


def commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Those that run something."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for group in groups:
        for command in group.choices.values():
            yield from commands(command)
    if not groups:
        yield parser


def shown(page: Path) -> Iterator[str]:
    """The lines of a page's shell blocks that call silbo."""
    for token in MarkdownIt().parse(page.read_text()):
        if token.type == "fence" and token.info.split()[:1] in (["sh"], ["shell"], ["bash"], ["console"]):
            yield from re.findall(r"^(?:\$ )?silbo (.*)$", token.content, re.MULTILINE)


SHOWN = [(page, line) for page in PAGES if "_build" not in page.parts for line in shown(page)]
EXAMPLES = [
    line
    for command in commands(make_parser())
    for line in re.findall(r"^  silbo (.*)$", command.epilog or "", re.MULTILINE)
]


@pytest.mark.parametrize("line", dict.fromkeys([line for _, line in SHOWN] + EXAMPLES))
def test_command_that_is_shown_is_one(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a page, or in a --help."""
    words = shlex.split(re.split(r" [|#>] | {3,}", line)[0])
    assert callable(make_parser().parse_args(words).run)


def test_pages_show_all_commands() -> None:
    text = "\n".join(line for _, line in SHOWN)
    for command in commands(make_parser()):
        assert command.prog.removeprefix("silbo ") in text


def test_reference_has_every_option_and_no_other() -> None:
    text = REFERENCE.read_text()
    said = set(re.findall(r"--[a-z][a-z-]+", text)) - {"--help"}
    there = {
        option
        for command in commands(make_parser())
        for action in command._actions
        for option in action.option_strings
        if option.startswith("--")
    }
    assert said == there - {"--help"}
    for command in commands(make_parser()):
        assert command.prog in text
