"""Lets the reference show the docstrings' few pieces of reStructuredText: formulas and literal blocks."""

import re
from typing import Any

import griffe

_MATH_LINE = re.compile(r":math:`([^`]*)`")
_MATH_BLOCK = re.compile(r"^( *)\.\. math:: *(.*)$", re.MULTILINE)
_SYMBOLS = {
    r"\eta": "η",
    r"\theta": "θ",
    r"\lambda": "λ",
    r"\alpha": "α",
    r"\gamma": "γ",
    r"\top": "ᵀ",
    r"\min": "min",
    r"\mathrm": "",
    r"\qquad": "   ",
    r"\,": " ",
    r"\cdot": "·",
    r"\le": "≤",
    r"\|": "‖",
    r"\in": "∈",
    r"\sum": "Σ",
    r"\ge": "≥",
}


def plain(formula: str) -> str:
    """A formula without TeX, for a site that loads no fonts and no scripts from elsewhere."""
    formula = re.sub(
        r"\\tilde\s*\\?([A-Za-z]+)", lambda found: f"{_SYMBOLS.get(chr(92) + found[1], found[1])}\u0303", formula
    )
    for symbol in sorted(_SYMBOLS, key=len, reverse=True):
        formula = formula.replace(symbol, _SYMBOLS[symbol])
    formula = formula.replace("^ᵀ", "ᵀ").replace("^{-1}", "⁻¹").replace("^2", "²").replace(" ᵀ", "ᵀ")
    return re.sub(r"[{}]", "", formula).strip()


class PlainDocstrings(griffe.Extension):
    """Rewrites docstrings before they are parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            text = _MATH_LINE.sub(lambda found: f"`{plain(found[1])}`", obj.docstring.value)
            text = _MATH_BLOCK.sub(lambda found: f"{found[1]}    {plain(found[2])}", text)
            obj.docstring.value = re.sub(r"^( *)Example::$", r"\1Example:", text, flags=re.MULTILINE)
