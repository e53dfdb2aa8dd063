"""Host names that a server on this machine answers to.

A web page may point a name of its own at 127.0.0.1 (DNS rebinding) and then ask a local server from the browser of whoever
opened the page. The browser's Host header names the page's host, by which such a request is told from others.
"""

import ipaddress
import re
from collections.abc import Collection
from dataclasses import dataclass

LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\s:/?#@\[\]\\]+)(?::([0-9]{1,5}))?")


def name_of(host: str) -> str | None:
    """Returns the name in a Host header, in lower case and without its port; None where the header is malformed."""
    found = _HOST.fullmatch(host.strip(" \t").lower())
    return None if found is None else found[1]


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach a server that listens on an IP address."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return (mapped or found).is_loopback


@dataclass(frozen=True)
class Hosts:
    """Host names that are answered.

    Attributes:
        names: In lower case, IPv6 addresses in brackets.
        any_address: Whether every IP address is answered too. No name can be rebound to one, and probes ask by address.
    """

    names: Collection[str]
    any_address: bool = False

    def accept(self, host: str) -> bool:
        """Whether a Host header is answered."""
        name = name_of(host)
        if name is None:
            return False
        return name in self.names or (self.any_address and _is_address(name))


def hosts_of(address: str, allowed: Collection[str], *, keys: bool, host: str | None = None) -> Hosts | None:
    """Returns the Host names that a server answers to, or None for all.

    Args:
        address: The IP address that it listens on.
        allowed: Names that the user allows.
        keys: Whether it asks for a key, which a page of somebody else does not have.
        host: What the user calls the address.
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
