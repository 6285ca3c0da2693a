"""The outermost eigenvalue by power iteration, the classical baseline.

It needs memory for two vectors instead of a Krylov basis, and more products than `lanczos` for the same accuracy
(Y. LeCun, P. Simard and B. Pearlmutter, "Automatic learning rate maximization by on-line estimation of the Hessian's
eigenvectors", 1993, is the form in which it came to neural networks).
"""

from typing import Literal

import torch
from torch import Tensor

from lyapunov_lightning.curvature.eigenpairs import Eigenpairs
from lyapunov_lightning.curvature.errors import NonFiniteCurvatureError
from lyapunov_lightning.curvature.linear import LinearOperator


def power_iteration(
    operator: LinearOperator,
    *,
    end: Literal["largest", "smallest"] = "largest",
    tol: float = 1e-2,
    max_matvecs: int = 200,
    start: Tensor | None = None,
    seed: int = 0,
) -> Eigenpairs:
    """The largest or the smallest eigenvalue of a symmetric operator by power iteration.

    Plain power iteration finds the eigenvalue of largest modulus, whichever end that is. Once an eigenvalue of the
    wrong sign shows, the spectrum is shifted so that the wanted end is the larger one. Stops when the residual
    ``‖Av − θv‖`` is at most ``tol·|θ|``.

    Args:
        operator: The symmetric operator.
        end: Which end of the spectrum.
        tol: Relative tolerance of the residual.
        max_matvecs: The most products to spend.
        start: The vector to begin with, shape ``(size,)``; random if None.
        seed: Seed of the random vector.

    Returns:
        One eigenpair.

    Raises:
        ValueError: If an argument is out of its range.
        NonFiniteCurvatureError: If a product is not finite.

    Example::

        >>> import torch
        >>> from lyapunov_lightning.curvature import HessianOperator, power_iteration
        >>> x = torch.ones(2, dtype=torch.float64, requires_grad=True)
        >>> hessian = HessianOperator(lambda batch: (batch * x**2).sum() / 2, [x], [torch.tensor([1.0, -2.0])])
        >>> round(float(power_iteration(hessian, end="smallest", tol=1e-6).values), 6)
        -2.0

    """
    if end not in ("largest", "smallest"):
        raise ValueError(f"`end` should be 'largest' or 'smallest', got {end!r}.")
    if not tol > 0:
        raise ValueError(f"`tol` should be a positive float, got {tol}.")
    if max_matvecs < 1:
        raise ValueError(f"`max_matvecs` should be a positive int, got {max_matvecs}.")
    sign = 1.0 if end == "largest" else -1.0
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(operator.size, generator=generator, dtype=operator.dtype).to(operator.device)
    vector = noise
    if start is not None:
        if start.numel() != operator.size:
            raise ValueError(f"`start` should have shape ({operator.size},), got {tuple(start.shape)}.")
        vector = start.detach().to(noise).reshape(-1)
        if not bool(torch.isfinite(vector).all()):
            raise ValueError("`start` should be finite.")
    if not float(torch.linalg.vector_norm(vector)) > 0:
        vector = noise
    vector = vector / torch.linalg.vector_norm(vector)
    shift = 0.0
    for num_matvecs in range(1, max_matvecs + 1):
        product = operator.matvec(vector).mul_(sign)  # of the operator whose upper end is wanted
        value = float(vector @ product)
        residual = float(torch.linalg.vector_norm(product - value * vector))
        if not (abs(value) < float("inf") and residual < float("inf")):
            raise NonFiniteCurvatureError(
                "A Hessian-vector product is not finite: the loss or its derivatives overflow or are NaN here."
            )
        rounding = 10 * torch.finfo(operator.dtype).eps * abs(value)
        converged = residual <= max(tol * abs(value), rounding)
        # A negative value, converged or not, shows that the other end may be the larger one in modulus. With the shift
        # by its modulus (and residual) the spectrum is non-negative there, and the iteration goes on.
        needed = residual - value
        stuck = num_matvecs > 20 and value - residual < 0
        if (value < 0 or stuck) and needed > shift * 1.01:
            shift = needed
            converged = False
            if num_matvecs == max_matvecs:
                break
            vector = vector + noise * (0.1 / torch.linalg.vector_norm(noise))
            vector = vector / torch.linalg.vector_norm(vector)
            continue
        if converged or num_matvecs == max_matvecs:
            break
        ahead = product + shift * vector
        norm = torch.linalg.vector_norm(ahead)
        if float(norm) == 0:
            break
        vector = ahead / norm
    return Eigenpairs(
        values=torch.tensor([sign * value], dtype=torch.float64),
        vectors=vector.reshape(1, -1),
        residuals=torch.tensor([max(residual, rounding)], dtype=torch.float64),
        converged=torch.tensor([converged]),
        num_matvecs=num_matvecs,
        num_largest=1 if end == "largest" else 0,
    )
