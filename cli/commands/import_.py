"""`slm import`; the module's name avoids Python's keyword."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from slm.cli.console import RichProgress, print_json, print_table, say
from slm.cli.following import after_checkpoint, next_step
from slm.cli.options import REPLACING, Word, json_option, out_option_for, overwrite_option
from slm.core.manifest import is_bundle
from slm.core.outputs import check_checkpoint_output
from slm.core.processes import peak_rss_mib
from slm.core.runs import imported_checkpoint

if TYPE_CHECKING:
    from slm.interchange.importing import Source


@click.command("import", epilog=REPLACING)
@click.argument("source", type=Word(), metavar="SOURCE")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Type of the stored weights; auto keeps float types and stores quantized weights as float32.",
)
@click.option("--revision", metavar="REV", help="Branch, tag or commit on the hub. [default: main]")
@out_option_for("checkpoint", "runs/NAME/checkpoint/imported")
@overwrite_option
@json_option
def import_(source: str, dtype: str, revision: str | None, out: Path | None, overwrite: bool, as_json: bool) -> None:
    """Import a Gemma 3 model as a checkpoint.

    SOURCE is a Hugging Face directory, a GGUF file, the id of a model on the Hugging Face hub, or a bundle of slm. Of a
    multimodal model only the text part is imported; of a quantized bundle, the rounded weights. The name and shape of every
    tensor are checked, and licence notices are kept.

    \b
      slm import google/gemma-3-270m            # needs a token: accept the licence on the hub first
      slm import path/to/gemma-3-1b-it
      slm import gemma-3-270m-q4_k_m.gguf
      slm import runs/tiny/onnx-int8
    """
    from slm.interchange.importing import import_model, source_name

    started = time.perf_counter()
    path = out or imported_checkpoint(source_name(source), source)
    check_checkpoint_output(path, overwrite=overwrite)  # before anything is downloaded
    done = import_model(_opened(source, revision), path, dtype, revision, RichProgress())  # type: ignore[arg-type]  # click checked it
    following = after_checkpoint(done.path)
    seconds = time.perf_counter() - started
    if as_json:
        print_json(
            {
                "checkpoint": str(done.path),
                "kind": done.kind,
                "parameters": done.parameters,
                "dtype": done.dtype,
                "stored_as": done.stored_as,
                "notices": done.notices,
                "seconds": round(seconds, 2),
                "peak_rss_mib": round(peak_rss_mib(), 1),
                "next": following,
            }
        )
        return
    stored = ", ".join(f"{count} {kind}" for kind, count in done.stored_as.items())
    print_table(
        "imported",
        ("", ""),
        [
            ("checkpoint", str(done.path)),
            ("parameters", f"{done.parameters:,}"),
            ("tensors", f"{stored}; now {done.dtype}"),
            ("time, peak memory", f"{seconds:.0f} s, {peak_rss_mib():,.0f} MiB"),
        ],
    )
    for notice in done.notices:
        say(notice)
    next_step(following)


def _opened(source: str, revision: str | None) -> "str | Source":
    """Returns a bundle as an opened source, and other sources as they are."""
    if revision is not None or not is_bundle(Path(source)):
        return source
    from slm.export.recovered import BundleModel

    model: Source = BundleModel(Path(source))
    return model
