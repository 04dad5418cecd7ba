"""Sets for fine-tuning: what a row holds, that a file is whole, and that TRL and OpenRLHF train on what it holds."""

import asyncio
import errno
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, permutations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from turnwise.agents.chat import ChatTemplate
from turnwise.agents.tiny import LONG, ROUTER, SHORT
from turnwise.agents.transformers_agent import TransformersAgent, TransformersEngine
from turnwise.agents.transformers_engine import load_tokenizer
from turnwise.environments.arithmetic import generate
from turnwise.environments.errors import InputError
from turnwise.environments.problem import Problem
from turnwise.environments.transcript import Reply, Step, Transcript
from turnwise.protocols.long_short import LONG_INSTRUCTION, SHORT_INSTRUCTION, LongShort
from turnwise.protocols.protocol import ReasoningProtocol
from turnwise.protocols.thinkless import Thinkless
from turnwise.rl.sft import backward
from turnwise.rl.sft_sets import (
    FEATURES,
    Row,
    long_short_rows,
    paired_rows,
    read_set,
    shuffled,
    thinkless_rows,
    write_set,
)
from turnwise.rl.trajectory import TokenSequence

PROBLEM = Problem("p", "Take 3, then +4, modulo 10.", "7")
ASKED = "<|user|>Take 3, then +4, modulo 10.<|assistant|>"
DIALOGUE = [
    ("long", "<think>Now 3+4=7</think>"),
    ("short", "<answer> +4→7</rethink>"),
    ("long", "<think>so 7.</think>"),
    ("short", "<answer> \\boxed{7}</answer>"),
]
THINK, BRIEF = "<think>Now 3+4=7.\n\n</think>The answer is \\boxed{7}.", "<short> +4→7 \\boxed{7}"
END = 4
TEMPLATE = ChatTemplate(load_tokenizer(LONG))


def all_rows() -> list[Row]:
    return long_short_rows(PROBLEM, DIALOGUE, TEMPLATE) + thinkless_rows(PROBLEM, THINK, BRIEF, TEMPLATE)


def ids_of(row: Row, column: str = "input_ids") -> list[int]:
    ids = row[column]
    assert isinstance(ids, list)
    return ids


def trained(row: Row) -> list[int]:
    return [label for label in ids_of(row, "labels") if label != -100]


def decoded(ids: Sequence[int]) -> str:
    return str(TEMPLATE.tokenizer.decode(ids))


def sequence(prompt: int, said: int, start: int = 0) -> TokenSequence:
    return TokenSequence(tuple(range(start, start + prompt + said)), ((prompt, prompt + said),))


def row(ids: list[int], prompt: int, **more: object) -> Row:
    labels = [-100] * prompt + ids[prompt:]
    texts = {"id": "", "seat": "long", "input": "", "output": "", "tokenizer": TEMPLATE.fingerprint}
    return {**texts, "input_ids": ids, "labels": labels, **more}


# What a row holds


def test_a_dialogue_is_a_row_a_turn() -> None:
    rows = long_short_rows(PROBLEM, DIALOGUE, TEMPLATE)
    assert [(one["id"], one["seat"], one["input"], one["output"]) for one in rows] == [
        ("p/0", "long", f"<|system|>{ASKED}", "<think>Now 3+4=7</think>"),
        ("p/1", "short", f"<|system|>{ASKED}<think>Now 3+4=7</think>", "<answer> +4→7</rethink>"),
        (
            "p/2", "long", f"<|system|>{ASKED}<think>Now 3+4=7</think><answer> +4→7</rethink>", "<think>so 7.</think>",
        ),
        (
            "p/3", "short", f"<|system|>{ASKED}<think>Now 3+4=7</think><answer> +4→7</rethink><think>so 7.</think>",
            "<answer> \\boxed{7}</answer>",
        ),
    ]  # fmt: skip
    assert ids_of(rows[0]) == [
        1, 2, 62, 333, 79, 231, 29, 22, 290, 323, 30, 22, 318, 231, 27, 26, 24, 3,
        5, 287, 231, 29, 21, 30, 39, 33, 6,
    ]  # fmt: skip
    assert ids_of(rows[0], "labels") == [-100] * 18 + [5, 287, 231, 29, 21, 30, 39, 33, 6]
    assert [len(ids_of(one)) - len(trained(one)) for one in rows] == [18, 27, 33, 40]
    assert [trained(one) for one in rows[1:]] == [
        [7, 323, 30, 327, 33, 9], [5, 93, 89, 231, 33, 24, 6], [7, 314, 317, 101, 33, 103, 8],
    ]  # fmt: skip
    assert {one["tokenizer"] for one in rows} == {TEMPLATE.fingerprint}


