"""Warnings about rows and settings of a fine-tuning run: what is probably a mistake, or has no effect."""

from collections.abc import Iterator, Sequence

from slm.core.config import ModelConfig
from slm.finetune.preparation import Prepared
from slm.finetune.rows import ChatRow, Row, TextRow
from slm.finetune.settings import FinetuneSettings
from slm.finetune.split import FEW_ROWS, repeated

# Factor by which a learning rate may differ from the default without a warning.
_FAR = 5.0
# Updates below which a run hardly changes the model.
_FEW_UPDATES = 30
# Scale of an adapter, alpha / rank, above which training is often unstable.
_LARGE_SCALE = 8.0
# Share of rows with the prompt of another row above which the shared prompt is what the rows are about, as in stories.
_SHARED = 0.5
# Marks of turns in rows of text.
_TURNS = ("<start_of_turn>", "<|im_start|>", "[INST]", "### Response:", "<|assistant|>", "\nAssistant:")
_OF_ADAPTERS = ("rank", "alpha", "rslora", "dora", "dropout", "target_modules")


def review(found: Prepared, given: FinetuneSettings, config: ModelConfig) -> list[str]:
    """Returns the warnings, one sentence each. `slm.finetune.preparation.prepare` reports rows that are cut or left out.

    Args:
        found: The rows, with the resolved settings.
        given: The settings as the user gave them.
        config: The shape of the base.
    """
    return [*_rows(found), *_settings(found, given, config), *_ineffective(found, given)]


def _rows(found: Prepared) -> Iterator[str]:
    rows = found.split.train
    if len(found.train.kept) < FEW_ROWS:
        yield f"{len(found.train.kept)} training rows are few: the model will repeat them rather than learn from them"
    equal, conflicting = repeated(rows)
    if equal:
        yield f"{equal} of {len(rows)} training rows equal an earlier row, and count more than once"
    if 0 < conflicting <= _SHARED * len(rows) and found.pairs is None:
        yield (
            f"{conflicting} of {len(rows)} training rows have the prompt of an earlier row and another answer: the model "
            "learns a mixture"
        )
    turns = _texts_with_turns(rows)
    if turns:
        yield (
            f"{turns} rows of text contain turns, such as {', '.join(_TURNS[:2])} or {_TURNS[3]!r}: their loss covers the "
            "prompts as well; give messages, or prompt and completion"
        )
    messages = [message for row in rows if isinstance(row, ChatRow) for message in row.messages]
    if any(each.get("calls") for each in messages) and not any(each["role"] == "tool" for each in messages):
        yield (
            "no training row has the result of a call: the model learns to make calls, but not to answer when it reads their "
            "results, and may make the same calls again"
        )


def _texts_with_turns(rows: Sequence[Row]) -> int:
    return sum(isinstance(row, TextRow) and any(mark in row.text for mark in _TURNS) for row in rows)


def _settings(found: Prepared, given: FinetuneSettings, config: ModelConfig) -> Iterator[str]:
    settings = found.settings
    assert settings.learning_rate is not None and settings.batch_size is not None and settings.epochs is not None
    usual = given.model_copy(update={"learning_rate": None}).resolved(
        config, len(found.train.kept), len(found.rows), preferences=found.pairs is not None
    )
    assert usual.learning_rate is not None
    ratio = settings.learning_rate / usual.learning_rate
    if ratio > _FAR:
        yield (
            f"the learning rate {settings.learning_rate:g} is {ratio:,.0f} times the default for this model and these rows, "
            f"{usual.learning_rate:.2g}: the loss may rise"
        )
    elif ratio < 1 / _FAR:
        yield (
            f"the learning rate {settings.learning_rate:g} is 1/{1 / ratio:,.0f} of the default for this model and these "
            f"rows, {usual.learning_rate:.2g}: the model may learn little"
        )
    rows = len(found.pairs[0]) if found.pairs is not None else len(found.rows)
    updates = settings.epochs * -(-rows // settings.batch_size)
    if updates < _FEW_UPDATES:
        yield f"the run has only {updates} updates: more epochs or a smaller batch size let the model learn more"
    elif settings.batch_size > rows:
        yield f"the batch size of {settings.batch_size} is larger than the number of rows, {rows}"
    if settings.method == "lora" and settings.alpha / settings.rank > _LARGE_SCALE and not settings.rslora:
        yield f"alpha / rank is {settings.alpha / settings.rank:g}: a scale this large often makes training unstable"
    if settings.method == "lora" and settings.rank >= config.hidden_size:
        yield (
            f"the rank of {settings.rank} is not below the model's width of {config.hidden_size}: the adapter is as large as "
            "the weights"
        )


def _ineffective(found: Prepared, given: FinetuneSettings) -> Iterator[str]:
    """Yields a warning for each setting that another one makes ineffective."""
    without_effect = [(name, given.method == "full", "with training.method=full") for name in _OF_ADAPTERS]
    without_effect += [
        ("beta", found.pairs is None, "without rows that have chosen and rejected"),
        ("patience", given.keep == "last", "with training.keep=last"),
    ]
    for name, applies, why in without_effect:
        if applies and getattr(given, name) not in (type(given).model_fields[name].default, None):
            yield f"training.{name} has no effect {why}"
