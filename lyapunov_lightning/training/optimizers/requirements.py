"""What callbacks demand of an optimizer, refused with a remedy where it is something else."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lyapunov_lightning.curvature.vectors.layout import is_narrow
from lyapunov_lightning.training.lightning_names import (
    LightningModule,
    MisconfigurationException,
    Trainer,
    callbacks_of,
    either,
)


def check_training_map(owner: str, optimizers: Sequence[torch.optim.Optimizer], *, momentum: bool = True) -> None:
    """Refuse to follow the training map of an optimizer that is not plain or heavy-ball SGD.

    Args:
        owner: The callback, as the error is to name it.
        optimizers: The trainer's optimizers.
        momentum: Whether heavy-ball momentum can be followed.

    Raises:
        MisconfigurationException: With the cause and the remedy.

    """

    def is_followed(optimizer: torch.optim.Optimizer) -> bool:
        # Not `isinstance`: a subclass may change the step, and an exponent of plain SGD's map would be logged as that
        # of the training.
        if type(optimizer) is not torch.optim.SGD or len(optimizer.param_groups) != 1:
            return False
        group = optimizer.param_groups[0]
        # The eigenvalue is read off the exponent by h = (1 + m − μ − m/μ)/α with μ = exp(λ), which is heavy-ball's
        # formula: Nesterov's gradient is taken elsewhere, and dampening changes the factor of the gradient.
        return not (group["nesterov"] or group["dampening"] or (group["momentum"] and not momentum))

    if not optimizers or not all(map(is_followed, optimizers)):
        kind = "plain or heavy-ball momentum" if momentum else "no momentum"
        raise MisconfigurationException(
            f"`{owner}` follows the map of SGD with one parameter group and {kind} at the lower end of the spectrum,"
            " which is not the optimizer here. Use `estimator='lanczos'`, or ask for the upper end only."
        )


def check_uniform_sgd(
    owner: str, optimizers: Sequence[torch.optim.Optimizer], parameters: Mapping[str, Tensor]
) -> None:
    """Refuse an optimizer whose step along a direction is not that direction times one learning rate.

    Weight decay may differ between parameter groups, since it enters the gradient before anything else.

    Args:
        owner: The callback, as the error is to name it.
        optimizers: The trainer's optimizers.
        parameters: The trainable parameters by name.

    Raises:
        MisconfigurationException: With the cause and the remedy.

    """
    cause = _not_uniform_sgd(optimizers, parameters)
    if cause is not None:
        raise MisconfigurationException(
            f"`{owner}` gives directions that cut across all parameters a learning rate of their own, which requires"
            f" one `torch.optim.SGD` with the same learning rate for all of them, but {cause}. Use such an optimizer,"
            " or remove the callback."
        )


def check_unscaled(owner: str, trainer: Trainer) -> None:
    """Refuse gradients that carry a loss scale until the optimizer's step.

    Raises:
        MisconfigurationException: With the cause and the remedy.

    """
    # Lightning unscales gradients before `on_before_optimizer_step`, but leaves that to optimizers that declare it for
    # themselves. Their gradients are 65,536 times too large in that hook, with the scaler's first scale.
    is_fused = any(group.get("fused") for optimizer in trainer.optimizers for group in optimizer.param_groups)
    if is_fused and getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise MisconfigurationException(
            f"`{owner}` needs the gradients unscaled, which a fused optimizer does only in its step. Use"
            " `fused=False`, or `precision='bf16-mixed'`."
        )


def check_movable(owner: str, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Refuse to move parameters under an optimizer that takes every move for its own.

    Raises:
        MisconfigurationException: With the cause and the remedy.

    """
    # LBFGS keeps the gradient and the step of its last call: a move in between is a change of the gradient without a
    # step, and enters its approximation of the Hessian as curvature that is not there.
    if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in optimizers):
        raise MisconfigurationException(
            f"`{owner}` moves the parameters between the optimizer's steps, which LBFGS would take for a change of the"
            " gradient along its own step. Use another optimizer, or do not ask for the descent."
        )


