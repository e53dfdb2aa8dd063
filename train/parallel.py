"""Data parallelism: torchrun starts several processes, each of which computes its share of the rows of every micro-step.

The recipe's batch is the sum over all processes, so that one process or four train the same model from the same rows.
With DDP (arXiv:2006.15704) every process holds the whole model; with FSDP2 (arXiv:2304.11277) each holds a shard of the
weights, gradients and moments, for models that do not fit into one device. Saved files are whole in both cases.
"""

import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from typing_extensions import override

from slm.core.errors import SlmError
from slm.train.choices import ParallelName

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store
    from torch.distributed.tensor import DTensor

# Values that processes exchange besides tensors, as JSON: no pickle.
Json = None | bool | int | float | str | list[Any] | dict[str, Any]
T = TypeVar("T", bound=Json)

# Timeout for joining, and for each exchange of gradients or numbers.
_TOGETHER = timedelta(minutes=10)
# Timeout for work that only the first process does, such as preparing the data.
_PATIENCE = timedelta(hours=12)

# Interval at which the first process looks for others.
_TICKETS_S = 0.01

_ERROR_CODE = 1


class Processes(Protocol):
    """A group of processes that train together.

    Attributes:
        rank: Number of this process; process 0 writes files and reports progress.
        size: Number of processes.
    """

    rank: int
    size: int

    def wrap(self, objective: nn.Module, kind: ParallelName, device: torch.device) -> nn.Module:
        """Returns the module with gradients averaged over the processes; its parameters keep their names.

        Args:
            objective: A `slm.train.learner.Objective`, its model on its device.
            kind: DDP or FSDP.
            device: The device of this process.
        """

    def micro_step(self, objective: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Returns the context in which a micro-step runs; `last` marks the last one of an update."""

    def gathered(self, objective: nn.Module) -> AbstractContextManager[Any]:
        """Returns the context in which the wrapped module, or its model, can be called outside of training.

        All processes must enter it and make the same calls.
        """

    def total(self, values: Sequence[float]) -> list[float]:
        """Returns the sums of numbers over the processes, the same in each."""

    def from_first(self, value: T) -> T:
        """Returns what the first process has."""


class Alone(Processes):
    """One process."""

    rank, size = 0, 1

    @override
    def wrap(self, objective: nn.Module, kind: ParallelName, device: torch.device) -> nn.Module:
        return objective

    @override
    def micro_step(self, objective: nn.Module, last: bool) -> AbstractContextManager[Any]:
        return nullcontext()

    @override
    def gathered(self, objective: nn.Module) -> AbstractContextManager[Any]:
        return nullcontext()

    @override
    def total(self, values: Sequence[float]) -> list[float]:
        return list(values)

    @override
    def from_first(self, value: T) -> T:
        return value


class Group(Processes):
    """The processes that torchrun started."""

    def __init__(self) -> None:
        """Joins the group.

        Raises:
            SlmError: When one of torchrun's variables is missing, or not all processes join.
        """
        try:
            # torchrun itself holds the store, so that it outlives a process that fails.
            store, self.rank, self.size = next(rendezvous("env://", timeout=_TOGETHER))
            self._store = _of_this_start(store, self.rank, self.size)
            # gloo handles CPU tensors; NCCL opens its connections when the first GPU tensor needs them
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, store=self._store, rank=self.rank, world_size=self.size, timeout=_TOGETHER)
            self._patient = dist.new_group(backend="gloo", timeout=_PATIENCE)
        except ValueError as error:  # a variable is missing or not a number
            raise SlmError(f"cannot join the other processes: {error}", "start them all with torchrun") from None
        except RuntimeError:
            raise SlmError(
                f"not all of the {os.environ['WORLD_SIZE']} processes came together within {_TOGETHER}",
                "start every node, with the same --rdzv-endpoint, and let them reach each other's ports",
            ) from None

    @override
    def wrap(self, objective: nn.Module, kind: ParallelName, device: torch.device) -> nn.Module:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if kind == "ddp":
            from torch.nn.parallel import DistributedDataParallel

            where = [device] if device.type == "cuda" else None
            wrapped = DistributedDataParallel(objective, device_ids=where, gradient_as_bucket_view=True)
            _settle(wrapped, device)
            return wrapped
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (self.size,))
        for layer in objective.model.model.layers:  # type: ignore[union-attr]
            fully_shard(layer, mesh=mesh)  # gathers and frees its weights on its own
        fully_shard(objective, mesh=mesh)
        return objective

    @override
    def micro_step(self, objective: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Returns the context of a micro-step. With DDP only the last one of an update exchanges gradients.

        With FSDP each one does: otherwise every process would hold whole gradients.
        """
        if _is_sharded(objective) or last:
            return nullcontext()
        return objective.no_sync()  # type: ignore[operator]

    @override
    @contextmanager
    def gathered(self, objective: nn.Module) -> Iterator[None]:
        """Gathers the weights outside of the layers, which gather their own, and frees them at the end.

        After a forward pass FSDP keeps the outermost module's weights for the backward pass. No backward pass follows here,
        and the next forward pass would not see weights that change in between, as with a moving average.
        """
        if not _is_sharded(objective):
            yield
            return
        objective.unshard()  # type: ignore[operator]
        try:
            yield
        finally:
            objective.reshard()  # type: ignore[operator]

    @override
    def total(self, values: Sequence[float]) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor)
        sums: list[float] = tensor.tolist()
        return sums

    @override
    def from_first(self, value: T) -> T:
        said = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        length = torch.tensor(len(said))
        dist.broadcast(length, src=0, group=self._patient)
        if self.rank != 0:
            said = torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(said, src=0, group=self._patient)
        heard: T = json.loads(said.numpy().tobytes())
        return heard

    def complains_first(self) -> bool:
        """Returns whether this process is the first to report an error; true in exactly one."""
        try:
            return self._store.add("complaints", 1) == 1
        except RuntimeError:  # torchrun has ended, and no other process can report
            return True


