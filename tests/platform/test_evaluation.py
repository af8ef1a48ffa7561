"""The figures of an evaluation, of members that are made up so that the truth is known."""

from __future__ import annotations

import io
import json
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from wattier.config import RunConfig
from wattier.errors import UserError
from wattier.evaluate import calibrated, error_products, predict_split, step_limits, still_holds
from wattier.evaluate_console import print_evaluation
from wattier.evaluation_figures import Split, density, figures_of
from wattier.records import finite_or_none
from wattier_gnn.ensemble import Ensemble, MemberNumbers
from wattier_gnn.model import ModelConfig, build_model
from wattier_gnn.splits import TEST
from wattier_gnn.weights import fit_weights

SOURCES = ("small", "large", "unlabelled")
SCALES = np.array([1.0, 4.0, 2.0])


def bare(members: int, **changes: Any) -> Ensemble:
    config = ModelConfig(
        SOURCES, tuple(SCALES.tolist()), 5.0, hidden_dim=4, n_layers=1, n_radial=2, head_dim=4, **changes
    )
    return Ensemble(tuple(build_model(config, k) for k in range(members)), np.zeros((len(SOURCES), 119)))


def made_up(rng: Any, counts: tuple[int, ...], members: int = 3, bad: float = 1.0) -> Split:
    """Members that err alike in part, on `large` ten times as much as on the others; `unlabelled` has no forces.

    bad: factor on the own errors of the last member.
    """
    source = np.repeat([0, 1, 2], counts)
    n_atoms = rng.integers(2, 9, len(source))
    by_member = np.ones(members)
    by_member[-1] = bad

    def members_say(true: Any, scale: Any) -> Any:
        scale = scale * np.exp(rng.normal(0, 0.4, scale.shape))
        own = by_member.reshape(-1, *[1] * true.ndim) * rng.normal(size=(members, *true.shape))
        return true + scale * (own + 0.8 * rng.standard_t(5, true.shape))

    energy = rng.normal(0, 3, len(source))
    energies = members_say(energy, 0.05 * n_atoms * np.array([1.0, 10.0, 1.0])[source])
    atom_source = np.repeat(source, n_atoms)
    forces = rng.normal(0, 2, (len(atom_source), 3))
    said_forces = members_say(forces, np.broadcast_to(0.1 * np.array([1, 10, 1.0])[atom_source][:, None], forces.shape))
    unknown = np.full((members, len(source)), np.nan)
    odd = tuple("too near" if k % 10 == 0 else None for k in range(len(source)))
    said = MemberNumbers(energies, said_forces, n_atoms, source, unknown)
    return Split(said, energy, forces, atom_source != 2, np.arange(len(source)) // 3, odd)


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    test = made_up(rng, (600, 300, 50))
    ensemble = calibrated(bare(3), made_up(rng, (900, 900, 40)), None, 0.9)
    return {**figures_of(ensemble, test, np.array([5, 6, 7])), "test": test, "ensemble": ensemble}


def test_errors_are_those_of_the_mean_by_source_and_of_all(figures: dict[str, Any]) -> None:
    test, rows = figures["test"], {**figures["sources"], "all": figures["pooled"]}
    energy, force = test.said.energies_ev.mean(axis=0), test.said.forces_ev_per_angstrom.mean(axis=0)
    atom_source = np.repeat(test.said.source_index, test.said.n_atoms)
    for k, name in enumerate([*SOURCES, "all"]):
        its = slice(None) if name == "all" else test.said.source_index == k
        atoms = test.force_known & ((atom_source == k) if name != "all" else True)
        error, row = (energy - test.energy_true_ev)[its], rows[name]
        per_atom = error / test.said.n_atoms[its]
        assert row["n_structures"] == len(error)
        assert row["energy_mae_ev"] == pytest.approx(np.abs(error).mean())
        assert row["energy_rmse_ev"] == pytest.approx(math.sqrt((error**2).mean()))
        assert row["energy_mae_ev_per_atom"] == pytest.approx(np.abs(per_atom).mean())
        assert row["energy_rmse_ev_per_atom"] == pytest.approx(math.sqrt((per_atom**2).mean()))
        if name == "unlabelled":
            assert row["force_mae_ev_per_angstrom"] is None
            assert row["force_rmse_ev_per_angstrom"] is None
        else:
            errors = (force - test.force_true)[atoms]
            assert row["force_mae_ev_per_angstrom"] == pytest.approx(np.abs(errors).mean())
            assert row["force_rmse_ev_per_angstrom"] == pytest.approx(math.sqrt((errors**2).mean()))
    assert figures["pooled"]["n_train"] == 18
    json.dumps(finite_or_none({k: v for k, v in figures.items() if k not in ("test", "ensemble")}), allow_nan=False)


def test_intervals_cover_what_they_promise_of_all_and_of_each_large_source(figures: dict[str, Any]) -> None:
    found = figures["intervals"]
    assert found["target"] == 0.9
    for quantity in ("energy", "forces"):
        rows = {"all": found[quantity]["pooled"], **found[quantity]["by_source"]}
        for name in ("all", "small", "large"):
            row = rows[name]
            assert row["band_low"] <= row["observed"] <= row["band_high"], (quantity, name)
            assert row["n_groups"] < row["n"]
        assert rows["large"]["mean_half_width"] > 5 * rows["small"]["mean_half_width"]
    by_source = found["energy"]["by_source"]
    assert [by_source[name]["quantile_from"] for name in SOURCES] == ["this source", "this source", "all sources"]
    assert found["energy"]["pooled"]["quantile_from"] == "mixed"
    assert found["forces"]["by_source"]["small"]["n_independent"] == 600
    assert found["forces"]["by_source"]["unlabelled"]["n"] == 0


def test_calibration_is_judged_an_atom_and_by_source(figures: dict[str, Any]) -> None:
    both = {name: figures["calibration_by_source"][name]["energy"] for name in ("small", "large")}
    assert both["large"]["sharpness"] == pytest.approx(10 * both["small"]["sharpness"], rel=0.15)
    assert both["large"]["crps"] == pytest.approx(10 * both["small"]["crps"], rel=0.15)
    assert all(part["coverage_68"] == pytest.approx(0.683, abs=0.06) for part in both.values())
    assert figures["calibration"]["energy"]["spearman"] > 0.5, "of all sources, whose errors differ tenfold"


def test_flagged_structures_are_counted_apart(figures: dict[str, Any]) -> None:
    row, test = figures["out_of_distribution"]["small"], figures["test"]
    assert (row["n"], row["flagged"]) == (600, 60)
    error = np.abs(test.said.energies_ev.mean(axis=0) - test.energy_true_ev) / test.said.n_atoms
    assert row["energy_mae_flagged_ev_per_atom"] == pytest.approx(error[:600:10].mean())


def test_parity_points_have_bars_and_density_and_are_about_a_thousand(figures: dict[str, Any]) -> None:
    points, test = figures["parity"]["small"], figures["test"]
    lengths = {name: len(values) for name, values in points.items()}
    assert {n for name, n in lengths.items() if name.startswith("energy")} == {600}
    assert len({n for name, n in lengths.items() if name.startswith("force")}) == 1
    assert 1000 <= lengths["force_density"] < 2000
    np.testing.assert_allclose(
        points["energy_true_ev_per_atom"], (test.energy_true_ev / test.said.n_atoms)[:600], atol=1e-5
    )
    assert min(points["energy_interval_ev_per_atom"]) > 0
    assert figures["parity"]["unlabelled"]["force_true_ev_per_angstrom"] == []


def test_density_counts_points_of_a_cell() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=400)
    y = x + 0.05 * rng.normal(size=400)
    low, width = min(x.min(), y.min()), (max(x.max(), y.max()) - min(x.min(), y.min())) / 64
    cells = [(min(int((a - low) / width), 63), min(int((b - low) / width), 63)) for a, b in zip(x, y, strict=True)]
    np.testing.assert_array_equal(density(x, y), [cells.count(cell) for cell in cells])
    np.testing.assert_array_equal(density(np.ones(3), np.ones(3)), [3, 3, 3])
    assert len(density(np.empty(0), np.empty(0))) == 0


