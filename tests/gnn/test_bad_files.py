"""Whatever is wrong with a file or a record becomes one line that names it, and what is sound is read."""

from __future__ import annotations

import gzip
import json
import lzma
import resource
from pathlib import Path

import pytest
from sound_files import NAMES, SOURCES, SUFFIXES, fails, make, survey, write_good

from wattier_gnn.cleaning import CleaningReport, read_clean, removal_reason
from wattier_gnn.datasets import READERS, json_stream
from wattier_gnn.structure import DataError, ShardError, Structure


@pytest.mark.parametrize("source", [*SOURCES, "ase_db"])
def test_a_missing_path(source: str, tmp_path: Path) -> None:
    assert "does not exist" in fails(source, tmp_path / "nowhere", DataError)


@pytest.mark.parametrize("source", SOURCES)
def test_a_link_that_leads_in_a_circle(source: str, tmp_path: Path) -> None:
    loop = tmp_path / NAMES.get(source, "0.extxyz")
    loop.symlink_to(loop)
    assert "is neither file nor folder" in fails(source, loop, DataError)
    assert "holds no file" in fails(source, tmp_path, DataError)


@pytest.mark.parametrize("source", [*SOURCES, "ase_db"])
def test_a_folder_without_such_files(source: str, tmp_path: Path) -> None:
    (tmp_path / "README").write_text("nothing here")
    (tmp_path / "train").mkdir()
    assert SUFFIXES.get(source, f"*{Path(NAMES.get(source, '')).suffix}") in fails(source, tmp_path, DataError)


@pytest.mark.parametrize("source", SOURCES[:-1])
@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.3, 0.6, 0.95])
def test_a_truncated_file(source: str, fraction: float, tmp_path: Path) -> None:
    path = write_good(tmp_path, source)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * fraction)])
    fails(source, path)


@pytest.mark.parametrize("source", SOURCES)
def test_another_format_under_the_name(source: str, tmp_path: Path) -> None:
    path = tmp_path / {**NAMES, "oc20": "0.extxyz", "extxyz": "a.xyz"}[source]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 64)
    (tmp_path / "0.txt").write_text("")
    fails(source, path)


def test_oc20_with_more_ids_than_frames_yields_nothing(tmp_path: Path) -> None:
    path = write_good(tmp_path, "oc20")
    (tmp_path / "0.txt.xz").write_bytes(lzma.compress(b"random1,frame0,nan\n" * 9))
    assert "has 8 frames for 9 lines of ids" in fails("oc20", path)
    with pytest.raises(ShardError):
        next(READERS["oc20"].read(path))


def test_oc20_without_ids(tmp_path: Path) -> None:
    path = write_good(tmp_path, "oc20")
    (tmp_path / "0.txt.xz").unlink()
    assert "0.txt.xz" in fails("oc20", path)


def test_oc20_with_malformed_ids(tmp_path: Path) -> None:
    path = write_good(tmp_path, "oc20")
    (tmp_path / "0.txt.xz").write_bytes(lzma.compress(b"random1\n" * 8))
    with pytest.raises(ShardError, match=r"0\.txt\.xz: line 1: is 'random1'"):
        list(READERS["oc20"].read(path))


