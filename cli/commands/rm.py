"""`slm rm`."""

import click

from slm.cli.console import print_json, say
from slm.cli.options import Word, json_option
from slm.core.errors import SlmError
from slm.core.inventory import removable, remove, size


@click.command()
@click.argument("names", type=Word(), nargs=-1, required=True, metavar="NAME...")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@json_option
def rm(names: tuple[str, ...], yes: bool, as_json: bool) -> None:
    """Remove models, adapters or whole runs under ./runs, or bundles from the cache.

    Lists what would be removed, with sizes, and asks. Nothing outside ./runs and the cache is removed, and no links are
    followed.

    \b
      slm rm tiny/onnx                # an artifact
      slm rm tiny demo-2 --yes        # whole runs
    """
    found = list(dict.fromkeys(removable(name) for name in names))
    sizes = [size(path) for path in found]
    if not yes:
        for path, number in zip(found, sizes, strict=True):
            say(f"{path}: {number / 1e6:,.1f} MB")
        if not click.confirm("Remove?", err=True):
            raise SlmError("nothing was removed", "answer y, or give --yes")
    for path in found:
        remove(path)
    if as_json:
        print_json({"removed": [str(path) for path in found], "bytes": sum(sizes)})
        return
    say(f"removed {len(found)}, {sum(sizes) / 1e6:,.1f} MB")
