"""Data sets for supervised fine-tuning, as Parquet by `datasets`: for `turnwise.rl.sft`, TRL and OpenRLHF alike.

One row is one turn of a dialogue, or one answer; one file holds what one model is to learn. `input_ids` and `labels`
are its exact token ids, and those of them that are trained (-100 elsewhere), which turnwise and TRL take as they are.

`input` and `output` are the same as texts, for OpenRLHF (`--data.input_key input --data.output_key output`, without
`--data.apply_chat_template`, since `input` is rendered already). It tokenises them anew, which gives the same ids where
the tags are tokens of the vocabulary, and appends a space and the end of sequence to an output that a closing tag ends.
`turnwise.rl.openrlhf.sft` has OpenRLHF train on the token ids instead.
"""

import glob
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from datasets import Dataset, Features, List, Value  # type: ignore[import-untyped]

from turnwise.agents.chat import ChatTemplate, decode
from turnwise.environments.benchmarks import quiet_datasets
from turnwise.environments.errors import InputError
from turnwise.environments.problem import Problem
from turnwise.environments.transcript import Turn
from turnwise.protocols.long_short import LongShort
from turnwise.protocols.thinkless import Thinkless
from turnwise.rl.cold_start.thoughts import Dropped
from turnwise.rl.demonstrations import Conversation, demonstrate, tokenised
from turnwise.rl.parquet import Row, write_rows
from turnwise.rl.sft import UNTRAINED
from turnwise.rl.trajectory import TokenSequence

S = TypeVar("S")

FEATURES = Features(
    {
        **{name: Value("string") for name in ("id", "seat", "input", "output")},
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "tokenizer": Value("string"),
    }
)


def long_short_rows(problem: Problem, dialogue: Sequence[tuple[str, str]], template: ChatTemplate) -> list[Row]:
    """One row for each (seat, text) of a dialogue of Long⊗Short; D_long and D_short are told apart by `seat`.

    The input is the seat's instruction Γ, the question, and the dialogue so far. Raises InputError for a dialogue that
    the protocol would not have had.
    """
    lines = iter(dialogue)

    def say(turn: Turn) -> str:
        seat, text = next(lines, ("", ""))
        if not seat:
            raise InputError(f"the dialogue of {problem.id!r} ends too early: seat {turn.seat!r} is to speak next")
        if seat != turn.seat:
            raise InputError(f"in {problem.id!r} seat {turn.seat!r} is to speak, but seat {seat!r} does: {text[:60]!r}")
        for tag in turn.stops:
            if behind := text.partition(tag)[2]:
                raise InputError(f"in {problem.id!r} {tag} ends a turn of seat {seat!r}; remove {behind[:60]!r} there")
        return text

    said = demonstrate(LongShort(max_turns=len(dialogue) + 2), problem, say)
    for seat, text in lines:
        raise InputError(f"the dialogue of {problem.id!r} is over before seat {seat!r} says {text[:60]!r}; remove that")
    return [_row(f"{problem.id}/{place}", [one], template) for place, one in enumerate(said)]


def thinkless_rows(problem: Problem, think: str, short: str, template: ChatTemplate) -> list[Row]:
    """Two independent rows: `<think>` and the long answer to a problem, and `<short>` and the brief one.

    `think` is the reasoning, `</think>` and the solution; either text may already begin with its control token. Raises
    InputError for texts in which a tag is missing or misplaced, and where a control token is not one token.
    """
    modes = ("<think>", "<short>")

    def answer(mode: str, text: str) -> Row:
        words = text.strip().removeprefix(mode)
        closings = 1 if mode == "<think>" else 0
        if not words.strip() or words.count("</think>") != closings or any(other in words for other in modes):
            raise InputError(
                f"an answer of Thinkless is `<think> ... </think> solution` or `<short> solution`, without any more of "
                f"these tags; for {problem.id!r}, {mode} got {text[:60]!r}"
            )

        def say(turn: Turn) -> str:
            template.check_control_tokens(turn)
            return mode if turn.state == "route" else words

        said = demonstrate(Thinkless(), problem, say)
        return _row(f"{problem.id}/{mode}", said, template)

    return [answer("<think>", think), answer("<short>", short)]


