"""Choice of the type of caches by a short measurement: attention after a full window, with each type.

Attention with 8-bit caches reads a quarter of the bytes and converts them. Which is faster depends on the processor.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from slm.core.contract import CacheType, input_specs, output_specs
from slm.core.files import scratch_directory
from slm.core.manifest import Bundle
from slm.export.graph import FloatFormat, Fused, build_graph, save_graph
from slm.runtime.bench import Case, OnnxRows
from slm.runtime.decoder import OnnxDecoder

TYPES: tuple[CacheType, ...] = ("float32", "int8")
# The number of layers, and their sizes outside attention, small enough that their time does not count.
_LAYERS, _HIDDEN, _VOCABULARY = 4, 32, 32
# Cached positions, and timed steps of each type. The minimum, on one thread, is robust against other load.
_POSITIONS, _STEPS = 512, 40
# 8-bit caches must be this much faster, because they round.
_GAIN = 0.95


def attention_times(source: Bundle, scratch: Path) -> dict[CacheType, float]:
    """Returns the time of a step with a few attention layers of a model in seconds, by type of cache.

    Args:
        source: A fused bundle for the CPU.
        scratch: The parent of a temporary directory.
    """
    sizes = {
        "num_hidden_layers": _LAYERS,
        "layer_types": source.config.layer_types[:1] * _LAYERS,
        "hidden_size": _HIDDEN,
    }
    sizes |= {"intermediate_size": _HIDDEN, "vocab_size": _VOCABULARY}
    config = source.config.model_copy(update=sizes)
    context = source.manifest.context
    case = Case(max(1, min(_POSITIONS, context - _STEPS)))
    steps = min(_STEPS, context - case.prompt)

    def rows(directory: Path, cache: CacheType) -> OnnxRows:
        path = directory / f"{cache}.onnx"
        target = Fused(FloatFormat(), "cpu", cache)
        graph = build_graph(config, target, {}, context)
        _fill(graph)
        save_graph(graph, path)
        caches = target.caches(config)
        changed: dict[str, Any] = {"model": path.name, "cache": caches, "inputs": input_specs(caches)}
        changed |= {"outputs": output_specs(_VOCABULARY, caches), "adapter_slots": False}
        manifest = source.manifest.model_copy(update=changed)
        return OnnxRows(OnnxDecoder(Bundle(directory, manifest, config), threads=1), case, steps)

    with scratch_directory(scratch, "caches") as directory:
        return _times({each: rows(directory, each) for each in TYPES}, steps)


def _times(rows: Mapping[CacheType, OnnxRows], steps: int) -> dict[CacheType, float]:
    """Returns the shortest time of a step in seconds; the rows take turns.

    Nothing refers to the rows afterwards, so that their files are no longer mapped and Windows can remove them.
    """
    times: dict[CacheType, list[float]] = {each: [] for each in rows}
    ids = np.zeros((1, 1), np.int64)
    for _ in range(steps):
        for each, row in rows.items():
            started = time.perf_counter()
            row.step(ids)
            times[each].append(time.perf_counter() - started)
    return {each: min(found) for each, found in times.items()}


def faster(times: Mapping[CacheType, float]) -> CacheType:
    """Returns the type of cache to use: int8 if it is clearly faster, else float32."""
    return "int8" if times["int8"] < _GAIN * times["float32"] else "float32"


def _fill(graph: ir.Model) -> None:
    """Gives every weight a value. The values do not affect the time."""
    for name, value in graph.graph.initializers.items():
        if isinstance(value.const_value, ir.LazyTensor):
            assert value.shape is not None and value.dtype is not None
            array = np.full(tuple(value.shape), 0.01, value.dtype.numpy())
            value.const_value = ir.tensor(array, dtype=value.dtype, name=name)
