"""Generated modules train bit for bit as they do without the reading callbacks, which measure their very loss."""

import pytest

from tests.generator import data, habits, objects, state
from tests.generator.cases import KINDS, Case, case_of, covering_cases
from tests.generator.mischief import MISCHIEF, Mischief, replay_in_place
from tests.generator.readers import others as beside
from tests.generator.runs import check, differences, run

COVERING = covering_cases()
NUM_DRAWN = 2
"""Cases as the benchmark draws thousands of them, by their seeds."""

PLACES = [*state.ATTRIBUTES, *state.TENSORS, *state.CODE, *objects.OBJECTS, *habits.ITERATORS]
"""All that a step can write to and that stays where it is put."""


@pytest.mark.parametrize(
    "case",
    [*COVERING, *map(case_of, range(NUM_DRAWN))],
    ids=[*range(len(COVERING)), *map("drawn {}".format, range(NUM_DRAWN))],
)
def test_callbacks_do_not_show_in_a_generated_module(case: Case) -> None:
    verdict = check(case)
    if verdict.failed or verdict.kind == "does not train":  # which is a fault of the generator
        pytest.fail(f"{verdict}\n\n{case.source()}", pytrace=False)


def test_every_ingredient_is_in_a_case_and_nothing_keeps_one_from_being_compared() -> None:
    used = {ingredient.name for case in COVERING for ingredient in case.ingredients()}
    assert used >= {one.name for kind in KINDS for one in kind if not one.slow}
    for case in COVERING:
        others = [one for one in case.ingredients() if not (one.exact and one.measurable)]
        assert not others or {*others} >= {*case.layers, *case.states, *case.options, *case.callbacks}
    assert {reader.name for case in COVERING for reader in case.readers[1:]} == {one.name for one in beside("float64")}


def test_a_seed_always_makes_the_same_case() -> None:
    sources = [case_of(seed).source() for seed in range(50)]
    assert sources == [case_of(seed).source() for seed in range(50)]
    assert len(set(sources)) == 50


@pytest.mark.parametrize("seed", [1, 2])
def test_two_runs_of_a_case_are_the_same(seed: int) -> None:
    assert run(case_of(seed)).differences(run(case_of(seed))) == []


@pytest.mark.parametrize("name", MISCHIEF)
def test_comparison_notices(name: str) -> None:
    counted = next(loader for loader in data.LOADERS if loader.name == "dataset with a counter and a cache")
    case = Case(0, loader=counted, states=(state.ATTRIBUTES[0],))
    without, with_mischief = run(case), run(case, [Mischief(MISCHIEF[name])])
    assert with_mischief.error is None
    assert without.differences(with_mischief) != []


def test_comparison_looks_into_every_place_of_state() -> None:
    """One module with all of them, replayed in place: each place by itself must be seen to have changed."""
    case = Case(0, states=tuple(PLACES))
    without, with_mischief = run(case), run(case, [Mischief(replay_in_place, only_at=[1])])
    assert (without.error, with_mischief.error) == (None, None)
    changed = "\n".join(differences("", without.steps[1], with_mischief.steps[1]))
    missed = [place.name for number, place in enumerate(PLACES) if f"state{number}'" not in changed]
    assert missed == []
