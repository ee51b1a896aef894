"""Factors that are sharded over processes (FSDP2's DTensors): gathered to read them, written shard by shard."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    return hasattr(tensor, "full_tensor")


def gathered(tensor: Tensor) -> Tensor:
    """The full tensor. Where it is sharded, every process must call: its shards are sent around."""
    sharded: Any = tensor
    return sharded.full_tensor() if is_sharded(tensor) else tensor


def local_shard(tensor: Tensor) -> Tensor:
    """The shard of a tensor that this process holds; the tensor itself where it is not sharded."""
    sharded: Any = tensor
    return sharded.to_local() if is_sharded(tensor) else tensor


def is_first(model: nn.Module) -> bool:
    """Whether this process writes the files of a model: process 0 of a sharded model, else any."""
    sharded = any(is_sharded(parameter) for parameter in model.parameters())
    return not sharded or distributed.get_rank() == 0


def write_factors(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy full tensors into parameters; where those are sharded, each process writes its own shard.

    Args:
        parameters: what to write to.
        values: as many numbers each, the same in all processes; a kernel may be given flattened.
    """
    shards = [_shard_like(*both) for both in zip(parameters, values, strict=True)]
    torch._foreach_copy_([local_shard(target) for target in parameters], shards)  # pyright: ignore[reportPrivateImportUsage]
    for target in parameters:
        if is_sharded(target):  # writing to a shard does not count as a change of its DTensor
            torch.autograd.graph.increment_version(target)


def _shard_like(parameter: Tensor, value: Tensor) -> Tensor:
    """The numbers of `value` that belong into this process's shard of `parameter`."""
    if value.shape != parameter.shape:  # a kernel
        value = value.view(parameter.shape)
    if not is_sharded(parameter):
        return value
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = parameter
    laid = distribute_tensor(
        value.to(sharded.dtype), sharded.device_mesh, sharded.placements, src_data_rank=None
    )
    return laid.to_local()
