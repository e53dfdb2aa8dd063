"""Entry point: finds commands without importing them, and turns every failure into one line."""

import errno
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from keyword import iskeyword
from types import FrameType
from typing import NoReturn

import click

from slm.cli.console import say_error
from slm.cli.streams import open_closed_streams, settle_streams
from slm.cli.suggesting import Suggesting
from slm.core.errors import SlmError
from slm.core.install import install_hint
from slm.core.machine import cpu_quota, usable_cores
from slm.version import __version__

# In the order of the chain. The help stands here so that `slm --help` imports no command.
COMMANDS = {
    "import": "Make a checkpoint of a Hugging Face or GGUF model.",
    "data": "Turn text into a dataset of tokens, for many runs to train on.",
    "train": "Train a model on text: tokenizer, data, checkpoint.",
    "finetune": "Fine-tune a checkpoint on rows of text, instructions or chats, with LoRA or in full.",
    "merge": "Combine several checkpoints, or a base and adapters, into one.",
    "export": "Export a checkpoint to an ONNX bundle or a GGUF file and prove it equal.",
    "verify": "Prove that a bundle is the checkpoint that it was made from.",
    "quantize": "Quantize a bundle and measure what that changed.",
    "eval": "Measure a model on text: loss, perplexity, bits per byte; or on tasks.",
    "generate": "Continue a text with a bundle or a checkpoint.",
    "chat": "Talk with a bundle or a checkpoint that was tuned on conversations.",
    "serve": "Answer over HTTP as OpenAI's API does.",
    "web": "Serve or write a page that runs a bundle in the browser.",
    "bench": "Measure how fast a model answers, and in how much memory.",
    "info": "Say what an artifact is and how it was made.",
    "doctor": "Say what this machine has and what is missing.",
    "demo": "Run the whole chain on data that ships with slm.",
}

# PyTorch's threads wait for each other at the end of every product, spinning by default. On a machine with other work that
# costs more than half of the speed; 5,000 turns keep 98 % of it when idle and 84 % of what sleeping at once gives when busy
# (docs/LOG.md). GNU's OpenMP reads it when PyTorch is first imported; what the user sets is kept.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
# Libraries start interpreters too (torch.compile's workers, multiprocessing's tracker): none imports from the directory where
# the command is run.
os.environ.setdefault("PYTHONSAFEPATH", "1")
# PyTorch counts cores and does not know of a container's quota.
if cpu_quota() is not None:
    os.environ.setdefault("OMP_NUM_THREADS", str(usable_cores()))

# What is true of a command that was stopped.
_WHOLE = "nothing is left half written"
_INTERRUPTED = {
    "train": f"{_WHOLE}; once training has begun, slm train --resume goes on with it",
    "finetune": f"{_WHOLE}; once training has begun, the same command goes on with it",
    "data": f"{_WHOLE}; slm data prepare goes on after the last whole file when it is called alike",
    "demo": f"{_WHOLE}; the steps that are done stay in the run, and slm demo begins another",
}

# Which extra brings a package, for the hint when it is missing.
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
        module = f"{cmd_name}_" if iskeyword(cmd_name) else cmd_name
        command: click.Command = getattr(import_module(f"slm.cli.{module}"), module)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of a failure; so does SLM_DEBUG=1.")
@click.version_option(__version__, prog_name="slm")
def cli() -> None:
    """From raw text to a verified, quantized small language model.

    \b
      slm train --data stories.txt      text        -> runs/NAME/checkpoint/best
      slm export --onnx                 checkpoint  -> runs/NAME/onnx
      slm quantize --int8               bundle      -> runs/NAME/onnx-int8
      slm generate -p "Once upon"       bundle      -> text

    A command given no input takes the newest suitable artifact under ./runs and says which. A name stands for a path: tiny,
    tiny/onnx-int8, tiny/best. docs/commands.md has the rules, and shell completion.
    """


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line and exits: 0 done, 1 failed, 2 used wrongly, 129, 130 or 143 interrupted."""
    open_closed_streams()
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    debug = "--debug" in arguments or os.environ.get("SLM_DEBUG", "") not in ("", "0")
    arguments = [
        argument for argument in arguments if argument != "--debug"
    ]  # after the command is as good as before it
    signal.signal(signal.SIGTERM, _terminate)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # which nohup has ignored
        signal.signal(signal.SIGHUP, _terminate)
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
    except BrokenPipeError:  # the reader of the pipe has exited: end quietly, as other tools do
        sys.exit(1)
    except Exception as error:
        if debug:
            traceback.print_exc()
        message, hint, code = _explain(error)
        say_error(message, hint)
        sys.exit(code)
    finally:
        settle_streams()
    sys.exit(0)


def _after_stopping(arguments: Sequence[str]) -> str:
    """Says what is left of a command that was stopped."""
    command = next((argument for argument in arguments if argument in COMMANDS), "")
    return _INTERRUPTED.get(command, _WHOLE)


class _Terminated(SystemExit):
    """SIGTERM or SIGHUP, on its way out through whatever has something to tidy up."""


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    raise _Terminated(128 + signum)


_FREE_SPACE = "free some, or name a place on another disk with --out"
_ELSEWHERE = "check the permissions, or name a place that you may write to with --out"
_OUT_OF_MEMORY = ("out of memory", "a smaller batch or context needs less", 1)


def _explain(error: Exception) -> tuple[str, str | None, int]:
    """Returns message, hint and exit code for an exception."""
    match error:
        case SlmError():
            return error.message, error.hint, 1
        case click.UsageError():
            command = error.ctx.command_path if error.ctx else "slm"
            return error.format_message(), f"{command} --help shows what it takes", 2
        case click.ClickException():
            return error.format_message(), None, 1
        case ModuleNotFoundError() if error.name and not error.name.startswith("slm"):
            extra = EXTRAS.get(error.name.partition(".")[0], "train")
            return f"this needs the package {error.name}", install_hint(extra), 1
        case OSError() if error.errno in (errno.ENOSPC, errno.EDQUOT):
            place = f" for {error.filename}" if error.filename else ""
            return f"no space left on the disk{place}", f"{_FREE_SPACE}; nothing is left half written", 1
        case OSError() if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and error.filename:
            return f"{error.strerror}: {error.filename}", _ELSEWHERE, 1
        case OSError() if error.strerror:
            return f"{error.strerror}: {error.filename}" if error.filename else error.strerror, None, 1
        case MemoryError():
            return _OUT_OF_MEMORY
        case RuntimeError() if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
            return _OUT_OF_MEMORY  # torch's, on CUDA and on the CPU
    return _unexpected(error)


def _unexpected(error: Exception) -> tuple[str, str, int]:
    text = " ".join(str(error).split())
    return f"unexpected {type(error).__name__}: {text}", "slm --debug ... shows where; please report it", 1
