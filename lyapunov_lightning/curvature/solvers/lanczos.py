r"""Extreme eigenpairs of a symmetric operator, both ends from one Krylov space.

Thick-restart Lanczos: a Krylov basis grows by one product a step; when it is full it is compressed to the Ritz vectors
nearest to both ends of the spectrum, and then grows again (K. Wu and H. Simon, "Thick-restart Lanczos method for
large symmetric eigenvalue problems", SIAM J. Matrix Anal. Appl. 22, 2000).

A pair of small residual need not be the one that was asked for. Two measures are taken:

- The Krylov space of one vector holds one direction of each eigenspace, so a repeated eigenvalue looks like a simple
  one in it; and with a start near an eigenvector it holds little else. The accepted pairs are therefore *challenged*:
  the direction in which the basis grows is given up for a fresh random one, and what was missed comes out of its Krylov
  space. That goes on until a copy is not likely to have stayed hidden in it. A small operator's basis may span the
  whole space, and then does.
- Where the values of the ends alone are wanted, copies do not matter. There the search itself goes on until its start
  is not likely to hide an eigenvalue further out. From one similar operator to the next a start is blended with noise,
  and with the vectors that came next to the wanted ones the last time, and a few products are always spent, in which
  whatever has risen since would outgrow the others.

How likely, `lyapunov_lightning.curvature.solvers.hidden` tells of either start, from the spectrum that it has shown.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lyapunov_lightning.curvature.arguments import check_positive
from lyapunov_lightning.curvature.errors import Interrupted
from lyapunov_lightning.curvature.linear import LinearOperator, space_of
from lyapunov_lightning.curvature.solvers.eigenpairs import Eigenpairs
from lyapunov_lightning.curvature.solvers.krylov import KrylovBasis, RitzPairs, Target, both_ends
from lyapunov_lightning.curvature.solvers.warm_start import with_noise
from lyapunov_lightning.curvature.vectors.memory import free_bytes
from lyapunov_lightning.curvature.vectors.space import VectorSpace

_RUNNERS_UP_SHARE = 0.3
"""Share of the vectors next to the wanted ones in the start of the next search. They are carried along from search to
search, so that an eigenvalue that rises is seen before it overtakes."""

_FAMILIARITY = 20.0
"""How much more than a random vector a warm start is taken to have of an eigenvector that it may have missed: what lies
near the wanted ones grew beside them in the last search. For one that only the noise has it is 0.1. Of 280 warm
searches in clustered, repeated, huge-ranged and indefinite spectra and in ones like a network's 4 were wrong with 20,
in 7.9 products each; 3 with 10, in 9.0; none with 1, in 10.8; and 22 where the distance to the next Ritz value was
believed, in 6.1. The next search sees what one has missed: its noise is another one."""

_LEAST_PRODUCTS_COLD = 1
_LEAST_PRODUCTS_WARM = 4
_LEAST_PRODUCTS_WITH_RIVAL = 6
"""Products that are spent on an outermost value at least: of a cold start, of a warm one, and where the next Ritz pair
comes near. With less, one that overtook, or rose out of the bulk of the spectrum since the last search, was missed more
often: in the training of two networks at once, of which the one had the largest eigenvalue first and then the other, in
13 of 177 searches with five products, in 10 with six and in 8 with eight."""

_RIVAL_MARGIN = 0.1
"""How near the next Ritz pair comes then, relative to the value."""

_UNCHANGED_SHARE = 0.03
"""Residual, relative to the tolerance, below which a start counts as an eigenvector still."""

_RESIDUAL_SHARE = 2.5
"""The residual at which an eigenvalue may count as exact to its tolerance, in relation to that: the distance to the
next eigenvalue, from which its error follows, is not known well while the residual is large."""

_ROUGH_TOL = 1e-3
"""Tolerance of the largest value from which on a few digits of the vectors will do."""

_WHOLE_SPACE_SIZE = 160
"""Operators up to this size get a basis that may span the whole space: the result is exact."""

_LOWER_END_ALONE = 64
"""The least basis for the lower end alone: in the Hessian of a network the upper end lies in its way, and a basis that
holds that too takes a half to two thirds of the products of one that finds it anew after every restart."""

BASIS_BYTES = 5 * 2**27
"""Bound on the memory of a basis by default: 33 float32 vectors of a model of 5 million parameters."""

_LARGE_BASIS = 128
"""The size of the basis where memory allows for it: each restart costs products, and 20 + 3 pairs of four networks took
none with this one."""

_SHARE_OF_FREE_MEMORY = 0.125
"""Share of the free memory that such a basis may take: on a machine without accelerators several processes see the same
memory as free."""

_SHARE_OF_THE_OTHER = 0.85
"""Share of the room left by the wanted Ritz vectors that the other end gets where it dominates: from 0.33 to 0.85 the
products that the lower end of a network's Hessian takes fell by up to 10 %."""

