"""Loads what it is told to, one case a line, and says what came of it; whatever goes wrong goes wrong in here.

`{"how": ..., "path": ..., "inside": ...}` comes in, `{"outcome": "works" | "refused" | "wrong", "what": ...}` goes out.
Memory is limited, and files that are opened outside of the case and of what Python itself needs are noticed.
"""

import json
import os
import resource
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

HEADROOM = 3 << 30  # of address space: onnxruntime and PyTorch reserve much that they do not touch
LONGEST = 2100

opened: list[str] = []
watching = False


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if watching and event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        opened.append(os.fsdecode(arguments[0]))


def _answer(model: Any) -> None:
    text = model.generate("One day", max_new_tokens=3, temperature=0)
    assert isinstance(text, str)


def bundle(path: Path, about: dict[str, str]) -> None:
    import slm

    _answer(slm.load(path))


def checkpoint(path: Path, about: dict[str, str]) -> None:
    import slm

    _answer(slm.load(path))


def imported(path: Path, about: dict[str, str]) -> None:
    import slm
    from slm.interchange.importing import import_model

    out = path.parent / "imported"
    import_model(str(path), out)
    _answer(slm.load(out))


def chat(path: Path, about: dict[str, str]) -> None:
    from slm.core.chat import chat_ids, dialogues
    from slm.core.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(path)
    said: Any = [{"role": "user", "content": "<end_of_turn> hi"}, {"role": "assistant", "content": "ho"}]
    chat_ids(tokenizer, said[:1])
    list(dialogues(tokenizer, [said], {0, 2}))
    tokenizer.encode("One day"), tokenizer.control_ids, tokenizer.sha256


def expansion(path: Path, about: dict[str, str]) -> None:
    """Encodes and decodes texts that rules like to expand; what takes long or makes much is wrong."""
    import time

    from slm.core.errors import SlmError
    from slm.core.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(path)
    begun = time.process_time()
    for text in ("a" * 2000, "e " * 1000, " " * 4000 + "x", "Once upon a time. " * 100):
        for encode in (tokenizer.encode, tokenizer.encode_literal):
            try:
                ids = encode(text)
            except SlmError:  # a model without an unknown token, perhaps
                continue
            assert len(ids) <= 256 * len(text) + 100, "a text grew"
            assert len(tokenizer.decode(ids[:1000])) < 100_000, "tokens grew"
    assert time.process_time() - begun < 20, "it takes long"


def peft(path: Path, about: dict[str, str]) -> None:
    from slm.core.nn import load_checkpoint
    from slm.finetune.adapter import load_adapter

    load_adapter(load_checkpoint(Path(about["base"])), path)


def slots(path: Path, about: dict[str, str]) -> None:
    import slm

    _answer(slm.load(about["base"], adapter=path))


def rows(path: Path, about: dict[str, str]) -> None:
    from slm.core.config import ModelConfig
    from slm.core.errors import SlmError
    from slm.core.tokenizer import Tokenizer
    from slm.finetune.examples import Renderer
    from slm.finetune.rows import read_rows

    bad: list[SlmError] = []
    try:
        found = read_rows(path, bad)
    except SlmError:
        read_rows(path)
        raise AssertionError("refused only when bad rows may be left out") from None
    base = Path(about["base"])
    config = ModelConfig.from_hf(json.loads((base / "config.json").read_text()))
    Renderer(Tokenizer.load(base), config).examples(found, 64, bad)
    for each in bad:
        assert each.message.isprintable()
    read_rows(path)


def documents(path: Path, about: dict[str, str]) -> None:
    from slm.core.text.documents import read_documents
    from slm.core.text.files import find_files

    for file in find_files(path):
        for document in read_documents(file):
            document.encode()


def dataset(path: Path, about: dict[str, str]) -> None:
    from slm.train.data.dataset import check_files, open_dataset

    found = open_dataset(path)
    check_files(found.path, found.manifest)
    for split in (found.train, found.validation):
        assert len(split.ids[:64]) == min(64, len(split.ids))


def run(path: Path, about: dict[str, str]) -> None:
    from slm.train.run import resume

    resume(path)


def tuning(path: Path, about: dict[str, str]) -> None:
    from slm.finetune.run import finetune
    from slm.finetune.settings import FinetuneSettings

    settings = FinetuneSettings(epochs=1, rank=2)
    finetune(Path(about["base"]), Path(about["rows"]), path, settings)


