import asyncio
import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import aclosing
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import turnwise
from turnwise.agents.agent import Agent
from turnwise.agents.scripted import ScriptedAgent
from turnwise.environments.answers import last_boxed
from turnwise.environments.environment import Grade, Grader, Outcome
from turnwise.environments.episode import Episode
from turnwise.environments.errors import InputError
from turnwise.environments.problem import Problem
from turnwise.environments.seeds import turn_seed
from turnwise.environments.transcript import Message, Reply, Step, Transcript, Turn
from turnwise.rl.cold_start.rollouts import Continuation, Prefixes, RolloutSettings, RolloutStore, draw
from turnwise.rl.cold_start.thoughts import Chain, Thought, steps_of

RUN: dict[str, str | int | float] = {"protocol": "test", "seed": 0}
Drawn = dict[tuple[str, int], tuple[str, int]]
"""Of each prefix and sample the outcome and the tokens."""


class BoxGrader(Grader):
    async def grade(self, problem: Problem, text: str) -> Grade:
        answer = last_boxed(text)
        outcome = Outcome.UNPARSABLE if answer is None else Outcome.RIGHT if answer == problem.answer else Outcome.WRONG
        return Grade(outcome, answer)


def chain(name: str = "p", thoughts: int = 3) -> Chain:
    """A chain whose first thoughts are short and whose last is long."""
    parts = tuple(Thought(f"Thought {n} on {name}.\n\n", "calculation", 50 + 30 * n) for n in range(1, thoughts + 1))
    return Chain(Problem(name, f"What is {name}?", "2", solution="".join(part.text for part in parts)), parts)


def gamble(turn: Turn, seed: int) -> str:
    """Right the more often the more of the chain is there, and by leaps; of a length of its own."""
    rng, thoughts = random.Random(seed), sum(message.role == "assistant" for message in turn.messages)
    right = rng.random() < (0.1, 0.2, 0.5, 0.5, 0.55, 0.8, 0.8, 0.8, 0.95)[thoughts]
    return f"{'so ' * rng.randrange(20)}\\boxed{{{2 if right else 3}}}"


class Unhurried(Agent):
    """Says what `gamble` has it say, after a sleep that is never the same."""

    async def reply(self, turn: Turn, seed: int) -> Reply:
        await asyncio.sleep(random.uniform(0, 0.002))
        return await ScriptedAgent(gamble).reply(turn, seed)


def failing(on: Callable[[Turn, int], bool]) -> ScriptedAgent:
    """Gambles, but fails on some turns."""

    def say(turn: Turn, seed: int) -> str:
        if on(turn, seed):
            raise RuntimeError("the server is down")
        return gamble(turn, seed)

    return ScriptedAgent(say)


async def run(
    store: RolloutStore,
    chains: list[Chain],
    settings: RolloutSettings,
    base: Agent | None = None,
    *,
    stop_after: int = 10**9,
    seed: int = 0,
) -> list[Episode]:
    episodes = list[Episode]()
    stream = draw(chains, Continuation(), base or ScriptedAgent(gamble), BoxGrader(), settings, store, seed=seed)
    async with aclosing(stream):
        async for episode in stream:
            episodes.append(episode)
            if len(episodes) == stop_after:
                break
    return episodes


def rolled_out(
    folder: Path, chains: list[Chain], settings: RolloutSettings, base: Agent | None = None, *, stop_after: int = 10**9
) -> list[Episode]:
    with RolloutStore(folder, RUN) as store:
        return asyncio.run(run(store, chains, settings, base, stop_after=stop_after))


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]


def drawn(folder: Path) -> Drawn:
    """What a folder holds; nothing twice."""
    found = {(line["prefix"], line["sample"]): (line["outcome"], line["tokens"]) for line in lines(folder)}
    assert len(found) == len(lines(folder)), "a continuation was drawn twice"
    return found  # type: ignore[return-value]


def results(folder: Path, chains: list[Chain]) -> list[tuple[list[tuple[int, int]], list[float]]]:
    """Of each chain the counts and the mean tokens, as a new process reads them."""
    with RolloutStore(folder, RUN) as store:
        return [
            (store.counts(one), [store.mean_tokens(one, n) for n in range(len(one.thoughts) + 1)]) for one in chains
        ]


# What the base model reads, and what is graded

QUESTION = Problem("p", "What is 1 + 1?", "2")
BEGUN = Problem("p", "What is 1 + 1?", "2", solution="<think>\nLet me add.\n\nIt is 2.\n\n")
CLOSED = Problem("p", "What is 1 + 1?", "2", solution="Let me add.\n\nIt is 2.\n</think>\n\n")


