"""Recordings written and read back as CSV and Parquet, what is refused in them, and their replay."""

import csv
import itertools
import sys

import pytest
from contract import PowerSourceContract

from wattier_telemetry import Device, Reading, SourceUnavailable, open_source
from wattier_telemetry.recording.recorder import TraceWriter
from wattier_telemetry.recording.trace import COLUMNS, Sample, TraceError, TrialPart, read_trace
from wattier_telemetry.sources.replay import ReplaySource

HEADER = "time_seconds,device,power_watts"
ODD = TrialPart('run/1:"a";b', "stage|x", "µ-trial, 7%\n", 3, 0.25)


def eight_devices(rounds=5):
    """Return samples of 8 devices in which every column is used, and None, empty and odd names occur."""
    samples = []
    for step, index in itertools.product(range(rounds), range(8)):
        device = Device(
            f"GPU-{index:04}",
            "Simulierte Karte, \"Ä\"; 'x'",
            "cpu" if index == 7 else "gpu",
            index,
            method="estimated" if index == 7 else "counter",
            counter_refresh_seconds=0.1,
            power_average_seconds=1.0,
            package_uuid="package" if index < 2 else None,
        )
        reading = Reading(
            1.7e9 + 0.1 * step + index * 1e-4,
            power_watts=300 + 0.1 * step,
            energy_joules=1e9 / 3 + 30 * step,
            utilization_ratio=1 / 3,
            memory_utilization_ratio=None if index == 3 else 0.5,
            memory_used_bytes=10.0 * 2**30,
            memory_total_bytes=150.0 * 2**30,
            temperature_celsius=-4.5,
            memory_temperature_celsius=None,
            clock_hertz=1.98e9,
            memory_clock_hertz=3.2e9,
            power_limit_watts=700.0,
            power_limit_max_watts=700.0,
            ecc_corrected=0.0,
            ecc_uncorrected=2.0,
            throttle_reasons=[None, (), ("power_cap", "software_thermal")][index % 3],
            throttle_seconds=[None, {}, {"power_cap": 1 / 7, "thermal": 0.0}][index % 3],
        )
        trials = [None, (), (ODD, TrialPart("r", "s", "t", 0, 1.0))][index % 3]
        samples.append(Sample(device, reading, "nvml", trials))
    return samples


def write(path, samples):
    with TraceWriter(path) as writer:
        writer.add(samples)
    return path


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
class TestRoundTrip:
    def test_every_figure_of_8_devices_comes_back_to_the_last_bit(self, tmp_path, suffix):
        samples = eight_devices()
        path = write(tmp_path / f"night.{suffix}", samples)
        assert list(read_trace(path)) == samples
        assert [file.name for file in tmp_path.iterdir()] == [path.name]  # no temporary file is left

    def test_other_tools_can_read_it(self, tmp_path, suffix):
        path = write(tmp_path / f"night.{suffix}", eight_devices())
        if suffix == "csv":
            with path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
        else:
            import pyarrow.parquet

            rows = pyarrow.parquet.read_table(path).to_pylist()
        assert tuple(rows[0]) == COLUMNS
        assert sum(float(row["power_watts"]) for row in rows) == pytest.approx(8 * (5 * 300 + 0.1 * 10))
        assert {row["memory_temperature_celsius"] for row in rows} <= {"", None}

    def test_replayed_devices_are_those_that_were_recorded(self, tmp_path, suffix):
        samples = eight_devices()
        path = write(tmp_path / f"night.{suffix}", samples)
        at = samples[0].reading.time_seconds + 0.25
        source = ReplaySource(path, clock=lambda: at)
        assert list(source.devices()) == [sample.device for sample in samples[:8]]
        reading = source.read(source.devices()[2])
        last = samples[8 * 2 + 2].reading  # the third round is the latest at 0.25 s
        assert reading.throttle_reasons == ("power_cap", "software_thermal")
        assert reading.throttle_seconds == last.throttle_seconds
        assert (reading.temperature_celsius, reading.ecc_uncorrected) == (-4.5, 2.0)
        assert reading.power_watts == pytest.approx(300.25, abs=1e-3)
        assert reading.energy_joules == pytest.approx(1e9 / 3 + 75, abs=0.1)

    def test_an_existing_file_is_never_overwritten(self, tmp_path, suffix):
        path = write(tmp_path / f"night.{suffix}", eight_devices())
        before = path.read_bytes()
        with pytest.raises(TraceError, match="exists already"):
            TraceWriter(path)
        assert path.read_bytes() == before


