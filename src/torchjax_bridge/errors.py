"""Every exception that this library raises, with its base classes.

::

    BridgeError
    ├── ExchangeError                          a tensor cannot cross
    │   ├── UnsupportedLeafError  (TypeError)      the other framework has no such object
    │   ├── DtypeError            (TypeError)      no counterpart dtype, or it needs x64
    │   ├── NarrowingError        (OverflowError)  a 64-bit value does not fit in 32 bits
    │   ├── ShareError            (ValueError, BufferError)  copy=False, and the memory cannot be shared
    │   └── DeviceError           (ValueError)     no such device on the other side
    ├── WeightsError                           a weight tree cannot cross
    │   ├── PlanError             (ValueError)     missing, unexpected, mismatched or ambiguous entries
    │   ├── SettingsError         (ValueError)     two models differ in a setting, or cannot be compared
    │   ├── OptimizerStateError   (ValueError)     an optimizer state that has no counterpart
    │   └── CheckpointError       (ValueError)     a file is not a valid checkpoint
    ├── PortError             (ValueError)     a torch module has no exact counterpart in Flax source
    ├── ForkError             (RuntimeError)   JAX is called in a child that was forked after JAX started
    └── WrapError                              a wrapped function cannot do what was asked
        ├── ArgumentError         (TypeError)      an argument that the other framework cannot take
        ├── OutputError           (ValueError)     an output that cannot be returned, or differs from output_shape
        └── TransformError        (RuntimeError)   a transform that this call does not support

A class also inherits from the builtins in parentheses, so ``except OverflowError`` works. A message says what was
asked, why it is impossible, and what to type.

This file imports nothing of the library, so every other file may import it.
"""

from collections.abc import Sequence

__all__ = [
    "ArgumentError",
    "BridgeError",
    "CheckpointError",
    "DeviceError",
    "DtypeError",
    "ExchangeError",
    "ForkError",
    "NarrowingError",
    "OptimizerStateError",
    "OutputError",
    "PlanError",
    "PortError",
    "SettingsError",
    "ShareError",
    "TransformError",
    "UnsupportedLeafError",
    "WeightsError",
    "WrapError",
]


class BridgeError(Exception):
    """The base class of every error that this library raises on purpose."""


class ExchangeError(BridgeError):
    """A tensor cannot cross between torch and JAX.

    Attributes:
        faults: For a tree, the error of each leaf that cannot cross, in the order of the leaves; empty for a single
            tensor.
    """

    faults: Sequence["ExchangeError"] = ()


class UnsupportedLeafError(ExchangeError, TypeError):
    """The other framework has no counterpart of this object."""


class DtypeError(ExchangeError, TypeError):
    """The dtype has no counterpart, or only with ``jax_enable_x64``."""


class NarrowingError(ExchangeError, OverflowError):
    """A 64-bit integer does not fit in the 32 bits that JAX keeps with x64 off."""


class ShareError(ExchangeError, ValueError, BufferError):
    """The memory cannot be shared, and ``copy=False`` forbids a copy."""


class DeviceError(ExchangeError, ValueError):
    """The device is not known to the other framework."""


class WeightsError(BridgeError):
    """A weight tree cannot be converted."""


class PlanError(WeightsError, ValueError):
    """Source and template do not fit; the message is a report of every fault at once."""


class SettingsError(WeightsError, ValueError):
    """Two models differ in a setting that arrays do not show, one is not live, or Flax lacks a setting."""


class OptimizerStateError(WeightsError, ValueError):
    """An optimizer state that has no counterpart in the other framework."""


class CheckpointError(WeightsError, ValueError):
    """A file that is not a valid checkpoint of its format."""


class PortError(BridgeError, ValueError):
    """A torch module cannot be written as Flax source; the message lists every reason at once.

    Attributes:
        faults: What has no counterpart, each with its module, line and reason.
    """

    faults: Sequence[object] = ()


class ForkError(BridgeError, RuntimeError):
    """JAX is called in a process that was forked after JAX started, and would hang."""


class WrapError(BridgeError):
    """A wrapped function or module cannot do what was asked."""


class ArgumentError(WrapError, TypeError):
    """An argument that cannot be passed to the other framework."""


class OutputError(WrapError, ValueError):
    """An output that cannot be passed back, or differs from ``output_shape``."""


class TransformError(WrapError, RuntimeError):
    """A transform that this call does not support."""
