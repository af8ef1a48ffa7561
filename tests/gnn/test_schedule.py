"""Learning rates in closed form."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from wattier_gnn.schedule import Schedule


def schedule(**changes: Any) -> Schedule:
    """From 1e-2 down to 1e-4 over ten epochs."""
    options = {
        "kind": "plateau", "epochs": 10, "warmup_steps": 0, "warmup_epochs": 0.0, "min_learning_rate": 1e-4,
        "plateau_factor": 0.5, "plateau_patience": 1,
    }  # fmt: skip
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-2)
    return Schedule(optimizer, **{**options, **changes})


def rate(s: Schedule, steps_done: int, epochs_done: float) -> float:
    s.before_step(steps_done, epochs_done)
    return s.learning_rate


def test_cosine() -> None:
    s = schedule(kind="cosine")
    for epochs_done in (0.0, 0.5, 3.3, 5.0, 9.99, 10.0, 12.0):
        expected = 1e-4 + (1e-2 - 1e-4) * 0.5 * (1 + math.cos(math.pi * min(epochs_done, 10) / 10))
        assert rate(s, 0, epochs_done) == pytest.approx(expected)
    s.after_epoch(math.inf)
    assert s.learning_rate == pytest.approx(1e-4), "a bad epoch does not move it"


def test_warm_up_by_steps_and_by_epochs() -> None:
    s = schedule(warmup_steps=4)
    assert [rate(s, k, 0.0) for k in range(6)] == pytest.approx([2.5e-3, 5e-3, 7.5e-3, 1e-2, 1e-2, 1e-2])
    s = schedule(warmup_epochs=2.0)
    assert [rate(s, 9, e) for e in (0.0, 0.5, 1.0, 2.0, 3.0)] == pytest.approx([0.0, 2.5e-3, 5e-3, 1e-2, 1e-2])
    s = schedule(kind="cosine", warmup_epochs=5.0)
    assert rate(s, 0, 2.5) == pytest.approx(0.5 * (1e-4 + (1e-2 - 1e-4) * 0.5 * (1 + math.cos(math.pi / 4))))


def test_the_plateau_rule_does_not_mistake_the_warm_up_for_its_own_fall() -> None:
    """Two bad epochs halve the full rate, and again down to the least, while the warm-up goes on."""
    s = schedule(warmup_epochs=4.0)
    full = []
    for epoch in range(12):
        full.append(rate(s, 0, epoch + 4.0))
        assert rate(s, 0, epoch / 3) == pytest.approx(full[-1] * min(1, epoch / 12))
        s.after_epoch(1.0)
    assert full[:7] == pytest.approx([1e-2, 1e-2, 1e-2, 5e-3, 5e-3, 2.5e-3, 2.5e-3])
    assert full[-1] >= 1e-4


def test_it_goes_on_from_its_state() -> None:
    one, other = schedule(), schedule()
    for s in (one, one, one):
        s.after_epoch(1.0)
    other.load_state_dict(one.state_dict())
    for s in (one, other):
        s.after_epoch(1.0)
        s.after_epoch(1.0)
    assert rate(one, 0, 5.0) == rate(other, 0, 5.0) < 1e-2
