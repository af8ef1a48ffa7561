"""The exporter scraped over HTTP and parsed as Prometheus does; the metric table; registrations."""

import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from functools import partial
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from scripted import ScriptedSource

from wattier_telemetry import Reading, SourceUnavailable, TrialRegistration, open_source, read_registrations
from wattier_telemetry.exporter import Renderer, ServeOptions, run, serve, serving, start
from wattier_telemetry.exporter.metrics import METRICS, Point, document, expose
from wattier_telemetry.exporter.sampler import Sampler
from wattier_telemetry.exporter.series import WattierView
from wattier_telemetry.records import ErrorCounts
from wattier_telemetry.registration import default_folder

EVERYTHING = {
    "utilization_ratio": 0.75,
    "memory_utilization_ratio": 0.5,
    "memory_used_bytes": 10.0 * 2**30,
    "memory_total_bytes": 150.0 * 2**30,
    "temperature_celsius": 61.0,
    "memory_temperature_celsius": 70.0,
    "clock_hertz": 1.98e9,
    "memory_clock_hertz": 3.201e9,
    "power_limit_watts": 650.0,
    "power_limit_max_watts": 700.0,
    "ecc_corrected": 3.0,
    "ecc_uncorrected": 1.0,
    "decoder_utilization_ratio": 0.25,
    "link_read_bytes": 7e9,
    "link_written_bytes": 8e9,
    "compute_units": 304.0,
    "compute_units_busy": 152.0,
}
NAMES = {  # what a dashboard asks for, written out: a renamed metric breaks somebody's panel
    "utilization_ratio": "wattier_utilization_ratio",
    "memory_utilization_ratio": "wattier_memory_utilization_ratio",
    "memory_used_bytes": "wattier_memory_used_bytes",
    "memory_total_bytes": "wattier_memory_total_bytes",
    "temperature_celsius": "wattier_temperature_celsius",
    "memory_temperature_celsius": "wattier_memory_temperature_celsius",
    "clock_hertz": "wattier_clock_hertz",
    "memory_clock_hertz": "wattier_memory_clock_hertz",
    "power_limit_watts": "wattier_power_limit_watts",
    "power_limit_max_watts": "wattier_power_limit_max_watts",
    "ecc_corrected": "wattier_ecc_corrected_total",
    "ecc_uncorrected": "wattier_ecc_uncorrected_total",
    "decoder_utilization_ratio": "wattier_decoder_utilization_ratio",
    "link_read_bytes": "wattier_link_read_bytes_total",
    "link_written_bytes": "wattier_link_written_bytes_total",
    "compute_units": "wattier_compute_units",
    "compute_units_busy": "wattier_compute_units_busy",
}


def parse(text):
    """Return {(name, labels): value}, as Prometheus' own parser reads it."""
    families = text_string_to_metric_families(text)
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


