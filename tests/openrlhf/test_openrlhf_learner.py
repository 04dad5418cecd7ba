"""A policy that learns on OpenRLHF, with its Ray actors, its trainer and DeepSpeed: it learns what `Learner` does.

Of an Adam step each weight gets about the learning rate, however small its gradient; where that is within the rounding
of zero, so is its share. Two implementations that add up in another order thus differ by up to half a step in a few
weights of a thousand: hence the learning rate here, and the comparison of the whole change with the whole difference.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

pytest.importorskip("deepspeed", reason="needs OpenRLHF: make openrlhf")

import ray
from ray.cluster_utils import Cluster

from turnwise.agents.tiny import LONG, ROUTER, SHORT
from turnwise.agents.transformers_agent import TransformersEngine
from turnwise.environments.errors import InputError
from turnwise.protocols.thinkless import Thinkless
from turnwise.rl.advantage import Sample
from turnwise.rl.learner import Learner, LearnerSettings
from turnwise.rl.loss import LossSettings
from turnwise.rl.openrlhf.learner import OpenRLHFLearner
from turnwise.rl.openrlhf.settings import OpenRLHFSettings
from turnwise.rl.trained_policy import PolicyDiedError

# What Ray says when it starts, and the files and processes that it leaves to the garbage collector when it ends.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Tip. In future versions of Ray:FutureWarning"),
    pytest.mark.filterwarnings("ignore:(unclosed file.*/dev/null|subprocess \\d+ is still running):ResourceWarning"),
]

# The workers of Ray have the function below by value: they cannot import a test.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

CONTROL = Thinkless().control_states
LEARNING_RATE = 1e-5


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two nodes, as Ray has it, of two CPUs each."""
    node = {"num_cpus": 2, "num_gpus": 0, "object_store_memory": 100_000_000}
    nodes = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    nodes.add_node(**node)
    ray.init(address=nodes.address, log_to_driver=False)
    yield
    ray.shutdown()
    nodes.shutdown()


def load(path: Path) -> TransformersEngine:
    return TransformersEngine.load(path, device="cpu", dtype=torch.float32)


def settings(**chosen: object) -> LearnerSettings:
    """The keys of a loss stand beside those of the learner."""
    loss = {key: chosen.pop(key) for key in list(chosen) if key in LossSettings.model_fields}
    defaults = {"learning_rate": LEARNING_RATE, "micro_batch_size": 3}
    return LearnerSettings.model_validate({**defaults, **chosen, "loss": loss})


class Pair:
    """One policy twice: as `Learner` has it, and on OpenRLHF."""

    def __init__(
        self,
        model: Path,
        chosen: LearnerSettings,
        *,
        reference: Path | None = None,
        temperature: float = 1.0,
        updates: int = 5,
        **openrlhf: object,
    ) -> None:
        near = None if reference is None else load(reference).model
        self.embedded = Learner(load(model).model, chosen, updates=updates, temperature=temperature, reference=near)
        self.before = weights(self.embedded)
        self.openrlhf = OpenRLHFLearner(
            model, chosen, updates=updates, temperature=temperature, reference=reference, openrlhf=on_cpu(**openrlhf)
        )

    def __enter__(self) -> "Pair":
        return self

    def __exit__(self, *_: object) -> None:
        self.openrlhf.close()

    def update(self, samples: Sequence[Sample], *, tolerance: float = 1e-5) -> dict[str, float]:
        """All that is logged agrees."""
        expected = self.embedded.update(samples, control_states=CONTROL)
        found = self.openrlhf.update(samples, control_states=CONTROL)
        assert list(found) == list(expected)
        assert found == pytest.approx(expected, rel=tolerance, abs=1e-6)
        assert self.openrlhf.version == self.embedded.version
        return expected

    def differences(self) -> tuple[float, float]:
        """The largest of any weight, and that of all over what was learnt."""
        expected, found = weights(self.embedded), self.openrlhf.weights()
        assert found.keys() == expected.keys()
        parted = flat({name: found[name] - weight for name, weight in expected.items()})
        moved = flat({name: weight - self.before[name] for name, weight in expected.items()})
        return float(parted.abs().max()), float(parted.norm() / moved.norm())


def on_cpu(**chosen: object) -> OpenRLHFSettings:
    return OpenRLHFSettings.model_validate({"gpus_per_rank": 0, "precision": "fp32", **chosen})


def weights(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in learner.model.state_dict().items()}


