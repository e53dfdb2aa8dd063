"""The model of a fine-tuning run: the base on its device, with the adapter that is trained, if there is one."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

from slm.core.chat import knows_turns
from slm.core.nn import CausalLM, load_checkpoint
from slm.core.nn.fake_quant import fake_quantize
from slm.core.progress import Progress
from slm.finetune.adapter import TunableLM, adapter_state, attach
from slm.finetune.examples import Renderer
from slm.finetune.fit import Fit, Trainable
from slm.finetune.frozen import lighten
from slm.finetune.indistinct import indistinct_tokens
from slm.finetune.judge import Judge
from slm.finetune.preference import Preferences
from slm.finetune.preparation import Prepared
from slm.finetune.state import Standing
from slm.finetune.teacher import Teacher
from slm.train.precision import Precision


@dataclass(frozen=True)
class Built:
    """A base and its new adapter.

    Attributes:
        model: The base, whose modules the adapter wraps.
        adapter: The adapter; None if every weight is trained.
        rows: Tokens whose rows of the embedding the adapter trains.
        precision: The type of the products.
    """

    model: CausalLM
    adapter: PeftModel | None
    rows: tuple[int, ...]
    precision: Precision

    @property
    def tuned(self) -> TunableLM | CausalLM:
        """The model with what is trained."""
        return self.model if self.adapter is None else self.adapter.get_base_model()

    @property
    def modules(self) -> int:
        """Number of modules with an adapter."""
        return 0 if self.adapter is None else sum(isinstance(each, LoraLinear) for each in self.adapter.modules())

    def fit(
        self,
        found: Prepared,
        standing: Standing,
        *,
        refer: bool = True,
        teacher: Teacher | None = None,
        judge: Judge | None = None,
    ) -> Fit:
        """Returns the weights, ready for the first update. Called once: it changes how the frozen weights are stored.

        Args:
            found: The rows.
            standing: The position of a run that has not begun.
            teacher: The model whose predictions are learned; None learns the answers of the rows.
            judge: Scores the replies after each epoch; None chooses the epoch by the loss.
            refer: Whether to compute what the base says about preferences, which takes a pass over them.
        """
        material, settings = found.material(teacher), found.settings
        if self.adapter is None:
            trainable = Trainable(self.model, dict(self.model.named_parameters()))
        else:
            tunable: TunableLM = self.adapter.get_base_model()
            lighten(tunable, self.precision.autocast, settings.grid)
            trainable = Trainable(tunable, _parameters(self.adapter))
        if refer and isinstance(material, Preferences):
            assert settings.batch_size is not None
            material.refer(trainable.model, settings.batch_size, self.precision.autocast, lambda: None)
        return Fit(trainable, material, settings, self.precision, standing, judge)


def build(
    base: Path,
    base_info: Mapping[str, Any],
    found: Prepared,
    renderer: Renderer,
    device: torch.device,
    precision: Precision,
    progress: Progress,
) -> Built:
    """Loads a base, and attaches a new adapter, drawn with the seed, unless every weight is trained.

    Args:
        base: The checkpoint.
        base_info: Its record.
        found: The rows.
        renderer: Converts rows to token ids.
        device: The device.
        precision: The type of the products.
        progress: Receives notes.
    """
    settings = found.settings
    model, grid = load_checkpoint(base), settings.grid
    if grid is not None:
        progress.note(f"quantization-aware training for {grid.precision.upper()}: layers in {grid.description}")
        if settings.method == "full":
            fake_quantize(model, grid)
    model.to(device)
    # A base trained on plain text has never seen a turn token: their rows of the embedding are still random.
    turns = [] if not found.chats or knows_turns(base_info, renderer.tokenizer) else renderer.turn_token_ids()
    if settings.method == "full":
        return Built(model, None, (), precision)
    rows = _rows_to_train(turns, model, found, renderer, progress)
    torch.manual_seed(settings.seed)
    return Built(model, attach(model, settings, base, rows), tuple(rows), precision)


def _rows_to_train(
    turns: list[int], model: CausalLM, found: Prepared, renderer: Renderer, progress: Progress
) -> list[int]:
    """Returns the tokens whose rows of the embedding are trained: turn tokens, and those that the base cannot tell apart."""
    indistinct = indistinct_tokens(model.model.embed_tokens.weight, found.train.kept)
    if not indistinct:
        return turns
    count = len(indistinct)
    which = f"{count} tokens of the answers from others, because its text did not contain them; their rows"
    if count == 1:
        which = "1 token of the answers from others, because its text did not contain it; its row"
    progress.note(
        f"the base cannot distinguish {which} of the embedding {'is' if count == 1 else 'are'} trained too: "
        f"{renderer.spelt(indistinct)}"
    )
    return list(dict.fromkeys((*turns, *indistinct)))


def _parameters(adapter: PeftModel) -> dict[str, nn.Parameter]:
    """Returns an adapter's trained parameters by their names in its file."""
    # peft's state holds detached tensors; their addresses identify the parameters.
    places = {p.data_ptr(): p for p in adapter.parameters() if p.requires_grad}
    return {name: places[tensor.data_ptr()] for name, tensor in adapter_state(adapter).items()}
