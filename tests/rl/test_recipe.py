"""What a recipe plays, pays and trains."""

import pytest
from pydantic import ValidationError

from turnwise.environments.errors import InputError
from turnwise.protocols.long_short import LongShort
from turnwise.protocols.rewards import RewardSum, Schedule, ThinklessTable
from turnwise.protocols.thinkless import Thinkless
from turnwise.rl.learner import LearnerSettings
from turnwise.rl.recipe import LongShortRecipe, Recipe, ThinklessRecipe


def test_long_short_is_paid_by_its_schedule_and_length_reward() -> None:
    recipe = LongShortRecipe(
        brevity=((0, 0.0), (3, 1.0)), length="arora-zanette", right_beats_wrong=False, max_turns=8, long_tokens=7
    )
    protocol = recipe.protocol()
    assert isinstance(protocol, LongShort)
    reward = protocol.reward
    assert isinstance(reward, RewardSum)
    assert not reward.right_beats_wrong
    assert [(term.name, term.at(2), term.at(3)) for term in reward.weighted] == [
        ("correctness", 1.0, 1.0), ("format", 1.0, 1.0), ("arora zanette length", 0.0, 1.0),
    ]  # fmt: skip
    assert (protocol.graph.max_turns, protocol.graph.states["think"].max_tokens) == (8, 7)
    assert protocol.graph.states["answer"].max_tokens == 160


def test_the_short_model_learns_as_the_long_one_unless_told_otherwise() -> None:
    settings = LearnerSettings(learning_rate=3e-4)
    policies = LongShortRecipe(long="a", short="b", learner=settings).policies()
    assert [(name, policy.model, policy.seats, policy.learner) for name, policy in policies.items()] == [
        ("long", "a", ("long",), settings), ("short", "b", ("short",), settings),
    ]  # fmt: skip
    slower = LearnerSettings(learning_rate=1e-5)
    learners = [
        policy.learner for policy in LongShortRecipe(learner=settings, short_learner=slower).policies().values()
    ]
    assert learners == [settings, slower]


def test_thinkless_is_paid_by_its_table_and_learns_by_degrpo() -> None:
    recipe = ThinklessRecipe(model="m", gamma=0.3, short_tokens=5, think_tokens=9)
    protocol = recipe.protocol()
    assert isinstance(protocol, Thinkless)
    assert protocol.reward.weighted[0].term == ThinklessTable(gamma=0.3)
    assert [protocol.graph.states[mode].max_tokens for mode in ("short", "think")] == [5, 9]
    (policy,) = recipe.policies().values()
    assert (policy.model, policy.seats, policy.learner.loss.aggregation) == ("m", ("solver",), "degrpo")


@pytest.mark.parametrize("recipe", [LongShortRecipe, ThinklessRecipe])
def test_recipes_refuse_what_they_do_not_know(recipe: type[Recipe]) -> None:
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        recipe.model_validate({"nothing": 1})
    with pytest.raises(ValidationError, match="Instance is frozen"):
        recipe().train = "easy"  # type: ignore[misc]


def test_a_schedule_that_makes_no_sense_is_told_when_the_protocol_is_made() -> None:
    assert Schedule(LongShortRecipe().brevity).at(5) == 0.25
    with pytest.raises(InputError, match="steps must increase"):
        LongShortRecipe(brevity=((3, 0.0), (1, 0.0))).protocol()
