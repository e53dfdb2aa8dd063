"""A training run from recipe to checkpoint: `RUN/config.yaml data/ checkpoint/{best,last} trainer/ metrics.jsonl loss.png`."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from slm.core.config import ModelConfig
from slm.core.errors import SlmError
from slm.core.machine import peak_rss_mib
from slm.core.nn import CausalLM, save_checkpoint
from slm.core.progress import Progress, Silent
from slm.core.tokenizer import END_OF_TEXT, END_OF_TURN, PAD, Tokenizer
from slm.core.weights import WEIGHTS_FILE
from slm.train.data.tokens import open_tokens
from slm.train.data.windows import gather, random_starts
from slm.train.evaluate import Check, Evaluation, evaluate
from slm.train.interrupt import held_back
from slm.train.learner import Learner
from slm.train.loop import Loop
from slm.train.metrics import Metrics, Row
from slm.train.optimizer import load_state_tensors, make_adamw, state_tensors
from slm.train.precision import capability, choose_precision
from slm.train.prepare import CONFIG, DATA, TRAIN_FILE, VALIDATION_FILE, prepare
from slm.train.recipe import Recipe, load_recipe
from slm.train.schedule import learning_rate
from slm.train.state import Counters, SavedState, load_state, save_state
from slm.version import __version__

_METRICS = ("loss", "perplexity", "bits_per_byte")
_MIB = 1 << 20
# float32 weights, gradients and AdamW's two moments.
_BYTES_PER_PARAMETER = 16


@dataclass(frozen=True)
class TrainResult:
    """What a run came to. Losses are nats a token on the held-out text.

    Attributes:
        run: The run's directory.
        checkpoint: The best checkpoint.
        loss_before: Before the first update.
        loss: Of the best checkpoint.
        perplexity: The exponential of it.
        bits_per_byte: The same by byte of text.
        parameters: Of the model, a tied head counted once.
        micro_steps: Of the whole run.
        updates: Of the whole run.
        tokens: Learned from in the whole run.
        tokens_s: Tokens over the seconds of training, evaluations included.
        elapsed_s: Those seconds, of a resumed run all of them.
        peak_rss_mib: Most memory that the process had resident.
    """

    run: Path
    checkpoint: Path
    loss_before: float
    loss: float
    perplexity: float
    bits_per_byte: float
    parameters: int
    micro_steps: int
    updates: int
    tokens: int
    tokens_s: float
    elapsed_s: float
    peak_rss_mib: float


def train(recipe: Recipe, out: Path, progress: Progress | None = None) -> TrainResult:
    """Trains a model from scratch.

    Args:
        recipe: Says everything; see `slm.train.recipe.load_recipe`.
        out: The run directory to make; nothing is left of it when the preparation fails.
        progress: Is told how it goes.

    Raises:
        SlmError: When data, tokenizer or directory will not do, or the loss is no longer finite.
    """
    progress = progress or Silent()
    pick_device(recipe.machine.device)  # before the work, not after it
    prepare(recipe, out, progress)
    return _Run(out, progress).go()


def resume(out: Path, progress: Progress | None = None) -> TrainResult:
    """Goes on with a run as if it had never stopped: the result is the same, bit for bit, on the same machine.

    Raises:
        SlmError: When the directory holds no run, or its files are damaged.
    """
    if not (out / CONFIG).is_file():
        raise SlmError(f"no run to go on with: {out} has no {CONFIG}", "slm train --data FILE starts one")
    return _Run(out, progress or Silent()).go()


def pick_device(wanted: str) -> torch.device:
    """Returns the device of a recipe's `machine.device`.

    Raises:
        SlmError: When it asks for CUDA and there is none.
    """
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise SlmError("PyTorch finds no CUDA device", "--set machine.device=cpu, or install PyTorch for CUDA")
    return torch.device("cuda" if available and wanted != "cpu" else "cpu")


def with_special_tokens(config: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """Returns the shape with the tokenizer's ids; the end of a turn ends a text too, for when turns are learned later."""
    end_of_text, end_of_turn, pad = (tokenizer.token_id(token) for token in (END_OF_TEXT, END_OF_TURN, PAD))
    ids = {"bos_token_id": end_of_text, "eos_token_id": (end_of_text, end_of_turn), "pad_token_id": pad}
    return ModelConfig.checked(config.model_dump() | ids)


