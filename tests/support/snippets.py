"""Runs the Python of a Markdown page as a reader would: from the top to the bottom, against a real Redis.

The convention, for whoever writes a page (CONTRIBUTING.md has it too):

- The ```python blocks of a page share one namespace and one event loop; `await` may stand at the top level.
- A block that calls `asyncio.run(` is a program: it runs in a process of its own and must exit with 0.
- A block whose first line is `# some/file.py` is written to that file, beside the page's other files, and then
  imported, or run if it is a program.
- ```python background is a program that runs while the page goes on and is ended with Ctrl-C: it must then exit
  with 0. The page goes on when the first line that it promises (see below) is out.
- ```console background is a command, `$ silbo consume ...`, that runs while the page goes on, once its consumer is connected, and is
  ended with Ctrl-C. Its other lines are all that it prints; of those that begin with a time, its log, the words before the
  fields have to be among what it logs.
- `#> text` promises a line of output; where a block has any, they are all of its output.
- `Redis()` and `redis://localhost:6379` are the page's own server, and so is SILBO_REDIS_URL in the environment;
  `localhost:9092` is its own Kafka.
- Code that needs a server which is not there in every test run stands in a block without a language; a test takes it from
  there with `shown` and runs it.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import importlib
import inspect
import io
import os
import re
import shlex
import signal
import sys
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

from tests.support.logging_state import logging_as_it_was
from tests.support.source import parse_source

SECONDS = 30.0
"""For one program, or one awaited line of a background program."""

TIME = r"\d{4}-\d\d-\d\dT[\d:]+Z"
"""The beginning of a line of a command's log."""

OTHER_NAMES = re.compile(r"py|python3|pycon|ipython\d?|\{(code|code-block|code-cell|testcode|doctest)\}\s*(i?py.*)?")


@dataclass(frozen=True, slots=True)
class Snippet:
    """One block: its code as the page has it, and the page's line before its first."""

    code: str
    line: int
    background: bool

    @property
    def is_program(self) -> bool:
        return self.background or "asyncio.run(" in self.code

    @property
    def file(self) -> str | None:
        named = re.match(r"# ([\w/]+\.py)\n", self.code)
        return named[1] if named else None

    @property
    def command(self) -> list[str]:
        """The words of a command of silbo's; none for Python."""
        return (
            shlex.split(self.code.partition("\n")[0].removeprefix("$ silbo"))
            if self.code.startswith("$ silbo ")
            else []
        )

    @property
    def logged(self) -> list[str]:
        """The lines that a command has to log: level and words, without the time and the fields."""
        return re.findall(rf"^{TIME} (.*?)(?: \w+=.*)?$", self.code, re.MULTILINE)

    @property
    def promised(self) -> list[str]:
        if self.command:
            return [line for line in self.code.splitlines()[1:] if not re.match(TIME, line)]
        return re.findall(r"^[ \t]*#> ?(.*)$", self.code, re.MULTILINE)


def snippets(text: str, line: int = 0) -> list[Snippet]:
    """The Python blocks of a page, those inside other directives included."""
    found: list[Snippet] = []
    for token in MarkdownIt().parse(text):
        if token.type != "fence" or token.map is None:
            continue
        info, start = token.info.strip(), line + token.map[0] + 1
        if info in {"python", "python background", "console background"}:
            found.append(Snippet(token.content, start, background=info.endswith("background")))
        elif info.startswith("python ") or OTHER_NAMES.fullmatch(info):
            raise AssertionError(f"line {start}: a block marked {info!r} would not be run; mark it ```python")
        elif info.startswith("{"):
            found += snippets(token.content, start)
    return found


def shown(page: Path, word: str) -> str:
    """The one block of a page that has this word in it, whether the page's own test runs it or not."""
    blocks = [token.content for token in MarkdownIt().parse(page.read_text()) if token.type == "fence"]
    (found,) = [block for block in blocks if word in block]
    return found


def without_pause(code: str) -> str:
    """A loop that rests a second where a listener has failed, resting no longer."""
    assert code.count("await asyncio.sleep(1)") == 1, "without a pause, a message that fails comes back at once"
    return code.replace("await asyncio.sleep(1)", "await asyncio.sleep(0)")


