"""The contract of engines, kept by each agent that can be had here, and broken by agents that break one rule each."""

import asyncio
import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
import typer
from transformers import PreTrainedModel

from turnwise.agents import contract
from turnwise.agents.agent import Agent
from turnwise.agents.contract import CHECKS, Check, Subject, problem_id
from turnwise.agents.engine import Engine
from turnwise.agents.replay import ReplayAgent
from turnwise.agents.scripted import ScriptedAgent
from turnwise.agents.tiny import LONG
from turnwise.agents.transformers_agent import TransformersAgent, TransformersEngine
from turnwise.environments.episode import Episode
from turnwise.environments.errors import InputError
from turnwise.environments.problem import Problem
from turnwise.environments.seeds import turn_seed
from turnwise.environments.transcript import Reply, Step, Transcript, Turn

every_check = pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return TransformersEngine.load(LONG)


@pytest.fixture(scope="module")
def reference(engine: TransformersEngine) -> PreTrainedModel:
    """Weights of its own, so that no engine can touch those that it is held against."""
    return copy.deepcopy(engine.model)


@pytest.fixture(scope="module")
def subject(engine: TransformersEngine, reference: PreTrainedModel) -> Callable[..., Subject]:
    def of(make: Callable[..., Agent]) -> Subject:
        return Subject(
            lambda temperature, top_p: make(engine, temperature=temperature, top_p=top_p),
            reference, engine.tokenizer, engine.context,
        )  # fmt: skip

    return of


Said = dict[tuple[Turn, int], Reply | Exception]


class Recording(TransformersAgent):
    """Keeps what it says, by turn and seed."""

    def __init__(self, said: Said, engine: Engine, *, temperature: float, top_p: float) -> None:
        super().__init__(engine, temperature=temperature, top_p=top_p)
        self.said = said

    async def reply(self, turn: Turn, seed: int) -> Reply:
        try:
            self.said[turn, seed] = await super().reply(turn, seed)
        except ValueError as error:
            self.said[turn, seed] = error
        said = self.said[turn, seed]
        if isinstance(said, Exception):
            raise said
        return said


@pytest.fixture(scope="module")
def recorded(subject: Callable[..., Subject]) -> Callable[[Check], Callable[[float, float], Said]]:
    """What transformers says in a check, which it passes, by temperature and top-p."""

    @cache
    def record(check: Check) -> Callable[[float, float], Said]:
        by_sampling: dict[tuple[float, float], Said] = {}

        def make(engine: Engine, *, temperature: float, top_p: float) -> Agent:
            said = by_sampling.setdefault((temperature, top_p), {})
            return Recording(said, engine, temperature=temperature, top_p=top_p)

        asyncio.run(check(subject(make)))
        return lambda temperature, top_p: by_sampling[temperature, top_p]

    return record


@every_check
def test_transformers_keeps_it(check: Check, recorded: Callable[[Check], Callable[[float, float], Said]]) -> None:
    recorded(check)


@every_check
def test_a_script_of_replies_keeps_it(
    check: Check, subject: Callable[..., Subject], recorded: Callable[[Check], Callable[[float, float], Said]]
) -> None:
    said = recorded(check)

    def say(lines: Said, turn: Turn, seed: int) -> Reply:
        line = lines[turn, seed]
        if isinstance(line, Exception):
            raise line
        return line

    asyncio.run(check(subject(lambda _, temperature, top_p: ScriptedAgent(partial(say, said(temperature, top_p))))))


@cache
def samples(problem_id: str) -> dict[int, int]:
    """The samples of a problem, by their seeds."""
    return {turn_seed(0, problem_id, sample, 0): sample for sample in range(contract.SAMPLES)}


# A replay knows no prompt, and no tag, that an engine would refuse.
OF_PROMPTS = (contract.a_prompt_that_does_not_fit_fails_its_turn,)


@pytest.mark.parametrize("check", [check for check in CHECKS if check not in OF_PROMPTS], ids=lambda one: one.__name__)
def test_a_replay_of_stored_episodes_keeps_it(
    check: Check, subject: Callable[..., Subject], recorded: Callable[[Check], Callable[[float, float], Said]]
) -> None:
    said = recorded(check)

    def episode(turn: Turn, seed: int, reply: Reply) -> Episode:
        problem = Problem(problem_id(turn), "?", "0")
        step = Step(turn.seat, turn.state, reply, turn.prefill)
        return Episode(Transcript(problem, (step,)), samples(problem.id)[seed], 0)

    def make(_: Engine, *, temperature: float, top_p: float) -> ReplayAgent:
        lines = said(temperature, top_p).items()
        return ReplayAgent(episode(*asked, line) for asked, line in lines if isinstance(line, Reply))

    asyncio.run(check(subject(make)))


# Agents that break one rule each


