"""Factors that are sharded over processes (FSDP2's DTensors): gathered to be read, each part written where it lies."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The tensor, gathered from all processes where it is sharded; all must ask."""
    sharded: Any = tensor
    return sharded.full_tensor() if is_sharded(tensor) else tensor


def part(tensor: Tensor) -> Tensor:
    """What of a tensor lies in this process."""
    sharded: Any = tensor
    return sharded.to_local() if is_sharded(tensor) else tensor


def is_first(model: nn.Module) -> bool:
    """Whether this process is the one to write files of a model: any, unless it is sharded."""
    sharded = any(is_sharded(parameter) for parameter in model.parameters())
    return not sharded or distributed.get_rank() == 0


def write(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy whole tensors, the same in all processes, into parameters of as many numbers: each process its part."""
    parts = [_part_like(target, source) for target, source in zip(targets, sources, strict=True)]
    torch._foreach_copy_([part(target) for target in targets], parts)  # pyright: ignore[reportPrivateImportUsage]
    for target in targets:
        if is_sharded(target):
            torch.autograd.graph.increment_version(target)


def _part_like(target: Tensor, source: Tensor) -> Tensor:
    if source.shape != target.shape:  # a kernel
        source = source.view(target.shape)
    if not is_sharded(target):
        return source
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = target
    laid = distribute_tensor(
        source.to(sharded.dtype), sharded.device_mesh, sharded.placements, src_data_rank=None
    )
    return laid.to_local()
