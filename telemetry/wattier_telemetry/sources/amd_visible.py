"""Which AMD GPUs a process may use, in the order in which HIP shows them to it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from wattier_telemetry.source import SourceUnavailable
from wattier_telemetry.sources.amd_binding import NO_UINT32, ask, entries, number, word


@dataclass(frozen=True, eq=False)
class Candidate:
    """One die as HIP sees it without any mask.

    Attributes:
        index: Position in HIP's order.
        place: Position in AMD SMI's order, which differs on some nodes.
        handles: The handles of all dies, in AMD SMI's order.
        hex_id: The hexadecimal digits behind ``GPU-`` in the UUID that ROCr prints, or None.
    """

    index: int
    place: int
    handles: list[Any]
    hex_id: str | None

    @property
    def handle(self) -> Any:
        """The die's own handle."""
        return self.handles[self.place]


def hip_order(smi: ModuleType, handles: list[Any]) -> list[Candidate]:
    """Return the dies as HIP counts them: by what ROCm 6.4 and newer tell, else by the kernel's node number."""
    told = [entries(ask(getattr(smi, "amdsmi_get_gpu_enumeration_info", None), handle)) for handle in handles]
    order = _sorted_places([number(answer.get("hip_id"), below=NO_UINT32) for answer in told])
    if order is None:
        nodes = [entries(ask(getattr(smi, "amdsmi_get_gpu_kfd_info", None), handle)) for handle in handles]
        order = _sorted_places([number(answer.get("node_id"), below=NO_UINT32) for answer in nodes])
    places = order if order is not None else list(range(len(handles)))
    found = []
    for index, place in enumerate(places):
        asic = entries(ask(smi.amdsmi_get_gpu_asic_info, handles[place]))
        uuid = word(told[place].get("hip_uuid")) or word(asic.get("asic_serial"))
        found.append(Candidate(index, place, handles, _digits(uuid) or None))
    return found


def _sorted_places(ranks: list[float | None]) -> list[int] | None:
    known = [rank for rank in ranks if rank is not None]
    if len(set(known)) < len(ranks):
        return None
    return sorted(range(len(ranks)), key=lambda place: known[place])


def _digits(uuid: str | None) -> str:
    """Return the digits of a UUID, however it is written: some releases print GPU-0xAB..., others GPU-ab..."""
    return (uuid or "").lower().removeprefix("gpu-").removeprefix("0x")


def visible(candidates: list[Candidate]) -> list[Candidate]:
    """Return what the masks leave, in their order.

    ROCr applies its mask first, and HIP counts among what that leaves; CUDA's mask stands in where HIP's is absent.

    Raises:
        SourceUnavailable: If an entry is not one of the dies, or nothing is left.
    """
    hip = "CUDA_VISIBLE_DEVICES" if os.environ.get("HIP_VISIBLE_DEVICES") is None else "HIP_VISIBLE_DEVICES"
    for variable in ("ROCR_VISIBLE_DEVICES", hip):
        mask = os.environ.get(variable)
        if mask is not None:
            candidates = _chosen(candidates, variable, mask)
    return candidates


def _chosen(candidates: list[Candidate], variable: str, mask: str) -> list[Candidate]:
    chosen: list[Candidate] = []
    for entry in filter(None, (part.strip() for part in mask.split(","))):
        if entry == "-1":  # the customary way to say "none from here on"
            break
        found = [candidate for place, candidate in enumerate(candidates) if _names(entry)(place, candidate)]
        if len(found) != 1:
            raise SourceUnavailable(
                f"{variable}='{mask}': '{entry}' is not one of the {len(candidates)} AMD GPUs; "
                "it must be an index, as 0, or a UUID, as GPU-1a2b3c4d5e6f7788"
            )
        chosen += [candidate for candidate in found if candidate not in chosen]
    if not chosen:
        raise SourceUnavailable(f"{variable}='{mask}' leaves no AMD GPU to this process")
    return chosen


def _names(entry: str) -> Callable[[int, Candidate], bool]:
    """Return whether an entry names a die: by its place among those that are left, or by how its UUID begins."""
    if entry.isdecimal():
        return lambda place, _: place == int(entry)
    digits = _digits(entry)
    is_uuid = entry.upper().startswith("GPU-") and bool(digits)
    return lambda _, candidate: is_uuid and (candidate.hex_id or "").startswith(digits)
