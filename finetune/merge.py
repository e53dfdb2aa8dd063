"""Merging an adapter into its base, which gives a plain model."""

from pathlib import Path

from slm.core.adapter_base import check_base
from slm.core.chat import ending_turns
from slm.core.checkpoint import notices_of, read_info
from slm.core.files import sha256_file
from slm.core.licence import modified, recorded_notices
from slm.core.nn import CausalLM, load_checkpoint, save_checkpoint
from slm.core.nn.fake_quant import round_weights
from slm.core.qat import RECORD, recorded_grid, without_grid
from slm.core.tokenizer import Tokenizer
from slm.core.tuned_rows import tuned_on, without_samples
from slm.core.weights import has_weights, weights_sha256
from slm.finetune.adapter import ADAPTER_WEIGHTS_FILE, load_adapter


def merge(base: Path, adapter: Path) -> CausalLM:
    """Returns the base with each adapted W replaced by W + alpha / rank * B A, and with the trained embedding rows.

    Computes in float32. A tied head stays tied: a trained row belongs to both embedding and head. If the adapter was trained on
    a grid, the result has rounded weights, which are those that training computed with.

    Raises:
        SlmError: When the adapter is damaged, does not fit, or was trained on another base.
    """
    check_base(adapter, base, weights_sha256(base) if has_weights(base) else None)
    model = load_checkpoint(base)
    # peft restores plain modules in place of its wrappers, inside the model itself.
    load_adapter(model, adapter).merge_and_unload()
    grid = recorded_grid(read_info(adapter))
    if grid is not None:
        round_weights(model, grid)
    return model.requires_grad_(True).eval()


def merged_checkpoint(base: Path, adapter: Path, out: Path) -> None:
    """Merges an adapter into its base and writes the result as a checkpoint, whole or not at all.

    Raises:
        SlmError: As `merge`.
    """
    model = merge(base, adapter)
    tuned = read_info(adapter)
    # An adapter may state its own licence; notices that both state appear once.
    notices = tuple(dict.fromkeys((*notices_of(base), *recorded_notices(tuned))))
    info = without_grid(read_info(base)) | {
        **({RECORD: tuned[RECORD]} if RECORD in tuned else {}),
        **tuned_on(tuned),
        "merged": {
            "base": {"path": str(base), "weights_sha256": weights_sha256(base)},
            "adapter": {"path": str(adapter), "weights_sha256": sha256_file(adapter / ADAPTER_WEIGHTS_FILE)},
            "finetune": without_samples({"finetune": tuned})["finetune"],
        },
        "notices": modified(notices, "merged with a LoRA adapter"),
    }
    tokenizer = Tokenizer.load(base)
    if tuned.get("turns"):
        model.config = ending_turns(model.config, tokenizer)
    save_checkpoint(out, model, tokenizer, info)