@pytest.mark.parametrize(
    ("protocol", "problem", "messages", "prefill"),
    [
        (Continuation(), QUESTION, [("user", "What is 1 + 1?")], ""),
        (
            Continuation(instruction="Be brief.", opening="<think>\n", closing="</think>"),
            QUESTION,
            [("system", "Be brief."), ("user", "What is 1 + 1?"), ("assistant", "<think>\n")],
            "</think>",
        ),
        (
            Continuation(closing="\n</think>"),
            BEGUN,
            [("user", "What is 1 + 1?"), ("assistant", "<think>\nLet me add.\n\n"), ("assistant", "It is 2.\n\n")],
            "\n</think>",
        ),
        (  # the chain begins with the opening itself
            Continuation(opening="<think>"),
            BEGUN,
            [("user", "What is 1 + 1?"), ("assistant", "<think>\nLet me add.\n\n"), ("assistant", "It is 2.\n\n")],
            "",
        ),
        (  # and this one already holds the closing
            Continuation(opening="<think>\n", closing="</think>"),
            CLOSED,
            [
                ("user", "What is 1 + 1?"),
                ("assistant", "<think>\n"),
                ("assistant", "Let me add.\n\n"),
                ("assistant", "It is 2.\n</think>\n\n"),
            ],
            "",
        ),
    ],
)
def test_what_the_base_model_reads(
    protocol: Continuation, problem: Problem, messages: list[tuple[str, str]], prefill: str
) -> None:
    (turn,) = protocol.next_turns(Transcript(problem))
    assert turn == Turn("base", "continue", tuple(Message(*each) for each in messages), (), 4096, prefill)  # type: ignore[arg-type]
    assert protocol.next_turns(Transcript(problem, (Step("base", "continue", Reply("", 0)),))) == []


def test_a_question_with_choices_and_a_budget() -> None:
    problem = Problem("p", "Which is even?", "B", choices=("1", "2"))
    (turn,) = Continuation(max_tokens=7).next_turns(Transcript(problem))
    assert turn == Turn("base", "continue", (Message("user", "Which is even?\n(A) 1\n(B) 2"),), (), 7)


pieces = st.sampled_from(["Let me add.", "2", " ", "\n", "\n\n", "\n \n", "<think>", "</think>", "    indented"])


@given(st.lists(pieces, max_size=30).map("".join), st.sampled_from(["", "<think>", "Let me"]))
def test_a_longer_prefix_continues_the_messages_of_a_shorter_one(text: str, opening: str) -> None:
    protocol, steps = Continuation(opening=opening), steps_of(text)
    read = list[tuple[Message, ...]]()
    for count in range(len(steps) + 1):
        (turn,) = protocol.next_turns(Transcript(Problem("p", "q", "a", solution="".join(steps[:count]))))
        read.append(turn.messages[1:])
        said = "".join(message.text for message in turn.messages[1:])
        assert said in ("".join(steps[:count]), opening + "".join(steps[:count]))
        assert said.startswith(opening)
    for shorter, longer in pairwise(read[1:]):
        assert longer[: len(shorter)] == shorter


@pytest.mark.parametrize(
    ("begun", "prefill", "said", "outcome"),
    [
        ("It is \\boxed{2}. ", "", "Done.", Outcome.RIGHT),  # the prefix has answered
        ("It is \\boxed{2}. ", "", "No, \\boxed{3}.", Outcome.WRONG),
        ("It is \\boxed{", "", "2}.", Outcome.RIGHT),
        ("It is ", "</think>\\boxed{", "2}.", Outcome.RIGHT),
        ("It is ", "", "two.", Outcome.UNPARSABLE),
    ],
)
def test_the_answer_is_read_from_the_chain_so_far_and_the_reply(
    begun: str, prefill: str, said: str, outcome: Outcome
) -> None:
    problem = Problem("p", "What is 1 + 1?", "2", solution=begun)
    answer = Continuation().answer(Transcript(problem, (Step("base", "continue", Reply(said, 1), prefill),)))
    assert answer == begun + prefill + said
    assert asyncio.run(BoxGrader().grade(problem, answer)).outcome is outcome


