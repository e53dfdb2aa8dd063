"""The public workflows, forms and citation: what can be checked without other tools. `make check` checks their schemas."""

import os
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import slm

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def read(path: Path) -> dict[Any, Any]:
    """Returns a file's YAML."""
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def steps(workflow: dict[Any, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Returns the jobs of a workflow with each of their steps."""
    for job in workflow["jobs"].values():
        for step in job["steps"]:
            yield job, step


def commands(workflow: dict[Any, Any]) -> Iterator[list[str]]:
    """Returns the words of each command, once for each value of `$TARGET`."""
    for job, step in steps(workflow):
        for line in step.get("run", "").splitlines():
            matrix = job.get("strategy", {}).get("matrix", {})
            listed = [value for value in matrix.get("target", []) if isinstance(value, str)]
            listed += [row["target"] for row in matrix.get("include", ()) if "target" in row]
            for target in listed or [""]:
                yield shlex.split(line.replace('"$TARGET"', target))


def unpinned(text: str) -> list[str]:
    """Returns the actions that are not named by a commit with the version beside it."""
    used = re.findall(r"^\s*(?:- )?uses: (.*)$", text, flags=re.MULTILINE)
    return [each for each in used if not re.fullmatch(r"[\w-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", each)]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("uses: ") > 1 and unpinned(text) == []


def test_one_commit_for_each_version_of_an_action() -> None:
    used = {line for path in WORKFLOWS for line in re.findall(r"uses: (.*)", path.read_text(encoding="utf-8"))}
    assert len({line.partition("@")[0] for line in used}) == len(used) > 5


def test_an_action_without_a_commit_is_found() -> None:
    """The control."""
    good = "actions/checkout@" + "0123456789" * 4 + " # v6.0.2"
    bad = ["actions/checkout@v6", good.partition(" ")[0], good.replace("9 #", " #")]
    assert unpinned("".join(f"  - uses: {each}\n" for each in (good, *bad))) == bad


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_jobs_have_few_rights_and_an_end(path: Path) -> None:
    workflow = read(path)
    assert workflow["permissions"] in ({}, {"contents": "read"})
    for name, job in workflow["jobs"].items():
        assert job["timeout-minutes"] <= 120, name
        written = {right for right, level in job.get("permissions", {}).items() if level == "write"}
        allowed = {"provenance": {"id-token", "attestations"}, "publish": {"id-token", "pages"}}
        assert written <= allowed.get(name, set()), name
    for _, step in steps(workflow):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False
    assert "secrets." not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_steps_call_targets_that_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", MAKEFILE, flags=re.MULTILINE))
    called = {word for command in commands(read(path)) if command[0] == "make" for word in command[1:]}
    called = {word for word in called if "=" not in word}
    assert called and called <= targets, called - targets


# The targets of tests that no workflow calls.
ELSEWHERE = {
    "test-gpu": "needs a GPU; `make test` rehearses it",
    "test-real": "needs a model under other terms",
    "test-cpus": "needs qemu-user and minutes",
    "test-arm64": "needs qemu-user and minutes; jobs run on Arm",
    "test-pythons": "the matrix of ci.yml has each Python",
    "test-fake-cuda": "part of test-peers",
}


def test_the_targets_of_a_contributor_run_in_public() -> None:
    called = {
        word for path in WORKFLOWS for command in commands(read(path)) if command[0] == "make" for word in command
    }
    phony = re.search(r"^\.PHONY: (.*)$", MAKEFILE, flags=re.MULTILINE)
    assert phony is not None
    tests = {target for target in phony[1].split() if target.partition("-")[0] == "test"}
    assert tests - called == set(ELSEWHERE)
    assert {"check", "check-tag", "docs", "dist"} <= called


def test_every_python_is_tested_and_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    prefix = "Programming Language :: Python :: 3."
    declared = {f"3.{each.removeprefix(prefix)}" for each in project["classifiers"] if each.startswith(prefix)}
    jobs = read(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]
    matrix = jobs["test"]["strategy"]["matrix"]
    x86 = {*matrix["python"], *(row["python"] for row in matrix["include"] if row["runner"] in matrix["runner"])}
    listed = re.search(r"^PYTHONS \?= (.*)$", MAKEFILE, flags=re.MULTILINE)
    assert listed is not None
    assert declared == x86 == set(jobs["edge"]["strategy"]["matrix"]["python"]) == set(listed[1].split())
    assert project["requires-python"] == f">={min(declared, key=lambda name: int(name[2:]))}"


def test_the_edge_part_runs_on_each_system_by_the_lines_of_the_makefile() -> None:
    job = read(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]["edge"]
    assert {name.partition("-")[0] for name in job["strategy"]["matrix"]["runner"]} == {"ubuntu", "macos", "windows"}
    assert any(name.endswith("-arm") for name in job["strategy"]["matrix"]["runner"])
    here = [line for step in job["steps"] for line in step.get("run", "").splitlines()]
    recipe = MAKEFILE.split("\ntest-edge:", 1)[1].split("\n\n", 1)[0].replace("$$", "$")
    there = [line.strip() for line in recipe.splitlines() if line.strip().startswith("build/edge/bin/python ")]
    assert here == [
        line.replace("build/edge/bin/python", "python").replace(" --quiet --disable-pip-version-check", "")
        for line in there
    ]
    assert len(here) == 4


def test_the_citation_is_of_this_version() -> None:
    citation = read(ROOT / "CITATION.cff")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert citation["version"] == slm.__version__ and citation["license"] == project["license"]


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A tree whose version is 1.2.3 everywhere."""
    if shutil.which("make") is None:
        pytest.skip("there is no make")
    (tmp_path / "src" / "slm").mkdir(parents=True)
    (tmp_path / "src" / "slm" / "version.py").write_text('"""x"""\n\n__version__ = "1.2.3"\n')
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## [Unreleased]\n\n## [1.2.3] - 2027-01-01\n")
    (tmp_path / "CITATION.cff").write_text("cff-version: 1.2.0\nversion: 1.2.3\n")
    return tmp_path


def checked(tree: Path, tag: str) -> tuple[int, str]:
    """Runs `make check-tag` in a tree, with the tag in the environment, as the workflow does."""
    command = ["make", "--no-print-directory", "--file", str(ROOT / "Makefile"), "check-tag"]
    done = subprocess.run(command, cwd=tree, env=os.environ | {"TAG": tag}, capture_output=True, encoding="utf-8")
    return done.returncode, done.stdout


def test_a_release_has_one_version(release: Path) -> None:
    assert checked(release, "v1.2.3") == (0, "")
    assert checked(release, "v1.2.4") == (2, "the tag is v1.2.4, and src/slm/version.py has 1.2.3\n")
    assert checked(release, "1.2.3")[0] == 2
    assert checked(release, "") == (2, "name the tag: make check-tag TAG=v1.2.3\n")


@pytest.mark.parametrize(
    "name", ["v`touch${IFS}ran`", "v$(touch${IFS}ran)", '";touch${IFS}ran;"', "v$(shell touch ran)"]
)
def test_the_name_of_a_tag_is_not_a_command(release: Path, name: str) -> None:
    code, text = checked(release, name)
    assert (code, text) == (2, f"the tag is {name}, and src/slm/version.py has 1.2.3\n")
    assert not (release / "ran").exists()


def test_the_release_gives_the_tag_to_make_in_the_environment() -> None:
    [step] = [step for _, step in steps(read(ROOT / ".github" / "workflows" / "release.yml")) if "TAG" in str(step)]
    assert step["run"] == "make check-tag" and step["env"] == {"TAG": "${{ github.ref_name }}"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("CHANGELOG.md", "## [Unreleased]\n\n## [1.2.30]\n", "CHANGELOG.md has no heading [1.2.3]\n"),
        ("CITATION.cff", "version: 1.2.30\n", "CITATION.cff has another version than 1.2.3\n"),
    ],
)
def test_a_release_with_two_versions_is_rejected(release: Path, name: str, text: str, message: str) -> None:
    (release / name).write_text(text)
    assert checked(release, "v1.2.3") == (2, message)
