"""`wattier bench power`: joules against watts that are known, resuming, memory that is not there, what others see."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from wattier import bench_power, bench_training
from wattier.bench_cli import _plan
from wattier.bench_page import power_curves, write_power_page
from wattier.bench_power import PowerPlan, measure_sizes
from wattier.bench_training import SizeTraining, bytes_kept
from wattier.config import ModelSection, ReferenceSize, TelemetrySection, load_sizes
from wattier.errors import UserError
from wattier.model_sizes import build_size, count_size
from wattier.prepare import recipe_of, source_paths
from wattier.rundir import hold_lock
from wattier_gnn.batch import Batch, Prediction
from wattier_gnn.ingest import ingest
from wattier_gnn.model import ModelConfig
from wattier_gnn.sample import SAMPLE_SOURCES
from wattier_gnn.store import Store
from wattier_gnn.workload import n_parameters
from wattier_telemetry import read_journal
from wattier_telemetry.registration import read_registrations

START_WATTS, WATTS_PER_SECOND = 100.0, 20.0  # of the recording that is played
TINY = ReferenceSize(architecture="reference", hidden_dim=8, n_layers=2, shared=[8], energy_head=[8], force_head=[8])
OURS = ModelSection(hidden_dim=8, n_layers=1, n_radial=4, head_dim=8, forces="vector")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from wattier.config import DataSection

    data = DataSection.model_validate({"sources": {"qm7x": "sample"}, "cutoff_angstrom": 3.0})
    folder = tmp_path_factory.mktemp("store")
    ingest(source_paths(data.sources), folder / "s", **recipe_of(data, 0), say=lambda _: None, workers=1)
    return folder / "s"


@pytest.fixture
def plan(tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WATTIER_REGISTRY", str(tmp_path / "registry"))
    trace = tmp_path / "watts.csv"
    trace.write_text("time_seconds,device,power_watts\n0,GPU-test,250\n")

    def build(sizes: dict[str, Any] | None = None, **settings: Any) -> PowerPlan:
        telemetry = TelemetrySection(source=f"replay:{settings.pop('trace', trace)}")
        fixed = {"out": tmp_path / "out", "store": store, "seconds": 0.3, "batch_structures": 4} | settings
        return PowerPlan(sizes or {"TINY": TINY}, telemetry=telemetry, **fixed)

    return build


def quiet(_: str) -> None:
    pass


def test_joules_are_the_integral_of_the_recording(plan, tmp_path: Path) -> None:
    trace = tmp_path / "ramp.csv"
    now = time.time()
    later = START_WATTS + 600 * WATTS_PER_SECOND
    trace.write_text(f"time_seconds,device,power_watts\n{now},GPU-test,{START_WATTS}\n{now + 600},GPU-test,{later}\n")
    (result,) = measure_sizes(plan(seconds=1.0, trace=trace), quiet)
    (journal,) = (tmp_path / "out/sizes/TINY").glob("*.energy.json")
    (share,) = read_journal(journal).shares
    middle = (share.start_seconds + share.end_seconds) / 2
    watts = START_WATTS + WATTS_PER_SECOND * (middle - now)
    assert result.seconds == pytest.approx(share.end_seconds - share.start_seconds)
    assert 1.0 <= result.seconds < 10
    assert result.joules == pytest.approx(watts * result.seconds, rel=0.01)
    assert result.mean_watts == pytest.approx(watts, rel=0.01)
    assert result.joules_low <= result.joules <= result.joules_high
    (curve,) = power_curves(tmp_path / "out/sizes/TINY" / "trace.csv")
    slope = (curve.watts[-1] - curve.watts[0]) / (curve.seconds[-1] - curve.seconds[0])
    assert slope == pytest.approx(WATTS_PER_SECOND, rel=0.01)
    assert curve.seconds[-1] == pytest.approx(result.seconds, abs=0.3)


def test_counts_are_those_of_the_steps(plan, store: Path, tmp_path: Path) -> None:
    (tiny, ours) = measure_sizes(plan({"TINY": TINY, "OURS": OURS}), quiet)
    assert tiny.structures == 4 * tiny.steps > 0
    assert tiny.atoms > 4 * tiny.structures  # molecules of qm7x have 5 atoms or more
    opened = Store(store)
    assert tiny.n_parameters == sum(p.numel() for p in build_size(TINY, opened, torch.device("cpu"), 0).parameters())
    assert ours.n_parameters == sum(p.numel() for p in build_size(OURS, opened, torch.device("cpu"), 0).parameters())
    rows = json.loads((tmp_path / "out" / "power.json").read_text())["sizes"]
    assert [row["name"] for row in rows] == ["TINY", "OURS"]
    assert rows[0]["joules_per_structure"] == pytest.approx(rows[0]["joules"] / rows[0]["structures"])
    assert rows[0]["structures_per_second"] == pytest.approx(rows[0]["structures"] / rows[0]["seconds"])


def test_a_size_is_counted_without_a_store_as_for_the_sample() -> None:
    config = ModelConfig(
        sources=SAMPLE_SOURCES, energy_scale_ev=(1.0,) * 5, mean_neighbors=1.0,
        **OURS.model_dump(exclude={"cutoff_angstrom"}),
    )  # fmt: skip
    assert count_size(OURS) == n_parameters(config)  # by arithmetic, where the other builds the network


def test_a_step_teaches(store: Path) -> None:
    with SizeTraining(TINY, store, 4, torch.device("cpu")) as training:
        training.prepare()
        before = [parameter.detach().clone() for parameter in training.model.parameters()]
        training.run(0.0, lambda _: None)
        after = list(training.model.parameters())
    changed = [not torch.equal(old, new) for old, new in zip(before, after, strict=True)]
    assert sum(changed) >= len(changed) - 2  # a dead unit's bias may rest


def test_a_finished_size_is_kept_and_an_interrupted_one_is_measured_again(plan, tmp_path, monkeypatch) -> None:
    sizes = {"TINY": TINY, "OURS": OURS}
    real, folder = SizeTraining.run, tmp_path / "registry"
    seen: list[Any] = []

    def interrupted(self, seconds, on_step):
        def step(progress):
            on_step(progress)
            seen.extend(read_registrations(folder))
            if self._size is OURS:  # its first step
                raise KeyboardInterrupt

        return real(self, seconds, step)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(SizeTraining, "run", interrupted)
        measure_sizes(plan(sizes), quiet)
    assert {(r.run, r.stage, r.trial, r.device_uuids) for r in seen} == {
        ("power", "power", "TINY", ("GPU-test",)),
        ("power", "power", "OURS", ("GPU-test",)),
    }
    assert read_registrations(folder) == []
    kept = (tmp_path / "out/sizes/TINY" / "result.json").read_bytes()
    assert not (tmp_path / "out/sizes/OURS" / "result.json").exists()
    lines: list[str] = []
    results = measure_sizes(plan(sizes), lines.append)
    assert (tmp_path / "out/sizes/TINY" / "result.json").read_bytes() == kept
    assert [result.status for result in results] == ["measured", "measured"]
    assert [line.split(":")[0] for line in lines if "trains for" in line] == ["OURS"]


def test_the_exporter_hears_of_speed_and_joules(plan, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(bench_power, "REGISTER_SECONDS", 0.0)
    real, told = SizeTraining.run, []

    def listened(self, seconds, on_step):
        def step(progress):
            on_step(progress)
            told.extend((progress, r) for r in read_registrations(tmp_path / "registry"))

        return real(self, seconds, step)

    monkeypatch.setattr(SizeTraining, "run", listened)
    (result,) = measure_sizes(plan(), quiet)
    _, last = told[-1]
    assert last.method == result.method == "integrated"
    assert last.energy_joules == pytest.approx(result.joules, rel=0.5)
    assert last.structures_per_second == pytest.approx(result.structures_per_second, rel=0.5)


def test_other_settings_in_one_folder_are_refused(plan) -> None:
    measure_sizes(plan(), quiet)
    with pytest.raises(UserError, match=r"was measured with batch_structures 4, but the command says 2.*--out"):
        measure_sizes(plan(batch_structures=2), quiet)
    with pytest.raises(UserError, match="was measured with size"):
        measure_sizes(plan({"TINY": TINY.model_copy(update={"hidden_dim": 9})}), quiet)


def test_a_folder_that_is_none_or_in_use_is_refused(plan, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--out: is .*file, which is a file"):
        measure_sizes(plan(out=tmp_path / "file"), quiet)
    with pytest.raises(UserError, match=r"--out: .*file/below cannot be made \(Not a directory\)"):
        measure_sizes(plan(out=tmp_path / "file" / "below"), quiet)
    with hold_lock(tmp_path / "out/.lock"), pytest.raises(UserError, match="another process measures there"):
        measure_sizes(plan(), quiet)


@pytest.mark.parametrize("damage", ["{", "[]", '{"name": "TINY"}'])
def test_a_damaged_result_is_named(plan, tmp_path: Path, damage: str) -> None:
    (tmp_path / "out/sizes/TINY").mkdir(parents=True)
    (tmp_path / "out/sizes/TINY" / "result.json").write_text(damage)
    with pytest.raises(UserError, match=r"result\.json"):
        measure_sizes(plan(), quiet)


def test_a_size_that_does_not_fit_is_a_row(plan, tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(bench_training, "available_bytes", lambda _: 1000)
        (result,) = measure_sizes(plan(), quiet)
    assert (result.status, result.available_bytes, result.joules, result.structures) == ("does_not_fit", 1000, None, 0)
    assert result.needed_bytes > 16 * result.n_parameters
    assert "does not fit" in bench_power.in_words(result)
    write_power_page([result], tmp_path / "out/sizes", tmp_path / "page.html")
    assert "does not fit" in (tmp_path / "page.html").read_text()
    (again,) = measure_sizes(plan(), quiet)  # memory has become free
    assert again.status == "measured"


@pytest.mark.parametrize("where", ["prepare", "run"])
def test_memory_that_runs_out_all_the_same_is_a_row_too(plan, monkeypatch, where: str) -> None:
    def fails(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    with monkeypatch.context() as patched:
        patched.setattr(SizeTraining, where, fails)
        (tiny, ours) = measure_sizes(plan({"TINY": TINY, "OURS": OURS}), quiet)
    assert (tiny.status, ours.status) == ("does_not_fit", "does_not_fit")
    assert "does not fit: OutOfMemoryError: CUDA out of memory" in bench_power.in_words(tiny)
    monkeypatch.setattr(SizeTraining, where, lambda *_: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        measure_sizes(plan(), quiet)


class TwoLayers(nn.Module):
    """Keeps its input (4 a row) and one hidden layer (h a row), each once."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, width), nn.Linear(width, 3)

    def forward(self, batch: Batch) -> Prediction:
        x = torch.cat([batch.positions, batch.positions[:, :1]], dim=1)
        return Prediction(batch.energy, self.second(torch.relu(self.first(x))))


