"""Losses, layers and functions of all kinds, each as a smooth enough scalar of a few parameters.

Every case is a module whose loss depends on its parameters through the function that it is named after, in general
position: away from kinks, with a curved function before and after it unless the case ends with a loss.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tests.curvature.helpers import vector


def _rand(*shape: int, seed: int = 1) -> Tensor:
    return vector(math.prod(shape), seed).view(shape)


def curved(output: Any) -> Tensor:
    """A curved scalar of everything that a function returned."""
    if isinstance(output, Tensor):
        if output.is_complex():
            return curved(torch.view_as_real(output.resolve_conj()))
        weights = torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype).view(output.shape)
        return (weights * output + (0.7 * output).sin()).sum()
    return sum((curved(part) for part in output if part is not None), torch.zeros((), dtype=torch.float64))


class OfTensors(nn.Module):
    """A function of parameters of some shapes."""

    def __init__(self, function: Callable[..., Any], *shapes: tuple[int, ...], curve: bool = True) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(0.5 * _rand(*s, seed=5 + i)) for i, s in enumerate(shapes)])
        self._function = function
        self._curve = curve

    def forward(self) -> Tensor:
        arguments = [w + 0.3 * w.tanh() for w in self.weights]
        output = self._function(*arguments)
        return curved(output) if self._curve else output


class OfModule(nn.Module):
    """A layer, between a linear map before and a curved function after it."""

    def __init__(self, layer: Callable[[], nn.Module], *shape: int, call: Callable[..., Any] | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layer = layer().double()
            for parameter in self.parameters():
                parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
        self.scale = nn.Parameter(0.7 + 0.1 * _rand(shape[-1]))
        self._inputs = _rand(*shape)
        self._call = call

    def forward(self) -> Tensor:
        inputs = (self._inputs * self.scale).tanh()
        return curved(self.layer(inputs) if self._call is None else self._call(self.layer, inputs))


def _spd(a: Tensor) -> Tensor:
    return a @ a.mT + 0.5 * torch.eye(a.shape[-1], dtype=a.dtype)


def _general(a: Tensor) -> Tensor:
    return a + 2 * torch.eye(a.shape[-1], dtype=a.dtype)


class Cube(torch.autograd.Function):
    """With a backward pass that is differentiable itself, and no forward derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


class _ForwardCube(torch.autograd.Function):
    """With all derivatives."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * tangent


class _NumpyCube(torch.autograd.Function):
    """Whose backward pass is hidden from autograd, as it says."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.from_numpy(x.detach().numpy() ** 3)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


class _Negative(torch.autograd.Function):
    """Linear, as the functions are by which ranks exchange what they have computed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return -x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return -tangent


class HiddenCube(Cube):
    """Whose backward pass is hidden from autograd, and which says nothing of it."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.from_numpy(3 * x.detach().numpy() ** 2 * gradient.detach().numpy())


def _gaussian_process(scale: Tensor) -> Tensor:
    x = torch.linspace(0, 1, 5, dtype=torch.float64)[:, None]
    kernel = (-((x - x.T) ** 2) * scale.exp()[0]).exp() + (0.1 + scale[1] ** 2) * torch.eye(5, dtype=torch.float64)
    y = _rand(5)
    return y @ torch.linalg.solve(kernel, y) + torch.logdet(kernel)


_LABELS = torch.tensor([0, 2, 1, 2])
_SIGNS = torch.tensor([1.0, -1.0, 1.0, 1.0], dtype=torch.float64)
_UNIT = torch.sigmoid(_rand(4, 3, seed=3))
_INDEX = torch.tensor([[0, 2, 1], [1, 0, 0]])

LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "binary_cross_entropy": lambda x: F.binary_cross_entropy(x.sigmoid(), _UNIT),
    "binary_cross_entropy_weighted": lambda x: F.binary_cross_entropy(x.sigmoid(), _UNIT, weight=_UNIT),
    "binary_cross_entropy_with_logits": lambda x: F.binary_cross_entropy_with_logits(x, _UNIT),
    "binary_cross_entropy_pos_weight": lambda x: F.binary_cross_entropy_with_logits(x, _UNIT, pos_weight=_UNIT[0]),
    "cosine_embedding_loss": lambda x: F.cosine_embedding_loss(x, _UNIT, _SIGNS, margin=-0.5),
    "cosine_similarity": lambda x: F.cosine_similarity(x, _UNIT).sum(),
    "cross_entropy": lambda x: F.cross_entropy(x, _LABELS),
    "cross_entropy_sum": lambda x: F.cross_entropy(x, _LABELS, reduction="sum"),
    "cross_entropy_smooth": lambda x: F.cross_entropy(x, _LABELS, label_smoothing=0.1, weight=_UNIT[0]),
    "cross_entropy_ignored": lambda x: F.cross_entropy(x, _LABELS, ignore_index=2),
    "cross_entropy_probabilities": lambda x: F.cross_entropy(x, _UNIT),
    "cross_entropy_2d": lambda x: F.cross_entropy(x.reshape(2, 3, 2), torch.tensor([[0, 2], [1, 1]])),
    "ctc_loss": lambda x: F.ctc_loss(
        x.log_softmax(-1)[:, None], torch.tensor([[1, 2]]), torch.tensor([4]), torch.tensor([2])
    ),
    "gaussian_nll_loss": lambda x: F.gaussian_nll_loss(x, _UNIT, x.exp()),
    "hinge_embedding_loss": lambda x: F.hinge_embedding_loss(x.square(), _SIGNS[:, None].expand(4, 3)),
    "huber_loss": lambda x: F.huber_loss(x, _UNIT, delta=0.5),
    "kl_div": lambda x: F.kl_div(x.log_softmax(-1), _UNIT, reduction="batchmean"),
    "kl_div_log_target": lambda x: F.kl_div(_UNIT.log(), x.log_softmax(-1), log_target=True, reduction="sum"),
    "l1_loss": lambda x: F.l1_loss(x**2, -_UNIT),
    "margin_ranking_loss": lambda x: F.margin_ranking_loss(x[:, 0].exp(), x[:, 1].exp(), _SIGNS, margin=2.0),
    "mse_loss": lambda x: F.mse_loss(x, _UNIT),
    "mse_loss_sum": lambda x: F.mse_loss(x, _UNIT, reduction="sum"),
    "mse_loss_weighted": lambda x: F.mse_loss(x, _UNIT, weight=_UNIT),
    "multi_margin_loss": lambda x: F.multi_margin_loss(x, _LABELS, margin=3.0),
    "multi_margin_loss_p2": lambda x: F.multi_margin_loss(x, _LABELS, p=2, margin=3.0),
    "multilabel_margin_loss": lambda x: F.multilabel_margin_loss(x.exp(), torch.tensor([[0, 2, -1]] * 4)),
    "multilabel_soft_margin_loss": lambda x: F.multilabel_soft_margin_loss(x, _UNIT.round()),
    "nll_loss": lambda x: F.nll_loss(x.log_softmax(-1), _LABELS),
    "nll_loss_2d": lambda x: F.nll_loss(x.reshape(2, 3, 2).log_softmax(1), torch.tensor([[0, 2], [1, 1]])),
    "poisson_nll_loss": lambda x: F.poisson_nll_loss(x, _UNIT, full=True),
    "smooth_l1_loss": lambda x: F.smooth_l1_loss(x, _UNIT),
    "smooth_l1_loss_beta": lambda x: F.smooth_l1_loss(x, _UNIT, beta=0.2),
    "soft_margin_loss": lambda x: F.soft_margin_loss(x, _SIGNS[:, None].expand(4, 3)),
    "triplet_margin_loss": lambda x: F.triplet_margin_loss(x, _UNIT, 2 * x.roll(1, 0), margin=9.0),
    "triplet_margin_with_distance_loss": lambda x: F.triplet_margin_with_distance_loss(
        x, _UNIT, x.roll(1, 0), margin=9.0, distance_function=lambda a, b: (a - b).square().sum(-1)
    ),
    "pairwise_distance": lambda x: F.pairwise_distance(x, _UNIT).sum(),
    "pdist": lambda x: F.pdist(x).sum(),
    "gaussian_process": lambda x: _gaussian_process(x.reshape(-1)[:2]),
    "dirichlet_likelihood": lambda x: (
        -torch.distributions.Dirichlet(x.exp()).log_prob(_UNIT / _UNIT.sum(-1, True)).sum()
    ),
    "normal_likelihood": lambda x: (
        -torch.distributions.MultivariateNormal(x[0], scale_tril=torch.linalg.cholesky(_spd(x[1:])))
        .log_prob(_UNIT)
        .sum()
    ),
    "beta_divergence": lambda x: torch.distributions.kl_divergence(
        torch.distributions.Gamma(x[0].exp(), x[1].exp()), torch.distributions.Gamma(x[2].exp(), x[3].exp())
    ).sum(),
    "focal_loss": lambda x: ((1 - x.softmax(-1)) ** 2 * F.cross_entropy(x, _LABELS, reduction="none")[:, None]).mean(),
    "hidden_function": lambda x: HiddenCube.apply(x).sum(),
    "linear_function": lambda x: _Negative.apply(x.square()).sum(),
    "info_nce": lambda x: F.cross_entropy(F.normalize(x) @ F.normalize(_UNIT).T / 0.1, torch.arange(4)),
    "gradient_penalty": lambda x: torch.autograd.grad((x**3).sum(), x, create_graph=True)[0].square().sum(),
}

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    name: getattr(F, name)
    for name in (
        *("celu", "elu", "gelu", "hardsigmoid", "hardshrink", "hardswish", "hardtanh", "leaky_relu", "logsigmoid"),
        *("mish", "relu", "relu6", "selu", "silu", "softplus", "softshrink", "softsign", "tanhshrink"),
        *("glu", "sigmoid", "tanh", "normalize"),
    )
} | {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "elu_alpha": lambda x: F.elu(x, 0.3),
    "softplus_beta": lambda x: F.softplus(x, 2.0),
    "threshold": lambda x: F.threshold(x, 0.1, 0.2),
    "softmax": lambda x: F.softmax(x, -1),
    "log_softmax": lambda x: F.log_softmax(x, -1),
    "softmin": lambda x: F.softmin(x, -1),
    "rrelu": lambda x: F.rrelu(x, training=False),
    "gumbel_softmax": lambda x: F.softmax((x + _rand(4, 4)) / 0.5, -1),
}

FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "det": (lambda a: torch.linalg.det(_general(a)), ((3, 3),)),
    "logdet": (lambda a: torch.logdet(_spd(a)), ((3, 3),)),
    "slogdet": (lambda a: torch.linalg.slogdet(_general(a))[1], ((3, 3),)),
    "batched_logdet": (lambda a: torch.logdet(_spd(a)), ((2, 3, 3),)),
    "solve": (lambda a, b: torch.linalg.solve(_general(a), b), ((3, 3), (3, 2))),
    "solve_vector": (lambda a, b: torch.linalg.solve(_general(a), b), ((3, 3), (3,))),
    "solve_triangular": (
        lambda a, b: torch.linalg.solve_triangular(_general(a).tril(), b, upper=False),
        ((3, 3), (3, 2)),
    ),
    "cholesky": (lambda a: torch.linalg.cholesky(_spd(a)), ((3, 3),)),
    "cholesky_solve": (lambda a, b: torch.cholesky_solve(b, torch.linalg.cholesky(_spd(a))), ((3, 3), (3, 2))),
    "cholesky_inverse": (lambda a: torch.cholesky_inverse(torch.linalg.cholesky(_spd(a))), ((3, 3),)),
    "inverse": (lambda a: torch.linalg.inv(_general(a)), ((3, 3),)),
    "eigh": (lambda a: torch.linalg.eigh(_spd(a))[0], ((3, 3),)),
    "eigh_vectors": (lambda a: torch.linalg.eigh(_spd(a))[1].square(), ((3, 3),)),
    "eigvalsh": (lambda a: torch.linalg.eigvalsh(_spd(a)), ((3, 3),)),
    "eig": (lambda a: torch.linalg.eig(_general(a))[0].real.sum() ** 2, ((3, 3),)),
    "eigvals": (lambda a: torch.linalg.eigvals(a).abs().square().sum(), ((3, 3),)),
    "svd": (lambda a: torch.linalg.svd(a, full_matrices=False)[1], ((3, 2),)),
    "svd_vectors": (lambda a: torch.linalg.svd(a, full_matrices=False)[0].square(), ((3, 2),)),
    "svdvals": (lambda a: torch.linalg.svdvals(a), ((3, 2),)),
    "qr": (lambda a: torch.linalg.qr(a), ((3, 2),)),
    "lu": (lambda a: torch.linalg.lu(_general(a))[1:], ((3, 3),)),
    "lu_solve": (lambda a, b: torch.linalg.lu_solve(*torch.linalg.lu_factor(_general(a)), b), ((3, 3), (3, 2))),
    "matrix_exp": (lambda a: torch.linalg.matrix_exp(a), ((3, 3),)),
    "matrix_power": (lambda a: torch.linalg.matrix_power(_general(a), 3), ((3, 3),)),
    "pinv": (lambda a: torch.linalg.pinv(a), ((3, 2),)),
    "lstsq": (lambda a, b: torch.linalg.lstsq(a, b).solution, ((4, 2), (4, 1))),
    "matrix_norm": (lambda a: torch.linalg.matrix_norm(a, "nuc"), ((3, 2),)),
    "matrix_norm_2": (lambda a: torch.linalg.matrix_norm(a, 2), ((3, 2),)),
    "householder_product": (lambda a, t: torch.linalg.householder_product(a, t), ((3, 2), (2,))),
    "cross": (torch.linalg.cross, ((2, 3), (2, 3))),
    "multi_dot": (lambda a, b, c: torch.linalg.multi_dot([a, b, c]), ((2, 3), (3, 2), (2, 2))),
    "trace": (lambda a: torch.trace(a @ a), ((3, 3),)),
    "fft": (lambda a: torch.fft.fft(a).abs(), ((5,),)),
    "rfft": (lambda a: torch.fft.rfft(a), ((6,),)),
    "irfft": (lambda a: torch.fft.irfft(torch.complex(a, a.sin())), ((4,),)),
    "fft2": (lambda a: torch.fft.fft2(a), ((3, 4),)),
    "stft": (
        lambda a: torch.stft(a, 4, window=torch.ones(4, dtype=a.dtype), return_complex=True).abs(),
        ((12,),),
    ),
    "angle": (lambda a: torch.angle(torch.complex(a, a.exp())), ((4,),)),
    "polar": (lambda a: torch.polar(a.exp(), a), ((4,),)),
    "cumsum": (lambda a: a.cumsum(0), ((5,),)),
    "cumprod": (lambda a: a.cumprod(0), ((5,),)),
    "logcumsumexp": (lambda a: a.logcumsumexp(0), ((5,),)),
    "cummax": (lambda a: a.cummax(0)[0], ((5,),)),
    "logsumexp": (lambda a: a.logsumexp(0), ((5,),)),
    "prod": (lambda a: a.prod(), ((5,),)),
    "prod_dim": (lambda a: a.prod(1), ((2, 3),)),
    "sort": (lambda a: a.sort()[0], ((5,),)),
    "topk": (lambda a: a.topk(2)[0], ((5,),)),
    "kthvalue": (lambda a: a.kthvalue(2)[0], ((5,),)),
    "median": (lambda a: a.median(), ((5,),)),
    "max": (lambda a: a.max(1)[0], ((2, 3),)),
    "amax": (lambda a: a.amax(1), ((2, 3),)),
    "aminmax": (lambda a: torch.aminmax(a), ((5,),)),
    "maximum": (torch.maximum, ((5,), (5,))),
    "clamp": (lambda a: a.clamp(-0.5, 0.5), ((5,),)),
    "where": (lambda a, b: torch.where(a > b, a**2, b), ((5,), (5,))),
    "gather": (lambda a: a.gather(1, _INDEX), ((2, 3),)),
    "scatter": (lambda a: torch.zeros(2, 3, dtype=a.dtype).scatter(1, _INDEX.sort()[1], a), ((2, 3),)),
    "scatter_add": (lambda a: torch.zeros(2, 3, dtype=a.dtype).scatter_add(1, _INDEX, a), ((2, 3),)),
    "scatter_reduce_prod": (
        lambda a: torch.ones(2, 3, dtype=a.dtype).scatter_reduce(1, _INDEX, a, "prod"),
        ((2, 3),),
    ),
    "scatter_reduce_mean": (
        lambda a: torch.ones(2, 3, dtype=a.dtype).scatter_reduce(1, _INDEX, a, "mean"),
        ((2, 3),),
    ),
    "scatter_reduce_amax": (
        lambda a: torch.zeros(2, 3, dtype=a.dtype).scatter_reduce(1, _INDEX, a.exp(), "amax"),
        ((2, 3),),
    ),
    "index_add": (lambda a, b: a.index_add(0, torch.tensor([0, 0, 1]), b), ((2, 3), (3, 3))),
    "index_select": (lambda a: a.index_select(0, torch.tensor([0, 0, 1])), ((2, 3),)),
    "index_put": (lambda a, b: a.index_put((torch.tensor([0, 0]),), b, accumulate=True), ((3,), (2,))),
    "masked_fill": (lambda a: a.masked_fill(a > 0, 0.1), ((5,),)),
    "masked_select": (lambda a: a.masked_select(a > 0), ((5,),)),
    "take_along_dim": (lambda a: torch.take_along_dim(a, _INDEX, 1), ((2, 3),)),
    "embedding": (lambda a: F.embedding(_INDEX, a), ((3, 2),)),
    "embedding_padded": (lambda a: F.embedding(_INDEX, a, padding_idx=0), ((3, 2),)),
    "embedding_bag": (lambda a: F.embedding_bag(_INDEX, a, mode="mean"), ((3, 2),)),
    "embedding_bag_max": (lambda a: F.embedding_bag(_INDEX, a, mode="max"), ((3, 2),)),
    "norm": (lambda a: a.norm(), ((5,),)),
    "norm_p3": (lambda a: a.norm(p=3), ((5,),)),
    "vector_norm_1": (lambda a: torch.linalg.vector_norm(a, 1), ((5,),)),
    "vector_norm_dim": (lambda a: torch.linalg.vector_norm(a, dim=1), ((2, 3),)),
    "renorm": (lambda a: a.renorm(2, 0, 0.5), ((2, 3),)),
    "dist": (torch.dist, ((5,), (5,))),
    "cdist": (torch.cdist, ((3, 2), (4, 2))),
    "cdist_matmul": (
        lambda a, b: torch.cdist(a, b, compute_mode="use_mm_for_euclid_dist"),
        ((3, 2), (4, 2)),
    ),
    "cdist_p1": (lambda a, b: torch.cdist(a, b, p=1.0), ((3, 2), (4, 2))),
    "cdist_p3": (lambda a, b: torch.cdist(a, b, p=3.0), ((3, 2), (4, 2))),
    "std": (lambda a: a.std(), ((5,),)),
    "var_dim": (lambda a: a.var(1), ((2, 3),)),
    "var_mean": (lambda a: torch.var_mean(a, 1), ((2, 3),)),
    "cov": (torch.cov, ((2, 4),)),
    "corrcoef": (torch.corrcoef, ((2, 4),)),
    "einsum": (lambda a, b: torch.einsum("ij,jk,kl->il", a, b, a.T), ((2, 3), (3, 3))),
    "tensordot": (lambda a, b: torch.tensordot(a, b, 1), ((2, 3), (3, 2))),
    "bilinear": (F.bilinear, ((2, 3), (2, 2), (2, 3, 2), (2,))),
    "kron": (torch.kron, ((2, 2), (2, 2))),
    "addbmm": (torch.addbmm, ((2, 2), (3, 2, 2), (3, 2, 2))),
    "baddbmm": (torch.baddbmm, ((2, 2, 2), (2, 2, 3), (2, 3, 2))),
    "interpolate_linear": (lambda a: F.interpolate(a, scale_factor=2, mode="linear"), ((1, 2, 4),)),
    "interpolate_bilinear": (lambda a: F.interpolate(a, size=(5, 3), mode="bilinear"), ((1, 1, 3, 4),)),
    "interpolate_bilinear_aa": (
        lambda a: F.interpolate(a, size=(2, 2), mode="bilinear", antialias=True),
        ((1, 1, 3, 4),),
    ),
    "interpolate_bicubic": (lambda a: F.interpolate(a, size=(5, 3), mode="bicubic"), ((1, 1, 3, 4),)),
    "interpolate_nearest": (lambda a: F.interpolate(a, scale_factor=2), ((1, 1, 2, 2),)),
    "interpolate_trilinear": (lambda a: F.interpolate(a, size=(3, 3, 3), mode="trilinear"), ((1, 1, 2, 2, 2),)),
    "grid_sample": (lambda a, g: F.grid_sample(a, 0.6 * g.tanh(), align_corners=False), ((1, 1, 3, 3), (1, 2, 2, 2))),
    "grid_sample_bicubic": (
        lambda a, g: F.grid_sample(a, 0.6 * g.tanh(), mode="bicubic", align_corners=False),
        ((1, 1, 3, 3), (1, 2, 2, 2)),
    ),
    "grid_sample_3d": (
        lambda a, g: F.grid_sample(a, 0.6 * g.tanh(), align_corners=True),
        ((1, 1, 2, 2, 2), (1, 1, 2, 2, 3)),
    ),
    "affine_grid": (lambda a: F.affine_grid(a, [1, 1, 2, 3], align_corners=False), ((1, 2, 3),)),
    "fold": (lambda a: F.fold(a, (3, 3), 2), ((1, 4, 4),)),
    "unfold": (lambda a: F.unfold(a, 2), ((1, 1, 3, 3),)),
    "tensor_unfold": (lambda a: a.unfold(0, 3, 1), ((5,),)),
    "pixel_shuffle": (lambda a: F.pixel_shuffle(a, 2), ((1, 4, 2, 1),)),
    "pad_reflect": (lambda a: F.pad(a, (1, 1), mode="reflect"), ((1, 2, 3),)),
    "pad_replicate_2d": (lambda a: F.pad(a, (1, 1, 0, 1), mode="replicate"), ((1, 1, 2, 3),)),
    "pad_circular": (lambda a: F.pad(a, (1, 1), mode="circular"), ((1, 2, 3),)),
    "roll_flip": (lambda a: a.roll(1, 0).flip(1) * a, ((2, 3),)),
    "repeat_interleave": (lambda a: a.repeat_interleave(2, 0), ((2, 3),)),
    "diag_embed": (lambda a: torch.linalg.inv(_general(torch.diag_embed(a))), ((3,),)),
    "tril": (lambda a: a.tril() @ a.triu(), ((3, 3),)),
    "stack_unbind": (lambda a: torch.stack(a.unbind(1)).prod(0), ((2, 3),)),
    "in_place": (lambda a: a.clone().mul_(a).add_(a.sin()).exp_(), ((4,),)),
    "in_place_slices": (lambda a: _filled(a), ((4,),)),
    "custom_function": (Cube.apply, ((3,),)),
    "custom_function_with_forward": (_ForwardCube.apply, ((3,),)),
    "custom_function_once": (_NumpyCube.apply, ((3,),)),
    "custom_function_hidden": (HiddenCube.apply, ((3,),)),
    "triangular_solve": (lambda a, b: torch.triangular_solve(b, _general(a), False)[0], ((3, 3), (3, 2))),
    "constant_of_no_grad": (lambda a: a.sin() * _without_grad(a.exp), ((4,),)),
    "constant_of_detach": (lambda a: a.sin() * a.exp().detach() * a.data.cos(), ((4,),)),
    "segment_reduce": (lambda a: torch.segment_reduce(a, "mean", lengths=torch.tensor([2, 3])), ((5,),)),
    "trapezoid": (torch.trapezoid, ((4,), (4,))),
    "gradient": (lambda a: torch.gradient(a)[0], ((5,),)),
    "quantile": (lambda a: a.quantile(0.3), ((5,),)),
    "nanmean": (lambda a: a.nanmean(), ((5,),)),
    "atan2": (torch.atan2, ((4,), (4,))),
    "hypot": (torch.hypot, ((4,), (4,))),
    "pow": (lambda a, b: torch.pow(a.exp(), b), ((4,), (4,))),
    "float_power": (lambda a: a.abs() ** 1.5, ((4,),)),
    "logaddexp": (torch.logaddexp, ((4,), (4,))),
    "xlogy": (lambda a, b: torch.special.xlogy(a, b.exp()), ((4,), (4,))),
    "xlog1py": (lambda a, b: torch.special.xlog1py(a, b.exp()), ((4,), (4,))),
    "lerp": (torch.lerp, ((4,), (4,), (4,))),
    "addcdiv": (lambda a, b, c: torch.addcdiv(a, b, c.exp()), ((4,), (4,), (4,))),
    "sinc": (torch.sinc, ((4,),)),
    "erf": (torch.erf, ((4,),)),
    "erfc": (torch.erfc, ((4,),)),
    "erfinv": (lambda a: torch.erfinv(0.5 * a.tanh()), ((4,),)),
    "erfcx": (torch.special.erfcx, ((4,),)),
    "lgamma": (lambda a: torch.lgamma(a.exp()), ((4,),)),
    "digamma": (lambda a: torch.digamma(a.exp()), ((4,),)),
    "polygamma": (lambda a: torch.polygamma(1, a.exp()), ((4,),)),
    "mvlgamma": (lambda a: torch.mvlgamma(a.exp() + 2, 2), ((4,),)),
    "expm1_log1p": (lambda a: torch.log1p(torch.expm1(a) ** 2), ((4,),)),
    "i0": (torch.special.i0, ((4,),)),
    "i1": (torch.special.i1, ((4,),)),
    "i0e": (torch.special.i0e, ((4,),)),
    "i1e": (torch.special.i1e, ((4,),)),
    "ndtr": (torch.special.ndtr, ((4,),)),
    "ndtri": (lambda a: torch.special.ndtri(a.sigmoid()), ((4,),)),
    "log_ndtr": (torch.special.log_ndtr, ((4,),)),
    "entr": (lambda a: torch.special.entr(a.exp()), ((4,),)),
    "logit": (lambda a: torch.logit(a.sigmoid() ** 2), ((4,),)),
    "rsqrt": (lambda a: a.exp().rsqrt(), ((4,),)),
    "tan_asin_acosh": (lambda a: (0.5 * a).tan() + (0.5 * a.tanh()).asin() + (1.5 + a**2).acosh(), ((4,),)),
    "bessel_j0": (torch.special.bessel_j0, ((4,),)),
    "complex_product": (lambda a, b: torch.complex(a, b) * torch.complex(b, a).conj(), ((4,), (4,))),
    "vmap": (lambda a: torch.func.vmap(lambda x: x.sin() * x.sum())(a), ((3, 2),)),
    "func_grad": (lambda a: torch.func.grad(lambda x: (x**3).sum())(a), ((3,),)),
    "func_jvp": (lambda a: torch.func.jvp(torch.sin, (a,), (a.exp(),))[1], ((3,),)),
    "func_jacrev": (lambda a: torch.func.jacrev(lambda x: x.sin() * x.sum())(a), ((3,),)),
    "func_jacfwd": (lambda a: torch.func.jacfwd(lambda x: x.sin() * x.sum())(a), ((3,),)),
    "func_hessian": (lambda a: torch.func.hessian(lambda x: x.sin().prod())(a), ((3,),)),
    "func_hessian_vmap": (lambda a: torch.func.vmap(torch.func.hessian(lambda x: x.sin().prod()))(a), ((2, 3),)),
    "autograd_grad": (lambda a: torch.autograd.grad(a.exp().prod(), a, create_graph=True)[0], ((3,),)),
    "autograd_hessian": (
        lambda a: torch.autograd.functional.hessian(lambda x: x.sin().prod(), a, create_graph=True),
        ((3,),),
    ),
}


