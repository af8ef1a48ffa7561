"""The exporter of a node, in reading order.

sampler    reads every device on a schedule (`lane`, one thread a source), sees trials come and go (`trials`)
watched    one device and its bill; `attribution` splits it among the trials; `state` keeps it over a restart
campaigns  what a driver on this node says of its campaign, and the series made of it
metrics    the one table of what is exported; `series` and `omnistat` fill it
server     who may ask (`access`), and how connections are kept in bounds (`listener`, `connection`)
serving    puts them together
"""

from wattier_telemetry.exporter.serving import (
    DEFAULT_PORT,
    Renderer,
    RunningExporter,
    ServeOptions,
    run,
    serve,
    start,
)

__all__ = ["DEFAULT_PORT", "Renderer", "RunningExporter", "ServeOptions", "run", "serve", "start"]