def flat(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([weight.flatten() for weight in state.values()])


def test_without_ray_it_says_so() -> None:
    with pytest.raises(InputError, match=r"needs Ray, which is not running: call ray\.init\(\) first"):
        OpenRLHFLearner(LONG, settings(), updates=1)


@pytest.mark.parametrize(
    ("aggregation", "ranks"),
    [("sample-mean", 3), *product(("sample-mean", "token-mean", "degrpo", "degrpo-token-mean"), (1, 2))],
)
def test_one_update_is_that_of_the_embedded_learner(
    cluster: None, routed: list[Sample], aggregation: str, ranks: int
) -> None:
    with Pair(ROUTER, settings(aggregation=aggregation, alpha=0.5), ranks=ranks, zero_stage=ranks) as pair:
        pair.update(routed)
        largest, share = pair.differences()
        nodes = ray.util.placement_group_table(pair.openrlhf._place)["bundles_to_node_id"]
        assert len(set(nodes.values())) == (2 if ranks == 3 else 1)
    assert largest < 1e-5
    assert share < 0.01


@pytest.mark.parametrize("ranks", [1, 2])
def test_so_it_is_near_a_reference_that_is_another_model(cluster: None, turns: list[Sample], ranks: int) -> None:
    with Pair(LONG, settings(kl_coefficient=0.5), reference=SHORT, ranks=ranks) as pair:
        assert pair.update(turns)["kl"] > 0.1
        largest, share = pair.differences()
    assert largest < 1e-5
    assert share < 0.01


EVERYTHING = {
    "aggregation": "degrpo", "balance": 0.3, "ratio": "sequence", "clip_low": 0.002, "clip_high": 0.003,
    "dual_clip": 1.01, "importance_cap": 1.02, "kl_coefficient": 0.1, "kl": "k2", "entropy_coefficient": 0.01,
}  # fmt: skip


@pytest.mark.parametrize("stage", [2, 3])
def test_so_it_is_with_all_other_terms_away_from_the_policy_that_was_sampled(
    cluster: None, routed: list[Sample], stage: int
) -> None:
    """Two updates of three steps each, at another temperature than 1, by a schedule, clipped."""
    chosen = settings(
        **EVERYTHING, learning_rate=1e-3, schedule="cosine", warmup=2, betas=(0.8, 0.9), weight_decay=0.5, clip=0.1,
        mini_batches=3, micro_batch_size=2,
    )  # fmt: skip
    with Pair(ROUTER, chosen, reference=LONG, temperature=0.7, updates=3, ranks=2, zero_stage=stage) as pair:
        first = pair.update(routed, tolerance=1e-3)
        # As its engines would have it, if it stood on their GPUs.
        pair.openrlhf.offload()
        pair.openrlhf.reload()
        second = pair.update(routed, tolerance=1e-2)
        assert second["clipped"] > 0.05
        assert first["gradient_norm"] > 1.5 * chosen.clip
        assert first["learning_rate"] < second["learning_rate"]
        _, share = pair.differences()
    assert share < 0.02


def weights_while_it_learns(learner: OpenRLHFLearner) -> dict[str, torch.Tensor]:
    """Asked for after the first of several steps of an update has begun, and before the last."""
    while "'learn'" not in learner.waits_for():
        time.sleep(0.001)
    return learner.weights()


def test_ranks_without_a_sequence_and_steps_without_any_and_what_must_not_be_learnt(
    cluster: None, routed: list[Sample]
) -> None:
    nothing = [replace(sample, advantages=(0.0,) * len(sample.advantages)) for sample in routed]
    one = next(sample for sample in routed if any(sample.advantages))
    with Pair(ROUTER, settings(schedule="linear", mini_batches=2), ranks=2) as pair:
        pair.update([one])  # two ranks, one sequence
        pair.update([*routed[:3], *nothing[3:]])
        learnt = pair.openrlhf.weights()
        figures = pair.update(nothing)
        assert figures["gradient_norm"] == 0
        pair.update([])
        assert flat(pair.openrlhf.weights()).equal(flat(learnt))
        with ThreadPoolExecutor() as another:
            half_way = another.submit(weights_while_it_learns, pair.openrlhf)
            pair.update(routed[4:] + [one] * 4, tolerance=1e-4)
        assert flat(half_way.result()).equal(flat(pair.openrlhf.weights()))
        assert pair.differences()[1] < 0.01

        learnt = pair.openrlhf.weights()
        step = routed[0].trajectory.sequence
        strange = replace(routed[0].trajectory, sequence=replace(step, token_ids=(*step.token_ids[:-1], 472)))
        with pytest.raises(
            InputError, match="samples must be of the model that learns, which has 472 tokens; got token"
        ):
            pair.openrlhf.update([replace(routed[0], trajectory=strange)])
        infinite = [replace(sample, advantages=(float("inf"),) * len(sample.advantages)) for sample in routed]
        with pytest.raises(InputError, match="the gradient must be finite; it is not after 5 updates: lower"):
            pair.openrlhf.update(infinite)
        assert flat(pair.openrlhf.weights()).equal(flat(learnt))
        pair.update(routed, tolerance=1e-4)  # and nothing of it is left

        ray.kill(pair.openrlhf._policy._actor_handlers[1])
        with pytest.raises(PolicyDiedError, match=r"^a rank that trains .* died in '\w+' \("):
            pair.openrlhf.update(routed)


def test_a_saved_state_goes_on_where_it_was_saved(cluster: None, routed: list[Sample], tmp_path: Path) -> None:
    chosen = settings(learning_rate=1e-3, schedule="linear", warmup=1, aggregation="degrpo")

    def learner() -> OpenRLHFLearner:
        return OpenRLHFLearner(ROUTER, chosen, updates=4, openrlhf=on_cpu(ranks=2))

    with learner() as first, learner() as second:
        for _ in range(2):
            first.update(routed, control_states=CONTROL)
        first.save(tmp_path / "state")
        first.save_pretrained(tmp_path / "model")
        saved = first.weights()
        figures = first.update(routed, control_states=CONTROL)
        second.load(tmp_path / "state")
        assert second.version == 2
        assert flat(second.weights()).equal(flat(saved))
        assert second.update(routed, control_states=CONTROL) == figures
        assert flat(second.weights()).equal(flat(first.weights()))
        with pytest.raises(InputError, match=r"has no learner\.json"):
            second.load(tmp_path / "model")
        about = tmp_path / "state" / "learner.json"
        about.write_text(about.read_text().replace('"ranks": 2', '"ranks": 3'))
        with pytest.raises(InputError, match=r"must be the state of a learner with {'ranks': 2"):
            second.load(tmp_path / "state")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert flat(model.state_dict()).equal(flat(saved))
    load(tmp_path / "model")  # with a tokenizer


def test_in_half_precision_it_learns_nearly_the_same(cluster: None, routed: list[Sample]) -> None:
    with Pair(
        ROUTER, settings(learning_rate=1e-3), zero_stage=1, precision="bf16", gradient_checkpointing=True
    ) as pair:
        expected = pair.embedded.update(routed)
        found = pair.openrlhf.update(routed)
        assert found["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=0.05)
        assert {weight.dtype for weight in pair.openrlhf.weights().values()} == {torch.bfloat16}
        _, share = pair.differences()
        learner = pair.openrlhf
        with pytest.raises(
            InputError, match=r"had too little in '__ray_call__' \(2 GiB\): ask for a smaller micro_batch_size or"
        ):
            learner._all(learner._policy, "__ray_call__", _run_out_of_memory)
    assert 0.01 < share < 0.5


def _run_out_of_memory(_: object) -> None:
    raise torch.OutOfMemoryError("2 GiB")


# Bad input


def test_before_anything_starts_what_cannot_be_is_told(cluster: None, tmp_path: Path, routed: list[Sample]) -> None:
    def actors() -> int:
        return len(ray.util.placement_group_table())

    near, before = settings(kl_coefficient=0.1), actors()
    config = AutoConfig.from_pretrained(LONG)
    config.hidden_size = 64
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "narrow")
    with pytest.raises(InputError, match="a KL term needs a reference model; give one, or set kl_coefficient to 0"):
        OpenRLHFLearner(LONG, near, updates=1)
    with pytest.raises(
        InputError, match=r"must have the shape of the policy; .* is \(472, 128\) in .* and \(472, 64\)"
    ):
        OpenRLHFLearner(LONG, near, updates=1, reference=tmp_path / "narrow")
    with pytest.raises(
        InputError, match=r"a model must be a checkpoint folder or a hub id; there is no folder .*nowhere"
    ):
        OpenRLHFLearner(tmp_path / "nowhere", settings(), updates=1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty must hold a language model: [^\n]*$"):
        OpenRLHFLearner(str(tmp_path / "empty"), settings(), updates=1)
    with pytest.raises(InputError, match=r"5 rank\(s\) need 5 CPU\(s\), and Ray has 4: ask for fewer ranks"):
        OpenRLHFLearner(LONG, settings(), updates=1, openrlhf=on_cpu(ranks=5))
    with pytest.raises(InputError, match=r"1 rank\(s\) need 1 GPU\(s\), and Ray has 0"):
        OpenRLHFLearner(LONG, settings(), updates=1)
    with pytest.raises(ValueError, match="flash_attention_2 needs"):
        on_cpu(attention="flash_attention_2")
    assert actors() == before
