"""A rule returns what it proposes for the situation that it is given, and nothing else."""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from lyapunov_lightning.callbacks.results.learning_rate import LearningRateResult
from lyapunov_lightning.callbacks.rules import (
    RULES,
    AlongUpdate,
    FollowBatchSharpness,
    InverseSharpness,
    Proposal,
    RuleName,
    Situation,
)
from lyapunov_lightning.curvature.errors import NonFiniteCurvatureError
from lyapunov_lightning.curvature.operators.hessian import HessianOperator
from lyapunov_lightning.training.lightning_names import MisconfigurationException
from lyapunov_lightning.training.optimizers.updates import SeenUpdate, Update
from lyapunov_lightning.training.replica.objective import ProbeBatch

CURVATURES = torch.tensor([4.0, 1.0], dtype=torch.float64)


class Bowl:
    """``2x² + y²/2`` at (1, 1), with SGD or another optimizer."""

    def __init__(self, optimizer: type[torch.optim.Optimizer] = torch.optim.SGD, **options: float) -> None:
        self.x = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.hessian = HessianOperator(
            lambda batch: (CURVATURES * self.x**2).sum() / 2 + 0 * batch.sum(), [self.x], [torch.zeros(1)]
        )
        self.optimizer = optimizer([self.x], lr=0.1, **options)  # type: ignore[call-arg]
        self.calls = 0

    def given(self, update: Tensor | None = None, lr: float = 0.1, *, is_first: bool = False) -> Situation:
        def progress() -> AbstractContextManager[None]:
            self.calls += 1
            return nullcontext(lambda: None)

        made = None if update is None else Update(update, lr)
        return Situation(
            self.hessian,
            self.optimizer,
            made,
            is_first=is_first,
            progress=progress,
            own=self.hessian,
            batches=[],
            hessian_on=lambda _: self.hessian,
        )


def test_the_table_has_the_names_that_the_command_line_reads() -> None:
    assert tuple(RULES) == get_args(RuleName)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(("rule", "share"), [(AlongUpdate, 0.3), (FollowBatchSharpness, 0.2)])
def test_the_first_learning_rate_is_a_share_of_the_way_to_the_bottom(rule: Any, share: float, momentum: float) -> None:
    bowl = Bowl(momentum=momentum)
    update = -CURVATURES  # down the gradient at (1, 1)
    proposal = rule().measure(bowl.given(update, is_first=True))
    bottom = float(update @ update / (update @ (CURVATURES * update)))
    assert proposal.found == pytest.approx(
        {"proposed": bottom, "slope_along_update": 17.0, "curvature_along_update": 65.0, "trials": 0}
    )
    assert proposal.lr == pytest.approx(share * (1 - momentum) * bottom)


def test_an_update_uphill_proposes_nothing() -> None:
    assert AlongUpdate().measure(Bowl().given(CURVATURES, is_first=True)) == Proposal(
        None, {"converged": False, "trials": 0}
    )


@pytest.mark.parametrize("update", [None, torch.ones(3, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)])
def test_without_an_update_of_these_parameters_slopes_do_not_count(update: Tensor | None) -> None:
    bowl, rule, seen = Bowl(), AlongUpdate(), SeenUpdate(-2.0, 17.0, 5.0, 1000.0)
    rule.measure(bowl.given(-CURVATURES))
    assert rule.follow(seen, 0.1) is not None
    assert rule.measure(bowl.given(update)) == Proposal(None, {"converged": False})
    assert rule.follow(seen, 0.1) is None


def test_steps_are_as_long_as_slope_and_curvature_say() -> None:
    bowl, rule = Bowl(), AlongUpdate()
    update, lr = -CURVATURES, 0.1
    proposal = rule.measure(bowl.given(update, lr))
    assert proposal.lr is None  # the learning rate moves in `follow`
    assert proposal.found["slope_along_update"] == pytest.approx(17.0 + lr * 65.0)
    for size, may_grow in ((101.0, True), (9.9, False)):  # 0.1 · 5 is a step of 5 % where the size is 10
        lengths = rule.follow(SeenUpdate(17.0, 17.0, 5.0, size), lr)
        assert lengths is not None
        assert lengths.length == pytest.approx(lr * 65.0 / (17.0 + lr * 65.0))
        assert lengths.at_least <= lengths.length
        assert lengths.may_grow is may_grow


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_inverse_sharpness_settles_before_the_first_step_and_then_follows(momentum: float) -> None:
    bowl, rule = Bowl(momentum=momentum), InverseSharpness(seed=0)
    for is_first, tolerance in ((True, 0.05), (False, 0.05)):
        proposal = rule.measure(bowl.given(is_first=is_first))
        assert proposal.found["lambda_max"] == pytest.approx(4.0, rel=tolerance)
        assert proposal.lr == pytest.approx((1 - momentum) * (math.e - 1) / 4, rel=tolerance)
    assert bowl.calls == 2
    assert rule.follow(SeenUpdate(1.0, 1.0, 1.0, 1.0), 0.1) is None


