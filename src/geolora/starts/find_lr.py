"""`find_lr`: the longest step of W that is not too long for the loss at hand, nor for the layer.

Two numbers bound a step, whatever optimizer makes it. Trust: (loss before - loss after) / <gradient, step>, on the
batch whose gradient it is and with the same dropout, is 1 for a small step, and 0 where the curvature uses up
all that the gradient promises. Length: ||W+ - W||_F of a layer in the unit in which `GeoLoRA` counts its own
steps, root mean square over the layers. Curvature alone cannot see steps that forget what a model knows, where the
loss has little to learn; length alone cannot see a loss that is steep. The search trains for a few steps,
raises or lowers the step size after each until one of the bounds is met, and puts everything back.
Constants: measured (docs/decisions.md).
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from geolora import processes
from geolora.errors import DataError, GradientError, SettingError
from geolora.kernels.tangent import distance, predicted_decrease
from geolora.methods import METHODS, resolve
from geolora.methods.geolora import units
from geolora.pairs.find import Pair, find_pairs
from geolora.pairs.sharded import gathered, is_sharded
from geolora.starts.gradient_pass import Loss, losses, refuse_useless
from geolora.starts.put_back import (
    copies,
    devices_of,
    put_back,
    random_of_torch,
    set_random_of_torch,
    write_values,
)

PROBES = 16
"""Steps of a search."""
TRUST = 0.4
"""Least share of the predicted decrease that should be there after a step."""
LENGTH = 0.02
"""The longest step, in the unit of a layer; an adaptive step of GeoLoRA's default is about as long."""
FAR = 3.0
"""A step that is so many times too long is undone, whatever the loss says of it."""
FAILED_ELSEWHERE = "find_lr: another process failed on its batches: see there."
MOST = 1.2
"""The most that the logarithm of the step size changes after a probe."""


class Probe(NamedTuple):
    """A step of the search.

    Attributes:
        lr: its step size. loss: before it. length: of the step, in units of the layers.
        predicted: how far the loss was to fall, to first order; below 0 where a momentum led uphill.
        actual: how far it fell. trust: 1 less the share of the prediction that was not there.
    """

    lr: float
    loss: float
    predicted: float
    actual: float
    length: float
    trust: float


