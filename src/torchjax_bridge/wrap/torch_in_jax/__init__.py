"""torch inside JAX: a torch function or an ``nn.Module``, called on arrays under every transform of JAX.

Owns one primitive (`_primitive`), the torch programs that it runs (`_program`, `_graph`), and how one JAX
array holds one tensor with x64 on or off (`_encoding`). Refuses torch code with output shapes that depend on
values, unless the caller announces them. Gives `as_jax_function` and `as_jax_module` to users; no other package
uses it.
"""

from typing import TYPE_CHECKING

from torchjax_bridge._lazy import lazy_attributes

if TYPE_CHECKING:
    from ._function import as_jax_function as as_jax_function
    from ._module import as_jax_module as as_jax_module

__all__ = ["as_jax_function", "as_jax_module"]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_attributes(
        __name__, {"as_jax_function": "_function", "as_jax_module": "_module"}
    )
