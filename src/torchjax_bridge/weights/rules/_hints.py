"""Hints of the caller, beside rules: names that differ, classes, flattened features, tensors that one side lacks.

Each hint names places of the torch side (`Fill`: of the Flax side) by a dotted pattern, matched segment by
segment from the first to the last. ``*`` stands for one whole segment or a part of one. A hint that matches
nothing is a fault, so a typing error is noticed.
"""

import re
from dataclasses import dataclass

from torch import nn

from torchjax_bridge.errors import PlanError
from torchjax_bridge.exchange import Path, split_path

__all__ = ["Fill", "Flatten", "Keep", "LayerType", "Rename", "matches_path"]


@dataclass(frozen=True)
class Rename:
    """Another name in the template for a torch name. Of several, the first that matches a path decides.

    Args:
        torch: The dotted path of a module or a tensor (``"features.0"``, ``"blocks.*.attn.c_proj"``).
        flax: What the template calls it, dotted, without the collection; each ``*`` takes what the ``*`` at
            the same place of ``torch`` stood for.

    >>> Rename("blocks.*.attn.c_proj", "blocks.*.attn.out").apply(("blocks", 3, "attn", "c_proj", "weight"))
    ('blocks', 3, 'attn', 'out', 'weight')
    """

    torch: str
    flax: str

    def __post_init__(self) -> None:
        if not isinstance(self.torch, str) or not isinstance(self.flax, str):
            raise PlanError(f"Rename takes two dotted names, not {self.torch!r} and {self.flax!r}.")

    def apply(self, path: Path) -> Path | None:
        """The new path, or None when the pattern is not a prefix of this one."""
        pattern = split_path(self.torch)
        if len(path) < len(pattern):
            return None
        found: list[str] = []
        for want, have in zip(pattern, path, strict=False):
            match = _segment(want).fullmatch(str(have))
            if match is None:
                return None
            found += match.groups()
        caught = iter(found)
        new = re.sub(r"\*", lambda _: next(caught, "*"), self.flax)
        return split_path(new) + path[len(pattern) :]

    def __str__(self) -> str:
        return f'Rename("{self.torch}", "{self.flax}")'


@dataclass(frozen=True)
class LayerType:
    """The torch class of a layer: in a bare ``state_dict``, where keys leave a doubt, or for a subclass.

    A subclass with its own ``forward`` is assumed to act like its base class, with a warning. This hint
    confirms it.

    Args:
        torch: The dotted path of the layer, or a pattern.
        kind: The class, such as ``nn.Linear``.
    """

    torch: str
    kind: type

    def __post_init__(self) -> None:
        _check_name("LayerType", self.torch)
        if not isinstance(self.kind, type) or not issubclass(self.kind, nn.Module):
            raise PlanError(
                f'LayerType("{self.torch}", ...) takes a torch class such as nn.Linear, not {self.kind!r}.'
            )

    def matches(self, path: Path) -> bool:
        """Whether the pattern matches the layer at this path."""
        return matches_path(self.torch, path)

    def __str__(self) -> str:
        return f'LayerType("{self.torch}", {self.kind.__name__})'


