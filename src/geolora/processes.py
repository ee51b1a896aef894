"""One run in several processes (`torchrun`, `accelerate launch`): who writes, and what all agree on."""

import os
from typing import Any

import torch


def count() -> int:
    """How many processes share the run, as the launcher says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join_group() -> None:
    """Form the group of processes, where there are several."""
    if count() > 1:
        from accelerate import PartialState

        PartialState(cpu=on_cpu())


def on_cpu() -> bool:
    """Whether to train on the CPU: without a GPU, and on a Mac, whose GPU has no float64."""
    return torch.backends.mps.is_available() or not torch.accelerator.is_available()


def rank() -> int:
    """Which of the processes that share the run this is."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """Whether this is the one process that writes for all."""
    return rank() == 0


def wait_for_all() -> None:
    """Return when all processes have called."""
    if count() > 1:
        torch.distributed.barrier()


def true_on_any(flag: bool) -> bool:
    """Whether the flag is True on any process of the group; all must call."""
    if not grouped():
        return flag
    from accelerate import PartialState

    largest = torch.tensor([int(flag)], device=PartialState().device)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return bool(largest.item())


def grouped() -> bool:
    """Whether this process is in a group of torch.distributed, whoever formed it."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def sum_over_group(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, replaced by its sum over the processes of the group; all must call."""
    if grouped():
        torch.distributed.all_reduce(tensor)
    return tensor


def one_device(arguments: Any) -> Any:
    """`TrainingArguments` of one process, which uses one GPU: Trainer would split over all, with more rows per step."""
    if count() == 1 and arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


def own_dropout(seed: int) -> None:
    """Give every process random numbers of its own, where there are several: they see other rows."""
    if count() > 1:
        torch.manual_seed(seed + rank())
