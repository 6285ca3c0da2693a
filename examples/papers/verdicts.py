"""From records to verdicts: what a claim's numbers are for each seed, and whether they bear it out."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

from examples.papers.experiments import Claim, Experiment, Scale
from examples.papers.record import Record
from examples.papers.running import Failed
from lyapunov_lightning.figures.style import house_style

Verdict = Literal["holds", "does not hold", "not decided at this scale"]

Numbers = dict[str, float | None]
"""What a measure found in the runs of one seed, by name."""


def judge(claim: Claim, numbers: Sequence[Numbers | None]) -> Verdict:
    """Whether the numbers bear a claim out.

    Args:
        claim: Its thresholds, and the share of the numbers that has to keep to them.
        numbers: Those of each seed; None where its runs broke off.

    Returns:
        It holds if it does with every seed, and does not hold if it does with none. A number that is not known leaves a
        seed undecided unless the others decide whatever it is.

    """
    votes = {None if seed is None else _vote(claim, seed) for seed in numbers}
    if votes == {True}:
        return "holds"
    return "does not hold" if votes == {False} else "not decided at this scale"


def why_undecided(claim: Claim, numbers: Sequence[Numbers | None]) -> str:
    """What keeps a claim from being decided; nothing for one that is.

    Args:
        claim: It.
        numbers: As for `judge`.

    """
    if judge(claim, numbers) != "not decided at this scale":
        return ""
    if None in numbers:
        return "not run"
    unknown = [_vote(claim, seed) is None for seed in numbers if seed is not None]
    return "the training did not come to it" if any(unknown) else "the seeds disagree"


def _vote(claim: Claim, numbers: Numbers) -> bool | None:
    """What one seed says."""
    if not numbers:
        return None
    known = [value for value in numbers.values() if value is not None and not math.isnan(value)]
    unknown = len(numbers) - len(known)
    inside = sum(
        (claim.above is None or value > claim.above) and (claim.below is None or value < claim.below) for value in known
    )
    needed = claim.share * len(numbers) - 1e-9
    if inside >= needed:
        return True
    return False if inside + unknown < needed else None


def _inside(claim: Claim, numbers: Numbers) -> int:
    """How many of the numbers speak for the claim."""
    return sum(
        (claim.above is None or value > claim.above) and (claim.below is None or value < claim.below)
        for value in _known(numbers)
    )


def _known(numbers: Numbers) -> list[float]:
    return [value for value in numbers.values() if value is not None and not math.isnan(value)]


@dataclass(frozen=True)
class Decided:
    """A claim with its verdict.

    Attributes:
        claim: It.
        quantity: What decides it.
        threshold: The threshold, in words.
        numbers: What was seen with each seed; None where the runs broke off.
        inside: How many of these numbers speak for the claim.
        verdict: What follows.
        reason: Why it is not decided, where it is not.

    """

    claim: str
    quantity: str
    threshold: str
    numbers: list[Numbers | None]
    inside: list[int]
    verdict: Verdict
    reason: str = ""

    @property
    def seen(self) -> str:
        """The numbers in short: for each seed the median, and if there are several how many speak for the claim."""
        return "; ".join(map(_in_short, self.numbers, self.inside))


@dataclass(frozen=True)
class Outcome:
    """What came of an experiment.

    Attributes:
        name: That of the experiment.
        title, source, about: The same as its.
        scale: At which scale it was run.
        seeds: With which seeds.
        runs: How many runs it has.
        seconds: How long they kept a core busy, those that it shares with others included.
        claims: What was decided.
        failures: Why runs broke off, if any did.
        picture: The file, if there is one.

    """

    name: str
    title: str
    source: str
    about: str
    scale: Scale
    seeds: list[int]
    runs: int
    seconds: float
    claims: list[Decided]
    failures: list[str] = field(default_factory=list)
    picture: str | None = None

    def save(self, path: Path) -> None:
        """Write it to a file."""
        path.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False), encoding="utf-8")

    @staticmethod
    def load(path: Path) -> "Outcome":
        """Read it again."""
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        content["claims"] = [Decided(**claim) for claim in content["claims"]]
        return Outcome(**content)


def conclude(
    experiment: Experiment, scale: Scale, results: Mapping[tuple[str, int], Record | Failed], folder: Path
) -> Outcome:
    """Decide the claims of an experiment and draw it.

    Args:
        experiment: It.
        scale: At which scale it was run.
        results: What came of each run, by its name and seed.
        folder: Where the outcome and the picture are written.

    """
    records = {key: result for key, result in results.items() if isinstance(result, Record)}
    failures = {
        f"{name}, seed {seed}: {result.reason} ({result.log})"
        for (name, seed), result in results.items()
        if isinstance(result, Failed)
    }
    decided = []
    for claim in experiment.claims:
        numbers: list[Numbers | None] = []
        for seed in experiment.seeds:
            of_seed = {name: records[name, seed] for name in experiment.runs if (name, seed) in records}
            is_whole = len(of_seed) == len(experiment.runs)
            numbers.append(experiment.function(claim.measure)(of_seed, **claim.options) if is_whole else None)
        verdict = judge(claim, numbers)
        inside = [0 if seed is None else _inside(claim, seed) for seed in numbers]
        reason = why_undecided(claim, numbers)
        decided.append(Decided(claim.claim, claim.quantity, claim.threshold, numbers, inside, verdict, reason))
    folder.mkdir(parents=True, exist_ok=True)
    picture = None
    if not failures:
        of_runs = {name: [records[name, seed] for seed in experiment.seeds] for name in experiment.runs}
        with house_style():
            drawn = experiment.function(experiment.draw)(of_runs, **experiment.draw_options)
        picture = str(drawn.save(folder / experiment.name)[0])
    outcome = Outcome(
        name=experiment.name,
        title=experiment.title,
        source=experiment.source,
        about=experiment.about,
        scale=scale,
        seeds=list(experiment.seeds),
        runs=len(results),
        seconds=sum(record.seconds for record in records.values()),
        claims=decided,
        failures=sorted(failures),
        picture=picture,
    )
    outcome.save(folder / f"{experiment.name}.json")
    return outcome


def _in_short(numbers: Numbers | None, inside: int) -> str:
    if numbers is None:
        return "not run"
    known = _known(numbers)
    if not known:
        return "not known"
    words = f"{median(known):.3g}"
    if len(numbers) > 1:
        words += f" ({min(known):.3g} to {max(known):.3g}; {inside} of {len(numbers)})"
    return words
