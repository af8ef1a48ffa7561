"""Samples that are pushed, and never lost: `sink` takes them, `spool` keeps them in `segment` files, `sender` and
`remote_write` bring them to Prometheus or VictoriaMetrics, oldest first.
"""

from wattier_telemetry.push.sink import PUSH_METRICS, PushSink

__all__ = ["PUSH_METRICS", "PushSink"]
