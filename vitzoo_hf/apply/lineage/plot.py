"""Draw a recovered forest: every tree around its root, coloured by the true trees where they are known."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from vitzoo_hf.apply.lineage.lineage import Forest
from vitzoo_hf.apply.lineage.metrics import Truth
from vitzoo_hf.report.style import INK, MUTED, STYLE, heading, short

Colour = str | tuple[float, float, float, float]
EDGES = {"right": "#9ca3af", "reversed": "#E69F00", "wrong": "#D55E00", "unknown": "#9ca3af"}


def lineage_table(forest: Forest, truth: Truth | None) -> pd.DataFrame:
    """`Forest.edges` with the columns `true_tree`, `true_parent_id` and `edge` where the truth is known.

    `edge` describes the edge to the recovered parent: right, reversed or wrong; null without such a parent.
    """
    table = forest.edges()
    if truth is None:
        return table
    ids = np.array([*forest.model_ids, None], dtype=object)
    table["true_tree"] = truth.tree
    table["true_parent_id"] = ids[truth.parent]
    kinds: list[str | None] = []
    for child, parent in enumerate(forest.parent.tolist()):
        if parent < 0:
            kinds.append(None)
        elif truth.parent[child] == parent:
            kinds.append("right")
        else:
            kinds.append("reversed" if truth.parent[parent] == child else "wrong")
    table["edge"] = kinds
    return table


@rc_context(STYLE)
def forest_figure(table: pd.DataFrame, title: str = "Recovered forest") -> Figure:
    """One panel a recovered tree: a dot is a model, a line an edge from parent to child, the root in the middle.

    Args:
        table: the result of `lineage_table`.
        title: title of the figure.
    """
    trees = list(dict.fromkeys(table["tree"]))
    columns = min(5, max(len(trees), 2))
    lines = math.ceil(len(trees) / columns)
    figure = Figure(figsize=(2.1 * columns + 0.3, 0.9 + 2.2 * lines), layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    is_known = "true_tree" in table
    count = int(table["true_tree"].max()) + 1 if is_known else 1
    # tab10 is easier to tell apart, but has only ten colours
    hues = colormaps["tab20" if count > 10 else "tab10"]
    for axes in panels:
        axes.set_axis_off()
    for axes, number in zip(panels, trees, strict=False):
        members = table[table["tree"] == number].set_index("model_id")
        colours = [hues(int(tree) % hues.N) for tree in members["true_tree"]] if is_known else [MUTED] * len(members)
        _draw_tree(axes, members, colours)
    subtitle = (
        f"{len(table)} models in {len(trees)} trees found from weights; larger dots: models found to have no parent"
    )
    if is_known:
        subtitle += f"\ncolour: the true tree, of {count}; ringed: models that truly have children"
    handles = [
        Line2D([], [], color=EDGES[kind], label=f"{kind} edge")
        for kind in EDGES
        if is_known and (table["edge"] == kind).any()
    ]
    if handles:
        figure.legend(handles=handles, loc="outside lower left", ncols=len(handles))
    heading(figure, title, subtitle)
    return figure


def _draw_tree(axes: Axes, members: pd.DataFrame, colours: Sequence[Colour]) -> None:
    """Draw one tree in a unit circle; models that no edge touches lie on the circle."""
    places = radial_places({child: parent for child, parent in members["parent_id"].items() if pd.notna(parent)})
    alone = [model_id for model_id in members.index if model_id not in places]
    for turn, model_id in enumerate(alone):
        angle = 2 * math.pi * turn / max(len(alone), 1)
        places[model_id] = (math.cos(angle), math.sin(angle)) if len(alone) > 1 else (0.0, 0.0)
    parents = set(members["true_parent_id"].dropna()) if "true_parent_id" in members else set()
    kinds = members["edge"] if "edge" in members else pd.Series("unknown", index=members.index)
    for child, parent in members["parent_id"].items():
        if pd.notna(parent):
            (x, y), (u, v) = places[child], places[parent]
            axes.plot([x, u], [y, v], color=EDGES[kinds[child]], linewidth=0.8, zorder=1)
    for (model_id, row), colour in zip(members.iterrows(), colours, strict=True):
        size = 26 if pd.notna(row["parent_id"]) else 70
        ring = INK if model_id in parents else "white"
        axes.scatter(*places[model_id], s=size, color=[colour], edgecolors=ring, linewidths=1.2, zorder=2)
    roots = members.index[members["parent_id"].isna()]
    name = short(str(roots[0]), 26) if len(roots) == 1 else f"{len(roots)} models without a parent"
    axes.set_title(name, fontsize=7.5, weight="normal")
    # room for the dots on the circle of radius 1
    axes.set(xlim=(-1.15, 1.15), ylim=(-1.15, 1.15), aspect="equal")


def radial_places(parent_of: Mapping[str, str]) -> dict[str, tuple[float, float]]:
    """Places of the nodes of a tree in the unit circle: root in the middle, leaves at equal angles, depth as radius.

    Args:
        parent_of: child -> parent.

    Example:
        >>> places = radial_places({"b": "a", "c": "a"})
        >>> places["a"], places["b"]
        ((0.0, 0.0), (1.0, 0.0))
    """
    children: dict[str, list[str]] = {}
    for child, parent in parent_of.items():
        children.setdefault(parent, []).append(child)
    roots = [node for node in children if node not in parent_of]
    depth = dict.fromkeys(roots, 0)
    order = list(roots)
    for node in order:  # grows on the way: breadth first
        for child in children.get(node, ()):
            depth[child] = depth[node] + 1
            order.append(child)
    leaves: list[str] = []
    # Depth first, by a stack rather than by recursion: a chain of parents may be longer than the recursion limit.
    waiting = list(reversed(roots))
    while waiting:
        node = waiting.pop()
        if node not in children:
            leaves.append(node)
        waiting.extend(reversed(children.get(node, [])))
    angle = {leaf: 2 * math.pi * number / len(leaves) for number, leaf in enumerate(leaves)}
    for node in reversed(order):
        if node in children:
            angle[node] = sum(angle[child] for child in children[node]) / len(children[node])
    deepest = max(depth.values(), default=1) or 1
    return {
        node: (depth[node] / deepest * math.cos(angle[node]), depth[node] / deepest * math.sin(angle[node]))
        for node in order
    }
