import base64
import gzip
import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import orjson
import pytest
from typer.testing import CliRunner

from turnwise.agents.tiny import LONG
from turnwise.analysis.aha import phrases_in
from turnwise.analysis.edges import FAILED, START, Edges
from turnwise.analysis.report import SCRIPTS, write_report
from turnwise.analysis.stored_runs import find_runs
from turnwise.cli import app
from turnwise.environments.environment import Grade, Outcome
from turnwise.environments.episode import Episode
from turnwise.environments.errors import InputError
from turnwise.environments.problem import Problem
from turnwise.environments.transcript import Reply, Step, Transcript
from turnwise.rl.episode_store import EpisodeStore, encode
from turnwise.rl.summary import wilson

PAGE = Path(__file__).parents[2] / "analysis" / "report_page"
HOSTILE = 'a</script><script>alert(1)</script><img src=x onerror=alert(2)> \u202egnp.exe\u202c $\\frac{1}{2}$ <!-- "\0'


def blocks(page: Path) -> dict[str, object]:
    """The data in a page, as its scripts unpack it."""
    found = re.findall(r'<script type="application/gzip" id="([\w-]+)">([A-Za-z0-9+/=]*)</script>', page.read_text())
    return {name: orjson.loads(gzip.decompress(base64.b64decode(packed))) for name, packed in found}


def dialogue(*steps: tuple[str, str, str, str | None], grade: Grade | None = None, sample: int = 0) -> Episode:
    """Turns as (seat, state, text, closing tag), one token each."""
    said = [Step(seat, state, Reply(text, 1, "stop" if stop else "end", stop)) for seat, state, text, stop in steps]
    error = "KeyError: 'x'" if grade is None else None
    return Episode(Transcript(Problem("p", "1 + 1?", "2"), tuple(said)), sample, 0, grade, error)


# What it holds


def test_a_training_run_is_told_of_by_run_level_and_step(training_run: Path, tmp_path: Path) -> None:
    written = write_report([training_run], tmp_path / "report.html")
    assert (written.runs, written.episodes) == (1, 5)
    index = blocks(tmp_path / "report.html")["index"]
    (run,) = index["runs"]
    assert (run["name"], run["about"]["protocol"]) == ("trained", "LongShort by hand")
    assert run["metrics"] == {"evaluation/right": [[0], [0.5]], "right": [[1, 2], [0.5, 0.75]]}
    whole = run["whole"]
    assert (whole["episodes"], whole["failed"], whole["right"], whole["turns"]) == (4, 1, 0.5, 2.5)
    assert whole["interval"] == list(wilson(1, 2))  # half of each of two problems
    assert whole["outcomes"] == {"right": 2, "wrong": 1, "unparsable": 1}
    assert (whole["rethinks"], whole["aha"], run["phrases"]) == (1, 1, {"overthink": 1})
    assert whole["tokens"] == pytest.approx(whole["seats"]["long"] + whole["seats"]["short"])
    assert {level: (row["episodes"], row["right"]) for level, row in run["levels"].items()} == {
        "1": (2, 0.5),
        "3": (2, 0.5),
    }
    assert {step: (row["episodes"], row["failed"]) for step, row in run["steps"].items()} == {"1": (2, 1), "2": (2, 0)}


def test_the_index_has_a_row_an_episode(training_run: Path, tmp_path: Path) -> None:
    write_report([training_run], tmp_path / "report.html")
    index = blocks(tmp_path / "report.html")["index"]
    assert index["outcomes"] == ["right", "wrong", "unparsable", "timed out", "failed", "ungraded"]
    assert index["seats"] == ["long", "short"]
    assert index["problems"] == [["easy", 1, "What is 2+4?", ""], ["hard", 3, "What is 7·8, modulo 10?", ""]]
    columns = index["episodes"]
    assert columns["step"] == [1, 1, 1, 2, 2]
    assert columns["problem"] == [0, 0, 1, 1, 1]
    assert columns["sample"] == [0, 1, 0, 0, 1]
    assert columns["outcome"] == [0, 1, 4, 0, 2]
    assert columns["turns"] == [2, 2, 1, 4, 2]
    assert columns["rethinks"] == [0, 0, 0, 1, 0]
    assert columns["aha"] == [0, 0, 0, 1, 0]
    assert columns["mode"] == [None] * 5


