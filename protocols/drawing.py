"""A turn graph as a picture: Mermaid text for a README, PNG for a report."""

from pathlib import Path

import networkx as nx
from matplotlib.figure import Figure

from turnwise.protocols.graph import END, TurnGraph

_COLOURS = ("#8ecae6", "#ffb703", "#b7e4c7", "#e0aaff", "#ffc8dd", "#ced4da")


def mermaid(graph: TurnGraph) -> str:
    """The graph as a Mermaid flowchart; the turn forced at the cap hangs on a dotted edge."""
    identifiers = {name: f"s{index}" for index, name in enumerate(graph.states)} | {END: "done"}
    lines = ["flowchart LR", f"    start(( )) --> {identifiers[graph.start]}", f"    done(({END}))"]
    for name, state in graph.states.items():
        seats, budget = " + ".join(state.seats), f"≤ {state.max_tokens} tokens"
        lines.append(f'    {identifiers[name]}["{_escape(name)}<br/>{_escape(seats)}, {budget}"]')
        targets: dict[str, list[str]] = {}
        for tag, target in state.successors().items():
            targets.setdefault(target, []).append(tag or "otherwise")
        for target, tags in targets.items():
            lines.append(f'    {identifiers[name]} -- "{_escape(", ".join(tags))}" --> {identifiers[target]}')
    if graph.final:
        lines.append(f'    cap(("turn {graph.max_turns}")) -.-> {identifiers[graph.final]}')
    return "\n".join(lines) + "\n"


def draw(graph: TurnGraph, path: str | Path) -> None:
    """Writes the graph as a PNG: one colour a seat, closing tags on the edges, left to right from the first state."""
    network = graph.digraph()
    depths: dict[str, int] = nx.single_source_shortest_path_length(network, graph.start)
    last = 1 + max(depth for name, depth in depths.items() if name != END)
    for name in network:
        # What only the cap leads to stands right before the end.
        network.nodes[name]["layer"] = last if name == END else depths.get(name, last - 1)
    places = nx.multipartite_layout(network, subset_key="layer", scale=2.0)
    colours = {seat: _COLOURS[index % len(_COLOURS)] for index, seat in enumerate(graph.seats)}
    figure = Figure(figsize=(3 + 2.6 * last, 2 + 0.9 * len(graph.states)), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for source, target in {(source, target) for source, target, _ in network.edges}:
        tags = [data["tag"] or "otherwise" for data in network.get_edge_data(source, target).values()]
        curve = "arc3,rad=0.25" if network.has_edge(target, source) or source == target else "arc3,rad=0.06"
        simple = nx.DiGraph([(source, target)])
        nx.draw_networkx_edges(
            simple, places, ax=axes, arrowsize=18, node_size=5200, connectionstyle=curve, edge_color="#495057",
        )  # fmt: skip
        nx.draw_networkx_edge_labels(
            simple, places, {(source, target): "\n".join(tags)}, ax=axes, font_size=9, connectionstyle=curve,
        )  # fmt: skip
    for name in network:
        seats = graph.states[name].seats if name != END else ()
        label = name if name == END else f"{name}\n{' + '.join(seats)}" + ("\n(at the cap)" if name == graph.final else "")
        face = colours[seats[0]] if seats else "#dee2e6"
        axes.annotate(
            label, places[name], ha="center", va="center", fontsize=11, zorder=5,
            bbox={"boxstyle": "round,pad=0.6", "facecolor": face, "edgecolor": "#495057"},
        )  # fmt: skip
    axes.margins(0.25)
    axes.set_axis_off()
    figure.savefig(path)


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
