"""The leading part of a matrix that is only seen through products: randomised subspace iteration.

G (d_out, d_in) is never formed. What is seen of it are G V for an orthonormal V (d_in, k) and G^T U for
an orthonormal U (d_out, k); the left singular vectors of one are the basis of the next:

    V random;   Y = G V = P S W^T, U = P;   Z = G^T U = P S W^T, V = P;   ...

After every pass P, S and the other basis times W are the leading singular triplets as far as seen
(Halko, Martinsson, Tropp, "Finding structure with randomness", SIAM Review 53, 2011, algorithm 4.4;
one product with G or G^T a pass instead of two).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SLOWEST = 0.9


class Triplets(NamedTuple):
    """Leading singular triplets: U (d_out, k), sigma (k,) descending, V (d_in, k). float64."""

    U: Tensor
    sigma: Tensor
    V: Tensor


def random_basis(d: int, k: int, seed: int) -> Tensor:
    """(d, k) with orthonormal columns, uniformly random, the same for a seed on every machine."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, k, generator=generator, dtype=torch.float64))[0]


def seen_from_right(product: Tensor, V: Tensor) -> Triplets:
    """Triplets of G V V^T from G V.

    Args:
        product: G V, (d_out, k), any dtype.
        V: (d_in, k), orthonormal columns.

    Returns:
        min(d_out, k) triplets; orthonormal also where sigma is zero.
    """
    P, sigma, Wt = torch.linalg.svd(product.double(), full_matrices=False)
    return Triplets(P, sigma, V.double() @ Wt.mT)


def seen_from_left(product: Tensor, U: Tensor) -> Triplets:
    """Triplets of U U^T G from G^T U (d_in, k), likewise."""
    P, sigma, Wt = torch.linalg.svd(product.double(), full_matrices=False)
    return Triplets(U.double() @ Wt.mT, sigma, P)


def missing(energies: Sequence[float]) -> float:
    """Estimated share of the energy of the best rank-r part that the last pass has not seen.

    Energies grow from pass to pass by gains that shrink, in the long run geometrically, but slower and
    slower: what converges fast does so first. The gains to come are summed as if each were sqrt(q) of the
    one before, q being the last two gains' ratio, and sqrt(q) at most 0.9. Gradients of MiniLM: one to three times what is missing
    from the third pass on (benchmarks/how_well_is_the_gradient_seen.py).

    Args:
        energies: sum of the r largest sigma^2 after every pass, ascending.

    Returns:
        In [0, 1]; 1 after a single pass, 0 where there is no energy.
    """
    if not energies or energies[-1] <= 0.0:
        return 0.0
    if len(energies) == 1:
        return 1.0
    gain = max(energies[-1] - energies[-2], 0.0) / energies[-1]
    before = (energies[-2] - energies[-3] if len(energies) > 2 else energies[-2]) / energies[-1]
    root = min((gain / before) ** 0.5, SLOWEST) if before > 0.0 else SLOWEST
    return min(1.0, gain * root / (1.0 - root))