@pytest.mark.parametrize("width", [5, 64])
def test_what_a_pass_keeps_is_as_counted_by_hand(store: Path, width: int) -> None:
    batch = Store(store).batch([0, 1, 2])
    n = len(batch.numbers)
    kept = bytes_kept(TwoLayers(width), batch)
    assert kept.total == 4 * n * (4 + width)
    assert kept.largest == 4 * n * max(4, width)


def test_memory_grows_with_the_batch_and_the_job_may_set_a_limit(store: Path, tmp_path: Path) -> None:
    needs = []
    for batch in (2, 32):
        with SizeTraining(TINY, store, batch, torch.device("cpu")) as training:
            needs.append(training.memory_need())
    assert needs[0].parameter_bytes == needs[1].parameter_bytes == 16 * count_size(TINY)
    assert 8 < needs[1].batch_bytes / needs[0].batch_bytes < 17  # the largest of many small batches is above the mean
    own = next(
        line.split(":", 2)[2].strip("/\n")
        for line in Path("/proc/self/cgroup").read_text().splitlines()
        if line.startswith("0::")
    )
    (tmp_path / own).mkdir(parents=True, exist_ok=True)
    (tmp_path / own / "memory.max").write_text("5000\n")
    (tmp_path / own / "memory.current").write_text("1200\n")
    assert list(bench_training._left_of_cgroups(tmp_path)) == [3800]
    (tmp_path / own / "memory.max").write_text("max\n")
    assert list(bench_training._left_of_cgroups(tmp_path)) == []