_ROOM_TO_CHALLENGE = 32
"""Room in the basis with which a challenge begins, so that few have to be restarted."""

_SHARE_TO_CHALLENGE = 0.75
"""Share of the tolerance within which pairs are challenged, so that what they take of the new Krylov space leaves them
converged. With all of it, 20 + 3 pairs of a trained LeNet took 94 products in place of 82, challenged twice."""

_PRODUCTS_BELOW_ROUNDING = 32
"""Products that a challenge of negligible values spends at most: what the rounding of the products hides, no further
ones bring to light."""

_FALL = 10.0
"""By how much a residual is taken to fall with one product at most."""

_ASYMMETRY_SHARE = 0.01
"""Asymmetry of the products, relative to the tolerance, from which on the residuals are measured and not derived: what
shows of their noise in the basis is a small part of it."""


def lanczos(
    operator: LinearOperator,
    *,
    largest: int = 1,
    smallest: int = 0,
    tol: float = 1e-3,
    value_tol: float | None = None,
    max_missed: float | None = 1e-2,
    max_matvecs: int | None = None,
    start: Tensor | None = None,
    seed: int = 0,
    max_basis_vectors: int | None = None,
    max_basis_bytes: int = BASIS_BYTES,
    watch: "Callable[[Search], None] | None" = None,
    resume: Mapping[str, Any] | None = None,
) -> Eigenpairs:
    """The largest and the smallest eigenvalues of a symmetric operator, with vectors, residuals and errors.

    A pair ``(θ, v)`` has converged when ``‖Av − θv‖ <= tol·|θ|``, or when the residual is negligible: at the rounding
    error of the products, or at 1e-8 of the norm of ``A``. The residual is a true error bound: an
    eigenvalue lies within it of ``θ``. By the symmetry of ``A`` the error of the value is nearer to its square over the
    distance to the next eigenvalue. Where the values alone matter, `value_tol` stops at that, for fewer products.

    The bound holds for operators that are not quite symmetric, or noisy, too. Where the products show it (finite
    differences, half precision, a loss that draws its own random numbers), the residual of each returned pair is
    measured by one more product.

    The seed determines every random number: the result is a function of the arguments alone, but for the size of the
    basis where that is left to the memory. The global generators are neither read nor advanced. The memory is that of
    the Krylov basis, which grows as it is needed to at most ``max_basis_vectors + 1`` vectors, of the result, of two
    vectors more, and of one for each time that copies of eigenvalues are looked for. What fails on one rank of a
    distributed operator ends the search on all of them.

    Args:
        operator: The symmetric operator, known by ``matvec``, ``size``, ``dtype`` and ``device``.
        largest: How many eigenvalues of the upper end.
        smallest: How many eigenvalues of the lower end (the most negative ones).
        tol: Relative tolerance of the residuals.
        value_tol: Relative tolerance of the errors of the eigenvalues, in place of `tol`: a pair has converged when its
            estimated error (see `Eigenpairs.value_errors`) is at most ``value_tol·|θ|`` and its residual at most 2.5
            times that. The error of one value of each end is that to the outermost eigenvalue.
        max_missed: The chance, at most, that an eigenvalue beyond a wanted one is missed, such as a copy of a repeated
            one (see `Eigenpairs.missed_probability`): the search goes on until it is that small. Of one value of each
            end, the chance for the worst place of the eigenvalue may be ten times that. None for no such check: what
            has a small residual is taken for what was asked for, which is right where no eigenvalue is repeated.
        max_matvecs: The most products to spend; ``100 + 50 * (largest + smallest)`` if None. What has not converged by
            then is returned as such.
        start: A vector ``(size,)``, or rows ``(j, size)``, in whose direction the wanted eigenvectors are expected;
            best the `Eigenpairs.start` of an earlier, similar operator. A little noise is added, so that a direction
            that `start` lacks is not missed.
        seed: Seed of the start vector, or of the noise added to it. In a series of searches, each of which starts from
            the last one, it should be another one each time.
        max_basis_vectors: The size of the Krylov basis. By default ``max(32, 2 * (largest + smallest) + 16)``, at
            least 64 for the lower end alone, within `max_basis_bytes`, and the whole space for operators of up to 160
            numbers. Where those bytes and an eighth of the memory that is free hold as many, and more is wanted than
            single values, up to 128: a search that has room needs no restart. The size decides on rounding and on the
            number of products, so give it where a result has to be the same on another machine.
        max_basis_bytes: Bound on the memory of a basis of the default size, down to four vectors more than are wanted.
        watch: Called with the search before each product, to show how far it is, or to keep its ``state_dict()``.
        resume: A ``state_dict()`` of a search for the same pairs of the same operator, with which to go on; `start`,
            `seed` and the sizes of the basis are those of that search. It finds what that one would have found.

    Returns:
        The eigenpairs, of the upper end descending, then of the lower end ascending. Where a product has raised
        `Interrupted`, those of the search so far, of which none counts as converged; if there are as many yet.

    Raises:
        ValueError: If an argument is out of its range, more eigenvalues are wanted than there are, or `start` does not
            fit the operator.
        NonFiniteCurvatureError: If a product is not finite.
        PeerFailureError: If another rank failed.

    Example::

        >>> import torch
        >>> from lyapunov_lightning.curvature import HessianOperator, lanczos
        >>> x = torch.ones(3, dtype=torch.float64, requires_grad=True)
        >>> scale = torch.tensor([4.0, 1.0, -2.0], dtype=torch.float64)
        >>> hessian = HessianOperator(lambda batch: (batch * x**2).sum() / 2, [x], [scale])
        >>> lanczos(hessian, largest=1, smallest=1).values.round(decimals=6)
        tensor([ 4., -2.], dtype=torch.float64)

    """
    space = space_of(operator)
    target = _target(space.size, largest, smallest, tol, value_tol, max_missed)
    if max_matvecs is None:
        max_matvecs = 100 + 50 * target.count
    elif max_matvecs < target.count:
        raise ValueError(
            f"`max_matvecs` should be at least `largest + smallest` = {target.count}, got {max_matvecs!r}."
        )
    capacity = _capacity(space, target, max_basis_vectors, max_basis_bytes)
    generator = torch.Generator().manual_seed(seed)
    with space.together():
        if resume is not None:
            capacity = _resumed_capacity(resume, space, target)
        elif max_basis_vectors is None:
            capacity = _grown(capacity, space, target, max_basis_bytes)
        # Not for the lower end, which in the Hessian of a network is a small part of the norm.
        roughly = value_tol is not None and value_tol >= _ROUGH_TOL and (largest, smallest) == (1, 0)
        basis = KrylovBasis(operator, capacity, generator, roughly=roughly)
        if resume is not None:
            search = Search(basis, target, max_matvecs, is_warm=resume["is_warm"])
            search.load_state_dict(resume)
        else:
            direction, familiarity = (None, 1.0) if start is None else _blended(space, start, generator)
            basis.begin(direction, familiarity)
            search = Search(basis, target, max_matvecs, is_warm=familiarity != 1)
        ritz, missed = search.run(watch)
        num_matvecs, is_interrupted = search.num_matvecs, search.is_interrupted
        vectors, start_rows = basis.combine(ritz.coefficients, _next_start(basis, target))
        pairs = Eigenpairs(
            values=ritz.values,
            vectors=vectors,
            residuals=ritz.residuals,
            value_errors=ritz.value_errors,
            missed_probability=missed,
            converged=ritz.converged,
            num_matvecs=num_matvecs,
            num_largest=largest,
            start=start_rows[0],
        )
        asymmetry, rounding = basis.asymmetry, basis.rounding
        # Before any further product, which has its own need of memory: the basis holds 33 vectors or more.
        del basis, search
        if not is_interrupted and asymmetry > _ASYMMETRY_SHARE * target.tol * float(ritz.values.abs().min()):
            pairs = _measured(operator, pairs, target, ritz.negligible, rounding, max_matvecs)
    return pairs


