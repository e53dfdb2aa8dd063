"""`slm run`: from a model of any source to a conversation."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from slm.cli.commands.chat import converse
from slm.cli.console import RichProgress, say
from slm.cli.options import Word, json_option
from slm.cli.sampling import Sections, TextOptions, generation_options
from slm.core.errors import SlmError
from slm.core.manifest import is_bundle
from slm.core.names import resolve
from slm.core.runs import RUNS, cached_bundles

if TYPE_CHECKING:
    from slm.pipeline import Precision


@click.command(cls=Sections)
@click.argument("source", type=Word(), metavar="NAME|HUB_ID|FILE")
@click.option("--int4", is_flag=True, help="Store weights in 4 bits instead of 8.")
@click.option("--float32", is_flag=True, help="Do not quantize.")
@click.option("--system", default="", metavar="TEXT", help="System message.")
@json_option
@generation_options
def run(source: str, int4: bool, float32: bool, system: str, as_json: bool, options: TextOptions) -> None:
    """Run any model: import, export and quantize it if needed, then chat.

    The argument is a run or an artifact under ./runs, a Hugging Face directory, a GGUF file, the id of a model on the Hugging
    Face hub, or a bundle from the cache (slm list). A bundle is used as it is. Everything else becomes an INT8 bundle in the
    cache, each step verified; the next call uses that bundle. $SLM_CACHE names another place for the cache. A changed file
    is converted again; of the hub, the newest version after slm rm.

    \b
      slm run google/gemma-3-270m-it
      slm run gemma-3-270m-it-Q8_0.gguf --int4
      slm run tiny --system "Be brief."
      printf 'Hi.\\n' | slm run tiny --greedy
    """
    if int4 and float32:
        raise click.UsageError("give --int4 or --float32, not both")
    precision: Precision = "int4" if int4 else "float32" if float32 else "int8"
    bundle = _bundle(source, precision, int4 or float32)
    converse(bundle, system, as_json, options)


def _bundle(source: str, precision: "Precision", chosen: bool) -> Path:
    """Returns the bundle to run, after making it if there is none.

    Args:
        source: The argument of the command.
        precision: The precision of a bundle that is made.
        chosen: Whether the user chose the precision.
    """
    cached = cached_bundles() / source
    known = cached if "/" not in source and is_bundle(cached) else _known(source)
    if known is not None and is_bundle(known):
        if chosen:
            raise SlmError(f"{known} is a bundle already", f"run its checkpoint, or slm quantize {known}")
        return known
    from slm.pipeline import ready_bundle

    place = ready_bundle(source if known is None else str(known), precision, RichProgress())
    say(f"Using {place} (slm rm {place.name} removes it).")
    return place


def _known(source: str) -> Path | None:
    """Returns the checkpoint or bundle that a path or a name under ./runs means, or None for other sources.

    Raises:
        SlmError: If it is neither, and not the form of a source that can be imported.
    """
    from slm.interchange.hub import SOURCES, is_hub_id

    if Path(source).is_file() or (is_hub_id(source) and not (RUNS / source).exists()):
        return None
    try:
        path, sentences = resolve(source, ("checkpoint", "bundle"))
    except SlmError as error:
        raise SlmError(error.message, f"{error.hint}; or name {SOURCES}") from None
    for sentence in sentences:
        say(sentence)
    return path
