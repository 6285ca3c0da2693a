"""Generalised Gauss–Newton and empirical Fisher: against dense matrices, what is known of both, what they refuse."""

import functools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lyapunov_lightning.curvature import (
    EmpiricalFisherOperator,
    GaussNewtonOperator,
    HessianOperator,
    MeasurementError,
    lanczos,
    power_iteration,
    spectral_density,
    stochastic_moments,
)
from tests.curvature.helpers import (
    OnceDifferentiableTanh,
    relative_error,
    rng_state,
    rounded,
    vector,
    without_garbage_collector,
)
from tests.problems import PROBLEMS, Batch, Problem, mlp

OPERATORS = ("gauss_newton", "fisher")
GRAPHS: dict[str, dict[str, Any]] = {"kept": {}, "rebuilt": {"max_graph_bytes": 0}}

every_operator = pytest.mark.parametrize("kind", OPERATORS)
every_problem = pytest.mark.parametrize("name", PROBLEMS)
kept_or_not = pytest.mark.parametrize("how", GRAPHS)


def of(kind: str, problem: Problem, parameters: Any = None, batches: Any = None, **options: Any) -> Any:
    parameters = problem.parameters if parameters is None else parameters
    batches = problem.batches if batches is None else batches
    if kind == "fisher":
        return EmpiricalFisherOperator(
            lambda batch: functional.cross_entropy(problem.model(batch[0]), batch[1], reduction="none"),
            parameters,
            batches,
            **options,
        )
    return GaussNewtonOperator(
        lambda batch: problem.model(batch[0]),
        lambda scores, batch: functional.cross_entropy(scores, batch[1]),
        parameters,
        batches,
        **options,
    )


def dense(kind: str, problem: Problem) -> Tensor:
    """By Jacobians of `torch.func`, and the Hessian of the loss in the scores."""

    def scores(flat: Tensor, inputs: Tensor) -> Tensor:
        sizes = [parameter.numel() for parameter in problem.parameters]
        pairs = zip(problem.model.named_parameters(), flat.split(sizes), strict=True)
        values = {name: piece.view(parameter.shape) for (name, parameter), piece in pairs}
        return functional_call(problem.model, values, (inputs,))

    at, matrix = problem.flat_parameters, torch.zeros(())
    for inputs, labels in problem.batches:
        if kind == "fisher":
            jacobian = torch.func.jacrev(
                lambda flat, x=inputs, y=labels: functional.cross_entropy(scores(flat, x), y, reduction="none")
            )(at)
            matrix = matrix + jacobian.T @ jacobian
        else:
            jacobian = torch.func.jacrev(scores)(at, inputs).flatten(0, 1)
            inner = torch.func.hessian(lambda z, y=labels: functional.cross_entropy(z, y, reduction="sum"))(
                scores(at, inputs)
            )
            matrix = matrix + jacobian.T @ inner.reshape(len(jacobian), -1) @ jacobian
    return matrix / sum(len(labels) for _, labels in problem.batches)


@functools.cache
def reference(kind: str, name: str = "mlp") -> Tensor:
    return dense(kind, PROBLEMS[name]())


# What they are.


@kept_or_not
@every_problem
@every_operator
def test_products_are_those_of_the_dense_matrix(kind: str, name: str, how: str) -> None:
    problem = PROBLEMS[name]()
    operator = of(kind, problem, **GRAPHS[how])
    matrix = reference(kind, name)
    assert relative_error(operator.to_dense(), matrix) <= 1e-10
    direction = vector(operator.size)
    given = direction.clone()
    assert relative_error(operator.matvec(direction), matrix @ direction) <= 1e-10
    assert torch.equal(direction, given)
    assert relative_error(operator.gradient(), problem.gradient_at(problem.flat_parameters)) <= 1e-10
    assert (operator.graph_bytes > 0) == (how == "kept")
    assert operator.num_matvecs == operator.size + 1


@every_problem
@every_operator
def test_float32_products_are_exact_to_rounding(kind: str, name: str) -> None:
    narrow, wide = rounded(PROBLEMS[name], torch.float32)
    operator, expected = of(kind, narrow), of(kind, wide)
    direction = vector(operator.size).float()
    product = operator.matvec(direction)
    assert product.dtype == torch.float32
    assert relative_error(product, expected.matvec(direction.double())) <= 1e-5


