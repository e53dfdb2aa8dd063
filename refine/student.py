"""The teacher, which is the float model, and the student: the same model with the products of a plan.

Dimensions: B batch, T positions, D hidden, V vocabulary, K input channels.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from slm.core.contract import module_rows
from slm.core.grid import as_stored
from slm.core.nn import CausalLM
from slm.core.nn.fake_quant import round_activations
from slm.core.nn.model import TextModel
from slm.export.graph import float_tensors
from slm.export.graph.blocks import SCALE
from slm.export.graph.builder import Array
from slm.export.torch_model import causal_lm
from slm.quantize.linears import EMBEDDING, HEAD
from slm.quantize.plan import Arrays, QuantizationPlan
from slm.quantize.quantizer import Quantizer
from slm.quantize.rounding import restored, rounded_weight
from slm.refine.products import LearnedProduct

# Width from which bfloat16 products are faster on a CPU that multiplies them.
_BF16_HIDDEN_SIZE = 256
# The largest relative change of a norm's weight. `slm verify` recovers smoothing factors from norms: neighbouring factors
# differ by 9 %, so that a change below half of that does not alter which factor is nearest.
NORM_RANGE = 0.04


def products_dtype(hidden_size: int) -> torch.dtype:
    """Returns the type of the student's products: bfloat16 where the CPU multiplies it, otherwise float32."""
    able = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if able and hidden_size >= _BF16_HIDDEN_SIZE else torch.float32


def teacher(quantizer: Quantizer) -> CausalLM:
    """Returns the float model."""
    return causal_lm(float_tensors(quantizer.float32.model_path, {}), quantizer.source.config).requires_grad_(False)


class Student:
    """The quantized model in PyTorch, with integers that are fixed, and with scales and norms that can be trained.

    Attributes:
        model: The decoder without its head.
        head: The head's dequantized weight (V, D).
    """

    def __init__(self, quantizer: Quantizer, plan: QuantizationPlan) -> None:
        """Builds the model of a plan. Tables and products on a grid are fixed."""
        self._config, self._plan = quantizer.source.config, plan
        tensors, importance = quantizer.smoothed_weights(plan), quantizer.importance(plan)
        # Products on CUDA do not round activations.
        self._rounds = plan.device == "cpu"

        def arrays(path: str) -> Arrays:
            return rounded_weight(path, tensors, plan, importance)

        tables = {
            path: torch.from_numpy(restored(arrays(path), plan.schemes[path]))
            for path in (EMBEDDING, HEAD)
            if path in plan.schemes
        }
        self.head = tables.get(HEAD, tables[EMBEDDING])
        self._head_scheme = plan.schemes[HEAD if HEAD in tables else EMBEDDING]
        with torch.device("meta"):
            self.model: TextModel = CausalLM(self._config).model
        self.model.embed_tokens.weight = nn.Parameter(tables[EMBEDDING], requires_grad=False)
        self._norms: dict[str, tuple[nn.Parameter, Tensor]] = {}
        for name in tensors:
            if name.endswith("norm.weight"):
                self._put_norm(name, tensors[name])
        self._rounded: dict[str, Arrays] = {}
        self._learned: dict[str, list[LearnedProduct]] = {}
        dtype = products_dtype(self._config.hidden_size)
        for linear in quantizer.layers:
            path, scheme = linear.path, plan.schemes[linear.path]
            self._rounded[path] = arrays(path)
            for module, rows in module_rows(path, self._config).items():
                part = {name: array[rows] for name, array in self._rounded[path].items()}
                product = LearnedProduct(part, scheme, self._rounds, dtype)
                parent, _, name = module.removeprefix("model.").rpartition(".")
                setattr(self.model.get_submodule(parent), name, product)
                if path in plan.exact:
                    product.requires_grad_(False)
                else:
                    self._learned.setdefault(path, []).append(product)

    def _put_norm(self, name: str, weight: Array) -> None:
        # Norms of queries and keys are float16 on CUDA.
        learned = self._plan.device == "cpu" or not name.endswith(("q_norm.weight", "k_norm.weight"))
        offset = torch.tensor(weight) - 1
        parameter = nn.Parameter(offset.clone(), requires_grad=learned)
        self.model.get_submodule(name.removeprefix("model.").removesuffix(".weight")).weight = parameter
        if learned:
            self._norms[name] = parameter, offset

    @property
    def products(self) -> list[LearnedProduct]:
        """The products that can be trained."""
        return [product for parts in self._learned.values() for product in parts]

    @property
    def norms(self) -> list[nn.Parameter]:
        """The norms' weights, as offsets from 1."""
        return [parameter for parameter, _ in self._norms.values()]

    def hidden(self, rows: Tensor) -> Tensor:
        """Maps tokens (B, T) to the inputs of the head (B, T, D), as the kernel rounds them."""
        found: Tensor = self.model(rows)
        return round_activations(found, self._head_scheme) if self._rounds else found

    @torch.no_grad()
    def bound(self) -> None:
        """Moves norms outside of their ranges back to the ends."""
        for parameter, before in self._norms.values():
            allowed = NORM_RANGE * (1 + before).abs()
            parameter.clamp_(before - allowed, before + allowed)

    def plan(self) -> QuantizationPlan:
        """Returns the plan with the trained scales and norms."""
        rounded: dict[str, Arrays] = {}
        for path, parts in self._learned.items():
            scale = as_stored(np.concatenate([part.scales() for part in parts]), self._plan.schemes[path])
            rounded[path] = {**self._rounded[path], SCALE: scale}
        norms = {name: (1 + parameter.detach()).numpy() for name, (parameter, _) in self._norms.items()}
        return replace(self._plan, rounded={**self._plan.rounded, **rounded}, norms=norms)