class TestWriter:
    def test_parquet_grows_as_a_csv_that_can_be_read_at_any_time(self, tmp_path):
        writer = TraceWriter(tmp_path / "night.parquet")
        writer._flushed -= 2  # a second has gone by
        samples = eight_devices()
        writer.add(samples)
        assert writer.growing.name == "night.parquet.partial.csv"
        assert list(read_trace(writer.growing)) == samples
        writer.close()
        writer.close()
        assert not writer.growing.exists()

    def test_long_recordings_become_parquet_in_pieces(self, tmp_path, monkeypatch):
        monkeypatch.setattr("wattier_telemetry.recording.recorder._BATCH_ROWS", 7)
        samples = eight_devices()
        path = write(tmp_path / "night.parquet", samples)
        import pyarrow.parquet

        assert pyarrow.parquet.ParquetFile(path).num_row_groups == 6  # 40 rows by 7
        assert list(read_trace(path)) == samples

    def test_other_names_are_refused(self, tmp_path):
        with pytest.raises(TraceError, match=r"night\.txt: a recording must be named \.csv or \.parquet"):
            TraceWriter(tmp_path / "night.txt")

    @pytest.mark.parametrize("use", [TraceWriter, lambda path: list(read_trace(path))])
    def test_parquet_without_pyarrow_says_what_to_install(self, tmp_path, monkeypatch, use):
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(TraceError, match="pip install pyarrow") as caught:
            use(tmp_path / "night.parquet")
        assert "\n" not in str(caught.value)
        assert list(tmp_path.iterdir()) == []


class TestReader:
    def read(self, tmp_path, text, name="t.csv"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        warnings = []
        return list(read_trace(path, warn=warnings.append)), warnings

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("", "line 1 is ''"),
            (f"{HEADER}\n", "line 2: the trace is empty"),
            ("time_seconds,power_watts\n0,1\n", "line 1 is 'time_seconds,power_watts', but must be"),
            ("time_seconds,device\n0,g\n", "line 1 is 'time_seconds,device', but must be"),
            (f"{HEADER},clock_herz\n0,g,1,1\n", r"unknown column 'clock_herz'. Did you mean 'clock_hertz'\?"),
            (f"{HEADER},power_watts\n0,g,1,1\n", "column power_watts is there twice"),
            (f"{HEADER}\n0,g,1\n1,g\n2,g,1\n", "line 3 has 2 cells, but must have 3"),
            (f"{HEADER}\n0,g,1\n\n1,g,warm\n", "line 4: power_watts is 'warm', but must be a finite number"),
            (f"{HEADER}\n0,g,NaN\n", "line 2: power_watts is 'NaN'"),
            (f"{HEADER}\n0,g,1e999\n", "line 2: power_watts is '1e999'"),
            (f"{HEADER}\n,g,1\n", "line 2: time_seconds is ''"),
            (f"{HEADER}\n0,g,-1\n", "line 2: power_watts is -1, but must not be negative"),
            (f"{HEADER}\n0,,1\n", "line 2: device is empty"),
            (f"{HEADER}\n0,g,1\n0,h,1\n0,g,1\n", "line 4: time_seconds of g must grow"),
            (f"{HEADER},domain\n0,g,1,tpu\n", "line 2: domain is 'tpu', but must be one of gpu, cpu, dram, node"),
            (f"{HEADER},method\n0,g,1,guess\n", "line 2: method is 'guess', but must be one of counter"),
            (f"{HEADER},trials\n0,g,1,r/s/t:1\n", "line 2: trials holds 'r/s/t:1', but must hold run/stage"),
            (f"{HEADER},trials\n0,g,1,r/s/t/0:1.5\n", "line 2: trials holds"),
            (f"{HEADER},trials\n0,g,1,r/s/t/0:nan\n", "line 2: trials holds"),
            (f"{HEADER},throttle_seconds\n0,g,1,cap:x\n", "line 2: throttle_seconds is 'x'"),
            (b"\x00\x01\x02\n\xff\xfe", "line 1"),
            (f"{HEADER}\n0,\xff,1\n".encode("latin-1"), "bytes that are no text"),
            (f'{HEADER}\n0,"g,1\n1,g,1\n', "line 3: cannot be read"),
        ],
    )
    def test_faults_are_named_in_one_line(self, tmp_path, text, problem):
        with pytest.raises(TraceError, match=problem) as caught:
            self.read(tmp_path, text)
        assert "\n" not in str(caught.value)
        assert "t.csv" in str(caught.value)

    def test_last_line_of_a_killed_recording_is_left_out_with_a_warning(self, tmp_path):
        samples = eight_devices()
        whole = write(tmp_path / "whole.csv", samples).read_bytes()
        lines = whole.splitlines(keepends=True)
        last = len(whole) - len(lines[-1])
        # Names in quotes, letters of several bytes, numbers: wherever the cut falls, no half number is believed.
        for cut in range(last + 1, len(whole)):
            found, warnings = self.read(tmp_path, whole[:cut])
            assert found == samples[:-1], whole[last:cut]
            assert len(warnings) == 1
            assert "left out" in warnings[0]
        assert self.read(tmp_path, whole[:last]) == (samples[:-1], [])

    def test_short_last_line_of_a_plain_trace_is_left_out_too(self, tmp_path):
        found, warnings = self.read(tmp_path, f"{HEADER}\n0,g,100\n1,g")
        assert [sample.reading.power_watts for sample in found] == [100]
        assert "line 3 was cut off" in warnings[0]

    def test_hand_made_file_needs_no_newline_at_its_end(self, tmp_path):
        found, warnings = self.read(tmp_path, f"\ufeff{HEADER}\r\n0,g,100\r\n1,g,200")
        assert [sample.reading.power_watts for sample in found] == [100, 200]
        assert warnings == []

    def test_files_are_streamed(self, tmp_path):
        path = tmp_path / "t.csv"
        path.write_text(f"{HEADER}\n0,g,100\n1,g,bad\n")
        samples = read_trace(path)
        assert next(samples).reading.power_watts == 100  # before the bad line was ever looked at
        with pytest.raises(TraceError, match="line 3"):
            next(samples)

    @pytest.mark.parametrize(
        ("columns", "problem"),
        [
            ({"time_seconds": [0.0], "device": ["g"]}, "must be time_seconds"),
            ({"time_seconds": [0.0], "device": ["g"], "power_watts": ["warm"]}, "row 1: power_watts is 'warm'"),
            ({"time_seconds": [0.0], "device": ["g"], "power_watts": [float("nan")]}, "row 1: power_watts is 'nan'"),
            ({"time_seconds": [None], "device": ["g"], "power_watts": [1.0]}, "row 1: time_seconds is"),
            ({"time_seconds": [0.0], "device": [5], "power_watts": [1.0]}, "row 1: device is '5', but must be text"),
            ({"time_seconds": [1.0, 1.0], "device": ["g", "g"], "power_watts": [1, 2]}, "row 2: time_seconds of g"),
        ],
    )
    def test_parquet_faults_are_named_in_one_line(self, tmp_path, columns, problem):
        import pyarrow
        import pyarrow.parquet

        path = tmp_path / "t.parquet"
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        with pytest.raises(TraceError, match=problem):
            list(read_trace(path))

    @pytest.mark.parametrize("data", [b"", b"PAR1", b"PAR1 and then nothing PAR1", b"\x00" * 100])
    def test_parquet_garbage_is_one_line(self, tmp_path, data):
        with pytest.raises(TraceError, match=r"t\.parquet: cannot be read") as caught:
            self.read(tmp_path, data, "t.parquet")
        assert "\n" not in str(caught.value)

    def test_parquet_cut_short_is_one_line(self, tmp_path):
        whole = write(tmp_path / "whole.parquet", eight_devices()).read_bytes()
        with pytest.raises(TraceError, match="cannot be read"):
            self.read(tmp_path, whole[:-20], "t.parquet")


