"""Symmetric linear maps that are known by their products: what solvers need of one, and what else it can do.

A solver of this package asks for the little that `LinearOperator` lists. A `SymmetricOperator` is at home among other
people's linear operators as well: it multiplies what they multiply (`@`), becomes a matrix, and becomes SciPy's.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from lyapunov_lightning.curvature.vectors.layout import FlatLayout
from lyapunov_lightning.curvature.vectors.space import VectorSpace

_COLUMNS_AT_ONCE = 16
"""Columns of the identity that are multiplied at a time: each batch is evaluated once for all of them, and they are few
enough that their memory does not count next to that of the matrix."""

_Operand = TypeVar("_Operand")


class LinearOperator(Protocol):
    """A symmetric linear map on flat vectors, known by its products alone: all that the solvers ask for.

    An operator whose vectors are stored in a way of their own says so in an attribute `space`, see `space_of`.
    """

    @property
    def size(self) -> int:
        """The length of the vectors."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the vectors."""

    @property
    def device(self) -> torch.device:
        """The device of the vectors."""

    def matvec(self, vector: Tensor) -> Tensor:
        """The product, a new vector of shape ``(size,)``."""


def space_of(operator: LinearOperator) -> VectorSpace:
    """The space of an operator's vectors: its attribute `space`, or else that of plain flat vectors."""
    space = getattr(operator, "space", None)
    return space if isinstance(space, VectorSpace) else VectorSpace(operator.size, operator.dtype, operator.device)


def parameters_of(
    parameters: Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Mapping[str, Tensor],
) -> tuple[tuple[Tensor, ...], tuple[str, ...]]:
    """The parameters in their order, each object once, and their names where they have any.

    Args:
        parameters: Tensors, such as ``model.parameters()``; or pairs of a name and a tensor, such as
            ``model.named_parameters()``; or a dictionary of them; or a single tensor.

    Returns:
        The tensors and their names. A tensor that is given more than once (tied weights) is there once, by its first
        name. Without names the second tuple is empty.

    Raises:
        ValueError: If something else is among them.

    """
    if isinstance(parameters, nn.Module):
        raise ValueError(
            f"`parameters` should be tensors, got a module of type {type(parameters).__name__}. Give its `parameters()`"
            " or `named_parameters()`."
        )
    if isinstance(parameters, Tensor):  # iteration would give its rows, which are no parameters
        parameters = [parameters]
    entries: list[Any] = list(parameters.items() if isinstance(parameters, Mapping) else parameters)
    named = bool(entries) and all(isinstance(entry, tuple) and len(entry) == 2 for entry in entries)
    pairs = entries if named else [("", entry) for entry in entries]
    # By identity: `==` of tensors compares their numbers, and two parameters with equal numbers are two parameters.
    unique: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in pairs:
        if not isinstance(tensor, Tensor) or not isinstance(name, str):
            raise ValueError(
                f"`parameters` should hold tensors, or pairs of a name and a tensor, got {type(tensor).__name__}."
            )
        unique.setdefault(id(tensor), (name, tensor))
    names = tuple(name for name, _ in unique.values()) if named else ()
    return tuple(tensor for _, tensor in unique.values()), names


