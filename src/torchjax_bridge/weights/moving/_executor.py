"""The threads that copy: one executor for the process.

A thread that lives on keeps the memory that its earlier copies were given and gave back, so the next copy finds its
pages there. With new threads for each conversion, more than half of a repeated conversion was page faults.

The executor is made when it is first needed. It has as many threads as torch, and is replaced when that number
changes. Python ends its threads when the main thread ends, and when nobody refers to a replaced one any more. What
is copied after that, by a thread that goes on or by ``atexit``, is copied by the thread that asks. A forked child,
which lacks the threads, makes its own.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import torch

from torchjax_bridge.exchange import at_fork

__all__ = ["copy_threads"]

_lock = threading.Lock()
_executor: ThreadPoolExecutor | None = None
_size = 0


class _CallingThread(Executor):
    """Runs each task at once; what a task raises, it raises there."""

    def submit(self, task: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(task(*args, **kwargs))
        return future


def copy_threads() -> Executor:
    """The executor, with ``torch.get_num_threads()`` threads. Its tasks must not wait for each other."""
    global _executor, _size
    if not threading.main_thread().is_alive():
        return _CallingThread()
    with _lock:
        size = torch.get_num_threads()
        if _executor is None or size != _size:
            _executor, _size = ThreadPoolExecutor(size, "torchjax-bridge-layout"), size
        return _executor


def _forget_in_child() -> None:
    global _executor, _lock
    _executor = None
    _lock = threading.Lock()  # another thread may have held it during the fork


at_fork(_forget_in_child)
