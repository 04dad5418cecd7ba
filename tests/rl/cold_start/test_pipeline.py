"""The stages of a cold start together: what comes out, what is left out, and that nothing is asked twice."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import load_dataset

from turnwise.agents.agent import Agent
from turnwise.agents.scripted import ScriptedAgent
from turnwise.environments.errors import InputError
from turnwise.environments.math_grader import MathGrader
from turnwise.environments.problem import Problem
from turnwise.environments.transcript import Reply, Turn
from turnwise.rl.cold_start.metric import at_least
from turnwise.rl.cold_start.pipeline import ColdStart, by_chance
from turnwise.rl.cold_start.rollouts import Continuation, RolloutSettings
from turnwise.rl.cold_start.thoughts import Chain, Dropped, WeighedChain

THOUGHTS = ("Okay, I need 1+1+1.", "Now 1+1 is 2.", "Wait, let me check: 2-1 is 1.", "Now 2+1 is 3, so \\boxed{3}.")
PROTOCOL, EIGHT = Continuation(max_tokens=8), RolloutSettings(samples=8)


def problem(name: str = "p", *thoughts: str) -> Problem:
    return Problem(name, f"What is {name}?", "3", solution="\n\n".join(thoughts or THOUGHTS))


class Counted(Agent):
    """Says what a function says, and counts how often it was asked."""

    def __init__(self, script: Callable[[Turn, int], str]) -> None:
        self.inner, self.asked = ScriptedAgent(script), 0

    async def reply(self, turn: Turn, seed: int) -> Reply:
        self.asked += 1
        return await self.inner.reply(turn, seed)


def base(turn: Turn, seed: int) -> str:
    """Right without a thought one time in eight or so, after two thoughts always, else half of the time."""
    said = "".join(message.text for message in turn.messages)
    sure = "Now 1+1 is 2" in said
    return "\\boxed{3}" if sure or seed % (2 if "Okay" in said else 8) == 0 else "\\boxed{4}"


def failing(turn: Turn, seed: int) -> str:
    raise RuntimeError("no such model")


def completer(turn: Turn, seed: int) -> str:
    outline = turn.messages[0].text.partition("Outline:\n")[2]
    numbers = [line.partition(".")[0] for line in outline.splitlines() if line.endswith("(to be written)")]
    return json.dumps({number: f"brief {number}" for number in numbers})


@pytest.fixture(scope="module")
def grader() -> MathGrader:
    with MathGrader() as grader:
        yield grader


def weigh(stages: ColdStart, chains: list[Chain], agent: Agent | None = None) -> list[WeighedChain]:
    return stages.weigh(chains, agent or ScriptedAgent(base), PROTOCOL, EIGHT)


def test_from_a_chain_to_a_dialogue(tmp_path: Path, grader: MathGrader) -> None:
    progress = dict[str, tuple[int, int]]()
    stages = ColdStart(tmp_path, grader, on_progress=lambda *told: progress.update({told[0]: told[1:]}))
    (chain,) = stages.chunk([problem()])
    assert [(thought.kind, thought.tokens) for thought in chain.thoughts] == [
        ("problem understanding", 4), ("calculation", 4), ("verification", 7), ("calculation", 6),
    ]  # fmt: skip
    (weighed,) = weigh(stages, [chain])
    assert weighed.rollouts == (8,) * 5
    assert weighed.right[2:] == (8, 8, 8)
    assert 0 < weighed.right[1] < 8
    assert weighed.long == (True, True, False, False)
    ((_, dialogue),) = stages.complete([weighed], ScriptedAgent(completer))
    assert dialogue == [
        ("long", "<think>Okay, I need 1+1+1.\n\nNow 1+1 is 2.</think>"),
        ("short", "<answer>brief 3\n\nbrief 4\n\n\\boxed{3}</answer>"),
    ]
    assert progress == {"rollouts": (40, 40), "completion": (1, 1)}
    assert stages.dropped == []
    assert (tmp_path / "dropped.jsonl").read_text() == ""


def test_thoughts_as_parquet(tmp_path: Path, grader: MathGrader) -> None:
    stages = ColdStart(tmp_path, grader)
    (weighed,) = weigh(stages, stages.chunk([problem()]))
    rows = load_dataset(
        "parquet", data_files=str(tmp_path / "thoughts.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    ).to_list()
    assert [row["text"].strip() for row in rows] == list(THOUGHTS)
    assert [row["place"] for row in rows] == [1, 2, 3, 4]
    assert [row["long"] for row in rows] == list(weighed.long)
    assert [row["score"] for row in rows] == list(weighed.scores)
    assert [(row["right_before"], row["right"], row["rollouts"]) for row in rows][1] == (weighed.right[1], 8, 8)


def test_what_cannot_be_used_is_left_out_and_the_rest_goes_on(tmp_path: Path, grader: MathGrader) -> None:
    def chunk(turn: Turn, seed: int) -> str:
        told = turn.messages[0].text
        if "deaf" in told:
            return "I would rather not."
        if "broken" in told:
            raise RuntimeError("the server is gone")
        steps = told.partition("\n\nSteps:\n")[2].count("Step ")
        return json.dumps([{"start": step, "end": step, "type": "calculation"} for step in range(1, steps + 1)])

    def unsteady(turn: Turn, seed: int) -> str:
        if "failing" in turn.messages[0].text:
            raise RuntimeError("out of memory")
        return base(turn, seed)

    def complete(turn: Turn, seed: int) -> str:
        if "astray" in turn.messages[0].text:
            return json.dumps({"3": "so \\boxed{4}", "4": "and no more"})
        return completer(turn, seed)

    stages = ColdStart(tmp_path, grader)
    problems = [problem(name) for name in ("fine", "deaf", "broken", "failing", "astray", "also fine")]
    problems += [problem("wrong", "One.", "Two, so \\boxed{2}."), problem("one paragraph", "All at once: \\boxed{3}.")]
    chains = stages.chunk(problems, chunker=ScriptedAgent(chunk))
    dialogues = stages.complete(weigh(stages, chains, ScriptedAgent(unsteady)), ScriptedAgent(complete))
    assert [solved.id for solved, _ in dialogues] == ["fine", "also fine"]
    said = {one.id: (one.stage, one.reason) for one in stages.dropped}
    assert said == {
        "wrong": ("reading", "its own answer is wrong"),
        "deaf": (
            "chunking",
            "no valid reply in 5 attempts; of the last: JSON was expected; got 'I would rather not.'",
        ),
        "broken": ("chunking", "RuntimeError: the server is gone"),
        "one paragraph": (
            "chunking",
            "a chain must have at least two thoughts, or there is nothing to weigh; it has no blank line",
        ),
        "failing": (
            "rollouts",
            "no continuation from the first 0 thoughts came to an end: RuntimeError: out of memory",
        ),
        "astray": ("completion", "the completed answer is wrong"),
    }
    written = [Dropped(**json.loads(line)) for line in (tmp_path / "dropped.jsonl").read_text().splitlines()]
    assert written == stages.dropped


def test_a_base_that_always_fails_leaves_nothing_and_says_why(tmp_path: Path, grader: MathGrader) -> None:
    stages = ColdStart(tmp_path, grader)
    assert weigh(stages, stages.chunk([problem("a"), problem("b")]), ScriptedAgent(failing)) == []
    assert [one.id for one in stages.dropped] == ["a", "b"]
    assert all(one.reason.endswith("RuntimeError: no such model") for one in stages.dropped)
    assert stages.complete([], ScriptedAgent(completer)) == []


def test_nothing_is_asked_twice_and_more_chains_and_more_continuations_only_what_is_new(
    tmp_path: Path, grader: MathGrader
) -> None:
    def run(names: str, samples: int = 8) -> tuple[list[WeighedChain], object, int, int]:
        stages, weigher, writer = ColdStart(tmp_path, grader), Counted(base), Counted(completer)
        chains = stages.chunk([problem(name) for name in names])
        weighed = stages.weigh(chains, weigher, PROTOCOL, RolloutSettings(samples=samples))
        return weighed, stages.complete(weighed, writer), weigher.asked, writer.asked

    first = run("ab")
    assert first[2:] == (80, 2)
    assert run("ab") == (*first[:2], 0, 0)
    more = run("abc")
    assert more[2:] == (40, 1)
    assert more[0][:2] == first[0]
    assert run("abc", samples=12)[2] == 3 * 5 * 4
    assert run("ab") == (*first[:2], 0, 0)  # of the twelve continuations, the first eight count


def test_a_chain_that_is_cut_otherwise_is_weighed_anew(tmp_path: Path, grader: MathGrader) -> None:
    whole = ScriptedAgent(
        lambda turn, seed: '[{"start": 1, "end": 3, "type": "a"}, {"start": 4, "end": 4, "type": "b"}]'
    )
    stages, weigher = ColdStart(tmp_path, grader), Counted(base)
    weigh(stages, stages.chunk([problem()]), weigher)
    weigh(stages, stages.chunk([problem()], chunker=whole), weigher)
    assert weigher.asked == 5 * 8 + 3 * 8


def test_a_gold_answer_that_is_mended_is_weighed_anew_and_another_completer_is_not(
    tmp_path: Path, grader: MathGrader
) -> None:
    def run(asked: Problem, completed_by: str) -> int:
        stages = ColdStart(tmp_path, grader, models={"completer": completed_by})
        weigher = Counted(base)
        weigh(stages, stages.chunk([asked]), weigher)
        return weigher.asked

    assert [run(problem(), "one"), run(problem(), "another")] == [40, 0]
    assert run(replace(problem(), answer="3.0"), "one") == 40
    assert run(replace(problem(), question="What, again?"), "one") == 40


def test_what_a_stage_dropped_is_said_once_however_often_it_is_called(tmp_path: Path, grader: MathGrader) -> None:
    stages = ColdStart(tmp_path, grader)
    for _ in range(2):
        chains = stages.chunk([problem("fine"), problem("wrong", "One.", "\\boxed{2}.")])
        for _ in range(2):
            weigh(stages, chains, ScriptedAgent(failing))
    assert [(one.id, one.stage) for one in stages.dropped] == [("wrong", "reading"), ("fine", "rollouts")]
    assert stages.failed == 40


def test_continuations_that_fail_are_counted_and_the_others_count(tmp_path: Path, grader: MathGrader) -> None:
    def unsteady(turn: Turn, seed: int) -> str:
        return failing(turn, seed) if seed % 4 == 0 else base(turn, seed)

    stages = ColdStart(tmp_path, grader)
    (weighed,) = weigh(stages, stages.chunk([problem()]), ScriptedAgent(unsteady))
    assert stages.failed == 40 - sum(weighed.rollouts) > 0
    assert stages.dropped == []


def test_another_seed_model_or_protocol_is_another_run(tmp_path: Path, grader: MathGrader) -> None:
    stages = ColdStart(tmp_path, grader, models={"base": "one"})
    chains = stages.chunk([problem()])
    weigh(stages, chains)
    with pytest.raises(InputError, match="base: 'one' there, 'another' here"):
        weigh(ColdStart(tmp_path, grader, models={"base": "another"}), chains)
    with pytest.raises(InputError, match="seed: 0 there, 1 here"):
        weigh(ColdStart(tmp_path, grader, models={"base": "one"}, seed=1), chains)
    with pytest.raises(InputError, match="protocol: "):
        stages.weigh(chains, ScriptedAgent(base), Continuation(max_tokens=9), EIGHT)


def test_other_scores_and_another_rule_take_the_place_of_the_papers(tmp_path: Path, grader: MathGrader) -> None:
    stages = ColdStart(tmp_path, grader)
    chains = stages.chunk([problem("a"), problem("b")])
    one, other = stages.weigh(chains, ScriptedAgent(base), PROTOCOL, EIGHT, score=by_chance(1))
    assert one.scores != other.scores
    assert one == stages.weigh(chains, ScriptedAgent(base), PROTOCOL, EIGHT, score=by_chance(1))[0]
    assert one.scores != stages.weigh(chains, ScriptedAgent(base), PROTOCOL, EIGHT, score=by_chance(2))[0].scores
    (every, _) = stages.weigh(chains, ScriptedAgent(base), PROTOCOL, EIGHT, assign=lambda s: at_least(s, -1))
    assert every.long == (True,) * 4
    ((_, dialogue), _) = stages.complete([every, other], ScriptedAgent(completer))
    everything = "\n\n".join(THOUGHTS)
    assert dialogue == [("long", f"<think>{everything}</think>"), ("short", "<answer>\\boxed{3}</answer>")]


def test_two_chains_of_one_id_are_refused(tmp_path: Path, grader: MathGrader) -> None:
    with pytest.raises(InputError, match="each chain needs an id of its own; 'b' stands more than once"):
        ColdStart(tmp_path, grader).chunk([problem("a"), problem("b"), problem("b", "Other.", "\\boxed{3}")])


def test_stopping_early_is_for_the_papers_scores_and_records_alone(tmp_path: Path, grader: MathGrader) -> None:
    stages, early = ColdStart(tmp_path, grader), RolloutSettings(samples=8, batch=4, stop_early=True)
    chains = stages.chunk([problem()])
    with pytest.raises(InputError, match="stop_early works with the scores M and strict records alone"):
        stages.weigh(chains, ScriptedAgent(base), PROTOCOL, early, score=by_chance(0))
    with pytest.raises(InputError, match="stop_early works with"):
        stages.weigh(chains, ScriptedAgent(base), PROTOCOL, early, assign=lambda scores: at_least(scores, 0))
    (full,) = weigh(stages, chains)
    nobody = ScriptedAgent(["nobody is asked again"] * 0)
    (stopped,) = stages.weigh(chains, nobody, PROTOCOL, early)
    assert sum(stopped.rollouts) < sum(full.rollouts)
    assert stopped.long == full.long
