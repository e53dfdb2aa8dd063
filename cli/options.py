"""Options that several commands share, so that the same thing has the same name everywhere."""

from pathlib import Path

import click

json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
out_option = click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Where to write. [default: in the run under ./runs, else beside the input]",
)
seed_option = click.option("--seed", type=int, default=0, show_default=True, help="Same seed, same output.")
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="a.b=c", help="Override one value of the recipe; may be repeated."
)
