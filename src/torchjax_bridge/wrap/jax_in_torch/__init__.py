"""JAX inside torch: a JAX function or a Flax module, called on tensors under every transform of torch.

Owns the programs: a JAX function at fixed shapes, its derivatives and its vmap, each compiled once
(`_program`). Owns how they run on tensors (`_run`), and how autograd, ``torch.func`` and ``torch.compile``
see them. Refuses leaves that are neither values nor hashable, and dtypes that torch does not have. Gives
`as_torch_function` and `as_torch_module` to users; no other package uses it. Only `_module` and the files that
begin with ``_flax`` need flax.
"""

from typing import TYPE_CHECKING

from torchjax_bridge._lazy import lazy_attributes

if TYPE_CHECKING:
    from ._function import as_torch_function as as_torch_function
    from ._module import as_torch_module as as_torch_module

__all__ = ["as_torch_function", "as_torch_module"]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_attributes(
        __name__, {"as_torch_function": "_function", "as_torch_module": "_module"}
    )
