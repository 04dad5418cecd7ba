"""Protocols, models and stored runs by their names, as commands are given them."""

import runpy
from collections.abc import Sequence
from pathlib import Path

from turnwise.environments.episode import Episode
from turnwise.environments.errors import InputError
from turnwise.protocols.long_short import LongShort
from turnwise.protocols.protocol import ReasoningProtocol
from turnwise.protocols.thinkless import Thinkless
from turnwise.rl.episode_store import read_episodes
from turnwise.rl.run_folder import Run


def protocol_named(name: str, *, max_tokens: int) -> ReasoningProtocol:
    """The protocol "longshort" or "thinkless", with a budget for each turn, or that in a Python file, FILE.py:NAME.

    Raises InputError where there is none of that name.
    """
    if name == "longshort":
        return LongShort(long_tokens=max_tokens, short_tokens=max_tokens)
    if name == "thinkless":
        return Thinkless(short_tokens=max_tokens, think_tokens=max_tokens)
    path, _, wanted = name.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        raise InputError(f"a protocol is longshort, thinkless, or FILE.py:NAME for one of your own; got {name!r}")
    found = runpy.run_path(path).get(wanted)
    if not isinstance(found, ReasoningProtocol):
        raise InputError(f"{path} must define a protocol called {wanted!r}; {wanted!r} is {type(found).__name__} there")
    return found


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
    models = {seat: named.get(seat) or run.get(seat) for seat in seats}
    if without := [seat for seat, model in models.items() if not isinstance(model, str)]:
        raise InputError(f"no model for seat(s) {without}, and the run names none; give each as --model SEAT=MODEL")
    return {seat: str(model) for seat, model in models.items()}


def stored_episodes(run: Path) -> list[Episode]:
    """The episodes of a store's folder; of one that was played again, the last. Raises InputError where are none."""
    episodes = list({episode.id: episode for episode in read_episodes(store_file(run))}.values())
    if not episodes:
        raise InputError(f"{run} holds no episodes; play some first")
    return episodes


def store_file(run: Path) -> Path:
    """The file with the episodes of a store's folder. Raises InputError where is none."""
    path = run / "episodes.jsonl"
    if not path.is_file():
        raise InputError(f"{run} is no run: it has no episodes.jsonl; give the folder of an episode store")
    return path
