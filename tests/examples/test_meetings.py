"""`make demo`: what it counts, what it notices, and that nothing is left of it however it ends."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from redis import Redis

from tools.redis_server import RedisServer

ROOT = Path(__file__).resolve().parents[2]
DEMO = [sys.executable, "-m", "examples.meetings"]
FAULTY = [
    *(sys.executable, "-c"),
    "import sys; from examples.meetings import demo; demo.HOST = 'tests.support.faulty_meetings_host'; demo.SECONDS_TO_ARRIVE = 2; sys.exit(demo.main())",
]
PROGRAMS = ("examples.meetings.host", "examples.meetings.billing", "examples.meetings.bystander")

_UNMEASURED = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
"""Its programs are many, and what they run of silbo other tests measure."""


class Run:
    """A demo in a process group of its own, as under a shell; everything it starts carries a mark."""

    def __init__(self, command: list[str], **environment: str) -> None:
        self._mark = f"SILBO_TEST_RUN={uuid.uuid4().hex}"
        name, value = self._mark.split("=")
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**_UNMEASURED, "SILBO_REDIS_URL": "", **environment, name: value},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.seen = ""

    def until(self, text: str) -> None:
        """Read its output up to a line with this text."""
        assert self.process.stdout
        while text not in (line := self.process.stdout.readline()):
            assert line, f"ended before {text!r}: {self.seen} {self.end()}"
            self.seen += line
        self.seen += line

    def press_ctrl_c(self) -> None:
        """What a terminal does: it interrupts the whole foreground group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def end(self) -> tuple[int, str, str]:
        """Wait for its end: exit code, output, errors."""
        out, err = self.process.communicate(timeout=50)
        return self.process.returncode, self.seen + out, err

    def processes(self) -> dict[int, str]:
        """Those that it or its children started, wherever they are now."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if self._mark.encode() in (process / "environ").read_bytes().split(b"\0"):
                    found[int(process.name)] = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:  # ended meanwhile, or another user's
                continue
        return found

    def nothing_left(self, *, within: float) -> bool:
        """Whether they are all gone; right after a `kill -9` they need a moment."""
        deadline = time.monotonic() + within
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.02)
        return not self.processes()


Start = Callable[..., Run]


@pytest.fixture
def runs() -> Iterator[list[Run]]:
    """What a test started, to be ended with it when it fails."""
    started: list[Run] = []
    yield started
    for run in started:
        for pid in run.processes():
            os.kill(pid, signal.SIGKILL)
        run.process.communicate()


@pytest.fixture
def start(runs: list[Run]) -> Start:
    def start(command: list[str], **environment: str) -> Run:
        runs.append(Run(command, **environment))
        return runs[-1]

    return start


def rows(table: str) -> dict[str, list[str]]:
    """The table's rows by their first column."""
    cells = [re.split(r"\s*[│|]\s*", line.strip(" │|")) for line in table.splitlines() if line.startswith(("│", "|"))]
    return {first: rest for first, *rest in cells}


# -- the figures --------------------------------------------------------------------------------------------


def test_demo_kills_host_billing_and_redis_and_loses_nothing(start: Start) -> None:
    """Every event that a client was told of is handled once, or a dead letter as planned, whatever died meanwhile."""
    run = start([*DEMO, "--requests", "400", "--seed", "7"])
    code, out, err = run.end()
    assert (code, err) == (0, ""), out
    story = ["kill -9 billing", "billing is back", "kill -9 Redis", "kill -9 host", "host is back", "Redis is back"]
    assert [told for line in out.splitlines() for told in story if told in line] == story
    [[in_hand], [in_the_outbox]] = (
        re.findall(f"kill -9 {told}", out) for told in (r"billing, with (\d+)", r"host, with (\d+)")
    )
    assert int(in_the_outbox) > 0
    assert assert_adds_up(out, requests=400)["redelivered"] == [int(in_hand)]
    assert run.nothing_left(within=0)


@pytest.mark.long
def test_a_calm_demo_adds_up_to_the_event(start: Start) -> None:
    """Nothing is sent again and nothing missed, on Pub/Sub neither."""
    run = start([*DEMO, "--requests", "400", "--seed", "7", "--calm"])
    code, out, err = run.end()
    assert (code, err) == (0, ""), out
    assert "kill" not in out.replace("is not killed", "")
    figures = assert_adds_up(out, requests=400)
    assert figures["given"] == figures["in the stream"]
    assert figures["redelivered"] == figures["done before, not again"] == [0]
    assert figures["lost"] == [0, 0]
    assert run.nothing_left(within=0)


