"""Which training samples help on test data and which do harm, by inverse-Hessian products.

``python -m examples.influence`` fits a linear classifier to handwritten digits of which some have a wrong label.
Without sample ``i`` of ``n`` the minimum of the loss moves, to first order, by ``H⁻¹gᵢ/n`` with the gradient ``gᵢ``
of the sample's loss, and the test loss by ``∇L_testᵀH⁻¹gᵢ/n`` (P. W. Koh and P. Liang, "Understanding black-box
predictions via influence functions", ICML 2017, and long before R. D. Cook, "Detection of influential observation in
linear regression", Technometrics 19, 1977). One inverse product with the gradient of the test loss is enough for all
samples. A few samples are then left out in truth, and the fit is done again. Ten seconds.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from examples.data import Digits
from lyapunov_lightning.curvature import HessianOperator, InverseProduct, conjugate_gradient

Samples = tuple[Tensor, Tensor]
Losses = Callable[[Tensor, Samples], Tensor]
"""The loss of each sample, from the weights."""


@dataclass(frozen=True)
class Objective:
    """The mean over samples of a loss that is convex in the weights, and weight decay.

    A sample that is left out has the weight 0, and the others keep theirs of ``1/n``, so that the minimum depends
    smoothly on the weights of the samples.

    Attributes:
        losses: The loss of each sample.
        samples: The samples.
        decay: The weight decay: half of it times the square of the weights is added.

    """

    losses: Losses
    samples: Samples
    decay: float

    def value(self, weights: Tensor, without: int | None = None) -> Tensor:
        """The objective, without one of the samples."""
        losses = self.losses(weights, self.samples)
        left_out = 0.0 if without is None else losses[without] / len(losses)
        return losses.mean() - left_out + self.decay / 2 * weights.square().sum()

    def hessian(self, weights: Tensor, without: int | None = None) -> HessianOperator:
        """Its Hessian."""
        return HessianOperator(lambda _: self.value(weights, without), [weights], [self.samples], weights=[1])

    def fitted(self, weights: Tensor, without: int | None = None) -> Tensor:
        """The minimum, by Newton's method with inverse products."""
        weights = weights.detach().clone().requires_grad_()
        hessian = self.hessian(weights, without)
        for _ in range(50):
            gradient = hessian.gradient()
            if float(gradient.norm()) < 1e-10:
                return weights
            step = conjugate_gradient(hessian, gradient, tol=1e-6).solution.view_as(weights)
            distance, before = 1.0, hessian.value()
            while hessian.value(-distance * step.flatten()) > before + 1e-13 and distance > 1e-3:
                distance /= 2
            with torch.no_grad():
                weights -= distance * step
        raise RuntimeError("Newton's method has not come to the minimum in 50 steps.")


def influences(objective: Objective, weights: Tensor, test: Samples) -> tuple[Tensor, InverseProduct]:
    """To first order by how much the test loss rises where each training sample is left out.

    Args:
        objective: What the weights minimise.
        weights: The minimum.
        test: The samples of the test loss.

    Returns:
        One number for each training sample, negative for one that does harm; and the inverse product that they came
        from, with its residual.

    """
    test_loss = HessianOperator(lambda batch: objective.losses(weights, batch).mean(), [weights], [test])
    found = conjugate_gradient(objective.hessian(weights), test_loss.gradient(), tol=1e-8, max_matvecs=5000)
    # The derivative of each loss along one direction: no gradient of a single sample is needed.
    direction = found.solution.view_as(weights)
    _, slopes = torch.func.jvp(lambda at: objective.losses(at, objective.samples), (weights.detach(),), (direction,))
    return slopes / len(slopes), found


def retrained(objective: Objective, weights: Tensor, test: Samples, without: Sequence[int]) -> list[float]:
    """By how much the test loss does rise where each of some samples is left out."""
    places = [weights, *(objective.fitted(weights, index) for index in without)]
    before, *after = (float(objective.losses(place.detach(), test).mean()) for place in places)
    return [loss - before for loss in after]


def cross_entropies(weights: Tensor, samples: Samples) -> Tensor:
    """Of a linear classifier."""
    return functional.cross_entropy(samples[0] @ weights, samples[1], reduction="none")


def digits(count: int, wrong: int) -> tuple[Samples, Samples]:
    """Training digits, of which the first ones have the label of the next class, and test digits."""
    data = Digits()
    data.setup("fit")
    (inputs, labels), test = next(iter(data.train_dataloader())), next(iter(data.val_dataloader()))
    labels = labels[:count].clone()
    labels[:wrong] = (labels[:wrong] + 1) % 10
    return (inputs[:count].double(), labels), (test[0].double(), test[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=600, help="training samples")
    parser.add_argument("--wrong", type=int, default=30, help="how many of them have a wrong label")
    parser.add_argument("--decay", type=float, default=0.01, help="weight decay")
    options = parser.parse_args()
    train, test = digits(options.count, options.wrong)
    objective = Objective(cross_entropies, train, options.decay)
    weights = objective.fitted(torch.zeros(train[0].shape[1], 10, dtype=torch.float64))
    rises, found = influences(objective, weights, test)
    print(f"one inverse product: {found.num_matvecs} products, relative residual {found.relative_residual:.1e}")
    order = rises.argsort().tolist()
    found_wrong = sum(index < options.wrong for index in order[: options.wrong])
    print(f"of the {options.wrong} samples that do most harm {found_wrong} have a wrong label")
    print("sample  label is  change of the test loss without it: predicted  retrained")
    shown = [*order[:4], *order[-3:]]
    for index, change in zip(shown, retrained(objective, weights, test, shown), strict=True):
        label = "wrong" if index < options.wrong else "right"
        print(f"{index:6d}  {label:8s}  {float(rises[index]):47.2e}  {change:9.2e}")


if __name__ == "__main__":
    main()
