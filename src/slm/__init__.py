"""slm: small language models from raw text to a verified, quantized model answering on a CPU or a GPU.

The public API is loaded on first use, so that `import slm` stays quick and needs neither torch nor onnx.
"""

import sys

if (
    sys.argv[:1] == ["-m"] and not sys.flags.safe_path
):  # which holds only while Python looks for the module of `python -m`
    from slm.isolation import leave_working_directory

    leave_working_directory()

from typing import TYPE_CHECKING, Any

from slm.version import __version__

if TYPE_CHECKING:
    from slm.core.config import ModelConfig
    from slm.core.errors import SlmError
    from slm.loading import load
    from slm.runtime.model import Model

__all__ = ["Model", "ModelConfig", "SlmError", "__version__", "load"]

_HOMES = {
    "Model": "slm.runtime.model",
    "ModelConfig": "slm.core.config",
    "SlmError": "slm.core.errors",
    "load": "slm.loading",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'slm' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