def test_the_two_answers_of_a_pair_know_nothing_of_each_other() -> None:
    think, short = thinkless_rows(PROBLEM, THINK, BRIEF, TEMPLATE)
    assert (think["id"], think["seat"], think["input"]) == ("p/<think>", "solver", ASKED)
    assert (short["id"], short["seat"], short["input"]) == ("p/<short>", "solver", ASKED)
    assert think["output"] == "<think>Now 3+4=7.\n\n</think>The answer is \\boxed{7}.<|end|>"
    assert short["output"] == "<short> +4→7 \\boxed{7}<|end|>"
    prompt = [2, 62, 333, 79, 231, 29, 22, 290, 323, 30, 22, 318, 231, 27, 26, 24, 3]
    assert ids_of(think)[:18] == [*prompt, 5]
    assert ids_of(think, "labels") == [-100] * 17 + [
        5, 287, 231, 29, 21, 30, 39, 33, 24, 270, 6, 351, 342, 278, 314, 317, 101, 33, 103, 24, END,
    ]  # fmt: skip
    assert ids_of(short) == [*prompt, 10, 323, 30, 327, 33, 314, 317, 101, 33, 103, END]
    assert ids_of(short, "labels") == [-100] * 17 + ids_of(short)[17:]


def test_a_control_token_may_be_left_to_the_row() -> None:
    bare = thinkless_rows(PROBLEM, f" {THINK.removeprefix('<think>')}\n", "\\boxed{7}", TEMPLATE)
    assert bare[0] == thinkless_rows(PROBLEM, THINK, BRIEF, TEMPLATE)[0]
    assert bare[1]["output"] == "<short>\\boxed{7}<|end|>"


def test_only_a_turn_that_no_tag_closes_is_taught_its_end_of_sequence() -> None:
    closed, unclosed = (
        long_short_rows(PROBLEM, [DIALOGUE[0], ("short", f"<answer> 7{end}")], TEMPLATE) for end in ("</answer>", "")
    )
    assert [trained(one)[-1] for one in closed] == [6, 8]
    assert [trained(one)[-1] for one in unclosed] == [6, END]
    assert unclosed[1]["output"] == "<answer> 7<|end|>"
    assert all(END not in trained(one)[:-1] for one in closed + unclosed)


def test_the_input_begins_with_the_instruction_of_the_seat() -> None:
    tokenizer = load_tokenizer(LONG)
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    rows = long_short_rows(PROBLEM, DIALOGUE, ChatTemplate(tokenizer))
    asked = "user: Take 3, then +4, modulo 10.\nassistant: "
    assert rows[0]["input"] == f"system: {LONG_INSTRUCTION}\n{asked}"
    assert rows[1]["input"] == f"system: {SHORT_INSTRUCTION}\n{asked}<think>Now 3+4=7</think>"
    assert rows[2]["input"] == f"system: {LONG_INSTRUCTION}\n{asked}<think>Now 3+4=7</think><answer> +4→7</rethink>"


WORDS = st.text(alphabet="ab 1+→\\{}\n<é", max_size=12)


