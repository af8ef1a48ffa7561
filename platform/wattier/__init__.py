"""Wattier finds which graph foundation model to train, and what it will cost in joules before the money is spent.

Read in this order: `config`, `run`, `funnel`, `policy`, `trial`, `select`. A search over a model of your own is
``wattier.search(space, run_trial, stages)``, see `own_model`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wattier.api import Found, search

__all__ = ["Found", "search"]


def __getattr__(name: str) -> Any:
    """Import what a script asks for when it asks: the command and the workers need little of it."""
    if name in __all__:
        from wattier import api

        return getattr(api, name)
    raise AttributeError(f"module 'wattier' has no attribute {name!r}")
