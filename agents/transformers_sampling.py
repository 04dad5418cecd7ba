"""The next token of each row, and where a reply ends."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase


class StopMatcher:
    """Finds the first closing tag as tokens arrive.

    A tag that was added to the tokenizer as a token is found by its id alone. Any other is found in the text, since it
    may span tokens, and may be followed by other characters within its last one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> None:
        added = tokenizer.get_added_vocab()
        self._by_id = {added[stop]: stop for stop in stops if stop in added}
        self._by_text = [stop for stop in stops if stop not in added]
        # A token decodes to at least one byte, so a tag's text lies within so many last tokens.
        self._reach = max((len(stop.encode()) for stop in self._by_text), default=0)
        self._last = {stop[-1] for stop in self._by_text} | {"\N{REPLACEMENT CHARACTER}"}
        self._may_end: dict[int, bool] = {}
        self._tokenizer = tokenizer

    def match(self, ids: Sequence[int]) -> str | None:
        """The tag that the last of `ids` completes; where it completes several, the one that ends first."""
        if not self._by_text or not self._may_complete(ids[-1]):
            return self._by_id.get(ids[-1])
        tail = decode(self._tokenizer, ids[-self._reach :])
        found = [(tail.find(stop) + len(stop), stop) for stop in self._by_text if stop in tail]
        return min(found)[1] if found else self._by_id.get(ids[-1])

    def _may_complete(self, token: int) -> bool:
        """Whether the token's own text has the last character of a tag: spares nearly all decoding of the tail."""
        if token not in self._may_end:
            piece = decode(self._tokenizer, [token])
            # Some tokenizers drop a space where a text begins.
            self._may_end[token] = any(last in piece or last.isspace() for last in self._last)
        return self._may_end[token]


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of `ids` as sampled: with special tokens, and with its spaces left alone."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


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
