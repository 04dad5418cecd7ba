"""What a command line names: protocols, who fills their seats, and runs that were played before."""

import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from pydantic import ValidationError

from turnwise.agents.agent import Agent
from turnwise.agents.scripted import ScriptedAgent
from turnwise.agents.team import EngineName, open_team
from turnwise.agents.tiny import LONG, NOVICE, ROUTER, SHORT
from turnwise.command import faults_in, load_quietly
from turnwise.environments.episode import Episode
from turnwise.environments.errors import InputError
from turnwise.protocols.debate import Debate, Panel
from turnwise.protocols.gated import Gated
from turnwise.protocols.graph import GraphProtocol, TurnGraph
from turnwise.protocols.long_short import LongShort
from turnwise.protocols.protocol import ReasoningProtocol
from turnwise.protocols.solo import Solo
from turnwise.protocols.thinkless import Thinkless
from turnwise.rl.episode_store import read_episodes
from turnwise.rl.run_folder import Run

PROTOCOLS: dict[str, Callable[[], GraphProtocol]] = {
    "longshort": LongShort,
    "thinkless": Thinkless,
    "always-think": partial(Thinkless, mode="think"),
    "never-think": partial(Thinkless, mode="short"),
    "gated": Gated,
    "solo": Solo,
    "debate": Debate,
    "panel": Panel,
}
SHOWN = 5  # stores that an error names
TINY_MODELS = {"tiny-long": LONG, "tiny-short": SHORT, "tiny-router": ROUTER, "tiny-novice": NOVICE}


class FaultyProtocolError(InputError):
    """A protocol's own file runs, and what it declares cannot be played."""


def open_protocol(name: str, *, max_tokens: int | None = None) -> ReasoningProtocol:
    """A protocol by its name here, or an object in a Python file, `FILE.py:NAME`; NAME may be left out if it is alone.

    `max_tokens` is the budget of every turn, but of those that choose a mode, in place of the protocol's own. Raises
    InputError for a name or file that holds none, and FaultyProtocolError where a graph in the file is refused.
    """
    if name in PROTOCOLS:
        protocol: ReasoningProtocol = PROTOCOLS[name]()
    elif ".py" in name:
        protocol = _protocol_in(name)
    else:
        raise InputError(f"no protocol is called {name!r}; name one of {', '.join(PROTOCOLS)}, or FILE.py:NAME")
    return protocol if max_tokens is None else _with_budget(protocol, max_tokens, name)


def graph_of(protocol: ReasoningProtocol, name: str) -> TurnGraph:
    """The protocol's turn graph. Raises InputError where it was not declared as one."""
    if not isinstance(protocol, GraphProtocol):
        raise InputError(f"{name} must be a GraphProtocol; it is a {type(protocol).__name__}, which has no graph")
    return protocol.graph


@dataclass(frozen=True, slots=True)
class Sampling:
    """What models are sampled with; as `turnwise.agents.team.open_team` has it."""

    engine: EngineName = "transformers"
    temperature: float = 0.6
    device: str = "cpu"
    urls: tuple[str, ...] = ()
    key_variable: str = ""
    cache_gigabytes: float = 1.0
    context: int | None = None


@contextmanager
def seated(named: Mapping[str, str], sampling: Sampling) -> Iterator[dict[str, Agent]]:
    """An agent for each seat: a model's, or what an object of a Python file says, `FILE.py:NAME`.

    The object is an agent, a list of lines, or a function of a turn and a seed, as ScriptedAgent takes them.
    """
    scripted = {seat: _agent_in(name) for seat, name in named.items() if ".py:" in name}
    models = {seat: TINY_MODELS.get(name, name) for seat, name in named.items() if seat not in scripted}
    if not models:
        yield scripted
        return
    with suppress(ModuleNotFoundError):  # of which `open_team` tells
        load_quietly()
    with open_team(
        models, engine=sampling.engine, temperature=sampling.temperature, device=sampling.device, urls=sampling.urls,
        key_variable=sampling.key_variable, cache_gigabytes=sampling.cache_gigabytes, context=sampling.context,
    ) as team:  # fmt: skip
        yield scripted | team


def seats_named(protocol: ReasoningProtocol, seats: Sequence[str]) -> dict[str, str]:
    """Who fills each seat, from texts like `SEAT=WHO`, and `WHO` for all the seats that are not named.

    Raises InputError for a seat that the protocol has not, one that is named twice, and one that nobody fills.
    """
    named = dict[str, str]()
    everybody = [text for text in seats if "=" not in text]
    for text in seats:
        seat, found, who = text.partition("=")
        if found and (seat not in protocol.seats or seat in named or not who):
            raise InputError(
                f"--seat must be SEAT=MODEL, once for each of the seats {', '.join(protocol.seats)}, or MODEL for all "
                f"others; got {text!r}"
            )
        if found:
            named[seat] = who
    missing = [seat for seat in protocol.seats if seat not in named]
    if len(everybody) > 1 or (missing and not everybody):
        told = f"nobody fills {', '.join(missing)}" if missing and not everybody else f"got {', '.join(everybody)}"
        raise InputError(f"each seat needs one agent, --seat SEAT=MODEL, or --seat MODEL for all others; {told}")
    return {seat: named.get(seat) or everybody[0] for seat in protocol.seats}


