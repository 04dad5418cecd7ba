"""Plots hold the figures that they are drawn from."""

from pathlib import Path

import pytest

from turnwise.analysis.control import Control, at_all_budgets
from turnwise.analysis.plots import accuracy_over_budgets, accuracy_over_tokens, heat_map
from turnwise.environments.environment import Grade, Outcome
from turnwise.environments.episode import Episode
from turnwise.environments.problem import Problem
from turnwise.environments.transcript import Reply, Step, Transcript
from turnwise.rl.summary import summarise


def episode(number: int, level: int, tokens: int, outcome: Outcome) -> Episode:
    problem = Problem(f"p{number}", "1 + 1?", "2", level=level)
    return Episode(Transcript(problem, (Step("a", "solve", Reply("2", tokens)),)), 0, 0, Grade(outcome, "2"))


def test_one_point_a_run_and_one_line_through_its_levels(tmp_path: Path) -> None:
    runs = {
        "brief": [episode(0, 1, 10, Outcome.RIGHT), episode(1, 2, 30, Outcome.WRONG)],
        "long": [episode(0, 1, 100, Outcome.RIGHT), episode(1, 2, 200, Outcome.RIGHT)],
    }
    figure = accuracy_over_tokens(runs, title="two problems")
    (axes,) = figure.axes
    points = {str(bar.get_label()): bar.lines[0].get_xydata().tolist() for bar in axes.containers}
    assert points == {"brief": [[20.0, 0.5]], "long": [[150.0, 1.0]]}
    courses = [line.get_xydata().tolist() for line in axes.lines if len(line.get_xydata()) == 2]
    assert [[10.0, 1.0], [30.0, 0.0]] in courses
    assert [[100.0, 1.0], [200.0, 1.0]] in courses
    assert [text.get_text() for text in axes.texts] == ["1", "2", "1", "2"]
    low = axes.containers[0].lines[2][0].get_segments()[0][0][1]
    assert low == pytest.approx(0.0945, abs=1e-4)
    figure.savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_heat_map_has_a_cell_for_each_two_rounds_with_its_number_in_it(tmp_path: Path) -> None:
    played = summarise([episode(0, 1, 10, Outcome.RIGHT), episode(1, 2, 31, Outcome.WRONG)])
    pool = [[Control(0.25, 100.0), Control(0.375, 80.0), Control(0.5, 70.4)], [played, played, Control(1.0, 3.0)]]
    figure = heat_map(pool, ("long", "short"), title="two and three rounds")
    assert figure.get_suptitle() == "two and three rounds"
    right, tokens = (axes for axes in figure.axes if axes.images)
    assert right.images[0].get_array().tolist() == [[0.25, 0.375, 0.5], [0.5, 0.5, 1.0]]
    assert tokens.images[0].get_array().tolist() == [[100.0, 80.0, 70.4], [20.5, 20.5, 3.0]]
    # Where each number stands, as (column, row), and that it can be read: dark on light, light on dark.
    written = {text.get_position(): (text.get_text(), text.get_color()) for text in right.texts}
    assert written == {
        (0, 0): ("25.0%", "white"), (1, 0): ("37.5%", "white"), (2, 0): ("50.0%", "white"),
        (0, 1): ("50.0%", "white"), (1, 1): ("50.0%", "white"), (2, 1): ("100.0%", "black"),
    }  # fmt: skip
    assert [text.get_text() for text in tokens.texts] == ["100", "80", "70", "20", "20", "3"]
    for axes in (right, tokens):
        assert (axes.get_ylabel(), axes.get_xlabel()) == ("long after round", "short after round")
        assert [label.get_text() for label in axes.get_yticklabels()] == ["r0", "r1"]
        assert [label.get_text() for label in axes.get_xticklabels()] == ["r0", "r1", "r2"]
    figure.savefig(tmp_path / "pool.png")
    assert (tmp_path / "pool.png").read_bytes().startswith(b"\x89PNG")


def test_a_heat_map_of_one_cell(tmp_path: Path) -> None:
    figure = heat_map([[Control(0.5, 10.0)]], ("a", "b"))
    assert [text.get_text() for axes in figure.axes for text in axes.texts] == ["50.0%", "10"]
    figure.savefig(tmp_path / "pool.png")
    assert (tmp_path / "pool.png").stat().st_size > 1000


def test_a_team_that_is_always_right_stands_beside_the_curves_of_a_lone_agent() -> None:
    """Of 384 right answers the upper end of the interval is rounded to less than 1."""
    team = [episode(number, 1, 10, Outcome.RIGHT) for number in range(384)]
    found = at_all_budgets(team, [episode(number, 1, 20, Outcome.RIGHT) for number in range(384)])
    (axes,) = accuracy_over_budgets(found, team="both", title="").axes
    (bar,) = axes.containers
    assert bar.lines[0].get_xydata().tolist() == [[10.0, 1.0]]
    (segment,) = bar.lines[2][0].get_segments()
    assert segment[:, 1].tolist() == [pytest.approx(0.990, abs=1e-3), pytest.approx(1.0)]