def assert_adds_up(out: str, *, requests: int) -> dict[str, list[int]]:
    """The table's figures, when they say what they should."""
    table = rows(out)
    figures = {name: [int(cell) for cell in cells if cell] for name, cells in table.items() if "p" not in name[-3:]}
    [bad], [refused], [given], [dead] = (
        figures[name] for name in ("bad, rejected", "refused by the plugin", "given", "dead letters")
    )
    assert figures["requests"] == [requests]
    assert min(bad, refused) > 10
    assert dead > 0
    assert given <= requests - bad - refused + dead
    assert figures["in the stream"] == [figures["handled"][0] + dead]
    assert figures["in the stream"] >= [given]
    assert figures["lost"][0] == 0
    assert figures["duplicates in the stream"] == [0]
    for percentile in ("p50", "p99"):
        _, streams, pubsub = table[f"dispatch to done, {percentile}"]
        assert 0 < float(streams.removesuffix(" ms")) < 30_000
        assert 0 < float(pubsub.removesuffix(" ms")) < 30_000
    assert f"Everything adds up: 0 lost of {given} given" in out
    return figures


@pytest.mark.long
@pytest.mark.parametrize(
    ("faults", "noticed"),
    [
        ("lose Streams, double Pub/Sub", [r"\d+ lost", r"Pub/Sub: \d+ doubled"]),
        ("double Streams, lose Pub/Sub", [r"\d+ duplicates in the stream", r"Pub/Sub: \d+ lost"]),
        (
            "enrich-not, refuse-not",
            [
                r"billing has \d+ accounts wrong",
                r"\d+ answers with another status than expected, first 200 instead of 403",
            ],
        ),
    ],
)
def test_demo_notices_what_is_wrong(start: Start, faults: str, noticed: list[str]) -> None:
    """A demo that can't fail shows nothing."""
    code, out, _ = start([*FAULTY, "--requests", "200", "--seed", "7", "--calm"], FAULTS=faults).end()
    assert code == 1
    for each in noticed:
        assert re.search(f"Does not add up: {each}", " ".join(out.split())), out
    assert "Everything adds up" not in out


@pytest.mark.long
def test_demo_notices_what_goes_with_the_host(start: Start) -> None:
    """An outbox in memory: whatever it held when the host was killed is lost, and said to be."""
    code, out, _ = start([*FAULTY, "--requests", "200", "--seed", "7"], FAULTS="forget").end()
    assert code == 1
    assert re.search(r"Does not add up: \d+ lost", " ".join(out.split())), out


# -- the end ------------------------------------------------------------------------------------------------

INTERRUPTIONS = [
    ("Redis: ", signal.SIGINT),
    pytest.param("kill -9 billing", signal.SIGINT, marks=pytest.mark.long),
    pytest.param("kill -9 Redis", signal.SIGTERM, marks=pytest.mark.long),
    pytest.param("kill -9 host", signal.SIGINT, marks=pytest.mark.long),
    pytest.param("225 of 300", signal.SIGHUP, marks=pytest.mark.long),
]


