"""What every token-exact agent keeps to, whatever engine it speaks with: a check for each rule.

    python -m turnwise.agents.contract MODEL                                   # transformers, on the CPU
    python -m turnwise.agents.contract MODEL --engine vllm                     # vLLM, on the GPU where there is one
    python -m turnwise.agents.contract MODEL --engine server --url http://127.0.0.1:8000/v1

holds an engine against plain forward passes of transformers over the same weights, and prints what it found. In tests,
parametrise over `CHECKS` and run `asyncio.run(check(Subject(...)))`: a check that fails raises an AssertionError, which
says what was found.
"""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from turnwise.agents.agent import Agent
from turnwise.agents.chat import ChatTemplate, decode
from turnwise.agents.team import EngineName, open_engine
from turnwise.agents.transformers_engine import TransformersEngine
from turnwise.environments.errors import InputError
from turnwise.environments.seeds import turn_seed
from turnwise.environments.transcript import Message, Reply, Turn

QUESTION = "Carla has a counter with one digit, which shows 6. Carla adds {}. Which digit does it show, modulo 10?"
SAMPLES, PLACES = 1000, 16
PATIENCE = 60.0  # seconds for a turn, at a server
WARM = 2.0  # models that are sure of themselves sample more than one thing there


@dataclass(frozen=True, slots=True)
class Subject:
    """The agents under test, made for a temperature and a top-p, and the weights that they must speak for.

    `context` is how many tokens prompt and reply may have together. Log-probabilities (nats) may differ by `tolerance`
    from those of a forward pass: by default what float32 allows.
    """

    agent: Callable[[float, float], Agent]
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    context: int
    tolerance: float = 1e-3

    def log_probabilities(self, reply: Reply, temperature: float, top_p: float = 1.0) -> torch.Tensor:
        """Those of all tokens [sampled, vocabulary] at each place of a reply, by a forward pass."""
        ids = torch.tensor([reply.prompt_token_ids + reply.token_ids], device=self.model.device)
        with torch.no_grad():
            logits = self.model(ids, use_cache=False).logits[0, len(reply.prompt_token_ids) - 1 : -1].float().cpu()
        logits = logits / (temperature or 1.0)
        ordered, order = logits.softmax(-1).sort(descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p
        outside[:, 0] = False
        masked = logits.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), -torch.inf)
        log_probabilities: torch.Tensor = masked.log_softmax(-1)
        return log_probabilities


def question(number: int, *, max_tokens: int = 40, stops: tuple[str, ...] = (), prefill: str = "<think>") -> Turn:
    """One of many turns, of many lengths."""
    text = " ".join(QUESTION.format(number + more) for more in range(1 + number % 4))
    return Turn("seat", "state", (Message("user", text),), stops, max_tokens, prefill)


def seed_of(turn: Turn, sample: int = 0) -> int:
    """The seed with which a check asks for a turn, as `turn_seed` gives it in a run with seed 0."""
    return turn_seed(0, problem_id(turn), sample, 0)


def problem_id(turn: Turn) -> str:
    """The problem's id in `seed_of`."""
    said = [message.text for message in turn.messages]
    return repr((said, turn.stops, turn.max_tokens, turn.prefill))


async def ask(agent: Agent, turns: Sequence[Turn], sample: int = 0) -> list[Reply]:
    """The replies to turns that are all asked for at once."""
    return list(await asyncio.gather(*(agent.reply(turn, seed_of(turn, sample)) for turn in turns)))


async def greedy_replies_are_the_likeliest_tokens(subject: Subject) -> None:
    """Also after prompts that share a beginning with earlier ones."""
    turns = [question(number) for number in range(16)]
    for _ in range(2):
        for turn, reply in zip(turns, await ask(subject.agent(0, 1), turns), strict=True):
            _is_whole(subject, turn, reply)
            _is_likeliest(subject, reply)


