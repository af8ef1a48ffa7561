"""Power caps on simulated GPUs are put back, whoever dies and how, for real, with processes and signals."""

import os
import random
import signal
import time
from contextlib import closing

import pytest
from cap_holder import GPU, OTHER, eventually, is_clean, keeper_of

from wattier_telemetry import EnergyMeter, open_source
from wattier_telemetry.cap_note import CapNote, Process, boot_id, note_path, read_note, write_note
from wattier_telemetry.cli import main
from wattier_telemetry.power_cap import PowerCap, check_caps, restore_caps

DEAD = Process(2**31 - 1, 1)


class TestEnds:
    """The limit is 350 W while the cap lasts and 700 W afterwards, whoever dies."""

    def test_normal_end(self, driver, caps):
        with PowerCap(GPU, 0.5) as cap:
            assert (cap.watts, cap.before_watts, driver.watts(0), driver.watts(1)) == (350, 700, 350, 700)
            note = read_note(caps, GPU)
            assert (note.original_watts, note.cap_watts, note.holder) == (700, 350, Process.this())
        assert [made.watts for made in driver.sets(0)] == [350, 700]
        assert (cap.restoration.outcome, cap.remark) == ("restored", "")
        assert is_clean(caps)
        assert cap.release() == cap.restoration, "a second call does nothing"
        assert len(driver.sets(0)) == 2

    def test_note_is_on_the_disk_before_the_limit_changes(self, driver, caps):
        with PowerCap(GPU, 0.5):
            wall_of_set = time.time() - (time.monotonic() - driver.sets()[0].clock)
            assert note_path(caps, GPU).stat().st_mtime <= wall_of_set + 0.01

    def test_one_after_the_other_on_one_gpu(self, driver):
        for ratio in (0.5, 0.8, 0.3):
            with PowerCap(GPU, ratio) as cap:
                assert cap.before_watts == 700
        assert [made.watts for made in driver.sets()] == [350, 700, 560, 700, 210, 700]

    def test_exception_passes_and_the_limit_is_back(self, driver, start):
        holder = start()
        assert holder.answer() == {"watts": 350, "before": 700}
        assert holder.finish("raise") == {"error": "the work failed", "notes": []}
        assert driver.watts() == 700

    @pytest.mark.parametrize(
        ("number", "group", "child"),
        [(signal.SIGTERM, False, False), (signal.SIGKILL, True, False), (signal.SIGKILL, False, True)],
        ids=["SIGTERM", "SIGKILL of its process group", "SIGKILL, a forked child lives on"],
    )
    def test_holder_dies(self, driver, caps, start, number, group, child):
        holder = start(with_child=child)
        holder.answer()
        holder.kill(number, group=group)
        eventually(lambda: driver.watts() == 700 and is_clean(caps))
        assert [made.watts for made in driver.sets()] == [350, 700]
        if child:
            os.killpg(holder.pid, 0)  # still there, as the orphaned workers of a trial are

    def test_next_trial_waits_until_the_limit_of_a_dead_one_is_back(self, driver, start):
        first = start()
        first.answer()
        first.kill()
        assert start(ratio=0.8).answer() == {"watts": 560, "before": 700}

    def test_keeper_is_killed_and_the_holder_puts_back(self, driver, caps, start):
        holder = start()
        holder.answer()
        os.kill(keeper_of(driver), signal.SIGKILL)
        assert holder.finish() == {"outcome": "restored", "remark": ""}
        assert driver.watts() == 700
        assert is_clean(caps)

    def test_keeper_is_asked_to_end_and_the_trial_is_told(self, driver, caps, start):
        holder = start()
        holder.answer()
        os.kill(keeper_of(driver), signal.SIGTERM)
        eventually(lambda: driver.watts() == 700 and is_clean(caps))
        remark = holder.finish()["remark"]
        assert "was taken off before the work was done, since a signal ended the keeper" in remark

    @pytest.mark.parametrize("who", ["next cap", "doctor", "power-caps --restore", "check"])
    def test_all_are_killed_and_the_next_finds_the_note(self, driver, caps, start, who, capsys):
        holder = start()
        holder.answer()
        os.kill(keeper_of(driver), signal.SIGKILL)
        holder.kill()
        eventually(lambda: not read_note(caps, GPU).holder.is_alive())
        assert driver.watts() == 350
        if who == "next cap":
            with PowerCap(OTHER, 0.9):
                assert driver.watts() == 700
        elif who == "check":
            check_caps([0.5])
        else:
            assert main(who.split()) == 0
            assert f"Simulated H200 {GPU}: its power limit is 700 W again" in capsys.readouterr().out
        assert driver.watts() == 700
        assert is_clean(caps)

    def test_all_are_killed_between_note_and_change(self, driver, caps):
        write_note(caps, CapNote(GPU, 700.0, 350.0, boot_id(), DEAD))
        (done,) = restore_caps()
        assert (done.outcome, driver.sets()) == ("already back", [])
        assert is_clean(caps)

    def test_power_falls_with_the_cap_and_comes_back(self, driver):
        with closing(open_source("nvml")) as source, EnergyMeter(source) as free:
            time.sleep(0.3)
        with PowerCap(GPU, 0.5), closing(open_source("nvml")) as source, EnergyMeter(source) as capped:
            time.sleep(0.3)
        for meter, watts in ((free, 600), (capped, 350)):
            share = next(share for share in meter.report.shares if share.device_uuid == GPU)
            assert share.joules == pytest.approx(watts * share.seconds, rel=0.1)


