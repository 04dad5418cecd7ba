"""What turnwise rests on in OpenRLHF and DeepSpeed, and they promise to nobody: what changes in it fails by name."""

import ast
import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch

pytest.importorskip("deepspeed", reason="needs OpenRLHF: make openrlhf")

import deepspeed
import openrlhf
import openrlhf.models.ring_attn_utils
import openrlhf.utils.utils
from deepspeed.comm import comm
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.offload_states import offload_optimizer_states, reload_optimizer_states
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from openrlhf.models import PolicyLoss
from openrlhf.utils.loss_utils import get_loss_batch_info

from turnwise.rl.learner import LearnerSettings
from turnwise.rl.openrlhf import names
from turnwise.rl.openrlhf.actors import PolicyRank, ReferenceRank
from turnwise.rl.openrlhf.arguments import command_line, openrlhf_arguments
from turnwise.rl.openrlhf.settings import OpenRLHFSettings
from turnwise.rl.openrlhf.step import StepLoss
from turnwise.rl.openrlhf.without_flash_attention import FUNCTIONS

OPENRLHF_POLICY, OPENRLHF_REFERENCE = PolicyRank.__mro__[1], ReferenceRank.__mro__[1]

# What is overridden, and what is called: all parameters of the first, of the second those that are given.
OVERRIDDEN = {
    names.ActorPPOTrainer.training_step: "self experience kl_ctl step loss_batch_info",
    names.DeepspeedStrategy.get_ds_train_config: "self optim_dict max_norm",
    names.DeepspeedStrategy._ds_init_train_model: "self model cfg",
    names.DeepspeedStrategy._get_model_parameters: "self model optim weight_decay",
    names.DeepspeedStrategy.optimizer_step: "self _optimizer model _scheduler name kwargs",
    names.NaiveReplayBuffer.append: "self experience",
    names.NaiveReplayBuffer.collate_fn: "self batch",
    OPENRLHF_POLICY.init_model_from_pretrained: "self strategy pretrain max_steps vllm_engines",
    OPENRLHF_POLICY.offload_states: "self",
    OPENRLHF_POLICY.reload_states: "self",
    PolicyLoss.forward: (
        "self log_probs old_log_probs advantages action_mask rollout_log_probs dp_size batch_num_tokens "
        "global_batch_size"
    ),
}
CALLED = {
    names.ActorPPOTrainer.__init__: "self strategy actor ema_model actor_optim actor_scheduler dataloader_pin_memory",
    names.ActorPPOTrainer.ppo_train: "self kl_ctl",
    names.DeepspeedStrategy.__init__: "self seed max_norm micro_train_batch_size train_batch_size zero_stage args",
    names.DeepspeedStrategy.is_rank_0: "self",
    names.DeepspeedStrategy.load_ckpt: "self model load_dir tag",
    names.NaiveReplayBuffer.__init__: "self sample_batch_size",
    names.NaiveReplayBuffer.clear: "self",
    names.RayActorGroup.__init__: "self num_nodes num_gpus_per_node ray_actor_type pg num_gpus_per_actor",
    names.RayActorGroup.async_init_model_from_pretrained: "self args kwargs",
    names.RayActorGroup.async_run_method: "self method_name args kwargs",
    names.RayActorGroup.async_run_method_batch: "self method_name kwargs",
    OPENRLHF_POLICY.append: "self experience",
    OPENRLHF_POLICY.fit: "self kl_ctl",
    OPENRLHF_POLICY.forward: "self sequences action_mask attention_mask",
    OPENRLHF_POLICY.save_checkpoint: "self tag client_states",
    OPENRLHF_POLICY.save_model: "self",
    OPENRLHF_POLICY.broadcast_to_vllm: "self",
    names.ActorPPOTrainer._init_vllm_sync_group: "self backend",
    OPENRLHF_REFERENCE.init_model_from_pretrained: "self strategy pretrain",
    OPENRLHF_REFERENCE.empty_cache: "self",
    OPENRLHF_REFERENCE.forward: "self sequences action_mask attention_mask",
    DeepSpeedEngine._consolidated_16bit_state_dict: "self",
    DeepSpeedEngine.get_global_grad_norm: "self",
    DeepSpeedEngine.is_gradient_accumulation_boundary: "self",
    DeepSpeedEngine.set_gradient_accumulation_boundary: "self is_boundary",
    DeepSpeedEngine.was_step_applied: "self",
    DeepSpeedEngine.zero_optimization_stage: "self",
    DeepSpeedZeroOptimizer.check_overflow: "self",
    DeepSpeedZeroOptimizer.get_all_grad_tensors: "self tensor_list dtype",
    DeepSpeedZeroOptimizer_Stage3.check_overflow: "self",
    DeepSpeedZeroOptimizer_Stage3.offload_states: "self include",
    DeepSpeedZeroOptimizer_Stage3.reload_states: "self",
    offload_optimizer_states: "optimizer device pin_memory",
    reload_optimizer_states: "optimizer device",
}


