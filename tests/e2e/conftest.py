"""A tiny run for the tests that kill it, and the end of what a test has left running."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from workplace import Workplace, end_all


@pytest.fixture(autouse=True)
def _nothing_goes_on() -> Iterator[None]:
    yield
    end_all()


@pytest.fixture
def tiny(tmp_path: Path) -> Workplace:
    """A whole funnel in half a minute: two sources, tiny networks, a power source of known watts."""
    trace = tmp_path / "hundred_watts.csv"
    trace.write_text("time_seconds,device,power_watts\n0,node,100\n")
    config = {
        "name": "tiny",
        "run_dir": str(tmp_path / "run"),
        "data": {"sources": {"qm7x": "sample", "mptrj": "sample"}, "cutoff_angstrom": 4.0, "placement": "spread"},
        "model": {"n_layers": 1, "n_radial": 4, "head_dim": 16, "n_head_layers": 1, "forces": "vector"},
        "search": {
            "space": {
                "hidden_dim": {"low": 8, "high": 24, "step": 8},
                "learning_rate": {"low": 1e-3, "high": 1e-2, "log": True},
            },
            "stages": [
                {"name": "wide", "trials": 4, "structures": 200, "epochs": 3, "reduction_factor": None},
                {"name": "deep", "trials": 2, "structures": 300, "epochs": 3, "ranks": 2, "promote": 2,
                 "reduction_factor": None},
            ],
        },
        "select": {"accurate": 1, "balanced": 1},
        "full_training": {"epochs": 60, "early_stop_patience": 60},  # long enough for one lost moment to be under 1 %
        "telemetry": {"source": f"replay:{trace}", "interval_seconds": 0.02},
    }  # fmt: skip
    place = Workplace(tmp_path, config)
    place.write()
    return place