@pytest.mark.parametrize("is_first", [False, True])
def test_without_positive_curvature_nothing_is_proposed(is_first: bool) -> None:
    bowl = Bowl()
    bowl.hessian = HessianOperator(lambda batch: bowl.x.sum() + 0 * batch.sum(), [bowl.x], [torch.zeros(1)])
    proposal = InverseSharpness(seed=0).measure(bowl.given(is_first=is_first))
    assert proposal == Proposal(None, {"converged": not is_first})


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}], ids=str)
def test_where_batches_agree_the_largest_eigenvalue_counts(options: dict[str, float]) -> None:
    bowl, rule = Bowl(**options), FollowBatchSharpness()
    for _ in range(3):
        proposal = rule.measure(bowl.given())
    limit = 2 * (1 + options.get("momentum", 0.0)) / 0.1
    assert proposal.found["lambda_max"] == pytest.approx(4.0, rel=5e-3)
    assert proposal.found["stability_ratio"] == pytest.approx(4.0 / limit, rel=5e-3)
    ratio = rule.edge_ratio()
    assert ratio is not None
    assert ratio.is_exact
    assert ratio.value == ratio.at_least == pytest.approx(10 * 4.0 / limit, rel=5e-3)


class Batches:
    """``cᵀx²/2`` at (1, 1), with curvatures ``c`` that are each batch's own."""

    def __init__(self, curvatures: Tensor, **options: float) -> None:
        self.x = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.optimizer = torch.optim.SGD([self.x], lr=0.1, **options)
        self.curvatures = curvatures

    def hessian(self, index: int) -> HessianOperator:
        curvatures = self.curvatures[index]
        return HessianOperator(lambda _: (curvatures * self.x**2).sum() / 2, [self.x], [torch.zeros(1)])

    def given(self, index: int) -> Situation:
        own = self.hessian(index)
        return Situation(
            own,
            self.optimizer,
            None,
            is_first=False,
            progress=lambda: nullcontext(lambda: None),
            own=own,
            batches=[ProbeBatch(index, index, True)],
            hessian_on=lambda batches: self.hessian(batches[0].batch),
        )


def test_under_noise_the_batch_sharpness_counts() -> None:
    """Batches that each bend another coordinate: their sharpness is 4, and that of their mean 2."""
    batches = Batches(torch.tensor([[4.0, 0.1], [0.1, 4.0]], dtype=torch.float64))
    rule = FollowBatchSharpness()
    for index in range(4):
        proposal = rule.measure(batches.given(index % 2))
    expected = (4.0**3 + 0.1**3) / (4.0**2 + 0.1**2)
    assert proposal.found["batch_sharpness"] == pytest.approx(expected)
    assert proposal.found["batch_agreement"] < 0.5
    assert proposal.found["stability_ratio"] == pytest.approx(expected * 0.1 / 2)
    ratio = rule.edge_ratio()
    assert ratio is not None
    assert not ratio.is_exact


def test_what_was_measured_is_forgotten_when_the_training_is_brought_back() -> None:
    bowl, rule = Bowl(), FollowBatchSharpness()
    rule.measure(bowl.given())
    assert rule.edge_ratio() is not None
    rule.forget()
    assert rule.edge_ratio() is None
    along, seen = AlongUpdate(), SeenUpdate(-2.0, 17.0, 5.0, 1000.0)
    along.measure(bowl.given(-CURVATURES))
    assert along.follow(seen, 0.1) is not None
    along.forget()
    assert along.follow(seen, 0.1) is None


def test_a_measurement_that_fails_leaves_no_ratio() -> None:
    bowl, rule = Bowl(), FollowBatchSharpness()
    rule.measure(bowl.given())
    bowl.x.data.fill_(math.nan)
    with pytest.raises(NonFiniteCurvatureError):
        rule.measure(bowl.given())
    assert rule.edge_ratio() is None


def test_an_optimizer_whose_limit_nobody_knows_is_refused_with_the_remedy() -> None:
    class Own(torch.optim.SGD):
        """May do anything in its step."""

    with pytest.raises(MisconfigurationException, match=r"limit of Own. Use `rule='along_update'`"):
        FollowBatchSharpness().check("Controller", Bowl(Own).optimizer)


def test_only_the_papers_rule_refuses_adam() -> None:
    sgd, adam = Bowl().optimizer, Bowl(torch.optim.Adam).optimizer
    for rule, optimizer in ((AlongUpdate(), sgd), (AlongUpdate(), adam), (InverseSharpness(), sgd)):
        rule.check("Controller", optimizer)
    with pytest.raises(MisconfigurationException, match=r"^`Controller\(rule='inverse_sharpness'\)`.*steps of Adam"):
        InverseSharpness().check("Controller", adam)


@pytest.mark.parametrize("name", RULES)
def test_a_rule_continues_from_its_state(name: RuleName) -> None:
    bowl, one, other = Bowl(), RULES[name](0), RULES[name](1)
    for is_first in (True, False, False, False):
        one.measure(bowl.given(-CURVATURES, is_first=is_first))
    seen = SeenUpdate(17.0, 17.0, 5.0, 101.0)
    one.follow(seen, 0.1)
    other.load_state_dict(one.state_dict())
    assert one.follow(seen, 0.1) == other.follow(seen, 0.1)
    assert one.edge_ratio() == other.edge_ratio()
    first, second = (rule.measure(bowl.given(-CURVATURES)) for rule in (one, other))
    assert first == second
    assert set(first.found) <= set(LearningRateResult.__dataclass_fields__)