def _without_grad(function: Callable[[], Tensor]) -> Tensor:
    with torch.no_grad():
        return function()


def _filled(a: Tensor) -> Tensor:
    out = torch.zeros(4, dtype=a.dtype)
    out[:2] = a[2:].exp()
    out[2:] = out[2:] + a[:2]
    return out * a


def _attention(**options: Any) -> Callable[..., Tensor]:
    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, **options)

    return attention


if hasattr(F, "linear_cross_entropy"):
    LOSSES["linear_cross_entropy"] = lambda x: F.linear_cross_entropy(x, x[:3, :].exp(), _LABELS)
    LOSSES["linear_cross_entropy_in_chunks"] = lambda x: F.linear_cross_entropy(
        x, x[:3, :].exp(), _LABELS, options=nn.LinearCrossEntropyOptions()
    )

_QKV = ((1, 2, 4, 2),) * 3

ATTENTION: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "attention": (_attention(), _QKV),
    "attention_causal": (_attention(is_causal=True), _QKV),
    "attention_masked": (_attention(attn_mask=torch.ones(4, 4, dtype=torch.bool).tril()), _QKV),
    "attention_biased": (_attention(attn_mask=_rand(4, 4)), _QKV),
    "attention_grouped": (_attention(enable_gqa=True), ((1, 4, 4, 2), (1, 2, 4, 2), (1, 2, 4, 2))),
}


