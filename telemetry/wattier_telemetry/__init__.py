"""Energy of a piece of work, measured on any node: no torch, no Ray, no configuration.

    from wattier_telemetry import EnergyMeter, bill, open_source

    source = open_source()                      # NVIDIA, AMD, RAPL, or an estimate that says so
    with EnergyMeter(source, journal=folder / "rank0.energy.json") as meter:
        train()
    meter.report.joules, meter.report.method    # None = nothing could be measured; never a silent 0

A process that was killed left its journal behind: ``bill(folder)`` adds up all attempts, ranks and nodes, and counts
no share twice. ``wattier-telemetry doctor`` says what this machine can measure; ``serve`` shows it to Prometheus.
"""

from wattier_telemetry.doctor import Finding, diagnose
from wattier_telemetry.journal import bill, read_journal
from wattier_telemetry.meter import EnergyMeter
from wattier_telemetry.records import Device, Domain, EnergyReport, Method, Reading, Share
from wattier_telemetry.registration import TrialRegistration, read_registrations
from wattier_telemetry.source import PowerSource, SourceUnavailable, open_source

__all__ = [
    "Device",
    "Domain",
    "EnergyMeter",
    "EnergyReport",
    "Finding",
    "Method",
    "PowerSource",
    "Reading",
    "Share",
    "SourceUnavailable",
    "TrialRegistration",
    "bill",
    "diagnose",
    "open_source",
    "read_journal",
    "read_registrations",
]
