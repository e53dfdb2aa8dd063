"""Answers that a teacher writes to rows that end with a request, before anything is trained.

The answers are stored in `OUT/teacher/answers.json` until the run is complete, so that a resumed run does not write them again.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from slm.core.chat import Message, tool_form
from slm.core.errors import SlmError
from slm.core.files import read_json, write_text
from slm.core.progress import Progress
from slm.core.tools import parsed_calls
from slm.finetune.examples import Renderer
from slm.finetune.replies import generate
from slm.finetune.rows import ChatRow, CompletionRow, Row
from slm.finetune.state import START_OVER
from slm.finetune.teacher import Teacher
from slm.runtime.answers import reply_ends
from slm.runtime.generation import Generation, Request
from slm.runtime.sampling import GREEDY

ANSWERS_FILE = "teacher/answers.json"
# A killed run loses at most this much work.
_SAVE_EVERY_S = 60.0


class Answer(BaseModel):
    """An answer of the teacher.

    Attributes:
        text: The text, with the marks of calls.
        ended: Whether the teacher ended it; otherwise it was cut at the maximum tokens of a row.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    text: str
    ended: bool


class Written(BaseModel):
    """The stored answers.

    Attributes:
        teacher: Hash of everything besides the prompt that decides an answer.
        answers: The answers by the hash of their prompt's tokens.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    teacher: str
    answers: dict[str, Answer]


@dataclass(frozen=True)
class Writer:
    """Lets a teacher answer rows.

    Attributes:
        load: Loads the teacher, which is not needed if all answers are stored.
        weights_sha256: Hash of the teacher's weights.
        renderer: Converts rows to token ids.
        max_length: Maximum tokens of a row.
        out: The directory of the result.
        overwrite: Whether stored answers of another teacher may be dropped.
        progress: Receives progress and notes.
    """

    load: Callable[[], Teacher]
    weights_sha256: str
    renderer: Renderer
    max_length: int
    out: Path
    overwrite: bool
    progress: Progress

    def complete(self, rows: Sequence[Row], unanswered: Sequence[int], *, write: bool = True) -> tuple[list[Row], int]:
        """Returns the rows with the teacher's greedy answers in place of placeholders, and the number that `write` left out.

        A row whose prompt has the maximum tokens keeps its placeholder, which is cut off with the end of its prompt later.

        Args:
            rows: The rows.
            unanswered: Numbers of the rows that end with a request.
            write: Whether the teacher writes answers that are not stored; otherwise their rows keep the placeholder.

        Raises:
            SlmError: If a conversation cannot be rendered, or the stored answers are of another run.
        """
        found = list(rows)
        asked = [(n, row) for n in unanswered if isinstance(row := rows[n], ChatRow | CompletionRow)]
        examples = self.renderer.uncut([row for _, row in asked])
        prompts: dict[int, tuple[int, ...]] = {}
        for (number, _), example in zip(asked, examples, strict=True):
            # The template's error is reported, or counted as a bad row, when the rows are rendered.
            if not isinstance(example, SlmError) and example.spans[-1][0] < self.max_length:
                prompts[number] = example.ids[: example.spans[-1][0]]
        written = self._stored()
        missing = {_key(ids): ids for ids in prompts.values() if _key(ids) not in written.answers}
        if missing and write:
            self._write(list(missing.values()), written)
        answers = {number: written.answers.get(_key(ids)) for number, ids in prompts.items()}
        for number, row in asked:
            if (answer := answers.get(number)) is not None:
                found[number] = self._answered(row, answer)
        known = [answer for answer in answers.values() if answer is not None]
        if known or write:
            self._report(known)
        return found, len(answers) - len(known)

    def _write(self, prompts: Sequence[tuple[int, ...]], written: Written) -> None:
        """Lets the teacher answer prompts, and stores the answers, also when it is interrupted."""
        teacher, tokenizer = self.load(), self.renderer.tokenizer
        config = teacher.model.config
        ends = reply_ends(tokenizer, (*config.stop_token_ids, *self.renderer.ends))
        shown = tokenizer.ids_of(tool_form(tokenizer).style.marks) & tokenizer.special_ids
        generations = {}
        for ids in prompts:
            request = Request(ids, GREEDY, self.max_length - len(ids), ends, shown=shown)
            generations[Generation(request, config.max_position_embeddings, config.vocab_size, tokenizer)] = _key(ids)
        saved_at = time.perf_counter()

        def ended(generation: Generation) -> None:
            nonlocal saved_at
            result = generation.result
            written.answers[generations[generation]] = Answer(text=result.text, ended=result.stopped == "end")
            self.progress.advance()
            if time.perf_counter() - saved_at > _SAVE_EVERY_S:
                self._store(written)
                saved_at = time.perf_counter()

        self.progress.start("teacher answers", len(prompts), "rows")
        try:
            generate(teacher.model, list(generations), teacher.autocast, ended)
        except KeyboardInterrupt:
            self.progress.note(f"stopping: the answers so far are saved in {self.out}; the same command continues")
            raise
        finally:
            self.progress.finish()
            self._store(written)

    def _answered(self, row: ChatRow | CompletionRow, answer: Answer) -> Row:
        if isinstance(row, CompletionRow):
            return replace(row, completion=answer.text, unended=not answer.ended)
        message: Message = {"role": "assistant", "content": answer.text.strip()}
        if row.tools:
            text, calls = parsed_calls(answer.text, tool_form(self.renderer.tokenizer).style)
            message = {"role": "assistant", "content": text.strip()}
            if calls:
                message["calls"] = tuple(calls)
        return replace(row, messages=(*row.messages[:-1], message), unended=not answer.ended)

    def _report(self, answers: Sequence[Answer]) -> None:
        cut = sum(not answer.ended for answer in answers)
        self.progress.note(f"answers written by the teacher: {len(answers):,}")
        if cut:
            self.progress.note(
                f"warning: answers of the teacher cut at {self.max_length} tokens of a row: {cut}; their end is not learned"
            )

    def _stored(self) -> Written:
        """Returns the stored answers of the same teacher.

        Raises:
            SlmError: If the file is damaged, or another teacher wrote the answers.
        """
        file, teacher = self.out / ANSWERS_FILE, self._identity()
        if not file.is_file():
            return Written(teacher=teacher, answers={})
        try:
            stored = Written.model_validate(read_json(file, "the teacher's answers"))
        except (SlmError, ValidationError):
            if not self.overwrite:
                raise SlmError(f"the teacher's answers are damaged: {file}", START_OVER) from None
            return Written(teacher=teacher, answers={})
        if stored.teacher == teacher:
            return stored
        if not self.overwrite:
            raise SlmError(
                f"{self.out} holds an interrupted run whose answers were written by another teacher, or with another "
                "--max-length",
                f"give the same values to resume it; {START_OVER}",
            )
        return Written(teacher=teacher, answers={})

    def _store(self, written: Written) -> None:
        file = self.out / ANSWERS_FILE
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(written.model_dump(mode="json")) + "\n")

    def _identity(self) -> str:
        fields: dict[str, Any] = {"weights": self.weights_sha256, "max_length": self.max_length}
        fields["tokenizer"] = self.renderer.tokenizer.sha256
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _key(ids: Sequence[int]) -> str:
    return hashlib.sha256(json.dumps(list(ids)).encode()).hexdigest()
