"""The counter of moves between files counts what it says, and a vector's way through a product stays straight."""

from benchmarks.walk import measure


def test_a_measurement_comes_back_from_wherever_it_went_and_a_product_takes_few_moves(tmp_path) -> None:
    walk = measure(str(tmp_path))
    assert walk.out.total() == walk.back.total() == walk.moves / 2
    assert walk.num_matvecs > 0
    assert walk.to_user[0] == "training/callback.py"
    assert walk.to_user[-1] == "training/replica/objective.py"
    # Moves that have to do with copying the module are another matter: they come once an evaluation. Beside the search
    # there are a product for the batch sharpness, its gradient, and the settings of the optimizer.
    assert (1 - walk.share("replica")) * walk.moves <= 130 * (walk.num_matvecs + 3)
