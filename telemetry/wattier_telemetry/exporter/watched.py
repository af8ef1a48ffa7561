"""What the sampler knows of one device: its latest reading, its account, and who is on it."""

from __future__ import annotations

from dataclasses import dataclass, field

from wattier_telemetry.account import Account
from wattier_telemetry.exporter.attribution import MICRO, Key, Ledger, Part, Split, split
from wattier_telemetry.exporter.metrics import INFO, Labels, label
from wattier_telemetry.integral import MOST_WATTS, credible
from wattier_telemetry.records import Device, Reading

_POWER_SECONDS = 0.1  # a counter's difference over less than this is mostly the counter's own steps
_NOBODY = Split({}, "whole")


@dataclass
class Watched:
    """One device under the sampler.

    Attributes:
        device: Which one.
        source: Name of the source that reads it.
        card: Position among all GPUs of the node, or None.
        account: Joules since this process started, guarded against counters that stand still or go backward.
        ledger: Who owes them.
        reading: The latest reading.
        read_at: When it was taken, on the monotonic clock.
        power_watts: Latest power, W; the mean since an earlier reading where only energy is counted.
        errors: Readings that failed.
        has_counter: Whether the device ever showed an energy counter.
        events: For each throttle reason the device knows, how often it was seen to begin.
        present: The trials that were on the device when it was last read.
        latest: How the latest step was divided.
        saved_counter: The counter as an exporter before this one left it.
        saved_split: Whom that exporter was billing.
    """

    device: Device
    source: str
    card: int | None
    account: Account
    ledger: Ledger = field(default_factory=Ledger)
    reading: Reading | None = None
    read_at: float = 0.0
    power_watts: float | None = None
    errors: int = 0
    has_counter: bool = False
    events: dict[str, int] = field(default_factory=dict)
    present: dict[Key, Part] = field(default_factory=dict)
    latest: Split = _NOBODY
    saved_counter: float | None = None
    saved_split: Split = _NOBODY
    _accounted: int = 0
    _acting: frozenset[str] = frozenset()
    _anchor: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        """Make the labels once: they are the same in every sample."""
        device = self.device
        texts = {"uuid": device.uuid, "device": device.name, "domain": device.domain, "source": self.source}
        self.labels: Labels = tuple((name, label(text)) for name, text in texts.items())
        self.uuid: Labels = self.labels[:1]
        more = (device.method, device.pci_bus_id, device.package_uuid, device.driver_version, device.vbios_version)
        names = INFO[len(self.labels) :]
        self.info: Labels = (*self.labels, *zip(names, map(label, (*more, device.serial)), strict=True))

    @property
    def billed(self) -> bool:
        """Whether its energy can be split; an estimate counts this process alone, so it cannot."""
        return self.device.method != "estimated"

    @property
    def contested(self) -> bool:
        """Whether anybody's part must be known, so that the device is worth asking about processes."""
        return self.billed and any(part.fraction < 1 or len(self.present) > 1 for part in self.present.values())

    def take(self, at: float, reading: Reading, busy: dict[int, float], roots: dict[int, int]) -> None:
        """Book a reading: power, throttling, joules and whose they are."""
        reading = credible(reading)
        self._note_power(at, reading)
        self._note_throttling(reading)
        if self.reading is None and self.saved_counter is not None and reading.energy_joules is not None:
            missed = reading.energy_joules - self.saved_counter
            if missed <= MOST_WATTS * at:  # since the machine started
                self.ledger.book(int(missed * MICRO), self.saved_split.weights)
        self.account.add(at, reading)
        self.reading, self.read_at = reading, at
        self.has_counter = self.has_counter or reading.energy_joules is not None
        if self.billed:
            self.latest = split(list(self.present.values()), busy, roots) if self.present else _NOBODY
            joules = int(self.account.joules * MICRO)
            self.ledger.book(joules - self._accounted, self.latest.weights)
            self._accounted = max(self._accounted, joules)

    def _note_power(self, at: float, reading: Reading) -> None:
        if reading.power_watts is not None:
            self.power_watts = reading.power_watts
            return
        if reading.energy_joules is None:
            self.power_watts = self._anchor = None
            return
        if self._anchor is not None:
            seconds, joules = at - self._anchor[0], reading.energy_joules - self._anchor[1]
            if seconds < _POWER_SECONDS and joules >= 0:
                return
            self.power_watts = joules / seconds if joules >= 0 else None
        self._anchor = (at, reading.energy_joules)

    def _note_throttling(self, reading: Reading) -> None:
        acting = frozenset(reading.throttle_reasons or ())
        for reason in (*acting, *(reading.throttle_seconds or {})):
            self.events.setdefault(reason, 0)
        if self.reading is not None:
            for reason in acting - self._acting:
                self.events[reason] += 1
        self._acting = acting
