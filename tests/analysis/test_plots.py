"""Plots hold the figures that they are drawn from."""

from pathlib import Path

import pytest

from turnwise.analysis.plots import accuracy_over_tokens
from turnwise.environments.environment import Grade, Outcome
from turnwise.environments.episode import Episode
from turnwise.environments.problem import Problem
from turnwise.environments.transcript import Reply, Step, Transcript


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
