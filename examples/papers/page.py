"""The page of the documentation that collects the outcomes."""

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

from examples.papers.experiments import PAPERS, names
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

Most of what stands here was run at scale `small`, which everybody can repeat on two cores: narrow networks, images of
16 x 16 or 8 x 8 pixels where the papers have 32 x 32, a part of the data, and hundreds of steps where the papers take
tens of thousands. Where that did not come to what a claim is about, there is a scale `medium` (`make papers
SCALE=medium`), of the same networks in thousands of steps; it takes hours. Each section tells its scale. **So a verdict
is about the claim in that setting.** *Holds*: with every seed. *Does not hold*: with none. *Not decided*: the seeds
disagree, the training did not come to what the claim is about, or the data were not there: the ten claims of tables 5
and 6 are about Fashion-MNIST and CIFAR-100, which were not at hand.

The last chapter stands beside the papers: which curvature settles at the edge of stability under mini-batches. What
follows from it for the chaos-theory paper has [a page of its own](which_curvature.md).

A claim about several runs has a number for each. "Seen" gives for each seed their median, their range, and how many of
them lie within the threshold: all have to, unless a share is stated. So *does not hold* may mean one run of six.
"""

_COUNTED = {"of the papers": tuple(PAPERS)[:3], "beside them": tuple(PAPERS)[3:]}
"""Which chapters' claims are counted together."""


def write_page(outcomes: Sequence[Outcome], page: Path) -> None:
    """Write the page, and its pictures to ``images/papers`` in the folder above it.

    Args:
        outcomes: What was run.
        page: The file. What it tells of other experiments stays, so that none has to be run again for the sake of one.

    """
    told = _told_on(page) if page.exists() else {}
    told.update({outcome.name: _section(outcome, page) for outcome in outcomes})
    sections = {name: told[name] for name in names() if name in told}
    lines = [_HEAD]
    for of, chapters in _COUNTED.items():
        counted = Counter(v for name, text in sections.items() if _paper(name) in chapters for v in _verdicts(text))
        if counted:
            holds, does_not, undecided = (counted[verdict] for verdict in get_args(Verdict))
            total = f"Of {counted.total()} claims {of}"
            lines.append(f"{total} {holds} hold, {does_not} do not, and {undecided} are not decided.")
    lines += ["", *_overview(sections)]
    for paper, title in PAPERS.items():
        chapter = [text for name, text in sections.items() if _paper(name) == paper]
        if chapter:
            lines += ["", f"## {title}"]
        for text in chapter:
            lines += ["", text]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _paper(name: str) -> str:
    return name.split("-")[0]


def _told_on(page: Path) -> dict[str, str]:
    """The section of each experiment, as the page has it."""
    sections = re.split(r"^(?=##+ )", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    named = [(re.match(r"### .* \{ #(\S+) \}$", text, flags=re.MULTILINE), text.strip()) for text in sections]
    return {heading[1]: text for heading, text in named if heading is not None}


def _overview(sections: Mapping[str, str]) -> list[str]:
    rows = ["| | holds | does not hold | not decided |", "|---|---|---|---|"]
    for name, text in sections.items():
        verdicts = Counter(_verdicts(text))
        counts = " | ".join(str(verdicts[verdict] or "") for verdict in get_args(Verdict))
        title = text.removeprefix("### ").split(" {", 1)[0]
        rows.append(f"| [{name}](#{name}) {title} | {counts} |")
    return rows


def _verdicts(section: str) -> list[str]:
    """The verdict of each claim: at the end of its row."""
    return re.findall(r"\| \*\*([^*]+)\*\*[^|]*\|$", section, flags=re.MULTILINE)


def _section(outcome: Outcome, page: Path) -> str:
    lines = [f"### {outcome.title} {{ #{outcome.name} }}", "", f"*{outcome.source}.* {outcome.about.strip()}", ""]
    lines += ["| claim | what decides | threshold | seen | verdict |", "|---|---|---|---|---|"]
    lines += [_row(claim) for claim in outcome.claims]
    lines += ["", f"`{outcome.name}`: scale `{outcome.scale}`, {outcome.runs} runs, {len(outcome.seeds)} seeds."]
    if outcome.failures:
        reasons = sorted({failure.split(": ", 1)[1].rsplit(" (", 1)[0] for failure in outcome.failures})
        lines += ["", f"Runs that broke off: {len(outcome.failures)} of {outcome.runs}. " + " ".join(reasons)]
    if outcome.picture is not None:
        images = page.parents[1] / "images" / "papers"
        images.mkdir(parents=True, exist_ok=True)
        picture = images / f"{outcome.name}.png"
        _shrink(Path(outcome.picture), picture)
        lines += ["", f"![{outcome.title}]({os.path.relpath(picture, page.parent)})"]
    return "\n".join(lines)


def _row(claim: Decided) -> str:
    verdict = f"**{claim.verdict}**" + (f": {claim.reason}" if claim.reason else "")
    cells = (claim.claim, claim.quantity, claim.threshold, claim.seen, verdict)
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _shrink(picture: Path, copy: Path) -> None:
    """A picture for the page: half as wide, with few colours, as forty of them are on it."""
    from PIL import Image

    with Image.open(picture) as image:
        small = image.convert("RGB").resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)
        small.quantize(64).save(copy, optimize=True)
