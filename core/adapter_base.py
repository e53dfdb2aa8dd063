"""The base model of an adapter, recorded in its `slm.json` with the hashes of weights and tokenizer."""

from pathlib import Path
from typing import Any

from slm.core.checkpoint import read_info
from slm.core.errors import SlmError
from slm.core.tokenizer import Tokenizer
from slm.core.weights import weights_sha256


def base_record(base: Path, tokenizer: Tokenizer) -> dict[str, str]:
    """Returns the record of a base model for an adapter's `slm.json`."""
    return {
        "path": str(base.resolve()),
        "weights_sha256": weights_sha256(base),
        "tokenizer_sha256": tokenizer.sha256,
    }


def check_base(adapter: Path, base: Path, weights: str | None) -> None:
    """Checks that an adapter was trained on a base. Adapters of other programs do not record a base and pass.

    Args:
        adapter: The adapter's directory in PEFT's format.
        base: A checkpoint or a bundle, which contains its tokenizer.
        weights: The hash of the base's weights; None if unknown.

    Raises:
        SlmError: If the recorded weights or tokenizer differ from the base's. The message names both bases.
    """
    recorded: Any = read_info(adapter).get("base")
    if not isinstance(recorded, dict):
        return
    wanted = recorded.get("weights_sha256")
    if wanted and weights and wanted != weights:
        raise SlmError(
            f"{adapter} was trained on {recorded.get('path')} (weights {str(wanted)[:12]}), not on {base} "
            f"({weights[:12]})",
            "use the base that the adapter was trained on, or fine-tune again on this one",
        )
    wanted = recorded.get("tokenizer_sha256")
    if wanted and wanted != Tokenizer.load(base).sha256:
        raise SlmError(
            f"{adapter} was trained with a tokenizer that differs from the one of {base}",
            "use the base that the adapter was trained on, or fine-tune again on this one",
        )
