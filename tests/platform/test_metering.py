"""The meter of a piece of work waits for what the GPU has queued, and for nothing where there is no GPU."""

import pytest
import torch

from wattier.config import TelemetrySection
from wattier.metering import metered


@pytest.fixture
def events(monkeypatch):
    """What was waited for, and when the work was done."""
    events = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("wait"))
    return events


@pytest.mark.parametrize(
    ("on_gpu", "initialized", "expected"),
    [(True, True, ["wait", "work", "wait"]), (True, False, ["work"]), (False, True, ["work"])],
)
def test_queued_work_is_waited_for_at_both_edges(tmp_path, monkeypatch, events, on_gpu, initialized, expected):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialized)
    trace = tmp_path / "watts.csv"
    trace.write_text("time_seconds,device,power_watts\n0,GPU-0,100\n")
    telemetry = TelemetrySection(source=f"replay:{trace}")
    with metered(tmp_path / "trial", "rank0", telemetry, on_gpu=on_gpu) as (meter, _):
        events.append("work")
    assert events == expected
    assert not meter.report.warnings


def test_a_context_that_came_with_the_work_is_waited_for_at_the_end(tmp_path, monkeypatch, events):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: "work" in events)
    trace = tmp_path / "watts.csv"
    trace.write_text("time_seconds,device,power_watts\n0,GPU-0,100\n")
    with metered(tmp_path / "trial", "rank0", TelemetrySection(source=f"replay:{trace}"), on_gpu=True):
        events.append("work")
    assert events == ["work", "wait"]