def paired_rows(
    pairs: Iterable[tuple[Problem, str, str]], template: ChatTemplate, *, seed: int = 0
) -> tuple[list[Row], list[Dropped]]:
    """The rows of many (problem, think, short): the pairs in an order shuffled by `seed`, each pair's rows together.

    A pair that `thinkless_rows` refuses is left out, and said.
    """
    taken, dropped = list[list[Row]](), list[Dropped]()
    for problem, think, short in pairs:
        try:
            taken.append(thinkless_rows(problem, think, short, template))
        except InputError as error:
            dropped.append(Dropped(problem.id, "pairs", str(error)))
    random.Random(f"pairs {seed}").shuffle(taken)
    return [row for rows in taken for row in rows], dropped


def _row(id_: str, said: Conversation, template: ChatTemplate) -> Row:
    """The row of successive turns of one seat, each of which continues the last."""
    seat = said[0][0].seat
    (sequence,) = tokenised(said, template, (seat,))
    ids, first = list(sequence.token_ids), sequence.said[0][0]
    texts = {"input": decode(template.tokenizer, ids[:first]), "output": decode(template.tokenizer, ids[first:])}
    labels = [UNTRAINED] * first + ids[first:]
    return {"id": id_, "seat": seat, **texts, "input_ids": ids, "labels": labels, "tokenizer": template.fingerprint}


def write_set(path: str | Path, rows: Iterable[Row]) -> int:
    """Writes rows to a Parquet file and returns how many they are. Raises InputError as `write_rows` does."""
    return write_rows(path, rows, FEATURES)


def read_set(path: str | Path, template: ChatTemplate, *, longest: int | None = None) -> list[TokenSequence]:
    """The training sequences of a set, one a row and in its order; what is beyond `longest` tokens is clipped.

    Raises InputError for a file that is no such set, for one of another tokenizer, and for a row whose input alone is
    beyond `longest`: left out, it would part pairs.
    """
    with TemporaryDirectory() as cache, quiet_datasets():
        try:
            table = Dataset.from_parquet(glob.escape(str(path)), cache_dir=cache, keep_in_memory=True)
        except Exception as error:  # what `datasets` raises for a bad file depends on where it notices
            reason = str(error.__cause__ or error).partition("\n")[0]
            raise InputError(f"{path} is no set of rows for fine-tuning that can be read: {reason}") from error
    if missing := sorted({"input_ids", "labels", "tokenizer"} - set(table.column_names)):
        raise InputError(f"{path} holds no token ids to train on (no column {', '.join(missing)}); write it anew")
    if others := set(table.unique("tokenizer")) - {template.fingerprint}:
        raise InputError(
            f"{path} was written with the tokenizer {', '.join(sorted(map(str, others)))}, and this model's is "
            f"{template.fingerprint}; write it anew with this model's tokenizer"
        )
    columns = table.select_columns(["input_ids", "labels"])
    return [_sequence(row, f"{path}, row {number}", longest) for number, row in enumerate(columns)]


def _sequence(row: Mapping[str, list[int] | None], place: str, longest: int | None) -> TokenSequence:
    ids, labels = row["input_ids"] or [], row["labels"] or []
    first = next((index for index, label in enumerate(labels) if label != UNTRAINED), 0)
    if first == 0 or labels != [UNTRAINED] * first + ids[first:]:
        raise InputError(f"{place}: labels are {UNTRAINED} for the input and then its output's ids; write the set anew")
    if longest is not None and first >= longest:
        raise InputError(
            f"{place}: an input of {first} tokens leaves none to train within {longest}; allow more, or write the set "
            "anew without it"
        )
    clipped = tuple(ids[:longest])
    return TokenSequence(clipped, ((first, len(clipped)),))


def shuffled(sequences: Sequence[S], *, seed: int, together: int = 1) -> Iterator[S]:
    """The sequences over and over, in a new order each time; `together` neighbours stay neighbours, as pairs do."""
    rng = random.Random(f"shuffle {seed}")
    starts = list(range(0, len(sequences), together))
    while starts:
        rng.shuffle(starts)
        for start in starts:
            yield from sequences[start : start + together]