async def log_probabilities_are_those_of_what_was_sampled_from(subject: Subject) -> None:
    """At temperatures and nuclei of every kind: these are what a trainer divides by."""
    turns = [question(number) for number in range(8)]
    for temperature, top_p in ((0.0, 1.0), (1.0, 1.0), (0.7, 1.0), (1.0, 0.8), (1.3, 0.5)):
        for reply in await ask(subject.agent(temperature, top_p), turns):
            _log_probabilities_agree(subject, reply, temperature, top_p)


async def samples_follow_the_distribution(subject: Subject) -> None:
    """A thousand samples of the token that a reply is least certain of, and of those after it."""
    turn = question(1)
    said = (await ask(subject.agent(0, 1), [turn]))[0]
    certainty = subject.log_probabilities(said, WARM).max(-1).values
    begun = decode(subject.tokenizer, said.token_ids[: int(certainty.argmin())])
    agent, turn = subject.agent(WARM, 1.0), turn._replace(prefill=turn.prefill + begun, max_tokens=PLACES)
    replies = await asyncio.gather(*(agent.reply(turn, seed_of(turn, sample)) for sample in range(SAMPLES)))
    for place in range(PLACES):
        alike = Counter(reply.token_ids[:place] for reply in replies if reply.token_count > place)
        beginnings = [beginning for beginning, count in alike.items() if count >= 100]
        for beginning in beginnings:
            _follow_the_distribution(subject, [one for one in replies if one.token_ids[:place] == beginning], place)


async def seeds_decide(subject: Subject) -> None:
    """A turn's seed decides its reply, alone or together with others, and in whatever order they come."""
    agent, turns = subject.agent(WARM, 1.0), [question(number, prefill="") for number in range(16)]
    together = _ids(await ask(agent, turns))
    _require(_ids(reversed(await ask(agent, turns[::-1]))) == together, "another order gave other replies")
    alone = [(await ask(agent, [turn]))[0] for turn in turns]
    _require(_ids(alone) == together, "turns asked for one by one got other replies than together")
    asked = [(turn, sample) for turn in turns for sample in range(8)]
    replies = await asyncio.gather(*(agent.reply(turn, seed_of(turn, sample)) for turn, sample in asked))
    different = len({(turn, ids) for (turn, _), ids in zip(asked, _ids(replies), strict=True)})
    _require(different > len(asked) / 2, f"{len(asked)} seeds gave {different} different replies")


async def closing_tags_end_replies(subject: Subject) -> None:
    """The first of them does, whether it is a token, spans several, or ends within one."""
    agent, added = subject.agent(0, 1), subject.tokenizer.get_added_vocab()
    whole, *longer = await ask(agent, [question(3, max_tokens=60)] + [question(n, max_tokens=400) for n in range(4)])
    pieces = [decode(subject.tokenizer, [token]) for token in whole.token_ids]
    spans = [tag for at in range(12) for width in (1, 2, 3) if (tag := "".join(pieces[at : at + width]).strip())]
    tags = dict.fromkeys([*spans, *(tag[1:] for tag in spans if len(tag) > 2)])
    turns = [question(3, max_tokens=60, stops=("</never>", tag)) for tag in tags]
    turns += [question(3, max_tokens=60, stops=pair) for pair in pairwise(tags)]
    wholes = [whole] * len(turns)
    for number, reply in enumerate(longer):
        for tag in sorted(tag for tag, token in added.items() if token in reply.token_ids[:-1]):
            turns.append(question(number, max_tokens=400, stops=("</never>", tag)))
            wholes.append(reply)
    for turn, uncut, reply in zip(turns, wholes, await ask(agent, turns), strict=True):
        _is_whole(subject, turn, reply)
        expected, stop = _cut(subject.tokenizer, uncut.token_ids, turn.stops)
        _require(
            (reply.token_ids, reply.stop) == (expected, stop),
            f"a reply that {turn.stops} should end as {decode(subject.tokenizer, expected)!r} with {stop!r} ended as "
            f"{reply.text!r} with {reply.stop!r}",
        )


