"""The pages of `docs` that are programs: they run, and print what they say."""

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NUMBER = re.compile(r"[-+]?\d+\.?\d*(?:e[-+]?\d+)?")


def assert_same_text(printed: str, stated: str) -> None:
    """The same words, and the same numbers to 2 % or one unit of the last digit shown."""
    words = ["".join(_NUMBER.sub("#", text).split()) for text in (printed, stated)]
    assert words[0] == words[1], f"{printed!r} is not {stated!r}"
    for found, expected in zip(_NUMBER.findall(printed), _NUMBER.findall(stated), strict=True):
        digits = len(expected.partition("e")[0].partition(".")[2])
        unit = 0.0 if "e" in expected else 1.01 * 10.0**-digits if digits else 0.0
        assert float(found) == pytest.approx(float(expected), rel=0.02, abs=unit), f"{printed!r} is not {stated!r}"


def test_the_comparison_of_texts_sees_words_and_numbers() -> None:
    assert_same_text("tensor([ 1.2345, -0.0101])\n3 of 7", "tensor([1.2344, -0.0100]) 3 of 7")
    for printed in ("tensor([1.2345, -0.0200]) 3 of 7", "tensor([1.2345, -0.0101]) 3 of 8", "1.2345, -0.0101 3 of 7"):
        with pytest.raises(AssertionError):
            assert_same_text(printed, "tensor([1.2344, -0.0100]) 3 of 7")


def test_without_lightning_runs_and_prints_what_it_says() -> None:
    blocks = _BLOCK.findall((DOCS / "without_lightning.md").read_text())
    namespace: dict[str, object] = {"__name__": "without_lightning"}
    printed = ""
    num_compared = 0
    for language, text in [*blocks, ("python", "")]:
        if language == "text":
            assert_same_text(printed, text)
            num_compared += 1
            printed = ""
        elif language == "python":
            assert not printed, f"The page does not say that it prints {printed!r}."
            with contextlib.redirect_stdout(io.StringIO()) as stream:
                exec(compile(text, "docs/without_lightning.md", "exec"), namespace)
            printed = stream.getvalue()
    assert num_compared >= 8


def test_the_core_alone_loads_no_lightning() -> None:
    program = (
        "import sys, lyapunov_lightning.curvature\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('lightning', 'pytorch_lightning', 'scipy')])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
