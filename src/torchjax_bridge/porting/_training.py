"""The second mode: a model is recorded and translated in training too, and both translations become one.

Owns why a model has no translation in training: it then evaluates only, and says so. The bodies of training
stand beside those of evaluation (`Body.training`); `_modes` writes both as one.
"""

import ast
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from torchjax_bridge.errors import ArgumentError
from torchjax_bridge.recording import (
    Fault,
    Frame,
    Node,
    Recording,
    SourceLine,
    changed_buffer,
    generalize,
    is_normed,
    record,
)

from ._argument_trees import takes
from ._attributes import is_container
from ._body import Body
from ._generators import Generators
from ._input_layouts import no_images
from ._inputs import Example, first_recorded
from ._layers import is_batch_norm
from ._model import Model
from ._statements import canonical, written
from .operations import table_name

__all__ = ["record_training", "stuck", "training_notes", "translate_both"]


def record_training(
    module: nn.Module,
    example: Example,
    other: Example | None,
    sizes: Sequence[Example],
    evaluation: Recording,
    whole: Collection[str] = (),
) -> tuple[Recording | None, list[Fault]]:
    """Record a module in training mode.

    Args:
        module: The module.
        example: What it is called with.
        other: The same with another batch size, or None.
        sizes: Inputs of other sizes that the module takes in evaluation.
        evaluation: Its recording in evaluation mode.
        whole: Paths of modules that are not looked into.

    Returns:
        The recording, or None where it fails; and why a translation of it would not train.
    """
    generators = Generators(module)
    try:
        with generators.restored():
            training = record(module, example.args, example.kwargs, training=True, whole=whole)
            if other is not None:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(1)
                    repeated = record(module, other.args, other.kwargs, training=True, whole=whole)
                training.faults.extend(generalize(training, repeated))
            for candidate in sizes:
                found = first_recorded(module, [candidate], whole=whole, training=True)
                if found is not None:  # otherwise the sizes are the module's own
                    generalize(training, found[1])
    except ArgumentError as err:
        return None, [Fault(f"{err} (in training mode)", "", SourceLine())]
    faults = [fault for fault in training.faults if fault not in evaluation.faults]
    asked = {(decision.path, decision.source.line) for decision in evaluation.decisions}
    faults += (
        Fault(f"{asking.reason} asks for values, which differ from step to step", asking.path, asking.source)
        for asking in training.decisions
        if not asking.by_size and (asking.path, asking.source.line) not in asked
    )
    faults += generators.drawn(training)
    faults += stuck(training, training=True)
    return training, faults


def stuck(recording: Recording, *, training: bool) -> Iterator[Fault]:
    """Layers that stay in the other mode when the model changes its mode, or that no layer of Flax trains like.

    A batch norm that stays in evaluation mode is told so where it is called.
    """
    for path, module in recording.modules.items():
        averages = isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats
        asks = averages or (is_batch_norm(module) and not training)
        drops = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        attends = isinstance(module, nn.MultiheadAttention) and module.dropout > 0
        if module.training is not training and (asks or drops or attends):
            modes = ("evaluation", "training")
            reason = f"'{path}' is in {modes[not training]} mode while the model is in {modes[training]} mode"
            yield Fault(f"{reason}; in Flax all layers change their mode together", path, SourceLine())
        if training and is_batch_norm(module) and module.training and module.momentum is None:
            reason = f"'{path}' has momentum=None, which averages over all batches; no layer of Flax does"
            yield Fault(f"{reason}, so give it a momentum", path, SourceLine())


def translate_both(
    evaluation: Recording, training: Recording | None, faults: Sequence[Fault], **settings: Any
) -> tuple[Model, list[Fault]]:
    """Translate a model in both modes.

    Args:
        evaluation: The recording in evaluation mode.
        training: The recording in training mode.
        faults: Why a translation of it would not train.
        settings: More arguments of `Model`.

    Returns:
        The model, and why it does not train: nothing if it does.
    """
    settings["written_buffers"] = frozenset(filter(None, map(changed_buffer, faults)))
    settings["no_images"] = no_images(
        evaluation, lambda places: _translated(evaluation, {**settings, "no_images": places})
    )
    if training is not None and not faults:
        dropouts = _alike_dropouts(evaluation.top, training.top)
        model = Model(evaluation, other=training, dropouts=dropouts, **settings)
        model.run()
        trained = Model(training, other=evaluation, first=model, **settings)
        trained.run()
        faults = [fault for fault in trained.faults if fault not in model.faults]
        faults = faults or list(_joined(model, trained))
        if not faults:
            return model, []
    return _translated(evaluation, settings), list(faults)


