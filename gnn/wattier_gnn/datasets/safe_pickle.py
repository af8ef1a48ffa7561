"""Pickled torch_geometric records read without running what a pickle asks to run.

A pickle is a program: it may call any function it names. Here it may name only what rebuilds tensors and arrays; a
class of torch_geometric becomes an inert `Record`, so that the package need not be installed.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy._core.multiarray import _reconstruct

from wattier_gnn.structure import DataError, ShardError

# What the C unpickler and tensor rebuilding raise on bytes that are no pickle or the wrong one.
_DAMAGED = (EOFError, ArithmeticError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError)


class Record:
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


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch_geometric" or module.startswith("torch_geometric."):
            return Record
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return _load_storage
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            from torch._utils import _rebuild_tensor_v2

            return _rebuild_tensor_v2
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        raise _ForbiddenGlobalError(f"{module}.{name}")


def _load_storage(data: bytes) -> Any:
    """What ``torch.storage._load_from_bytes`` does, less its permission to run code."""
    import torch

    return torch.load(io.BytesIO(data), weights_only=True)


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
}
