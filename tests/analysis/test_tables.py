from rich.console import Console
from rich.table import Table

from turnwise.analysis.control import Control
from turnwise.analysis.evaluation import Difference, difference, evaluate
from turnwise.analysis.papers import printed_for
from turnwise.analysis.statistics import Estimate
from turnwise.analysis.tables import (
    comparison,
    differences,
    endings,
    equal_tokens,
    evaluations,
    left_out,
    levels,
    printed_results,
    rounds_played,
)
from turnwise.environments.environment import Grade, Outcome
from turnwise.environments.episode import Episode
from turnwise.environments.problem import Problem
from turnwise.environments.transcript import Reply, Step, Transcript
from turnwise.rl.cold_start.thoughts import Dropped
from turnwise.rl.summary import summarise


def episode(*tokens: tuple[str, int], right: bool = True, level: int = 1, stop: str | None = None) -> Episode:
    steps = tuple(Step(seat, "state", Reply("text", count, stop=stop)) for seat, count in tokens)
    grade = Grade(Outcome.RIGHT if right else Outcome.WRONG)
    return Episode(Transcript(Problem("p", "1 + 1?", "2", level=level), steps), 0, 0, grade)


def failed(level: int) -> Episode:
    return Episode(Transcript(Problem("p", "1 + 1?", "2", level=level)), 0, 0, error="KeyError: 'x'")


def rows(table: Table) -> list[list[str]]:
    """The cells of the rendered text, the heading first."""
    console = Console(width=200, color_system=None)
    with console.capture() as captured:
        console.print(table)
    lines = [line for line in captured.get().splitlines() if line[:1] in "┃│" and line]
    return [[cell.strip() for cell in line.strip("┃│").replace("┃", "│").split("│")] for line in lines]


ALONE = [episode(("long", 100)), episode(("long", 300), right=False)]
TOGETHER = [episode(("long", 60), ("short", 10)), episode(("long", 20), ("short", 10), ("long", 5))]


class TestComparison:
    def test_each_run_is_a_row(self) -> None:
        table = comparison({"alone": ALONE, "together": TOGETHER}, baseline="alone", title="Two runs")
        assert table.title == "Two runs"
        assert rows(table) == [
            ["", "right", "95% interval", "tokens", "long", "short", "turns", "AES"],
            ["alone", "50.0%", "5.5% to 94.5%", "200.0", "200.0", "", "1.0", "+0.00"],
            # (200 − 52.5) / 200 + 3 · (1 − 0.5) / 0.5
            ["together", "100.0%", "20.7% to 100.0%", "52.5", "42.5", "10.0", "2.5", "+3.74"],
        ]

    def test_one_seat_needs_no_columns_of_its_own(self) -> None:
        assert rows(comparison({"alone": ALONE}, baseline="alone"))[0] == [
            "", "right", "95% interval", "tokens", "turns", "AES",
        ]  # fmt: skip

    def test_the_think_share_is_shown_where_a_run_has_one(self) -> None:
        routed = [episode(("long", 1), stop="<think>"), episode(("long", 1), stop="<short>")]
        heading, alone, thinkless = rows(comparison({"alone": ALONE, "routed": routed}, baseline="routed"))
        assert heading[-2:] == ["thinks", "AES"]
        assert alone[-2:] == ["", "-201.50"]
        assert thinkless[-2:] == ["50%", "+0.00"]

    def test_there_is_no_aes_against_a_baseline_without_a_right_answer(self) -> None:
        wrong = [episode(("long", 10), right=False)]
        assert [row[-1] for row in rows(comparison({"alone": ALONE, "wrong": wrong}, baseline="wrong"))] == [
            "AES",
            "",
            "",
        ]


class TestLevels:
    def test_each_level_is_a_row(self) -> None:
        easy = [episode(("a", 10)), episode(("a", 20), right=False)]
        hard = [episode(("a", 99), level=12)]
        table = levels({"both": easy + hard, "easy only": easy}, title="By level")
        assert table.title == "By level"
        assert rows(table) == [
            ["level", "both", "easy only"],
            ["1", "50% in 15", "50% in 15"],
            ["12", "100% in 99", ""],
        ]

    def test_a_level_on_which_a_run_failed_is_left_empty(self) -> None:
        one, other = [episode(("a", 10)), episode(("a", 30), level=2)], [episode(("a", 10)), failed(2)]
        assert rows(levels({"one": one, "other": other}))[1:] == [
            ["1", "100% in 10", "100% in 10"],
            ["2", "100% in 30", ""],
        ]


class TestRoundsPlayed:
    def test_each_round_is_a_row_in_the_order_in_which_they_were_partners(self) -> None:
        base, wrong = summarise(ALONE), summarise([episode(("long", 10), right=False)])
        pool = [[base, wrong], [wrong, summarise(TOGETHER)], [summarise([episode(("long", 40))]), wrong]]
        table = rounds_played(pool, [(0, 0), (1, 1), (2, 0)], ("long", "short"), base)
        assert table.title == "Round by round"
        assert rows(table) == [
            ["", "right", "95% interval", "tokens", "turns", "AES"],
            ["long-r0⊗short-r0", "50.0%", "5.5% to 94.5%", "200.0", "1.0", "+0.00"],
            ["long-r1⊗short-r1", "100.0%", "20.7% to 100.0%", "52.5", "2.5", "+3.74"],
            # (200 − 40) / 200 + 3
            ["long-r2⊗short-r0", "100.0%", "20.7% to 100.0%", "40.0", "1.0", "+3.80"],
        ]

    def test_there_is_no_aes_against_a_base_without_a_right_answer(self) -> None:
        wrong = summarise([episode(("long", 10), right=False)])
        assert rows(rounds_played([[wrong]], [(0, 0)], ("a", "b"), wrong))[1] == [
            "a-r0⊗b-r0", "0.0%", "0.0% to 79.3%", "10.0", "1.0", "",
        ]  # fmt: skip


