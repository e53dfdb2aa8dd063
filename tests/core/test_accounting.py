"""Each figure of the accounting against what it is a figure of: tensors, buffers, and PyTorch's own counter.

And the figures of docs/accounting.md against the accounting.
"""

import re
import subprocess
import sys
from bisect import bisect_left
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from slm.core.accounting import (
    HALF_BYTES,
    Flops,
    Parameters,
    bundle_cache_bytes,
    cache_bytes,
    decode_flops,
    int8_bytes,
    parameters,
    prefill_flops,
    saved_percent,
    weights_bytes,
)
from slm.core.config import FULL, ModelConfig
from slm.core.contract import CacheType, Device, cache_layers
from slm.core.manifest import Bundle
from slm.core.nn import CausalLM, KVCache
from slm.core.presets import PRESETS, preset
from slm.export.graph import graph_tensors
from slm.quantize.linears import linears_of
from slm.quantize.plan import INT8, QuantizationPlan, schemes_of
from slm.quantize.rounding import rounded_tensors
from slm.runtime.cache import KVBuffers
from slm.runtime.decoder import OnnxDecoder

WINDOW = 16
# Before the window is full, the last position that sees everything, the first that does not, and well past it.
POSITIONS = (0, 1, WINDOW - 2, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW)

MakeModel = Callable[..., CausalLM]


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def shape(request: pytest.FixtureRequest, config: ModelConfig) -> ModelConfig:
    return config.model_copy(update={"tie_word_embeddings": request.param})


def of_vocabulary(size: int, tied: bool = True) -> ModelConfig:
    """The 270M shape with a vocabulary."""
    return preset("gemma3-270m").model_copy(update={"vocab_size": size, "tie_word_embeddings": tied})


def part_of(name: str) -> str:
    for piece, part in (
        ("norm", "norms"),
        ("self_attn", "attention"),
        ("mlp", "mlp"),
        ("embed", "embedding"),
        ("lm_head", "head"),
    ):
        if piece in name:
            return part
    raise AssertionError(name)


def test_parameters_are_those_of_the_state(shape: ModelConfig) -> None:
    with torch.device("meta"):
        model = CausalLM(shape)
    counted = dict.fromkeys(("embedding", "attention", "mlp", "norms", "head"), 0)
    for name, parameter in model.named_parameters():
        counted[part_of(name)] += parameter.numel()
    parts = parameters(shape)
    assert parts == Parameters(**counted)
    assert parts.total == shape.parameter_count() == sum(p.numel() for p in model.parameters())
    assert (parts.head == 0) == shape.tie_word_embeddings


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_of_the_presets(name: str) -> None:
    assert parameters(preset(name)).total == preset(name).parameter_count()


def test_parameters_of_the_270m_shape() -> None:
    assert parameters(of_vocabulary(50_257)).total == 132_490_496
    assert parameters(of_vocabulary(50_257, tied=False)).total == 164_654_976
    assert parameters(of_vocabulary(262_144)).total == 268_098_176


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_the_weights(shape: ModelConfig, make_model: MakeModel, dtype: torch.dtype) -> None:
    model = make_model(shape).to(dtype)
    assert weights_bytes(shape, dtype.itemsize) == sum(p.numel() * p.element_size() for p in model.parameters())


def test_int8_bytes_are_those_of_the_quantized_tensors(config: ModelConfig, shared_bundle: Bundle) -> None:
    plan = QuantizationPlan(schemes_of(linears_of(config), INT8["quality"]), "nearest")  # blocks of 32 everywhere
    tensors = rounded_tensors(graph_tensors(shared_bundle.model_path), plan, {})
    weights = [tensors[name] for name in tensors if ".weight" in name]  # not the rotation tables
    assert int8_bytes(config, 32) == sum(array.nbytes for array in weights)
    assert int8_bytes(config, 128) is None  # the hidden size of 64 has no such block


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("context", [1, WINDOW, WINDOW + 1, 200])
def test_cache_bytes_are_those_of_the_buffers(config: ModelConfig, context: int, batch: int) -> None:
    buffers = KVBuffers(cache_layers(config), context, batch)
    assert cache_bytes(config, context, batch) == buffers.bytes
    everything = [layer.model_copy(update={"window": None}) for layer in cache_layers(config)]
    assert cache_bytes(config, context, batch, kind="full") == KVBuffers(everything, context, batch).bytes


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("device", ["cpu", "cuda", "webgpu"])
def test_cache_bytes_of_a_fused_bundle(config: ModelConfig, device: Device, dtype: CacheType) -> None:
    layers = cache_layers(config, device, dtype)
    assert bundle_cache_bytes(layers, "fused", 200, 3) == KVBuffers(layers, 200, 3).bytes


