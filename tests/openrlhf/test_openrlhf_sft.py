"""OpenRLHF's supervised fine-tuning on the sets of turnwise, against turnwise's own."""

import inspect
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from turnwise.agents.chat import ChatTemplate
from turnwise.agents.tiny import NOVICE
from turnwise.agents.transformers_agent import TransformersAgent, TransformersEngine
from turnwise.agents.transformers_engine import load_tokenizer
from turnwise.environments.arithmetic import arithmetic
from turnwise.environments.errors import InputError
from turnwise.environments.math_grader import MathGrader
from turnwise.environments.problem import Problem
from turnwise.protocols.thinkless import Thinkless
from turnwise.rl.fine_tune import fine_tune
from turnwise.rl.openrlhf.settings import OpenRLHFSettings
from turnwise.rl.rollout import play
from turnwise.rl.sft import SFTSettings
from turnwise.rl.sft_sets import paired_rows, read_set, write_set

pytest.importorskip("deepspeed", reason="needs OpenRLHF: make openrlhf")

from datasets import Dataset

from turnwise.rl.openrlhf.sft import LOSSES, fine_tune_openrlhf
from turnwise.rl.openrlhf.sft_rank import Rows, SFTStrategy, Trainer, train_sft

# Without a warm-up, in which the two differ.
SETTINGS = SFTSettings(steps=4, batch_size=8, micro_batch_size=2, learning_rate=1e-3, warmup=0.0, save_every=1)
ON_CPU = OpenRLHFSettings(gpus_per_rank=0, precision="fp32", gpus_per_actor=0)
TEMPLATE = ChatTemplate(load_tokenizer(NOVICE))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("set") / "pairs.parquet"
    pairs = [(Problem(f"p{n}", f"What is 1+{n}?", ""), f"1+{n}={n + 1}</think>{n + 1}", f"{n + 1}") for n in range(9)]
    rows, _ = paired_rows(pairs, TEMPLATE)
    write_set(path, rows)
    return path


