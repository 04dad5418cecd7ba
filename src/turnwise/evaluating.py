"""Teams on a benchmark: played or replayed, seed by seed, in a folder that can be resumed, and held against another."""

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import orjson
from rich.console import Console

from turnwise.agents.agent import Agent
from turnwise.agents.replay import ReplayAgent
from turnwise.agents.stored_answers import answering, count_words, read_answers
from turnwise.analysis.evaluation import Difference, Evaluation, difference, evaluate
from turnwise.analysis.papers import Printed, printed_for
from turnwise.analysis.tables import differences, endings, evaluations, levels, printed_results
from turnwise.environments.environment import Environment
from turnwise.environments.episode import Episode
from turnwise.environments.errors import InputError
from turnwise.named import TINY_MODELS, stored_episodes
from turnwise.protocols.protocol import ReasoningProtocol
from turnwise.rl.episode_store import encode
from turnwise.rl.rollout import in_order
from turnwise.rl.run_folder import Run, read_run, write_whole
from turnwise.show import play_shown


@dataclass(frozen=True, slots=True)
class Entry:
    """A team that is evaluated: `seeds` runs, each of `samples` on every problem.

    `settings` is what, besides protocol, problems and seed, must be equal where a run is resumed. `only` has, for each
    seed, the ids of the episodes to be played, if not all are.
    """

    name: str
    protocol: ReasoningProtocol
    team: Mapping[str, Agent]
    samples: int
    seeds: Sequence[int]
    settings: Run
    only: Mapping[int, Collection[str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Result:
    """What each run came to, beside its baseline and the papers' own figures on the same benchmark."""

    benchmark: str
    problems: int
    tokens: str
    runs: Mapping[str, Evaluation]
    differences: Mapping[str, Difference]
    printed: Sequence[Printed]

    @property
    def json(self) -> bytes:
        """All of it, for machines."""
        return orjson.dumps(self, option=orjson.OPT_NON_STR_KEYS | orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def solution_entries(
    path: Path,
    environment: Environment,
    protocol: ReasoningProtocol,
    *,
    samples: int | None = None,
    tokenizer: str | None = None,
) -> list[Entry]:
    """An entry for each model in a file of solutions, which `read_answers` describes.

    Tokens are those of the tokenizer, or words. Raises InputError for a protocol with several seats.
    """
    if len(protocol.seats) != 1:
        raise InputError(f"stored solutions fill one seat; the protocol has {', '.join(protocol.seats)}: name another")
    count_tokens = count_words if tokenizer is None else _counter(tokenizer)
    entries, read = [], read_answers(path, environment.problems)
    digest = hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
    for model, answers in read.items():
        team = dict.fromkeys(protocol.seats, answering(answers, model, count_tokens=count_tokens))
        settings = {"solutions": f"{path.name} {digest}", "model": model, "tokenizer": tokenizer or ""}
        fewest = min(map(len, answers.values()))
        entries.append(Entry(model, protocol, team, samples or fewest, (0,), settings))
    return entries


def replayed_entry(
    folder: Path, environment: Environment, protocol: ReasoningProtocol, *, samples: int | None = None
) -> tuple[Environment, list[Entry]]:
    """The run that a folder holds, to be played again as it was and graded anew; and those problems that it holds.

    Of each problem all samples that finished, or those numbered below `samples`.
    """
    stored = stored_episodes(folder)
    held = {episode.transcript.problem.id for episode in stored}
    problems = [problem for problem in environment.problems if problem.id in held]
    if not problems:
        raise InputError(f"{folder} holds no episode on the problems of {environment.name}; name those that it played")
    held = {problem.id for problem in problems}
    digest, only = hashlib.blake2b(digest_size=8), dict[int, set[str]]()
    for episode in stored:
        digest.update(encode(episode))
        if episode.transcript.problem.id in held and (not samples or episode.sample < samples):
            only.setdefault(episode.seed, set()).add(episode.id)
    entry = Entry(
        folder.name, protocol, dict.fromkeys(protocol.seats, ReplayAgent(stored)),
        samples or 1 + max(episode.sample for episode in stored), sorted(only),
        {"replay": f"{folder.name} {digest.hexdigest()}", **_unit_of(folder)}, only,
    )  # fmt: skip
    return replace(environment, problems=problems), [entry]


def _counter(tokenizer: str) -> Callable[[str], int]:
    from turnwise.agents.transformers_engine import load_tokenizer  # transformers: only where it is asked for

    try:
        reader = load_tokenizer(TINY_MODELS.get(tokenizer, tokenizer))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot load a tokenizer from {tokenizer}: {error}".partition("\n")[0]) from None
    return lambda text: len(reader.encode(text, add_special_tokens=False))


def evaluate_entries(
    entries: Sequence[Entry],
    environment: Environment,
    console: Console,
    *,
    baseline: str | None = None,
    output: Path | None = None,
    answer_marker: str = "",
) -> tuple[Result, dict[str, list[Episode]]]:
    """Plays what is missing, and says what all of it came to; with an `output` folder, in its `evaluation.json` too.

    The folder gets an episode store for each seed, `seed-0` and so on, after an entry's name where there are several.
    `baseline` is the name of an entry, or the folder of an earlier run, whose tokens are to be the same ones.
    `answer_marker` says how answers are found, so that a run is not resumed with another.
    """
    tokens = _counted(entries[0].settings)
    protocols = {entry.name: entry.protocol for entry in entries}
    earlier = dict[str, list[Episode]]()
    if baseline is not None and baseline not in protocols:
        earlier = {baseline: _baseline(baseline, list(protocols), environment, tokens)}
    runs = dict[str, list[Episode]]()
    for entry in entries:
        settings = {**entry.settings, "answer_marker": answer_marker}
        called = f"{entry.name.replace('/', '-')} " if len(entries) > 1 else ""
        runs[entry.name] = _played(entry, called, environment, console, output, settings)
    runs |= earlier
    found = Result(
        benchmark=environment.name,
        problems=len(environment.problems),
        tokens=tokens,
        runs={name: evaluate(episodes, protocols.get(name)) for name, episodes in runs.items()},
        differences={
            name: difference(episodes, runs[baseline], baseline=baseline)
            for name, episodes in runs.items()
            if baseline is not None and name != baseline
        },
        printed=printed_for(environment.name),
    )
    if output:
        write_whole(output / "evaluation.json", lambda path: path.write_bytes(found.json))
    return found, runs


def show_evaluation(result: Result, runs: Mapping[str, Sequence[Episode]], console: Console) -> None:
    """Prints the result as tables: each run, how it ended, by level, against the baseline, and the papers' figures."""
    title = f"{result.problems} problems of {result.benchmark}"
    console.print(evaluations(result.runs, title=title, caption=f"tokens: {result.tokens}, an episode"))
    console.print(endings(result.runs))
    if len({episode.transcript.problem.level for episodes in runs.values() for episode in episodes}) > 1:
        console.print(levels(runs, title="Right, in how many tokens, by level"))
    if result.differences:
        console.print(differences(result.differences))
    if result.printed:
        console.print(printed_results(result.printed, result.benchmark))


def _counted(run: Run) -> str:
    """What is counted as tokens in a run that its settings, or its `run.json`, describe."""
    if "tokenizer" not in run:
        return "sampled tokens"
    return f"of {run['tokenizer']} in the stored texts" if run["tokenizer"] else "words of the stored texts"


def _unit_of(folder: Path) -> Run:
    """What the `run.json` of the stores in a folder say of stored texts' tokenizer, or nothing."""
    stores = [path.parent for path in folder.rglob("episodes.jsonl") if path.with_name("run.json").is_file()]
    tokenizers = [run["tokenizer"] for run in map(read_run, stores) if "tokenizer" in run]
    return {"tokenizer": tokenizers[0]} if tokenizers else {}


def _baseline(folder: str, entries: Sequence[str], environment: Environment, tokens: str) -> list[Episode]:
    if not Path(folder).is_dir():
        raise InputError(f"a baseline is one of {', '.join(entries)}, or the folder of an earlier run; got {folder}")
    if (counted := _counted(_unit_of(Path(folder)))) != tokens:
        raise InputError(
            f"AES needs tokens of one kind: those of {folder} are {counted}, and this run's are {tokens}; give a "
            "baseline with the same, such as by --tokenizer"
        )
    episodes = in_order(environment, stored_episodes(Path(folder)))
    if not episodes:
        raise InputError(f"{folder} holds no episode on these problems of {environment.name}")
    return episodes


def _played(
    entry: Entry,
    called: str,
    environment: Environment,
    console: Console,
    output: Path | None,
    settings: dict[str, str | int | float],
) -> list[Episode]:
    """The episodes of an entry, of all its seeds."""
    episodes = list[Episode]()
    for seed in entry.seeds:
        of_seed = play_shown(
            f"{called}seed {seed}", entry.protocol, entry.team, environment, console,
            seed=seed, samples=entry.samples, output=output, settings=settings, only=entry.only.get(seed),
        )  # fmt: skip
        episodes += (episode for episode in of_seed if episode.sample < entry.samples)
    return episodes
