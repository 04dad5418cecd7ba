"""The figures behind the plots and tables, and text that must not be taken for more than text."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib import colormaps, rc_context
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich.console import Console
from rich.table import Table

from turnwise.analysis.thoughts import (
    chain_picture,
    kinds,
    savings,
    scores_by_position,
    success_by_thoughts,
    thought_statistics,
)
from turnwise.environments.errors import InputError
from turnwise.environments.problem import Problem
from turnwise.rl.cold_start.thoughts import Chain, Thought, WeighedChain
from turnwise.rl.summary import wilson

KINDS = ("problem understanding", "calculation", "verification", "final answer")


def weighed(
    lengths: Sequence[int],
    right: Sequence[int],
    scores: Sequence[float],
    long: str,
    *,
    drawn: int | Sequence[int] = 4,
    tokens: Sequence[float] = (),
    errors: float = 0.5,
    texts: Sequence[str] = (),
    name: str = "p",
) -> WeighedChain:
    """`long` is such as "LssL"."""
    thoughts = [
        Thought(texts[i] if texts else f"thought {i + 1}", texts[i] if texts else KINDS[i % 4], length)
        for i, length in enumerate(lengths)
    ]
    return WeighedChain(
        Chain(Problem(name, "What is 1 + 1?", "2"), tuple(thoughts)),
        tuple(right),
        (drawn,) * len(right) if isinstance(drawn, int) else tuple(drawn),
        tuple(tokens or [10.0] * len(right)),
        tuple(scores),
        (errors,) * len(lengths),
        (0.1,) * len(lengths),
        tuple(letter == "L" for letter in long),
    )


# The first half of BRIEF's tokens is two of its thoughts; of LENGTHY's, one: the second goes beyond.
BRIEF = weighed([40, 10, 50], [0, 1, 2, 4], [0.1, 0.4, -0.25], "LLs", tokens=[80, 60, 40, 10], name="brief")
LENGTHY = weighed(
    [20, 40, 20, 10, 10], [1, 1, 2, 8, 6, 8], [-0.25, 0.2, 0.5, -0.15, -0.05], "LLLss", drawn=8,
    tokens=[120, 90, 70, 31, 16, 4], name="lengthy",
)  # fmt: skip


def written(figure: Figure, folder: Path) -> None:
    figure.savefig(folder / "plot.png")
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")


def said(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def rows(table: Table) -> list[list[str]]:
    """The cells of the rendered text, the heading first."""
    console = Console(width=200, color_system=None)
    with console.capture() as captured:
        console.print(table)
    lines = [line for line in captured.get().splitlines() if line[:1] in "┃│" and line]
    return [[cell.strip() for cell in line.strip("┃│").replace("┃", "│").split("│")] for line in lines]


class TestSuccessByThoughts:
    def test_each_continuation_counts_once(self, tmp_path: Path) -> None:
        figure = success_by_thoughts([BRIEF, LENGTHY], title="two chains")
        assert figure.get_suptitle() == "two chains"
        right, _, tokens, _ = figure.axes
        courses = [axes.lines[0].get_xydata().tolist() for axes in (right, tokens)]
        # Of 4 + 8 continuations, and beyond three thoughts of LENGTHY's 8 alone.
        assert courses[0] == [[0, 1 / 12], [1, 2 / 12], [2, 4 / 12], [3, 1.0], [4, 0.75], [5, 1.0]]
        # (80 · 4 + 120 · 8) / 12 and so on.
        assert courses[1] == [[0, 320 / 3], [1, 80.0], [2, 60.0], [3, 24.0], [4, 16.0], [5, 4.0]]
        assert [label.get_text() for label in tokens.get_xticklabels()] == [
            "0\n(2)", "1\n(2)", "2\n(2)", "3\n(2)", "4\n(1)", "5\n(1)",
        ]  # fmt: skip
        written(figure, tmp_path)

    def test_the_band_is_the_interval_of_all_continuations(self) -> None:
        right = success_by_thoughts([BRIEF, LENGTHY]).axes[0]
        (band,) = right.collections
        edge = band.get_paths()[0].vertices.tolist()
        assert sorted({y for x, y in edge if x == 2}) == pytest.approx(wilson(4, 12))
        assert sorted({y for x, y in edge if x == 4}) == pytest.approx(wilson(6, 8))

    def test_by_share_every_chain_is_in_every_place(self) -> None:
        _, right, _, tokens = success_by_thoughts([BRIEF, LENGTHY]).axes
        assert right.get_title() == "by share of the chain: 2 chains"
        # BRIEF's thoughts end at 40%, 50% and 100% of its tokens, LENGTHY's at 20%, 60%, 80%, 90% and 100%.
        brief = [0, 0, 0, 0, 1, 2, 2, 2, 2, 2, 3]
        lengthy = [0, 0, 1, 1, 1, 1, 2, 2, 3, 4, 5]
        expected = [(BRIEF.right[i] + LENGTHY.right[j]) / 12 for i, j in zip(brief, lengthy, strict=True)]
        assert right.lines[0].get_xydata().tolist() == [[x, y] for x, y in enumerate(expected)]
        assert tokens.lines[0].get_xydata().tolist()[4] == [4, (60 * 4 + 90 * 8) / 12]
        assert [label.get_text() for label in tokens.get_xticklabels()] == ["0%", "20%", "40%", "60%", "80%", "100%"]

    def test_it_goes_as_far_as_enough_of_the_chains(self) -> None:
        def reached(chains: Sequence[WeighedChain], enough: float) -> int:
            return len(success_by_thoughts(chains, enough=enough).axes[0].lines[0].get_xdata()) - 1

        assert reached([LENGTHY, BRIEF, BRIEF, BRIEF], 0.25) == 5
        assert reached([LENGTHY, BRIEF, BRIEF, BRIEF], 0.26) == 3
        assert reached([LENGTHY, BRIEF, BRIEF, BRIEF, BRIEF], 0.25) == 3
        assert reached([BRIEF, LENGTHY], 0.0) == 5
        assert reached([BRIEF, LENGTHY], 1.0) == 3

    def test_a_failed_continuation_leaves_its_prefix_with_fewer(self) -> None:
        one = weighed([1, 1], [1, 1, 1], [0.1, 0.0], "Ls", drawn=[4, 2, 1], tokens=[30, 20, 10])
        right, _, tokens, _ = success_by_thoughts([one, replace(one, rollouts=(12, 2, 1))]).axes
        assert right.lines[0].get_ydata().tolist() == [2 / 16, 0.5, 1.0]
        assert tokens.lines[0].get_ydata().tolist() == [30.0, 20.0, 10.0]

    def test_one_chain_of_many_thoughts_has_a_dozen_ticks(self, tmp_path: Path) -> None:
        one = weighed([5] * 40, [2] * 41, [0.1] * 40, "L" + "s" * 39)
        figure = success_by_thoughts([one])
        assert [label.get_text() for label in figure.axes[2].get_xticklabels()] == [
            f"{thoughts}\n(1)" for thoughts in (0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40)
        ]
        assert figure.axes[1].get_title() == "by share of the chain: 1 chain"
        written(figure, tmp_path)


class TestScoresByPosition:
    def test_a_line_of_means_for_each_n(self, tmp_path: Path) -> None:
        short = replace(BRIEF, scores=(0.3, 0.0, -0.25), errors=(0.9, 0.1, 0.2))
        long = replace(LENGTHY, scores=(0.1, 0.2, 0.3, 0.4, 0.5), errors=(0.25,) * 5)
        figure = scores_by_position({128: [short, long], 8: [LENGTHY, BRIEF]}, title="M")
        (axes,) = figure.axes
        few, many, _ = axes.lines
        assert few.get_ydata().tolist() == pytest.approx([-0.075, 0.3, 0.125, -0.15, -0.05])
        assert many.get_ydata().tolist() == pytest.approx([0.2, 0.1, 0.025, 0.4, 0.5])
        # Beside each other: the few to the left, the many to the right of each position.
        assert few.get_xdata().tolist() == pytest.approx([0.94, 1.94, 2.94, 3.94, 4.94])
        assert many.get_xdata().tolist() == pytest.approx([1.06, 2.06, 3.06, 4.06, 5.06])
        # (0.9 + 0.1 + 0.2 + 5 · 0.25) / 8
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == ["N = 8: ±0.50", "N = 128: ±0.31"]
        assert axes.get_title() == "M"
        assert [label.get_text() for label in axes.get_xticklabels()] == [
            "1\n(2)", "2\n(2)", "3\n(2)", "4\n(1)", "5\n(1)",
        ]  # fmt: skip
        written(figure, tmp_path)

    def test_the_bars_are_the_quartiles(self) -> None:
        chains = [
            weighed([1, 1], [0, 1, 1], [score, 0.0], "Ls", name=str(score)) for score in (0.1, 0.2, 0.3, 0.4, 0.9)
        ]
        (axes,) = scores_by_position({8: chains}).axes
        bars = axes.collections[0].get_segments()
        assert [[list(end) for end in bar] for bar in bars] == [
            [pytest.approx([1, 0.2]), pytest.approx([1, 0.4])],
            [[2, 0.0], [2, 0.0]],
        ]

    def test_of_one_chain_both_quartiles_are_its_score(self, tmp_path: Path) -> None:
        figure = scores_by_position({4: [BRIEF]})
        bars = figure.axes[0].collections[0].get_segments()
        assert [[end[1] for end in bar] for bar in bars] == [[0.1, 0.1], [0.4, 0.4], [-0.25, -0.25]]
        written(figure, tmp_path)

    def test_it_goes_as_far_as_enough_of_the_chains(self) -> None:
        (axes,) = scores_by_position({4: [BRIEF, LENGTHY]}, enough=0.6).axes
        assert axes.lines[0].get_xdata().tolist() == [1, 2, 3]

    @pytest.mark.parametrize("fewer", [{4: [BRIEF], 8: [BRIEF, LENGTHY]}, {4: [BRIEF], 8: [LENGTHY]}])
    def test_other_chains_are_refused(self, fewer: Mapping[int, Sequence[WeighedChain]]) -> None:
        with pytest.raises(InputError, match=r"needs the same chains.*: \d, 8: \d"):
            scores_by_position(fewer)


class TestTables:
    def test_statistics(self) -> None:
        table = thought_statistics([BRIEF, LENGTHY])
        assert table.title == "Thoughts of 2 chains"
        assert rows(table) == [
            ["", "all", "stay long", "become short"],
            ["thoughts", "8", "5", "3"],
            ["a chain, mean", "4.0", "2.5", "1.5"],
            ["a chain, least to most", "3 to 5", "2 to 3", "1 to 2"],
            # 200 tokens; long 40 + 10 + 20 + 40 + 20, short 50 + 10 + 10
            ["tokens a thought", "25.0", "26.0", "23.3"],
            ["share of tokens", "100.0%", "65.0%", "35.0%"],
            ["chains with 1 long", "", "0 (0%)", ""],
            ["chains with 2 long", "", "1 (50%)", ""],
            ["chains with 3 long", "", "1 (50%)", ""],
            ["chains with 4 or more long", "", "0 (0%)", ""],
        ]

    def test_chains_of_four_and_more_long_thoughts_count_together_and_there_may_be_no_short_ones(self) -> None:
        four, six = (weighed([1] * n, [1] * (n + 1), [0.1] * n, "L" * n) for n in (4, 6))
        found = rows(thought_statistics([four, six]))
        assert found[4] == ["tokens a thought", "1.0", "1.0", ""]
        assert found[3][-1] == "0 to 0"
        assert found[5][-1] == "0.0%"
        assert found[-1] == ["chains with 4 or more long", "", "2 (100%)", ""]

    def test_kinds_by_how_many_there_are(self) -> None:
        assert rows(kinds([BRIEF, LENGTHY])) == [
            ["", "thoughts", "tokens", "M", "stay long"],
            ["problem understanding", "3", "23.3", "-0.07", "67%"],
            ["calculation", "2", "25.0", "+0.30", "100%"],
            ["verification", "2", "35.0", "+0.12", "50%"],
            ["final answer", "1", "10.0", "-0.15", "0%"],
        ]

    def test_kinds_are_no_markup_and_one_line(self) -> None:
        texts = ["[bold]x[/bold]", "a\n\tb", ":smile: \x1b[31m", "[/]", "a b"]
        found = rows(kinds([weighed([1] * 5, [1] * 6, [0.0] * 5, "Lssss", texts=texts)]))
        assert [(row[0], row[1]) for row in found[1:]] == [
            ("a b", "2"), (":smile: [31m", "1"), ("[/]", "1"), ("[bold]x[/bold]", "1"),
        ]  # fmt: skip

    def test_savings(self) -> None:
        early = weighed([1, 1], [0, 1, 1], [0.1, 0.0], "Ls", drawn=[8, 64, 600], name="early")
        assert savings([early, replace(early, rollouts=(1000, 8, 8))], 1000) == (
            "1,688 of 6,000 continuations were drawn (28%): 72% saved"
        )
        with pytest.raises(InputError, match="at least the continuations drawn of any prefix, 600; got 599"):
            savings([replace(early, rollouts=(8, 8, 8)), early], 599)


class TestChainPicture:
    def test_a_row_a_thought_with_its_numbers(self, tmp_path: Path) -> None:
        one = replace(LENGTHY, errors=(0.1, 0.2, 0.3, 0.4, 0.5))
        figure = chain_picture(one)
        ground = figure.axes[0]
        texts = {(text.get_text(), text.get_position()[1]) for text in ground.texts}
        placed = {row: [text for text, y in texts if abs(y - row) < 0.3] for row in range(6)}
        assert sorted(placed[0]) == ["1 of 8", "no thought"]
        assert sorted(placed[3]) == ["+0.50 ± 0.30", "3", "8 of 8", "long", "thought 3", "verification"]
        assert sorted(placed[4]) == ["4", "6 of 8", "final answer", "short", "thought 4", "−0.15 ± 0.40"]
        assert "What is 1 + 1?" in said(figure)
        assert "5 thoughts, 3 kept long, with 80% of the tokens" in said(figure)
        written(figure, tmp_path)

    def test_bars_are_as_long_as_their_tokens_and_coloured_by_score(self) -> None:
        _, tokens, success, bar = chain_picture(LENGTHY).axes
        bars = [patch for patch in tokens.patches if isinstance(patch, Rectangle)]
        assert [(patch.get_width(), patch.get_y() + patch.get_height() / 2) for patch in bars] == [
            (20, 1), (40, 2), (20, 3), (10, 4), (10, 5),
        ]  # fmt: skip
        assert [text.get_text() for text in tokens.texts] == ["20", "40", "20", "10", "10"]
        assert bars[2].get_facecolor() == colormaps["RdBu"](1.0)
        assert bars[0].get_facecolor() == colormaps["RdBu"](0.25)
        assert bar.get_xlim() == (-0.25, 0.5)
        # Downwards, from no thought to all of them.
        assert success.lines[0].get_xydata().tolist() == [
            [0.125, 0], [0.125, 1], [0.25, 2], [1.0, 3], [0.75, 4], [1.0, 5],
        ]  # fmt: skip
        assert success.get_ylim() == tokens.get_ylim() == (5.5, -0.5)
        interval = success.collections[0].get_segments()[4].tolist()
        assert interval == [[pytest.approx(wilson(6, 8)[0]), 4], [pytest.approx(wilson(6, 8)[1]), 4]]

    def test_the_colours_span_what_scores_there_are(self) -> None:
        bars = chain_picture(weighed([1, 1], [0, 1, 1], [0.8, -0.9], "Ls")).axes
        assert bars[3].get_xlim() == (-0.9, 0.9)
        assert [patch.get_facecolor() for patch in bars[1].patches][1] == colormaps["RdBu"](0.0)

    def test_rows_and_marks_of_long_thoughts_stand_out(self) -> None:
        ground = chain_picture(LENGTHY).axes[0]
        tinted = [patch for patch in ground.patches if isinstance(patch, Rectangle)]
        assert [patch.get_y() + patch.get_height() / 2 for patch in tinted] == [1, 2, 3]
        chips = [text for text in ground.texts if text.get_text() in ("long", "short")]
        filled = [chip.get_bbox_patch() for chip in chips]
        assert [chip is not None and chip.get_facecolor() == to_rgba("white") for chip in filled] == [
            False, False, False, True, True,
        ]  # fmt: skip

    def test_text_is_never_mathematics_or_markup(self, tmp_path: Path) -> None:
        texts = ["$\\frac{$", "$", "<think>a $x^2$ and \\$5</think>", "a\x00b \ud800 中", "a\n\n b\tc", "\x1b[31m", ""]
        one = weighed([1] * 7, [1] * 8, [0.0] * 7, "Lssssss", texts=texts)
        question = replace(one.chain.problem, question="$\\frac{ 中\x00$")
        figure = chain_picture(replace(one, chain=replace(one.chain, problem=question)))
        expected = ["$\\frac{$", "$", "<think>a $x^2$ and \\$5</think>", "a b □", "a b c", "[31m", ""]
        for text in expected:
            assert said(figure).count(text) == 2
        assert "$\\frac{ □ $" in said(figure)
        written(figure, tmp_path)

    def test_first_words_as_many_as_asked_for_and_as_fit(self, tmp_path: Path) -> None:
        texts = ["one two three four", "one two three", "W" * 5000]
        one = weighed([1, 1, 1], [1] * 4, [0.0] * 3, "Lss", texts=texts)
        one = replace(one, chain=replace(one.chain, problem=replace(one.chain.problem, question="W" * 5000)))
        figure = chain_picture(one, most_words=3)
        # The kind of a thought is its text here, and stands above it.
        assert [said(figure).count(text) for text in ("one two three …", "one two three")] == [1, 2]
        written(figure, tmp_path)
        cut = [text for text in figure.axes[0].texts if "WW" in text.get_text()]
        # From where they begin to the bars, or to the edge: filled, and not beyond.
        edges = [text.get_window_extent().x1 / figure.dpi for text in cut]
        widths = sorted([round(edge, 1) for edge in edges])
        assert len(cut) == 3
        assert all(text.get_text().endswith("W…") for text in cut)
        bars = figure.axes[1].get_window_extent().x0 / figure.dpi
        assert bars - 0.4 < widths[0] <= widths[1] < bars
        assert figure.get_figwidth() - 0.4 < widths[2] < figure.get_figwidth()

    def test_a_font_that_is_added_draws_what_the_first_one_lacks(self, tmp_path: Path) -> None:
        one = weighed([1], [1, 1], [0.0], "L", texts=["ꙮ ∑ 中"])
        assert "ꙮ ∑ □" in said(chain_picture(one))
        for families, text in ((["STIXGeneral"], "? ∑ ?"), (["STIXGeneral", "DejaVu Sans"], "ꙮ ∑ □")):
            with rc_context({"font.family": families}):
                figure = chain_picture(one)
                assert text in said(figure)
                written(figure, tmp_path)

    def test_it_grows_by_a_row_a_thought(self, tmp_path: Path) -> None:
        few, many = (chain_picture(weighed([9] * n, [1] * (n + 1), [0.1] * n, "L" + "s" * (n - 1))) for n in (1, 40))
        assert many.get_figheight() - few.get_figheight() == pytest.approx(39 * 0.44)
        assert many.get_figwidth() == few.get_figwidth()
        for figure in (few, many):
            written(figure, tmp_path)

    def test_a_chain_without_a_thought_is_refused(self) -> None:
        with pytest.raises(InputError, match="at least one thought; got none"):
            chain_picture(weighed([], [1], [], ""))


@pytest.mark.parametrize("draw", [success_by_thoughts, thought_statistics, kinds, lambda none: savings(none, 8)])
def test_no_chains_are_refused(draw: Callable[[list[WeighedChain]], object]) -> None:
    with pytest.raises(InputError, match="at least one weighed chain; got none"):
        draw([])


def test_no_samples_or_chains_have_no_scores() -> None:
    with pytest.raises(InputError, match="at least one number of samples; got none"):
        scores_by_position({})
    with pytest.raises(InputError, match="at least one weighed chain; got none"):
        scores_by_position({8: []})
