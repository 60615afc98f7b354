"""TODO wrap.torch_in_jax."""

from ._function import as_jax_function as as_jax_function
from ._module import as_jax_module as as_jax_module