@every_operator
def test_half_precision_products_come_in_float32(kind: str) -> None:
    narrow, wide = rounded(mlp, torch.bfloat16)
    operator, expected = of(kind, narrow), of(kind, wide)
    direction = vector(operator.size).bfloat16()
    product = operator.matvec(direction)
    assert product.dtype == torch.float32
    assert relative_error(product, expected.matvec(direction.double())) <= 0.05


@every_operator
def test_a_block_is_its_columns(kind: str) -> None:
    operator = of(kind, mlp())
    block = torch.stack([vector(operator.size, seed) for seed in range(3)], dim=1)
    products = operator @ block
    assert operator.num_matvecs == 3
    assert torch.equal(products, torch.stack([operator @ column for column in block.T], dim=1))
    assert (operator @ block[:, :0]).shape == (51, 0)


@every_operator
def test_convex_losses_have_no_negative_curvature_and_a_fisher_matrix_has_the_rank_of_its_samples(kind: str) -> None:
    values = torch.linalg.eigvalsh(of(kind, mlp()).to_dense())
    assert values[0] >= -1e-14
    rank = int((values > 1e-12).sum())
    assert rank == (8 if kind == "fisher" else 16)  # 8 samples of 3 classes, whose probabilities sum to one


def test_gauss_newton_is_the_hessian_of_a_linear_model() -> None:
    problem = mlp()
    linear = Problem(
        problem.model[-1], [(torch.tanh(inputs[:, [0, 1, 2, 3, 0, 1]]), y) for inputs, y in problem.batches]
    )
    assert relative_error(of("gauss_newton", linear).to_dense(), linear.dense_hessian()) <= 1e-12


def test_gauss_newton_is_the_hessian_where_squares_fit_exactly() -> None:
    problem = mlp()
    batches = [(inputs, problem.model(inputs).detach()) for inputs, _ in problem.batches]
    matrix = GaussNewtonOperator(
        lambda batch: problem.model(batch[0]),
        lambda z, batch: functional.mse_loss(z, batch[1]),
        problem.parameters,
        batches,
    )
    hessian = HessianOperator(
        lambda batch: functional.mse_loss(problem.model(batch[0]), batch[1]), problem.parameters, batches
    )
    assert relative_error(matrix.to_dense(), hessian.to_dense()) <= 1e-12


def test_gauss_newton_of_cross_entropy_is_the_fisher_matrix_of_labels_from_the_model() -> None:
    """Every sample with every label, weighted by the label's probability."""
    problem = mlp()
    inputs = torch.cat([batch[0] for batch in problem.batches])
    probabilities = problem.model(inputs).softmax(dim=1).detach()
    batches = [(x[None], torch.tensor([label])) for x in inputs for label in range(3)]
    fisher = of("fisher", problem, batches=batches, weights=probabilities.flatten().tolist())
    assert relative_error(fisher.to_dense(), reference("gauss_newton")) <= 1e-12


def test_the_empirical_fisher_of_squares_is_gauss_newton_where_residuals_are_one() -> None:
    problem = mlp()
    signs = [(-1.0) ** torch.arange(len(labels)) for _, labels in problem.batches]
    batches = [
        (inputs, problem.model(inputs)[:, 0].detach() + sign)
        for (inputs, _), sign in zip(problem.batches, signs, strict=True)
    ]

    def residuals(batch: Batch) -> Tensor:
        return problem.model(batch[0])[:, 0] - batch[1]

    fisher = EmpiricalFisherOperator(lambda batch: residuals(batch) ** 2 / 2, problem.parameters, batches)
    matrix = GaussNewtonOperator(residuals, lambda r, _: r.square().mean() / 2, problem.parameters, batches)
    assert relative_error(fisher.to_dense(), matrix.to_dense()) <= 1e-12


@every_operator
def test_every_solver_takes_them(kind: str) -> None:
    operator, values = of(kind, mlp()), torch.linalg.eigvalsh(reference(kind)).flip(0)
    pairs = lanczos(operator, largest=3, smallest=1, tol=1e-8)
    assert torch.allclose(pairs.largest, values[:3], rtol=1e-7)
    assert abs(float(pairs.smallest[0])) <= 1e-8 * float(values[0])
    power = power_iteration(operator, tol=1e-3, max_matvecs=1000)
    assert abs(float(power.values[0] - values[0])) <= 1e-3 * float(values[0])
    moments = stochastic_moments(operator, num_probes=200)
    assert abs(moments.trace.value - float(values.sum())) <= 6 * moments.trace.standard_error
    assert spectral_density(operator).moment(1).value == pytest.approx(float(values.mean()), rel=0.5)


