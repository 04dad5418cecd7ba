"""A turn graph as a picture: Mermaid text for a README, PNG for a report."""

from itertools import pairwise
from pathlib import Path
from statistics import fmean

import networkx as nx
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path as Curve

from turnwise.protocols.graph import END, State, TurnGraph

_COLOURS = ("#8ecae6", "#ffd166", "#b7e4c7", "#e0aaff", "#ffc8dd", "#f4a261")
_LINE, _PLAIN = "#495057", "#e9ecef"
_START, _CAP = "\0start", "\0cap"  # nodes beside the states, by names that no state has
_ROW, _BOX, _MARGIN = 1.5, 0.62, 0.35  # inches, as are all lengths here


def mermaid(graph: TurnGraph) -> str:
    """The graph as a Mermaid flowchart; what the cap on turns leads to hangs on a dotted edge."""
    identifiers = {name: f"s{index}" for index, name in enumerate(graph.states)} | {END: "done"}
    lines = ["flowchart LR", f"    start(( )) --> {identifiers[graph.start]}", f"    done(({END}))"]
    for name, state in graph.states.items():
        text = "<br/>".join(_escape(line) for line in (name, *_details(state)))
        lines.append(f'    {identifiers[name]}["{text}"]')
        for target, tags in _exits(state).items():
            edge = f'-- "{_escape(", ".join(tags))}" -->' if tags else "-->"
            lines.append(f"    {identifiers[name]} {edge} {identifiers[target]}")
    if graph.max_turns:
        lines.append(f'    cap(["{_cap(graph)}"]) -.-> {identifiers[graph.final or END]}')
    return "\n".join(lines) + "\n"


def draw(graph: TurnGraph, path: str | Path) -> None:
    """Writes the graph as a PNG, left to right, with one colour a seat and the closing tags on the edges.

    Simultaneous seats lie behind each other. What leads back does so from below. What the cap on turns leads to hangs
    on a dotted edge.
    """
    layers, chains = _layers(graph)
    rows = _rows(layers, chains)
    if list(layers.values()).count(0) == 1:
        rows[_START] = rows[graph.start]
    labels = {(name, target): "\n".join(tags) for name, s in graph.states.items() for target, tags in _exits(s).items()}
    details = {name: "\n".join(_details(state)) for name, state in graph.states.items()} | {_CAP: _cap(graph)}
    widths = {name: 0.3 + max(_width(name), _width(text)) for name, text in details.items()} | {_START: 0.16, END: 0.6}

    places, x = dict[str, tuple[float, float]](), _MARGIN
    for layer in range(layers[END] + 1):
        column = [name for name in layers if layers[name] == layer]
        widest = max(widths.get(name, 0.0) for name in column)
        places |= {
            name: (x + widest / 2, _MARGIN + _BOX / 2 + (rows[name] - min(rows.values())) * _ROW) for name in column
        }
        leaving = [labels.get((chain[0], chain[-1]), "") for chain in chains if chain[0] in column]
        x += widest + 0.6 + 1.25 * max(map(_width, leaving), default=0.0)
    back = {name for chain in chains if layers[chain[0]] >= layers[chain[-1]] for name in (chain[0], chain[-1])}
    width = places[END][0] + widths[END] / 2 + _MARGIN
    height = max(y + (0.75 if name in back else 0.0) for name, (_, y) in places.items()) + _BOX / 2 + _MARGIN
    figure = Figure(figsize=(width, height), dpi=150)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0), xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()

    for chain in chains:
        ends, points = (chain[0], chain[-1]), [places[name] for name in chain]
        (x, y), (to_x, to_y) = points[0], points[-1]
        if layers[ends[0]] < layers[ends[1]]:
            points[0], points[-1] = (x + widths[ends[0]] / 2, y), (to_x - widths[ends[1]] / 2, to_y)
            curve, ((x, y), (to_x, to_y)) = Curve(points), points[:2]
            # Nearer to the source, so that the labels of two edges that cross keep apart.
            spot = (x + 0.42 * (to_x - x), y + 0.42 * (to_y - y))
        else:
            low = max(y, to_y) + _BOX / 2 + 0.6 + 0.1 * (layers[ends[0]] - layers[ends[1]])
            points = [(x - 0.2, y + _BOX / 2), (x - 0.2, low), (to_x + 0.2, low), (to_x + 0.2, to_y + _BOX / 2)]
            curve = Curve(points, [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4])
            spot = ((x + to_x) / 2, (points[0][1] + 6 * low + points[-1][1]) / 8)
        style, line = ("->", ":") if ends[0] == _CAP else ("-|>", "-")
        axes.add_patch(FancyArrowPatch(path=curve, arrowstyle=style, mutation_scale=14, color=_LINE, linestyle=line))
        if text := labels.get(ends):
            _write(axes, spot, text, 9, back="white")
    colours = {seat: _COLOURS[index % len(_COLOURS)] for index, seat in enumerate(graph.seats)}
    for name in (_START, *graph.states, END, *([_CAP] if graph.max_turns else [])):
        x, y = places[name]
        seats = graph.states[name].seats if name in graph.states else ()
        faces = [colours[seat] for seat in seats] or [{_START: _LINE, _CAP: "white"}.get(name, _PLAIN)]
        tall = 0.16 if name == _START else _BOX if seats else 0.4
        for index, face in reversed(list(enumerate(faces))):
            corner = (x - widths[name] / 2 + 0.06 * index, y - tall / 2 - 0.06 * index)
            axes.add_patch(
                FancyBboxPatch(
                    corner, widths[name], tall, boxstyle="round,pad=0,rounding_size=0.08", facecolor=face,
                    edgecolor=_LINE, linestyle=":" if name == _CAP else "-", zorder=3,
                )
            )  # fmt: skip
        if seats:
            _write(axes, (x, y - 0.19), name, 10, weight="bold")
            _write(axes, (x, y + 0.1), details[name], 8)
        elif name != _START:
            _write(axes, (x, y), details.get(name, name), 9)
    figure.savefig(path, format="png")