def test_each_control_is_a_row() -> None:
    table = equal_tokens({"long alone, cut short": Control(0.256, 63.96), "a majority of 9": Control(1.0, 7.0)})
    assert table.title == "For the same tokens, alone"
    assert rows(table) == [
        ["", "right", "tokens"],
        ["long alone, cut short", "25.6%", "64.0"],
        ["a majority of 9", "100.0%", "7.0"],
    ]
    gained = equal_tokens({"alone": Control(0.5, 7.0)}, {"alone": Estimate(0.25, -0.1, 0.6)})
    assert rows(gained) == [
        ["", "right", "tokens", "team's gain", "95% interval"],
        ["alone", "50.0%", "7.0", "+25.0%", "-10.0% to +60.0%"],
    ]


def test_names_are_shown_as_they_are() -> None:
    name = "a[/b] both[old]"
    team = [episode(("x[/y]", 1), ("z[old]", 2))]
    shown = [
        comparison({name: team}, baseline=name, title=name),
        levels({name: team}, title=name),
        evaluations({name: evaluate(team)}, title=name, caption=name),
        endings({name: evaluate(team)}),
        equal_tokens({name: Control(0.5, 1.0)}),
        rounds_played([[summarise(team)]], [(0, 0)], (name, name), summarise(team)),
    ]
    for table in shown:
        assert name in str(rows(table))
    for table in (shown[0], shown[2], shown[3]):
        assert "x[/y]" in str(rows(table))


def test_what_was_left_out_is_counted_by_stage_and_reason() -> None:
    dropped = [
        Dropped("a", "reading", "its own answer is wrong"),
        Dropped("b", "chunking", "got '[red]'"),
        Dropped("[c]", "reading", "its own answer is wrong"),
    ]
    table = left_out(dropped, kept=7)
    assert rows(table) == [
        ["stage", "reason", "chains", "such as"],
        ["reading", "its own answer is wrong", "2", "a"],
        ["chunking", "got '[red]'", "1", "b"],
    ]
    assert (table.title, table.caption) == ("Chains left out", "7 kept")


class TestEvaluations:
    def test_each_run_is_a_row(self) -> None:
        assert rows(evaluations({"alone": evaluate(ALONE), "together [1]": evaluate(TOGETHER)}, title="Two runs")) == [
            [
                "", "samples", "right", "95% interval", "pass@2", "tokens", "95% interval", "per right answer", "long",
                "short", "turns",
            ],
            # Of the one problem there is nothing to be drawn.
            [
                "alone", "2 × 1", "50.0%", "50.0% to 50.0%", "100.0%", "200.0", "200.0 to 200.0", "400.0", "200.0", "",
                "1.0",
            ],
            [
                "together [1]", "2 × 1", "100.0%", "20.7% to 100.0%", "100.0%", "52.5", "52.5 to 52.5", "52.5", "42.5",
                "10.0", "2.5",
            ],
        ]  # fmt: skip

    def test_one_sample_one_seat_nothing_right_and_a_mode(self) -> None:
        wrong = evaluate([episode(("a", 10), right=False, stop="<think>")])
        heading, row = rows(evaluations({"wrong": wrong}))
        assert heading == [
            "",
            "samples",
            "right",
            "95% interval",
            "tokens",
            "95% interval",
            "per right answer",
            "turns",
            "thinks",
        ]
        assert row[-3:] == ["", "1.0", "100%"]

    def test_how_it_ended(self) -> None:
        assert rows(endings({"alone": evaluate([*ALONE, failed(1)])})) == [
            ["", "right", "wrong", "unparsable", "timed out", "failed", "cut off", "ill-formed"],
            ["alone", "1", "1", "0", "0", "1", "0.0%", ""],
        ]
        heading, row = rows(endings({"together": evaluate(TOGETHER)}))
        assert heading[-4:] == ["cut off", "cut off, long", "cut off, short", "ill-formed"]
        assert row[-4:] == ["0.0%", "0.0%", "0.0%", ""]


def test_each_difference_is_a_row() -> None:
    paired = difference(TOGETHER, ALONE, baseline="alone")
    never = Difference("alone", 7, Estimate(0.1, -0.05, 0.25), Estimate(-3.0, -5.0, -1.0), None)
    table = differences({"together": paired, "never": never})
    assert table.title == "Against alone"
    assert rows(table) == [
        ["", "right", "95% interval", "tokens", "95% interval", "AES", "95% interval", "problems"],
        [
            "together", "+50.0%", "-69.0% to +89.7%", "-147.5", "-147.5 to -147.5", "+3.74", "+3.74 to +3.74", "1",
        ],
        ["never", "+10.0%", "-5.0% to +25.0%", "-3.0", "-5.0 to -1.0", "", "", "7"],
    ]  # fmt: skip


def test_each_printed_result_is_a_row() -> None:
    found = rows(printed_results(printed_for("math-500"), "math-500"))
    assert found[0] == ["paper", "system", "right", "tokens", "thinks", "length, all five", "AES, all five"]
    assert ["Thinkless", "Thinkless", "81.8%", "2555", "52%", "", ""] in found
    assert ["Long⊗Short", "Qwen long-r4⊗short-r2", "89.8%", "", "", "2113", "+0.61"] in found
    assert len(found) == 1 + 7 + 13