def _target(
    size: int, largest: int, smallest: int, tol: float, value_tol: float | None, max_missed: float | None
) -> Target:
    """The target, from checked arguments."""
    if largest < 0 or smallest < 0 or largest + smallest == 0:
        raise ValueError(
            "`largest` and `smallest` should be non-negative ints, not both 0,"
            f" got largest={largest} and smallest={smallest}."
        )
    if largest + smallest > size:
        raise ValueError(
            f"`largest + smallest` should be at most the operator's size {size},"
            f" got largest={largest} and smallest={smallest}."
        )
    check_positive("tol", tol)
    if value_tol is not None:
        check_positive("value_tol", value_tol)
        tol = _RESIDUAL_SHARE * value_tol
    if max_missed is not None:
        check_positive("max_missed", max_missed)
    return Target(largest, smallest, tol, value_tol, max_missed)


def _capacity(space: VectorSpace, target: Target, max_basis_vectors: int | None, max_basis_bytes: int) -> int:
    """How many vectors the basis may hold."""
    if max_basis_vectors is None:
        max_basis_vectors = least_basis_vectors(space, target.largest, target.smallest, max_basis_bytes)
    elif max_basis_vectors < target.count + 2:
        raise ValueError(
            f"`max_basis_vectors` should be at least `largest + smallest + 2` = {target.count + 2},"
            f" got {max_basis_vectors!r}."
        )
    return min(max_basis_vectors, space.size)


