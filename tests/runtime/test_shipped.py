"""The model inside the package: sound, small, and what `slm generate` falls back to."""

from collections.abc import Callable
from typing import Any

import slm as package
from slm.core.manifest import Bundle
from slm.core.tokenizer import Tokenizer
from slm.runtime.shipped import model_path


def test_it_is_a_sound_int8_bundle() -> None:
    bundle = Bundle.open(model_path())
    assert bundle.manifest.precision == "int8" and bundle.bytes < 3_000_000
    quality, provenance = bundle.manifest.quality, bundle.manifest.provenance
    assert quality is not None and quality.kl_nats < 0.02
    # On the shipped validation stories, which it was not trained on; a model that knew only word counts would be above 100.
    assert quality.perplexity_after < 3
    assert provenance["parity"]["tokens"] == 3 * bundle.config.sliding_window


def test_it_tells_a_story_past_its_window() -> None:
    model = package.load(model_path())
    text = model.generate("One sunny day,", max_new_tokens=160, temperature=0)
    assert model.last_run is not None
    assert len(model.last_run.tokens) > model.decoder.bundle.config.sliding_window  # type: ignore[attr-defined]
    words = [word.strip('.,!?"').lower() for word in text.split()]
    from slm.core import sample

    known = {word.strip('.,!?"').lower() for word in sample.stories_path().read_text(encoding="utf-8").split()}
    assert len(set(words)) > 25
    assert sum(word in known for word in words) / len(words) > 0.95


def test_its_tokenizer_is_that_of_its_model() -> None:
    bundle = Bundle.open(model_path())
    assert Tokenizer.load(model_path()).vocab_size == bundle.config.vocab_size


def test_generate_falls_back_to_it(slm: Callable[..., Any]) -> None:
    result = slm("generate", "-p", "One day", "--greedy", "--max-new-tokens", "12")
    assert result.code == 0, result.err
    assert "the small model that ships with slm" in result.err
    assert result.out.startswith("One day") and len(result.out) > 20
