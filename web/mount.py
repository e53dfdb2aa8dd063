"""The page on a server that answers: every file of it a route, so that no path leads anywhere else."""

from typing import Any

from slm.web.site import HEADERS, HEADERS_FILE, Site, content_type


def mount(app: Any, site: Site) -> None:
    """Adds a site to an application.

    Args:
        app: FastAPI's or Starlette's; its other routes go before these.
        site: With mode `server`.
    """
    from starlette.responses import Response

    def answer(name: str, content: bytes) -> Any:
        async def send(request: Any) -> Response:
            return Response(content, headers=dict(HEADERS), media_type=content_type(name))

        return send

    for path, name in paths_of(site).items():
        app.add_route(path, answer(name, site.read(name)), methods=["GET"], include_in_schema=False)


def paths_of(site: Site) -> dict[str, str]:
    """Returns the files of a site by the paths that they are served at."""
    paths = {f"/{name}": name for name in site.files if name != HEADERS_FILE}
    return paths | ({"/": "index.html"} if "index.html" in site.files else {})