def test_cache_bytes_of_a_portable_bundle(portable_bundle: Bundle) -> None:
    decoder = OnnxDecoder(portable_bundle)
    for length in (1, WINDOW - 1, WINDOW, 3 * WINDOW):
        decoder.reset()
        decoder.read([1] * length)
        layers = decoder.bundle.manifest.cache
        assert bundle_cache_bytes(layers, "portable", length) == decoder.buffers.bytes


def test_cache_bytes_once_the_buffers_have_grown() -> None:
    config = preset("gemma3-270m")
    buffers = KVBuffers(cache_layers(config), 2048)
    assert buffers.bytes == cache_bytes(config, 256)
    buffers.reserve(1024)
    assert buffers.bytes == cache_bytes(config, 1024)
    assert cache_bytes(config, 1024, itemsize=HALF_BYTES, kind="windowed_without_slack") == 11_010_048
    assert cache_bytes(config, 1, itemsize=HALF_BYTES, kind="full") == 18_432


@pytest.mark.parametrize("position", POSITIONS)
@torch.no_grad()
def test_the_windows_need_what_pytorch_looks_at(config: ModelConfig, make_model: MakeModel, position: int) -> None:
    model, cache = make_model(config), KVCache(config)
    if position:
        model(torch.zeros(2, position, dtype=torch.int64), cache=cache)
    looked_at = 0
    for layer in cache.layers:
        key, value = layer.update(torch.zeros(2, 2, 1, 32), torch.zeros(2, 2, 1, 32))
        looked_at += key.nbytes + value.nbytes
    assert looked_at == cache_bytes(config, position + 1, batch=2, kind="windowed_without_slack")


def measured(model: CausalLM, cache: KVCache, tokens: int = 1, keep: int = 1) -> dict[str, int]:
    """What PyTorch counts for the next tokens: `mm` is the matrix products, `bmm` scores and values.

    The plain attention, whose products are counted one by one; of the fused ones on a CPU the counter knows nothing.
    """
    ids = torch.zeros(1, tokens, dtype=torch.int64, device=model.lm_head.weight.device)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids, cache=cache, num_logits_to_keep=keep)
    counts = {str(name).removeprefix("aten."): count for name, count in counter.get_flop_counts()["Global"].items()}
    assert counts.keys() == {"mm", "bmm"}
    return counts


def after(model: CausalLM, tokens: int) -> KVCache:
    cache = KVCache(model.config)
    if tokens:
        with torch.no_grad():
            model(torch.zeros(1, tokens, dtype=torch.int64, device=model.lm_head.weight.device), cache=cache)
    return cache


@pytest.mark.parametrize("position", POSITIONS)
def test_decode_is_what_pytorch_counts(shape: ModelConfig, make_model: MakeModel, position: int) -> None:
    model = make_model(shape)
    counts, flops = measured(model, after(model, position)), decode_flops(shape, position)
    assert counts["mm"] == flops.body + flops.head
    assert counts["bmm"] == flops.attention
    assert sum(counts.values()) == flops.total
    assert decode_flops(shape, position + 1).attention > flops.attention  # the global layer always sees one more


@pytest.mark.parametrize("position", POSITIONS)
def test_without_windows_is_a_model_without_sliding_layers(
    config: ModelConfig, make_model: MakeModel, position: int
) -> None:
    model = make_model(config.model_copy(update={"layer_types": (FULL,) * config.num_hidden_layers}))
    flops = decode_flops(config, position, windows=False)
    assert sum(measured(model, after(model, position)).values()) == flops.total
    assert (flops == decode_flops(config, position)) == (position < WINDOW)


