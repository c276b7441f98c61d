"""``python -m benchmarks.solvers --table NAME [--model NAME] [--seed N] [--latency]``, or ``--print``."""

import argparse
from collections.abc import Callable, Mapping

from benchmarks.solvers import cost, ranks, rounding, sparse, structured
from benchmarks.solvers.rows import Recorder, read, table_text
from benchmarks.solvers.subjects import SUBJECTS, TOKENS

LAYER_TABLES: Mapping[str, Callable[..., None]] = {
    "rounding": rounding.run,
    "lowrank": ranks.run,
    "sparsity": sparse.run,
}
MODELS: Mapping[str, tuple[str, ...]] = {
    "rounding": ("minilm", "resnet20", "lm"),
    "lowrank": ("lenet5", "resnet20", "lm", "minilm"),
    "sparsity": ("minilm", "resnet20", "lm"),
    "structured": ("lenet5", "resnet20"),
    "cost": ("minilm", "square"),
}
REFERENCES = {"lowrank": "SVD-LLM", "sparsity": "SparseGPT", "rounding": "GPTQ"}


def main() -> None:
    """Run what is asked for, then print the tables from the records."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", choices=sorted(MODELS), help="one table; default: all of errors")
    parser.add_argument("--model", help="one model; default: all of the table")
    parser.add_argument("--seed", type=int, default=0, help="which samples calibrate")
    parser.add_argument("--latency", action="store_true", help="also time factors (quiet machine)")
    parser.add_argument("--print", action="store_true", help="only print what is recorded")
    options = parser.parse_args()
    # What takes time is asked for by name.
    tables = [options.table] if options.table else [name for name in MODELS if name != "cost"]
    for table in tables:
        models = [options.model] if options.model else MODELS[table]
        for model in models:
            if model not in MODELS[table]:
                parser.error(f"--table {table} has the models {', '.join(MODELS[table])}")
            if not options.print:
                run(table, model, options.seed, latency=options.latency)
            print(table_text(read(), table, model, REFERENCES.get(table, "")))


def run(table: str, model: str, seed: int, *, latency: bool = False) -> None:
    """Every row of a table and model that is not recorded yet."""
    recorder = Recorder(seed, {"tokens": TOKENS})
    if table == "structured":
        structured.run(model, recorder)
    elif table == "cost":
        cost.run(model, recorder)
    else:
        subject = SUBJECTS[model](seed)
        options = {"latency": latency} if table == "lowrank" else {}
        LAYER_TABLES[table](subject, model, recorder, **options)


if __name__ == "__main__":
    main()
