"""Conversations without agents: what is said is given, and who says it where is the protocol's."""

from collections.abc import Callable

import pytest

from turnwise.agents.scripted import cut
from turnwise.environments.problem import Problem
from turnwise.environments.transcript import Step, Transcript
from turnwise.protocols.protocol import ReasoningProtocol

Converse = Callable[..., Transcript]


@pytest.fixture(scope="session")
def converse() -> Converse:
    """Plays `texts`, one a turn; a list of texts fills the simultaneous turns, or only the first of them."""

    def play(protocol: ReasoningProtocol, *texts: str | list[str]) -> Transcript:
        transcript = Transcript(Problem("p", "1 + 1?", "2"))
        for said in texts:
            turns, lines = protocol.next_turns(transcript), [said] if isinstance(said, str) else said
            assert turns, f"the dialogue is over before {said!r}"
            steps = [Step(t.seat, t.state, cut(line, t), t.prefill) for t, line in zip(turns, lines, strict=False)]
            transcript = transcript.extended(*steps)
        return transcript

    return play
