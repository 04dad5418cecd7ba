import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

import turnwise
from turnwise.environments.environment import Grade, Outcome
from turnwise.environments.episode import Episode
from turnwise.environments.errors import InputError
from turnwise.environments.problem import Problem
from turnwise.environments.transcript import Finish, Reply, Step, Transcript
from turnwise.rl.episode_store import EpisodeStore, decode, encode, read_episodes

RUN: dict[str, str | int | float] = {"protocol": "test", "seed": 0}

# Plays argv[2] episodes of two turns, 100 token ids each, into the store at argv[1]; at most argv[3] bytes a file,
# or any number for "0". For each of the seconds that follow, a fork does so first, and is killed when it has computed
# for so long after its first episodes; then comes its exit code.
PLAY = """
import itertools, os, random, resource, signal, sys
from turnwise.agents.scripted import ScriptedAgent
from turnwise.environments.environment import Environment, Grade, Grader, Outcome
from turnwise.environments.errors import InputError
from turnwise.environments.problem import Problem
from turnwise.environments.transcript import Reply
from turnwise.protocols.graph import GraphProtocol, State, TurnGraph
from turnwise.protocols.rewards import Correctness, RewardSum
from turnwise.rl.episode_store import EpisodeStore
from turnwise.rl.rollout import play

class AllRight(Grader):
    async def grade(self, problem, text):
        return Grade(Outcome.RIGHT, text)

doom, asked = 0.0, itertools.count()

def say(turn, seed):
    if next(asked) == 2 * 64 and doom:
        signal.setitimer(signal.ITIMER_PROF, doom)
    rng = random.Random(seed)
    ids = tuple(rng.randrange(100_000) for _ in range(100))
    return Reply(f"{seed}", 100, "end", None, ids, tuple(-rng.random() for _ in ids), ids[:50])

if sys.argv[3] != "0":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
states = {"ask": State(seat="first", then="reply"), "reply": State(seat="second")}
graph = TurnGraph(seats={"first": "", "second": ""}, start="ask", states=states)
protocol = GraphProtocol(graph, RewardSum((Correctness(),)))
problems = [Problem(f"p{n}", "question", "42") for n in range(int(sys.argv[2]))]
agent = ScriptedAgent(say)
for seconds in map(float, sys.argv[4:]):
    child = os.fork()
    if child == 0:
        doom = seconds
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
try:
    with EpisodeStore(sys.argv[1], {"protocol": "test", "seed": 0}) as store:
        print(len(store.ids), flush=True)
        play(protocol, {"first": agent, "second": agent}, Environment("test", problems, AllRight()), store=store)
except InputError as error:
    sys.exit(str(error))
"""


