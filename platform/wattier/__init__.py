"""Wattier finds which graph foundation model to train, and what it will cost in joules before the money is spent.

Read in this order: `config`, `run`, `search`, `ray_backend`, `trial`, `select`.
"""
