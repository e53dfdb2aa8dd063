"""Several models as one: probabilities are averaged, in whatever portions the tokens are read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slm.core.config import ModelConfig
from slm.core.errors import SlmError
from slm.core.manifest import Bundle
from slm.core.nn import CausalLM, load_checkpoint, save_checkpoint
from slm.core.nn.decoder import TorchDecoder
from slm.core.tokenizer import Tokenizer
from slm.loading import load_ensemble
from slm.runtime.decoder import OnnxDecoder
from slm.runtime.ensemble import Average, EnsembleDecoder

# Tolerance of probabilities of a few thousandths, whose logits differ by 1e-5 between portions.
TOLERANCE = 1e-5


@pytest.fixture
def other(make_model: Callable[..., CausalLM], config: ModelConfig, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "other", make_model(config, 9), tokenizer, {"made_by": "tests"})
    return tmp_path / "other"


@pytest.fixture
def decoders(shared_bundle: Bundle, other: Path) -> list[Any]:
    return [OnnxDecoder(shared_bundle), TorchDecoder(load_checkpoint(other))]


def softmax(x: np.ndarray) -> np.ndarray:
    x = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


@pytest.mark.parametrize("average", ["mean", "geometric"])
def test_probabilities_are_averaged(decoders: list[Any], average: Average) -> None:
    ids = np.random.default_rng(0).integers(0, decoders[0].vocab_size, (2, 30))
    found = softmax(EnsembleDecoder(decoders, average).logits(ids))
    parts = [softmax(decoder.logits(ids)) for decoder in decoders]
    wanted = sum(parts) / 2 if average == "mean" else softmax(sum(np.log(part) for part in parts) / 2)
    np.testing.assert_allclose(found, wanted, atol=TOLERANCE)
    assert np.abs(found - parts[0]).max() > 100 * TOLERANCE


def test_every_way_of_reading_agrees(decoders: list[Any]) -> None:
    ensemble = EnsembleDecoder(decoders)
    ids = np.random.default_rng(1).integers(0, ensemble.vocab_size, 30)
    wanted = ensemble.logits(ids[None])[0]
    np.testing.assert_allclose(softmax(ensemble.read(ids[:20].tolist())), softmax(wanted[19]), atol=TOLERANCE)
    snapshot = ensemble.snapshot()
    assert ensemble.length == snapshot.length == 20 and snapshot.bytes > 0
    found = ensemble.read_each(ids[20:24].tolist())
    np.testing.assert_allclose(softmax(found), softmax(wanted[20:24]), atol=TOLERANCE)
    ensemble.rewind(22)
    np.testing.assert_allclose(softmax(ensemble.read([int(ids[22])])), softmax(wanted[22]), atol=TOLERANCE)
    ensemble.restore(snapshot)
    np.testing.assert_allclose(softmax(ensemble.read([int(ids[20])])), softmax(wanted[20]), atol=TOLERANCE)
    likely, _ = ensemble.score(ids[None])
    logs = np.log(softmax(wanted[:-1]))
    np.testing.assert_allclose(likely[0], np.take_along_axis(logs, ids[1:, None], -1)[:, 0], atol=1e-4)


def test_a_model_with_itself_is_itself(shared_bundle: Bundle) -> None:
    twice = EnsembleDecoder([OnnxDecoder(shared_bundle), OnnxDecoder(shared_bundle)])
    ids = list(range(1, 20))
    alone = OnnxDecoder(shared_bundle).read(ids)
    np.testing.assert_allclose(softmax(twice.read(ids)), softmax(alone), atol=TOLERANCE)


def test_when_one_cannot_read_all_forget(decoders: list[Any]) -> None:
    ensemble = EnsembleDecoder(decoders)
    ensemble.read([1, 2, 3])
    with pytest.raises(SlmError):
        ensemble.read([1] * (ensemble.context + 1))
    assert [decoder.length for decoder in decoders] == [0, 0]
    with pytest.raises(SlmError, match="not of this ensemble"):
        ensemble.restore(decoders[0].snapshot())


def test_the_command(slm: Callable[..., Any], shared_bundle: Bundle, other: Path, tmp_path: Path) -> None:
    options = ("-p", "The fox", "--greedy", "--max-new-tokens", 10, "--json")
    result = slm("generate", shared_bundle.path, other, "--ensemble", "mean", *options)
    assert result.code == 0
    answer = json.loads(result.out)
    assert answer["text"] == load_ensemble([shared_bundle.path, other]).generate(
        "The fox", max_new_tokens=10, temperature=0
    )
    assert answer["backend"].startswith("mean of 2")
    drafted = slm("generate", shared_bundle.path, other, "--ensemble", "mean", "--draft", 3, *options)
    assert json.loads(drafted.out)["text"] == answer["text"]
    assert slm("generate", shared_bundle.path, other, *options).code == 2
    assert slm("generate", shared_bundle.path, "--ensemble", "mean", *options).code == 2
    words = json.loads((other / "tokenizer.json").read_text())
    words["model"]["merges"] = words["model"]["merges"][:-1]
    (other / "tokenizer.json").write_text(json.dumps(words))
    result = slm("generate", shared_bundle.path, other, "--ensemble", "mean", *options)
    assert result.code == 1 and "different tokenizers" in result.err
