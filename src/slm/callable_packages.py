"""The packages `slm.train`, `slm.finetune`, `slm.export` and `slm.quantize` can be called: each calls the step of its name.

A package and a function cannot share a name: importing `slm.train.recipe` sets `slm.train` to the package. So the package
itself is what is called, whichever came first.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inspect import Signature

# The packages that are steps too, with the module of the function of the same name.
STEPS = {
    "train": "slm.steps.training",
    "finetune": "slm.steps.finetuning",
    "export": "slm.steps.exporting",
    "quantize": "slm.steps.quantizing",
}


class _Package(ModuleType):
    def __reduce__(self) -> tuple[Callable[[str], ModuleType], tuple[str]]:
        """Pickles by name: Ray and others ship functions whose globals have packages, and know only plain modules."""
        return import_module, (self.__name__,)


class _CallablePackage(_Package):
    """A package that is also a function."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the step of the package's name."""
        return self.__wrapped__(*args, **kwargs)

    @property
    def __wrapped__(self) -> Any:
        """The step, for `inspect` and the help of notebooks."""
        name = self.__name__.rpartition(".")[2]
        return getattr(import_module(STEPS[name]), name)

    @property
    def __signature__(self) -> "Signature":
        """The step's signature."""
        from inspect import signature

        return signature(self.__wrapped__)


class _Root(_Package):
    """The package `slm`, which makes the packages of `STEPS` callable when the import system sets them as attributes."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in STEPS and type(value) is ModuleType:
            value.__class__ = _CallablePackage
        super().__setattr__(name, value)


def install(package: str) -> None:
    """Prepares the root package.

    Args:
        package: Its name, which is being imported.
    """
    sys.modules[package].__class__ = _Root
