"""`port`: records a module, translates it, and proves what came out."""

import contextlib
import linecache
import sys
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import torch
from torch import nn

from torchjax_bridge.errors import PortError, WeightsError
from torchjax_bridge.recording import Fault, SourceLine, generalize, record

from ._built import filled, linen_model, nnx_model
from ._classes import definitions
from ._conditions import conditions, decided_otherwise, fixed_arguments
from ._constructors import Given
from ._draws import draw_notes, same_draws
from ._generators import Generators
from ._given import (
    chosen,
    given_example,
    given_functions,
    given_lines,
    given_module,
    one_layer,
    require_called,
)
from ._header import header
from ._input_axes import axes_text, differing_axes
from ._inputs import Example, arguments_of, first_recorded
from ._other_sizes import try_sizes
from ._outputs import uncompiled_outputs
from ._parts import Modules, Part, find_parts, shared_weights
from ._placed import RefusedError
from ._proof import holds_for, prove
from ._refusal import refuse
from ._result import Port
from ._rules import rules_of
from ._source import source_of
from ._torch_part import fill_unsaved
from ._training import record_training, stuck, training_notes, translate_both

__all__ = ["port"]

_To = Literal["nnx", "linen"]
_Training = Literal["optional", "required", "none"]


def port(
    module: nn.Module,
    *inputs: Any,
    kwargs: Mapping[str, Any] | None = None,
    ops: Mapping[Callable[..., Any], str | Callable[..., str]] | None = None,
    modules: Modules | None = None,
    keep: Collection[str] = (),
    assume: Iterable[str] = (),
    exact_statistics: bool = False,
    training: _Training = "optional",
    to: _To = "nnx",
    verify: bool = True,
) -> Port:
    """Write a torch module as Flax source, class for class, with its weights, and prove that it computes the same.

    The module runs on the inputs in evaluation and in training mode, each again with another batch size, and what
    it calls is translated. Where training does something else, the port asks ``self.deterministic``, which
    ``model.train()`` and ``model.eval()`` of nnx set. Images have
    their channels last in the port, ``(N, H, W, C)``. A transposition that torch makes becomes a layout and costs
    nothing. Neither the batch size nor a size that the code reads is baked in. The port is compared with torch on
    the inputs, and once more with perturbed weights and another batch size.

    Args:
        module: A live module; it is not changed.
        inputs: Example inputs, as torch takes them: trees of tensors, and whatever else the module takes. The
            first axis of the first tensor is the batch. Where a line leaves out a mask that hides nothing, the
            port is made by one that hides something, and proved with both. A module and inputs on the ``meta``
            device are ported without memory for values, and without a proof.
        kwargs: Keyword arguments for the module.
        ops: Your own translations, by torch function: a JAX expression with ``{0}``, ``{1}`` and ``{name}`` for
            the arguments, such as ``{torch.fft.fft: "jnp.fft.fft({0})"}``, or a function from the expressions of
            the arguments to that expression. Arguments and result have torch's order
            of axes.
        modules: Your own translations, by torch class: a subclass of ``nnx.Module`` (of ``linen.Module`` in a port
            to linen), or its path ``"package.module:Class"``, or a `Replacement`, or a function from the torch
            module to a `Replacement`, such as ``{MyLayer: lambda layer: Replacement(FlaxLayer, {"size":
            layer.size})}``. The file imports the class, makes it and calls it in the place of the torch module.
        keep: Paths of modules that stay in torch, or patterns (``"blocks.*.mixer"``). The emitted class takes each
            as an argument; ``model`` has a `TorchPart` in its place, through which gradients flow.
        assume: Lines of torch code, as ``"file.py:12"``, that decide by the values of a tensor. The port does what
            they decided for the example, and its header says so.
        exact_statistics: Whether BatchNorm keeps torch's unbiased running variance, by a small class in the file;
            ``nnx.BatchNorm`` keeps the biased one.
        training: What becomes of a module that has a translation in evaluation and none in training. With
            ``"optional"`` its port evaluates only: the file and ``notes`` say why, and a call in training mode
            raises. With ``"required"`` it is refused. ``"none"`` does not look at training, so every port
            evaluates only.
        to: The library that the source is written for. Classes of ``"linen"`` make their layers in ``setup``, and a
            call of one that does something else in training takes ``train``.
        verify: Whether to prove the port: its outputs, and the gradients of a random projection of them.

    Returns:
        A `Port`: ``source``, ``model`` with the weights, ``rules``, ``notes``, ``proof``.

    Raises:
        PortError: Something has no exact counterpart. The message lists everything at once, each with the module,
            the line and a way out. Or the port differs from torch.
        ArgumentError: The module fails on these inputs, or cannot be copied.

    Memory:
        Holds every intermediate tensor of one forward while it records. The port's weights are copies. The proof
        holds three more copies of them, and their gradients in torch and in JAX.

    >>> import jax, torch
    >>> ported = port(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()), torch.ones(1, 3, 8, 8))
    >>> ported.model(jax.numpy.ones((2, 8, 8, 3))).shape
    (2, 6, 6, 4)
    """
    chosen("to", to, _To)
    chosen("training", training, _Training)
    module, functions, assumed = given_module(module), given_functions(ops), given_lines(assume)
    parts = find_parts(module, modules, keep, to)
    request = _Request(module, parts, functions, assumed, exact_statistics, training, to, verify)
    # Whatever the caller is in.
    with torch.inference_mode(False), torch.enable_grad(), jax.disable_jit(False):
        return _ported(request, given_example(inputs, kwargs))


