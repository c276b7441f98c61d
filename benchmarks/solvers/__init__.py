"""The solvers beside those of other projects: rounding, low rank, structure, zeros, and what they cost.

    python -m benchmarks.solvers --table rounding --model minilm --seed 0
    python -m benchmarks.solvers --print

Every row goes to ``benchmarks/results/solvers.jsonl`` as soon as it is known; rows that are there are
not measured again. A seed decides which samples calibrate. Every method gets the same layers, the same
calibration rows, the same groups and the same freedom of its grid, and every method's bias takes up the mean of
its error on the calibration rows; errors are on rows that no method has seen.
"""
