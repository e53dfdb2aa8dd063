"""The page as routes of an API server, one route per file, so that no path leads anywhere else."""

from typing import Any

from slm.web.site import HEADERS, HEADERS_FILE, Site, content_type


def mount(app: Any, site: Site) -> None:
    """Adds a site to an application.

    Args:
        app: A FastAPI or Starlette application; its other routes take precedence.
        site: A site of mode `server`.
    """
    from starlette.responses import Response

    def answer(name: str, content: bytes) -> Any:
        async def send(request: Any) -> Response:
            return Response(content, headers=dict(HEADERS), media_type=content_type(name))

        return send

    for path, name in paths_of(site).items():
        app.add_route(path, answer(name, site.read(name)), methods=["GET"], include_in_schema=False)


def paths_of(site: Site) -> dict[str, str]:
    """Returns the files of a site by their paths on the server."""
    paths = {f"/{name}": name for name in site.files if name != HEADERS_FILE}
    return paths | ({"/": "index.html"} if "index.html" in site.files else {})
