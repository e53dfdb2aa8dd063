"""Memory of cached keys and values: shared with numpy, or on a device.

Dimensions: B batch, K kv heads, C capacity, H head dim.
"""

from collections.abc import Callable
from copy import copy
from itertools import product
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

Array = NDArray[Any]


# The address of a buffer, and its shape.
Located = tuple[int, tuple[int, ...]]


class Buffer(Protocol):
    """Keys or values of one layer (B, K, C, H), bound as past and as present at the same time."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, K, C, H)."""

    @property
    def nbytes(self) -> int:
        """Memory of the buffer, in bytes."""

    @property
    def located(self) -> Located:
        """The address and the shape."""

    def rows(self, start: int, stop: int) -> "Buffer":
        """Returns some rows as a buffer of their own, on the same memory."""

    def bind(self, binding: ort.IOBinding, past: str, present: str) -> None:
        """Binds the buffer as an input and as an output. The buffer must outlive the binding."""

    def read(self, rows: slice, start: int, stop: int) -> Array:
        """Returns some positions of some rows (rows, K, stop - start, H), valid until the next step or write."""

    def write(self, rows: slice, start: int, array: Array) -> None:
        """Replaces the positions of some rows (rows, K, positions, H) from `start` on."""


# Creates a buffer from its initial content (B, K, C, H), whose memory the buffer may take over.
Place = Callable[[Array], Buffer]


class HostBuffer:
    """A buffer that numpy and the graph share: reading takes no copy, and writing takes one.

    Attributes:
        array: The memory.
    """

    def __init__(self, array: Array) -> None:
        self.array = array
        # On the CPU, an OrtValue created from an array shares its memory: the array shows what the graph writes.
        self._value = ort.OrtValue.ortvalue_from_numpy(array)

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, K, C, H)."""
        return self.array.shape

    @property
    def nbytes(self) -> int:
        """Memory of the buffer, in bytes."""
        return self.array.nbytes

    @property
    def located(self) -> Located:
        """The address and the shape."""
        return self.array.ctypes.data, self.array.shape

    def rows(self, start: int, stop: int) -> "HostBuffer":
        """Returns some rows as a buffer of their own, on the same memory."""
        return HostBuffer(self.array[start:stop])

    def bind(self, binding: ort.IOBinding, past: str, present: str) -> None:
        """Binds the buffer as an input and as an output."""
        binding.bind_ortvalue_input(past, self._value)
        binding.bind_ortvalue_output(present, self._value)

    def read(self, rows: slice, start: int, stop: int) -> Array:
        """Returns a view of some positions of some rows (rows, K, stop - start, H)."""
        return self.array[rows, :, start:stop]

    def write(self, rows: slice, start: int, array: Array) -> None:
        """Replaces the positions of some rows (rows, K, positions, H) from `start` on."""
        self.array[rows, :, start : start + array.shape[2]] = array


class DeviceBuffer:
    """A buffer in a device's memory. A step copies nothing; numpy receives copies.

    Reading and writing go through the host, because onnxruntime cannot copy parts of a tensor within a device. They transfer
    exactly the requested bytes, one transfer per head of each row, and then the host waits for the device. Operations that
    are cheap on a CPU should therefore be rare here: a snapshot moves all cached bytes over the bus once (9.0 MiB after 512
    tokens of the 270M shape in float16), an exchange of two rows four times as much, and a growing buffer moves itself twice.
    """

    def __init__(self, array: Array, session: ort.InferenceSession, device: str, device_id: int = 0) -> None:
        """Allocates memory and fills it.

        Args:
            array: The initial content (B, K, C, H), which is copied.
            session: The session that will use the buffer.
            device: onnxruntime's name of the device, such as "cuda".
            device_id: The index of the device.
        """
        self.shape: tuple[int, ...] = array.shape
        self.dtype = array.dtype
        self._session = session
        self._device = (device, device_id)
        self._value = ort.OrtValue.ortvalue_from_shape_and_type(array.shape, array.dtype.type, device, device_id)
        self._value.update_inplace(array)
        self._first = 0  # the rows of the OrtValue that this buffer covers

    @property
    def nbytes(self) -> int:
        """Memory of the buffer, in bytes."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    @property
    def located(self) -> Located:
        """The address and the shape."""
        return self._address(0), self.shape

    def rows(self, start: int, stop: int) -> "DeviceBuffer":
        """Returns some rows as a buffer of their own, on the same memory."""
        view = copy(self)
        view._first, view.shape = self._first + start, (stop - start, *self.shape[1:])
        return view

    def bind(self, binding: ort.IOBinding, past: str, present: str) -> None:
        """Binds the buffer as an input and as an output, by its address: an OrtValue cannot represent a subset of rows."""
        where = (*self._device, self.dtype.type, self.shape, self._address(0))
        binding.bind_input(past, *where)
        binding.bind_output(present, *where)

    def read(self, rows: slice, start: int, stop: int) -> Array:
        """Returns a copy of some positions of some rows (rows, K, stop - start, H)."""
        chosen = range(*rows.indices(self.shape[0]))
        array = np.empty((len(chosen), self.shape[1], stop - start, self.shape[3]), self.dtype)
        if array.size:
            for (i, row), head in product(enumerate(chosen), range(self.shape[1])):
                array[i, head] = self._part(row, head, start, stop).numpy()
        return array

    def write(self, rows: slice, start: int, array: Array) -> None:
        """Replaces the positions of some rows (rows, K, positions, H) from `start` on."""
        if array.size:
            for (i, row), head in product(enumerate(range(*rows.indices(self.shape[0]))), range(self.shape[1])):
                part = self._part(row, head, start, start + array.shape[2])
                part.update_inplace(np.ascontiguousarray(array[i, head]))

    def _address(self, row: int, head: int = 0, position: int = 0) -> int:
        _, heads, capacity, width = self.shape
        before = (((self._first + row) * heads + head) * capacity + position) * width
        return int(self._value.data_ptr()) + before * self.dtype.itemsize

    def _part(self, row: int, head: int, start: int, stop: int) -> ort.OrtValue:
        """Returns positions of one head (positions, H), which are contiguous, as an OrtValue on the same memory.

        onnxruntime creates such values from addresses only through a binding.
        """
        binding = self._session.io_binding()
        name = self._session.get_outputs()[0].name
        shape = (stop - start, self.shape[3])
        binding.bind_output(name, *self._device, self.dtype.type, shape, self._address(row, head, start))
        return binding.get_outputs()[0]
