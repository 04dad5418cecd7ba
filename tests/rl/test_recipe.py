"""What a recipe plays, pays and trains."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from turnwise.command import read_config
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
    assert protocol.graph.states["answer"].max_tokens == 120


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


# The recipes of examples/openrlhf

FOLDER = Path(__file__).parents[2] / "examples" / "openrlhf"
LONGSHORT = ("longshort_llama_8b", "longshort_qwen_7b", "longshort_tiny")
THINKLESS = ("thinkless_1.5b", "thinkless_tiny")


def recipe_in(name: str) -> Recipe:
    recipe = LongShortRecipe if name.startswith("longshort") else ThinklessRecipe
    return read_config(recipe, ["--config", str(FOLDER / f"{name}.toml")])


def test_every_recipe_that_is_shipped_is_tried_here() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.toml")) == [*LONGSHORT, *THINKLESS]


@pytest.mark.parametrize("name", [*LONGSHORT, *THINKLESS])
def test_a_shipped_recipe_trains_on_openrlhf_says_how_and_is_whole(name: str) -> None:
    recipe, text = recipe_in(name), (FOLDER / f"{name}.toml").read_text()
    assert recipe.backend == "openrlhf"
    assert recipe.output == Path("runs") / name
    command = "longshort" if name in LONGSHORT else "thinkless"
    assert f"turnwise train {command} --config examples/openrlhf/{name}.toml" in text
    seats = recipe.protocol().seats
    assert sorted(seat for policy in recipe.policies().values() for seat in policy.seats) == sorted(seats)
    if name.endswith("_tiny"):
        assert (recipe.openrlhf.gpus_per_rank, recipe.openrlhf.gpus_per_actor, recipe.openrlhf.precision) == (
            0,
            0,
            "fp32",
        )
    else:
        assert "ray start --head" in text
        assert "ray start --address" in text


def test_thinkless_as_the_paper_prints_it() -> None:
    recipe = recipe_in("thinkless_1.5b")
    assert isinstance(recipe, ThinklessRecipe)
    assert (recipe.train, recipe.train_problems, recipe.gamma) == ("deepscaler", 40_315, 0.5)
    assert (recipe.think_tokens, recipe.openrlhf.context) == (24_576, 1024 + 1 + 24_576)
    training = recipe.training
    assert (training.steps, training.problems, training.samples, training.temperature) == (600, 128, 8, 0.6)
    assert training.estimator == "mean-centred"
    learner = recipe.learner
    assert (learner.learning_rate, learner.schedule, learner.weight_decay) == (1e-6, "constant", 0.01)
    assert learner.betas == (0.9, 0.999)
    assert training.problems // learner.mini_batches == 64
    loss = learner.loss
    assert (loss.aggregation, loss.alpha, loss.clip_low, loss.clip_high) == ("degrpo", 1e-3, 0.2, 0.2)
    assert (loss.kl, loss.kl_coefficient, loss.entropy_coefficient) == ("k3", 1e-3, 0)
    assert recipe.openrlhf.ranks == 4


@pytest.mark.parametrize("name", ["longshort_qwen_7b", "longshort_llama_8b"])
def test_long_short_as_the_paper_and_its_code_have_it(name: str) -> None:
    recipe = recipe_in(name)
    assert isinstance(recipe, LongShortRecipe)
    training, learner = recipe.training, recipe.learner
    assert training.rounds == "long long short long short long"
    assert (recipe.train, training.temperature, training.estimator, training.grouping) == (
        "math-train", 0.9, "mean-centred", "seat",
    )  # fmt: skip
    assert (learner.learning_rate, learner.schedule, recipe.long_tokens, recipe.short_tokens) == (
        5e-6,
        "cosine",
        1024,
        512,
    )
    loss = learner.loss
    assert (loss.kl_coefficient, loss.clip_low, loss.clip_high) == (0.04, 0.2, 0.2)
    # As many dialogues a round as the code's 8 epochs of 2 samples each.
    assert training.samples * training.problems * training.steps == 2 * 8 * (7474 // 64) * 64
    # µ is 0 in the first round, rises with each round, and ends at 1.
    µ = [recipe.protocol().reward.weighted[2].at(number * training.steps + 1) for number in range(6)]
    assert µ == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert [term.at(1) for term in recipe.protocol().reward.weighted[:2]] == [1.0, 1.0]
    assert not recipe.protocol().reward.right_beats_wrong
    assert len(recipe.policies()) * recipe.openrlhf.ranks == 8


@pytest.mark.parametrize(
    ("tiny", "paper"), [("longshort_tiny", "longshort_qwen_7b"), ("thinkless_tiny", "thinkless_1.5b")]
)
def test_a_tiny_recipe_is_the_papers_but_for_what_a_laptop_or_its_models_ask_for(tiny: str, paper: str) -> None:
    one, other = recipe_in(tiny).model_dump(), recipe_in(paper).model_dump()
    size = {"long", "short", "model", "output", "train", "train_problems", "test", "test_problems", "brevity", "gamma",
            "think_tokens", "short_tokens", "long_tokens", "openrlhf"}  # fmt: skip
    kept = one.keys() - size - {"training", "learner"}
    assert {name: one[name] for name in kept} == {name: other[name] for name in kept}
    training, learning = (
        {name: (one[part][name], other[part][name]) for name in one[part]} for part in ("training", "learner")
    )
    assert {name for name, (mine, theirs) in training.items() if mine != theirs} <= {
        "steps", "problems", "temperature", "evaluate_every", "estimator",
    }  # fmt: skip
    assert {name for name, (mine, theirs) in learning.items() if mine != theirs} <= {
        "learning_rate", "micro_batch_size", "loss",
    }  # fmt: skip
    losses = one["learner"]["loss"], other["learner"]["loss"]
    assert {name for name in losses[0] if losses[0][name] != losses[1][name]} <= {"alpha"}


@pytest.mark.parametrize("name", [*LONGSHORT, *THINKLESS])
def test_a_wrong_key_is_one_line(name: str, tmp_path: Path) -> None:
    recipe, file = LongShortRecipe if name in LONGSHORT else ThinklessRecipe, tmp_path / "wrong.toml"
    file.write_text((FOLDER / f"{name}.toml").read_text().replace("[learner.loss]", "[learner.loss]\nalhpa = 1.0"))
    with pytest.raises(InputError, match=r"^learner\.loss\.alhpa: Extra inputs are not permitted; got 1\.0$"):
        read_config(recipe, ["--config", str(file)])
