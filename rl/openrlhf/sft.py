"""Fine-tunes a model on a set by OpenRLHF's own supervised fine-tuning, in processes of its own."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import orjson
from pydantic import BaseModel, ConfigDict
from transformers import AutoConfig

from turnwise.agents.chat import ChatTemplate
from turnwise.agents.transformers_engine import checkpoint, load_tokenizer
from turnwise.environments.errors import InputError
from turnwise.rl.fine_tune import claim_fine_tuning
from turnwise.rl.openrlhf.installed import require_openrlhf
from turnwise.rl.openrlhf.settings import OpenRLHFSettings
from turnwise.rl.run_folder import write_whole
from turnwise.rl.sft import SFTSettings
from turnwise.rl.sft_sets import read_set

LOG, LOSSES, CHECKPOINT = "train_sft.log", "losses.jsonl", "checkpoint"


class Job(BaseModel):
    """What each rank is told, in a file."""

    model_config = ConfigDict(frozen=True)

    model: str
    data: Path
    settings: SFTSettings
    openrlhf: OpenRLHFSettings
    seed: int
    together: int
    longest: int
    folder: Path
    output: Path


def fine_tune_openrlhf(
    model: str | Path,
    data: Path,
    settings: SFTSettings,
    folder: Path,
    *,
    openrlhf: OpenRLHFSettings | None = None,
    seed: int = 0,
    together: int = 1,
    longest: int | None = None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Path:
    """Does what `turnwise.rl.fine_tune.fine_tune` does, on the ranks that `openrlhf` says: same rows, same loss.

    But for the warm-up, in which OpenRLHF's first learning rate is 0 where that of `fine_tune` is not. The checkpoint
    is in the precision that was trained in. What OpenRLHF says is in `train_sft.log`.

    Raises InputError as `fine_tune` does, where OpenRLHF is not installed, for batches that the ranks cannot divide,
    and where the training fails.
    """
    require_openrlhf()
    placed = openrlhf or OpenRLHFSettings()
    each = settings.micro_batch_size * placed.ranks
    if settings.batch_size % each:
        raise InputError(
            f"a batch must divide into the micro-batches of all ranks; got batch_size={settings.batch_size}, and "
            f"micro_batch_size={settings.micro_batch_size} on {placed.ranks} rank(s): ask for a multiple of {each}"
        )
    said = placed.model_dump_json(include={"ranks", "zero_stage", "precision"})
    claim_fine_tuning(
        model, data, settings, folder, seed=seed, together=together, longest=longest, also={"openrlhf": said}
    )
    trained = folder / "model"
    if trained.exists():
        return trained
    found = checkpoint(model)
    tokenizer = load_tokenizer(found)
    context = int(getattr(AutoConfig.from_pretrained(found), "max_position_embeddings", 2**31))
    longest = min(longest or context, context)
    if not read_set(data, ChatTemplate(tokenizer), longest=longest):
        raise InputError(f"{data} holds no rows to train on; write a set with some")

    def train(output: Path) -> None:
        job = Job(
            model=str(found.resolve() if isinstance(found, Path) else found), data=data.resolve(), settings=settings,
            openrlhf=placed, seed=seed, together=together, longest=longest, folder=folder.resolve(),
            output=output.resolve(),
        )  # fmt: skip
        _run(job, on_step)
        # OpenRLHF's is read by the rules of the model's type, which may not be the tokenizer's.
        tokenizer.save_pretrained(output)

    write_whole(trained, train)
    shutil.rmtree(folder / CHECKPOINT, ignore_errors=True)
    return trained


def _run(job: Job, on_step: Callable[[int, float], None]) -> None:
    """Starts the ranks, tells of each step, and waits for the end."""
    described, losses = job.folder / "job.json", job.folder / LOSSES
    described.write_text(job.model_dump_json())
    losses.unlink(missing_ok=True)
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(job.openrlhf.ranks)]
    command = [sys.executable, "-m", *launch, "-m", "turnwise.rl.openrlhf.sft_rank", str(described)]
    environment = dict(os.environ)
    if not job.openrlhf.gpus_per_rank:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    told = 0
    with (job.folder / LOG).open("w") as log:
        ranks = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            while True:
                ended = ranks.poll() is not None
                lines = losses.read_bytes().split(b"\n")[:-1] if losses.exists() else []
                for line in lines[told:]:
                    on_step(*orjson.loads(line))
                told = len(lines)
                if ended:
                    break
                time.sleep(0.2)
        finally:
            ranks.terminate()
            ranks.wait()
    described.unlink()
    if ranks.returncode:
        said = (job.folder / LOG).read_text(errors="replace")
        found = re.search(r"\w*(?:Error|Exception): .*", said)
        reason = found[0].strip() if found else f"it ended with code {ranks.returncode}"
        raise InputError(f"OpenRLHF's train_sft failed: {reason}; {job.folder / LOG} has all that it said")
