"""Ray as the cluster; imported only where it is used."""

import json
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from slm.core.errors import SlmError
from slm.train.data.cluster.jobs import LostError
from slm.train.data.cluster.tasks import result_of, run_task

_INSTALL = "pip install 'slm-edge[ray]' on every machine"
# How long `wait` waits, so that a cluster that has lost its machines is noticed.
_WAIT_S = 5.0
# How long to try to reach the head of the cluster.
_REACHED_S = 20.0


@contextmanager
def ray_cluster(address: str) -> Iterator["RayCluster"]:
    """Connects to a Ray cluster for the duration of the block.

    Args:
        address: HOST:PORT of its head, or "auto" for the cluster that this machine belongs to.

    Raises:
        SlmError: When Ray is not installed, or there is no cluster.
    """
    try:
        import ray
    except ImportError:
        raise SlmError("--ray needs the package ray, which is not installed", _INSTALL) from None
    _check_reachable(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        raise _absent(address, type(error).__name__) from None
    try:
        yield RayCluster(ray)
    finally:
        with suppress(Exception):
            ray.shutdown()


def _check_reachable(address: str) -> None:
    """Checks that something listens at HOST:PORT; Ray itself tries for minutes."""
    host, _, port = address.rpartition(":")
    if not host or "/" in address or not port.isdecimal():  # "auto", or an address of Ray's client
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _REACHED_S).close()
    except (OSError, OverflowError) as error:
        raise _absent(address, getattr(error, "strerror", None) or "no answer") from None


def _absent(address: str, reason: str) -> SlmError:
    return SlmError(
        f"no Ray cluster at {address} ({reason})",
        "start it with ray start --head, and on other machines ray start --address=HOST:PORT; its versions of Python and Ray "
        "must be those of this environment",
    )


class RayCluster:
    """A Ray cluster; see `slm.train.data.cluster.jobs.Cluster`."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        # Losses are handled by `run_jobs`, which reports them. Tasks are spread over all machines.
        self._run = ray.remote(num_cpus=1, max_retries=0, scheduling_strategy="SPREAD")(run_task)

    def slots(self) -> int:
        """Returns the processors of the cluster."""
        return int(self._ray.cluster_resources().get("CPU", 0))

    def submit(self, task: str, spec: dict[str, Any]) -> Any:
        """Starts a task on one processor."""
        return self._run.remote(task, json.dumps(spec))

    def wait(self, handles: list[Any]) -> Any | None:
        """Returns a handle whose task has ended; None if none does within some seconds."""
        ended, _ = self._ray.wait(handles, num_returns=1, timeout=_WAIT_S)
        return ended[0] if ended else None

    def result(self, handle: Any) -> bytes:
        """Returns the result of a task.

        Raises:
            LostError: When its worker or machine is lost.
            SlmError: When the task failed.
        """
        failures = self._ray.exceptions
        try:
            returned: bytes = self._ray.get(handle)
        except failures.OutOfMemoryError:
            raise LostError("its machine was out of memory") from None
        except failures.RayTaskError as error:
            raise _failed(error) from None
        except failures.RayError as error:
            raise LostError(type(error).__name__) from None
        return result_of(returned)

    def cancel(self, handles: list[Any]) -> None:
        """Ends tasks."""
        for handle in handles:
            with suppress(Exception):
                self._ray.cancel(handle, force=True)


def _failed(error: Any) -> SlmError:
    reason = " ".join(str(getattr(error, "cause", None) or error).split())[-300:]
    if "No module named" in reason:
        return SlmError(
            f"a machine of the cluster lacks a package ({reason})", "install the same slm-edge on all machines"
        )
    return SlmError(f"a task failed on the cluster ({reason})", "try the same command without --ray")
