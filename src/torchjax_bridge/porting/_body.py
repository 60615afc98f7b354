"""What one frame of the recording becomes: statements, what they read, and what is returned."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torchjax_bridge.recording import Frame, SourceLine

from ._constructors import Code
from ._placed import Axes, Placed

__all__ = ["Body", "Statement"]


@dataclass
class Statement:
    """``target = text``.

    Attributes:
        names: The variables that it binds, ``_v3_`` and so on.
        target: The left side.
        text: The right side.
        source: The author's line.
        called: The path of the module whose call it is part of, if it is a call of one.
        items: For each of several variables its own expression, for code that reads few of them.
        kinds: What each variable is that is no array, such as ``int``.
    """

    names: tuple[str, ...]
    target: str
    text: str
    source: SourceLine
    called: str = ""
    items: tuple[str, ...] = ()
    kinds: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Body:
    """What one frame becomes.

    Attributes:
        frame: The frame.
        inputs: The arguments that it takes: for each its name and the tree of values and numbers.
        names: For each variable that is an argument, or a part of one, its expression.
        orders: The order of axes of each array among the arguments.
        statements: The code.
        result: The expression that is returned.
        result_places: Where each returned array stands.
        attributes: The numbers of the module that the code reads, by name.
        dropouts: The dropouts that the code calls as functions, by attribute: the rate, and the axes along
            which they drop everything together.
        callables: The functions that an instance of the class is given, by attribute.
        functions: Of a Sequential, its modules without weights by name: as a function, what it is given and
            what it gives.
        helpers: The functions that the code needs beside it.
        random: Whether the code draws random numbers.
        axes: The order of axes of each variable that is an array.
        base_call: Whether the code calls the layer that the class derives from.
        training: The code in training, where it is not the same.
        evaluates_only: Whether the code raises in training.
    """

    frame: Frame
    inputs: list[tuple[str, Any]]
    names: dict[str, str] = field(default_factory=dict)
    orders: list[Axes] = field(default_factory=list)
    statements: list[Statement] = field(default_factory=list)
    result: str = ""
    result_places: list[Placed] = field(default_factory=list)
    attributes: dict[str, Any] = field(default_factory=dict)
    dropouts: dict[str, tuple[float, tuple[int, ...]]] = field(default_factory=dict)
    callables: dict[str, Code] = field(default_factory=dict)
    functions: dict[str, tuple[str, str, str]] = field(default_factory=dict)
    helpers: set[str] = field(default_factory=set)
    random: bool = False
    axes: dict[str, Axes] = field(default_factory=dict)
    base_call: bool = False
    training: "Body | None" = None
    evaluates_only: bool = False

    @property
    def asks_mode(self) -> bool:
        """Whether the code asks if the model trains."""
        return self.training is not None or self.evaluates_only