def test_right_is_paid_one() -> None:
    outcomes = (Outcome.RIGHT, Outcome.WRONG, Outcome.UNPARSABLE)
    transcript = Transcript(QUESTION, (Step("base", "continue", Reply("2", 1)),))
    group = [Episode(transcript, sample, 0, Grade(outcome)) for sample, outcome in enumerate(outcomes)]
    assert [rewards["base"].total for rewards in Continuation().rewards(group)] == [1, 0, 0]


def test_a_protocol_is_known_by_all_that_it_is_made_of() -> None:
    protocols = [
        Continuation(), Continuation(instruction="a"), Continuation(opening="a"), Continuation(closing="a"),
        Continuation(max_tokens=7),
    ]  # fmt: skip
    assert len({protocol.fingerprint for protocol in protocols}) == 5
    assert Continuation(opening="a").fingerprint == protocols[2].fingerprint


def test_prefixes() -> None:
    prefixes = Prefixes([chain("p"), chain("a/1#2")], [(0, 0), (0, 2), (1, 3)])
    assert [(problem.id, problem.solution) for problem in prefixes] == [
        ("p/0", ""),
        ("p/2", "Thought 1 on p.\n\nThought 2 on p.\n\n"),
        ("a/1#2/3", "Thought 1 on a/1#2.\n\nThought 2 on a/1#2.\n\nThought 3 on a/1#2.\n\n"),
    ]
    assert len(prefixes) == 3
    assert list(prefixes[1:]) == [prefixes[1], prefixes[-1]]
    assert (prefixes[1].question, prefixes[1].answer) == ("What is p?", "2")


# What is drawn


@pytest.mark.parametrize(
    ("settings", "rounds"),
    [
        (RolloutSettings(), [8]),
        (RolloutSettings(samples=20, batch=8), [20]),
        (RolloutSettings(samples=20, batch=8, stop_early=True), [8, 16, 20]),
        (RolloutSettings(samples=16, batch=8, stop_early=True), [8, 16]),
        (RolloutSettings(samples=5, batch=8, stop_early=True), [5]),
    ],
)
def test_rounds(settings: RolloutSettings, rounds: list[int]) -> None:
    assert settings.rounds == rounds


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"batch": 0}, {"z": 0}, {"concurrency": 0}, {"sample": 8}])
def test_settings_that_cannot_be(wrong: dict[str, int]) -> None:
    with pytest.raises(ValidationError):
        RolloutSettings.model_validate(wrong)


def test_each_prefix_is_continued_so_many_times_each_with_a_seed_of_its_own(tmp_path: Path) -> None:
    heard = list[tuple[str, int, int]]()

    def say(turn: Turn, seed: int) -> str:
        heard.append((turn.messages[0].text, len(turn.messages) - 1, seed))
        return gamble(turn, seed)

    chains = [chain("p", 3), chain("q", 2)]
    with RolloutStore(tmp_path / "run", RUN) as store:
        episodes = asyncio.run(run(store, chains, RolloutSettings(samples=5), ScriptedAgent(say), seed=7))
        assert store.drawn == len(episodes) == 35
    expected = {(f"p/{n}", sample) for n in range(4) for sample in range(5)}
    expected |= {(f"q/{n}", sample) for n in range(3) for sample in range(5)}
    assert drawn(tmp_path / "run").keys() == expected
    assert Counter(heard) == Counter(
        (f"What is {one.problem.id}?", n, turn_seed(7, f"{one.problem.id}/{n}", sample, 0))
        for one in chains for n in range(len(one.thoughts) + 1) for sample in range(5)
    )  # fmt: skip
    assert len({seed for _, _, seed in heard}) == 35


@pytest.mark.parametrize("stop_early", [False, True])
def test_neither_concurrency_nor_the_order_of_arrival_matters(tmp_path: Path, stop_early: bool) -> None:
    chains = [chain(name, 8) for name in "pqr"]
    settings = RolloutSettings(samples=24, batch=4, stop_early=stop_early)
    rolled_out(tmp_path / "1", chains, settings.model_copy(update={"concurrency": 1}))
    for concurrency in (7, 64):
        folder = tmp_path / str(concurrency)
        rolled_out(folder, chains, settings.model_copy(update={"concurrency": concurrency}), Unhurried())
        assert lines(folder) != lines(tmp_path / "1"), "all came in order"
        assert drawn(folder) == drawn(tmp_path / "1")
        assert results(folder, chains) == results(tmp_path / "1", chains)