def run(folder: Path, count: int, limit: int = 0, *, kills: Sequence[float] = ()) -> "subprocess.CompletedProcess[str]":
    """A process that plays `count` episodes into a store; it says how many it found there, and then begins."""
    return subprocess.run(
        [sys.executable, "-c", PLAY, str(folder), str(count), str(limit), *map(str, kills)],
        env={**os.environ, "PYTHONPATH": str(Path(turnwise.__file__).parents[1])},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


def episode(
    number: int = 0, *, sample: int = 0, error: str | None = None, text: str = "42", ids: tuple[int, ...] = (1, 2)
) -> Episode:
    reply = Reply(text, len(ids), "end", None, ids, tuple(-0.5 for _ in ids), (7, 8, 9) if ids else ())
    transcript = Transcript(Problem(f"p{number}", "question", "42"), (Step("solver", "solve", reply),))
    return Episode(transcript, sample, 0, None if error else Grade(Outcome.RIGHT, "42"), error)


def filled(folder: Path, count: int) -> Path:
    """The file of a store that holds `count` episodes."""
    with EpisodeStore(folder, RUN) as store:
        for number in range(count):
            store.append(episode(number))
    return folder / "episodes.jsonl"


# What is written is what is read

texts = st.text(max_size=12)
finishes: st.SearchStrategy[Finish] = st.sampled_from(["stop", "end", "length"])
token_ids = st.lists(st.integers(0, 200_000), max_size=6).map(tuple)
log_probabilities = st.floats(max_value=0, allow_nan=False, allow_infinity=False)


@st.composite
def episodes(draw: st.DrawFn) -> Episode:
    """Any episode; a prompt goes on from what its seat read and said before, or from some of it, or from nothing."""
    heard: dict[str, tuple[int, ...]] = {}
    steps = []
    for _ in range(draw(st.integers(0, 6))):
        seat, ids, fresh = draw(st.sampled_from(["long", "short"])), draw(token_ids), draw(token_ids)
        before = heard.get(seat, ())
        prompt = before[: draw(st.sampled_from([0, len(before), len(before) // 2, len(before) - 1]))] + fresh
        heard[seat] = prompt + ids
        reply = Reply(
            text=draw(texts), token_count=draw(st.integers(0, 2**31)), finish=draw(finishes),
            stop=draw(st.none() | texts), token_ids=ids, log_probabilities=tuple(draw(log_probabilities) for _ in ids),
            prompt_token_ids=prompt, tokenizer=draw(texts), model=draw(texts), version=draw(st.integers(0, 2**31)),
            versions=draw(st.sampled_from([(), tuple(range(len(ids)))])),
        )  # fmt: skip
        steps.append(Step(seat, draw(texts), reply, draw(texts)))
    problem = Problem(
        draw(texts), draw(texts), draw(texts), draw(st.integers(0, 9)), draw(texts), draw(texts),
        tuple(draw(st.lists(texts, max_size=3))),
    )  # fmt: skip
    grade = draw(st.none() | st.builds(Grade, st.sampled_from(Outcome), st.none() | texts))
    seed, sample = draw(st.integers(0, 2**63 - 1)), draw(st.integers(0, 1000))
    return Episode(Transcript(problem, tuple(steps)), sample, seed, grade, draw(st.none() | texts))


@given(episodes())
def test_decode_undoes_encode(episode: Episode) -> None:
    line = encode(episode)
    assert b"\n" not in line
    assert decode(line) == episode


def test_a_prompt_is_written_once() -> None:
    def step(seat: str, prompt: tuple[int, ...], ids: tuple[int, ...]) -> Step:
        return Step(seat, "state", Reply("", len(ids), token_ids=ids, prompt_token_ids=prompt))

    steps = (
        step("long", (1, 2), (3, 4)),
        step("short", (1, 2, 3, 4), (5,)),
        step("long", (1, 2, 3, 4, 5), (6,)),
        step("long", (1, 2, 3, 4, 5, 6), (7,)),
        step("short", (1, 2, 3, 4, 5), (8,)),  # nothing new
        step("short", (1, 2, 3, 4, 5, 9), (8,)),  # not what the seat said before
    )
    line = encode(Episode(Transcript(Problem("p", "q", "a"), steps), 0, 0))
    written = [(step["prompt_shared"], step["prompt_token_ids"]) for step in orjson.loads(line)["steps"]]
    assert written == [(0, [1, 2]), (0, [1, 2, 3, 4]), (4, [5]), (6, []), (5, []), (0, [1, 2, 3, 4, 5, 9])]


def test_log_probabilities_are_exact() -> None:
    rng = random.Random(0)
    values = (*(-rng.expovariate(1) for _ in range(1000)), -0.0, -5e-324, -1.7976931348623157e308)
    reply = Reply("", len(values), token_ids=tuple(range(len(values))), log_probabilities=values)
    read = decode(encode(Episode(Transcript(Problem("p", "q", "a"), (Step("s", "t", reply),)), 0, 0)))
    assert [value.hex() for value in read.transcript.steps[0].reply.log_probabilities] == [
        value.hex() for value in values
    ]


def test_an_episode_that_failed_may_come_again_and_the_last_counts(tmp_path: Path) -> None:
    with EpisodeStore(tmp_path / "run", RUN) as store:
        for each in (episode(0), episode(1, error="boom"), episode(2), episode(1, text="better")):
            store.append(each)
        assert list(store) == [episode(0), episode(2), episode(1, text="better")]
    with EpisodeStore(tmp_path / "run", RUN) as store:
        assert store.ids == {"p0#0", "p1#0", "p2#0"}


def test_an_episode_that_failed_is_not_among_the_ids(tmp_path: Path) -> None:
    with EpisodeStore(tmp_path / "run", RUN) as store:
        store.append(episode(0, error="boom"))
        assert store.ids == set()
    with EpisodeStore(tmp_path / "run", RUN) as store:
        assert store.ids == set()
        assert list(store) == [episode(0, error="boom")]


# Kills, torn lines and full disks


def test_ten_kills_lose_nothing(tmp_path: Path) -> None:
    rng = random.Random()
    done = run(tmp_path / "run", 2000, kills=[rng.uniform(0.001, 0.01) for _ in range(10)])
    assert (done.returncode, done.stderr) == (0, "")
    told = list(map(int, done.stdout.split()))
    found, codes = told[::2], told[1::2]
    assert codes == [-signal.SIGPROF] * 10
    assert found == sorted(found)
    assert len(set(found)) > 2, f"runs went on from {found} episodes"
    lines = (tmp_path / "run" / "episodes.jsonl").read_bytes().splitlines(keepends=True)
    assert all(line.endswith(b"\n") for line in lines)
    assert Counter(decode(line).id for line in lines) == {f"p{n}#0": 1 for n in range(2000)}


@pytest.mark.parametrize("size", [1, 300, 70_000, 200_000])
def test_a_torn_last_line_is_cut(tmp_path: Path, size: int) -> None:
    path = filled(tmp_path / "run", 3)
    whole = path.read_bytes()
    long = encode(episode(3, text="x" * 300_000))
    path.write_bytes(whole + long[:size])
    with EpisodeStore(tmp_path / "run", RUN) as store:
        assert store.ids == {"p0#0", "p1#0", "p2#0"}
        assert path.read_bytes() == whole
        store.append(episode(3))
    assert list(read_episodes(path)) == [episode(n) for n in range(4)]


@pytest.mark.parametrize("size", [100, 65_536, 65_537, 140_000])
def test_a_torn_first_line_is_cut(tmp_path: Path, size: int) -> None:
    path = filled(tmp_path / "run", 0)
    path.write_bytes(encode(episode(0, text="x" * 300_000))[:size])
    with EpisodeStore(tmp_path / "run", RUN) as store:
        assert store.ids == set()
    assert path.read_bytes() == b""


def test_a_torn_last_line_of_a_run_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    path = filled(tmp_path / "run", 2)
    path.write_bytes(path.read_bytes()[:-20])
    assert list(read_episodes(path)) == [episode(0)]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = filled(tmp_path / "run", 3)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:50] + b"\n" + lines[2])
    with pytest.raises(InputError, match=r"^line 2 of .*episodes\.jsonl is damaged: .*; remove that line$"):
        EpisodeStore(tmp_path / "run", RUN)
    path.write_bytes(lines[0] + lines[2])
    with EpisodeStore(tmp_path / "run", RUN) as store:  # the failed opening has given the folder back
        assert store.ids == {"p0#0", "p2#0"}


def test_a_line_of_something_else_is_named(tmp_path: Path) -> None:
    path = filled(tmp_path / "run", 1)
    path.write_bytes(path.read_bytes() + b'{"id": "p1#0", "error": null}\n')
    with pytest.raises(InputError, match=r"^line 2 of .* is damaged: 'steps'; remove that line$"):
        list(read_episodes(path))


def test_a_full_disk_keeps_whole_lines_and_the_run_resumes(tmp_path: Path) -> None:
    path = tmp_path / "run" / "episodes.jsonl"
    full = run(tmp_path / "run", 200, 100_000)
    lines = path.read_bytes().splitlines(keepends=True)
    assert 1 < len(lines) < 200
    assert lines[-1].endswith(b"\n")
    assert path.stat().st_size <= 100_000
    expected = f"cannot write to {path}: File too large; what it holds is safe: make room and run the same command"
    assert full.returncode == 1
    assert full.stderr.startswith(expected)

    done = run(tmp_path / "run", 200)
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) == len(lines)
    assert Counter(each.id for each in read_episodes(path)) == {f"p{n}#0": 1 for n in range(200)}


# Whose folder it is


def test_run_json_says_what_run_it_is(tmp_path: Path) -> None:
    filled(tmp_path / "deep" / "run", 0)
    assert json.loads((tmp_path / "deep" / "run" / "run.json").read_text()) == {"format": 1, **RUN}


def test_another_run(tmp_path: Path) -> None:
    path = filled(tmp_path / "run", 2)
    before = path.read_bytes()
    expected = r"holds another run \(seed: 0 there, 1 here\); choose another folder or remove it"
    with pytest.raises(InputError, match=expected):
        EpisodeStore(tmp_path / "run", {**RUN, "seed": 1})
    with pytest.raises(InputError, match=r"\(model: None there, 'm' here\)"):
        EpisodeStore(tmp_path / "run", {**RUN, "model": "m"})
    assert path.read_bytes() == before


def test_a_folder_that_holds_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="exists and holds no run; choose a new or an empty folder"):
        EpisodeStore(tmp_path, RUN)
    with pytest.raises(InputError, match="exists and holds no run; choose a new or an empty folder"):
        EpisodeStore(tmp_path / "thesis.tex", RUN)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_empty_folder_will_do(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert filled(tmp_path / "run", 1).exists()


def test_a_run_that_was_killed_before_it_had_begun(tmp_path: Path) -> None:
    (tmp_path / "run.json.draft").write_text("{")
    assert filled(tmp_path, 1).exists()


def test_an_unreadable_run_json(tmp_path: Path) -> None:
    filled(tmp_path / "run", 0)
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(InputError, match=r"holds no readable run\.json"):
        EpisodeStore(tmp_path / "run", RUN)


def test_a_second_writer(tmp_path: Path) -> None:
    with EpisodeStore(tmp_path / "run", RUN) as store:
        store.append(episode(0))
        with pytest.raises(InputError, match=r"another process is writing to .*; wait for it or choose another folder"):
            EpisodeStore(tmp_path / "run", RUN)
    with EpisodeStore(tmp_path / "run", RUN) as store:
        assert store.ids == {"p0#0"}
