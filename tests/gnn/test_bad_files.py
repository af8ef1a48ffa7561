"""Whatever is wrong with a file or a record becomes one line that names it, and what is sound is read."""

from __future__ import annotations

import gzip
import json
import lzma
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from wattier_gnn.cleaning import CleaningReport, read_clean, removal_reason
from wattier_gnn.datasets import READERS, json_stream
from wattier_gnn.sample import layouts
from wattier_gnn.structure import BadRecord, DataError, ShardError, Structure

SOURCES = ("ani1x", "qm7x", "oc20", "oc22", "mptrj", "extxyz")
SUFFIXES = {"oc20": "*.extxyz.xz", "mptrj": "*.json.gz", "extxyz": "*.xyz", "ase_db": "*.db"}
NAMES = {"ani1x": "a.h5", "qm7x": "1000.hdf5", "oc22": "data.0000.lmdb", "mptrj": "a.json"}


def make(source: str, index: int) -> Structure:
    rng = np.random.default_rng(index)
    group, key = {
        "ani1x": ("CO", f"CO/{index}"),
        "qm7x": ("1", f"1/Geom-m1-i1-c1-{index}"),
        "oc20": ("random1", f"random1/frame{index}"),
        "oc22": ("1", f"1/{index}"),
        "mptrj": (f"mp-{index}", f"mp-{index}-0-0"),
    }[source]
    return Structure(
        numbers=np.array([6, 8], dtype=np.int64),
        positions_angstrom=rng.normal(size=(2, 3)),
        cell_angstrom=5 * np.eye(3),
        pbc=(True, True, True),
        energy_ev=-1.0,
        forces_ev_per_angstrom=rng.normal(size=(2, 3)),
        source=source,
        group=group,
        key=key,
    )


def write_good(folder: Path, source: str, n_structures: int = 8, given: list[Structure] | None = None) -> Path:
    structures = given or [make(source, index) for index in range(n_structures)]
    tags = [[1, 2]] * n_structures
    if source == "oc20":
        layouts.write_oc20(folder, 0, structures, tags, [[False, False]] * n_structures)
        return folder / "0.extxyz.xz"
    path = folder / NAMES[source]
    if source == "oc22":
        layouts.write_oc22(path, structures, tags)
    else:
        write: Callable[[Path, list[Structure]], None] = getattr(layouts, f"write_{source}")
        write(path, structures)
    return path


def fails(source: str, path: Path, kind: type[DataError] = ShardError) -> str:
    """The message of reading all of `path`: one line that names the file."""
    reader = READERS[source]
    with pytest.raises(DataError) as caught:
        for shard in reader.shards(path):
            list(reader.read(shard))
    assert type(caught.value) is kind
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert "must" in message
    return message


def survey(source: str, path: Path) -> tuple[list[str], list[str]]:
    """Keys of the sound structures, and the messages of the bad records: one line each, that names the file."""
    found = list(READERS[source].read(path))
    messages = [record.message for record in found if isinstance(record, BadRecord)]
    for message in messages:
        assert "\n" not in message
        assert str(path.parent) in message
        assert "must" in message
    return [record.key for record in found if isinstance(record, Structure)], messages


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


@pytest.mark.parametrize("source", ["ani1x", "qm7x"])
def test_hdf5_of_another_dataset(source: str, tmp_path: Path) -> None:
    path = tmp_path / NAMES[source]
    with h5py.File(path, "w") as file:
        file["CO/atomic_numbers/x"] = np.zeros(2)
    keys, (message,) = survey(source, path)
    assert keys == []
    assert "/CO/atomic_numbers" in message


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("wb97x_dz.energy", np.array([b"low"] * 8), "must be a dataset of numbers [8]"),
        ("wb97x_dz.energy", np.zeros((8, 2)), "is float64 [8, 2]"),
        ("wb97x_dz.forces", np.zeros((8, 3, 3)), "must be a dataset of numbers [8, 2, 3]"),
        ("atomic_numbers", np.array([6.5, 8.0]), "holds fractions"),
        ("atomic_numbers", np.float64(6), "is float64 []"),
        ("coordinates", None, "coordinates"),
    ],
)
def test_hdf5_with_a_wrong_dataset(name: str, value: Any, said: str, tmp_path: Path) -> None:
    path = write_good(tmp_path, "ani1x")
    with h5py.File(path, "r+") as file:
        file.copy("CO", "C2O2")
        del file[f"CO/{name}"]
        if value is not None:
            file[f"CO/{name}"] = value
    keys, (message,) = survey("ani1x", path)
    assert said in message
    assert f"/CO/{name}" in message
    assert keys == [f"C2O2/{row}" for row in range(8)]  # the other formula is read


