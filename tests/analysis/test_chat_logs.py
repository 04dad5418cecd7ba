"""Chat logs of others become episodes: whole, graded where that is possible, or not at all."""

import json
from functools import partial
from pathlib import Path

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turnwise.analysis.chat_logs import ChatColumns, Imported, import_chats
from turnwise.environments.answers import last_marked
from turnwise.environments.environment import Grade, Grader, Outcome
from turnwise.environments.errors import InputError
from turnwise.environments.math_grader import MathGrader
from turnwise.environments.problem import Problem
from turnwise.rl.episode_store import EpisodeStore, read_episodes


class Contains(Grader):
    """Right is what holds the answer; so many answers, and then a kill."""

    def __init__(self, answers: int = 10**9) -> None:
        self.left = answers

    async def grade(self, problem: Problem, text: str) -> Grade:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        return Grade(Outcome.RIGHT if problem.answer in text else Outcome.WRONG, text)


def chat(*texts: str, **more: object) -> dict[str, object]:
    """User and assistant in turn."""
    roles = ("user", "assistant") * len(texts)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)], **more}


def written(folder: Path, *lines: object) -> Path:
    path = folder / "chats.jsonl"
    path.write_bytes(b"".join((line if isinstance(line, bytes) else orjson.dumps(line)) + b"\n" for line in lines))
    return path


def test_chats_become_episodes(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be brief."}
    parts = [{"type": "text", "text": "one "}, {"type": "image_url"}, {"type": "text", "text": "two three"}]
    ann = {"role": "assistant", "content": parts, "name": "ann"}
    source = written(
        tmp_path,
        chat("1 + 1?", "It is 2", id="a", answer=2),
        b"",
        chat("1 + 1?", "It is 3", id="a", answer="2"),
        {"messages": [system, {"role": "user", "content": "Why?"}, ann]},
        chat("Solve this: 7", "8", "Are you sure?", "No: 7", "Thanks, not 8!", problem="7", answer="7"),
        {"messages": [{"role": "assistant", "content": None}, {"role": "tool", "content": "42"}], "id": 5},
    )  # fmt: skip
    assert import_chats(source, tmp_path / "run", Contains()) == Imported(chats=5, graded=3, right=2)
    first, second, why, sure, tool = read_episodes(tmp_path / "run" / "episodes.jsonl")
    assert (first.id, second.id) == ("a#0", "a#1")
    assert first.transcript.problem == Problem("a", "1 + 1?", "2")
    assert (first.grade, second.right) == (Grade(Outcome.RIGHT, "It is 2"), False)
    assert why.transcript.problem.question == "Be brief.\n\nWhy?"
    assert (why.grade, why.error) == (None, None)
    ((seat, state, reply, _),) = why.transcript.steps
    assert (seat, state, reply.text, reply.token_count) == ("ann", "assistant", "one two three", 3)
    assert sure.transcript.problem.question == "7"
    assert [(step.seat, step.reply.token_count) for step in sure.transcript.steps] == [
        ("assistant", 1), ("user", 0), ("assistant", 2), ("user", 0),
    ]  # fmt: skip
    assert sure.grade == Grade(Outcome.RIGHT, "No: 7")
    assert tool.transcript.problem == Problem("5", "", "")
    assert [step.seat for step in tool.transcript.steps] == ["assistant", "tool"]


def test_ids_are_made_of_the_problem_where_there_are_none(tmp_path: Path) -> None:
    source = written(tmp_path, chat("1?", "1"), chat("2?", "2"), chat("1?", "one"))
    import_chats(source, tmp_path / "run", Contains())
    one, two, again = read_episodes(tmp_path / "run" / "episodes.jsonl")
    assert one.id.startswith("chats-")
    assert one.transcript.problem == again.transcript.problem != two.transcript.problem
    assert [one.sample, two.sample, again.sample] == [0, 0, 1]


def test_other_columns_and_another_mark_of_the_answer(tmp_path: Path) -> None:
    line = {"dialogue": chat("5 + 5?", "So it is\n#### 10.0")["messages"], "gold": 10, "uid": "x"}
    columns = ChatColumns(messages="dialogue", id="uid", answer="gold")
    with MathGrader(extract=partial(last_marked, marker="####")) as grader:
        found = import_chats(written(tmp_path, line), tmp_path / "run", grader, columns=columns)
    assert found == Imported(1, 1, 1)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b'{"messages": [', "line 2: no JSON"),
        (b'{"messages": [{"role": "assistant", "content": "\xff"}]}', "line 2: no JSON"),
        (b'{"messages": [{"role": "assistant", "content": "\\ud800"}]}', "line 2: no JSON"),
        (b"[1]", "line 2: no JSON object, but a list"),
        (b'{"text": "hi"}', "line 2: nothing in 'messages'"),
        (b'{"messages": []}', "line 2: no message of the assistant's"),
        (b'{"messages": "hi"}', "line 2: messages: Input should be a valid list"),
        (b'{"messages": [{"role": "assistant", "content": 5}]}', "line 2: messages.0.content"),
        (b'{"messages": [{"content": "hi"}]}', "line 2: messages.0.role: Field required"),
        (orjson.dumps(chat("1?", "1", answer=[1])), "line 2: 'answer' holds a list; expected text or a number"),
        (orjson.dumps(chat("1?", "1", answer=True)), "line 2: 'answer' holds a bool"),
        (orjson.dumps(chat("2?", "1", id="a")), "line 2: id 'a' is that of another problem further up"),
    ],
)
def test_a_damaged_line_is_told_by_its_number_and_nothing_is_written(tmp_path: Path, line: bytes, told: str) -> None:
    source = written(tmp_path, chat("1?", "1", id="a"), line, chat("3?", "1"))
    with pytest.raises(InputError) as error:
        import_chats(source, tmp_path / "run", Contains())
    assert told in str(error.value)
    assert "1 damaged line(s)" in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_many_damaged_lines_are_counted(tmp_path: Path) -> None:
    source = written(tmp_path, *[b"x"] * 8)
    with pytest.raises(InputError, match=r"8 damaged line\(s\).*line 5: .*; and 3 more; mend"):
        import_chats(source, tmp_path / "run", Contains())


