"""Host names that a server on this machine accepts.

A web page can point its own host name at 127.0.0.1 (DNS rebinding) and then send requests to a local server from the visitor's
browser. The Host header of such a request has the page's host name, which identifies it.
"""

import ipaddress
import re
from collections.abc import Collection
from dataclasses import dataclass

LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\s:/?#@\[\]\\]+)(?::([0-9]{1,5}))?")


def name_of(host: str) -> str | None:
    """Returns the name in a Host header, in lower case and without its port; None if the header is malformed."""
    found = _HOST.fullmatch(host.strip(" \t").lower())
    return None if found is None else found[1]


def is_loopback(address: str) -> bool:
    """Returns whether only this machine can reach a server that listens on an IP address."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return (mapped or found).is_loopback


@dataclass(frozen=True)
class Hosts:
    """The accepted host names.

    Attributes:
        names: The names in lower case, with IPv6 addresses in brackets.
        any_address: Whether to accept every IP address as well. Rebinding needs a name, and health probes use addresses.
    """

    names: Collection[str]
    any_address: bool = False

    def accept(self, host: str) -> bool:
        """Returns whether a Host header is accepted."""
        name = name_of(host)
        if name is None:
            return False
        return name in self.names or (self.any_address and _is_address(name))


def hosts_of(address: str, allowed: Collection[str], *, keys: bool, host: str | None = None) -> Hosts | None:
    """Returns the host names that a server accepts, or None for all.

    Args:
        address: The IP address on which it listens.
        allowed: Names that the user allows.
        keys: Whether it requires an API key, which a foreign page does not have.
        host: The user's name of the address.
    """
    loopback = is_loopback(address)
    if not allowed and (keys or not loopback):
        return None
    own = (f"[{name}]" if ":" in name else name for name in (address, host or address))
    return Hosts(LOCAL_NAMES | {name.lower() for name in (*own, *allowed)}, any_address=not loopback)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True