class TestOthers:
    def test_what_somebody_else_set_meanwhile_is_left_and_said(self, driver, caps, start):
        holder = start()
        holder.answer()
        driver.set_by_hand(500)
        answer = holder.finish()
        assert answer["outcome"] == "changed by others"
        assert "did not last" in answer["remark"]
        assert "somebody else set its power limit, to 500 W" in answer["remark"]
        assert driver.watts() == 500
        assert is_clean(caps), "it is no longer ours to put back"

    def test_lower_limit_of_an_administrator_is_never_raised(self, driver, start):
        driver.set_by_hand(300)
        holder = start(ratio=0.5)
        assert holder.answer() == {"watts": 300, "before": 300}
        assert holder.finish() == {"outcome": "already back", "remark": ""}
        assert len(driver.sets()) == 1

    def test_limit_of_an_administrator_comes_back_to_the_milliwatt(self, driver):
        driver.set_by_hand(650.123)
        with PowerCap(GPU, 0.5):
            assert driver.watts() == 350
        assert driver.watts() == 650.123

    @pytest.mark.parametrize("ratio", [0.8, 1.0])
    def test_two_on_one_gpu_are_refused(self, driver, start, ratio):
        """Also where the first one did not need to change anything."""
        first = start(ratio=ratio)
        first.answer()
        sets = len(driver.sets())
        error = start(ratio=0.5, wait_seconds=0.2).answer()["error"]
        assert f"is capped by process {first.pid} already" in error
        assert len(driver.sets()) == sets
        first.finish()
        assert driver.watts() == 700

    def test_two_on_one_gpu_are_refused_after_the_keeper_died(self, driver, start):
        first = start(ratio=0.8)
        first.answer()
        os.kill(keeper_of(driver), signal.SIGKILL)
        error = start(wait_seconds=0.2).answer()["error"]
        assert f"is capped by process {first.pid} already" in error
        assert [done.outcome for done in restore_caps()] == ["in use"]
        assert driver.watts() == 560
        first.finish()
        assert driver.watts() == 700

    def test_mask_does_not_hide_the_gpu_from_its_keeper(self, driver, monkeypatch):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
        assert [device.uuid for device in check_caps([0.5])] == [OTHER]
        with PowerCap(OTHER, 0.5):
            assert (driver.watts(0), driver.watts(1)) == (700, 350)


class TestRandomHistories:
    @pytest.mark.parametrize("seed", range(2))
    def test_whatever_starts_dies_and_ends_the_limits_come_back(self, driver, caps, start, seed):
        """Holders on two GPUs; holders and keepers are killed at random; truth: nobody else sets a limit here."""
        luck = random.Random(seed)
        alive = {}
        for _ in range(9):
            uuid = luck.choice([GPU, OTHER])
            number = (GPU, OTHER).index(uuid)
            holder = alive.pop(uuid, None)
            if holder is None:
                ratio = luck.choice([0.3, 0.5, 0.9])
                alive[uuid] = holder = start(uuid, ratio)
                if luck.random() < 0.8:  # else it may be killed in the middle of the start
                    assert holder.answer() == {"watts": round(700 * ratio), "before": 700}
                continue
            how = luck.choice(["end", "raise", "kill", "kill keeper", "kill both"])
            if "keeper" in how or "both" in how:
                holder.answer()
                os.kill(keeper_of(driver, number), signal.SIGKILL)
            if how in ("kill", "kill both"):
                holder.kill()
            else:
                holder.answer()
                holder.finish("raise" if how == "raise" else "return")
                assert driver.watts(number) == 700
        for holder in alive.values():
            holder.kill()
        eventually(lambda: all(done.outcome != "in use" for done in restore_caps()) and is_clean(caps))
        eventually(lambda: (driver.watts(0), driver.watts(1)) == (700, 700))
