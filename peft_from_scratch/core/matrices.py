"""Two computations on matrices that several methods share."""

import math

import torch
from torch import Tensor


def svd_halves(W: Tensor, r: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """(A, B) with scale · B A the nearest matrix of rank r to W = U S Vᵀ.

        A = (S_r / scale)^½ V_rᵀ      B = U_r (S_r / scale)^½           Eckart and Young

    The singular values go in equal parts to either side.

    Args
        W  (d_out, d_in)
        r  rank; where W has a lower one, so have A and B
    Returns  A (r, d_in) and B (d_out, r), of W's dtype
    """
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    root = (S[:r] / scale).sqrt()
    return root[:, None] * Vt[:r], U[:, :r] * root


def relative_error(error: float, whole: float) -> float:
    """error / whole; 0 where both are 0, infinite where `whole` alone is."""
    return error / whole if whole else math.inf if error else 0.0
