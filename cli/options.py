"""Options and parameter types that several commands share."""

import math
from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypedDict

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from slm.cli.console import say
from slm.core.arguments import MAX_COUNT
from slm.core.machine import MAX_THREADS
from slm.steps.arguments import MAX_SEED, check_input

if TYPE_CHECKING:
    from slm.core.artifacts import Kind

# Part of the help of every command that writes an artifact, and of docs/commands.md.
REPLACING = (
    "An output that exists is replaced only if slm made it and it is of the same kind. Trained weights and prepared datasets "
    "are replaced only with --overwrite. Other files are never replaced."
)

MAX_PORT = 65_535


class Whole(click.IntRange):
    """An integer between two bounds. The help omits the upper bounds `MAX_COUNT` and `MAX_SEED`."""

    def __init__(self, min: int, max: int = MAX_COUNT) -> None:
        super().__init__(min, max)

    def _describe_range(self) -> str:
        return f"x>={self.min}" if self.max in (MAX_COUNT, MAX_SEED) else super()._describe_range()


class Real(click.FloatRange):
    """A number between two bounds. Rejects NaN, which passes comparisons with bounds."""

    def __init__(self, min: float, max: float, min_open: bool = False, max_open: bool = False) -> None:
        super().__init__(min, max, min_open, max_open)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Returns the number."""
        number: float = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value!r} is not a number", param, ctx)
        return number


class Percentage(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic in newer versions only
    """A share as a percentage, such as "99.99%", above 0% and at most 100%."""

    name = "percentage"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Returns the share, as a number from 0 to 1."""
        if isinstance(value, float):
            return value
        text = str(value).strip()
        try:
            share = float(text.removesuffix("%")) / 100 if text.endswith("%") else math.nan
        except ValueError:
            share = math.nan
        if not 0 < share <= 1:
            self.fail(f"{value!r} is not a percentage such as 99.99%", param, ctx)
        return share


