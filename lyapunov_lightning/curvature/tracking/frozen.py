r"""How soon an eigenvector is out of date: the curvature along it as the parameters move on.

The eigenvectors :math:`v` at both ends of the spectrum of one step are kept, and :math:`v^\top H(t) v` is measured at
later steps :math:`t`. As long as it stays at the end of the spectrum, the direction is still an extreme one ("Negative
eigenvalues of the Hessian in deep neural networks", sec. 2.2, fig. 2).
"""

from typing import Any

import torch
from torch import Tensor

from lyapunov_lightning.curvature.linear import LinearOperator, space_of
from lyapunov_lightning.curvature.solvers.eigenpairs import Eigenpairs


class FrozenDirections:
    """The top and the bottom eigenvectors of some steps, and the curvature along them at later steps.

    It holds two vectors of the operator's size for each frozen step.

    Example::

        >>> import torch
        >>> from lyapunov_lightning.curvature import HessianOperator, lanczos
        >>> from lyapunov_lightning.curvature.tracking.frozen import FrozenDirections
        >>> x = torch.ones(3, dtype=torch.float64, requires_grad=True)
        >>> def hessian(*scale):
        ...     batch = torch.tensor(scale, dtype=torch.float64)
        ...     return HessianOperator(lambda batch: (batch * x**2).sum() / 2, [x], [batch])
        >>> frozen = FrozenDirections()
        >>> frozen.freeze(7, lanczos(hessian(4.0, 1.0, -2.0), smallest=1))
        >>> top, bottom = frozen.curvatures(hessian(3.0, 5.0, 1.0))[7]
        >>> round(top, 6), round(bottom, 6)
        (3.0, 1.0)

    """

    def __init__(self) -> None:
        self._vectors: dict[int, Tensor] = {}

    def freeze(self, step: int, pairs: Eigenpairs) -> None:
        """Keep the outermost eigenvectors of both ends.

        Args:
            step: The step to which they belong.
            pairs: At least one eigenpair of each end.

        """
        self._vectors[step] = torch.stack([pairs.vectors[0], pairs.vectors[pairs.num_largest]])

    def curvatures(self, operator: LinearOperator) -> dict[int, tuple[float, float]]:
        """``vᵀHv`` along the vectors, for one product each.

        Vectors of another size are left out: parameters of the model were frozen or unfrozen since.

        Returns:
            For each step, the curvature along its top and along its bottom vector.

        """
        found: dict[int, tuple[float, float]] = {}
        space = space_of(operator)
        for step, vectors in self._vectors.items():
            # Moved to the device once, after a resume, and kept there.
            if vectors.shape[1] == space.length:
                self._vectors[step] = here = vectors.to(operator.device, operator.dtype)
                top, bottom = (float(space.inner(vector, operator.matvec(vector))) for vector in here)
                found[step] = (top, bottom)
        return found

    def state_dict(self) -> dict[str, Any]:
        """The vectors, on the CPU."""
        return {"vectors": {step: vectors.cpu() for step, vectors in self._vectors.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._vectors = {step: vectors for step, vectors in state["vectors"].items() if vectors is not None}