@pytest.fixture(scope="module")
def embedded(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    losses = list[float]()
    folder = tmp_path_factory.mktemp("embedded")
    return fine_tune(NOVICE, data, SETTINGS, folder, together=2, on_step=lambda _, loss: losses.append(loss)), losses


def assert_equal(found: Path, expected: Path) -> None:
    mine, theirs = load_file(found / "model.safetensors"), load_file(expected / "model.safetensors")
    assert mine.keys() == theirs.keys()
    for name, weight in mine.items():
        assert weight.dtype == torch.float32
        torch.testing.assert_close(
            weight, theirs[name], atol=1e-5, rtol=1e-4, msg=lambda told, name=name: f"{name}: {told}"
        )


def test_it_learns_what_turnwise_alone_would_and_the_result_plays(
    data: Path, embedded: tuple[Path, list[float]], tmp_path: Path
) -> None:
    steps, losses = list[int](), list[float]()

    def on_step(step: int, loss: float) -> None:
        steps.append(step)
        losses.append(loss)

    model = fine_tune_openrlhf(NOVICE, data, SETTINGS, tmp_path, openrlhf=ON_CPU, together=2, on_step=on_step)
    assert model == tmp_path / "model"
    assert steps == [1, 2, 3, 4]
    assert losses == pytest.approx(embedded[1], rel=1e-4)
    assert losses[-1] < losses[0]
    assert_equal(model, embedded[0])
    engine = TransformersEngine.load(model)
    assert engine.template.fingerprint == TEMPLATE.fingerprint
    with MathGrader() as grader:
        team = {"solver": TransformersAgent(engine)}
        episodes = play(Thinkless(mode="short"), team, arithmetic(grader, count=2))
    assert all(episode.grade is not None for episode in episodes)
    done = fine_tune_openrlhf(NOVICE, data, SETTINGS, tmp_path, openrlhf=ON_CPU, together=2, on_step=on_step)
    assert (done, len(steps)) == (model, 4)


def test_on_two_ranks_and_stopped_it_goes_on_from_its_checkpoint_to_the_same_end(
    data: Path, embedded: tuple[Path, list[float]], tmp_path: Path
) -> None:
    class StoppedError(Exception):
        pass

    def stop(step: int, loss: float) -> None:
        raise StoppedError

    two = ON_CPU.model_copy(update={"ranks": 2, "zero_stage": 3})
    with pytest.raises(StoppedError):
        fine_tune_openrlhf(NOVICE, data, SETTINGS, tmp_path, openrlhf=two, together=2, on_step=stop)
    assert not (tmp_path / "model").exists()
    steps = list[int]()
    model = fine_tune_openrlhf(
        NOVICE, data, SETTINGS, tmp_path, openrlhf=two, together=2, on_step=lambda step, _: steps.append(step)
    )
    assert 1 not in steps
    assert steps[-1] == 4 or not steps
    assert_equal(model, embedded[0])


def test_a_row_is_trained_on_its_labels_and_on_nothing_else(data: Path) -> None:
    table = Dataset.from_parquet(str(data), keep_in_memory=True)
    (expected,) = read_set(data, TEMPLATE)[3:4]
    ids, attended, trained = Rows(table, TEMPLATE.tokenizer, 4096, [0, 3])[1]
    assert ids.tolist() == [list(expected.token_ids)]
    assert attended.tolist() == [[1] * len(expected.token_ids)]
    # The mask is of the tokens that predict: one place before those that are predicted, and never the last.
    assert trained.tolist() == [[*map(float, expected.mask[1:]), 0.0]]
    ids, _, trained = Rows(table, TEMPLATE.tokenizer, len(expected.token_ids) - 1, [3])[0]
    assert ids.tolist() == [list(expected.token_ids[:-1])]
    assert trained.tolist() == [[*map(float, expected.mask[1:-1]), 0.0]]


def test_a_training_that_fails_is_one_line_with_its_reason(data: Path, tmp_path: Path) -> None:
    broken = tmp_path / "model"
    shutil.copytree(NOVICE, broken)
    (broken / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(InputError, match=r"train_sft failed: .*Error.*train_sft\.log has all") as raised:
        fine_tune_openrlhf(broken, data, SETTINGS, tmp_path / "run", openrlhf=ON_CPU)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run" / "model").exists()


def test_bad_input_starts_no_process(data: Path, tmp_path: Path) -> None:
    three = ON_CPU.model_copy(update={"ranks": 3})
    with pytest.raises(InputError, match=r"batch_size=8, and micro_batch_size=2 on 3 rank.* a multiple of 6$"):
        fine_tune_openrlhf(NOVICE, data, SETTINGS, tmp_path / "run", openrlhf=three)
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="leaves none to train within 3"):
        fine_tune_openrlhf(NOVICE, data, SETTINGS, tmp_path / "run", openrlhf=ON_CPU, longest=3)
    assert not (tmp_path / "run" / LOSSES).exists()
    described = json.loads((tmp_path / "run" / "run.json").read_text())
    assert described["openrlhf"] == '{"ranks":1,"zero_stage":2,"precision":"fp32"}'


def test_what_is_replaced_in_openrlhf_is_what_it_was() -> None:
    theirs = inspect.getsource(train_sft.train)
    for called in ("get_strategy(args)", "SFTDataset(\n", "SFTTrainer(\n", "strategy.setup_dataloader(\n"):
        assert called in theirs, called
    for mine in (SFTStrategy.setup_dataloader, Trainer.save_logs_and_checkpoints):
        base = {SFTStrategy: SFTStrategy.__mro__[2], Trainer: Trainer.__mro__[1]}
        owner = SFTStrategy if mine is SFTStrategy.setup_dataloader else Trainer
        original = getattr(base[owner], mine.__name__)
        given = [name for name, p in inspect.signature(mine).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert list(inspect.signature(original).parameters)[: len(given)] == given
    assert list(inspect.signature(Rows.__mro__[1].__init__).parameters)[:4] == [
        "self",
        "dataset",
        "tokenizer",
        "max_length",
    ]
