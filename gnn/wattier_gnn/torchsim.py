"""A released ensemble as a TorchSim model: many structures relaxed or moved in one batch.

``ts.integrate(state, WattierModel("release", source="mptrj"), ...)``. Import this module only where torch_sim is.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wattier_gnn.devices import chosen_device
from wattier_gnn.ensemble import Ensemble
from wattier_gnn.model import source_index_of
from wattier_gnn.release import load_release
from wattier_gnn.structure import Structure

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it calls torch.jit.script when it is imported
        from torch_sim.models.interface import ModelInterface
except ImportError as error:
    raise ImportError(
        f"wattier_gnn.torchsim needs torch_sim, which cannot be imported ({error}). "
        'Install it: pip install "wattier[torchsim]".'
    ) from error


class WattierModel(ModelInterface):  # type: ignore[misc]  # TorchSim is not installed where types are checked
    """Energy [eV], forces [eV/Angstrom], stress [eV/Angstrom^3] and how sure they are, of all systems of a state.

    Neighbours are found on the CPU; all else happens on the device. The numbers are those of `WattierCalculator`.

    Args:
        release: folder that ``wattier export`` made, of which every file's hash is checked; or a loaded ensemble.
        source: whose level of theory to predict at, such as ``mptrj`` (see ``Ensemble.sources``).
        device: None takes a GPU where there is one.
        dtype: of the members and of the answer; float32 or float64.
        conservative: take minus the gradient of the energy for forces, also of members that predict forces directly:
            see `WattierCalculator`.
        compute_stress: whether to say the stress, which costs members that predict forces directly a derivative.

    Raises:
        DataError: the release is damaged or newer than this version; in a calculation: a structure that no answer can
            be given for.
        ValueError: no such source, device or dtype.
    """

    def __init__(  # noqa: PLR0913
        self,
        release: Path | str | Ensemble,
        source: str,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        conservative: bool = False,
        compute_stress: bool = True,
    ) -> None:
        super().__init__()
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype is {dtype}, but must be torch.float32 or torch.float64")
        ensemble = release if isinstance(release, Ensemble) else load_release(release)
        source_index_of(ensemble.sources, source)
        self._device = chosen_device("auto" if device is None else str(device))
        self._dtype = dtype
        self._compute_forces, self._compute_stress = True, compute_stress
        self._memory_scales_with = "n_atoms_x_density"
        self.ensemble = ensemble.moved(self._device, dtype)
        self.source, self.conservative = source, conservative
        self.is_conservative = conservative or ensemble.is_conservative

    def forward(self, state: Any, **_kwargs: Any) -> dict[str, Tensor]:
        """Energy [n_systems], forces [n_atoms, 3], stress [n_systems, 3, 3], NaN of systems that do not repeat.

        Where they are known also energy_std [n_systems] and forces_std [n_atoms, 3], calibrated.

        Args:
            state: a ``SimState``, or a dictionary with its positions, cell, pbc, atomic_numbers and system_idx.
        """
        prediction = self.ensemble.predict(
            structures_of(state), self.source, stress=self._compute_stress, conservative=self.conservative
        )
        said = {"energy": prediction.energy_ev, "forces": prediction.forces_ev_per_angstrom}
        if self._compute_stress:
            said["stress"] = prediction.stress_ev_per_angstrom3
        spreads = {"energy_std": prediction.energy_std_ev, "forces_std": prediction.forces_std_ev_per_angstrom}
        said |= {name: values for name, values in spreads.items() if np.isfinite(values).all()}
        return {name: torch.as_tensor(x, dtype=self._dtype, device=self._device) for name, x in said.items()}


def structures_of(state: Any) -> list[Structure]:
    """The systems of a TorchSim state, without labels; atoms of a system lie together there, in order."""
    get = state.__getitem__ if isinstance(state, dict) else lambda name: getattr(state, name)
    positions, numbers, cells, system = (
        get(name).detach().cpu().numpy() for name in ("positions", "atomic_numbers", "cell", "system_idx")
    )
    pbc = np.broadcast_to(np.asarray(torch.as_tensor(get("pbc")).cpu(), dtype=bool), (3,)).tolist()
    bounds = np.searchsorted(system, np.arange(len(cells) + 1))
    return [
        Structure(
            numbers=numbers[a:b].astype(np.int64),
            positions_angstrom=positions[a:b].astype(np.float64),
            cell_angstrom=np.ascontiguousarray(cell.T, dtype=np.float64) if any(pbc) else None,  # columns there
            pbc=(pbc[0], pbc[1], pbc[2]),
            energy_ev=float("nan"),
            forces_ev_per_angstrom=None,
            source="",
            group="",
            key="",
        )
        for a, b, cell in zip(bounds[:-1], bounds[1:], cells, strict=True)
    ]