def _layers(graph: TurnGraph) -> tuple[dict[str, int], list[tuple[str, ...]]]:
    """The column of each node, and each edge as a chain of nodes, with one of its own in each column that it passes."""
    network = nx.DiGraph(graph.digraph())
    network.add_edge(_START, graph.start)
    order = [name for name in nx.bfs_tree(network, _START) if name != END]
    order += [graph.final] if graph.final and graph.final not in order else []
    layers = dict[str, int]()
    for name in [*order, END]:
        before = [layers[source] for source in network.predecessors(name) if source in layers]
        # What only the cap leads to stands right before the end.
        layers[name] = 1 + max(before) if before else max(layers.values(), default=0)
    if graph.max_turns:
        layers[_CAP] = layers[graph.final or END] - 1
        network.add_edge(_CAP, graph.final or END)
    chains = []
    for source, target in list(network.edges):
        passed = range(layers[source] + 1, layers[target])
        chains.append((source, *(f"\0{source}\0{target}\0{layer}" for layer in passed), target))
        layers |= dict(zip(chains[-1][1:-1], passed, strict=True))
    return layers, chains


def _rows(layers: dict[str, int], chains: list[tuple[str, ...]]) -> dict[str, float]:
    """The row of each node, from 0 in the middle: in each column in the order of the rows that lead there."""
    rows = dict[str, float]()
    for layer in range(layers[END] + 1):
        column = [name for name in layers if layers[name] == layer]
        before = {
            name: [rows[s] for chain in chains for s, t in pairwise(chain) if t == name and s in rows]
            for name in column
        }
        column.sort(key=lambda name: (not before[name], fmean(before[name] or [0.0])))
        rows |= {name: index - (len(column) - 1) / 2 for index, name in enumerate(column)}
    return rows


def _details(state: State) -> tuple[str, str]:
    return " + ".join(state.seats), f"≤ {state.max_tokens} token{'s' if state.max_tokens > 1 else ''}"


def _exits(state: State) -> dict[str, list[str]]:
    """The closing tags that lead to each state that can follow; none where a turn has but one way to go on."""
    if not state.closes:
        return {state.then: []}
    exits: dict[str, list[str]] = {}
    for tag, target in state.successors().items():
        exits.setdefault(target, []).append(tag or "otherwise")
    return exits


def _cap(graph: TurnGraph) -> str:
    return f"{'at' if graph.final else 'after'} turn {graph.max_turns}"


def _width(text: str) -> float:
    """About how wide a text is at the largest size in use."""
    return 0.087 * max(map(len, text.split("\n")))


def _write(
    axes: Axes, place: tuple[float, float], text: str, size: float, *, weight: str = "normal", back: str = "none"
) -> None:
    box = {"facecolor": back, "edgecolor": "none", "pad": 1.0}
    axes.text(*place, text, size=size, weight=weight, ha="center", va="center", bbox=box, zorder=5, parse_math=False)


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