@given(turns=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3))
@settings(max_examples=40)
def test_a_row_is_what_the_engine_would_see_and_say_in_play(turns: list[tuple[str, str]]) -> None:
    dialogue = [
        said
        for number, (thought, words) in enumerate(turns, start=1)
        for said in (
            ("long", f"<think>{thought}</think>"),
            ("short", f"<answer>{words}{'</answer>' if number == len(turns) else '</rethink>'}"),
        )
    ]
    rows = long_short_rows(PROBLEM, dialogue, TEMPLATE)
    protocol, transcript = LongShort(max_turns=8), Transcript(PROBLEM)
    for one, (seat, text) in zip(rows, dialogue, strict=True):
        (turn,) = protocol.next_turns(transcript)
        prompt, said = TEMPLATE.prompt(turn), TEMPLATE.tokens(text)
        assert (turn.seat, one["seat"]) == (seat, seat)
        assert ids_of(one) == [*prompt, *said]
        assert ids_of(one, "labels") == [-100] * len(prompt) + list(said)
        assert decoded(prompt) == one["input"]
        assert text == one["output"]
        stop = next(tag for tag in turn.stops if text.endswith(tag))
        reply = Reply(text, len(said), "stop", stop, said, (0.0,) * len(said), tuple(prompt), TEMPLATE.fingerprint)
        transcript = transcript.extended(Step(seat, turn.state, reply))
    assert not protocol.next_turns(transcript)


@given(thought=WORDS, solution=WORDS.filter(str.strip), brief=WORDS.filter(str.strip))
@settings(max_examples=40)
def test_the_first_trained_token_is_the_control_token_and_the_last_ends_the_sequence(
    thought: str, solution: str, brief: str
) -> None:
    think, short = thinkless_rows(PROBLEM, f"<think>{thought}</think>{solution}", f"<short>{brief}", TEMPLATE)
    for one, mode, text in ((think, 5, f"{thought}</think>{solution.rstrip()}"), (short, 10, brief.rstrip())):
        assert trained(one) == [mode, *TEMPLATE.tokens(text), END]
        assert ids_of(one)[-len(trained(one)) :] == trained(one)
        assert decoded(trained(one)) == one["output"]
        assert one["input"] == ASKED


def played(protocol: ReasoningProtocol, problem: Problem, team: dict[str, TransformersAgent], seed: int) -> Transcript:
    async def play() -> Transcript:
        transcript = Transcript(problem)
        while turns := protocol.next_turns(transcript):
            (turn,) = turns
            reply = await team[turn.seat].reply(turn, seed)
            transcript = transcript.extended(Step(turn.seat, turn.state, reply, turn.prefill))
        return transcript

    return asyncio.run(play())


def test_rows_of_what_models_said_have_the_ids_that_their_engines_read_and_sampled() -> None:
    folders = {"long": LONG, "short": SHORT}
    team = {seat: TransformersAgent(TransformersEngine.load(path), temperature=0.6) for seat, path in folders.items()}
    lengths = []
    for seed, problem in enumerate(islice(generate("train", levels=(6,), seed=3), 8)):
        transcript = played(LongShort(max_turns=9), problem, team, seed)
        rows = long_short_rows(problem, [(step.seat, step.text) for step in transcript.steps], TEMPLATE)
        for one, step in zip(rows, transcript.steps, strict=True):
            assert ids_of(one) == [*step.reply.prompt_token_ids, *step.reply.token_ids]
            assert trained(one) == list(step.reply.token_ids)
        lengths.append(len(rows))
    assert max(lengths) >= 4


def test_rows_of_what_a_router_said_have_the_ids_that_its_engine_read_and_sampled() -> None:
    problem = next(generate("train", levels=(3,), seed=3))
    team = {"solver": TransformersAgent(TransformersEngine.load(ROUTER), temperature=0.0)}
    think, short = (played(Thinkless(mode=mode), problem, team, 0).steps[0] for mode in ("think", "short"))
    for one, step in zip(thinkless_rows(problem, think.text, short.text, TEMPLATE), (think, short), strict=True):
        assert step.reply.finish == "end"
        assert ids_of(one) == [*step.reply.prompt_token_ids, *step.reply.token_ids]
        assert trained(one) == [*TEMPLATE.tokens(step.prefill), *step.reply.token_ids]


