import os
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import pytest
import torch
from jaxlib import _jax

from torchjax_bridge.errors import ExchangeError
from torchjax_bridge.exchange import _dlpack, choice, to_jax, to_torch

PRIVATE_NAMES = [
    "dlpack_managed_tensor_to_buffer",
    "buffer_to_dlpack_managed_tensor",
]


def test_the_path_in_use_is_the_one_that_was_chosen(dlpack_path):
    assert choice().path == dlpack_path
    assert dlpack_path in choice().reason or "trial" in choice().reason


def test_both_directions_share_memory_and_keep_values():
    tensor = torch.arange(64, dtype=torch.float32)
    array = _dlpack.import_cpu(tensor)
    assert isinstance(array, jax.Array)
    assert array.unsafe_buffer_pointer() == tensor.data_ptr()
    assert array.tolist() == tensor.tolist()
    back = _dlpack.export(array)
    assert back.data_ptr() == tensor.data_ptr()
    assert torch.equal(back, tensor)


@pytest.mark.parametrize("name", PRIVATE_NAMES)
def test_a_jaxlib_without_the_private_functions_takes_the_public_path(monkeypatch, name):
    monkeypatch.delattr(f"jaxlib._jax.{name}")
    chosen = _dlpack.set_path("")
    assert chosen.path == "public"
    assert name in chosen.reason
    monkeypatch.undo()  # the public functions call the same ones underneath
    assert to_torch(to_jax(torch.ones(16))).tolist() == [1.0] * 16


@pytest.mark.parametrize("name", ["_to_dlpack", "_from_dlpack"])
def test_a_torch_without_the_private_functions_takes_the_public_path(monkeypatch, name):
    monkeypatch.delattr(torch._C, name)
    chosen = _dlpack.set_path("")
    assert chosen.path == "public"
    assert name in chosen.reason


def test_a_private_import_that_copies_is_not_taken(monkeypatch):
    monkeypatch.setattr(
        "jaxlib._jax.dlpack_managed_tensor_to_buffer",
        lambda capsule, *_: jnp.array(torch.utils.dlpack.from_dlpack(capsule).numpy(), copy=True),
    )
    chosen = _dlpack.set_path("")
    assert chosen.path == "public"
    assert "does not share memory" in chosen.reason


def test_a_private_export_with_wrong_values_is_not_taken(monkeypatch):
    from jaxlib import _jax

    real = _jax.buffer_to_dlpack_managed_tensor
    monkeypatch.setattr(_jax, "buffer_to_dlpack_managed_tensor", lambda a, **kw: real(a + 1, **kw))
    chosen = _dlpack.set_path("")
    assert chosen.path == "public"
    assert "other values" in chosen.reason


def test_a_private_export_of_a_dtype_that_torch_lacks_is_not_taken(monkeypatch):
    real = torch._C._from_dlpack

    def eager(capsule):
        try:
            return real(capsule)
        except BufferError:  # as if torch took float8_e3m4 for bytes
            return torch.zeros(4, dtype=torch.uint8)

    monkeypatch.setattr(torch._C, "_from_dlpack", eager)
    chosen = _dlpack.set_path("")
    assert chosen.path == "public"
    assert "which torch lacks, is exported" in chosen.reason


def test_a_private_import_of_another_signature_is_not_taken(monkeypatch):
    monkeypatch.setattr("jaxlib._jax.dlpack_managed_tensor_to_buffer", lambda capsule: None)
    assert _dlpack.set_path("").path == "public"


def test_a_private_import_that_is_not_told_the_kind_of_memory_is_taken(monkeypatch):
    now = _jax.dlpack_managed_tensor_to_buffer

    def before_jaxlib_0_10_2(capsule, device, stream, copy=None):
        return now(capsule, device, stream, copy)

    monkeypatch.setattr("jaxlib._jax.dlpack_managed_tensor_to_buffer", before_jaxlib_0_10_2)
    assert _dlpack.set_path("").path == "fast"
    tensor = torch.arange(16.0)
    assert to_jax(tensor).unsafe_buffer_pointer() == tensor.data_ptr()


def test_a_jaxlib_whose_arrays_cannot_be_cloned_exports_them_all_the_same(monkeypatch):
    monkeypatch.delattr(_jax.ArrayImpl, "clone")
    assert _dlpack.set_path("").path == "fast"
    array = jnp.full(1000, 5.0) + 0
    tensor = to_torch(array)
    assert tensor.data_ptr() == array.unsafe_buffer_pointer()
    array.delete()
    assert tensor.tolist() == [5.0] * 1000