def test_one_bad_conformation_of_qm7x(tmp_path: Path) -> None:
    path = write_good(tmp_path, "qm7x")
    with h5py.File(path, "r+") as file:
        file["1/Geom-m1-i1-c1-0/note"] = "fine"
        del file["1/Geom-m1-i1-c1-3/pbe0FOR"]
        file["1/Geom-m1-i1-c1-3/pbe0FOR"] = np.zeros((3, 3))
        file["2"] = 3
    keys, messages = survey("qm7x", path)
    assert len(keys) == 7
    assert [("/1/Geom-m1-i1-c1-3/pbe0FOR" in messages[0]), ("/2: is a Dataset" in messages[1])] == [True, True]


def test_hdf5_that_announces_what_it_does_not_hold(tmp_path: Path) -> None:
    path = write_good(tmp_path, "ani1x")
    with h5py.File(path, "r+") as file:
        group = file.create_group("H")
        group["atomic_numbers"] = np.array([1], dtype=np.uint8)
        group.create_dataset("coordinates", (10**12, 1, 3), "f4", chunks=(1000, 1, 3), compression="gzip")
    keys, (message,) = survey("ani1x", path)
    assert len(keys) == 8
    assert "announces 12,000,000,000,000 bytes of which 0 are stored" in message


def test_hdf5_whose_chunks_unpack_to_gigabytes(tmp_path: Path) -> None:
    path = write_good(tmp_path, "qm7x")
    with h5py.File(path, "r+") as file:
        group = file.create_group("7/Geom-m1-i1-c1-1")
        group.create_dataset("atNUM", (10**8,), "i8", chunks=(10**8,), compression="gzip")
    keys, (message,) = survey("qm7x", path)
    assert len(keys) == 8
    assert "is stored in chunks of 800,000,000 bytes" in message


def test_hdf5_that_points_at_other_files(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(range(24)))
    other = tmp_path / "other.h5"
    with h5py.File(other, "w") as file:
        file["atomic_numbers"] = np.array([1])
    path = write_good(tmp_path, "ani1x")
    with h5py.File(path, "r+") as file:
        file["H"] = h5py.ExternalLink(other.name, "/")
        file["He/atomic_numbers"] = np.array([2], dtype=np.uint8)
        file["He"].create_dataset("coordinates", (2, 1, 3), "f4", external=[(str(secret), 0, 24)])
    _, messages = survey("ani1x", path)
    assert "is a link to 'other.h5'" in messages[0]
    assert "takes its values from another file" in messages[1]


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


def test_one_bad_frame_of_oc20(tmp_path: Path) -> None:
    path = write_good(tmp_path, "oc20")
    text = lzma.decompress(path.read_bytes()).decode()
    path.write_bytes(lzma.compress(text.replace("C  ", "C x ", 3).replace("C x ", "C  ", 2).encode()))
    keys, (message,) = survey("oc20", path)
    assert keys == [f"random1/frame{n}" for n in (0, 1, 3, 4, 5, 6, 7)]
    assert "frame 2" in message


def test_mptrj_yields_what_comes_before_the_damage(tmp_path: Path) -> None:
    path = write_good(tmp_path, "mptrj")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * 0.6)])
    with pytest.raises(ShardError, match="after mp-4"):
        for index, structure in enumerate(READERS["mptrj"].read(path)):
            assert isinstance(structure, Structure)
            assert structure.key == f"mp-{index}-0-0"


