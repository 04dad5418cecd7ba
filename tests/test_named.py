import asyncio
from pathlib import Path

import pytest

from turnwise.agents.scripted import ScriptedAgent
from turnwise.environments.environment import Grade, Outcome
from turnwise.environments.episode import Episode
from turnwise.environments.errors import InputError
from turnwise.environments.problem import Problem
from turnwise.environments.transcript import Transcript, Turn
from turnwise.named import (
    PROTOCOLS,
    FaultyProtocolError,
    Sampling,
    graph_of,
    open_protocol,
    seated,
    seats_named,
    stored_episodes,
)
from turnwise.protocols.graph import GraphProtocol
from turnwise.protocols.long_short import LongShort
from turnwise.rl.episode_store import EpisodeStore

PAIR = """
from turnwise.protocols.graph import END, GraphProtocol, State, TurnGraph
from turnwise.protocols.rewards import Correctness, RewardSum

pair = GraphProtocol(
    TurnGraph(
        seats={"ann": "", "bob": ""},
        start="guess",
        states={
            "guess": State(seat="ann", then="judge", max_tokens=64),
            "judge": State(seat="bob", closes={"<agreed>": END}, then=END, max_tokens=32),
        },
    ),
    RewardSum((Correctness(),)),
)
lines = ["2"]
number = 3


def guess(turn, seed):
    return "2"
"""


def written(folder: Path, text: str = PAIR, name: str = "pair.py") -> Path:
    path = folder / name
    path.write_text(text)
    return path


class TestOpenProtocol:
    @pytest.mark.parametrize("name", PROTOCOLS)
    def test_by_name(self, name: str) -> None:
        protocol = open_protocol(name)
        assert isinstance(protocol, GraphProtocol)
        assert protocol.fingerprint == PROTOCOLS[name]().fingerprint

    def test_in_a_file_whose_only_protocol_needs_no_name(self, tmp_path: Path) -> None:
        path = written(tmp_path)
        named, found = open_protocol(f"{path}:pair"), open_protocol(str(path))
        assert named is found
        assert named.seats == ("ann", "bob")

    def test_a_file_may_import_its_neighbour_and_have_the_name_of_a_module(self, tmp_path: Path) -> None:
        written(tmp_path)
        path = written(tmp_path, "from pair import pair as mine\n", "random.py")
        assert open_protocol(f"{path}:mine").seats == ("ann", "bob")
        import random

        assert random.random() < 1

    def test_a_budget_for_every_turn_but_the_choice_of_a_mode(self) -> None:
        graph = graph_of(open_protocol("gated", max_tokens=7), "gated")
        assert {name: state.max_tokens for name, state in graph.states.items()} == {
            "gate": 1, "alone": 7, "think": 7, "answer": 7, "conclude": 7,
        }  # fmt: skip
        assert graph.max_turns == 7

    @pytest.mark.parametrize(
        ("text", "name", "message"),
        [
            (PAIR, "other", r"pair\.py has no 'other'; it has .*pair, lines, number, guess"),
            (PAIR, "lines", r"pair\.py:lines must be a protocol, such as a GraphProtocol; it is a list"),
            ("x = 1\n", "", r"pair\.py must be named as FILE\.py:NAME; its protocols are none"),
            (PAIR + "other = pair\n", "", r"its protocols are pair, other"),
            ("\nx = (\n", "pair", r"pair\.py, line 2: SyntaxError: '\(' was never closed"),
            ("\nimport nowhere_at_all\n", "pair", r"pair\.py, line 2: ModuleNotFoundError: No module named"),
            ("def f():\n    raise KeyError('k')\nf()\n", "pair", r"pair\.py, line 2: KeyError: 'k'"),
        ],
    )
    def test_files_that_hold_none(self, tmp_path: Path, text: str, name: str, message: str) -> None:
        path = written(tmp_path, text)
        with pytest.raises(InputError, match=message) as error:
            open_protocol(f"{path}:{name}" if name else str(path))
        assert "\n" not in str(error.value)
        assert not isinstance(error.value, FaultyProtocolError)

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ('then="judge"', 'then="jugde"', r"pair\.py, line 6: state 'guess' leads to 'jugde'"),
            ('then="judge"', 'next="judge"', r"pair\.py, line 10: next: Extra inputs are not permitted"),
            ('"bob": ""', '"bob": "", "cleo": ""', r"seat\(s\) \['cleo'\] never speak"),
            ("(Correctness(),)", "()", r"pair\.py, line 14: a sum needs at least one term"),
        ],
    )
    def test_a_graph_that_is_refused_is_a_fault_in_one_line(
        self, tmp_path: Path, old: str, new: str, message: str
    ) -> None:
        with pytest.raises(FaultyProtocolError, match=message) as error:
            open_protocol(str(written(tmp_path, PAIR.replace(old, new))))
        assert "\n" not in str(error.value)

    def test_the_line_of_a_file_that_is_named_from_here(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "here").mkdir()
        written(tmp_path / "here", PAIR.replace('then="judge"', 'then="jugde"'), "named_from_here.py")
        monkeypatch.chdir(tmp_path)
        with pytest.raises(FaultyProtocolError, match=r"^here/named_from_here\.py, line 6: state 'guess' leads to"):
            open_protocol("here/named_from_here.py:pair")

    def test_names_and_files_that_are_none(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="no protocol is called 'long-short'; name one of longshort, thinkless"):
            open_protocol("long-short")
        with pytest.raises(InputError, match=r"no file .*none\.py; write FILE\.py:NAME"):
            open_protocol(f"{tmp_path / 'none.py'}:x")