class SymmetricOperator(ABC):
    r"""A symmetric linear map on the vectors of a space.

    ``operator @ x`` is its product with

    - a tensor of shape ``(size,)``, or ``(size, k)`` for ``k`` vectors as columns,
    - a NumPy array of such a shape,
    - a list, a tuple or a dictionary with one tensor for each parameter, in that parameter's shape, where the vectors
      are made of parameters;

    what comes back is of the same kind, with the operator's dtype and device, or with each parameter's. ``x @
    operator`` is the same with rows for columns.

    SciPy cannot read an operator as it is, since it takes `dtype` for one of NumPy: give it ``operator.to_scipy()``.

    Args:
        space: The space.
        layout: How parameters form its vectors, if they do.
        names: The names of these parameters, by which dictionaries are read; none if empty.

    Attributes:
        size: The length of the vectors.
        dtype: Their dtype.
        device: Where they are.

    Example::

        >>> import torch
        >>> from lyapunov_lightning.curvature import HessianOperator
        >>> x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        >>> hessian = HessianOperator(lambda scale: scale * (x[0] ** 2 + x[0] * x[1]), [x], [3.0], weights=[1])
        >>> hessian @ torch.tensor([1.0, 0.0], dtype=torch.float64)
        tensor([6., 3.], dtype=torch.float64)
        >>> hessian @ [torch.tensor([0.0, 1.0])]
        [tensor([3., 0.], dtype=torch.float64)]
        >>> hessian.to_dense()
        tensor([[6., 3.],
                [3., 0.]], dtype=torch.float64)

    """

    layout: FlatLayout | None = None
    names: tuple[str, ...] = ()
    # Without it NumPy takes the operator for an object array in `array @ operator`, and never asks `__rmatmul__`.
    __array_ufunc__ = None

    def __init__(self, space: VectorSpace, layout: FlatLayout | None = None, names: Sequence[str] = ()) -> None:
        self.space = space
        self.size = space.size
        self.dtype = space.dtype
        self.device = space.device
        if layout is not None:
            self.layout = layout
            self.names = tuple(names)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.size, self.size

    @property
    def T(self) -> "SymmetricOperator":  # noqa: N802
        """The transpose: the operator itself."""
        return self

    @abstractmethod
    def matvec(self, vector: Tensor) -> Tensor:
        """The product, a new vector of shape ``(size,)``."""

    def matmat(self, block: Tensor) -> Tensor:
        """The products with several vectors.

        Args:
            block: Shape ``(size, k)``: the vectors as columns.

        Returns:
            A new tensor of shape ``(size, k)``.

        """
        products = torch.empty(block.shape, dtype=self.dtype, device=self.device)
        for index, column in enumerate(block.unbind(dim=1)):
            products[:, index] = self.matvec(column)
        return products

    def to_dense(self, max_bytes: int = 2**30) -> Tensor:
        """The matrix, column by column as the products give it.

        It is not made symmetric: how far it is from symmetric shows the rounding of the products, or that PyTorch
        differentiates the loss wrongly. It costs as many products as it has columns.

        Args:
            max_bytes: The most memory that the matrix may take.

        Returns:
            Shape ``(size, size)``.

        Raises:
            ValueError: If it would take more.

        """
        num_bytes = self.size**2 * self.dtype.itemsize
        if num_bytes > max_bytes:
            raise ValueError(
                f"A matrix of shape ({self.size}, {self.size}) takes {num_bytes / 2**20:,.0f} MiB, and `max_bytes`"
                f" allows for {max_bytes / 2**20:,.0f} MiB. Use products (`lanczos`, `spectral_density`), fewer"
                " parameters, or a larger `max_bytes`."
            )
        dense = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        for start in range(0, self.size, _COLUMNS_AT_ONCE):
            columns = dense[:, start : start + _COLUMNS_AT_ONCE]
            block = torch.zeros_like(columns)
            block[start : start + _COLUMNS_AT_ONCE].fill_diagonal_(1)
            # Each rank makes the whole columns and keeps its part: where an entry of a vector in parts is, only the
            # space knows.
            own = torch.stack([self.space.cut(column) for column in block.T], dim=1)
            for column, product in zip(columns.T, self.matmat(own).T, strict=True):
                column.copy_(self.space.whole(product))
        return dense

    def to_scipy(self) -> Any:
        """This operator as SciPy's, for ``scipy.sparse.linalg.eigsh``, ``lobpcg``, ``cg`` and the others.

        Of the ranks of a distributed measurement all have to call the same function of SciPy.

        Returns:
            A ``scipy.sparse.linalg.LinearOperator`` of this operator's precision. What it multiplies are NumPy arrays,
            which are copied to the device and back.

        Raises:
            ImportError: If SciPy is not installed.

        """
        try:
            from scipy.sparse import linalg  # type: ignore[import-untyped,import-not-found,unused-ignore]
        except ImportError as error:
            raise ImportError(
                "`to_scipy` needs SciPy, which this package does without: `pip install scipy`. `lanczos` finds"
                " eigenvalues and needs none."
            ) from error

        def product(array: Any) -> Any:
            return self @ array

        # The products of the transpose are the same ones. Vectors are float32 or float64, see `FlatLayout`: NumPy has
        # no bfloat16.
        return linalg.LinearOperator(
            self.shape,
            matvec=product,
            rmatvec=product,
            matmat=product,
            rmatmat=product,
            dtype=np.float64 if self.dtype == torch.float64 else np.float32,
        )

    def __matmul__(self, other: _Operand) -> _Operand:
        if isinstance(other, Tensor):
            return cast(_Operand, self._times(other))
        if isinstance(other, np.ndarray):
            # A copy: PyTorch warns of read-only arrays, and refuses reversed ones.
            product = self._times(torch.from_numpy(np.array(other, order="C")))
            return cast(_Operand, product.cpu().numpy())
        if self.layout is None or not isinstance(other, (list, tuple, Mapping)):
            return NotImplemented
        if not isinstance(other, Mapping):
            return cast(_Operand, type(other)(self._times_pieces(self.layout, other)))
        keys = self._keys(other)
        return cast(
            _Operand, dict(zip(keys, self._times_pieces(self.layout, [other[key] for key in keys]), strict=True))
        )

    def __rmatmul__(self, other: _Operand) -> _Operand:
        # xA = (Axᵀ)ᵀ, by the symmetry of A. For a vector, a list or a dictionary there is nothing to transpose.
        if isinstance(other, (Tensor, np.ndarray)) and other.ndim == 2:
            return cast(_Operand, (self @ other.T).T)
        return self @ other

    def _times(self, tensor: Tensor) -> Tensor:
        length = self.space.length
        # PyTorch would broadcast or cast these without a word, and drop an imaginary part with a warning.
        if tensor.is_complex() or tensor.ndim not in (1, 2) or len(tensor) != length:
            raise ValueError(
                f"An operator of shape {self.shape} multiplies real vectors of shape ({length},) and blocks of"
                f" columns of shape ({length}, k), got {tensor.dtype} of shape {tuple(tensor.shape)}."
            )
        tensor = tensor.detach().to(dtype=self.dtype, device=self.device)
        return self.matvec(tensor) if tensor.ndim == 1 else self.matmat(tensor)

    def _times_pieces(self, layout: FlatLayout, pieces: Sequence[Tensor]) -> list[Tensor]:
        shapes = [tuple(piece.shape) for piece in layout.split(layout.zeros())]
        given = [tuple(piece.shape) for piece in pieces]
        if given != shapes:
            raise ValueError(f"The tensors should have the shapes of the parameters, {shapes}, got {given}.")
        return layout.split(self.matvec(layout.flatten(pieces)))

    def _keys(self, tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
        if not self.names:
            raise ValueError(
                "A dictionary of tensors needs parameters with names. Give the operator `model.named_parameters()`, or"
                " multiply a list."
            )
        # In any order: a state's keys need not be in that of the parameters.
        if set(tensors) != set(self.names):
            raise ValueError(f"The tensors should be named {list(self.names)}, got {list(tensors)}.")
        return self.names


class ScaledOperator(SymmetricOperator):
    """``sign · diag(s) A diag(s) + diag(t)`` for an operator ``A``, a positive vector ``s`` and a shift ``t``.

    With ``s = P^{-1/2}`` for a diagonal preconditioner ``P`` it is symmetric and has the eigenvalues of ``P^{-1}A``,
    the matrix that decides on the stability of an adaptive optimizer (see `stability_of`, which finds ``s`` and ``t``).
    Weight decay ``λ`` that is not part of the loss adds the shift ``λ`` where it is decoupled from the preconditioner,
    and ``λ s²`` where it goes through it.

    Args:
        operator: The symmetric operator ``A``.
        scale: The vector ``s`` of shape ``(size,)``; ones if None.
        shift: The vector ``t`` of shape ``(size,)``, or one number for all entries; zeros if None.
        sign: 1, or -1 for ``-A``.

    Raises:
        ValueError: If `scale` or `shift` has another shape.

    """

    def __init__(
        self,
        operator: LinearOperator,
        scale: Tensor | None = None,
        shift: Tensor | float | None = None,
        *,
        sign: float = 1.0,
    ) -> None:
        length = space_of(operator).length
        super().__init__(space_of(operator), getattr(operator, "layout", None), getattr(operator, "names", ()))
        self._operator = operator
        self._sign = sign
        self._scale = self._shift = None
        if scale is not None:
            if scale.shape != (length,):
                raise ValueError(f"`scale` should have shape ({length},), got {tuple(scale.shape)}.")
            self._scale = scale.detach().to(dtype=self.dtype, device=self.device)
        if shift is not None:
            self._shift = torch.as_tensor(shift).detach().to(dtype=self.dtype, device=self.device)
            if self._shift.ndim and self._shift.shape != (length,):
                given = tuple(self._shift.shape)
                raise ValueError(f"`shift` should be a number or have shape ({length},), got {given}.")

    def matvec(self, vector: Tensor) -> Tensor:
        """The product ``sign · s ⊙ A(s ⊙ v) + t ⊙ v``."""
        return self._around(self._operator.matvec, vector, self._scale, self._shift)

    def matmat(self, block: Tensor) -> Tensor:
        """The products with several vectors, the columns of a tensor of shape ``(size, k)``."""
        if not isinstance(self._operator, SymmetricOperator):  # another one need not have `matmat`
            return super().matmat(block)
        scale = None if self._scale is None else self._scale[:, None]
        shift = self._shift[:, None] if self._shift is not None and self._shift.ndim else self._shift
        return self._around(self._operator.matmat, block, scale, shift)

    def _around(
        self, times: Callable[[Tensor], Tensor], vectors: Tensor, scale: Tensor | None, shift: Tensor | None
    ) -> Tensor:
        """Scale and shift around a product with the operator itself."""
        product = times(vectors) if scale is None else times(vectors * scale) * scale
        # The sign before the shift: weight decay adds to the curvature that the optimizer sees, also where it
        # maximizes.
        if self._sign != 1:
            product = -product
        return product if shift is None else torch.addcmul(product, shift, vectors)