def test_conversations_come_with_what_was_paid_and_trained(training_run: Path, tmp_path: Path) -> None:
    write_report([training_run], tmp_path / "report.html")
    said = blocks(tmp_path / "report.html")["said-0"]
    assert [one["id"] for one in said] == ["easy#0", "easy#1", "hard#0", "hard#0", "hard#1"]
    assert said[0]["rewards"] is said[0]["advantages"] is None, "step 1 has no credit log"
    assert said[3]["rewards"] == {"long": {"correctness": 1.0, "format": 0.5}}
    assert said[3]["advantages"] == [0.25, None, 0.25, None]
    assert said[2]["error"] == "ConnectionError: the server <b>left</b>"
    assert (said[0]["statement"], said[0]["gold"], said[0]["answer"]) == ("What is 2+4?", "6", "6")
    turn = said[0]["turns"][1]
    assert (turn["seat"], turn["text"], turn["stop"]) == ("short", "<answer> \\boxed{6}</answer>", "</answer>")


def test_tokens_are_what_was_read_since_and_what_was_said(training_run: Path, tmp_path: Path) -> None:
    write_report([training_run], tmp_path / "report.html")
    found = blocks(tmp_path / "report.html")
    texts = found["vocabularies"]
    first, asked, again, _ = found["tokens-0"][3]
    (vocabulary,) = texts.values()
    read = {name: "".join(vocabulary[str(id)] for id in again[name]) for name in ("read", "said")}
    assert again["continues"]
    assert not first["continues"]
    assert not asked["continues"]
    assert read == {"read": "<answer> is it?</rethink>", "said": "<think>7×8=56</think>"}
    assert again["logs"] == [-0.5] * len(again["said"])


def test_without_its_tokenizer_a_run_is_told_of_by_ids(training_run: Path, tmp_path: Path) -> None:
    plain = training_run / "episodes" / "000001" / "episodes.jsonl"
    write_report([plain], tmp_path / "ids.html")
    found = blocks(tmp_path / "ids.html")
    assert found["vocabularies"] == {}
    assert found["index"]["runs"][0]["about"] == {}
    write_report([plain], tmp_path / "texts.html", tokenizers=[LONG])
    assert blocks(tmp_path / "texts.html")["vocabularies"] != {}


def test_the_same_runs_give_the_same_page(training_run: Path, tmp_path: Path) -> None:
    pages = [tmp_path / "one.html", tmp_path / "two.html"]
    for page in pages:
        write_report([training_run], page)
    assert pages[0].read_bytes() == pages[1].read_bytes()


def test_conversations_are_in_blocks_that_the_index_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("turnwise.analysis.report.BLOCK", 2000)
    with EpisodeStore(tmp_path / "run", {"protocol": "by hand"}) as store:
        for sample in range(20):
            store.append(dialogue(("a", "s", "x" * 50 * sample, None), grade=Grade(Outcome.WRONG), sample=sample))
    write_report([tmp_path / "run"], tmp_path / "report.html")
    found = blocks(tmp_path / "report.html")
    firsts = found["index"]["blocks"]["said"]
    assert len(firsts) > 3
    assert firsts == sorted(set(firsts))
    for number, first in enumerate(firsts):
        assert found[f"said-{number}"][0]["id"] == f"p#{first}"


# What it reads


def test_runs_are_found_in_folders_and_told_apart(training_run: Path, tmp_path: Path) -> None:
    for folder in ("eval/before", "eval/after", "other/before"):
        with EpisodeStore(tmp_path / folder, {"protocol": "by hand"}) as store:
            store.append(dialogue(("a", "s", "2", None), grade=Grade(Outcome.RIGHT)))
    (tmp_path / "eval" / "notes").mkdir()
    found = find_runs([tmp_path / "eval", tmp_path / "other" / "before", training_run])
    before, other = str(tmp_path / "eval" / "before"), str(tmp_path / "other" / "before")
    assert [run.name for run in found] == ["after", before, other, "trained"]
    assert [run.count() for run in found] == [1, 1, 1, 5]
    assert [step for step, _ in found[3].stores] == [1, 2]
    (plain,) = find_runs([training_run / "episodes" / "000001" / "episodes.jsonl"])
    assert (plain.name, plain.about, plain.count()) == ("000001", {}, 3)


