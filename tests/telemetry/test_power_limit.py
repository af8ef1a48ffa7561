"""Power limits of simulated GPUs, NVIDIA's and AMD's: what is refused and why, and the command that shows them."""

import time

import pytest
from cap_holder import GPU, OTHER, Driver, eventually, is_clean
from scenario import SimulatedDevice, write_scenario

from wattier_telemetry.cap_note import CapNote, Process, boot_id, note_path, read_note, write_note
from wattier_telemetry.cli import main
from wattier_telemetry.power_cap import PowerCap, cap_states, check_caps
from wattier_telemetry.power_limit import PowerCapError, open_limiter

DEAD = Process(2**31 - 1, 1)
MI300X = {
    "name": "AMD_Instinct_MI300X",
    "gfx": "942",
    "average": "na",
    "limit_max": 750,
    "limit_default": 750,
    "limit": 750,
}


class TestRefused:
    """Nothing is changed, and one line says why."""

    @pytest.fixture
    def refused(self, simulated_nvml, driver):
        def refused_(ratio=0.5, act=None, **keys):
            simulated_nvml(SimulatedDevice(600, extra=keys))
            with pytest.raises(PowerCapError) as caught:
                act() if act else PowerCap(GPU, ratio).__enter__()
            assert "\n" not in str(caught.value)
            return str(caught.value)

        return refused_

    def test_no_permission(self, refused, driver, caps):
        for act in (None, lambda: check_caps([0.5])):
            text = refused(setting="denied", act=act)
            assert "does not let this user set its power limit (Insufficient Permissions)" in text
            assert "As a rule only root may: run the trials as root, ask the node's administrator" in text
        assert driver.sets() == []
        assert is_clean(caps)

    def test_not_supported(self, refused):
        assert "does not take a power limit of 350 W: Not Supported" in refused(setting="none")
        assert "does not take a power limit of 700 W: Not Supported" in refused(
            setting="none", act=lambda: check_caps([1])
        )
        assert "does not tell its power limit: Not Supported" in refused(limit="na")

    @pytest.mark.parametrize("ratio", [0.2, 0.01])
    def test_out_of_range_says_the_range(self, refused, driver, ratio):
        for act in (None, lambda: check_caps([1.0, ratio])):
            text = refused(ratio, act=act)
            assert f"is {700 * ratio:g} W, but must be from 200 to 700 W there, that is from 0.286 to 1 of" in text
        assert {made.watts for made in driver.sets()} <= {700}

    def test_driver_that_says_yes_and_does_nothing(self, refused, caps):
        assert "the driver took a power limit of 350 W, but still says 700 W" in refused(setting="lies")
        assert is_clean(caps)

    def test_driver_that_does_not_put_back(self, simulated_nvml, driver, caps):
        simulated_nvml(SimulatedDevice(600, extra={"setting": "sticks"}))
        cap = PowerCap(GPU, 0.5).__enter__()
        with pytest.raises(PowerCapError, match=r"power limit of 700 W back, but still says 350 W\. Set it by hand"):
            cap.release()
        assert read_note(caps, GPU).original_watts == 700, "the next one tries again"
        simulated_nvml(SimulatedDevice(600, extra={"setting": "sticks"}))
        with pytest.raises(PowerCapError, match="still says 350 W"):
            check_caps([0.5])
        assert main(["power-caps", "--restore"]) == 2

    def test_unknown_gpu_and_none_at_all(self, refused, monkeypatch):
        assert "there is no such GPU on this node" in refused(act=lambda: PowerCap("GPU-zzzz", 0.5).__enter__())
        monkeypatch.delenv("WATTIER_SCENARIO")
        with pytest.raises(PowerCapError, match=r"no GPU here whose power limit could be set: NVML does not start"):
            open_limiter()

    def test_lost_gpu(self, refused):
        assert "does not tell its power limit: GPU is lost" in refused(lost=0)

    def test_hanging_driver_does_not_hold_the_trial_for_ever(self, simulated_nvml, driver, monkeypatch):
        monkeypatch.setattr("wattier_telemetry.power_cap.ANSWER_SECONDS", 0.3)
        cap = PowerCap(GPU, 0.5, wait_seconds=0.2)
        simulated_nvml(SimulatedDevice(600, extra={"hang": 0, "hang_for": 1}))
        with pytest.raises(PowerCapError, match=r"driver has not answered for 0\.5 s"):
            cap.__enter__()
        time.sleep(1)
        eventually(lambda: driver.watts() == 700)

    def test_folder_that_others_write_to(self, driver, caps):
        caps.chmod(0o777)
        with pytest.raises(
            PowerCapError, match=r"no folder that this user alone may write to\. Set WATTIER_POWER_CAPS"
        ):
            PowerCap(GPU, 0.5).__enter__()
        assert driver.sets() == []

    @pytest.mark.parametrize("make", [lambda path: path.symlink_to("/tmp"), lambda path: path.touch()])
    def test_folder_that_is_none(self, driver, caps, make):
        caps.rmdir()
        make(caps)
        with pytest.raises(PowerCapError, match="WATTIER_POWER_CAPS"):
            check_caps([0.5])


