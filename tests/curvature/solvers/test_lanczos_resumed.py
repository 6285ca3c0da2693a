"""A search that is interrupted at any product gives what it has, and goes on to what it would have found."""

import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lyapunov_lightning.curvature import lanczos
from lyapunov_lightning.curvature.errors import Interrupted
from lyapunov_lightning.curvature.solvers.lanczos import Search

SIZE = 300
ENDS = torch.tensor([9.0, 5.0, 5.0, 5.0, 4.9, -3.0, -7.0])
VALUES = torch.cat([ENDS, torch.linspace(1, -1, SIZE - len(ENDS))])
WANTED: dict[str, Any] = {"largest": 4, "smallest": 1, "max_basis_vectors": 24}


class Diagonal:
    """Known eigenvalues, some of them repeated; each product is counted, and one of them may be interrupted."""

    dtype, device, size = torch.float64, torch.device("cpu"), SIZE

    def __init__(self, interrupted_at: float = math.inf) -> None:
        self.num_matvecs = 0
        self.interrupted_at = interrupted_at

    def matvec(self, vector: Tensor) -> Tensor:
        if self.num_matvecs >= self.interrupted_at:
            raise Interrupted
        self.num_matvecs += 1
        return VALUES.double() * vector


class Keeper:
    """Keeps the state before each product, as a file would."""

    def __init__(self) -> None:
        self.file = io.BytesIO()
        self.search: Search | None = None

    def __call__(self, search: Search) -> None:
        self.search = search
        self.file = io.BytesIO()
        torch.save(search.state_dict(), self.file)

    @property
    def state(self) -> dict[str, Any]:
        self.file.seek(0)
        return torch.load(self.file, weights_only=True)


def test_a_search_goes_on_to_the_bit_from_wherever_it_was_interrupted() -> None:
    """Through restarts, and through a challenge, with a random vector that was not drawn yet."""
    whole = Diagonal()
    expected = lanczos(whole, **WANTED)
    assert expected.values.tolist() == pytest.approx([9, 5, 5, 5, -7], rel=1e-6)
    phases = set()
    for count in (0, 1, 7, 23, 24, 25, 40, whole.num_matvecs - 1):
        keeper, operator = Keeper(), Diagonal(count)
        if count < 5:
            with pytest.raises(Interrupted):
                lanczos(operator, watch=keeper, **WANTED)
        else:
            early = lanczos(operator, watch=keeper, **WANTED)
            assert not early.converged.any()
            assert early.num_matvecs == count
            rest = VALUES.double() * early.vectors - early.values[:, None] * early.vectors
            assert (torch.linalg.vector_norm(rest, dim=1) <= early.residuals + 1e-12).all()
        phases.add(keeper.search.is_challenged)
        # Another seed, and a basis of another size: those of the search count.
        again = lanczos(other := Diagonal(), resume=keeper.state, **{**WANTED, "seed": 5, "max_basis_vectors": 60})
        assert other.num_matvecs == whole.num_matvecs - count
        for name, value in vars(expected).items():
            assert torch.equal(torch.as_tensor(getattr(again, name)), torch.as_tensor(value)), (count, name)
    assert phases == {False, True}


def test_the_state_has_nothing_of_unused_memory() -> None:
    keeper = Keeper()
    with pytest.raises(Interrupted):
        lanczos(Diagonal(2), watch=keeper, **WANTED)
    (block,) = keeper.state["basis"]["blocks"]
    assert block[:3].any(dim=1).all()
    assert not block[3:].any()


def test_how_far_a_search_is_can_be_seen() -> None:
    keeper = Keeper()
    found = lanczos(Diagonal(), watch=keeper, **WANTED)
    assert keeper.search.num_matvecs == found.num_matvecs
    assert keeper.search.max_matvecs == 100 + 50 * 5
    counts, excess = zip(*keeper.search.excess, strict=True)
    assert list(counts) == sorted(set(counts))
    assert counts[-1] == found.num_matvecs
    assert max(excess) > 100
    assert excess[-1] <= 1


@pytest.mark.parametrize("other", [{"largest": 3}, {"tol": 1e-2}, {"max_missed": None}])
def test_the_state_of_another_search_is_refused(other: dict[str, Any]) -> None:
    keeper = Keeper()
    with pytest.raises(Interrupted):
        lanczos(Diagonal(2), watch=keeper, **WANTED)
    (name,) = other
    with pytest.raises(ValueError, match=f"`resume` is the state of another search: of {name} "):
        lanczos(Diagonal(), resume=keeper.state, **{**WANTED, **other})


def test_the_state_of_a_warm_search_knows_that_it_was_warm() -> None:
    start = torch.ones(SIZE, dtype=torch.float64)
    expected = lanczos(whole := Diagonal(), start=start)
    keeper = Keeper()
    lanczos(Diagonal(6), start=start, watch=keeper)
    assert torch.equal(lanczos(again := Diagonal(), resume=keeper.state).values, expected.values)
    assert again.num_matvecs == whole.num_matvecs - 6
