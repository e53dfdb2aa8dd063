"""The PyTorch model with the tensors of a graph: the inverse of `slm.export.graph.checkpoint_tensors`."""

from collections.abc import Mapping

import numpy as np
import torch

from slm.core.config import ModelConfig
from slm.core.contract import module_rows
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