def test_what_stopping_early_draws_is_some_of_what_is_drawn_without(tmp_path: Path) -> None:
    chains = [chain(f"p{n}", 8) for n in range(20)]
    rolled_out(tmp_path / "full", chains, RolloutSettings(samples=64))
    rolled_out(tmp_path / "early", chains, RolloutSettings(samples=64, stop_early=True))
    full, early = drawn(tmp_path / "full"), drawn(tmp_path / "early")
    assert len(full) == 20 * 9 * 64
    assert early.items() < full.items()
    assert len(early) < 0.6 * len(full)
    taken = Counter(prefix for prefix, _ in early)
    assert len(taken) == 20 * 9
    assert set(taken.values()) <= {8, 16, 24, 32, 40, 48, 56, 64}
    assert all((prefix, sample) in early for prefix, most in taken.items() for sample in range(most))


def test_no_chains(tmp_path: Path) -> None:
    assert rolled_out(tmp_path / "run", [], RolloutSettings(samples=16, stop_early=True)) == []


def test_mean_tokens_do_not_depend_on_the_order_of_lines(tmp_path: Path) -> None:
    chains = [chain("p", 4)]
    rolled_out(tmp_path / "run", chains, RolloutSettings(samples=9))
    expected, (_, tokens) = results(tmp_path / "run", chains), results(tmp_path / "run", chains)[0]
    by_hand = [
        [count for (prefix, _), (_, count) in drawn(tmp_path / "run").items() if prefix == f"p/{n}"] for n in range(5)
    ]
    assert tokens == [sum(counts) / 9 for counts in by_hand]
    path = tmp_path / "run" / "rollouts.jsonl"
    written = path.read_bytes().splitlines(keepends=True)
    random.Random(0).shuffle(written)
    path.write_bytes(b"".join(written))
    assert results(tmp_path / "run", chains) == expected


# The store


def ended(prefix: str, sample: int, outcome: Outcome | None, tokens: int = 10) -> Episode:
    transcript = Transcript(Problem(prefix, "q", "2"), (Step("base", "continue", Reply("", tokens)),))
    return Episode(transcript, sample, 0, outcome and Grade(outcome), None if outcome else f"boom {sample}")


