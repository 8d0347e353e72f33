"""What passes over an exported graph ask about its nodes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from cet.partition.export import PREFIX

_END = torch.iinfo(torch.int64).max


def drop_identities(graph: fx.Graph) -> dict[str, fx.Node]:
    """All nodes by name, after operations that return their input as it is were taken out of the graph; their names
    then mean that input."""
    nodes: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        if _is_identity(node):
            (source,) = node.all_input_nodes
            node.replace_all_uses_with(source)
            graph.erase_node(node)
            nodes[node.name] = source
        else:
            nodes[node.name] = node
    return nodes


def _is_identity(node: fx.Node) -> bool:
    """Dropout that is off, and the slice ``[:]``."""
    if node.target is torch.ops.aten.dropout.default:
        return node.args[2] is False
    return node.target is torch.ops.aten.slice.Tensor and node.args[2:] in ((0, _END), (0, _END, 1))


def writes(node: fx.Node) -> bool:
    """Whether an operation changes one of its inputs."""
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and schema.is_mutable


def views(node: fx.Node) -> Iterator[fx.Node]:
    """A value and all that it is a view of."""
    yield node
    schema = getattr(node.target, "_schema", None)
    if node.op == "call_function" and schema is not None:
        for argument, described in zip(node.args, schema.arguments, strict=False):
            if isinstance(argument, fx.Node) and described.alias_info is not None:
                yield from views(argument)


def last_uses(body: list[fx.Node], values: list[fx.Node], kept: set[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """For each node of ``body`` the values that nothing after it uses."""
    last: dict[fx.Node, fx.Node] = {}
    for node in body:
        last[node] = node
        for argument in node.all_input_nodes:
            last[argument] = node
    dying: dict[fx.Node, list[fx.Node]] = {}
    for value in values:
        if value not in kept and value in last and value.op != "get_attr":
            dying.setdefault(last[value], []).append(value)
    return dying


def origin(node: fx.Node) -> str:
    """A value's name, and the submodule that computed it."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values() if path]
    where = paths[-1].removeprefix(PREFIX.rstrip(".")).lstrip(".") if paths else ""
    return f"value {node.name!r}" + (f" of submodule {where!r}" if where else "")