async def execute(code: str, namespace: dict[str, Any], name: str = "page") -> None:
    """Run code that may have `await` at its top level."""
    compiled = compile(code, name, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    result = eval(compiled, namespace)  # exec() would drop the coroutine
    if inspect.iscoroutine(result):
        await result


def forget_modules(folder: Path, names: Iterable[str]) -> None:
    """Let Python import anew those of the modules that came from a folder; to be called while ``sys.path`` still has it."""
    for name in names:
        module = sys.modules[name]
        where = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", ())), "")
        if where.startswith(f"{folder}/"):  # also a folder of modules, which has no file
            del sys.modules[name]


class Page:
    """One page while it is run, in a folder of its own."""

    def __init__(self, path: Path, folder: Path, redis_url: str | None = None, kafka_url: str | None = None) -> None:
        self._path = path
        self._folder = folder
        self._url = redis_url
        self._kafka_url = kafka_url
        self._module = types.ModuleType(re.sub(r"\W", "_", f"page_{path.stem}"))
        self._background: list[tuple[Snippet, asyncio.subprocess.Process]] = []
        self._logs: dict[asyncio.subprocess.Process, asyncio.Task[str]] = {}  # of commands

    async def run(self) -> None:
        """Every block in turn.

        Raises:
            AssertionError: A program failed, or the output is not what the page says.
        """
        with self._surroundings():
            try:
                for snippet in snippets(self._path.read_text()):
                    await self._run(snippet)
                for snippet, process in self._background:
                    await self._end(snippet, process)
            finally:
                for _, process in self._background:
                    if process.returncode is None:
                        process.kill()
                        await process.wait()

    @contextlib.contextmanager
    def _surroundings(self) -> Iterator[None]:
        modules, path, environment = set(sys.modules), list(sys.path), os.environ.get("SILBO_REDIS_URL")
        sys.modules[self._module.__name__] = self._module  # annotations are resolved there
        sys.path.insert(0, str(self._folder))
        os.environ["SILBO_REDIS_URL"] = self._url or ""
        try:
            with logging_as_it_was():
                yield
        finally:
            forget_modules(self._folder, set(sys.modules) - modules)
            sys.path[:] = path
            sys.modules.pop(self._module.__name__, None)
            os.environ["SILBO_REDIS_URL"] = environment or ""

    async def _run(self, snippet: Snippet) -> None:
        code = snippet.code
        if snippet.command:
            await self._start_command(snippet)
            return
        if self._url:
            code = code.replace("redis://localhost:6379", self._url).replace("redis://localhost", self._url)
            code = re.sub(r"\bRedis\(\)", f"Redis.from_url({self._url!r})", code)
        if self._kafka_url:
            code = code.replace("localhost:9092", self._kafka_url)
        assert not {"6379", "9092"} & set(re.findall(r"\d+", code)), (
            f"{self._at(snippet)} names a server that may be somebody's own; say Redis()"
        )
        if snippet.file:
            file = self._folder / snippet.file
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(code)
        if snippet.is_program:
            await self._program(snippet, code)
        else:
            said = io.StringIO()
            with contextlib.redirect_stdout(said):
                if snippet.file:
                    importlib.invalidate_caches()
                    importlib.import_module(snippet.file.removesuffix(".py").replace("/", "."))
                else:
                    await self._inline(snippet, code)
            self._compare(snippet, said.getvalue())

    async def _inline(self, snippet: Snippet, code: str) -> None:
        tree = ast.increment_lineno(parse_source(code), snippet.line)  # a traceback shows the page's own lines
        compiled = compile(tree, str(self._path), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
        result = eval(compiled, self._module.__dict__)  # exec() would drop the coroutine
        if inspect.iscoroutine(result):
            await result

    async def _program(self, snippet: Snippet, code: str) -> None:
        name = snippet.file or f"line_{snippet.line}.py"
        (self._folder / name).write_text(code)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-u", "-W", "error", name),
            cwd=self._folder,
            stdout=asyncio.subprocess.PIPE,
            stderr=None if snippet.background else asyncio.subprocess.PIPE,
        )
        if snippet.background:
            self._background.append((snippet, process))
            if snippet.promised:
                await self._expect(snippet, process, snippet.promised[0])
            return
        try:
            async with asyncio.timeout(SECONDS):
                out, err = await process.communicate()
        except TimeoutError:
            process.kill()
            out, err = await process.communicate()
            err += b"\nstill running: a program that is to be ended with Ctrl-C is marked ```python background"
        assert process.returncode == 0, f"{self._at(snippet)} exited with {process.returncode}:\n{err.decode()}"
        self._compare(snippet, out.decode())

    async def _start_command(self, snippet: Snippet) -> None:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-u", "-W", "error", "-m", "silbo", *snippet.command),
            cwd=self._folder,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        self._background.append((snippet, process))
        stderr = process.stderr
        assert stderr is not None
        told = ""
        async with asyncio.timeout(SECONDS):
            while "consumer connected" not in told:
                line = (await stderr.readline()).decode()
                assert line, f"{self._at(snippet)} ended: {told}"
                told += line

        async def read() -> str:
            return told + (await stderr.read()).decode()

        self._logs[process] = asyncio.create_task(read())

    async def _end(self, snippet: Snippet, process: asyncio.subprocess.Process) -> None:
        for line in snippet.promised if snippet.command else snippet.promised[1:]:
            await self._expect(snippet, process, line)
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        async with asyncio.timeout(SECONDS):
            rest = await process.stdout.read()
            await process.wait()
        assert process.returncode == 0, f"{self._at(snippet)} exited with {process.returncode} on Ctrl-C"
        if snippet.command:
            log = await self._logs[process]
            for words in snippet.logged:
                assert words in log, f"{self._at(snippet)} promises the line {words!r} and logged {log}"
        if snippet.promised:
            assert rest == b"", f"{self._at(snippet)} said more than the page: {rest.decode()}"

    async def _expect(self, snippet: Snippet, process: asyncio.subprocess.Process, line: str) -> None:
        assert process.stdout is not None
        try:
            async with asyncio.timeout(SECONDS):
                said = (await process.stdout.readline()).decode().rstrip("\n")
        except TimeoutError:
            said = f"nothing for {SECONDS:.0f} s"
        assert said == line, f"{self._at(snippet)} promises the line {line!r} and said {said!r}"

    def _compare(self, snippet: Snippet, said: str) -> None:
        if snippet.promised:
            assert said.splitlines() == snippet.promised, f"{self._at(snippet)} prints something else"

    def _at(self, snippet: Snippet) -> str:
        return f"{self._path.name}:{snippet.line}"