class Warm(TransformersAgent):
    """Is warmer than it says."""

    def __init__(self, engine: Engine, *, temperature: float, top_p: float) -> None:
        super().__init__(engine, temperature=temperature, top_p=top_p)
        self.temperature = temperature + 1


class Raw(TransformersAgent):
    """Gives the log-probabilities of temperature 1, whatever its own."""

    async def reply(self, turn: Turn, seed: int) -> Reply:
        reply = await super().reply(turn, seed)
        if self.temperature == 0:
            return reply
        return replace(reply, log_probabilities=tuple(x * self.temperature for x in reply.log_probabilities))


class Cold(TransformersAgent):
    """Leaves the least likely tokens out."""

    def __init__(self, engine: Engine, *, temperature: float, top_p: float) -> None:
        super().__init__(engine, temperature=temperature, top_p=min(top_p, 0.3))


class Counting(TransformersAgent):
    """Counts, and minds no seed."""

    count = itertools.count()

    async def reply(self, turn: Turn, seed: int) -> Reply:
        return await super().reply(turn, next(self.count))


class Unheeding(TransformersAgent):
    """One reply a turn, whatever the seed."""

    async def reply(self, turn: Turn, seed: int) -> Reply:
        return await super().reply(turn, 0)


class OnceDrawn(TransformersAgent):
    """Samples the first token of a reply, and of the others the likeliest."""

    async def reply(self, turn: Turn, seed: int) -> Reply:
        first = await super().reply(turn._replace(max_tokens=1), seed)
        if turn.max_tokens == 1 or first.finish != "length":
            return first
        rest = await self.engine.sample(
            [*first.prompt_token_ids, *first.token_ids],
            stops=turn.stops,
            max_tokens=turn.max_tokens - 1,
            seed=seed,
            temperature=0,
        )
        return replace(
            rest,
            text=first.text + rest.text,
            token_count=1 + rest.token_count,
            token_ids=first.token_ids + rest.token_ids,
            log_probabilities=first.log_probabilities + rest.log_probabilities,
            prompt_token_ids=first.prompt_token_ids,
        )


class FewSeeds(TransformersAgent):
    """Knows two seeds."""

    async def reply(self, turn: Turn, seed: int) -> Reply:
        return await super().reply(turn, seed % 2)


class Unhearing(TransformersAgent):
    """Knows no tag that is a token."""

    async def reply(self, turn: Turn, seed: int) -> Reply:
        added = self.engine.tokenizer.get_added_vocab()
        return await super().reply(turn._replace(stops=tuple(tag for tag in turn.stops if tag not in added)), seed)


class Deaf(TransformersAgent):
    """Goes on to the end of a turn that was cancelled."""

    async def reply(self, turn: Turn, seed: int) -> Reply:
        task = asyncio.ensure_future(super().reply(turn, seed))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            return await task


class Late(TransformersAgent):
    """Says a token more, after the tag."""

    async def reply(self, turn: Turn, seed: int) -> Reply:
        reply = await super().reply(turn, seed)
        if reply.finish != "stop" or turn.max_tokens == 1:
            return reply
        whole = await super().reply(turn._replace(stops=(), max_tokens=reply.token_count + 1), seed)
        return replace(whole, finish=reply.finish, stop=reply.stop)


class Greedy(TransformersAgent):
    """Takes a token more than it was given."""

    async def reply(self, turn: Turn, seed: int) -> Reply:
        more = turn.max_tokens + (turn.max_tokens > 1)
        return await super().reply(turn._replace(max_tokens=more), seed)


class Cutting(TransformersAgent):
    """Cuts a prompt that does not fit."""

    async def reply(self, turn: Turn, seed: int) -> Reply:
        prompt = self.engine.template.prompt(turn)
        if len(prompt) < self.engine.context:
            return await super().reply(turn, seed)
        return await self.engine.sample(prompt[-9:], stops=turn.stops, max_tokens=turn.max_tokens, seed=seed)


class Strict(TransformersAgent):
    """Ends the run where a prompt does not fit."""

    async def reply(self, turn: Turn, seed: int) -> Reply:
        try:
            return await super().reply(turn, seed)
        except ValueError as error:
            raise InputError(str(error)) from error


class Modeless(TransformersAgent):
    """Takes any tag for a mode."""

    async def reply(self, turn: Turn, seed: int) -> Reply:
        prompt = self.engine.template.prompt(turn)
        return await self.engine.sample(prompt, stops=turn.stops, max_tokens=turn.max_tokens, seed=seed, temperature=0)


class Fragile(TransformersAgent):
    """Is broken by one cancelled turn."""

    cancelled = False

    async def reply(self, turn: Turn, seed: int) -> Reply:
        try:
            reply = await super().reply(turn, seed)
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        if self.cancelled:
            raise RuntimeError("it is broken")
        return reply


