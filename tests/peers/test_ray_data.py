"""`slm data prepare --ray` on two machines of Ray: the bytes of a preparation without Ray, also when a machine is lost."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.waiting import wait_for

pytestmark = pytest.mark.peer

PACKAGES = Path(__file__).parents[2] / "build" / "peers" / "ray"
SCRIPTS = Path(__file__).parent / "scripts"
# What Ray needs without its dashboard, whose agents take long to start.
CORE = ("ray", "msgpack")
OPTIONS = ("--vocab-size", "300", "--shard-tokens", "60000", "--dedup", "--quality")
# Examining and encoding all files takes some seconds on two processors.
FILES, COPIES = 8, 5


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    if not PACKAGES.is_dir():
        pytest.skip("no ray under build/peers; `make peers` installs it")
    core = tmp_path_factory.mktemp("core")
    for path in PACKAGES.iterdir():
        if path.name in CORE or path.name.startswith("ray-"):
            (core / path.name).symlink_to(path)
    return os.environ | {"PYTHONPATH": str(core), "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}


class Nodes:
    """A cluster of two machines."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdin is not None and process.stdout is not None
        self._in, self._lines = process.stdin, iter(process.stdout.readline, "")
        self.address = self._until("address ").removeprefix("address ").strip()

    def tell(self, command: str) -> None:
        self._in.write(f"{command}\n")
        self._in.flush()
        self._until(command)

    def _until(self, start: str) -> str:
        return next(line for line in self._lines if line.startswith(start))


@pytest.fixture(scope="module")
def nodes(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    said = tmp_path_factory.mktemp("ray") / "stderr"
    with said.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, str(SCRIPTS / "ray_nodes.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        )
        try:
            started = Nodes(process)
        except StopIteration:
            pytest.fail(said.read_text()[-3000:])
        yield started
        assert process.stdin is not None and process.stdout is not None
        process.stdin.close()
        assert process.wait(60) == 0
        process.stdout.close()


class Shared:
    """A directory that both machines see, and commands that read and write there."""

    def __init__(self, path: Path, environment: dict[str, str]) -> None:
        self.path, self._environment = path, environment

    def command(self, out: str, *more: str) -> "subprocess.Popen[str]":
        code = "import sys; from slm.cli.main import main; main(sys.argv[1:])"
        places = ("--data", str(self.path / "texts"), "--out", str(self.path / out))
        return subprocess.Popen(
            [sys.executable, "-c", code, "data", "prepare", *places, *OPTIONS, *more],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self._environment,
        )

    def contents(self, out: str) -> dict[str, str]:
        files = sorted((self.path / out).iterdir())
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}

    def examined(self, out: str) -> int:
        """The number of parts that were examined."""
        return len(list((self.path / f".{out}.unfinished/parts").glob("examine-*.done")))


@pytest.fixture(scope="module")
def shared(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory, stories: list[str]) -> Shared:
    """A directory that both machines see, with text, and the dataset that is made of it without Ray."""
    place = Shared(tmp_path_factory.mktemp("shared"), environment)
    (place.path / "texts").mkdir()
    for number in range(FILES):
        rows = [{"text": f"{story.strip()} {number} {copy}"} for copy in range(COPIES) for story in stories[number::2]]
        rows += rows[:5]
        (place.path / f"texts/{number}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    result = place.command("without").communicate(timeout=300)
    assert (place.path / "without/dataset.json").is_file(), result
    return place


def test_two_machines_make_the_bytes_of_one(nodes: Nodes, shared: Shared) -> None:
    process = shared.command("with", "--ray", nodes.address, "--json")
    out, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert shared.contents("with") == shared.contents("without")
    report = json.loads(out)
    assert report["train"]["duplicates_removed"] >= 5 and len(report["train"]["shards"]) > 2
    assert not (shared.path / ".with.unfinished").exists()


@pytest.mark.parametrize("victim", ["worker", "machine"])
def test_a_lost_worker_and_a_lost_machine_change_nothing(nodes: Nodes, shared: Shared, victim: str) -> None:
    process = shared.command(victim, "--ray", nodes.address)
    wait_for(lambda: shared.examined(victim) >= 1 or process.poll() is not None, 200)
    assert process.poll() is None, process.communicate()
    if victim == "machine":
        nodes.tell("kill")
    else:
        kill_a_task()
    _, errors = process.communicate(timeout=240)
    if victim == "machine":
        nodes.tell("add")
    assert process.returncode == 0, errors
    assert shared.contents(victim) == shared.contents("without")
    assert "it is done again" in errors


def kill_a_task() -> None:
    """Kills the process of a task that runs."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        for process in psutil.process_iter(["cmdline"]):
            if "ray::run_task" in " ".join(process.info["cmdline"] or ()):
                process.send_signal(signal.SIGKILL)
                return
        time.sleep(0.02)
    pytest.fail("no task runs")


def test_an_interrupted_command_continues(nodes: Nodes, shared: Shared) -> None:
    process = shared.command("cut", "--ray", nodes.address)
    wait_for(lambda: shared.examined("cut") >= 2 or process.poll() is not None, 200)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert shared.examined("cut") >= 2 and not (shared.path / "cut").exists()
    again = shared.command("cut", "--ray", nodes.address, "--workers", "1")
    _, errors = again.communicate(timeout=240)
    assert again.returncode == 0 and "parts were finished before" in errors, errors
    assert shared.contents("cut") == shared.contents("without")


def test_a_cluster_that_is_not_there_is_named(shared: Shared) -> None:
    process = shared.command("wrong", "--ray", "127.0.0.1:1")
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 1 and "no Ray cluster at 127.0.0.1:1" in errors and "Traceback" not in errors, errors
    assert not (shared.path / "wrong").exists()