# Which parameters, which batches, which randomness.


@every_operator
def test_frozen_and_unused_parameters_are_rows_and_columns_of_zeros(kind: str) -> None:
    problem = mlp()
    unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    problem.parameters[0].requires_grad_(False)
    expected = torch.zeros(53, 53, dtype=torch.float64)
    expected[26:, 26:] = reference(kind)[24:, 24:]
    operator = of(kind, problem, parameters=[unused, *problem.parameters])
    assert relative_error(operator.to_dense(), expected) <= 1e-10
    assert not operator.gradient()[:26].any()


@every_operator
def test_a_model_that_is_all_frozen_has_no_curvature(kind: str) -> None:
    problem = mlp()
    problem.model.requires_grad_(False)
    operator = of(kind, problem)
    assert not operator.matvec(vector(operator.size)).any()
    assert not operator.gradient().any()


@every_operator
def test_a_tied_parameter_that_is_given_twice_counts_once(kind: str) -> None:
    problem = PROBLEMS["tied"]()
    model: Any = problem.model
    twice = [model.embedding.weight, *model.hidden.parameters(), model.output.weight]
    assert torch.equal(of(kind, problem, parameters=twice).to_dense(), of(kind, problem).to_dense())


@every_operator
def test_batches_weigh_as_they_are_told(kind: str) -> None:
    problem = mlp()
    matrices = [of(kind, problem, batches=[batch]).to_dense() for batch in problem.batches]
    weighted = of(kind, problem, batches=iter(problem.batches), weights=[1.0, 3.0]).to_dense()
    assert relative_error(weighted, (matrices[0] + 3 * matrices[1]) / 4) <= 1e-12


@every_operator
def test_dropout_masks_are_those_of_one_function_and_no_generator_moves(kind: str) -> None:
    problem = mlp(dropout=0.5)
    before = rng_state()
    kept, rebuilt = (of(kind, problem, **options) for options in GRAPHS.values())
    matrix = kept.to_dense()
    assert torch.equal(matrix, rebuilt.to_dense())
    assert relative_error(matrix, matrix.T) <= 1e-14
    assert relative_error(matrix, reference(kind)) > 0.1
    kept.gradient()
    assert rng_state() == before


@kept_or_not
@every_operator
def test_parameters_that_moved_between_products_are_not_mixed_with_the_old_ones(kind: str, how: str) -> None:
    problem = mlp()
    operator = of(kind, problem, **GRAPHS[how])
    direction = vector(operator.size)
    operator.matvec(direction)
    with torch.no_grad():
        for parameter in problem.parameters:
            parameter.mul_(1.5)
    assert relative_error(operator.matvec(direction), dense(kind, problem) @ direction) <= 1e-10


@pytest.mark.parametrize("what", ["inputs", "labels", "mode"])
@every_operator
def test_changes_of_batches_and_layers_are_noticed(kind: str, what: str) -> None:
    problem = mlp(dropout=0.5)
    operator = of(kind, problem)
    direction = vector(operator.size)
    before = torch.cat([operator.matvec(direction), operator.gradient()])
    if what == "mode":
        problem.model.eval()
    else:
        tensor = problem.batches[0][what == "labels"]
        tensor.copy_(tensor.roll(1, 0))
    after = torch.cat([operator.matvec(direction), operator.gradient()])
    operator.reset()
    assert torch.equal(after, torch.cat([operator.matvec(direction), operator.gradient()]))
    assert not torch.equal(after, before)


@every_operator
def test_products_are_right_without_grad_mode_and_in_inference_mode(kind: str) -> None:
    operator = of(kind, mlp(), **GRAPHS["rebuilt"])
    direction = vector(operator.size)
    expected = reference(kind) @ direction
    with torch.no_grad():
        assert relative_error(operator.matvec(direction), expected) <= 1e-10
    with torch.inference_mode():
        assert relative_error(operator.matvec(vector(operator.size)), expected) <= 1e-10


@every_operator
def test_parameters_and_their_gradients_are_left_alone(kind: str) -> None:
    problem = mlp()
    seen = []
    given = problem.parameters[0].grad = torch.ones_like(problem.parameters[0])
    problem.parameters[1].register_hook(seen.append)
    versions = [parameter._version for parameter in problem.parameters]
    operator = of(kind, problem)
    direction = vector(operator.size)
    for _ in range(2):
        assert relative_error(operator.matvec(direction), reference(kind) @ direction) <= 1e-10
        operator.gradient()
    assert [parameter._version for parameter in problem.parameters] == versions
    assert problem.parameters[0].grad is given
    assert all(parameter.grad is None for parameter in problem.parameters[1:])
    assert not seen


