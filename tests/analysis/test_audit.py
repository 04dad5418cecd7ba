import gc
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import orjson
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from turnwise.agents.chat import fingerprint
from turnwise.agents.scripted import ScriptedAgent
from turnwise.agents.tiny import LONG, ROUTER, SHORT
from turnwise.agents.transformers_agent import TransformersAgent, TransformersEngine
from turnwise.agents.transformers_engine import load_tokenizer
from turnwise.analysis import audit as module
from turnwise.analysis.audit import Audit, audit, main
from turnwise.command import run
from turnwise.environments.arithmetic import arithmetic
from turnwise.environments.environment import Grade, Grader, Outcome
from turnwise.environments.episode import Episode
from turnwise.environments.problem import Problem
from turnwise.environments.transcript import Reply, Step, Transcript
from turnwise.protocols.debate import Debate, Panel
from turnwise.protocols.graph import GraphProtocol, State, TurnGraph
from turnwise.protocols.long_short import LongShort
from turnwise.protocols.rewards import Correctness, RewardSum
from turnwise.protocols.thinkless import Thinkless
from turnwise.rl.advantage import Sample
from turnwise.rl.batch import Batch
from turnwise.rl.episode_store import EpisodeStore, decode, read_episodes
from turnwise.rl.loss import LossSettings, policy_loss, token_weights
from turnwise.rl.rollout import Team, play
from turnwise.rl.trajectory import TokenSequence, Trajectory, trajectories


class AllRight(Grader):
    async def grade(self, problem: Problem, text: str) -> Grade:
        return Grade(Outcome.RIGHT, text)


def doubting() -> GraphProtocol:
    """The long model thinks, and then once more without having read what it thought."""
    states = {
        "think": State(seat="long", closes={"</think>": "again"}, then="again", max_tokens=64),
        "again": State(seat="long", reads=(), max_tokens=64),
    }
    return GraphProtocol(TurnGraph(seats={"long": ""}, start="think", states=states), RewardSum((Correctness(),)))


PROTOCOLS = {
    "thinkless": Thinkless(short_tokens=32, think_tokens=96),
    "long-short": LongShort(long_tokens=64, short_tokens=32),
    "debate": Debate(rounds=3, max_tokens=24),
    "panel": Panel(max_tokens=24),
    "doubting": doubting(),
}


@pytest.fixture(scope="module")
def team() -> Team:
    long, short, router = (TransformersAgent(TransformersEngine.load(path)) for path in (LONG, SHORT, ROUTER))
    clerk = ScriptedAgent(lambda turn, seed: "I have read you all. \\boxed{4}")
    seats = {"long": long, "short": short, "solver": router, "judge": short}
    return seats | {"first": short, "second": long, "third": long, "chair": clerk}


