"""Solvers take the same way on all ranks: where one of them fails, and where it does not compute the same digits."""

import pytest
import torch

from tests.distributed import solver_runs as runs
from tests.distributed.operator_runs import of_network, shards
from tests.distributed.references import same, union_of

NETWORKS = ["lanczos of a scaled Hessian", "online of Gauss-Newton"]
MESSAGE = 64


@pytest.mark.parametrize("name", [*runs.SOLVERS, *NETWORKS])
def test_wherever_a_rank_fails_all_end_and_are_in_step_again(outcomes, name):
    other, own = (outcome[name] for outcome in outcomes("failing_solvers"))
    assert len(own["found"]) > 2 * runs.EDGE
    for here, there in zip(own["found"], other["found"], strict=True):
        assert here[0] == there[0]
        # Told by the other one, and not by the timeout of a collective that it waited in.
        assert (here[1], there[1]) == ("OutOfMemoryError", "PeerFailureError"), here[0]
        assert here[2] == there[2] == [2, 2, 2]


@pytest.mark.parametrize("name", runs.SOLVERS)
def test_a_product_is_one_sum_with_few_short_messages_beside_it(outcomes, name):
    first, second = (outcome[name] for outcome in outcomes("solver_collectives"))
    assert first == second
    assert {call for call, _ in first["calls"]} == {"all_reduce"}
    lengths = [length for _, length in first["calls"]]
    assert lengths.count(runs.SIZE + 1) == first["products"] > 0
    messages = lengths.count(MESSAGE)
    assert messages == len(lengths) - first["products"]
    assert messages <= (3 if name.startswith(("power", "online", "inverse")) else 2) * first["products"] + 3


@pytest.mark.parametrize("dtype", runs.NOISE)
@pytest.mark.parametrize("name", [name for name in runs.SOLVERS if name != "check"])
def test_ranks_that_differ_in_the_last_digits_decide_alike_and_find_the_same(outcomes, name, dtype):
    first, second = (outcome[name, dtype] for outcome in outcomes("unlike_hardware"))
    assert first["products"] == second["products"]
    assert same(first["found"], second["found"])


@pytest.mark.parametrize("dtype", runs.NOISE)
@pytest.mark.parametrize("name", [name for name in runs.SOLVERS if name.startswith(("lanczos", "power"))])
def test_eigenpairs_of_ranks_that_differ_in_the_last_digits_are_right(outcomes, name, dtype):
    first, second = (outcome[name, dtype] for outcome in outcomes("unlike_hardware"))
    matrix = runs.matrix(runs.SOLVERS[name][0])
    for outcome in (first, second):
        vectors, values = outcome["vectors"].double(), outcome["found"]["values"]
        residuals = torch.linalg.vector_norm(vectors @ matrix.T - values[:, None] * vectors, dim=1)
        assert (residuals <= outcome["found"]["residuals"] * 1.01 + 20 * runs.NOISE[dtype]).all()
    assert (first["vectors"] - second["vectors"]).norm() <= 100 * runs.NOISE[dtype]
    if name != "power for the smallest":  # which is given few products
        assert first["found"]["converged"].all()


def test_inverse_products_over_unequal_shards_are_those_of_a_dense_solve_on_all_data(outcomes):
    first, second = outcomes("inverse_products")
    assert same([first["b"], first["damped"]["solution"]], [second["b"], second["damped"]["solution"]])
    batches = [batch for of_rank in shards("unequal", torch.float64) for batch in of_rank]
    assert len({len(labels) for _, labels in batches}) > 1
    hessian = of_network([union_of(batches)])
    dense, b = hessian.to_dense(), hessian.gradient()
    assert torch.allclose(first["b"], b, rtol=0, atol=1e-12)
    damped = dense + runs.DAMPING * torch.eye(len(b), dtype=torch.float64)
    least = float(torch.linalg.eigvalsh(damped)[0])
    found = first["damped"]
    assert least > 0
    assert found["converged"]
    assert found["non_positive"] is None
    error = found["solution"] - torch.linalg.solve(damped, b)
    assert float(error.norm()) <= found["residual"] / least + 1e-12
    # Without damping this Hessian is indefinite, and both ranks end at the same direction.
    directions = [outcome["plain"]["non_positive"] for outcome in (first, second)]
    vector = directions[0].vector
    assert torch.equal(vector, directions[1].vector)
    assert float(vector @ dense @ vector) == pytest.approx(directions[0].curvature, abs=1e-10)
    assert directions[0].curvature < 0


def test_an_online_eigenpair_is_right_after_a_rank_has_failed(outcomes):
    """Its vectors are the same on all ranks, or products would be those of no matrix."""
    matrix = runs.matrix("simple")
    for first, second in zip(*outcomes("online_after_failures"), strict=True):
        assert torch.equal(first["vector"], second["vector"])
        product = matrix @ first["vector"]
        assert float(first["vector"] @ product) == pytest.approx(first["value"], abs=1e-12)
        assert float((product - first["value"] * first["vector"]).norm()) == pytest.approx(first["residual"], rel=1e-6)
