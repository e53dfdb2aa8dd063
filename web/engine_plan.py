"""Where the page's own engine finds the tensors of a bundle, for `site.json`.

The engine (`web/engine`, in WebAssembly) runs bundles of slm for the CPU with quantized weights, which it reads as they lie in
the bundle's data file. `static/engine.js` checks every place against the file and the model's shape before it uses it.
"""

import base64
from pathlib import PurePosixPath
from typing import Any

from slm.core.contract import head_candidates, product_sizes
from slm.core.errors import SlmError
from slm.core.graph_file import FileTensor, read_graph
from slm.core.manifest import Bundle, Manifest, Scheme

# The sizes that the engine's loops step through.
_MULTIPLE = 8
# The block sizes that it reads, and the largest block of 4-bit weights.
_BLOCK_SIZES = (16, 32, 64, 128, 256)


class NotSupported(Exception):
    """The engine cannot run a bundle. The message says why, and `hint` what makes it fast."""

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.hint = hint


def engine_plan(bundle: Bundle) -> dict[str, Any]:
    """Returns the model's shape, its products and the places of its tensors.

    A place is [offset, bytes] in the data file, or the tensor itself in base64 if the graph contains it.

    Raises:
        NotSupported: If onnxruntime-web has to run the bundle.
    """
    manifest, config = bundle.manifest, bundle.config
    products = _products(bundle)
    for name, size in (
        ("hidden_size", config.hidden_size),
        ("intermediate_size", config.intermediate_size),
        ("head_dim", config.head_dim),
    ):
        if size % _MULTIPLE:
            raise NotSupported(f"{name} {size} is no multiple of {_MULTIPLE}")
    try:
        bundle.check_graph()
    except SlmError:
        raise NotSupported("slm did not write its graph") from None
    tensors = read_graph(bundle.model_path).tensors
    files = {tensor.external[0] for tensor in tensors.values() if tensor.external}
    if len(files) != 1:
        raise NotSupported(f"its weights are in {len(files)} files")
    return {
        "data": (PurePosixPath(manifest.model).parent / files.pop()).as_posix(),
        "shape": {
            "vocab": config.vocab_size,
            "hidden": config.hidden_size,
            "heads": config.num_attention_heads,
            "kvHeads": config.num_key_value_heads,
            "headDim": config.head_dim,
            "inner": config.intermediate_size,
            "activation": config.hidden_activation,
            "context": manifest.context,
            "windows": [config.window(layer) for layer in range(config.num_hidden_layers)],
            "epsilon": config.rms_norm_eps,
            "scale": config.query_pre_attn_scalar**-0.5,
            "embeddingScale": config.hidden_size**0.5,
            "cache": manifest.cache[0].dtype,
            "tied": config.tie_word_embeddings,
            "candidates": head_candidates(config.vocab_size),
        },
        "products": products,
        "tensors": {name: _place(tensor) for name, tensor in tensors.items() if _is_read(name)},
    }


def _products(bundle: Bundle) -> dict[str, dict[str, Any]]:
    """Returns the storage of each product, by path."""
    manifest, config = bundle.manifest, bundle.config
    if manifest.device != "cpu":
        raise NotSupported(f"it was exported for {manifest.device}")
    if manifest.target != "fused":
        raise NotSupported("its graph is portable", "slm export --onnx --target fused")
    paths = [path for path, _, _ in product_sizes(config)]
    paths += ["model.embed_tokens", *([] if config.tie_word_embeddings else ["lm_head"])]
    schemes = manifest.quantization.schemes if manifest.quantization else {}
    return {path: _product(schemes.get(path), config.tie_word_embeddings) for path in paths}


def _product(scheme: Scheme | None, tied: bool) -> dict[str, Any]:
    if scheme is None:
        return {"bits": 0}
    if scheme.half:
        raise NotSupported("its products are float16")
    if not scheme.dynamic and scheme.block_size not in _BLOCK_SIZES:
        raise NotSupported(f"its blocks have {scheme.block_size} weights")
    if scheme.zero_points and scheme.bits != 4:
        raise NotSupported(f"its {scheme.bits}-bit weights have zero points")
    if scheme.frequent and not tied:
        raise NotSupported("its head is not its table, which has rows of frequent tokens")
    fields = ("bits", "block_size", "zero_points", "dynamic", "halves", "frequent")
    return {name: getattr(scheme, name) for name in fields}


def _is_read(name: str) -> bool:
    """Returns whether the engine reads a tensor: not the defaults of inputs and not what only adapters use."""
    return name.startswith(("model.", "lm_head.", "positions.")) and not name.endswith((".slot_columns", ".slot_rows"))


def _place(tensor: FileTensor) -> list[int] | str:
    if tensor.external is None:
        return base64.b64encode(tensor.raw).decode()
    _, offset, length = tensor.external
    size = tensor.bytes if length is None else length
    assert size is not None
    return [offset, size]


def slow_note(problem: NotSupported) -> str:
    """Returns a warning for a bundle that onnxruntime-web runs: in one line, with what to do."""
    hint = f" ({problem.hint})" if problem.hint else ""
    return f"the page runs this bundle with onnxruntime-web, which is slower: {problem}{hint}"


def large_note(manifest: Manifest) -> str:
    """Returns advice for a bundle whose weights take more bytes than they need, or nothing."""
    if manifest.quantization is not None:
        return ""
    return "float32 weights are four times as large and as slow as INT8 (slm quantize --int8)"
