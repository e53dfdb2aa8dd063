"""`slm web`."""

import shlex
import sys
from pathlib import Path

import click

from slm.cli.choosing import default_model
from slm.cli.console import print_json, say
from slm.cli.following import next_step
from slm.cli.options import MAX_PORT, REPLACING, Artifact, FilePath, HostName, Whole, Word, json_option
from slm.core.errors import SlmError
from slm.core.manifest import Bundle


@click.command(epilog=REPLACING)
@click.argument("model", type=Artifact(checkpoints=False), required=False)
@click.option("--out", type=FilePath(), metavar="DIR", help="Write the site there instead of serving it.")
@click.option("--name", type=Word(), help="What the page calls the model. [default: RUN/BUNDLE]")
@click.option(
    "--host", type=Word(), default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 is every one."
)
@click.option("--port", type=Whole(0, MAX_PORT), default=8080, show_default=True, help="0 takes a free one.")
@click.option("--allow-host", "hosts", type=HostName(), multiple=True, metavar="NAME",
              help="A Host name that requests may use; may be repeated. [default: localhost, 127.0.0.1 and [::1] on this "
                   "machine, any name with another --host]")  # fmt: skip
@json_option
def web(
    model: Path | None, out: Path | None, name: str | None, host: str, port: int, hosts: tuple[str, ...], as_json: bool
) -> None:
    """Serve a page, or write one, that runs a bundle in the browser: nothing typed leaves it.

    Without MODEL, the newest bundle under ./runs, or the small model that ships where there is none.
    The page works without a network once
    it was opened. What --out writes is served by any host of static files; `_headers` says which headers let it use threads.

    \b
      slm web
      slm web runs/tiny/onnx-int8 --out site
    """
    from slm.web.server import SiteServer
    from slm.web.site import check_site_output, local_site

    if out is not None:
        check_site_output(out)
    path = model or default_model(bundle=True)
    site = local_site(Bundle.open(path), name or _name(path))
    found = {"model": str(path), "version": site.version, "files": len(site.files), "bytes": site.size}
    if out is not None:
        site.write(out)
        say(f"{out}: {len(site.files)} files, {site.size / 1e6:.1f} MB")
        following = shlex.join(["python3", "-m", "http.server", "--directory", str(out)])
        if as_json:
            print_json({"out": str(out)} | found | {"next": following})
        else:
            next_step(following)
        return
    try:
        server = SiteServer(site, host, port, hosts)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise SlmError(f"cannot listen on {host}:{port} ({reason})", "another --port, or another --host") from None
    with server:
        if as_json:
            print_json({"url": server.url} | found)
            sys.stdout.flush()
        if not server.local:
            say("note: browsers give pages of other machines threads and a store over https alone")
        say(f"{path}: {site.size / 1e6:.1f} MB on {server.url} until Ctrl-C")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("stopped")
        except SystemExit as end:  # told to end by a signal, which the exit code names
            say("stopped")
            raise SystemExit(end.code) from None


def _name(path: Path) -> str:
    """Returns what to call a model that has no name: its run's and its own, for the one that ships a word."""
    from slm.core.names import short_name
    from slm.runtime import shipped

    return "stories" if path == shipped.model_path() else short_name(path)