def scrape(port):
    """Return one scrape, parsed."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        return parse(answer.read().decode())


def pick(samples, name, **labels):
    """Return the values of all samples of a name that carry these labels."""
    return [value for (n, have), value in samples.items() if n == name and labels.items() <= dict(have).items()]


@pytest.fixture
def exporter(tmp_path):
    running = []

    def begin(source):
        running.append((serve(source, port=0, registry_folder=tmp_path / "trials"), source))
        return running[-1][0]

    yield begin
    for server, source in running:
        source.close()
        server.close()


def trial(**changes):
    return TrialRegistration(
        **{"run": "r", "stage": "s1", "trial": "t7", "rank": 0, "pid": os.getpid(), "device_uuids": ("u",), **changes}
    )


class TestExporter:
    def test_every_field_of_a_reading_has_a_series(self, exporter):
        source = ScriptedSource(u=300.0)
        source.extra = {**EVERYTHING, "errors_by_block": {"gfx": ErrorCounts(1.0, 2.0, None)}}
        samples = scrape(exporter(source).port)
        assert pick(samples, "wattier_block_errors_total", block="gfx", kind="uncorrected") == [2]
        assert pick(samples, "wattier_block_errors_total", kind="deferred") == []
        labels = {"uuid": "u", "device": "GPU u", "domain": "gpu", "source": "scripted"}
        assert {f: pick(samples, n, **labels) for f, n in NAMES.items()} == {f: [v] for f, v in EVERYTHING.items()}
        assert pick(samples, "wattier_power_watts", **labels) == [300]
        assert pick(samples, "wattier_energy_joules_total", method="counter", **labels)[0] > 0
        fields = set(Reading.__slots__) - {"time_seconds", "throttle_reasons", "throttle_seconds", "errors_by_block"}
        assert fields == NAMES.keys() | {"power_watts", "energy_joules"}

    def test_nvml_through_its_real_binding(self, exporter, two_gpus):
        samples = scrape(exporter(open_source("nvml", whole_node=True)).port)
        assert pick(samples, "wattier_power_watts", source="nvml") == pytest.approx([300, 300], rel=0.05)
        assert len(pick(samples, "wattier_energy_joules_total", method="counter")) == 2

    def test_unknown_fields_are_absent(self, exporter, trace):
        samples = scrape(exporter(open_source(f"replay:{trace('0,g,100')}")).port)
        assert pick(samples, "wattier_power_watts") == [100]
        assert not pick(samples, "wattier_temperature_celsius")
        assert not pick(samples, "wattier_throttled")

    def test_failing_device_does_not_take_the_other_along(self, exporter):
        source = ScriptedSource(u=1.0, v=2.0)
        server = exporter(source)
        assert pick(scrape(server.port), "wattier_power_watts", uuid="u") == [1.0]
        source.failing.add("u")
        until(lambda: scrape(server.port) and server.sampler.watched[0].errors)
        with server.sampler.locked:
            server.sampler.watched[0].read_at -= 2 * server.sampler.stale_seconds  # as if it had failed for so long
        until(lambda: not pick(scrape(server.port), "wattier_power_watts", uuid="u"))
        samples = scrape(server.port)
        assert pick(samples, "wattier_read_errors_total", uuid="u")[0] >= 1
        assert pick(samples, "wattier_read_errors_total", uuid="v") == [0]
        assert not pick(samples, "wattier_power_watts", uuid="u")
        assert pick(samples, "wattier_power_watts", uuid="v") == [2.0]

    def test_power_from_a_bare_counter(self, exporter, powercap):
        from wattier_telemetry.sources.rapl import RaplSource

        server = exporter(RaplSource(powercap))
        assert not pick(scrape(server.port), "wattier_power_watts")
        (powercap / "intel-rapl:0/energy_uj").write_text("2000000")
        for _ in range(100):
            if watts := pick(scrape(server.port), "wattier_power_watts", domain="cpu"):
                break
            threading.Event().wait(0.05)
        assert max(watts) > 0

    def test_energy_without_a_counter_is_added_up_and_says_so(self, exporter):
        source = ScriptedSource(u=1000.0)
        source.counter = False
        server = exporter(source)

        def look():
            """Joules in a scrape, and those and the time of the latest reading, which may have come just behind it."""
            (scraped,) = pick(scrape(server.port), "wattier_energy_joules_total", method="integrated")
            with server.sampler.locked:
                (watched,) = server.sampler.watched
                return scraped, watched.account.joules, watched.read_at

        _, before, first = look()
        threading.Event().wait(0.3)
        scraped, joules, last = look()
        assert joules - before == pytest.approx(1000 * (last - first), rel=1e-6)
        assert before + 300 <= scraped <= joules

    def test_throttling(self, exporter):
        source = ScriptedSource(u=1.0)
        source.extra = {"throttle_reasons": (), "throttle_seconds": {"power_cap": 12.5, "software_thermal": 0.0}}
        server = exporter(source)
        samples = scrape(server.port)
        reasons = {reason: pick(samples, "wattier_throttled", reason=reason) for reason in ("none", "power_cap")}
        assert reasons == {"none": [0], "power_cap": [0]}
        assert pick(samples, "wattier_throttled_seconds_total", reason="power_cap") == [12.5]
        source.extra = {"throttle_reasons": ("power_cap",), "throttle_seconds": {"power_cap": 13.0}}
        threading.Event().wait(0.1)
        samples = scrape(server.port)
        assert pick(samples, "wattier_throttled", reason="power_cap") == [1]
        assert not pick(samples, "wattier_throttled", reason="none")
        assert pick(samples, "wattier_throttle_events_total", reason="power_cap") == [1]

    def test_trials(self, exporter, tmp_path):
        port = exporter(ScriptedSource(u=100.0)).port
        assert not pick(scrape(port), "wattier_trial_info")
        began = time.monotonic()
        registration = trial(
            epoch=3, epochs=9, val_loss=0.25, structures_per_second=120.5, energy_joules=77.0, method="counter"
        )
        registration.write(tmp_path / "trials")
        threading.Event().wait(0.1)
        samples, labels = scrape(port), {"run": "r", "stage": "s1", "trial": "t7", "rank": "0"}
        assert pick(samples, "wattier_trial_info", uuid="u", method="counter", **labels) == [1]
        assert pick(samples, "wattier_trial_metered_joules_total", **labels) == [77]
        (own,) = pick(samples, "wattier_trial_energy_joules_total", uuid="u", **labels)
        assert 0 <= own <= 100 * (time.monotonic() - began)  # by the exporter, not the meter's 77
        assert pick(samples, "wattier_trial_epoch", **labels) == [3]
        assert pick(samples, "wattier_trial_epochs_planned", **labels) == [9]
        assert pick(samples, "wattier_trial_val_loss", **labels) == [0.25]
        assert pick(samples, "wattier_trial_structures_per_second", **labels) == [120.5]
        registration.withdraw(tmp_path / "trials")
        threading.Event().wait(0.1)
        samples = scrape(port)
        assert not pick(samples, "wattier_trial_info")
        assert len(pick(samples, "wattier_trial_energy_joules_total")) == 1  # its last joules, once
        threading.Event().wait(0.1)
        assert not [name for name, _ in scrape(port) if name.startswith("wattier_trial_")]

    def test_awkward_labels_are_escaped(self, exporter, tmp_path):
        name = 'a"b\\c\nd{e="f"} 1 # ü'
        path = trial(trial=name).write(tmp_path / "trials")
        path.write_text(path.read_text().replace('"s1"', r'"\ud800"'))  # JSON may hold what UTF-8 cannot
        found = [dict(have) for (n, have) in scrape(exporter(ScriptedSource(u=1.0)).port) if n == "wattier_trial_info"]
        assert [(labels["trial"], labels["stage"]) for labels in found] == [(name, "?")]

    def test_twenty_scrapers_cause_one_reading_and_one_rendering(self, tmp_path, monkeypatch):
        source = ScriptedSource(u=1.0)
        monkeypatch.setattr(serving, "FRESH_SECONDS", 100.0)  # so that all come at once, however slowly they start
        sampler = Sampler([source], registry=tmp_path, period_seconds=1000.0)
        renderer = Renderer(sampler, [WattierView()])
        sampler.start()
        until(lambda: sampler.generation)
        monkeypatch.setattr(sampler, "fresh", partial(sampler.fresh, timeout_seconds=60))
        (lane,) = sampler._lanes
        with sampler.locked:
            lane.started_at = lane.sampled_at = lane.sampled_at - 1000
        reads = source.reads
        source.gate.clear()
        threads = [threading.Thread(target=renderer.render, daemon=True) for _ in range(20)]
        for thread in threads:
            thread.start()
        until(lambda: len(sampler._sampled._waiters) == 20)
        source.gate.set()
        for thread in threads:
            thread.join()
        sampler.close()
        assert (source.reads - reads, renderer.renderings) == (1, 1)


class TestStart:
    @pytest.fixture
    def options(self, trace, tmp_path):
        source = f"replay:{trace('0,g,100', '1,h,200')}"
        return {"sources": source, "port": 0, "registry": tmp_path / "trials"}

    def test_discovery_file_lives_as_long_as_the_exporter(self, options, tmp_path):
        path = tmp_path / "sd" / "wattier.json"
        running = start(ServeOptions(discovery=path, **options))
        ((entry),) = json.loads(path.read_text())
        assert entry["targets"] == [f"127.0.0.1:{running.port}"]
        assert entry["labels"]["job"] == "wattier"
        assert pick(scrape(running.port), "wattier_power_watts", uuid="g") == [100]
        running.close()
        running.close()
        assert list(path.parent.iterdir()) == []
        with pytest.raises(urllib.error.URLError):
            scrape(running.port)

    def test_discovery_of_every_address_names_the_host(self, options, tmp_path):
        path = tmp_path / "wattier.json"
        running = start(ServeOptions(discovery=path, address="0.0.0.0", allow=("127.0.0.0/8",), **options))
        assert json.loads(path.read_text())[0]["targets"] == [f"{socket.getfqdn()}:{running.port}"]
        running.close()

    def test_joules_survive_a_restart(self, options, tmp_path):
        joules = [0.0]
        for _ in range(2):
            running = start(ServeOptions(**options))
            found = []
            until(
                lambda running=running, found=found: (
                    found.extend(pick(scrape(running.port), "wattier_accounted_energy_joules_total", uuid="g"))
                    or found[-1] > joules[-1] + 15
                )
            )
            running.close()
            assert found[0] >= joules[-1]
            joules.append(found[-1])

    def test_second_exporter_on_one_folder_works_and_says_what_it_cannot(self, options, caplog):
        first, second = start(ServeOptions(**options)), start(ServeOptions(**options))
        assert "joules do not survive a restart" in caplog.text
        assert scrape(second.port)
        first.close()
        second.close()

    def test_a_failure_leaves_nothing_open(self, options):
        with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match=r"\S"):
            start(ServeOptions(**{**options, "port": taken.getsockname()[1]}))
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("wattier")]
        start(ServeOptions(**options)).close()  # the lock on the folder is free again

    def test_run_ends_when_told(self, options):
        stop = threading.Event()
        thread = threading.Thread(target=run, args=(ServeOptions(**options), stop), daemon=True)
        thread.start()
        threading.Event().wait(0.3)
        assert thread.is_alive()
        stop.set()
        thread.join(10)
        assert not thread.is_alive()

    def test_a_source_that_is_not_there(self):
        with pytest.raises(SourceUnavailable):
            start(ServeOptions(sources="replay:/absent.csv", port=0))


class TestTable:
    def test_document_is_current(self):
        path = Path(__file__).parents[2] / "docs" / "metrics.md"
        assert path.read_text() == document(), "its first lines say how it is made"

    def test_names_follow_prometheus(self):
        names = [metric.name for metric in METRICS]
        assert len(set(names)) == len(names)
        for metric in METRICS:
            assert metric.name.startswith("wattier_")
            assert (metric.kind == "counter") == metric.name.endswith("_total"), metric.name
            assert metric.help.endswith("."), metric.name

    def test_numbers_are_written_whole(self):
        values = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1 / 3, "e": 2.0**70, "f": 7}
        text = expose([Point(name, (), value) for name, value in values.items()]).decode()
        found = {name: value for (name, _), value in parse(text).items()}
        assert math.isnan(found.pop("a"))
        del values["a"]
        assert found == values


class TestRegistration:
    def test_round_trip_and_rewriting(self, tmp_path):
        trial(epoch=1).write(tmp_path)
        path = trial(epoch=2, epochs=10).write(tmp_path)
        assert path.name == "r.s1.t7.0.json"
        assert read_registrations(tmp_path) == [trial(epoch=2, epochs=10)]
        assert list(tmp_path.iterdir()) == [path]

    def test_awkward_names_stay_inside_and_apart(self, tmp_path):
        names = ["../../x", "a.b", "a_b", "", "ö" * 300]
        paths = {trial(trial=name).write(tmp_path) for name in names}
        assert len(paths) == len(names)
        assert {path.parent for path in paths} == {tmp_path}
        assert sorted(found.trial for found in read_registrations(tmp_path)) == sorted(names)

    def test_diverged_loss_is_unknown(self, tmp_path):
        trial(val_loss=math.nan).write(tmp_path)
        assert read_registrations(tmp_path)[0].val_loss is None

    def test_torn_and_foreign_files_are_passed_over(self, tmp_path):
        for i, text in enumerate(["", "{", "[]", "{}", '{"run": 1, "stage": 2, "trial": 3, "rank": 4, "pid": 5}']):
            (tmp_path / f"{i}.json").write_text(text)
        trial().write(tmp_path)
        assert read_registrations(tmp_path) == [trial()]

    def test_dead_process_is_removed_here_but_not_elsewhere(self, tmp_path):
        child = subprocess.Popen([sys.executable, "-c", ""])
        child.wait()
        dead = trial(pid=child.pid).write(tmp_path)
        away = trial(trial="t8", pid=child.pid, host="another-node")
        away.write(tmp_path)
        assert read_registrations(tmp_path) == [away]
        assert not dead.exists()

    def test_inherited_pid_is_dead(self, tmp_path):
        path = trial().write(tmp_path)
        os.utime(path, (1000, 1000))  # written long before this process began
        assert read_registrations(tmp_path) == []

    def test_default_folder_is_private(self, monkeypatch, tmp_path):
        assert default_folder() == tmp_path / "registry"
        monkeypatch.delenv("WATTIER_REGISTRY")
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
        assert default_folder() == tmp_path / "wattier"
        assert (tmp_path / "wattier").stat().st_mode & 0o777 == 0o700
        monkeypatch.delenv("XDG_RUNTIME_DIR")
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        assert default_folder() == tmp_path / f"wattier-{os.getuid()}"

    @pytest.mark.parametrize("text", ["NaN", "0", "-1", "1.5", '"a"'])
    def test_impossible_fractions_are_passed_over(self, tmp_path, text):
        path = trial().write(tmp_path)
        path.write_text(path.read_text().replace('"fraction": 1.0', f'"fraction": {text}'))
        assert read_registrations(tmp_path) == []


def test_closed_source_says_so(two_gpus):
    source = open_source("nvml")
    source.close()
    with pytest.raises(SourceUnavailable, match="closed"):
        source.read(source.devices()[0])
