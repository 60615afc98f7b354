"""A live link: the weights of one model go to its twin again and again, by a plan that was made once.

Owns `link` (`_make_link`) and the `Link` that it gives (`_link`), the live tensors of the module (`_torch_side`),
the Variables or the tree of the Flax model (`_flax_side`), one move of the plan (`_steps`), the views that are kept
(`_views`), what stays as it is (`_frozen`), what a pull writes (`_writes`), the memory that both sides use
(`_apart`), and the order of CUDA work (`_streams`). Refuses what the plan cannot see any more, by name (`_stale`),
and to run while JAX traces (`_tracing`).
Knows no layouts and no pairing. Gives `link` to users; no other package uses it.
"""

from ._link import Link as Link
from ._make_link import link as link
