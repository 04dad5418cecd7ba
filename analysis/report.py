"""One HTML file that shows what happened: runs, figures, and every conversation, token by token.

The page is plain HTML, CSS and JavaScript in `report_page/`, and holds its data: JSON in blocks, each compressed and in
base64, of which the browser unpacks what is looked at. So nothing that a model said is ever part of the HTML, and the
page needs no network. Its content security policy lets it run its own scripts and load nothing.
"""

import base64
import gzip
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import BinaryIO

import orjson

from turnwise import __version__
from turnwise.analysis.aha import PHRASES, phrases_in
from turnwise.analysis.edges import Edges
from turnwise.analysis.stored_runs import StoredEpisode, StoredRun, find_runs
from turnwise.analysis.token_texts import TokenTexts
from turnwise.environments.environment import Grade, Outcome
from turnwise.environments.episode import Episode
from turnwise.environments.errors import InputError
from turnwise.environments.problem import Problem
from turnwise.environments.transcript import Reply, Step, Transcript
from turnwise.protocols.rewards import mode_of
from turnwise.rl.run_folder import write_whole
from turnwise.rl.summary import summarise

SCRIPTS = ("data.js", "draw.js", "overview.js", "metrics.js", "graph.js", "conversation.js", "episodes.js", "page.js")
FAILED, UNGRADED = "failed", "ungraded"
RETHINK = "</rethink>"
# So many bytes of JSON a block: a conversation that is looked at costs the browser this much, and not all of them.
BLOCK = 1 << 18
SNIPPET = 160

Json = object
"""What JSON can hold."""


@dataclass(frozen=True, slots=True)
class Written:
    """What a report holds."""

    path: Path
    runs: int
    episodes: int
    bytes: int


@dataclass(frozen=True, slots=True)
class _Seen:
    """What the tables need to know of an episode: itself without what was said, and what was found in that."""

    episode: Episode
    step: int | None
    rethinks: int
    phrases: tuple[str, ...]


def write_report(
    paths: Sequence[Path],
    output: Path,
    *,
    tokenizers: Sequence[Path] = (),
    on_progress: Callable[[str, int, int], None] = lambda stage, done, most: None,
) -> Written:
    """Writes the report of all runs in some folders and files of episodes.

    Token ids are shown as text where their tokenizer is in one of the folders `tokenizers`, or is that of a training
    run's own policies. Episodes are read and written one after the other; of each, the figures alone stay in memory.

    Raises InputError for what holds no run, a damaged line, a tokenizer that cannot be loaded or read no token, and a
    file that cannot be written.
    """
    runs, texts = find_runs(list(paths)), TokenTexts()
    for folder in tokenizers:
        texts.load(folder)
    for folder in (folder for run in runs for folder in run.tokenizers):
        with suppress(InputError):  # nobody asked for it
            texts.load(folder)
    page = _Page(texts, on_progress, most=sum(run.count() for run in runs))

    def write(draft: Path) -> None:
        try:
            page.write(runs, draft)
            if tokenizers and not texts.texts:
                raise InputError(f"no token was sampled with the tokenizer in {tokenizers[0]}; name the run's own")
        except BaseException:
            draft.unlink(missing_ok=True)
            raise

    write_whole(output, write)
    return Written(output, len(runs), len(page.index["run"]), output.stat().st_size)


