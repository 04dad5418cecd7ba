"""What the learner takes from OpenRLHF. Whatever else imports OpenRLHF must import this first: it makes it possible."""

from importlib.util import find_spec

import torch

if not torch.cuda.is_available():
    import turnwise.rl.openrlhf.without_cuda
if find_spec("flash_attn") is None:
    import turnwise.rl.openrlhf.without_flash_attention
if find_spec("vllm") is None:
    import turnwise.rl.openrlhf.without_vllm  # noqa: F401

import openrlhf.utils.utils
from openrlhf.models import Actor
from openrlhf.trainer.ppo_utils.experience import Experience
from openrlhf.trainer.ppo_utils.replay_buffer import NaiveReplayBuffer
from openrlhf.trainer.ray.launcher import RayActorGroup, ReferenceModelActor
from openrlhf.trainer.ray.ppo_actor import ActorPPOTrainer, PolicyModelActor
from openrlhf.utils.deepspeed import DeepspeedStrategy

__all__ = [
    "Actor",
    "ActorPPOTrainer",
    "DeepspeedStrategy",
    "Experience",
    "NaiveReplayBuffer",
    "PolicyModelActor",
    "RayActorGroup",
    "ReferenceModelActor",
    "class_of",
]

_half_precision = openrlhf.utils.utils.convert_to_torch_dtype


def _precision(name: str) -> torch.dtype:
    """OpenRLHF trains in single precision as in half, but knows no name for it."""
    return torch.float32 if name == "fp32" else _half_precision(name)


openrlhf.utils.utils.convert_to_torch_dtype = _precision


def class_of(actor: type) -> type:
    """The class of which @ray.remote made an actor, which alone can be subclassed."""
    found: type = actor.__ray_metadata__.modified_class.__ray_actor_class__  # type: ignore[attr-defined]
    return found
