"""Where power comes from, one file a vendor; `wattier_telemetry.source` opens them by name."""