def test_a_file_that_is_empty_or_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is empty"):
        import_chats(written(tmp_path, b""), tmp_path / "run", Contains())
    with pytest.raises(InputError, match=r"cannot read .*none\.jsonl: No such file"):
        import_chats(tmp_path / "none.jsonl", tmp_path / "run", Contains())


def test_a_stopped_import_goes_on_and_another_file_is_refused(tmp_path: Path) -> None:
    source = written(tmp_path, *(chat(f"{n}?", str(n), answer=str(n)) for n in range(150)))
    with pytest.raises(KeyboardInterrupt):
        import_chats(source, tmp_path / "run", Contains(100))
    path = tmp_path / "run" / "episodes.jsonl"
    assert len(list(read_episodes(path))) == 64
    with path.open("ab") as file:
        file.write(b'{"id": "torn')
    rest = Contains(150 - 64)
    assert import_chats(source, tmp_path / "run", rest) == Imported(150, 150, 150)
    assert rest.left == 0
    assert len({episode.id for episode in read_episodes(path)}) == 150
    assert import_chats(source, tmp_path / "run", Contains(0)) == Imported(150, 150, 150)
    written(tmp_path, chat("1?", "1"))
    with pytest.raises(InputError, match="holds another run"):
        import_chats(source, tmp_path / "run", Contains())


hostile = st.text(st.characters(exclude_categories=("Cs",)), max_size=40) | st.sampled_from(
    [
        "<script>alert(1)</script>",
        "\u202etxt\u202c",
        "\x00\x1b[31m",
        "\\(\\frac{1}{",
        "\r\n\u2028\u2029",
        "x" * 1_000_000,
    ]
)


@given(st.lists(st.lists(hostile, min_size=2, max_size=4), min_size=1, max_size=4))
@settings(max_examples=25, deadline=None)
def test_any_text_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, chats: list[list[str]]) -> None:
    folder = tmp_path_factory.mktemp("hostile")
    source = folder / "chats.jsonl"
    # As json writes them, with escapes, and not as orjson does.
    source.write_text("".join(json.dumps(chat(*texts, id=str(n))) + "\n" for n, texts in enumerate(chats)))
    import_chats(source, folder / "run", Contains())
    with EpisodeStore(folder / "run", json.loads((folder / "run" / "run.json").read_text())) as store:
        for texts, episode in zip(chats, store, strict=True):
            assert episode.transcript.problem.question == texts[0]
            assert [step.text for step in episode.transcript.steps] == texts[1:]
