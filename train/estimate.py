"""How long a recipe would take on this machine, from one layer and the head."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from slm.core.nn import CausalLM
from slm.train.evaluate import cross_entropy
from slm.train.precision import capability, choose_precision
from slm.train.recipe import Recipe

# Enough for the products to run at their full speed, little enough to be timed within a second or two.
_TOKENS = 512


def estimate_seconds(recipe: Recipe) -> float:
    """Estimates the seconds of a run on the CPU: one layer and the head are timed, forward and backward.

    An estimate: updates, evaluations and whatever else the machine does come on top.
    """
    config = recipe.model.config()
    one_layer = config.model_copy(update={"num_hidden_layers": 1, "layer_types": config.layer_types[:1]})
    precision = choose_precision(recipe.machine.precision, capability(torch.device("cpu")), config.hidden_size)
    model = CausalLM(one_layer)
    model.init_weights(torch.Generator().manual_seed(0))
    ids = torch.arange(_TOKENS).remainder(config.vocab_size).view(-1, min(_TOKENS, recipe.batch.context))

    def run(function: Callable[[Tensor], Tensor]) -> float:
        def once() -> float:
            began = time.perf_counter()
            with torch.autocast("cpu", dtype=precision.autocast, enabled=precision.autocast is not None):
                output = function(ids)
            loss = (
                cross_entropy(output, ids) if output.shape[-1] == config.vocab_size else output.float().square().mean()
            )
            loss.backward()
            return time.perf_counter() - began

        return min(once(), once())

    layer, layer_and_head = run(model.model), run(model)
    per_token = (layer_and_head + (config.num_hidden_layers - 1) * layer) / ids.numel()
    return per_token * recipe.schedule.micro_steps * recipe.tokens_per_micro_step
