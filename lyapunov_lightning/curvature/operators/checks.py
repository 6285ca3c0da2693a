"""Whether an operator is what the solvers take it for: symmetric, and the same at every product."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lyapunov_lightning.curvature.linear import LinearOperator, space_of


@dataclass(frozen=True)
class OperatorCheck:
    """How far products are from the products of one symmetric matrix ``A``.

    Solvers for symmetric matrices find no residual below the asymmetry times the norm of ``A``. Where that is more than
    their tolerance they do not converge, or take the symmetric part that they see for the whole.

    What is to be expected of the Hessian of a loss that PyTorch differentiates rightly: an asymmetry of 1e-16 to 1e-14
    with float64 and of 1e-7 to 1e-5 with float32 parameters, of 1e-3 to 1e-2 under bfloat16 autocast; by finite
    differences 1e-4 to 1e-3 for smooth networks and up to 1 for those with kinks, such as ReLU and max-pooling. The
    nondeterminism of all of these is 0 on a CPU, and on a GPU of the order of rounding, where sums are taken in another
    order each time.

    Attributes:
        asymmetry: The largest of ``|uᵀAv − vᵀAu| / ‖Av‖`` for two independent standard normal vectors, an estimate of
            ``‖A − Aᵀ‖ / ‖A‖`` in the Frobenius norm, and of ``|uᵀAw − wᵀw| / wᵀw`` with ``w = Au``, which measures it
            among the leading eigenvectors, where a solver looks.
        nondeterminism: The relative difference of two products with one vector, everything evaluated anew in between. A
            loss with a random generator of its own shows here.
        inexactness: The relative difference of a product to a finite difference of gradients along ``w``; None if that
            was not asked for. For smooth losses 1e-6 with float64 and 1e-2 with float32; a loss with kinks gives large
            values although its products are exact.

    """

    asymmetry: float
    nondeterminism: float
    inexactness: float | None = None

    @property
    def is_symmetric(self) -> bool:
        """Whether the asymmetry is at most 1e-3, the tolerance to which `lanczos` looks for eigenpairs by default."""
        return self.asymmetry <= 1e-3

    @property
    def is_deterministic(self) -> bool:
        """Whether the nondeterminism is at most 1e-4: more than rounding, and less than any other random numbers."""
        return self.nondeterminism <= 1e-4

    @property
    def fault(self) -> str | None:
        """What keeps searches for eigenvalues from ending, in a sentence with its figures; None where neither does."""
        if not self.is_deterministic:
            return (
                f"The products are random: two of them with one vector differ by {self.nondeterminism:.0e} of their"
                " length, everything evaluated anew. The loss draws numbers that are not drawn again, such as those of"
                " a generator of its own. " + _NO_TOLERANCE
            )
        if not self.is_symmetric:
            return (
                f"The products are not those of a symmetric matrix: uᵀHv and vᵀHu differ by {self.asymmetry:.0e} of the"
                " length of a product. What the training follows is then not the gradient of one loss: a stopped"
                " gradient, a hook or an option that changes gradients, or a function whose backward pass is not its"
                " derivative; finite differences are so across the kinks of a ReLU too. " + _NO_TOLERANCE
            )
        return None


_NO_TOLERANCE = "No tolerance and no number of products makes an eigenvalue of that: take the residual for its error."


def check_operator(
    operator: LinearOperator,
    *,
    seed: int = 0,
    between: Callable[[], None] | None = None,
    reference: Callable[[Tensor], Tensor] | None = None,
) -> OperatorCheck:
    """Measure how symmetric and how deterministic an operator is, by four products.

    Args:
        operator: Any operator on flat vectors.
        seed: Seed of the random vectors.
        between: Is called before a product is repeated, to let nothing be remembered of the first one.
        reference: The product by other means, to compare with.

    Returns:
        What was found; NaN where a product is not finite.

    Example::

        >>> import torch
        >>> from lyapunov_lightning.curvature.operators.checks import check_operator
        >>> class Rotation:
        ...     size, dtype, device = 2, torch.float64, torch.device("cpu")
        ...     def matvec(self, v):
        ...         return torch.stack([-v[1], v[0]])
        >>> check_operator(Rotation()).is_symmetric
        False

    """
    space = space_of(operator)
    generator = torch.Generator().manual_seed(seed)
    with space.together():
        u, v = space.random(generator), space.random(generator)
        of_u, of_v = operator.matvec(u), operator.matvec(v)
        # Random vectors have next to nothing along the few leading eigenvectors among a million; w = Au lies along
        # these.
        of_w = operator.matvec(of_u)
        if between is not None:
            between()
        again = operator.matvec(u)
        products = torch.stack([space.inner(u, of_v), space.inner(v, of_u), space.inner(u, of_w)])
        norms = torch.stack([space.norm(of_u), space.norm(of_v), space.norm(again.sub_(of_u))])
        uv, vu, uw, norm_u, norm_v, change = space.agreed(torch.cat([products.to(norms), norms])).tolist()
        inexactness = None
        if reference is not None:
            expected = reference(of_u)
            numbers = torch.stack([space.norm(expected - of_w), space.norm(expected)])
            inexactness = _ratio(*space.agreed(numbers).tolist())
    # For standard normal u and v, uᵀ(A - Aᵀ)v is of the size of the Frobenius norm of A - Aᵀ, and ‖Av‖ of that of A.
    scale = max(norm_u, norm_v)
    asymmetries = [_ratio(abs(uv - vu), scale), _ratio(abs(uw - norm_u**2), norm_u**2)]
    return OperatorCheck(
        # `max` of numbers with NaN depends on their order; a NaN has to win, or the operator would pass for symmetric.
        asymmetry=max(asymmetries, key=lambda value: (value != value, value)),
        nondeterminism=_ratio(change, norm_u),
        inexactness=inexactness,
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else part  # of a zero operator nothing is off, and the ratio is 0
