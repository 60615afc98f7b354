"""Weights that torch computes from others in every forward pass: ``weight_norm`` and ``spectral_norm``.

Both exist as old hooks (``weight_g`` and ``weight_v``; ``weight_orig``, ``weight_u`` and ``weight_v``) and as
parametrizations (``parametrizations.weight.original0`` and so on), on any tensor of any layer. So there is no
table here: the layer's own rule applies, with the tensors that make the weight in place of ``weight``.

By default they are folded: the plain Flax layer gets the weight that torch uses in evaluation, ``g v / |v|``
(T. Salimans and D. Kingma, "Weight normalization", 2016, equation 2) or ``W / (u' W v)`` (T. Miyato et al.,
"Spectral normalization", 2018, equation 8 and appendix A). Folding loses the parts. The way back returns the
previous parts while they still fold to the same bits, else parts that fold to the new weight.

linen's wrappers ``nn.WeightNorm`` and ``nn.SpectralNorm`` keep parts of their own beside the kernel:
``kernel/scale`` (g), or ``kernel/u`` and ``kernel/sigma``. If the template has them, they are filled. So are
the scales of ``nnx.WeightNorm``. It writes the normalised kernel over its own; the sign of g goes into that
kernel, so every output stays the same. ``nnx.SpectralNorm`` divides its kernel again in every call, so it is
refused.

Settings for parity: ``nn.WeightNorm(layer)`` with its ``feature_axes=-1`` where torch has ``dim=0``.
``nn.SpectralNorm`` iterates once more in every call, also in evaluation, so it agrees with torch only as far as
``u`` has converged.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchjax_bridge.exchange import Path

from ..layouts import Layout, Reshape, then
from ._computed import SpectralNormed, SpectralParts, WeightNormed, WeightParts
from ._rule import Entry, Layer, Rule

__all__ = ["computed_notes", "parametrized"]


# --- which tensors make which weight -----------------------------------------------------------------


@dataclass(frozen=True)
class _ComputedTensor:
    """One computed tensor, the method, and the tensors it is made of: the one with its shape first."""

    name: str
    method: Literal["weight_norm", "spectral_norm", "pruning", "a parametrization"]
    parts: tuple[str, ...]


_PLACE = "parametrizations."


@lru_cache(maxsize=1024)  # every rule asks, for every layer
def _computed_tensors(names: frozenset[str]) -> tuple[_ComputedTensor, ...]:
    """The computed tensors of a layer, recognised by the names of their parts."""
    found = []
    for name in sorted(names):
        stem, _, mark = name.rpartition("_")
        if mark == "g" and f"{stem}_v" in names:
            found.append(_ComputedTensor(stem, "weight_norm", (f"{stem}_v", name)))
        elif mark == "orig" and {f"{stem}_u", f"{stem}_v"} <= names:
            found.append(_ComputedTensor(stem, "spectral_norm", (name, f"{stem}_u", f"{stem}_v")))
        elif mark == "orig" and f"{stem}_mask" in names:
            found.append(_ComputedTensor(stem, "pruning", (name, f"{stem}_mask")))
    chains: dict[str, set[str]] = {}
    for name in names:
        if name.startswith(_PLACE):
            tensor, _, part = name.removeprefix(_PLACE).partition(".")
            chains.setdefault(tensor, set()).add(part)
    for tensor, parts in sorted(chains.items()):
        place = f"{_PLACE}{tensor}."
        if parts == {"original0", "original1"}:
            found.append(_ComputedTensor(tensor, "weight_norm", (f"{place}original1", f"{place}original0")))
        elif parts == {"original", "0._u", "0._v"}:
            found.append(
                _ComputedTensor(tensor, "spectral_norm", (f"{place}original", f"{place}0._u", f"{place}0._v"))
            )
        else:
            found.append(
                _ComputedTensor(tensor, "a parametrization", tuple(place + part for part in sorted(parts)))
            )
    return tuple(found)


def _plain_names(names: frozenset[str], made: Sequence[_ComputedTensor]) -> frozenset[str]:
    """The names as they would be if the computed tensors were ordinary ones."""
    return names - {part for one in made for part in one.parts} | {one.name for one in made}


def _refuse_others(layer: Layer, made: Sequence[_ComputedTensor]) -> None:
    """Raise for any other method, and for several on one tensor."""
    chains = getattr(layer.module, "parametrizations", {})
    for one in made:
        if one.method == "pruning":
            raise ValueError(
                f"'{one.name}' is pruned; keep the result with "
                f'torch.nn.utils.prune.remove(layer, "{one.name}") first'
            )
        kinds = [type(step).__name__ for step in chains[one.name]] if one.name in chains else []
        if one.method == "a parametrization" or kinds not in ([], *([kind] for kind in _KINDS[one.method])):
            raise ValueError(
                f"'{one.name}' is computed by {', '.join(kinds) or one.method}, which has no counterpart; keep "
                f'the result with torch.nn.utils.parametrize.remove_parametrizations(layer, "{one.name}") first'
            )


# What torch calls the parametrizations that its public functions make.
_KINDS = {"weight_norm": ("_WeightNorm",), "spectral_norm": ("_SpectralNorm",)}


def _dim(layer: Layer, one: _ComputedTensor, default: int) -> int:
    """The output axis of spectral_norm: that of the live module, or torch's default."""
    chain = getattr(layer.module, "parametrizations", {})
    steps: list[Any] = list(chain[one.name]) if one.name in chain else []
    steps += [hook for hook in _hooks(layer.module) if getattr(hook, "name", None) == one.name]
    return next((int(step.dim) for step in steps if hasattr(step, "dim")), default)


