"""The properties of a bundle that determine its graph in addition to the configuration."""

from collections.abc import Callable
from dataclasses import dataclass

from slm.core.contract import Device, Target
from slm.core.graph_plan.builder import FLOAT, FLOAT16


@dataclass(frozen=True)
class Stored:
    """The storage of a product's weight, with the fields of the manifest's `Scheme`. `bits` is 0 for floats."""

    bits: int = 0
    block_size: int = 1
    zero_points: bool = False
    dynamic: bool = False
    half: bool = False
    halves: bool = False
    frequent: int = 0


@dataclass(frozen=True)
class Kind:
    """The properties that determine a graph in addition to the configuration.

    Attributes:
        target: The operators: onnxruntime's own ("fused") or standard ("portable").
        device: The device that the bundle is for.
        context: The longest sequence in tokens.
        accuracy_level: The attribute of MatMulNBits.
        stored: Returns the storage of a product's weight, by path.
        slots: Whether the graph has inputs for adapters.
        quantized_cache: Whether keys and values are cached as INT8.
    """

    target: Target
    device: Device
    context: int
    accuracy_level: int
    stored: Callable[[str], Stored]
    slots: bool
    quantized_cache: bool

    def dtype(self, path: str) -> int:
        """Returns the type number of a product's input and output."""
        return FLOAT16 if self.stored(path).half else FLOAT

    @property
    def attention_dtype(self) -> int:
        """The type number of the attention operator's input and output."""
        return FLOAT if self.device == "cpu" else FLOAT16
