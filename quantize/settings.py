"""Settings of a quantization, its quality limits, and the settings that a bundle supports."""

from dataclasses import dataclass, replace
from typing import Literal

from slm.core.contract import CacheType
from slm.core.errors import SlmError
from slm.core.manifest import Bundle
from slm.core.progress import Progress
from slm.quantize.defaults import MAX_KL_NATS
from slm.quantize.results import Change

Prefer = Literal["auto", "speed", "size", "quality"]
Method = Literal["nearest", "searched", "gptq"]
Head = Literal["whole", "halves"]


@dataclass(frozen=True)
class Gate:
    """The limits of the quality check. None means no limit.

    Attributes:
        max_kl_nats: Limit of the mean KL divergence from the source's predictions, in nats.
        max_perplexity_increase: Limit of the relative increase of perplexity.
    """

    max_kl_nats: float | None
    max_perplexity_increase: float | None = None

    def refuses(self, change: Change) -> str | None:
        """Returns the reason for rejection, or None. Rejects NaN."""
        if self.max_kl_nats is not None and not change.kl_nats <= self.max_kl_nats:
            return f"KL divergence {change.kl_nats:.4f} nats (limit {self.max_kl_nats:g})"
        grown = change.perplexity_after / change.perplexity_before - 1
        if self.max_perplexity_increase is not None and not grown <= self.max_perplexity_increase:
            return f"perplexity increase {grown:.1%} (limit {self.max_perplexity_increase:.1%})"
        return None


GATES = {precision: Gate(nats) for precision, nats in MAX_KL_NATS.items()}


@dataclass(frozen=True)
class Settings:
    """The settings of a quantization.

    Attributes:
        precision: "int8" or "int4". With "int4", sensitive layers can get eight bits.
        prefer: The property to optimize.
        dynamic: Use products of 8-bit integers with a dynamic scale for each token, instead of blocks.
        block_size: The number of input channels that share one scale in the layers' weights. None: `prefer` decides.
        method: The rounding method. None: GPTQ for four bits, nearest for eight bits.
        smooth: Whether to smooth activations first. None: only if it measures better.
        cache: The type of cached keys and values. None: `prefer` decides; with "auto", the type with the faster attention.
        head_bits: For INT4, the bits of the head and of the token embeddings. None: the search chooses if there is a target,
            otherwise `prefer` decides.
        head: Whether the tied table is stored whole, or in halves for faster single-token steps (`slm.export.graph.halves`).
        target_bytes: For INT4, the limit of the size of graph and weights, in bytes.
        target_kl_nats: For INT4, the target KL divergence. Layers get eight bits until it is reached.
        refine: For INT4, whether scales and norms are trained after rounding (`slm.refine`).
        gate: The limits of the quality check. None: the default limits of the precision.
    """

    precision: Literal["int8", "int4"] = "int8"
    prefer: Prefer = "auto"
    dynamic: bool = False
    block_size: int | None = None
    method: Method | None = None
    smooth: bool | None = None
    cache: CacheType | None = None
    head_bits: Literal[4, 8] | None = None
    head: Head = "whole"
    target_bytes: int | None = None
    target_kl_nats: float | None = None
    refine: bool = False
    gate: Gate | None = None

    @property
    def rounding_method(self) -> Method:
        """The rounding method."""
        return self.method or ("gptq" if self.precision == "int4" else "nearest")

    @property
    def cache_type(self) -> CacheType | None:
        """The type of cached keys and values. None: the type with the faster attention."""
        if self.cache is not None or self.prefer == "auto":
            return self.cache
        return "int8" if self.prefer == "speed" else "float32"

    @property
    def tables(self) -> Literal["four", "eight", "search"]:
        """The bits of the head and of the token embeddings, or whether the search chooses them."""
        if self.precision == "int8" or self.head_bits == 8 or self.head == "halves":
            return "eight"
        if self.head_bits == 4:
            return "four"
        if self.target_bytes is not None or self.target_kl_nats is not None:
            return "search"
        return "four" if self.prefer == "size" else "eight"

    @property
    def limits(self) -> Gate:
        """The limits of the quality check."""
        return self.gate or GATES[self.precision]

    def requested(self) -> dict[str, object]:
        """Returns the requested settings for reports, without those left open."""
        asked: dict[str, object] = {"precision": self.precision, "prefer": self.prefer, "dynamic": self.dynamic or None}
        asked |= {"block_size": self.block_size, "head_bits": self.head_bits}
        asked |= {"head": None if self.head == "whole" else self.head}
        asked |= {
            "target_bytes": self.target_bytes,
            "target_kl_nats": self.target_kl_nats,
            "refine": self.refine or None,
        }
        return {name: value for name, value in asked.items() if value is not None}

    def finer(self) -> str | None:
        """Returns options that reduce the rounding error, or None if there are none."""
        if self.precision == "int4":
            if self.target_bytes:
                return "a larger --target-size"
            return "--int4 --prefer quality" if self.prefer == "size" else "--int8"
        if self.dynamic:
            return "--int8 without --int8-dynamic"
        return None if self.prefer == "quality" else "--prefer quality"