# What is refused


@pytest.mark.parametrize(
    ("dialogue", "message"),
    [
        ([], "the dialogue of 'p' ends too early: seat 'long' is to speak next"),
        (DIALOGUE[:1], "the dialogue of 'p' ends too early: seat 'short' is to speak next"),
        (DIALOGUE[:2], "the dialogue of 'p' ends too early: seat 'long' is to speak next"),
        (DIALOGUE[1:], r"in 'p' seat 'long' is to speak, but seat 'short' does: '<answer> \+4→7</rethink>'"),
        (
            [DIALOGUE[0], DIALOGUE[3], DIALOGUE[2]],
            "the dialogue of 'p' is over before seat 'long' says '<think>so 7.</think>'; remove that",
        ),
        (
            [("long", "<think>a</think> b</think>"), DIALOGUE[3]],
            "in 'p' </think> ends a turn of seat 'long'; remove ' b</think>' there",
        ),
        (
            [DIALOGUE[0], ("short", "<answer>7</answer> or so")],
            "in 'p' </answer> ends a turn of seat 'short'; remove ' or so' there",
        ),
        (
            [DIALOGUE[0], ("short", "<answer>7</rethink>8</answer>")],
            "in 'p' </rethink> ends a turn of seat 'short'; remove '8</answer>' there",
        ),
    ],
)
def test_a_dialogue_that_the_protocol_would_not_have_is_refused(dialogue: list[tuple[str, str]], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}$"):
        long_short_rows(PROBLEM, dialogue, TEMPLATE)


@pytest.mark.parametrize(
    ("think", "short", "mode"),
    [
        ("<think>no end", BRIEF, "<think>"),
        ("<think>a</think>b</think>c", BRIEF, "<think>"),
        ("<think><short>a</think>b", BRIEF, "<think>"),
        ("<think><think>a</think>b", BRIEF, "<think>"),
        ("", BRIEF, "<think>"),
        (THINK, "", "<short>"),
        (THINK, "<short>\n", "<short>"),
        (THINK, THINK, "<short>"),
        (THINK, "<think>cut off", "<short>"),
        (THINK, "a</think>b", "<short>"),
    ],
)
def test_an_answer_whose_tags_are_not_those_of_its_mode_is_refused(think: str, short: str, mode: str) -> None:
    message = f"^an answer of Thinkless is .* for 'p', {mode} got {{}}"
    with pytest.raises(InputError, match=message.format("")) as error:
        thinkless_rows(PROBLEM, think, short, TEMPLATE)
    assert str(error.value).endswith(repr(think if mode == "<think>" else short))


def test_a_control_token_that_is_several_tokens_is_refused() -> None:
    described = json.loads((LONG / "tokenizer.json").read_text())
    described["added_tokens"] = [token for token in described["added_tokens"] if token["content"] != "<short>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(described)),
        eos_token="<|end|>",
        chat_template=TEMPLATE.tokenizer.chat_template,
    )
    with pytest.raises(
        InputError, match=r"^a control token must be one token .*; \['<short>'\] of seat 'solver' are not: "
    ):
        thinkless_rows(PROBLEM, THINK, BRIEF, ChatTemplate(tokenizer))


# Pairs, and order


def answers(number: int) -> list[tuple[Problem, str, str]]:
    return [(Problem(f"p{place}", "1+1?", "2"), f"{place}</think>2", f"{place}") for place in range(number)]


def test_pairs_are_shuffled_as_pairs_and_then_flattened() -> None:
    ids = [one["id"] for one in paired_rows(answers(20), TEMPLATE, seed=1)[0]]
    order = [str(think).partition("/")[0] for think in ids[::2]]
    assert ids == [f"{problem}/{mode}" for problem in order for mode in ("<think>", "<short>")]
    assert sorted(order) == sorted(f"p{place}" for place in range(20))
    assert order != [f"p{place}" for place in range(20)]
    assert ids == [one["id"] for one in paired_rows(iter(answers(20)), TEMPLATE, seed=1)[0]]
    assert ids != [one["id"] for one in paired_rows(answers(20), TEMPLATE, seed=2)[0]]


