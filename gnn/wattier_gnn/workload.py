"""How much work a model makes of structures, by arithmetic: nothing is built and nothing runs.

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


class Rate(NamedTuple):
    """Work in proportion to atoms and to directed edges."""

    per_atom: float
    per_edge: float

    def of(self, atoms: float, edges: float) -> float:
        """The work of so many; both may be means over many structures."""
        return self.per_atom * atoms + self.per_edge * edges


class Work(NamedTuple):
    """The work that a model makes.

    Attributes:
        training_flops: of a forward pass, the forces and the gradient of the loss.
        inference_flops: of energy and forces.
        training_bytes, inference_bytes: read and written by operators.
        training_operations, inference_operations: operators of one step of one rank.
        parameters: trainable numbers.
    """

    training_flops: Rate
    inference_flops: Rate
    training_bytes: Rate
    inference_bytes: Rate
    training_operations: float
    inference_operations: float
    parameters: int


class _Product(NamedTuple):
    """A linear layer, on atoms or edges, that a model has so many times.

    moving: its input depends on positions. learned: its input depends on weights. in_layer: it is within a layer of
    the encoder, which may be recomputed.
    """

    times: int
    n_in: int
    n_out: int
    on_edges: bool
    moving: bool = True
    learned: bool = True
    in_layer: bool = True


def model_work(config: ModelConfig, edges_in_step: float = 0.0) -> Work:
    """Work of a model, by its config alone.

    edges_in_step: of a step of one rank, which decides the number of chunks where `edge_chunk` is set.
    """
    flops, moved = {True: [0.0, 0.0], False: [0.0, 0.0]}, {True: [0.0, 0.0], False: [0.0, 0.0]}
    for p in _products(config):
        multiplied, touched = 2.0 * p.times * p.n_in * p.n_out, FLOAT_BYTES * p.times * (p.n_in + p.n_out)
        for training, repeats in zip((True, False), _repeats(config, p), strict=True):
            flops[training][p.on_edges] += repeats * multiplied
            moved[training][p.on_edges] += repeats * touched
    for training, sums in moved.items():
        per_atom, per_edge = _other_bytes(config, training=training)
        sums[0], sums[1] = sums[0] + per_atom, sums[1] + per_edge
    return Work(
        Rate(*flops[True]),
        Rate(*flops[False]),
        Rate(*moved[True]),
        Rate(*moved[False]),
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
        return (5, 2) if again else (2 + int(p.learned), 1)
    # Forces are a derivative, whose own derivative takes each of these products twice more.
    return (12, 3) if again else (6, 2)


def _is_chunked(config: ModelConfig) -> bool:
    return config.edge_chunk is not None and config.family == "egnn"


def _other_bytes(config: ModelConfig, *, training: bool) -> tuple[float, float]:
    """Bytes moved by what is no product, for an atom and for an edge."""
    mode = "conservative" if config.forces == "conservative" else "vector"
    layer_edge, layer_atom, readout, radial, once = _BYTES[config.family, mode, training]
    h, layers = config.hidden_dim, float(config.n_layers)
    if config.activation_checkpointing or _is_chunked(config):
        layers *= _AGAIN[mode, training]
    per_edge = layers * (layer_edge * h + radial * config.n_radial) + readout * h + once
    if config.forces == "direct":
        per_edge += _DIRECT_BYTES[training]
    return FLOAT_BYTES * layers * layer_atom * h, FLOAT_BYTES * per_edge


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
    heads = n_heads * (head + head_layer * config.n_head_layers)
    if config.energy_variance:  # no derivative is taken of its first derivative, as with forces that are no gradient
        n_deviations = 1 if config.energy_heads == "shared" else len(config.sources)
        _, head, head_layer, _ = _OPERATIONS[config.family, "vector", training]
        heads += n_deviations * (head + head_layer * config.n_head_layers)
    return layers + heads + rest


def _products(config: ModelConfig) -> Iterator[_Product]:
    yield from _egnn_layers(config) if config.family == "egnn" else _geometric_layers(config)
    if config.forces != "conservative":
        yield from _force_head(config)
    widths = [config.hidden_dim, *[config.head_dim] * config.n_head_layers]
    for a, b in itertools.pairwise(widths):  # an atom goes through the head of its source
        yield _Product(2 if config.energy_heads == "both" else 1, a, b, False, in_layer=False)
    if config.energy_variance:  # reads what the encoder found, and teaches it nothing
        for k, (a, b) in enumerate(itertools.pairwise(widths)):
            yield _Product(1, a, b, False, moving=False, learned=k > 0, in_layer=False)


def _egnn_layers(config: ModelConfig) -> Iterator[_Product]:
    h, r, n = config.hidden_dim, config.n_radial, config.n_layers
    # What the first layer is given does not depend on positions, nor its edge vectors on weights.
    yield _Product(2, h, h, False, moving=False)
    yield _Product(1, r, h, True, learned=False)
    if n > 1:
        yield _Product(2 * (n - 1), h, h, False)
        yield _Product(n - 1, r, h, True)
        yield _Product(n - 1, h, h, True)  # coordinates
    yield _Product(n, h, h, True)
    yield _Product(n, 2 * h, h, False)
    yield _Product(n, h, h, False)


def _geometric_layers(config: ModelConfig) -> Iterator[_Product]:
    h, n = config.hidden_dim, config.n_layers
    yield _Product(n, config.n_radial, h, True, learned=False)
    if config.family == "schnet":
        yield _Product(n, h, h, True)
        yield _Product(1, h, h, False, moving=False)
        yield _Product(n - 1, h, h, False)
        yield _Product(2 * n, h, h, False)
    else:
        yield _Product(n, 3 * h, h, True)
        yield _Product(n, (PNA_COLUMNS + 1) * h, h, False)
        yield _Product(n, h, h, False)


def _force_head(config: ModelConfig) -> Iterator[_Product]:
    h, own_messages = config.hidden_dim, config.family == "egnn"
    if not own_messages:
        yield _Product(2, h, h, False, in_layer=False)
        yield _Product(1, config.n_radial, h, True, learned=False, in_layer=False)
    yield _Product(1, h, h, True, in_layer=own_messages)  # within the last layer
    if config.forces == "direct":
        yield _Product(1, h, N_DIRECTIONS, True, in_layer=own_messages)
        yield _Product(1, h + 3 * N_DIRECTIONS, config.head_dim, False, in_layer=False)
        yield _Product(1, config.head_dim, 3, False, in_layer=False)


def n_parameters(config: ModelConfig) -> int:
    """Number of trainable parameters of the model of a config."""
    h, r, d = config.hidden_dim, config.n_radial, config.head_dim
    n_heads = 1 if config.energy_heads == "shared" else len(config.sources)
    widths = [h, *[d] * config.n_head_layers]
    head = sum((a + 1) * b for a, b in itertools.pairwise(widths)) + widths[-1]
    total = N_ELEMENTS * h + head * (n_heads * (1 + int(config.energy_variance)) + int(config.energy_heads == "both"))
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
