"""Run figures and tables of the three papers again, and say which of their claims hold.

python -m examples.papers --list             # what there is
python -m examples.papers                    # all of it
python -m examples.papers chaos-fig4         # one of them
python -m examples.papers --scale medium     # those that have a setting of their own at this scale
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from tqdm import tqdm

from examples.papers.experiments import Experiment, Scale, has_own_setting, load, names
from examples.papers.page import write_page
from examples.papers.running import Runs
from examples.papers.verdicts import Outcome, conclude


def main(arguments: Sequence[str] | None = None) -> list[Outcome]:
    """Run what the command line names.

    Args:
        arguments: The command line's arguments; those of the process if None.

    Returns:
        What came of it.

    """
    options = _parser().parse_args(arguments)
    known = names()
    unknown = sorted(set(options.names) - set(known))
    if unknown:
        _parser().error(f"There is no {', '.join(unknown)}. What there is: {', '.join(known)}.")
    chosen = options.names or [name for name in known if has_own_setting(name, options.scale)]
    experiments = [load(name, options.scale) for name in chosen]
    if options.list:
        for experiment in experiments:
            print(f"{experiment.name:18s} {experiment.title} ({experiment.source})")
        return []
    folder = options.out / options.scale
    if options.page is not None:
        outcomes = [outcome for name in known if (outcome := _largest(name, options.out)) is not None]
        write_page(outcomes, options.page)
        return outcomes
    started = time.perf_counter()
    jobs = options.jobs or (1 if options.scale == "full" else 2)
    with Runs(folder / "runs", options.root, jobs) as runs:
        if options.fresh:
            runs.forget(run for experiment in experiments for run in experiment.all_runs.values())
        outcomes = _run(experiments, runs, options.scale, folder / "outcomes")
    verdicts = [claim.verdict for outcome in outcomes for claim in outcome.claims]
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts))
    print(f"{len(verdicts)} claims: {counts}; {(time.perf_counter() - started) / 60:.1f} minutes")
    print(f"Pictures and verdicts: {folder / 'outcomes'}")
    return outcomes


def _run(experiments: Sequence[Experiment], runs: Runs, scale: Scale, folder: Path) -> list[Outcome]:
    """All of them, with one progress bar; each is told when it is there."""
    distinct = {run.key: run for experiment in experiments for run in experiment.all_runs.values()}
    outcomes = []
    with tqdm(total=len(distinct), unit="run", desc="papers", dynamic_ncols=True) as bar:
        runs.submit(distinct.values(), done=bar.update)
        for experiment in experiments:
            results = {key: runs.result(run) for key, run in experiment.all_runs.items()}
            outcome = conclude(experiment, scale, results, folder)
            outcomes.append(outcome)
            tqdm.write(_told(outcome), file=sys.stdout)
    return outcomes


def _largest(name: str, out: Path) -> Outcome | None:
    """What came of an experiment at the largest scale at which it was run."""
    paths = [out / scale / "outcomes" / f"{name}.json" for scale in reversed(get_args(Scale))]
    return next((Outcome.load(path) for path in paths if path.exists()), None)


def _told(outcome: Outcome) -> str:
    lines = [f"\n{outcome.name}: {outcome.title} ({outcome.source}), {outcome.seconds:.0f} s"]
    lines += [f"  broke off: {failure}" for failure in outcome.failures]
    for claim in outcome.claims:
        lines.append(f"  {claim.verdict.upper()}: {claim.claim}")
        lines.append(f"    {claim.quantity}: {claim.seen}; threshold: {claim.threshold}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m examples.papers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="figures or tables, such as chaos-fig4; all if none")
    scales = "small: minutes on two cores; medium: hours; full: the paper's own"
    parser.add_argument("--scale", choices=get_args(Scale), default="small", help=scales)
    parser.add_argument("--root", default="data", help="folder of the data sets, which are downloaded if not there")
    parser.add_argument("--out", type=Path, default=Path("logs/papers"), help="where everything is kept")
    parser.add_argument("--jobs", type=int, help="runs at a time: 2, and 1 at the full scale")
    parser.add_argument("--fresh", action="store_true", help="make the runs anew that were made before")
    parser.add_argument("--list", action="store_true", help="say what there is, and run nothing")
    page = "write the page of all that was run, and run nothing; of what was not, it keeps what it says"
    parser.add_argument("--page", type=Path, metavar="FILE", help=page)
    return parser


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nStopped. What was run is kept: the same command goes on from there.")
