"""A model and the random numbers as they were, after something has been tried on them."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def copies(tensors: list[Any]) -> list[Tensor]:
    """Copies of tensors as they stand."""
    return [tensor.detach().clone() for tensor in tensors]


@torch.no_grad()
def write_values(tensors: list[Any], values: list[Tensor]) -> None:
    """Write values into tensors."""
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def running_statistics(model: nn.Module) -> list[Tensor]:
    """Buffers of norms, which a forward pass changes. Those of other layers may be quantised weights of any size."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    return [buffer for norm in norms for buffer in norm.buffers()]


def devices_of(model: nn.Module) -> list[int]:
    """CUDA devices that a model lies on."""
    return sorted({p.device.index for p in model.parameters() if p.is_cuda})


def random_of_torch(devices: list[int]) -> list[Tensor]:
    """States of torch's random numbers, on the CPU and on the devices."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]


def set_random_of_torch(states: list[Tensor], devices: list[int]) -> None:
    """Set what `random_of_torch` gave."""
    torch.set_rng_state(states[0])
    for device, state in zip(devices, states[1:], strict=True):
        torch.cuda.set_rng_state(state, device)


@contextmanager
def put_back(model: nn.Module) -> Iterator[None]:
    """Put back, whatever happens: trainable parameters, their gradients, running statistics, random states of torch, Python, NumPy."""
    import numpy as np

    trained = [p for p in model.parameters() if p.requires_grad]
    devices = devices_of(model)
    values, grads, buffers = copies(trained), [p.grad for p in trained], running_statistics(model)
    were = copies(buffers)
    states = random_of_torch(devices), random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        for p in trained:
            p.grad = None
        yield
    finally:
        write_values(trained, values)
        write_values(buffers, were)
        for p, grad in zip(trained, grads, strict=True):
            p.grad = grad
        set_random_of_torch(states[0], devices)
        random.setstate(states[1])
        np.random.set_state(states[2])  # noqa: NPY002