def test_a_pair_that_cannot_be_used_is_left_out_and_said() -> None:
    pairs = answers(3)
    pairs[1] = (pairs[1][0], "never finished", "1")
    rows, dropped = paired_rows(pairs, TEMPLATE)
    assert sorted(str(row["id"]) for row in rows) == ["p0/<short>", "p0/<think>", "p2/<short>", "p2/<think>"]
    ((id_, stage, reason),) = [(one.id, one.stage, one.reason) for one in dropped]
    assert (id_, stage) == ("p1", "pairs")
    assert reason.endswith("for 'p1', <think> got 'never finished'")


def test_each_pair_is_what_it_would_be_alone() -> None:
    expected = {one["id"]: one for each in answers(5) for one in thinkless_rows(*each, TEMPLATE)}
    assert {one["id"]: one for one in paired_rows(answers(5), TEMPLATE)[0]} == expected


@given(
    number=st.integers(1, 12), together=st.integers(1, 3), seed=st.integers(0, 2**32), epochs=st.integers(1, 3)
)  # fmt: skip
def test_every_epoch_has_each_sequence_once_and_neighbours_stay_together(
    number: int, together: int, seed: int, epochs: int
) -> None:
    sequences = [sequence(2, 1, start) for start in range(number)]
    stream = list(islice(shuffled(sequences, seed=seed, together=together), number * epochs))
    for epoch in range(epochs):
        said = [one.token_ids[0] for one in stream[epoch * number : (epoch + 1) * number]]
        assert sorted(said) == list(range(number))
        for place, start in enumerate(said):
            if start % together:
                assert said[place - 1] == start - 1
    assert stream == list(islice(shuffled(sequences, seed=seed, together=together), number * epochs))


def test_every_order_comes_up_and_the_seed_chooses() -> None:
    sequences = [sequence(2, 1, start) for start in range(3)]
    orders = {tuple(islice(shuffled(sequences, seed=seed), 3)) for seed in range(60)}
    assert orders == set(permutations(sequences))
    stream = shuffled(sequences, seed=0)
    assert {tuple(islice(stream, 3)) for _ in range(60)} == orders


def test_shuffling_leaves_all_else_alone() -> None:
    random.seed(5)
    state, sequences = random.getstate(), [sequence(2, 1, start) for start in range(9)]
    list(islice(shuffled(sequences, seed=1), 30))
    paired_rows(answers(5), TEMPLATE)
    assert random.getstate() == state
    assert sequences == [sequence(2, 1, start) for start in range(9)]
    assert list(shuffled([], seed=0)) == []


# Files


def test_rows_come_back_through_datasets(tmp_path: Path) -> None:
    path = tmp_path / "new" / "set.parquet"
    assert write_set(str(path), iter(all_rows())) == 6
    table = load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert table.features == FEATURES
    assert list(table) == all_rows()
    assert [file.name for file in path.parent.iterdir()] == ["set.parquet"]


def test_a_set_is_read_as_it_was_written_and_in_its_order(tmp_path: Path) -> None:
    written = [row([*range(start, start + 9)], 1 + start % 8) for start in (5, 3, 400, 1, 17)]
    assert write_set(tmp_path / "set.parquet", written) == 5
    expected = [TokenSequence(tuple(range(start, start + 9)), ((1 + start % 8, 9),)) for start in (5, 3, 400, 1, 17)]
    assert read_set(tmp_path / "set.parquet", TEMPLATE) == expected
    assert read_set(str(tmp_path / "set.parquet"), TEMPLATE) == expected


def test_what_is_read_of_real_rows_trains_their_outputs(tmp_path: Path) -> None:
    write_set(tmp_path / "set.parquet", all_rows())
    for one, read in zip(all_rows(), read_set(tmp_path / "set.parquet", TEMPLATE), strict=True):
        assert list(read.token_ids) == ids_of(one)
        assert [
            token if said else -100 for token, said in zip(read.token_ids, read.mask, strict=True)
        ] == ids_of(one, "labels")  # fmt: skip


