"""NAS-Bench-Graph (Qin et al. 2022) as a table of one fidelity: it checks the sampler alone.

26,206 graph networks of up to four operations, trained by the benchmark's authors; the space is the 9 wirings x 9^4
operations that stand for them, of which many are the same network. Loss is 1 - validation accuracy. The benchmark holds
no joules: what stands for them is its `latency` in milliseconds, which is the energy of a thousand passes at one watt.
"""

from __future__ import annotations

import itertools

import numpy as np
from search.space import Params, Space
from search.tables import TableProblem

DATASETS = ("arxiv", "citeseer", "computers", "cora", "cs", "photo", "physics", "pubmed")


def nas_graph(dataset: str) -> TableProblem:
    """The table of one dataset, from the files of the installed package."""
    from nas_bench_graph import Arch, light_read
    from nas_bench_graph.architecture import gnn_list, link_list

    measured = light_read(dataset)
    rows: list[Params] = []
    outcomes = []
    for wiring in link_list:
        for operations in itertools.product(gnn_list, repeat=4):
            found = measured.get(Arch(list(wiring), list(operations)).valid_hash())
            if found is None:  # all four skipped
                continue
            names = {f"operation{i + 1}": operation for i, operation in enumerate(operations)}
            rows.append({"wiring": "".join(map(str, wiring)), **names})
            outcomes.append((1.0 - float(found["valid_perf"]), 1e3 * float(found["latency"])))
    space: Space = {name: {"choices": list(dict.fromkeys(row[name] for row in rows))} for name in rows[0]}
    values = np.array(outcomes)
    return TableProblem(f"nas-{dataset}", space, (1,), rows, values[:, :1, None], values[:, 1:, None])
