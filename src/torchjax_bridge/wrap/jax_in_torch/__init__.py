"""TODO wrap.jax_in_torch."""

from ._function import as_torch_function as as_torch_function
from ._module import as_torch_module as as_torch_module
