"""Pickled torch_geometric records read without running what a pickle asks to run.

A pickle is a program: it may call any function it names. Here it may name only what rebuilds tensors and arrays; a
class of torch_geometric becomes an inert `Record`, so that the package need not be installed. Neither may it change
what it names (later pickles use it too), nor make the unpickler or torch allocate what it merely announces.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from math import prod
from typing import Any, NoReturn

import numpy as np

from wattier_gnn.structure import DataError, ShardError

# What the C unpickler and tensor rebuilding raise on bytes that are no pickle or the wrong one.
_DAMAGED = (
    EOFError, ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, MemoryError, OSError,
    RuntimeError, TypeError, ValueError,
)  # fmt: skip
_MEMO_WRITES = {"PUT", "BINPUT", "LONG_BINPUT"}


class _Unchangeable(type):
    def __setattr__(cls, name: str, value: Any) -> NoReturn:
        raise TypeError(f"{cls.__name__}.{name} must not be set")


class Record(metaclass=_Unchangeable):
    """Stands in for any torch_geometric object: holds its attributes, does nothing."""


class _ForbiddenGlobalError(Exception):
    """A pickle named something that is not on the list."""


def load(data: bytes, where: str) -> Any:
    """The object of one pickle made of plain Python values, tensors, arrays and torch_geometric objects (`Record`).

    Args:
        data: the pickle.
        where: file and key, for messages.

    Raises:
        DataError: the pickle names a function or class outside the list. Nothing was run.
        ShardError: the bytes are no whole pickle.
    """
    try:
        _check_memo(data)
        return _Unpickler(io.BytesIO(data)).load()
    except _ForbiddenGlobalError as error:
        raise DataError(
            f"{where}: the pickle asks for {error}, but must ask only for tensors, arrays and torch_geometric data. "
            "Nothing was run; do not open this file with other tools unless you trust its origin"
        ) from error
    except (pickle.UnpicklingError, *_DAMAGED) as error:
        raise ShardError(
            f"{where}: cannot be unpickled ({error!r}), but must be a whole pickle. Fetch it again"
        ) from error


def load_record(data: bytes, where: str) -> Mapping[str, Any]:
    """The fields of one pickled ``torch_geometric.data.Data``: of PyG 2 (``_store._mapping``) or older (attributes).

    Raises:
        DataError, ShardError: as for `load`, or the pickle holds something else.
    """
    record = load(data, where)
    fields: Any = record.__dict__ if isinstance(record, Record) else None
    if isinstance(fields, Mapping) and isinstance(fields.get("_store"), Record):
        fields = fields["_store"].__dict__.get("_mapping")
    if not isinstance(fields, Mapping):
        raise ShardError(
            f"{where}: is a {type(record).__name__}, but must be a torch_geometric Data. Check the dataset"
        )
    return fields


def _check_memo(data: bytes) -> None:
    """Refuse a memo larger than the pickle: the unpickler would fill gigabytes for one small number."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in _MEMO_WRITES and not 0 <= int(argument or 0) <= len(data):
            raise pickle.UnpicklingError(f"memo entry {argument} in {len(data)} bytes")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch_geometric" or module.startswith("torch_geometric."):
            return Record
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        raise _ForbiddenGlobalError(f"{module}.{name}")


class _LoadStorage:
    """What ``torch.storage._load_from_bytes`` does, less its permission to run code."""

    __slots__ = ()  # an object of no attributes: a pickle cannot change it

    def __call__(self, data: bytes) -> Any:
        import torch

        if data[:2] == b"PK":  # storages are never zipped inside a pickle, and a zip file may unpack to anything
            raise pickle.UnpicklingError("a zip file where a storage is due")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of protocols that it then refuses
            return torch.load(io.BytesIO(data), weights_only=True)


class _RebuildTensor:
    """What ``torch._utils._rebuild_tensor_v2`` does, but the storage must hold what the tensor announces.

    Torch would enlarge the storage to any size asked for, and stretch one number to any shape with strides of 0.
    """

    __slots__ = ()

    def __call__(self, storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_unused: Any) -> Any:
        import torch

        if not isinstance(storage, torch.storage.TypedStorage):
            raise pickle.UnpicklingError(f"a tensor on a {type(storage).__name__}")
        available = storage._untyped_storage.nbytes() // storage.dtype.itemsize
        if offset < 0 or min((*size, *stride), default=0) < 0 or offset + prod(size) > available:
            raise pickle.UnpicklingError(f"a tensor {list(size)} on {available} numbers")
        flat = torch.empty(0, dtype=storage.dtype).set_(storage._untyped_storage, offset, (available - offset,), (1,))
        return flat.as_strided(size, stride)


class _NumberType(metaclass=_Unchangeable):
    """Stands in for ``numpy.dtype``, of numbers only.

    The state of a real one holds flags by which numpy takes the bytes of an array for addresses of objects.
    """

    __slots__ = ("dtype",)

    def __init__(self, name: str, *_unused: Any) -> None:
        if not isinstance(name, str) or np.dtype(name).kind not in "iufb":
            raise pickle.UnpicklingError(f"values of type {name!r:.40}, which are no numbers")
        self.dtype: np.dtype[Any] = np.dtype(name)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray[Any, Any]):
    """An array that holds the bytes its pickle brings along: numpy would allocate objects that it announces."""

    __slots__ = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        version, shape, number, is_fortran, data = state
        if not isinstance(number, _NumberType) or not isinstance(data, bytes):
            raise pickle.UnpicklingError("an array that is not made of numbers")
        super().__setstate__((version, shape, number.dtype, is_fortran, data))


class _Reconstruct:
    """What ``numpy.core.multiarray._reconstruct`` does, but empty whatever the shape: the state sets it, with bytes."""

    __slots__ = ()

    def __call__(self, *_unused: Any) -> _Array:
        return np.empty(0, "b").view(_Array)


class _Scalar:
    """What ``numpy.core.multiarray.scalar`` does, for numbers only."""

    __slots__ = ()

    def __call__(self, number: Any, data: bytes) -> Any:
        if not isinstance(number, _NumberType) or len(data) != number.dtype.itemsize:
            raise pickle.UnpicklingError("a scalar that is no number")
        return np.frombuffer(data, number.dtype)[0]


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch.storage", "_load_from_bytes"): _LoadStorage(),
    ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
    ("numpy.core.multiarray", "scalar"): _Scalar(),
    ("numpy._core.multiarray", "scalar"): _Scalar(),
    ("numpy", "ndarray"): object(),  # named as what to reconstruct, never called: it would allocate any shape
    ("numpy", "dtype"): _NumberType,
    ("numpy.core.multiarray", "_reconstruct"): _Reconstruct(),
    ("numpy._core.multiarray", "_reconstruct"): _Reconstruct(),
}
