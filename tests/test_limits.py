"""docs/limits.md states the limits that the code has."""

import re
from pathlib import Path

import click
import pytest

from slm.cli.commands.finetune import finetune
from slm.core import (
    name_patterns,
    peft_fields,
    template,
    template_worker,
    tokenizer_components,
    tokenizer_fields,
    tokenizer_regex,
    tokenizer_rules,
)
from slm.core.machine import MAX_THREADS
from slm.core.metrics import objects
from slm.core.text import csv_rows, files, parquet_rows, streams
from slm.finetune import rows, task
from slm.runtime import constraint, evaluate, schema_check
from slm.serve import body, connections, fields, messages, middleware, requests
from slm.serve.service import Limits

PAGE = (Path(__file__).parents[1] / "docs" / "limits.md").read_text(encoding="utf-8")


def mib(number: int) -> str:
    return streams.size(number)


@pytest.mark.parametrize(
    ("what", "stated"),
    [
        ("a row, a cell, a document", [mib(streams.DOCUMENT_BYTES)]),
        ("the rows of `slm finetune` together", [mib(rows.DATA_BYTES)]),
        ("choices of a row", [f"{task._MOST_CHOICES:,}; {task._MOST_DISTINCT}"]),
        ("nesting of JSON that is compared", [f"{objects._DEEPEST} levels"]),
        ("wrong rows", [f"{rows._MOST_BAD:,}"]),
        ("decoding Parquet", [mib(parquet_rows._DECODING_BYTES)]),
        ("columns of a table", [f"{csv_rows.MOST_COLUMNS:,}"]),
        ("files and directories", [f"{files._MOST_ENTRIES:,}"]),
        ("memory of decompressors", [mib(streams._XZ_BYTES), mib(1 << streams._ZST_WINDOW_LOG)]),
        ("tokens of `slm eval", [f"{evaluate._MOST_TOKENS:,}"]),
        ("a body", [mib(Limits().body_bytes), f"{body.MOST_CONTAINERS:,} objects and arrays",
                    f"{body.MOST_STRINGS:,} strings", f"{body.MOST_VALUES:,} other"]),
        ("the bodies of all requests", [mib(Limits().bodies_bytes)]),
        ("headers, path and query", [mib(middleware._HEAD_BYTES), f"{connections.HEADERS_S:g} s"]),
        ("an answer", [f"{Limits().new_tokens:,} tokens", f"{Limits().seconds:g} s"]),
        ("messages, parts", [f"{requests.MOST_MESSAGES:,}, {messages.MOST_PARTS:,}, {messages.MOST_PARTS:,}"]),
        ("`n`, `stop`", [f"{requests.MOST_CHOICES}, {requests.MOST_STOPS}, "
                         f"{fields.LONGEST_STOP:,}, {fields.MOST_BIASES:,}"]),
        ("a JSON schema", [f"{constraint._LONGEST:,}", f"{constraint._MOST_PATTERNS}"]),
        ("compiling a schema", [f"{schema_check.MAX_SECONDS:g} s", mib(schema_check.MAX_BYTES), f"{constraint._WAITING} wait"]),
        ("the masks", [f"{constraint._FIRST_S:g} s", f"{1000 * constraint._TOKEN_S:g} ms"]),
        ("connections", [f"{connections._ENOUGH:,}"]),
        ("a client that does not read", [f"{Limits().patience_s:g} s"]),
        ("a template", [f"{template.MAX_TEMPLATE_CHARACTERS:,}"]),
        ("rendering one conversation", [f"{template.MAX_SECONDS} s", mib(template_worker.MAX_BYTES)]),
        ("the rendered text", [f"{template_worker.MAX_TEXT_CHARACTERS:,}"]),
        ("file |", [mib(tokenizer_fields.MAX_BYTES)]),
        ("components", [f"{tokenizer_fields.MAX_COMPONENTS}", f"{tokenizer_fields.MAX_NESTING} deep"]),
        ("normalizers and", [f"{tokenizer_fields.MAX_GROWTH}"]),
        ("decoders together", [f"{tokenizer_fields.MAX_DECODED_GROWTH}"]),
        ("`Replace`", [f"{tokenizer_fields.MAX_INSERT}"]),
        ("regular expressions", [f"{tokenizer_regex.MAX_CHARACTERS:,}"]),
        ("`TemplateProcessing`", [f"{tokenizer_components.MAX_TEMPLATE_TOKENS} tokens"]),
        ("a token of the vocabulary", [f"{tokenizer_fields.MAX_TOKEN:,}"]),
        ("added tokens", [f"{tokenizer_rules.MAX_ADDED_TOKENS:,}", f"{tokenizer_rules.MAX_ADDED_CHARACTERS:,}"]),
        ("WordPiece", [f"{tokenizer_rules.MAX_WORD}"]),
        ("names in a list", [f"{peft_fields._MOST_NAMES:,}"]),
        ("patterns in", [f"{name_patterns.MAX_PATTERNS:,}, each of {name_patterns.MAX_PATTERN_CHARACTERS:,} characters",
                         f"{name_patterns.MAX_CHARACTERS:,} together"]),
    ],
)  # fmt: skip
def test_a_limit_is_the_codes(what: str, stated: list[str]) -> None:
    (row,) = re.findall(rf"^\| {re.escape(what)}.*$", PAGE, flags=re.MULTILINE)
    assert all(each in row for each in stated), (row, stated)


def test_numbers_are_the_codes() -> None:
    assert f"threads from 1 to {MAX_THREADS}" in PAGE


def test_the_help_states_the_codes_defaults() -> None:
    helps = {each.name: each.help or "" for each in finetune.params if isinstance(each, click.Option)}
    assert f"[default: {streams.DOCUMENT_BYTES >> 20}MiB]" in helps["max_document_bytes"]
    assert f"[default: {rows.DATA_BYTES >> 20}MiB]" in helps["max_data_bytes"]
