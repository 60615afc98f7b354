"""RECORDINGS: what a torch module does with example inputs, call by call, at the level of torch's public functions.

Owns the recorder and what it gives: a tree of frames, one for each call of a module. Refuses nothing: what
cannot be recorded is a `Fault` of the recording. Gives `weights` and `port` the same `Recording`. Needs torch
alone.
"""

from ._copies import copy_module
from ._effects import changed_buffer
from ._fast_path import without_fast_path
from ._faults import Decision, Fault
from ._frames import Constant, Frame, Node, Parameter, Value, fields_of, map_tensors, replaced, tensors_of
from ._functions import RANDOM
from ._generalize import generalize
from ._homes import homes
from ._leaves import has_hooks, is_leaf, is_normed, layer_class
from ._numbers import (
    Argument,
    Attribute,
    Dim,
    Expression,
    Number,
    Operation,
    Output,
    Real,
    SizeOf,
    is_size,
)
from ._random_states import restored_random_states
from ._recorder import Recording, record
from ._source import SourceLine

__all__ = [
    "RANDOM",
    "Argument",
    "Attribute",
    "Constant",
    "Decision",
    "Dim",
    "Expression",
    "Fault",
    "Frame",
    "Node",
    "Number",
    "Operation",
    "Output",
    "Parameter",
    "Real",
    "Recording",
    "SizeOf",
    "SourceLine",
    "Value",
    "changed_buffer",
    "copy_module",
    "fields_of",
    "generalize",
    "has_hooks",
    "homes",
    "is_leaf",
    "is_normed",
    "is_size",
    "layer_class",
    "map_tensors",
    "record",
    "replaced",
    "restored_random_states",
    "tensors_of",
    "without_fast_path",
]
