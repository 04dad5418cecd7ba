import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from turnwise.environments.environment import Grade, Outcome
from turnwise.environments.episode import Episode
from turnwise.environments.errors import InputError
from turnwise.environments.problem import Problem
from turnwise.environments.transcript import Reply, Step, Transcript
from turnwise.protocols.rewards import Reward
from turnwise.rl.metrics import (
    MetricsLog,
    collapsed_mode,
    evaluation_figures,
    mode_shares,
    read_metrics,
    training_figures,
)


def episode(
    *steps: tuple[str, str, int] | tuple[str, str, int, str], right: bool = True, level: int = 1, problem: str = "p"
) -> Episode:
    """Turns are given as (seat, state, tokens), or also the tag that they stopped at."""
    taken = tuple(
        Step(seat, state, Reply("", tokens, "stop" if stop else "end", stop[0] if stop else None))
        for seat, state, tokens, *stop in steps
    )
    transcript = Transcript(Problem(problem, "1 + 1?", "2", level=level), taken)
    return Episode(transcript, 0, 0, Grade(Outcome.RIGHT if right else Outcome.WRONG))


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Each figure that TensorBoard shows, as (step, value)."""
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def name_first(folder: Path) -> Path:
    """TensorBoard reads files by their names, in which the time is in whole seconds: the file, as an old one."""
    (events,) = (folder / "tensorboard").iterdir()
    return events.rename(events.with_name("events.out.tfevents.0000000001"))


class TestFigures:
    def test_of_a_training_step_by_hand(self) -> None:
        groups = [
            [
                episode(("long", "think", 10), ("short", "answer", 2)),
                episode(("long", "think", 20), ("short", "answer", 4), ("long", "think", 6), right=False),
            ],
            [episode(("long", "think", 6), problem="q")],
        ]
        paid = [
            [
                {"long": Reward({"correctness": 1.0, "kimi length": 0.5}), "short": Reward({"correctness": 1.0})},
                {"long": Reward({"correctness": 0.0, "kimi length": -0.5}), "short": Reward({"correctness": 0.0})},
            ],
            [{"long": Reward({"correctness": 1.0, "kimi length": 0.75}), "short": Reward({"correctness": 1.0})}],
        ]
        assert training_figures(groups, paid) == pytest.approx({
            "right": 2 / 3,
            "tokens": (12 + 30 + 6) / 3,
            "turns": (2 + 3 + 1) / 3,
            "reward/long": (1.5 - 0.5 + 1.75) / 3,
            "reward/long/correctness": 2 / 3,
            "reward/long/kimi length": 0.25,
            "reward/short": 2 / 3,
            "reward/short/correctness": 2 / 3,
        })  # fmt: skip

    def test_modes_are_shares_of_choices_of_which_an_episode_may_have_several(self) -> None:
        """Three modes, of which one was never named, and an episode that chose three times."""
        episodes = [
            episode(("router", "route", 1, "<think>"), ("router", "route", 1, "<short>"), ("router", "think", 9)),
            episode(
                ("router", "route", 1, "<think>"), ("router", "again", 1, "<think>"), ("router", "route", 1, "<ask>"),
                right=False,
            ),
            episode(("router", "route", 1, "<short>")),
            episode(("router", "route", 1), ("router", "think", 4, "<short>"), right=False),
        ]  # fmt: skip
        paid = [[{"router": Reward({"correctness": float(one.right)})} for one in episodes]]
        figures = training_figures([episodes], paid, {"route", "again"})
        assert figures == pytest.approx({
            "right": 0.5,
            "tokens": (11 + 3 + 1 + 5) / 4,
            "turns": (3 + 3 + 1 + 2) / 4,
            "share of modes/<ask>": 1 / 7,
            "share of modes/<short>": 2 / 7,
            "share of modes/<think>": 3 / 7,
            "share of modes/other": 1 / 7,
            "right by mode/<ask>": 0.0,
            "right by mode/<short>": 1.0,
            "right by mode/<think>": 1 / 3,
            "right by mode/other": 0.0,
            "reward/router": 0.5,
            "reward/router/correctness": 0.5,
        })  # fmt: skip
        assert mode_shares(figures) == pytest.approx(
            {"<ask>": 1 / 7, "<short>": 2 / 7, "<think>": 3 / 7, "other": 1 / 7}
        )
        # Without control states nothing is a choice.
        assert mode_shares(training_figures([episodes], paid)) == {}

    def test_of_an_evaluation_over_all_and_by_level(self) -> None:
        failed = Episode(Transcript(Problem("f", "1 + 1?", "2", level=3)), 0, 0, error="KeyError: 'x'")
        episodes = [
            episode(("solver", "route", 1, "<short>"), ("solver", "short", 4)),
            episode(("solver", "route", 1, "<think>"), ("solver", "think", 9), right=False),
            episode(("solver", "route", 1, "<think>"), ("solver", "think", 29), level=2),
            failed,
        ]
        assert evaluation_figures(episodes, {"route"}) == pytest.approx({
            "evaluation/right": 2 / 3,
            "evaluation/tokens": 15.0,
            "evaluation/turns": 2.0,
            "evaluation/share of modes/<short>": 1 / 3,
            "evaluation/share of modes/<think>": 2 / 3,
            "evaluation/right by mode/<short>": 1.0,
            "evaluation/right by mode/<think>": 0.5,
            "evaluation/level 1/right": 0.5,
            "evaluation/level 1/tokens": 7.5,
            "evaluation/level 1/turns": 2.0,
            "evaluation/level 1/share of modes/<short>": 0.5,
            "evaluation/level 1/share of modes/<think>": 0.5,
            "evaluation/level 1/right by mode/<short>": 1.0,
            "evaluation/level 1/right by mode/<think>": 0.0,
            "evaluation/level 2/right": 1.0,
            "evaluation/level 2/tokens": 30.0,
            "evaluation/level 2/turns": 2.0,
            "evaluation/level 2/share of modes/<think>": 1.0,
            "evaluation/level 2/right by mode/<think>": 1.0,
        })  # fmt: skip

    def test_one_level_needs_no_figures_of_its_own(self) -> None:
        episodes = [episode(("solver", "solve", 4)), episode(("solver", "solve", 6), right=False)]
        assert evaluation_figures(episodes) == {
            "evaluation/right": 0.5,
            "evaluation/tokens": 5.0,
            "evaluation/turns": 1.0,
        }

    def test_the_modes_of_an_evaluation_are_not_those_of_training(self) -> None:
        assert mode_shares(
            {"evaluation/share of modes/<think>": 0.5, "share of modes/<short>": 0.25, "right": 1.0}
        ) == {"<short>": 0.25}


class TestCollapse:
    @pytest.mark.parametrize(
        ("steps", "mode"),
        [
            ([{"<short>": 1.0}, {"<short>": 1.0}], "<short>"),
            ([{"<short>": 0.99, "<think>": 0.01}, {"<short>": 0.985, "<think>": 0.015}], "<short>"),
            ([{"<short>": 0.01, "<think>": 0.99}, {"<think>": 1.0}], "<think>"),
            # One step in which another mode was still tried.
            ([{"<short>": 1.0}, {"<short>": 0.97, "<think>": 0.03}], None),
            ([{"<short>": 0.98, "<think>": 0.02}], None),
            ([{"<short>": 1.0}, {"<think>": 1.0}], None),
            # Three modes: what counts is that the others are gone together.
            ([{"<ask>": 0.012, "<short>": 0.976, "<think>": 0.012}], None),
            ([{"<ask>": 0.005, "<short>": 0.99, "<think>": 0.005}], "<short>"),
            ([{}, {}], None),
            ([], None),
        ],
    )
    def test_by_hand(self, steps: list[dict[str, float]], mode: str | None) -> None:
        assert collapsed_mode(steps) == mode

    def test_the_share_that_is_left_to_the_others_is_given(self) -> None:
        steps = [{"<short>": 0.9, "<think>": 0.1}]
        assert collapsed_mode(steps, below=0.11) == "<short>"
        assert collapsed_mode(steps, below=0.05) is None


class TestLog:
    def test_each_step_is_a_line_and_tensorboard_shows_the_same(self, tmp_path: Path) -> None:
        log = MetricsLog(tmp_path, last=-1)
        log.write(0, {"evaluation/right": 0.5, "share of modes/<think>": 0.25})
        log.write(1, {"right": 1.0, "evaluation/level 2/tokens": 123.5})
        log.write(2, {"right": 0.75})
        log.close()
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == read_metrics(tmp_path) == [
            {"step": 0, "evaluation/right": 0.5, "share of modes/<think>": 0.25},
            {"step": 1, "right": 1.0, "evaluation/level 2/tokens": 123.5},
            {"step": 2, "right": 0.75},
        ]  # fmt: skip
        assert scalars(tmp_path) == {
            "evaluation/right": [(0, 0.5)],
            "share of modes/<think>": [(0, 0.25)],
            "right": [(1, 1.0), (2, 0.75)],
            "evaluation/level 2/tokens": [(1, 123.5)],
        }

    def test_what_is_done_again_is_taken_back_even_where_it_was_torn(self, tmp_path: Path) -> None:
        log = MetricsLog(tmp_path, last=-1)
        for step in range(4):
            log.write(step, {"right": step / 4})
        log.close()
        path = tmp_path / "metrics.jsonl"
        with path.open("ab") as file:
            file.write(b'{"step":4,"rig')
        with name_first(tmp_path).open("ab") as file:  # a record of which the kill left 6 bytes
            file.write(b"\x2a\0\0\0\0\0")
        assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1, 2, 3]

        log = MetricsLog(tmp_path, last=1)
        assert read_metrics(tmp_path) == [{"step": 0, "right": 0.0}, {"step": 1, "right": 0.25}]
        log.write(2, {"right": 0.625})
        log.close()
        assert read_metrics(tmp_path)[2:] == [{"step": 2, "right": 0.625}]
        assert path.read_bytes().endswith(b"}\n")
        assert scalars(tmp_path) == {"right": [(0, 0.0), (1, 0.25), (2, 0.625)]}
        assert sorted(found.name for found in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]

    def test_a_run_that_begins_anew_keeps_nothing(self, tmp_path: Path) -> None:
        log = MetricsLog(tmp_path, last=-1)
        log.write(0, {"right": 0.25})
        log.close()
        name_first(tmp_path)
        log = MetricsLog(tmp_path, last=-1)
        log.write(0, {"right": 0.5})
        log.close()
        assert read_metrics(tmp_path) == [{"step": 0, "right": 0.5}]
        assert scalars(tmp_path) == {"right": [(0, 0.5)]}

    def test_a_kill_while_lines_are_taken_back_loses_none(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        log = MetricsLog(tmp_path, last=-1)
        for step in range(3):
            log.write(step, {"right": 0.5})
        log.close()

        def killed(path: Path, content: bytes) -> int:
            path.open("wb").close()
            raise KeyboardInterrupt

        monkeypatch.setattr(Path, "write_bytes", killed)
        with pytest.raises(KeyboardInterrupt):
            MetricsLog(tmp_path, last=1)
        assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1, 2]

    def test_what_cannot_be_written(self, tmp_path: Path) -> None:
        log, path = MetricsLog(tmp_path, last=-1), tmp_path / "metrics.jsonl"
        path.unlink()
        path.mkdir()
        with pytest.raises(InputError) as error:
            log.write(0, {"right": 0.25})
        assert str(error.value) == (
            f"cannot write to {path}: Is a directory; the last checkpoint is safe: make room and run the same command "
            "again"
        )
        log.close()

    def test_there_are_none_before_the_first_step(self, tmp_path: Path) -> None:
        assert read_metrics(tmp_path) == []
        assert read_metrics(str(tmp_path)) == []