@pytest.mark.parametrize("longest", [4, 6, 8, 9, 10, None])
def test_what_is_too_long_is_clipped_and_not_dropped(tmp_path: Path, longest: int | None) -> None:
    write_set(tmp_path / "set.parquet", [row([*range(8)], 3), row([*range(50, 60)], 1), row([1, 2], 1)])
    first, second, third = read_set(tmp_path / "set.parquet", TEMPLATE, longest=longest)
    kept = longest or 100
    assert first == TokenSequence(tuple(range(8))[:kept], ((3, min(8, kept)),))
    assert second == TokenSequence(tuple(range(50, 60))[:kept], ((1, min(10, kept)),))
    assert third == TokenSequence((1, 2), ((1, 2),))


@pytest.mark.parametrize("longest", [3, 1, 0, -1])
def test_an_input_that_leaves_no_room_for_its_output_is_refused(tmp_path: Path, longest: int) -> None:
    path = tmp_path / "set.parquet"
    write_set(path, [row([1, 2], 1), row([*range(8)], 3)] if longest > 1 else [row([*range(8)], 3)])
    place = 1 if longest > 1 else 0
    with pytest.raises(InputError) as error:
        read_set(path, TEMPLATE, longest=longest)
    assert str(error.value) == (
        f"{path}, row {place}: an input of 3 tokens leaves none to train within {longest}; allow more, or write the "
        "set anew without it"
    )


def test_neither_writing_nor_reading_prints_anything(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_set(tmp_path / "set.parquet", all_rows())
    read_set(tmp_path / "set.parquet", TEMPLATE)
    (tmp_path / "bad.parquet").write_text("no Parquet")
    with pytest.raises(InputError):
        read_set(tmp_path / "bad.parquet", TEMPLATE)
    with pytest.raises(InputError):
        write_set(tmp_path / "set.parquet", failing(InputError("no")))
    assert capfd.readouterr() == ("", "")


def test_a_path_is_no_pattern(tmp_path: Path) -> None:
    write_set(tmp_path / "a[1]*.parquet", all_rows()[:1])
    write_set(tmp_path / "a1.parquet", all_rows())
    assert len(read_set(tmp_path / "a[1]*.parquet", TEMPLATE)) == 1
    with pytest.raises(InputError, match=r"a\*\.parquet is no set of rows"):
        read_set(tmp_path / "a*.parquet", TEMPLATE)


def test_rows_are_made_one_at_a_time_while_they_are_written(tmp_path: Path) -> None:
    made = all_rows()
    count = write_set(tmp_path / "set.parquet", (made.pop(0) for _ in range(6)))
    assert (count, made) == (6, [])
    assert len(read_set(tmp_path / "set.parquet", TEMPLATE)) == 6


def failing(error: BaseException, after: int = 2) -> Iterator[Row]:
    yield from all_rows()[:after]
    raise error


@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize(
    "error", [InputError("problem 'p' has no answer"), RuntimeError("odd"), FileNotFoundError(2, "no such file", "x")]
)
def test_what_is_wrong_with_a_row_is_said_as_it_was_and_the_old_set_stays(
    tmp_path: Path, error: Exception, after: int
) -> None:
    (tmp_path / "set.parquet").write_text("old")
    with pytest.raises(type(error)) as raised:
        write_set(tmp_path / "set.parquet", failing(error, after))
    assert raised.value is error
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("set.parquet", "old")]


