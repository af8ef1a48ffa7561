"""LMDB files read without the LMDB library, which trusts what a file says of itself.

The library maps the file into memory and follows its offsets unchecked: a damaged or malicious file kills the process
with a signal (3 of 300 files with five random bytes changed did). This reader takes bytes by position, checks every
offset, and raises. Layout: ``mdb.c`` of LMDB 0.9, data version 1, 64 bit, little endian; no named databases and no
duplicate keys, which no dataset uses.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from wattier_gnn.datasets.shard import MOST_RECORD_BYTES, shard_error
from wattier_gnn.structure import ShardError

_PAGE_HEADER = struct.Struct("<QHHHH")  # page number, pad, flags, then lower and upper or the number of pages
# magic, version; page size (of the free list's record); entries, root (of the main database's); last page, transaction
_META = struct.Struct("<II16xI76xQQQQ")
_NODE = struct.Struct("<HHHH")  # data size or child page, low and high; flags; key size
_MAGIC, _VERSION = 0xBEEFC0DE, 1
_BRANCH, _LEAF, _OVERFLOW = 0x01, 0x02, 0x04
_BIG_DATA, _OTHER_NODE_FLAGS = 0x01, 0x06
_NO_PAGE = 0xFFFFFFFFFFFFFFFF
_DEEPEST = 32
_CACHED_PAGES = 64


class _Node(NamedTuple):
    key: bytes
    child: int
    value: bytes | None
    overflow: tuple[int, int] | None  # page, size


class _Meta(NamedTuple):
    page_bytes: int
    entries: int
    root: int
    last_page: int
    transaction: int


class LmdbFile:
    """A file of keys and values. Use as a context manager.

    Attributes:
        entries: the number of keys, as the file says and its size allows.
    """

    def __init__(self, path: Path) -> None:
        """Raises ShardError where the file is no LMDB file or is cut short."""
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise shard_error(path, "", f"cannot be read: {error}", "a whole LMDB file") from error
        try:
            self._size = os.fstat(self._descriptor).st_size
            self._meta = self._read_meta()
        except BaseException:
            os.close(self._descriptor)
            raise
        self.entries = self._meta.entries
        self._nodes = lru_cache(_CACHED_PAGES)(self._read_nodes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def get(self, key: bytes) -> bytes | None:
        """The value of a key; None where there is none.

        Raises:
            ShardError: a page on the way is damaged.
        """
        page = self._meta.root
        for _ in range(_DEEPEST):
            if page == _NO_PAGE:
                return None
            is_leaf, nodes = self._nodes(page)
            at = _last_at_most(nodes, key, 0 if is_leaf else 1)
            if is_leaf:
                return self._value(nodes[at]) if at >= 0 and nodes[at].key == key else None
            page = nodes[max(at, 0)].child
        raise self._damaged("has pages in a circle")

    def keys(self) -> Iterator[bytes]:
        """All keys in the order of their bytes.

        Raises:
            ShardError: a page is damaged.
        """
        seen: set[int] = set()
        pages = [] if self._meta.root == _NO_PAGE else [self._meta.root]
        while pages:
            page = pages.pop()
            if page in seen:
                raise self._damaged("has pages in a circle")
            seen.add(page)
            is_leaf, nodes = self._nodes(page)
            if is_leaf:
                yield from (node.key for node in nodes)
            else:
                pages.extend(node.child for node in reversed(nodes))

    def _read_meta(self) -> _Meta:
        first = self._parse_meta(0)
        second = self._parse_meta(first.page_bytes)
        meta = max(first, second, key=lambda meta: meta.transaction)
        must_be = (meta.last_page + 1) * meta.page_bytes
        if self._size < must_be:
            what_is = f"has {self._size} bytes"
            raise shard_error(self.path, "", what_is, f"at least {must_be} bytes long, as its header says")
        if meta.entries > self._size // _NODE.size:
            raise self._damaged(f"announces {meta.entries} keys in {self._size} bytes")
        return meta

    def _parse_meta(self, offset: int) -> _Meta:
        data = self._at(offset + _PAGE_HEADER.size, _META.size, "its header")
        magic, version, page_bytes, *rest = _META.unpack(data)
        if (magic, version) != (_MAGIC, _VERSION):
            raise shard_error(self.path, "", "has no LMDB header", "a whole LMDB file")
        if page_bytes not in (1 << n for n in range(9, 17)):
            raise self._damaged(f"has pages of {page_bytes} bytes")
        return _Meta(page_bytes, *rest)

    def _read_nodes(self, page: int) -> tuple[bool, list[_Node]]:
        """Whether a page is a leaf, and its entries."""
        data = self._page(page, self._meta.page_bytes)
        _, _, flags, lower, _ = _PAGE_HEADER.unpack_from(data)
        if flags & 0xF not in (_BRANCH, _LEAF) or not _PAGE_HEADER.size <= lower <= len(data):
            raise self._damaged(f"has a damaged page {page}")
        is_leaf, n_nodes = bool(flags & _LEAF), (lower - _PAGE_HEADER.size) // 2
        if n_nodes == 0:
            raise self._damaged(f"has an empty page {page}")
        offsets = struct.unpack_from(f"<{n_nodes}H", data, _PAGE_HEADER.size)
        try:
            return is_leaf, [_node(data, offset, is_leaf) for offset in offsets]
        except (struct.error, ValueError) as error:
            raise self._damaged(f"has a damaged page {page} ({error})") from error

    def _value(self, node: _Node) -> bytes:
        if node.overflow is None:
            return node.value or b""
        page, size = node.overflow
        if size > MOST_RECORD_BYTES:
            raise self._damaged(f"announces a record of {size:,} bytes")
        data = self._page(page, _PAGE_HEADER.size + size)
        if _PAGE_HEADER.unpack_from(data)[2] & 0xF != _OVERFLOW:
            raise self._damaged(f"has a damaged page {page}")
        return data[_PAGE_HEADER.size :]

    def _page(self, page: int, n_bytes: int) -> bytes:
        if page > self._meta.last_page:
            raise self._damaged(f"points at page {page} of {self._meta.last_page + 1}")
        return self._at(page * self._meta.page_bytes, n_bytes, f"page {page}")

    def _at(self, offset: int, n_bytes: int, what: str) -> bytes:
        try:
            data = os.pread(self._descriptor, n_bytes, offset) if offset + n_bytes <= self._size else b""
        except OSError as error:
            raise self._damaged(f"cannot be read: {error}") from error
        if len(data) < n_bytes:
            raise self._damaged(f"ends before {what} does")
        return data

    def _damaged(self, what_is: str) -> ShardError:
        return shard_error(self.path, "", what_is, "a whole LMDB file")


def _node(data: bytes, offset: int, is_leaf: bool) -> _Node:
    low, high, flags, key_size = _NODE.unpack_from(data, offset)
    start = offset + _NODE.size
    end = start + key_size
    if offset < _PAGE_HEADER.size or end > len(data):
        raise ValueError("a key lies outside")
    key = data[start:end]
    if not is_leaf:
        return _Node(key, low | high << 16 | flags << 32, None, None)
    size = low | high << 16
    if flags & _OTHER_NODE_FLAGS:
        raise ValueError("it holds a database or duplicates")
    if flags & _BIG_DATA:
        return _Node(key, 0, None, (struct.unpack_from("<Q", data, end)[0], size))
    if end + size > len(data):
        raise ValueError("a value lies outside")
    return _Node(key, 0, data[end : end + size], None)


def _last_at_most(nodes: list[_Node], key: bytes, first: int) -> int:
    """The last entry whose key is not above `key`; the first key of a branch page stands for anything below."""
    low, high = first, len(nodes)
    while low < high:
        middle = (low + high) // 2
        if nodes[middle].key <= key:
            low = middle + 1
        else:
            high = middle
    return low - 1
