"""`slm web`: serves or writes a web page that runs a bundle in the browser."""

import shlex
import sys
from pathlib import Path

import click

from slm.cli.choosing import default_model
from slm.cli.console import print_json, say
from slm.cli.following import next_step
from slm.cli.listening import cannot_listen
from slm.cli.options import MAX_PORT, REPLACING, Artifact, FilePath, HostName, Whole, Word, json_option
from slm.core.manifest import Bundle


@click.command(epilog=REPLACING)
@click.argument("model", type=Artifact(checkpoints=False), required=False)
@click.option("--out", type=FilePath(), metavar="DIR", help="Write the site to DIR instead of serving it.")
@click.option("--name", type=Word(), help="The model's name on the page. [default: RUN/BUNDLE]")
@click.option(
    "--host",
    type=Word(),
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on; 0.0.0.0 is all addresses.",
)
@click.option("--port", type=Whole(0, MAX_PORT), default=8080, show_default=True, help="Port; 0 chooses a free one.")
@click.option("--allow-host", "hosts", type=HostName(), multiple=True, metavar="NAME",
              help="A Host name to accept in requests; may be repeated. [default: localhost, 127.0.0.1 and [::1]; with "
                   "another --host, any name]")  # fmt: skip
@json_option
def web(
    model: Path | None, out: Path | None, name: str | None, host: str, port: int, hosts: tuple[str, ...], as_json: bool
) -> None:
    """Serve or write a page that runs a bundle in the browser; prompts stay in the browser.

    Without MODEL, uses the newest bundle under ./runs, or the bundled demo model if there is none. After the first visit the
    page works offline. Any static host can serve the output of --out; its file `_headers` lists the HTTP headers that enable
    threads.

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
    if note := site.fields["note"]:
        say(f"note: {note}")
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
        raise cannot_listen(host, port, error) from None
    with server:
        if as_json:
            print_json({"url": server.url} | found)
            sys.stdout.flush()
        if not server.local:
            say("note: for pages of other machines, browsers allow threads and storage over https only")
        say(f"{path}: {site.size / 1e6:.1f} MB on {server.url} (Ctrl-C stops)")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("stopped")
        except SystemExit as end:  # a signal; the exit code names it
            say("stopped")
            raise SystemExit(end.code) from None


def _name(path: Path) -> str:
    """Returns the default name of a model on the page: RUN/BUNDLE, or "stories" for the bundled demo model."""
    from slm.core.names import short_name
    from slm.runtime import shipped

    return "stories" if path == shipped.model_path() else short_name(path)
