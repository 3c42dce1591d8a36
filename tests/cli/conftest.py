"""A command in this process."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from silbo.cli.main import main
from tests.cli.support import Done, Run


@pytest.fixture
def logging_as_it_was() -> Iterator[None]:
    """A command that runs for long sets the logging of its process, which is the other tests' here."""
    root, own = logging.getLogger(), logging.getLogger("silbo")
    handlers, levels = root.handlers[:], (root.level, own.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    own.setLevel(levels[1])


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, logging_as_it_was: None) -> Run:
    monkeypatch.delenv("SILBO_STORE", raising=False)
    monkeypatch.delenv("SILBO_REDIS_URL", raising=False)

    def call(*arguments: str) -> Done:
        try:
            code = main(arguments)
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        said = capsys.readouterr()
        return Done(code, said.out, said.err)

    return call
