"""How long a recipe would take on this machine, from one layer and the head."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from slm.core.nn import CausalLM
from slm.train.evaluate import cross_entropy
from slm.train.precision import capability, choose_precision
from slm.train.recipe import Recipe

# Enough for the products to run at their full speed and for the embedding's gradient, as large as the table however few the
# tokens, not to weigh too much; little enough to be timed within a few seconds.
_TOKENS = 1024
_GOES = 3


def estimate_seconds(recipe: Recipe) -> float:
    """Estimates the seconds of a run on the CPU: a model of one layer is timed, forward and backward, and a layer alone.

    An estimate: updates, evaluations and whatever else the machine does come on top.
    """
    config = recipe.model.config()
    model = CausalLM(config.model_copy(update={"num_hidden_layers": 1, "layer_types": config.layer_types[:1]}))
    precision = choose_precision(recipe.machine.precision, capability(torch.device("cpu")), config.hidden_size)
    ids = torch.arange(_TOKENS).remainder(config.vocab_size).view(-1, min(_TOKENS, recipe.batch.context))
    positions = model.model.positions(ids, None, past=0)[config.layer_types[0]]
    hidden = torch.randn(*ids.shape, config.hidden_size)

    def whole() -> Tensor:
        return cross_entropy(model(ids), ids)

    def layer() -> Tensor:
        out: Tensor = model.model.layers[0](hidden, positions, None)
        return out.float().square().mean()

    def seconds(loss: Callable[[], Tensor]) -> float:
        def once() -> float:
            began = time.perf_counter()
            with torch.autocast("cpu", dtype=precision.autocast, enabled=precision.autocast is not None):
                value = loss()
            value.backward()
            return time.perf_counter() - began

        return min(once() for _ in range(_GOES))

    total = seconds(whole) + (config.num_hidden_layers - 1) * seconds(layer)
    return total / _TOKENS * recipe.schedule.micro_steps * recipe.tokens_per_micro_step
