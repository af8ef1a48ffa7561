"""HDF5 files of others: a dataset is read after its size, type and place are known to be sane, never before."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from wattier_gnn.datasets.shard import MOST_ATOMS, MOST_RECORD_BYTES, Shape, checked_array, shard_error

# A dataset that unpacks to more than this many times its size was never written: HDF5 makes up the missing values.
LARGEST_COMPRESSION = 2000
LARGEST_CHUNK_BYTES = 4 * MOST_RECORD_BYTES

_HDF5_ERRORS = (KeyError, OSError, RuntimeError, ValueError, TypeError, AttributeError, MemoryError)


def open_hdf5(path: Path) -> h5py.File:
    """The file, opened for reading.

    Raises:
        ShardError: HDF5 cannot open it (truncated, or no HDF5 at all).
    """
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise shard_error(path, "", f"HDF5 says {error}", "a whole HDF5 file") from error


def hdf5_names(path: Path, group: h5py.Group) -> Iterator[str]:
    """The names in a group, one by one.

    Raises:
        ShardError: the list of names is damaged.
    """
    try:
        for name in group:
            yield str(name)
    except _HDF5_ERRORS as error:
        raise shard_error(path, str(group.name), f"HDF5 says {error}", "a group whose names can be read") from error


def hdf5_group(path: Path, parent: h5py.Group, name: str) -> h5py.Group:
    """The group `name` inside `parent`.

    Raises:
        ShardError: it is something else, lies in another file, or cannot be read.
    """
    inside = f"{parent.name.rstrip('/')}/{name}"
    try:
        group = _member(path, parent, name)
    except _HDF5_ERRORS as error:
        raise shard_error(path, inside, f"HDF5 says {error}", "a group") from error
    if not isinstance(group, h5py.Group):
        raise shard_error(path, inside, f"is a {type(group).__name__}", "a group")
    return group


def hdf5_dataset(path: Path, group: h5py.Group, name: str, shape: Shape) -> h5py.Dataset:
    """The dataset `name` of `group`, not yet read; its numbers are there and have this shape.

    Raises:
        ShardError: it is missing, lies in another file, was never written, or has another shape or type.
    """
    inside, must_be = f"{group.name}/{name}", f"a dataset of numbers [{', '.join(map(str, shape))}]"
    try:
        dataset = _member(path, group, name)
        if not isinstance(dataset, h5py.Dataset):
            raise shard_error(path, inside, f"is a {type(dataset).__name__}", must_be)
        shape_there, dtype = dataset.shape or (), dataset.dtype
        fits = len(shape_there) == len(shape) and all(
            isinstance(due, str) or due == length for due, length in zip(shape, shape_there, strict=False)
        )
        if dtype.kind not in "iuf" or not fits:
            raise shard_error(path, inside, f"is {dtype} {list(shape_there)}", must_be)
        stored, announced = int(dataset.id.get_storage_size()), prod(shape_there) * dtype.itemsize
        recipe = dataset.id.get_create_plist()
        layout = recipe.get_layout()
        if layout == h5py.h5d.VIRTUAL or (layout == h5py.h5d.CONTIGUOUS and recipe.get_external_count()):
            raise shard_error(path, inside, "takes its values from another file", "stored in this one")
        chunked = layout == h5py.h5d.CHUNKED
        chunk = prod(recipe.get_chunk()) * dtype.itemsize if chunked else 0  # unpacked whole for any of its values
    except _HDF5_ERRORS as error:
        raise shard_error(path, inside, f"HDF5 says {error}", must_be) from error
    if chunk > LARGEST_CHUNK_BYTES:
        raise shard_error(
            path, inside, f"is stored in chunks of {chunk:,} bytes", f"of {LARGEST_CHUNK_BYTES:,} at most"
        )
    if announced > LARGEST_COMPRESSION * stored:
        what_is = f"announces {announced:,} bytes of which {stored:,} are stored"
        raise shard_error(path, inside, what_is, "written whole")
    return dataset


def hdf5_array(path: Path, group: h5py.Group, name: str, shape: Shape, dtype: type[np.generic]) -> NDArray[Any]:
    """All of the dataset `name` of `group`, checked as by `checked_array`.

    Raises:
        ShardError: as for `hdf5_dataset`, it is too large, or it cannot be read.
    """
    dataset = hdf5_dataset(path, group, name, shape)
    if dataset.nbytes > MOST_RECORD_BYTES:
        what_is = f"has {dataset.nbytes:,} bytes"
        raise shard_error(path, f"{group.name}/{name}", what_is, f"of at most {MOST_ATOMS:,} atoms")
    return hdf5_rows(path, dataset, (), shape, dtype)


def hdf5_rows(
    path: Path, dataset: h5py.Dataset, rows: slice | tuple[()], shape: Shape, dtype: type[np.generic]
) -> NDArray[Any]:
    """Some rows of a dataset, checked as by `checked_array`; ``()`` for all of it.

    Raises:
        ShardError: they cannot be read.
    """
    try:
        values = dataset[rows]
    except _HDF5_ERRORS as error:
        raise shard_error(path, str(dataset.name), f"HDF5 says {error}", "a dataset that can be read") from error
    return checked_array(path, str(dataset.name), values, shape, dtype)


def _member(path: Path, parent: h5py.Group, name: str) -> Any:
    """What lies under a name; a link is not followed: it would read what the file's author has no right to.

    Nor is one by a path within the file, which may lead through one that leaves it. No release has either.
    """
    if parent.id.links.get_info(name.encode()).type != h5py.h5l.TYPE_HARD:
        link = parent.get(name, getlink=True)
        target = link.filename if isinstance(link, h5py.ExternalLink) else link.path
        inside = f"{parent.name.rstrip('/')}/{name}"
        raise shard_error(path, inside, f"is a link to {target!r}", "stored here, in this file")
    return parent[name]
