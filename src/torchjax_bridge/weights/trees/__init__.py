"""Both models, read once: trees of layers with their tensors and leaves, their classes and what ties them.

Owns the torch side (`_torch_tree`: a module or a ``state_dict``, without wrappers) and the Flax side
(`_flax_tree`: nnx or linen, and how to fill it again), with what a live model adds: its modules by path
(`_live_modules`), whether a layer computes what its class says (`_own_forward`), what has no weights
(`_weightless`), and which tensors are one (`_ties`). Refuses what is no model. Pairs nothing. Gives the two trees
to all that follows.
"""

from ._flax_tree import FlaxLeaf as FlaxLeaf
from ._flax_tree import FlaxNode as FlaxNode
from ._flax_tree import FlaxTree as FlaxTree
from ._live_modules import Linen as Linen
from ._live_modules import as_linen as as_linen
from ._live_modules import below as below
from ._live_modules import linen_path as linen_path
from ._live_modules import live_linen as live_linen
from ._live_modules import live_nnx as live_nnx
from ._live_modules import rng_streams as rng_streams
from ._own_forward import call_of_its_own as call_of_its_own
from ._own_forward import lies_by_its_name as lies_by_its_name
from ._own_forward import spelt as spelt
from ._own_forward import taken_for_granted as taken_for_granted
from ._own_forward import taken_for_granted_in_flax as taken_for_granted_in_flax
from ._read_flax import read_flax as read_flax
from ._read_torch import read_torch as read_torch
from ._shardings import placed as placed
from ._shardings import sharding_of as sharding_of
from ._ties import ties_of as ties_of
from ._torch_tree import TorchLeaf as TorchLeaf
from ._torch_tree import TorchNode as TorchNode
from ._torch_tree import TorchTree as TorchTree
from ._weightless import between_layers as between_layers
from ._weightless import dropouts_beside as dropouts_beside
from ._weightless import functions as functions
