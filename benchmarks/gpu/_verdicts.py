"""What the project promises of a GPU, and what of the run speaks for or against each promise.

A promise is *held* if all of its evidence was seen and is good, *broken* if any is bad, and otherwise *not shown*:
a test that was skipped or not reached says nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .._record import Suite
from ._run import Run
from ._tests import Outcome

__all__ = ["BROKEN", "HELD", "UNKNOWN", "Verdict", "verdicts"]

HELD, BROKEN, UNKNOWN = "held", "broken", "not shown"


@dataclass(frozen=True)
class Verdict:
    """One promise, and what was seen of it."""

    promise: str
    verdict: str
    evidence: str


# Promise -> the tests that show it: part of a test's name, all of which count.
_BY_TESTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "The fast path works on the GPU, and tells if it does not",
        ("test_the_fast_path_passed_its_trial_on_the_device",),
    ),
    (
        "Every dtype and dense layout is shared on the device, without a copy",
        ("exchange/test_cuda.py::test_every_dtype", "exchange/test_cuda.py::test_channels_last"),
    ),
    (
        "Streams keep the order, also side streams: nobody reads what is not yet written",
        (
            "is_waited_for_by_jax",
            "is_waited_for_by_torch",
            "a_copy_behind_a_running_kernel",
            "jax_reads_what_torch_has_yet_to_write",
            "torch_runs_in_order_between",
            "closed_over_weights_are_read_after",
            "the_backward_pass_runs_on_the_stream",
        ),
    ),
    (
        "Memory that is dropped is not reused before the other framework has read it",
        ("is_not_reused_before", "what_was_held_goes_back", "torch_may_write_to_an_argument"),
    ),
    (
        "The host never waits",
        (
            "the_host_returns_while",
            "no_host_synchronisation",
            "the_host_waits_in_neither",
            "the_host_does_not_wait",
            "no_operation_of_ours_synchronises",
            "no_crossing_waits_for_the_device",
        ),
    ),
    ("Pinned memory and moves between devices follow the rules", ("pinned", "device_moves", "unaligned_gapped")),
    ("JAX code works inside torch on the GPU", ("wrap/jax_in_torch/test_gpu.py",)),
    ("torch code works inside JAX on the GPU", ("wrap/torch_in_jax/test_gpu.py",)),
    ("A link pushes and pulls on the GPU, on its own stream", ("weights/linking/test_cuda.py",)),
)  # fmt: skip

# Promise -> the stage whose good end shows it.
_BY_STAGE = (
    ("torch and JAX both see the GPU, and small tensors cross", "doctor"),
    ("A trained network is ported, tuned and brought back, on the GPU on both sides", "flagship"),
    ("compute-sanitizer finds no fault in the tests of order", "sanitizer"),
)


def verdicts(run: Run, tests: Sequence[Outcome], suites: Sequence[Suite]) -> list[Verdict]:
    """Every promise with its verdict: first those of the tests and stages, then the figures."""
    ran = {one.stage: one for one in run.stages}

    def of_stage(promise: str, stage: str) -> Verdict:
        one = ran.get(stage)
        if one is None or one.outcome in ("skipped", "not reached", "cut off"):
            return Verdict(promise, UNKNOWN, one.why if one else f"the stage {stage} was not reached")
        return Verdict(promise, HELD if one.outcome == "done" else BROKEN, one.why)

    first, *others = (of_stage(promise, stage) for promise, stage in _BY_STAGE)
    shown = [first, *(_of_tests(promise, parts, tests) for promise, parts in _BY_TESTS), *others]
    for suite in suites:
        for promise in suite.promises:
            if promise.held is not None:
                bound = f"{promise.sense} {promise.limit:.4g} {promise.unit}".rstrip()
                seen = f"{promise.measured.median:.4g} {promise.unit}".rstrip()
                verdict = HELD if promise.held else BROKEN
                shown.append(Verdict(f"{suite.name}: {promise.text}", verdict, f"{seen}; promised {bound}"))
    return shown


def _of_tests(promise: str, parts: Sequence[str], tests: Sequence[Outcome]) -> Verdict:
    mine = [one for one in tests if any(part in one.test for part in parts)]
    missing = [part for part in parts if not any(part in one.test for one in mine)]
    if not mine:
        return Verdict(promise, UNKNOWN, "its tests were not reached")

    def count(test: Callable[[str], bool]) -> int:
        return sum(test(one.outcome) for one in mine)

    passed = count(lambda outcome: outcome == "passed")
    bad = count(lambda outcome: outcome in ("failed", "hung", "crashed"))
    unseen = len(mine) - passed - bad
    words = [f"{passed} passed"]
    words += [f"{bad} did not"] if bad else []
    words += [f"{unseen} skipped or not reached"] if unseen else []
    words += [f"no test was collected for {', '.join(missing)}"] if missing else []
    verdict = BROKEN if bad else HELD if passed and not missing and passed >= unseen else UNKNOWN
    return Verdict(promise, verdict, ", ".join(words))