def test_a_set_has_rows(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"^a Parquet file holds at least one row, but there are none to write to .*set\.parquet$"
    ):
        write_set(tmp_path / "set.parquet", [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_for_drafts_is_said_in_one_line_and_the_old_set_stays(tmp_path: Path, code: int) -> None:
    (tmp_path / "set.parquet").write_text("old")
    with pytest.raises(
        InputError, match=r"^cannot write .*set\.parquet: no space left in .*; make room, or set TMPDIR"
    ):
        write_set(tmp_path / "set.parquet", failing(OSError(code, "full")))
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("set.parquet", "old")]


@pytest.mark.parametrize(
    ("error", "raised", "left"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), InputError, ["set.parquet"]),
        (KeyboardInterrupt(), KeyboardInterrupt, ["set.parquet", "set.parquet.draft"]),
    ],
    ids=["a full disk", "a kill"],
)
def test_a_set_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, raised: type[BaseException], left: list[str]
) -> None:
    path = tmp_path / "set.parquet"
    write_set(path, all_rows())

    def half(table: Dataset, draft: Path) -> None:
        draft.write_bytes(b"PAR1 and so")
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(Dataset, "to_parquet", half)
        with pytest.raises(raised) as said:
            write_set(path, all_rows()[:1])
    if isinstance(said.value, InputError):
        assert str(said.value).startswith(f"cannot write {path}: No space left on device; make room")
    assert len(read_set(path, TEMPLATE)) == 6
    assert sorted(file.name for file in tmp_path.iterdir()) == left
    assert write_set(path, all_rows()[:1]) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["set.parquet"]


def truncated(path: Path) -> None:
    write_set(path, all_rows())
    path.write_bytes(path.read_bytes()[:-20])


def damaged(path: Path) -> None:
    write_set(path, all_rows())
    whole = path.read_bytes()
    path.write_bytes(whole[:100] + bytes(200) + whole[300:])


def table(**columns: list[object]) -> Callable[[Path], None]:
    return lambda path: write_table(path, columns)


def write_table(path: Path, columns: dict[str, list[object]], features: object = None) -> None:
    with path.open("wb") as file:
        Dataset.from_dict(columns, features=features).to_parquet(file)


MINE: list[object] = [TEMPLATE.fingerprint]
UNREADABLE = "is no set of rows for fine-tuning that can be read: .+"
LABELS = ", row 0: labels are -100 for the input and then its output's ids; write the set anew"


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, f" {UNREADABLE}"),
        (lambda path: path.write_text('{"input": "a"}\nnot Parquet'), f" {UNREADABLE}"),
        (lambda path: path.touch(), f" {UNREADABLE}"),
        (lambda path: path.mkdir(), f" {UNREADABLE}"),
        (truncated, f" {UNREADABLE}"),
        (damaged, f" {UNREADABLE}"),
        (
            lambda path: write_table(path, {name: [] for name in FEATURES}, FEATURES),
            f" {UNREADABLE}",
        ),
        (
            table(input=["a"], output=["b"]),
            r" holds no token ids to train on \(no column input_ids, labels, tokenizer\); write it anew",
        ),
        (
            table(input_ids=[[1, 2]], tokenizer=MINE),
            r" holds no token ids to train on \(no column labels\); write it anew",
        ),
        (
            table(input_ids=[[1, 2]] * 3, labels=[[-100, 2]] * 3, tokenizer=["b", *MINE, "a"]),
            f" was written with the tokenizer a, b, and this model's is {MINE[0]}; "
            "write it anew with this model's tokenizer",
        ),
        (
            table(input_ids=[[1, 2]], labels=[[-100, 2]], tokenizer=[None]),
            f" was written with the tokenizer None, and this model's is {MINE[0]}; .*",
        ),
        (table(input_ids=[[1, 2]], labels=[[-100, 3]], tokenizer=MINE), LABELS),
        (table(input_ids=[[1, 2, 3]], labels=[[-100, 2]], tokenizer=MINE), LABELS),
        (table(input_ids=[[1, 2, 3]], labels=[[-100, 2, -100]], tokenizer=MINE), LABELS),
        (table(input_ids=[[1, 2]], labels=[[-100, -100]], tokenizer=MINE), LABELS),
        (table(input_ids=[[1, 2]], labels=[[1, 2]], tokenizer=MINE), LABELS),
        (table(input_ids=[[]], labels=[[]], tokenizer=MINE), LABELS),
        (table(input_ids=[None], labels=[None], tokenizer=MINE), LABELS),
        (table(input_ids=["a b"], labels=["a b"], tokenizer=MINE), LABELS),
    ],
)  # fmt: skip
def test_a_file_that_is_no_set_of_this_tokenizer_is_refused_in_one_line(
    tmp_path: Path, write: Callable[[Path], object], message: str
) -> None:
    path = tmp_path / "set.parquet"
    write(path)
    with pytest.raises(InputError) as error:
        read_set(path, TEMPLATE)
    assert str(error.value).startswith(str(path))
    assert re.fullmatch(message, str(error.value).removeprefix(str(path))), str(error.value)


