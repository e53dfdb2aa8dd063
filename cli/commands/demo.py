"""`slm demo`: runs the complete workflow on the bundled text, and verifies each step."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from slm.cli.console import STDOUT, RichProgress, print_json, print_table, say
from slm.cli.following import asking, next_step
from slm.cli.options import json_option, out_option_for
from slm.core.chat import turn_ids
from slm.core.errors import SlmError
from slm.core.manifest import Bundle
from slm.core.outputs import check_writable
from slm.core.processes import peak_rss_mib
from slm.core.runs import free_run

PROMPT = "One day, a little"
REQUEST = "Tell me a story about a fox who finds a key."
NEW_TOKENS = 60


@dataclass(frozen=True)
class Step:
    """One row of the table: the artifact, its verification, and the time."""

    name: str
    made: str
    proved: str
    seconds: float


@click.command()
@out_option_for("run", "a new runs/demo")
@json_option
def demo(out: Path | None, as_json: bool) -> None:
    """Run the complete workflow on bundled data.

    Train, export, quantize, fine-tune with LoRA, merge, export and quantize again. Each step is compared with the previous
    one, and the texts that each model generates are shown.

    \b
      slm demo
      slm demo --json --out runs/mine
    """
    out = out or free_run("demo")
    if out.exists():
        raise SlmError(f"{out} exists", "name another --out; slm demo replaces nothing")
    check_writable(out)
    started = time.perf_counter()
    chain = _Chain(out)
    chain.train()
    chain.export()
    chain.quantize()
    chain.finetune()
    chain.deploy_adapter()
    texts = chain.texts()
    seconds = time.perf_counter() - started
    if as_json:
        figures = {"run": str(out), "seconds": round(seconds, 1), "peak_rss_mib": round(peak_rss_mib())}
        print_json(figures | {"steps": chain.figures, "texts": texts, "next": asking(chain.tuned_int8)})
        return
    rows = [(step.name, step.made, step.proved, f"{step.seconds:.0f} s") for step in chain.steps]
    print_table(f"{out}: each step compared with the previous one", ("step", "artifact", "verification", "time"), rows)
    for name, text in texts.items():
        STDOUT.print(f"\n[bold]{name}[/]")
        click.echo(text)
    say(f"\n{seconds:.0f} s in total, peak memory {peak_rss_mib():,.0f} MiB")
    next_step(asking(chain.tuned_int8))


class _Chain:
    """The steps in order; each writes its artifact to the run and adds a row to the table."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.progress = RichProgress()
        self.steps: list[Step] = []
        self.figures: dict[str, Any] = {}

    def train(self) -> None:
        """Trains a checkpoint on the bundled text."""
        from slm.train.recipe import load_recipe
        from slm.train.run import train

        result = train(load_recipe("tiny"), self.out, self.progress)
        self.checkpoint = result.checkpoint
        self._row(
            "train",
            f"{result.parameters:,} parameters, {result.tokens / 1e3:,.0f}k tokens at {result.tokens_s:,.0f}/s",
            f"held-out loss {result.loss_before:.2f} to {result.loss:.2f}, {result.bits_per_byte:.2f} bits per byte",
            result.elapsed_s,
            loss_before=result.loss_before,
            loss=result.loss,
            bits_per_byte=result.bits_per_byte,
        )

    def export(self) -> None:
        """Exports the checkpoint to a bundle."""
        self.bundle = self._export("export", self.checkpoint, self.out / "onnx")

    def quantize(self) -> None:
        """Quantizes the bundle to INT8."""
        self.int8 = self._quantize("quantize", self.bundle)

    def finetune(self) -> None:
        """Fine-tunes the checkpoint to a LoRA adapter."""
        from slm.core import sample
        from slm.finetune.preparation import RowFiles
        from slm.finetune.run import finetune

        self.adapter = self.out / "adapters" / "pairs"
        rows = RowFiles(sample.pairs_path(), hold_out=0.1)
        result = finetune(self.checkpoint, rows, self.adapter, progress=self.progress, samples=0)
        self._row(
            "finetune",
            f"LoRA adapter of {result.trainable_parameters:,} parameters from {result.rows} instructions",
            f"held-out loss {result.loss_before:.2f} to {result.loss_after:.2f}",
            result.seconds,
            loss_before=result.loss_before,
            loss_after=result.loss_after,
        )

    def deploy_adapter(self) -> None:
        """Merges the adapter, exports the merged checkpoint, and quantizes the bundle."""
        from slm.finetune.merge import merged_checkpoint

        merged = self.out / "checkpoint" / "pairs"
        merged_checkpoint(self.checkpoint, self.adapter, merged)
        self.tuned = self._export("export tuned", merged, self.out / "onnx-pairs")
        self.tuned_int8 = self._quantize("quantize tuned", self.tuned)
        self.merged = merged

    def texts(self) -> dict[str, str]:
        """Returns a greedy completion of each model; a float32 bundle must generate the same text as its checkpoint."""
        stages = {
            "checkpoint (PyTorch)": self.checkpoint,
            "bundle (float32)": self.bundle.path,
            "bundle (INT8)": self.int8.path,
            "tuned checkpoint (PyTorch)": self.merged,
            "tuned bundle (float32)": self.tuned.path,
            "tuned bundle (INT8)": self.tuned_int8.path,
        }
        texts, rates = {}, {}
        for name, path in stages.items():
            texts[name], rates[name] = _answer(path, tuned="tuned" in name)
        for tuned in ("", "tuned "):
            if texts[f"{tuned}bundle (float32)"] != texts[f"{tuned}checkpoint (PyTorch)"]:
                raise SlmError(f"the {tuned}bundle generates a different text than its checkpoint", "please report it")
        self._row(
            "generate",
            ", ".join(f"{rates[name]:,.0f} tokens/s {kind}" for name, kind in _SHOWN.items()),
            "float32 bundles generate the same text as their checkpoints",
            0.0,
            decode_tok_s=rates,
        )
        texts = {name: f"{REQUEST}\n{t}" if "tuned" in name else PROMPT + t for name, t in texts.items()}
        return texts

    def _export(self, name: str, checkpoint: Path, out: Path) -> Bundle:
        from slm.export.bundle import export_bundle

        started = time.perf_counter()
        bundle = export_bundle(checkpoint, out, progress=self.progress)
        parity = bundle.manifest.parity
        assert parity is not None
        self._row(
            name,
            f"ONNX bundle of {bundle.bytes / 1e6:.1f} MB",
            f"matches PyTorch within {parity.largest:.0e} over {parity.tokens} tokens "
            f"(window {bundle.config.sliding_window})",
            time.perf_counter() - started,
            bytes=bundle.bytes,
            parity=parity.largest,
        )
        return bundle

    def _quantize(self, name: str, source: Bundle) -> Bundle:
        from slm.quantize.make import quantize_bundle
        from slm.quantize.texts import measuring_text

        started = time.perf_counter()
        out = source.path.with_name(f"{source.path.name}-int8")
        bundle, _ = quantize_bundle(source, out, measuring_text(source, None), progress=self.progress)
        quality = bundle.manifest.quality
        assert quality is not None
        self._row(
            name,
            f"INT8 bundle of {bundle.bytes / 1e6:.1f} MB",
            f"KL {quality.kl_nats:.4f} nats, {quality.same_top1:.1%} same top-1, "
            f"perplexity {quality.perplexity_before:.2f} to {quality.perplexity_after:.2f}",
            time.perf_counter() - started,
            bytes=bundle.bytes,
            kl_nats=quality.kl_nats,
            same_top1=quality.same_top1,
        )
        return bundle

    def _row(self, name: str, made: str, proved: str, seconds: float, **figures: Any) -> None:
        self.steps.append(Step(name, made, proved, seconds))
        self.figures[name] = figures | {"seconds": round(seconds, 1)}
        say(f"{name}: {made}; {proved}")


_SHOWN = {"checkpoint (PyTorch)": "PyTorch", "bundle (float32)": "float32", "bundle (INT8)": "INT8"}


def _answer(path: Path, tuned: bool) -> tuple[str, float]:
    """Returns a greedy completion (for a tuned model, the answer to a request) and the decoding speed in tokens/s."""
    from slm.loading import load

    model = load(path)
    prompt = turn_ids(model.tokenizer, REQUEST, model.stop_token_ids) if tuned else PROMPT
    result = model.complete(prompt, max_new_tokens=NEW_TOKENS, temperature=0)
    return result.text, result.decode_tok_s or 0.0