def models_of(seats: Sequence[str], given: Sequence[str], run: Run) -> dict[str, str]:
    """The model of each of the seats: as SEAT=MODEL among `given`, or else as the run's description has it.

    Raises InputError for what is no SEAT=MODEL, and for a seat without a model.
    """
    named = {}
    for text in given:
        seat, found, model = text.partition("=")
        if not found or not model:
            raise InputError(f"a model is given as SEAT=MODEL, such as long=agents/tiny/long; got {text!r}")
        named[seat] = model
    models = {seat: named.get(seat) or run.get(f"seat {seat}", run.get(seat)) for seat in seats}
    if without := [seat for seat, model in models.items() if not isinstance(model, str)]:
        raise InputError(f"no model for seat(s) {without}, and the run names none; give each as --model SEAT=MODEL")
    return {seat: str(model) for seat, model in models.items()}


def stored_episodes(folder: Path) -> list[Episode]:
    """The finished episodes of the one run that a folder holds, of all its seeds.

    Raises InputError where it holds none, or several runs.
    """
    found = dict[tuple[int, str], tuple[Path, Episode]]()
    for path in sorted(folder.rglob("episodes.jsonl")):
        for episode in read_episodes(path):
            key = (episode.seed, episode.id)
            if key in found and found[key][0] != path:
                raise InputError(
                    f"{folder} holds several runs, such as {found[key][0].parent} and {path.parent}; name one of them"
                )
            found[key] = (path, episode)
    episodes = [episode for _, episode in found.values() if episode.error is None]
    if not episodes:
        raise InputError(f"{folder} holds no finished episodes; name what eval or play wrote by --output")
    return episodes


def store_in(folder: Path) -> Path:
    """The one episode store that a folder is or holds. Raises InputError where it holds several, or none."""
    if (folder / "episodes.jsonl").is_file():
        return folder
    found = [path.parent for path in sorted(folder.rglob("episodes.jsonl"))]
    if len(found) != 1:
        shown = ", ".join(map(str, found[:SHOWN])) + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "")
        raise InputError(f"one episode store is needed; {folder} holds {shown or 'none'}: name the folder of one")
    return found[0]


def _protocol_in(name: str) -> ReasoningProtocol:
    path, _, wanted = name.partition(".py:")
    if wanted:
        found = _object_in(name)
        if not isinstance(found, ReasoningProtocol):
            raise InputError(f"{name} must be a protocol, such as a GraphProtocol; it is a {type(found).__name__}")
        return found
    path = name
    protocols = {key: one for key, one in vars(load_file(Path(path))).items() if isinstance(one, ReasoningProtocol)}
    if len(protocols) != 1:
        raise InputError(f"{path} must be named as FILE.py:NAME; its protocols are {', '.join(protocols) or 'none'}")
    return next(iter(protocols.values()))


def _agent_in(name: str) -> Agent:
    found = _object_in(name)
    if isinstance(found, Agent):
        return found
    if callable(found) or (isinstance(found, list | tuple) and all(isinstance(line, str) for line in found)):
        return ScriptedAgent(found)
    raise InputError(f"{name} must be an agent, a list of lines or a function (turn, seed); it is {found!r:.60}")


def _object_in(name: str) -> object:
    path, _, wanted = name.rpartition(":")
    module = load_file(Path(path))
    if wanted not in vars(module):
        there = [key for key in vars(module) if not key.startswith("_")]
        raise InputError(f"{path} has no {wanted!r}; it has {', '.join(there)}")
    found: object = vars(module)[wanted]
    return found


@cache
def load_file(path: Path) -> ModuleType:
    """A Python file, run as a module that can import its neighbours."""
    if not path.is_file():
        raise InputError(f"no file {path}; write FILE.py:NAME")
    name = f"turnwise file {path}"  # which hides no other module
    spec = spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} must be a Python file, whose name ends in .py")
    module = sys.modules[name] = module_from_spec(spec)
    sys.path.append(str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    except ValidationError as refused:
        raise FaultyProtocolError(f"{path}, line {_line(refused, path)}: {faults_in(refused)}") from None
    except InputError as error:
        raise FaultyProtocolError(f"{path}, line {_line(error, path)}: {error}") from None
    except Exception as error:
        raise InputError(f"{path}, line {_line(error, path)}: {type(error).__name__}: {error}") from error
    return module


def _line(error: Exception, path: Path) -> int | None:
    """The line of the file that an error comes from."""
    if isinstance(error, SyntaxError):
        return error.lineno
    frames = traceback.extract_tb(error.__traceback__)
    file = str(path.absolute())  # as importlib calls it
    return next((frame.lineno for frame in reversed(frames) if frame.filename == file), None)


def _with_budget(protocol: ReasoningProtocol, max_tokens: int, name: str) -> GraphProtocol:
    graph = graph_of(protocol, name)
    states = {
        key: state if state.control else state.model_copy(update={"max_tokens": max_tokens})
        for key, state in graph.states.items()
    }
    assert isinstance(protocol, GraphProtocol)
    return GraphProtocol(TurnGraph(**{**dict(graph), "states": states}), protocol.reward)
