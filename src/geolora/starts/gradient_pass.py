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

from geolora import processes
from geolora.errors import DataError, GradientError
from geolora.kernels.sketch import Triplets, missing, random_basis, seen_from_left, seen_from_right
from geolora.pairs.find import Pair
from geolora.starts.put_back import copies, devices_of, running_statistics, write_values

Loss = Callable[[nn.Module, Any], Tensor]
"""(model, batch) -> scalar loss."""


class GradientSketch:
    """What is known of the gradient G of one pair's W; every pass adds to it.

    Attributes:
        pair: the pair.
        module_A, module_B: the modules that hold its factors as their `weight`.
        width: k, how many directions are followed.
        basis: orthonormal columns for the next pass: V (d_in, k), which shows G V, before the passes 1, 3, …;
            U (d_out, k), which shows G^T U, before the others.
        energies: sum of the r largest sigma^2 known after each pass.
        triplets: the r leading singular triplets as the last pass showed them; None before and in a pass.
    """

    def __init__(self, pair: Pair, module_A: nn.Module, module_B: nn.Module, width: int) -> None:
        self.pair, self.module_A, self.module_B = pair, module_A, module_B
        self.width = min(width, pair.d_in, pair.d_out)
        seed = zlib.crc32(f"sketch of {pair.name}".encode())
        self.basis = random_basis(pair.d_in, self.width, seed).float()
        self.energies: list[float] = []
        self.triplets: Triplets | None = None

    @contextmanager
    def shown_through_pair(self, from_right: bool) -> Iterator[nn.Parameter]:
        """Replace the pair by one of k slots, the basis and zeros, which does not change the function.

        Args:
            from_right: whether A holds the basis and B is zero, so that B's gradient is s G V; else B
                holds it and A's gradient is s (G^T U)^T.

        Yields:
            The factor that is zero, to take the gradient of.
        """
        self.triplets = None  # makes room
        A, B = self.pair.A, self.pair.B
        like = {"device": A.device, "dtype": torch.promote_types(A.dtype, torch.float32)}
        shape_A, shape_B = (self.width, *A.shape[1:]), (B.shape[0], self.width, *B.shape[2:])
        basis = self.basis = self.basis.to(**like)
        if from_right:
            new_A, new_B = basis.mT.reshape(shape_A), torch.zeros(shape_B, **like)
        else:
            new_A, new_B = torch.zeros(shape_A, **like), basis.reshape(shape_B)
        self.module_A.weight = nn.Parameter(new_A, requires_grad=not from_right)
        self.module_B.weight = nn.Parameter(new_B, requires_grad=from_right)
        try:
            yield self.module_B.weight if from_right else self.module_A.weight
        finally:
            self.module_A.weight, self.module_B.weight = A, B

    def add(self, product: Tensor, from_right: bool) -> None:
        """Take in what a pass has shown: G V (d_out, k), or G^T U (d_in, k)."""
        if not bool(product.isfinite().all()):
            raise GradientError(
                f"the gradient of `{self.pair.name}` is not finite. Look at the loss and the batches; "
                "with fp16, lower the loss scale."
            )
        seen = (seen_from_right if from_right else seen_from_left)(product, self.basis)
        r = self.pair.r
        self.energies.append(float(seen.sigma[:r].square().sum()))
        self.triplets = Triplets(*(factor[..., :r].float() for factor in seen))
        self.basis = (seen.U if from_right else seen.V).float()


def sketch_gradients(
    model: nn.Module,
    pairs: list[Pair],
    modules: dict[str, tuple[nn.Module, nn.Module]],
    batches: Iterable[Any],
    loss_fn: Loss | None,
    width: int | None,
    passes: int,
    tolerance: float,
) -> list[GradientSketch]:
    """Pass over the batches until no pair misses more than `tolerance` of its gradient, at most `passes` times.

    Args:
        modules: {layer: the modules whose `weight` is A, and B}.
        batches: iterated over once a pass.
        loss_fn, width, passes, tolerance: as in `geolora.get_lora_one_state`.
    """
    sketches = [GradientSketch(pair, *modules[pair.name], width or 2 * pair.r) for pair in pairs]
    with _undisturbed(model):
        for number in range(1, passes + 1):
            _pass(sketches, model, batches, loss_fn, number)
            if number > 1 and max(missing(sketch.energies) for sketch in sketches) <= tolerance:
                break
    return sketches