def check_own_steps(owner: str, pl_module: LightningModule) -> None:
    """Refuse a module whose updates cannot be seen, before anything is said of how its curvature could be measured.

    Raises:
        MisconfigurationException: With the cause and the remedy.

    """
    if not pl_module.automatic_optimization:
        raise MisconfigurationException(
            f"`{owner}` cannot steer a module with manual optimization, since it does not see its steps. Use automatic"
            " optimization."
        )
    # A bfloat16 parameter near 1 moves by 4e-3 or not at all, so most of an update is missing from the difference.
    narrow = {str(p.dtype) for p in pl_module.parameters() if p.requires_grad and is_narrow([p])}
    if narrow:
        raise MisconfigurationException(
            f"`{owner}` measures updates as differences of parameters, which are lost in the rounding of"
            f" {', '.join(narrow)}. Use mixed precision, which keeps the parameters in float32."
        )


def check_steerable(owner: str, trainer: Trainer, pl_module: LightningModule) -> torch.optim.Optimizer:
    """Refuse what keeps a callback from steering the learning rate.

    Returns:
        The optimizer.

    Raises:
        MisconfigurationException: With the cause and the remedy.

    """
    check_own_steps(owner, pl_module)
    # LambdaLR and OneCycleLR would overwrite what is set here, StepLR and CosineAnnealingLR multiply it by their factor
    # each time: a learning rate that neither of the two has chosen.
    if trainer.lr_scheduler_configs:
        names = ", ".join(type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs)
        raise MisconfigurationException(
            f"`{owner}` sets the learning rate, and so does {names}. Return the optimizer alone from"
            " `configure_optimizers`, or leave `lr_scheduler` out of the configuration."
        )
    optimizer: torch.optim.Optimizer = trainer.optimizers[0]
    if not optimizer.param_groups:  # what Lightning puts in the place of none
        raise MisconfigurationException(
            f"`{owner}` needs an optimizer to steer, and `configure_optimizers` returned none. Return one, or take the"
            " callback out."
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise MisconfigurationException(
            f"`{owner}` cannot steer LBFGS, which evaluates the loss several times in a step and has curvature of its"
            " own. Use SGD, Adam or any other optimizer that moves by learning rate times update."
        )
    cause = _not_steered_by_lr(optimizer)
    if cause is not None:
        raise MisconfigurationException(
            f"`{owner}` cannot steer {type(optimizer).__name__}, which {cause}. Use SGD, Adam or any other optimizer"
            " that moves by learning rate times update, or take the callback out."
        )
    # It adds its scheduler to the trainer in the epoch in which it begins, so that the check above finds none.
    if any(isinstance(callback, either("callbacks.StochasticWeightAveraging")) for callback in callbacks_of(trainer)):
        raise MisconfigurationException(
            f"`{owner}` sets the learning rate, and so does StochasticWeightAveraging. Use one of the two, or"
            " WeightAveraging, which leaves the learning rate alone."
        )
    if not all(float(group.get("lr", 0.0)) > 0 for group in optimizer.param_groups):
        raise MisconfigurationException(
            f"`{owner}` needs an optimizer with a positive learning rate `lr` in every parameter group; its value does"
            f" not matter, but the ratios do. {type(optimizer).__name__} has"
            f" {[group.get('lr') for group in optimizer.param_groups]}."
        )
    return optimizer


def gain_of_momentum(optimizer: torch.optim.Optimizer) -> float:
    """How many times a lasting gradient moves the parameters beyond a first one: ``(1 - dampening) / (1 - momentum)``.

    The largest of the parameter groups; 1 without momentum, and for optimizers that average gradients instead.

    """
    # With momentum m a constant gradient g moves the parameters by (1 − dampening)(1 + m + m² + ...) times lr·g a step.
    gains = [
        (1 - float(group.get("dampening", 0.0))) / (1 - float(group["momentum"]))
        for group in optimizer.param_groups
        if 0 < float(group.get("momentum") or 0.0) < 1
    ]
    return max([1.0, *gains])


def _not_steered_by_lr(optimizer: torch.optim.Optimizer) -> str | None:
    """Why the steps of an optimizer are not its learning rate times something else; None if they are."""
    # By what they have, since none of these is part of PyTorch and each exists in several packages: SAM, then the
    # schedule-free optimizers, then Prodigy and D-Adaptation.
    if hasattr(optimizer, "first_step") and hasattr(optimizer, "second_step"):
        return "evaluates the loss at two places in a step"
    if hasattr(optimizer, "train") and hasattr(optimizer, "eval"):
        return "keeps other parameters for the evaluation than for the training, and a schedule of its own"
    if any({"d", "k"} <= group.keys() for group in optimizer.param_groups):  # Prodigy's and D-Adaptation's estimate
        return "finds its learning rate itself"
    if any(group.get("maximize") for group in optimizer.param_groups):
        return "goes uphill (`maximize`)"
    # `is False`: an optimizer that cannot be tried is let through. What it does wrong the safeguard sees in the loss.
    if _steps_scale(optimizer) is False:
        return "takes steps that are not in proportion to its learning rate"
    return None


def _steps_scale(optimizer: torch.optim.Optimizer) -> bool | None:
    """Whether a step is in proportion to the learning rate of that step, tried on two numbers.

    Returns:
        None where no other optimizer of the kind can be made.

    """
    known = inspect.signature(type(optimizer)).parameters
    # Without what the constructor does not take, such as `decoupled_weight_decay` in the defaults of AdamW.
    options = {name: value for name, value in optimizer.defaults.items() if name in known and name != "lr"}
    displacements = []
    for last in (1e-3, 1e-2):
        # In float64: of a step of 1e-3 from a float32 parameter near 1 the rounding is 1e-4, and would not pass for
        # proportional to 1e-6.
        parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64, device="cpu"))
        try:
            make: Any = type(optimizer)
            toy = make([parameter], lr=1e-2, **options)
            # Only the last of three steps differs in its learning rate, and gradients change their signs. Rprop reads
            # the learning rate in its first step only and follows the signs from then on; ASGD's decay of the step
            # depends on it.
            for lr, gradient in ((1e-2, (1.0, 3.0)), (1e-2, (2.0, -1.0)), (last, (-1.0, 2.0))):
                before = parameter.detach().clone()
                toy.param_groups[0]["lr"] = lr
                parameter.grad = parameter.new_tensor(gradient)
                toy.step()
        except Exception:  # an optimizer of somebody else's, which may want anything: it is taken at its word
            return None
        displacements.append((parameter.detach() - before) / last)
    return torch.allclose(displacements[0], displacements[1], rtol=1e-6, atol=1e-12)


def _not_uniform_sgd(optimizers: Sequence[torch.optim.Optimizer], parameters: Mapping[str, Tensor]) -> str | None:
    """Why the optimizer is not one SGD for all parameters alike; None if it is."""
    if len(optimizers) != 1:
        return f"there are {len(optimizers)} optimizers"
    optimizer = optimizers[0]
    # Not `isinstance`, as above: in a subclass γ times the gradient need not be γ times the step.
    if type(optimizer) is not torch.optim.SGD:
        return f"the optimizer is {type(optimizer).__name__}"
    groups = optimizer.param_groups
    if any(group["maximize"] for group in groups):
        return "`maximize` is set"
    for name in ("lr", "momentum", "dampening", "nesterov"):
        values = {float(group[name]) for group in groups}
        if len(values) > 1:
            return f"the parameter groups have different `{name}`: {', '.join(map(str, sorted(values)))}"
    # By identity: `in` a list of tensors compares entry by entry, and fails for tensors of different shapes.
    held = {id(parameter) for group in groups for parameter in group["params"]}
    left_out = [name for name, parameter in parameters.items() if id(parameter) not in held]
    if left_out:
        return f"it does not train {', '.join(left_out)}, which should then not require a gradient"
    return None
