"""Ray as the cluster; imported only where it is used."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from slm.core.errors import SlmError
from slm.train.data.cluster.jobs import LostError
from slm.train.data.cluster.tasks import result_of, run_task

_INSTALL = "pip install 'slm-edge[ray]' on every machine"
# How long `wait` waits, so that a cluster that has lost its machines is noticed.
_WAIT_S = 5.0


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
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        raise SlmError(
            f"no Ray cluster at {address} ({type(error).__name__})",
            "start it with ray start --head, and on other machines ray start --address=HOST:PORT; its versions of Python and "
            "Ray must be those of this environment",
        ) from None
    try:
        yield RayCluster(ray)
    finally:
        with suppress(Exception):
            ray.shutdown()


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
