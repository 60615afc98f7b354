"""Both models, read once: trees of layers with their tensors and leaves, their classes and ties.

Owns the torch side (`_torch_tree`; read by `_read_torch`, with `_wrappers` removed and `_renaming` applied)
and the Flax side (`_flax_tree`; read and filled again by `_read_nnx` and `_read_linen`). Also owns what a
live model adds: its modules by path (`_live_modules`), whether a layer computes what its class says
(`_overridden`), modules without weights (`_weightless`), ties (`_ties`) and shardings (`_shardings`). Refuses
what is no model. Pairs no layers. Gives the two trees to all that follows.
"""

from ._flax_tree import FlaxLeaf as FlaxLeaf
from ._flax_tree import FlaxNode as FlaxNode
from ._flax_tree import FlaxTree as FlaxTree
from ._live_modules import LinenModel as LinenModel
from ._live_modules import as_linen as as_linen
from ._live_modules import layers_below as layers_below
from ._live_modules import linen_path as linen_path
from ._live_modules import live_linen as live_linen
from ._live_modules import live_nnx as live_nnx
from ._live_modules import rng_streams as rng_streams
from ._overridden import flax_assumptions as flax_assumptions
from ._overridden import overridden_call_words as overridden_call_words
from ._overridden import source_name as source_name
from ._overridden import square_leaf_assumption as square_leaf_assumption
from ._overridden import torch_assumptions as torch_assumptions
from ._read_flax import read_flax as read_flax
from ._read_nnx import is_hooked as is_hooked
from ._read_torch import read_torch as read_torch
from ._shardings import partition_of as partition_of
from ._shardings import place_on_sharding as place_on_sharding
from ._shardings import sharding_of as sharding_of
from ._ties import ties_of as ties_of
from ._torch_tree import TorchLeaf as TorchLeaf
from ._torch_tree import TorchNode as TorchNode
from ._torch_tree import TorchTree as TorchTree
from ._weightless import activation_pairs as activation_pairs
from ._weightless import dropout_pairs as dropout_pairs
from ._weightless import recurrent_dropouts as recurrent_dropouts
from ._wrappers import wrapped_module as wrapped_module
