"""Where PostgreSQL is looked for. That it runs, dies and leaves nothing behind: tests/services/."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import postgres
from tools.postgres import PostgresNotFound, PostgresServer, find_postgres


def programs(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("initdb", "postgres"):
        (folder / name).touch()
    return folder


def test_first_folder_with_both_programs_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "client").mkdir()
    (tmp_path / "client" / "pg_config").touch()
    first, second = programs(tmp_path / "16" / "bin"), programs(tmp_path / "9.6" / "bin")
    monkeypatch.setattr(postgres, "_folders", lambda: iter([tmp_path / "client", first, second]))
    assert find_postgres() == first


def test_newest_release_comes_first(tmp_path: Path) -> None:
    folders = [tmp_path / release / "bin" for release in ("9.6", "15", "17", "postgresql@16", "postgresql")]
    newest = sorted(folders, key=postgres._release, reverse=True)
    assert [folder.parent.name for folder in newest] == ["17", "postgresql@16", "15", "9.6", "postgresql"]


def test_without_a_server_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """And fails: a skip would hide that nothing was tested."""
    monkeypatch.setattr(postgres, "_folders", lambda: iter([]))
    with pytest.raises(PostgresNotFound, match="sudo apt-get install postgresql .*, brew install postgresql"):
        PostgresServer().start()