def _mha(layer: nn.MultiheadAttention, x: Tensor) -> Tensor:
    return layer(x, x, x, need_weights=False)[0]


def _encoder(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, x) if isinstance(layer, (nn.TransformerDecoderLayer, nn.Transformer)) else layer(x)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: OfModule(lambda: nn.Linear(3, 2), 4, 3),
    "bilinear_layer": lambda: OfModule(lambda: nn.Bilinear(3, 3, 2), 4, 3, call=lambda layer, x: layer(x, x)),
    "conv1d": lambda: OfModule(lambda: nn.Conv1d(2, 3, 3, padding=1, stride=2), 2, 2, 5),
    "conv2d": lambda: OfModule(lambda: nn.Conv2d(2, 2, 2, padding="same", padding_mode="circular"), 1, 2, 3, 3),
    "conv2d_grouped": lambda: OfModule(lambda: nn.Conv2d(2, 4, 2, groups=2, dilation=2, bias=False), 2, 2, 4, 4),
    "conv3d": lambda: OfModule(lambda: nn.Conv3d(1, 2, 2), 1, 1, 3, 3, 3),
    "conv_transpose1d": lambda: OfModule(lambda: nn.ConvTranspose1d(2, 2, 2, stride=2, output_padding=1), 1, 2, 3),
    "conv_transpose2d": lambda: OfModule(lambda: nn.ConvTranspose2d(2, 2, 2, padding=1), 1, 2, 3, 3),
    "conv_transpose2d_grouped": lambda: OfModule(lambda: nn.ConvTranspose2d(2, 4, 2, groups=2), 1, 2, 3, 3),
    "conv_transpose3d": lambda: OfModule(lambda: nn.ConvTranspose3d(1, 1, 2), 1, 1, 2, 2, 2),
    "batch_norm": lambda: OfModule(lambda: nn.BatchNorm1d(3), 4, 3),
    "batch_norm_eval": lambda: OfModule(lambda: nn.BatchNorm1d(3).eval(), 4, 3),
    "batch_norm_2d": lambda: OfModule(lambda: nn.BatchNorm2d(2), 2, 2, 2, 3),
    "batch_norm_plain": lambda: OfModule(lambda: nn.BatchNorm1d(3, affine=False, track_running_stats=False), 4, 3),
    "layer_norm": lambda: OfModule(lambda: nn.LayerNorm(3), 4, 3),
    "layer_norm_plain": lambda: OfModule(lambda: nn.LayerNorm(3, elementwise_affine=False), 4, 3),
    "group_norm": lambda: OfModule(lambda: nn.GroupNorm(2, 4), 2, 4, 3),
    "instance_norm": lambda: OfModule(lambda: nn.InstanceNorm1d(2, affine=True), 2, 2, 4),
    "rms_norm": lambda: OfModule(lambda: nn.RMSNorm(3), 4, 3),
    "local_response_norm": lambda: OfModule(lambda: nn.LocalResponseNorm(2), 1, 3, 4),
    "weight_norm": lambda: OfModule(lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), 4, 3),
    "orthogonal": lambda: OfModule(lambda: nn.utils.parametrizations.orthogonal(nn.Linear(3, 3)), 4, 3),
    "spectral_norm": lambda: OfModule(lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2)).eval(), 4, 3),
    "prelu": lambda: OfModule(lambda: nn.PReLU(3), 4, 3),
    "max_pool1d": lambda: OfModule(lambda: nn.MaxPool1d(2), 1, 2, 6),
    "max_pool2d": lambda: OfModule(lambda: nn.MaxPool2d(2, stride=1), 1, 1, 3, 3),
    "max_pool3d": lambda: OfModule(lambda: nn.MaxPool3d(2), 1, 1, 2, 2, 4),
    "max_unpool2d": lambda: OfModule(
        nn.Identity, 1, 1, 4, 4, call=lambda _, x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2)
    ),
    "avg_pool1d": lambda: OfModule(lambda: nn.AvgPool1d(2), 1, 2, 6),
    "avg_pool2d": lambda: OfModule(lambda: nn.AvgPool2d(2, padding=1), 1, 1, 4, 4),
    "avg_pool3d": lambda: OfModule(lambda: nn.AvgPool3d(2), 1, 1, 2, 2, 4),
    "adaptive_avg_pool2d": lambda: OfModule(lambda: nn.AdaptiveAvgPool2d((2, 1)), 1, 1, 3, 4),
    "adaptive_max_pool2d": lambda: OfModule(lambda: nn.AdaptiveMaxPool2d((2, 1)), 1, 1, 3, 4),
    "lp_pool2d": lambda: OfModule(lambda: nn.LPPool2d(2, 2), 1, 1, 4, 4),
    "fractional_max_pool2d": lambda: OfModule(
        lambda: nn.FractionalMaxPool2d(2, output_size=2, _random_samples=torch.full((1, 1, 2), 0.4).double()),
        *(1, 1, 5, 5),
    ),
    "rnn_tanh": lambda: OfModule(lambda: nn.RNN(2, 2), 3, 1, 2),
    "rnn_relu": lambda: OfModule(lambda: nn.RNN(2, 2, nonlinearity="relu"), 3, 1, 2),
    "lstm": lambda: OfModule(lambda: nn.LSTM(2, 2, num_layers=2), 3, 1, 2, call=lambda layer, x: layer(x)[0]),
    "lstm_bidirectional": lambda: OfModule(
        lambda: nn.LSTM(2, 2, bidirectional=True, proj_size=1), 3, 1, 2, call=lambda layer, x: layer(x)[0]
    ),
    "lstm_packed": lambda: OfModule(
        lambda: nn.LSTM(2, 2),
        *(3, 2, 2),
        call=lambda layer, x: layer(nn.utils.rnn.pack_padded_sequence(x, [3, 2]))[0].data,
    ),
    "gru": lambda: OfModule(lambda: nn.GRU(2, 2), 3, 1, 2, call=lambda layer, x: layer(x)[0]),
    "lstm_cell": lambda: OfModule(lambda: nn.LSTMCell(2, 2), 3, 2),
    "gru_cell": lambda: OfModule(lambda: nn.GRUCell(2, 2), 3, 2),
    "multihead_attention": lambda: OfModule(lambda: nn.MultiheadAttention(4, 2, batch_first=True), 1, 3, 4, call=_mha),
    "multihead_attention_weights": lambda: OfModule(
        lambda: nn.MultiheadAttention(4, 2), 3, 1, 4, call=lambda layer, x: layer(x, x, x)
    ),
    "transformer_encoder": lambda: OfModule(
        lambda: nn.TransformerEncoderLayer(4, 2, 4, dropout=0.0, activation="gelu", batch_first=True), 1, 3, 4
    ),
    "transformer_encoder_eval": lambda: OfModule(
        lambda: nn.TransformerEncoderLayer(4, 2, 4, activation="gelu", batch_first=True).eval(), 1, 3, 4
    ),
    "transformer_decoder": lambda: OfModule(
        lambda: nn.TransformerDecoderLayer(4, 2, 4, dropout=0.0, activation="gelu"), 3, 1, 4, call=_encoder
    ),
    "dropout": lambda: OfModule(lambda: nn.Dropout(0.5), 4, 3),
    "alpha_dropout": lambda: OfModule(lambda: nn.AlphaDropout(0.5), 4, 3),
}


