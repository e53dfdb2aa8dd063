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

    for name in site.files:
        if name != HEADERS_FILE:
            for path in {f"/{name}", "/" if name == "index.html" else f"/{name}"}:
                app.add_route(path, answer(name, site.read(name)), methods=["GET"], include_in_schema=False)
