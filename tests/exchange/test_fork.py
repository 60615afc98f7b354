"""A process forked after JAX started: calls that need JAX's threads raise, and sharing memory still works."""

import os
import signal
import subprocess
import sys
import textwrap
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from torchjax_bridge import (
    as_jax_function,
    as_torch_function,
    as_torch_module,
    errors,
    to_flax,
    to_jax,
    to_state_dict,
    to_torch,
)
from torchjax_bridge.exchange import _dlpack, _fork

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork"),
    pytest.mark.filterwarnings("ignore:.*fork:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]


def in_child(call, seconds=20):
    """The outcome of a call in a forked child: ``"ok"``, the error, or ``"hangs"``."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        outcome = "ok"
        try:
            signal.alarm(seconds)
            torch.set_num_threads(1)  # as in a DataLoader's worker; torch's own threads are not there either
            call()
        except errors.ForkError as err:
            outcome = f"ForkError: {err}"
        except BaseException:
            outcome = traceback.format_exc()
        os.write(write, outcome.encode())
        os._exit(0)
    os.close(write)
    _, status = os.waitpid(child, 0)
    with os.fdopen(read) as pipe:
        outcome = pipe.read()
    return "hangs" if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM else outcome


ARRAY = np.arange(12, dtype=np.float32)
double = as_torch_function(lambda x: x * 2)
halve = as_jax_function(lambda x: x / 2)
LINEAR = torch.nn.Linear(2, 3)


def flax_linear():
    return nnx.Linear(2, 3, rngs=nnx.Rngs(0))


@pytest.fixture
def started():
    """JAX has run, and so have the wrapped functions."""
    array = jax.block_until_ready(jnp.asarray(ARRAY) + 0)
    double(torch.ones(2))
    halve(array)
    return array


def test_memory_is_shared_in_a_forked_child(started):
    array, tensor = started, torch.ones(64)
    offset = torch.ones(65)[1:]

    def work():
        assert to_torch(array).tolist() == ARRAY.tolist()
        assert to_torch(array, copy=True).tolist() == ARRAY.tolist()
        assert to_torch({"a": [array]})["a"][0].data_ptr() == array.unsafe_buffer_pointer()
        assert to_jax(tensor).unsafe_buffer_pointer() == tensor.data_ptr()
        for copied in (to_jax(tensor, copy=True), to_jax(offset), to_jax(torch.ones(1).expand(64))):
            assert np.asarray(copied).tolist() == [1.0] * 64
        assert np.asarray(to_jax(torch.arange(3))).tolist() == [0, 1, 2]
        assert to_jax(array) is array

    assert in_child(work) == "ok"


def test_a_first_crossing_in_a_forked_child_takes_the_public_path(started):
    array = started

    def work():
        _dlpack.reset_path()
        assert to_torch(array).tolist() == ARRAY.tolist()
        assert _dlpack.choice().path == "public"
        assert "forked after JAX had started" in _dlpack.choice().reason

    assert in_child(work) == "ok"


linear = flax_linear()
REFUSED = {
    "a new program": lambda array: as_torch_function(lambda x: x * 3)(torch.ones(3)),
    "a new shape": lambda array: double(torch.ones(7)),
    "a program that is compiled": lambda array: double(torch.ones(2)),
    "under no_grad": lambda array: torch.no_grad()(double)(torch.ones(2)),
    "its derivative": lambda array: torch.func.grad(lambda x: double(x).sum())(torch.ones(2)),
    "a torch function": lambda array: halve(array),
    "a torch function in jit": lambda array: jax.jit(halve)(array),
    "a copy of an array": lambda array: to_jax(array, copy=True),
    "a copy in a tree": lambda array: to_jax([torch.ones(2), array], copy=True),
    "a Flax module": lambda array: as_torch_module(linear),
    "to_flax": lambda array: to_flax(LINEAR, linear),
    "to_state_dict": lambda array: to_state_dict(linear, LINEAR),
}


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED)
def test_a_call_that_needs_the_threads_of_jax_raises(started, call):
    outcome = in_child(lambda: call(started))
    assert outcome.startswith("ForkError: cannot ")
    assert "forked after JAX had started" in outcome
    assert "spawn" in outcome


def test_a_backward_pass_of_a_forward_pass_before_the_fork_raises(started):
    x = torch.ones(2, requires_grad=True)
    y = double(x).sum()
    assert in_child(y.backward).startswith("ForkError")
    y.backward()
    assert x.grad.tolist() == [2, 2]


def test_an_array_that_was_being_computed_is_not_waited_for():
    big = jnp.ones((1200, 1200))
    work = jax.jit(lambda x: jax.lax.fori_loop(0, 30, lambda _, y: y @ x / 1200, x))
    jax.block_until_ready(work(big))
    unfinished = work(big)
    outcome = in_child(lambda: to_torch(unfinished))
    assert "an array that was being computed" in outcome
    assert in_child(lambda: to_torch([unfinished])) in (outcome, "ok")  # it may have been finished since
    assert to_torch(unfinished).shape == big.shape


def test_grandchildren_raise_too(started):
    def fork_again():
        outcome = in_child(lambda: double(torch.ones(2)))
        assert outcome.startswith("ForkError"), outcome

    assert in_child(fork_again) == "ok"


def test_the_parent_goes_on(started):
    assert in_child(lambda: None) == "ok"
    assert not _fork.forked()
    assert double(torch.ones(9)).tolist() == [2.0] * 9


def test_without_the_private_query_a_crossing_records_that_jax_started(started, monkeypatch):
    monkeypatch.setattr(_fork, "_jax_has_started", None)
    assert in_child(lambda: double(torch.ones(2))).startswith("ForkError")
    monkeypatch.setattr(_fork, "_jax_used", False)
    assert in_child(lambda: _fork.refuse_in_fork("run")) == "ok"


LOADERS = """
    import os, warnings
    import numpy as np, torch
    from torch.utils.data import DataLoader, Dataset
    import jax, jax.numpy as jnp
    from torchjax_bridge import as_torch_function, to_jax, to_torch
    from torchjax_bridge.errors import ForkError

    warnings.filterwarnings("ignore", ".*fork")
    double = as_torch_function(lambda x: x * 2)


    class Data(Dataset):
        def __init__(self, jax_runs):
            self.jax_runs = jax_runs

        def __len__(self):
            return 4

        def __getitem__(self, i):
            x = torch.full((16,), float(i))
            return double(x) if self.jax_runs else to_torch(to_jax(x))


    def load(how, jax_runs):
        loader = DataLoader(Data(jax_runs), num_workers=2, multiprocessing_context=how, timeout=100)
        return [batch[0, 0].item() for batch in loader]


    if __name__ == "__main__":
        # JAX has not started: the children start their own.
        assert load("fork", True) == [0, 2, 4, 6]
        double(torch.ones(16))
        try:
            load("fork", True)
        except ForkError as err:
            assert "spawn" in str(err)
        else:
            raise AssertionError
        assert load("fork", False) == [0, 1, 2, 3]
        assert load("spawn", True) == [0, 2, 4, 6]
        print("done")
"""


def test_workers_of_a_data_loader_raise_where_they_would_hang_and_run_where_they_can(tmp_path, dlpack_path):
    if dlpack_path == "public":
        pytest.skip("once is enough: the script chooses for itself")
    script = tmp_path / "loaders.py"
    script.write_text(textwrap.dedent(LOADERS))
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300, check=False)
    assert run.stdout == "done\n", run.stderr
