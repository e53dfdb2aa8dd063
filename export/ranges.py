"""Measurement of a model's activations, and the choice of the products that run in float16.

The largest float16 is 65,504. Activations of Gemma exceed it, and overflow to infinity on a GPU, possibly without a visible
error. The model therefore reads a text in float32 first. Products whose activations come near the limit stay in float32.
"""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from slm.core.errors import SlmError
from slm.core.manifest import Ranges
from slm.core.nn import CausalLM
from slm.core.sample import validation_path
from slm.core.text.tokens import TextSource
from slm.core.tokenizer import Tokenizer

LARGEST_FLOAT16 = 65_504.0
# Other texts can have larger activations than the measured one. A factor of 8 is three of float16's sixteen powers of two.
MARGIN = 8.0
TOKENS = 2048
_ROW = 512

# The graph joins several of the model's products into one.
_PRODUCTS = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}


def scan_ranges(model: CausalLM, tokenizer: Tokenizer, text: Path | None = None) -> Ranges:
    """Measures activations on a text and chooses the products that stay in float32.

    Args:
        model: The model, in float32.
        tokenizer: The model's tokenizer.
        text: A text file. The default is the stories that ship with slm.

    Returns:
        The largest absolute input or output of each product, and the products that stay in float32.

    Raises:
        SlmError: If the text is too short, or the attention values are too large for float16 caches.
    """
    file = text or validation_path()
    ids = [id for document in TextSource(file).first_tokens(tokenizer, TOKENS) for id in document][:TOKENS]
    length = min(len(ids), _ROW, model.config.max_position_embeddings)
    if length < 2:
        raise SlmError(f"{file} has too little text to measure activations", "use at least a few sentences")
    rows = torch.tensor(ids[: len(ids) // length * length]).reshape(-1, length)
    largest = _largest(model, rows)
    values = max(value for path, value in largest.items() if path.endswith("v_proj"))
    if not values * MARGIN < LARGEST_FLOAT16:
        raise SlmError(
            f"attention values reach {values:,.0f}, too close to the limit of float16 caches",
            "use --device cpu, which keeps float32",
        )
    products: dict[str, float] = {}
    for path, value in largest.items():
        parent, _, name = path.rpartition(".")
        product = ".".join(filter(None, (parent, _PRODUCTS.get(name, name))))
        products[product] = max(value, products.get(product, 0.0))
    return Ranges(
        text="the stories that ship with slm" if text is None else str(text),
        tokens=rows.numel(),
        margin=MARGIN,
        largest={path: round(value, 3) for path, value in products.items()},
        float32=tuple(path for path, value in products.items() if not value * MARGIN < LARGEST_FLOAT16),
    )


def _largest(model: CausalLM, rows: Tensor) -> dict[str, float]:
    """Returns the largest absolute input or output of every linear layer, by path."""
    largest: dict[str, float] = defaultdict(float)

    def watch(path: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            reached = max(float(tensor.abs().max()) for tensor in (*inputs, output))
            largest[path] = max(largest[path], reached)
            if path.endswith("down_proj"):  # its input is computed in the type of the product before it
                before = path.replace("down_proj", "gate_proj")
                largest[before] = max(largest[before], float(inputs[0].abs().max()))

        return hook

    hooks = [
        module.register_forward_hook(watch(path))
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        with torch.inference_mode():
            for row in rows:
                model(row[None])
    finally:
        for hook in hooks:
            hook.remove()
    if "lm_head" in largest and model.config.tie_word_embeddings:  # in the graph, the embedding computes a tied head
        largest["model.embed_tokens"] = largest.pop("lm_head")
    return dict(largest)
