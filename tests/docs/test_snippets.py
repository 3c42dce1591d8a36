"""What README and docs show is what happens: every Python block of every page is run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.snippets import Page, snippets
from tools.kafka import KafkaMock

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    page
    for page in [*ROOT.glob("README.md"), *ROOT.joinpath("docs").rglob("*.md")]
    if "_build" not in page.parts and snippets(page.read_text())
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
async def test_page_does_what_it_says(
    page: Path, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each page gets a Redis of its own, for pages use silbo's default prefix, and a folder of its own to be run in."""
    monkeypatch.chdir(tmp_path)
    code = "".join(snippet.code for snippet in snippets(page.read_text()))
    url = request.getfixturevalue("own_redis").url if "redis" in code.lower() else None
    kafka_url = request.getfixturevalue("own_kafka").url if "localhost:9092" in code else None
    await Page(page, tmp_path, url, kafka_url).run()


@pytest.fixture
def own_kafka() -> Iterator[KafkaMock]:
    with KafkaMock() as kafka:
        yield kafka


async def run(tmp_path: Path, text: str, redis_url: str | None = None) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    folder = tmp_path / "run"
    folder.mkdir()
    await Page(page, folder, redis_url).run()


async def test_blocks_share_a_namespace_and_a_loop(tmp_path: Path) -> None:
    text = """
```python
import asyncio
task = asyncio.create_task(asyncio.sleep(0, "done"))
```
````{note}
```python
print(await task)
#> done
```
````
"""
    await run(tmp_path, text)
    assert [snippet.line for snippet in snippets(text)] == [2, 7]


async def test_error_names_the_line_of_the_page(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        await run(tmp_path, "one\n\n```python\nx = 0\n1 / x\n```\n")
    assert caught.traceback[-1].path == tmp_path / "page.md"
    assert caught.traceback[-1].lineno + 1 == 5


async def test_other_output_than_promised_fails(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"page\.md:1 prints something else"):
        await run(tmp_path, "```python\nprint(1)\n#> 2\n```\n")


async def test_program_runs_in_a_process_of_its_own_and_must_succeed(tmp_path: Path) -> None:
    program = "```python\n# {0}.py\nimport asyncio, os\nasync def main(): {1}\nasyncio.run(main())\n{2}```\n"
    await run(tmp_path, program.format("good", "print('out')", "#> out\n"))
    (tmp_path / "run").rename(tmp_path / "first")
    with pytest.raises(AssertionError, match=r"page\.md:1 exited with 1(?s:.*)RuntimeError: no"):
        await run(tmp_path, program.format("bad", "raise RuntimeError('no')", ""))


async def test_file_can_be_imported_by_later_blocks(tmp_path: Path) -> None:
    await run(tmp_path, "```python\n# shop/plugin.py\nNAME = 'x'\n```\n```python\nfrom shop.plugin import NAME\n```\n")


BACKGROUND = """
```python background
# listener.py
import asyncio, contextlib
from redis.asyncio import Redis

async def main():
    async with Redis() as redis, redis.pubsub() as pubsub:
        await pubsub.subscribe("news")
        async for message in pubsub.listen():
            print(message["type"], message["data"])
            #> subscribe 1
            #> message b'hello'

with contextlib.suppress(KeyboardInterrupt):
    asyncio.run(main())
```
```python
from redis.asyncio import Redis
async with Redis.from_url("redis://localhost:6379") as redis:
    assert await redis.publish("news", MESSAGE) == 1
```
"""


async def test_background_program_runs_beside_the_page(tmp_path: Path, redis_url: str) -> None:
    await run(tmp_path, BACKGROUND.replace("MESSAGE", "'hello'"), redis_url)


async def test_background_program_must_say_what_it_promises(tmp_path: Path, redis_url: str) -> None:
    with pytest.raises(AssertionError, match=r"promises the line .*hello"):
        await run(tmp_path, BACKGROUND.replace("MESSAGE", "'other'"), redis_url)


@pytest.mark.parametrize("info", ["py", "pycon", "python no-run", "{code-block} python"])
def test_block_that_would_not_be_run_is_refused(info: str) -> None:
    with pytest.raises(AssertionError, match="line 1"):
        snippets(f"```{info}\nx = 1\n```\n")


async def test_page_never_names_the_default_port(tmp_path: Path, redis_url: str) -> None:
    with pytest.raises(AssertionError, match="somebody's own"):
        await run(tmp_path, "```python\nport = 6379\n```\n", redis_url)
