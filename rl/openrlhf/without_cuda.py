"""Redirects OpenRLHF's and DeepSpeed's calls to CUDA, on a machine that has none.

What asks for the current device gets the CPU; what waits for a device, or selects one, does nothing. All that is
computed is computed by the code that would compute it on a GPU.
"""

from functools import wraps

import deepspeed
import torch
from deepspeed.comm.torch import TorchBackend
from openrlhf.trainer.ppo_utils import replay_buffer

assert not torch.cuda.is_available(), "this module is for machines without CUDA"


def current_device() -> torch.device:
    """Where OpenRLHF puts its tensors."""
    return torch.device("cpu")


# One function for each: torch keeps a table of its own functions, in which none may stand twice.
torch.cuda.current_device = current_device  # type: ignore[assignment]
torch.cuda.set_device = lambda device: None
torch.cuda.synchronize = lambda device=None: None

# Minutes of C++ compiling, for a faster sum over ranks of one machine; without it that is gloo's.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

_gather = TorchBackend.all_gather_into_tensor


@wraps(_gather)
def _gather_at_once(
    self: TorchBackend,
    output_tensor: torch.Tensor,
    input_tensor: torch.Tensor,
    group: object = None,
    async_op: bool = False,
) -> object:
    """DeepSpeed gathers several parameters (ZeRO-3) and waits for the last alone. On a GPU all have come by then; on a
    CPU another may come late, and overwrite with old weights what was loaded or learnt meanwhile.
    """
    transfer = _gather(self, output_tensor, input_tensor, group, async_op)
    if async_op:
        transfer.wait()
    return transfer


TorchBackend.all_gather_into_tensor = _gather_at_once

_build = replay_buffer.NaiveReplayBuffer.__init__


@wraps(_build)
def _build_on_cpu(self: replay_buffer.NaiveReplayBuffer, *arguments: object) -> None:
    """The constructor writes "cuda:" before the number of the device, and uses it for nothing but moving tensors."""
    torch.cuda.current_device = lambda: 0
    try:
        _build(self, *arguments)
    finally:
        torch.cuda.current_device = current_device  # type: ignore[assignment]
    self.target_device = current_device()


replay_buffer.NaiveReplayBuffer.__init__ = _build_on_cpu
