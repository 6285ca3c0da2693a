"""The benchmark of precisions runs, and finds what its page says: full precision where the weights allow for it."""

from benchmarks import precision
from benchmarks.problems import Problem, sentences
from benchmarks.transformers import LanguageModel


def test_mixed_precision_is_measured_in_float32_and_autocast_of_the_loss_is_not() -> None:
    problem = Problem("tiny", LanguageModel(True, words=12, width=8, layers=1, scale=10.0), [sentences(2, 6, 12)])
    wide = precision.measured(problem, "bf16-mixed")
    narrow = precision.measured(problem, "bf16-mixed, autocast")
    for method in precision.METHODS[:2]:
        # over ten drawn networks at most 1.4e-4 and at least 1.3e-3
        assert _worse_end(wide[method]) <= 4e-4 < _worse_end(narrow[method]) <= 0.5
    assert _worse_end(wide["finite_difference"]) <= 0.02
    assert narrow["finite_difference"] == "refused"


def _worse_end(found: tuple[float, float, float] | str) -> float:
    """The larger error of the two ends: one of them alone may be right by chance, with eight bits as well."""
    assert not isinstance(found, str), found
    return max(found[:2])


def test_the_page_has_a_line_for_every_precision() -> None:
    page = precision.PAGE.read_text()
    assert all(page.count(f"| {kind} |") >= 4 for kind in precision.PRECISIONS)
    assert page.startswith(precision.HEAD)
