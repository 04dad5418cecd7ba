"""Thinkless (arXiv 2505.13379): one agent routes itself; its first token says whether it thinks."""

from typing import Literal

from turnwise.protocols.graph import GraphProtocol, State, TurnGraph
from turnwise.protocols.rewards import RewardSum, ThinklessTable


class Thinkless(GraphProtocol):
    """One seat, "solver". Its control token is a turn of its own, of one token: the mode is read from the token's id.

    The two turns continue one message, so the model sees what it would see in one turn, and π(c, a | x) =
    π(c | x) · π(a | x, c) holds as in the paper, with a token budget for each mode. `mode` forces one of them. No
    instruction is given, as in the paper; the answer of a thinking turn stands behind `</think>`.
    """

    def __init__(
        self,
        *,
        short_tokens: int = 2048,
        think_tokens: int = 24576,
        mode: Literal["short", "think"] | None = None,
        reward: RewardSum | None = None,
    ) -> None:
        states = {
            "route": State(seat="solver", closes={"<short>": "short", "<think>": "think"}, max_tokens=1, control=True),
            "short": State(seat="solver", max_tokens=short_tokens),
            "think": State(seat="solver", max_tokens=think_tokens, answer_after="</think>"),
        }
        if mode is not None:
            states = {mode: states[mode].model_copy(update={"prefill": f"<{mode}>"})}
        graph = TurnGraph(seats={"solver": ""}, start=mode or "route", states=states)
        super().__init__(graph, reward or RewardSum((ThinklessTable(gamma=0.5),)))
