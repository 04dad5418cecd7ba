"""A lone agent: the control that every collaboration is held against."""

from turnwise.protocols.graph import END, GraphProtocol, State, TurnGraph
from turnwise.protocols.rewards import Correctness, RewardSum


class Solo(GraphProtocol):
    """One seat, one turn, ended by the model itself or by one of `stops`.

    With `answer_after` (for example "</think>") only what follows the last such tag is graded.
    """

    def __init__(
        self,
        seat: str = "solver",
        *,
        instruction: str = "",
        max_tokens: int = 4096,
        stops: tuple[str, ...] = (),
        prefill: str = "",
        answer_after: str = "",
        reward: RewardSum | None = None,
    ) -> None:
        state = State(
            seat=seat,
            closes=dict.fromkeys(stops, END),
            max_tokens=max_tokens,
            prefill=prefill,
            answer_after=answer_after,
        )
        graph = TurnGraph(seats={seat: instruction}, start="solve", states={"solve": state})
        super().__init__(graph, reward or RewardSum((Correctness(),)))
