"""Arguments of the steps: their types, and the check of a call against the annotations of its function.

A step checks names, types, choices and ranges before it does anything, as the command line does for options.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from inspect import signature
from numbers import Integral, Real
from os import PathLike, fspath
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, ParamSpec, TypeGuard, TypeVar, Union, get_args, get_origin

from slm.core.arguments import MAX_COUNT, check_keywords, described
from slm.core.errors import ArgumentError, SlmError
from slm.core.machine import prepare_threads
from slm.core.progress import Progress

_P = ParamSpec("_P")
_T = TypeVar("_T")

PathArgument = str | PathLike[str]
LogName = Literal["tensorboard", "wandb", "mlflow"]

_passed: ContextVar[frozenset[str]] = ContextVar("passed", default=frozenset())


@dataclass(frozen=True, repr=False)
class Range:
    """The range of a number.

    Attributes:
        least: The smallest value.
        most: The largest value.
        least_open: Whether the smallest value itself is out of range.
        most_open: Whether the largest value itself is out of range.
    """

    least: float
    most: float
    least_open: bool = False
    most_open: bool = False

    def __contains__(self, value: float) -> bool:
        """Returns whether a number is in the range; NaN is not."""
        above = self.least < value if self.least_open else self.least <= value
        return above and (value < self.most if self.most_open else value <= self.most)

    def __repr__(self) -> str:
        lower = f"{'above' if self.least_open else 'at least'} {self.least:,}"
        if self.most in (MAX_COUNT, MAX_SEED) or math.isinf(self.most):
            return lower
        return f"{lower} and {'below' if self.most_open else 'at most'} {self.most:,}"


# The largest seed that NumPy, PyTorch and recipes accept.
MAX_SEED = 2**63 - 1

Positive = Annotated[int, Range(1, MAX_COUNT)]
Two = Annotated[int, Range(2, MAX_COUNT)]
Bytes = Annotated[int, Range(1, 1 << 40)]
Seed = Annotated[int, Range(0, MAX_SEED)]
Share = Annotated[float, Range(0, 1)]
PartialShare = Annotated[float, Range(0, 1, least_open=True)]


def step(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Decorates a step: checks the arguments of a call against the annotations, and prepares PyTorch's threads.

    The decorated function raises an ArgumentError for an unknown keyword, too many positional arguments, and a value of the
    wrong type or out of range.
    """
    known = signature(function)

    @wraps(function)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        check_keywords(function.__name__, kwargs, known.parameters)
        try:
            arguments = known.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise ArgumentError(f"{function.__name__}(): {error}", "pass the options by name") from None
        for name, value in arguments.items():
            _check(name, value, known.parameters[name].annotation)
        if "torch" not in sys.modules:
            prepare_threads()
        before = _passed.set(frozenset(arguments))
        try:
            return function(*args, **kwargs)
        finally:
            _passed.reset(before)

    return checked


def passed() -> frozenset[str]:
    """Returns the names of the arguments that the caller of the current step passed, rather than left at their defaults."""
    return _passed.get()


def changed(function: Callable[..., Any], arguments: Mapping[str, Any]) -> list[str]:
    """Returns the names of the arguments that differ from the defaults of a step."""
    defaults = signature(function).parameters
    return [name for name, value in arguments.items() if value != defaults[name].default]


def as_path(value: PathArgument) -> Path:
    """Returns an argument as a path; `~/` is the home directory.

    Raises:
        ArgumentError: If it is empty.
    """
    text = fspath(value)
    if not text.strip():
        raise ArgumentError("a path is empty", "name a file or a directory")
    return Path(text).expanduser() if text.startswith("~/") else Path(text)


def as_optional_path(value: PathArgument | None) -> Path | None:
    """Returns an argument as a path; None for None."""
    return None if value is None else as_path(value)


def as_paths(value: PathArgument | Sequence[PathArgument] | None) -> tuple[Path, ...]:
    """Returns one argument, or a list of them, as paths."""
    if value is None:
        return ()
    return tuple(map(as_path, [value] if isinstance(value, str | PathLike) else value))


def as_names(value: str | Sequence[str] | None) -> list[str]:
    """Returns names from a list, or from a text with commas."""
    names = value.split(",") if isinstance(value, str) else value or []
    return [name.strip() for name in names if name.strip()]


def as_overrides(values: Mapping[str, object] | Sequence[str]) -> tuple[str, ...]:
    """Returns values of a recipe as overrides, such as "a.b=c", from a dictionary or from texts."""
    texts = [f"{name}={json.dumps(value)}" for name, value in values.items()] if isinstance(values, Mapping) else values
    return tuple(texts)


def check_input(path: Path, what: str, *, directories: bool = False) -> None:
    """Checks that an input file exists and is readable, before anything is loaded or measured.

    Args:
        path: The file.
        what: A name for the file, for messages ("text").
        directories: Whether to accept a directory.

    Raises:
        SlmError: If the file is missing, unreadable or a directory.
    """
    if not path.exists():
        raise SlmError(f"{what} not found: {path}", "check the path")
    if path.is_dir() and not directories:
        raise SlmError(f"{what} is a directory, not a file: {path}", "name a file")
    if not os.access(path, os.R_OK):
        raise SlmError(f"cannot read {what}: {path} (Permission denied)", "check its permissions")


def _check(name: str, value: object, hint: Any) -> None:
    kinds = _alternatives(hint)
    if any(_fits(value, each) for each in kinds):
        return
    of_items = [get_args(each)[0] for each in kinds if get_origin(each) is Sequence]
    if of_items and _is_list(value):
        for i, each in enumerate(value):
            _check(f"{name}[{i}]", each, of_items[0])
    wanted = " or ".join(dict.fromkeys(map(_wanted, kinds)))
    raise ArgumentError(f"{name} is {described(value)}; it must be {wanted}")


def _alternatives(hint: Any) -> list[Any]:
    if get_origin(hint) in (Union, UnionType):
        return [each for part in get_args(hint) for each in _alternatives(part)]
    if get_origin(hint) is Literal:
        return [Literal[each] for each in get_args(hint)]
    return [hint]


def _fits(value: object, hint: Any) -> bool:
    """Returns whether a value is of a type; for a type that is not one of those below, it is."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _fits(value, inner[0]) and value in inner[1]
    if origin is Literal:
        return type(value) is type(inner[0]) and value == inner[0]
    if hint in (int, float):
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    if hint in (bool, str, NoneType, Progress):
        return isinstance(value, hint)
    if origin is PathLike:
        return isinstance(value, PathLike)
    if origin is Sequence:
        return _is_list(value) and all(any(_fits(each, one) for one in _alternatives(inner[0])) for each in value)
    return isinstance(value, Mapping) if origin is Mapping else True


def _is_list(value: object) -> TypeGuard[Sequence[object]]:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _wanted(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        within = inner[1]
        return f"{_wanted(inner[0])} {'' if within.least_open else 'of '}{within}"
    if origin is Literal:
        return repr(inner[0])
    if origin is Sequence:
        return "a list"
    if hint is Progress:
        return "an object with the methods of slm.core.progress.Progress"
    names = {int: "a whole number", float: "a number", bool: "True or False", str: "a string", NoneType: "None"}
    return names.get(hint, {PathLike: "a path", Mapping: "a mapping"}.get(origin, "of another type"))
