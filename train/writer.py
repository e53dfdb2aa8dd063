"""Who writes the files of a save: this thread at once, or another one while training goes on.

A thread suffices: safetensors and fsync release the interpreter's lock.
"""

import threading
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

Work = Callable[[], None]


class Writer(Protocol):
    """Writes the parts of a save in order."""

    def kept(self, name: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Returns tensors that stay as they are until they are written.

        Args:
            name: The purpose of the tensors, the same in every save.
            tensors: The tensors, on the CPU; training may change them.
        """

    def add(self, work: Work) -> None:
        """Takes the next part of a save."""

    def begin(self) -> None:
        """Lets the parts be written."""

    def finish(self) -> None:
        """Waits until everything is on the disk.

        Raises:
            OSError: When a part could not be written, such as on a full disk; the parts after it were not written.
        """

    def await_end(self, seconds: float) -> None:
        """Waits until nothing is written, for at most so many seconds; any thread may call it."""


class AtOnce(Writer):
    """Writes each part when it is added."""

    @override
    def kept(self, name: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return tensors

    @override
    def add(self, work: Work) -> None:
        work()

    @override
    def begin(self) -> None:
        """Does nothing."""

    @override
    def finish(self) -> None:
        """Does nothing."""

    @override
    def await_end(self, seconds: float) -> None:
        """Does nothing."""


class Background(Writer):
    """Writes in a thread, from copies of the tensors. The copies' memory is kept for the next save."""

    def __init__(self, *, shared: bool) -> None:
        """Prepares the first save.

        Args:
            shared: Whether the tensors of a save share memory with what is trained, as on a CPU. Those of a GPU are copies.
        """
        self._shared = shared
        self._copies: dict[str, dict[str, Tensor]] = {}
        self._works: list[Work] = []
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @override
    @torch.no_grad()
    def kept(self, name: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        copies, before = {}, self._copies.get(name, {})
        for key, tensor in tensors.items():
            if not self._shared and tensor.dim():  # an optimizer may count its steps on the CPU
                copies[key] = tensor
                continue
            copy = before.get(key)
            if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                copy = torch.empty_like(tensor, memory_format=torch.contiguous_format)
            # By one thread: hundreds of parallel copies, each with a barrier, take seconds on a busy machine.
            np.copyto(copy.numpy(), tensor.numpy())
            copies[key] = copy
        if self._shared:
            self._copies[name] = copies
        return copies

    @override
    def add(self, work: Work) -> None:
        self._works.append(work)

    @override
    def begin(self) -> None:
        works, self._works = self._works, []

        def write() -> None:
            try:
                for work in works:
                    work()
            except BaseException as error:  # raised in the thread that waits
                self._error = error

        # Not a daemon: a command that fails elsewhere still ends the save before it exits.
        self._thread = threading.Thread(target=write, name="checkpoint writer")
        self._thread.start()

    @override
    def finish(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    @override
    def await_end(self, seconds: float) -> None:
        thread = self._thread
        if thread is not None:
            thread.join(seconds)
