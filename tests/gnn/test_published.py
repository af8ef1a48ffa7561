"""The published layer algebra has the published sizes, and the published flaw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from wattier.config import load_sizes
from wattier_gnn.model import count_parameters
from wattier_gnn.published import PublishedEGNN, PublishedSizes, count_closed_form

TALK = Path(__file__).parents[2] / "configs" / "talk_sizes.yaml"
PUBLISHED = {"SMALL": 58_404, "MEDIUM": 14_539_004, "LARGE": 163_129_004}
TINY = PublishedSizes(32, 3, (32, 24), (20,), (16,))


def count_built(sizes: PublishedSizes) -> int:
    with torch.device("meta"):
        return count_parameters(PublishedEGNN(sizes))


def test_the_sizes_of_the_talk() -> None:
    sizes = load_sizes(TALK).sizes
    assert set(sizes) == set(PUBLISHED)
    for name, size in sizes.items():
        published = PublishedSizes(
            size.hidden_dim, size.n_layers, tuple(size.shared), tuple(size.energy_head), tuple(size.force_head)
        )
        assert count_built(published) == count_closed_form(published) == PUBLISHED[name]


@pytest.mark.parametrize(
    ("hidden_dim", "n_layers", "head", "expected"),
    [
        (866, 4, (889, 889, 889), 22_065_718),  # the released GFM260
        (100, 2, (300, 300), 337_604),  # the corners of the published search space
        (2000, 6, (1000, 1000, 1000), 158_278_604),
    ],
)
def test_released_models_keep_a_shared_mlp_of_two_by_fifty(
    hidden_dim: int, n_layers: int, head: tuple[int, ...], expected: int
) -> None:
    sizes = PublishedSizes(hidden_dim, n_layers, (50, 50), head, head)
    assert count_built(sizes) == count_closed_form(sizes) == expected


def test_forward_gives_one_energy_a_structure_and_one_force_an_atom(tools: Any) -> None:
    structures = list(tools.scenes().values())
    prediction = PublishedEGNN(TINY).double()(tools.join(structures))
    assert prediction.energy.shape == (3,)
    assert prediction.forces.shape == (15, 3)
    (prediction.energy.sum() + prediction.forces.sum()).backward()


def test_it_is_not_invariant_to_translation_and_ours_is(tools: Any) -> None:
    molecule = tools.scenes()["molecule"]
    moved = tools.structure(molecule.numbers, molecule.positions_angstrom + 10.0)
    torch.manual_seed(0)
    published, ours = PublishedEGNN(TINY).double(), tools.model()
    batches = [tools.join([molecule]), tools.join([moved])]
    a, b = (float(published(batch).energy.detach()) for batch in batches)
    assert abs(a - b) > 1e-3
    a, b = (float(ours(batch).energy) for batch in batches)
    assert a == pytest.approx(b, rel=1e-12)


@pytest.mark.parametrize("changes", [{"n_layers": 1}, {"shared": ()}])
def test_sizes_outside_the_algebra_are_refused(changes: dict[str, Any]) -> None:
    good = {"hidden_dim": 8, "n_layers": 3, "shared": (6,), "energy_head": (7,), "force_head": (9,)}
    with pytest.raises(ValueError, match="but must"):
        PublishedSizes(**{**good, **changes})
