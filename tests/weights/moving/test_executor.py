"""The threads that copy live on, are as many as torch's, and are not missed in a forked child."""

import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from flax import nnx
from torch import nn

from torchjax_bridge import to_flax
from torchjax_bridge.weights.moving import copy_threads


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def _layout_threads() -> set[int]:
    return {one.ident or 0 for one in threading.enumerate() if one.name.startswith("torchjax-bridge-layout")}


def test_conversions_use_the_same_threads_again() -> None:
    module = nn.Sequential(nn.Linear(512, 600), nn.Linear(600, 512))
    rngs = nnx.Rngs(0)
    template = nnx.Sequential(nnx.Linear(512, 600, rngs=rngs), nnx.Linear(600, 512, rngs=rngs))
    barrier = threading.Barrier(2)
    list(copy_threads().map(lambda _: barrier.wait(10), range(2)))  # a thread is started when it is needed
    before = _layout_threads()
    assert len(before) >= 2
    for _ in range(3):
        to_flax(module, template)
    assert _layout_threads() <= before  # those of an executor that was replaced before may still end


def test_there_are_as_many_threads_as_torch_has() -> None:
    executor = copy_threads()
    assert copy_threads() is executor

    def most_at_once(count: int) -> int:
        barrier = threading.Barrier(count)
        threads = copy_threads().map(lambda _: (barrier.wait(10), threading.get_ident())[1], range(count))
        return len(set(threads))

    assert most_at_once(2) == 2
    torch.set_num_threads(3)
    assert copy_threads() is not executor
    assert most_at_once(3) == 3


def test_the_threads_of_a_replaced_executor_end() -> None:
    list(copy_threads().map(time.sleep, [0.01, 0.01]))
    gc.collect()
    before = _layout_threads()
    torch.set_num_threads(3)
    copy_threads()
    deadline = time.monotonic() + 10
    while before & _layout_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not before & _layout_threads()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*fork:RuntimeWarning")
def test_a_forked_child_makes_threads_of_its_own() -> None:
    list(copy_threads().map(abs, range(4)))
    child = os.fork()
    if not child:
        try:
            done = copy_threads().submit(os.getpid).result(20) == os.getpid()
        finally:
            os._exit(0 if done else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_process_that_has_copied_ends_and_what_goes_on_copies_itself() -> None:
    code = (
        "import atexit, threading, time\n"
        "from torchjax_bridge.weights.moving import copy_threads\n"
        "copy_threads().submit(print, 'copied').result()\n"
        "def learner():\n"
        "    threading.main_thread().join()\n"
        "    print(*copy_threads().map(abs, [-1, -2]))\n"
        "threading.Thread(target=learner).start()\n"
        "atexit.register(lambda: print(*copy_threads().map(abs, [-3])))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "copied\n1 2\n3\n"