def check_source(source: Bundle, settings: Settings) -> None:
    """Checks that a bundle can be quantized with these settings.

    Raises:
        SlmError: If the bundle is already quantized, or its target or device does not support a setting.
    """
    manifest = source.manifest
    if manifest.quantization is not None:
        raise SlmError(
            f"{source.path} is already {manifest.precision}", "quantize the float bundle that it was created from"
        )
    if manifest.device == "webgpu" and settings.head_bits == 4:
        # The kernel of GatherBlockQuantized accepts no packed zero points (onnxruntime-web 1.30, and 1.31 as of 2026-09-14).
        raise SlmError(f"{source.path} is for WebGPU, which does not support --head-bits 4", "omit --head-bits")
    if settings.precision == "int8" and settings.method not in (None, "nearest"):
        raise SlmError(
            f"INT8 supports the method nearest only, not {settings.method}",
            f"use slm quantize --int4 --method {settings.method}",
        )
    if settings.refine and settings.precision != "int4":
        raise SlmError("--refine requires --int4; 8-bit weights change the predictions too little", "omit --refine")
    if settings.head == "halves":
        _check_halves(source)
    if manifest.target == "portable":
        what = "--int8-dynamic" if settings.dynamic else "--kv-cache int8" if settings.cache == "int8" else None
        if settings.head_bits == 4:  # the standard operator Gather does not take 4-bit integers
            what = "--head-bits 4"
        if what is not None:
            raise SlmError(
                f"{source.path} is a portable bundle, which does not support {what}",
                "quantize a fused bundle (slm export --onnx)",
            )
    if manifest.device != "cpu":
        _check_gpu(source, settings)


def _check_halves(source: Bundle) -> None:
    if (source.manifest.target, source.manifest.device) != ("fused", "cpu"):
        raise SlmError(
            f"--head halves supports fused bundles for the CPU only, and {source.path} is not one", "omit --head halves"
        )
    if not source.config.tie_word_embeddings:
        raise SlmError(f"--head halves needs a tied head, and {source.path} has an untied one", "omit --head halves")


def _check_gpu(source: Bundle, settings: Settings) -> None:
    name = _gpu(source)
    if settings.dynamic:
        raise SlmError(
            f"{source.path} is for {name}, which does not support --int8-dynamic",
            f"use slm quantize --int8, which stores 8-bit weights for {name}",
        )
    if settings.cache is not None:
        raise SlmError(
            f"{source.path} is for {name}, which supports float16 caches only, not {settings.cache}", "omit --kv-cache"
        )
    if settings.smooth:
        raise SlmError(
            f"{source.path} is for {name}, where smoothed activations could overflow float16",
            "omit --smooth",
        )


def _gpu(source: Bundle) -> str:
    return "WebGPU" if source.manifest.device == "webgpu" else "CUDA"


def fitted_settings(source: Bundle, settings: Settings, progress: Progress) -> Settings:
    """Returns the settings with the values that a bundle's target and device require.

    Prints a note if `prefer` asks for something that the device does not support.
    """
    if source.manifest.device == "webgpu" and settings.precision == "int4":
        if settings.prefer == "size":
            progress.note("WebGPU does not support a 4-bit table; --prefer size does not change its 8 bits")
        settings = replace(settings, head_bits=8)
    if source.manifest.target == "portable":
        return replace(settings, cache="float32", head_bits=8 if settings.precision == "int4" else None)
    if source.manifest.device != "cpu":
        if settings.prefer == "speed":
            progress.note(f"{_gpu(source)} supports float16 caches only; --prefer speed does not change them")
        return replace(settings, cache="float16", smooth=False)
    return settings
