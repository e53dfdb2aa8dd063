"""Names from artifacts of others mean the same file on every system, or are rejected."""

from pathlib import Path

import pytest

from slm.core import systems
from slm.core.errors import SlmError
from slm.core.file_names import is_portable, leads_out
from slm.core.files import member
from slm.core.shell import quoted

LEADS_OUT = (
    "../x",
    "..\\x",
    "a/../../x",
    "a\\..\\x",
    "C:x",
    "C:\\x",
    "c:/x",
    "\\x",
    "/x",
    "\\\\host\\share\\x",
    "\\\\?\\C:\\x",
)
INVALID = ("a\\b", "a:b", "model.onnx::$DATA", "CON", "con.txt", "onnx/NUL", "aux.json", "com1", "LPT9.onnx", "lpt¹", "nul .x",
           "manifest.json.", "config.json ", "a./b", "a?", "<a", "a|b")  # fmt: skip
VALID = ("config.json", "onnx/model.onnx_data", "model-00001-of-00002.safetensors", ".hidden", "a..b", "console.json",
         "com.json", "com10", "communication", "nullable.txt", "ünïcode.json", "a b.txt", "lpt")  # fmt: skip


@pytest.mark.parametrize("name", LEADS_OUT)
def test_names_that_lead_out_of_an_artifact_on_any_system(name: str, tmp_path: Path) -> None:
    assert leads_out(name)
    for links in (False, True):
        with pytest.raises(SlmError, match="leads out of the directory"):
            member(tmp_path, name, links=links)


@pytest.mark.parametrize("name", INVALID)
def test_names_that_are_no_file_or_another_one_on_windows(name: str, tmp_path: Path) -> None:
    assert not is_portable(name)
    with pytest.raises(SlmError, match=r"is not a valid file name|leads out"):
        member(tmp_path, name)


@pytest.mark.parametrize("name", VALID)
def test_ordinary_names(name: str, tmp_path: Path) -> None:
    assert is_portable(name) and not leads_out(name)
    assert member(tmp_path, name) == tmp_path / name


def test_quotes_are_those_of_the_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    assert quoted("runs/a b") == "'runs/a b'" and quoted("runs/a") == "runs/a"
    monkeypatch.setattr(systems, "WINDOWS", True)
    assert quoted(r"C:\models\tiny") == r"C:\models\tiny" and quoted(r"C:\my models") == r'"C:\my models"'
    assert quoted('say "hi"') == r'"say \"hi\""'