def config_with(**ensemble: Any) -> RunConfig:
    return RunConfig.model_validate({
        "name": "x", "run_dir": "runs/x", "data": {"sources": {"qm7x": "sample"}},
        "search": {"space": {"hidden_dim": {"choices": [8]}}, "stages": [{"name": "s", "trials": 1, "epochs": 1}]},
        "ensemble": ensemble,
    })  # fmt: skip


def test_fitted_weights_hear_less_of_a_bad_member_and_err_less_on_test() -> None:
    rng = np.random.default_rng(2)
    validation, test = (made_up(rng, (200, 200, 40), bad=20.0) for _ in range(2))
    fitted = fit_weights(error_products(validation, SimpleNamespace(meta={"energy_scale_ev": SCALES}), config_with()))
    assert fitted.weights[2] < 0.05
    plain = figures_of(calibrated(bare(3), validation, None, 0.9), test, np.ones(3, int))
    better = figures_of(calibrated(bare(3), validation, fitted, 0.9), test, np.ones(3, int))
    assert better["pooled"]["energy_mae_ev"] < 0.6 * plain["pooled"]["energy_mae_ev"]
    row = better["intervals"]["energy"]["pooled"]
    assert row["band_low"] <= row["observed"] <= row["band_high"]


def test_products_of_errors_are_the_loss_with_every_source_alike() -> None:
    """Of equal weights, by the definition: mean over sources of mean squares, in units of their scales."""
    validation = made_up(np.random.default_rng(3), (30, 20, 10))
    config = config_with()
    config = config.model_copy(update={"training": config.training.model_copy(update={"energy_weight": 8.0})})
    grams = error_products(validation, SimpleNamespace(meta={"energy_scale_ev": SCALES}), config)
    said, equal = validation.said, np.full(3, 1 / 3)
    error = (said.energies_ev.mean(axis=0) - validation.energy_true_ev) / said.n_atoms
    force_error = said.forces_ev_per_angstrom.mean(axis=0) - validation.force_true
    atom_source = np.repeat(said.source_index, said.n_atoms)
    total = 0.0
    for k, scale in enumerate(SCALES):
        total += 8.0 * np.mean((error[said.source_index == k] / scale) ** 2)
        if k != 2:
            total += np.mean((force_error[atom_source == k] / scale) ** 2)
    assert equal @ grams.sum(axis=0) @ equal == pytest.approx(total / 3)


