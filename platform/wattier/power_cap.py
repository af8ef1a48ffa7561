"""The power cap of a trial: each rank sets it on the GPU that is its own, and it is put back whatever happens.

`wattier_telemetry.power_cap` does both; here is which GPU and what ratio, and what a run must be told of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

from wattier.config import RunConfig
from wattier.config_combinations import reached
from wattier.errors import UserError
from wattier.records import Params
from wattier.rundir import read_json, write_json
from wattier_telemetry import EnergyReport, bill
from wattier_telemetry.power_cap import PowerCap, check_caps
from wattier_telemetry.power_limit import PowerCapError, open_limiter


def cap_ratio(config: RunConfig, params: Params) -> float | None:
    """The cap of a trial, as a part of the default limit of its GPUs; None = their limits are left alone."""
    ratio = params.get("power_cap_ratio", config.training.power_cap_ratio)
    return None if ratio is None else float(ratio)


@contextmanager
def power_capped(folder: Path, rank: int, gpus: float, ratio: float | None) -> Iterator[Callable[[], None]]:
    """Cap the GPU of a rank for the length of the block; yields what ends the cap earlier.

    Ended so, it leaves ``attempt<n>-rank<r>.power_cap.json`` in the trial's folder: which GPU, the watts in force and
    before, and a remark where the cap did not last.

    Raises:
        PowerCapError: it cannot be set, or not put back.
    """
    if ratio is None:
        yield lambda: None
        return
    if gpus < 1:
        raise PowerCapError(
            f"rank {rank} has {gpus:g} of a GPU, but a power limit acts on all who share one. Give each rank a whole "
            "GPU (resources.gpus_per_rank), or remove power_cap_ratio"
        )
    with closing(open_limiter()) as limiter:
        devices = limiter.devices()
    # The launcher narrows the view of each rank to its GPU, or shows all of them to all ranks of the trial.
    with PowerCap(devices[rank % len(devices)].uuid, ratio) as cap:

        def uncap() -> None:
            done = cap.release()
            number = 1 + len(list(folder.glob(f"*rank{rank}.power_cap.json")))
            write_json(
                folder / f"attempt{number}-rank{rank}.power_cap.json",
                {
                    "device_uuid": cap.uuid,
                    "power_cap_ratio": ratio,
                    "power_cap_watts": cap.watts,
                    "before_watts": cap.before_watts,
                    "afterwards": done.text if done else None,
                    "remark": cap.remark,
                },
            )

        yield uncap


def bill_with_remarks(folder: Path) -> EnergyReport:
    """The bill of a trial, with a warning where a cap did not last: its joules are not those of the cap."""
    energy = bill(folder)
    remarks = [read_json(path).get("remark") for path in sorted(folder.glob("*.power_cap.json"))]
    return replace(energy, warnings=tuple(dict.fromkeys([*energy.warnings, *filter(None, remarks)])))


def check_power_caps(config: RunConfig) -> None:
    """Refuse caps that no trial on this machine could have.

    Raises:
        UserError: no GPU, no permission, a cap out of a GPU's range, or more ranks than GPUs.
    """
    ratios = [float(ratio) for ratio in reached(config, "power_cap_ratio") if ratio is not None]
    if not ratios:
        return
    try:
        devices = check_caps(ratios)
    except PowerCapError as error:
        raise UserError(f"power_cap_ratio: {error}.") from error
    ranks = max([config.full_training.ranks, *(stage.ranks for stage in config.search.stages)])
    if ranks > len(devices):
        raise UserError(
            f"power_cap_ratio: a trial has up to {ranks} ranks, but this machine has {len(devices)} GPUs, and a power "
            "limit acts on all who share one. Lower ranks, or remove power_cap_ratio."
        )