# Ranks.


class TwoRanks:
    """Sums over two ranks, the second of which runs first and is remembered."""

    def __init__(self) -> None:
        self.second: list[Tensor] = []
        self.first: list[int] = []

    def of_second(self, buffer: Tensor) -> None:
        self.second.append(buffer.clone())

    def of_first(self, buffer: Tensor) -> None:
        self.first.append(len(buffer))
        buffer.add_(self.second.pop(0))


@pytest.mark.parametrize("empty", [False, True])
@every_operator
def test_ranks_meet_once_a_product_and_have_the_matrix_of_all_batches(kind: str, empty: bool) -> None:
    problem = mlp()
    shares = [[], problem.batches] if empty else [problem.batches[:1], problem.batches[1:]]
    ranks = TwoRanks()
    first = of(kind, problem, batches=shares[0], reduce=ranks.of_first)
    second = of(kind, problem, batches=shares[1], reduce=ranks.of_second)
    block = torch.stack([vector(51, seed) for seed in range(3)], dim=1)
    second.matvec(block[:, 0]), second.matmat(block), second.gradient()
    products = [first.matvec(block[:, 0]), first.matmat(block), first.gradient()]
    expected = [reference(kind) @ block[:, 0], reference(kind) @ block, problem.gradient_at(problem.flat_parameters)]
    assert max(map(relative_error, products, expected)) <= 1e-10
    assert ranks.first == [51 + 3, 3 * 51 + 3, 51 + 3]


# Graphs.


@every_operator
def test_graphs_are_kept_within_their_bound(kind: str) -> None:
    problem = mlp(sizes=(5, 5, 5))
    each = of(kind, problem, batches=problem.batches[:1])
    direction = vector(each.size)
    each.matvec(direction)
    operator = of(kind, problem, max_graph_bytes=2 * each.graph_bytes + 1)
    expected = dense(kind, problem) @ direction
    for _ in range(2):
        assert relative_error(operator.matvec(direction), expected) <= 1e-10
        assert operator.graph_bytes == 2 * each.graph_bytes


