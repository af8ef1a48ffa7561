"""Files become a store: the same bytes whoever works and whatever dies, and nothing leaves uncounted."""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toys import SOURCES, make, structure

from wattier_gnn import merge, parts
from wattier_gnn.cleaning import CleaningReport, read_clean
from wattier_gnn.columns import Appender
from wattier_gnn.datasets import READERS
from wattier_gnn.ingest import read_cleaning
from wattier_gnn.reference import composition
from wattier_gnn.sample import sample_path
from wattier_gnn.splits import SPLIT_NAMES, TRAIN
from wattier_gnn.store import Store
from wattier_gnn.structure import BadRecord, DataError, ShardError

WORKER = Path(__file__).with_name("ingest_worker.py")
SECONDS = 100


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many parts and commits, and no waiting for the disk: what is killed here is a process, not the machine."""
    monkeypatch.setattr(parts, "PART_STRUCTURES", 100)
    monkeypatch.setattr(merge, "COMMIT_BYTES", 1)
    monkeypatch.setattr(os, "fsync", lambda _: None)


def bytes_of(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the folder of an ingestion holds that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "PART_STRUCTURES", 100)
        patch.setattr(os, "fsync", lambda _: None)
        make(folder)
    return bytes_of(folder)


class TestWhatIsWritten:
    def test_structures_are_those_that_cleaning_lets_through(self, tmp_path: Path) -> None:
        store, said = make(tmp_path / "s")
        report = CleaningReport()
        kept = [s for name in SOURCES for s in read_clean(READERS[name], sample_path(name), 100.0, report)]
        assert [store.key(k) for k in range(len(store))] == [s.key for s in kept]
        assert [store.groups.names[k] for k in store.columns["group"]] == [s.group for s in kept]
        np.testing.assert_array_equal(store.energy, [s.energy_ev for s in kept])
        arrays = store.gather(np.arange(len(store)))
        np.testing.assert_array_equal(arrays["positions"], np.concatenate([s.positions_angstrom for s in kept]))
        assert read_cleaning(store) == report
        assert said[0] == "oc22: 441 read, 439 kept, removed: 1 nan label, 1 force above threshold"

    def test_the_manifest_tells_all(self, tmp_path: Path) -> None:
        store, said = make(tmp_path / "s")
        total = 0
        for index, name in enumerate(SOURCES):
            about, mine = store.meta["by_source"][name], store.source_index == index
            total += len(about["files"])
            for file in about["files"]:
                path = sample_path(name) / file["name"]
                assert file["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
                assert file["bytes"] == path.stat().st_size
            assert about["structures"] == {n: int((mine & (store.split == k)).sum()) for k, n in enumerate(SPLIT_NAMES)}
            assert (about["atoms"], about["edges"]) == (store.n_atoms[mine].sum(), store.n_edges[mine].sum())
            arrays = store.gather(np.flatnonzero(mine & (store.split == TRAIN)))
            counts = composition(arrays["numbers"], np.diff(arrays["atom_offset"]))
            residual = arrays["energy"] - counts @ store.references[index]
            assert about["residual_std_ev"] == pytest.approx(residual.std(ddof=1), rel=1e-6)
            by_atom = (residual / counts.sum(axis=1)).std(ddof=1)
            assert about["residual_std_ev_per_atom"] == pytest.approx(by_atom, rel=1e-6)
            assert f"{name}: aligned energies spread by {by_atom * 1000:.1f} meV/atom" in said
            least = np.linalg.lstsq(counts, arrays["energy"], rcond=1e-10)[0]
            np.testing.assert_allclose(store.references[index], least, rtol=0, atol=1e-8)
            assert about["force_rms_ev_per_angstrom"] == pytest.approx(np.sqrt((arrays["forces"] ** 2).mean()))
        assert total == sum(len(READERS[name].shards(sample_path(name))) for name in SOURCES)
        assert store.meta["settings"] == {
            "cutoff_angstrom": 2.5, "max_force_ev_per_angstrom": 100.0, "force_norm": "per_atom", "seed": 1,
            "neighbors": "precomputed", "split": {"train": 0.8, "val": 0.1, "test": 0.1},
        }  # fmt: skip

    def test_edges_may_be_counted_and_not_kept(self, tmp_path: Path) -> None:
        kept, _ = make(tmp_path / "kept", {"oc22": sample_path("oc22")})
        found, _ = make(tmp_path / "found", {"oc22": sample_path("oc22")}, neighbors="on_the_fly")
        assert len(found.columns["edges"]) == 0
        np.testing.assert_array_equal(found.n_edges, kept.n_edges)
        part = np.array([400, 3, 77])
        for name, values in kept.gather(part).items():
            np.testing.assert_array_equal(found.gather(part)[name], values)
        assert found.meta["mean_neighbors"] == kept.meta["mean_neighbors"]


class TestAgain:
    def test_a_second_run_does_nothing(self, tmp_path: Path, undisturbed: dict[str, str]) -> None:
        make(tmp_path / "s")
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").iterdir()}
        _, said = make(tmp_path / "s")
        assert said == [f"store: nothing to do, all 3 files are in {tmp_path / 's'}"]
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / "s").iterdir() if path.name != ".lock"} == {
            path: stamp for path, stamp in before.items() if path.name != ".lock"
        }
        assert bytes_of(tmp_path / "s") == undisturbed

    def test_several_processes_write_the_same_bytes(self, tmp_path: Path, undisturbed: dict[str, str]) -> None:
        """Their parts have another size, and it does not show."""
        calls: list[Any] = []
        make(tmp_path / "s", workers=2, progress=calls.append)
        assert bytes_of(tmp_path / "s") == undisturbed
        assert (calls[-1].files_done, calls[-1].files) == (3, 3)
        assert calls[-1].bytes_done == calls[-1].bytes
        assert calls[-1].structures_read == 441 + 508 + 471

    @pytest.mark.parametrize("where", ["part", "merge", "pool"])
    def test_killed_and_run_again_it_leaves_the_same_bytes(
        self, tmp_path: Path, undisturbed: dict[str, str], where: str
    ) -> None:
        folder = tmp_path / "s"
        command = [sys.executable, str(WORKER), str(folder), where]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not (folder / "manifest.json").exists()
        records = {path: path.stat().st_mtime_ns for path in folder.rglob("shard.json")}
        finished = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
        assert finished
        if where == "pool":
            wait_until_gone([int(pid) for pid in folder.with_suffix(".pids").read_text().split()])
        with pytest.raises(DataError, match="not finished"):
            Store(folder)
        seen: dict[Path, int] = {}
        look = lambda _: seen.update({p: p.stat().st_mtime_ns for p in [*records, *finished] if p.exists()})  # noqa: E731
        make(folder, progress=look)
        if where != "merge":
            assert seen == records | finished, "a finished part was made again"
        assert bytes_of(folder) == undisturbed

    @pytest.mark.parametrize("change", [{"seed": 2}, {"split": {"train": 0.6, "val": 0.2, "test": 0.2}}])
    def test_a_merge_that_was_begun_with_other_settings_is_forgotten(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
    ) -> None:
        """Parts that were merged are gone; their files must be converted again, or structures would be lost."""
        make(tmp_path / "fresh", **change)
        flush, calls = Appender.flush, itertools.count()

        def failing(self: Appender) -> None:
            if next(calls) == 2:
                raise OSError("no space left on device")
            flush(self)

        with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
            patch.setattr(Appender, "flush", failing)
            make(tmp_path / "s")
        make(tmp_path / "s", **change)
        assert bytes_of(tmp_path / "s") == bytes_of(tmp_path / "fresh")

    def test_memory_does_not_grow_with_the_input(self, tmp_path: Path) -> None:
        """20,000 structures make a store of 40 MB, and would take three times as much as objects."""
        command = [sys.executable, str(WORKER), str(tmp_path / "s"), "memory"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True)
        first, second = (int(line) / 1024 for line in done.stdout.split())
        assert second - first < 24, f"{first:.0f} MiB, then {second:.0f} MiB"


class TestAdding:
    def test_what_is_there_stays_where_it_is(self, tmp_path: Path, toy: Callable[..., Path]) -> None:
        first = toy("a", [structure(k) for k in range(80)])
        before, _ = make(tmp_path / "s", {"toy": first})
        old = {name: np.array(column) for name, column in before.columns.items()}
        toy("b", [structure(k) for k in range(60, 160)])
        store, _ = make(tmp_path / "s", {"toy": tmp_path / "toys", "qm7x": sample_path("qm7x")})
        assert store.sources == ("toy", "qm7x")
        assert len(store) == 180 + 507
        for name, values in old.items():
            np.testing.assert_array_equal(store.columns[name][: len(values)], values, err_msg=name)
        for row in range(len(store.groups)):
            members = store.columns["group"] == row
            assert len(set(store.split[members].tolist())) == 1
            assert members.sum() == store.groups.n_structures[row]
        shares = np.bincount(store.split[store.source_index == 0]) / 180
        np.testing.assert_allclose(shares, [0.8, 0.1, 0.1], atol=0.06)
        assert before.groups.names == [f"g{k}" for k in range(20)]  # read now, by somebody who had it open before
        training = store.gather(np.flatnonzero((store.source_index == 0) & (store.split == TRAIN)))
        counts = composition(training["numbers"], np.diff(training["atom_offset"]))
        due = np.linalg.lstsq(counts, training["energy"], rcond=1e-10)[0]
        np.testing.assert_allclose(store.references[0], due, rtol=0, atol=1e-8)
        assert before.energy.shape == (80,)  # whoever has it open sees what it saw

    def test_a_file_that_is_there_twice_is_taken_once(self, tmp_path: Path, toy: Callable[..., Path]) -> None:
        toy("a", [structure(k) for k in range(80)])
        copy = toy("b", [structure(k) for k in range(80)])
        copy.write_text("a")
        store, _ = make(tmp_path / "s", {"toy": tmp_path / "toys"})
        assert len(store) == 80
        assert [f.get("duplicate_of") for f in store.meta["by_source"]["toy"]["files"]] == [None, "a.toy"]
        _, said = make(tmp_path / "s", {"toy": tmp_path / "toys"})
        assert "nothing to do" in said[0]

    def test_a_file_that_has_changed_is_refused(self, tmp_path: Path, toy: Callable[..., Path]) -> None:
        """Its old structures are in the store; a file that was only touched is the same file."""
        path = toy("a", [structure(k) for k in range(80)])
        make(tmp_path / "s", {"toy": path})
        os.utime(path, ns=(1, 1))
        _, said = make(tmp_path / "s", {"toy": path})
        assert "nothing to do" in said[0]
        for text in ("b", "longer"):
            path.write_text(text)
            with pytest.raises(DataError, match=r"a\.toy: has changed since"):
                make(tmp_path / "s", {"toy": path})

    def test_other_settings_are_refused(self, tmp_path: Path, toy: Callable[..., Path]) -> None:
        toy("a", [structure(k) for k in range(80)])
        make(tmp_path / "s", {"toy": tmp_path / "toys"})
        with pytest.raises(DataError, match=r"made with cutoff_angstrom 2\.5, .* and 3\.0 was given"):
            make(tmp_path / "s", {"toy": tmp_path / "toys"}, cutoff_angstrom=3.0)

    def test_a_folder_of_something_else_is_left_alone(self, tmp_path: Path, toy: Callable[..., Path]) -> None:
        toy("a", [structure(k) for k in range(80)])
        (tmp_path / "s").mkdir()
        (tmp_path / "s" / "thesis.tex").write_text("x")
        with pytest.raises(DataError, match="not a readable store"):
            make(tmp_path / "s", {"toy": tmp_path / "toys"})
        assert (tmp_path / "s" / "thesis.tex").exists()

    def test_one_at_a_time(self, tmp_path: Path, toy: Callable[..., Path]) -> None:
        toy("a", [structure(k) for k in range(80)])
        (tmp_path / "s").mkdir()
        with (tmp_path / "s" / ".lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            with pytest.raises(DataError, match="being written by another process"):
                make(tmp_path / "s", {"toy": tmp_path / "toys"})


class TestBadInput:
    ITEMS = (
        *(structure(k) for k in range(40)), BadRecord("a.toy: record 40 is bad"), structure(41, energy_ev=np.nan),
        structure(42, numbers=np.array([0, 1, 1])), structure(43, numbers=np.array([6, 1, 119])),
        structure(44, positions_angstrom=np.full((3, 3), np.inf)), structure(45, positions_angstrom=1e9 * np.eye(3)),
        structure(46, cell_angstrom=np.ones((3, 3)), pbc=(True, True, True)), structure(47, pbc=(True, False, False)),
        structure(48, numbers=np.zeros(0, dtype=np.int64), positions_angstrom=np.zeros((0, 3)),
                  forces_ev_per_angstrom=None),
        structure(49, cell_angstrom=np.diag([5.0, 5.0, 1e-4]), pbc=(True, True, True)),
        structure(50, cell_angstrom=3 * np.eye(3), positions_angstrom=np.diag([1e5, 0, 0]), pbc=(True, True, True)),
        *(structure(k) for k in range(51, 90)),
    )  # fmt: skip

    def test_what_cannot_be_used_is_counted_by_reason(self, tmp_path: Path, toy: Callable[..., Path]) -> None:
        store, said = make(tmp_path / "s", {"toy": toy("a", list(self.ITEMS))})
        report = read_cleaning(store)
        assert report.removed["toy"] == {
            "unreadable record": 1, "nan label": 1, "unknown element": 2, "nan position": 1, "position out of range": 1,
            "cell without volume": 3, "no atoms": 1, "atoms outside their cell": 1,
        }  # fmt: skip
        assert (report.read["toy"], report.kept["toy"], len(store)) == (90, 79, 79)
        assert report.bad_records == {"toy": ["a.toy: record 40 is bad"]}
        assert "1 unreadable record" in said[0]

    def test_refused_at_the_first_and_gone_on_with(self, tmp_path: Path, toy: Callable[..., Path]) -> None:
        path = toy("a", list(self.ITEMS))
        with pytest.raises(DataError, match=r"record 40 is bad\. To go on .* --skip-bad"):
            make(tmp_path / "s", {"toy": path}, on_bad="refuse")
        store, _ = make(tmp_path / "s", {"toy": path})
        assert len(store) == 79

    def test_only_the_first_messages_are_kept(self, tmp_path: Path, toy: Callable[..., Path]) -> None:
        bad = [BadRecord(f"bad {k}") for k in range(300)]
        store, _ = make(tmp_path / "s", {"toy": toy("a", [*bad, *(structure(k) for k in range(80))])})
        report = read_cleaning(store)
        assert report.bad_records["toy"] == [f"bad {k}" for k in range(20)]
        assert report.removed["toy"]["unreadable record"] == 300

    @pytest.mark.parametrize("error", [ShardError("a.toy: ends early"), DataError("a.toy: asks for code")])
    def test_a_file_that_ends_badly_gives_what_came_before(
        self, tmp_path: Path, toy: Callable[..., Path], error: DataError
    ) -> None:
        toy("a", [*(structure(k) for k in range(40)), error])
        toy("b", [structure(k) for k in range(40, 80)])
        store, said = make(tmp_path / "s", {"toy": tmp_path / "toys"})
        assert len(store) == 80
        assert read_cleaning(store).bad_shards == {"toy": [str(error)]}
        assert "1 unreadable file skipped" in said[0]
        with pytest.raises(DataError, match=r"a\.toy: .* data\.on_bad: skip"):
            make(tmp_path / "t", {"toy": tmp_path / "toys"}, on_bad="refuse")

    def test_a_source_with_nothing_left_is_refused(self, tmp_path: Path, toy: Callable[..., Path]) -> None:
        path = toy("a", [structure(k, energy_ev=np.nan) for k in range(5)])
        with pytest.raises(DataError, match=r"holds no usable toy structure \(5 read\)"):
            make(tmp_path / "s", {"toy": path})

    def test_an_empty_split_is_refused_or_said(self, tmp_path: Path, toy: Callable[..., Path]) -> None:
        path = toy("a", [structure(k, group="one") for k in range(8)])
        with pytest.raises(DataError, match="toy: the val split is empty"):
            make(tmp_path / "s", {"toy": path})
        store, said = make(tmp_path / "s", {"toy": path}, may_be_empty=True)
        assert len(store) == 8
        assert "warning: toy: the val split is empty" in said

    def test_a_missing_file_is_a_data_error(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="does not exist"):
            make(tmp_path / "s", {"qm7x": tmp_path / "nowhere"})


def wait_until_gone(pids: list[int]) -> None:
    """Children of a killed parent must leave by themselves."""
    deadline = time.monotonic() + SECONDS
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, "orphans were left"
