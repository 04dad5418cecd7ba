"""Conversations that were written rather than sampled, as what a policy is to say: for supervised fine-tuning."""

from collections.abc import Callable, Iterable

from turnwise.agents.chat import ChatTemplate
from turnwise.environments.errors import InputError
from turnwise.environments.problem import Problem
from turnwise.environments.transcript import Reply, Step, Transcript, Turn
from turnwise.protocols.protocol import ReasoningProtocol
from turnwise.rl.trajectory import TokenSequence, join_turns

Conversation = list[tuple[Turn, Reply]]


def demonstrate(protocol: ReasoningProtocol, problem: Problem, say: Callable[[Turn], str]) -> Conversation:
    """A conversation through the protocol itself, so that what is learnt is exactly what will be met.

    `say` gives the text of each turn. Raises InputError for simultaneous turns.
    """
    transcript, said = Transcript(problem), Conversation()
    while turns := protocol.next_turns(transcript):
        if len(turns) > 1:
            raise InputError(f"a conversation is written one turn at a time; here {len(turns)} are simultaneous")
        turn = turns[0]
        text = say(turn)
        stop = next((tag for tag in turn.stops if text.endswith(tag)), None)
        reply = Reply(text, 0, "stop" if stop else "end", stop)
        said.append((turn, reply))
        transcript = transcript.extended(Step(turn.seat, turn.state, reply, turn.prefill))
    return said


def tokenised(
    said: Iterable[tuple[Turn, Reply]], template: ChatTemplate, seats: tuple[str, ...]
) -> list[TokenSequence]:
    """What `seats` said, as training sequences; a turn that no closing tag ended is taught its end of sequence."""
    turns = []
    for turn, reply in said:
        if turn.seat in seats:
            ending = [] if reply.stop else [template.tokenizer.eos_token_id]
            turns.append((template.prompt(turn), [*template.tokens(reply.text), *ending]))
    return join_turns(turns)
