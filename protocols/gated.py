"""Thinkless' control token decides whether a Long⊗Short dialogue opens at all. In neither paper."""

from turnwise.protocols.graph import END, GraphProtocol, State, TurnGraph
from turnwise.protocols.long_short import LongShort
from turnwise.protocols.rewards import Correctness, RewardSum

DEFAULT_REWARD = RewardSum((Correctness(),))


class Gated(GraphProtocol):
    """Seats "router", "long" and "short". On `<think>` the dialogue opens; on `<short>` the short seat answers alone.

    The router reads the bare question, and the others never see its token.
    """

    def __init__(self, dialogue: LongShort | None = None, *, reward: RewardSum = DEFAULT_REWARD) -> None:
        inner = (dialogue or LongShort()).graph
        gate = State(seat="router", closes={"<think>": inner.start, "<short>": "alone"}, max_tokens=1, control=True)
        alone = State(seat="short", closes={"</answer>": END}, max_tokens=inner.states["answer"].max_tokens, reads=())
        opened = {name: state.model_copy(update={"reads": tuple(inner.states)}) for name, state in inner.states.items()}
        graph = TurnGraph(
            seats={"router": "", **inner.seats},
            start="gate",
            states={"gate": gate, "alone": alone, **opened},
            max_turns=None if inner.max_turns is None else inner.max_turns + 1,
            final=inner.final,
        )
        super().__init__(graph, reward)