async def budget_and_context_end_replies(subject: Subject) -> None:
    """To the token."""
    agent = subject.agent(0, 1)
    turns = [question(3, max_tokens=budget) for budget in (1, 2, 9)] + [_long_question(subject, fits=True)]
    for turn, reply in zip(turns, await ask(agent, turns), strict=True):
        _is_whole(subject, turn, reply)


async def a_prompt_that_does_not_fit_fails_its_turn(subject: Subject) -> None:
    """With a ValueError, and no other turn with it; a turn without messages, which is no prompt, is an InputError."""
    agent, fitting = subject.agent(0, 1), question(2)
    expected = (await ask(agent, [fitting]))[0]
    turns = [_long_question(subject, fits=False), fitting, fitting._replace(messages=())]
    asked = (agent.reply(turn, seed_of(turn)) for turn in turns)
    too_long, fits, empty = await asyncio.gather(*asked, return_exceptions=True)
    fails = isinstance(too_long, ValueError) and not isinstance(too_long, InputError)
    _require(fails, f"a prompt that does not fit came to {too_long!r}")
    _require(isinstance(empty, InputError), f"a turn without messages came to {empty!r}")
    unharmed = isinstance(fits, Reply) and fits.token_ids == expected.token_ids
    _require(unharmed, f"a turn beside those came to {fits!r}")


async def a_choice_of_mode_is_one_token(subject: Subject) -> None:
    """A turn of one token ends on a tag that is a token; with one that is none, it is an InputError."""
    agent, turn = subject.agent(0, 1), question(1, max_tokens=1)
    said = (await ask(agent, [turn]))[0].text
    chosen = turn._replace(stops=(said, "</neither of them>"))
    (refused,) = await asyncio.gather(agent.reply(chosen, seed_of(chosen)), return_exceptions=True)
    _require(isinstance(refused, InputError), f"a tag that is no token was taken, and came to {refused!r}")
    taken = (await ask(agent, [turn._replace(stops=(said,))]))[0]
    _require((taken.stop, taken.token_count) == (said, 1), f"the token {said!r} was no mode: {taken!r}")


async def a_cancelled_turn_leaves_the_others_alone(subject: Subject) -> None:
    """And the agent goes on."""
    agent, turns = subject.agent(0, 1), [question(number, max_tokens=30) for number in range(4)]
    long = question(5, max_tokens=200, stops=("</never>",))
    expected = await ask(agent, [*turns, long])
    cancelled = asyncio.create_task(agent.reply(long, seed_of(long)))
    others = asyncio.create_task(ask(agent, turns))
    await asyncio.sleep(0.02)
    called_off = cancelled.cancel()  # or it has ended by itself
    (ended,) = await asyncio.gather(cancelled, return_exceptions=True)
    _require(not called_off or isinstance(ended, asyncio.CancelledError), f"a cancelled turn came to {ended!r}")
    (beside,) = await asyncio.gather(others, return_exceptions=True)
    unharmed = not isinstance(beside, BaseException) and _ids(beside) == _ids(expected[:4])
    _require(unharmed, f"turns beside a cancelled one came to {beside!r}")
    _require(_ids(await ask(agent, [long])) == _ids(expected[4:]), "a turn that had been cancelled got another reply")


