"""`slm.load`: loads a bundle with onnxruntime or a checkpoint with PyTorch, behind one class."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from slm.core.arguments import check_type, keywords_checked
from slm.core.artifacts import newest_model
from slm.core.chat import declares_tools
from slm.core.checkpoint import INFO_FILE, is_checkpoint, read_info
from slm.core.errors import ArgumentError, SlmError
from slm.core.machine import check_threads
from slm.core.manifest import Bundle, is_bundle
from slm.core.names import resolve
from slm.core.tokenizer import Tokenizer
from slm.runtime import shipped
from slm.runtime.backend import Decoder
from slm.runtime.model import About, Model
from slm.runtime.placement import check_placement
from slm.runtime.session import RuntimeDevice

if TYPE_CHECKING:
    from slm.core.nn import CausalLM
    from slm.runtime.adapters import Adapter
    from slm.runtime.ensemble import Average


@keywords_checked
def load(
    path: str | PathLike[str] | None = None,
    *,
    device: RuntimeDevice = "cpu",
    cuda_graph: bool = False,
    threads: int | None = None,
    draft_tokens: int | None = None,
    adapter: str | PathLike[str] | None = None,
    trust: bool = False,
    allow_slow: bool = False,
) -> Model:
    """Loads a model for inference.

        model = slm.load()                       # the newest under ./runs
        model = slm.load("runs/tiny/onnx-int8")  # a bundle, which onnxruntime runs
        model = slm.load("tiny/checkpoint/best") # a checkpoint, which PyTorch runs; ./runs need not be named

    Args:
        path: A bundle or a checkpoint, or a result of `slm.train`, `slm.export` or `slm.quantize`. None takes the newest under
            ./runs, as commands do, or the bundled demo model if there is none; `model.about.path` is its path.
        device: "cpu" or "cuda".
        cuda_graph: On CUDA, record the kernel launches of a single-token step once and replay them (docs/generation.md).
            Requires a bundle exported with `--device cuda`.
        threads: Threads per operator; by default the usable physical cores.
        draft_tokens: Read up to this many tokens ahead where the text repeats (`slm.runtime.speculative`); None disables it.
        adapter: A LoRA adapter: a PEFT directory, or an `.onnx_adapter` file for a bundle with slots.
        trust: Whether to run a bundle whose graph slm did not write. Such a graph can take any time and memory.
        allow_slow: Whether to run a bundle on "cuda" that was exported for the CPU. Its attention then runs on the CPU.

    Raises:
        SlmError: If the path is not a model, the model is damaged or was exported for another device, or the adapter belongs
            to another model; an `ArgumentError`, which is also a `TypeError`, for an unknown keyword or a wrong type.
    """
    options = LoadOptions(device, cuda_graph, threads, draft_tokens, adapter, trust, allow_slow)
    _check_path("path", path)
    options.check()
    return _load(_resolved(path), options)


@dataclass(frozen=True)
class LoadOptions:
    """The options of `load`, which documents them."""

    device: RuntimeDevice
    cuda_graph: bool
    threads: int | None
    draft_tokens: int | None
    adapter: str | PathLike[str] | None
    trust: bool
    allow_slow: bool

    def check(self) -> None:
        """Checks types and ranges.

        Raises:
            SlmError: If an option has the wrong type or is out of range.
        """
        _check_path("adapter", self.adapter)
        if self.device not in get_args(RuntimeDevice):
            raise ArgumentError(f"device is {self.device!r}", f"one of {', '.join(map(repr, get_args(RuntimeDevice)))}")
        for name, value in (("threads", self.threads), ("draft_tokens", self.draft_tokens)):
            check_type(name, value, (Integral, type(None)), "a whole number or None")
            if isinstance(value, int) and value < 1:
                raise SlmError(f"{name} is {value}; it must be 1 or more")
        check_type("cuda_graph", self.cuda_graph, bool, "True or False")
        if self.cuda_graph and self.device != "cuda":
            raise ArgumentError("cuda_graph requires CUDA", "device='cuda'")


def _check_path(name: str, path: object) -> None:
    check_type(name, path, (str, PathLike, type(None)), "a path (str or pathlib.Path)")
    if isinstance(path, str) and not path.strip():
        raise SlmError(f"{name} is empty", "name a bundle or a checkpoint, or omit it for the newest")


def _load(path: Path, options: LoadOptions) -> Model:
    if is_bundle(path):
        return _load_bundle(path, options)
    if is_checkpoint(path):
        return _load_checkpoint(path, options)
    what = "not found" if not path.exists() else "neither a checkpoint nor a bundle"
    if path.suffix == ".gguf":
        raise SlmError(f"a GGUF file is neither a checkpoint nor a bundle: {path}", f"slm import {path}")
    raise SlmError(f"{what}: {path}", "slm train makes a checkpoint, slm export --onnx a bundle")


def _load_bundle(path: Path, options: LoadOptions) -> Model:
    from slm.runtime.decoder import OnnxDecoder
    from slm.runtime.unused import trim_freed_memory

    bundle = Bundle.open(path, options.trust)
    check_placement(bundle, options.device, options.allow_slow)
    onnx = OnnxDecoder(bundle, options.device, options.threads, cuda_graph=options.cuda_graph)
    if options.adapter is not None:
        onnx.use(load_adapter(Path(options.adapter), bundle))
    about = About(path, bundle.manifest.precision, options.device, bundle.config.parameter_count())
    tokenizer = Tokenizer.load(path)
    trim_freed_memory()
    model = Model(tokenizer, _drafting(onnx, options.draft_tokens), bundle.stop_token_ids, about)
    model.declares_tools = declares_tools(_info(bundle.manifest.provenance.get(INFO_FILE), options))
    return model


def _load_checkpoint(path: Path, options: LoadOptions) -> Model:
    if options.cuda_graph:
        raise SlmError(
            f"{path} is a checkpoint; CUDA graphs require a bundle",
            "use a bundle from slm export --onnx --device cuda, or omit CUDA graphs",
        )
    import torch

    from slm.core.nn import load_checkpoint
    from slm.core.nn.decoder import TorchDecoder

    if options.device == "cuda" and not torch.cuda.is_available():
        raise SlmError("PyTorch finds no CUDA device", "--device cpu")
    if options.threads is not None:
        torch.set_num_threads(check_threads(options.threads))
    model = load_checkpoint(path) if options.adapter is None else _merged(path, Path(options.adapter))
    model.to(options.device)
    precision = str(model.model.norm.weight.dtype).removeprefix("torch.")
    about = About(path, precision, options.device, model.config.parameter_count())
    decoder = _drafting(TorchDecoder(model), options.draft_tokens)
    loaded = Model(Tokenizer.load(path), decoder, model.config.stop_token_ids, about)
    loaded.declares_tools = declares_tools(_info(read_info(path), options))
    return loaded


def _info(made: object, options: LoadOptions) -> dict[str, Any]:
    """Returns how a model was made, and the adapter if there is one."""
    info = made if isinstance(made, dict) else {}
    return info if options.adapter is None else {**info, "finetuned": read_info(Path(options.adapter))}


def _resolved(path: str | PathLike[str] | None) -> Path:
    """Returns the artifact of a name; the newest for None."""
    if path is not None:
        return resolve(fspath(path), ("checkpoint", "bundle"))[0]
    choice = newest_model()
    return shipped.model_path() if choice is None else choice.artifact.path


@keywords_checked
def load_ensemble(
    paths: Sequence[str | PathLike[str]],
    average: "Average" = "mean",
    *,
    device: RuntimeDevice = "cpu",
    cuda_graph: bool = False,
    threads: int | None = None,
    draft_tokens: int | None = None,
    trust: bool = False,
    allow_slow: bool = False,
) -> Model:
    """Loads several models that share a tokenizer as one, whose predictions are averaged.

    Args:
        paths: Bundles and checkpoints.
        average: "mean" averages probabilities; "geometric" averages their logarithms.
        device: See `load`.
        cuda_graph: See `load`.
        threads: See `load`.
        draft_tokens: See `load`.
        trust: See `load`.
        allow_slow: See `load`.

    Raises:
        SlmError: As `load`, and if tokenizers differ.
    """
    from slm.runtime.ensemble import EnsembleDecoder

    check_type("paths", paths, (list, tuple), "a list of paths")
    if not paths:
        raise SlmError("there is no model in paths", "name two or more")
    options = LoadOptions(device, cuda_graph, threads, draft_tokens, None, trust, allow_slow)
    for path in paths:
        _check_path("path", path)
    options.check()
    each = replace(options, draft_tokens=None)  # the average is drafted, not its members
    models = [_load(_resolved(path), each) for path in paths]
    first = models[0]
    for path, model in zip(paths, models, strict=True):
        if model.tokenizer.sha256 != first.tokenizer.sha256:
            raise SlmError(
                f"{path} and {paths[0]} have different tokenizers", "the models of an ensemble share one tokenizer"
            )
    stops = dict.fromkeys(token for model in models for token in model.stop_token_ids)
    decoder = EnsembleDecoder([model.decoder for model in models], average)
    return Model(first.tokenizer, _drafting(decoder, draft_tokens), tuple(stops))


def load_adapter(path: Path, bundle: Bundle) -> "Adapter":
    """Reads an adapter for a bundle with slots: a PEFT directory, or an `.onnx_adapter` file.

    Raises:
        SlmError: If the bundle has no slots, or the adapter belongs to another model.
    """
    if path.is_dir():
        from slm.interchange.onnx_adapter import adapter_from_peft

        return adapter_from_peft(path, bundle)
    from slm.runtime.adapters import read_adapter

    return read_adapter(path, bundle)


def _merged(checkpoint: Path, adapter: Path) -> "CausalLM":
    from slm.finetune.merge import merge

    return merge(checkpoint, adapter)


def _drafting(decoder: Decoder, draft_tokens: int | None) -> Decoder:
    if draft_tokens is None:
        return decoder
    from slm.runtime.speculative import SpeculativeDecoder

    return SpeculativeDecoder(decoder, draft_tokens)