def name_of(function: Callable[..., object]) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def parameters(function: Callable[..., object]) -> list[str]:
    """Ray adds one of its own to the methods of an actor."""
    return [name for name in inspect.signature(function).parameters if name != "_ray_trace_ctx"]


@pytest.mark.parametrize("function", OVERRIDDEN, ids=name_of)
def test_what_is_overridden_has_the_same_parameters(function: Callable[..., object]) -> None:
    assert parameters(function) == OVERRIDDEN[function].split()


@pytest.mark.parametrize("function", CALLED, ids=name_of)
def test_what_is_called_takes_what_it_is_given(function: Callable[..., object]) -> None:
    assert [name for name in parameters(function) if name in CALLED[function].split()] == CALLED[function].split()


def test_the_loss_is_called_by_the_same_names_and_what_it_gives_is_taken_as_it_is_meant() -> None:
    assert list(inspect.signature(StepLoss.forward).parameters) == OVERRIDDEN[PolicyLoss.forward].split()
    source = inspect.getsource(names.ActorPPOTrainer.training_step)
    assert "actor_loss, clip_ratio, ppo_kl, vllm_kl, is_filter_ratio = self.actor_loss_fn(" in source
    assert get_loss_batch_info(None, torch.ones(1, 2)).keys() == {"dp_size", "batch_num_tokens", "global_batch_size"}
    assert "self.replay_buffer = NaiveReplayBuffer(" in inspect.getsource(names.ActorPPOTrainer.__init__)


def test_an_experience_has_a_place_for_all_that_a_token_carries() -> None:
    per_token = {field.name for field in fields(names.Experience) if names.Experience.is_step_tensor_field(field.name)}
    assert per_token >= {
        "sequences", "attention_mask", "action_mask", "action_log_probs", "base_action_log_probs", "rollout_log_probs",
        "advantages", "values", "returns",
    }  # fmt: skip
    # What carries the weights is not read in training.
    for function in (names.ActorPPOTrainer.training_step, names.ActorPPOTrainer.ppo_train):
        read = {
            node.attr
            for node in ast.walk(ast.parse(inspect.getsource(function).strip()))
            if isinstance(node, ast.Attribute)
        }
        assert not read & {"values", "returns"}


def test_a_model_reads_its_precision_and_temperature_where_they_are_set() -> None:
    source = inspect.getsource(names.Actor)
    assert "from openrlhf.utils.utils import convert_to_torch_dtype" in source
    assert 'output["logits"].div_(self.temperature)' in source
    assert openrlhf.utils.utils.convert_to_torch_dtype("fp32") == torch.float32
    assert openrlhf.utils.utils.convert_to_torch_dtype("bf16") == torch.bfloat16


def test_who_shares_a_gpu_with_an_engine_sends_it_no_weights_by_nccl() -> None:
    source = inspect.getsource(names.ActorPPOTrainer.broadcast_to_vllm)
    assert "sync_fn = _handle_cuda_ipc if self.use_cuda_ipc else _broadcast_param" in source
    source = inspect.getsource(names.ActorPPOTrainer.__init__)
    assert "self.use_cuda_ipc = backend ==" in source
    assert "if self.vllm_engines is not None and not self.use_cuda_ipc" in source


def test_without_vllm_its_version_is_not_asked_for_and_its_actor_not_imported() -> None:
    source = inspect.getsource(OPENRLHF_POLICY.init_model_from_pretrained)
    assert 'if getattr(args.vllm, "sync_backend", "nccl") == "nccl":\n            import vllm' in source
    assert openrlhf.__file__ is not None
    package = ast.parse((Path(openrlhf.__file__).parent / "trainer" / "ray" / "__init__.py").read_text())
    imported = [node.module for node in package.body if isinstance(node, ast.ImportFrom)]
    assert imported == ["vllm_engine"], "it now has more in it than without_vllm leaves out"


