"""The next token of each row."""

from collections.abc import Sequence

import torch

GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mixed(state: torch.Tensor) -> torch.Tensor:
    """The output function of SplitMix64 (Steele, Lea and Flood 2014), on int64 read as unsigned; in place."""
    for shift, factor in ((30, FIRST), (27, SECOND)):
        state ^= _shifted(state, shift)
        state *= factor - 2**64
    state ^= _shifted(state, 31)
    return state


def _shifted(state: torch.Tensor, shift: int) -> torch.Tensor:
    # torch shifts signed numbers arithmetically: the sign that it draws in is masked out.
    return (state >> shift).bitwise_and_(2 ** (64 - shift) - 1)


def exponential(seeds: torch.Tensor, positions: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Exponentially distributed numbers [rows, vocabulary], a function of seed [rows], position [rows] and column.

    Seeds and positions are int64. Each row is the SplitMix64 sequence whose seed is the hash of the two.
    """
    rows = mixed(mixed(seeds.clone()) + positions)
    columns = torch.arange(1, vocabulary + 1, device=seeds.device) * (GOLDEN - 2**64)
    bits = _shifted(mixed(rows[:, None] + columns), 11)
    # From 53 bits, as a float that keeps its relative precision near 0, where the smallest of a row decides.
    return bits.float().add_(0.5).mul_(-(2.0**-53)).log1p_().neg_()


class Sampler:
    """Draws the next token of each row, as the winner of an exponential race: the smallest noise / probability.

    A row's noise depends on its seed and position alone, and so not on its batch. Unlike the inversion of a
    distribution function, the race hardly minds the last bits of the logits, which do depend on the batch: only a tie
    can change its winner. Temperature 0 is greedy, and its log-probabilities are those at temperature 1.
    """

    def __init__(
        self, seeds: Sequence[int], temperatures: Sequence[float], top_ps: Sequence[float], device: torch.device
    ) -> None:
        signed = [(seed + 2**63) % 2**64 - 2**63 for seed in seeds]
        self._seeds = torch.tensor(signed, dtype=torch.long, device=device)
        self._tempered = any(temperature not in (0, 1) for temperature in temperatures)
        self._temperatures = torch.tensor([temperature or 1.0 for temperature in temperatures], device=device)[:, None]
        greedy = [temperature == 0 for temperature in temperatures]
        self._all_greedy, self._any_greedy = all(greedy), any(greedy)
        self._greedy = torch.tensor(greedy, device=device)[:, None]
        nucleus = [index for index, top_p in enumerate(top_ps) if top_p < 1 and not greedy[index]]
        self._nucleus = torch.tensor(nucleus, dtype=torch.long, device=device)
        self._top_p = torch.tensor([top_ps[index] for index in nucleus], device=device)[:, None]

    def __call__(self, logits: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [rows] and their log-probabilities [rows], for logits [rows, vocabulary] and positions [rows]."""
        logits = logits.float()
        if self._tempered:
            logits = logits / self._temperatures
        if len(self._nucleus):
            logits = logits.index_copy(0, self._nucleus, self._within_top_p(logits[self._nucleus]))
        log_probabilities = logits.log_softmax(-1)
        race = log_probabilities
        if not self._all_greedy:
            noise = exponential(self._seeds, positions, logits.shape[-1]).log_()
            race = race - (noise.masked_fill_(self._greedy, 0.0) if self._any_greedy else noise)
        tokens = race.argmax(-1)
        return tokens, log_probabilities.gather(-1, tokens[:, None])[:, 0]

    def _within_top_p(self, logits: torch.Tensor) -> torch.Tensor:
        ordered, order = logits.sort(stable=True, dim=-1, descending=True)
        probabilities = ordered.softmax(-1)
        beyond = probabilities.cumsum(-1) - probabilities >= self._top_p
        beyond[:, 0] = False
        return logits.masked_fill(torch.zeros_like(beyond).scatter_(-1, order, beyond), -torch.inf)
