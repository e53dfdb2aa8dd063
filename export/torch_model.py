"""The PyTorch model with the tensors of a graph: the inverse of `slm.export.graph.checkpoint_tensors`."""

from collections.abc import Mapping
from itertools import accumulate

import numpy as np
import torch

from slm.core.config import ModelConfig
from slm.core.nn import CausalLM
from slm.export.graph.builder import Array


def causal_lm(tensors: Mapping[str, Array], config: ModelConfig) -> CausalLM:
    """Returns the model with a float graph's tensors, in float32 and in evaluation mode.

    Args:
        tensors: The tensors, under the graph's names; read one at a time.
        config: The model's shape.
    """
    with torch.device("meta"):
        model = CausalLM(config)
    state: dict[str, torch.Tensor] = {}
    for name in tensors:
        array, path = tensors[name], name.removesuffix(".weight")
        if path.endswith("norm"):
            array = array - np.float32(1)  # the graph's norms include the 1 that Gemma adds
        state |= {f"{module}.weight": torch.tensor(array[rows]) for module, rows in module_rows(path, config).items()}
    model.load_state_dict(state, strict=not config.tie_word_embeddings, assign=True)
    model.tie_weights()
    return model.eval()


def module_rows(path: str, config: ModelConfig) -> dict[str, slice]:
    """Returns the modules whose weights a tensor of the graph joins, by path, with their rows in it.

    The graph joins q, k, v and gate, up along their outputs. Every other tensor belongs to one module.
    """
    parent, _, product = path.rpartition(".")
    queries, width = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    sizes: dict[str, int]
    match product:
        case "qkv_proj":
            sizes = {"q_proj": queries, "k_proj": width, "v_proj": width}
        case "gate_up_proj":
            sizes = {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size}
        case _:
            return {path: slice(None)}
    ends = list(accumulate(sizes.values()))
    return {f"{parent}.{name}": slice(end - size, end) for (name, size), end in zip(sizes.items(), ends, strict=True)}
