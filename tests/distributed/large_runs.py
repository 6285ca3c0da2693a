"""The benchmark's decoder, sharded over the ranks at toy size."""

from typing import Any

from benchmarks.large import CRITICAL, Options, outcome_of, trained
from tests.distributed.ranks import WORLD_SIZE, check

WAYS = ("sharpness", "products", CRITICAL)


@check
def sharded_decoder(rank: int) -> dict[str, Any]:
    """What is measured on gathered parameters, and on shards alone."""
    found = {}
    bounds: dict[str, dict[str, Any]] = {"gathered": {}, "on shards": {"max_gather_bytes": 0}}
    for name, hessian in bounds.items():
        ways = WAYS[:2] if hessian else WAYS  # always at the same steps
        options = Options("decoder1b", "toy", WORLD_SIZE, 1, ways, hessian=hessian)
        result = trained(options)
        outcome = outcome_of(options, result, {}, 1.0)
        found[name] = {
            "method": result.callbacks["products"].method,
            "parameters": result.num_parameters,
            "sharpness": result.callbacks["sharpness"].results[0].lambda_max,
            "rows": outcome.tables[0].rows,
            "about": outcome.about,
        }
    return found