def test_of_an_episode_that_was_played_again_the_last_counts(tmp_path: Path) -> None:
    with EpisodeStore(tmp_path / "run", {"protocol": "by hand"}) as store:
        store.append(dialogue())
        store.append(dialogue(("a", "s", "2", None), grade=Grade(Outcome.RIGHT)))
    (run,) = find_runs([tmp_path / "run"])
    assert [stored.episode.right for stored in run.episodes()] == [True]


def test_what_is_no_unicode_is_replaced_and_a_torn_last_line_left_out(tmp_path: Path) -> None:
    said = (b"\xff\xfe!", rb"\ud800!", rb"\ud83d\ude00", b"ok")
    lines = [
        encode(dialogue(("a", "s", "BAD", None), grade=Grade(Outcome.WRONG), sample=sample)).replace(b"BAD", text)
        for sample, text in enumerate(said)
    ]
    path = tmp_path / "chat.jsonl"
    path.write_bytes(b"\n".join([*lines, b'{"id":"to']))
    (run,) = find_runs([path])
    assert [stored.episode.transcript.text for stored in run.episodes()] == ["\ufffd\ufffd!", "\ufffd!", "😀", "ok"]


@pytest.mark.parametrize("line", [b'{"id": "p#0"}', b"no JSON", b'["a list"]'])
def test_a_damaged_line_is_named_and_the_last_report_stays(tmp_path: Path, line: bytes) -> None:
    path, page = tmp_path / "chat.jsonl", tmp_path / "report.html"
    path.write_bytes(encode(dialogue(("a", "s", "2", None), grade=Grade(Outcome.RIGHT))) + b"\n")
    write_report([path], page)
    before = page.read_bytes()
    with path.open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(InputError, match=r"line 2 of .*chat\.jsonl is damaged"):
        write_report([path], page)
    assert page.read_bytes() == before
    assert sorted(found.name for found in tmp_path.iterdir()) == ["chat.jsonl", "report.html"]


def test_what_cannot_be_shown_is_told_in_one_line(training_run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"needs the folder of a training run.* is none$"):
        write_report([tmp_path / "nowhere"], tmp_path / "report.html")
    with pytest.raises(InputError, match=r"tokenizer\.json.*cannot be loaded"):
        write_report([training_run], tmp_path / "report.html", tokenizers=[tmp_path])
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        write_report([training_run], tmp_path / "file" / "report.html")
    with EpisodeStore(tmp_path / "run", {"protocol": "by hand"}) as store:
        store.append(dialogue(("a", "s", "2", None), grade=Grade(Outcome.RIGHT)))
    with pytest.raises(InputError, match="no token was sampled with the tokenizer"):
        write_report([tmp_path / "run"], tmp_path / "report.html", tokenizers=[LONG])
    assert not (tmp_path / "report.html").exists()
    assert not list(tmp_path.glob("*.draft"))


def test_what_was_not_graded_has_not_failed(tmp_path: Path) -> None:
    chat = Episode(dialogue(("a", "s", "I overthink", None)).transcript, 0, 0)
    failed = dialogue(("a", "s", "I overthink", None), sample=1)
    with EpisodeStore(tmp_path / "run", {"protocol": "chat log"}) as store:
        for episode in (chat, failed):
            store.append(episode)
    write_report([tmp_path / "run"], tmp_path / "report.html")
    index = blocks(tmp_path / "report.html")["index"]
    (run,) = index["runs"]
    whole = run["whole"]
    assert (whole["episodes"], whole["failed"], whole["tokens"], whole["turns"]) == (1, 1, 1.0, 1.0)
    assert whole["right"] is whole["interval"] is None
    assert (whole["outcomes"], whole["aha"], run["phrases"]) == ({"ungraded": 1}, 1, {"overthink": 1})
    assert [index["outcomes"][number] for number in index["episodes"]["outcome"]] == ["ungraded", "failed"]
    assert ["s", "end", "", 1] in run["edges"]
    assert ["s", FAILED, "", 1] in run["edges"]


# What it says of dialogues


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("I am Overthinking this, let me re-think.", ("overthink", "rethink")),
        ("an over-thought plan; think again, and reconsider it", ("overthink", "think again", "reconsider")),
        ("we should rethink", ("rethink",)),
        ("<answer> 3</rethink> <rethink>", ()),
        ("overthinker, unrethink, I think. Again", ()),
    ],
)
def test_phrases_that_say_of_an_answer_that_it_thinks_again(text: str, found: tuple[str, ...]) -> None:
    assert phrases_in(dialogue(("a", "s", "first", None), ("b", "t", text, None))) == found


