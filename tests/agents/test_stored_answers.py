import asyncio
import json
from pathlib import Path

import pytest

from turnwise.agents.stored_answers import answering, read_answers
from turnwise.environments.errors import InputError
from turnwise.environments.problem import Problem
from turnwise.environments.seeds import turn_seed
from turnwise.environments.transcript import Message, Reply, Turn

PROBLEMS = (Problem("p-0", "1 + 1?", "2"), Problem("p-1", "2 + 1?", "3"))


def written(folder: Path, *rows: object) -> Path:
    path = folder / "mine.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


class TestReadAnswers:
    def test_one_model_with_several_samples(self, tmp_path: Path) -> None:
        path = written(
            tmp_path,
            {"question": " 1 + 1? ", "solution": "two"},
            {"id": "p-1", "solution": "three"},
            {"problem": "1 + 1?", "solution": "2", "model": "mine"},
            {"question": "another?", "solution": "left out"},
            "",
        )
        assert read_answers(path, PROBLEMS) == {"mine": {"p-0": ["two", "2"], "p-1": ["three"]}}

    def test_several_models(self, tmp_path: Path) -> None:
        both = [
            {"id": id_, "a": {"solution": f"a{id_}"}, "b": {"solution": "b", "right": True}} for id_ in ("p-0", "p-1")
        ]
        assert read_answers(written(tmp_path, *both), PROBLEMS) == {
            "a": {"p-0": ["ap-0"], "p-1": ["ap-1"]},
            "b": {"p-0": ["b"], "p-1": ["b"]},
        }
        named = [{"id": id_, "model": model, "solution": "x"} for id_ in ("p-0", "p-1") for model in "ab"]
        assert list(read_answers(written(tmp_path, *named), PROBLEMS)) == ["a", "b"]

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            (['{"id": '], r"line 1 of .* must be a JSON object; it is no JSON \("),
            (["", "[1]"], "line 2 of .* must be a JSON object; it is no JSON object, but a list"),
            (['"' + "x" * 38 + '×"'], "it is no JSON object, but a str"),
            ([{"id": "p-0"}], 'line 1 of .* needs an "id" or a "question".* it has id'),
            ([{"solution": "2"}], 'line 1 of .* needs an "id" or a "question"'),
            ([{"id": "q", "solution": "2"}], "answers none of the problems"),
            ([{"id": "p-0", "solution": "2"}], "mine leaves 1 problems without a solution, such as p-1"),
        ],
    )
    def test_files_that_cannot_be_used(self, tmp_path: Path, rows: list[object], message: str) -> None:
        with pytest.raises(InputError, match=message):
            read_answers(written(tmp_path, *rows), PROBLEMS)

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"cannot read solutions from .*none\.jsonl: No such file"):
            read_answers(tmp_path / "none.jsonl", PROBLEMS)


class TestAnswering:
    def reply(self, problem: str, sample: int, seed: int = 0, turn: int = 0) -> Reply:
        agent = answering({"p-0": ["one  two\nthree", "x"], "p-1": ["y"]}, "mine", seed=5)
        asked = Turn("solver", "solve", (Message("user", "?"),), (), 1)
        return asyncio.run(agent.reply(asked, turn_seed(seed, problem, sample, turn)))

    def test_each_sample_is_the_next_text_in_words(self) -> None:
        assert self.reply("p-0", 0, seed=5) == Reply("one  two\nthree", 3, model="mine")
        assert self.reply("p-0", 1, seed=5) == Reply("x", 1, model="mine")
        assert self.reply("p-1", 0, seed=5).text == "y"

    @pytest.mark.parametrize(
        ("problem", "sample", "seed", "turn"), [("p-1", 1, 5, 0), ("p-0", 0, 0, 0), ("p-0", 0, 5, 1)]
    )
    def test_nothing_else_is_stored(self, problem: str, sample: int, seed: int, turn: int) -> None:
        with pytest.raises(InputError, match="mine has no stored solution for this turn of seat 'solver'"):
            self.reply(problem, sample, seed, turn)

    def test_tokens_may_be_counted_otherwise(self) -> None:
        agent = answering({"p-0": ["four"]}, "mine", count_tokens=len)
        asked = Turn("solver", "solve", (), (), 1)
        assert asyncio.run(agent.reply(asked, turn_seed(0, "p-0", 0, 0))).token_count == 4
