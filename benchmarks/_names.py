"""The names of the suites. To add one: one module with ``run(setting) -> Findings``, one entry in `SUITES`."""

__all__ = ["GROUPS", "ON_GPU", "SUITES"]

# Name on the command line -> module; imported when run, so that a suite may need flax and another not.
SUITES = {
    "exchange": "benchmarks.exchange",
    "files": "benchmarks.files",
    "gpu-memory": "benchmarks.gpu.memory",
    "relayout": "benchmarks.gpu.relayout",
    "sharding": "benchmarks.sharding",
    "weights": "benchmarks.weights",
    "wrap-jax": "benchmarks.wrap_jax",
    "wrap-torch": "benchmarks.wrap_torch",
}

# Those that ask what only a GPU answers.
ON_GPU = ("gpu-memory", "relayout")

# Names that stand for several suites.
GROUPS = {"wrap": ("wrap-jax", "wrap-torch")}
