"""Options that several commands share, so that the same thing has the same name everywhere."""

import math
from pathlib import Path
from typing import Any, ClassVar

import click

from slm.core.errors import SlmError
from slm.core.machine import MAX_THREADS

# The checkpoints that a run may hold, the one that is mostly meant first.
_CHECKPOINTS = ("best", "last", "imported")

# What numbers of 32 bits hold: lengths in tokens and rows have no smaller limit that is the same for every model.
MAX_COUNT = 2**31 - 1
# What NumPy, PyTorch and a recipe take.
MAX_SEED = 2**63 - 1


class Whole(click.IntRange):
    """A whole number with both bounds. The help leaves `MAX_COUNT` and `MAX_SEED` out."""

    def __init__(self, min: int, max: int = MAX_COUNT) -> None:
        super().__init__(min, max)

    def _describe_range(self) -> str:
        return f"x>={self.min}" if self.max in (MAX_COUNT, MAX_SEED) else super()._describe_range()


class Real(click.FloatRange):
    """A number with both bounds. NaN is rejected, which no comparison does."""

    def __init__(self, min: float, max: float, min_open: bool = False, max_open: bool = False) -> None:
        super().__init__(min, max, min_open, max_open)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Returns the number."""
        number: float = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value!r} is not a number", param, ctx)
        return number


json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
out_option = click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Where to write. [default: in the run under ./runs, else beside the input]",
)
seed_option = click.option(
    "--seed", type=Whole(0, MAX_SEED), default=0, show_default=True, help="Same seed, same output."
)


class ByteCount(click.ParamType[int]):
    """Bytes: "64MiB", "1GB", or a bare number of them."""

    name = "size"
    _UNITS: ClassVar = {
        "": 1,
        "B": 1,
        "KB": 10**3,
        "MB": 10**6,
        "GB": 10**9,
        "KIB": 1 << 10,
        "MIB": 1 << 20,
        "GIB": 1 << 30,
    }
    _MOST = 1 << 40

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Returns bytes, at least 1."""
        if isinstance(value, int):
            return value
        text = str(value).strip().upper()
        number = text.rstrip("KMGIB ")
        try:
            found = int(float(number) * self._UNITS[text[len(number) :].strip()])
        except (ValueError, KeyError, OverflowError):
            self.fail(f"{value!r} is not a size in bytes such as 64MiB", param, ctx)
        if not 1 <= found <= self._MOST:
            self.fail(f"{value!r} is not between 1 byte and 1 TiB", param, ctx)
        return found


document_option = click.option(
    "--max-document-bytes",
    type=ByteCount(),
    metavar="SIZE",
    help="Refuse rows and documents that are longer, such as 64MiB. [default: 16MiB]",
)
column_option = click.option("--column", metavar="NAME", help="What the text is called in rows. [default: text]")

threads_option = click.option("--threads", type=Whole(1, MAX_THREADS), help="Threads. [default: usable physical cores]")


def _warn_of_trust(context: click.Context, parameter: click.Parameter, trust: bool) -> bool:
    if trust:
        from slm.cli.console import say

        say("warning: --trust: the graph is not checked; it can take any time and memory")
    return trust


trust_option = click.option(
    "--trust",
    is_flag=True,
    callback=_warn_of_trust,
    help="Run a bundle whose graph slm did not write; such a graph can take any time and memory.",
)
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="a.b=c", help="Override one value of the recipe; may be repeated."
)


class Artifact(click.Path):
    """The path of a checkpoint or a bundle. A run, which may hold several of either, is refused with their names.

    Args:
        checkpoints: Whether a checkpoint will do.
        bundles: Whether a bundle will do.
    """

    def __init__(self, *, checkpoints: bool = True, bundles: bool = True) -> None:
        super().__init__(path_type=Path)
        self._checkpoints = checkpoints
        self._bundles = bundles

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Returns the path.

        Raises:
            SlmError: When it is a run.
        """
        path: Path = super().convert(value, param, ctx)  # type: ignore[assignment]  # as path_type says
        if path.is_dir():
            _refuse_run(path, self._checkpoints, self._bundles)
        return path


def _refuse_run(path: Path, checkpoints: bool, bundles: bool) -> None:
    from slm.core.checkpoint import is_checkpoint  # here, so that `slm --help` does not wait for numpy
    from slm.core.manifest import is_bundle

    if is_checkpoint(path) or is_bundle(path):
        return
    names = (*(f"checkpoint/{name}" for name in _CHECKPOINTS), *_CHECKPOINTS)  # of a run; of its checkpoint directory
    trained = [path / name for name in names if is_checkpoint(path / name)]
    exported = [bundle for bundle in sorted(path.glob("onnx*")) if is_bundle(bundle)]
    wanted = ["checkpoint"] * checkpoints + ["bundle"] * bundles
    what = f"neither a {' nor a '.join(wanted)}" if len(wanted) > 1 else f"not a {wanted[0]}"
    if found := trained * checkpoints + exported * bundles:
        raise SlmError(f"{what}: {path}", f"name what it holds: {', '.join(map(str, found))}")
    if trained:
        raise SlmError(f"{what}: {path}", f"slm export --onnx {trained[0]} makes one")
    if (path / "metrics.jsonl").is_file():
        raise SlmError(
            f"{what}: {path}", f"the run has saved none yet: slm train --resume --out {path} goes on with it"
        )


class HostName(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic in newer versions only
    """A name in a Host header, without a port."""

    name = "host"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Returns the name."""
        from slm.web.hosts import name_of

        text = str(value)
        name = name_of(f"[{text}]" if text.count(":") > 1 and not text.startswith("[") else text)
        if name is None or (":" in text and not name.startswith("[")):
            self.fail(f"{value!r} is not a host name; leave out scheme and port.", param, ctx)
        return name
