"""The next token of each row, and where a reply ends."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
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


def uniform(seeds: NDArray[np.uint64], positions: NDArray[np.uint64]) -> NDArray[np.float64]:
    """One number in [0, 1) per (seed, position): SplitMix64 (Steele et al. 2014), twice, as a counter's hash."""

    def mixed(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
        state = state + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return state ^ (state >> np.uint64(31))

    # 52 bits: the product with a sum of probabilities then stays below that sum in double precision.
    return (mixed(mixed(seeds) + positions) >> np.uint64(12)).astype(np.float64) * 2.0**-52


class Sampler:
    """Draws the next token of each row by inverting its distribution function at the row's own random number.

    A row's token depends on its seed, its position and its own logits, and so not on its batch. Temperature 0 is
    greedy, and its log-probabilities are those at temperature 1.
    """

    def __init__(
        self, seeds: Sequence[int], temperatures: Sequence[float], top_ps: Sequence[float], device: torch.device
    ) -> None:
        self._device = device
        self._seeds = np.array([seed % 2**64 for seed in seeds], dtype=np.uint64)
        self._tempered = any(temperature not in (0, 1) for temperature in temperatures)
        self._temperatures = torch.tensor([temperature or 1.0 for temperature in temperatures], device=device)[:, None]
        greedy = [temperature == 0 for temperature in temperatures]
        self._all_greedy, self._any_greedy = all(greedy), any(greedy)
        self._greedy = torch.tensor(greedy, device=device)
        nucleus = [index for index, top_p in enumerate(top_ps) if top_p < 1 and not greedy[index]]
        self._nucleus = torch.tensor(nucleus, dtype=torch.long, device=device)
        self._top_p = torch.tensor([top_ps[index] for index in nucleus], device=device)[:, None]

    def __call__(self, logits: torch.Tensor, positions: NDArray[np.uint64]) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [rows] and their log-probabilities [rows], for logits [rows, vocabulary]."""
        logits = logits.float()
        if self._tempered:
            logits = logits / self._temperatures
        if len(self._nucleus):
            logits = logits.index_copy(0, self._nucleus, self._within_top_p(logits[self._nucleus]))
        log_probabilities = logits.log_softmax(-1)
        if self._all_greedy:
            tokens = logits.argmax(-1)
        else:
            # In double precision, where a large vocabulary's running sum keeps its order and reaches 1.
            mass = log_probabilities.double().exp_().cumsum(-1)
            drawn = torch.from_numpy(uniform(self._seeds, positions)).to(self._device)[:, None] * mass[:, -1:]
            # The clamp only matters for logits that are not numbers, which the caller reports.
            tokens = torch.searchsorted(mass, drawn, right=True)[:, 0].clamp_(max=logits.shape[-1] - 1)
            if self._any_greedy:
                tokens = torch.where(self._greedy, logits.argmax(-1), tokens)
        return tokens, log_probabilities.gather(-1, tokens[:, None])[:, 0]

    def _within_top_p(self, logits: torch.Tensor) -> torch.Tensor:
        ordered, order = logits.sort(stable=True, dim=-1, descending=True)
        probabilities = ordered.softmax(-1)
        beyond = probabilities.cumsum(-1) - probabilities >= self._top_p
        beyond[:, 0] = False
        return logits.masked_fill(torch.zeros_like(beyond).scatter_(-1, order, beyond), -torch.inf)
