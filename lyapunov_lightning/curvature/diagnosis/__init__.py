"""Is the learning rate to blame? Read off the stability ratios and the losses of a run.

The stability ratio is the eigenvalue that counts for the optimizer over the one at which its learning rate turns
unstable. A direction whose curvature is beyond the limit throws the parameters further out with every step, so that the
loss rises soon after; one below it does not, whatever else makes the loss rise. The diagnosis of a run is the first of
these kinds that fits:

1. ``unknown``: there is no ratio, since the limit of the optimizer is not known or nothing was measured.
2. ``diverged``: the loss became NaN or infinite, or each of its last values lies above each of its first ones; and one
   of the last three ratios before that was at the limit. ``diverged_below`` if none was.
3. ``not_converged``: fewer than half of the measurements met their tolerance. ``few``: fewer than three did.
4. ``below``: no ratio was at the limit.
5. ``left``: one was, but over the last third of the measurements the median was below 0.8.
6. ``limited``: the loss spiked, and at least half of the spikes came near a measurement at the limit, in a share at
   least as large as that of all steps that are near one.
7. ``above``: since the limit was met the median is above 1.5. ``at_edge`` otherwise.

A ratio is *at the limit* from 0.95 on. *Near* is within 20 steps, or within the usual distance of two measurements
where that is larger. A *spike* is two or more losses in a row that stand out from the 20 before them: above their
median by six times their spread (that of a normal distribution with their median absolute deviation) and by 30 % of
the median.

Two things these rules cannot know. The ratio of a mini-batch is as a rule above that of all data, most of all for small
batches, whose sharpest direction is another one at the next step; there ``above`` is common and harmless. And a ratio
is known only where it was measured: what rises and falls between two measurements is not seen.

The room has five parts, and each knows only those before it: `readings` (the measurements, and the learning rate that
they name), `losses` (what a series of losses shows by itself), `facts` (what was seen in a run), `kinds` (the rules
above) and `sentences` (what is said of each kind). `watch` judges a run that is not over. Nothing here knows the
callback or how the ratios were measured.

References:
    J. Cohen et al., "Gradient descent on neural networks typically occurs at the edge of stability", 2021, for the edge
    and for what the loss does there; J. Cohen et al., "Adaptive gradient methods at the edge of stability", 2022.

"""

from lyapunov_lightning.curvature.diagnosis.kinds import Kind, classify
from lyapunov_lightning.curvature.diagnosis.losses import diverged_at, loss_spikes
from lyapunov_lightning.curvature.diagnosis.readings import Reading
from lyapunov_lightning.curvature.diagnosis.sentences import TITLES, Diagnosis, diagnose
from lyapunov_lightning.curvature.diagnosis.watch import EdgeWatch

__all__ = ["TITLES", "Diagnosis", "EdgeWatch", "Kind", "Reading", "classify", "diagnose", "diverged_at", "loss_spikes"]
