"""What a run of episodes is worth, with intervals over problems, and what it is worth beside another."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from turnwise.analysis.statistics import Estimate, bootstrap, change, pass_at
from turnwise.environments.environment import Outcome
from turnwise.environments.episode import Episode
from turnwise.environments.transcript import Step
from turnwise.protocols.graph import GraphProtocol
from turnwise.protocols.protocol import ReasoningProtocol
from turnwise.protocols.rewards import Format
from turnwise.rl.summary import accuracy_efficiency_score, summarise, wilson

Table = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Figures over finished episodes; those that an exception ended are counted in `failed` and in nothing else.

    `samples` is how many each problem has, over all `seeds` (the fewest, where some failed). `accuracy` is avg@k: the
    mean over problems of the share of their samples that are right; `by_seed` the same for each seed. `pass_at` has
    pass@k for powers of two up to `samples`, and for `samples`. `tokens` are sampled tokens an episode, `seat_tokens`
    those of each seat, `tokens_per_right` those of all episodes over the number of right ones (None: nothing was
    right). `turns`, `think_share` and `outcomes` are as in a `Summary`. Of all turns but those that choose a mode,
    `cut_off` is the share that the token budget ended, and `seat_cut_off` that of each seat. Of all turns, `ill_formed`
    is the share that `breaks_form` finds fault with (None: the form is not known).
    """

    episodes: int
    failed: int
    problems: int
    samples: int
    seeds: tuple[int, ...]
    accuracy: Estimate
    by_seed: Mapping[int, float]
    pass_at: Mapping[int, Estimate]
    tokens: Estimate
    seat_tokens: Mapping[str, float]
    tokens_per_right: Estimate | None
    turns: float
    think_share: float | None
    outcomes: Mapping[Outcome, int]
    cut_off: float
    seat_cut_off: Mapping[str, float]
    ill_formed: float | None


@dataclass(frozen=True, slots=True)
class Difference:
    """What a run is worth beside the one called `baseline`: accuracy and tokens less its own, and AES against it.

    All of it is over the `problems` that both have met, each drawn with what both made of it (a paired bootstrap). AES
    is as in `turnwise.rl.summary.accuracy_efficiency_score`; None where the baseline got nothing right.
    """

    baseline: str
    problems: int
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
    cut_off = defaultdict[str, list[bool]](list)
    for step in steps:
        if step.state not in control:
            cut_off[step.seat].append(step.reply.finish == "length")
    ill_formed = None
    if isinstance(protocol, GraphProtocol):
        ill_formed = sum(breaks_form(protocol, step) for step in steps) / (len(steps) or 1)
    return Evaluation(
        episodes=summary.episodes,
        failed=summary.failed,
        problems=len(groups),
        samples=samples,
        seeds=tuple(sorted(by_seed)),
        accuracy=_share([fmean(one.right for one in group) for group in groups]),
        by_seed={seed: fmean(by_seed[seed]) for seed in sorted(by_seed)},
        pass_at={k: _share(shares) for k, shares in chances.items()},
        tokens=bootstrap(lambda sums: sums[..., 1] / sums[..., 2], table),
        seat_tokens=summary.seat_tokens,
        tokens_per_right=bootstrap(lambda sums: sums[..., 1] / sums[..., 0], table) if table[:, 0].any() else None,
        turns=summary.turns,
        think_share=summary.think_share,
        outcomes=summary.outcomes,
        cut_off=sum(map(sum, cut_off.values())) / (sum(map(len, cut_off.values())) or 1),
        seat_cut_off={seat: fmean(turns) for seat, turns in cut_off.items()},
        ill_formed=ill_formed,
    )


def difference(episodes: Sequence[Episode], base: Sequence[Episode], *, baseline: str) -> Difference:
    """A run beside a baseline, on those problems of which both have finished episodes.

    Raises ValueError where there are none.
    """
    ours, theirs = _by_id(episodes), _by_id(base)
    common = [id_ for id_ in ours if id_ in theirs]
    if not common:
        raise ValueError(f"the run and {baseline} have no problem in common")
    # Columns: our accuracy and tokens, 1 to count problems, and the same of the baseline.
    table = np.hstack([_table({id_: groups[id_] for id_ in common}) for groups in (ours, theirs)])

    def aes(sums: Table) -> Table:
        accuracy, tokens, _, base_accuracy, base_tokens, _ = np.moveaxis(sums, -1, 0)
        return accuracy_efficiency_score(accuracy, tokens, base_accuracy=base_accuracy, base_tokens=base_tokens)

    return Difference(
        baseline=baseline,
        problems=len(common),
        accuracy=change(table[:, 0], table[:, 3]),
        tokens=bootstrap(lambda sums: (sums[..., 1] - sums[..., 4]) / sums[..., 2], table),
        aes=bootstrap(aes, table) if table[:, 3].any() and table[:, 4].all() else None,
    )


def breaks_form(protocol: GraphProtocol, step: Step) -> bool:
    """Whether a turn that came to its own end has not the form that its protocol asks for.

    It ends at one of the closing tags that its state has, it holds the tag behind which its answer stands, and it is
    well formed by the terms that the protocol pays for form. A turn that the budget ended is cut off, and not counted
    here; but a choice of mode that chose none breaks the form.
    """
    state = protocol.graph.states[step.state]
    if step.reply.finish == "length" and step.state not in protocol.control_states:
        return False
    if state.closes and step.reply.stop is None:
        return True
    if state.answer_after not in step.text:
        return True
    forms = (weighted.term for weighted in protocol.reward.weighted)
    return any(isinstance(form, Format) and step.seat in form.tags and not form.well_formed(step) for form in forms)


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