def _translated(recording: Recording, settings: Mapping[str, Any]) -> Model:
    model = Model(recording, **settings)
    model.run()
    return model


def training_notes(model: Model, faults: Sequence[Fault]) -> list[str]:
    """What a user must know before training. A model with faults of training is made to refuse it."""
    if faults:
        first, more = faults[0], len(set(faults)) - 1
        where = f" ({first.source})" if first.source.file else ""
        reason = f"{first.reason}{where}" + (f", and {more} more" if more else "")
        model.bodies[""].evaluates_only = True
        return [f"evaluation only: {reason}"]
    notes = [
        f"training in which row {module.padding_idx} of '{path}' is trained too: torch leaves it (padding_idx)"
        for path, module in model.modules.items()
        if isinstance(module, nn.Embedding) and module.padding_idx is not None and path in model.called_layers
    ]
    notes += [
        f"training that moves the weight of '{path}' itself: torch computes it in each call (weight_norm, "
        "spectral_norm)"
        for path, module in model.modules.items()
        if path in model.called_layers and path not in model.parts and is_normed(module)
    ]
    frozen = [path for path, parameter in model.parameters.items() if not parameter.tensor.requires_grad]
    if frozen and len(frozen) < len(model.parameters):
        shown = ", ".join(frozen[:3]) + (f" and {len(frozen) - 3} more" if len(frozen) > 3 else "")
        notes.append(f"training that leaves {shown} as it is: torch does not train it")
    return notes


def _joined(model: Model, trained: Model) -> Iterator[Fault]:
    """Put the bodies of training beside those of evaluation; gives what keeps them apart."""
    for path, body in trained.bodies.items():
        own = model.bodies.setdefault(path, body)
        if own is body:
            continue
        if _taken(own) != _taken(body) or own.orders != body.orders:
            yield Fault(f"'{path}' takes other arguments in training", path, SourceLine())
        own.attributes |= body.attributes
        own.callables |= body.callables
        own.dropouts |= body.dropouts
        own.random |= body.random
        own.base_call |= body.base_call
        if canonical(own) == canonical(body):
            if len(_code(body)) < len(_code(own)):  # as where a model keeps what it computed for evaluation
                own.statements, own.names, own.result = body.statements, body.names, body.result
        elif _code(own) != _code(body):
            own.training = body
            if is_container(own.frame.module, nn.Sequential):
                model.own_sequentials.add(path)
    for path, shape in trained.flattened.items():
        if model.flattened.setdefault(path, shape) != shape:
            yield Fault(f"'{path}' reads a flattened map in another order in training", path, SourceLine())
    model.read_parameters |= trained.read_parameters
    model.shared |= trained.shared
    model.handed.aliases |= trained.handed.aliases
    model.called_layers |= trained.called_layers
    model.own_sequentials |= trained.own_sequentials


def _taken(body: Body) -> list[str]:
    return [name for name, tree in body.inputs if takes(tree)]


def _code(body: Body) -> list[str]:
    lines = written(body)
    return [ast.dump(line) for line in lines.lines]


def _alike_dropouts(evaluation: Frame, training: Frame) -> frozenset[Node]:
    """The calls of ``F.dropout`` in evaluation that training makes, too: there they drop, here they do nothing."""
    first, second = _dropouts(evaluation), _dropouts(training)
    return frozenset(
        node
        for path, nodes in first.items()
        if [node.source for node in nodes] == [node.source for node in second.get(path, [])]
        for node in nodes
    )


def _dropouts(frame: Frame) -> dict[str, list[Node]]:
    found: dict[str, list[Node]] = {}
    for node in frame.nodes:
        if node.frame is not None:
            for path, nodes in _dropouts(node.frame).items():
                found.setdefault(path, []).extend(nodes)
        elif table_name(node.function) in _DROPOUTS:
            found.setdefault(frame.path, []).append(node)
    return found


_DROPOUTS = ("dropout", "dropout1d", "dropout2d", "dropout3d")