@kept_or_not
@every_operator
def test_nothing_outlives_the_operator(kind: str, how: str) -> None:
    problem = mlp()
    alive: list[weakref.ref[Tensor]] = []

    class Watching(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            outputs = torch.exp(inputs)
            alive.append(weakref.ref(outputs))
            return outputs

    watched = Problem(nn.Sequential(*problem.model, Watching()), problem.batches)
    with without_garbage_collector():
        operator = of(kind, watched, **GRAPHS[how])
        operator.matvec(vector(operator.size))
        operator.gradient()
        del operator
        assert not [reference for reference in alive if reference() is not None]


@every_operator
def test_what_is_not_noticed_is_seen_after_a_reset(kind: str) -> None:
    factor = [1.0]
    scaled = with_tanh(lambda inputs: torch.tanh(inputs) * factor[0])
    operator = of(kind, scaled)
    direction = vector(operator.size)
    before = operator.matvec(direction)
    factor[0] = 2.0
    assert torch.equal(operator.matvec(direction), before)
    operator.reset()
    assert operator.graph_bytes == 0
    assert torch.equal(operator.matvec(direction), of(kind, scaled).matvec(direction))
    assert relative_error(operator.matvec(direction), before) > 0.1


@every_operator
def test_a_check_tells_that_products_are_symmetric_and_the_same_each_time(kind: str) -> None:
    check = of(kind, mlp(dropout=0.3)).check()
    assert check.asymmetry <= 1e-14
    assert check.nondeterminism == 0
    generator = torch.Generator().manual_seed(0)
    noisy = of(kind, with_tanh(lambda x: torch.tanh(x) * torch.rand(6, generator=generator).double()))
    assert not noisy.check().is_deterministic


# Outputs and losses of all kinds.


def test_outputs_may_be_of_any_structure() -> None:
    problem = mlp()

    def outputs(batch: Batch) -> dict[str, Any]:
        scores = problem.model(batch[0])
        return {"scores": (scores[:, :1], [scores[:, 1:]]), "argmax": scores.argmax(dim=1), "name": "mlp", "no": None}

    def loss(given: dict[str, Any], batch: Batch) -> Tensor:
        assert given["name"] == "mlp"
        assert given["argmax"].dtype == torch.int64
        return functional.cross_entropy(torch.cat([given["scores"][0], *given["scores"][1]], dim=1), batch[1])

    operator = GaussNewtonOperator(outputs, loss, problem.parameters, problem.batches)
    assert relative_error(operator.to_dense(), reference("gauss_newton")) <= 1e-10


@kept_or_not
def test_what_the_loss_takes_of_the_parameters_may_be_among_the_outputs(how: str) -> None:
    """Weight decay, whose derivative in the parameters is the identity."""
    problem = mlp()
    parameters = problem.parameters

    def loss(given: Any, batch: Batch) -> Tensor:
        scores, weights = given
        return functional.cross_entropy(scores, batch[1]) + 0.05 * sum(weight.square().sum() for weight in weights)

    operator = GaussNewtonOperator(
        lambda batch: (problem.model(batch[0]), parameters), loss, parameters, problem.batches, **GRAPHS[how]
    )
    expected = reference("gauss_newton") + 0.1 * torch.eye(51, dtype=torch.float64)
    assert relative_error(operator.to_dense(), expected) <= 1e-10


def test_a_loss_that_reads_the_parameters_beside_the_outputs_is_refused() -> None:
    problem = mlp()
    operator = GaussNewtonOperator(
        lambda batch: problem.model(batch[0]),
        lambda scores, batch: functional.cross_entropy(scores, batch[1]) + problem.parameters[0].square().sum(),
        problem.parameters,
        problem.batches,
    )
    for measure in (lambda: operator.matvec(vector(51)), operator.gradient):
        with pytest.raises(MeasurementError, match="other ways than through the outputs"):
            measure()


@pytest.mark.parametrize("loss", [lambda z, _: z.mean(), lambda z, _: torch.ones(())])
def test_a_loss_that_is_linear_in_the_outputs_or_constant_has_no_curvature(loss: Callable[..., Tensor]) -> None:
    problem = mlp()
    operator = GaussNewtonOperator(lambda b: problem.model(b[0]), loss, problem.parameters, problem.batches)
    for _ in range(2):
        assert not operator.matvec(vector(51)).any()


def test_complex_outputs_are_refused() -> None:
    problem = mlp()
    operator = GaussNewtonOperator(
        lambda batch: torch.fft.fft(problem.model(batch[0])),
        lambda z, _: z.abs().mean(),
        problem.parameters,
        problem.batches,
    )
    with pytest.raises(MeasurementError, match="real"):
        operator.matvec(vector(51))


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (lambda scores: scores, r"shape \(n,\), got shape \(5, 3\).*reduction='none'"),
        (lambda scores: scores.mean(), r"got shape \(\)"),
        (lambda scores: scores[:0, 0], r"got shape \(0,\)"),
        (lambda scores: None, "got NoneType"),
    ],
)
def test_losses_that_are_no_vector_are_refused(losses: Callable[[Tensor], Any], message: str) -> None:
    problem = mlp()
    operator = EmpiricalFisherOperator(lambda b: losses(problem.model(b[0])), problem.parameters, problem.batches)
    with pytest.raises(MeasurementError, match=message):
        operator.matvec(vector(51))


def test_a_loss_that_is_no_scalar_is_refused() -> None:
    problem = mlp()
    operator = GaussNewtonOperator(lambda b: problem.model(b[0]), lambda z, _: z, problem.parameters, problem.batches)
    with pytest.raises(MeasurementError, match="should be a scalar"):
        operator.matvec(vector(51))


# Layers of all kinds.


class DetachedDerivativeTanh(torch.autograd.Function):
    """Its derivative is a constant to autograd: no Hessian comes out right, and Gauss–Newton needs no more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.tanh(x)
        ctx.derivative = 1 - y.detach() ** 2
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * ctx.derivative


class DetachedGradientTanh(DetachedDerivativeTanh):
    """Computes with the numbers of the gradient alone, as a kernel of its own does."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.detach() * ctx.derivative


