"""Runs a module once and writes down what it does: a frame for each module call, a node for each torch function.

The module runs on a copy, so caches that it fills and statistics that it updates are the copy's; parameters are
shared. A ``TorchFunctionMode`` sees each public function before torch decomposes it; hooks see each module. Python
code runs as it is: what it decided by a size or a value is a `Decision` of the recording.
"""

import copy
import inspect
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode, resolve_name

from torchjax_bridge.errors import ArgumentError

from ._caches import empty_caches, find_caches
from ._composed import COMPOSED
from ._copies import copy_module
from ._effects import buffer_changed, counted_numbers, saved_buffers, written_buffers, written_parameter
from ._escapes import calls_between, made_again, returned_too
from ._fast_path import without_fast_path
from ._faults import Decision, Fault
from ._frames import (
    Constant,
    Frame,
    Node,
    Parameter,
    Value,
    fields_of,
    holds_tensors,
    map_tensors,
    replaced,
    tensors_of,
)
from ._functions import QUESTIONS, RANDOM, READS_NOTHING, short_name
from ._homes import homes
from ._leaves import is_leaf, is_normed, mixes_hooks
from ._numbers import Argument, Attribute, Dim, Operation, Output, Real, SizeOf, _listeners, is_size
from ._numbers import with_origin as number
from ._source import SourceLine, author_line, only_hints, only_raises, runs_in_function, torch_line
from ._views import View, same_memory, views_of

__all__ = ["Recording", "record"]

# What a forward may raise for inputs that it does not take.
_FAILURES = RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError


@dataclass
class Recording:
    """What one run of a module did.

    Attributes:
        module: The copy that ran.
        top: The frame of the module itself.
        output: What it returned.
        faults: What could not be recorded.
        decisions: What Python code asked of sizes and values, in order.
        modules: Every module by path; one that several parents hold, by each of its paths.
    """

    module: nn.Module
    top: Frame
    output: Any
    faults: list[Fault] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    modules: dict[str, nn.Module] = field(default_factory=dict)

    def arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call of the module by the names of the recording."""
        return dict(_named_arguments(self.module.forward, tuple(args), dict(kwargs)))


def record(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    training: bool = False,
    whole: Collection[str] = (),
) -> Recording:
    """Run a copy of a module once, without gradients, and record it.

    Args:
        module: The module; it is not changed.
        args: What it takes: trees of tensors and whatever else. They are not written to.
        kwargs: Keyword arguments.
        training: Whether the copy runs in training mode.
        whole: Paths of modules that are recorded as one call, as layers of torch's own are.

    Returns:
        A `Recording`.

    Raises:
        ArgumentError: The module cannot be copied, or fails on these inputs.

    Memory:
        Holds every intermediate tensor while it runs. Shares the parameters; copies buffers and inputs. Modules
        and inputs on the ``meta`` device are recorded without memory for values.
    """
    inputs = tuple(args), dict(kwargs or {})
    before: list[torch.Tensor] = []
    with torch.inference_mode(False):  # so that copies count what is written to them
        while True:
            empty_caches()
            recording, kept = _run(module, inputs, training, whole)
            if list(map(id, kept)) == list(map(id, before)) or not find_caches(kept):
                return recording
            before = kept  # nothing was seen to make what a cache kept


def _run(
    module: nn.Module, inputs: tuple[Any, ...], training: bool, whole: Collection[str]
) -> tuple[Recording, list[torch.Tensor]]:
    """The recording of one run of a copy, and the tensors of earlier runs that it read."""
    clone = copy_module(module, share=True)
    clone.train().train(training)  # what was kept in evaluation, of whichever weights, is dropped
    args, kwargs = _copied(inputs)
    recorder = _Recorder(clone, whole)
    _listeners.append(recorder.size_decision)
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[]))
            stack.enter_context(without_fast_path())
            stack.enter_context(torch.enable_grad())  # so that ``torch.no_grad()`` of the author's is seen
            stack.enter_context(recorder.hooked())
            stack.enter_context(recorder)
            output = clone(*args, **kwargs)
    except _FAILURES as err:
        raise ArgumentError(_failure(module, inputs, training, recorder.frames, err)) from err
    finally:
        _listeners.remove(recorder.size_decision)
    if recorder.top is None or recorder.frames:
        raise ArgumentError(f"{type(module).__name__} does not return from a call of one of its modules.")
    recorder.faults += [*written_buffers(recorder.buffers), *counted_numbers(recorder.modules)]
    found = recorder.faults, recorder.decisions, recorder.modules
    return Recording(clone, recorder.top, output, *found), recorder.kept


def _failure(
    module: nn.Module, inputs: tuple[Any, ...], training: bool, frames: Sequence[Frame], err: Exception
) -> str:
    """What to say of an error: it is the recording's if the module runs by itself."""
    name, reason = type(module).__name__, f"{type(err).__name__}: {err}"
    try:
        args, kwargs = _copied(inputs)
        with torch.enable_grad(), torch.random.fork_rng(devices=[]), without_fast_path():
            copy_module(module).train(training)(*args, **kwargs)
    except _FAILURES:
        return f"{name} fails on these inputs: {reason}"
    path = frames[-1].path if frames else ""
    where = f"'{path}'" if path else "the model itself"
    fix = f"keep=[{path!r}]" if path else "keep= for a module of its own with these lines"
    words = f"{name} runs on these inputs, and cannot be recorded, in {where}: {reason}."
    return f"{words} A port leaves that in torch by {fix}."


