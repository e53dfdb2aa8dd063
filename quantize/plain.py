"""The float32 bundle that settings are chosen on: for a CUDA bundle, a temporary one with the same weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slm.core.contract import input_specs, output_specs
from slm.core.files import scratch_directory
from slm.core.manifest import MODEL_NAMES, Bundle
from slm.export.graph import FloatFormat, Fused, build_graph, float_tensors, save_graph


@contextmanager
def plain_bundle(source: Bundle, scratch: Path) -> Iterator[Bundle]:
    """Yields a float bundle whose activations and weights can be looked at in float32: the source, where it is float32.

    Args:
        source: A float bundle.
        scratch: Where a temporary bundle is written; it takes four bytes a parameter.
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
