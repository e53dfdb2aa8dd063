"""`/docs`: the OpenAPI description as one HTML page, without scripts or external resources."""

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color-scheme: light dark; }
code, pre { font: 14px/1.5 ui-monospace, monospace; }
pre { overflow-x: auto; padding: .75rem; border: 1px solid #8886; border-radius: 4px; }
table { border-collapse: collapse; width: 100%; margin: .5rem 0 1.5rem; }
td, th { text-align: left; vertical-align: top; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid #8884; }
h2 { margin-top: 2.5rem; } h2 code { font-size: 1.1rem; }
.method { display: inline-block; min-width: 3.5rem; font-weight: 600; }
"""
_DIGEST = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": (
        f"default-src 'none'; style-src 'sha256-{_DIGEST}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
_EXAMPLES: Mapping[str, Mapping[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 64},
    "/v1/completions": {"prompt": "Once upon a time", "max_tokens": 64},
}


def docs_page(description: Mapping[str, Any]) -> str:
    """Returns the page for an OpenAPI description."""
    schemas = description["components"]["schemas"]
    title = f"{description['info']['title']} {description['info']['version']}"
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{_STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        "<p>An OpenAI-compatible API. The description for programs is <a href='/openapi.json'><code>/openapi.json</code></a>. ",
        "<code>null</code> means that a field is absent.</p>",
    ]
    for path, operations in description["paths"].items():
        for method, operation in operations.items():
            parts += _operation(path, method, operation)
    parts.append("<h1>Objects</h1>")
    for name, schema in schemas.items():
        parts += _object(name, schema)
    return "\n".join([*parts, "</body></html>\n"])


def _operation(path: str, method: str, operation: Mapping[str, Any]) -> Iterator[str]:
    yield f'<h2><span class="method">{escape(method.upper())}</span> <code>{escape(path)}</code></h2>'
    yield f"<p>{escape(operation.get('description') or operation.get('summary', ''))}</p>"
    if operation.get("security"):
        yield "<p>Needs an API key: <code>authorization: Bearer KEY</code>.</p>"
    body = operation.get("requestBody", {}).get("content", {}).get("application/json")
    if body:
        yield f"<p>Body: {_type(body['schema'])}.</p>"
    if path in _EXAMPLES:
        example = json.dumps(_EXAMPLES[path])
        yield f"<pre>curl http://localhost:8000{escape(path)} -H 'content-type: application/json' -d '{escape(example)}'</pre>"
    yield "<table><tr><th>Status</th><th>Answer</th></tr>"
    for status, answer in operation["responses"].items():
        kinds = [_type(content["schema"]) for content in answer.get("content", {}).values() if content.get("schema")]
        said = ": ".join([escape(answer.get("description", "")), *kinds[:1]])
        yield f"<tr><td>{escape(str(status))}</td><td>{said}</td></tr>"
    yield "</table>"


def _object(name: str, schema: Mapping[str, Any]) -> Iterator[str]:
    yield f'<h2 id="{escape(name)}"><code>{escape(name)}</code></h2>'
    yield f"<p>{escape(schema.get('description', ''))}</p>"
    yield "<table><tr><th>Field</th><th>Type</th><th></th></tr>"
    required = schema.get("required", ())
    for field, told in schema.get("properties", {}).items():
        notes = [*(["Required."] if field in required else []), *_limits(told), told.get("description", "")]
        said = escape(" ".join(note for note in notes if note))
        yield f"<tr><td><code>{escape(field)}</code></td><td>{_type(told)}</td><td>{said}</td></tr>"
    yield "</table>"


def _type(schema: Mapping[str, Any]) -> str:
    """Returns a schema's type in a few words, as HTML; omits null."""
    if "$ref" in schema:
        name = escape(str(schema["$ref"]).rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    kinds = schema.get("anyOf") or schema.get("oneOf")
    if kinds:
        return " or ".join(dict.fromkeys(_type(each) for each in kinds if each.get("type") != "null"))
    if "const" in schema:
        return f"<code>{escape(json.dumps(schema['const']))}</code>"
    if "enum" in schema:
        return " or ".join(f"<code>{escape(json.dumps(each))}</code>" for each in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    return escape(str(schema.get("type", "any")))


def _limits(schema: Mapping[str, Any]) -> Iterator[str]:
    bounds = (
        ("minimum", "at least"), ("exclusiveMinimum", "above"), ("maximum", "at most"), ("exclusiveMaximum", "below"),
        ("minItems", "items: at least"), ("maxItems", "items: at most"), ("maxLength", "characters: at most"),
        ("maxProperties", "entries: at most"),
    )  # fmt: skip
    for each in (schema, *(kind for kind in schema.get("anyOf", ()) if isinstance(kind, Mapping))):
        found = [f"{words} {each[name]:,}" for name, words in bounds if name in each]
        if found:
            yield f"{', '.join(found).capitalize()}."
