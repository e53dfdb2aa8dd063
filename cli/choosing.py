"""The default inputs of commands, as `slm.steps.choosing` chooses them; each function prints one line about the choice."""

from pathlib import Path

from slm.cli.console import say
from slm.steps import choosing


def default_model(*, bundle: bool = False) -> Path:
    """Returns the newest finished model; see `slm.steps.choosing.default_model`."""
    return choosing.default_model(say, bundle=bundle)


def default_checkpoint() -> Path:
    """Returns the newest finished checkpoint; see `slm.steps.choosing.default_checkpoint`."""
    return choosing.default_checkpoint(say)


def default_bundle() -> Path:
    """Returns the newest bundle; see `slm.steps.choosing.default_bundle`."""
    return choosing.default_bundle(say)


def base_of(adapter: Path) -> Path:
    """Returns the checkpoint that an adapter was trained on; see `slm.steps.choosing.base_of`."""
    return choosing.base_of(adapter, say)
