"""Entry point of the command line: imports commands on demand, and reports every error in one line."""

import errno
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import NoReturn

import click

from slm.cli.console import say_error
from slm.cli.streams import open_closed_streams, settle_streams, use_utf8
from slm.cli.suggesting import Suggesting
from slm.core import systems
from slm.core.errors import SlmError
from slm.core.install import install_hint
from slm.core.machine import prepare_threads
from slm.core.signals import stopping
from slm.version import __version__

# In the order of the workflow. The help texts are here so that `slm --help` imports no command.
COMMANDS = {
    "import": "Import a Hugging Face or GGUF model as a checkpoint.",
    "data": "Prepare a dataset of tokens from text, for use in many training runs.",
    "train": "Train a model on text: tokenizer, data, checkpoint.",
    "finetune": "Fine-tune a checkpoint on text, instructions or conversations, with LoRA or in full.",
    "merge": "Combine several checkpoints, or a base and adapters, into one.",
    "trim": "Trim a checkpoint's vocabulary to the tokens that a text needs.",
    "export": "Export a checkpoint to an ONNX bundle or a GGUF file, and verify it.",
    "verify": "Verify that a bundle matches its checkpoint.",
    "quantize": "Quantize a bundle and measure the effect on quality.",
    "eval": "Evaluate a model on text (loss, perplexity, bits per byte) or on tasks.",
    "run": "Run any model in one command: import, export, quantize and chat.",
    "generate": "Generate text with a bundle or a checkpoint.",
    "chat": "Chat with a bundle or a checkpoint that was fine-tuned on conversations.",
    "serve": "Serve a model over HTTP with an OpenAI-compatible API.",
    "web": "Serve or write a page that runs a bundle in the browser.",
    "bench": "Measure a model's speed and memory.",
    "info": "Describe a checkpoint, a bundle or a preset: sizes, cost and origin.",
    "list": "List the models and adapters under ./runs and in the cache.",
    "compare": "Compare runs: recipes, curves and figures.",
    "rm": "Remove models, adapters or runs.",
    "doctor": "Report the machine's hardware, installed packages, and what is missing.",
    "demo": "Run the complete workflow on bundled data.",
}

# Commands whose names mean something else in Python; their modules end with "_".
_RENAMED = ("import", "list")

prepare_threads()
# Libraries start Python processes too (torch.compile's workers, multiprocessing's tracker). None of them imports from the
# working directory.
os.environ.setdefault("PYTHONSAFEPATH", "1")

# Hints for interrupted commands.
_WHOLE = "no file is incomplete"
_INTERRUPTED = {
    "train": f"{_WHOLE}; if training had started, slm train --resume continues it",
    "finetune": f"{_WHOLE}; if training had started, the same command continues it",
    "data": f"{_WHOLE}; the same slm data prepare command continues after the last complete file",
    "demo": f"{_WHOLE}; completed steps stay in the run, and slm demo starts a new run",
}
# The extra that installs each package, for the hint if the package is missing.
EXTRAS = {
    "fastapi": "serve",
    "starlette": "serve",
    "uvicorn": "serve",
    "h11": "serve",
    "llguidance": "serve",
    "prometheus_client": "serve",
    "onnxruntime": "cpu",
    "onnx": "convert",
    "onnxscript": "convert",
    "onnx_ir": "convert",
    "safetensors": "convert",
    "ml_dtypes": "convert",
    "gguf": "convert",
    "huggingface_hub": "convert",
}


class _Lazy(Suggesting):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = f"{cmd_name}_" if cmd_name in _RENAMED else cmd_name
        command: click.Command = getattr(import_module(f"slm.cli.commands.{module}"), module)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error; so does SLM_DEBUG=1.")