class _Page:
    """A report that is being written."""

    def __init__(self, texts: TokenTexts, on_progress: Callable[[str, int, int], None], most: int) -> None:
        self._token_texts, self._on_progress, self._most = texts, on_progress, most
        self._problems: dict[tuple[str, int, str], int] = {}
        self._subjects: list[str] = []
        self._seats: dict[str, None] = {}
        self._modes: dict[str, int] = {}
        # One entry an episode, in the order of the blocks.
        self.index: dict[str, list[int | None]] = {
            name: []
            for name in ("run", "step", "problem", "sample", "outcome", "mode", "tokens", "turns", "rethinks", "aha")
        }

    def write(self, runs: Sequence[StoredRun], path: Path) -> None:
        """The whole page."""
        page = files("turnwise.analysis") / "report_page"
        template = (page / "report.html").read_text(encoding="utf-8")
        style = (page / "report.css").read_text(encoding="utf-8")
        scripts = [(page / name).read_text(encoding="utf-8") for name in SCRIPTS]
        sources = {"script-src": scripts, "style-src": [style]}
        policy = "; ".join(["default-src 'none'", *(f"{what} {_hashes(texts)}" for what, texts in sources.items())])
        head, tail = template.replace("{policy}", policy).replace("{style}", style).split("{blocks}")
        with path.open("wb") as file:
            file.write(head.encode())
            said, tokens = _Blocks(file, "said"), _Blocks(file, "tokens")
            told = [self._write_run(number, run, said, tokens) for number, run in enumerate(runs)]
            said.flush()
            tokens.flush()
            _write_block(file, "vocabularies", _packed(self._token_texts.texts))
            _write_block(file, "index", _packed(self._index(told, {"said": said.firsts, "tokens": tokens.firsts})))
            file.write(tail.replace("{scripts}", "".join(f"<script>{s}</script>\n" for s in scripts)).encode())

    def _write_run(self, number: int, run: StoredRun, said: "_Blocks", tokens: "_Blocks") -> Json:
        """Writes the episodes of a run; returns what is told of it as a whole."""
        seen, edges = list[_Seen](), Edges()
        for stored in run.episodes():
            episode = stored.episode
            found = _Seen(
                _without_words(episode), stored.step,
                sum(step.reply.stop == RETHINK for step in episode.transcript.steps), phrases_in(episode),
            )  # fmt: skip
            said.add(_said(stored))
            tokens.add(self._tokens(episode))
            self._add_to_index(number, found, episode)
            seen.append(found)
            edges.add(episode)
            self._on_progress("episodes", len(self.index["run"]), self._most)
        levels = sorted({one.episode.transcript.problem.level for one in seen})
        steps = sorted({one.step for one in seen if one.step is not None})
        return {
            "name": run.name, "path": str(run.path), "about": run.about, "metrics": _columns(run),
            "whole": _row(seen),
            "levels": {str(at): _row([s for s in seen if s.episode.transcript.problem.level == at]) for at in levels},
            "steps": {str(step): _row([one for one in seen if one.step == step]) for step in steps},
            "phrases": Counter(phrase for one in seen if one.episode.error is None for phrase in one.phrases),
            "edges": [[*edge, count] for edge, count in edges.taken.items()],
            "states": {
                state: {"visits": count, "tokens": edges.tokens[state], "seats": list(edges.seats[state])}
                for state, count in edges.visits.items()
            },
        }  # fmt: skip

    def _add_to_index(self, run: int, seen: _Seen, episode: Episode) -> None:
        problem, mode = episode.transcript.problem, mode_of(episode.transcript)
        key = (problem.id, problem.level, problem.question[:SNIPPET])
        if key not in self._problems:
            self._subjects.append(problem.subject)
        self._seats |= dict.fromkeys(step.seat for step in episode.transcript.steps)
        found = {
            "run": run, "step": seen.step, "problem": self._problems.setdefault(key, len(self._problems)),
            "sample": episode.sample, "outcome": _OUTCOMES.index(_outcome(episode)),
            "mode": None if mode is None else self._modes.setdefault(mode, len(self._modes)),
            "tokens": episode.transcript.token_count, "turns": len(episode.transcript.steps),
            "rethinks": seen.rethinks, "aha": len(seen.phrases),
        }  # fmt: skip
        for name, value in found.items():
            self.index[name].append(value)

    def _tokens(self, episode: Episode) -> Json:
        """For each turn what its seat read since it last spoke, what it said, and the log-probabilities of that."""
        known: dict[str, tuple[int, ...]] = {}
        turns = []
        for step in episode.transcript.steps:
            reply, before = step.reply, known.get(step.seat, ())
            continues = bool(before) and reply.prompt_token_ids[: len(before)] == before
            read = reply.prompt_token_ids[len(before) :] if continues else reply.prompt_token_ids
            known[step.seat] = reply.prompt_token_ids + reply.token_ids
            self._token_texts.read(reply.tokenizer, read + reply.token_ids)
            turns.append({
                "vocabulary": reply.tokenizer, "continues": continues, "read": read, "said": reply.token_ids,
                # A store has null where there is no number.
                "logs": [None if value is None else round(value, 5) for value in reply.log_probabilities],
            })  # fmt: skip
        return turns

    def _index(self, runs: list[Json], blocks: Mapping[str, list[int]]) -> Json:
        problems = [[*key, subject] for key, subject in zip(self._problems, self._subjects, strict=True)]
        return {
            "version": __version__, "runs": runs, "problems": problems, "outcomes": _OUTCOMES, "blocks": blocks,
            "modes": list(self._modes), "seats": list(self._seats), "phrases": PHRASES, "episodes": self.index,
        }  # fmt: skip


