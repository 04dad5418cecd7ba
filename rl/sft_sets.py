"""Data sets for supervised fine-tuning, as Parquet by `datasets`: for `turnwise.rl.sft`, TRL and OpenRLHF alike.

One row is one turn. `input` and `output` are its texts, for OpenRLHF (`--data.input_key input --data.output_key
output`, without `--data.apply_chat_template`, since `input` is rendered already). `input_ids` and `labels` are its
exact token ids, and those of them that are trained (-100 elsewhere), which turnwise and TRL take as they are. OpenRLHF
tokenises the texts anew and appends an end of sequence to every output, even where a closing tag ends the turn.
"""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from datasets import Dataset, Features, List, Value  # type: ignore[import-untyped]
from datasets.exceptions import DatasetsError  # type: ignore[import-untyped]

from turnwise.agents.chat import ChatTemplate
from turnwise.environments.benchmarks import quiet_datasets
from turnwise.environments.errors import InputError
from turnwise.environments.problem import Problem
from turnwise.environments.transcript import Turn
from turnwise.protocols.long_short import LongShort
from turnwise.protocols.thinkless import Thinkless
from turnwise.rl.demonstrations import Conversation, demonstrate, tokenised
from turnwise.rl.run_folder import write_whole
from turnwise.rl.sft import UNTRAINED
from turnwise.rl.trajectory import TokenSequence

FEATURES = Features(
    {
        **{name: Value("string") for name in ("id", "seat", "input", "output")},
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "tokenizer": Value("string"),
    }
)
Row = Mapping[str, object]


def long_short_rows(problem: Problem, dialogue: Sequence[tuple[str, str]], template: ChatTemplate) -> list[Row]:
    """One row for each (seat, text) of a dialogue of Long⊗Short; D_long and D_short are told apart by `seat`.

    The input is the seat's instruction Γ, the question, and the dialogue so far. Raises InputError for a dialogue that
    the protocol would not have had.
    """
    lines = iter(dialogue)

    def say(turn: Turn) -> str:
        seat, text = next(lines, ("nobody", ""))
        if seat != turn.seat:
            raise InputError(f"it is the turn of seat {turn.seat!r} here, and not of {seat!r}: {text[:60]!r}")
        return text

    said = demonstrate(LongShort(max_turns=len(dialogue) + 1), problem, say)
    return [
        row
        for place, (turn, reply) in enumerate(said)
        for row in _rows(f"{problem.id}/{place}", turn.seat, [(turn, reply)], template)
    ]


def thinkless_rows(problem: Problem, think: str, short: str, template: ChatTemplate) -> list[Row]:
    """Two independent rows: `<think>` and the long answer to a problem, and `<short>` and the brief one.

    `think` is the reasoning, `</think>` and the solution; either text may already begin with its control token.
    """

    def answer(mode: str, text: str) -> Row:
        words = text.strip().removeprefix(mode)
        said = demonstrate(Thinkless(), problem, lambda turn: mode if turn.state == "route" else words)
        (row,) = _rows(f"{problem.id}/{mode}", "solver", said, template)
        return row

    return [answer("<think>", think), answer("<short>", short)]


def _rows(id_: str, seat: str, said: Conversation, template: ChatTemplate) -> list[Row]:
    """One row for each token sequence that the turns of a seat make up."""
    rows = list[Row]()
    for sequence in tokenised(said, template, (seat,)):
        first = sequence.said[0][0]
        ids, decode = list(sequence.token_ids), partial(template.tokenizer.decode, skip_special_tokens=False)
        labels = [token if said else UNTRAINED for token, said in zip(ids, sequence.mask, strict=True)]
        rows.append(
            {"id": id_, "seat": seat, "input": decode(ids[:first]), "output": decode(ids[first:])}
            | {"input_ids": ids, "labels": labels, "tokenizer": template.fingerprint}
        )
    return rows


def write_set(path: Path, rows: Iterable[Row]) -> int:
    """Writes rows to a Parquet file, whole or not at all, and returns how many they are; memory does not grow."""
    with TemporaryDirectory() as cache, quiet_datasets():
        table = Dataset.from_generator(lambda: iter(rows), features=FEATURES, cache_dir=cache, fingerprint="set")
        write_whole(path, table.to_parquet)
        return len(table)


def read_set(path: str | Path, template: ChatTemplate, *, longest: int | None = None) -> list[TokenSequence]:
    """The training sequences of a set, in its order; what is beyond `longest` tokens is clipped, and not the whole row.

    Raises InputError for a file that is no such set, and for one of another tokenizer.
    """
    with TemporaryDirectory() as cache, quiet_datasets():
        try:
            table = Dataset.from_parquet(str(path), cache_dir=cache, keep_in_memory=True)
        except (OSError, ValueError, DatasetsError) as error:
            raise InputError(f"a set is a Parquet file that turnwise wrote; {path} cannot be read: {error}") from None
    if missing := sorted({"input_ids", "labels", "tokenizer"} - set(table.column_names)):
        raise InputError(f"{path} holds no token ids to train on (no column {', '.join(missing)}); write it anew")
    if others := set(table.unique("tokenizer")) - {template.fingerprint}:
        raise InputError(
            f"{path} was written with the tokenizer {', '.join(others)}, and this model's is {template.fingerprint}; "
            "write it anew with this model's tokenizer"
        )
    sequences = (_sequence(row["input_ids"][:longest], row["labels"][:longest]) for row in table)
    return [sequence for sequence in sequences if sequence.trained]


def _sequence(ids: list[int], labels: list[int]) -> TokenSequence:
    trained = (place for place, label in enumerate(labels) if label != UNTRAINED)
    first = next(trained, len(ids))
    return TokenSequence(tuple(ids), ((first, len(ids)),))


def shuffled(sequences: Sequence[TokenSequence], *, seed: int, together: int = 1) -> Iterator[TokenSequence]:
    """The sequences over and over, in a new order each time; `together` neighbours stay neighbours, as pairs do."""
    rng = random.Random(f"shuffle {seed}")
    starts = list(range(0, len(sequences), together))
    while starts:
        rng.shuffle(starts)
        for start in starts:
            yield from sequences[start : start + together]
