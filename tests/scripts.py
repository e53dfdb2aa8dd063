"""Imports the scripts of the repository that are no part of the package."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


def script(path: Path, patch: pytest.MonkeyPatch) -> ModuleType:
    """Returns a script as a module, which is known by its name for as long as the patch lasts.

    Args:
        path: The script.
        patch: Registers the module: dataclasses look for the types of their fields there.
    """
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    patch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    return module
