"""Schedulers: who is stopped, who never is, and that replaying gives the same answers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wattier.halving import Halving, ParetoHalving, rung_epochs
from wattier.records import EpochRecord

EPOCHS = 27
Curve = tuple[list[float], float | None]  # losses at epochs 1, 3, 9, 27, and joules of an epoch


def record(epoch: int, loss: float | None, joules: float | None) -> EpochRecord:
    return EpochRecord(epoch, None, loss, {}, 0, 1.0, 1e-3, energy_joules=None if joules is None else joules * epoch)


def play(halving: Halving | ParetoHalving, curves: list[Curve]) -> list[tuple[str, int, bool]]:
    """Runs trials one after another; answers in their order."""
    told = []
    for number, (losses, joules) in enumerate(curves):
        for epoch, loss in zip((1, 3, 9, 27), losses, strict=True):
            told.append((f"t{number}", epoch, halving.go_on(f"t{number}", record(epoch, loss, joules))))
            if not told[-1][2]:
                break
    return told


losses = st.lists(st.floats(0.01, 10.0), min_size=4, max_size=4)
histories = st.lists(st.tuples(losses, st.floats(1.0, 100.0)), min_size=1, max_size=12)


@settings(deadline=None, max_examples=60)
@given(histories)
def test_what_no_finished_trial_dominates_goes_on(curves: list[Curve]) -> None:
    told = play(ParetoHalving(EPOCHS, 3), curves)
    finished = {name for name, epoch, _ in told if epoch == EPOCHS}
    place = {1: 0, 3: 1, 9: 2}
    for name, epoch, went_on in told:
        if went_on:
            continue
        own_losses, own_joules = curves[int(name[1:])]
        assert own_joules is not None
        assert any(
            curves[int(other[1:])][0][place[epoch]] <= own_losses[place[epoch]]
            and (curves[int(other[1:])][1] or 0) <= own_joules * (1 + 1e-9)
            for other in finished
            if int(other[1:]) < int(name[1:])
        )


@settings(deadline=None, max_examples=30)
@given(histories)
def test_asked_again_it_repeats_itself_and_replayed_it_agrees(curves: list[Curve]) -> None:
    halving = ParetoHalving(EPOCHS, 3)
    told = play(halving, curves)
    assert play(halving, curves) == told
    assert play(ParetoHalving(EPOCHS, 3), curves) == told


def test_a_trial_that_is_worse_and_dearer_is_stopped_early_once_enough_is_known() -> None:
    rng = np.random.default_rng(0)
    good: list[Curve] = [([q * f for f in (8, 4, 2, 1)], 10.0 + i) for i, q in enumerate(1 + 0.1 * rng.random(6))]
    told = play(ParetoHalving(EPOCHS, 3), [*good, ([80.0, 40.0, 20.0, 10.0], 50.0)])
    assert [answer for answer in told if answer[0] == "t6"] == [("t6", 1, False)]


def test_what_rungs_have_said_so_far_decides_how_far_they_are_believed() -> None:
    """The same losses at the first rung: a trial that is worse there is stopped where they foretold the end."""
    at_rung = [4.0, 4.4, 4.8, 5.2, 5.6, 6.0]
    foretold = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5]
    shuffled = [1.3, 1.1, 1.5, 1.0, 1.4, 1.2]
    went_on = []
    for ends in (foretold, shuffled):
        halving = ParetoHalving(EPOCHS, 3)
        for number, (start, end) in enumerate(zip(at_rung, ends, strict=True)):
            halving.answers |= {(f"t{number}", epoch): True for epoch in (1, 3, 9)}  # they went on, whatever they were
            halving._rungs.entered(f"t{number}", 1, start)
            halving.joules[f"t{number}"] = 10.0
            halving.go_on(f"t{number}", record(EPOCHS, end, 10.0))
        went_on.append(halving.go_on("new", record(1, 5.9, 10.0)))
    assert went_on == [False, True]


@pytest.mark.parametrize("kind", [Halving, ParetoHalving])
def test_a_diverged_trial_is_stopped(kind: type[Halving] | type[ParetoHalving]) -> None:
    assert not kind(EPOCHS, 3).go_on("t0", record(2, None, 1.0))


def test_without_joules_it_judges_by_loss_alone() -> None:
    good: list[Curve] = [([8.0 + 0.1 * i, 4.0, 2.0, 1.0], None) for i in range(6)]
    told = play(ParetoHalving(EPOCHS, 3), [*good, ([80.0, 40.0, 20.0, 10.0], None)])
    assert told[-1] == ("t6", 1, False)


def test_a_report_after_a_rung_stands_for_it() -> None:
    halving = Halving(54, 3)
    assert halving.go_on("a", record(2, 1.0, 1.0))
    assert not halving.go_on("b", record(2, 2.0, 1.0))
    assert list(halving.rungs) == [2]


def test_rungs_need_a_factor() -> None:
    assert rung_epochs(27, 3) == [1, 3, 9]
    assert rung_epochs(27, None) == []
    with pytest.raises(ValueError, match="reduction_factor is 1, but must be at least 2"):
        rung_epochs(27, 1)
