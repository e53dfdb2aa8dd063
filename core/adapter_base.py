"""Which base an adapter was trained on, as its `slm.json` records it: weights and tokenizer by their hashes."""

from pathlib import Path
from typing import Any

from slm.core.checkpoint import read_info
from slm.core.errors import SlmError
from slm.core.tokenizer import Tokenizer
from slm.core.weights import weights_sha256


def base_record(base: Path, tokenizer: Tokenizer) -> dict[str, str]:
    """Returns what an adapter's record says of the base that it is trained on."""
    return {
        "path": str(base.resolve()),
        "weights_sha256": weights_sha256(base),
        "tokenizer_sha256": tokenizer.sha256,
    }


def check_base(adapter: Path, base: Path, weights: str | None) -> None:
    """Compares a base with the one that an adapter says it was trained on; an adapter made elsewhere may not say.

    Args:
        adapter: PEFT's directory.
        base: A checkpoint or a bundle; its tokenizer lies in it.
        weights: Hash of the base's weights; None where nobody knows.

    Raises:
        SlmError: When weights or tokenizer are others; both bases are named.
    """
    recorded: Any = read_info(adapter).get("base")
    if not isinstance(recorded, dict):
        return
    wanted = recorded.get("weights_sha256")
    if wanted and weights and wanted != weights:
        raise SlmError(
            f"{adapter} was trained on {recorded.get('path')} (weights {str(wanted)[:12]}), not on {base} "
            f"({weights[:12]})",
            "name the base that it was trained on, or fine-tune again on this one",
        )
    wanted = recorded.get("tokenizer_sha256")
    if wanted and wanted != Tokenizer.load(base).sha256:
        raise SlmError(
            f"{adapter} was trained with another tokenizer than that of {base}",
            "its ids would mean other texts; name the base that it was trained on, or fine-tune again on this one",
        )
