"""The 270M shape with random weights: export and INT8 quantization, verified, within a size limit.

One layer of each kind of its eighteen: all of them have the same shapes. `tests/peers/test_real_model.py` has all of them.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from slm.core.config import FULL, SLIDING
from slm.core.errors import SlmError
from slm.core.nn import CausalLM, save_checkpoint
from slm.core.presets import preset
from slm.export.bundle import export_bundle
from slm.quantize.make import quantize_bundle
from slm.quantize.texts import TokenRows
from slm.train.data.tokenizer import gpt2
from slm.train.run import with_special_tokens

MEGABYTE = 1_000_000


@pytest.mark.slow
@pytest.mark.usefixtures("gpt2_vocabulary")
def test_from_weights_to_int8(tmp_path: Path) -> None:
    whole = preset("gemma3-270m")
    # A short window changes no weight, and with it the parity check reads 192 tokens.
    few = {"num_hidden_layers": 2, "layer_types": (SLIDING, FULL), "sliding_window": 64}
    config = whole.model_copy(update=few)
    try:
        tokenizer = gpt2(config.max_position_embeddings)
    except SlmError as error:
        pytest.skip(f"a bundle without GPT-2's tokenizer would be smaller than a real one: {error}")
    model = CausalLM(with_special_tokens(config, tokenizer))
    model.init_weights(torch.Generator().manual_seed(0))
    save_checkpoint(tmp_path / "checkpoint", model, tokenizer, {})
    bundle = export_bundle(tmp_path / "checkpoint", tmp_path / "onnx")
    parity = bundle.manifest.parity
    assert parity is not None and parity.tokens == 3 * config.sliding_window
    assert 0 < parity.largest < 1e-4
    rows = np.random.default_rng(0).integers(0, config.vocab_size, (1, config.sliding_window + 64))
    made = quantize_bundle(bundle, tmp_path / "onnx-int8", TokenRows("random tokens", rows))[0]
    assert made.manifest.quantization is not None
    schemes = made.manifest.quantization.schemes
    assert {scheme.block_size for path, scheme in schemes.items() if "layers" in path} == {128}
    assert 0.25 * bundle.bytes < made.bytes
    assert made.bytes * whole.parameter_count() / config.parameter_count() <= 160 * MEGABYTE