def test_power_of_a_counter_alone_is_its_slope(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    lines = [f"{100 + k / 10},process,cpu,estimated,{7 * k / 10}" for k in range(41)]
    trace.write_text("time_seconds,device,domain,method,energy_joules\n" + "\n".join(lines) + "\n")
    (curve,) = power_curves(trace)
    assert len(curve.watts) in (3, 4)
    assert curve.watts == pytest.approx([7.0] * len(curve.watts))


def test_a_page_has_its_figures_and_its_table(plan, tmp_path: Path) -> None:
    (result,) = measure_sizes(plan(), quiet)
    write_power_page([result], tmp_path / "out/sizes", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count('id="power"') == page.count('id="joules"') == 1
    assert f"<td>{result.n_parameters:,}</td>" in page
    (tmp_path / "out/sizes/TINY/trace.csv").unlink()
    with pytest.raises(UserError, match=r"trace\.csv: cannot be read.*Remove the folder of that size"):
        write_power_page([result], tmp_path / "out/sizes", tmp_path / "page.html")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sizes: {../x: {architecture: reference}}", r"\.\./x.*pattern"),
        ("sizes: {}", "names no size"),
        ("models: {A: {hiden_dim: 8}}", r"models\.A: unknown key 'hiden_dim'\. Did you mean"),
        (
            "sizes: {A: {architecture: reference, hidden_dim: 8, n_layers: 2, shared: [8], energy_head: [8], "
            "force_head: [8]}}\nmodels: {A: {}}",
            "A is in sizes and in models",
        ),
    ],
)
def test_bad_files_of_sizes(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "sizes.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_sizes(path)


def test_bad_options_are_said_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "sizes.yaml"
    path.write_text("models: {SMALL: {hidden_dim: 8}}")
    with pytest.raises(UserError, match=r"--sizes: is 'SMAL', but must be one of sizes\.yaml\. Did you mean 'SMALL'"):
        _plan(path, "SMAL", 1.0, 4, None, tmp_path / "out", "auto", None)
    with pytest.raises(UserError, match="--seconds: is nan"):  # which is below no minimum
        _plan(path, None, float("nan"), 4, None, tmp_path / "out", "auto", None)
    with pytest.raises(UserError, match="rated_watts_per_core"):
        _plan(path, None, 1.0, 4, None, tmp_path / "out", "auto", -3.0)