async def later_prompts_continue_earlier_ones(subject: Subject) -> None:
    """Token for token; and what was kept of earlier turns gives the same log-probabilities."""
    agent = subject.agent(1.0, 1.0)

    async def dialogue(number: int) -> list[Reply]:
        turn, replies = question(number, prefill=""), list[Reply]()
        for _ in range(3):
            reply = (await ask(agent, [turn]))[0]
            replies.append(reply)
            said = (Message("assistant", reply.text, reply), Message("user", "Go on."))
            turn = turn._replace(messages=turn.messages + said)
        return replies

    for replies in await asyncio.gather(*(dialogue(number) for number in range(4))):
        for before, after in pairwise(replies):
            sequence = before.prompt_token_ids + before.token_ids
            continues = after.prompt_token_ids[: len(sequence)] == sequence
            _require(continues, "a prompt does not continue what was read and said before")
        for reply in replies:
            _log_probabilities_agree(subject, reply, 1.0)


Check = Callable[[Subject], Coroutine[None, None, None]]
CHECKS: tuple[Check, ...] = (
    greedy_replies_are_the_likeliest_tokens,
    log_probabilities_are_those_of_what_was_sampled_from,
    samples_follow_the_distribution,
    seeds_decide,
    closing_tags_end_replies,
    budget_and_context_end_replies,
    a_prompt_that_does_not_fit_fails_its_turn,
    a_choice_of_mode_is_one_token,
    a_cancelled_turn_leaves_the_others_alone,
    later_prompts_continue_earlier_ones,
)


def _follow_the_distribution(subject: Subject, replies: Sequence[Reply], place: int) -> None:
    """The tokens at one place of replies that are alike up to there."""
    drawn = Counter(reply.token_ids[place] for reply in replies if reply.token_count > place)
    count = drawn.total()
    whole = next(reply for reply in replies if reply.token_count > place)
    for token, probability in enumerate(subject.log_probabilities(whole, WARM)[place].exp().tolist()):
        spread = math.sqrt(count * probability * (1 - probability))
        _require(
            abs(drawn[token] - count * probability) <= 5 * spread + 3,
            f"token {token} has probability {probability:.4f}, and was {drawn[token]} of {count} samples at {place}",
        )


def _is_whole(subject: Subject, turn: Turn, reply: Reply) -> None:
    """A reply's fields agree with each other and with its turn."""
    template, ids = ChatTemplate(subject.tokenizer), reply.token_ids
    budget = min(turn.max_tokens, subject.context - len(reply.prompt_token_ids))
    text = decode(subject.tokenizer, ids[:-1] if reply.finish == "end" else ids)
    counts = (reply.token_count, len(ids), len(reply.log_probabilities))
    by_tag = reply.finish == "stop"
    _require(reply.prompt_token_ids == tuple(template.prompt(turn)), "the prompt is not that of the chat template")
    _require(reply.tokenizer == template.fingerprint, "the reply names another vocabulary")
    _require(len(set(counts)) == 1 and bool(ids), f"count, ids and log-probabilities are {counts} in number")
    _require(len(ids) <= budget, f"{len(ids)} tokens were sampled, of {budget} at most")
    short = reply.finish == "length" and len(ids) < budget
    _require(not short, f"the budget of {budget} tokens ended a reply of {len(ids)}")
    named = reply.stop in turn.stops and str(reply.stop) in reply.text if by_tag else reply.stop is None
    _require(named, f"a reply that ended by {reply.finish!r} names the tag {reply.stop!r}")
    _require(reply.text == text, f"{text!r} was sampled, and the reply says {reply.text!r}")


def _is_likeliest(subject: Subject, reply: Reply) -> None:
    expected = subject.log_probabilities(reply, 0)
    short = float((expected.max(-1).values - _of(reply, expected)).max())
    _require(short <= subject.tolerance, f"greedy tokens are less likely than others, by up to {short:.2g} nats")
    _log_probabilities_agree(subject, reply, 0)


def _log_probabilities_agree(subject: Subject, reply: Reply, temperature: float, top_p: float = 1.0) -> None:
    expected = _of(reply, subject.log_probabilities(reply, temperature, top_p))
    apart = float((torch.tensor(reply.log_probabilities) - expected).abs().max())
    _require(
        apart <= subject.tolerance,
        f"log-probabilities at temperature {temperature} and top_p {top_p} are up to {apart:.2g} nats off",
    )


