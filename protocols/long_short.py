"""Long⊗Short (arXiv 2505.11827): a long-thought and a short-thought model alternate until the short one answers."""

from turnwise.protocols.graph import END, GraphProtocol, State, TurnGraph
from turnwise.protocols.lengths import KimiLength
from turnwise.protocols.rewards import Correctness, Format, RewardSum, Weighted

_RULES = (
    "Two assistants answer one user together, taking turns in a single message. The long-thought assistant does the "
    "hard steps and thinks them through: it opens with <think> and closes with </think>. The short-thought assistant "
    "then completes the straightforward steps: it opens with <answer> and closes either with </rethink>, to ask for "
    "another long thought, or with </answer>, once the final answer stands in \\boxed{}. So the turns are "
    "<think>...</think> <answer>...</rethink> <think>...</think> <answer>...</answer>. "
)
LONG_INSTRUCTION = _RULES + "You are the long-thought assistant: open with <think> and close with </think>."
SHORT_INSTRUCTION = (
    _RULES + "You are the short-thought assistant: open with <answer> and close with </rethink> or </answer>."
)
TAGS = {"long": (("<think>",), ("</think>",)), "short": (("<answer>",), ("</answer>", "</rethink>"))}
DEFAULT_REWARD = RewardSum((Correctness(), Format(TAGS), Weighted(KimiLength(), 1.0)))


class LongShort(GraphProtocol):
    """Seats "long" and "short". At the cap on turns the short seat must answer: its last turn is begun for it."""

    def __init__(
        self,
        *,
        max_turns: int = 6,
        long_tokens: int = 1024,
        short_tokens: int = 512,
        reward: RewardSum = DEFAULT_REWARD,
    ) -> None:
        states = {
            "think": State(seat="long", closes={"</think>": "answer"}, then="answer", max_tokens=long_tokens),
            "answer": State(seat="short", closes={"</answer>": END, "</rethink>": "think"}, max_tokens=short_tokens),
            "conclude": State(
                seat="short", prefill="<answer>Final answer:", closes={"</answer>": END}, max_tokens=short_tokens
            ),
        }
        seats = {"long": LONG_INSTRUCTION, "short": SHORT_INSTRUCTION}
        super().__init__(
            TurnGraph(seats=seats, start="think", states=states, max_turns=max_turns, final="conclude"), reward
        )