class TestAmd:
    """The same through the real amdsmi binding."""

    @pytest.fixture
    def play(self, rocm, caps, tmp_path, monkeypatch):
        """Return a function that sets up dies, and returns the driver's memory; no NVML is in sight."""
        broken = tmp_path / "no-nvml"
        broken.mkdir()
        (broken / "libnvidia-ml.so.1").write_text("no library")  # found before that of the machine
        monkeypatch.setenv("LD_LIBRARY_PATH", str(broken))
        monkeypatch.setenv("ROCM_PATH", str(rocm))
        monkeypatch.setenv("WATTIER_SCENARIO", str(tmp_path / "scenario"))
        monkeypatch.setenv("WATTIER_LIMITS", str(tmp_path / "limits"))

        def play_(*extras):
            write_scenario(tmp_path / "scenario", *(SimulatedDevice(600, extra=extra) for extra in extras))
            return Driver(tmp_path / "limits")

        return play_

    @pytest.fixture(autouse=True)
    def only_amd(self, no_nvml, fresh_binding):
        """Neither NVML nor a binding of another test in this process."""

    def test_cap_of_the_second_gpu(self, play, caps):
        driver = play(MI300X, MI300X)
        second = check_caps([0.6, 1.0])[1]
        with PowerCap(second.uuid, 0.6) as cap:
            assert (cap.watts, cap.before_watts) == (450, 750)
            assert [driver.watts(number, at_first=750) for number in (0, 1)] == [750, 450]
        assert [made.watts for made in driver.sets(1)] == [750, 450, 750], "the first is the question whether one may"
        assert is_clean(caps)

    def test_limits_in_watts(self, play):
        play(MI300X | {"limit": 700, "limit_min": 100})
        limiter = open_limiter()
        assert limiter.limits(limiter.devices()[0]) == (700, 750, 100, 750)
        limiter.close()

    @pytest.mark.parametrize(
        ("extra", "message"),
        [
            ({"setting": "denied"}, "does not let this user set its power limit"),
            ({"setting": "none"}, "does not take a power limit of 750 W"),
            ({"limit": "na"}, "does not tell its power limit"),
            ({"limit_default": "na"}, "does not tell its power limit"),
        ],
    )
    def test_refused(self, play, extra, message):
        play(MI300X | extra)
        with pytest.raises(PowerCapError, match=message) as caught:
            check_caps([0.9])
        assert "\n" not in str(caught.value)

    def test_one_die_of_two_has_no_limit_of_its_own(self, play):
        die = {"name": "AMD_Instinct_MI250X", "gfx": "90a", "current": "na", "refresh": 0}
        driver = play(die, die | {"silent": 1})
        with pytest.raises(
            PowerCapError, match="one of two dies that share a power limit, which would act on the other"
        ):
            check_caps([0.9])
        assert driver.sets() == []


class TestCommand:
    def test_it_shows_limits_and_who_capped(self, driver, start, capsys):
        start().answer()
        assert main(["power-caps"]) == 0
        first, second = capsys.readouterr().out.splitlines()
        assert "350 W (by itself 700 W, can be set from 200 to 700 W)" in first
        assert "capped by process" in first and "from 700 W to 350 W" in first
        assert second.split("  ") == [
            OTHER,
            "Simulated H200",
            "700 W (by itself 700 W, can be set from 200 to 700 W)",
            "",
        ]

    def test_restore_leaves_the_living_alone(self, driver, start, capsys):
        start().answer()
        assert main(["power-caps", "--restore"]) == 0
        assert "is capped by process" in capsys.readouterr().out
        assert driver.watts() == 350

    def test_it_says_what_was_left_behind_and_what_has_no_limit(self, simulated_nvml, driver, caps):
        simulated_nvml(SimulatedDevice(extra={"limit": "na"}), SimulatedDevice(), SimulatedDevice())
        write_note(caps, CapNote(OTHER, 700.0, 350.0, boot_id(), DEAD))
        note_path(caps, "GPU-cccc-0000").write_text("{")
        none, left, damaged = cap_states()
        assert none.limits is None
        assert "does not tell its power limit" in none.remark
        assert left.remark == f"left behind by a dead process {DEAD.pid}, from 700 W to 350 W"
        assert "no readable note" in damaged.remark

    def test_without_a_gpu(self, driver, monkeypatch, capsys):
        monkeypatch.delenv("WATTIER_SCENARIO")
        assert main(["power-caps"]) == 2
        assert capsys.readouterr().err.startswith("wattier-telemetry: there is no GPU here whose power limit")
        assert main(["power-caps", "--restore"]) == 0, "there is nothing to restore"