class TestSeats:
    def test_by_name_and_all_others(self) -> None:
        protocol = LongShort()
        assert seats_named(protocol, ["long=a", "short=b"]) == {"long": "a", "short": "b"}
        assert seats_named(protocol, ["both"]) == {"long": "both", "short": "both"}
        assert seats_named(protocol, ["rest", "short=b=c"]) == {"long": "rest", "short": "b=c"}

    @pytest.mark.parametrize(
        ("seats", "message"),
        [
            (["long=a"], "each seat needs one agent.*; nobody fills short"),
            ([], "nobody fills long, short"),
            (["a", "b"], "got a, b"),
            (["middle=a", "b"], "each of the seats long, short, or MODEL for all others; got 'middle=a'"),
            (["long=a", "long=b", "c"], "got 'long=b'"),
            (["long=", "c"], "got 'long='"),
        ],
    )
    def test_what_cannot_be_meant(self, seats: list[str], message: str) -> None:
        with pytest.raises(InputError, match=message):
            seats_named(LongShort(), seats)

    def test_agents_of_a_file_need_no_model(self, tmp_path: Path) -> None:
        path = written(
            tmp_path, PAIR + "from turnwise.agents.scripted import ScriptedAgent\nagent = ScriptedAgent(['2'])\n"
        )
        named = {"a": f"{path}:guess", "b": f"{path}:lines", "c": f"{path}:agent"}
        with seated(named, Sampling()) as team:
            assert list(team) == ["a", "b", "c"]
            for agent in team.values():
                assert isinstance(agent, ScriptedAgent)
                assert asyncio.run(agent.reply(Turn("a", "guess", (), (), 9), 0)).text == "2"
        with (
            pytest.raises(
                InputError, match=r"pair\.py:number must be an agent, a list of lines or a function .* it is 3"
            ),
            seated({"a": f"{path}:number"}, Sampling()),
        ):
            raise AssertionError


class TestStoredEpisodes:
    def store(self, folder: Path, *episodes: Episode) -> None:
        with EpisodeStore(folder, {}) as store:
            for episode in episodes:
                store.append(episode)

    def episode(self, problem: str, seed: int = 0, *, error: str | None = None) -> Episode:
        grade = None if error else Grade(Outcome.RIGHT)
        return Episode(Transcript(Problem(problem, "1 + 1?", "2")), 0, seed, grade, error)

    def test_all_seeds_without_what_failed(self, tmp_path: Path) -> None:
        first, second = self.episode("p"), self.episode("p", 1)
        self.store(tmp_path / "seed-0", self.episode("p", error="x"), first, self.episode("q", error="x"))
        self.store(tmp_path / "seed-1", second)
        assert stored_episodes(tmp_path) == [first, second]
        assert stored_episodes(tmp_path / "seed-1") == [second]

    def test_several_runs_or_none(self, tmp_path: Path) -> None:
        for name in "ab":
            self.store(tmp_path / name, self.episode("p"))
        with pytest.raises(InputError, match=r"holds several runs, such as .*a and .*b; name one of them"):
            stored_episodes(tmp_path)
        (tmp_path / "c").mkdir()
        with pytest.raises(InputError, match="holds no finished episodes"):
            stored_episodes(tmp_path / "c")