@pytest.fixture(scope="module")
def stores(team: Team, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store for each protocol."""
    folder = tmp_path_factory.mktemp("runs")
    for name, protocol in PROTOCOLS.items():
        with EpisodeStore(folder / name, {"protocol": name}) as store:
            play(protocol, team, arithmetic(AllRight(), problem_set="mixed", count=6), samples=2, store=store)
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(LONG)


# What was played as it should be


@pytest.mark.parametrize(
    ("name", "views"),
    [
        ("thinkless", 0),
        ("long-short", 0),
        ("panel", 0),
        ("doubting", 1),
        # What a debater is asked is not shown again a round later; and the second one hears of the first round's first
        # speaker before it reads itself again.
        ("debate", 3),
    ],
)
def test_a_run_has_no_faults(stores: Path, tokenizer: PreTrainedTokenizerBase, name: str, views: int) -> None:
    episodes = list(read_episodes(stores / name / "episodes.jsonl"))
    steps = [step for episode in episodes for step in episode.transcript.steps]
    scripted = 12 if name == "panel" else 0
    seats = len({(episode.id, step.seat) for episode in episodes for step in episode.transcript.steps}) - scripted
    expected = Audit(
        episodes=12,
        turns=len(steps),
        turns_without_ids=scripted,
        sampled_tokens=sum(step.reply.token_count for step in steps if step.seat != "chair"),
        sequences=seats + 12 * views,
        other_views=12 * views,
    )
    assert audit(episodes) == expected
    assert audit(episodes, tokenizer) == replace(expected, decoded_turns=len(steps) - scripted)


ids = st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.booleans(), ids, ids), max_size=8))
def test_any_views_of_what_was_said_are_sound(parts: list[tuple[str, bool, tuple[int, ...], tuple[int, ...]]]) -> None:
    steps, heard, views = list[Step](), dict[str, tuple[int, ...]](), 0
    for seat, continues, read, said in parts:
        prompt = heard.get(seat, ()) + read if continues else read
        views += seat in heard and prompt[: len(heard[seat])] != heard[seat]
        heard[seat] = prompt + said
        steps.append(step(seat, prompt, said))
    found = audit([episode(*steps)])
    assert found.faults == ()
    assert (found.sampled_tokens, found.other_views) == (sum(len(said) for *_, said in parts), views)
    assert found.sequences == len(heard) + views


# By hand


def step(seat: str, prompt: Sequence[int], said: Sequence[int], text: str = "") -> Step:
    reply = Reply(text, len(said), "length", None, tuple(said), (-0.5,) * len(said), tuple(prompt))
    return Step(seat, "state", reply)


def episode(*steps: Step, number: int = 0, error: str | None = None) -> Episode:
    grade = None if error else Grade(Outcome.RIGHT, "4")
    return Episode(Transcript(Problem(f"p{number}", "2 + 2?", "4"), steps), 0, 0, grade, error)


SOUND = episode(step("long", (1, 2), (3, 4)), step("short", (1, 2, 3, 4), (5,)), step("long", (1, 2, 3, 4, 5), (6,)))
OTHER = episode(step("long", (1, 2, 9), (7, 7, 7, 7)), step("short", (8,), (5, 6)), number=1)


def changed(place: int, fields: Mapping[str, object], episode: Episode = SOUND) -> Episode:
    """The episode with another reply in one turn."""
    steps = list(episode.transcript.steps)
    steps[place] = steps[place]._replace(reply=replace(steps[place].reply, **fields))  # type: ignore[arg-type]
    return replace(episode, transcript=replace(episode.transcript, steps=tuple(steps)))


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"token_count": 3}, "lengths: token_count 3, 2 token ids, 2 log-probabilities"),
        ({"log_probabilities": (-0.5,)}, "lengths: token_count 2, 2 token ids, 1 log-probabilities"),
        ({"token_ids": (3, 4, 4)}, "lengths: token_count 2, 3 token ids, 2 log-probabilities"),
        ({"token_ids": ()}, "lengths: token_count 2, 0 token ids, 2 log-probabilities"),
        (
            {"token_ids": (), "log_probabilities": (), "token_count": 0},
            "lengths: token_count 0, 0 token ids, 0 log-probabilities",
        ),
        ({"prompt_token_ids": ()}, "lengths: the token ids of the prompt are missing"),
        ({"log_probabilities": (-0.5, float("nan"))}, "lengths: a log-probability is nan"),
        ({"log_probabilities": (float("-inf"), -0.5)}, "lengths: a log-probability is -inf"),
        ({"log_probabilities": (-0.5, 2e-5)}, "lengths: a log-probability is 2e-05"),
        ({"versions": (1,)}, "lengths: 2 token ids of version 0 or later, in order, are of [1]"),
        ({"versions": (2, 1)}, "lengths: 2 token ids of version 0 or later, in order, are of [2, 1]"),
        ({"version": 3, "versions": (2, 3)}, "lengths: 2 token ids of version 3 or later, in order, are of [2, 3]"),
    ],
)
def test_lengths_that_differ_and_what_is_no_log_probability(fields: dict[str, object], fault: str) -> None:
    assert audit([changed(0, fields)]).faults == (f"p0#0, turn 0 (long): {fault}",)


def test_a_log_probability_may_be_rounded_to_just_above_0() -> None:
    assert audit([changed(0, {"log_probabilities": (9e-6, -1e30)})]).faults == ()


def test_an_episode_that_comes_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 2)
    found = audit([SOUND, OTHER, SOUND, OTHER])
    assert found.faults == tuple(f"{id}: weight: this episode is in the store a second time" for id in ("p0#0", "p1#0"))
    assert found.episodes == 4


def test_an_episode_that_failed_is_counted_alone_and_may_come_again() -> None:
    failed = replace(changed(0, {"token_count": 9}), grade=None, error="RuntimeError: x")
    again, alone = audit([failed, failed, SOUND]), audit([SOUND])
    assert again == replace(alone, episodes=3, failed_episodes=2)
    assert audit([SOUND, failed]).faults == ("p0#0: weight: this episode is in the store a second time",)


def test_a_seat_without_token_ids_is_not_trained_and_the_others_are() -> None:
    found = audit([changed(1, {"token_ids": (), "log_probabilities": (), "prompt_token_ids": ()})])
    assert found == Audit(1, 0, turns=3, turns_without_ids=1, sampled_tokens=3, sequences=1)


def test_a_store_is_never_held_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 2)
    alive = list[int]()

    def endless() -> Iterator[Episode]:
        for number in range(20):
            yield replace(SOUND, transcript=replace(SOUND.transcript, problem=Problem(f"p{number}", "q", "a")))
            alive.append(sum(type(thing) is Episode for thing in gc.get_objects()))

    gc.freeze()  # what there is already need not be looked through each time
    try:
        assert audit(endless()).episodes == 20
    finally:
        gc.unfreeze()
    assert alive[-1] <= alive[3]


# In the file of a store


Plant = Callable[[dict[str, list[int | float | None]]], object]


@pytest.mark.parametrize(
    ("plant", "fault"),
    [
        (lambda step: step.update(token_count=1), r"lengths: token_count 1, (\d+) token ids, \1 log-probabilities"),
        (lambda step: step["log_probabilities"].pop(), r"lengths: token_count (\d+), \1 token ids, \d+ log-pr.*"),
        (lambda step: step["log_probabilities"].insert(0, None), r"lengths: token_count (\d+), \1 token ids, .*"),
        (lambda step: step["log_probabilities"].__setitem__(0, None), "lengths: a log-probability is None"),
        (lambda step: step["log_probabilities"].__setitem__(0, 0.25), r"lengths: a log-probability is 0\.25"),
        (lambda step: step.update(prompt_token_ids=[]), "lengths: the token ids of the prompt are missing"),
        (lambda step: step.update(text="<think>"), "drift: the text is not what the token ids read"),
        (lambda step: step["token_ids"].__setitem__(2, 9), "drift: the text is not what the token ids read"),
    ],
)
def test_a_fault_planted_in_a_store_is_found(
    stores: Path, tokenizer: PreTrainedTokenizerBase, plant: Plant, fault: str
) -> None:
    lines = (stores / "long-short" / "episodes.jsonl").read_bytes().splitlines()
    record = orjson.loads(lines[3])
    plant(record["steps"][0])
    lines[3] = orjson.dumps(record)
    found = audit(map(decode, lines), tokenizer)
    assert found.episodes == 12
    assert re.fullmatch(rf"{record['id']}, turn 0 \(long\): {fault}", found.faults[0])


# Drift


Ids = tuple[int, ...]
Written = Callable[[str], Ids]


@pytest.fixture(scope="module")
def written(tokenizer: PreTrainedTokenizerBase) -> Written:
    """The token ids that a text is given."""
    return lambda text: tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.fixture(scope="module")
def spelt(written: Written) -> Written:
    """The token ids of a text letter by letter, as a model may well sample it."""
    return lambda text: tuple(id for letter in text for id in written(letter))


QUESTION, THOUGHT = "What is 7 plus 8?", "so the digit is 5."


def drifting(written: Written, *steps: tuple[str, Ids, Ids, str], question: str = QUESTION) -> Audit:
    """The audit of turns by seat, what was read after the question, what was said, and its text.

    The seat "foreign" has another tokenizer; what is said without token ids is a script's.
    """
    vocabulary = fingerprint(load_tokenizer(LONG))
    played = []
    for seat, read, said, text in steps:
        one = step(seat, written(question) + read if said else (), said, text)
        played.append(one._replace(reply=replace(one.reply, tokenizer="another" if seat == "foreign" else vocabulary)))
    asked = Transcript(Problem("p0", question, "4"), tuple(played))
    return audit([replace(SOUND, transcript=asked)], load_tokenizer(LONG))


def test_what_is_shown_as_it_was_sampled_has_not_drifted(written: Written, spelt: Written) -> None:
    assert spelt(THOUGHT) != written(THOUGHT)
    said = ("long", (), spelt(THOUGHT), THOUGHT)
    for seat in ("long", "short"):
        found = drifting(written, said, (seat, spelt(THOUGHT) + written("\n"), written("5"), "5"))
        assert (found.faults, found.decoded_turns) == ((), 2)


@pytest.mark.parametrize(("seat", "views"), [("long", 1), ("short", 0)])
def test_history_that_was_tokenised_again(written: Written, spelt: Written, seat: str, views: int) -> None:
    steps = ("long", (), spelt(THOUGHT), THOUGHT), (seat, written(THOUGHT), written("5"), "5")
    fault = f"p0#0, turn 1 ({seat}): drift: the prompt shows turn 0 in other token ids than those sampled"
    assert drifting(written, *steps).faults == (fault,)
    # Without a tokenizer it may as well be another view.
    found = audit([episode(*(step(who, (1, *read), said) for who, read, said, _ in steps))])
    assert (found.faults, found.other_views) == ((), views)


def test_a_short_reply_does_not_hide_that_a_longer_one_has_drifted(written: Written, spelt: Written) -> None:
    again = written(" digit") + written(THOUGHT)
    assert again.count(written(" digit")[0]) == 2
    steps = ("a", (), written(" digit"), " digit"), ("b", (), spelt(THOUGHT), THOUGHT), ("a", again, written("5"), "5")
    fault = "p0#0, turn 2 (a): drift: the prompt shows turn 1 in other token ids than those sampled"
    assert drifting(written, *steps).faults == (fault,)


def test_words_that_stand_elsewhere_have_not_drifted(written: Written, spelt: Written) -> None:
    hidden, answer = ("long", (), spelt("digit"), "digit"), (written("5"), "5")
    longer, read = ("long", (), spelt("digits"), "digits"), ("b", written(THOUGHT), *answer)
    quoted = written("long: digit") + written("long: digits")
    assert not drifting(written, hidden, longer, ("b", quoted, *answer)).faults
    assert not drifting(written, hidden, ("b", (), *answer), question="Which digit is 7 plus 8?").faults
    for seat, said in (("a", written(THOUGHT)), ("foreign", (1, 2)), ("script", ())):
        assert not drifting(written, hidden, (seat, (), said, THOUGHT), read).faults
    assert not drifting(written, ("long", (), spelt("\n"), "\n"), ("b", written("\n\n"), *answer)).faults
    # But not where nobody else says them.
    assert drifting(written, hidden, read).faults


def test_the_end_of_sequence_has_no_text(tokenizer: PreTrainedTokenizerBase, written: Written) -> None:
    said = {"tokenizer": fingerprint(tokenizer), "text": "5", "token_ids": (*written("5"), tokenizer.eos_token_id)}
    ended = changed(0, said)
    for finish, faults in (("end", 0), ("length", 1)):
        assert len(audit([changed(0, {"finish": finish}, ended)], tokenizer).faults) == faults


# In the code that trains


Spans = tuple[tuple[int, int], ...]


def altered(alter: Callable[[Trajectory], Trajectory]) -> Callable[[Episode, str], list[Trajectory]]:
    return lambda episode, seat: [alter(one) for one in trajectories(episode, seat)]


def masked(said: Callable[[Spans], Spans]) -> Callable[[Episode, str], list[Trajectory]]:
    def alter(one: Trajectory) -> Trajectory:
        return replace(one, sequence=replace(one.sequence, said=said(one.sequence.said)))

    return altered(alter)


def said_at(one: Trajectory, start: int, end: int) -> Trajectory:
    """The trajectory with other ends of its turns, in the mask as well."""
    turns = tuple(turn._replace(start=turn.start + start, end=turn.end + end) for turn in one.turns)
    said = tuple((turn.start, turn.end) for turn in turns)
    return replace(one, sequence=replace(one.sequence, said=said), turns=turns)


def without_prompt(one: Trajectory) -> Trajectory:
    moved = said_at(one, -1, -1)
    return replace(moved, sequence=TokenSequence(one.sequence.token_ids[1:], moved.sequence.said))


@pytest.mark.parametrize(
    "broken",
    [
        masked(lambda said: ((0, said[0][1]), *said[1:])),  # the prompt is trained
        masked(lambda said: ((said[0][0], said[-1][1]),)),  # what was read in between is trained
        masked(lambda said: said[1:]),  # a turn is not trained
        altered(lambda one: said_at(one, -1, 0)),
        altered(lambda one: said_at(one, 1, 1)),
        altered(without_prompt),
        altered(lambda one: replace(one, sequence=replace(one.sequence, token_ids=(*one.sequence.token_ids[:-1], 99)))),
        altered(lambda one: replace(one, turns=one.turns[:-1])),
        lambda episode, seat: trajectories(episode, "long" if seat == "short" else "short"),
        lambda episode, seat: trajectories(episode, seat) * 2,  # twice
        lambda episode, seat: [],
    ],
)
def test_a_mask_other_than_the_sampled_tokens(broken: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "trajectories", broken)
    faults = audit([SOUND]).faults
    assert {fault.split(": ")[1] for fault in faults} == {"mask"}
    assert any("(long)" in fault for fault in faults)


def batched(change: Callable[[Batch], Mapping[str, object]]) -> Callable[..., Batch]:
    """`Batch.of` with other fields."""
    original = Batch.of

    def of(samples: Sequence[Sample], *, dtype: torch.dtype) -> Batch:
        batch = original(samples, dtype=dtype)
        return replace(batch, **change(batch))  # type: ignore[arg-type]

    return of


def training_a_prompt(batch: Batch) -> dict[str, torch.Tensor]:
    """The fields of the batch with one trained token more: the first one that was read."""
    flat = ("sequences", "episodes", "columns", "advantages", "engine_log_probs", "control")
    extended = {name: torch.cat([getattr(batch, name)[:1], getattr(batch, name)]) for name in flat}
    return {**extended, "columns": torch.cat([torch.tensor([0]), batch.columns])}


def without_first(settings: LossSettings, *tensors: torch.Tensor) -> torch.Tensor:
    """The loss of all tokens but the first."""
    return policy_loss(settings, *(tensor[1:] for tensor in tensors))


def token_mean(settings: LossSettings, *tensors: torch.Tensor) -> object:
    return token_weights(settings.model_copy(update={"aggregation": "token-mean"}), *tensors)


@pytest.mark.parametrize(
    ("name", "broken", "rules"),
    [
        ("Batch.of", batched(lambda batch: {"columns": batch.columns - 1}), {"loss", "weight"}),
        ("Batch.of", batched(lambda batch: {"sequences": batch.sequences.max() - batch.sequences}), {"loss", "weight"}),
        ("Batch.of", batched(lambda batch: {"token_ids": batch.token_ids[::-1]}), {"loss", "weight"}),
        ("Batch.of", batched(lambda batch: {"advantages": batch.advantages.flip(0)}), {"weight"}),
        ("Batch.of", batched(lambda batch: {"advantages": batch.advantages * 0}), {"loss", "weight"}),
        ("Batch.of", batched(lambda batch: {"episodes": batch.episodes * 0}), {"weight"}),
        ("Batch.of", batched(training_a_prompt), {"loss", "weight"}),
        ("policy_loss", without_first, {"loss", "weight"}),
        ("token_weights", token_mean, {"weight"}),
    ],
)
def test_a_loss_that_pulls_elsewhere_or_weighs_otherwise(
    name: str, broken: object, rules: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shorter = replace(OTHER, transcript=OTHER.transcript.prefix(1))
    assert audit([SOUND, shorter]).faults == ()
    monkeypatch.setattr(f"turnwise.analysis.audit.{name}", broken)
    assert {fault.split(": ")[1] for fault in audit([SOUND, shorter]).faults if "(long)" in fault} == rules


# The command


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Exit code, output and error output of the command with some arguments."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["audit", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            run(main)
        return int(ended.value.code or 0), *capsys.readouterr()

    return call


def test_all_stores_below_a_folder(stores: Path, command: Command) -> None:
    code, told, _ = command(stores, "--tokenizer", LONG)
    assert code == 0
    assert re.search(r"stores: 5\s.*episodes +│ +60 │.*decoded turns +│ +[1-9].*faults: 0$", told.strip(), re.DOTALL)
    code, told, _ = command(stores / "debate")
    assert code == 0
    assert re.search(r"stores: 1\s.*episodes +│ +12 │.*other views +│ +36 │.*faults: 0$", told.strip(), re.DOTALL)


def test_faults_are_told_line_by_line_up_to_20(stores: Path, tmp_path: Path, command: Command) -> None:
    line = (stores / "long-short" / "episodes.jsonl").read_bytes()
    for name in ("000010", "000020"):
        (tmp_path / "episodes" / name).mkdir(parents=True)
        (tmp_path / "episodes" / name / "episodes.jsonl").write_bytes(line * 2)
    code, told, _ = command(tmp_path)
    assert code == 1
    faults = [line for line in told.splitlines() if "weight: this episode is in the store a second time" in line]
    assert len(faults) == 20
    assert [fault.split(": ")[0] for fault in faults] == ["episodes/000010"] * 12 + ["episodes/000020"] * 8
    assert told.strip().endswith("faults: 24")
    _, told, _ = command(tmp_path / "episodes" / "000010")
    assert faults[0].removeprefix("episodes/000010: ") in told.splitlines()


def test_input_that_cannot_be_used(stores: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "episodes.jsonl").write_text("{}\n")
    other = tmp_path / "other"
    tokenizer = load_tokenizer(LONG)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(other)
    refused: dict[tuple[str | Path, ...], str] = {
        (tmp_path / "none",): "holds no episodes; name the folder of an episode store or of a training run",
        (other,): "holds no episodes",
        (tmp_path / "run",): "line 1 of .* is damaged: 'id'|line 1 of .* is damaged: 'steps'",
        (stores, "--tokenizer", tmp_path): "cannot load a tokenizer from .*: it holds no tokenizer.json",
        (stores, "--tokenizer", other): "no turn in .* was sampled with the tokenizer in .*; name the run's own",
    }
    for arguments, expected in refused.items():
        code, _, complaint = command(*arguments)
        assert (code, complaint.count("\n")) == (2, 1)
        assert re.match(f"error: .*({expected})", complaint)


def test_it_is_a_module_to_be_run(
    tmp_path: Path, run_script: Callable[..., "subprocess.CompletedProcess[str]"]
) -> None:
    done = run_script(Path(module.__file__), tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
