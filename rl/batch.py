"""What a policy learns from in one optimiser step, as flat tensors with one entry a trained token."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from turnwise.rl.advantage import Sample

Tokens = Float[torch.Tensor, " tokens"]
Flags = Bool[torch.Tensor, " tokens"]
Numbers = Int[torch.Tensor, " tokens"]


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences in order of length, and for each trained token of each of them, in order:

    the number of its sequence and of its episode, its place in the sequence (`columns`), its advantage, the engine's
    log-probability, and whether it is a control token. `modes` names, for each control token alone, the closing tag of
    its turn, which is the mode it chose ("other" where no tag closed it).
    """

    token_ids: tuple[tuple[int, ...], ...]
    sequences: Numbers
    episodes: Numbers
    columns: Numbers
    advantages: Tokens
    engine_log_probs: Tokens
    control: Flags
    modes: tuple[str, ...]

    @classmethod
    def of(
        cls,
        samples: Sequence[Sample],
        *,
        control_states: Collection[str] = (),
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "Batch":
        """The batch of some samples of one policy. An episode's tokens count together, whichever seat said them."""
        ordered = sorted(samples, key=lambda sample: len(sample.trajectory.sequence.token_ids))
        known: dict[str, int] = {}
        sequences, episodes, columns, control = list[int](), list[int](), list[int](), list[bool]()
        advantages, log_probs, modes = list[float](), list[float](), list[str]()
        for number, sample in enumerate(ordered):
            episode = known.setdefault(sample.trajectory.episode.id, len(known))
            for turn, advantage in zip(sample.trajectory.turns, sample.advantages, strict=True):
                size = turn.end - turn.start
                sequences += [number] * size
                episodes += [episode] * size
                columns += range(turn.start, turn.end)
                advantages += [advantage] * size
                log_probs += turn.step.reply.log_probabilities
                chooses = turn.step.state in control_states
                control += [chooses] * size
                modes += [turn.step.reply.stop or "other"] * size if chooses else []
        return cls(
            token_ids=tuple(sample.trajectory.sequence.token_ids for sample in ordered),
            sequences=torch.tensor(sequences, dtype=torch.long, device=device),
            episodes=torch.tensor(episodes, dtype=torch.long, device=device),
            columns=torch.tensor(columns, dtype=torch.long, device=device),
            advantages=torch.tensor(advantages, dtype=dtype, device=device),
            engine_log_probs=torch.tensor(log_probs, dtype=dtype, device=device),
            control=torch.tensor(control, dtype=torch.bool, device=device),
            modes=tuple(modes),
        )

    def micro_batches(self, size: int, *, skip: Flags | None = None) -> Iterator["MicroBatch"]:
        """The batch, at most `size` sequences at a time, of like length. Sequences of which `skip` holds every token
        are left out.
        """
        lengths = torch.bincount(self.sequences, minlength=len(self.token_ids))
        wanted = lengths > 0
        if skip is not None:
            wanted &= torch.bincount(self.sequences[~skip], minlength=len(self.token_ids)) > 0
        found = wanted.nonzero().flatten()
        for start in range(0, len(found), size):
            numbers = found[start : start + size]
            tokens = torch.isin(self.sequences, numbers).nonzero().flatten()
            rows = torch.searchsorted(numbers, self.sequences[tokens])
            inputs = [torch.tensor(self.token_ids[number]) for number in numbers.tolist()]
            # Padding stands on the right, where causal attention never lets a trained token see it.
            padded = pad_sequence(inputs, batch_first=True).to(self.sequences.device)
            yield MicroBatch(padded, tokens, rows, self.columns[tokens])


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Some sequences of a batch, padded, and where their trained tokens stand in the batch and in `inputs`."""

    inputs: Int[torch.Tensor, "sequences length"]
    tokens: Numbers
    rows: Numbers
    columns: Numbers

    def logits(self, model: PreTrainedModel, temperature: float) -> Float[torch.Tensor, "tokens vocabulary"]:
        """The logits that each trained token was drawn from, in single precision or better, at `temperature`."""
        before, places = torch.unique(self.columns - 1, return_inverse=True)  # after no other token are logits needed
        output = model(input_ids=self.inputs, use_cache=False, logits_to_keep=before).logits
        logits: torch.Tensor = output[self.rows, places].to(torch.promote_types(output.dtype, torch.float32))
        return logits if temperature == 1 else logits / temperature

    def log_probs(self, logits: Float[torch.Tensor, "tokens vocabulary"]) -> Tokens:
        """The log-probability of each trained token."""
        said = self.inputs[self.rows, self.columns]
        return logits.log_softmax(-1).gather(-1, said[:, None])[:, 0]