class TestReplayContract(PowerSourceContract):
    name = "replay"

    @pytest.fixture
    def source(self, trace):
        return open_source(f"replay:{trace('0,gpu-0,100', '0,gpu-1,50')}")


class TestReplay:
    def at(self, path, now):
        source = ReplaySource(path, clock=lambda: now)
        return source.read(source.devices()[0])

    def test_counter_alone_is_played_exactly_and_power_stays_unknown(self, trace):
        path = trace("0,g,5", "10,g,105", "20,g,105", header="time_seconds,device,energy_joules")
        seen = {now: self.at(path, now) for now in (-1, 0, 5, 10, 15, 30)}
        assert {now: r.energy_joules for now, r in seen.items()} == {-1: -5, 0: 5, 5: 55, 10: 105, 15: 105, 30: 105}
        assert {r.power_watts for r in seen.values()} == {None}

    def test_counter_that_was_reset_drops_at_once_and_not_slowly(self, trace):
        path = trace("0,g,100,500", "10,g,100,0", "20,g,100,1000", header=f"{HEADER},energy_joules")
        assert [self.at(path, now).energy_joules for now in (9.9, 10, 15)] == [500, 0, 500]

    def test_gaps_in_power_are_bridged_by_straight_lines(self, trace):
        path = trace("0,g,0,5", "5,g,,6", "10,g,100,7", header=f"{HEADER},temperature_celsius")
        reading = self.at(path, 7.5)
        assert (reading.power_watts, reading.energy_joules) == (75, pytest.approx(75 * 7.5 / 2))
        assert reading.temperature_celsius == 6  # stands until the next line

    def test_domain_name_and_method_are_honoured(self, trace):
        path = trace("0,c,9,cpu,package-0,estimated", header=f"{HEADER},domain,name,method")
        (device,) = ReplaySource(path).devices()
        assert (device.domain, device.name, device.method) == ("cpu", "package-0", "estimated")

    def test_methods_of_plain_traces(self, trace):
        counted = trace("0,g,1,7", header=f"{HEADER},energy_joules", name="counted.csv")
        assert ReplaySource(counted).devices()[0].method == "counter"
        assert ReplaySource(trace("0,g,1")).devices()[0].method == "integrated"

    def test_device_without_power_and_energy_is_refused(self, trace):
        with pytest.raises(SourceUnavailable, match="h has neither power_watts nor energy_joules in any line"):
            ReplaySource(trace("0,g,1", "0,h,"))
