"""The OpenAPI description: FastAPI's own, with additions.

`slm.serve.body` reads bodies instead of FastAPI, so that their schemas are added here.
"""

from typing import Any

from pydantic import BaseModel

from slm.serve.requests import ChatRequest, CompletionRequest

_SCHEMAS = "#/components/schemas/{model}"
REQUESTS: tuple[type[BaseModel], ...] = (ChatRequest, CompletionRequest)


def body_of(kind: type[BaseModel]) -> dict[str, Any]:
    """Returns the description of a request's body, for a route."""
    reference = {"$ref": _SCHEMAS.format(model=kind.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}}


def describe(found: dict[str, Any], *, keys: bool) -> dict[str, Any]:
    """Returns the whole description.

    Args:
        found: FastAPI's description, which is modified.
        keys: Whether requests need an API key.
    """
    schemas = found.setdefault("components", {}).setdefault("schemas", {})
    for kind in REQUESTS:
        schema = kind.model_json_schema(ref_template=_SCHEMAS)
        schemas.update(schema.pop("$defs", {}))
        schemas[kind.__name__] = schema
    # FastAPI describes a 422 for an invalid field; this server responds with 400, also for path parameters.
    for path in found["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    if keys:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for name, path in found["paths"].items():
            for operation in path.values() if name.startswith("/v1/") else ():
                operation["security"] = [{"key": []}]
    return found
