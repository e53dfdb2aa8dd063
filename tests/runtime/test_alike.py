"""`steps_alike`: logits are bit-identical for any number of tokens or rows per step."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slm.core.manifest import Bundle
from slm.quantize.make import quantize_bundle
from slm.quantize.settings import Gate, Settings
from slm.quantize.texts import TokenRows
from slm.runtime.decoder import OnnxDecoder

_CPU = Path("/proc/cpuinfo")
TOKENS = np.random.default_rng(1).integers(0, 320, 12).tolist()

pytestmark = pytest.mark.skipif(
    not _CPU.is_file() or "avx512_vnni" not in _CPU.read_text(),
    reason="kernels for AVX-512 VNNI add alike; others were not measured",
)


@pytest.mark.parametrize(
    ("settings", "alike"),
    [
        ({"block_size": 32, "cache": "int8"}, True),
        ({"dynamic": True, "cache": "int8"}, True),
        ({"precision": "int4", "prefer": "size", "head_bits": 8, "method": "nearest", "cache": "int8"}, True),
        ({"cache": "int8"}, False),  # attention's output in blocks of 128
        ({"block_size": 32}, False),  # caches in floats
        ({"dynamic": True}, False),
    ],
    ids=str,
)
def test_steps_alike(shared_bundle: Bundle, tmp_path: Path, settings: dict[str, Any], alike: bool) -> None:
    text = TokenRows("random", np.random.default_rng(0).integers(0, 320, (2, 64)))
    given = Settings(smooth=False, gate=Gate(None), **settings)
    bundle, _ = quantize_bundle(shared_bundle, tmp_path / "made", text, given, None, text)
    ones, several = OnnxDecoder(bundle, threads=1), OnnxDecoder(bundle, threads=1)
    assert ones.steps_alike == alike
    same = np.array_equal([ones.read([token]) for token in TOKENS], several.read_each(TOKENS))
    assert same == alike  # the steps are equal, and without the condition they are not
    heads = bundle.config.num_attention_heads
    assert OnnxDecoder(bundle, threads=heads).steps_alike == alike
    assert not OnnxDecoder(bundle, threads=heads + 1).steps_alike
