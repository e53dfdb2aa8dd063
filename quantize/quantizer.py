"""A quantization in progress: its source, settings and texts, what was measured, and trials of plans.

Dimensions: K input channels.
"""

from collections import ChainMap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from slm.core.files import scratch_directory
from slm.core.manifest import Bundle
from slm.core.progress import Progress
from slm.export.graph import LazyTensors, graph_tensors, released
from slm.export.graph.builder import Array
from slm.quantize.instrumented import InstrumentedModel
from slm.quantize.linears import Linear, linears_of
from slm.quantize.plain import plain_bundle
from slm.quantize.plan import QuantizationPlan
from slm.quantize.quality import measure
from slm.quantize.rounding import placeholders, rounded_tensors
from slm.quantize.settings import Settings
from slm.quantize.statistics import root_mean_squares
from slm.quantize.texts import TokenRows
from slm.quantize.write import graph_bytes, write_graph
from slm.runtime.decoder import OnnxDecoder


class Reference:
    """The decoder that predictions are compared with. It opens on use, and again if it is used after `close`."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._decoder: OnnxDecoder | None = None

    def __call__(self) -> OnnxDecoder:
        """Returns the decoder."""
        self._decoder = self._decoder or OnnxDecoder(self._bundle)
        return self._decoder

    def close(self) -> None:
        """Closes the decoder to free its memory."""
        self._decoder = None


@dataclass(frozen=True)
class Quantizer:
    """Holds what every step of a quantization needs, and tries plans.

    Attributes:
        source: The bundle to quantize.
        float32: A float32 bundle for the CPU with the source's weights; the source itself if it is one.
        settings: The requested settings.
        calibration: The text on which settings are chosen.
        evaluation: The held-out text on which the result is measured.
        progress: Receives the progress of each step.
        scratch: The parent of temporary bundles.
        reference: Runs the source. Steps that need its memory close it.
    """

    source: Bundle
    float32: Bundle
    settings: Settings
    calibration: TokenRows
    evaluation: TokenRows
    progress: Progress
    scratch: Path
    reference: Reference

    @cached_property
    def linears(self) -> tuple[Linear, ...]:
        """The weights to quantize."""
        return linears_of(self.source.config)

    @cached_property
    def layers(self) -> tuple[Linear, ...]:
        """The weights of the layers' products."""
        return tuple(linear for linear in self.linears if linear.role == "layer")

    @cached_property
    def weights(self) -> LazyTensors:
        """The tensors of the float32 graph, by name."""
        return graph_tensors(self.float32.model_path)

    @cached_property
    def activations(self) -> Mapping[str, Array]:
        """Root mean square of each input channel (K,) of the layers' products, by path.

        It is measured on the calibration text at the first use. It is empty if no setting needs it.
        """
        if self.settings.smooth is False and self.settings.rounding_method == "nearest":
            return {}
        return root_mean_squares(
            InstrumentedModel(self.float32, self.layers), self.layers, self.calibration, self.progress
        )

    def smoothed_activations(self, plan: QuantizationPlan) -> dict[str, Array]:
        """Returns the root mean square of each input channel (K,) with the plan's smoothing, by path."""
        return {path: plan.smoothing.activations(f"{path}.weight", rms) for path, rms in self.activations.items()}

    def importance(self, plan: QuantizationPlan) -> dict[str, Array]:
        """Returns the weight of each input channel's error (K,), the mean square of its activations, by path."""
        return {path: np.square(rms) for path, rms in self.smoothed_activations(plan).items()}

    def smoothed_weights(self, plan: QuantizationPlan) -> LazyTensors:
        """Returns the tensors of the float32 graph with the plan's smoothing, by name."""
        return plan.smoothing.apply(self.weights)

    def tensors(self, plan: QuantizationPlan) -> Mapping[str, Array]:
        """Returns the tensors of the quantized graph, by name. Weights are rounded when they are read."""
        rounded = rounded_tensors(self.smoothed_weights(plan), plan, self.importance(plan))
        return ChainMap(dict(plan.cache_steps), dict(plan.norms), rounded)  # type: ignore[arg-type]  # only read

    @contextmanager
    def trial(self, plan: QuantizationPlan) -> Iterator[Bundle]:
        """Yields a temporary bundle of a plan, which can run."""
        with scratch_directory(self.scratch, "trial") as directory:
            yield write_graph(self.source, plan, self.tensors(plan), directory)

    def kl_nats(self, plan: QuantizationPlan, text: TokenRows) -> float:
        """Returns the mean KL divergence of a plan's predictions from the source's on a text, in nats."""
        with self.trial(plan) as bundle:
            return measure(self.reference(), OnnxDecoder(bundle), text, self.progress).kl_nats

    def bytes(self, plan: QuantizationPlan) -> int:
        """Returns the size of a plan's graph and weights in bytes, padding included, without rounding the weights."""
        rounded = placeholders(self.linears, plan.schemes)
        with self.trial(replace(plan, rounded=rounded)) as bundle:
            return graph_bytes(bundle)


@contextmanager
def quantizer_of(
    source: Bundle,
    settings: Settings,
    calibration: TokenRows,
    evaluation: TokenRows,
    progress: Progress,
    scratch: Path,
) -> Iterator[Quantizer]:
    """Yields the quantizer of a bundle, with a temporary float32 bundle if the source is not one; see `Quantizer`."""
    with released(), plain_bundle(source, scratch) as float32:
        yield Quantizer(source, float32, settings, calibration, evaluation, progress, scratch, Reference(source))
