"""Combination of models of one shape: averages, spherical interpolation, task arithmetic, TIES.

Computes in float32, one tensor at a time. A tied head stays tied: it is stored once, as the embedding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from slm.core.checkpoint import notices_of, open_weights, read_config, read_info, tensor_shapes, write_checkpoint
from slm.core.errors import SlmError
from slm.core.licence import modified, recorded_notices
from slm.core.progress import Progress, Silent
from slm.core.tokenizer import Tokenizer
from slm.core.weights import weights_sha256
from slm.finetune.merge import merge

Method = Literal["linear", "slerp", "task", "ties"]

Array = NDArray[Any]

# Below this sine of their angle, the arc between two tensors is treated as a line.
_PARALLEL = 1e-6


@dataclass(frozen=True)
class Combination:
    """The way to combine models.

    Attributes:
        method: "linear": the weighted mean. "slerp": interpolation of two models along the arc (Shoemake 1985). "task": the
            base plus the weighted sum of each model's difference from it (arXiv:2212.04089). "ties": the same with trimmed
            differences, averaged over those that agree with the majority sign (arXiv:2306.01708).
        weights: One per model. For linear they are divided by their sum; for slerp the second one, as a share of the sum, is
            the position on the arc.
        density: For TIES, the share of each difference's values to keep, the largest ones.
        scale: For task and TIES, the factor of the combined difference.
    """

    method: Method
    weights: tuple[float, ...]
    density: float = 0.2
    scale: float = 1.0

    def tensor(self, models: Sequence[Array], base: Array | None) -> Array:
        """Returns the combined tensor, float32.

        Args:
            models: The tensor of each model, float32.
            base: The base's tensor, for task and TIES.
        """
        if self.method == "linear":
            return _sum(models, [weight / sum(self.weights) for weight in self.weights])
        if self.method == "slerp":
            return _slerp(models[0], models[1], self.weights[1] / sum(self.weights))
        assert base is not None
        changes = [model - base for model in models]
        change = _sum(changes, self.weights) if self.method == "task" else _ties(changes, self.weights, self.density)
        combined: Array = base + np.float32(self.scale) * change
        return combined


def combine(
    models: Sequence[Path],
    out: Path,
    combination: Combination,
    base: Path | None = None,
    adapters: Sequence[Path] = (),
    progress: Progress | None = None,
) -> None:
    """Combines checkpoints, or adapters of one base, and writes a checkpoint, whole or not at all.

    Args:
        models: Checkpoints, of one shape and with one tokenizer.
        out: The checkpoint's directory.
        combination: The method, with a weight for each checkpoint and then for each adapter.
        base: The base of task arithmetic, TIES and the adapters.
        adapters: Adapters; each counts as the checkpoint that merging it into the base gives.
        progress: Receives the number of tensors done.

    Raises:
        SlmError: When models do not fit together, or an adapter does not fit the base.
    """
    progress = progress or Silent()
    first = models[0] if models else base
    assert first is not None
    _check_alike([*models, *([] if base is None else [base])])
    config = read_config(first)
    readers = [open_weights(path, config).float32 for path in models] + [
        _merged(base, path) for path in adapters if base is not None
    ]
    of_base = None if base is None or combination.method in ("linear", "slerp") else open_weights(base, config).float32
    shapes = tensor_shapes(config)
    progress.start("combine", len(shapes), "tensors")
    tensors: dict[str, Array] = {}
    for name in shapes:
        tensors[name] = combination.tensor([read(name) for read in readers], of_base and of_base(name))
        progress.advance()
    progress.finish()
    sources = [*models, *adapters] if base is None else [base, *models, *adapters]
    notices = [notice for path in sources for notice in _notices(path)]
    info = {
        "combined": {
            "method": combination.method,
            "weights": combination.weights,
            "density": combination.density if combination.method == "ties" else None,
            "scale": combination.scale if combination.method in ("task", "ties") else None,
            "base": None if base is None else {"path": str(base), "weights_sha256": weights_sha256(base)},
            "models": [{"path": str(path), "weights_sha256": weights_sha256(path)} for path in models],
            "adapters": [str(path) for path in adapters],
        },
        "notices": modified(tuple(dict.fromkeys(notices)), f"combined ({combination.method})"),
    }
    write_checkpoint(out, config, tensors, Tokenizer.load(first), info)


def _notices(path: Path) -> Sequence[str]:
    return notices_of(path) if (path / "config.json").is_file() else recorded_notices(read_info(path))


def _check_alike(paths: Sequence[Path]) -> None:
    first, *others = paths
    config, tokenizer = read_config(first), Tokenizer.load(first)
    for path in others:
        theirs = read_config(path)
        if theirs != config:
            changed = [name for name, value in config if value != getattr(theirs, name)]
            raise SlmError(
                f"{path} and {first} are of different shapes: {', '.join(changed)}", "models of one shape combine"
            )
        if Tokenizer.load(path).sha256 != tokenizer.sha256:
            raise SlmError(f"{path} and {first} have different tokenizers", "only models that share one combine")


def _merged(base: Path, adapter: Path) -> Callable[[str], Array]:
    tensors = {name: parameter.detach().numpy() for name, parameter in merge(base, adapter).named_parameters()}
    return tensors.__getitem__


def _sum(arrays: Sequence[Array], weights: Sequence[float]) -> Array:
    total = np.zeros_like(arrays[0])
    for array, weight in zip(arrays, weights, strict=True):
        total += np.float32(weight) * array
    return total


def _slerp(first: Array, second: Array, share: float) -> Array:
    """Returns a point on the arc between two tensors, with a norm between theirs."""
    lengths = [float(np.linalg.norm(array)) for array in (first, second)]
    if not all(lengths):
        return _sum((first, second), (1 - share, share))
    cosine = float(np.clip((first.ravel() / lengths[0]) @ (second.ravel() / lengths[1]), -1, 1))
    angle = float(np.arccos(cosine))
    if np.sin(angle) < _PARALLEL:
        return _sum((first, second), (1 - share, share))
    parts = [np.sin((1 - share) * angle) / np.sin(angle), np.sin(share * angle) / np.sin(angle)]
    length = (1 - share) * lengths[0] + share * lengths[1]
    return _sum((first, second), [length * part / own for part, own in zip(parts, lengths, strict=True)])


def _ties(changes: Sequence[Array], weights: Sequence[float], density: float) -> Array:
    """Trims each difference to its largest values, elects a sign for every value, and averages those that have it."""
    trimmed = [np.float32(weight) * _largest(change, density) for change, weight in zip(changes, weights, strict=True)]
    sign = np.sign(sum(trimmed))
    total, count = np.zeros_like(changes[0]), np.zeros_like(changes[0])
    for change, weight in zip(trimmed, weights, strict=True):
        agrees = (np.sign(change) == sign) & (sign != 0)
        total += np.where(agrees, change, 0)
        count += agrees * np.float32(abs(weight))
    return np.divide(total, count, out=np.zeros_like(total), where=count != 0)


def _largest(change: Array, density: float) -> Array:
    keep = max(1, round(density * change.size))
    if keep >= change.size:
        return change
    sizes = np.abs(change)
    least = np.partition(sizes.ravel(), change.size - keep)[change.size - keep]
    return np.where(sizes >= least, change, np.float32(0))
