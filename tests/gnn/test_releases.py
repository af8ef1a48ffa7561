"""What is released where, and what becomes of packed files."""

from __future__ import annotations

import gzip
import io
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from wattier_gnn.datasets import READERS
from wattier_gnn.datasets.releases import RELEASES
from wattier_gnn.fetch import choose_files, from_elsewhere, readable_folders
from wattier_gnn.structure import DataError, Structure
from wattier_gnn.unpack import unpack


def hdf5_bytes() -> bytes:
    stream = io.BytesIO()
    with h5py.File(stream, "w") as file:
        group = file.create_group("1/Geom-m1-i1-c1-opt")
        group["atNUM"], group["atXYZ"] = np.array([1, 1]), np.eye(3)[:2]
        group["ePBE0"], group["pbe0FOR"] = np.array([-30.0]), np.zeros((2, 3))
    return stream.getvalue()


def tar_bytes(members: dict[str, bytes], link: str | None = None) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        if link:
            info = tarfile.TarInfo("link")
            info.type, info.linkname = tarfile.SYMTYPE, link
            archive.addfile(info)
    return stream.getvalue()


@pytest.mark.parametrize("archive", [False, True])
@pytest.mark.parametrize("compress", [lzma.compress, gzip.compress, bytes])
def test_a_packed_shard(archive: bool, compress: Callable[[bytes], bytes], tmp_path: Path) -> None:
    content = hdf5_bytes()
    (tmp_path / "1000.xz").write_bytes(compress(tar_bytes({"./1000.hdf5": content}) if archive else content))
    assert unpack(tmp_path / "1000.xz", tmp_path / "1000.hdf5") == tmp_path / "1000.hdf5"
    assert (tmp_path / "1000.hdf5").read_bytes() == content
    (structure,) = READERS["qm7x"].read(tmp_path / "1000.hdf5")
    assert isinstance(structure, Structure)
    assert structure.key == "1/Geom-m1-i1-c1-opt"
    assert readable_folders(READERS["qm7x"], tmp_path / "1000.hdf5") == [tmp_path]


def test_an_archive_of_folders(tmp_path: Path) -> None:
    packed = tar_bytes({"set/train/data.0000.lmdb": b"x", "set/val/data.0000.lmdb": b"z", "set/README": b"y"})
    (tmp_path / "set.tar.gz").write_bytes(gzip.compress(packed))
    folder = unpack(tmp_path / "set.tar.gz", tmp_path / "set")
    assert (folder / "set/README").read_bytes() == b"y"
    assert readable_folders(READERS["oc22"], folder) == [folder / "set/train", folder / "set/val"]


@pytest.mark.parametrize(
    "packed",
    [
        lzma.compress(hdf5_bytes())[:-40],
        gzip.compress(hdf5_bytes())[:-40],
        tar_bytes({"a": bytes(300_000)})[:2000],
        tar_bytes({"../outside": b"x"}),
        tar_bytes({"a": b"x"}, link="/etc"),
        tar_bytes({"a": b"x"}, link="a"),
    ],
)
def test_an_archive_that_is_damaged_or_means_harm(packed: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "set.tar").write_bytes(packed)
    with pytest.raises(DataError, match=r"set\.tar"):
        unpack(folder / "set.tar", folder / "set")
    assert [path.name for path in tmp_path.rglob("*")] == ["here", "set.tar"]  # nothing half unpacked, nothing outside


@pytest.mark.parametrize("page", [b"<!doctype html><p>Sign in", b"", bytes(3000), b"\xfd7z"])
def test_what_is_no_packed_file_is_not_taken_for_the_file_itself(page: bytes, tmp_path: Path) -> None:
    (tmp_path / "6000.xz").write_bytes(page)
    with pytest.raises(DataError, match=r"6000\.xz: starts with b.*, but must be packed with xz or gzip"):
        unpack(tmp_path / "6000.xz", tmp_path / "6000.hdf5")
    assert [path.name for path in tmp_path.iterdir()] == ["6000.xz"]


def test_a_small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "1000.xz").write_bytes(lzma.compress(hdf5_bytes()))
    monkeypatch.setattr("shutil.disk_usage", lambda _path: type("usage", (), {"free": 10}))
    with pytest.raises(DataError, match="to unpack"):
        unpack(tmp_path / "1000.xz", tmp_path / "1000.hdf5")


def test_choosing_files() -> None:
    assert [file.name for file in choose_files("qm7x", [])[1]] == [f"{n}000.xz" for n in range(1, 9)]
    assert [file.name for file in choose_files("oc20", ["s2ef_val_ood_*", "*md*"])[1]] == [
        "s2ef_val_ood_ads.tar", "s2ef_val_ood_cat.tar", "s2ef_val_ood_both.tar", "s2ef_md.tar",
    ]  # fmt: skip
    for name, patterns, said in (
        ("ani2x", [], "must be one of ani1x"),
        ("oc20", [], "is released in parts"),
        ("oc20", ["s2ef_train_2m.tar"], "has no file 's2ef_train_2m.tar'"),
    ):
        with pytest.raises(DataError, match=said):
            choose_files(name, patterns)


def test_another_address() -> None:
    files = list(RELEASES["qm7x"].files)
    assert from_elsewhere(files, "http://mirror/x/")[1].url == "http://mirror/x/2000.xz"
    assert from_elsewhere(files[:1], "https://mirror/x")[0].url == "https://mirror/x"
    for chosen, url in ((files, "http://mirror/x"), (files[:1], "file:///etc/passwd"), (files[:1], "ftp://mirror/")):
        with pytest.raises(DataError, match="but must"):
            from_elsewhere(chosen, url)


def test_the_table_of_releases() -> None:
    assert set(RELEASES) == {"ani1x", "qm7x", "oc20", "oc22", "mptrj"}
    for name, release in RELEASES.items():
        reader = READERS[name]
        assert release.name == name
        assert None not in (reader.method, reader.licence, reader.citation)
        assert len({file.name for file in release.files}) == len(release.files)
        for file in release.files:
            assert file.url.startswith("https://")
            assert file.md5 is None or (len(file.md5) == 32 and int(file.md5, 16) > 0)
