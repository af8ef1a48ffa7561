"""A campaign of hundreds of trials and many members, as its run directory would hold it; every number is made up."""

import json
import math
import random

from wattier.config import RunConfig
from wattier.pareto import non_dominated_ranks
from wattier.power_trace import PowerTrace
from wattier.records import EpochRecord, Fidelity, Pick, Selection, Tier, TrialResult
from wattier.rundir import FULL_STAGE, RunDir, write_json
from wattier_telemetry import EnergyReport, Share
from wattier_telemetry.journal import Journal

SOURCES = ("ani1x", "qm7x", "oc20", "oc22", "mptrj")
START = 1_760_000_000.0
STAGES = {"scout": (2, 0.6, 2_000), "sift": (6, 0.3, 10_000), "final": (12, 0.1, 40_000)}  # epochs, share, structures
FULL_EPOCHS, JOULES_PER_EPOCH = 120, 900.0


def campaign_config(path, counts, members):
    """Three stages and six hyper-parameters, one of which is a word."""
    space = {
        "learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
        "hidden_dim": {"low": 32, "high": 512, "step": 32},
        "n_layers": {"low": 2, "high": 6},
        "batch_structures": {"choices": [8, 16, 32, 64]},
        "family": {"choices": ["egnn", "schnet", "pna"]},
    }
    stages = [
        {
            "name": name,
            "trials": counts[name],
            "epochs": epochs,
            "structures": structures,
            "promote": 5 * (name != "scout"),
        }
        for name, (epochs, _, structures) in STAGES.items()
    ]
    accurate = max(1, members // 4)
    return RunConfig.model_validate(
        {
            "name": "campaign",
            "run_dir": str(path),
            "data": {"sources": dict.fromkeys(SOURCES, "sample")},
            "search": {"space": space, "stages": stages},
            "select": {"accurate": accurate, "balanced": members - accurate},
            "full_training": {"epochs": FULL_EPOCHS},
        }
    )


def fabricate(path, *, trials=400, members=15, seed=0):
    """Write the run directory of a finished campaign, and return it."""
    noise = random.Random(seed)
    counts = {stage: max(members + 8, round(trials * share)) for stage, (_, share, _) in STAGES.items()}
    run = RunDir.create(campaign_config(path, counts, members))
    rows, tried = [], []
    for stage, (epochs, _, _) in STAGES.items():
        count = counts[stage]
        carried = sorted(tried, key=_quality)[: count // 3]
        configs = carried + [_params(noise) for _ in range(count - len(carried))]
        rows += [_trial(run, stage, f"{stage}-{i:03d}", params, epochs, noise) for i, params in enumerate(configs)]
        tried = configs
    selection = _selection([row for row in rows if row.fidelity.stage == "final"], members)
    write_json(run.selection_path, selection.to_dict())
    finals = {row.trial_id: row for row in rows if row.fidelity.stage == "final"}
    for trial_id in selection.picked:
        rows.append(_trial(run, FULL_STAGE, trial_id, finals[trial_id].params, FULL_EPOCHS, noise, member=True))
        _trace(run, rows[-1], noise, gap=trial_id == selection.picked[-1], hot=trial_id == selection.picked[0])
    run.trials_path.write_text("".join(json.dumps(row.to_dict()) + "\n" for row in rows))
    data = EnergyReport.of([_share("cpu-0", "cpu", 40_000.0, 0, 400)], [])
    Journal(run.phase_folder("data") / "attempt1-driver.energy.json").finish(data)
    write_json(run.evaluation_path, evaluation([row for row in rows if row.fidelity.stage == FULL_STAGE], noise))
    run.store_path.mkdir(parents=True)
    cleaning = {"read": dict.fromkeys(SOURCES, 9000), "kept": dict.fromkeys(SOURCES, 8900), "removed": {}}
    write_json(run.store_manifest_path, {"cleaning": cleaning})
    return run


def evaluation(rows, noise):
    """What the evaluation of several members leaves; of a single one, calibration says nothing."""
    several = len(rows) > 1
    metrics, parity = {}, {}
    for index, source in enumerate(SOURCES):
        true = [noise.gauss(0, 0.3) for _ in range(900)]
        forces = [noise.gauss(0, 2) for _ in range(1000)]
        metrics[source] = {
            "n_structures": 900, "n_train": 7000, "energy_mae_ev": 0.31 + index / 10, "energy_mae_ev_per_atom": 0.021,
            "energy_rmse_ev": 0.61, "force_mae_ev_per_angstrom": 0.11, "force_rmse_ev_per_angstrom": 0.2,
            "force_correlation": 0.98, "reference_energy_mae_ev": 2.1, "energy_mae_ratio": 0.2,
            "spearman_error_spread": 0.55 if several else None,
        }  # fmt: skip
        parity[source] = {
            "energy_true_ev_per_atom": true,
            "energy_predicted_ev_per_atom": [x + noise.gauss(0, 0.03) for x in true],
            "energy_std_ev_per_atom": [abs(noise.gauss(0.03, 0.01)) if several else None for _ in true],
            "force_true_ev_per_angstrom": forces,
            "force_predicted_ev_per_angstrom": [x + noise.gauss(0, 0.2) for x in forces],
        }
    levels = [i / 20 for i in range(21)] if several else []
    part = {
        "scale": 1.7 if several else None, "expected": levels, "observed": [x**1.2 for x in levels],
        "miscalibration_area": 0.043 if several else None, "coverage_68": 0.64 if several else None,
        "coverage_95": 0.93 if several else None, "nll": -1.2, "sharpness": 0.06, "spearman": 0.4, "unit": "eV/atom",
    }  # fmt: skip
    coverage = {
        source: {"n": 900, "observed": 0.86 + 0.02 * i, "band_low": 0.873, "band_high": 0.925, "mean_half_width": 0.34}
        for i, source in enumerate(SOURCES)
    }
    pooled = {"n": 4500, "observed": 0.9, "band_low": 0.889, "band_high": 0.911, "mean_half_width": 0.33}
    interval = {"pooled": pooled, "by_source": coverage}
    names = ("trial_id", "val_loss", "epochs_done", "n_parameters", "energy_joules")
    return {
        "members": [{name: getattr(row, name) for name in names} for row in rows],
        "sources": metrics,
        "calibration": {"energy": part, "forces": part | {"unit": "eV/Å"}},
        "parity": parity,
        "intervals": {"target": 0.9, "method": "Split conformal.", "energy": interval, "forces": interval},
        "weights": {"kind": "equal", "by_member": {row.trial_id: 1 / len(rows) for row in rows}},
        "out_of_distribution": {
            source: {
                "n": 900,
                "flagged": i,
                "energy_mae_flagged_ev_per_atom": 0.2,
                "energy_mae_others_ev_per_atom": 0.02,
            }
            for i, source in enumerate(SOURCES)
        },
    }


def _selection(rows, members):
    """The lowest losses, and what is cheapest of the rest: as many members as are wanted, whatever rules there are."""
    candidates = sorted((row for row in rows if row.status == "complete"), key=lambda row: row.val_loss)
    assert len(candidates) >= members
    accurate, rest = candidates[: max(1, members // 4)], candidates[max(1, members // 4) :]
    balanced = sorted(rest, key=lambda row: row.energy_joules)[: members - len(accurate)]
    ranks = non_dominated_ranks([(row.val_loss, row.energy_joules) for row in candidates])
    tiers = [
        Tier(name, f"the {words}", tuple(Pick(row.trial_id, f"it is among the {words}") for row in chosen))
        for name, words, chosen in (("accurate", "lowest losses", accurate), ("balanced", "cheapest", balanced))
    ]
    return Selection(
        stage="final",
        tiers=tuple(tiers),
        front=tuple(row.trial_id for row, rank in zip(candidates, ranks, strict=True) if rank == 0),
        hypervolume=None,
        reference_point=None,
        candidates=tuple(sorted(row.trial_id for row in candidates)),
        excluded={row.trial_id: f"it ended as {row.status}" for row in rows if row.status != "complete"},
        projected_joules=10 * sum(row.energy_joules for row in (*accurate, *balanced)),
        projected_joules_all=10 * sum(row.energy_joules for row in candidates),
    )


def _params(noise):
    return {
        "learning_rate": 10 ** noise.uniform(-4, -2), "hidden_dim": 32 * noise.randint(1, 16),
        "n_layers": noise.randint(2, 6), "batch_structures": noise.choice([8, 16, 32, 64]),
        "family": noise.choice(["egnn", "schnet", "pna"]),
    }  # fmt: skip


def _quality(params):
    """The loss that a configuration tends to: better near a rate of 1e-3, when wide, and when equivariant."""
    rate = math.log10(params["learning_rate"] / 1e-3)
    family = {"egnn": 1.0, "schnet": 1.25, "pna": 1.35}[params["family"]]
    return family * (0.05 + 0.12 * rate**2 + 3.0 / params["hidden_dim"])


def _joules(params):
    return (
        JOULES_PER_EPOCH * (params["hidden_dim"] / 64) ** 1.4 * params["n_layers"] / params["batch_structures"] ** 0.3
    )


def _share(uuid, domain, joules, start, seconds, throttled=None):
    return Share(
        uuid, domain, START + start, START + start + seconds, 1.0, joules, "counter", 0.99, 0.98 * joules,
        1.02 * joules, throttled_seconds=throttled,
    )  # fmt: skip


def _trial(run, stage, trial_id, params, epochs, noise, *, member=False):
    number = noise.randint(0, 10**6)
    fate = "complete" if member else noise.choices(["complete", "pruned", "failed"], [0.55, 0.42, 0.03])[0]
    done = {"complete": epochs, "pruned": max(1, epochs // 3), "failed": 1}[fate]
    seconds, joules = 30.0 * done, _joules(params) * done * noise.uniform(0.95, 1.05)
    losses = [_quality(params) * (1 + 4 / (1 + epoch)) * noise.uniform(0.98, 1.02) for epoch in range(1, done + 1)]
    hot = {"power_cap": 0.3 * seconds if noise.random() < 0.02 else 0.0}
    bill = EnergyReport.of([_share(f"GPU-{number % 8}", "gpu", joules, number, seconds, hot)])
    result = TrialResult(
        run="campaign", trial_id=trial_id, params=params, fidelity=Fidelity(stage, None, epochs, 1), status=fate,
        val_loss=None if fate == "failed" else min(losses), val_by_source={}, epochs_done=done, structures_seen=1000,
        wall_seconds=seconds, energy=bill, n_parameters=params["hidden_dim"] ** 2 * params["n_layers"],
        error="out of memory" if fate == "failed" else None,
        peak_memory_bytes=number * 10_000, devices=(f"GPU-{number % 8}",),
    ).flagged(0.1)  # fmt: skip
    folder = run.trial_folder(stage, trial_id)
    folder.mkdir(parents=True)
    lines = [
        EpochRecord(epoch, loss, loss, {}, 100 * epoch, 30.0, 1e-3, joules * epoch / done, START + number + 30 * epoch)
        for epoch, loss in enumerate(losses, 1)
    ]
    (folder / "epochs.jsonl").write_text("".join(json.dumps(line.to_dict()) + "\n" for line in lines))
    return result


def _trace(run, row, noise, *, gap, hot):
    """Power that wavers about its mean, with five minutes that nobody measured, or some under a power cap."""
    trace = PowerTrace(
        run.trial_folder(FULL_STAGE, row.trial_id) / "attempt1-rank0.trace.csv", {"GPU-0": "NVIDIA H100"}
    )
    watts, joules, unseen, capped = row.energy_joules / row.wall_seconds, 0.0, 0.0, 0.0
    for step in range(1, 400):
        seconds = row.wall_seconds * step / 400
        missing = gap and 150 < step < 190
        if missing:
            unseen += row.wall_seconds / 400
        elif hot and 250 < step < 300:
            capped += row.wall_seconds / 400
            joules += 0.6 * watts * row.wall_seconds / 400
        else:
            joules += watts * (1 + 0.15 * math.sin(step / 9) + noise.gauss(0, 0.03)) * row.wall_seconds / 400
        share = Share(
            "GPU-0", "gpu", START, START + seconds, 1.0, joules, "counter", 1 - unseen / seconds,
            throttled_seconds={"power_cap": capped},
        )  # fmt: skip
        trace.add(EnergyReport.of([share]), int(2e10 + 5e9 * min(1, step / 20)))