class _Run:
    """A prepared run directory, opened to train in it."""

    def __init__(self, path: Path, progress: Progress) -> None:
        self.path = path
        self.progress = progress
        self.recipe = load_recipe(path / CONFIG)
        self.tokenizer = Tokenizer.load(path / DATA)
        self.train_tokens = open_tokens(path / DATA / TRAIN_FILE, self.tokenizer)
        self.validation_tokens = open_tokens(path / DATA / VALIDATION_FILE, self.tokenizer)
        self.device = pick_device(self.recipe.machine.device)
        self.config = with_special_tokens(self.recipe.model.config(), self.tokenizer)
        self.precision = choose_precision(
            self.recipe.machine.precision, capability(self.device), self.config.hidden_size
        )
        self.best, self.last = (path / "checkpoint" / name for name in ("best", "last"))

    def go(self) -> TrainResult:
        """Trains to the end."""
        recipe = self.recipe
        saved = load_state(self.path)
        counters = saved.counters if saved else Counters()
        metrics = Metrics(self.path, counters.micro_steps)
        learner = self._learner(saved)
        self._describe(counters)
        with held_back() as interruption:
            loop = Loop(
                learner,
                counters,
                metrics,
                updates=recipe.updates,
                tokens_per_micro_step=recipe.tokens_per_micro_step,
                evaluate=partial(self._evaluate, learner.model),
                evaluate_every=recipe.evaluation.every_micro_steps,
                keep_best=lambda row: self._save_checkpoint(self.best, learner.model, row["micro_steps"], row),
                save=partial(self._save, learner, metrics),
                last=self.last,
                interruption=interruption,
                progress=self.progress,
            )
            loop.run()
        return self._result(metrics, loop.elapsed_s)

    def _learner(self, saved: SavedState | None) -> Learner:
        """Builds the model, from the seed or from what was saved, and all that trains it."""
        recipe = self.recipe
        model = CausalLM(self.config)
        if saved is None:
            model.init_weights(torch.Generator().manual_seed(recipe.seed))
        else:
            model.load_state_dict(saved.weights, strict=False)  # a tied head is stored once
        model.to(self.device)
        fields = recipe.optimizer.model_dump()
        max_grad_norm = fields.pop("max_grad_norm")
        schedule = recipe.schedule
        optimizer = make_adamw(model, **fields)
        learner = Learner(
            model,
            optimizer,
            batch=self._batch,
            rate=partial(
                learning_rate,
                peak=schedule.learning_rate,
                final=schedule.final_learning_rate,
                start=schedule.start,
                warmup=schedule.warmup_micro_steps,
                total=schedule.micro_steps,
            ),
            precision=self.precision,
            accumulation=recipe.batch.accumulation,
            max_grad_norm=max_grad_norm,
        )
        if saved is not None:
            load_state_tensors(optimizer, model, saved.optimizer)
            learner.scaler.load_state_dict(saved.counters.scaler)
        return learner

    def _batch(self, micro_step: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids, batch = self.train_tokens.ids, self.recipe.batch
        starts = random_starts(len(ids), batch.batch_size, batch.context, self.recipe.seed, micro_step)
        return gather(ids, starts, batch.context, self.device)

    def _evaluate(self, model: CausalLM, check: Check) -> Evaluation:
        batch = self.recipe.batch
        return evaluate(
            model,
            self.validation_tokens,
            windows=self.recipe.evaluation.windows,
            context=batch.context,
            batch_size=batch.batch_size,
            check=check,
        )

    def _save(self, learner: Learner, metrics: Metrics, counters: Counters) -> None:
        measured = metrics.evaluations
        self._save_checkpoint(self.last, learner.model, counters.micro_steps, measured[-1] if measured else None)
        tensors = state_tensors(learner.optimizer, learner.model)
        save_state(self.path, counters, tensors, self.last / WEIGHTS_FILE)

    def _save_checkpoint(self, path: Path, model: CausalLM, micro_steps: int, measured: Row | None) -> None:
        recipe = self.recipe
        info = {
            "made_by": "slm train",
            "slm_version": __version__,
            "torch_version": torch.__version__,
            "parameters": self.config.parameter_count(),
            "micro_steps": micro_steps,
            "updates": micro_steps // recipe.batch.accumulation,
            "tokens": micro_steps * recipe.tokens_per_micro_step,
            "metrics": measured and {name: measured[name] for name in ("micro_steps", *_METRICS)},
            "seed": recipe.seed,
            "device": self.device.type,
            "precision": self.precision.name,
            "tokenizer_sha256": self.tokenizer.sha256,
            "data": {
                name: tokens.header.model_dump()
                for name, tokens in (("train", self.train_tokens), ("validation", self.validation_tokens))
            },
            "recipe": recipe.model_dump(mode="json"),
        }
        save_checkpoint(path, model, self.tokenizer, info)

    def _describe(self, counters: Counters) -> None:
        """Says what is about to run, and where."""
        recipe, note = self.recipe, self.progress.note
        parameters = self.config.parameter_count()
        note(
            f"model: {parameters:,} parameters, {parameters * _BYTES_PER_PARAMETER / _MIB:,.0f} MiB with gradients and "
            f"AdamW's moments; context {recipe.batch.context}, vocabulary {self.config.vocab_size:,}"
        )
        note(f"device: {_device_name(self.device)}, {self.precision.name}")
        tokens, stream = (
            recipe.updates * recipe.batch.accumulation * recipe.tokens_per_micro_step,
            self.train_tokens.ids,
        )
        note(
            f"run: {recipe.updates:,} updates of {recipe.batch.accumulation * recipe.tokens_per_micro_step:,} tokens, "
            f"{tokens:,} in all: {tokens / len(stream):.1f} times the training text's {len(stream):,}"
        )
        if counters.micro_steps:
            note(f"going on after {counters.micro_steps:,} micro-steps")

    def _result(self, metrics: Metrics, elapsed_s: float) -> TrainResult:
        best, recipe = metrics.best, self.recipe
        assert best is not None  # there is an update, and an evaluation after the last one
        micro_steps = recipe.updates * recipe.batch.accumulation
        tokens = micro_steps * recipe.tokens_per_micro_step
        return TrainResult(
            run=self.path,
            checkpoint=self.best,
            loss_before=metrics.evaluations[0]["loss"],
            **{name: best[name] for name in _METRICS},
            parameters=self.config.parameter_count(),
            micro_steps=micro_steps,
            updates=recipe.updates,
            tokens=tokens,
            tokens_s=tokens / elapsed_s,
            elapsed_s=elapsed_s,
            peak_rss_mib=peak_rss_mib(),
        )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'' if threads == 1 else 's'}"