def test_what_the_protocol_puts_in_a_mouth_is_no_second_thought() -> None:
    episode = dialogue()
    step = Step("a", "s", Reply("yes", 1), prefill="I should rethink:")
    assert phrases_in(Episode(episode.transcript.extended(step), 0, 0)) == ()


def test_edges_are_counted_from_successive_states() -> None:
    edges = Edges()
    right = Grade(Outcome.RIGHT)
    loop = dialogue(
        ("long", "think", "a", "</think>"), ("short", "answer", "b", "</rethink>"), ("long", "think", "c", "</think>"),
        ("short", "answer", "d", "</answer>"), grade=right,
    )  # fmt: skip
    edges.add(loop)
    edges.add(dialogue(("long", "think", "a", None)))
    assert edges.taken == {
        (START, "think", ""): 2,
        ("think", "answer", "</think>"): 2,
        ("answer", "think", "</rethink>"): 1,
        ("answer", "end", "</answer>"): 1,
        ("think", FAILED, ""): 1,
    }
    assert edges.visits == {"think": 3, "answer": 2}
    assert edges.tokens == {"think": 3, "answer": 2}


def test_simultaneous_turns_are_one_visit_and_a_seat_that_goes_on_several() -> None:
    edges = Edges()
    jurors = [(seat, "vote", "x", None) for seat in "abc"]
    edges.add(dialogue(*jurors, *jurors, ("d", "sum", "y", None), ("d", "sum", "z", None), grade=Grade(Outcome.WRONG)))
    assert edges.taken == {
        (START, "vote", ""): 1,
        ("vote", "vote", ""): 1,
        ("vote", "sum", ""): 1,
        ("sum", "sum", ""): 1,
        ("sum", "end", ""): 1,
    }
    assert list(edges.seats["vote"]) == ["a", "b", "c"]


# The page itself


def test_nothing_that_was_said_is_part_of_the_html(tmp_path: Path) -> None:
    with EpisodeStore(tmp_path / "run", {"protocol": HOSTILE}) as store:
        problem = Problem(HOSTILE, HOSTILE, HOSTILE, subject=HOSTILE)
        step = Step(HOSTILE, HOSTILE, Reply(HOSTILE, 1, stop=HOSTILE, model=HOSTILE), HOSTILE)
        store.append(Episode(Transcript(problem, (step,)), 0, 0, Grade(Outcome.WRONG, HOSTILE)))
    write_report([tmp_path / "run"], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "alert(" not in text
    assert "onerror" not in text
    assert blocks(tmp_path / "report.html")["said-0"][0]["turns"][0]["text"] == HOSTILE


def test_the_page_may_run_its_own_scripts_and_load_nothing(training_run: Path, tmp_path: Path) -> None:
    write_report([training_run], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert policy
    assert policy[1].startswith("default-src 'none'; script-src 'sha256-")
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(scripts) == len(SCRIPTS)
    for script in scripts:
        assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy[1]
    assert not re.search(r"""(?:src|href)=|url\(["']?http|@import|https?://(?!www\.w3\.org/2000/svg)""", text)


def test_the_scripts_insert_text_only_as_text() -> None:
    assert sorted(path.name for path in PAGE.iterdir()) == sorted(["report.css", "report.html", *SCRIPTS])
    for name in SCRIPTS:
        source = (PAGE / name).read_text()
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", source), (
            name
        )
        assert "</script" not in source


# The command


def test_the_command_tells_what_it_wrote(training_run: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    done = CliRunner().invoke(app, ["report", str(training_run), "-o", str(page), "--json"])
    assert done.exit_code == 0
    assert orjson.loads(done.stdout) == {"path": str(page), "runs": 1, "episodes": 5, "bytes": page.stat().st_size}
    done = CliRunner().invoke(app, ["report", str(training_run), "-o", str(page)])
    assert done.stdout.startswith(f"{page}: 5 episodes of 1 run, 0.")


def test_a_report_with_token_texts_loads_neither_torch_nor_transformers(training_run: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    code = f"""
import sys
from pathlib import Path
from turnwise.analysis.report import write_report
write_report([Path({str(training_run)!r})], Path({str(page)!r}), tokenizers=[Path({str(LONG)!r})])
print({{"torch", "transformers", "matplotlib"}} & sys.modules.keys())
"""
    environment = {**os.environ, "PYTHONPATH": str(PAGE.parents[1] / "src")}
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "set()"