def test_arrays_of_an_unknown_class_share_memory_all_the_same(monkeypatch):
    monkeypatch.setattr(_dlpack, "PlainArray", type("PlainArray", (), {}))
    array = jnp.arange(16.0) + 1
    assert to_torch(array).data_ptr() == array.unsafe_buffer_pointer()
    assert to_torch([array])[0].tolist() == array.tolist()


def test_exporting_a_deleted_array_raises():
    array = jnp.arange(3) + 1
    array.delete()
    with pytest.raises((RuntimeError, TypeError)):  # and does not crash, as a clone of it would
        _dlpack.export(array)


def test_asking_for_a_fast_path_that_does_not_work_raises(monkeypatch):
    monkeypatch.delattr("jaxlib._jax.dlpack_managed_tensor_to_buffer")
    with pytest.raises(ExchangeError, match=r"TORCHJAX_BRIDGE_DLPACK=fast, but .*Unset it"):
        _dlpack.set_path("fast")


def test_an_unknown_word_raises_and_lists_the_known_ones():
    with pytest.raises(ExchangeError, match=r"'quick' is neither 'fast' nor 'public'"):
        _dlpack.set_path("quick")


def test_a_failed_choice_leaves_the_path_as_it_was(dlpack_path):
    with pytest.raises(ExchangeError):
        _dlpack.set_path("quick")
    assert choice().path == dlpack_path


def test_the_first_crossings_of_many_threads_choose_once(monkeypatch):
    calls = []
    real = _dlpack._choose

    def counting(wanted):
        calls.append(wanted)
        return real(wanted)

    monkeypatch.setattr(_dlpack, "_choose", counting)
    _dlpack.reset_path()
    barrier = threading.Barrier(8)
    results = []

    def cross():
        barrier.wait()
        results.append(to_jax(torch.full((16,), 3.0)).tolist() == [3.0] * 16)

    threads = [threading.Thread(target=cross) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 8
    assert len(calls) == 1


PROGRAM = """
import torch, jax.numpy as jnp
import torchjax_bridge as tjb
from torchjax_bridge.exchange import choice
tensor = torch.arange(32.0)
array = tjb.to_jax(tensor)
assert array.unsafe_buffer_pointer() == tensor.data_ptr()
assert tjb.to_torch(array).data_ptr() == tensor.data_ptr()
print(choice().path)
"""


def _run(word: str | None) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if name != _dlpack.PATH_VARIABLE}
    if word is not None:
        env[_dlpack.PATH_VARIABLE] = word
    return subprocess.run(
        [sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=300
    )


class TestTheSwitch:
    @pytest.fixture(autouse=True)
    def dlpack_path(self):
        """A process of its own chooses."""

    @pytest.mark.parametrize(("word", "path"), [("public", "public"), ("fast", "fast"), (None, "fast")])
    def test_chooses_the_path_of_a_new_process(self, word, path):
        done = _run(word)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == path

    def test_with_an_unknown_word_raises_at_the_first_crossing(self):
        done = _run("quick")
        assert done.returncode != 0
        assert "TORCHJAX_BRIDGE_DLPACK='quick' is neither 'fast' nor 'public'" in done.stderr


@pytest.mark.parametrize("dlpack_path", ["fast"], indirect=True)
def test_importing_the_library_chooses_nothing_and_starts_no_backend():
    program = (
        "import torchjax_bridge, jax\n"
        "from torchjax_bridge.exchange import _dlpack\n"
        "from jax._src import xla_bridge\n"
        "print(_dlpack._chosen, xla_bridge.backends_are_initialized())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["None", "False"], done.stderr


def _in_jit(cross):
    jax.jit(lambda x: (cross(), x)[1])(1.0)


def _under_fake_tensors(cross):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        cross()


def _with_meta_as_default(cross):
    with torch.device("meta"):
        cross()


def _in_a_torch_transform(cross):
    torch.func.vmap(lambda x: (cross(), x)[1])(torch.ones(2))


def _on_another_default_device(cross):
    with jax.default_device(jax.devices("cpu")[3]):
        cross()


@pytest.mark.parametrize(
    "context",
    [_in_jit, _under_fake_tensors, _with_meta_as_default, _in_a_torch_transform, _on_another_default_device],
)
def test_where_the_first_crossing_happens_does_not_change_the_choice(monkeypatch, context):
    monkeypatch.delenv(_dlpack.PATH_VARIABLE, raising=False)
    _dlpack.reset_path()
    context(_dlpack.choice)
    assert choice().path == "fast", choice().reason
