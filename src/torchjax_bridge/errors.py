"""Every exception this library raises, and what each is a kind of.

::

    BridgeError
    ├── ExchangeError                          a tensor cannot cross
    │   ├── UnsupportedLeafError  (TypeError)      the other framework has no such thing
    │   ├── DtypeError            (TypeError)      no counterpart dtype, or it needs x64
    │   ├── NarrowingError        (OverflowError)  a 64-bit value does not fit in 32 bits
    │   ├── ShareError            (ValueError, BufferError)  copy=False was asked and cannot be had
    │   └── DeviceError           (ValueError)     no such device on the other side
    ├── WeightsError                           a weight tree cannot cross
    │   ├── PlanError             (ValueError)     missing, unexpected, mismatched or ambiguous entries
    │   ├── SettingsError         (ValueError)     two live layers disagree in a setting
    │   ├── OptimizerStateError   (ValueError)     an optimizer state without counterpart
    │   └── CheckpointError       (ValueError)     a file is not a sound checkpoint
    ├── ForkError             (RuntimeError)   JAX is asked to run in a child that was forked after it started
    └── WrapError                              a wrapped function cannot do what was asked
        ├── ArgumentError         (TypeError)      an argument that cannot be passed across
        ├── OutputError           (ValueError)     an output that is not what was announced
        └── TransformError        (RuntimeError)   a transform that cannot be honoured

A class is also the builtin that a caller who does not know this library expects, so
``except OverflowError`` works. A message says what was asked, why it cannot be, and what to type.

This file imports nothing of ours, so that every other file may import it.
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
    "SettingsError",
    "ShareError",
    "TransformError",
    "UnsupportedLeafError",
    "WeightsError",
    "WrapError",
]


class BridgeError(Exception):
    """The root: catches everything this library raises on purpose."""


class ExchangeError(BridgeError):
    """A tensor cannot cross between torch and JAX.

    Attributes:
        faults: When a tree was asked to cross, the error of every leaf that could not, in the
            order of the leaves; empty for a single tensor.
    """

    faults: Sequence["ExchangeError"] = ()


class UnsupportedLeafError(ExchangeError, TypeError):
    """The other framework has nothing that could hold this object."""


class DtypeError(ExchangeError, TypeError):
    """The dtype has no counterpart, or only with ``jax_enable_x64``."""


class NarrowingError(ExchangeError, OverflowError):
    """A 64-bit integer does not fit in the 32 bits that JAX keeps with x64 off."""


class ShareError(ExchangeError, ValueError, BufferError):
    """``copy=False`` was asked, and the memory cannot be shared."""


class DeviceError(ExchangeError, ValueError):
    """The device is not known to the other framework."""


class WeightsError(BridgeError):
    """A weight tree cannot be converted."""


class PlanError(WeightsError, ValueError):
    """Source and template do not fit; the message is a report of every fault at once."""


class SettingsError(WeightsError, ValueError):
    """Two corresponding layers disagree in a setting that arrays do not carry."""


class OptimizerStateError(WeightsError, ValueError):
    """An optimizer state that has no counterpart in the other framework."""


class CheckpointError(WeightsError, ValueError):
    """A file that is not a sound checkpoint of its format."""


class ForkError(BridgeError, RuntimeError):
    """JAX is asked to run in a process that was forked after it had started, where it would wait for ever."""


class WrapError(BridgeError):
    """A wrapped function or module cannot do what was asked."""


class ArgumentError(WrapError, TypeError):
    """An argument that cannot be passed across."""


class OutputError(WrapError, ValueError):
    """An output that is not what was announced, or cannot be passed back."""


class TransformError(WrapError, RuntimeError):
    """A transform that this call cannot honour."""