@dataclass(frozen=True)
class _Request:
    """What is to be ported, and how."""

    module: nn.Module
    parts: Mapping[str, Part]
    functions: Mapping[str, Any]
    assumed: frozenset[str]
    exact_statistics: bool
    training: _Training
    to: _To
    verify: bool


def _ported(request: _Request, own: Example, also: Example | None = None) -> Port:
    """The port by an example, proved with another one, too."""
    module, parts, assumed, to = request.module, request.parts, request.assumed, request.to
    name = type(module).__name__
    example, other = _examples(own)
    generators = Generators(module)
    with generators.restored():
        # A module that takes one example at a time is recorded with one.
        found = first_recorded(module, [example], whole=parts) if example is not own else None
        example, recording = found or (own, record(module, own.args, own.kwargs, whole=parts))
    recording.faults += shared_weights(module, parts)
    recording.faults += [*generators.drawn(recording), *stuck(recording, training=False)]
    notes = fixed_arguments(recording)
    if other is not None:
        # Twice as large a batch where torch takes no other, as for pairs; or the first axis is no batch, but a
        # length that is the size of other axes, too.
        twice = example.with_batch(2 * (example.batch or 1))
        candidates = other, twice, example.stretched(example.axes_of(example.batch))
        with generators.restored():
            repeated = first_recorded(module, candidates, whole=parts)
        other = None if repeated is None else repeated[0]
        if repeated is None:
            notes.append(f"a batch of {example.batch}: the torch module itself fails with another one")
        else:
            recording.faults.extend(generalize(recording, repeated[1]))
    with generators.restored():
        sizes = try_sizes(module, recording, example, other, whole=parts)
    notes += sizes.notes
    trained, lacking = None, [Fault("training was not asked for", "", SourceLine())]
    if request.training != "none":
        trained, lacking = record_training(module, example, other, sizes.taken, recording, parts)
    require_called(request.functions, (recording, trained))
    model, lacking = translate_both(
        recording,
        trained,
        lacking,
        parts=parts,
        functions=request.functions,
        exact_statistics=request.exact_statistics,
        to=to,
    )
    is_meta = any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
    otherwise = {}
    if request.verify and not is_meta:
        otherwise = decided_otherwise(module, recording, example, whole=parts)
    held, refused = conditions(recording, assumed, otherwise)
    notes += held
    if refused:  # otherwise what follows from values that Python was told stands on its own
        model.faults = [fault for fault in model.faults if not fault.follows]
    refused += lacking if request.training == "required" else []
    refuse([*model.faults, *refused], module, to)
    notes += [*model.held, *draw_notes(recording), *training_notes(model, lacking)]
    notes += uncompiled_outputs(recording.top.result)
    notes += [f"the values of {name}, which no state_dict holds" for name in model.constants]
    try:
        classes = definitions(model)
    except RefusedError as err:
        model.fault(Fault(str(err), "", SourceLine()))
    refuse(model.faults, module, to)
    if not classes:
        raise one_layer(module)
    given = {name: one.path for name, (one, *_) in classes[-1].params.items() if isinstance(one, Given)}
    chosen = {f"{one.name}.{attribute}": what for one in classes for attribute, what in one.chosen.items()}
    with _mistakes(name):
        source = source_of(classes, header(module, model, notes, given, chosen), parts.values())
        rules = rules_of(model)
        kind = _load(source, classes[-1].name)
        if to == "linen":
            template = linen_model(
                kind,
                arguments_of(model.recording, model.input_orders, example),
                has_mode=classes[-1].has_mode,
            )
        else:
            template = nnx_model(kind, {name: module.get_submodule(path) for name, path in given.items()})
    if is_meta:
        return Port(source, template, rules, tuple(notes), None, classes[-1].name)
    if given:
        fill_unsaved(template)
    with _mistakes(name), same_draws(kind):
        twin = filled(module, template, rules)
        proof = prove(module, model, twin, rules, example, other) if request.verify else None
        if also is not None:
            prove(module, model, twin, rules, also, None)
        # Several lines may be decided otherwise by the same inputs.
        others = list({id(one): one for inputs in otherwise.values() for one in inputs}.values())
        holds_for_others = all(holds_for(module, model, twin, one) for one in others)
        unlike = [
            one for one in sizes.unconditional if request.verify and not holds_for(module, model, twin, one)
        ]
    if not holds_for_others:
        # A mask that hides nothing was left out, say: a port by one that hides something may be right for both.
        for one in others if also is None else ():
            with contextlib.suppress(PortError):
                return _ported(request, one, also=own)
        refuse(conditions(recording, assumed)[1], module, to)
    if unlike:
        sizes_held = axes_text(recording, example, differing_axes(example, unlike))
        notes.append(f"{sizes_held}: with larger ones the port differs from torch")
        source = source_of(classes, header(module, model, notes, given, chosen), parts.values())
    return Port(source, twin, rules, tuple(notes), proof, classes[-1].name)


# What code may raise that is wrong.
_RAISED = (
    ValueError, SyntaxError, NameError, TypeError, AttributeError, LookupError, RuntimeError, WeightsError,
)  # fmt: skip


@contextlib.contextmanager
def _mistakes(name: str) -> Iterator[None]:
    """Say of an error in the emitted code that it is no fault of the user's."""
    try:
        yield
    except PortError:
        raise
    except _RAISED as err:
        raise PortError(
            f"The port of {name} does not run: {err}\nThis is a mistake of the port; please report the model."
        ) from err


def _examples(given: Example) -> tuple[Example, Example | None]:
    """The example to record, and one of another batch size.

    In a batch of one, an axis of one element could be the batch or not, so two are recorded.
    """
    size = given.batch
    if not size:
        return given, None
    example = given if size > 1 else given.with_batch(2)
    return example, example.with_batch(max(size, 2) + 1)


def _load(source: str, name: str) -> Any:
    """The class of the source, which runs as a module of its own; tracebacks show its lines."""
    module = types.ModuleType(f"ported_{name}")
    file = f"<{module.__name__}.py>"
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
    sys.modules[module.__name__] = module
    code = compile(source, file, "exec")
    exec(code, module.__dict__)
    return getattr(module, name)
