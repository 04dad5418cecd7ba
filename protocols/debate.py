"""Debate (Du et al., arXiv 2305.14325) and a panel with a chair (Wang et al., arXiv 2406.04692)."""

from turnwise.environments.errors import InputError
from turnwise.protocols.graph import GraphProtocol, State, TurnGraph
from turnwise.protocols.rewards import Correctness, RewardSum

_SOLVE = "Solve the problem step by step. Put your final answer in \\boxed{}."
_REVISE = "Read what the others wrote, find the mistakes in it and in your own answer, and answer again in \\boxed{}."
_CONCLUDE = "Weigh the answers above against each other and give the final answer in \\boxed{}."
DEFAULT_REWARD = RewardSum((Correctness(),))


class Debate(GraphProtocol):
    """`debaters` answer at once, then revise in each further round after reading each other; the judge concludes.

    Turns within a round are simultaneous: nobody has the advantage of having heard the others first.
    """

    def __init__(
        self,
        debaters: tuple[str, ...] = ("first", "second"),
        judge: str = "judge",
        *,
        rounds: int = 2,
        max_tokens: int = 1024,
        reward: RewardSum = DEFAULT_REWARD,
    ) -> None:
        if rounds < 1:
            raise InputError(f"a debate has at least one round; got {rounds}")
        names = [f"round {number}" for number in range(1, rounds + 1)]
        states = {
            name: State(seat=debaters, then=following, max_tokens=max_tokens, ask="" if name == names[0] else _REVISE)
            for name, following in zip(names, [*names[1:], "judge"], strict=True)
        }
        states["judge"] = State(seat=judge, max_tokens=max_tokens, ask=_CONCLUDE)
        seats = {**dict.fromkeys(debaters, _SOLVE), judge: ""}
        super().__init__(TurnGraph(seats=seats, start=names[0], states=states, dialogue="chat"), reward)


class Panel(Debate):
    """Members answer once, at the same time and without hearing each other; the chair reads them all and concludes."""

    def __init__(
        self,
        members: tuple[str, ...] = ("first", "second", "third"),
        chair: str = "chair",
        *,
        max_tokens: int = 1024,
        reward: RewardSum = DEFAULT_REWARD,
    ) -> None:
        super().__init__(members, chair, rounds=1, max_tokens=max_tokens, reward=reward)
