"""Flax layers that compute what torch's do, where Flax's own cannot.

`nnx` and `linen` hold subclasses of Flax's layers under the same names. They can replace Flax's anywhere, and the
same rules fill them:

- ``BatchNorm`` feeds its running variance with the unbiased variance of the batch, so training goes on as in
  torch and not only evaluation agrees;
- ``GRUCell`` (nnx) has the bias on the state that ``nnx.GRUCell`` lacks;
- ``LayerNorm`` and ``RMSNorm`` (nnx) have a scale of several axes;
- ``PReLU`` has one slope a channel.

Owns these layers; has no rules and moves no weights. Refuses a layer that Flax's own settings can express:
it does not belong here. Gives the layers to users, under ``torchjax_bridge.weights.layers``.
"""

from . import _linen as linen
from . import _nnx as nnx

__all__ = ["linen", "nnx"]
