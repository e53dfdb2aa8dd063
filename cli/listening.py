"""The error of a command that cannot open its port."""

from slm.core.errors import SlmError


def cannot_listen(host: str, port: int, error: OSError) -> SlmError:
    """Returns the error for an address that is in use or does not belong to this machine."""
    reason = (error.strerror or str(error)).lower()
    return SlmError(f"cannot listen on {host}:{port} ({reason})", "choose another --port or --host")
