"""A command in this process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from silbo.cli.main import main
from tests.support.command_line import Done, Run
from tests.support.logging_state import logging_as_it_was


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    monkeypatch.delenv("SILBO_STORE", raising=False)
    monkeypatch.delenv("SILBO_REDIS_URL", raising=False)
    monkeypatch.delenv("SILBO_PREFIX", raising=False)

    def call(*arguments: str) -> Done:
        try:
            code = main(arguments)
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        said = capsys.readouterr()
        return Done(code, said.out, said.err)

    with logging_as_it_was():  # a relay sets it
        yield call
