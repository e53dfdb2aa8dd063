"""`slm bench`."""

import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click

from slm.cli import bench_report
from slm.cli.choosing import default_model
from slm.cli.console import RichProgress, print_json, say
from slm.cli.options import (
    Artifact,
    FilePath,
    Loading,
    Whole,
    allow_slow_option,
    collects,
    collects_loading,
    cuda_graph_option,
    json_option,
    threads_option,
    trust_option,
)
from slm.cli.sampling import warn_of_conversions
from slm.core import child
from slm.core.arguments import MAX_COUNT
from slm.core.errors import SlmError
from slm.core.machine import instruction_sets, memory, processor_name, return_freed_memory
from slm.core.processes import peak_rss_mib, resident_mib
from slm.version import __version__

if TYPE_CHECKING:
    from slm.runtime.backend import Decoder
    from slm.runtime.bench import Case, MakeRows, Measured, Spread, Timing

_PROMPTS = "128,512,2048"
_FRESH_TOKENS = 8


def _numbers(context: click.Context, parameter: click.Parameter, value: str) -> list[int]:
    """Parses a list of numbers such as 128,512,2048."""
    try:
        numbers = [int(part) for part in value.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1 or max(numbers) > MAX_COUNT or len(numbers) > 100:
        raise click.BadParameter(f"{value!r} is not a list of numbers such as {_PROMPTS}")
    return sorted(set(numbers))


@dataclass(frozen=True)
class BenchPlan:
    """Which cases are measured, and how often.

    Attributes:
        prompts: Prompt lengths in tokens, ascending.
        batches: Batch sizes, ascending.
        new: New tokens per row.
        rounds: Timings of each case.
    """

    prompts: list[int]
    batches: list[int]
    new: int
    rounds: int


@click.command()
@click.argument("model", type=Artifact(), required=False)
@click.option(
    "--prompt",
    "prompts",
    default=_PROMPTS,
    callback=_numbers,
    show_default=True,
    metavar="N,N",
    help="Prompt lengths, in tokens.",
)
@click.option(
    "--batch", "batches", default="1,8", callback=_numbers, show_default=True, metavar="B,B", help="Batch sizes."
)
@click.option("--new", type=Whole(2), default=32, show_default=True, metavar="N", help="New tokens per row.")
@click.option("--rounds", type=Whole(1, 10_000), default=5, show_default=True, help="Timings of each case.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@cuda_graph_option
@threads_option
@click.option("--plot", type=FilePath(directories=False), metavar="FILE.png", help="Write a plot of the speeds.")
@click.option(
    "--compare",
    type=FilePath(directories=False),
    metavar="OLD.json",
    help="Compare with the --json report of an earlier run.",
)
@trust_option
@allow_slow_option
@json_option
@collects_loading
@collects("plan", BenchPlan)
def bench(
    model: Path | None, plan: BenchPlan, loading: Loading, plot: Path | None, compare: Path | None, as_json: bool
) -> None:
    """Measure the speed and memory of a bundle (onnxruntime) or a checkpoint (PyTorch).

    Without MODEL, uses the newest finished model under ./runs, or the bundled demo model if there is none. Time to first
    token, prefill and decode speed are medians of rounds in which all cases take turns; every round also measures the read
    speed of memory. Loading and memory are measured in separate processes.

    \b
      slm bench
      slm bench runs/tiny/onnx-int8 --prompt 128,4000 --batch 1,4 --plot speed.png
      slm bench --json > before.json;  slm bench --compare before.json

    docs/benchmarks.md defines each figure.
    """
    if plot is not None and find_spec("matplotlib") is None:
        raise SlmError("--plot needs matplotlib, which is not installed", "pip install matplotlib")
    if plot is not None:
        bench_report.check_plot(plot)
    old = None if compare is None else bench_report.read(compare)
    report = _report(model or default_model(), plan, loading)
    compared = None if old is None else bench_report.compare(report, old)
    if plot is not None:
        bench_report.plot(report, old, plot)
    if as_json:
        print_json(report if compared is None else report | {"compared": compared})
        return
    bench_report.print_report(report)
    if compared is not None:
        bench_report.print_comparison(compared, str(compare))


def _report(path: Path, plan: BenchPlan, loading: Loading) -> dict[str, Any]:
    """Measures a model and returns the report."""
    from slm.loading import load

    device = loading["device"]
    decoder = load(path, **loading).decoder
    say(f"{path}: {decoder.description}")
    warn_of_conversions(decoder, device)
    plan = _fitting(plan, decoder.context)
    report = _about(path, decoder) | {"device": device, "rounds": plan.rounds, "new_tokens": plan.new}
    timings = _measure(decoder, plan, report["threads"], device)
    del decoder  # frees the memory for the following measurements
    fresh = _fresh_processes(path, plan, loading)
    return report | {
        "load_ms": _rounded(median(figures["load_ms"] for figures in fresh)),
        "memory": [{"prompt": prompt} | figures for prompt, figures in zip(plan.prompts, fresh, strict=True)],
        "read_gb_s": _read_rate(timings),
        "results": [_row(timing) for timing in timings],
    }


def _fitting(plan: BenchPlan, context: int) -> BenchPlan:
    """Returns the plan with the prompt lengths that fit into the context.

    Raises:
        SlmError: If a requested length does not fit, or none of the defaults does.
    """
    prompts, new = plan.prompts, plan.new
    fitting = [prompt for prompt in prompts if prompt + new <= context]
    asked = click.get_current_context().get_parameter_source("prompts") != click.core.ParameterSource.DEFAULT
    if not fitting or (asked and fitting != prompts):
        raise SlmError(
            f"{prompts[-1] if asked else prompts[0]:,} tokens and {new:,} new ones do not fit into the context of {context:,}",
            "use a shorter --prompt or a smaller --new",
        )
    if fitting != prompts:
        say(
            f"the context is {context:,} tokens; omitted prompt lengths: "
            + ", ".join(f"{prompt:,}" for prompt in prompts if prompt not in fitting)
        )
    return replace(plan, prompts=fitting)


def _about(path: Path, decoder: "Decoder") -> dict[str, Any]:
    """Returns the report's fields about the model, the machine and the versions."""
    import onnxruntime

    from slm.core.weights import bytes_on_disk, weights_sha256
    from slm.runtime.decoder import OnnxDecoder

    versions = {"slm": __version__, "onnxruntime": onnxruntime.__version__, "python": platform.python_version()}
    about = {
        "schema_version": bench_report.SCHEMA_VERSION,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": str(path),
        "backend": decoder.description,
    }
    if isinstance(decoder, OnnxDecoder):
        manifest = decoder.bundle.manifest
        data = manifest.files.get(f"{manifest.model}_data", manifest.files[manifest.model])
        about |= {
            "precision": manifest.precision,
            "parameters": manifest.parameters,
            "weights_sha256": data.sha256,
            "file_bytes": decoder.bundle.bytes,
            "threads": decoder.session.get_session_options().intra_op_num_threads,
        }
    else:
        import torch

        from slm.core.checkpoint import read_config

        versions |= {"torch": torch.__version__}
        about |= {
            "precision": "float32",
            "parameters": read_config(path).parameter_count(),
            "weights_sha256": weights_sha256(path),
            "file_bytes": bytes_on_disk(path),
            "threads": torch.get_num_threads(),
        }
    room = memory()
    machine = {
        "processor": processor_name(),
        "system": platform.system(),
        "instruction_sets": [name for name, has in instruction_sets().items() if has],
        "memory_bytes": room.total,
    }
    return about | {"versions": versions, "machine": machine}


def _measure(decoder: "Decoder", plan: BenchPlan, threads: int, device: str) -> "list[Timing]":
    from slm.runtime.bench import Case, ReadProbe, measure

    cases = [Case(prompt, batch) for batch in plan.batches for prompt in plan.prompts]
    model = _measured(decoder)
    # A GPU is not limited by the host's memory.
    probe = ReadProbe(model.step_bytes(cases[0]), threads) if device == "cpu" else None
    try:
        return measure(model, cases, probe, new=plan.new, rounds=plan.rounds, progress=RichProgress())
    finally:
        if probe is not None:
            probe.close()


def _measured(decoder: "Decoder") -> "Measured":
    """Returns the model as the benchmark measures it, with its backend's way to create rows."""
    from slm.core.contract import cache_layers
    from slm.runtime import bench
    from slm.runtime.decoder import OnnxDecoder

    if isinstance(decoder, OnnxDecoder):
        make_rows, layers = bench.onnx_rows(decoder), decoder.bundle.manifest.cache
        weights = bench.weight_bytes_read(decoder.bundle)
    else:
        from slm.core.nn.decoder import TorchDecoder

        assert isinstance(decoder, TorchDecoder)
        make_rows, layers = _torch_rows(decoder), cache_layers(decoder.model.config)
        weights = bench.float32_weight_bytes_read(decoder.model.config)
    return bench.Measured(
        decoder, make_rows, lambda case: weights + case.batch * bench.cache_bytes_read(layers, case.prompt)
    )


def _torch_rows(decoder: Any) -> "MakeRows":
    """Returns a function that creates rows of a checkpoint, with caches of ones of the prompt's length."""
    import torch

    from slm.core.nn.cache import KVCache

    model, config = decoder.model, decoder.model.config
    device = model.model.embed_tokens.weight.device

    class TorchRows:
        def __init__(self, case: "Case", new: int) -> None:
            self._cache = KVCache(config)
            self._cache.length = case.prompt
            for layer in self._cache.layers:
                kept = case.prompt if layer.window is None else min(case.prompt, layer.window - 1)
                shape = (case.batch, config.num_key_value_heads, kept, config.head_dim)
                layer.key, layer.value = torch.ones(shape, device=device), torch.ones(shape, device=device)

        @torch.inference_mode()
        def step(self, ids: Any) -> Any:
            logits = model(torch.as_tensor(ids, device=device), cache=self._cache, num_logits_to_keep=1)
            return logits[:, -1].float().cpu().numpy()

    return TorchRows


def _fresh_processes(path: Path, plan: BenchPlan, loading: Loading) -> list[dict[str, float]]:
    progress = RichProgress()
    progress.start("loading and memory", len(plan.prompts), "processes")
    try:
        found = []
        for prompt in plan.prompts:
            found.append(fresh_process(path, prompt, new=min(plan.new, _FRESH_TOKENS), **loading))
            progress.advance()
        return found
    finally:
        progress.finish()


def fresh_process(path: Path, prompt: int, *, new: int = _FRESH_TOKENS, **how: Any) -> dict[str, float]:
    """Loads a model in a new process, which reads a prompt and generates a few tokens.

    Args:
        path: A bundle or a checkpoint.
        prompt: Tokens of the prompt.
        new: Tokens to generate.
        **how: Options of `slm.load`, such as `device` and `threads`.

    Returns:
        `load_ms`, including imports and file checks; `ttft_ms` of the first prompt; `rss_mib`, resident memory during
        decode; and `peak_rss_mib`, its peak in the whole process.

    Raises:
        SlmError: If the process fails; the message is the last line of its output.
    """
    arguments = json.dumps([str(path.resolve()), prompt, new, how])
    done = child.run("from slm.cli.commands.bench import in_fresh_process; in_fresh_process()", arguments)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
        raise SlmError(f"a process that loads {path} failed: {said[-1]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def in_fresh_process() -> None:
    """Runs in the new process of `fresh_process` and prints its figures."""
    path, prompt, new, how = json.loads(sys.argv[1])
    return_freed_memory()  # the same setting as slm generate
    started = time.perf_counter()
    from slm.loading import load
    from slm.runtime.bench import prompt_ids

    decoder = load(path, **how).decoder
    loaded = time.perf_counter()
    token = int(decoder.read(prompt_ids(prompt, decoder.vocab_size)).argmax())
    first = time.perf_counter()
    for _ in range(new - 1):
        token = int(decoder.read([token]).argmax())
    resident = resident_mib()
    figures = {
        "load_ms": _rounded(1e3 * (loaded - started)),
        "ttft_ms": _rounded(1e3 * (first - loaded)),
        "rss_mib": None if resident is None else _rounded(resident),
        "peak_rss_mib": _rounded(peak_rss_mib()),
    }
    sys.stdout.write(json.dumps(figures) + "\n")


def _row(timing: "Timing") -> dict[str, Any]:
    return {
        **asdict(timing.case),
        "ttft_ms": _spread(timing.ttft_ms),
        "prefill_tok_s": _spread(timing.prefill_tok_s),
        "decode_tok_s": _spread(timing.decode_tok_s),
        "step_ms": _spread(timing.step_ms),
        "step_bytes": timing.step_bytes,
        "memory_share": _spread(timing.memory_share),
    }


def _read_rate(timings: "Sequence[Timing]") -> dict[str, float] | None:
    from slm.runtime.bench import Spread

    rates = timings[0].read_rate
    return _spread(Spread.of([rate / 1e9 for rate in rates])) if rates else None


def _spread(spread: "Spread | None") -> dict[str, float] | None:
    return None if spread is None else {name: _rounded(value) for name, value in asdict(spread).items()}


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