def test_what_a_store_holds(tmp_path: Path) -> None:
    one = chain("a#1", 1)
    with RolloutStore(tmp_path / "run", RUN) as store:
        store.append(ended("a#1/0", 3, Outcome.RIGHT, 10))
        store.append(ended("a#1/0", 0, Outcome.TIMED_OUT, 15))
        store.append(ended("a#1/0", 1, None))
        store.append(ended("a#1/0", 2, None))
        store.append(ended("a#1/1", 0, Outcome.UNPARSABLE, 0))
        for _ in range(2):
            held = [f"a#1/{n}#{sample}" for n in range(3) for sample in range(5) if f"a#1/{n}#{sample}" in store.ids]
            failed = ["a#1/0#1", "a#1/0#2"] if store.failed else []
            assert held == sorted(["a#1/0#0", *failed, "a#1/0#3", "a#1/1#0"])
            assert store.failed in (0, 2)
            assert store.counts(one) == [(1, 2), (0, 1)]
            assert store.counts(one, [3, 0]) == [(0, 1), (0, 0)]
            assert (store.mean_tokens(one, 0), store.mean_tokens(one, 1)) == (12.5, 0)
            assert (store.mean_tokens(one, 0, 3), store.mean_tokens(one, 0, 0)) == (15, 0)
            assert store.drawn == 3
            if store.error(one, 0):
                assert (store.error(one, 0), store.error(one, 1)) == ("boom 2", "")
                store.close()
                store = RolloutStore(tmp_path / "run", RUN)
        assert store.error(one, 0) == "", "it is drawn again"
    assert (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines() == [
        '{"prefix":"a#1/0","sample":3,"outcome":"right","tokens":10}',
        '{"prefix":"a#1/0","sample":0,"outcome":"timed out","tokens":15}',
        '{"prefix":"a#1/1","sample":0,"outcome":"unparsable","tokens":0}',
    ]


# Continuations that fail


def test_a_base_model_that_always_fails(tmp_path: Path) -> None:
    one = chain("p", 2)
    with RolloutStore(tmp_path / "run", RUN) as store:
        settings = RolloutSettings(samples=12, batch=4, stop_early=True)
        episodes = asyncio.run(run(store, [one], settings, failing(lambda turn, seed: True)))
        assert all(episode.error == "RuntimeError: the server is down" for episode in episodes)
        assert store.counts(one) == [(0, 0)] * 3
        assert [store.error(one, n) for n in range(3)] == ["RuntimeError: the server is down"] * 3
        assert [store.mean_tokens(one, n) for n in range(3)] == [0, 0, 0]
        assert (store.drawn, store.failed) == (0, len(episodes))
        assert len({episode.id for episode in episodes}) == len(episodes), "none is asked for twice"
    assert lines(tmp_path / "run") == []


def test_a_chain_that_always_fails_holds_up_no_other(tmp_path: Path) -> None:
    chains = [chain("p"), chain("q"), chain("r")]
    rolled_out(tmp_path / "whole", chains, RolloutSettings(samples=4))
    with RolloutStore(tmp_path / "run", RUN) as store:
        base = failing(lambda turn, seed: turn.messages[0].text == "What is q?")
        asyncio.run(run(store, chains, RolloutSettings(samples=4), base))
        assert store.counts(chains[1]) == [(0, 0)] * 4
        assert [bool(store.error(one, 3)) for one in chains] == [False, True, False]
    expected = results(tmp_path / "whole", chains)
    expected[1] = [(0, 0)] * 4, [0] * 4
    assert results(tmp_path / "run", chains) == expected


@pytest.mark.parametrize("stop_early", [False, True])
def test_one_that_failed_is_drawn_again_and_counted_once(tmp_path: Path, stop_early: bool) -> None:
    chains = [chain(name, 8) for name in "pqrs"]
    settings = RolloutSettings(samples=16, batch=4, stop_early=stop_early)
    episodes = rolled_out(tmp_path / "run", chains, settings, failing(lambda turn, seed: seed % 4 == 0))
    before = drawn(tmp_path / "run")
    assert 0 < len(before) < len(episodes)
    again = rolled_out(tmp_path / "run", chains, settings)
    assert not {episode.id for episode in again} & {f"{prefix}#{sample}" for prefix, sample in before}
    after = drawn(tmp_path / "run")
    rolled_out(tmp_path / "whole", chains, RolloutSettings(samples=16))
    whole = drawn(tmp_path / "whole")
    assert before.items() < after.items() <= whole.items()
    least = 4 if stop_early else 16
    assert {(f"{name}/{n}", sample) for name in "pqrs" for n in range(9) for sample in range(least)} <= after.keys()
    for one, (counts, _) in zip(chains, results(tmp_path / "run", chains), strict=True):
        for n, count in enumerate(counts):
            ends = [outcome for (prefix, _), (outcome, _) in after.items() if prefix == f"{one.problem.id}/{n}"]
            assert count == (ends.count("right"), len(ends))


def test_an_agent_that_no_turn_can_suit_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="turn 1 needs another"):
        rolled_out(tmp_path / "run", [chain()], RolloutSettings(), ScriptedAgent([]))


# Stopped and taken up again


def reopened(folder: Path, batch: int) -> set[str]:
    """The prefixes that one round left alone and a later one drew again, of a run without concurrency."""
    found, latest = set[str](), 0
    for line in lines(folder):
        number = int(str(line["sample"])) // batch
        if number < latest:
            found.add(str(line["prefix"]))
        latest = max(latest, number)
    return found