# The loaders of others


def test_trl_trains_on_the_rows_as_they_are_and_its_loss_is_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trl = pytest.importorskip("trl", reason="TRL is not installed (pip install -c constraints.txt trl)")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", True)  # or each trainer calls home
    path = tmp_path / "set.parquet"
    write_set(path, all_rows())
    dataset = load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    with torch.random.fork_rng():
        trainer = trl.SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(LONG),
            args=trl.SFTConfig(
                output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False, report_to="none", save_strategy="no",
                per_device_train_batch_size=6, max_steps=1, logging_steps=1, disable_tqdm=True, max_length=None,
                train_sampling_strategy="sequential",
            ),
            train_dataset=dataset,
            processing_class=load_tokenizer(LONG),
        )  # fmt: skip
        (batch,) = trainer.get_train_dataloader()
        trainer.train()
    longest = max(len(ids_of(one)) for one in all_rows())
    for one, ids, labels, seen in zip(
        all_rows(), batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True
    ):
        length, padding = len(ids_of(one)), longest - len(ids_of(one))
        assert ids[:length].tolist() == ids_of(one)
        assert labels.tolist() == ids_of(one, "labels") + [-100] * padding
        assert seen.tolist() == [1] * length + [0] * padding
    model = AutoModelForCausalLM.from_pretrained(LONG).train()
    assert trainer.state.global_step == 1
    assert trainer.state.log_history[0]["loss"] == pytest.approx(
        backward(model, read_set(path, TEMPLATE), 6), abs=1e-5
    )  # fmt: skip


def test_openrlhf_trains_on_the_same_ids_and_a_space_and_an_end_of_sequence_behind_a_closing_tag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = "OpenRLHF is not installed (pip install pylatexenc; pip install --no-deps openrlhf==0.11.2)"
    openrlhf = pytest.importorskip("openrlhf.datasets", reason=reason)
    from openrlhf.datasets.utils import blending_datasets
    from openrlhf.utils import get_tokenizer

    path = tmp_path / "set.parquet"
    write_set(path, all_rows())
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    # As openrlhf.cli.train_sft does with --data.input_key input --data.output_key output.
    data = SimpleNamespace(input_key="input", output_key="output", apply_chat_template=False)
    strategy = SimpleNamespace(args=SimpleNamespace(data=data), print=lambda *_: None, is_rank_0=lambda: False)
    loaded = blending_datasets(str(path), None, strategy, dataset_split="train")
    tokenizer = get_tokenizer(str(LONG), None, "right", strategy)
    rows = openrlhf.SFTDataset(loaded, tokenizer, 2048, strategy, num_processors=None)
    assert len(rows) == 6
    space, appended = 231, list[str]()
    assert decoded([space]) == " "
    for one, (ids, seen, loss_mask) in zip(all_rows(), rows, strict=True):
        length, prompt = len(ids_of(one)), len(ids_of(one)) - len(trained(one))
        assert ids[0, :length].tolist() == ids_of(one)
        appended.append(decoded(ids[0, length:]))
        assert seen.tolist() == [[1] * ids.shape[1]]
        # The mask stands where a token is predicted, one place before the token itself.
        assert loss_mask.tolist() == [[0.0] * (prompt - 1) + [1.0] * (ids.shape[1] - prompt) + [0.0]]
    assert appended == [" <|end|>"] * 4 + [""] * 2
    assert [ids[0, -2:].tolist() for ids, _, _ in islice(rows, 4)] == [[space, END]] * 4
