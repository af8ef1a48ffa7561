"""Ingestions that die at the worst moment, or meet files that are not what they were: no structure goes in silence."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toys import make, structure

from wattier_gnn import merge, parts
from wattier_gnn.columns import Appender
from wattier_gnn.ingest import read_cleaning
from wattier_gnn.sample import sample_path
from wattier_gnn.store import Store
from wattier_gnn.structure import BadRecord, DataError, ShardError

Toy = Callable[..., Path]


class Kill(BaseException):
    """In the place of SIGKILL: no handler of ours sees it."""


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(merge, "COMMIT_BYTES", 1)


@pytest.fixture
def two(toy: Toy) -> Path:
    """A folder of two files of 80 structures each."""
    toy("a", [structure(k) for k in range(80)])
    return toy("b", [structure(k) for k in range(80, 160)]).parent


def killed(
    owner: Any, name: str, when: Callable[..., bool], folder: Path, paths: dict[str, Path], **options: Any
) -> None:
    """An ingestion that dies behind the first call of `owner.name` for whose arguments `when` holds."""
    real = getattr(owner, name)

    def call(*arguments: Any, **keywords: Any) -> Any:
        result = real(*arguments, **keywords)
        if when(*arguments):
            raise Kill
        return result

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Kill):
        patch.setattr(owner, name, call)
        make(folder, paths, **options)


def assert_whole(store: Store, n: int = 160) -> None:
    assert sorted(store.key(k) for k in range(len(store))) == sorted(f"k{k}" for k in range(n))
    assert read_cleaning(store).kept.total() == n


class TestKilled:
    @pytest.mark.parametrize("last", ["merge.json", "inputs.json"])
    def test_while_it_cleans_up(self, two: Path, tmp_path: Path, last: str) -> None:
        killed(Path, "unlink", lambda path, **_: path.name == last, tmp_path / "s", {"toy": two / "a.toy"})
        store, said = make(tmp_path / "s", {"toy": two})
        assert_whole(store)
        assert "nothing to do" not in said[-1]

    @pytest.mark.parametrize("last", ["merge.json", "inputs.json"])
    def test_while_it_forgets_another_merge(self, two: Path, tmp_path: Path, last: str) -> None:
        killed(merge, "_remove_parts", lambda _: True, tmp_path / "s", {"toy": two})
        killed(Path, "unlink", lambda path, **_: path.name == last, tmp_path / "s", {"toy": two}, seed=2)
        assert_whole(make(tmp_path / "s", {"toy": two})[0])

    def test_while_it_clears_the_way(self, two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(parts, "PART_STRUCTURES", 50)
        killed(parts, "write_text", lambda path, _: path.name == "shard.json", tmp_path / "s", {"toy": two})
        is_part = lambda path, **_: str(path).endswith(".safetensors")  # noqa: E731
        killed(os, "unlink", is_part, tmp_path / "s", {"toy": two}, cutoff_angstrom=3.0)
        assert_whole(make(tmp_path / "s", {"toy": two})[0])

    def test_between_the_last_part_and_its_record(self, toy: Toy, tmp_path: Path) -> None:
        """A file that ends early is then counted once."""
        path = toy("a", [*(structure(k) for k in range(80)), ShardError("a.toy: ends early")])
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Kill):
            patch.setattr(parts, "write_text", lambda *_: (_ for _ in ()).throw(Kill))
            make(tmp_path / "s", {"toy": path})
        store, said = make(tmp_path / "s", {"toy": path})
        assert_whole(store, 80)
        assert read_cleaning(store).bad_shards == {"toy": ["a.toy: ends early"]}
        assert "1 unreadable file skipped" in said[0]


class TestLostParts:
    def test_they_are_made_again(self, two: Path, tmp_path: Path) -> None:
        with pytest.raises(Kill), pytest.MonkeyPatch.context() as patch:
            patch.setattr(merge, "_dealt", lambda *_: (_ for _ in ()).throw(Kill))
            make(tmp_path / "s", {"toy": two})
        next((tmp_path / "s" / ".ingest").rglob("*.safetensors")).unlink()
        assert_whole(make(tmp_path / "s", {"toy": two})[0])

    def test_a_merge_that_is_gone_on_with_refuses_until_they_are(self, two: Path, tmp_path: Path) -> None:
        killed(merge, "_remove_parts", lambda _: True, tmp_path / "s", {"toy": two})
        (part,) = (tmp_path / "s" / ".ingest").rglob("*.safetensors")
        part.unlink()
        with pytest.raises(DataError, match="holds 0 parts, but must hold 1"):
            make(tmp_path / "s", {"toy": two})
        shutil.rmtree(part.parent)
        assert_whole(make(tmp_path / "s", {"toy": two})[0])

    def test_what_was_joined_must_be_what_was_kept(
        self, two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        append, calls = Appender.append, itertools.count()

        def forgetful(self: Appender, arrays: Any) -> None:
            if next(calls):
                append(self, arrays)

        monkeypatch.setattr(Appender, "append", forgetful)
        with pytest.raises(DataError, match="80 structures were joined, but must be the 160"):
            make(tmp_path / "s", {"toy": two})
        assert not (tmp_path / "s" / "manifest.json").exists()


class TestDamagedStore:
    def test_it_is_not_added_to(self, two: Path, tmp_path: Path) -> None:
        store, _ = make(tmp_path / "s", {"toy": two / "a.toy"})
        column = tmp_path / "s" / "atoms.bin"
        os.truncate(column, half := column.stat().st_size // 2)
        with pytest.raises(DataError, match=r"not a readable store \(atoms\.bin has"):
            make(tmp_path / "s", {"toy": two})
        with (
            pytest.raises(DataError, match=r"atoms\.bin has .* bytes of"),
            Appender(tmp_path / "s", store.meta["rows"]),
        ):
            pass
        assert column.stat().st_size == half

    def test_nor_is_one_whose_columns_lie_elsewhere(self, two: Path, tmp_path: Path) -> None:
        """Cutting them back to the rows of this manifest would take away what others added."""
        make(tmp_path / "s", {"toy": two / "a.toy"})
        (tmp_path / "links").mkdir()
        for path in (tmp_path / "s").iterdir():
            (tmp_path / "links" / path.name).symlink_to(path)
        with pytest.raises(DataError, match="Add to the store that it links to"):
            make(tmp_path / "links", {"toy": two})


class TestOtherFiles:
    def test_a_second_layout_is_refused(self, tmp_path: Path) -> None:
        make(tmp_path / "s", {"oc22": sample_path("oc22")})
        (tmp_path / "1.traj").write_bytes(b"")
        with pytest.raises(DataError, match=r"hold oc22 of \*\.lmdb and \*\.traj, but must hold one layout"):
            make(tmp_path / "s", {"oc22": tmp_path / "1.traj"})

    def test_a_file_whose_ids_came_back_is_read(self, tmp_path: Path) -> None:
        folder = tmp_path / "oc20"
        folder.mkdir()
        for name in ("0.extxyz.xz", "0.txt.xz", "1.extxyz.xz", "1.txt.xz"):
            shutil.copy(sample_path("oc20") / name, folder)
        (folder / "1.txt.xz").rename(tmp_path / "away")
        options: dict[str, Any] = {"may_be_empty": True}
        first, _ = make(tmp_path / "s", {"oc20": folder}, **options)
        assert len(read_cleaning(first).bad_shards["oc20"]) == 1
        (tmp_path / "away").rename(folder / "1.txt.xz")
        second, said = make(tmp_path / "s", {"oc20": folder}, **options)
        fresh, _ = make(tmp_path / "fresh", {"oc20": folder}, **options)
        assert len(second) == len(fresh) > len(first)
        assert read_cleaning(second).read == read_cleaning(fresh).read
        assert not read_cleaning(second).bad_shards["oc20"]
        assert "unreadable" not in said[0]
        files = second.meta["by_source"]["oc20"]["files"]
        assert files == fresh.meta["by_source"]["oc20"]["files"]
        assert [file["beside"][0]["name"] for file in files] == ["0.txt.xz", "1.txt.xz"]
        (folder / "1.txt.xz").write_bytes((folder / "0.txt.xz").read_bytes())
        with pytest.raises(DataError, match="has changed since"):
            make(tmp_path / "s", {"oc20": folder}, **options)

    def test_a_file_that_gave_nothing_may_change(self, two: Path, toy: Toy, tmp_path: Path) -> None:
        bad = toy("b", [ShardError(f"{two / 'b.toy'}: is no toy")])
        assert_whole(make(tmp_path / "s", {"toy": two})[0], 80)
        assert "nothing to do" in make(tmp_path / "s", {"toy": two})[1][0]
        toy("b", [structure(k) for k in range(80, 160)])
        bad.write_text("a whole one")
        store, said = make(tmp_path / "s", {"toy": two})
        assert_whole(store)
        assert "unreadable" not in said[0]
        bad.write_text("yet another")
        with pytest.raises(DataError, match="has changed since"):
            make(tmp_path / "s", {"toy": two})

    def test_refuse_does_not_go_on_with_what_skip_began(self, two: Path, toy: Toy, tmp_path: Path) -> None:
        toy("a", [BadRecord("record 0 is bad"), *(structure(k) for k in range(80))])
        killed(parts, "write_text", lambda path, _: path.name == "shard.json", tmp_path / "s", {"toy": two})
        with pytest.raises(DataError, match=r"record 0 is bad\. To go on"):
            make(tmp_path / "s", {"toy": two}, on_bad="refuse")
        store, _ = make(tmp_path / "s", {"toy": two})
        assert_whole(store)
        np.testing.assert_array_equal(store.energy[:80], [structure(k).energy_ev for k in range(80)])
