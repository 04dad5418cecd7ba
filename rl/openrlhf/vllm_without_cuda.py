"""Redirects how OpenRLHF brings weights to vLLM, on a machine without CUDA. Loaded where they are sent and received.

The group of processes is vLLM's own, and its bytes pass through a TCP store instead of NCCL; tensors lie on the CPU.
All that is computed with them is computed by the code that would compute it on a GPU.
"""

import torch

assert not torch.cuda.is_available(), "this module is for machines without CUDA"

import turnwise.rl.openrlhf.names  # noqa: E402, F401  # isort: skip  # OpenRLHF cannot be imported before it
import openrlhf.trainer.ray.ppo_actor as ppo_actor  # noqa: E402
import openrlhf.utils.distributed_util as distributed_util  # noqa: E402
from vllm.distributed.utils import StatelessProcessGroup  # type: ignore[import-not-found]  # noqa: E402

# By way of `vllm_process`, this also has vLLM keep linear layers as they are loaded, and loadable again.
from turnwise.rl.openrlhf.vllm_actor import Worker  # noqa: E402


class Group:
    """Stands for vLLM's PyNcclCommunicator, over the process group that this would have made itself from."""

    def __init__(self, group: StatelessProcessGroup) -> None:
        self._group = group

    def broadcast(self, tensor: torch.Tensor, src: int, stream: None = None) -> None:
        """Sends the tensor, or overwrites it with what comes."""
        tensor.copy_(self._group.broadcast(tensor, src))


def group_of_processes(
    master_address: str, master_port: int, rank: int, world_size: int, device: torch.device
) -> Group:
    """In the place of OpenRLHF's function, with its parameters."""
    # The store keeps what was sent until the next is, by when OpenRLHF has seen it arrive; and not for an hour.
    group = StatelessProcessGroup.create(master_address, master_port, rank, world_size, data_expiration_seconds=0)
    return Group(group)


def current_stream(device: None = None) -> None:
    """There is none."""


torch.cuda.current_stream = current_stream  # type: ignore[assignment]
# The first for vLLM's workers, the second for the rank that sends.
distributed_util.stateless_init_process_group = group_of_processes
ppo_actor.stateless_init_process_group = group_of_processes


class WorkerWithoutCUDA(Worker):
    """OpenRLHF's allocates what it receives on a GPU."""

    def update_weight(self, name: str, dtype: torch.dtype, shape: torch.Size, empty_cache: bool = False) -> None:
        """Receives one parameter, and loads it."""
        assert dtype == self.model_config.dtype, f"mismatch dtype: src {dtype}, dst {self.model_config.dtype}"
        weight = torch.empty(shape, dtype=dtype)
        self._model_update_group.broadcast(weight, src=0)
        self.model_runner.model.load_weights(weights=[(name, weight)])
