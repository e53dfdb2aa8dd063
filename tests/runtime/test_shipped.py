"""The bundled demo model: intact, small, and the default of `slm generate`."""

from collections.abc import Callable
from typing import Any

import slm as package
from slm.core.manifest import Bundle
from slm.core.tokenizer import Tokenizer
from slm.runtime.shipped import model_path


def test_it_is_a_sound_int8_bundle() -> None:
    bundle = Bundle.open(model_path())
    assert bundle.manifest.precision == "int8" and bundle.bytes < 6_000_000
    quality, provenance = bundle.manifest.quality, bundle.manifest.provenance
    assert quality is not None and quality.kl_nats < 0.02
    # On held-out TinyStories; a model that knew only word counts would be above 400.
    assert quality.perplexity_after < 9
    assert provenance["parity"]["tokens"] == 3 * bundle.config.sliding_window


def test_it_tells_a_story_past_its_window() -> None:
    model = package.load(model_path())
    result = model.complete("Once upon a time", max_new_tokens=220, temperature=0.7, seed=1)
    assert len(result.tokens) > model.decoder.bundle.config.sliding_window  # type: ignore[attr-defined]
    words = [word.strip('.,!?"').lower() for word in result.text.split()]
    assert sum(word.replace("'", "").isalpha() for word in words) / len(words) > 0.95
    assert len(set(words)) > 50
    # it does not run in circles: hardly any four words in a row come back
    fours = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    assert len(set(fours)) / len(fours) > 0.9
    names = {word for word in ("lily", "tom", "tim", "sue", "sam", "max") if words.count(word) > 1}
    assert names  # whoever is told of is told of again


def test_its_tokenizer_is_that_of_its_model() -> None:
    bundle = Bundle.open(model_path())
    assert Tokenizer.load(model_path()).vocab_size == bundle.config.vocab_size


def test_generate_falls_back_to_it(slm: Callable[..., Any]) -> None:
    result = slm("generate", "-p", "One day", "--greedy", "--max-new-tokens", "12")
    assert result.code == 0, result.err
    assert "Using the bundled demo model (no model in ./runs)." in result.err
    assert result.out.startswith("One day") and len(result.out) > 20
