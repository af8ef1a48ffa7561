"""Omnistat's names, held against its own metric table: every series of its SMI, RMS and info collectors."""

import json
import os

import pytest
from prometheus_client.parser import text_string_to_metric_families
from scripted import ScriptedSource

from wattier_telemetry import TrialRegistration
from wattier_telemetry.exporter.metrics import expose
from wattier_telemetry.exporter.omnistat import METRICS, OmnistatView
from wattier_telemetry.exporter.sampler import Sampler
from wattier_telemetry.records import ErrorCounts

# The blocks that the table names, and one of those behind its dots.
BLOCKS = ("umc", "sdma", "gfx", "mmhub", "pcie_bif", "hdp", "xgmi_wafl", "athub")
READING = {
    "utilization_ratio": 0.42,
    "memory_utilization_ratio": 0.22,
    "memory_used_bytes": 16.0 * 2**30,
    "memory_total_bytes": 64.0 * 2**30,
    "temperature_celsius": 42.0,
    "memory_temperature_celsius": 46.0,
    "clock_hertz": 1.7e9,
    "memory_clock_hertz": 1.6e9,
    "power_limit_watts": 560.0,
    "ecc_corrected": 5.0,
    "ecc_uncorrected": 2.0,
    "throttle_reasons": (),
    "decoder_utilization_ratio": 0.07,
    "link_read_bytes": 3.0 * 1024,
    "link_written_bytes": 5.0 * 1024,
    "compute_units": 104.0,
    "compute_units_busy": 26.0,
    "errors_by_block": {block: ErrorCounts(i, i + 0.25, i + 0.5) for i, block in enumerate(BLOCKS)},
}
# name: (labels, value of card 0), from Omnistat 1.14 and its unit for each
SMI = {
    "rocm_num_gpus": (set(), 2),
    "rocm_version_info": ({"card", "driver_ver", "vbios", "type", "serial", "schema"}, 1),
    "rocm_utilization_percentage": ({"card"}, 42),
    "rocm_vram_used_percentage": ({"card"}, 25),
    "rocm_vram_total_bytes": ({"card"}, 64 * 2**30),
    "rocm_vram_busy_percentage": ({"card"}, 22),
    "rocm_average_socket_power_watts": ({"card", "source"}, 300),
    "rocm_energy_joules": ({"card"}, None),
    "rocm_sclk_clock_mhz": ({"card", "source"}, 1700),
    "rocm_mclk_clock_mhz": ({"card", "source"}, 1600),
    "rocm_temperature_celsius": ({"card", "location"}, 42),
    "rocm_temperature_memory_celsius": ({"card", "location"}, 46),
    "rocm_power_cap_watts": ({"card"}, 560),
    **{f"rocm_ras_{block}_correctable_count": ({"card"}, i) for i, block in enumerate(BLOCKS)},
    **{f"rocm_ras_{block}_uncorrectable_count": ({"card"}, i + 0.25) for i, block in enumerate(BLOCKS)},
    **{f"rocm_ras_{block}_deferred_count": ({"card"}, i + 0.5) for i, block in enumerate(BLOCKS)},
    "rocm_num_compute_units": ({"card"}, 104),
    "rocm_compute_unit_occupancy": ({"card"}, 26),
    "rocm_xgmi_total_read_kilobytes": ({"card"}, 3),
    "rocm_xgmi_total_write_kilobytes": ({"card"}, 5),
    "rocm_average_decoder_utilization_percentage": ({"card"}, 7),
    "rocm_throttle_events": ({"card"}, 0),
}
JOB = {"jobid", "user", "partition", "nodes", "batchflag", "jobstep", "type"}
RMS = {"rmsjob_info": JOB, "rmsjob_annotations": {"marker", "jobid"}, "omnistat_info": {"version", "mode", "schema"}}


class Fixture:
    """A sampler whose points come under Omnistat's names."""

    def __init__(self, source, folder, **environment):
        self.source = source
        self.folder = folder
        self.job_file = folder / "job.json"
        self.view = OmnistatView({"WATTIER_OMNISTAT_JOB_FILE": str(self.job_file), **environment})
        self.sampler = Sampler([source], registry=folder / "trials", period_seconds=0.05)
        self.sampler.start()

    def samples(self, ended_after=0):
        self.sampler.fresh(0.0)
        with self.sampler.locked:
            node, _ = self.sampler.look(ended_after=ended_after)
            points = [*self.view.devices(node.watched, node), *self.view.common(node)]
        families = list(text_string_to_metric_families(expose(points, METRICS).decode()))
        assert {family.type for family in families} == {"gauge"}
        return [sample for family in families for sample in family.samples]

    def labels(self, name, **environment):
        return [sample.labels for sample in self.samples() if sample.name == name]


@pytest.fixture
def node(tmp_path):
    made = []

    def make(**environment):
        source = ScriptedSource(a=300.0, b=100.0)
        source.extra = dict(READING)
        made.append(Fixture(source, tmp_path, **environment))
        return made[-1]

    yield make
    for fixture in made:
        fixture.sampler.close()


def register(folder):
    registration = TrialRegistration("r", "s", "t", 0, os.getpid(), ("a",))
    registration.write(folder / "trials")
    return lambda: registration.withdraw(folder / "trials")


