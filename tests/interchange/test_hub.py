"""What happens when a model cannot be had from the hub: one line each, and what to do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import huggingface_hub
import pytest
from huggingface_hub import errors

from slm.core.errors import SlmError
from slm.interchange.hub import download, is_hub_id
from slm.interchange.importing import import_model


def response(code: int) -> Any:
    return Mock(status_code=code, headers={}, request=Mock(url="https://huggingface.co/x"), url="u", text="")


FAILURES = {
    "gated": (errors.GatedRepoError("gated", response=response(403)), "licence must be accepted", "hf auth login"),
    "unknown": (errors.RepositoryNotFoundError("no", response=response(404)), "has no model a/b", "spelling"),
    "revision": (errors.RevisionNotFoundError("no", response=response(404)), "no such revision", "tree/main"),
    "network": (errors.LocalEntryNotFoundError("no"), "not in the hub's cache", "HF_HUB_OFFLINE"),
    "server": (errors.HfHubHTTPError("503 Server Error", response=response(503)), "503", "check the network"),
    "socket": (ConnectionError("name not\nresolved"), "name not resolved", "check the network"),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_failure_is_explained(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    error, said, hint = FAILURES[kind]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Mock(side_effect=error))
    with pytest.raises(SlmError, match=said) as caught:
        download("a/b")
    assert caught.value.hint is not None and hint in caught.value.hint and "\n" not in caught.value.message


def test_without_a_network_it_is_one_line(slm: Callable[..., Any]) -> None:
    result = slm("import", "google/gemma-3-270m")
    assert result.code == 1
    assert [line.split(":")[0] for line in result.err.splitlines()[-2:]] == ["error", "hint"]
    assert "google/gemma-3-270m" in result.err and not Path("runs").exists()


def test_what_was_downloaded_is_imported(
    monkeypatch: pytest.MonkeyPatch, shared_checkpoint: Path, slm: Callable[..., Any]
) -> None:
    got = Mock(return_value=str(shared_checkpoint))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", got)
    assert slm("import", "someone/small-model", "--revision", "v2").code == 0
    assert got.call_args.args == ("someone/small-model",) and got.call_args.kwargs["revision"] == "v2"
    assert not any(
        pattern.endswith((".bin", ".pt", ".pkl", ".py")) for pattern in got.call_args.kwargs["allow_patterns"]
    )
    assert Path("runs/small-model/checkpoint/imported/model.safetensors").is_file()


def test_a_path_is_not_an_id(tmp_path: Path) -> None:
    assert is_hub_id("google/gemma-3-270m") and is_hub_id("a/b.c_d")
    Path("here/there").mkdir(parents=True)
    for source in ("here/there", "./a/b", "/a/b", "a", "a/b/c", "../a/b", "a/b c"):
        assert not is_hub_id(source)
    with pytest.raises(SlmError, match="not found: nothing"):
        import_model("nothing", tmp_path / "out")
