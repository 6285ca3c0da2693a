"""What everything costs, in one table and one picture: this package beside others.

    make bench ROOT=data                                     # all of it, 70 minutes on two slow cores
    python -m benchmarks products growth --root data         # some sections, printed
    python -m benchmarks --quick                             # toy sizes: whether it runs, in a minute

Sections: eigenpairs, products, training, processes, growth. All times are wall-clock medians over repeats that are
interleaved within this one run, with their quartiles. Without CIFAR-10 under --root the images are random. Packages
that are not installed are rows that say so; `make bench` installs them into an environment of their own.
"""

import argparse
import importlib.metadata
import platform
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from benchmarks import eigenpairs, growth, processes, products, report, training_cost
from benchmarks.peers import versions
from benchmarks.problems import has_images
from benchmarks.report import Outcome, Run, Settings
from benchmarks.workers import quiet

SECTIONS = {
    "eigenpairs": eigenpairs,
    "products": products,
    "training": training_cost,
    "processes": processes,
    "growth": growth,
}
HEAD = """\
# Benchmark results

Written by `make bench`; [how it is measured, and how to read it](index.md).

![Our time beside that of others, products in gradients, training with a callback, growth, and two \
processes](../images/benchmark.png)

"""


def about(settings: Settings) -> str:
    """Where and how it was measured."""
    packages = ("torch", "lightning", "numpy")
    found = {name: importlib.metadata.version(name) for name in packages} | versions()
    data = "CIFAR-10" if has_images(settings.root) else "random images"
    listed = ", ".join(f"{name} {version}" for name, version in found.items())
    cores = f"{processor()}, Python {platform.python_version()}"
    small = " Toy sizes: none of these numbers says anything." if settings.quick else ""
    return f"One run of `make bench`: {settings.repeats} interleaved repeats, {data}; {cores}; {listed}.{small}"


def processor() -> str:
    """The name of the machine's processor, as far as it is known."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} cores of {names[0]}" if names else platform.machine()


def measured(names: list[str], settings: Settings) -> Iterator[Outcome]:
    """What the sections find, one after the other; what fails leaves the others alone."""
    for name in names:
        started = time.perf_counter()
        try:
            outcome = SECTIONS[name].run(settings)
        except Exception as error:
            traceback.print_exc()
            reason = f"This section failed: {type(error).__name__}: {error}"
            outcome = Outcome(name, name, reason, seconds=time.perf_counter() - started)
        print(f"{name}: {outcome.seconds:.0f} s", file=sys.stderr, flush=True)
        yield outcome


def main(arguments: list[str] | None = None) -> int:
    """Run the sections."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"some of {', '.join(SECTIONS)}; all if none")
    parser.add_argument("--root", default="data", help="folder of CIFAR-10 in torchvision's layout; none is downloaded")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each, at most one for each core")
    parser.add_argument("--quick", action="store_true", help="toy sizes")
    parser.add_argument("--write", action="store_true", help="write page and picture of the documentation as well")
    parser.add_argument("--again", action="store_true", help="nothing is measured: what was last written, once more")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of the documentation")
    parser.add_argument("--kept", type=Path, default=Path("logs/benchmarks.json"), help="what was measured, as JSON")
    found = parser.parse_args(arguments)
    unknown = [name for name in found.sections if name not in SECTIONS]
    if unknown:
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    settings = Settings(found.root, found.repeats, found.jobs, found.quick)
    quiet()
    if found.again:
        run = report.load(found.kept)
    else:
        names = [name for name in SECTIONS if name in (found.sections or SECTIONS)]
        run = Run(about(settings), list(measured(names, settings)))
    print(run.markdown())
    if found.write:
        report.save(run, found.kept)
        picture = report.picture(run, {name: section.draw for name, section in SECTIONS.items()})
        picture.save(found.docs / "images" / "benchmark")
        (found.docs / "benchmarks").mkdir(exist_ok=True)
        (found.docs / "benchmarks" / "results.md").write_text(HEAD + run.markdown())
    return int(any(not outcome.figures for outcome in run.outcomes))


if __name__ == "__main__":
    sys.exit(main())
