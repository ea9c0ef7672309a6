"""Walks through the graph that autograd keeps."""

from collections.abc import Iterator, Sequence

from torch.autograd.graph import Node


def nodes_with_parents(top: Node | None) -> dict[Node, list[Node]]:
    """All nodes of a graph, each with those right above it."""
    above: dict[Node, list[Node]] = {} if top is None else {top: []}
    stack = list(above)
    while stack:
        node = stack.pop()
        for below, _ in node.next_functions:
            if below is None:
                continue
            if below not in above:
                above[below] = []
                stack.append(below)
            above[below].append(node)
    return above


def ancestors(nodes: Sequence[Node], above: dict[Node, list[Node]]) -> set[Node]:
    """Nodes from which any of the given ones can be reached by at least one step."""
    found: set[Node] = set()
    stack = list(nodes)
    while stack:
        for node in above[stack.pop()]:
            if node not in found:
                found.add(node)
                stack.append(node)
    return found


def all_nodes(root: Node | None) -> Iterator[Node]:
    """All nodes of a graph."""
    seen: set[Node] = set()
    stack = [root] if root is not None else []
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            yield node
            stack.extend(below for below, _ in node.next_functions if below is not None)


def leaves_behind(top: Node | None, node: Node) -> set[int]:
    """Ids of the leaves that functions of a node's output take, alone or changed on their own.

    Args:
        top: where the graph starts.
        node: one of its nodes.
    """
    above = nodes_with_parents(top)
    behind = ancestors([node], above) if node in above else set()
    stack = [n for parent in behind for n, _ in parent.next_functions if n is not None]
    seen = behind | {node}
    found: set[int] = set()
    while stack:
        below = stack.pop()
        if below in seen:
            continue
        seen.add(below)
        variable = getattr(below, "variable", None)
        if variable is not None:
            found.add(id(variable))
        if len(below.next_functions) == 1:  # transposed, conjugated: not made of data as well
            stack.extend(n for n, _ in below.next_functions if n is not None)
    return found
