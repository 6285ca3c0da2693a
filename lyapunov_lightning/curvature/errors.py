"""What can go wrong in a measurement without being the caller's mistake."""


class MeasurementError(RuntimeError):
    """A curvature measurement could not be completed.

    Raised when the loss cannot be differentiated as asked, when a product is not finite, or when another rank of
    a distributed measurement failed. The message says which, and what to do about it.
    """


class NonFiniteCurvatureError(MeasurementError):
    """The loss, its gradient or a Hessian-vector product is NaN or infinite.

    Args:
        message: What is not finite, and where.

    """

    def __init__(
        self,
        message: str = "A Hessian-vector product is not finite: the loss or its derivatives overflow or are NaN here.",
    ) -> None:
        super().__init__(message)


class PeerFailureError(MeasurementError):
    """Other ranks of a distributed measurement failed; they say why themselves.

    Args:
        num_ranks: How many.

    """

    def __init__(self, num_ranks: int) -> None:
        super().__init__(f"The measurement failed on {num_ranks} other rank(s); their log says why.")


class Interrupted(KeyboardInterrupt):
    """Ends a search with what it has found, where an operator raises it in place of a product.

    Unlike a plain ``KeyboardInterrupt``, which may come in the middle of anything, it comes where nothing is half done.
    """


class CurvatureWarning(UserWarning):
    """A measurement is missing, degraded or to be read with care."""
