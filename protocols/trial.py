"""A protocol tried out: conversations of agents that say anything, and what goes wrong in them."""

import random
from dataclasses import dataclass
from math import isfinite

from turnwise.environments.environment import Grade, Outcome
from turnwise.environments.episode import Episode
from turnwise.environments.problem import Problem
from turnwise.environments.transcript import Finish, Reply, Step, Transcript, Turn
from turnwise.protocols.protocol import ReasoningProtocol

MOST_TURNS = 10_000


@dataclass(frozen=True, slots=True)
class Trial:
    """The fewest and the most turns that a conversation took, the most tokens, and each fault once."""

    conversations: int
    fewest_turns: int
    most_turns: int
    most_tokens: int
    faults: tuple[str, ...]


def try_out(protocol: ReasoningProtocol, *, conversations: int = 200, seed: int = 0) -> Trial:
    """Plays conversations in which each turn ends in any way that it can, and pays them by any grades, in pairs.

    A fault is an exception, a conversation without an end or a turn, two turns of one seat at once, an answer that is
    no text, and a seat that is not paid a finite number.
    """
    rng, problem = random.Random(seed), Problem("trial", "1 + 1?", "2")
    faults, turns, tokens, group = dict[str, None](), [0], [0], list[Episode]()
    for sample in range(conversations):
        try:
            transcript = _converse(protocol, problem, rng)
            grade = Grade(rng.choice(list(Outcome)), "2")
            group.append(Episode(transcript, len(group), seed, grade))
            if len(group) == 2 or sample == conversations - 1:
                paid, group = protocol.rewards(group), []
                for rewards in paid:
                    if missing := [s for s in protocol.seats if s not in rewards or not isfinite(rewards[s].total)]:
                        raise ValueError(f"seat(s) {missing} are not paid a finite number")
        except Exception as error:  # whatever a user's protocol raises is what is looked for
            faults[f"{type(error).__name__}: {error}"], group = None, []
            continue
        turns.append(len(transcript.steps))
        tokens.append(transcript.token_count)
    played = turns[1:] or turns
    return Trial(conversations, min(played), max(played), max(tokens), tuple(faults))


def _converse(protocol: ReasoningProtocol, problem: Problem, rng: random.Random) -> Transcript:
    transcript = Transcript(problem)
    while turns := protocol.next_turns(transcript):
        if len({turn.seat for turn in turns}) < len(turns):
            raise ValueError(f"seats speak twice at once: {[turn.seat for turn in turns]}")
        transcript = transcript.extended(*(Step(t.seat, t.state, _anything(t, rng), t.prefill) for t in turns))
        if len(transcript.steps) > MOST_TURNS:
            raise ValueError(f"a conversation had not ended after {MOST_TURNS} turns")
    if not transcript.steps:
        raise ValueError("nobody speaks")
    if not isinstance(answer := protocol.answer(transcript), str):
        raise TypeError(f"the answer must be a text; got {answer!r}")
    return transcript


def _anything(turn: Turn, rng: random.Random) -> Reply:
    finish: Finish = rng.choice(("stop", "end", "length"))
    stop = rng.choice(turn.stops) if finish == "stop" and turn.stops else None
    count = turn.max_tokens if finish == "length" else rng.randint(1, turn.max_tokens)
    text = rng.choice(("so \\boxed{2} ", "<think>a < b ", "<answer>", "", "⊗\n\n"))
    return Reply(text + (stop or ""), count, finish if stop or finish == "length" else "end", stop)