def least_basis_vectors(space: VectorSpace, largest: int, smallest: int, max_basis_bytes: int = BASIS_BYTES) -> int:
    """The size of the basis by default where there is no memory for more, a number that depends on nothing else.

    It is one that `lanczos` takes, so that it may be above the size of a small space. For a search whose result has to
    be the same whatever memory happens to be free.

    Args:
        space: The space of the operator.
        largest: How many eigenvalues of the upper end.
        smallest: How many of the lower end.
        max_basis_bytes: As for `lanczos`.

    """
    count = largest + smallest
    if space.size <= _WHOLE_SPACE_SIZE:
        return max(space.size, count + 2)  # `lanczos` wants to be asked for two vectors more than eigenvalues
    least = 32 if largest else _LOWER_END_ALONE
    affordable = max_basis_bytes // space.vector_bytes
    return min(max(least, 2 * count + 16), max(affordable, count + 4), space.size)


def _grown(capacity: int, space: VectorSpace, target: Target, max_basis_bytes: int) -> int:
    """How many it may hold where there is memory for more, on every rank."""
    larger = min(_LARGE_BASIS, max_basis_bytes // space.vector_bytes, space.size)
    # A single value is found in fewer products than the basis holds, beside a training that needs the memory.
    if target.values_alone or larger <= capacity:
        return capacity
    needed = larger * space.vector_bytes
    return larger if space.all_say(needed <= _SHARE_OF_FREE_MEMORY * free_bytes(space.device)) else capacity


def _blended(space: VectorSpace, start: Tensor, generator: torch.Generator) -> tuple[Tensor, float]:
    """A combination of the rows of `start` in which each has the same share, with a little of everything else.

    Returns:
        The combination, and how much more than a random vector it has of an eigenvector that may be missed.

    """
    rows = space.adopt(start, "start")
    noise = space.random(generator)
    direction = rows[0].clone()
    # With random signs, rows that cancel in one combination do not in that of the next seed.
    for row in rows[1:]:
        direction += row * float(torch.randn((), generator=generator, dtype=torch.float64, device="cpu").sign())
    blended = with_noise(space, direction, noise)
    return blended, 1.0 if blended is noise else _FAMILIARITY


def _resumed_capacity(state: Mapping[str, Any], space: VectorSpace, target: Target) -> int:
    """The size of the basis of a search that is gone on with.

    Raises:
        ValueError: If it was for other pairs, or of another operator.

    """
    asked = _asked(space, target)
    differing = [
        f"{name} {state['asked'].get(name)!r} and not {value!r}"
        for name, value in asked.items()
        if state["asked"].get(name) != value
    ]
    if differing:
        raise ValueError(f"`resume` is the state of another search: of {', '.join(differing)}.")
    return int(state["capacity"])


def _asked(space: VectorSpace, target: Target) -> dict[str, Any]:
    """What a search is for, as far as its state can tell."""
    return {"size": space.size, "dtype": str(space.dtype), **vars(target)}


class Search:
    """A search for extreme eigenpairs while it is under way.

    Args:
        basis: The Krylov basis, begun.
        target: What is wanted.
        max_matvecs: The most products to spend.
        is_warm: Whether the start was given.

    Attributes:
        num_matvecs: Products that were spent, those before a resumption among them.
        max_matvecs: The most products to spend.
        excess: For each look at the pairs the number of products, and how many times its tolerance the residual of the
            worst pair was. It falls to 1 while the pairs converge, and rises where others have come up.
        is_challenged: Whether all pairs have converged, and copies of them are looked for.
        is_interrupted: Whether it was ended by an interrupted product.

    """

    def __init__(self, basis: KrylovBasis, target: Target, max_matvecs: int, *, is_warm: bool) -> None:
        self._basis = basis
        self._target = target
        self._is_warm = is_warm
        self._least = _LEAST_PRODUCTS_WARM if is_warm else _LEAST_PRODUCTS_COLD
        self._challenge = _Challenge(basis, target, is_warm=is_warm)
        self._next_check = self._least if target.ends_alone else 0
        self.num_matvecs = 0
        self.max_matvecs = max_matvecs
        self.excess: list[tuple[int, float]] = []
        self.is_interrupted = False

    @property
    def is_challenged(self) -> bool:
        """Whether all pairs have converged, and copies of them are looked for."""
        return self._challenge.is_on

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on, in tensors and plain values. The tensors are not copied, and soon out of date.

        It is to be taken before a product or in place of it, not within `watch` of another search.

        """
        return {
            "asked": _asked(self._basis.space, self._target),
            "capacity": self._basis.capacity,
            "is_warm": self._is_warm,
            "basis": self._basis.state_dict(),
            "challenge": self._challenge.state_dict(),
            "num_matvecs": self.num_matvecs,
            "next_check": self._next_check,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken."""
        self._basis.load_state_dict(state["basis"])
        self._challenge.load_state_dict(state["challenge"])
        self.num_matvecs = state["num_matvecs"]
        self._next_check = state["next_check"]

    def run(self, watch: "Callable[[Search], None] | None" = None) -> tuple[RitzPairs, Tensor]:
        """Grow the basis until the wanted pairs have converged, or no more products are to be spent.

        Returns:
            The pairs, and the chances that eigenvalues beyond them were missed.

        """
        basis, challenge, target = self._basis, self._challenge, self._target
        while True:
            try:
                if watch is not None:
                    watch(self)
                basis.expand()
            except Interrupted:
                if basis.length < target.count:
                    raise
                self.is_interrupted = True
                ritz = basis.ritz(target)
                return replace(ritz, converged=torch.zeros_like(ritz.converged)), challenge.missed(ritz)
            self.num_matvecs += 1
            last = basis.is_complete or self.num_matvecs >= self.max_matvecs
            if basis.length < target.count or not (last or basis.is_full or basis.length >= self._next_check):
                continue
            ritz = challenge.compared(basis.ritz(target))
            excess = _excess(ritz, target)
            self.excess.append((self.num_matvecs, excess))
            self._next_check = basis.length + _products_to_go(excess)
            enough = self.num_matvecs >= _least(ritz, target, self._least)
            if last or (enough and challenge.is_met(ritz, self.num_matvecs)):
                return ritz, challenge.missed(ritz)
            # Without the challenge, searches for 4 + 2 pairs missed copies of a triple eigenvalue on all of 12
            # operators, with every residual within the tolerance, in 34 products; with it they found all in 75.
            if challenge.is_due(ritz):
                if basis.capacity - basis.length < _ROOM_TO_CHALLENGE:
                    basis.compress(*_kept_at_challenge(basis, target))
                basis.begin()
                challenge.start(ritz, self.num_matvecs)
                self._next_check = basis.length + 1
                continue
            if not challenge.is_on:
                basis.turn_to(ritz)
            if basis.is_full:
                basis.compress(*_kept_at_restart(basis.capacity, ritz, target))
                self._next_check = basis.length + 1


def _excess(ritz: RitzPairs, target: Target) -> float:
    """How many times its tolerance the residual of the worst pair is."""
    return float((ritz.residuals / (target.tol * ritz.values.abs()).clamp_min(ritz.negligible)).max())


def _products_to_go(excess: float) -> int:
    """After how many products the pairs are looked at again: the eigenproblem of the projection takes time, too.

    It grows with the cube of the basis, from 2 ms at 16 vectors to 33 ms at 199 on one core.
    """
    return max(1, int(math.log(excess, _FALL)))


def _least(ritz: RitzPairs, target: Target, least: int) -> int:
    """How many products are to be spent on outermost values, which something not yet seen may have overtaken."""
    if ritz.may_be_overtaken(target, margin=_RIVAL_MARGIN):
        return max(least, _LEAST_PRODUCTS_WITH_RIVAL)
    # A start that is still an eigenvector leaves nothing to be seen in the first products.
    return least + bool((ritz.residuals <= _UNCHANGED_SHARE * target.tol * ritz.values.abs()).all())


def _kept_at_restart(capacity: int, ritz: RitzPairs, target: Target) -> tuple[int, int]:
    """How many Ritz vectors of each end a restart keeps: the wanted ones, and half of the room that they leave.

    The vectors next to the wanted ones hasten the convergence of their end, so they are kept for ends that still have
    some way to go. An end that is not wanted but reaches further than the wanted one is what the basis would turn to
    again after every restart, so most of the room is for that one's vectors.
    """
    largest, smallest = target.largest, target.smallest
    spare = (capacity - target.count) // 2
    of_the_other = int(_SHARE_OF_THE_OTHER * spare)
    if largest == 0 and ritz.extent[1] > -float(ritz.values[0]):
        return of_the_other, smallest + spare - of_the_other
    if smallest == 0 and -ritz.extent[0] > float(ritz.values[0]):
        return largest + spare - of_the_other, of_the_other
    top = largest > 0 and not bool(ritz.converged[:largest].all())
    bottom = smallest > 0 and not bool(ritz.converged[largest:].all())
    if top == bottom:
        top = largest > 0
        bottom = smallest > 0
    top_share = spare * top // (top + bottom)
    return largest + top_share, smallest + spare - top_share


def _kept_at_challenge(basis: KrylovBasis, target: Target) -> tuple[int, int]:
    """How many Ritz vectors of each end stay when a challenge begins without room: the wanted ones and a few more."""
    # With less room a restart would fall into the challenge: on 12 operators with a triple eigenvalue that took 95
    # products in place of 39, and two searches did not converge.
    spare = max(0, min(basis.capacity - _ROOM_TO_CHALLENGE, basis.length) - target.count)
    top = spare * target.largest // target.count
    return target.largest + top, target.smallest + (spare - top if target.smallest else 0)


def _next_start(basis: KrylovBasis, target: Target) -> Tensor:
    """The coefficients, in one column, of the vector from which the next search may start."""
    _, vectors = basis.eigh()
    wanted = both_ends(basis.length, target.largest, target.smallest)
    column = vectors[:, wanted].sum(dim=1)
    if basis.length > target.count:
        top, bottom = basis.length - 1 - target.largest, target.smallest
        # A set, since in a small basis the vectors next to both ends may be the same.
        runners_up = {*[top][: target.largest], *[bottom][: target.smallest]}
        column += _RUNNERS_UP_SHARE * vectors[:, sorted(runners_up)].sum(dim=1)
    return column[:, None]


def _measured(
    operator: LinearOperator, pairs: Eigenpairs, target: Target, negligible: float, rounding: float, max_matvecs: int
) -> Eigenpairs:
    """The pairs with residuals that were measured by a product each, as far as the budget goes.

    No residual counts as less than the rounding of the product that measures it: in float32 one of 1.5e-7 was found for
    a value that was off by 1.6e-7.
    """
    space = space_of(operator)
    residuals, errors = pairs.residuals.clone(), pairs.value_errors.clone()
    count = min(len(pairs.values), max_matvecs - pairs.num_matvecs)
    for index in range(count):
        vector = pairs.vectors[index]
        product = operator.matvec(vector)
        quotient = space.inner(vector, product).double()
        # The residual belongs to the value that is returned, not to the quotient of this product; how far these two
        # differ is the noise of the products.
        difference = product - pairs.values[index].to(product) * vector
        # Ranks whose residuals differ in the last digit would disagree on what has converged.
        own, other_value = space.agreed(torch.stack([space.norm(difference).double(), quotient])).tolist()
        residuals[index] = max(own, rounding)
        errors[index] = max(float(errors[index]), abs(other_value - float(pairs.values[index])))
    if not target.values_alone:
        errors = torch.minimum(errors, residuals)
    is_measured = torch.arange(len(residuals), device="cpu") < count
    return replace(
        pairs,
        residuals=residuals,
        value_errors=errors,
        converged=pairs.converged & is_measured & target.is_met(pairs.values, residuals, errors, negligible),
        num_matvecs=pairs.num_matvecs + count,
    )


class _Challenge:
    """The search for copies of repeated eigenvalues that one Krylov space cannot hold.

    It starts when every wanted pair has converged, in the Krylov space of a random vector orthogonal to them, and is
    met when a copy beyond them is not likely to have been missed there. A copy that comes up ends it: the search then
    continues, and the new set is challenged in its turn. The outermost values are not challenged where no more is
    wanted, since their own search tells how likely something further out was missed; unless one is negligible: it may
    be that of a large null space, in which a Krylov space hardly grows; or unless a vector is wanted and the start was
    given, of which nothing is known: at another eigenvector the search might end.
    """

    def __init__(self, basis: KrylovBasis, target: Target, *, is_warm: bool) -> None:
        self._basis = basis
        self._target = target
        self._trusts_start = target.ends_alone and (target.values_alone or not is_warm)
        self._spans_the_space = basis.capacity == basis.space.size
        self._accepted: RitzPairs | None = None
        self._started_at = 0

    @property
    def is_on(self) -> bool:
        """Whether there are pairs that are challenged at present."""
        return self._accepted is not None

    def state_dict(self) -> dict[str, Any]:
        """The pairs that are challenged, and since when."""
        accepted = None if self._accepted is None else dict(vars(self._accepted))
        return {"accepted": accepted, "started_at": self._started_at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Challenge the same pairs."""
        self._accepted = None if state["accepted"] is None else RitzPairs(**state["accepted"])
        self._started_at = state["started_at"]

    def is_due(self, ritz: RitzPairs) -> bool:
        """Whether the pairs are good enough to be challenged."""
        if self._accepted is not None or not self._is_needed(ritz):
            return False
        # What is set aside is not improved for now: of a value that is next to nothing it may be all there is. Noise of
        # the products no further one improves.
        good = ritz.residuals <= _SHARE_TO_CHALLENGE * (self._target.tol * ritz.values.abs()).clamp_min(ritz.negligible)
        is_noisy = self._basis.asymmetry > ritz.negligible
        return bool(ritz.converged.all()) and (is_noisy or bool(good.all()))

    def start(self, accepted: RitzPairs, num_matvecs: int) -> None:
        """Begin, with the pairs that are to stand."""
        self._accepted = accepted
        self._started_at = num_matvecs

    def compared(self, ritz: RitzPairs) -> RitzPairs:
        """End the challenge where something has come up since it began; or else the pairs are as exact as they were."""
        accepted = self._accepted
        if accepted is None:
            return ritz
        # Values may still move within their residuals. Only where the two intervals are disjoint has another value come
        # up.
        moved = (ritz.values - accepted.values).abs() > ritz.residuals + accepted.residuals
        # The first values of the new Krylov space are near none of its eigenvalues, and those that they come close to
        # are no less exact for it.
        errors = torch.minimum(ritz.value_errors, accepted.value_errors)
        converged = self._target.is_met(ritz.values, ritz.residuals, errors, ritz.negligible)
        if bool(moved.any()) or not bool((converged | ritz.converged).all()):
            self._accepted = None
            return ritz
        return replace(ritz, value_errors=errors, converged=converged | ritz.converged)

    def missed(self, ritz: RitzPairs, *, exactly: bool = False) -> Tensor:
        """The chance, at most, that an eigenvalue beyond each of the pairs was missed."""
        if self._accepted is not None or self._trusts_start or self._basis.is_complete:
            return self._basis.missed_probability(self._target, ritz, exactly=exactly)
        # Of copies their start says nothing, and a start that was given says nothing at all.
        return torch.ones(self._target.count, dtype=torch.float64, device="cpu")

    def is_met(self, ritz: RitzPairs, num_matvecs: int) -> bool:
        """Whether the converged pairs may stand."""
        if not bool(ritz.converged.all()) or (self._accepted is None and self._is_needed(ritz)):
            return False
        spent = 0 if self._accepted is None else num_matvecs - self._started_at
        are_negligible = self._are_negligible(ritz)
        if are_negligible and spent >= _PRODUCTS_BELOW_ROUNDING:
            return True
        if are_negligible and self._target.ends_alone:
            return False
        missed = self.missed(ritz, exactly=not are_negligible)
        return bool((missed <= self._target.allowed_chance).all())

    def _is_needed(self, ritz: RitzPairs) -> bool:
        if self._target.max_missed is None:
            return False
        if self._trusts_start:
            return self._are_negligible(ritz)
        return not self._spans_the_space

    def _are_negligible(self, ritz: RitzPairs) -> bool:
        """Whether a value has converged for no other reason than that it is next to nothing."""
        return bool((ritz.residuals > self._target.tol * ritz.values.abs()).any())
