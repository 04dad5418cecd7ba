"""OpenRLHF's Ray actors, trainer and strategy, as subclasses: a process for each rank, trained with turnwise's loss."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum
from deepspeed.runtime.zero.offload_states import offload_optimizer_states, reload_optimizer_states
from ray.actor import ActorHandle

from turnwise.rl.loss import LossSettings
from turnwise.rl.openrlhf.names import (
    Actor,
    ActorPPOTrainer,
    DeepspeedStrategy,
    Experience,
    NaiveReplayBuffer,
    PolicyModelActor,
    ReferenceModelActor,
    class_of,
)
from turnwise.rl.openrlhf.step import StepLoss


class Strategy(DeepspeedStrategy):  # type: ignore[misc]
    """DeepSpeed with the optimiser of `Learner`: torch's AdamW, whose weight decay is for all parameters."""

    def __init__(self, arguments: SimpleNamespace, loss: LossSettings) -> None:
        super().__init__(
            seed=arguments.train.seed,
            max_norm=arguments.actor.max_norm,
            micro_train_batch_size=arguments.train.micro_batch_size,
            train_batch_size=arguments.train.batch_size,
            zero_stage=arguments.ds.zero_stage,
            args=arguments,
        )
        self.loss = loss

    def get_ds_train_config(
        self, optim_dict: dict[str, Any] | None = None, *, max_norm: float | None = None
    ) -> dict[str, Any]:
        """DeepSpeed's settings. Its own Adam would have to be compiled first."""
        if optim_dict is not None:
            optim_dict["params"] |= {"torch_adam": True, "fused": True}
        config: dict[str, Any] = super().get_ds_train_config(optim_dict, max_norm=max_norm)
        if self.stage > 1:  # in stage 1 DeepSpeed would take another optimiser, without `check_overflow`
            config["data_types"] = {"grad_accum_dtype": "fp32"}
        return config

    def _ds_init_train_model(
        self, model: torch.nn.Module, cfg: dict[str, Any]
    ) -> tuple[torch.nn.Module, object, object]:
        """By themselves gradients of micro-batches are added up in stage 2 as they come, in half precision."""
        model, optimizer, scheduler = super()._ds_init_train_model(model, cfg)
        if self.stage == 2:
            of_micro_batch = optimizer.get_all_grad_tensors
            optimizer.get_all_grad_tensors = lambda tensors, dtype: [
                gradient.to(dtype) for gradient in of_micro_batch(tensors, dtype)
            ]
        return model, optimizer, scheduler

    def _get_model_parameters(
        self, model: torch.nn.Module, *, optim: str | None = None, weight_decay: float = 0.0
    ) -> tuple[torch.nn.Module, list[dict[str, Any]]]:
        """OpenRLHF would leave biases and norms out of the decay."""
        raw, _ = super()._get_model_parameters(model, optim=optim, weight_decay=weight_decay)
        return raw, [{"params": [p for p in raw.parameters() if p.requires_grad], "weight_decay": weight_decay}]

    def optimizer_step(
        self, _optimizer: object, model: Actor, _scheduler: object, name: str = "model", **kwargs: object
    ) -> None:
        """An optimiser step, where the gradients of all micro-batches are there."""
        engine = model.model
        if engine.is_gradient_accumulation_boundary():
            # By itself DeepSpeed looks for what is not finite in half precision only.
            engine.optimizer.check_overflow()
        super().optimizer_step(_optimizer, model, _scheduler, name=name, **kwargs)


class MicroBatches(NaiveReplayBuffer):  # type: ignore[misc]
    """A buffer which gives back each experience as it was put in, as one micro-batch."""

    def append(self, experience: Experience) -> None:
        """OpenRLHF would take it apart, to make micro-batches of other sequences than were chosen for their length."""
        self.items.append(experience)

    def collate_fn(self, batch: list[Experience]) -> Experience:
        """The one micro-batch."""
        (experience,) = batch
        return experience


