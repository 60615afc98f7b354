"""The whole model while it is translated: the bodies of its modules, and every fault.

Decides for each call whether it is a function, a layer, or a module that gets a class of its own.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import nn

from torchjax_bridge.errors import SettingsError
from torchjax_bridge.recording import (
    Fault,
    Frame,
    Node,
    Parameter,
    Recording,
    SourceLine,
    Value,
    homes,
    tensors_of,
)
from torchjax_bridge.weights import Twin, twin_of

from ._argument_trees import parts_of, tree_text
from ._attributes import attribute_text, common_path, is_container
from ._body import Body
from ._calls import call_module, call_part
from ._constructors import Text
from ._functions import given_functions
from ._handed import HandedModules
from ._layers import call_layer, is_batch_norm, is_layer
from ._lowering import Lowering, standard_order
from ._parameters import place_of
from ._parts import Part
from ._placed import Axes, Placed, RefusedError, channels_last, torch_order
from ._reserved import argument_name
from ._statements import needed_calls
from .operations import translate_function

__all__ = ["Model"]


@dataclass
class Model:
    """One translation of one recording.

    Attributes:
        recording: What is translated.
        functions: The user's own translations of torch functions, by public name.
        bodies: The translated frames by the path of their module.
        faults: What has no translation.
        flattened: For each layer over a flattened map, by path, the ``(C, *space)`` of the map.
        parts: What is not looked into, by path: what the caller translates, and what stays in torch.
        exact_statistics: Whether batch norms average the variance that torch averages.
        to: The library that the port is written for, ``"nnx"`` or ``"linen"``.
        other: The recording in the other mode: what a module does there decides whether it gets a class.
        first: The translation of the other mode, whose orders of axes are kept, or None.
        dropouts: Calls of ``F.dropout`` that do nothing in evaluation, and drop in training.
        constants: The tensors whose values the code spells out, since no ``state_dict`` holds them.
        packed: For the data of each packed sequence: the padded array with the batch first, the lengths, and how
            long it is.
        refused: What calls without translation give.
        held: What translations hold for.
        no_images: The places, among all inputs, of those of four axes that come in as in torch.
        outer: For each tensor among the arguments of a call of a module, what it is outside of all modules.
        written_buffers: The saved buffers that training changes, by their full names.
        variables: How many variables there are.
    """

    recording: Recording
    functions: Mapping[str, Callable[..., str]] = field(default_factory=dict)
    bodies: dict[str, Body] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    flattened: dict[str, tuple[int, ...] | None] = field(default_factory=dict)
    read_parameters: dict[str, Parameter] = field(default_factory=dict)
    called_layers: set[str] = field(default_factory=set)
    own_sequentials: set[str] = field(default_factory=set)
    parts: Mapping[str, Part] = field(default_factory=dict)
    exact_statistics: bool = False
    to: Literal["nnx", "linen"] = "nnx"
    other: Recording | None = None
    first: "Model | None" = None
    dropouts: frozenset[Node] = frozenset()
    packed: dict[Value, tuple[str, str, int]] = field(default_factory=dict)
    refused: set[Value] = field(default_factory=set)
    held: dict[str, None] = field(default_factory=dict)
    no_images: frozenset[int] = frozenset()
    outer: dict[Value, Value] = field(default_factory=dict)
    constants: dict[str, None] = field(default_factory=dict)
    written_buffers: frozenset[str] = frozenset()
    variables: int = 0

    def __post_init__(self) -> None:
        tops = [self.recording.top, *([self.other.top] if self.other is not None else [])]
        self.framed = {frame.path for top in tops for frame in top.walk()}
        self.active = {frame.path for top in tops for frame in top.walk() if frame.nodes}
        trained = [one.modules for one in (self.recording, self.other) if one and one.module.training]
        self.frozen = {
            path
            for modules in trained
            for path, one in modules.items()
            if is_batch_norm(one) and not one.training
        }
        self.given_functions = given_functions(self.modules) if self.to == "nnx" else set()
        first: dict[int, Parameter] = {}
        self.tied_parameters: dict[str, str] = {}
        self.parameters: dict[str, Parameter] = {}
        self.homes = homes(self.modules)
        for path, module in self.modules.items():
            for name, tensor in module._parameters.items():
                if tensor is None:
                    continue
                home = Parameter(module, name, f"{self.homes[id(module)][0]}.{name}".lstrip("."), tensor)
                full = f"{path}.{name}".lstrip(".")
                self.parameters[full] = replace(home, path=full)
                if (known := first.setdefault(id(tensor), home)).owner is not module:
                    self.tied_parameters[full] = known.path
        self.shared: dict[tuple[str, str], str] = {}
        self.handed = HandedModules(self)
        self._twins: dict[str, Twin] = {}

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Every module of the recorded copy by path."""
        return self.recording.modules

    def is_layer(self, path: str) -> bool:
        """Whether the module at a path becomes one Flax layer, or a part that is not looked into."""
        return path in self.parts or is_layer(self.modules[path])

    def twin(self, path: str, module: nn.Module) -> Twin:
        """The Flax twin of a layer.

        Raises:
            RefusedError: A setting of the layer has no counterpart.
        """
        if path not in self._twins:
            try:
                if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.momentum is None:
                    module = copy.copy(module)
                    module.momentum = 0.01  # Flax's default, for evaluation alone
                twin = twin_of(module, exact_statistics=self.exact_statistics)
                if self.to == "linen" and "use_running_average" in twin.call:
                    raise RefusedError(
                        f"'{path}' has no running statistics, and linen's BatchNorm writes some in evaluation"
                    )
                self._twins[path] = twin.in_linen() if self.to == "linen" else twin
            except SettingsError as err:
                raise RefusedError(f"'{path}': {err}") from err
        return self._twins[path]

    def call_settings(self, path: str, module: nn.Module) -> dict[str, Any]:
        """The settings with which a layer is called: one that stays in evaluation mode is told so."""
        frozen = {"use_running_average": True} if path in self.frozen else {}
        return {**self.twin(path, module).call, **frozen}

    def base_twin(self, path: str, module: nn.Module) -> Twin:
        """The Flax twin of the torch layer that a module derives from, with the module's settings."""
        base = next(kind for kind in type(module).__mro__ if kind.__module__.startswith("torch.nn.modules."))
        plain = copy.copy(module)
        plain.__class__ = base
        return self.twin(f"{path} as {base.__name__}", plain)

    def tied_owner(self, path: str) -> str | None:
        """The full name of the parameter that a layer shares as its weight, if another layer owns it."""
        return self.tied_parameters.get(f"{path}.weight" if path else "weight")

    @property
    def read_owners(self) -> set[str]:
        """The paths of the modules whose parameters code reads by itself."""
        return {path.rpartition(".")[0] for path in self.read_parameters}

    def share(self, path: str, name: str, owner: str) -> None:
        """Note that an attribute of a module is a parameter of another one: the port has one variable for both."""
        self.shared[path, name] = owner
        self.note_read(self.parameters[owner])

    def shared_by(self, path: str) -> dict[str, Parameter]:
        """The attributes of a module that are parameters of another one."""
        return {name: self.parameters[owner] for (at, name), owner in self.shared.items() if at == path}

    def ties_in(self, path: str) -> dict[str, Text]:
        """The variables that the class of a module gives two modules below it, by the attribute that is set."""
        found = {}
        for (module, name), owner in self.shared.items():
            holder = owner.rpartition(".")[0]
            if self.common_class([module, holder]) == path:
                target = attribute_text(self, path, module).removeprefix("self.")
                held, _ = place_of(self.parameters[owner])
                found[f"{target}.{name}"] = Text(f"{attribute_text(self, path, holder)}.{held}")
        return found

    def common_class(self, paths: Sequence[str]) -> str:
        """The innermost module that gets a class of its own and holds all of these, or is the only one."""
        common = common_path(paths)
        while common and not self.is_class(common):
            common = common.rpartition(".")[0]
        return common

    def is_class(self, path: str) -> bool:
        """Whether a module becomes a class of the file, and not a chain of layers where it is made."""
        is_chain = is_container(self.modules[path], nn.Sequential) and path not in self.own_sequentials
        return path in self.bodies and not (path and is_chain)

    def dropped(self, path: str) -> set[str]:
        """The children of a module whose only weight is another layer's."""
        inside = f"{path}." if path else ""
        shared = {*self.bodies, *(module for module, _ in self.shared)}
        return {
            full.removeprefix(inside).rpartition(".")[0]
            for full in self.tied_parameters
            if full.startswith(inside)
            and full.endswith(".weight")
            and full.removesuffix(".weight") not in shared
        }

    @property
    def tied_layers(self) -> set[str]:
        """The layers whose weight is another layer's."""
        return {path.rpartition(".")[0] for path in self.tied_parameters}

    def note_map(self, path: str, shape: tuple[int, ...] | None) -> None:
        """Note which map, if any, a layer is given flattened, in Flax's order of axes.

        Raises:
            RefusedError: It is given another one elsewhere, and its weight has one order of rows.
        """
        if self.flattened.setdefault(path, shape) != shape:
            raise RefusedError(
                f"'{path}' is given a flattened map in one call, and other features in another; the rows of its "
                "weight have one order"
            )

    def note_read(self, origin: Parameter) -> None:
        """Note that code reads a parameter by itself."""
        self.read_parameters[origin.path] = origin

    def fault(self, fault: Fault) -> None:
        """Note something without translation, once."""
        if fault not in self.faults:
            self.faults.append(fault)

    def run(self) -> Body:
        """Translate everything; returns the body of the model itself."""
        top = self.recording.top
        for fault in self.recording.faults:
            self.fault(fault)
        return self.lower(
            top, {value: Placed("", order) for value, order in self.input_orders.items()}, outermost=True
        )

    @property
    def input_orders(self) -> dict[Value, Axes]:
        """The order of axes in which each input of the model comes in."""
        values = [value for _, tree in self.recording.top.inputs for value in tensors_of(tree)]
        return {
            value: torch_order(len(value.shape)) if place in self.no_images else standard_order(value)
            for place, value in enumerate(values)
        }

    # --- calls ----------------------------------------------------------------------------------------------

    def translate(self, lowering: Lowering, node: Node) -> None:
        """Emit what one call becomes."""
        before = len(lowering.body.statements)
        if node.module is None:
            lowering.bind(node, translate_function(lowering, node))
        elif node.path in self.parts:
            call_part(lowering, node, self.parts[node.path])
        elif node.frame is None:
            self.called_layers.add(node.path)
            lowering.bind(node, call_layer(lowering, node))
        else:
            call_module(lowering, node, node.frame)
        for statement in lowering.body.statements[before:] if node.module is not None else ():
            statement.called = statement.called or node.path

    @property
    def uncalled(self) -> set[str]:
        """The modules that torch calls and the code does not, since nothing reads what they give."""
        bodies = [part for body in self.bodies.values() for part in (body, body.training) if part is not None]
        every = {statement.called for body in bodies for statement in body.statements if statement.called}
        return every.difference(*map(needed_calls, bodies))

    # --- frames ---------------------------------------------------------------------------------------------

    def lower(self, frame: Frame, places: Mapping[Value, Placed], outermost: bool = False) -> Body:
        """The body of a frame whose arguments stand in these orders."""
        lowering = Lowering(self, frame)
        body = lowering.body
        taken: dict[str, str] = {}
        for name, tree in frame.inputs:
            if (other := taken.setdefault(argument_name(name), name)) != name:
                reason = f"arguments {other} and {name} would have one name in the port; rename one of them"
                lowering.refuse(reason, SourceLine())
            for value, text in parts_of(argument_name(name), tree):
                variable = lowering.fresh()
                body.names[variable] = text
                lowering.set(value, places[value].with_text(variable))
                body.orders.append(places[value].order)
        lowering.run(frame.nodes)
        try:
            for value in tensors_of(frame.result):
                if outermost:
                    order = channels_last(len(value.shape))
                    if len(value.shape) != 4 or lowering.at(value).order != order:
                        order = torch_order(len(value.shape))
                    text = lowering.read(value, order)
                    lowering.set(value, Placed(text, order))
                elif not is_container(frame.module, nn.Sequential):
                    lowering.in_torch_map_order(value)
                    self._as_first(lowering, value, len(body.result_places))
                    self._as_given(lowering, value)
                body.result_places.append(lowering.at(value))
            body.result = tree_text(frame.result, lambda value: lowering.at(value).text, lowering.returned)
        except RefusedError as err:
            lowering.refuse(str(err), frame.end, follows=frame.told)
        if outermost:
            self.bodies[frame.path] = body
        return body

    def _as_given(self, lowering: Lowering, value: Value) -> None:
        """Bring ``(N, length, features)`` back into torch's order where the module took it so."""
        orders = [order for order in lowering.body.orders if len(order) == len(value.shape)]
        standard = torch_order(len(value.shape))
        placed = lowering.at(value)
        if (
            len(value.shape) == 3
            and placed.map_axis is None
            and placed.order != standard
            and standard in orders
        ):
            lowering.set(value, Placed(lowering.read(value, standard), standard))

    def _as_first(self, lowering: Lowering, value: Value, place: int) -> None:
        """Bring a result into the order of axes that the other mode gives it."""
        body = self.first and self.first.bodies.get(lowering.frame.path)
        order = body.result_places[place].order if body and place < len(body.result_places) else ()
        if len(order) == len(value.shape) and order != lowering.at(value).order:
            lowering.set(value, Placed(lowering.read(value, order), order))