def _hooks(module: nn.Module | None) -> Iterable[Any]:
    # torch keeps old hooks in this attribute and offers no other way to ask for them.
    return getattr(module, "_forward_pre_hooks", {}).values()


def computed_notes(module: nn.Module) -> tuple[str, ...]:
    """What the plain twin of a layer does not have of its weights: that torch computes them.

    Raises:
        ValueError: They are computed by something else than ``weight_norm`` and ``spectral_norm``.
    """
    made = _computed_tensors(frozenset(module.state_dict()))
    _refuse_others(Layer({}, {}, module), made)
    return tuple(
        f"'{one.name}' is computed by {one.method} in torch: the twin holds the result, and trains that"
        for one in made
    )


# --- rules -------------------------------------------------------------------------------------------


def parametrized(rule: Rule) -> Rule:
    """The rule of the same layer with some of its tensors computed by weight_norm or spectral_norm."""
    default = 1 if any(issubclass(kind, _TRANSPOSED) for kind in rule.types) else 0

    def entries(layer: Layer) -> Iterable[Entry]:
        names = frozenset(layer.torch)
        made = {one.name: one for one in _computed_tensors(names)}
        _refuse_others(layer, tuple(made.values()))
        inner = _inner(layer)
        kept = _plain_names(names, tuple(made.values()))
        tensors = {name: tensor for name, tensor in layer.torch.items() if name in kept}
        tensors |= {name: layer.torch[one.parts[0]] for name, one in made.items()}
        flax = {
            path[len(inner) :]: shape for path, shape in layer.flax.items() if path[: len(inner)] == inner
        }
        for entry in rule.entries_for(replace(layer, torch=tensors, flax=flax)):
            paths = tuple((*inner, *path) for path in entry.flax_paths)
            computed = [name for name in entry.torch_names if name in made]
            if not computed:
                yield replace(entry, flax=paths)
            elif len(entry.torch_names) > 1:
                raise ValueError(f"'{computed[0]}' is computed, and joins other tensors in Flax")
            else:
                yield from _computed_entries(replace(entry, flax=paths), made[computed[0]], layer, default)

    def applies(names: frozenset[str]) -> bool:
        made = _computed_tensors(names)
        return bool(made) and rule.may_be(_plain_names(names, made))

    return Rule(
        rule.torch_types,
        entries,
        flax_types=rule.flax_types,
        keeps=rule.keeps,
        required=frozenset(),
        applies=applies,
        settings="as without; the weight is folded into a plain layer, or kept apart in linen's wrappers",
        label=rule.name,
    )