class StepTrainer(ActorPPOTrainer):  # type: ignore[misc]
    """OpenRLHF's trainer with turnwise's loss, for which all that is in its buffer makes one optimiser step."""

    def __init__(self, strategy: Strategy, actor: Actor, optimizer: object, scheduler: object) -> None:
        super().__init__(
            strategy,
            actor,
            ema_model=None,
            actor_optim=optimizer,
            actor_scheduler=scheduler,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        self.actor_loss_fn = StepLoss(strategy.loss)
        self.replay_buffer = MicroBatches(1)
        if strategy.loss.entropy_coefficient:
            actor.register_forward_hook(self._keep_logits)

    def training_step(
        self, experience: Experience, kl_ctl: float, step: int, loss_batch_info: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Forward and backward of a micro-batch, and the optimiser step after the last."""
        self.actor_loss_fn.experience = experience
        self.actor.model.set_gradient_accumulation_boundary(step + 1 == len(self.replay_buffer))
        return super().training_step(experience, kl_ctl, step, loss_batch_info)  # type: ignore[no-any-return]

    def _keep_logits(self, actor: Actor, inputs: object, outputs: tuple[torch.Tensor, Any]) -> None:
        """For the entropy. They are at the temperature already."""
        if torch.is_grad_enabled():
            self.actor_loss_fn.logits = outputs[1]["logits"]


class PolicyRank(class_of(PolicyModelActor)):  # type: ignore[misc]
    """One rank of a policy that learns."""

    def init_model_from_pretrained(
        self, strategy: Strategy, pretrain: str, max_steps: int | None = None, vllm_engines: None = None
    ) -> None:
        """Loads the model and its optimiser; all ranks do so at once."""
        super().init_model_from_pretrained(strategy, pretrain, max_steps, vllm_engines)
        self.trainer = StepTrainer(strategy, self.actor, self.actor_optim, self.actor_scheduler)

    def learn(self, seed: int) -> tuple[dict[str, float], dict[str, float]]:
        """One optimiser step on what was appended; the sums of this rank, and what is the same for all of them.

        The norm of the gradient is nan where it was not finite, and then nothing was learnt.
        """
        engine, loss = self.actor.model, self.trainer.actor_loss_fn
        loss.sums.clear()
        learning_rate = self.actor_scheduler.get_last_lr()[0]
        # The same for all ranks: so all shuffle alike, and micro-batches of like length stay together.
        torch.manual_seed(seed)
        self.fit()
        norm = float(engine.get_global_grad_norm()) if engine.was_step_applied() else math.nan
        return dict(loss.sums), {"gradient_norm": norm, "learning_rate": learning_rate}

    def rest(self) -> dict[str, float]:
        """An optimiser step that has nothing to learn from: it counts for the learning rate alone."""
        learning_rate = self.actor_scheduler.get_last_lr()[0]
        self.actor_scheduler.step()
        return {"gradient_norm": 0.0, "learning_rate": learning_rate}

    def offload_states(self) -> None:
        """Moves to main memory what only learning needs; all ranks must be asked."""
        if self.actor.model.zero_optimization_stage() < 3:
            super().offload_states()
            return
        # In stage 3 DeepSpeed moves what is an optimiser's for its own Adam alone.
        optimizer = self.actor_optim
        optimizer.offload_states({OffloadStateTypeEnum.lp_grads, OffloadStateTypeEnum.contiguous_grad_buffer})
        offload_optimizer_states(optimizer.optimizer, "cpu", pin_memory=True)
        for weights in self._optimizers_weights():
            weights.data = weights.data.cpu()
        torch.cuda.empty_cache()

    def reload_states(self) -> None:
        """Moves it back."""
        if self.actor.model.zero_optimization_stage() < 3:
            super().reload_states()
            return
        optimizer, device = self.actor_optim, torch.cuda.current_device()
        optimizer.reload_states()
        reload_optimizer_states(optimizer.optimizer, device)
        for weights in self._optimizers_weights():
            weights.data = weights.data.to(device)

    def _optimizers_weights(self) -> list[torch.Tensor]:
        """Those that are not the model's own, as they are in single precision."""
        pairs = zip(
            self.actor_optim.fp32_partitioned_groups_flat, self.actor_optim.fp16_partitioned_groups_flat, strict=True
        )
        return [mine for mine, models in pairs if mine is not models]

    def connect(self, engines: list[ActorHandle]) -> None:
        """Makes the group in which the first rank sends weights to vLLM; all ranks must be asked."""
        if not torch.cuda.is_available():
            import turnwise.rl.openrlhf.vllm_without_cuda  # noqa: F401
        self.trainer.vllm_engines = engines
        # Processes on one GPU form no NCCL group: OpenRLHF then lets vLLM read the trainer's memory.
        self.trainer.use_cuda_ipc = torch.cuda.is_available() and self.strategy.args.train.colocate_all
        self.strategy.args.vllm.num_engines = len(engines)
        if self.strategy.is_rank_0() and not self.trainer.use_cuda_ipc:
            self.trainer._init_vllm_sync_group(self.strategy.args.vllm.sync_backend)

    def weights(self) -> dict[str, torch.Tensor] | None:
        """Those of all ranks, on the first; all ranks must be asked."""
        engine = self.actor.model
        whole = engine.zero_optimization_stage() < 3
        state = engine.module.state_dict() if whole else engine._consolidated_16bit_state_dict()
        if not self.strategy.is_rank_0():
            return None
        return {name: weight.detach().cpu().clone() for name, weight in state.items()}

    def save_weights(self, folder: str) -> None:
        """As a Hugging Face checkpoint; all ranks must be asked."""
        self.strategy.args.ckpt.output_dir = folder
        self.save_model()

    def save_state(self, folder: str, version: int) -> None:
        """What `load_state` takes up, in DeepSpeed's form; all ranks must be asked."""
        self.strategy.args.ckpt.path = folder
        self.save_checkpoint("state", {"version": version})

    def load_state(self, folder: str) -> int:
        """Goes on from a saved state; its version."""
        _, states = self.strategy.load_ckpt(self.actor.model, str(Path(folder) / "_actor"), "state")
        return int(states["version"])


class ReferenceRank(class_of(ReferenceModelActor)):  # type: ignore[misc]
    """One rank of the model that a KL term keeps a policy near to."""
