"""The result of a measurement of `SpectrumTracker`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from typing_extensions import override

from lyapunov_lightning.training.results import Result, known, ranked


@dataclass(frozen=True, kw_only=True)
class TrackedSpectrum(Result):
    """The result of a measurement of `SpectrumTracker`; None or empty where nothing was measured.

    Attributes:
        largest, smallest: The eigenvalues of both ends, the outermost first, in the unit of the loss's second
            derivative.
        residual: The largest residual ``‖Hv − λv‖`` among them; an eigenvalue of the Hessian lies within it.
        converged: The share of the eigenvalues that met the tolerance.
        matvecs: Hessian-vector products spent on the Hessian as a whole, or differences of gradients.
        negative_mass: Share of the negative eigenvalues in the sum of the moduli of the tracked eigenvalues, or of all
            eigenvalues if the density is measured.
        cosines_largest, cosines_smallest: Absolute cosine of the mini-batch gradients with each eigenvector, averaged
            over ten mini-batches of the data.
        gradient_in_top_subspace: Share of these gradients' squared norm in the span of the upper end's eigenvectors.
        gradient_in_random_subspace: The same share for a random vector, to compare with.
        subspace_overlap, subspace_overlap_first: The overlap of that span with the one of the last and of the first
            measurement, ``‖V_old V_newᵀ‖²_F / k``; 1 for equal spans.
        trace, frobenius_norm: Stochastic estimates for the whole Hessian.
        trace_error, frobenius_norm_error: Their standard errors.
        lambda_max_of: The largest eigenvalue of each diagonal block, by name.
        lambda_max_error_of: Their estimated errors.
        trace_of, trace_error_of: The trace of each diagonal block, estimated, and its standard error.
        block_converged: The share of the blocks whose eigenvalue met the tolerance.
        block_matvecs: Products spent on the blocks.
        has_block_curves: Whether each block is logged as a curve; else the blocks are in the figure and the table.
        exponents_largest, exponents_smallest: The Lyapunov exponents of gradient ascent and of the training map.
        paper_largest, paper_smallest: The eigenvalues in the paper's convention.
        from_other_end: How many of the eigenvalues belong to the other end of the spectrum, and are among these because
            they grow faster under the map than those left of their own end.

    """

    largest: tuple[float, ...] = ()
    smallest: tuple[float, ...] = ()
    residual: float | None = None
    converged: float | None = None
    matvecs: int = 0
    negative_mass: float | None = None
    cosines_largest: tuple[float, ...] = ()
    cosines_smallest: tuple[float, ...] = ()
    gradient_in_top_subspace: float | None = None
    gradient_in_random_subspace: float | None = None
    subspace_overlap: float | None = None
    subspace_overlap_first: float | None = None
    trace: float | None = None
    trace_error: float | None = None
    frobenius_norm: float | None = None
    frobenius_norm_error: float | None = None
    lambda_max_of: Mapping[str, float] = field(default_factory=dict)
    lambda_max_error_of: Mapping[str, float] = field(default_factory=dict)
    trace_of: Mapping[str, float] = field(default_factory=dict)
    trace_error_of: Mapping[str, float] = field(default_factory=dict)
    block_converged: float | None = None
    block_matvecs: int | None = None
    has_block_curves: bool = True
    exponents_largest: tuple[float, ...] = ()
    exponents_smallest: tuple[float, ...] = ()
    paper_largest: tuple[float, ...] = ()
    paper_smallest: tuple[float, ...] = ()
    from_other_end: int | None = None

    @property
    def tracked_norm(self) -> float:
        """The Frobenius norm of the tracked eigenvalues alone, as in the sharpest-directions paper."""
        return math.hypot(*self.largest, *self.smallest)

    @property
    @override
    def has_converged(self) -> bool:
        return self.converged in (None, 1.0) and self.block_converged in (None, 1.0)

    @override
    def scalars(self) -> dict[str, float]:
        shown = ("trace", "frobenius_norm", "gradient_in_top_subspace", "subspace_overlap")
        quality = ("residual", "converged", "matvecs", "trace_error", "frobenius_norm_error")
        of_blocks = ("block_converged", "block_matvecs")
        further = (
            "tracked_norm",
            "negative_mass",
            "gradient_in_random_subspace",
            "subspace_overlap_first",
            "from_other_end",
        )
        found: dict[str, float | None] = {
            **ranked("spectrum/lambda", self.largest),
            **ranked("spectrum/lambda_min", self.smallest),
            **(self._of_blocks() if self.has_block_curves else {}),
            **{f"spectrum/{name}": getattr(self, name) for name in shown},
            **ranked("spectrum_details/gradient_cosine", self.cosines_largest),
            **ranked("spectrum_details/gradient_cosine_min", self.cosines_smallest),
            **ranked("spectrum_details/lyapunov_exponent", self.exponents_largest),
            **ranked("spectrum_details/lyapunov_exponent_min", self.exponents_smallest),
            **ranked("spectrum_details/paper_lambda", self.paper_largest),
            **ranked("spectrum_details/paper_lambda_min", self.paper_smallest),
            **{f"spectrum_details/{name}": getattr(self, name) for name in (*further, *quality, *of_blocks)},
        }
        return known(found)

    @override
    def table(self) -> dict[str, float]:
        errors = {"lambda_max_error": self.lambda_max_error_of, "trace_error": self.trace_error_of}
        found = {} if self.has_block_curves else self._of_blocks()
        for name, values in errors.items():
            found |= {f"spectrum_details/{name}_{block}": value for block, value in values.items()}
        return found

    def _of_blocks(self) -> dict[str, float]:
        """The numbers of each diagonal block, by tag."""
        return {
            **{f"spectrum/lambda_max_{block}": value for block, value in self.lambda_max_of.items()},
            **{f"spectrum_details/trace_{block}": value for block, value in self.trace_of.items()},
        }
