"""Plans are held against what torch keeps, where Ray puts things, and what the ZeRO paper counts."""

import weakref
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel, Qwen2Config

from turnwise.agents.tiny import LONG, ROUTER, SHORT
from turnwise.environments.errors import InputError
from turnwise.protocols.long_short import LongShort
from turnwise.protocols.thinkless import Thinkless
from turnwise.rl.learner import LearnerSettings
from turnwise.rl.loss import LossSettings
from turnwise.rl.openrlhf.estimate import Assumptions, estimate, seat_shares
from turnwise.rl.openrlhf.model_shape import ModelShape
from turnwise.rl.openrlhf.placement import WHOLE, Group, Machine, Node, pack
from turnwise.rl.openrlhf.plan import Plan, footprint, plan
from turnwise.rl.openrlhf.settings import OpenRLHFSettings
from turnwise.rl.trained_policy import Policy
from turnwise.rl.trainer import TrainingSettings


def qwen(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocabulary: int, **more: object
) -> Qwen2Config:
    return Qwen2Config(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, max_position_embeddings=32768, **more,
    )  # fmt: skip


QWEN_7B = qwen(3584, 18944, 28, 28, 4, 152064, tie_word_embeddings=False)
QWEN_TIED = qwen(1536, 8960, 28, 12, 2, 151936, tie_word_embeddings=True)
DISTILL = qwen(1536, 8960, 28, 12, 2, 151936, tie_word_embeddings=False)
LLAMA_8B = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256, max_position_embeddings=131072, tie_word_embeddings=False,
)  # fmt: skip
# Long enough beside its width that what is kept is of sequences, and not of weights.
MINI = qwen(64, 160, 3, 4, 2, 512, tie_word_embeddings=False)

H100 = {"engine": "vllm", "attention": "flash_attention_2", "gradient_checkpointing": True, "context": 8192}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Folders with nothing but a config.json in them."""
    configs = {"qwen": QWEN_7B, "llama": LLAMA_8B, "distill": DISTILL}
    found = {name: tmp_path_factory.mktemp(name) for name in configs}
    for name, config in configs.items():
        config.save_pretrained(found[name])
    return found


def long_short(model: Path, learner: LearnerSettings | None = None) -> dict[str, Policy]:
    return {seat: Policy(model, (seat,), learner or LearnerSettings(micro_batch_size=1)) for seat in ("long", "short")}


def test_tiny_models_on_one_gpu_each() -> None:
    policies = {"long": Policy(LONG, ("long",)), "short": Policy(SHORT, ("short",))}
    settings = OpenRLHFSettings(engine="transformers")
    found = plan(policies, settings, LongShort(), Machine(gpus_per_node=4), prompt_tokens=100)
    assert [(one.policy, one.role, one.node, one.gpu) for one in found.processes] == [
        ("long", "engine", 0, 0), ("long", "rank", 0, 1), ("short", "engine", 0, 2), ("short", "rank", 0, 3),
    ]  # fmt: skip
    assert [gpu.number for gpu in found.gpus] == [0, 1, 2, 3]
    assert found.gpus[1].learning["weights"] == 2 * found.shapes["long"].parameters
    # The protocol would allow 4,608 tokens, the tiny models' context 1,024.
    assert found.dialogues["long"].longest == 1024
    # 64 turns at once, and the prefixes that are kept of others.
    cached = (64 * 1024 + 65_536) * found.shapes["long"].cached(width=2)
    assert found.gpus[0].learning["cache"] == found.gpus[0].sampling["cache"] == cached


class TestShapes:
    @pytest.mark.parametrize(
        ("config", "parameters", "cached"),
        [(QWEN_7B, 7_615_616_512, 57_344), (LLAMA_8B, 8_030_261_248, 131_072), (DISTILL, 1_777_088_000, 28_672)],
    )
    def test_those_of_known_models(self, config: PretrainedConfig, parameters: int, cached: int) -> None:
        shape = ModelShape.of(config)
        assert shape.parameters == parameters
        assert shape.cached(width=2) == cached

    def test_embeddings_that_the_output_layer_shares_are_multiplied_with(self) -> None:
        tied, untied = ModelShape.of(QWEN_TIED), ModelShape.of(DISTILL)
        assert untied.parameters - tied.parameters == 151_936 * 1536 == untied.looked_up
        assert tied.looked_up == 0
        assert tied.arithmetic(0) == untied.arithmetic(0) == 2 * 1_543_714_304

    def test_attention_looks_back_over_half_the_length(self) -> None:
        # Two products of 2 operations each, over 500 tokens, in 28 layers of 12 heads of 128.
        assert ModelShape.of(DISTILL).arithmetic(1000) - 2 * 1_543_714_304 == 2 * 2 * 500 * 28 * 12 * 128

    def test_what_is_no_model(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="must hold a language model"):
            ModelShape.of(tmp_path)


class Peak(TorchDispatchMode):
    """The most bytes that tensors made within it held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if (
                isinstance(tensor, torch.Tensor)
                and (key := (storage := tensor.untyped_storage())._cdata) not in self.live
            ):
                self.live[key] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, key)
        self.most = max(self.most, sum(self.live.values()))
        return out


