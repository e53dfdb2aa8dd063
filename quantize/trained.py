"""Quantization of a model that was trained for it: the plan keeps the grid of training, so that no weight moves."""

from slm.core.checkpoint import INFO_FILE
from slm.core.grid import distance
from slm.core.manifest import Manifest
from slm.core.qat import QatGrid, recorded_grid
from slm.quantize.plan import PreferredSchemes, QuantizationPlan, schemes_of
from slm.quantize.quantizer import Quantizer
from slm.quantize.settings import Settings

# The largest distance of a weight from its grid, in steps: 0.1 for a weight in 8 bits that was stored in bfloat16, and 0.29 for
# a weight that was not trained on this grid.
_ON_GRID = 0.15


def trained_for(manifest: Manifest) -> QatGrid | None:
    """Returns the grid of quantization-aware training that a bundle's checkpoint recorded; None if there is none.

    Raises:
        SlmError: If the record is damaged.
    """
    info = manifest.provenance.get(INFO_FILE)
    return recorded_grid(info) if isinstance(info, dict) else None


def trained_plan(quantizer: Quantizer) -> QuantizationPlan | None:
    """Returns the plan for the grid on which the model was trained.

    Prints a note with the grid; or a warning if a setting contradicts the grid, or if the weights are not on it.

    Returns:
        The plan, without smoothing or search. None if the model was not trained on a grid, or the grid cannot be kept.

    Raises:
        SlmError: If the record of the grid is damaged.
    """
    grid, note = trained_for(quantizer.source.manifest), quantizer.progress.note
    if grid is None:
        return None
    name = grid.precision.upper()
    if (option := contradiction(quantizer.settings, grid)) is not None:
        note(
            f"warning: the model was trained for {name} (--qat {grid.precision}); {option} moves its weights off that grid"
        )
        return None
    schemes = schemes_of(quantizer.linears, PreferredSchemes.of(grid))
    moved = [
        path for path, scheme in schemes.items() if distance(quantizer.weights[f"{path}.weight"], scheme) > _ON_GRID
    ]
    if moved:
        note(
            f"warning: the checkpoint records training for {name}, but {len(moved)} of {len(schemes)} weights are not on that "
            f"grid ({moved[0]}); the record is ignored"
        )
        return None
    note(
        f"the model was trained for {name}: its weights keep that grid (layers in {grid.description}), without smoothing or "
        "search"
    )
    return QuantizationPlan(schemes, "nearest", trained_for=grid.precision)


def contradiction(settings: Settings, grid: QatGrid) -> str | None:
    """Returns an option that moves weights off a grid; None if there is none."""
    options = {
        "--int8-dynamic": settings.dynamic,
        f"--{settings.precision}": settings.precision != grid.precision,
        f"--method {settings.method}": settings.method not in (None, "nearest"),
        "--smooth": settings.smooth,
        f"--block-size {settings.block_size}": settings.block_size not in (None, grid.layers.block_size),
        f"--prefer {settings.prefer}": settings.prefer != "auto",
        "--head-bits 4": settings.head_bits == 4,
        "--refine": settings.refine,
        "--head halves": settings.head == "halves",  # whose integers have another range
        "--target-size": settings.target_bytes is not None,
    }
    return next((option for option, given in options.items() if given), None)
