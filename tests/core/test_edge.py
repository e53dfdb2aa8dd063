"""What an edge device does needs none of the packages that the extras bring, though they are installed here.

`tests/test_packaging.py` tries the same where they are not installed, which takes a package index.
"""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from slm.cli.main import EXTRAS

ROOT = Path(__file__).parent.parent.parent
# As they are imported, where that is not as they are called.
IMPORTED = {"backports.zstd": "backports", "pyyaml": "yaml", "lm_eval": "lm_eval"}
# What onnx and datasets bring, and Python's own from 3.14 on.
MORE = ("onnx_ir", "pyarrow", "pandas", "transformers", "compression.zstd")


def extras() -> set[str]:
    """Returns what the extras bring, as it is imported."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [line for extra in ("convert", "train", "eval") for line in project["optional-dependencies"][extra]]
    names = {re.split(r"[\[<>=;, ]", line)[0] for line in lines} - {
        "slm-edge",
        "typing_extensions",
    }  # pydantic brings the latter
    return {IMPORTED.get(name, name) for name in names} | set(MORE)


def edge(*lines: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Runs a program in which what the extras bring cannot be imported."""
    program = [f"import sys; sys.modules.update(dict.fromkeys({sorted(extras())!r}))", *lines]
    return subprocess.run([sys.executable, "-c", "\n".join(program)], input=stdin, capture_output=True, text=True)


def modules() -> list[str]:
    homes = ("runtime", "cli", "core", "core/graph_plan", "core/text", "web")
    files = [file.relative_to(ROOT) for home in homes for file in sorted((ROOT / home).glob("*.py"))]
    return [".".join(("slm", *file.with_suffix("").parts)) for file in files if file.stem != "__init__"]


def test_what_is_blocked() -> None:
    assert {"torch", "onnx", "onnxscript", "safetensors", "backports", "yaml", "datasets", "lm_eval"} <= extras()
    assert edge("import torch").returncode == edge("from backports import zstd").returncode == 1


def test_every_module_of_an_edge_device_imports() -> None:
    assert len(modules()) > 40
    done = edge(*(f"import {module}" for module in modules()))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["text.txt", "text.jsonl.gz"])
def test_text_is_read(name: str) -> None:
    write = "import gzip, json; from pathlib import Path; Path('text.txt').write_text('Once.'); "
    write += "Path('text.jsonl.gz').write_bytes(gzip.compress(json.dumps({'text': 'Once.'}).encode()))"
    read = f"from slm.core.text.documents import read_documents; print(list(read_documents(Path({name!r}))))"
    done = edge(write, read)
    assert done.stdout == "['Once.']\n", done.stderr


def test_what_needs_an_extra_says_which(tmp_path: Path) -> None:
    (tmp_path / "text.txt.zst").write_bytes(b"")
    done = edge("from slm.cli.main import main", "main(['eval', '--data', 'text.txt.zst'])")
    assert done.returncode == 1
    assert "slm-edge[train]" in done.stderr and "Traceback" not in done.stderr


def imports(home: str) -> set[str]:
    """Returns the packages that the modules of a directory import, wherever in them."""
    found = set()
    for file in (ROOT / home).glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {each.name.partition(".")[0] for each in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names - {"slm"}


def test_a_server_without_its_extra_says_which() -> None:
    """Whichever of its packages is imported first."""
    needed = imports("serve") | {"llguidance"}  # which `slm.runtime.constraint` imports
    needed -= (imports("runtime") - {"llguidance"}) | imports("core") | {"pydantic_core"}
    assert {"fastapi", "starlette", "uvicorn", "h11", "llguidance"} <= needed
    assert {name: EXTRAS.get(name) for name in needed} == dict.fromkeys(needed, "serve")
    for name in ("starlette", "h11"):
        block = f"sys.modules.update(dict.fromkeys({sorted(name + rest for rest in ('', '.types'))!r}))"
        done = edge(block, "from slm.cli.main import main", "main(['serve', '--port', '0'])")
        assert done.returncode == 1 and "slm-edge[serve]" in done.stderr and "Traceback" not in done.stderr


def test_a_chat_needs_no_extra() -> None:
    talk = "main(['chat', '--max-new-tokens', '5', '--threads', '1'])"
    done = edge("from slm.cli.main import main", talk, stdin="Hi.\nAnd then?\n")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 2