@dataclass(frozen=True)
class Flatten:
    """The feature map that was flattened to feed a layer, or that is made of its output.

    torch flattens ``(C, H, W)``, a Flax model usually ``(H, W, C)``, so the rows of the kernel come in
    another order. Arrays do not show the order, and a wrong one goes unnoticed. So in a model with feature
    maps, a layer needs this hint if nothing else explains its input width. So does a Linear of a generator or
    a decoder whose output is viewed as ``(C, H, W)``. With ``inputs=``, a run of the torch model gives the hint,
    for a Flax model that flattens its own channels-last map. A hint of the caller's prevails.

    Args:
        torch: The dotted path of the layer, or a pattern: a Linear, a recurrent layer or cell (its input), or
            a BatchNorm1d, LayerNorm, RMSNorm or PReLU over the flattened features. A GroupNorm, an attention or a
            Bilinear keeps torch's order, so it takes ``None`` only.
        features: The ``(C, H, W)`` (or ``(C, L)``, ``(C, D, H, W)``) that torch flattens, if the Flax model
            flattens its own channels-last map. ``None`` if the Flax model moves the channels to the front
            before it flattens (``x.transpose(0, 3, 1, 2).reshape(...)``): then nothing changes.
        output: Whether ``features`` is made of a Linear's output, where Flax makes ``(H, W, C)`` of it.

    Raises:
        PlanError: The features are not two or more positive sizes, or ``output`` is not a bool.
    """

    torch: str
    features: tuple[int, ...] | None
    output: bool = False

    def __post_init__(self) -> None:
        _check_name("Flatten", self.torch)
        if not isinstance(self.output, bool):
            raise PlanError(f'Flatten("{self.torch}", ...) takes output=True or False, not {self.output!r}.')
        sizes = self.features
        if sizes is None:
            return
        if (
            not isinstance(sizes, tuple | list)
            or len(sizes) < 2
            or not all(type(size) is int and size > 0 for size in sizes)
        ):
            raise PlanError(
                f'Flatten("{self.torch}", ...) takes the (C, H, W) or (C, L) that is flattened, or None, '
                f"not {sizes!r}."
            )
        object.__setattr__(self, "features", tuple(sizes))

    def matches(self, path: Path) -> bool:
        """Whether the pattern matches the layer at this path."""
        return matches_path(self.torch, path)

    def __str__(self) -> str:
        return f'Flatten("{self.torch}", {self.features}{", output=True" if self.output else ""})'


@dataclass(frozen=True)
class Keep:
    """Tensors that stay in torch: the Flax model does without them, such as those of a layer that is never called.

    They cross neither way: `to_flax` leaves them out, and `to_state_dict` takes them from its template.

    Args:
        torch: The dotted path of a tensor, or of a module for all its tensors; or a pattern.

    >>> Keep("encoder.*.pooler").matches(("encoder", 3, "pooler", "weight"))
    True
    """

    torch: str

    def __post_init__(self) -> None:
        if not isinstance(self.torch, str):
            raise PlanError(f"Keep takes the dotted name of a module or a tensor, not {self.torch!r}.")

    def matches(self, path: Path) -> bool:
        """Whether the pattern matches the tensor at this path."""
        return matches_path(self.torch, path[: len(split_path(self.torch))])

    def __str__(self) -> str:
        return f'Keep("{self.torch}")'


@dataclass(frozen=True)
class Fill:
    """A leaf that only the Flax model has, and the value with which both compute the same.

    Converting back to torch works only while every element still has that value. A trained leaf would be
    lost, so it raises.

    Args:
        flax: The dotted path of the leaf, without linen's collection, or a pattern (``"blocks.*.attn.key.bias"``).
        value: The value of every element, such as ``0.0`` for a bias.

    Raises:
        PlanError: The value is not a number, or NaN.
    """

    flax: str
    value: float

    def __post_init__(self) -> None:
        if not isinstance(self.flax, str):
            raise PlanError(
                f"Fill({self.flax!r}, ...) takes the dotted name of a Flax leaf, or a pattern, first."
            )
        if not isinstance(self.value, int | float) or self.value != self.value:
            raise PlanError(f'Fill("{self.flax}", ...) takes a number such as 0.0, not {self.value!r}.')

    def matches(self, path: Path) -> bool:
        """Whether the pattern matches the leaf at this path."""
        return matches_path(self.flax, path)

    def __str__(self) -> str:
        return f'Fill("{self.flax}", {self.value})'


def _check_name(hint: str, name: object) -> None:
    if not isinstance(name, str):
        raise PlanError(f"{hint}({name!r}, ...) takes the dotted name of a layer, or a pattern, first.")


def matches_path(pattern: str, path: Path) -> bool:
    want = split_path(pattern)
    return len(want) == len(path) and all(
        _segment(one).fullmatch(str(other)) for one, other in zip(want, path, strict=True)
    )


def _segment(want: str | int) -> re.Pattern[str]:
    return re.compile("(.*)".join(re.escape(part) for part in str(want).split("*")))
