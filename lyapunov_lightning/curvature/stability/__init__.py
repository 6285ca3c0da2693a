r"""Where an optimizer's present learning rate turns unstable, on all of the data and on mini-batches.

On a quadratic a training step is a linear map. Along one direction of curvature ``h`` every optimizer below is the same
map with other numbers, of the parameter ``x`` and of what its momentum still has to give, ``v``::

    x ← kept·x - now·h·x - v          v ← memory·v + later·h·x

**All of the data.** As the curvature grows, an eigenvalue of the map leaves the unit circle at -1: the parameters then
swing from one side to the other, and the gradient ``g, -g, g, ...`` that this brings comes out of the momentum as
``r·g``. With the learning rate ``η`` the largest stable curvature is ``(1 + kept) / (r η)``:

=======================================  ==================================  =================================
optimizer                                response ``r``                      stability limit
=======================================  ==================================  =================================
SGD, Adagrad                             ``1``                               ``2 / η``
SGD, momentum ``m``, dampening ``d``     ``(1 - d) / (1 + m)``               ``(2 + 2m) / ((1 - d) η)``
SGD, Nesterov momentum ``m``             ``(1 + 2m) / (1 + m)``              ``(2 + 2m) / ((1 + 2m) η)``
Adam, RAdam, Adamax                      ``(1 - β1) / (1 + β1)``             ``(2 + 2β1) / ((1 - β1) η)``
AdamW                                    the same                            ``(1 + β1)(2 - ηw) / ((1 - β1) η)``
RMSprop, momentum ``m``                  ``1 / (1 + m)``                     ``(2 + 2m) / η``
NAdam, momentum ``μ``, then ``μ'``       ``1 - μ + μ'(1 - β1)/(1 + β1)``     ``2 / (r η)``
=======================================  ==================================  =================================

For an adaptive optimizer it is to be compared with the largest eigenvalue of the preconditioned Hessian ``P^{-1}H``,
where ``P`` divides the gradient in its update (J. Cohen et al., "Adaptive gradient methods at the edge of stability",
2022), here as it stands and as if it were fixed. Further:

- *Decoupled weight decay* ``w`` (AdamW) makes ``kept`` ``1 - ηw``, else it is 1.
- *Weight decay in the gradient* (all others) adds ``w`` to the curvature before the gradient is divided by ``P``.
- *Groups* that differ in learning rate, momentum or weight decay have one limit together: with
  ``S = diag(r η / (2 - ηw)) P^{-1}`` (``w`` decoupled) and ``D`` the decay in the gradient, the map is stable up to
  ``λ_max(S^{1/2} (H + D) S^{1/2}) = 1``. That nothing else leaves the circle before follows from the symmetry of ``H``:
  on the circle the polynomial of every one of these optimizers is real at ±1 only.
- `maximize` follows the gradient upwards: ``-H`` takes the place of ``H``.

**Mini-batches.** Now ``h`` differs from step to step. It is described by two numbers: the *batch sharpness*
``B = E[h²] / E[h]``, to which the curvature of a batch along its own gradient averages (A. Andreyev, P. Beneventano,
"Edge of stochastic stability", 2024), and the *agreement* of the batches, ``p = E[h]² / E[h²]``: 1 where all see the
same curvature, towards 0 where each sees another direction. The step then is the map of the mean curvature ``pB``, with
noise of variance ``p(1 - p)B²`` that is fed back through one number, ``h·x``. The second moments of such a system decay
as long as the variance of the noise times the squared impulse response of the mean map, summed over time, is below 1
(J. Willems, G. Blankenship, "Frequency domain stability criteria for stochastic systems", 1971). The impulse response
is that of ``(now·z + δ) / (z² + c₁z + c₂)`` with ``δ = later - memory·now``, ``c₁ = now·pB - kept - memory`` and
``c₂ = kept·memory + δ·pB``, and the sum of its squares is known in closed form. So the limit is the smallest positive
root ``B`` of

    (1 - c₂)((1 + c₂)² - c₁²)  =  p(1 - p)B² · ((now² + δ²)(1 + c₂) - 2·now·δ·c₁),

which is ``2(1 - m²) / (η (1 + m - 2mp))`` for SGD with momentum ``m``: ``2/η`` without momentum whatever ``p``, the
classical limit at ``p = 1``, and ``2(1 - m)/η`` towards ``p = 0``. At ``m = 0.9`` the ends are a factor of 19 apart.

**Single runs.** What the mean over all draws of batches does, and what almost every run does, are two things: beyond
this limit rare excursions carry the mean, while the others shrink. `random_map` computes both.
"""

from lyapunov_lightning.curvature.stability.optimizers import (
    Stability,
    is_adaptive,
    is_known,
    learning_rate,
    stability_of,
)
from lyapunov_lightning.curvature.stability.random_map import (
    Exponent,
    almost_sure_edge,
    lyapunov_exponent,
    mean_square_edge,
    mean_square_growth,
)
from lyapunov_lightning.curvature.stability.step_map import StepMap

__all__ = [
    "Exponent",
    "Stability",
    "StepMap",
    "almost_sure_edge",
    "is_adaptive",
    "is_known",
    "learning_rate",
    "lyapunov_exponent",
    "mean_square_edge",
    "mean_square_growth",
    "stability_of",
]
