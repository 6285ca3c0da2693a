"""Is the learning rate to blame? Read off the stability ratios and the losses of a run.

The stability ratio is a curvature over the one at which the optimizer's learning rate turns unstable. A direction whose
curvature is beyond the limit throws the parameters further out with every step, so that the loss rises soon after, from
step to step; one below it does not, whatever else makes the loss rise. The diagnosis of a run is the first of these
kinds that fits:

1. ``unknown``: there is no ratio, since the limit of the optimizer is not known or nothing was measured.
2. ``too_fast``: the loss rose in the first steps, to more than twice the first one and out of its noise, and was no
   lower at the end than at first.
3. The loss was *lost*: it became NaN or infinite, or rose and never came back. ``data_fault`` if it *jumped* further at
   once than the ratios before explain. Else, by the measurements in the window before: ``lost_otherwise`` if none was
   near the limit, ``too_fast`` if it was lost in the first steps, and ``too_fast_later``. A loss that is lost in the
   first steps before any ratio is known is ``too_fast`` as well: hardly anything else does that.
4. ``not_converged``: fewer than half of the measurements met their tolerance. ``few``: fewer than three count.
5. ``too_fast``, ``too_fast_later``: the limit was met, and the loss was no lower at the end than at first.
6. ``bad_batch``, ``data_fault``: the loss jumped for one or two steps, or for more, and came back.
7. ``clipped``: the gradient was clipped at most of the measured steps.
8. No ratio was at the limit: ``noise_limited`` if the loss has fallen, over its last half no further than it differs
   from batch to batch, and noise takes a good part of the progress of the steps; else ``room``.
9. ``left``: one was, but none of the last third, whose median was below 0.8.
10. ``limited``: the loss spiked, and at least half of the spikes came near a measurement at the limit, in a share at
    least as large as that of all steps that are near one. Or since the limit was met the median is above 1.2, and the
    loss has fallen over its last half no further than it differs from batch to batch.
11. ``above``: the median is above 3. ``at_edge`` otherwise.

A ratio is *at the limit* from 0.95 on, and *near the limit* from 0.5 on: the limit is known roughly. *The window
before* a step is the last 20, or the usual distance of two measurements where that is larger; where a schedule has
raised the learning rate since the last measurement, its ratio counts as what it comes to. *Near* in steps is as far.
Losses *stand out* from the 20 before them above their median by six times their spread (that of a normal distribution
with their median absolute deviation) and by 30 % of the median; two or more in a row are a *spike*.

A loss *jumps* if the first one to stand out does so by five such margins above the last ones (or by two, and by eight
within three steps), undoes most of what the training had gained, and is the highest of the run. What the learning rate
does builds up, since along a direction at ``r`` times its limit a step multiplies the loss by a few times ``(2r - 1)²``
at most; at the limit the jump has to be ten times that.

Left out are ratios that may not be judged, such as an Adam's first; those that were measured on the data of a jump, or
still have it in their average; and an average that is at the limit by a single one of its measurements.

What these rules cannot know: a ratio is known only where it was measured, and what rises and falls between two
measurements is not seen.

The room has six parts, and each knows only those before it: `readings` (the measurements, and the learning rate that
they name), `losses` (what a series of losses shows by itself), `facts` (what was seen in a run), `kinds` (the rules
above), `sentences` (what is said of each kind) and `verdict` (all of it together). `watch` judges a run that is not
over. Nothing here knows the callback or how the ratios were measured. `benchmarks/known_runs` holds the rules
against a hundred runs of which the cause is known.

References:
    J. Cohen et al., "Gradient descent on neural networks typically occurs at the edge of stability", 2021, for the edge
    and for what the loss does there; J. Cohen et al., "Adaptive gradient methods at the edge of stability", 2022.

"""

from lyapunov_lightning.curvature.diagnosis.kinds import Kind, classify
from lyapunov_lightning.curvature.diagnosis.losses import diverged_at, loss_spikes
from lyapunov_lightning.curvature.diagnosis.readings import Reading
from lyapunov_lightning.curvature.diagnosis.sentences import TITLES
from lyapunov_lightning.curvature.diagnosis.verdict import Diagnosis, diagnose
from lyapunov_lightning.curvature.diagnosis.watch import EdgeWatch

__all__ = ["TITLES", "Diagnosis", "EdgeWatch", "Kind", "Reading", "classify", "diagnose", "diverged_at", "loss_spikes"]
