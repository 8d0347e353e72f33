"""Takes the graph of all segments apart, and puts each weight where ONNX Runtime wants it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import onnx_ir as ir

from cet.deploy.onnx_nodes import Value, Weights
from cet.deploy.segments import SegmentModule

_SMALL = 64
"""Bytes."""


class Part(NamedTuple):
    """The part of a graph that is one segment."""

    inputs: list[Value]
    nodes: list[ir.Node]
    outputs: list[Value]


def split(graph: ir.Graph, segments: Sequence[SegmentModule], num_sized: int, is_chain: bool = False) -> list[Part]:
    """The segments in a graph; what several of them compute from weights alone belongs to the first of them, which
    stands around the others, in a chain to the first of all, which alone does."""
    inputs, outputs = iter(graph.inputs), iter(graph.outputs)
    parts: list[Part] = []
    owner: dict[ir.Node, int] = {}
    for depth, segment in enumerate(segments):
        taken, made = own_values(segment, num_sized, inputs, outputs)
        own = Part(taken, [], made)
        pending, reached = [value.producer() for value in own.outputs], set[ir.Node]()
        while pending:
            node = pending.pop()
            if node is not None and node not in reached:
                reached.add(node)
                pending += [value.producer() for value in _read_by(node)]
        for node in reached:
            owner[node] = 0 if is_chain and node in owner else owner.get(node, depth)
        parts.append(own)
    for node in graph:
        if node in owner:
            parts[owner[node]].nodes.append(node)
    return parts


def own_values(
    segment: SegmentModule, num_sized: int, inputs: Iterator[Value], outputs: Iterator[Value]
) -> tuple[list[Value], list[Value]]:
    """The next inputs and outputs of a graph of all segments, which are those of this one."""
    made = [kind for kind, _ in segment.handed_on if kind == "made"]
    taken = [next(inputs) for _ in range(num_sized + len(segment.taken_row_dims))]
    return taken, [next(outputs) for _ in ("logits", *made)]


def num_bytes(part: Part, weights: set[Value]) -> int:
    """Of the weights that a segment reads."""
    read = {value for node in part.nodes for value in _read_by(node)} & weights
    return sum(weight.const_value.nbytes for weight in read if weight.const_value is not None)


def place_weights(graph: ir.Graph, weights: Weights, is_chain: bool) -> None:
    """Hold each weight of a model in one graph, its own or that of a branch, but for small ones, of which each branch
    has its own.

    Args:
        graph: the outermost.
        weights: of the model.
        is_chain: whether its branches stand one behind the other.
    """
    for branch in _branches(graph):
        _own_small_weights(branch, weights)
    _place(graph, set(weights.values), is_chain)


def _own_small_weights(branch: ir.Graph, weights: Weights) -> None:
    """Give a branch, and those within it, a copy of each small weight that it reads. ONNX Runtime fuses int8 nodes only
    where zero points are the branch's own, and to read from around a branch costs at each call."""
    shared, own = set(weights.values), dict[Value, Value]()
    for node in branch:
        for index, value in enumerate(node.inputs):
            if value in shared and not _is_large(value):
                if value not in own:
                    own[value] = weights.copy(value)
                node.replace_input_with(index, own[value])
    for inner in _branches(branch):
        _own_small_weights(inner, weights)


def _place(graph: ir.Graph, weights: set[Value], is_chain: bool) -> None:
    """Put each weight into the innermost branch that reads it: reading from around a branch costs at each call. In a
    chain the large ones stay around the branches, where there is one of each; ONNX Runtime lays out for its kernels
    those of a branch and of the graph around it."""
    branches = list(_branches(graph))
    read_in = [{value for node in branch for value in _read_by(node)} & weights for branch in branches]
    here = {value for node in graph for value in node.inputs if value in weights}
    here |= {value for value in graph.outputs if value in weights}
    here |= {value for a, b in itertools.combinations(read_in, 2) for value in a & b}
    if is_chain:
        here |= {value for read in read_in for value in read if _is_large(value)}
    for value in sorted(here, key=lambda value: value.name or ""):
        graph.register_initializer(value)
    for branch, read in zip(branches, read_in, strict=True):
        _place(branch, read - here, False)


def _is_large(weight: Value) -> bool:
    assert weight.const_value is not None
    return weight.const_value.nbytes > _SMALL


def _branches(graph: ir.Graph) -> Iterator[ir.Graph]:
    for node in graph:
        yield from (a.as_graph() for a in node.attributes.values() if a.type is ir.AttributeType.GRAPH)


def _read_by(node: ir.Node) -> Iterator[Value]:
    """What a node reads, in its own branches too."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if attribute.type is ir.AttributeType.GRAPH:
            for inner in attribute.as_graph():
                yield from _read_by(inner)