def cases() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Name and builder of every case."""

    def build(*arguments: Any, **options: Any) -> Callable[[], nn.Module]:
        return lambda: OfTensors(*arguments, **options)

    for name, loss in LOSSES.items():
        yield f"loss-{name}", build(loss, (4, 3), curve=False)
        yield f"inner-{name}", build(lambda x, loss=loss: (0.1 * loss(x)).square(), (4, 3))
    for name, activation in ACTIVATIONS.items():
        yield f"activation-{name}", build(activation, (4, 4))
    for name, (function, shapes) in (FUNCTIONS | ATTENTION).items():
        yield f"function-{name}", build(function, *shapes)
    for name, layer in LAYERS.items():
        yield f"layer-{name}", layer


CASES = dict(cases())

CONSTANTS = ["function-constant_of_no_grad", "function-constant_of_detach"]
"""Cases with a part that is no function of the parameters in a derivative, and one in a difference."""

WRONG_IN_PYTORCH = [
    "activation-hardsigmoid",  # which has no second derivative
    "layer-weight_norm",  # the second derivative
    "loss-hidden_function",  # taken for constants
    "inner-hidden_function",
    "function-custom_function_hidden",
    "loss-linear_cross_entropy_in_chunks",
    "inner-linear_cross_entropy_in_chunks",
]

NOT_TWICE = [
    *("ctc_loss", "multi_margin_loss", "multi_margin_loss_p2", "multilabel_margin_loss", "embedding_bag"),
    *("embedding_bag_max", "custom_function_once", "custom_function_hidden", "hidden_function", "segment_reduce"),
]
"""What PyTorch cannot differentiate twice, at the end of the names of cases."""

NOT_FORWARD = [
    *NOT_TWICE,
    *("huber_loss", "soft_margin_loss", "pdist", "scatter_reduce_prod", "cdist", "cdist_matmul", "cdist_p1"),
    *("cdist_p3", "grid_sample", "grid_sample_bicubic", "grid_sample_3d", "custom_function", "func_jvp", "func_jacfwd"),
    *("func_hessian", "func_hessian_vmap", "lstm_packed", "embedding_padded"),
]
"""What has no forward derivative, or whose gradient has none."""
