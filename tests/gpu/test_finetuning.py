"""LoRA on the device with examples packed into rows: none sees another, and the loss falls."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from slm.core.nn import save_checkpoint
from slm.core.tokenizer import Tokenizer
from slm.finetune.run import finetune
from slm.finetune.settings import FinetuneSettings
from tests.conftest import random_model
from tests.gpu.conftest import Record
from tests.gpu.rig import Rig
from tests.progress import Notes

pytestmark = pytest.mark.gpu

LENGTHS = (20, 71, 33)
EPOCHS = 8
DTYPES = {"float32": torch.float32, "float16": torch.float16}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 256])
def test_packed_texts_do_not_see_each_other(rig: Rig, record: Record, head_dim: int, dtype: str) -> None:
    """Hidden states of a packed row against those of its texts alone; a row without borders is the control."""
    model = random_model(rig.config(head_dim)).to(rig.device).train()
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(0, 320, (1, length), generator=generator).to(rig.device) for length in LENGTHS]
    segments = torch.cat([torch.full_like(text, number) for number, text in enumerate(texts)], 1)

    @torch.no_grad()
    def hidden(ids: Tensor, segments: Tensor | None = None) -> Tensor:
        with torch.autocast(rig.device.type, dtype=DTYPES[dtype], enabled=dtype != "float32"):
            out: Tensor = model.model(ids, segments=segments).float()
        return out

    alone = torch.cat([hidden(text) for text in texts], 1)
    row = torch.cat(texts, 1)
    packed, joined = (
        float((hidden(row, borders) - alone).abs().max() / alone.abs().max()) for borders in (segments, None)
    )
    # Through all layers, of which each adds its own rounding.
    limit = len(model.model.layers) * rig.tolerance(DTYPES[dtype])
    record(f"packed row, head_dim {head_dim}, {dtype}", packed, limit)
    assert packed <= limit < joined


def test_a_packed_lora_learns(rig: Rig, tokenizer: Tokenizer, record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(Path("base"), random_model(rig.config(64)), tokenizer, {})
    rows = [{"prompt": f"The number {n}", "completion": f" is {n} and ends here."} for n in range(24)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if rig.rehearsal:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    settings = FinetuneSettings(pack=True, epochs=EPOCHS, batch_size=2, max_length=160)
    notes = Notes()
    result = finetune(Path("base"), Path("rows.jsonl"), Path("adapter"), settings, notes, samples=0)
    record("packed LoRA: loss before", result.loss_before, None, "nats")
    record("packed LoRA: loss after", result.loss_after, result.loss_before, "nats")
    assert any("packed into" in line for line in notes.lines)
    assert result.rows + result.validation_rows == len(rows) > result.updates / EPOCHS * settings.batch_size
    assert result.loss_after < 0.8 * result.loss_before