@pytest.mark.parametrize("length", [1, WINDOW, WINDOW + 1, 2 * WINDOW + 5])
def test_prefill_is_the_sum_of_its_steps(config: ModelConfig, make_model: MakeModel, length: int) -> None:
    model, cache = make_model(config), KVCache(config)
    steps = [measured(model, cache) for _ in range(length)]
    every = prefill_flops(config, length, head_positions=length)
    assert sum(step["mm"] + step["bmm"] for step in steps) == every.total
    once = prefill_flops(config, length)
    assert (once.body, once.attention, once.head * length) == (every.body, every.attention, every.head)
    assert once.per_token(length) == Flops(once.body / length, once.attention / length, once.head / length)


@pytest.mark.parametrize("length", [WINDOW, 2 * WINDOW + 5])
def test_a_masked_prefill_computes_the_same_products_and_more_scores(
    config: ModelConfig, make_model: MakeModel, length: int
) -> None:
    counts, flops = measured(make_model(config), KVCache(config), length), prefill_flops(config, length)
    assert counts["mm"] == flops.body + flops.head
    # Every score of the rectangle, whatever its mask says.
    dense = length * decode_flops(config, length - 1, windows=False).attention
    assert counts["bmm"] == dense > flops.attention


@pytest.mark.parametrize("position", [511, 512])  # the edge of the window
def test_decode_at_the_270m_shape(position: int) -> None:
    config = of_vocabulary(262_144)
    with torch.device("meta"):
        model = CausalLM(config)
    assert sum(measured(model, after(model, position)).values()) == decode_flops(config, position).total


def test_it_needs_no_torch() -> None:
    program = "import sys, slm.core.accounting; sys.exit('torch' in sys.modules or 'onnx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


PAGE = (Path(__file__).parent.parent.parent / "docs" / "accounting.md").read_text(encoding="utf-8")
SMALL, LARGE = of_vocabulary(50_257), of_vocabulary(262_144)
LENGTHS = range(1, SMALL.max_position_embeddings + 1)


def mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def gflop(count: float) -> str:
    return f"{count / 1e9:.3f}"


def saved(less: float, more: float) -> str:
    return f"{saved_percent(less, more):.1f} %"


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |\n"


def test_the_pages_parameters_and_weights() -> None:
    def both(name: str, of: Callable[[ModelConfig], str]) -> None:
        assert row(name, of(SMALL), of(LARGE)) in PAGE

    def untied(config: ModelConfig) -> ModelConfig:
        return config.model_copy(update={"tie_word_embeddings": False})

    def int8(config: ModelConfig) -> str:
        size = int8_bytes(config)
        assert size is not None
        return mb(size)

    both("embedding", lambda c: f"{parameters(c).embedding:,}")
    both("blocks", lambda c: f"{parameters(c).total - parameters(c).embedding:,}")
    both("parameters, tied head", lambda c: f"{parameters(c).total:,}")
    both("parameters, head of its own", lambda c: f"{parameters(untied(c)).total:,}")
    both("weights in float32", lambda c: mb(weights_bytes(c, 4)))
    both("weights in 16 bit", lambda c: mb(weights_bytes(c, 2)))
    both("weights in INT8, blocks of 128", int8)
    both("matrix products of the blocks", lambda c: f"{gflop(decode_flops(c, 0).body)} GFLOP a token")
    both("head", lambda c: f"{gflop(decode_flops(c, 0).head)} GFLOP a token")
    both(
        "both, without scores and values",
        lambda c: f"{gflop(decode_flops(c, 0).body + decode_flops(c, 0).head)} GFLOP a token",
    )
    more = parameters(preset("gemma3-270m")).total - parameters(SMALL).total
    sentences = " ".join(PAGE.split())
    assert f"{more:,} parameters more" in sentences
    share = 100 * parameters(LARGE).embedding / parameters(LARGE).total
    assert f"of which {share:.0f} % are the embedding" in sentences


@pytest.mark.parametrize("length", [1_024, 4_096, 8_192, 32_768])
def test_the_pages_cache(length: int) -> None:
    full = [cache_bytes(SMALL, length, itemsize=size, kind="full") for size in (4, 2)]
    windowed = cache_bytes(SMALL, length), cache_bytes(SMALL, length, itemsize=2, kind="windowed_without_slack")
    assert row(f"{length:,}", *map(mb, (*full, *windowed))) in PAGE


