"""Every command of an edge device works on a system without what only Linux has, and with the rules of Windows for files.

`hiding` says what is hidden, and from whom. `edge.py` and `chain.py` run the commands.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
EDGE = ("runtime", "cli", "cli/commands", "core", "core/graph_plan", "core/metrics", "core/text", "web", "serve",
        "steps")  # fmt: skip
MAKING = ("train", "train/data", "train/logs", "finetune", "export", "export/graph", "quantize", "refine", "interchange",
          "interchange/gguf", "interchange/trim", "core/nn")  # fmt: skip
BREAK = 21


def modules(homes: tuple[str, ...]) -> str:
    files = [file.relative_to(ROOT) for home in homes for file in sorted((ROOT / home).glob("*.py"))]
    names = [".".join(("slm", *file.with_suffix("").parts)) for file in files if not file.stem.startswith("__")]
    return " ".join(name for name in names if name != "slm.interchange.harness")  # which needs lm_eval


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-P", *arguments], capture_output=True, encoding="utf-8", timeout=800)


def report_of(system: str, program: str, homes: tuple[str, ...], home: Path) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("SLM_CACHE", str(home / "cache"))
        done = run(str(HERE / program), system, modules(homes))
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Traceback" not in done.stderr, done.stderr[-4000:]
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report | {"err": done.stderr}


@pytest.fixture(scope="module", params=["bare", "windows"])
def edge(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    report = report_of(request.param, "edge.py", EDGE, tmp_path_factory.mktemp("edge"))
    return report | {"windows": request.param == "windows"}


def test_help(edge: dict[str, Any]) -> None:
    assert set(edge["help"]) == {0} and len(edge["help"]) > 20


def test_a_prompt_of_another_system_is_the_same_prompt(edge: dict[str, Any]) -> None:
    """With a byte order mark, and line ends of Windows."""
    code, text = edge["generate"]
    assert code == 0 and text.startswith("One day") and len(text) > len("One day") + 3
    assert edge["piped"][0] == 0 and edge["piped"][1].startswith("One\nday")
    code, answers = edge["chat"]
    assert code == 0 and len(answers.splitlines()) == 2 and "\r" not in answers


def test_a_page_is_written_and_replaced(edge: dict[str, Any]) -> None:
    if "from npm is missing" in edge["err"]:
        pytest.skip("files of the page are missing; `make web` fetches them")
    (code, files), again = edge["web"], edge["again"]
    assert (code, again) == (0, 0) and files > 20


def test_speed_and_memory(edge: dict[str, Any]) -> None:
    code, text = edge["bench"]
    assert code == 0, edge["err"][-3000:]
    report = json.loads(text)
    assert report["memory"][0]["rss_mib"] > 20 and report["machine"]["processor"] == (
        "Some Processor" if edge["windows"] else report["machine"]["processor"]
    )
    # Without /proc, a system other than Windows reports the peak through `resource`, which is hidden too.
    assert report["memory"][0]["peak_rss_mib"] > 20


def test_reports(edge: dict[str, Any]) -> None:
    for name in ("info", "doctor", "eval"):
        code, text = edge[name]
        assert code == 0, (name, edge["err"][-3000:])
        json.loads(text)
    assert edge["list"] == 0 and edge["missing"] == 1
    assert json.loads(edge["eval"][1])["documents"] == 1
    doctor = json.loads(edge["doctor"][1])
    lacking = {"huge pages", "release of mapped weights", "memory limits", "SIGUSR1", "readline"}
    assert doctor["system"]["lacking"].keys() == (lacking | {"long paths"} if edge["windows"] else lacking)
    assert doctor["memory"]["available"] > 1 << 20 and doctor["cores"]["used"] >= 1


def test_a_server_answers_and_stops(edge: dict[str, Any]) -> None:
    served = edge["serve"]
    assert "error" not in served, served
    assert served["text"][0] == 200 and served["text"][1]["choices"][0]["text"]
    status, answer = served["schema"]
    assert status == 200 and json.loads(answer["choices"][0]["message"]["content"]) in (True, False)
    status, answer = served["demanding"]
    assert status == 400 and "to compile" in answer["error"]["message"]
    assert served["code"] == 128 + (BREAK if edge["windows"] else 2)


def test_templates_stay_within_limits(edge: dict[str, Any]) -> None:
    for name in ("time", "memory"):
        reason, seconds, after = edge[name]
        assert "it takes more than" in reason and after == "hello" and seconds < 9


def test_nothing_is_left_and_no_open_file_was_moved(edge: dict[str, Any]) -> None:
    assert {*edge["left"]} - {"page"} == {"text.txt"}
    assert edge["refused"] == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_models_are_made(tmp_path: Path) -> None:
    """Training, fine-tuning, export, quantization and verification, most of them twice over the same place."""
    report = report_of("windows", "chain.py", (*EDGE, *MAKING), tmp_path)
    assert report["refused"] == [], report["err"][-3000:]
    assert set(report["codes"].values()) == {0}, report["err"][-4000:]


CONTROLS = {
    "import fcntl": "No module named 'fcntl'",
    "import resource": "No module named 'resource'",
    "import os; os.fork()": "no attribute 'fork'",
    "import os; os.sched_getaffinity(0)": "no attribute 'sched_getaffinity'",
    "import signal; signal.SIGHUP": "no attribute 'SIGHUP'",
    "from os import getuid": "cannot import name 'getuid'",
    "open('/proc/self/status')": "No such file or directory",
    "from pathlib import Path; Path('/proc/cpuinfo').read_text()": "No such file or directory",
}
WINDOWS = {
    "import os; os.open('.', os.O_RDONLY)": "Permission denied",
    "import os; file = open('x', 'w'); os.replace('x', 'y')": "another process uses",
    "import os; os.mkdir('d'); file = open('d/x', 'w'); os.rename('d', 'e')": "another process uses",
    "import os; file = open('x', 'w'); os.unlink('x')": "another process uses",
    "import shutil, os; os.mkdir('d'); file = open('d/x', 'w'); shutil.rmtree('d')": "another process uses",
    "import mmap, os; open('x', 'w').write('abc'); f = open('x', 'rb'); m = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ); "
    "f.close(); os.unlink('x')": "another process uses",
    "import os; os.kill(os.getpid(), 0)": "ends a process on Windows",
    "import sys, os; assert (sys.platform, os.name) == ('linux', 'posix')": "AssertionError",
}


PROGRAM = """
import sys, os, json
sys.path.insert(0, sys.argv[1])
import hiding
hiding.install(sys.argv[2])
found = []
for number, code in enumerate(json.loads(sys.argv[4])):
    os.makedirs(str(number))
    os.chdir(str(number))
    try:
        exec(code, {"__name__": sys.argv[3]})
        found.append("")
    except Exception as error:
        found.append(f"{type(error).__name__}: {error}")
    os.chdir("..")
print(json.dumps(found))
"""


@pytest.mark.parametrize(("system", "controls"), [("bare", CONTROLS), ("windows", CONTROLS | WINDOWS)])
def test_what_is_hidden_is_found(system: str, controls: dict[str, str]) -> None:
    """A module of slm that uses it fails."""
    done = run("-c", PROGRAM, str(HERE), system, "slm.made_for_this", json.dumps(list(controls)))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert all(reason in each for reason, each in zip(controls.values(), found, strict=True)), found


def test_other_packages_see_the_system_as_it_is() -> None:
    controls = [each for each in CONTROLS if "fork()" not in each]
    done = run("-c", PROGRAM, str(HERE), "windows", "another", json.dumps(controls))
    assert json.loads(done.stdout) == [""] * len(controls), done.stderr