def test_mptrj_truncated_under_gzip(tmp_path: Path) -> None:
    packed = gzip.compress(write_good(tmp_path, "mptrj").read_bytes())
    path = tmp_path / "b.json.gz"
    path.write_bytes(packed[: len(packed) // 2])
    fails("mptrj", path)


def _drop_force(frame: dict[str, Any]) -> None:
    del frame["force"]


def _shorten_force(frame: dict[str, Any]) -> None:
    frame["force"] = frame["force"][:1]


def _word_for_energy(frame: dict[str, Any]) -> None:
    frame["corrected_total_energy"] = "low"


def _move_xyz(frame: dict[str, Any]) -> None:
    frame["structure"]["sites"][1]["xyz"][0] += 1.0


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_drop_force, "lacks 'force'"),
        (_shorten_force, "is float64 [1, 3], but must be numbers [2, 3]"),
        (_word_for_energy, "corrected_total_energy"),
        (_move_xyz, "up to 1 Å from abc"),
    ],
)
def test_mptrj_with_a_wrong_frame(spoil: Callable[[dict[str, Any]], None], said: str, tmp_path: Path) -> None:
    path = write_good(tmp_path, "mptrj")
    materials = json.loads(path.read_text(encoding="utf-8"))
    spoil(materials["mp-2"]["mp-2-0-0"])
    materials["mp-3"] = [1]
    path.write_text(json.dumps(materials), encoding="utf-8")
    keys, messages = survey("mptrj", path)
    assert said in messages[0]
    assert "mp-2/mp-2-0-0" in messages[0]
    assert "mp-3: is a list" in messages[1]
    assert len(keys) == 6


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text.replace('"mp-2":', '"mp-2"', 1), "where ':' is due"),
        (lambda text: text.replace(',"mp-2"', ' "mp-2"', 1), "where ',' is due"),
        (lambda text: text.replace('"mp-2"', "mp-2", 1), "where a name is due"),
        (lambda text: text[:-1], "nothing more where ',' is due"),
        (lambda text: text.replace('{"mp-2-0-0":', '{"mp-2-0-0":' + "[" * 200_000, 1), "nested too deeply"),
        (lambda text: "[" + text + "]", "where '{' is due"),
    ],
)
def test_mptrj_that_is_no_json(damage: Callable[[str], str], said: str, tmp_path: Path) -> None:
    path = write_good(tmp_path, "mptrj")
    path.write_text(damage(path.read_text(encoding="utf-8")), encoding="utf-8")
    assert said in fails("mptrj", path)


def test_names_that_steer_a_terminal_or_cannot_be_written(tmp_path: Path) -> None:
    path = write_good(tmp_path, "mptrj")
    materials = json.loads(path.read_text(encoding="utf-8"))
    half, red = "mp-\ud800", "mp-\x1b[31m"
    materials[half], materials[red] = materials.pop("mp-2"), materials.pop("mp-3")
    del materials[red]["mp-3-0-0"]["force"]
    path.write_text(json.dumps(materials), encoding="utf-8")
    keys, messages = survey("mptrj", path)
    assert len(keys) == 6
    assert "mp-\\ud800/mp-2-0-0: is no text" in messages[0]
    assert "mp-\\x1b[31m/mp-3-0-0: lacks" in messages[1]


def test_mptrj_with_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = write_good(tmp_path, "mptrj")
    path.write_bytes(path.read_bytes().replace(b"mp-2", b"mp-\xff"))
    assert "cannot be read: 'utf-8'" in fails("mptrj", path)


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


@pytest.mark.parametrize(("number", "reason"), [(0, "unknown element"), (119, "unknown element"), (None, "no atoms")])
def test_impossible_atoms_are_left_to_cleaning(number: int | None, reason: str, tmp_path: Path) -> None:
    numbers = np.array([] if number is None else [number], dtype=np.uint8)
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        group = file.create_group("X")
        group["atomic_numbers"] = numbers
        group["coordinates"], group["wb97x_dz.forces"] = (np.zeros((1, len(numbers), 3), "f4") for _ in range(2))
        group["wb97x_dz.energy"] = np.zeros(1)
    (found,) = READERS["ani1x"].read(path)
    assert isinstance(found, Structure)
    assert removal_reason(found, 100.0) == reason


def test_bad_records_are_counted_and_the_rest_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.xyz"
    path.write_bytes(GOOD_FRAME + b"1\nenergy=low\nH 0 0 0\n" + GOOD_FRAME + b"4\n")
    report = CleaningReport()
    assert len(list(read_clean(READERS["extxyz"], path, 100.0, report))) == 2
    assert (report.read["extxyz"], report.kept["extxyz"]) == (3, 2)
    assert sum(report.removed["extxyz"].values()) == 1
    assert len(report.bad_shards["extxyz"]) == 1
