"""The page of the documentation that collects the outcomes."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from examples.papers.experiments import PAPERS
from examples.papers.verdicts import Decided, Outcome, Verdict

_HEAD = """\
# The three papers, run again

<!-- Written by `python -m examples.papers --page`; change the experiments, not this page. -->

Every figure and table of the three papers whose methods this package implements, each with the claim that it stands
for, the number that decides it, and a threshold that was written down before the run. One command runs them all, or one
of them:

    make papers
    python -m examples.papers chaos-fig4

`--list` names them. Each is a YAML file in `examples/papers/figures`, put together from configurations that
`lyapunov-lightning fit` takes as they are; every run leaves its own in its folder. A broken-off run goes on where it
was, and figures that need the same training share it. `--scale full` is the papers' own setting, for a GPU.

What stands here was run at scale `small`, which everybody can repeat on two cores: narrow networks, images of 16 x 16
or 8 x 8 pixels where the papers have 32 x 32, a part of the data, and hundreds of steps where the papers take tens of
thousands. **So a verdict is about the claim in that setting.** *Holds*: with every seed. *Does not hold*: with none.
*Not decided at this scale*: the seeds disagree, the training did not come to what the claim is about, or the data were
not there.

A claim about several runs has a number for each. "Seen" gives for each seed their median, their range, and how many of
them lie within the threshold: all have to, unless a share is stated. So *does not hold* may mean one run of six.
"""


def write_page(outcomes: Sequence[Outcome], page: Path) -> None:
    """Write the page, and its pictures to ``images/papers`` in the folder above it.

    Args:
        outcomes: In the order in which they are to be told.
        page: The file.

    """
    images = page.parents[1] / "images" / "papers"
    images.mkdir(parents=True, exist_ok=True)
    counts = Counter(claim.verdict for outcome in outcomes for claim in outcome.claims)
    holds, does_not, undecided = (counts[verdict] for verdict in get_args(Verdict))
    lines = [
        _HEAD,
        f"Of {sum(counts.values())} claims {holds} hold, {does_not} do not, and {undecided} are not decided.",
    ]
    lines += ["", *_overview(outcomes)]
    for paper, title in PAPERS.items():
        chapter = [outcome for outcome in outcomes if outcome.name.startswith(f"{paper}-")]
        if chapter:
            lines += ["", f"## {title}"]
        for outcome in chapter:
            lines += ["", *_section(outcome)]
            if outcome.picture is not None:
                name = f"{outcome.name}.png"
                _shrink(Path(outcome.picture), images / name)
                link = os.path.relpath(images / name, page.parent)
                lines += ["", f"![{outcome.title}]({link})"]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _overview(outcomes: Sequence[Outcome]) -> list[str]:
    rows = ["| | holds | does not hold | not decided |", "|---|---|---|---|"]
    for outcome in outcomes:
        verdicts = Counter(claim.verdict for claim in outcome.claims)
        counts = " | ".join(str(verdicts[verdict] or "") for verdict in get_args(Verdict))
        rows.append(f"| [{outcome.name}](#{outcome.name}) {outcome.title} | {counts} |")
    return rows


def _section(outcome: Outcome) -> list[str]:
    lines = [f"### {outcome.title} {{ #{outcome.name} }}", "", f"*{outcome.source}.* {outcome.about.strip()}", ""]
    lines += ["| claim | what decides | threshold | seen | verdict |", "|---|---|---|---|---|"]
    lines += [_row(claim) for claim in outcome.claims]
    lines += ["", f"`{outcome.name}`: {outcome.runs} runs, {len(outcome.seeds)} seeds."]
    if outcome.failures:
        reasons = sorted({failure.split(": ", 1)[1].rsplit(" (", 1)[0] for failure in outcome.failures})
        lines += ["", f"Runs that broke off: {len(outcome.failures)} of {outcome.runs}. " + " ".join(reasons)]
    return lines


def _row(claim: Decided) -> str:
    cells = (claim.claim, claim.quantity, claim.threshold, claim.seen, f"**{claim.verdict}**")
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _shrink(picture: Path, copy: Path) -> None:
    """A picture for the page: half as wide, with few colours, as forty of them are on it."""
    from PIL import Image

    with Image.open(picture) as image:
        small = image.convert("RGB").resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)
        small.quantize(64).save(copy, optimize=True)
