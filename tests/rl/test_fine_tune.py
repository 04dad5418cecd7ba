"""Fine-tuning in a folder: once, from where it was stopped, and never in the folder of another."""

from itertools import count
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from turnwise.agents.chat import ChatTemplate
from turnwise.agents.tiny import LONG, NOVICE
from turnwise.agents.transformers_engine import TransformersEngine, load_tokenizer
from turnwise.environments.errors import InputError
from turnwise.environments.problem import Problem
from turnwise.rl.fine_tune import fine_tune
from turnwise.rl.sft import SFTSettings
from turnwise.rl.sft_sets import paired_rows, write_set

SETTINGS = SFTSettings(steps=4, batch_size=4, learning_rate=1e-3, save_every=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("set") / "pairs.parquet"
    pairs = [(Problem(f"p{n}", f"What is 1+{n}?", ""), f"1+{n}={n + 1}</think>{n + 1}", f"{n + 1}") for n in range(9)]
    rows, _ = paired_rows(pairs, ChatTemplate(load_tokenizer(LONG)))
    write_set(path, rows)
    return path


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return found


def test_the_result_loads_and_is_single_precision_though_the_base_was_saved_in_half(data: Path, tmp_path: Path) -> None:
    losses = list[float]()
    model = fine_tune(NOVICE, data, SETTINGS, tmp_path / "run", on_step=lambda step, loss: losses.append(loss))
    assert model == tmp_path / "run" / "model"
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert {tensor.dtype for tensor in weights(model).values()} == {torch.float32}
    assert {tensor.dtype for tensor in weights(NOVICE).values()} == {torch.float16}
    assert TransformersEngine.load(model).template.fingerprint == TransformersEngine.load(NOVICE).template.fingerprint
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["model", "run.json"]


def test_stopped_anywhere_it_ends_as_if_it_never_was_and_done_it_is_done(data: Path, tmp_path: Path) -> None:
    whole = weights(fine_tune(NOVICE, data, SETTINGS, tmp_path / "whole"))

    class StoppedError(Exception):
        pass

    def stop_at_two(step: int, loss: float) -> None:
        if step == 3:
            raise StoppedError

    with pytest.raises(StoppedError):
        fine_tune(NOVICE, data, SETTINGS, tmp_path / "run", on_step=stop_at_two)
    steps = list[int]()
    resumed = weights(fine_tune(NOVICE, data, SETTINGS, tmp_path / "run", on_step=lambda step, _: steps.append(step)))
    assert steps == [3, 4]
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    asked = count()
    fine_tune(NOVICE, data, SETTINGS, tmp_path / "run", on_step=lambda step, loss: next(asked))
    assert next(asked) == 0


def test_the_folder_of_another_training_is_refused(data: Path, tmp_path: Path) -> None:
    fine_tune(NOVICE, data, SETTINGS, tmp_path / "run")
    with pytest.raises(InputError, match="model: "):
        fine_tune(LONG, data, SETTINGS, tmp_path / "run")
    with pytest.raises(InputError, match=r"settings: .*\"steps\":4.* there, .*\"steps\":5"):
        fine_tune(NOVICE, data, SETTINGS.model_copy(update={"steps": 5}), tmp_path / "run")
    with pytest.raises(
        InputError, match="order: 'seed 0, 1 together, all tokens' there, 'seed 1, 2 together, 40 tokens'"
    ):
        fine_tune(NOVICE, data, SETTINGS, tmp_path / "run", seed=1, together=2, longest=40)
    other = tmp_path / "other.parquet"
    other.write_bytes(data.read_bytes() + b"more")
    with pytest.raises(InputError, match="data: "):
        fine_tune(NOVICE, other, SETTINGS, tmp_path / "run")


def test_rows_are_clipped(data: Path, tmp_path: Path) -> None:
    whole = weights(fine_tune(NOVICE, data, SETTINGS, tmp_path / "whole"))
    clipped = weights(fine_tune(NOVICE, data, SETTINGS, tmp_path / "clipped", longest=14))
    assert any(not torch.equal(clipped[name], tensor) for name, tensor in whole.items())
    with pytest.raises(InputError, match="leaves none to train within 3"):
        fine_tune(NOVICE, data, SETTINGS, tmp_path / "none", longest=3)