@dataclass(frozen=True)
class FoundLr:
    """What `find_lr` found.

    Attributes:
        lr: the step size to train with, at its largest where a schedule varies it.
        curve: every probe, in order.
    """

    lr: float
    curve: tuple[Probe, ...]

    def plot(self, path: str | Path) -> Path:
        """Draw step size, trust and length of every probe as a PNG; needs the `plots` extra."""
        from geolora.report.figures import save, search_figure

        save(search_figure(self.as_dict()), Path(path))
        return Path(path)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: `lr`, its `bounds`, and `curve` with the numbers of every probe, None where one is not finite."""
        rows = [probe._asdict() for probe in self.curve]
        finite = [{k: v if math.isfinite(v) else None for k, v in row.items()} for row in rows]
        return {"lr": self.lr, "bounds": {"trust": TRUST, "length": LENGTH}, "curve": finite}


def find_lr(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
    start: float | None = None,
    loss_fn: Loss | None = None,
    probes: int = PROBES,
    accumulate: int = 1,
) -> FoundLr:
    """Find a step size for a model with LoRA layers, by a few steps of training that are undone.

    Every probe costs about one and a third step. When it returns, also by an error or Ctrl-C, parameters, their
    gradients, running statistics and random states are what they were, bit for bit.

    Args:
        model: a PeftModel, or any module with LoRA layers, not wrapped for DDP; as it will be trained (mode,
            checkpointing).
        batches: training batches, mappings for model(**batch).loss, of the rows of a step. They are gone over again
            where they are fewer than needed. In several processes every one gives its own.
        optimizer: called as optimizer(model) or optimizer(model, lr=…); None is `GeoLoRA`. What is searched
            is the lr of its param groups that hold pairs; others keep theirs. Ranks are not judged meanwhile.
        start: the step size to begin with; None for the optimizer's default.
        loss_fn: (model, batch) -> scalar loss, where it is not the model's own.
        probes: how many steps are tried.
        accumulate: batches that a step sees together.

    Returns:
        A `FoundLr`.

    Raises:
        SettingError: an argument out of its range. DataError: no batch, or one without a loss.
        PairingError: no pair, or a layer that is none (DoRA, experts).
        GradientError: a loss that is not finite, does not depend on a LoRA layer, or is lowered by no step.

    Source: ratio and update of trust regions, Conn, Gould, Toint, "Trust-region methods", 2000, section 6.1.

    Examples:
        >>> lr = geolora.find_lr(model, loader).lr  # doctest: +SKIP
        >>> optimizer = geolora.GeoLoRA(model, lr=lr)  # doctest: +SKIP
    """
    for name, number in (("probes", probes), ("accumulate", accumulate)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise SettingError(
                f"find_lr: `{name}` must be a whole number from 1 on; got {number!r}."
            )
    if start is not None and not (start > 0 and math.isfinite(start)):
        raise SettingError(f"find_lr: `start` must be None or a number > 0; got {start!r}.")
    make = resolve(METHODS["geolora"].optimizer) if optimizer is None else optimizer
    with put_back(model):
        search = _Search(model, make, start, loss_fn)
        curve = tuple(_probes(search, _steps_of(batches, accumulate), probes))
    return FoundLr(_settled(curve), curve)


class _Search:
    """A model and its optimizer in a search, and which of its parameters the step size moves."""

    def __init__(
        self,
        model: nn.Module,
        make: Callable[..., torch.optim.Optimizer],
        start: float | None,
        loss_fn: Loss | None,
    ) -> None:
        self.model, self.loss_fn = model, loss_fn
        self.optimizer = make(model) if start is None else make(model, lr=start)
        self.pairs = find_pairs(model, with_sharded=True)
        self.units = units([(pair.d_out, pair.d_in) for pair in self.pairs])
        factors = {id(p) for pair in self.pairs for p in (pair.A, pair.B)}
        groups = self.optimizer.param_groups
        places = [i for i, g in enumerate(groups) if any(id(p) in factors for p in g["params"])]
        # by place, since a state that is loaded makes the groups anew; LoRA+ has more than lr for B
        each = make(model, lr=1.0).param_groups
        self.shares = {place: float(each[place]["lr"]) for place in places}
        searched = [groups[place] for place in places]
        rates = [groups[place]["lr"] / share for place, share in self.shares.items() if share]
        self.lr = float(rates[0]) if rates else 0.0
        if not self.lr > 0:
            raise SettingError(
                "find_lr: `optimizer` must have param groups that hold the pairs, with an lr above 0; got "
                f"{self.lr}."
            )
        for group in searched:
            if "tail" in group:
                group["tail"] = None  # a step that judges ranks is longer by what it cuts
        self.moved = [p for group in searched for p in group["params"]]
        self.beside = [p for p in self.moved if id(p) not in factors]
        moved = {id(p) for p in self.moved}
        self.others = [p for p in model.parameters() if p.requires_grad and id(p) not in moved]
        self.devices = devices_of(model)
        self.slopes: list[float] = []
        """|predicted| / lr of every probe so far."""

    def probe(self, step: list[Any], lr: float) -> Probe:
        """Take a step of this size on these batches, and undo it where the loss rises or it was far too long."""
        self.optimizer.zero_grad()
        seeds = random_of_torch(self.devices)
        loss = self._gradient(step)
        if not self._is_finite():
            return _failed(lr, loss)
        before, held = copies(self.moved), copies(self.others)
        state = copy.deepcopy(self.optimizer.state_dict())
        grads = {id(p): p.grad for p in self.moved if p.grad is not None}

        def undone(probe: Probe) -> Probe:
            write_values(self.moved, before)
            write_values(self.others, held)
            self.optimizer.load_state_dict(state)
            return probe

        for place, share in self.shares.items():
            self.optimizer.param_groups[place]["lr"] = lr * share
        try:
            self.optimizer.step()
        except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
            return undone(_failed(lr, loss))
        predicted, length = self._compared(before, grads)
        ahead = copies(self.others)
        write_values(self.others, held)  # what falls by their step is not ours
        with torch.no_grad(), torch.random.fork_rng(self.devices):
            set_random_of_torch(seeds, self.devices)
            now = self._mean(float(one) for one in self._losses(step))
        probe = Probe(
            lr, loss, predicted, loss - now, length, self._trust(lr, predicted, loss - now)
        )
        if not (probe.trust >= 0 and probe.length <= FAR * LENGTH):
            return undone(probe)
        write_values(self.others, ahead)
        return probe

    def _trust(self, lr: float, predicted: float, actual: float) -> float:
        """1 - (predicted - actual) / |predicted|, against the usual slope where this batch has less of one."""
        if not (math.isfinite(predicted) and math.isfinite(actual)):
            return -math.inf
        self.slopes.append(abs(predicted) / lr)
        usual = lr * max(self.slopes[-1], sum(self.slopes) / len(self.slopes))
        return 1 - (predicted - actual) / usual if usual else 1.0

    def _losses(self, step: list[Any]) -> Iterator[Tensor]:
        return losses(self.model, step, self.loss_fn)

    def _gradient(self, step: list[Any]) -> float:
        """The mean loss of some batches, and its gradient, over all processes."""

        def descend() -> Iterator[float]:
            for loss in self._losses(step):
                refuse_useless(loss)
                (loss / len(step)).backward()
                yield float(loss.detach())

        mean = self._mean(descend())
        if processes.grouped():
            world = torch.distributed.get_world_size()
            for p in (*self.moved, *self.others):
                if p.grad is not None and not is_sharded(p):
                    p.grad.copy_(processes.sum_over_group(p.grad) / world)
        return mean

    def _is_finite(self) -> bool:
        """Whether all gradients are, on all processes."""
        grads = [p.grad for p in (*self.moved, *self.others) if p.grad is not None]
        wrong = sum(not bool(gathered(grad).isfinite().all()) for grad in grads)
        flag = torch.tensor(float(wrong), device=self.moved[0].device)
        return not float(processes.sum_over_group(flag))

    def _mean(self, values: Iterable[float]) -> float:
        """Over all processes, in float64; raises on all of them where one fails."""
        failure, seen = None, []
        try:
            seen = list(values)
        except Exception as error:  # noqa: BLE001 (raised again, on all processes)
            failure = error
        told = [sum(seen), len(seen), failure is not None]
        total = torch.tensor(told, dtype=torch.float64, device=self.moved[0].device)
        total, count, failures = processes.sum_over_group(total).tolist()
        if failure is not None:
            raise failure
        if failures:
            raise GradientError(FAILED_ELSEWHERE)
        return total / count

    @torch.no_grad()
    def _compared(self, before: list[Tensor], grads: dict[int, Tensor]) -> tuple[float, float]:
        """How far the loss falls by the step to first order, and how long the step is."""
        was = {id(p): value for p, value in zip(self.moved, before, strict=True)}
        falls, squares = [], []
        for pair, unit in zip(self.pairs, self.units, strict=True):
            there = pair.gathered()
            here, slope = _matrices(pair, was), _matrices(pair, grads)
            scale = torch.tensor(pair.scale, device=there[0].device)
            falls.append(predicted_decrease(here, there, slope))
            squares.append((distance(here, there, scale) / unit).square())
        for p in self.beside:
            if id(p) in grads:
                change = gathered(was[id(p)]).double() - gathered(p).double()
                falls.append((gathered(grads[id(p)]).double() * change).sum())
        predicted, square = (math.fsum(map(float, values)) for values in (falls, squares))
        return predicted, math.sqrt(square / len(self.pairs))


def _failed(lr: float, loss: float) -> Probe:
    """A probe without a step, or with one that gave no number."""
    return Probe(lr, loss, 0.0, -math.inf, math.inf, -math.inf)


def _alike(steps: Iterator[list[Any]]) -> Iterator[list[Any]]:
    """As many as every process has."""
    while True:
        step, failure = None, None
        try:
            step = next(steps, None)
        except Exception as error:  # noqa: BLE001 (raised again, on all processes)
            failure = error
        if processes.true_on_any(failure is not None):
            raise failure or GradientError(FAILED_ELSEWHERE)
        if processes.true_on_any(step is None) or step is None:
            return
        yield step


def _matrices(pair: Pair, known: dict[int, Tensor]) -> tuple[Tensor, Tensor]:
    """What is known of A (r, d_in) and B (d_out, r) of a pair by their ids; zeros where nothing is."""
    A, B = (gathered(known.get(id(p), torch.zeros_like(p))).flatten(1) for p in (pair.A, pair.B))
    return A, B


def _probes(search: _Search, steps: Iterator[list[Any]], count: int) -> Iterator[Probe]:
    """Probe after probe; the step size of the next follows from the ratio of the last."""
    from tqdm.auto import tqdm

    silent = processes.grouped() and torch.distributed.get_rank() != 0
    lr = search.lr
    with tqdm(
        desc="step size", total=count, unit="probe", delay=3, leave=False, disable=silent
    ) as bar:
        for step in islice(_alike(steps), count):
            probe = search.probe(step, lr)
            yield probe
            bar.set_postfix(lr=f"{lr:.2g}", trust=f"{probe.trust:.2f}", refresh=False)
            bar.update()
            lr *= math.exp(_change(probe))


def _change(probe: Probe) -> float:
    """Of the logarithm of the step size: what the nearer of the two bounds says.

    Where the loss is quadratic along the step, 1 - trust is proportional to its size: half of the way to where
    that says trust is `TRUST`, since it differs from batch to batch.
    """
    doubt = max(1 - probe.trust, 1e-9)
    change = math.log((1 - TRUST) / doubt) / 2 if math.isfinite(doubt) else -MOST
    if 0 < probe.length < math.inf:
        change = min(change, math.log(LENGTH / probe.length))
    return max(-MOST, min(MOST, change))


def _settled(curve: tuple[Probe, ...]) -> float:
    """The step size of a search: the geometric mean over its last third, where it no longer depends on the start."""
    if not any(probe.actual > 0 for probe in curve):
        raise GradientError(
            "find_lr: the loss must fall by some step; it did by none, or gradients were not finite. Look at the loss: "
            "it must be the same for the same batch and the same random numbers of torch."
        )
    last = curve[2 * len(curve) // 3 :]
    return math.exp(sum(math.log(probe.lr) for probe in last) / len(last))


def _steps_of(batches: Iterable[Any], accumulate: int) -> Iterator[list[Any]]:
    """Lists of `accumulate` batches; the same ones again when all have been seen."""
    seen = 0
    while True:
        source, before = iter(batches), seen
        while len(step := list(islice(source, accumulate))) == accumulate:
            yield step
            seen += 1
        if not seen:
            raise DataError(f"find_lr: `batches` must hold {accumulate} or more; got {len(step)}.")
        if seen == before:  # an iterator, at its end
            return
