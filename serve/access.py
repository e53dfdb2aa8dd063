"""Access control: API keys, Host names and origins. Decisions use the request as received, never a URL built from it.

A URL is built from the Host header and parsed again, by rules that the router does not share: `Host: a?` turns every path
into a query, so that a check of the URL's path would accept the request without a key.
"""

import contextlib
import hashlib
import hmac
from collections.abc import Collection, Iterable, Iterator, Sequence
from urllib.parse import urlsplit

from starlette.types import Scope

from slm.serve.errors import Refused
from slm.web.hosts import Hosts

Headers = Sequence[tuple[bytes, bytes]]

# How long a browser may cache a preflight's response, in seconds, and the longest list of headers that it repeats.
_PREFLIGHT_S = 600
_MOST_HEADERS = 4096


class Access:
    """Decides whether a request is allowed, before its body is read."""

    def __init__(
        self,
        keys: Sequence[str] = (),
        hosts: Hosts | None = None,
        origins: Collection[str] = (),
        public: Collection[str] = (),
    ) -> None:
        """Stores the rules.

        Args:
            keys: API keys, one of which a request must have; empty to allow requests without a key.
            hosts: Allowed Host names; None for all.
            origins: Allowed origins of other sites' pages; "*" for all.
            public: Paths that need no key. Every other path needs one, whether it exists or not.
        """
        # Clients send non-ASCII characters in UTF-8 or, as old clients do, in Latin-1.
        spelt = {spelling for key in keys if key for spelling in _spellings(key)}
        self._locked, self._keys = bool(keys), [hashlib.sha256(each).digest() for each in spelt]
        self._hosts, self._public = hosts, frozenset(public)
        self._origins = frozenset(origin.lower() for origin in origins)

    def refusal(self, scope: Scope) -> Refused | None:
        """Returns why a request is rejected, or None."""
        headers: Headers = scope["headers"]
        if (wrong := self._wrong_host(headers)) is not None:
            return wrong
        if not self._locked:
            return self._foreign(headers)
        if _public_path(scope) in self._public or self._has_key(headers):
            return None
        return Refused(401, "the API key is missing or wrong", "authentication_error", code="invalid_api_key")

    def preflight(self, scope: Scope) -> list[tuple[bytes, bytes]] | None:
        """Returns the headers of a preflight's response, in addition to `cors`; None for any other request."""
        headers: Headers = scope["headers"]
        wanted = _only(headers, b"access-control-request-method")
        if scope["method"] != "OPTIONS" or wanted is None or not self.cors(headers):
            return None
        asked = _only(headers, b"access-control-request-headers") or b"authorization, content-type"
        answer = [
            (b"access-control-allow-methods", b"GET, HEAD, POST, OPTIONS"),
            (b"access-control-allow-headers", asked[:_MOST_HEADERS]),
            (b"access-control-max-age", b"%d" % _PREFLIGHT_S),
        ]
        if _only(headers, b"access-control-request-private-network") == b"true":
            answer.append((b"access-control-allow-private-network", b"true"))
        return answer

    def cors(self, headers: Headers) -> list[tuple[bytes, bytes]]:
        """Returns the headers that let another site's page read a response; none if its origin is not allowed."""
        origin = _only(headers, b"origin")
        if origin is None or not self._allows(origin):
            return []
        return [
            (b"access-control-allow-origin", b"*" if "*" in self._origins else origin),
            (b"access-control-expose-headers", b"retry-after, x-request-id"),
            (b"vary", b"Origin"),
        ]

    def _allows(self, origin: bytes) -> bool:
        return "*" in self._origins or origin.decode("latin-1").lower() in self._origins

    def _wrong_host(self, headers: Headers) -> Refused | None:
        if self._hosts is None:
            return None
        hosts = list(_all(headers, b"host"))
        # Browsers always send a Host header; a request without one is not from a browser, so DNS rebinding does not apply.
        if not hosts or (len(hosts) == 1 and self._hosts.accept(hosts[0].decode("latin-1"))):
            return None
        return Refused(
            421,
            "the Host name is not allowed; allow it with slm serve --allow-host NAME",
            code="host_not_allowed",
        )

    def _foreign(self, headers: Headers) -> Refused | None:
        """Rejects requests that another site's page makes a browser send without a preflight."""
        origins = list(_all(headers, b"origin"))
        if not origins or all(_is_own(origin, headers) or self._allows(origin) for origin in origins):
            return None
        return Refused(
            403,
            "the origin of the web page is not allowed; allow it with slm serve --cors-origin ORIGIN",
            code="origin_not_allowed",
        )

    def _has_key(self, headers: Headers) -> bool:
        given = list(_all(headers, b"authorization"))
        if len(given) != 1:
            return False
        scheme, _, key = given[0].strip(b" \t").partition(b" ")
        if scheme.lower() != b"bearer":
            return False
        digest = hashlib.sha256(key.strip(b" \t")).digest()
        # Every key is compared in constant time, so that the duration reveals nothing.
        return sum(hmac.compare_digest(digest, each) for each in self._keys) > 0


def origin_of(text: str) -> str | None:
    """Returns an origin as browsers spell it, "*" or "null"; None if the text is not an origin."""
    text = text.strip().lower()
    if text in ("*", "null"):
        return text
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        return None
    if not parts.scheme or not parts.hostname or parts.username is not None or "\\" in text or not text.isascii():
        return None
    if parts.path not in ("", "/") or parts.query or parts.fragment or "?" in text or "#" in text:
        return None
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    usual = port is None or port == {"http": 80, "https": 443}.get(parts.scheme)
    return f"{parts.scheme}://{host}" if usual else f"{parts.scheme}://{host}:{port}"


def _is_own(origin: bytes, headers: Headers) -> bool:
    """Returns whether a page comes from this server, judged by the Host name that the browser used."""
    host = _only(headers, b"host")
    scheme, _, authority = origin.lower().partition(b"://")
    if host is None or scheme not in (b"http", b"https") or not authority:
        return False
    usual = b":80" if scheme == b"http" else b":443"
    return authority.removesuffix(usual) == host.strip(b" \t").lower().removesuffix(usual)


def _public_path(scope: Scope) -> str | None:
    """Returns the path that the router will see; None if it has escapes, which no known client sends in these paths."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    if "%" in scope.get("raw_path", b"").decode("latin-1"):
        return None
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


def _all(headers: Headers, name: bytes) -> Iterable[bytes]:
    return (value for key, value in headers if key.lower() == name)


def _only(headers: Headers, name: bytes) -> bytes | None:
    """Returns a header's value; None if it is absent or repeated."""
    found = list(_all(headers, name))
    return found[0] if len(found) == 1 else None


def _spellings(key: str) -> Iterator[bytes]:
    for code in ("utf-8", "latin-1"):
        with contextlib.suppress(UnicodeEncodeError):
            yield key.encode(code)
