"""slm: small language models, from raw text to a verified, quantized model that runs on a CPU or a GPU.

    import slm

    model = slm.load()                                  # the newest model under ./runs, or slm.load("runs/tiny/onnx-int8")
    text = model.generate("Once upon a time", max_new_tokens=50)
    texts = model.generate(["Once", "One day"], temperature=0)
    for piece in model.stream("The fox"):
        print(piece, end="")
    chat = model.chat(system="Be brief.")
    print(chat.ask("Name a colour."))

    adapter = slm.finetune("rows.jsonl")                # also slm.train(...)
    bundle = slm.export(adapter)
    small = slm.quantize(bundle, "int8")
    scores = slm.evaluate([adapter, small], task="held_out.jsonl", metric="exact")

These functions have the names, options and defaults of the commands (`slm --help`). Errors are `slm.SlmError`, with a `message`
and a `hint`; `slm.ArgumentError`, for invalid calls, is also a `TypeError`.

The public names are imported on first use, so that `import slm` is fast and needs neither torch nor onnx.
"""

import sys

if sys.argv[:1] == ["-m"] and not sys.flags.safe_path:  # true only while Python looks up the module of `python -m`
    from slm.isolation import leave_working_directory

    leave_working_directory()

from typing import TYPE_CHECKING, Any

from slm.callable_packages import STEPS, install
from slm.version import __version__

install(__name__)

if TYPE_CHECKING:
    from slm.core.config import ModelConfig
    from slm.core.errors import ArgumentError, SlmError
    from slm.finetune.run import FinetuneResult
    from slm.loading import load, load_ensemble
    from slm.runtime.chat import Chat
    from slm.runtime.generation import Piece, Result
    from slm.runtime.model import Model
    from slm.runtime.options import GenerationOptions
    from slm.runtime.streaming import Stream
    from slm.steps.comparison import Comparison
    from slm.steps.evaluating import TextResult, evaluate
    from slm.steps.exporting import ExportResult, export
    from slm.steps.finetuning import finetune
    from slm.steps.quantizing import QuantizeResult, quantize
    from slm.steps.training import train
    from slm.train.run import TrainResult

__all__ = [
    "ArgumentError",
    "Chat",
    "Comparison",
    "ExportResult",
    "FinetuneResult",
    "GenerationOptions",
    "Model",
    "ModelConfig",
    "Piece",
    "QuantizeResult",
    "Result",
    "SlmError",
    "Stream",
    "TextResult",
    "TrainResult",
    "__version__",
    "evaluate",
    "export",
    "finetune",
    "load",
    "load_ensemble",
    "quantize",
    "train",
]

_HOMES = {
    "ArgumentError": "slm.core.errors",
    "Chat": "slm.runtime.chat",
    "Comparison": "slm.steps.comparison",
    "ExportResult": "slm.steps.exporting",
    "FinetuneResult": "slm.finetune.run",
    "GenerationOptions": "slm.runtime.options",
    "Model": "slm.runtime.model",
    "ModelConfig": "slm.core.config",
    "Piece": "slm.runtime.generation",
    "QuantizeResult": "slm.steps.quantizing",
    "Result": "slm.runtime.generation",
    "SlmError": "slm.core.errors",
    "Stream": "slm.runtime.streaming",
    "TextResult": "slm.steps.evaluating",
    "TrainResult": "slm.train.run",
    "evaluate": "slm.steps.evaluating",
    "load": "slm.loading",
    "load_ensemble": "slm.loading",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in STEPS:
        return import_module(f"slm.{name}")
    if name not in _HOMES:
        from difflib import get_close_matches

        close = get_close_matches(name, [*_HOMES, *STEPS], 1)
        raise AttributeError(
            f"module 'slm' has no attribute {name!r}" + (f"; did you mean {close[0]}?" if close else "")
        )
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
