"""The notes of power caps: whatever lies in their folder, no limit is set that no cap of ours had replaced."""

import json
import math
import os

import pytest
from cap_holder import GPU, OTHER, is_clean

from wattier_telemetry import cap_note
from wattier_telemetry.cap_note import CapNote, Process, boot_id, locked, note_path, read_note, write_note
from wattier_telemetry.power_cap import PowerCap, check_caps, restore_caps
from wattier_telemetry.power_limit import PowerCapError

DEAD = Process(2**31 - 1, 1)


class TestNotes:
    @staticmethod
    def good(**changes):
        holder = {"pid": DEAD.pid, "started_ticks": DEAD.started_ticks}
        return {
            "uuid": GPU,
            "original_watts": 700.0,
            "cap_watts": 350.0,
            "boot_id": boot_id(),
            "holder": holder,
            **changes,
        }

    def test_good_note_is_followed(self, driver, caps):
        driver.set_by_hand(350)
        note_path(caps, GPU).write_text(json.dumps(self.good()))
        assert [done.outcome for done in restore_caps()] == ["restored"]
        assert driver.watts() == 700

    def test_another_boot_restores_nothing(self, driver, caps):
        """Somebody has set 350 W since the machine started; the old note must not undo that."""
        driver.set_by_hand(350)
        note_path(caps, GPU).write_text(json.dumps(self.good(boot_id="0b5e")))
        assert [done.outcome for done in restore_caps()] == ["another boot"]
        assert driver.watts() == 350
        assert is_clean(caps)

    def test_process_that_got_the_number_of_a_dead_holder(self, driver, caps):
        driver.set_by_hand(350)
        holder = {"pid": os.getppid(), "started_ticks": 1}
        note_path(caps, GPU).write_text(json.dumps(self.good(holder=holder)))
        assert [done.outcome for done in restore_caps()] == ["restored"]

    @pytest.mark.parametrize(
        "text",
        ["", "{", '{"uuid": "GPU-aa', "[]", "null", "[" * 10_000, "x" * 100_000, '{"uuid": 1e999}'],
        ids=["empty", "truncated", "torn", "list", "null", "deep", "huge", "infinite"],
    )
    def test_damaged(self, driver, caps, text):
        self.check_problem(driver, caps, text)

    @pytest.mark.parametrize(
        "changes",
        [
            {"original_watts": None}, {"original_watts": "700"}, {"original_watts": -700}, {"original_watts": True},
            {"original_watts": 1e9}, {"cap_watts": math.nan}, {"cap_watts": 0}, {"holder": 7}, {"holder": {"pid": 1}},
            {"holder": {"pid": -1, "started_ticks": 1}}, {"holder": {"pid": 2**80, "started_ticks": 1}}, {"boot_id": 7},
            {"uuid": "../../../etc/passwd"}, {"uuid": OTHER}, {"uuid": ["GPU"]},
        ],
        ids=str,
    )  # fmt: skip
    def test_wrong_fields(self, driver, caps, changes):
        self.check_problem(driver, caps, json.dumps(self.good(**changes)))

    @staticmethod
    def check_problem(driver, caps, text):
        driver.set_by_hand(350)
        path = note_path(caps, GPU)
        path.write_text(text)
        (done,) = restore_caps()
        assert done.outcome == "problem"
        assert str(path) in done.text
        assert "emove the file" in done.text
        assert "\n" not in done.text
        with pytest.raises(PowerCapError, match="emove the file"):
            check_caps([0.5])
        assert driver.watts() == 350
        assert path.exists()

    def test_a_cap_on_top_of_a_damaged_note_is_refused(self, driver, caps):
        note_path(caps, GPU).write_text("{")
        with pytest.raises(PowerCapError, match="no readable note"):
            PowerCap(GPU, 0.5).__enter__()
        assert driver.sets() == []

    def test_note_that_others_may_have_written(self, driver, caps):
        driver.set_by_hand(350)
        path = note_path(caps, GPU)
        path.write_text(json.dumps(self.good()))
        path.chmod(0o666)
        assert "others may have written it" in restore_caps()[0].text
        assert driver.watts() == 350

    @pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
    def test_no_file(self, driver, caps, tmp_path, kind):
        path, real = note_path(caps, GPU), tmp_path / "real.json"
        real.write_text(json.dumps(self.good()))
        {"link": lambda: path.symlink_to(real), "pipe": lambda: os.mkfifo(path), "folder": path.mkdir}[kind]()
        assert [done.outcome for done in restore_caps()] == ["problem"]
        assert driver.sets() == []

    def test_notes_of_gpus_that_are_not_here_are_left_to_others(self, driver, caps):
        path = note_path(caps, "GPU-of-another-node")
        path.write_text(json.dumps(self.good(uuid="GPU-of-another-node")))
        (caps / "stray.json").write_text("{")
        assert restore_caps() == []
        assert path.exists()

    @pytest.mark.parametrize("uuid", ["../../escape", "/etc/passwd", "a/b", ".", "", "GPU\0x", "x" * 5000, "GPU-ä:ö"])
    def test_no_uuid_leads_out_of_the_folder(self, caps, uuid):
        path = note_path(caps, uuid)
        assert path.parent == caps
        assert os.path.normpath(path) == str(path)
        write_note(caps, CapNote(uuid, 700.0, 350.0, boot_id(), DEAD))
        assert [file.name for file in caps.iterdir()] == [path.name]
        assert read_note(caps, uuid).uuid == uuid

    def test_unlike_uuids_have_unlike_notes(self, caps):
        assert note_path(caps, "a/b") != note_path(caps, "a_b")

    def test_lock_is_given_once_and_says_for_whom(self, caps):
        with locked(caps, GPU, DEAD) as first, locked(caps, GPU) as second, locked(caps, OTHER) as other:
            assert (first, second, other) == (None, DEAD, None)
        with locked(caps, GPU) as again:
            assert again is None

    def test_no_boot_id_no_cap(self, driver, caps, monkeypatch, tmp_path):
        monkeypatch.setattr(cap_note, "_PROC", tmp_path)
        with pytest.raises(PowerCapError, match="does not tell its boot id"):
            boot_id()
