"""Proof, on a stored run, that what trains is exactly what was sampled.

`python -m turnwise.analysis.audit FOLDER` holds every episode store in FOLDER (a training run has many) to five rules:

- lengths: a reply has as many token ids and as many log-probabilities as `token_count` says, and a prompt before them;
  log-probabilities are finite and at most 0 (up to `ROUNDING`); versions, where tokens have any, never go back.
- mask: the trained tokens of a seat's trajectories are its sampled ones, each once, after exactly what was read.
- drift: token ids read as the reply's text, and a later prompt that shows the text shows those ids.
- loss: the gradient of `policy_loss`, on the learner's batch, is zero everywhere but at the seat's sampled tokens.
- weight: no episode is there twice, and each weighs 1 / N in a seat's mean over N of them.

Drift needs the run's tokenizer. A text is not shown where it stands in the problem or before it, in another turn, or
quoted in a user's message (`seat: text`). Without a tokenizer, prompts that do not continue what their seat read and
said are only counted, as other views. That the log-probabilities are the model's, only its weights could tell.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice, zip_longest
from math import inf
from pathlib import Path
from typing import Annotated

import orjson
import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from turnwise.agents.chat import decode, fingerprint
from turnwise.agents.transformers_engine import load_tokenizer
from turnwise.environments.episode import Episode
from turnwise.environments.errors import InputError
from turnwise.environments.transcript import Reply
from turnwise.rl.advantage import Sample
from turnwise.rl.batch import Batch
from turnwise.rl.episode_store import read_episodes
from turnwise.rl.loss import LossSettings, policy_loss, token_weights
from turnwise.rl.trajectory import Trajectory, trajectories

ROUNDING = 1e-5  # float32's log_softmax may come out so far above 0
CHUNK, SHOWN = 128, 20  # episodes in memory and in a batch; faults printed


@dataclass(frozen=True, slots=True)
class Audit:
    """What was checked, and its faults, one line each: the episode, the turn (from 0), the rule.

    Failed episodes train nobody: they are counted, and that is all. Turns without ids cannot be trained on. Decoded
    turns are those that were sampled with the given tokenizer.
    """

    episodes: int = 0
    failed_episodes: int = 0
    turns: int = 0
    turns_without_ids: int = 0
    decoded_turns: int = 0
    sampled_tokens: int = 0
    sequences: int = 0
    other_views: int = 0
    faults: tuple[str, ...] = ()

    def __add__(self, other: "Audit") -> "Audit":
        return Audit(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


def audit(episodes: Iterable[Episode], tokenizer: PreTrainedTokenizerBase | None = None) -> Audit:
    """Checks the episodes of one store, of which it holds `CHUNK` at a time."""
    total, known, stream = Audit(), set[str](), iter(episodes)
    vocabulary = None if tokenizer is None else fingerprint(tokenizer)
    while chunk := list(islice(stream, CHUNK)):
        samples = defaultdict[str, list[Sample]](list)
        for episode in chunk:
            if episode.id in known:
                total += Audit(faults=(f"{episode.id}: weight: this episode is in the store a second time",))
            elif episode.grade is None:  # it may come again
                total += Audit(failed_episodes=1)
            else:
                known.add(episode.id)
                found, sound = _audit_episode(episode, tokenizer, vocabulary)
                total += found
                for sample in sound:
                    samples[sample.trajectory.seat].append(sample)
        total += Audit(len(chunk), faults=tuple(fault for seat in samples for fault in _batch_faults(samples[seat])))
    return total


def _audit_episode(
    episode: Episode, tokenizer: PreTrainedTokenizerBase | None, vocabulary: str | None
) -> tuple[Audit, list[Sample]]:
    """What one episode comes to, and the samples of those of its seats that have no faults."""
    steps, faults, unfit, samples = episode.transcript.steps, list[str](), set[str](), list[Sample]()
    without_ids = decoded = sequences = views = 0
    for place, (seat, _, reply, _) in enumerate(steps):
        wrong = list[str]()
        if reply.token_ids or reply.log_probabilities or reply.prompt_token_ids:
            wrong += _length_faults(reply)
            if tokenizer is not None and reply.tokenizer == vocabulary:
                decoded += 1
                wrong += _drift_faults(episode, place, tokenizer, vocabulary)
            faults += (f"{episode.id}, turn {place} ({seat}): {fault}" for fault in wrong)
        else:
            without_ids += 1
        if wrong or not reply.token_ids:
            unfit.add(seat)
    for seat in dict.fromkeys(step.seat for step in steps if step.seat not in unfit):
        found = trajectories(episode, seat)
        sequences, views = sequences + len(found), views + len(found) - 1
        if wrong := list(_mask_faults(episode, seat, found)):
            faults += wrong
        else:
            # Each turn has an advantage of its own, so that one that is given to other tokens shows.
            samples += [Sample(one, tuple(turn.place + 1.0 for turn in one.turns)) for one in found]
    tokens = sum(len(step.reply.token_ids) for step in steps)
    return Audit(0, 0, len(steps), without_ids, decoded, tokens, sequences, views, tuple(faults)), samples


def _length_faults(reply: Reply) -> Iterator[str]:
    ids, log_probs = reply.token_ids, reply.log_probabilities
    if not reply.token_count == len(ids) == len(log_probs) > 0:
        yield f"lengths: token_count {reply.token_count}, {len(ids)} token ids, {len(log_probs)} log-probabilities"
    if not reply.prompt_token_ids:
        yield "lengths: the token ids of the prompt are missing"
    versions = reply.versions
    if versions and (len(versions) != len(ids) or sorted(versions) != list(versions) or versions[0] < reply.version):
        yield f"lengths: {len(ids)} token ids of version {reply.version} or later, in order, are of {list(versions)}"
    # JSON knows no NaN: a store has null in its place.
    if wrong := [value for value in log_probs if value is None or not -inf < value <= ROUNDING]:
        yield f"lengths: a log-probability is {wrong[0]}"


def _drift_faults(episode: Episode, place: int, tokenizer: PreTrainedTokenizerBase, vocabulary: str) -> Iterator[str]:
    earlier, reply = episode.transcript.steps[:place], episode.transcript.steps[place].reply
    if decode(tokenizer, reply.token_ids[:-1] if reply.finish == "end" else reply.token_ids) != reply.text:
        yield "drift: the text is not what the token ids read"
    prompt = _letters(reply.prompt_token_ids)
    heard = decode(tokenizer, reply.prompt_token_ids).split(episode.transcript.problem.statement)[-1]
    # What was not sampled with this tokenizer can only be shown as a text.
    shown = [step.reply.tokenizer != vocabulary or _letters(step.reply.token_ids) in prompt for step in earlier]
    longest_first = sorted(zip(earlier, shown, strict=True), key=lambda pair: -len(pair[0].text))
    for number, said in enumerate(step.reply.text for step in earlier):
        rest = heard
        for step, exactly in longest_first:
            if said in step.text:
                rest = rest.replace(f"{step.seat}: {step.text}", "\0")
                rest = rest.replace(step.reply.text, "\0") if exactly else rest
        if said.strip() and said in rest:
            yield f"drift: the prompt shows turn {number} in other token ids than those sampled"


def _letters(ids: Sequence[int]) -> str:
    """A letter for each token id: strings are quick to search for one another."""
    return "".join(map(chr, ids))


def _mask_faults(episode: Episode, seat: str, found: Sequence[Trajectory]) -> Iterator[str]:
    steps = [(place, step) for place, step in enumerate(episode.transcript.steps) if step.seat == seat]
    sampled = [(place, step, step.reply.prompt_token_ids, step.reply.token_ids) for place, step in steps]
    trained = [
        (turn.place, turn.step, one.sequence.token_ids[: turn.start], one.sequence.token_ids[turn.start : turn.end])
        for one in found
        for turn in one.turns
    ]
    if wrong := next((pair for pair in zip_longest(sampled, trained) if pair[0] != pair[1]), None):
        place = next(turn for turn in wrong if turn)[0]
        yield f"{episode.id}, turn {place} ({seat}): mask: trained is not what was sampled, once, after what was read"
    if any(one.sequence.said != tuple((turn.start, turn.end) for turn in one.turns) for one in found):
        yield f"{episode.id}, all turns ({seat}): mask: it is not where the turns are"


def _batch_faults(samples: Sequence[Sample]) -> Iterator[str]:
    """What the rules loss and weight find, for one seat."""
    samples = sorted(samples, key=lambda sample: len(sample.trajectory.sequence.token_ids))  # as the batch does
    settings, batch = LossSettings(aggregation="sample-mean"), Batch.of(samples, dtype=torch.float64)
    weights, plain, _ = token_weights(settings, batch.episodes, batch.control, batch.advantages)
    (micro,) = batch.micro_batches(len(samples))
    log_probs = torch.zeros(micro.inputs.shape, dtype=torch.float64, requires_grad=True)
    said = log_probs[micro.rows, micro.columns]
    loss = policy_loss(
        settings, said, said.detach(), batch.engine_log_probs, batch.advantages, batch.sequences, weights, plain
    )
    (gradient,) = torch.autograd.grad(loss, log_probs)
    weighed = dict.fromkeys((sample.trajectory.episode.id for sample in samples), 0.0)
    for sample, inputs, slopes in zip(samples, micro.inputs, gradient, strict=False):
        one, id = sample.trajectory, sample.trajectory.episode.id
        own = {
            token: advantage
            for turn, advantage in zip(one.turns, sample.advantages, strict=True)
            for token in enumerate(turn.step.reply.token_ids, start=len(turn.step.reply.prompt_token_ids))
        }
        columns = slopes.nonzero()[:, 0]
        tokens = zip(columns.tolist(), inputs[columns].tolist(), strict=True)
        pulled = dict(zip(tokens, slopes[columns].tolist(), strict=True))
        if wrong := own.keys() ^ pulled.keys():
            column = min(wrong)[0]
            place = next((turn.place for turn in one.turns if column < turn.end), one.turns[-1].place)
            yield f"{id}, turn {place} ({one.seat}): loss: the gradient is wrong at token {column} of the sequence"
        weighed[id] -= sum(pulled[token] / own[token] for token in own.keys() & pulled.keys())
    for id, weight in weighed.items():
        if not abs(weight - 1 / len(weighed)) <= 1e-9:
            seat = samples[0].trajectory.seat
            yield f"{id}, all turns ({seat}): weight: {weight:.6g} in a mean over {len(weighed)} episodes"


def main(folder: Path, tokenizer: Path | None = None, as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """Proves that what trains is exactly what was sampled, in each episode store in FOLDER; exit code 1 if it is not.

    With the folder of the run's tokenizer, it also proves that nothing was tokenised a second time.

    `as_json` prints the `Audit` as JSON.
    """
    try:
        reader = None if tokenizer is None else load_tokenizer(tokenizer)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot load a tokenizer from {tokenizer}: {error}") from None
    total, stores = Audit(), sorted(folder.rglob("episodes.jsonl"))
    for store in stores:
        found = audit(read_episodes(store), reader)
        where = "" if store.parent == folder else f"{store.parent.relative_to(folder)}: "
        total += replace(found, faults=tuple(where + fault for fault in found.faults))
    if not total.episodes:
        raise InputError(f"{folder} holds no episodes; name the folder of an episode store or of a training run")
    if reader is not None and not total.decoded_turns:
        raise InputError(f"no turn in {folder} was sampled with the tokenizer in {tokenizer}; name the run's own")
    if as_json:
        typer.echo(orjson.dumps(total, option=orjson.OPT_INDENT_2))
        raise typer.Exit(bool(total.faults))
    console, table = Console(), Table(title=f"{folder}, stores: {len(stores)}", title_justify="left", show_header=False)
    for field in fields(total)[:-1]:
        table.add_row(field.name.replace("_", " "), f"{getattr(total, field.name):>9,}")
    console.print(table)
    for fault in total.faults[:SHOWN]:
        console.print(fault, style="red", markup=False, highlight=False, soft_wrap=True)
    console.print(f"faults: {len(total.faults):,}", style="red" if total.faults else "green", highlight=False)
    raise typer.Exit(bool(total.faults))


if __name__ == "__main__":
    from turnwise.command import run

    run(main)
