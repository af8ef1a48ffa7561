"""Pickled arrays: sound ones come back as they were; those that mean harm get no memory and are not believed."""

from __future__ import annotations

import contextlib
import pickle
import tracemalloc
from typing import Any

import numpy as np
import pytest

from wattier_gnn.datasets import safe_pickle
from wattier_gnn.structure import ShardError

NDARRAY, RECONSTRUCT = b"cnumpy\nndarray\n", b"cnumpy.core.multiarray\n_reconstruct\n"
TYPES = {name: pickle.dumps(np.dtype(name), 3)[2:-1] for name in ("f8", "O")}


def with_state(dtype: str, shape: tuple[int, ...], data: Any) -> bytes:
    """The pickle of an array that is given this state."""
    state = b"(K\x01" + plain(shape) + TYPES[dtype] + b"\x89" + plain(data) + b"t"
    return b"\x80\x03" + RECONSTRUCT + NDARRAY + b"K\x00\x85C\x01b\x87R" + state + b"b."


def plain(value: Any) -> bytes:
    """A value as it stands inside a pickle; nothing is memoized, so that it can stand in any."""
    return b"".join(pickle.dumps(value, 3)[2:-1].rsplit(b"q\x00", 1))


@pytest.mark.parametrize("protocol", [3, 4])
def test_arrays_come_back_as_they_were(protocol: int) -> None:
    numbers = np.arange(12.0).reshape(3, 4)
    for array in (numbers, numbers.T, numbers.astype(">f4"), numbers > 3, numbers[:0], np.array(3), np.float32(0.1)):
        found = safe_pickle.load(pickle.dumps(array, protocol), "here")
        assert isinstance(found, np.ndarray | np.generic)
        np.testing.assert_array_equal(found, array)
        assert (found.shape, found.dtype) == (array.shape, array.dtype.newbyteorder("="))
    assert safe_pickle.load(with_state("f8", (2,), np.array([1.0, 2.0]).tobytes()), "here").tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02" + NDARRAY + plain((10**8,)) + TYPES["O"] + b"\x86R.",
        b"\x80\x02" + NDARRAY + plain((10**8,)) + b"\x85R.",
        b"\x80\x03" + RECONSTRUCT + NDARRAY + plain((10**8,)) + b"C\x01b\x87R.",
        with_state("O", (10**8,), []),
        with_state("f8", (10**8,), []),
        with_state("f8", (10**8,), b"12345678"),
        with_state("f8", (10**8,), b""),
    ],
)
def test_an_array_that_is_announced_gets_no_memory(data: bytes) -> None:
    tracemalloc.start()  # numpy tells it what it asks for, touched or not
    try:
        with contextlib.suppress(ShardError):
            assert safe_pickle.load(data, "here").size == 0
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(data) < 250
    assert peak < 1_000_000


@pytest.mark.parametrize("data", [with_state("f8", (-1, -1), bytes(8)), with_state("O", (0,), [])])
def test_an_array_that_cannot_be(data: bytes) -> None:
    with pytest.raises(ShardError, match="cannot be unpickled"):
        safe_pickle.load(data, "here")


def test_the_flags_of_a_type_do_not_make_addresses_of_numbers() -> None:
    # 1 at the end of a type's state says that values are counted references: numpy would follow them, and crash.
    sound = pickle.dumps(np.full(3, 7.0), 3)
    flagged = sound.replace(b"K\x00t", b"K\x01t")
    assert flagged != sound
    found = safe_pickle.load(flagged, "here")
    assert (found.dtype.flags, found.tolist()) == (0, [7.0] * 3)