class Share(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic in newer versions only
    """A share as a percentage or a number, such as "2%" or "0.02".

    Args:
        highest: The largest share.
    """

    name = "share"

    def __init__(self, highest: float = 1.0) -> None:
        self._highest = highest

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Returns the share as a number."""
        text = str(value).strip()
        try:
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            share = math.nan
        if not 0 <= share <= self._highest:
            self.fail(f"{value!r} is not a share from 0 to {self._highest:,.0%}, such as 2% or 0.02", param, ctx)
        return share


class FilePath(click.Path):
    """A path. Rejects the empty string: a shell passes it for an unset variable, and it would mean `.`.

    Args:
        directories: Whether a directory is suitable.
    """

    def __init__(self, *, directories: bool = True) -> None:
        super().__init__(path_type=Path, dir_okay=directories)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Returns the path."""
        if value == "":
            self.fail("the path is empty", param, ctx)
        return super().convert(value, param, ctx)


class Word(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic in newer versions only
    """A string that is not empty."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Returns the string."""
        text = str(value)
        if not text.strip():
            self.fail("it is empty", param, ctx)
        return text


json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace trained weights or a dataset at the output.")
seed_option = click.option(
    "--seed", type=Whole(0, MAX_SEED), default=0, show_default=True, help="Same seed, same output."
)


class ByteCount(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic in newer versions only
    """A size in bytes: "64MiB", "0.5 GB", or a bare number.

    Args:
        unit: The unit of a bare number.
    """

    name = "size"
    _UNITS: ClassVar = {
        "B": 1,
        "KB": 10**3,
        "MB": 10**6,
        "GB": 10**9,
        "KIB": 1 << 10,
        "MIB": 1 << 20,
        "GIB": 1 << 30,
    }
    _MOST = 1 << 40

    def __init__(self, unit: str = "B") -> None:
        self._unit = unit

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Returns the number of bytes, at least 1."""
        if isinstance(value, int):
            return value
        text = str(value).strip().upper()
        number = text.rstrip("KMGIB ")
        try:
            found = int(float(number) * self._UNITS[text[len(number) :].strip() or self._unit])
        except (ValueError, KeyError, OverflowError):
            self.fail(f"{value!r} is not a size in bytes such as 64MiB", param, ctx)
        if not 1 <= found <= self._MOST:
            self.fail(f"{value!r} is not between 1 byte and 1 TiB", param, ctx)
        return found


document_option = click.option(
    "--max-document-bytes",
    type=ByteCount(),
    metavar="SIZE",
    help="Reject longer rows and documents, such as 64MiB. [default: 16MiB]",
)
column_option = click.option("--column", metavar="NAME", help="Name of the text column in rows. [default: text]")

threads_option = click.option("--threads", type=Whole(1, MAX_THREADS), help="Threads. [default: usable physical cores]")


def _warn_of_trust(context: click.Context, parameter: click.Parameter, trust: bool) -> bool:
    if trust:
        from slm.cli.console import say

        say("warning: --trust: the graph is not checked; it can take any time and memory")
    return trust


cuda_graph_option = click.option(
    "--cuda-graph", is_flag=True, help="With --device cuda: record a step's kernel launches once, and replay them."
)
trust_option = click.option(
    "--trust",
    is_flag=True,
    callback=_warn_of_trust,
    help="Run a bundle whose graph slm did not write; such a graph can take any time and memory.",
)
allow_slow_option = click.option(
    "--allow-slow",
    is_flag=True,
    help="With --device cuda: run a bundle that was exported for the CPU, whose attention then runs on the CPU.",
)
qat_option = click.option(
    "--qat",
    type=click.Choice(["int8", "int4"]),
    help="Train with the rounded values of slm quantize --int8 or --int4, which then changes no weight.",
)
set_option = click.option(
    "--set", multiple=True, metavar="a.b=c", help="Override one value of the recipe; may be repeated."
)


log_option = click.option(
    "--log",
    type=click.Choice(["tensorboard", "wandb", "mlflow"]),
    multiple=True,
    help="Also log metrics, recipe and samples there; may be repeated.",
)


def is_given(option: str) -> bool:
    """Returns whether the current command has an option on its command line, rather than by default."""
    source = click.get_current_context().get_parameter_source(option)
    return source in (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)


def out_option_for(what: str, default: str) -> Callable[[Any], Any]:
    """Returns the option --out of a command.

    Args:
        what: The artifact that is written, such as "bundle".
        default: The path without the option.
    """
    return click.option(
        "--out",
        type=FilePath(),
        metavar="DIR",
        help=f"Directory of the {what}. [default: {default}]",
    )


class Artifact(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic in newer versions only
    """A checkpoint, bundle or adapter: a path, a run's name, RUN/ARTIFACT, or a name that occurs once under ./runs.

    Args:
        checkpoints: Whether to accept checkpoints.
        bundles: Whether to accept bundles.
        adapters: Whether to accept adapters.
        others: Returns further valid names, such as those of presets.
    """

    name = "artifact"

    def __init__(
        self,
        *,
        checkpoints: bool = True,
        bundles: bool = True,
        adapters: bool = False,
        others: Callable[[], list[str]] = list,
    ) -> None:
        suitable: list[tuple[Kind, bool]] = [("checkpoint", checkpoints), ("bundle", bundles), ("adapter", adapters)]
        self._kinds = [kind for kind, included in suitable if included]
        self._others = others

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Returns the path; prints which artifact a name refers to.

        Raises:
            SlmError: If there is no such artifact; the hint says what to type.
        """
        from slm.core.names import resolve  # imported here, so that `slm --help` does not load numpy
        from slm.core.runs import RUNS

        if isinstance(value, Path):
            return value
        others = self._others()
        if value in others and not any(place.exists() for place in (Path(value), RUNS / value)):
            return Path(value)
        path, sentences = resolve(str(value), self._kinds, others)
        for sentence in sentences:
            say(sentence)
        return path

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Returns the names of artifacts under ./runs; the shell adds paths."""
        from slm.core.names import known_names

        names = [*known_names(self._kinds), *self._others()]
        found = [CompletionItem(name) for name in names if name.startswith(incomplete)]
        return [*found, CompletionItem(incomplete, type="file")]


adapter_type = Artifact(checkpoints=False, bundles=False, adapters=True)


class InputFile(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic in newer versions only
    """An input file, which is checked before anything is loaded or measured.

    Args:
        what: A name for the file, for messages ("text").
        directories: Whether to accept a directory.
    """

    name = "file"

    def __init__(self, what: str, *, directories: bool = False) -> None:
        self._what = what
        self._directories = directories

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Returns the path.

        Raises:
            SlmError: If the file is missing, unreadable or a directory.
        """
        if value == "":
            self.fail("the path is empty", param, ctx)
        path = Path(value).expanduser()
        check_input(path, self._what, directories=self._directories)
        return path

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Lets the shell complete paths."""
        return [CompletionItem(incomplete, type="file")]


class HostName(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic in newer versions only
    """A name in a Host header, without a port."""

    name = "host"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Returns the name."""
        from slm.web.hosts import name_of

        text = str(value)
        name = name_of(f"[{text}]" if text.count(":") > 1 and not text.startswith("[") else text)
        if name is None or (":" in text and not name.startswith("[")):
            self.fail(f"{value!r} is not a host name; omit scheme and port.", param, ctx)
        return name


class Loading(TypedDict):
    """The options of `slm.load` that every command with a model has."""

    device: Literal["cpu", "cuda"]
    cuda_graph: bool
    threads: int | None
    trust: bool
    allow_slow: bool


def collects(argument: str, group: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Passes the options that are fields of a dataclass to a command as one argument.

    Args:
        argument: The name of the argument.
        group: The dataclass. Its fields have the names of the options.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(command)
        def collected(**options: Any) -> Any:
            values = {field.name: options.pop(field.name) for field in fields(group)}
            return command(**{argument: group(**values)}, **options)

        return collected

    return decorate


def collects_loading(command: Callable[..., Any]) -> Callable[..., Any]:
    """Passes --device, --cuda-graph, --threads, --trust and --allow-slow to a command as one argument, `loading`.

    The command raises `click.UsageError` if --cuda-graph comes without --device cuda.
    """

    @wraps(command)
    def collected(**options: Any) -> Any:
        loading = {name: options.pop(name) for name in Loading.__annotations__}
        if loading["cuda_graph"] and loading["device"] != "cuda":
            raise click.UsageError("--cuda-graph needs --device cuda")
        return command(loading=loading, **options)

    return collected
