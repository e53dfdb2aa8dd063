"""The float32 bundle for calibration. For a CUDA bundle, this is a temporary bundle with the same weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slm.core.contract import input_specs, output_specs
from slm.core.files import scratch_directory
from slm.core.manifest import MODEL_NAMES, Bundle
from slm.export.graph import FloatFormat, Fused, build_graph, float_tensors, save_graph


@contextmanager
def plain_bundle(source: Bundle, scratch: Path) -> Iterator[Bundle]:
    """Yields the source if it is a float32 bundle, or a temporary float32 bundle with its weights.

    Args:
        source: A float bundle.
        scratch: The parent of a temporary bundle, which takes four bytes per parameter.
    """
    if source.manifest.device == "cpu":
        yield source
        return
    with scratch_directory(scratch, "float32") as directory:
        target = Fused(FloatFormat())
        model = directory / "onnx" / f"{MODEL_NAMES['float32']}.onnx"
        model.parent.mkdir()
        tensors = float_tensors(source.model_path, {})
        save_graph(build_graph(source.config, target, tensors, source.manifest.context), model)
        caches = target.caches(source.config)
        manifest = source.manifest.model_copy(
            update={
                "model": model.relative_to(directory).as_posix(),
                "precision": "float32",
                "device": "cpu",
                "inputs": input_specs(caches),
                "outputs": output_specs(source.config.vocab_size, caches),
                "cache": caches,
            }
        )
        yield Bundle(directory, manifest, source.config)
