from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import _memory, exchange
from benchmarks._case import WrongResultError
from benchmarks._record import Suite, load
from benchmarks._setting import Setting
from benchmarks.exchange import _headline, _routes
from benchmarks.exchange._host_wait import no_host_wait
from benchmarks.exchange._routes import COLD, OURS, RAW, STOCK, WARM, both_directions, check_result
from torchjax_bridge import to_jax, to_torch

QUICK = Setting("cpu", quick=True)


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    """The suite as ``--quick --peers`` writes it."""
    folder = tmp_path_factory.mktemp("results")
    assert command.main(["exchange", "--quick", "--peers", "--output", str(folder)]) == 0
    return load(folder / "cpu.json")[0]


@pytest.mark.slow
def test_every_question_is_asked_in_both_directions(suite: Suite):
    keys = {case.key for case in suite.cases}
    for direction in ("to_jax", "to_torch"):
        assert {f"{direction}/{part}" for part in ("headline", "tree", "state_dict", "flat")} <= keys
        assert {f"{direction}/{verb}/4" for verb in ("share", "copy")} <= keys
        assert {f"{direction}/{verb}/{4**10}" for verb in ("share", "copy")} <= keys
    assert "to_jax/dispatch" in keys
    assert len(keys) == len(suite.cases)


@pytest.mark.slow
def test_every_case_holds_a_timed_row_of_ours_and_its_baseline(suite: Suite):
    for case in suite.cases:
        assert case.row(case.baseline).ratio.median == 1.0
        ours = [row for row in case.rows if row.ours]
        assert ours
        assert all(row.microseconds.best > 0 and row.rounds >= 3 for row in ours)


def test_ours_shares_where_sharing_is_asked_and_copies_where_a_copy_is(suite: Suite):
    for case in suite.cases:
        if "/share/" in case.key or case.key.endswith(("headline", "tree", "state_dict", "flat")):
            assert all(row.shares for row in case.rows if row.ours)
        if "/copy/" in case.key:
            assert not any(row.shares for row in case.rows)


def test_every_promise_of_the_exchange_is_measured(suite: Suite):
    texts = " | ".join(promise.text for promise in suite.promises)
    for words in (
        "to_jax of one tensor / raw",
        "to_jax of an expanded tensor / of its .contiguous()",
        "/ to_torch of one tensor",
        "single calls",
        "state_dict",
        "/ of 4 KB",
    ):
        assert words in texts
    assert {promise.sense for promise in suite.promises} == {"at most", "at least", "reported"}


def test_the_path_that_was_taken_is_among_the_facts(suite: Suite):
    assert any("path" in fact for fact in suite.facts)


def test_the_full_run_goes_from_4_bytes_to_256_megabytes():
    from benchmarks.exchange import _flat, _sweep

    assert (_sweep._FULL[0], _sweep._FULL[-1]) == (4, 256 * 2**20)
    assert _flat._FULL[-1] == 2**30


def test_a_bridge_that_copies_in_silence_stops_the_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_routes, "to_jax", lambda tensor: to_jax(tensor, copy=True))
    (towards_jax, _), _ = both_directions(QUICK)
    with pytest.raises(WrongResultError, match="copied, and must share"):
        _headline.headline(towards_jax, QUICK)


def test_a_bridge_that_shares_in_spite_of_copy_stops_the_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_routes, "to_torch", lambda array, copy=None: to_torch(array))
    (_, towards_torch), _ = both_directions(QUICK)
    ours = next(one for one in towards_torch.copying(jnp.ones(4)) if one.ours)
    with pytest.raises(WrongResultError, match="shares memory, which a copy must not"):
        ours.check(ours.call(ours.operand))


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (np.ones(3, np.float32), "the result is a ndarray"),
        (jnp.ones(4), r"float32\(4,\)"),
        (jnp.ones(3, jnp.float16), "float16"),
        (jnp.ones(3) * 2, "the values differ"),
    ],
)
def test_a_result_of_another_kind_shape_dtype_or_value_is_wrong(result: object, said: str):
    with pytest.raises(WrongResultError, match=said):
        check_result(torch.ones(3), result, must_share=None)


def test_a_copy_of_equal_bits_is_right_and_told_from_a_view():
    tensor = torch.full((3,), float("nan"))
    assert check_result(tensor, to_jax(tensor, copy=True), must_share=None) is False
    assert check_result(tensor, to_jax(tensor), must_share=None) is True


def test_the_memcpy_that_is_the_limit_does_copy():
    source = torch.rand(1000)
    warm = _memory.warm_copy(source)
    first = warm(None)
    assert torch.equal(first, source)
    assert first.data_ptr() != source.data_ptr()
    source.add_(1)
    assert torch.equal(warm(None), source)
    cold = _memory.cold_copy(source)
    assert torch.equal(cold(None), source)
    assert cold(None) is not cold(None)


def test_fresh_pages_are_timed_only_where_an_allocator_would_ask_for_them():
    (towards_jax, _), _ = both_directions(QUICK)
    names = [one.name for one in towards_jax.copying(torch.rand(16))]
    assert WARM in names
    assert COLD not in names
    assert COLD in [one.name for one in towards_jax.copying(torch.rand(_memory.COLD_FROM // 4))]


def test_operands_hold_random_values_on_one_device_of_the_framework_they_leave():
    (towards_jax, towards_torch), _ = both_directions(QUICK)
    tensor, array = towards_jax.make_operand((4, 5)), towards_torch.make_operand((4, 5))
    assert isinstance(tensor, torch.Tensor)
    assert isinstance(array, jax.Array)
    assert tensor.std() > 0
    assert array.std() > 0


def test_without_the_private_functions_the_rest_is_measured_and_the_reason_told(
    monkeypatch: pytest.MonkeyPatch,
):
    from jaxlib import _jax

    with monkeypatch.context() as patch:  # the stock route needs it too
        patch.delattr(_jax, "dlpack_managed_tensor_to_buffer")
        (towards_jax, _), missing = both_directions(QUICK)
    assert RAW not in towards_jax.routes
    assert next(iter(towards_jax.routes)) == STOCK
    assert missing[0].startswith("The raw capsule functions cannot be timed here: AttributeError")
    found = _headline.headline(towards_jax, QUICK)
    assert [promise.text for promise in found.promises] == [f"{STOCK} / to_jax of one tensor"]


@pytest.mark.gpu
@pytest.mark.parametrize("index", [0, 1])
def test_on_a_gpu_no_crossing_waits_for_the_device(index: int):
    setting = Setting("cuda", quick=True)
    found = no_host_wait(both_directions(setting)[0][index], setting)
    assert len(found.promises) == 2, found.facts
    assert [promise.measured.median for promise in found.promises] == [0.0, 0.0]


@pytest.mark.gpu
def test_on_a_gpu_the_same_suite_runs(tmp_path: Path):
    assert command.main(["exchange", "--device", "cuda", "--quick", "--output", str(tmp_path)]) == 0
    suite = load(tmp_path / "cuda.json")[0]
    assert suite.provenance["hardware"]["gpu"]
    assert all(
        row.shares for case in suite.cases if "/share/" in case.key for row in case.rows if row.name == OURS
    )


def test_the_suite_is_a_function_of_the_setting_alone():
    assert exchange.run.__annotations__["setting"] is Setting
