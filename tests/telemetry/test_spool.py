"""The spool folder: what a crash, a full disk, a second process and foreign files do to it."""

import errno
import json
import os
import pickle
import re
import subprocess
import sys
import zlib

import pytest

from wattier_telemetry.push import spool as spool_module
from wattier_telemetry.push.segment import Series, decode, encode
from wattier_telemetry.push.spool import Spool, SpoolUnavailable


def batch(*values, name="m"):
    return [Series(name, (("uuid", "u"),), [1000 * n for n in range(len(values))], list(values))]


@pytest.fixture
def opened(tmp_path):
    """Open spools in one folder and close them after the test."""
    spools = []

    def open_spool(**options):
        spools.append(Spool(tmp_path / "spool", **options))
        return spools[-1]

    yield open_spool
    for one in spools:
        one.close()


def drain(spool):
    """Return the values of all batches in the order in which they would be sent."""
    values = []
    while segment := spool.oldest():
        values += [value for series in spool.read(segment) for value in series.values]
        spool.done(segment)
    return values


def names(folder):
    return sorted(path.name for path in folder.iterdir())


class TestOrder:
    def test_oldest_first_also_after_a_restart(self, opened):
        first = opened()
        for value in range(12):
            first.append(batch(value))
        first.close()
        second = opened()
        second.append(batch(12))
        assert drain(second) == list(range(13))
        assert (len(second), second.size_bytes) == (0, 0)

    def test_numbers_never_go_back(self, opened, tmp_path):
        first = opened()
        for value in range(3):
            first.append(batch(value))
        first.reject(first.oldest())
        drain(first)
        first.close()
        second = opened()
        second.append(batch(3))
        assert second.oldest().path.name > names(tmp_path / "spool" / "rejected")[-1]

    def test_an_earlier_process_may_have_sent_its_batches(self, opened):
        first = opened()
        first.append(batch(1))
        assert not first.oldest().replayed
        first.close()
        assert opened().oldest().replayed

    def test_batches_on_hold_come_back_before_the_others(self, opened):
        spool = opened()
        for value in range(3):
            spool.append(batch(value))
        for _ in range(2):
            spool.done(spool.oldest(), hold_seconds=60)
        assert len(spool) == 1
        assert spool.recall() == 2
        assert drain(spool) == [0, 1, 2]

    def test_close_deletes_what_is_on_hold(self, opened, tmp_path):
        spool = opened()
        spool.append(batch(1))
        spool.done(spool.oldest(), hold_seconds=60)
        spool.close()
        assert not list((tmp_path / "spool").glob("*.segment"))

    def test_values_and_labels_survive_exactly(self, opened):
        hostile = 'a"b\\c\nd é 中 \U0001f525'
        values = [0.1 + 0.2, -0.0, 5e-324, 1.7976931348623157e308, float("inf"), 2.0**53 + 2]
        spool = opened()
        spool.append([Series("m", (("l", hostile),), list(range(6)), values)])
        (series,) = spool.read(spool.oldest())
        assert [value.hex() for value in series.values] == [value.hex() for value in values]
        assert series.labels == (("l", hostile),)


class TestLock:
    def test_a_second_process_is_refused_in_one_line(self, opened, tmp_path):
        opened()
        code = "import pathlib, sys; from wattier_telemetry.push.spool import Spool; Spool(pathlib.Path(sys.argv[1]))"
        run = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "spool")], capture_output=True, text=True, check=False
        )
        assert run.returncode != 0
        last = run.stderr.strip().splitlines()[-1]
        assert last.endswith("spool: is the spool of another running process. Give each its own folder")

    def test_the_lock_goes_with_the_process(self, opened):
        opened().close()
        opened()

    def test_a_file_where_the_folder_should_be(self, tmp_path):
        (tmp_path / "spool").write_text("")
        with pytest.raises(SpoolUnavailable, match="cannot be used as a spool: File exists"):
            Spool(tmp_path / "spool")