@click.version_option(__version__, prog_name="slm")
def cli() -> None:
    """Train, fine-tune, export, quantize and run small language models.

    \b
      slm train --data stories.txt      text        -> runs/NAME/checkpoint/best
      slm export --onnx                 checkpoint  -> runs/NAME/onnx
      slm quantize --int8               bundle      -> runs/NAME/onnx-int8
      slm generate -p "Once upon"       bundle      -> text

    Without an input argument, a command uses the newest suitable artifact under ./runs and reports its path. Names can replace
    paths: tiny, tiny/onnx-int8, tiny/best. docs/commands.md describes names and shell completion.
    """


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line and exits: 0 success, 1 error, 2 usage error, 129, 130 or 143 interrupted."""
    open_closed_streams()
    use_utf8()
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    debug = "--debug" in arguments or os.environ.get("SLM_DEBUG", "") not in ("", "0")
    arguments = [
        argument for argument in arguments if argument != "--debug"
    ]  # --debug is accepted before and after the command
    signals = [each for each in stopping() if each != signal.SIGINT]  # Python raises KeyboardInterrupt for SIGINT
    for signum in signals:
        signal.signal(signum, _terminate)
    try:
        cli.main(args=list(arguments), prog_name="slm", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as shown:
        click.echo(shown.format_message())
        sys.exit(2)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except (KeyboardInterrupt, click.Abort):
        say_error("interrupted", _after_stopping(arguments))
        sys.exit(130)
    except _Terminated as terminated:
        say_error("terminated", _after_stopping(arguments))
        sys.exit(terminated.code)
    except BrokenPipeError:  # the reader of the pipe has exited: exit without a message, as other tools do
        sys.exit(1)
    except Exception as error:
        if systems.WINDOWS and isinstance(error, OSError) and error.errno == errno.EINVAL and error.filename is None:
            sys.exit(1)  # a broken pipe on Windows
        if debug:
            traceback.print_exc()
        message, hint, code = _explain(error)
        say_error(message, hint)
        sys.exit(code)
    finally:
        settle_streams()
        for signum in signals:  # an exception in Python's exit handlers would print a traceback
            signal.signal(signum, signal.SIG_DFL)
    sys.exit(0)


def _after_stopping(arguments: Sequence[str]) -> str:
    """Returns the hint for an interrupted command: which files remain, and how to continue."""
    command = next((argument for argument in arguments if argument in COMMANDS), "")
    return _INTERRUPTED.get(command, _WHOLE)


class _Terminated(SystemExit):
    """A signal to stop as an exception, so that cleanup code runs."""


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    raise _Terminated(128 + signum)


_FREE_SPACE = "free disk space, or name a directory on another disk with --out"
_ELSEWHERE = "check the permissions, or name a writable directory with --out"
_LONG_PATH = "use a shorter path, or permit long paths in Windows (docs/systems.md)"
# Windows adds the name of a temporary file to that of a directory, which may have up to 247 characters; a file, up to 259.
_LONGEST_PATH = 247
_OUT_OF_MEMORY = ("out of memory", "use a smaller batch or context", 1)


def _explain(error: Exception) -> tuple[str, str | None, int]:
    """Returns the message, hint and exit code for an exception."""
    match error:
        case SlmError():
            return error.message, error.hint, 1
        case click.UsageError():
            command = error.ctx.command_path if error.ctx else "slm"
            return error.format_message(), f"see {command} --help", 2
        case click.ClickException():
            return error.format_message(), None, 1
        case ModuleNotFoundError() if error.name and not error.name.startswith("slm"):
            extra = EXTRAS.get(error.name.partition(".")[0], "train")
            return f"the package {error.name} is not installed", install_hint(extra), 1
        case OSError() if error.errno in (errno.ENOSPC, errno.EDQUOT):
            place = f" for {error.filename}" if error.filename else ""
            return f"no space left on the disk{place}", f"{_FREE_SPACE}; no file is incomplete", 1
        case OSError() if systems.WINDOWS and (characters := _too_long(error)):
            return f"the path has {characters} characters, more than Windows permits: {error.filename}", _LONG_PATH, 1
        case OSError() if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and error.filename:
            return f"{error.strerror}: {error.filename}", _ELSEWHERE, 1
        case OSError() if error.strerror:
            return f"{error.strerror}: {error.filename}" if error.filename else error.strerror, None, 1
        case MemoryError():
            return _OUT_OF_MEMORY
        case RuntimeError() if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
            return _OUT_OF_MEMORY  # PyTorch's errors on CUDA and on the CPU
    return _unexpected(error)


def _too_long(error: OSError) -> int:
    """Returns the length of the path of an error, if its length may be the reason; otherwise 0."""
    if error.errno not in (errno.ENOENT, errno.EINVAL) or not isinstance(error.filename, str):
        return 0
    length = len(str(Path(error.filename).absolute()))
    return length if length > _LONGEST_PATH and not error.filename.startswith("\\\\?\\") else 0


def _unexpected(error: Exception) -> tuple[str, str, int]:
    text = " ".join(str(error).split())
    return (
        f"unexpected {type(error).__name__}: {text}",
        "run slm --debug ... for the traceback, and please report it",
        1,
    )