def info(path: Path, about: dict[str, str]) -> None:
    _command("info", path)


def _command(*arguments: object) -> None:
    import io
    from contextlib import redirect_stdout

    from slm.cli import console, main
    from slm.core.errors import SlmError

    said: list[str] = []
    console.say_error = main.say_error = lambda message, hint=None: said.append(message)  # type: ignore[assignment]
    try:
        with redirect_stdout(io.StringIO()):
            main.main([str(argument) for argument in arguments])
    except SystemExit as done:
        if done.code:
            raise (AssertionError if said[0].startswith("unexpected") else SlmError)(said[0]) from None


ACTIONS: dict[str, Callable[[Path, dict[str, str]], None]] = {
    f.__name__: f
    for f in (bundle, checkpoint, imported, chat, expansion, peft, slots, rows, documents, dataset, run, tuning, info)
}
# What a careless loader would do, for the test of the test.
ACTIONS["careless_field"] = lambda path, about: json.loads((path / "manifest.json").read_text())["context"] + 0
ACTIONS["careless_path"] = lambda path, about: (path / "../../outside/secret").read_text()
ACTIONS["careless_memory"] = lambda path, about: bytearray(1 << 40)
ACTIONS["careless_wait"] = lambda path, about: os.read(os.pipe()[0], 1)
ACTIONS["careless_crash"] = lambda path, about: os.abort()


def _outside(inside: list[str]) -> list[str]:
    """Returns what was opened that neither the case nor Python's installation holds."""
    own = [*(str(Path(each).resolve()) for each in inside), *ALLOWED]
    # A name that is not absolute is relative to an opened directory: rmtree's, every other one is given whole.
    found = (os.path.realpath(name) for name in opened if name.startswith("/"))
    return [name for name in found if not any(name == each or name.startswith(each + "/") for each in own)]


def _one(case: dict[str, Any]) -> dict[str, str]:
    global watching
    from slm.core.errors import SlmError

    opened.clear()
    watching = True
    try:
        ACTIONS[case["how"]](Path(case["path"]), case)
        outcome, what = "works", ""
    except SlmError as error:
        one_line = error.message.isprintable() and (error.hint or "").isprintable() and len(error.message) <= LONGEST
        outcome, what = ("refused" if one_line else "wrong"), error.message[:LONGEST]
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        where = next((f"{f.filename}:{f.lineno}" for f in reversed(frames) if "/slm/" in f.filename), "")
        outcome, what = "wrong", f"{type(error).__name__}: {error} ({where})"[:1000]
    finally:
        watching = False
    found = _outside(case["inside"])
    return {"outcome": "wrong", "what": f"opened {found[0]}"} if found else {"outcome": outcome, "what": what}


def _main() -> None:
    import importlib.util
    import multiprocessing

    # Before the first context, which TensorBoard's queue needs, Python 3.14 tries the temporary directory.
    multiprocessing.get_context()
    for name in ("onnxruntime", "torch", "safetensors.torch", "slm.loading", "slm.finetune.run", "slm.train.run",
                 "slm.interchange.importing", "slm.cli.main", "slm.cli.commands.info", "pyarrow.parquet", "gguf",
                 "slm.runtime.decoder", "slm.core.nn.decoder",
                 "matplotlib.font_manager"):  # fmt: skip
        importlib.import_module(name)
    import onnxruntime
    import torch

    torch.set_num_threads(1)
    onnxruntime.set_default_logger_severity(4)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + HEADROOM, size + HEADROOM))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.fdopen(os.dup(1), "w")  # what is printed by others goes elsewhere
    os.dup2(2, 1)
    sys.addaudithook(_audit)
    for line in sys.stdin:
        answers.write(json.dumps(_one(json.loads(line))) + "\n")
        answers.flush()


ALLOWED = [
    *{os.path.realpath(each) for each in (sys.prefix, sys.base_prefix, *sys.path) if each},
    str(Path(__file__).resolve().parents[3]), "/proc", "/sys", "/usr", "/dev", "/lib", "/etc/ld.so.cache", "/etc/localtime",
]  # fmt: skip


if __name__ == "__main__":
    _main()