def test_of_flash_attention_it_imports_what_is_left_out() -> None:
    path = openrlhf.models.ring_attn_utils.__file__
    assert path is not None
    imports = [node for node in ast.parse(Path(path).read_text()).body if isinstance(node, ast.ImportFrom)]
    found = {
        node.module: tuple(alias.name for alias in node.names) for node in imports if "flash_attn" in str(node.module)
    }
    assert found == FUNCTIONS


def test_the_command_line_has_the_flags_that_are_set_and_the_arguments_what_is_read() -> None:
    learner = LearnerSettings(learning_rate=0.125, betas=(0.5, 0.75), weight_decay=0.25, clip=2, warmup=3)
    settings = OpenRLHFSettings(ranks=3, zero_stage=3, precision="fp32", attention="eager", gradient_checkpointing=True)
    arguments = openrlhf_arguments(settings, learner, steps=7, temperature=0.5)
    actor = arguments.actor
    assert (actor.adam.lr, actor.adam.betas, actor.adam.weight_decay) == (0.125, [0.5, 0.75], 0.25)
    assert (actor.lr_scheduler, actor.max_norm, actor.eps_clip_low_high) == ("constant_with_warmup", 2, [0.2, 0.2])
    assert actor.gradient_checkpointing_enable
    assert (arguments.rollout.temperature, arguments.ds.zero_stage, arguments.ds.param_dtype) == (0.5, 3, "fp32")
    assert (arguments.train.batch_size, arguments.train.micro_batch_size, arguments.train.max_epochs) == (3, 1, 1)
    assert arguments.ds.attn_implementation == "eager"
    # Nothing of OpenRLHF's own is on beside it.
    assert (actor.entropy_coef, actor.aux_loss_coef, arguments.algo.kl.use_loss) == (None, 0, False)
    assert (arguments.ds.packing_samples, arguments.train.dynamic_batch_enable, arguments.train.enable_ema) == (
        False,
    ) * 3
    assert command_line().get_default("actor.adam.eps") == 1e-8  # torch's


@pytest.mark.parametrize("steps", [0, 1, 3, 7, 10, 49, 100, 1000])
def test_the_warm_up_has_as_many_steps_as_it_should(steps: int) -> None:
    """By the formula of OpenRLHF."""
    assert "math.ceil(scheduler_steps * cfg.get(" in inspect.getsource(names.DeepspeedStrategy._ds_init_train_model)
    for warmup in {0, 1, steps // 3, steps - 1, steps}.intersection(range(steps + 1)):
        arguments = openrlhf_arguments(OpenRLHFSettings(), LearnerSettings(warmup=warmup), steps=steps, temperature=1)
        assert -(-steps * arguments.actor.lr_warmup_ratio // 1) == warmup


def test_in_stage_3_deepspeed_moves_the_states_of_its_own_adam_alone_and_its_weights_are_there_to_be_moved() -> None:
    source = inspect.getsource(DeepSpeedZeroOptimizer_Stage3.offload_states)
    # When this is no more, its own will do.
    assert "assert self.optimizer.__class__ == deepspeed.ops.adam.fused_adam.FusedAdam" in source
    assert "buf.data = buf.data.to(device" in source
    source = inspect.getsource(DeepSpeedZeroOptimizer_Stage3)
    assert "self.fp32_partitioned_groups_flat.append(self.fp16_partitioned_groups_flat[i])" in source


def test_deepspeed_takes_torchs_optimiser_and_leaves_out_what_it_would_compile() -> None:
    assert '"torch_adam"' in inspect.getsource(deepspeed.runtime.config)
    assert "torch.optim.AdamW if adam_w_mode" in inspect.getsource(DeepSpeedEngine.get_optimizer_configuration)
    if not torch.cuda.is_available():
        assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False
        # When this is no more, DeepSpeed need not be made to wait.
        assert "launch_handles[-1].wait()" in inspect.getsource(deepspeed.zero.Init)
        passed_on = (
            "cdb.all_gather_into_tensor(output_tensor=output_tensor, input_tensor=tensor, group=group, async_op="
        )
        assert passed_on in Path(str(comm.__file__)).read_text()