class _Blocks:
    """Records of episodes, written in blocks; `firsts` are the numbers of the first episode of each."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._name = file, name
        self._records, self._size = list[bytes](), 0
        self._added = 0
        self.firsts: list[int] = []

    def add(self, record: Json) -> None:
        """The record of the next episode."""
        if not self._records:
            self.firsts.append(self._added)
        self._records.append(orjson.dumps(record))
        self._added += 1
        self._size += len(self._records[-1])
        if self._size >= BLOCK:
            self.flush()

    def flush(self) -> None:
        """Writes what is left."""
        if self._records:
            _write_block(self._file, f"{self._name}-{len(self.firsts) - 1}", b"[" + b",".join(self._records) + b"]")
            self._records, self._size = [], 0


_NO_GRADE = Grade(Outcome.UNPARSABLE)
_OUTCOMES = [*map(str, Outcome), FAILED, UNGRADED]


def _outcome(episode: Episode) -> str:
    if episode.grade is None:
        return UNGRADED if episode.error is None else FAILED
    return str(episode.grade.outcome)


def _without_words(episode: Episode) -> Episode:
    """The episode as `summarise` needs it."""
    steps = (
        Step(step.seat, step.state, Reply("", step.reply.token_count, step.reply.finish, step.reply.stop), step.prefill)
        for step in episode.transcript.steps
    )
    problem = episode.transcript.problem
    transcript = Transcript(Problem(problem.id, "", "", problem.level), tuple(steps))
    return replace(episode, transcript=transcript)


def _said(stored: StoredEpisode) -> Json:
    """The conversation of an episode, and the credit for it."""
    episode, credit = stored.episode, stored.credit
    problem = episode.transcript.problem
    return {
        "id": episode.id, "seed": str(episode.seed), "error": episode.error,
        "answer": episode.grade.answer if episode.grade else None,
        "statement": problem.statement, "gold": problem.answer, "solution": problem.solution,
        "rewards": credit and {seat: reward.terms for seat, reward in credit.rewards.items()},
        "advantages": credit and credit.advantages,
        "turns": [
            {
                "seat": step.seat, "state": step.state, "prefill": step.prefill, "text": step.reply.text,
                "tokens": step.reply.token_count, "finish": step.reply.finish, "stop": step.reply.stop,
                "model": step.reply.model, "version": step.reply.version,
            }
            for step in episode.transcript.steps
        ],
    }  # fmt: skip


def _row(seen: Sequence[_Seen]) -> Json:
    """What some episodes come to, as a row of a table; None where none of them finished.

    "right" and "interval" are of those that were graded, and None where none was.
    """
    finished = [one for one in seen if one.episode.error is None]
    if not finished:
        return None
    # Of an imported chat without a gold answer all but its grade is known.
    summary = summarise(replace(one.episode, grade=one.episode.grade or _NO_GRADE) for one in finished)
    graded = [one.episode for one in finished if one.episode.grade is not None]
    right = summarise(graded) if graded else None
    return {
        "episodes": len(finished), "failed": len(seen) - len(finished), "right": right and right.accuracy,
        "interval": right and right.interval, "tokens": summary.tokens, "seats": summary.seat_tokens,
        "turns": summary.turns, "thinks": summary.think_share,
        "outcomes": Counter(_outcome(one.episode) for one in finished),
        "rethinks": sum(one.rethinks > 0 for one in finished), "aha": sum(bool(one.phrases) for one in finished),
    }  # fmt: skip


def _columns(run: StoredRun) -> Json:
    """For each figure of a training run its steps and its values."""
    columns: dict[str, tuple[list[float], list[float]]] = {}
    for figures in run.metrics:
        for name, value in figures.items():
            if name != "step" and value is not None:
                steps, values = columns.setdefault(name, ([], []))
                steps.append(figures["step"] or 0)
                values.append(value)
    return columns


def _hashes(texts: Sequence[str]) -> str:
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
    return " ".join(f"'sha256-{digest}'" for digest in digests)


def _packed(value: Json) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS)


def _write_block(file: BinaryIO, name: str, json: bytes) -> None:
    packed = base64.b64encode(gzip.compress(json, mtime=0))
    file.write(b'<script type="application/gzip" id="' + name.encode() + b'">' + packed + b"</script>\n")
