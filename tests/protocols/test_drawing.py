import struct
from itertools import combinations
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from turnwise.protocols.debate import Debate, Panel
from turnwise.protocols.drawing import draw, mermaid
from turnwise.protocols.gated import Gated
from turnwise.protocols.graph import END, State, TurnGraph
from turnwise.protocols.long_short import LongShort
from turnwise.protocols.solo import Solo
from turnwise.protocols.thinkless import Thinkless

CAPPED = TurnGraph(
    seats={"a": "", "b": "", "c": ""},
    start="ask",
    states={
        "ask": State(seat=("a", "b"), then="check"),
        "check": State(seat="c", closes={"<again>": "ask", "<on>": "check"}),
    },
    max_turns=5,
)
GRAPHS = {
    "long short": LongShort().graph,
    "gated": Gated().graph,
    "debate": Debate(("ann", "bob", "cleo"), rounds=3).graph,
    "panel": Panel().graph,
    "thinkless": Thinkless().graph,
    "solo": Solo().graph,
    "capped": CAPPED,
}

LONG_SHORT = """\
flowchart LR
    start(( )) --> s0
    done((end))
    s0["think<br/>long<br/>≤ 1024 tokens"]
    s0 -- "&lt;/think&gt;, otherwise" --> s1
    s1["answer<br/>short<br/>≤ 512 tokens"]
    s1 -- "&lt;/answer&gt;, otherwise" --> done
    s1 -- "&lt;/rethink&gt;" --> s0
    s2["conclude<br/>short<br/>≤ 512 tokens"]
    s2 -- "&lt;/answer&gt;, otherwise" --> done
    cap(["at turn 6"]) -.-> s2
"""


def test_long_short_in_mermaid() -> None:
    assert mermaid(LongShort().graph) == LONG_SHORT


def test_simultaneous_seats_a_cap_without_a_final_state_and_single_exits_in_mermaid() -> None:
    assert mermaid(CAPPED).splitlines()[3:] == [
        '    s0["ask<br/>a + b<br/>≤ 1024 tokens"]',
        "    s0 --> s1",
        '    s1["check<br/>c<br/>≤ 1024 tokens"]',
        '    s1 -- "&lt;again&gt;" --> s0',
        '    s1 -- "&lt;on&gt;" --> s1',
        '    s1 -- "otherwise" --> done',
        '    cap(["after turn 5"]) -.-> done',
    ]
    assert 's0["route<br/>solver<br/>≤ 1 token"]' in mermaid(Thinkless().graph)


def test_names_are_escaped_in_mermaid() -> None:
    graph = TurnGraph(seats={'<"a">': ""}, start="x & y", states={"x & y": State(seat='<"a">')})
    assert '"x &amp; y<br/>&lt;&quot;a&quot;&gt;<br/>≤ 1024 tokens"' in mermaid(graph)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Figure]:
    """The figures that were saved."""
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, path, **more: (figures.append(figure), save(figure, path, **more))
    )
    return figures


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
class TestPicture:
    def test_it_is_a_png_of_a_size_that_a_page_can_hold(self, graph: TurnGraph, tmp_path: Path) -> None:
        draw(graph, tmp_path / "graph.png")
        data = (tmp_path / "graph.png").read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", data[16:24])
        assert 400 <= width <= 2400
        assert 100 <= height <= 1200
        assert 3_000 < len(data) < 300_000

    def test_every_state_seat_tag_and_cap_is_named(self, graph: TurnGraph, drawn: list[Figure], tmp_path: Path) -> None:
        draw(graph, str(tmp_path / "graph.png"))
        texts = [text.get_text() for text in drawn[0].axes[0].texts]
        lines = [line for text in texts for line in text.split("\n")]
        for name, state in graph.states.items():
            assert texts.count(name) == 1
            assert " + ".join(state.seats) in lines
            assert set(state.closes) <= set(lines)
        assert END in texts
        cap = f"{'at' if graph.final else 'after'} turn {graph.max_turns}"
        assert (cap in texts) == (graph.max_turns is not None)

    def test_no_text_lies_over_another_or_outside(self, graph: TurnGraph, drawn: list[Figure], tmp_path: Path) -> None:
        draw(graph, tmp_path / "graph.png")
        (figure,) = drawn
        boxes = [(text.get_text(), text.get_window_extent()) for text in figure.axes[0].texts]
        for (one, first), (other, second) in combinations(boxes, 2):
            assert not first.overlaps(second), (one, other)
        for text, box in boxes:
            assert box.x0 > 0, text
            assert box.y0 > 0, text
            assert box.x1 < figure.bbox.x1, text
            assert box.y1 < figure.bbox.y1, text


def test_simultaneous_seats_have_a_sheet_each_in_their_colours(drawn: list[Figure], tmp_path: Path) -> None:
    draw(CAPPED, tmp_path / "graph.png")
    sheets = [patch.get_facecolor() for patch in drawn[0].axes[0].patches if patch.get_zorder() == 3]
    # Start, ask for two seats, check, end, cap.
    assert len(sheets) == 6
    assert len(set(sheets)) == 6
