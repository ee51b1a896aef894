"""Passes over batches that show the gradient of every pair through the adapter itself.

With B = 0 and A = V^T a LoRA layer computes what its base does, and one backward pass leaves
grad_B = s G V; with A = 0 and B = U it leaves grad_A = s U^T G (G = dL/dW, s LoRA's scale). Passes over the same
batches that take turns are subspace iteration on G (`kernels/sketch.py`) in the memory of an adapter: no base
weight needs a gradient, so the base may be quantised, and checkpointing, accumulation and autocast work as in
training. Meanwhile the pair is replaced by a wider one; it is put back whatever happens.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from geolora.errors import DataError, GradientError
from geolora.kernels.sketch import Triplets, missing, random_basis, seen_from_left, seen_from_right
from geolora.pairs.find import Pair

Loss = Callable[[nn.Module, Any], Tensor]
"""(model, batch) -> scalar loss."""


def look_at(
    model: nn.Module,
    pairs: list[Pair],
    modules: dict[str, tuple[nn.Module, nn.Module]],
    batches: Iterable[Any],
    loss_fn: Loss | None,
    width: int | None,
    passes: int,
    tolerance: float,
) -> list["Seat"]:
    """Look at the gradients of all pairs until no one misses more than `tolerance`, or `passes` times.

    Args:
        modules: {layer: the modules whose `weight` is A, and B}.
        batches: iterated over once a pass.
        loss_fn, width, passes, tolerance: as in `geolora.get_lora_one_state`.
    """
    seats = [Seat(pair, *modules[pair.name], width or 2 * pair.r) for pair in pairs]
    with _undisturbed(model):
        for number in range(1, passes + 1):
            _look(seats, model, batches, loss_fn, number)
            if number > 1 and max(missing(seat.energies) for seat in seats) <= tolerance:
                break
    return seats


def mean_loss(model: nn.Module, batches: Iterable[Any], loss_fn: Loss | None = None) -> float:
    """Mean loss of the batches as the model stands, dropout off, over all processes; changes nothing."""
    device = next(model.parameters()).device
    total, count, failure = torch.zeros((), device=device), 0, None
    with _undisturbed(model), torch.no_grad():
        try:
            for loss in _losses(model, batches, loss_fn):
                total, count = total + loss.detach().float(), count + 1
        except Exception as error:  # noqa: BLE001 (raised again, on all processes)
            failure = error
    return float(_over_processes(total, _agreed(count, failure, device)))


class Seat:
    """Where a pair sits, and the basis that is known: V (to look at G V next), then U, then V …"""

    def __init__(self, pair: Pair, on_A: nn.Module, on_B: nn.Module, width: int) -> None:
        self.pair, self.on_A, self.on_B = pair, on_A, on_B
        self.width = min(width, pair.d_in, pair.d_out)
        seed = zlib.crc32(f"sketch of {pair.name}".encode())
        self.basis = random_basis(pair.d_in, self.width, seed).float()
        self.energies: list[float] = []
        self.seen: Triplets | None = None

    @contextmanager
    def widened(self, from_right: bool) -> Iterator[nn.Parameter]:
        """Replace the pair by one that does nothing to the function; yields the factor to look at."""
        self.seen = None  # makes room
        A, B = self.pair.A, self.pair.B
        like = {"device": A.device, "dtype": torch.promote_types(A.dtype, torch.float32)}
        shape_A, shape_B = (self.width, *A.shape[1:]), (B.shape[0], self.width, *B.shape[2:])
        basis = self.basis = self.basis.to(**like)
        if from_right:
            known, looked = basis.mT.reshape(shape_A), torch.zeros(shape_B, **like)
        else:
            known, looked = basis.reshape(shape_B), torch.zeros(shape_A, **like)
        fixed, wanted = nn.Parameter(known, requires_grad=False), nn.Parameter(looked)
        self.on_A.weight, self.on_B.weight = (fixed, wanted) if from_right else (wanted, fixed)
        try:
            yield wanted
        finally:
            self.on_A.weight, self.on_B.weight = A, B

    def take(self, product: Tensor, from_right: bool) -> None:
        """What a pass has shown: G V (d_out, k), or G^T U (d_in, k)."""
        if not bool(product.isfinite().all()):
            raise GradientError(
                f"the gradient of `{self.pair.name}` is not finite. Look at the loss and the batches; "
                "with fp16, lower the loss scale."
            )
        seen = (seen_from_right if from_right else seen_from_left)(product, self.basis)
        r = self.pair.r
        self.energies.append(float(seen.sigma[:r].square().sum()))
        self.seen = Triplets(*(part[..., :r].float() for part in seen))
        self.basis = (seen.U if from_right else seen.V).float()


def _look(
    seats: list[Seat],
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Loss | None,
    number: int,
) -> None:
    """Pass 1, 2, … over the batches, and what it shows to every seat; odd ones look from the right."""
    from tqdm.auto import tqdm

    from_right, alone = number % 2 == 1, not _several() or torch.distributed.get_rank() == 0
    bar = tqdm(
        desc=f"gradient, pass {number}", unit="batch", delay=3, leave=False, disable=not alone
    )
    with ExitStack() as stack, bar:
        wanted = [stack.enter_context(seat.widened(from_right)) for seat in seats]
        count, failure = 0, None
        try:
            for loss in _losses(model, batches, loss_fn):
                _refuse_useless(loss)
                loss.backward()
                count += 1
                bar.update()
        except Exception as error:  # noqa: BLE001 (raised again, on all processes)
            failure = error
    count = _agreed(count, failure, wanted[0].device)
    for seat, factor in zip(seats, wanted, strict=True):
        grad = torch.zeros_like(factor) if factor.grad is None else factor.grad
        factor.grad = None
        mean = _over_processes(grad / seat.pair.scale, count).flatten(1)
        seat.take(mean if from_right else mean.mT, from_right)


def _losses(model: nn.Module, batches: Iterable[Any], loss_fn: Loss | None) -> Iterator[Tensor]:
    """The loss of every batch; refuses what is none."""
    from accelerate.utils import send_to_device

    device = next(model.parameters()).device
    for batch in batches:
        moved = send_to_device(batch, device)
        if loss_fn is not None:
            loss = loss_fn(model, moved)
        elif isinstance(moved, Mapping):
            output = model(**moved)
            loss = output["loss"] if isinstance(output, Mapping) else getattr(output, "loss", None)
        else:
            raise DataError(
                f"`batches` must hold mappings for model(**batch), or `loss_fn` must be given; got a "
                f"{type(batch).__name__}."
            )
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise DataError(
                f"a batch must give a scalar loss; got {type(loss).__name__}. Have it hold `labels`, or "
                "give `loss_fn`."
            )
        yield loss


def _refuse_useless(loss: Tensor) -> None:
    if not bool(loss.isfinite()):
        raise GradientError(f"the loss of a batch is {loss.item()}. Look at the batches.")
    if not loss.requires_grad:
        raise GradientError(
            "the loss of `batches` must depend on a LoRA layer; it does on none, or was made under "
            "no_grad. With reentrant checkpointing call model.enable_input_require_grads()."
        )


def _agreed(count: int, failure: Exception | None, device: torch.device) -> int:
    """The number of batches of all processes; raises on all of them where one has failed, or all have none."""
    if _several():
        both = torch.tensor([float(count), float(failure is not None)], device=device)
        torch.distributed.all_reduce(both)
        count = int(both[0])
        if failure is None and both[1] > 0:
            raise GradientError("another process failed in this pass over its batches: see there.")
    if failure is not None:
        raise failure
    if count == 0:
        raise DataError("`batches` must hold at least one batch; got none.")
    return count


def _over_processes(total: Tensor, count: int) -> Tensor:
    """total, summed over all processes, / count."""
    if _several():
        torch.distributed.all_reduce(total)
    return total / count


def _several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """No dropout, no parameter that wants a gradient; put back at the end, as are random numbers.

    Modes are left alone: eval mode would switch gradient checkpointing off. transformers keeps
    rates of attention as numbers on its modules. Running statistics of norms are put back too.
    """
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rates = [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, float) and ("drop" in name or (name == "p" and _drops(module)))
    ]
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    statistics = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    try:
        for module, name, _ in rates:
            setattr(module, name, 0.0)
        for parameter in wanted:
            parameter.requires_grad_(False)
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        for module, name, value in rates:
            setattr(module, name, value)
        for parameter in wanted:
            parameter.requires_grad_(True)
        for buffer, before in statistics:
            buffer.copy_(before)


def _drops(module: nn.Module) -> bool:
    return "drop" in type(module).__name__.lower()