GOOD_FRAME = b"1\nenergy=1 pbc=F\nH 0 0 0\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"2\nenergy=1 pbc=F\nH 0 0 0\n", "ends after 2 of 3 lines"),
        (b"one\nenergy=1\nH 0 0 0\n", "number of atoms"),
        (b"-1\nenergy=1\n", "number of atoms"),
        (b"1000000000000\nenergy=1\nH 0 0 0\n", "announces 1,000,000,000,000 atoms"),
        (b"9" * 5000 + b"\nenergy=1\n", "number of atoms"),
        (b"1\n" + b" " * (3 << 20), "goes on after"),
    ],
)
def test_extxyz_that_cannot_be_read_on(text: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.xyz"
    path.write_bytes(GOOD_FRAME + text)
    message = fails("extxyz", path)
    assert said in message
    assert "frame 1" in message
    assert isinstance(next(READERS["extxyz"].read(path)), Structure)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"1\npbc=F\nH 0 0 0\n", "has no energy"),
        (b"1\nenergy=1\nH 0 zero 0\n", "ASE says"),
        (b"1\nenergy=1\nH 0 0\n", "ASE says"),
        (b"1\nenergy=1\nUuu 0 0 0\n", "ASE says"),
        (b"1\nenergy=low\nH 0 0 0\n", "energy"),
        (b"1\nenergy=1 note=\xff\nH 0 0 0\n", "ASE says UnicodeDecodeError"),
        (b"1\nProperties=species:S:1:pos:R:999999999999 energy=1\nH 0 0 0\n", "announces 1,000,000,000 columns"),
        (b"1\nProperties=species:S:1:pos:R:3:forces:R:1 energy=1\nH 0 0 0 1\n", "forces"),
        (b'1\nenergy=1 note="_JSON ' + b"[" * 50_000 + b'"\nH 0 0 0\n', "ASE says RecursionError"),
    ],
)
def test_extxyz_with_one_bad_frame(text: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.xyz"
    path.write_bytes(GOOD_FRAME + text + GOOD_FRAME)
    keys, (message,) = survey("extxyz", path)
    assert keys == ["a.xyz/0", "a.xyz/2"]
    assert said in message
    assert "frame 1" in message


def test_a_group_of_extxyz_may_be_called_anything(tmp_path: Path) -> None:
    path = tmp_path / "a.xyz"
    names = ["0", "F", "7", "slab", None]
    comments = [b"" if name is None else f" group={name}".encode() for name in names]
    path.write_bytes(b"".join(GOOD_FRAME.replace(b" pbc", comment + b" pbc") for comment in comments))
    groups = [item.group for item in READERS["extxyz"].read(path) if isinstance(item, Structure)]
    assert groups == ["0", "False", "7", "slab", "H"]  # ASE takes F for a truth value


def test_one_bad_frame_of_oc20(tmp_path: Path) -> None:
    path = write_good(tmp_path, "oc20")
    text = lzma.decompress(path.read_bytes()).decode()
    path.write_bytes(lzma.compress(text.replace("C  ", "C x ", 3).replace("C x ", "C  ", 2).encode()))
    keys, (message,) = survey("oc20", path)
    assert keys == [f"random1/frame{n}" for n in (0, 1, 3, 4, 5, 6, 7)]
    assert "frame 2" in message


def test_packed_files_that_unpack_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "MOST_VALUE_CHARACTERS", 2 << 20)
    text, document = tmp_path / "a.xyz.xz", tmp_path / "a.json.gz"
    text.write_bytes(lzma.compress(GOOD_FRAME + b"1\n" + b" " * (40 << 20), preset=0))
    document.write_bytes(gzip.compress(b'{"mp-1": {"a": [' + b"0," * (20 << 20), compresslevel=1))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "goes on after" in fails("extxyz", text)
    assert "has a value of more than" in fails("mptrj", document)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150_000  # KiB


@pytest.mark.parametrize("source", ["oc20", "oc22"])
def test_two_layouts_in_a_folder_are_not_read_twice(source: str, tmp_path: Path) -> None:
    write_good(tmp_path, source)
    (tmp_path / "a.aselmdb").touch()
    assert "must hold one layout" in fails(source, tmp_path, DataError)
    assert len(READERS[source].shards(tmp_path / "a.aselmdb")) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("source", ["ani1x", "qm7x", "oc20", "oc22", "mptrj"])
def test_labels_that_are_no_numbers_are_left_to_cleaning(source: str, value: float, tmp_path: Path) -> None:
    structure = make(source, 0)
    structure.forces_ev_per_angstrom[0, 0] = value  # type: ignore[index]
    if source == "mptrj":
        path = write_good(tmp_path, source, 1)
        materials = json.loads(path.read_text(encoding="utf-8"))
        materials["mp-0"]["mp-0-0-0"]["force"][0][0] = value
        path.write_text(json.dumps(materials), encoding="utf-8")
    else:
        path = write_good(tmp_path, source, 1, [structure])
    (found,) = READERS[source].read(path)
    assert isinstance(found, Structure)
    assert removal_reason(found, 100.0) == "nan label"


def test_bad_records_are_counted_and_the_rest_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.xyz"
    path.write_bytes(GOOD_FRAME + b"1\nenergy=low\nH 0 0 0\n" + GOOD_FRAME + b"4\n")
    report = CleaningReport()
    assert len(list(read_clean(READERS["extxyz"], path, 100.0, report))) == 2
    assert (report.read["extxyz"], report.kept["extxyz"]) == (3, 2)
    assert sum(report.removed["extxyz"].values()) == 1
    assert len(report.bad_shards["extxyz"]) == 1
