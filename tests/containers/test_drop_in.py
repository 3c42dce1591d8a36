"""A host that was written against Whistle runs unchanged on silbo."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = (Path(__file__).resolve().parents[1] / "support/written_against_whistle.py").read_text()
IMPORT = "from whistle import AsyncEventDispatcher, Event, IAsyncEventDispatcher\n"


def _run(source: str) -> list[str]:
    done = subprocess.run([sys.executable, "-W", "error::RuntimeWarning", "-c", source], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_a_whistle_host_behaves_the_same_with_silbos_class_in_the_place_of_whistles() -> None:
    """Its overrides, its logging of each listener, its plugins: the same lines in the same order."""
    whistle = _run(PROGRAM)
    assert _run(_on_silbo(PROGRAM)) == whistle
    assert len(whistle) == 51
    assert "  meeting.joined stopped by Moderation.refuse_banned" in whistle
    assert whistle[-1] == "8 True"


def test_and_with_silbo_registering_it_in_the_container() -> None:
    registration = "container.add_instance(dispatcher, IAsyncEventDispatcher)\n"
    silbos = "__import__('silbo.containers.rodi').containers.rodi.register_dispatcher(container, dispatcher)\n"
    assert _run(_replace_one(_on_silbo(PROGRAM), registration, silbos)) == _run(PROGRAM)


def _on_silbo(program: str) -> str:
    return _replace_one(
        program, IMPORT, "from silbo import AsyncEventDispatcher\nfrom whistle import Event, IAsyncEventDispatcher\n"
    )


def _replace_one(program: str, line: str, instead: str) -> str:
    assert program.count(line) == 1
    return program.replace(line, instead)


def test_the_program_is_really_on_silbos_class_the_second_time() -> None:
    which = "\nprint(AsyncEventDispatcher.__module__.partition('.')[0])\n"
    assert _run(PROGRAM + which)[-1] == "whistle"
    assert _run(_on_silbo(PROGRAM) + which)[-1] == "silbo"