def _of_this_start(store: "Store", rank: int, size: int) -> "Store":
    """Returns the part of a store that belongs to these processes alone.

    When torchrun restarts its processes, they find the store as their predecessors left it, and would connect to those. The
    number of restarts does not tell them apart: it does not count changes of the number of nodes, and a node that joins later
    counts from 0. Therefore each process draws a ticket, and the first process answers every ticket with a name for this start.

    Raises:
        RuntimeError: When not all processes come in time.
    """
    store.set_timeout(_TOGETHER)
    if rank != 0:
        name = store.get(f"start/{store.add('tickets', 1)}").decode()
        store.add(f"{name}/came", 1)
        return dist.PrefixStore(name, store)  # type: ignore[attr-defined]
    name, until = secrets.token_hex(8), time.monotonic() + _TOGETHER.total_seconds()
    while store.add(f"{name}/came", 0) < size - 1:
        answered, drawn = store.add("answered", 0), store.add("tickets", 0)
        for ticket in range(answered + 1, drawn + 1):
            store.set(f"start/{ticket}", name)
            store.add("answered", 1)
        if time.monotonic() > until:
            raise RuntimeError("not all processes came")
        time.sleep(_TICKETS_S)
    return dist.PrefixStore(name, store)  # type: ignore[attr-defined]


@contextmanager
def joined() -> Iterator[Processes]:
    """Joins the processes that torchrun started, if any, within the block.

    If one of them fails or is stopped, the others exit too. The first to fail reports its error; the others exit silently.

    Raises:
        SlmError: When the processes cannot join, or one of them ended without reporting an error.
    """
    if not launched():
        yield Alone()
        return
    group = Group()
    try:
        yield group
    except BaseException as error:
        _leave(group, error)
    dist.destroy_process_group()


def _leave(group: Group, error: BaseException) -> NoReturn:
    """Raises the error in the process that reports it, and exits in the others."""
    if not group.complains_first():
        code = error.code if isinstance(error, SystemExit) else getattr(error, "exit_code", _ERROR_CODE)
        raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else code) from None
    # gloo's errors have no class of their own
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
        raise SlmError(
            "another of the processes is gone",
            "see torchrun's report for the reason; slm train --resume continues the run",
        ) from error
    raise error


