"""The page as routes of an API server, one route per file, so that no path leads anywhere else."""

from typing import Any

from slm.web.ranges import UnsatisfiableError, content_range, requested
from slm.web.site import HEADERS, HEADERS_FILE, Site, content_type, entity_tag


def mount(app: Any, site: Site) -> None:
    """Adds a site to an application.

    Args:
        app: A FastAPI or Starlette application; its other routes take precedence.
        site: A site of mode `server`.
    """
    from starlette.responses import Response

    def answer(name: str, content: bytes) -> Any:
        entry = site.entries.get(name)
        tag = None if entry is None else entity_tag(entry)
        fixed = {**HEADERS, "Accept-Ranges": "bytes", **({} if tag is None else {"ETag": tag})}

        async def send(request: Any) -> Response:
            given = request.headers
            if tag is not None and given.get("If-None-Match") == tag:
                return Response(status_code=304, headers=fixed)
            wanted = given.get("Range") if request.method == "GET" else None
            try:
                found = requested(wanted, given.get("If-Range"), tag, len(content))
            except UnsatisfiableError:
                return Response(status_code=416, headers={**fixed, "Content-Range": content_range(None, len(content))})
            if found is None:
                return Response(content, headers=fixed, media_type=content_type(name))
            headers = {**fixed, "Content-Range": content_range(found, len(content))}
            return Response(content[slice(*found)], 206, headers, content_type(name))

        return send

    for path, name in paths_of(site).items():
        app.add_route(path, answer(name, site.read(name)), methods=["GET"], include_in_schema=False)


def paths_of(site: Site) -> dict[str, str]:
    """Returns the files of a site by their paths on the server."""
    paths = {f"/{name}": name for name in site.files if name != HEADERS_FILE}
    return paths | ({"/": "index.html"} if "index.html" in site.files else {})
