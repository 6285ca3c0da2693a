"""The start of a search for eigenvectors of which something is known already, such as the result of the last search."""

from torch import Tensor

from lyapunov_lightning.curvature.vectors.space import VectorSpace

_NOISE = 0.1
"""Norm of the random part of a warm start, relative to the given direction."""


def with_noise(space: VectorSpace, direction: Tensor, noise: Tensor) -> Tensor:
    """A direction at unit length, with a little of everything else.

    Without it an eigenvector that is orthogonal to the direction would stay out of sight however large its eigenvalue
    has become.

    Args:
        space: The space of the vectors.
        direction: Shape ``(n,)``; it is overwritten.
        noise: Shape ``(n,)``: a random vector.

    Returns:
        The start, which is the noise itself if the direction is zero or not finite.

    """
    norm = float(space.norm(direction))
    return direction.div_(norm).add_(noise, alpha=_NOISE / float(space.norm(noise))) if norm > 0 else noise
