"""examples/assistant.ipynb in Jupyter's kernel, as it stands: the same texts as those that are stored, on the same machine."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.peers.conftest import PEERS, environment
from tests.steps.test_notebook import EXAMPLES, NOTEBOOK, cells, text

pytestmark = [pytest.mark.peer, pytest.mark.slow, pytest.mark.timeout(1200)]

EXECUTE = """
import nbformat
from nbclient import NotebookClient
notebook = nbformat.read("assistant.ipynb", 4)
NotebookClient(notebook, timeout=1000, kernel_name="python3").execute()
nbformat.write(notebook, "assistant.ipynb")
"""


def test_the_notebook_runs_in_jupyter() -> None:
    shutil.copy(NOTEBOOK, "assistant.ipynb")
    shutil.copytree(EXAMPLES / "faq", "faq")
    kernels = Path("kernels/python3")
    kernels.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernels / "kernel.json").write_text(
        json.dumps({"argv": command, "display_name": "Python 3", "language": "python"})
    )
    settings = environment("notebook") | {"JUPYTER_PATH": str(Path.cwd())}
    done = subprocess.run(
        [sys.executable, "-c", EXECUTE], env=settings, capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (PEERS / "notebook").is_dir()
    found = json.loads(Path("assistant.ipynb").read_text(encoding="utf-8"))["cells"]
    ran = [cell for cell in found if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in ran] == list(range(1, len(ran) + 1))
    bars = [o for cell in ran for o in cell["outputs"] if o["output_type"] == "display_data"]
    assert all(bar["data"]["text/plain"] == "" for bar in bars) and bars  # the bars have disappeared
    answers = [[line for line in text(cell).splitlines() if "wanted:" in line or "asked:" in line] for cell in ran]
    stored = [[line for line in text(cell).splitlines() if "wanted:" in line or "asked:" in line] for cell in cells()]
    assert answers[3] == stored[3] != []
    assert "nine in the morning" in text(ran[-1])
