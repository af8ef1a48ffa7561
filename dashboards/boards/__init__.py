"""The Grafana dashboards, one a file, over `panels` (what a panel looks like) and `layout` (what a dashboard has).

Written for Grafana 11.6, whose types the pinned grafana-foundation-sdk holds. A joule is never the ``increase()`` of a
counter here: PromQL extrapolates, and makes 1,500 J of a true 1,200. A panel whose description says "Empty" may have
nothing to show in a healthy run; every other one must, and a test asks a real Prometheus.
"""

from boards import campaign, fleet, models, trial

BOARDS = {"campaign": campaign.build, "trial": trial.build, "fleet": fleet.build, "models": models.build}