def with_tanh(tanh: Callable[[Tensor], Tensor]) -> Problem:
    """`mlp` with another activation."""

    class Activation(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return tanh(inputs)

    problem = mlp()
    return Problem(nn.Sequential(problem.model[0], Activation(), *problem.model[2:]), problem.batches)


@kept_or_not
@every_operator
def test_layers_that_can_be_differentiated_once_are_exact_if_their_backward_pass_is_differentiable(
    kind: str, how: str
) -> None:
    operator = of(kind, with_tanh(DetachedDerivativeTanh.apply), **GRAPHS[how])
    assert relative_error(operator.to_dense(), reference(kind)) <= 1e-10


@pytest.mark.parametrize("tanh", [OnceDifferentiableTanh, DetachedGradientTanh])
@kept_or_not
@every_operator
def test_layers_whose_backward_pass_is_not_differentiable_are_refused(
    kind: str, how: str, tanh: type[torch.autograd.Function]
) -> None:
    """Also where the rest of the model would give a number: the last layer's part of ``Jv`` is there without it."""
    operator = of(kind, with_tanh(tanh.apply), **GRAPHS[how])
    for _ in range(2):
        with pytest.raises(MeasurementError, match="cannot be differentiated"):
            operator.matvec(vector(51))


@pytest.mark.parametrize("square", [OnceDifferentiableTanh, DetachedGradientTanh])
def test_losses_that_hide_their_backward_pass_are_refused(square: type[torch.autograd.Function]) -> None:
    problem = mlp()
    operator = GaussNewtonOperator(
        lambda batch: problem.model(batch[0]), lambda z, _: square.apply(z).sum(), problem.parameters, problem.batches
    )
    with pytest.raises(MeasurementError, match="cannot be differentiated"):
        operator.matvec(vector(51))


@every_operator
def test_a_part_that_is_detached_in_a_backward_pass_is_noticed(kind: str) -> None:
    """By a hook, which leaves the other part of the gradient as it is."""

    def halved(inputs: Tensor) -> Tensor:
        outputs = torch.tanh(inputs)
        outputs.register_hook(lambda gradient: gradient / 2 + gradient.detach() / 2)
        return outputs

    with pytest.raises(MeasurementError, match="detaches"):
        of(kind, with_tanh(halved)).matvec(vector(51))


@pytest.mark.parametrize("use_reentrant", [False, True])
@every_operator
def test_checkpointed_layers_are_evaluated_again(kind: str, use_reentrant: bool) -> None:
    operator = of(kind, with_tanh(lambda x: checkpoint(torch.tanh, x, use_reentrant=use_reentrant)))
    for _ in range(2):
        assert relative_error(operator.matvec(vector(51)), reference(kind) @ vector(51)) <= 1e-10


@every_operator
def test_errors_that_do_not_concern_derivatives_pass_through(kind: str) -> None:
    def fail(inputs: Tensor) -> Tensor:
        raise RuntimeError("shapes do not match")

    operator = of(kind, with_tanh(fail))
    with pytest.raises(RuntimeError, match="shapes do not match") as caught:
        operator.matvec(vector(51))
    assert not isinstance(caught.value, MeasurementError)


@every_operator
def test_recurrent_layers_whose_kernel_cannot_be_differentiated_are_computed_from_their_parts(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = PROBLEMS["lstm"]()
    forward = problem.model.forward

    def fused(inputs: Tensor) -> Tensor:
        outputs = forward(inputs)
        if torch.backends.mkldnn.flags and torch.backends.mkldnn.enabled:
            return _FusedRNN.apply(outputs)
        return outputs

    monkeypatch.setattr(problem.model, "forward", fused)
    operator = of(kind, problem)
    direction = vector(operator.size)
    for _ in range(2):
        assert relative_error(operator.matvec(direction), reference(kind, "lstm") @ direction) <= 1e-10


class _FusedRNN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        if gradient.requires_grad:
            raise RuntimeError("derivative for aten::rnn_backward is not implemented")
        return gradient


# Arguments.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_graph_bytes": -1}, "`max_graph_bytes`.*non-negative.*-1"),
        ({"weights": [1.0]}, "`weights`.*2 batches.*1"),
        ({"parameters": []}, "`parameters`.*at least one"),
        ({"batches": []}, "`batches`.*at least one"),
    ],
)
@every_operator
def test_bad_arguments_are_named_with_their_values(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        of(kind, mlp(), **options)


@pytest.mark.parametrize("shape", [(50,), (1, 51), ()])
@every_operator
def test_vectors_of_a_wrong_shape_are_refused(kind: str, shape: tuple[int, ...]) -> None:
    operator = of(kind, mlp())
    for measure in (operator.matvec, operator.matmat):
        with pytest.raises(ValueError, match=r"\(51,"):
            measure(torch.ones(shape))
