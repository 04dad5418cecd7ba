"""What is asked, and what the right answer is."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Problem:
    """A question with a checkable answer.

    `id` is unique within an environment and stable between runs: seeds, stores and splits are keyed by it.
    `answer` is the gold answer alone, without its derivation (which is `solution`, where there is one).
    `level` orders problems by difficulty within their environment; 0 where it is not known.
    `choices` are the options of a multiple-choice question, in order; `answer` is then a letter, "A" for the first.
    """

    id: str
    question: str
    answer: str
    level: int = 0
    subject: str = ""
    solution: str = ""
    choices: tuple[str, ...] = ()

    @property
    def statement(self) -> str:
        """The question as it is put to an agent, with its lettered choices where it has some."""
        lettered = [f"({chr(ord('A') + index)}) {choice}" for index, choice in enumerate(self.choices)]
        return "\n".join([self.question, *lettered])
