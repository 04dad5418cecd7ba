"""What a run of episodes is worth, with intervals over problems, and what it is worth beside another."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from turnwise.analysis.statistics import Estimate, bootstrap, pass_at
from turnwise.environments.episode import Episode
from turnwise.environments.transcript import Step
from turnwise.protocols.graph import GraphProtocol
from turnwise.protocols.protocol import ReasoningProtocol
from turnwise.protocols.rewards import Format
from turnwise.rl.summary import Summary, accuracy_efficiency_score, summarise, wilson

Table = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Figures over finished episodes; `summary` has those that need no interval.

    `samples` is how many each problem has, over all `seeds` (the fewest, where some failed). `accuracy` is avg@k: the
    mean over problems of the share of their samples that are right; `by_seed` the same for each seed. `pass_at` has
    pass@k for powers of two up to `samples`, and for `samples`. `tokens_per_right` is all sampled tokens over the
    number of right answers (None: nothing was right). Of all turns, `cut_off` is the share that the token budget ended,
    and `ill_formed` the share of the others that `breaks_form` finds fault with (None where the form is not known).
    """

    summary: Summary
    problems: int
    samples: int
    seeds: tuple[int, ...]
    accuracy: Estimate
    by_seed: Mapping[int, float]
    pass_at: Mapping[int, Estimate]
    tokens: Estimate
    tokens_per_right: Estimate | None
    cut_off: float
    ill_formed: float | None


@dataclass(frozen=True, slots=True)
class Difference:
    """What a run is worth beside the one called `baseline`: accuracy and tokens less its own, and AES against it.

    `paired` says that both met the same problems, which were then drawn together. AES is None where the baseline got
    nothing right.
    """

    baseline: str
    paired: bool
    accuracy: Estimate
    tokens: Estimate
    aes: Estimate | None


def evaluate(episodes: Iterable[Episode], protocol: ReasoningProtocol | None = None) -> Evaluation:
    """The figures of the episodes of one run, of all its seeds; `protocol` tells what form its turns should have.

    Raises ValueError where no episode finished.
    """
    everything = list(episodes)
    summary = summarise(everything)
    by_problem = _by_id(everything)
    groups, table = list(by_problem.values()), _table(by_problem)
    by_seed = defaultdict[int, list[bool]](list)
    for group in groups:
        for episode in group:
            by_seed[episode.seed].append(episode.right)
    samples = min(map(len, groups))
    ks = sorted({samples, *(2**power for power in range(1, 12) if 2**power <= samples)} - {1})
    chances = {k: [pass_at(k, len(group), sum(one.right for one in group)) for group in groups] for k in ks}
    steps = [step for group in groups for episode in group for step in episode.transcript.steps]
    control = protocol.control_states if protocol else frozenset[str]()
    cut_off = [step for step in steps if _cut_off(step, control)]
    ill_formed = None
    if isinstance(protocol, GraphProtocol):
        ill_formed = sum(breaks_form(protocol, step) for step in steps) / len(steps)
    return Evaluation(
        summary=summary,
        problems=len(groups),
        samples=samples,
        seeds=tuple(sorted(by_seed)),
        accuracy=_share([fmean(one.right for one in group) for group in groups]),
        by_seed={seed: fmean(by_seed[seed]) for seed in sorted(by_seed)},
        pass_at={k: _share(shares) for k, shares in chances.items()},
        tokens=bootstrap(lambda sums: sums[..., 1] / sums[..., 2], table),
        tokens_per_right=bootstrap(lambda sums: sums[..., 1] / sums[..., 0], table) if table[:, 0].any() else None,
        cut_off=len(cut_off) / len(steps),
        ill_formed=ill_formed,
    )


def difference(episodes: Sequence[Episode], base: Sequence[Episode], *, baseline: str) -> Difference:
    """A run beside a baseline, paired where both have finished episodes on the same problems."""
    ours, theirs = _by_id(episodes), _by_id(base)
    paired = ours.keys() == theirs.keys()
    if paired:
        groups = [np.hstack([_table(ours), _table({id_: theirs[id_] for id_ in ours})])]
    else:
        groups = [_table(ours), _table(theirs)]

    def means(sums: tuple[Table, ...]) -> tuple[Table, Table, Table, Table]:
        """Accuracy and tokens, ours and then theirs."""
        both = np.concatenate(sums, axis=-1)
        right, tokens, problems, base_right, base_tokens, base_problems = np.moveaxis(both, -1, 0)
        return right / problems, tokens / problems, base_right / base_problems, base_tokens / base_problems

    def accuracy(*sums: Table) -> Table:
        right, _, base_right, _ = means(sums)
        return right - base_right

    def tokens(*sums: Table) -> Table:
        _, tokens, _, base_tokens = means(sums)
        return tokens - base_tokens

    def aes(*sums: Table) -> Table:
        right, tokens, base_right, base_tokens = (np.atleast_1d(mean) for mean in means(sums))
        scores = [
            accuracy_efficiency_score(a, t, base_accuracy=b, base_tokens=n) if b and n else np.nan
            for a, t, b, n in zip(
                right.tolist(), tokens.tolist(), base_right.tolist(), base_tokens.tolist(), strict=True
            )
        ]
        return np.array(scores).reshape(sums[0].shape[:-1])

    anything_right = any(episode.right for episode in base)
    return Difference(
        baseline=baseline,
        paired=paired,
        accuracy=bootstrap(accuracy, *groups),
        tokens=bootstrap(tokens, *groups),
        aes=bootstrap(aes, *groups) if anything_right else None,
    )


def breaks_form(protocol: GraphProtocol, step: Step) -> bool:
    """Whether a turn that came to its own end has not the form that its protocol asks for.

    It ends at one of the closing tags that its state has, it holds the tag behind which its answer stands, and it is
    well formed by the terms that the protocol pays for form. A turn that the budget ended is cut off, and not counted
    here; but a choice of mode that chose none breaks the form.
    """
    state = protocol.graph.states[step.state]
    if _cut_off(step, protocol.control_states):
        return False
    if state.closes and step.reply.stop is None:
        return True
    if state.answer_after not in step.text:
        return True
    forms = (weighted.term for weighted in protocol.reward.weighted)
    return any(isinstance(form, Format) and step.seat in form.tags and not form.well_formed(step) for form in forms)


def _cut_off(step: Step, control_states: Collection[str]) -> bool:
    return step.reply.finish == "length" and step.state not in control_states


def _by_id(episodes: Iterable[Episode]) -> dict[str, list[Episode]]:
    groups = defaultdict[str, list[Episode]](list)
    for episode in episodes:
        if episode.grade is not None:
            groups[episode.transcript.problem.id].append(episode)
    return dict(groups)


def _table(groups: Mapping[str, Sequence[Episode]]) -> Table:
    """A row for each problem: the share of its samples that are right, their mean tokens, and 1, to count problems."""
    return np.array(
        [
            (fmean(e.right for e in group), fmean(e.transcript.token_count for e in group), 1.0)
            for group in groups.values()
        ]
    )


def _share(shares: Sequence[float]) -> Estimate:
    """The mean of a share in [0, 1] over problems.

    Where all of them are 0, or all 1, drawing them again tells nothing: then the interval is Wilson's.
    """
    if len(set(shares)) == 1 and shares[0] in (0.0, 1.0):
        return Estimate(shares[0], *wilson(round(shares[0]) * len(shares), len(shares)))
    return bootstrap(lambda sums: sums[..., 0] / sums[..., 1], np.column_stack([shares, np.ones(len(shares))]))