@pytest.mark.parametrize(("moment", "number"), INTERRUPTIONS)
def test_interrupted_demo_leaves_nothing_and_is_quiet(start: Start, moment: str, number: signal.Signals) -> None:
    """Ctrl-C, a plain kill and a closed terminal, at a chance distance after one of these lines."""
    run = start([*DEMO, "--requests", "300"])
    run.until(moment)
    time.sleep(random.uniform(0, 0.2))
    if number == signal.SIGINT:
        run.press_ctrl_c()
    else:
        os.kill(run.process.pid, number)
    code, out, err = run.end()
    if "adds up" not in out:  # else it came too late
        assert (code, err) == (128 + number, "")
    assert run.nothing_left(within=0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_demo_ended_while_it_starts_leaves_nothing(start: Start, number: signal.Signals) -> None:
    """Before anything is set up to meet a signal."""
    run = start(DEMO)
    time.sleep(random.uniform(0, 1.2))
    os.kill(run.process.pid, number)
    code, out, _ = run.end()
    # Whichever code Python itself gives while it starts; it can also lose a Ctrl-C in a callback of an import.
    assert code != 0 or "adds up" in out
    assert run.nothing_left(within=8)


@pytest.mark.parametrize("moment", ["are ready", pytest.param("kill -9 host", marks=pytest.mark.long)])
def test_killed_demo_leaves_no_process_and_no_file(start: Start, moment: str) -> None:
    """`kill -9`: its programs and its Redis see that their input has ended."""
    with TemporaryDirectory() as folder:  # `tmp_path` is too long for a socket
        run = start([*DEMO, "--requests", "300"], TMPDIR=folder)
        run.until(moment)
        assert os.listdir(folder)
        if moment == "are ready":
            assert all(any(program in line for line in run.processes().values()) for program in PROGRAMS)
        run.process.kill()
        assert run.nothing_left(within=8)
        assert os.listdir(folder) == []


@pytest.mark.long
def test_ctrl_c_in_a_real_terminal(start: Start) -> None:
    """With a progress bar, and the key itself."""
    spawn = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
    run = start([sys.executable, "-c", spawn, *DEMO, "--requests", "5000"], TERM="xterm")
    run.until("are ready")
    run.process.stdin.write("\x03")
    run.process.stdin.flush()
    code, out, _ = run.end()
    assert code == 130
    assert "Traceback" not in out
    assert run.nothing_left(within=0)


@pytest.mark.long
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_that_dies_is_said_in_one_line(start: Start, program: str) -> None:
    """What was sent to it is not waited for."""
    run = start([*DEMO, "--requests", "300", "--calm"])
    run.until("are ready")
    [pid] = [pid for pid, line in run.processes().items() if program in line]
    os.kill(pid, signal.SIGKILL)
    code, _, err = run.end()
    assert code == 1
    assert len(err.splitlines()) == 1
    assert re.search("ended too early|no longer answers", err)
    assert run.nothing_left(within=0)


@pytest.mark.long
def test_a_program_that_does_not_start_is_said_in_one_line(start: Start) -> None:
    code, _, err = start(FAULTY, FAULTS="start-not").end()
    assert (code, err) == (1, "tests.support.faulty_meetings_host ended too early\n")


@pytest.mark.long
@pytest.mark.parametrize("program", PROGRAMS)
def test_each_program_also_runs_alone_and_ends_quietly(
    start: Start, own_redis: RedisServer, tmp_path: Path, program: str
) -> None:
    """As its README says: with a URL, until Ctrl-C or the end of its input. It makes its folder itself."""
    folder = tmp_path / "meetings-data"
    for interrupted in (True, False):
        run = start([sys.executable, "-m", program], SILBO_REDIS_URL=own_redis.url, MEETINGS_FOLDER=str(folder))
        run.until("{")
        if interrupted:
            run.press_ctrl_c()
            run.process.wait(timeout=10)
        code, _, err = run.end()  # closes its input
        assert code in (0, -signal.SIGINT)
        assert err == ""
    code, _, err = start([sys.executable, "-m", program]).end()
    assert code == 1
    assert err.startswith("Set SILBO_REDIS_URL")


@pytest.mark.parametrize("program", PROGRAMS)
def test_program_whose_starter_is_gone_with_its_folder_brings_nothing_back(
    start: Start, tmp_path: Path, program: str
) -> None:
    """A demo that is killed while its programs start: they may come to their files after all has been removed."""
    gone = tmp_path / "gone"
    command = [sys.executable, "-m", program]
    code, _, err = start(command, SILBO_REDIS_URL="unix:///nowhere", MEETINGS_FOLDER=str(gone / "demo")).end()
    assert code == 1
    assert "FileNotFoundError" in err
    assert not gone.exists()


# -- a Redis of the user's ----------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("interrupted", [False, True])
def test_a_given_redis_is_left_as_it_was(start: Start, own_redis: RedisServer, interrupted: bool) -> None:
    """What was there stays, and nothing of the demo is left, after Ctrl-C too."""
    with Redis.from_url(own_redis.url) as client:
        client.set("mine", "kept")
        run = start([*DEMO, "--requests", "300"], SILBO_REDIS_URL=own_redis.url)
        run.until("are ready")
        assert client.keys("silbo-demo-*")
        if interrupted:
            run.press_ctrl_c()
        code, out, err = run.end()
        assert (code, err) == (130 if interrupted else 0, ""), out
        assert "the one at SILBO_REDIS_URL" in out
        assert client.get("mine") == b"kept"
        assert client.keys() == [b"mine"]


@pytest.mark.long
def test_what_a_killed_demo_leaves_in_a_given_redis_expires(
    start: Start, own_redis: RedisServer, tmp_path: Path
) -> None:
    run = start([*DEMO, "--requests", "300"], SILBO_REDIS_URL=own_redis.url, TMPDIR=str(tmp_path))
    run.until("75 of 300")
    run.process.kill()
    assert run.nothing_left(within=8)
    with Redis.from_url(own_redis.url) as client:
        [stream] = client.scan_iter("silbo-demo-*}", _type="stream")
        assert 0 < client.ttl(stream) <= 3600


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("redis://127.0.0.1:1/0", "Redis does not answer: "),
        ("unix:///nowhere/redis.sock", "Redis does not answer: "),
        ("localhost:6380", "SILBO_REDIS_URL is no URL of a Redis: "),
    ],
)
def test_a_wrong_url_is_one_clear_line(start: Start, url: str, told: str) -> None:
    code, _, err = start(DEMO, SILBO_REDIS_URL=url).end()
    assert code == 1
    assert err.startswith(told)
    assert len(err.splitlines()) == 1


@pytest.mark.long
def test_a_frozen_redis_is_one_clear_line(start: Start, own_redis: RedisServer) -> None:
    own_redis.pause()
    code, _, err = start(DEMO, SILBO_REDIS_URL=own_redis.url).end()
    own_redis.resume()
    assert (code, err) == (1, "Redis does not answer within 5 s\n")


def test_help_and_wrong_options(start: Start) -> None:
    code, out, _ = start([*DEMO, "--help"]).end()
    assert code == 0
    assert "--requests" in out
    code, _, err = start([*DEMO, "--requests", "0"]).end()
    assert code == 2
    assert "at least 1" in err