_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _inner(layer: Layer) -> Path:
    """The path of the layer inside its nnx wrapper; empty without one."""
    below = bool(layer.flax) and all(path[0] in ("layer_instance", "scales") for path in layer.flax)
    sigma = any("/" in str(path[-1]) for path in layer.flax)
    if layer.flax_module is not None and layer.flax_kind == "SpectralNorm":
        raise ValueError(
            "nnx.SpectralNorm writes over the kernel it holds, so it cannot hold torch's parts; use the plain "
            "layer, which gets the folded weight"
        )
    if not below or sigma:
        return ("layer_instance",) if below else ()
    scales = [path for path in layer.flax if path[0] == "scales"]
    if getattr(layer.flax_module, "feature_axes", -1) != -1 or len(scales) != 1:
        raise ValueError(
            "nnx.WeightNorm holds torch's parts with feature_axes=-1, use_scale=True and a filter for the kernel "
            "alone; set them so, or use the plain layer, which gets the folded weight"
        )
    return ("layer_instance",)


def _computed_entries(entry: Entry, one: _ComputedTensor, layer: Layer, default: int) -> Iterable[Entry]:
    """The entries of a computed tensor: folded, or in the parts of a Flax wrapper."""
    dim = _dim(layer, one, default)
    (*scope, kernel), *others = entry.flax_paths
    scale, left, value = ((*scope, f"{kernel}/{name}") for name in ("scale", "u", "sigma"))
    nnx_scale = ("scales", str((*scope[1:], kernel)))  # nnx keeps them by the path of the kernel
    wrapped = [path for path in (scale, nnx_scale, left, value) if path in layer.flax and not others]
    if not wrapped:
        folds = one.method == "weight_norm"
        fold: Layout = WeightNormed(tuple(layer.torch[one.parts[1]].shape)) if folds else SpectralNormed(dim)
        note = "" if folds else "the weight of evaluation: u and v as they are now"
        yield replace(entry, torch=one.parts, layout=then(fold, entry.layout), note=note)
        return
    original = layer.torch[one.parts[0]]
    if one.method == "weight_norm" and wrapped in ([scale], [nnx_scale]):
        length = tuple(layer.torch[one.parts[1]].shape)
        axes = [axis for axis, size in enumerate(length) if size > 1]
        if len(axes) > 1 or (axes and not _is_last(entry.layout, original, axes[0])):
            raise ValueError(
                f"the lengths {length} of '{one.name}' are not one a feature of Flax's WeightNorm"
            )
        size = length[axes[0]] if axes else 1
        if wrapped == [nnx_scale]:
            if axes != [0]:
                raise ValueError(
                    f"the lengths {length} of '{one.name}' are not one an output, as nnx.WeightNorm's; use the "
                    "plain layer"
                )
            parts = WeightParts(entry.layout, (size,))
            yield Entry(one.parts, (*entry.flax_paths, nnx_scale), parts, "", note=_IN_NNX)
            return
        yield replace(entry, torch=one.parts[0])
        yield Entry(one.parts[1], (scale,), Reshape(length, (size,)))
    elif one.method == "spectral_norm" and wrapped == [left, value]:
        if not _is_last(entry.layout, original, dim):
            raise ValueError(
                f"linen's SpectralNorm sets another axis of '{one.name}' apart than torch; fold it"
            )
        layout = SpectralParts(dim, entry.layout)
        note = "linen's SpectralNorm iterates once more in every call: they agree as far as u has converged"
        yield Entry(one.parts, (*entry.flax_paths, left, value), layout, "", note=note)
    else:
        raise ValueError(f"'{one.name}' is computed by {one.method}, and the Flax wrapper is for the other")


_IN_NNX = (
    "nnx.WeightNorm writes the normalised kernel over the one it holds in every call, which changes no output, and "
    "does not train its scales"
)


def _is_last(layout: Layout, weight: Tensor, axis: int) -> bool:
    """Whether an axis of the torch tensor is the last one of its Flax leaf."""
    size = weight.shape[axis]
    shape = [size if place == axis else 1 for place in range(weight.ndim)]
    try:
        (placed,) = layout.forward((torch.arange(size).view(shape).expand(weight.shape),))
    except RuntimeError:  # not the layout of such a tensor
        return False
    return placed.shape[-1] == size and torch.equal(placed, torch.arange(size).expand(placed.shape))