def model(width: int, attention: str, checkpointing: bool) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        built: PreTrainedModel = AutoModelForCausalLM.from_config(
            MINI, attn_implementation=attention, dtype=torch.float32 if width == 4 else torch.bfloat16
        )
    built.config.use_cache = False
    built.train()
    if checkpointing:
        built.gradient_checkpointing_enable({"use_reentrant": False})
    return built


def log_probs(built: PreTrainedModel, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As OpenRLHF's Actor computes them where flash-attn is not there; the logits are kept, as its trainer does."""
    mask = torch.ones_like(ids)
    logits = built(ids, attention_mask=mask, position_ids=mask.cumsum(-1) - 1).logits.to(torch.float32)
    chosen = logits.gather(-1, ids.roll(-1, 1).unsqueeze(-1)).squeeze(-1)
    flat, sums = logits.reshape(-1, logits.shape[-1]), torch.zeros(ids.numel())
    for start in range(0, len(flat), 1024):
        sums[start : start + 1024] = flat[start : start + 1024].logsumexp(-1)
    return chosen - sums.view(ids.shape), logits


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
class TestActivations:
    """Against torch itself: within 3 % of the bytes that it saves, and 10 % of the most that it holds."""

    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_what_is_kept(self, width: int, checkpointing: bool, attention: str) -> None:
        built, ids = model(width, attention, checkpointing), torch.randint(0, 512, (2, 128))
        parameters = {weight.untyped_storage().data_ptr() for weight in built.parameters()}
        saved = dict[int, torch.Tensor]()

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            found = log_probs(built, ids)
        measured = sum(tensor.untyped_storage().nbytes() for at, tensor in saved.items() if at not in parameters)
        shape = ModelShape.of(MINI)
        predicted = shape.kept(256, 128, width=width, attention=attention, checkpointing=checkpointing)
        assert predicted + 4 * found[1].numel() == pytest.approx(measured, rel=0.03)

    def test_the_peak_of_a_micro_batch(self, width: int, checkpointing: bool) -> None:
        built, ids = model(width, "sdpa", checkpointing), torch.randint(0, 512, (2, 192))
        for weight in built.parameters():
            weight.grad = torch.zeros_like(weight)
        with Peak() as peak:
            found, logits = log_probs(built, ids)
            torch.autograd.backward(found.sum())
        settings = OpenRLHFSettings(precision="fp32" if width == 4 else "bf16", gradient_checkpointing=checkpointing)
        predicted = footprint("rank", ModelShape.of(MINI), settings, LearnerSettings(micro_batch_size=2), 192).learning
        assert logits.shape == (2, 192, 512)
        assert predicted["activations"] + predicted["logits"] == pytest.approx(peak.most, rel=0.1)


class TestPlacement:
    # What Ray 2.55 did with two nodes of 16 CPUs and 4 GPUs: the number of bundles of each group and their share of a
    # GPU, and the node and GPU that each bundle got, nodes numbered as they came into use.
    @pytest.mark.parametrize(
        ("groups", "places"),
        [
            ([(2, 1.0)] * 4, [["00", "01"], ["10", "11"], ["02", "03"], ["12", "13"]]),
            ([(4, 1.0), (2, 1.0), (1, 1.0), (1, 1.0)], [["00", "01", "02", "03"], ["10", "11"], ["12"], ["13"]]),
            ([(3, 1.0), (2, 1.0), (3, 1.0)], [["00", "01", "02"], ["10", "11"], ["12", "13", "03"]]),
            ([(4, 1.0), (2, 0.5), (3, 0.5)], [["00", "01", "02", "03"], ["10", "10"], ["11", "11", "12"]]),
            ([(3, 0.5), (3, 0.5), (2, 0.25)], [["00", "00", "01"], ["10", "10", "11"], ["01", "01"]]),
            ([(6, 1.0), (1, 1.0), (1, 1.0)], [["00", "01", "02", "03", "10", "11"], ["12"], ["13"]]),
        ],
    )
    def test_it_is_rays(self, groups: list[tuple[int, float]], places: list[list[str]]) -> None:
        nodes = [Node(16 * WHOLE, [WHOLE] * 4) for _ in range(2)]
        found = [pack(Group("p", ("rank",), count, WHOLE, int(share * WHOLE)), nodes) for count, share in groups]
        assert found == [[(int(place[0]), int(place[1])) for place in group] for group in places]

    def test_a_share_that_no_gpu_has_left_is_no_room(self) -> None:
        nodes = [Node(16 * WHOLE, [5000, 5000])]
        assert pack(Group("p", ("rank",), 1, WHOLE, WHOLE), nodes) is None

    def test_processes_without_a_gpu(self) -> None:
        settings = OpenRLHFSettings(gpus_per_rank=0, gpus_per_actor=0, ranks=2)
        found = plan({"solver": Policy(ROUTER, ("solver",))}, settings, Thinkless(), Machine(gpus_per_node=0))
        assert [(one.role, one.number, one.gpu) for one in found.processes] == [
            ("engine", 0, None), ("rank", 0, None), ("rank", 1, None),
        ]  # fmt: skip
        assert found.gpus == ()

    @pytest.mark.parametrize(
        "shares",
        [
            {"ranks": 2, "gpus_per_rank": 0.5},
            {"ranks": 2, "actors": 2, "gpus_per_rank": 0.25, "gpus_per_actor": 0.25, "colocated": True},
            {"gpus_per_rank": 0.5, "gpus_per_actor": 0.5},
            {"actors": 2, "gpus_per_actor": 0.5},
        ],
    )
    def test_who_forms_a_group_of_nccls_must_not_share_a_gpu(self, shares: dict[str, float]) -> None:
        with pytest.raises(ValueError, match=r"must not share a GPU; got ranks=.*: use colocated, or whole GPUs"):
            OpenRLHFSettings.model_validate(shares)

    def test_others_may(self) -> None:
        OpenRLHFSettings(actors=2, gpus_per_rank=0.5, gpus_per_actor=0.5, engine="transformers")
        OpenRLHFSettings(gpus_per_rank=0.25, gpus_per_actor=0.25, colocated=True)
        OpenRLHFSettings(ranks=2, gpus_per_rank=0.6)
        OpenRLHFSettings(ranks=2, actors=2, gpus_per_rank=0, gpus_per_actor=0)


class TestMemory:
    @pytest.mark.parametrize(("stage", "gigabytes"), [(1, 31.4), (2, 16.6 + 0.47), (3, 1.9 + 0.23)])
    def test_states_are_those_of_the_zero_paper(self, stage: int, gigabytes: float) -> None:
        # Figure 1 of arXiv 1910.02054: 7.5 billion parameters on 64 GPUs. It adds up gradients in half precision.
        shape = ModelShape(7_500_000_000, 0, 50_000, 1024, 1, 8, 8, 1, 1, 8)
        settings = OpenRLHFSettings.model_validate({"ranks": 64, "zero_stage": stage})
        parts = footprint("rank", shape, settings, LearnerSettings(), 16).learning
        states = sum(parts[name] for name in ("weights", "gradients", "optimiser"))
        assert states / 1e9 == pytest.approx(gigabytes, abs=0.05)

    def test_a_reference_model_only_where_a_divergence_is_paid_for(self, folders: Mapping[str, Path]) -> None:
        settings = OpenRLHFSettings.model_validate({**H100, "ranks": 2, "zero_stage": 3})
        for coefficient, roles in ((0.0, {"rank"}), (1e-3, {"rank", "reference"})):
            learner = LearnerSettings(micro_batch_size=1, loss=LossSettings(kl_coefficient=coefficient))
            policies = {"solver": Policy(folders["distill"], ("solver",), learner)}
            found = plan(policies, settings, Thinkless(think_tokens=2048), Machine())
            assert {one.role for one in found.gpus[1].processes} == roles
            assert ("reference weights" in found.gpus[1].learning) == ("reference" in roles)

    def test_colocated_the_phases_take_turns(self, folders: Mapping[str, Path]) -> None:
        settings = OpenRLHFSettings.model_validate(
            {
                **H100,
                "ranks": 4,
                "actors": 4,
                "cache_gigabytes": 20,
                "colocated": True,
                "gpus_per_rank": 0.6,
                "gpus_per_actor": 0.4,
            }
        )
        found = plan(long_short(folders["qwen"]), settings, LongShort(), Machine())
        assert {(one.role, one.gpu) for one in found.processes if one.policy == "short"} == {
            (role, gpu) for role in ("rank", "engine") for gpu in (4, 5, 6, 7)
        }
        gpu, weights = found.gpus[0], 2 * 7_615_616_512
        assert gpu.sampling["weights"] == gpu.sampling["engine weights"] == gpu.learning["weights"] == weights
        assert gpu.sampling["cache"] == 20 * 10**9
        assert "optimiser" not in gpu.sampling
        assert "engine weights" not in gpu.learning
        assert gpu.learning["optimiser"] == 3 * 7_615_616_512
        assert gpu.peak == max(sum(gpu.learning.values()), sum(gpu.sampling.values()))
        # Each of the eight has its engine's weights or its optimiser's state in main memory.
        assert found.main_memory == {0: 8 * (weights + 3 * 7_615_616_512)}

    def test_dialogues_in_the_cache(self, folders: Mapping[str, Path]) -> None:
        settings = OpenRLHFSettings.model_validate({**H100, "ranks": 4, "actors": 2, "cache_gigabytes": 10})
        policies = {"both": Policy(folders["qwen"], ("long", "short"), LearnerSettings(micro_batch_size=1))}
        found = plan(policies, settings, LongShort(), Machine(), prompt_tokens=392).dialogues["both"]
        assert (found.longest, found.tokens_a_gigabyte, found.cache_tokens) == (5000, 17_438, 2 * 174_386)
        assert found.at_once == 2 * 34


class TestRefusals:
    def refused(
        self, model: Path, settings: dict[str, object], machine: Machine, learner: LearnerSettings | None = None
    ) -> str:
        with pytest.raises(InputError) as error:
            plan(long_short(model, learner), OpenRLHFSettings.model_validate(settings), LongShort(), machine)
        assert "\n" not in str(error.value)
        return str(error.value)

    def test_more_gpus_than_there_are(self, folders: Mapping[str, Path]) -> None:
        message = self.refused(folders["qwen"], {**H100, "ranks": 4}, Machine())
        assert message.startswith(
            "a plan must fit the machine; it needs 10 GPU(s) and 10 CPU(s), and 1 node(s) of 8 GPU(s) and 64 CPU(s) "
            "have no room for the rank processes of policy 'short': ask for fewer ranks or actors"
        )

    def test_more_cpus_than_there_are(self, folders: Mapping[str, Path]) -> None:
        message = self.refused(folders["qwen"], {**H100, "ranks": 2}, Machine(cpus_per_node=5))
        assert "needs 6 GPU(s) and 6 CPU(s)" in message

    def test_more_memory_than_a_gpu_has(self, folders: Mapping[str, Path]) -> None:
        message = self.refused(folders["qwen"], H100, Machine())
        assert message.startswith("a plan must fit each GPU's memory; GPU 1 of node 0 needs")
        assert "while learning (optimiser 91.4, " in message
        assert message.endswith("73.6 of 80 GB can be planned with: ask for more ranks")

    def test_the_remedy_is_for_what_takes_the_most(self, folders: Mapping[str, Path]) -> None:
        settings: dict[str, object] = {**H100, "ranks": 2, "zero_stage": 3, "attention": "sdpa"}
        message = self.refused(folders["distill"], settings, Machine(), LearnerSettings(micro_batch_size=8))
        assert "while learning (logits " in message
        assert "ask for flash_attention_2, or a smaller micro_batch_size or context; or " in message

    def test_no_remedy_that_is_taken_already(self, folders: Mapping[str, Path]) -> None:
        learner = LearnerSettings(micro_batch_size=64)
        message = self.refused(folders["distill"], {**H100, "zero_stage": 3}, Machine(), learner)
        assert "while learning (logits " in message
        assert message.endswith("ask for a smaller micro_batch_size or context; or more ranks")
        message = self.refused(folders["qwen"], {**H100, "engine": "transformers", "max_running": 300}, Machine())
        assert "while learning (cache " in message
        assert message.endswith("ask for a smaller max_running or context")

    def test_seats_that_the_protocol_has_not(self) -> None:
        policies = {"judge": Policy(LONG, ("judge",))}
        with pytest.raises(InputError, match=r"of \['long', 'short'\], each once; got \['judge'\]"):
            plan(policies, OpenRLHFSettings(), LongShort(), Machine())

    def test_seats_that_no_policy_fills_are_told(self) -> None:
        policies = {"long": Policy(LONG, ("long",))}
        found = plan(policies, OpenRLHFSettings(), LongShort(), Machine())
        assert found.notes[0] == "left out: who fills the seat(s) ['short'], which no policy does"

    def test_a_cache_without_room_for_one_dialogue(self, folders: Mapping[str, Path]) -> None:
        message = self.refused(folders["qwen"], {**H100, "context": 32768}, Machine())
        assert "has 32768 tokens, 1.88 GB, and cache_gigabytes is 1: raise it" in message

    def test_a_context_that_the_model_has_not(self, folders: Mapping[str, Path]) -> None:
        message = self.refused(folders["qwen"], {**H100, "context": 65536}, Machine())
        assert "'long' asks for 65536 tokens and its model has 32768" in message


class TestEstimate:
    def planned(self, folders: Mapping[str, Path]) -> tuple[dict[str, Policy], OpenRLHFSettings, Plan]:
        policies = long_short(folders["distill"])
        settings = OpenRLHFSettings.model_validate({**H100, "gradient_checkpointing": False, "ranks": 2})
        return policies, settings, plan(policies, settings, LongShort(), Machine(teraflops=1000), prompt_tokens=392)

    def test_by_hand(self, folders: Mapping[str, Path]) -> None:
        policies, settings, planned = self.planned(folders)
        training = TrainingSettings(rounds="long long short", steps=10, problems=10, samples=10)
        assumed = Assumptions(dialogue_share=0.5, learning=0.5, reading=0.25, sampling=0.01, gpu_hour_price=2.0)
        found = estimate(planned, policies, settings, LongShort(), training, assumed, prompt_tokens=392)
        # 2,304 of at most 4,608 tokens, 100 times; two thirds are the long seat's, which has budgets of 1,024 to 512.
        token = 2 * 1_543_714_304 + 2 * 2696 * 28 * 1536
        long = found.policies["long"]
        assert long.sampled == pytest.approx(230_400 * 2 / 3)
        assert long.trained == long.sampled + long.read == pytest.approx(269_600)
        assert long.learning_seconds == pytest.approx(269_600 * 3 * token / (0.5e15 * 2))
        assert long.sampling_seconds == pytest.approx(token * (153_600 / 1e13 + 116_000 / 0.25e15))
        assert found.steps == 30
        assert found.gpus == 6
        assert found.step_seconds == pytest.approx(long.sampling_seconds + long.learning_seconds)
        assert found.hours == pytest.approx(30 * found.step_seconds / 3600)
        assert found.cost == pytest.approx(found.hours * 6 * 2)

    def test_further_passes(self, folders: Mapping[str, Path]) -> None:
        policies, settings, planned = self.planned(folders)

        def seconds(learner: LearnerSettings, checkpointing: bool = False) -> float:
            changed = settings.model_copy(update={"gradient_checkpointing": checkpointing})
            trained = {name: Policy(one.model, one.seats, learner) for name, one in policies.items()}
            found = estimate(planned, trained, changed, LongShort(), TrainingSettings(), Assumptions())
            return found.policies["long"].learning_seconds

        plain = seconds(LearnerSettings())
        assert seconds(LearnerSettings(), checkpointing=True) == pytest.approx(plain * 4 / 3)
        assert seconds(LearnerSettings(loss=LossSettings(kl_coefficient=1e-3))) == pytest.approx(plain * 4 / 3)
        assert seconds(LearnerSettings(mini_batches=2)) == pytest.approx(plain * 3.5 / 3)

    def test_colocated_each_phase_has_both_shares(self, folders: Mapping[str, Path]) -> None:
        policies, settings, planned = self.planned(folders)

        def seconds(share: float, colocated: bool) -> float:
            shares = {"actors": 2, "gpus_per_rank": share, "gpus_per_actor": share, "colocated": colocated}
            changed = settings.model_copy(update=shares)
            return estimate(planned, policies, changed, LongShort(), TrainingSettings(), Assumptions()).step_seconds

        whole = seconds(1, colocated=False)
        assert seconds(0.5, colocated=True) == pytest.approx(whole)
        assert seconds(0.5, colocated=False) == pytest.approx(2 * whole)

    def test_policies_that_learn_in_one_round_do_so_at_once(self, folders: Mapping[str, Path]) -> None:
        policies, settings, planned = self.planned(folders)
        found = estimate(planned, policies, settings, LongShort(), TrainingSettings(steps=7), Assumptions())
        learning = max(one.learning_seconds for one in found.policies.values())
        assert found.step_seconds == pytest.approx(found.policies["long"].sampling_seconds + learning)
        assert found.steps == 7
        assert found.cost is None

    def test_seats_speak_as_their_budgets_suggest(self) -> None:
        assert seat_shares(LongShort(long_tokens=300, short_tokens=100)) == {"long": 0.75, "short": 0.25}
