"""A trial's power cap, on simulated GPUs: in force while it trains, put back whoever dies, refused at the start."""

import ctypes
import json
import os
import signal
import subprocess
import sys

import pynvml
import pytest
from cap_holder import GPU, Driver, eventually, is_clean
from scenario import SimulatedDevice, build_nvml, write_scenario

from wattier import run as steps
from wattier.config import RunConfig
from wattier.errors import UserError
from wattier.launch import Stage
from wattier.power_cap import cap_ratio, power_capped
from wattier.records import Fidelity, Proposal
from wattier.rundir import RunDir, write_json
from wattier_telemetry import EnergyReport, Share
from wattier_telemetry.cap_note import read_note
from wattier_telemetry.power_limit import PowerCapError

WATTS = 600.0  # what the simulated GPUs draw where nothing holds them down
POWER_CAP = 4  # of NVML's reasons
RAY_SECONDS = 120.0  # a cluster starts in ten on an idle machine


class Quiet:
    """A listener."""

    def phase(self, name):
        pass

    say = progress = phase

    def trial(self, result, done, total):
        pass


@pytest.fixture(scope="module")
def nvml_folder(tmp_path_factory):
    return build_nvml(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def simulate(nvml_folder, tmp_path, monkeypatch):
    """Return a function that sets up one simulated GPU, here and in every process from here; returns its memory."""
    monkeypatch.setattr(pynvml, "nvmlLib", ctypes.CDLL(str(nvml_folder / "libnvidia-ml.so.1")))
    pynvml._nvmlGetFunctionPointer_cache.clear()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, value in {
        "LD_LIBRARY_PATH": nvml_folder,
        "WATTIER_SCENARIO": tmp_path / "scenario",
        "WATTIER_LIMITS": tmp_path / "limits",
        "WATTIER_POWER_CAPS": tmp_path / "caps",
        "WATTIER_REGISTRY": tmp_path / "registry",
    }.items():
        monkeypatch.setenv(name, str(value))

    def simulate_(**keys):
        write_scenario(tmp_path / "scenario", SimulatedDevice(WATTS, extra=keys))
        return Driver(tmp_path / "limits")

    yield simulate_
    pynvml._nvmlGetFunctionPointer_cache.clear()


@pytest.fixture
def make(tmp_path):
    """A run of tiny trials under caps."""

    def build(ratios=(0.5,), *, trials=1, ranks=1, epochs=1, launcher="inline", gpus=1, retries=1):
        config = RunConfig.model_validate({
            "name": "capped", "run_dir": str(tmp_path / "run"), "launcher": launcher,
            "data": {"sources": {"qm7x": "sample"}, "cutoff_angstrom": 3.0},
            "model": {"hidden_dim": 8, "n_layers": 1, "n_radial": 4, "head_dim": 8, "forces": "vector"},
            "search": {"space": {"power_cap_ratio": {"choices": list(ratios)}}, "stages": [
                {"name": "s", "trials": trials, "structures": 64, "epochs": epochs, "ranks": ranks,
                 "reduction_factor": None}
            ]},
            "full_training": {"ranks": ranks}, "telemetry": {"source": "nvml"},
            "resources": {"gpus_per_rank": gpus, "allow_power_cap": True, "retries": retries},
        })  # fmt: skip
        return RunDir.create(config), config

    return build


def search(run, config):
    with steps.launcher_for(config) as launcher:
        steps.search(run, config, launcher, Quiet())


def test_power_is_held_down_while_a_trial_trains_and_only_then(simulate, make, tmp_path):
    driver = simulate(reasons=POWER_CAP, refresh=0.001)
    run, config = make([0.5, 0.7], trials=4, epochs=20)  # as long as many readings: each edge is known to some ms
    search(run, config)
    results = run.trials()
    assert {result.status for result in results} == {"complete"}
    for result in results:
        watts = min(WATTS, round(700 * result.params["power_cap_ratio"]))
        assert result.energy.joules == pytest.approx(watts * result.energy.seconds, rel=0.05)
        assert result.devices == (GPU,)
        assert not result.throttled, "being held down by the cap is what was tried"
        assert not result.energy.warnings
        (note,) = run.trial_folder("s", result.trial_id).glob("*.power_cap.json")
        record = json.loads(note.read_text())
        assert note.name == "attempt1-rank0.power_cap.json"
        assert (record["power_cap_watts"], record["before_watts"], record["remark"]) == (watts, 700, "")
    expected = [round(700 * result.params["power_cap_ratio"]) for result in results]
    assert [made.watts for made in driver.sets()] == [700, *(w for cap in expected for w in (cap, 700))]
    assert is_clean(tmp_path / "caps")


def test_on_ray_the_trial_is_killed_and_then_the_driver(simulate, make, tmp_path):
    """SIGKILL of a trial's process, which Ray starts anew; then of the driver, which the whole cluster follows."""
    driver, caps = simulate(), tmp_path / "caps"
    _, config = make(epochs=1000, launcher="ray")
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    command = [sys.executable, "-m", "wattier", "search", str(tmp_path / "run.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        eventually(lambda: driver.watts() == 350, RAY_SECONDS)
        first = read_note(caps, GPU).holder.pid
        assert first != process.pid
        os.kill(first, signal.SIGKILL)
        eventually(lambda: len(driver.sets()) > 3, RAY_SECONDS)
        assert read_note(caps, GPU).holder.pid != first
    finally:
        process.kill()
        process.wait()
    eventually(lambda: driver.watts() == 700 and is_clean(caps), RAY_SECONDS)
    assert [made.watts for made in driver.sets()] == [700, 350, 700, 350, 700]


def test_trial_that_fails_and_is_tried_again_leaves_the_limit_as_it_was(simulate, make):
    driver = simulate()
    run, config = make(retries=2)
    broken = run.trial_folder("s", "s-000") / "last.pt"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"not a checkpoint")
    search(run, config)
    (result,) = run.trials()
    assert result.status == "failed"
    assert [made.watts for made in driver.sets()] == [700, *[350, 700] * 3]


def test_cap_that_did_not_last_is_a_warning_of_the_bill(simulate, make, monkeypatch):
    driver = simulate()
    run, config = make(epochs=2)
    spent = []

    def meddle(self, record):
        if not spent:
            driver.set_by_hand(500)
        spent.append(record)
        return True

    monkeypatch.setattr("wattier.policy.SearchPolicy.on_epoch", lambda self, _, record: meddle(self, record))
    search(run, config)
    (result,) = run.trials()
    (warning,) = [text for text in result.energy.warnings if "cap" in text]
    assert "the power cap of 350 W did not last" in warning
    assert "set its power limit, to 500 W" in warning
    assert driver.watts() == 500, "what somebody else has set is left"


@pytest.mark.parametrize(
    ("ratios", "ranks", "keys", "message"),
    [
        (
            [0.5, 0.9],
            1,
            {"setting": "denied"},
            r"power_cap_ratio: Simulated H200 GPU-aaaa-0000: the driver does not let",
        ),
        ([0.2, 0.9], 1, {}, r"a power cap of 0\.2 is 140 W, but must be from 200 to 700 W"),
        ([0.5], 1, {"limit": "na"}, "does not tell its power limit"),
        ([0.5], 2, {}, "up to 2 ranks, but this machine has 1 GPUs"),
        ([0.5], 1, {"mig": 1}, "no GPU here whose power limit could be set"),
    ],
)
def test_what_no_trial_could_do_is_refused_before_anything_is_done(simulate, make, ratios, ranks, keys, message):
    driver = simulate(**keys)
    run, config = make(ratios, ranks=ranks)
    with pytest.raises(UserError, match=message) as caught:
        search(run, config)
    assert "\n" not in str(caught.value)
    assert not run.store_path.exists()
    assert {made.watts for made in driver.sets()} <= {700}


def test_part_of_a_gpu_is_refused(simulate, tmp_path):
    driver = simulate()
    with pytest.raises(PowerCapError, match=r"rank 1 has 0\.5 of a GPU"), power_capped(tmp_path, 1, 0.5, 0.7):
        pass
    assert driver.sets() == []


def test_without_a_cap_no_driver_is_asked(simulate, tmp_path):
    driver = simulate(setting="denied", limit="na")
    with power_capped(tmp_path, 0, 0.0, None) as uncap:
        uncap()
    assert (driver.sets(), list(tmp_path.glob("*.power_cap.json"))) == ([], [])


@pytest.mark.parametrize(("cap", "hot", "throttled"), [(None, 0, True), (0.7, 0, False), (0.7, 30, True)])
def test_a_cap_is_no_throttling_but_heat_is(make, tmp_path, trial, cap, hot, throttled):
    run, config = make()
    share = Share("gpu", "gpu", 0.0, 100.0, 1.0, 5e4, "counter", throttled_seconds={"power_cap": 90.0, "heat": hot})
    result = trial("s-000", stage="s", params={} if cap is None else {"power_cap_ratio": cap})
    folder = run.trial_folder("s", "s-000")
    folder.mkdir(parents=True)
    write_json(folder / "result.json", {**result.to_dict(), "energy": EnergyReport.of([share]).to_dict()})
    outcome = Stage(run, config, Fidelity("s", None, 1, 1), 1).outcome(Proposal("s-000", result.params), None)
    assert outcome.throttled is throttled


def test_cap_of_a_whole_run_and_that_of_a_trial(make):
    _, config = make()
    assert (cap_ratio(config, {}), cap_ratio(config, {"power_cap_ratio": 0.6})) == (None, 0.6)
    fixed = config.model_copy(update={"training": config.training.model_copy(update={"power_cap_ratio": 0.8})})
    assert (cap_ratio(fixed, {}), cap_ratio(fixed, {"power_cap_ratio": 0.6})) == (0.8, 0.6)
