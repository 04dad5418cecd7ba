from collections.abc import Mapping
from pathlib import Path

import pytest

from turnwise.agents.tiny import LONG, SHORT
from turnwise.environments.arithmetic import arithmetic
from turnwise.environments.environment import Grade, Grader, Outcome
from turnwise.environments.errors import InputError
from turnwise.environments.problem import Problem
from turnwise.protocols.long_short import LongShort
from turnwise.rl.learner import LearnerSettings
from turnwise.rl.opponent_pool import cells_played, opponent_pool, weights_by_round
from turnwise.rl.rounds import parse_rounds
from turnwise.rl.summary import Summary
from turnwise.rl.trained_policy import Policy
from turnwise.rl.trainer import Trainer, TrainingSettings

POLICIES = ("long", "short")


class Boxed(Grader):
    """Right is what has the answer's digit in it."""

    async def grade(self, problem: Problem, text: str) -> Grade:
        return Grade(Outcome.RIGHT if f"{{{problem.answer}}}" in text else Outcome.WRONG)


def test_the_path_of_the_papers_rounds_as_literals() -> None:
    rounds = parse_rounds("long long short long short long", 30, POLICIES)
    walked = [(0, 0), (1, 0), (2, 0), (2, 1), (3, 1), (3, 2), (4, 2)]
    assert cells_played(rounds, "long", "short") == walked
    assert cells_played(rounds, "short", "long") == [(row, column) for column, row in walked]


def test_the_path_of_rounds_of_both_is_the_diagonal_and_third_parties_do_not_move_it() -> None:
    assert cells_played(parse_rounds("long+short long+short", 2, POLICIES), "long", "short") == [(0, 0), (1, 1), (2, 2)]
    rounds = parse_rounds("judge long judge+short", 2, (*POLICIES, "judge"))
    assert cells_played(rounds, "long", "short") == [(0, 0), (0, 0), (1, 0), (1, 1)]


def test_every_round_with_every_round_and_on_the_path_what_was_evaluated_then(tmp_path: Path) -> None:
    """Without chance in it, what an evaluation finds depends on the weights alone."""
    settings = TrainingSettings(
        rounds="long short", steps=2, problems=2, samples=3, temperature=1.3, evaluation_temperature=0, keep_episodes=0
    )
    environment = arithmetic(Boxed(), problem_set="easy", count=8)
    policies = {
        "long": Policy(LONG, ("long",), LearnerSettings(learning_rate=1e-3)),
        "short": Policy(SHORT, ("short",), LearnerSettings(learning_rate=3e-3)),
    }
    protocol = LongShort(max_turns=4, long_tokens=32, short_tokens=16)
    trainer = Trainer(protocol, policies, environment, environment, settings, tmp_path / "run")
    evaluated = [report.evaluation for report in trainer.train() if report.evaluation]
    after = weights(trainer)
    pool = opponent_pool(trainer, "long", "short")
    assert [len(row) for row in pool] == [2, 2]
    walked = [pool[row][column] for row, column in cells_played(trainer.rounds, "long", "short")]
    assert figures(walked) == figures(evaluated)
    assert len({str(figures([cell])) for row in pool for cell in row}) == 4, "the cells must be told apart"
    turned = opponent_pool(trainer, "short", "long")
    assert [figures(row) for row in turned] == [figures(column) for column in zip(*pool, strict=True)]
    assert weights(trainer) == after, "what is played with is not what is trained"


def figures(summaries: list[Summary] | tuple[Summary, ...]) -> list[Mapping[str, object]]:
    return [
        {"right": one.accuracy, "tokens": one.seat_tokens, "turns": one.turns, "episodes": one.episodes}
        for one in summaries
    ]


def weights(trainer: Trainer) -> dict[str, float]:
    return {
        name: sum(float(tensor.double().sum()) for tensor in trained.engine.model.state_dict().values())
        for name, trained in trainer.trained.items()
    }


def test_the_weights_of_a_policy_come_in_the_order_of_its_rounds(tmp_path: Path) -> None:
    policy = tmp_path / "policies" / "long"
    for name in ("r10", "r2", "r0", "r1.draft", "rest"):
        (policy / name).mkdir(parents=True)
    assert weights_by_round(tmp_path, "long") == [policy / "r0", policy / "r2", policy / "r10"]


def test_a_policy_that_has_no_weights(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        weights_by_round(tmp_path, "judge")
    assert str(error.value) == (
        f"{tmp_path} holds no weights of a policy 'judge': train it first, or name another policy"
    )