class Retokenising(TransformersAgent):
    """Reads what was said as text."""

    async def reply(self, turn: Turn, seed: int) -> Reply:
        messages = tuple(message._replace(reply=None, text=message.text.strip()) for message in turn.messages)
        return await super().reply(turn._replace(messages=messages), seed)


class Forgetful(TransformersAgent):
    """Computes later turns with other weights, as with stale keys and values."""

    async def reply(self, turn: Turn, seed: int) -> Reply:
        reply = await super().reply(turn, seed)
        if len(turn.messages) == 1:
            return reply
        return replace(reply, log_probabilities=tuple(x - 0.01 for x in reply.log_probabilities))


BROKEN: list[tuple[type[TransformersAgent], Check, str]] = [
    (Warm, contract.greedy_replies_are_the_likeliest_tokens, "greedy tokens are less likely than others, by up to"),
    (Greedy, contract.greedy_replies_are_the_likeliest_tokens, "41 tokens were sampled, of 40 at most"),
    (Raw, contract.log_probabilities_are_those_of_what_was_sampled_from, r"at temperature 0\.7 and top_p 1\.0 are up"),
    (Cold, contract.samples_follow_the_distribution, "has probability .*, and was .* of .* samples at 0"),
    (Counting, contract.seeds_decide, "another order gave other replies"),
    (Unheeding, contract.seeds_decide, "128 seeds gave 16 different replies"),
    (FewSeeds, contract.seeds_decide, "128 seeds gave .* different replies"),
    (OnceDrawn, contract.samples_follow_the_distribution, "has probability .*, and was .* samples at [1-9]"),
    (Late, contract.closing_tags_end_replies, "a reply that .* should end as .* with .* ended as"),
    (Unhearing, contract.closing_tags_end_replies, "a reply that .* should end as .*</think>.* ended as .* with None"),
    (Deaf, contract.a_cancelled_turn_leaves_the_others_alone, "a cancelled turn came to Reply"),
    (Greedy, contract.budget_and_context_end_replies, "3 tokens were sampled, of 2 at most"),
    (Cutting, contract.a_prompt_that_does_not_fit_fails_its_turn, "a prompt that does not fit came to Reply"),
    (Strict, contract.a_prompt_that_does_not_fit_fails_its_turn, "a prompt that does not fit came to InputError"),
    (Modeless, contract.a_choice_of_mode_is_one_token, "a tag that is no token was taken, and came to Reply"),
    (Fragile, contract.a_cancelled_turn_leaves_the_others_alone, "beside a cancelled one came to RuntimeError"),
    (Retokenising, contract.later_prompts_continue_earlier_ones, "does not continue what was read and said before"),
    (Forgetful, contract.later_prompts_continue_earlier_ones, r"are up to 0\.01 nats off"),
]


@pytest.mark.parametrize(("broken", "check", "found"), BROKEN, ids=lambda one: getattr(one, "__name__", ""))
def test_an_agent_that_breaks_a_rule_is_found_out(
    broken: type[TransformersAgent], check: Check, found: str, subject: Callable[..., Subject]
) -> None:
    with pytest.raises(AssertionError, match=found) as failure:
        asyncio.run(check(subject(broken)))
    assert "\n" not in str(failure.value)


def test_every_rule_is_broken_by_some_agent() -> None:
    assert {check for _, check, _ in BROKEN} == set(CHECKS)


def test_other_weights_are_found_out(engine: TransformersEngine, reference: PreTrainedModel) -> None:
    other = copy.deepcopy(reference)
    with torch.no_grad():
        other.get_output_embeddings().weight.mul_(1.01)
    make = partial(TransformersAgent, engine)
    subject = Subject(lambda t, p: make(temperature=t, top_p=p), other, engine.tokenizer, engine.context)
    with pytest.raises(AssertionError, match=r"greedy tokens are less|log-probabilities at temperature 0 and"):
        asyncio.run(contract.greedy_replies_are_the_likeliest_tokens(subject))


async def nobody_speaks(subject: Subject) -> None:
    raise RuntimeError("[b]it[/b] is broken")


def test_it_is_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(contract, "CHECKS", (contract.a_choice_of_mode_is_one_token,) * 2)
    with pytest.raises(typer.Exit) as kept:
        contract.main(str(LONG))
    assert (kept.value.exit_code, capsys.readouterr().out.count(" s  kept\n")) == (0, 2)
    monkeypatch.setattr(contract, "CHECKS", (contract.a_choice_of_mode_is_one_token, nobody_speaks))
    with pytest.raises(typer.Exit) as broken:
        contract.main(str(LONG))
    printed = capsys.readouterr().out
    assert (broken.value.exit_code, printed.count(" s  kept\n")) == (1, 1)
    assert "RuntimeError: [b]it[/b] is broken" in printed
    with pytest.raises(InputError, match="there is no folder"):
        contract.main("/nowhere")
