"""A hundred small trainings of which the cause is known: does the diagnosis name it?

    pip install -e '.[bench]'
    python -m benchmarks.known_runs                  # about ten minutes on one core
    python -m benchmarks.known_runs --set second     # other problems, other seeds
    python -m benchmarks.known_runs --only clipped   # one kind

What is wrong with a run, or right, is known from how it is made, and is checked by trainings without a probe: "too
fast" trains at a third of the rate, a fault in the data does no harm where it is left out, a clipped run is lost
without clipping, "room" gets on better at four times the rate, noise sets the rate where a third of it comes as far and
three times as much is stable and comes no farther. For each setting (problem, optimizer, batch size, seed) a sweep in
steps of √3 finds the largest *usable* rate, from the best one on upwards the last that makes three quarters of its
progress, and the smallest *broken* one, which makes none. Counted is the kind that ``probe.diagnosis()`` names at the
end of the same run in a Trainer.

The rules of the diagnosis were made with the first set in view; the second was looked at once, when they were done.
"""