def mean_loss(model: nn.Module, batches: Iterable[Any], loss_fn: Loss | None = None) -> float:
    """Mean loss of the batches as the model stands, dropout off, over all processes; changes nothing."""
    device = next(model.parameters()).device
    total, count, failure = torch.zeros((), device=device), 0, None
    with _undisturbed(model), torch.no_grad():
        try:
            for loss in losses(model, batches, loss_fn):
                total, count = total + loss.detach().float(), count + 1
        except Exception as error:  # noqa: BLE001 (raised again, on all processes)
            failure = error
    count = _count_of_all(count, failure, device)
    return float(processes.sum_over_group(total) / count)


def without_gradient(model: nn.Module, batch: Any) -> list[str]:
    """Names of the trainable parameters that the loss of a batch does not depend on; changes nothing."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    with _undisturbed(model):
        for _, parameter in named:
            parameter.requires_grad_(True)
        (loss,) = losses(model, [batch], None)
        grads = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    return [name for (name, _), grad in zip(named, grads, strict=True) if grad is None]


def _pass(
    sketches: list[GradientSketch],
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Loss | None,
    number: int,
) -> None:
    """Pass 1, 2, … over the batches, added to every sketch; odd ones show G V, even ones G^T U."""
    from tqdm.auto import tqdm

    from_right = number % 2 == 1
    silent = processes.grouped() and torch.distributed.get_rank() != 0
    bar = tqdm(desc=f"gradient, pass {number}", unit="batch", delay=3, leave=False, disable=silent)
    with ExitStack() as stack, bar:
        factors = [
            stack.enter_context(sketch.shown_through_pair(from_right)) for sketch in sketches
        ]
        count, failure = 0, None
        try:
            for loss in losses(model, batches, loss_fn):
                refuse_useless(loss)
                loss.backward()
                count += 1
                bar.update()
        except Exception as error:  # noqa: BLE001 (raised again, on all processes)
            failure = error
    count = _count_of_all(count, failure, factors[0].device)
    for sketch, factor in zip(sketches, factors, strict=True):
        grad = torch.zeros_like(factor) if factor.grad is None else factor.grad
        factor.grad = None
        mean = (processes.sum_over_group(grad / sketch.pair.scale) / count).flatten(1)
        sketch.add(mean if from_right else mean.mT, from_right)


def losses(model: nn.Module, batches: Iterable[Any], loss_fn: Loss | None) -> Iterator[Tensor]:
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


def refuse_useless(loss: Tensor) -> None:
    """Raise `GradientError` for a loss that is not finite, or depends on no LoRA layer."""
    if not bool(loss.isfinite()):
        raise GradientError(f"the loss of a batch is {loss.item()}. Look at the batches.")
    if not loss.requires_grad:
        raise GradientError(
            "the loss of `batches` must depend on a LoRA layer; it does on none, or was made under "
            "no_grad. With reentrant checkpointing call model.enable_input_require_grads()."
        )


def _count_of_all(count: int, failure: Exception | None, device: torch.device) -> int:
    """The number of batches of all processes; raises on every one where one has failed, or all have none."""
    totals = torch.tensor([float(count), float(failure is not None)], device=device)
    batches, failures = processes.sum_over_group(totals).tolist()
    if failure is not None:
        raise failure
    if failures:
        raise GradientError("another process failed in this pass over its batches: see there.")
    if not batches:
        raise DataError("`batches` must hold at least one batch; got none.")
    return int(batches)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Switch dropout and all parameters' gradients off; put back what was, and what a forward pass changes.

    That is the state of the random number generators and the running statistics of norms. Train or eval
    mode is left alone: eval mode would switch gradient checkpointing off. Dropout rates are numbers on
    modules: `p` of torch's, names with "drop" in transformers.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rates = [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, float) and ("drop" in name or (name == "p" and _drops(module)))
    ]
    statistics = running_statistics(model)
    were = copies(statistics)
    try:
        for module, name, _ in rates:
            setattr(module, name, 0.0)
        for parameter in trainable:
            parameter.requires_grad_(False)
        with torch.random.fork_rng(devices=devices_of(model)):
            yield
    finally:
        for module, name, value in rates:
            setattr(module, name, value)
        for parameter in trainable:
            parameter.requires_grad_(True)
        write_values(statistics, were)


def _drops(module: nn.Module) -> bool:
    return "drop" in type(module).__name__.lower()