def test_one_member_has_intervals_and_no_deviations() -> None:
    rng = np.random.default_rng(4)
    ensemble = calibrated(bare(1), made_up(rng, (400, 400, 50), members=1), None, 0.9)
    found = figures_of(ensemble, made_up(rng, (400, 400, 50), members=1), np.ones(3, int))
    row = found["intervals"]["energy"]["pooled"]
    assert row["band_low"] <= row["observed"] <= row["band_high"]
    assert "constant" in found["intervals"]["method"]
    assert found["calibration"]["energy"]["expected"] == ()
    assert math.isnan(found["calibration"]["energy"]["nll"])
    assert found["pooled"]["spearman_error_spread"] is None


def test_forces_need_fewer_structures_for_factors_of_their_own() -> None:
    found = calibrated(bare(3), made_up(np.random.default_rng(6), (60, 29, 100)), None, 0.9).calibration
    assert found.energy.is_own == (False, False, True)
    assert found.forces.is_own == (True, False, False), "the third has no forces"


def test_a_source_without_test_structures_has_no_figures() -> None:
    rng = np.random.default_rng(5)
    ensemble = calibrated(bare(3), made_up(rng, (120, 120, 0)), None, 0.9)
    found = finite_or_none(figures_of(ensemble, made_up(rng, (50, 0, 0)), np.ones(3, int)))
    assert found["sources"]["large"]["energy_mae_ev"] is None
    assert found["intervals"]["energy"]["by_source"]["large"]["observed"] is None
    assert found["parity"]["large"]["energy_density"] == []
    json.dumps(found, allow_nan=False)


def test_a_run_without_test_structures_is_told_what_to_do() -> None:
    store = SimpleNamespace(folder="run/data/store", indices=lambda _: np.empty(0, int))
    with pytest.raises(UserError, match=r"no test structures.*Raise data\.split"):
        predict_split(bare(1), store, TEST, step_limits(config_with()))


def test_an_evaluation_holds_for_its_members_settings_and_version() -> None:
    config = config_with()
    evaluation = {"members": [], "settings": config.ensemble.model_dump()}
    assert still_holds(json.loads(json.dumps(evaluation)), config, [])
    assert not still_holds(None, config, [])
    assert not still_holds({"members": []}, config, []), "of a version that knew no intervals"
    assert not still_holds(evaluation, config_with(weights="fitted"), [])
    assert not still_holds(evaluation, config_with(coverage=0.8), [])


@pytest.mark.parametrize("wrong", [{"weights": "best"}, {"coverage": 1.0}, {"coverage": 0.4}, {"coverge": 0.9}])
def test_wrong_ensemble_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="ensemble"):
        config_with(**wrong)


def printed(run: Any) -> str:
    stream = io.StringIO()
    print_evaluation(run, Console(file=stream, width=140))
    return stream.getvalue()


def test_the_table_on_the_screen(figures: dict[str, Any], whole_run: Any) -> None:
    old = printed(whole_run)
    assert "ani1x" in old
    assert "unknown" in old, "an evaluation of an earlier version has no intervals"
    data = json.loads(whole_run.evaluation_path.read_text())
    data |= finite_or_none({k: v for k, v in figures.items() if k not in ("test", "ensemble")})
    whole_run.evaluation_path.write_text(json.dumps(data))
    text = printed(whole_run)
    row = figures["intervals"]["energy"]["pooled"]
    assert "90 % intervals cover" in text
    (line,) = [line for line in text.splitlines() if " all " in line]
    assert f"{100 * row['observed']:.0f} %" in line
    assert f"{100 * row['band_low']:.0f} % to {100 * row['band_high']:.0f} %" in line