@pytest.mark.parametrize("name", SMI)
def test_smi_series(node, name):
    labels, value = SMI[name]
    found = [sample for sample in node().samples() if sample.name == name]
    assert found
    assert all(set(sample.labels) == labels for sample in found)
    if "card" in labels:
        assert [sample.labels["card"] for sample in found] == ["0", "1"]
    if value is not None:
        assert found[0].value == pytest.approx(value)


@pytest.mark.parametrize("name", RMS)
def test_rms_series(node, tmp_path, name):
    register(tmp_path)
    (found,) = [sample for sample in node().samples() if sample.name == name]
    assert set(found.labels) == RMS[name]


def test_nothing_else_is_shown_and_all_of_it_is_in_the_table(node, tmp_path):
    register(tmp_path)
    assert {sample.name for sample in node().samples()} == SMI.keys() | RMS.keys() == {one.name for one in METRICS}


def test_idle_job_is_all_empty_labels(node):
    assert node().labels("rmsjob_info") == [dict.fromkeys(JOB, "")]


def test_job_file_of_the_prolog(node):
    job = {
        "RMS_TYPE": "slurm",
        "RMS_JOB_ID": "74129",
        "RMS_JOB_USER": "auser",
        "RMS_JOB_PARTITION": "devel",
        "RMS_JOB_NUM_NODES": "2",
        "RMS_JOB_BATCHMODE": 1,
        "RMS_STEP_ID": -1,
    }
    expected = {
        "jobid": "74129",
        "user": "auser",
        "partition": "devel",
        "nodes": "2",
        "batchflag": "1",
        "jobstep": "-1",
        "type": "slurm",
    }
    fixture = node(SLURM_JOB_ID="1")
    fixture.job_file.write_text(json.dumps(job))
    assert fixture.labels("rmsjob_info") == [expected]
    fixture.job_file.write_text(json.dumps({**job, "RMS_JOB_ID": "74130x"}))
    assert fixture.labels("rmsjob_info") == [{**expected, "jobid": "74130x"}]
    fixture.job_file.unlink()
    assert fixture.labels("rmsjob_info")[0]["jobid"] == "1"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (
            {
                "SLURM_JOB_ID": "12345",
                "SLURM_JOB_USER": "testuser",
                "SLURM_JOB_PARTITION": "batch",
                "SLURM_JOB_NUM_NODES": "4",
                "SLURM_STEP_ID": "4294967291",
            },
            ("12345", "testuser", "batch", "4", "1", "-1", "slurm"),
        ),
        (
            {"SLURM_JOB_ID": "12345", "SLURM_STEP_ID": "3", "SLURM_PTY_PORT": "1"},
            ("12345", "", "", "", "0", "3", "slurm"),
        ),
        (
            {"PBS_JOBID": "77.host", "PBS_O_LOGNAME": "u", "PBS_QUEUE": "q", "PBS_ENVIRONMENT": "PBS_INTERACTIVE"},
            ("77", "u", "q", "", "0", "-1", "pbs"),
        ),
    ],
)
def test_job_from_the_environment(node, environment, expected):
    names = ("jobid", "user", "partition", "nodes", "batchflag", "jobstep", "type")
    assert node(**environment).labels("rmsjob_info") == [dict(zip(names, expected, strict=True))]


def test_annotation_is_the_trials_start_and_zero_once_at_its_end(node, tmp_path):
    leave = register(tmp_path)
    fixture = node(SLURM_JOB_ID="5")

    def annotations(after=0):
        return [
            (one.labels["marker"], one.labels["jobid"], one.value)
            for one in fixture.samples(after)
            if one.name == "rmsjob_annotations"
        ]

    ((marker, jobid, value),) = annotations()
    assert (marker, jobid) == ("r/s/t", "5")
    assert value == pytest.approx(fixture.sampler.timeline(), abs=10)
    leave()
    while fixture.sampler.look()[0].trials:
        fixture.sampler.fresh(0.0)
    assert annotations() == [("r/s/t", "5", 0.0)]
    with fixture.sampler.locked:
        _, number = fixture.sampler.look()
    assert annotations(number) == []


def test_thermal_throttling_is_counted_and_a_power_cap_is_not(node):
    fixture = node()
    for reasons in (("power_cap",), ("software_thermal",), (), ("hardware_thermal", "power_cap")):
        fixture.source.extra["throttle_reasons"] = reasons
        fixture.sampler.fresh(0.0)
        fixture.samples()
    events = [sample.value for sample in fixture.samples() if sample.name == "rocm_throttle_events"]
    assert events == [2, 2]


def test_a_figure_that_is_unknown_has_no_series(node):
    fixture = node()
    fixture.source.extra = {}
    names = {sample.name for sample in fixture.samples()}
    assert "rocm_vram_used_percentage" not in names
    assert "rocm_throttle_events" not in names
    assert "rocm_average_socket_power_watts" in names


def test_a_device_that_does_not_tell_its_blocks_apart_counts_errors_of_its_memory(node):
    fixture = node()
    fixture.source.extra = {**READING, "errors_by_block": None}
    found = {sample.name: sample.value for sample in fixture.samples() if "_ras_" in sample.name}
    assert found == {"rocm_ras_umc_correctable_count": 5, "rocm_ras_umc_uncorrectable_count": 2}
