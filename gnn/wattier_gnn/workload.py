"""How much work a model makes of a structure, by arithmetic: nothing is built and nothing runs.

Products are counted as ``torch.utils.flop_counter`` does, two operations a multiplication and addition, from the shapes
of all linear layers; a test holds them to it. Bytes are those that operators read and write, of which only the order is
known: products move their operands, and each layer's other operators go over its tensors so many times.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from wattier_gnn.heads import N_DIRECTIONS
from wattier_gnn.model import ModelConfig

N_ELEMENTS = 119
PNA_COLUMNS = 16  # four aggregators times four scalers
FLOAT_BYTES = 4
# Fitted to operators counted on built models (family, force mode, training or inference), which the test counts anew:
# bytes: how often what is no product goes over [E, H] and [N, H] of each layer, [E, H] of the readout, [E, n_radial]
# of each layer and [E] once. operations: of a layer, of an energy head, of a layer of a head, of all else.
_BYTES = {
    ("egnn", "vector", True): (33.4, 127.0, 0.0, 38.0, 0.0),
    ("egnn", "vector", False): (13.5, 30.0, 0.0, 12.0, 190.0),
    ("egnn", "conservative", True): (125.0, 305.0, 0.0, 224.0, 0.0),
    ("egnn", "conservative", False): (28.2, 57.0, 0.0, 55.0, 0.0),
    ("schnet", "vector", True): (32.5, 130.0, 17.0, 4.0, 140.0),
    ("schnet", "vector", False): (13.0, 25.0, 11.0, 3.0, 207.0),
    ("schnet", "conservative", True): (115.0, 271.0, 0.0, 52.0, 620.0),
    ("schnet", "conservative", False): (31.6, 45.0, 0.0, 14.0, 277.0),
    ("pna", "vector", True): (121.0, 454.0, 17.0, 5.0, 121.0),
    ("pna", "vector", False): (40.0, 166.0, 10.0, 3.0, 224.0),
    ("pna", "conservative", True): (264.0, 1304.0, 0.0, 59.0, 8.0),
    ("pna", "conservative", False): (117.0, 351.0, 0.0, 13.0, 280.0),
}
_DIRECT_BYTES = {True: 300.0, False: 110.0}  # on [E], beside those of vector forces
_OPERATIONS = {
    ("egnn", "vector", True): (111.0, 13.1, 10.3, 12.0),
    ("egnn", "vector", False): (38.7, 6.4, 2.7, 37.0),
    ("egnn", "conservative", True): (350.0, 31.5, 30.9, 0.0),
    ("egnn", "conservative", False): (106.0, 11.3, 4.6, 13.0),
    ("schnet", "vector", True): (42.0, 14.6, 10.5, 93.0),
    ("schnet", "vector", False): (19.7, 6.5, 2.7, 65.0),
    ("schnet", "conservative", True): (140.0, 23.6, 32.3, 197.0),
    ("schnet", "conservative", False): (43.5, 11.4, 4.5, 76.0),
    ("pna", "vector", True): (140.0, 14.6, 10.5, 93.0),
    ("pna", "vector", False): (63.7, 6.4, 2.7, 64.0),
    ("pna", "conservative", True): (314.0, 23.5, 32.4, 195.0),
    ("pna", "conservative", False): (134.0, 11.3, 4.6, 74.0),
}
_DIRECT_OPERATIONS = {True: 12.0, False: 4.0}
# What recomputation adds to all that is no product, in training and in inference, by force mode.
_AGAIN = {("vector", True): 1.4, ("vector", False): 1.0, ("conservative", True): 1.85, ("conservative", False): 1.4}


class Work(NamedTuple):
    """The work of one structure, of a training step and of the model.

    Attributes:
        training_flops: of a forward pass, the forces and the gradient of the loss.
        inference_flops: of energy and forces.
        training_bytes, inference_bytes: read and written by operators.
        training_operations, inference_operations: operators of one step, whatever it holds; edge chunks aside.
        parameters: trainable numbers.
    """

    training_flops: float
    inference_flops: float
    training_bytes: float
    inference_bytes: float
    training_operations: float
    inference_operations: float
    parameters: int


class _Product(NamedTuple):
    """A linear layer on `rows` rows; moving: its input depends on positions; learned: on weights before it."""

    rows: float
    n_in: int
    n_out: int
    moving: bool = True
    learned: bool = True
    in_layer: bool = True
    on_edges: bool = False


def model_work(config: ModelConfig, atoms: float, edges: float, edges_in_step: float = 0.0) -> Work:
    """Work of one structure of so many atoms and directed edges; both may be means over many structures.

    edges_in_step: of a whole step of one rank, which decides the number of chunks where `edge_chunk` is set.
    """
    training_flops = inference_flops = training_bytes = inference_bytes = 0.0
    for p in _products(config, atoms, edges):
        trained, inferred = _repeats(config, p)
        flops = 2.0 * p.rows * p.n_in * p.n_out
        moved = FLOAT_BYTES * p.rows * (p.n_in + p.n_out)
        training_flops += trained * flops
        inference_flops += inferred * flops
        training_bytes += trained * moved
        inference_bytes += inferred * moved
    return Work(
        training_flops,
        inference_flops,
        training_bytes + _other_bytes(config, atoms, edges, training=True),
        inference_bytes + _other_bytes(config, atoms, edges, training=False),
        _operations(config, edges_in_step, training=True),
        _operations(config, edges_in_step, training=False),
        n_parameters(config),
    )


def _repeats(config: ModelConfig, p: _Product) -> tuple[int, int]:
    """How often a product is made in training and in inference: of a linear layer, of its input and of its weights."""
    again = p.in_layer and (config.activation_checkpointing or (_is_chunked(config) and p.on_edges))
    if config.forces != "conservative":
        return 2 + int(p.learned) + int(again), 1
    if not p.moving:
        return (5, 2) if again else (3, 1)
    # Forces are a derivative, whose own derivative takes each of these products twice more.
    return (12, 3) if again else (6, 2)


def _is_chunked(config: ModelConfig) -> bool:
    return config.edge_chunk is not None and config.family == "egnn"


def _other_bytes(config: ModelConfig, atoms: float, edges: float, *, training: bool) -> float:
    """Bytes moved by what is no product."""
    mode = "conservative" if config.forces == "conservative" else "vector"
    layer_edges, layer_atoms, readout, radial, once = _BYTES[config.family, mode, training]
    h = config.hidden_dim
    numbers = config.n_layers * (layer_edges * edges * h + layer_atoms * atoms * h + radial * edges * config.n_radial)
    if config.activation_checkpointing or _is_chunked(config):
        numbers *= _AGAIN[mode, training]
    numbers += readout * edges * h + once * edges
    if config.forces == "direct":
        numbers += _DIRECT_BYTES[training] * edges
    return FLOAT_BYTES * numbers


def _operations(config: ModelConfig, edges_in_step: float, *, training: bool) -> float:
    """Operators of a step of one rank."""
    mode = "conservative" if config.forces == "conservative" else "vector"
    layer, head, head_layer, once = _OPERATIONS[config.family, mode, training]
    n_heads = (1 if config.energy_heads == "shared" else len(config.sources)) + int(config.energy_heads == "both")
    layers = layer * config.n_layers
    if config.activation_checkpointing or _is_chunked(config):
        layers *= _AGAIN[mode, training]
    if _is_chunked(config) and config.edge_chunk:
        layers *= max(1.0, 0.75 * edges_in_step / config.edge_chunk)  # a part of a layer works on atoms, once
    rest = once + (_DIRECT_OPERATIONS[training] if config.forces == "direct" else 0.0)
    return layers + n_heads * (head + head_layer * config.n_head_layers) + rest


def _products(config: ModelConfig, atoms: float, edges: float) -> Iterator[_Product]:
    h = config.hidden_dim
    for layer in range(config.n_layers):
        yield from _layer(config, atoms, edges, layer)
    yield from _force_head(config, atoms, edges)
    widths = [h, *[config.head_dim] * config.n_head_layers]
    for _ in range(2 if config.energy_heads == "both" else 1):
        for a, b in itertools.pairwise(widths):
            yield _Product(atoms, a, b, in_layer=False)


def _layer(config: ModelConfig, atoms: float, edges: float, layer: int) -> Iterator[_Product]:
    h, r, first = config.hidden_dim, config.n_radial, layer == 0
    if config.family == "egnn":
        # From the second layer on, positions depend on weights.
        yield _Product(atoms, h, h, moving=not first)
        yield _Product(atoms, h, h, moving=not first)
        yield _Product(edges, r, h, learned=not first, on_edges=True)
        yield _Product(edges, h, h, on_edges=True)
        yield _Product(atoms, 2 * h, h)
        yield _Product(atoms, h, h)
        if layer < config.n_layers - 1:
            yield _Product(edges, h, h, on_edges=True)
    elif config.family == "schnet":
        yield _Product(edges, r, h, learned=False)
        yield _Product(edges, h, h)
        yield _Product(atoms, h, h, moving=not first)
        yield _Product(atoms, h, h)
        yield _Product(atoms, h, h)
    else:
        yield _Product(edges, r, h, learned=False)
        yield _Product(edges, 3 * h, h)
        yield _Product(atoms, (PNA_COLUMNS + 1) * h, h)
        yield _Product(atoms, h, h)


def _force_head(config: ModelConfig, atoms: float, edges: float) -> Iterator[_Product]:
    if config.forces == "conservative":
        return
    h = config.hidden_dim
    if config.family != "egnn":  # messages of their own
        yield _Product(atoms, h, h, in_layer=False)
        yield _Product(atoms, h, h, in_layer=False)
        yield _Product(edges, config.n_radial, h, learned=False, in_layer=False)
    in_layer = config.family == "egnn"  # the last layer applies it to its messages
    yield _Product(edges, h, h, in_layer=in_layer, on_edges=True)
    if config.forces == "direct":
        yield _Product(edges, h, N_DIRECTIONS, in_layer=in_layer, on_edges=True)
        yield _Product(atoms, h + 3 * N_DIRECTIONS, config.head_dim, in_layer=False)
        yield _Product(atoms, config.head_dim, 3, in_layer=False)


def n_parameters(config: ModelConfig) -> int:
    """Number of trainable parameters of the model of a config."""
    h, r, d = config.hidden_dim, config.n_radial, config.head_dim
    n_heads = 1 if config.energy_heads == "shared" else len(config.sources)
    widths = [h, *[d] * config.n_head_layers]
    head = sum((a + 1) * b for a, b in itertools.pairwise(widths)) + widths[-1]
    total = N_ELEMENTS * h + head * (n_heads + int(config.energy_heads == "both"))
    if config.family == "egnn":
        layer = (h + 1) * h + h * h + r * h + (h + 1) * h + (2 * h + 1) * h + (h + 1) * h
        total += config.n_layers * layer + (config.n_layers - 1) * ((h + 1) * h + h)
    elif config.family == "schnet":
        total += config.n_layers * ((r + 1) * h + (h + 1) * h + h * h + (h + 1) * h + (h + 1) * h)
    else:
        post = (PNA_COLUMNS + 1) * h
        total += config.n_layers * ((r + 1) * h + (3 * h + 1) * h + (post + 1) * h + (h + 1) * h)
    if config.forces != "conservative":
        total += (h + 1) * h
        if config.family != "egnn":
            total += (h + 1) * h + h * h + r * h
        if config.forces == "vector":
            total += h
        else:
            total += h * N_DIRECTIONS + (h + 3 * N_DIRECTIONS + 1) * d + (d + 1) * 3
    return total
