"""Who speaks when, what ends a turn, and who is paid what."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from turnwise.environments.episode import Episode
from turnwise.environments.transcript import Transcript, Turn
from turnwise.protocols.rewards import Reward


class ReasoningProtocol(ABC):
    """Pure functions of the transcript. Replay, branching, resuming and Monte Carlo from any prefix follow from that.

    `seats` names every role, in a fixed order. `control_states` names the states whose sampled tokens are control
    tokens: they choose a mode, and DeGRPO weighs them apart from the words that follow (`turnwise.rl.loss`).
    """

    seats: tuple[str, ...]
    control_states: frozenset[str] = frozenset()

    @property
    def fingerprint(self) -> str:
        """Equal for two protocols that play and pay alike: by it a run is known again when it is resumed."""
        return type(self).__qualname__

    @abstractmethod
    def next_turns(self, transcript: Transcript) -> Sequence[Turn]:
        """Who speaks next: one turn, several that are simultaneous (none sees another's reply), or none at the end."""

    @abstractmethod
    def answer(self, transcript: Transcript) -> str:
        """The part of a finished transcript that is handed to the grader; empty where no answer was given."""

    @abstractmethod
    def rewards(self, group: Sequence[Episode], step: int = 0) -> list[Mapping[str, Reward]]:
        """What each seat is paid for each episode of `group`, all of them on one problem, at training step `step`.

        A group, since brevity is paid relative to the other dialogues on the same problem. Raises ValueError for a
        group that holds several problems or an episode without a grade.
        """