@pytest.mark.parametrize("length", [512, 1_024, 4_096, 8_192, 16_384, 32_768])
def test_the_pages_operations(length: int) -> None:
    def compared(less: Flops, more: Flops) -> tuple[str, str, str]:
        return gflop(more.total), gflop(less.total), saved(less.total, more.total)

    cells: list[str] = []
    for config in (SMALL, LARGE):
        less, more = (decode_flops(config, length - 1, windows=windows) for windows in (True, False))
        cells += compared(less, more)
    assert row(f"{length:,}", *cells, saved(less.attention, more.attention)) in PAGE
    if length > 512:
        less, more = (prefill_flops(SMALL, length, windows=windows).per_token(length) for windows in (True, False))
        assert row(f"{length:,}", *compared(less, more), saved(less.attention, more.attention)) in PAGE


def first(holds: Callable[[int], bool]) -> int:
    """Returns the first length from which on something holds."""
    return LENGTHS[bisect_left(LENGTHS, True, key=holds)]


def test_where_the_quoted_figures_hold() -> None:
    lengths = [first(lambda n, i=size: cache_bytes(SMALL, n, itemsize=i, kind="full") >= 120e6) for size in (2, 4)]  # type: ignore[misc]
    assert row("without windows", *(f"{length:,} tokens" for length in lengths)) in PAGE
    longest = LENGTHS[-1]
    assert cache_bytes(SMALL, longest, itemsize=2) < 120e6 and mb(cache_bytes(SMALL, longest, itemsize=2)) in PAGE
    windowed = first(lambda n: cache_bytes(SMALL, n) >= 120e6)
    assert row("with windows, as slm allocates", "never within 32,768", f"{windowed:,} tokens") in PAGE

    def both(name: str, of: Callable[[ModelConfig], str]) -> None:
        assert row(name, of(SMALL), of(LARGE)) in PAGE

    def everywhere(config: ModelConfig) -> float:
        return prefill_flops(config, longest, windows=False, head_positions=longest).total / longest

    assert all(max(decode_flops(config, longest - 1).total, everywhere(config)) < 2.1e9 for config in (SMALL, LARGE))
    both("decoding, before any score", lambda c: gflop(decode_flops(c, 0).body + decode_flops(c, 0).head))
    both("decoding, 128 tokens of context", lambda c: gflop(decode_flops(c, 127).total))
    both("decoding, 32,768 tokens, with windows", lambda c: gflop(decode_flops(c, longest - 1).total))
    both(
        "decoding without windows passes 2.1 at",
        lambda c: f"{first(lambda n: decode_flops(c, n - 1, windows=False).total >= 2.1e9):,} tokens",
    )
    both("prefill of 32,768 without windows, a head at every position", lambda c: gflop(everywhere(c)))

    def decoding(length: int) -> float:
        less, more = (decode_flops(SMALL, length - 1, windows=windows) for windows in (True, False))
        return saved_percent(less.attention, more.attention)

    def prefilling(length: int) -> float:
        less, more = (prefill_flops(SMALL, length, windows=windows) for windows in (True, False))
        return saved_percent(less.attention, more.attention)

    for name, what, length in (("decoding", decoding, 8_192), ("prefill", prefilling, 16_384)):
        low, high = (first(lambda n, f=what, p=percent: f(n) >= p) for percent in (77.5, 78.5))  # type: ignore[misc]
        assert row(name, f"{low:,} to {high - 1:,}", f"{what(length):.1f} % at {length:,}") in PAGE

    lengths = [512, 8_192, longest]
    for config, name in ((SMALL, "operations, GPT-2's 50,257"), (LARGE, "operations, Gemma's 262,144")):
        found = [[decode_flops(config, n - 1, windows=w).total for w in (True, False)] for n in lengths]
        assert saved_percent(*found[-1]) < 77.5 and row(name, *(saved(*each) for each in found)) in PAGE
    caches = [(cache_bytes(SMALL, n), cache_bytes(SMALL, n, kind="full")) for n in lengths]
    assert row("bytes of the cache", *(saved(*each) for each in caches)) in PAGE


def test_the_pages_program() -> None:
    program = re.search(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert program is not None
    with redirect_stdout(StringIO()) as said:
        exec(program[1], {})
    assert said.getvalue().split() == re.findall(r"# (\d+)$", program[1], flags=re.MULTILINE)