def _of(reply: Reply, log_probabilities: torch.Tensor) -> torch.Tensor:
    return log_probabilities.gather(-1, torch.tensor(reply.token_ids)[:, None])[:, 0]


def _require(kept: bool, found: str) -> None:
    if not kept:  # and not `assert`, which python -O leaves out
        raise AssertionError(found)


def _cut(
    tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...], stops: Sequence[str]
) -> tuple[tuple[int, ...], str | None]:
    """Up to the token that completes a tag for the first time, by decoding every beginning; and that tag."""
    added = tokenizer.get_added_vocab()
    for end in range(1, len(ids) + 1):
        text = decode(tokenizer, ids[:end])
        found = [(text.find(tag) + len(tag), tag) for tag in stops if tag not in added and tag in text]
        found += [(len(text), tag) for tag in stops if added.get(tag) == ids[end - 1]]
        if found:
            return ids[:end], min(found)[1]
    return ids, None


def _long_question(subject: Subject, *, fits: bool) -> Turn:
    """A turn whose prompt all but fills the context, or does not fit."""
    template, turn = ChatTemplate(subject.tokenizer), question(1, max_tokens=subject.context)
    empty, word = len(template.prompt(_heard(turn, 0))), len(template.prompt(_heard(turn, 100)))
    words = int((subject.context - empty) / (word - empty) * 100)
    sizes = (words - more if fits else words + more for more in range(words))
    return next(one for size in sizes if (len(template.prompt(one := _heard(turn, size))) < subject.context) == fits)


def _heard(turn: Turn, words: int) -> Turn:
    return turn._replace(messages=(Message("user", " 7" * words),))


def _ids(replies: Sequence[Reply] | Iterator[Reply]) -> list[tuple[int, ...]]:
    return [reply.token_ids for reply in replies]


def main(
    model: Annotated[str, typer.Argument(help="A checkpoint folder or a hub id.")],
    engine: EngineName = "transformers",
    url: Annotated[
        list[str] | None, typer.Option(help="The server's base URL; several stand in for each other.")
    ] = None,
    key_variable: Annotated[str, typer.Option(help="The environment variable with the server's key.")] = "",
    device: Annotated[str, typer.Option(help="Of transformers, here and as the reference.")] = "cpu",
    context: Annotated[int | None, typer.Option(help="If it is not the model's own.")] = None,
    cache_gigabytes: Annotated[float, typer.Option(help="What vLLM takes beside the weights.")] = 1.0,
    tolerance: Annotated[float, typer.Option(help="Of log-probabilities (nats).")] = 1e-3,
) -> None:
    """Holds an engine in float32 against transformers' forward passes; exit code 1 where it breaks a rule."""
    reference = TransformersEngine.load(model, device=device, dtype=torch.float32)
    context, broken = reference.context if context is None else context, 0
    console = Console(soft_wrap=True)
    with open_engine(
        model, engine, device=device, urls=url or (), key_variable=key_variable, cache_gigabytes=cache_gigabytes,
        context=context, dtype=torch.float32, deadline=PATIENCE,
    ) as agent:  # fmt: skip
        subject = Subject(
            lambda temperature, top_p: agent(temperature=temperature, top_p=top_p),
            reference.model, reference.tokenizer, context, tolerance,
        )  # fmt: skip
        for check in CHECKS:
            began, found = time.perf_counter(), Text("kept", "green")
            try:
                asyncio.run(check(subject))
            except Exception as failure:
                broken, found = broken + 1, Text(f"{type(failure).__name__}: {failure}", "red")
            seconds = time.perf_counter() - began
            console.print(Text(f"{check.__name__.replace('_', ' '):<54}{seconds:6.1f} s  ") + found)
    raise typer.Exit(bool(broken))


if __name__ == "__main__":
    from turnwise.command import run

    run(main)