class TestDamage:
    @pytest.mark.parametrize(
        "content",
        [
            pytest.param(b"", id="empty"),
            pytest.param(encode(batch(1, 2, 3))[:-3], id="torn"),
            pytest.param(encode(batch(1))[:10] + b"\0\0" + encode(batch(1))[12:], id="flipped"),
            pytest.param(b"hello", id="text"),
            pytest.param(pickle.dumps(ValueError), id="pickle"),
            pytest.param(zlib.compress(b"[1, 2"), id="half JSON"),
            pytest.param(zlib.compress(b"[" * 200_000), id="deep JSON"),
            pytest.param(zlib.compress(b'{"format":99,"series":[]}'), id="of the future"),
            pytest.param(zlib.compress(b'{"format":1,"series":[["m",[],[1],["x"]]]}'), id="text as value"),
            pytest.param(zlib.compress(b'{"format":1,"series":[["m",[],[1,2],[1]]]}'), id="uneven"),
            pytest.param(zlib.compress(b'{"format":1,"series":[["m",[["a"]],[1],[1]]]}'), id="label without value"),
            pytest.param(zlib.compress(b'{"format":1,"series":[7]}'), id="number as series"),
        ],
    )
    def test_what_is_no_batch_is_a_value_error(self, content):
        with pytest.raises(ValueError, match=r"torn|no batch|series that is none|Expecting"):
            decode(content)

    def test_a_bomb_is_refused(self, monkeypatch):
        monkeypatch.setattr("wattier_telemetry.push.segment.MOST_BYTES", 10_000)
        with pytest.raises(ValueError, match="larger than any batch"):
            decode(zlib.compress(b" " * 1_000_000))

    def test_foreign_names_are_set_aside_and_other_files_left_alone(self, opened, tmp_path, caplog):
        folder = tmp_path / "spool"
        folder.mkdir()
        (folder / "mine.segment").write_text("x")
        (folder / "0000000000000001.1.segment").mkdir()
        (folder / "0000000000000002.1.segment").symlink_to("/dev/zero")
        (folder / "thesis.tex").write_text("x")
        (folder / ".segment.tmp").write_text("half")
        spool = opened()
        assert drain(spool) == []
        assert names(folder) == ["lock", "rejected", "state.json", "thesis.tex"]
        assert len(names(folder / "rejected")) == spool.corrupt == 3
        assert "mine.segment: is no batch of ours: moved to" in caplog.text

    def test_rejected_is_kept_but_bounded(self, opened, tmp_path, monkeypatch):
        monkeypatch.setattr(spool_module, "REJECTED_KEPT", 3)
        spool = opened()
        for value in range(5):
            spool.append(batch(value))
        while segment := spool.oldest():
            spool.reject(segment)
        kept = [int(re.match(r"\d+", name)[0]) for name in names(tmp_path / "spool" / "rejected")]
        assert kept == [3, 4, 5]
        assert spool.lost["rejected"] == 5


class TestDisk:
    def test_a_failed_write_leaves_nothing_behind(self, opened, tmp_path, monkeypatch):
        spool = opened()

        def full(descriptor):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(OSError, match="No space left"):
                spool.append(batch(1))
        assert names(tmp_path / "spool") == ["lock", "rejected", "state.json"]
        spool.append(batch(2))
        assert drain(spool) == [2]

    def test_beyond_the_cap_the_oldest_are_dropped_and_counted(self, opened, tmp_path, caplog):
        spool = opened(cap_bytes=3 * len(encode(batch(7.5))))
        for _ in range(8):
            spool.append(batch(7.5))
        assert [int(path.name[:16]) for path in sorted((tmp_path / "spool").glob("*.segment"))] == [6, 7, 8]
        assert drain(spool) == [7.5, 7.5, 7.5]
        assert spool.lost["spool_full"] == 5
        assert "is over its cap" in caplog.text

    def test_the_batch_on_its_way_is_not_dropped(self, opened):
        spool = opened(cap_bytes=1)
        spool.append(batch(1))
        sending = spool.oldest()
        for value in range(2, 5):
            spool.append(batch(value))
        assert spool.read(sending)[0].values == [1]
        assert drain(spool) == [1, 4]


class TestUncleanEnd:
    def test_is_counted_once(self, opened, caplog):
        first = opened()
        first.note(70)
        first.close()  # without saying "clean", as SIGKILL does
        second = opened()
        assert second.lost["killed"] == 70
        assert "did not end cleanly (killed): at most 70 samples are lost" in caplog.text
        second.note(0, clean=True)
        second.close()
        assert opened().lost["killed"] == 0

    def test_a_shorter_state_leaves_nothing_of_a_longer_one(self, opened, tmp_path):
        spool = opened()
        spool.note(123_456_789_012)
        spool.note(5)
        assert json.loads((tmp_path / "spool" / "state.json").read_text())["at_risk"] == 5

    @pytest.mark.parametrize("text", ["{", "[]", '{"clean": false}', '{"clean": 0, "at_risk": "x", "reason": 1}'])
    def test_a_damaged_state_is_said_and_survived(self, opened, tmp_path, caplog, text):
        (tmp_path / "spool").mkdir()
        (tmp_path / "spool" / "state.json").write_text(text)
        assert sum(opened().lost.values()) == 0
        assert "state.json: is damaged" in caplog.text
