"""One rank of OpenRLHF's supervised fine-tuning: `python -m turnwise.rl.openrlhf.sft_rank JOB`, as torchrun starts it.

`openrlhf.cli.train_sft.train` runs as it is, with three of its names replaced by subclasses: the data set gives the
token ids and labels of `turnwise.rl.sft_sets` as they stand (OpenRLHF's own would tokenise texts anew, end them with a
space and the end of sequence, and train those, too), the strategy has torch's AdamW and keeps the rows in order, and
the trainer writes down its losses.
"""

import math
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import orjson
import torch

from turnwise.rl.openrlhf.actors import Strategy
from turnwise.rl.openrlhf.arguments import command_line
from turnwise.rl.openrlhf.names import DeepspeedStrategy
from turnwise.rl.openrlhf.sft import CHECKPOINT, LOSSES, Job
from turnwise.rl.sft import UNTRAINED
from turnwise.rl.sft_sets import shuffled

# Behind `names`, which makes it possible.
from openrlhf.cli import train_sft  # isort: skip
from openrlhf.utils.config import hierarchize  # isort: skip


class Rows(train_sft.SFTDataset):  # type: ignore[misc]
    """So many rows of a set in the order of `shuffled`, as tokens and what of them is trained."""

    def __init__(
        self, dataset: Sequence[dict[str, list[int]]], tokenizer: object, max_length: int, order: Sequence[int]
    ) -> None:
        self.rows, self.tokenizer, self.max_length, self.order = dataset, tokenizer, max_length, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token ids, what is no padding, and where the *next* token is trained."""
        row = self.rows[self.order[place]]
        ids = torch.tensor([row["input_ids"][: self.max_length]])
        trained = torch.tensor([row["labels"][: self.max_length]]) != UNTRAINED
        return ids, torch.ones_like(ids), torch.roll(trained, -1).float()


class SFTStrategy(Strategy):
    """DeepSpeed with the optimiser of `turnwise.rl.sft`, which is given the rows in the order that they have."""

    def __init__(self, arguments: SimpleNamespace) -> None:
        DeepspeedStrategy.__init__(
            self, seed=arguments.train.seed, max_norm=arguments.max_norm,
            micro_train_batch_size=arguments.train.micro_batch_size, train_batch_size=arguments.train.batch_size,
            zero_stage=arguments.ds.zero_stage, args=arguments,
        )  # fmt: skip

    def setup_dataloader(
        self, replay_buffer: object, batch_size: int, pin_memory: bool = False, shuffle: bool = True, *others: object,
        **named: object,
    ) -> object:  # fmt: skip
        """OpenRLHF would shuffle them."""
        pinned = torch.cuda.is_available()
        return super().setup_dataloader(replay_buffer, batch_size, pinned, False, *others, **named)


class Trainer(train_sft.SFTTrainer):  # type: ignore[misc]
    """Writes the loss of each step into a file, and stops where it is not finite."""

    losses: Path

    def save_logs_and_checkpoints(
        self, args: SimpleNamespace, global_step: int, step_bar: object, logs_dict: dict[str, float] | None = None,
        client_states: dict[str, int] | None = None,
    ) -> None:  # fmt: skip
        """After each optimiser step."""
        loss = float(self.strategy.all_reduce({"loss": (logs_dict or {})["loss_mean"]})["loss"])
        if not math.isfinite(loss):
            raise ArithmeticError(
                f"the loss must be finite, and is {loss} at step {global_step}: lower the learning rate"
            )
        super().save_logs_and_checkpoints(args, global_step, step_bar, logs_dict, client_states)
        if self.strategy.is_rank_0():
            with self.losses.open("ab") as file:
                file.write(orjson.dumps([global_step, loss]) + b"\n")


def sft_arguments(job: Job) -> SimpleNamespace:
    """OpenRLHF's nested arguments: the defaults of its command line, but for what the job says."""
    settings, openrlhf = job.settings, job.openrlhf
    flags: dict[str, object] = {
        "model.model_name_or_path": job.model,
        "data.dataset": job.data,
        "data.max_len": job.longest,
        "train.seed": job.seed,
        "train.max_epochs": 1,
        "train.batch_size": settings.batch_size,
        "train.micro_batch_size": settings.micro_batch_size,
        "adam.lr": settings.learning_rate,
        "adam.weight_decay": settings.weight_decay,
        "lr_warmup_ratio": settings.warmup,
        "max_norm": settings.clip,
        "ds.zero_stage": openrlhf.zero_stage,
        "ds.attn_implementation": openrlhf.attention,
        "ckpt.path": job.folder / CHECKPOINT,
        "ckpt.save_steps": settings.save_every,
        "ckpt.max_num": 2,  # the older one goes before a newer one is whole
        "ckpt.output_dir": job.output,
    }
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    words += ["--adam.betas", *map(str, settings.betas), "--ckpt.load_enable"]
    if openrlhf.gradient_checkpointing:
        words.append("--model.gradient_checkpointing_enable")
    arguments: SimpleNamespace = hierarchize(command_line(train_sft.__name__).parse_args(words))
    # Not among the choices of the flag, which are of half precision.
    arguments.ds.param_dtype = openrlhf.precision
    return arguments


def main() -> None:
    """Trains."""
    job = Job.model_validate_json(Path(sys.argv[1]).read_text())
    number = job.settings.steps * job.settings.batch_size

    def rows(
        dataset: Sequence[dict[str, list[int]]], tokenizer: object, max_length: int, *_: object, **__: object
    ) -> Rows:
        order = list(islice(shuffled(range(len(dataset)), seed=job.seed, together=job.together), number))
        return Rows(dataset, tokenizer, max_length, order)

    Trainer.losses = job.folder / LOSSES
    train_sft.get_strategy, train_sft.SFTDataset, train_sft.SFTTrainer = SFTStrategy, rows, Trainer
    train_sft.train(sft_arguments(job))


if __name__ == "__main__":
    main()