def _copied(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copies of inputs, down to the arrays inside objects, so that ``forward`` may write to its own."""
    detached = map_tensors(inputs, lambda tensor: tensor.detach().clone(), same_kind=True)
    try:
        return copy.deepcopy(detached, {id(tensor): tensor for tensor in tensors_of(detached, torch.Tensor)})
    except (RuntimeError, TypeError) as err:
        raise ArgumentError(f"cannot copy the inputs, which a recording must not write to: {err}") from err


class _Recorder(TorchFunctionMode):
    """The state of one recording."""

    def __init__(self, root: nn.Module, whole: Collection[str]) -> None:
        super().__init__()
        self.frames: list[Frame] = []
        self.top: Frame | None = None
        self.faults: list[Fault] = []
        self.decisions: list[Decision] = []
        self.modules = dict(root.named_modules(remove_duplicate=False))
        self._whole = {id(self.modules[path]) for path in whole}
        inside = {id(part) for path in whole for part in self.modules[path].modules()}
        self.buffers = saved_buffers(self.modules, inside)
        self._paused = 0
        self._runs_whole = False  # a module that is recorded as one call
        self._told_values = False  # to Python, which may have made other tensors of them
        self._paths = homes(self.modules)
        # By the identity of the tensor: what it is now, at which version, and the tensor, which must stay alive.
        self._bound: dict[int, tuple[Value, int, torch.Tensor]] = {}
        self._owned = {id(origin.tensor): origin for origin in _owned(self.modules)}
        self._attributes = set(map(id, _tensor_attributes(self.modules)))
        self._views: dict[int, View] = {}  # by the identity of the tensor
        self._mixed: set[int] = set()  # the modules with hooks among those of a normed weight
        self.kept: list[torch.Tensor] = []  # by something outside of the model, from before the run
        self._calls: list[tuple[Node | None, list[tuple[torch.Tensor, Any]]]] = []

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Hooks on every module while it runs, and numbers that know their attribute."""
        unique = {id(module): module for module in self.modules.values()}
        leaves = {key for key, module in unique.items() if key in self._whole or is_leaf(module)}
        inner = {id(part) for key in self._whole for part in unique[key].modules()}
        self._mixed = {key for key, module in unique.items() if mixes_hooks(module)}
        handles = []
        for key, module in unique.items():
            if not type(module).__module__.startswith("torch.") and key not in leaves | inner:
                _name_numbers(module, self._paths[key][0])

            def before(
                module: nn.Module,
                args: tuple[Any, ...],
                kwargs: dict[str, Any],
                leaf: bool = key in leaves,
            ) -> Any:
                return self._enter(module, args, kwargs, leaf)

            def after(
                module: nn.Module, args: Any, kwargs: Any, output: Any, leaf: bool = key in leaves
            ) -> Any:
                return self._leave(output, leaf)

            # What hooks do is code of the caller, but for those of the model itself, which nothing calls.
            inside = module is self.modules[""] or is_normed(module)
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True, prepend=inside))
            handles.append(module.register_forward_hook(after, with_kwargs=True, prepend=not inside))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # --- what was seen --------------------------------------------------------------------------------------

    def fault(self, reason: str, source: SourceLine | None = None, *, follows: bool = False) -> None:
        """Note what the recording does not hold."""
        path = self.frames[-1].path if self.frames else ""
        self.faults.append(Fault(reason, path, source or author_line(), follows=follows))

    def size_decision(self, left: Any, symbol: str, right: Any, outcome: bool) -> None:
        """Note a comparison of sizes."""
        inside = torch_line()
        if self.frames and not self._paused and not (inside and only_raises(inside)):
            words = f"{left} {symbol} {right}"
            where = self.frames[-1].path, author_line()
            question = left, symbol, right
            self.decisions.append(Decision(words, *where, True, question, outcome, inside=inside))

    def _value_decision(self, name: str, tensors: Sequence[Value], answer: Any) -> None:
        if any(value.varies for value in tensors) and not only_hints():
            self._told_values = self.frames[-1].told = True
            where = self.frames[-1].path, author_line()
            outcome = answer if isinstance(answer, bool) else None
            self.decisions.append(Decision(QUESTIONS[name], *where, outcome=outcome, asked=tuple(tensors)))

    # --- values ---------------------------------------------------------------------------------------------

    def _bind(
        self, tensor: torch.Tensor, frame: Frame, origin: Node | None, name: str = "", varies: bool = True
    ) -> Value:
        value = Value(tuple(map(int, tensor.size())), tensor.dtype, frame, origin, name, varies=varies)
        stops = tensor.is_inference() or not (torch.is_grad_enabled() or runs_in_function())
        value.constant = isinstance(origin, Node) and stops
        self._bound[id(tensor)] = value, _version(tensor), tensor
        return value

    def _read(self, tensor: torch.Tensor, frame: Frame, source: SourceLine | None = None) -> Value:
        """What a tensor is where a call of ``frame`` reads it, at the running line or at ``source``."""
        value, version, _ = self._bound.get(id(tensor), (None, 0, None))
        if value is not None and value.frame is not frame and _version(tensor) == version:
            value = self._returned_too(tensor, value, frame)
        if value is not None and value.frame is frame:
            if _version(tensor) != version and id(tensor) in self._views:
                value = self._made_anew(tensor, frame, source)
            elif _version(tensor) != version:
                self.fault("a tensor is read after it was written to in place through a view of it", source)
            value.uses += 1
            if value.constant and torch.is_grad_enabled() and value.varies and tensor.is_floating_point():
                return self._detached(tensor, value, source)
            return value
        shape = tuple(map(int, tensor.size()))
        if (owned := self._owned.get(id(tensor))) is not None:
            varies = owned.is_saved
            return Value(shape, tensor.dtype, frame, owned, owned.name, uses=1, varies=varies)
        if value is not None:
            self.fault(
                "a tensor of another module's forward is read, and no argument passes it (an attribute does?)"
            )
            return Value(shape, tensor.dtype, frame, Constant(None), uses=1)
        known = id(tensor) in self._attributes
        if not known:
            self.kept.append(tensor)
            known = _of_numpy(tensor) and not self._told_values
        if not known and tensor.dim() + tensor.numel() > 1:
            self.fault(
                "a tensor is read that is no parameter, no buffer and made by no function of torch's (what "
                "torch.jit.script compiles makes such tensors: call the Python function)",
                source,
                follows=frame.told and _of_numpy(tensor),
            )
            return Value(shape, tensor.dtype, frame, Constant(None), uses=1)
        self._bound[id(tensor)] = (
            Value(shape, tensor.dtype, frame),
            _version(tensor),
            tensor,
        )  # keeps it alive
        return Value(shape, tensor.dtype, frame, Constant(tensor), uses=1, varies=False)

    def _is_argument(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is what a module was given, and not what it wrote over that."""
        value, version, _ = self._bound.get(id(tensor), (None, 0, None))
        return value is not None and value.origin is None and version == _version(tensor)

    def _returned_too(self, tensor: torch.Tensor, value: Value, frame: Frame) -> Value:
        """What a module made that has ended, as a hook, an attribute or a cache kept it: it is returned, too."""
        calls = calls_between(frame, value.frame)
        for node in calls:
            value = returned_too(node, value)
        anew = None if calls else made_again(value, frame)
        value = anew or value
        if calls or anew is not None:
            self._bound[id(tensor)] = value, _version(tensor), tensor
        return value

    def _made_anew(self, tensor: torch.Tensor, frame: Frame, source: SourceLine | None) -> Value:
        """A view, of what the whole is now."""
        view = self._views[id(tensor)]
        whole = self._read(view.whole, frame, source)
        function, args, kwargs = view.read(whole)
        node = Node(args, kwargs, source or author_line(), function=function)
        node.result = self._bind(tensor, frame, node, varies=whole.varies)
        frame.nodes.append(node)
        return node.result

    def _detached(self, tensor: torch.Tensor, value: Value, source: SourceLine | None) -> Value:
        """What ``torch.no_grad()`` made, read outside of it: no gradient flows through."""
        source = value.origin.source if isinstance(value.origin, Node) else source
        node = Node((value,), {}, source or author_line(), function="torch.Tensor.detach")
        node.result = self._bind(tensor, value.frame, node, varies=value.varies)
        node.result.constant = False
        node.result.uses = 1
        value.frame.nodes.append(node)
        return node.result

    # --- functions ------------------------------------------------------------------------------------------

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self._runs_whole:
            return func(*args, **kwargs)  # which may ask for gradients
        if self._paused or not self.frames:
            return _without_gradients(func, args, kwargs)
        full = resolve_name(func) or getattr(func, "__qualname__", str(func))
        if full == "torch.Tensor.data.__get__":  # which would hide from the tensor what is written to it
            func, full = torch.Tensor.detach, "torch.Tensor.detach"
        name = short_name(full)
        if name in READS_NOTHING:
            return func(*args, **kwargs)
        if (compose := COMPOSED.get(full)) is not None:
            with self:  # which is off while it asks here
                parts = compose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        frame = self.frames[-1]
        self._refuse_autocast()
        if name in ("shape", "size", "__len__", "numel", "nelement") and isinstance(args[0], torch.Tensor):
            return self._sizes(name, func(*args, **kwargs), args, kwargs)

        def read(tensor: torch.Tensor) -> Value:
            return self._read(tensor, frame)

        if name in QUESTIONS:
            asked = list(tensors_of(map_tensors((args, kwargs), read)))
            answer = func(*args, **kwargs)
            self._value_decision(name, asked, answer)
            return answer
        given, given_kwargs = map_tensors(args, read), map_tensors(kwargs, read)
        parameter = written_parameter(full, given)
        if parameter is not None:
            reason = f"forward writes to the parameter '{parameter.path}', and no layer of Flax does"
            self.fault(buffer_changed(parameter.path) if parameter.is_buffer else reason)
            if name == "__set__":
                return None
            args = (args[0].clone(), *args[1:])  # the parameter is the caller's
        tensors = list(tensors_of((args, kwargs), torch.Tensor))
        versions = [_version(tensor) for tensor in tensors]
        node = Node(given, given_kwargs, author_line(), function=full, told=frame.told)
        with self._pause():
            output = _without_gradients(func, args, kwargs)
            if name == "__iter__":
                output = tuple(output)
        written = [t for t, version in zip(tensors, versions, strict=True) if _version(t) != version]
        node.inplace = bool(written)
        returned = [args[0]] if name == "__setitem__" else list(tensors_of(output, torch.Tensor))
        if any(not any(same_memory(tensor, other) for other in returned) for tensor in written):
            self.fault(f"{full} writes to an argument that it does not return")
        varies = any(value.varies for value in tensors_of((given, given_kwargs))) or name in RANDOM

        def bind(tensor: torch.Tensor) -> Value:
            return self._bind(tensor, frame, node, varies=varies)

        if name == "__setitem__" and self._assigns_itself(args):  # the end of y[0] += 1
            self._same_after(args[2], versions[0])
            return None
        node.result = bind(args[0]) if name == "__setitem__" else map_tensors(output, bind)
        frame.nodes.append(node)
        self._views.update(views_of(node, func, args, output))
        for tensor in written if name != "__setitem__" else args[:1]:
            self._write_through(tensor, node, frame)
        return iter(output) if name == "__iter__" else output

    def _assigns_itself(self, args: tuple[Any, ...]) -> bool:
        """Whether an assignment to a part gives that very part, which was written to before."""
        view = self._views.get(id(args[2]))
        return view is not None and view.whole is args[0] and view.given is args[1]

    def _same_after(self, tensor: torch.Tensor, version: int) -> None:
        """A view and its wholes are what they were at a version, though they have another one now."""
        while True:
            value, known, _ = self._bound[id(tensor)]
            if known == version:
                self._bound[id(tensor)] = value, _version(tensor), tensor
            if (view := self._views.get(id(tensor))) is None:
                return
            tensor = view.whole

    def _write_through(self, tensor: torch.Tensor, node: Node, frame: Frame) -> None:
        """A write to a view is a new value of the whole."""
        while (view := self._views.get(id(tensor))) is not None:
            before = self._bound.get(id(view.whole))
            if before is None or before[0].frame is not frame:
                return  # the next read of the whole is a fault
            part, version, _ = self._bound[id(tensor)]
            if version != _version(tensor):
                return  # likewise
            function, args = view.written(before[0], part)
            made = Node(args, {}, node.source, function=function, inplace=True)
            varies = before[0].varies or part.varies
            made.result = self._bind(view.whole, frame, made, varies=varies)
            before[0].uses += 1
            part.uses += 1
            frame.nodes.append(made)
            tensor = view.whole

    def _sizes(self, name: str, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value = self._read(args[0], self.frames[-1])
        value.uses -= 1
        if isinstance(output, torch.Size):
            return torch.Size([Dim(size, SizeOf(value, axis)) for axis, size in enumerate(output)])
        if name in ("numel", "nelement"):
            count: Any = 1
            for axis, size in enumerate(value.shape):
                count = Dim(
                    int(count) * size,
                    SizeOf(value, axis)
                    if axis == 0
                    else Operation("*", count.expression, SizeOf(value, axis)),
                )
            return count
        axis = 0 if name == "__len__" else (args[1] if len(args) > 1 else kwargs["dim"]) % len(value.shape)
        return Dim(output, SizeOf(value, int(axis)))

    def _refuse_autocast(self) -> None:
        """Note that torch chooses the dtypes, which nothing in the recording says."""
        if any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
            path = self.frames[-1].path
            reason = (
                "torch.autocast is on, and a port computes in the dtype of what it is given; leave it out"
            )
            if not any(fault.reason == reason and fault.path == path for fault in self.faults):
                self.fault(reason)

    @contextmanager
    def _pause(self) -> Iterator[None]:
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    # --- modules --------------------------------------------------------------------------------------------

    def _path(self, module: nn.Module, parent: Frame | None) -> str:
        """The path of a module; of several, its home where it has weights, else the one below the running frame."""
        paths = self._paths[id(module)]
        if len(paths) == 1 or (id(module) not in self._whole and _has_weights(module)):
            return paths[0]
        inside = parent.path + "." if parent is not None and parent.path else ""
        return next((path for path in paths if path.startswith(inside)), paths[0])

    def _enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], leaf: bool
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._paused:
            if not leaf:
                self._calls.append((None, []))
            else:
                self._paused += 1
            return None
        with self._pause():
            parent = self.frames[-1] if self.frames else None
            path = self._path(module, parent)
            if leaf and id(module) in self._mixed:
                self.fault(f"'{path}' has a hook beside the one of its normed weight; compute in forward")
            node = None
            if parent is not None:
                given = map_tensors((args, kwargs), lambda tensor: self._read(tensor, parent))
                node = Node(given[0], given[1], author_line(), module=module, path=path, told=parent.told)
            if leaf and parent is not None:
                self._calls.append((node, []))
                self._paused += 1  # until it returns
                self._runs_whole = id(module) in self._whole
                return None
            frame = Frame(module, path, parent)
            frame.told = parent is not None and parent.told and _holds_numbers((args, kwargs))
            forward = inspect.unwrap(module.forward)
            frame.code = getattr(getattr(forward, "__func__", forward), "__code__", None)
            outer = [(t, self._bound.get(id(t))) for t in tensors_of((args, kwargs), torch.Tensor)]
            named = _named_arguments(module.forward, args, kwargs)
            if node is not None and parent is not None:
                node.named = [
                    (name, map_tensors(tree, lambda t: self._read(t, parent))) for name, tree in named
                ]
            varies = {id(t): bound[0].varies for t, bound in outer if bound is not None}
            for name, tree in named:

                def place(tensor: torch.Tensor, name: str = name) -> Value:
                    return self._bind(tensor, frame, None, name, varies.get(id(tensor), True))

                frame.inputs.append((name, map_tensors(tree, place)))
            if node is not None:
                node.frame = frame
            self._calls.append((node, outer))
            self.frames.append(frame)
            origins: dict[int, Any] = {}
            for name, tree in named:
                _arguments(tree, name, origins)
            return replaced(args, origins), replaced(kwargs, origins)

    def _leave(self, output: Any, leaf: bool) -> Any:
        if self._paused > leaf:
            if leaf:
                self._paused -= 1
            else:
                self._calls.pop()
            return output
        if leaf and self._paused:
            self._paused -= 1
            self._runs_whole = False
        with self._pause():
            node, outer = self._calls.pop()
            if node is None or node.frame is not None:
                frame = self.frames.pop()
                last = frame.nodes[-1].source if frame.nodes else None
                frame.result = map_tensors(output, lambda tensor: self._read(tensor, frame, last))
                for tensor, bound in outer:
                    if bound is not None:
                        self._bound[id(tensor)] = bound
                    elif self._is_argument(tensor):  # a parameter or buffer: outside it is that again
                        del self._bound[id(tensor)]
            if node is None:
                self.top = frame
                return output
            parent = self.frames[-1]
            parent.told |= node.frame is not None and node.frame.told and _holds_numbers(output)
            varies = _varying(node)
            sizes: dict[int, Any] = {}
            _outputs(output, parent, node, sizes)
            output = replaced(output, {key: dim for key, (_, dim) in sizes.items()})
            result = map_tensors(output, lambda tensor: self._bind(tensor, parent, node, varies=next(varies)))
            node.result = replaced(result, {id(dim): value for value, dim in sizes.values()})
            parent.nodes.append(node)
            for tensor, bound in outer:
                if bound is not None and bound[1] != _version(tensor):
                    self._write_through(tensor, node, parent)
            return output


def _varying(call: Node) -> Iterator[bool]:
    """Whether each result of a call of a module depends on what it was given, or on parameters."""
    if call.frame is not None:
        return iter([value.varies for value in tensors_of(call.frame.result)])
    given = any(value.varies for value in tensors_of((call.args, call.kwargs)))
    return itertools.repeat(given or next(call.module.parameters(), None) is not None)  # type: ignore[union-attr]


def _without_gradients(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a function gives; torch keeps nothing for gradients. What changes its modes is run as it is."""
    if getattr(func, "__name__", "") == "_set_grad_enabled":
        return func(*args, **kwargs)
    with torch.no_grad():
        return func(*args, **kwargs)


def _has_weights(module: nn.Module) -> bool:
    return next(itertools.chain(module.parameters(), module.buffers()), None) is not None


def _of_numpy(tensor: torch.Tensor) -> bool:
    """Whether the memory of a tensor is an array's: torch's own can grow."""
    return not tensor.is_meta and not tensor.untyped_storage().resizable()


def _version(tensor: torch.Tensor) -> int:
    """How often a tensor was written to; torch does not count it for those made in ``inference_mode``."""
    return 0 if tensor.is_inference() else tensor._version


def _owned(modules: Mapping[str, nn.Module]) -> Iterator[Parameter]:
    """The parameters and buffers of all modules; of a shared one, the first place is last and so prevails."""
    for path, *_ in reversed(homes(modules).values()):
        module = modules[path]
        for name, tensor in [*module._buffers.items(), *module._parameters.items()]:
            if tensor is not None:
                yield Parameter(module, name, f"{path}.{name}".lstrip("."), tensor)


def _tensor_attributes(modules: Mapping[str, nn.Module]) -> Iterator[torch.Tensor]:
    for module in modules.values():
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                yield from tensors_of(value, torch.Tensor)


def _name_numbers(module: nn.Module, path: str) -> None:
    """Replace the numbers among a module's attributes by equal ones that know which attribute they are."""
    for name, value in list(vars(module).items()):
        if name.startswith("_") or name == "training":
            continue
        if type(value) in (int, float):
            module.__dict__[name] = number(value, Attribute(path, name))
        elif type(value) in (tuple, list) and value and all(type(item) in (int, float) for item in value):
            items = [number(item, Attribute(path, name, place)) for place, item in enumerate(value)]
            module.__dict__[name] = type(value)(items)


def _named_arguments(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[tuple[str, Any]]:
    """The arguments of a call by the names of the signature; ``*args`` are numbered."""
    try:
        bound = inspect.signature(forward).bind(*args, **kwargs)
    except TypeError:  # the call itself will say it better
        return [(f"x{place}", tree) for place, tree in enumerate(args)] + list(kwargs.items())
    named: list[tuple[str, Any]] = []
    for name, tree in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            named += [(f"{name}{place}", item) for place, item in enumerate(tree)]
        elif kind is inspect.Parameter.VAR_KEYWORD:
            named += tree.items()
        else:
            named.append((name, tree))
    return named


def _arguments(tree: Any, name: str, origins: dict[int, Any]) -> None:
    """Sizes among the arguments of a module: inside it they go by the name of the argument."""
    if is_size(tree):
        origins.setdefault(id(tree), number(tree, Argument(name)))
    elif isinstance(tree, tuple | list):
        for place, item in enumerate(tree):
            _arguments(item, f"{name}[{place}]", origins)
    elif isinstance(tree, Mapping) or holds_tensors(tree):
        for key, item in fields_of(tree).items():
            _arguments(item, f"{name}[{key!r}]", origins)


def _holds_numbers(tree: Any) -> bool:
    """Whether values that Python was told may be in a tree: plain numbers, text, arrays of NumPy."""
    found = tensors_of(tree, (int, float, complex, str, np.ndarray))
    return any(not isinstance(item, bool | Dim | Real) for item in found)


def _outputs(tree: Any, parent: Frame, node: Node, sizes: dict[int, Any]) -> None:
    """Sizes among the results of a module: outside it each is a value of its own."""
    for item in tensors_of(tree, Dim):
        if is_size(item):
            value = Value((), None, parent, node)
            sizes.setdefault(id(item), (value, Dim(item, Output(value))))
