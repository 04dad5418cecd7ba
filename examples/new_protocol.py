"""A protocol of one's own, in one file: a jury of three answers at once; where it disagrees, the long model thinks.

    python examples/new_protocol.py

The three jurors are one tiny model in three seats (so they share weights), the clerk who counts their votes is a
Python function, and the thinker is the tiny long-thought model. Expect the jurors to agree at once on one-step
problems, where that saves most of the tokens, and the thinker to be called on most others, where it costs a few more.
"""

import re

from turnwise.agents.scripted import ScriptedAgent
from turnwise.agents.tiny import LONG, SHORT
from turnwise.agents.transformers_agent import TransformersAgent, TransformersEngine
from turnwise.command import run
from turnwise.environments.math_grader import MathGrader
from turnwise.environments.transcript import Turn
from turnwise.protocols.graph import END, GraphProtocol, State, TurnGraph
from turnwise.protocols.lengths import KimiLength
from turnwise.protocols.rewards import Correctness, RewardSum
from turnwise.protocols.solo import Solo
from turnwise.show import open_environment, play_side_by_side

JURORS = ("ann", "bob", "cleo")


# The protocol: 15 lines.
jury = GraphProtocol(
    TurnGraph(
        seats={**dict.fromkeys(JURORS, ""), "clerk": "", "thinker": ""},
        start="vote",
        states={
            "vote": State(seat=JURORS, closes={"</answer>": "count"}, then="count", max_tokens=32),
            "count": State(seat="clerk", closes={"</answer>": END, "</rethink>": "think"}, max_tokens=32),
            "think": State(seat="thinker", reads=(), max_tokens=768, answer_after="</think>"),
        },
        dialogue="chat",
    ),
    RewardSum((Correctness(), KimiLength()), right_beats_wrong=True),
)


def count_votes(turn: Turn, seed: int) -> str:
    """The clerk: hands in what all jurors say, or asks for a long thought."""
    votes = {vote for message in turn.messages for vote in re.findall(r"\\boxed\{(.*?)\}", message.text)}
    return f"<answer>\\boxed{{{votes.pop()}}}</answer>" if len(votes) == 1 else "<answer>We disagree.</rethink>"


def main(problems: str = "easy", number: int = 96, seed: int = 0) -> None:
    """The jury, beside the long model alone."""
    juror = TransformersAgent(TransformersEngine.load(SHORT), temperature=1.0)
    thinker = TransformersAgent(TransformersEngine.load(LONG), temperature=0.6)
    team = {**dict.fromkeys(JURORS, juror), "clerk": ScriptedAgent(count_votes), "thinker": thinker}
    protocols = {"jury": jury, "long alone": Solo("thinker", answer_after="</think>")}
    with MathGrader() as grader:
        environment = open_environment(problems, grader, number=number, seed=seed)
        play_side_by_side(protocols, team, environment, baseline="long alone", seed=seed)


if __name__ == "__main__":
    run(main)
