"""The grid of quantization-aware training, which `slm train` and `slm finetune` record and `slm quantize` uses again."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from slm.core.checkpoint import tensor_shapes
from slm.core.config import ModelConfig, first_mistake
from slm.core.errors import SlmError
from slm.core.grid import BLOCK_SIZES, fitting_block
from slm.core.manifest import Scheme

QatPrecision = Literal["int8", "int4"]
PRECISIONS: tuple[QatPrecision, ...] = get_args(QatPrecision)
# The name of the record in `slm.json`, which export copies to a bundle's manifest.
RECORD = "qat"


class QatGrid(BaseModel):
    """The grid on which a model was trained.

    Products round their inputs to 8 bits, in blocks of the same size as their weights' blocks.

    Attributes:
        precision: The precision for `slm quantize`.
        layers: The scheme of the layers' products.
        vocabulary: The scheme of embedding and head.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    precision: QatPrecision
    layers: Scheme
    vocabulary: Scheme

    @property
    def description(self) -> str:
        """The schemes in words."""
        return f"{self.layers.name}, embedding and head in {self.vocabulary.name}"

    def scheme(self, path: str, inputs: int) -> Scheme:
        """Returns the scheme of a product or of the embedding. A block size that does not fit is reduced.

        Args:
            path: Path of the module in the model or in the graph.
            inputs: Number of input channels.

        Raises:
            SlmError: If no block size divides the number of inputs.
        """
        return fitted_scheme(self.layers if ".layers." in path else self.vocabulary, path, inputs)

    def schemes(self, config: ModelConfig) -> Iterator[tuple[str, Scheme]]:
        """Yields the name of each weight on the grid, in a checkpoint, with its scheme.

        Raises:
            SlmError: If no block size divides the number of inputs of a product.
        """
        for name, shape in tensor_shapes(config).items():
            if len(shape) > 1:
                yield name, self.scheme(name.removesuffix(".weight"), shape[1])


def fitted_scheme(scheme: Scheme, path: str, inputs: int) -> Scheme:
    """Returns a scheme with a block size that divides the number of inputs of a product.

    Raises:
        SlmError: If there is none.
    """
    size = fitting_block(inputs, scheme.block_size)
    if size is None:
        raise SlmError(
            f"{path} has {inputs} inputs, not a multiple of the block size {BLOCK_SIZES[-1]}",
            f"quantization needs a multiple of {BLOCK_SIZES[-1]} inputs",
        )
    return scheme.model_copy(update={"block_size": size})


# The grids of `slm quantize --int8` and `slm quantize --int4 --prefer size`.
GRIDS: Mapping[QatPrecision, QatGrid] = {
    "int8": QatGrid(precision="int8", layers=Scheme(bits=8, block_size=128), vocabulary=Scheme(bits=8, block_size=64)),
    "int4": QatGrid(
        precision="int4",
        layers=Scheme(bits=4, block_size=32, zero_points=True),
        vocabulary=Scheme(bits=8, block_size=128),
    ),
}


def recorded_grid(info: Mapping[str, Any]) -> QatGrid | None:
    """Returns the grid in the contents of an `slm.json`; None if the model was trained without one.

    Raises:
        SlmError: If the record is damaged.
    """
    if RECORD not in info:
        return None
    try:
        return QatGrid.model_validate(info[RECORD])
    except ValidationError as error:
        raise SlmError(f"slm.json is damaged: {RECORD}: {first_mistake(error)}", f"remove {RECORD} from it") from None


def without_grid(info: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the contents of an `slm.json` without the grid, for weights that training has moved off it."""
    return {name: value for name, value in info.items() if name != RECORD}