def by_first(processes: Processes, work: Callable[[], T]) -> T:
    """Runs `work` in the first process; returns its result, or raises its `SlmError`, in every process."""
    told: dict[str, Any] = {}
    if processes.rank == 0:
        try:
            told = {"result": work()}
        except SlmError as error:
            told = {"complaint": [error.message, error.hint]}
    told = processes.from_first(told)
    if "complaint" in told:
        raise SlmError(*told["complaint"])
    result: T = told["result"]
    return result


def launched() -> bool:
    """Returns whether torchrun started this process together with others."""
    size = os.environ.get("WORLD_SIZE", "1")
    return not size.isdigit() or int(size) > 1


def local_rank() -> int:
    """Returns the number of this process on its machine, which is also the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_size() -> int:
    """Returns the number of processes that torchrun started on this machine, which share its memory."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def check_even(rows: int, processes: Processes) -> None:
    """Checks that every process gets as many rows of a micro-step.

    Raises:
        SlmError: When the rows cannot be divided evenly.
    """
    if rows % processes.size:
        raise SlmError(
            f"{processes.size} processes cannot share batches of {rows} windows evenly",
            f"--set batch.batch_size={-(-rows // processes.size) * processes.size}",
        )


def share_of(rows: int, processes: Processes) -> slice:
    """Returns this process's rows of a micro-step; the first processes have one more where they do not divide evenly."""
    mine, more = divmod(rows, processes.size)
    first = processes.rank * mine + min(processes.rank, more)
    return slice(first, first + mine + (processes.rank < more))


def launch_id() -> str | None:
    """Returns what names this call of torchrun in all of its restarts; None without torchrun.

    That is its --rdzv-id, or the process of torchrun itself where it has none.
    """
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    if run_id != "none":
        return run_id
    import psutil

    try:
        agent = psutil.Process(os.getppid())
        return f"{socket.gethostname()} {agent.pid} {agent.create_time()}"
    except psutil.Error:
        return None


def collect(tensors: Iterable[tuple[str, Tensor]], keep: bool = True) -> dict[str, Tensor]:
    """Returns tensors by name, whole and on the CPU; every process must pass the same ones.

    Args:
        tensors: Names and tensors, of which each process may hold a shard.
        keep: Whether to return them in this process; otherwise it returns nothing, and holds one tensor at a time.
    """
    collected = {}
    for name, tensor in tensors:
        full = whole(tensor.detach())
        if keep:
            collected[name] = full.cpu().contiguous()
    return collected


def whole(tensor: Tensor) -> Tensor:
    """Returns a tensor whole, of which each process may hold a shard; every process must call this."""
    return tensor.full_tensor() if _is_share(tensor) else tensor  # type: ignore[attr-defined]


def shared_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Returns this process's shard of a whole tensor, sharded like a parameter; the tensor itself if nothing is sharded."""
    if not _is_share(parameter) or tensor.shape != parameter.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    like: DTensor = parameter  # type: ignore[assignment]
    # None: every process has read the same tensor, so that none needs to be sent
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _settle(wrapped: nn.Module, device: torch.device) -> None:
    """Makes one backward pass, after which DDP arranges its buckets by the order in which gradients arrive.

    Where an element of a gradient lies in a bucket decides in which order more than two processes add it. A run that is resumed
    thereby adds as the run did that was not interrupted, from its first update on.
    """
    objective: Any = wrapped.module
    body = objective.model.model
    compiled, objective._compiled, flex, body.flex = objective._compiled, None, body.flex, False
    try:
        ids = torch.zeros(1, 2, dtype=torch.int64, device=device)
        for _ in range(2):  # the second forward pass arranges them
            wrapped(ids, ids).backward()
    finally:
        objective._compiled, body.flex = compiled, flex
    wrapped.zero_grad(set_to_none=True)


def _is_share(tensor: Tensor) -> bool:
    """Returns whether a tensor is a DTensor, without importing it in a single process."""
    return hasattr(tensor, "full_tensor")


def _is_sharded(objective: nn.Module) -> bool:
    """Returns whether a module is sharded by FSDP."""
    return hasattr(objective, "set_requires_gradient_sync")