@pytest.mark.parametrize(
    ("stop_early", "base"),
    [(False, ScriptedAgent(gamble)), (True, ScriptedAgent(gamble)), (True, failing(lambda turn, seed: seed % 9 == 0))],
)
def test_a_run_that_is_left_anywhere_goes_on_to_the_same_end(tmp_path: Path, stop_early: bool, base: Agent) -> None:
    chains = [chain(f"p{n}", 8) for n in range(8)]
    settings = RolloutSettings(samples=32, batch=2, stop_early=stop_early, concurrency=1)
    episodes = rolled_out(tmp_path / "whole", chains, settings, base)
    count, failed = len(episodes), {episode.id for episode in episodes if episode.error}
    if stop_early:
        assert len(reopened(tmp_path / "whole", 2)) > 3, "hardly a prefix was opened again"
    whole, expected = drawn(tmp_path / "whole"), results(tmp_path / "whole", chains)
    for stop in range(1, count, count // 8):
        folder = tmp_path / str(stop)
        rolled_out(folder, chains, settings, base, stop_after=stop)
        assert len(lines(folder)) < count
        rolled_out(folder, chains, settings, base, stop_after=max(1, (count - stop) // 2))
        rolled_out(folder, chains, settings, base)
        assert drawn(folder) == whole
        assert results(folder, chains) == expected
        assert {episode.id for episode in rolled_out(folder, chains, settings, base)} == failed


CHAINS = [chain(f"p{n}", 8) for n in range(12)]
LONG = RolloutSettings(samples=32, concurrency=16)


class Doomed(Unhurried):
    """Its process is killed once it has computed for so many seconds more after the first episodes."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.asked = seconds, 0

    async def reply(self, turn: Turn, seed: int) -> Reply:
        self.asked += 1
        if self.asked == LONG.concurrency + 1:
            signal.setitimer(signal.ITIMER_PROF, self.seconds)
        return await super().reply(turn, seed)


def in_forks(folder: str, stop_early: str, *seconds: str) -> None:
    """Rolls out `CHAINS`, again and again in a fork that is killed, and at last in one that is not.

    Each fork says how many continuations it found, and then begins; then comes its exit code.
    """
    for doom in (*map(float, seconds), 0):
        child = os.fork()
        if child == 0:
            with RolloutStore(folder, RUN) as store:
                print(store.drawn, flush=True)
                settings = LONG.model_copy(update={"stop_early": stop_early == "True"})
                asyncio.run(run(store, CHAINS, settings, Doomed(doom)))
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


@pytest.mark.parametrize("stop_early", [False, True])
def test_kills_draw_nothing_twice_and_change_nothing(tmp_path: Path, stop_early: bool) -> None:
    rolled_out(tmp_path / "whole", CHAINS, LONG.model_copy(update={"stop_early": stop_early}))
    rng, folder = random.Random(), tmp_path / "run"
    done = subprocess.run(
        [sys.executable, __file__, str(folder), str(stop_early), *(str(rng.uniform(0.001, 0.015)) for _ in range(6))],
        env={**os.environ, "PYTHONPATH": str(Path(turnwise.__file__).parents[1])},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    told = list(map(int, done.stdout.split()))
    found, codes = told[::2], told[1::2]
    assert codes == [-signal.SIGPROF] * 6 + [0]
    assert found == sorted(found)
    assert len(set(found)) > 2, f"runs went on from {found} continuations"
    assert drawn(folder) == drawn(tmp_path / "whole")
    assert results(folder, CHAINS) == results(tmp_path / "whole", CHAINS)


def filled(folder: Path) -> Path:
    rolled_out(folder, [chain("p", 1)], RolloutSettings(samples=2))
    return folder / "rollouts.jsonl"


@pytest.mark.parametrize("left", [1, 20, 56])
def test_a_torn_last_line_is_drawn_again(tmp_path: Path, left: int) -> None:
    path = filled(tmp_path / "run")
    whole, before = drawn(tmp_path / "run"), path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(before[:-1]) + before[-1][:left])
    with RolloutStore(tmp_path / "run", RUN) as store:
        assert store.drawn == 3
        assert path.read_bytes() == b"".join(before[:-1])
        assert len(asyncio.run(run(store, [chain("p", 1)], RolloutSettings(samples=2)))) == 1
    assert drawn(tmp_path / "run") == whole


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"prefix":"p/0","sample', "unexpected .*"),
        ('{"prefix":"p/0","sample":0,"tokens":3}', "'outcome'"),
        ('{"prefix":"p/0","sample":0,"outcome":"odd","tokens":3}', "'odd' is not a valid Outcome"),
        ('{"prefix":"p/0","sample":"x","outcome":"right","tokens":3}', "invalid literal .*"),
        ("[]", "list indices .*"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str, fault: str) -> None:
    path = filled(tmp_path / "run")
    before = path.read_text().splitlines()
    path.write_text("\n".join([before[0], line, *before[2:], ""]))
    with pytest.raises(InputError, match=rf"^line 2 of .*rollouts\.jsonl is damaged: {fault}; remove that line$"):
        RolloutStore(tmp_path / "run", RUN)
    path.write_text("\n".join([before[0], *before[2:], ""]))
    with RolloutStore(tmp_path / "run", RUN) as store:  # the failed opening has given the folder back
        assert store.drawn == 3


def test_another_runs_folder(tmp_path: Path) -> None:
    filled(tmp_path / "run")
    with pytest.raises(InputError, match=r"holds another run \(seed: 0 there, 1 here\)"):
        RolloutStore(tmp_path / "run", {**RUN, "seed": 1})


def test_a_second_writer(tmp_path: Path) -> None:
    filled(tmp_path / "run")
    with RolloutStore(tmp_path / "run", RUN), pytest.raises(InputError, match="another process is writing to"):
        RolloutStore(tmp_path / "run", RUN)


if __name__ == "__main__":
    in_forks(*sys.argv[1:])
