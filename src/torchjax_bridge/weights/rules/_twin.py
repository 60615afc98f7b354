"""The Flax layer that computes what a torch layer computes, as a value: its class and its arguments.

A rule makes a `Twin` of a live torch layer (``Rule.twin``). It can be built, and written as source. Owns the
names that nnx and linen have for the same layer. Imports flax when it builds.

All twins take channels last, ``(N, *space, C)``, and attention takes ``(N, length, features)``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from importlib import import_module
from typing import Any, Literal

from torchjax_bridge.errors import SettingsError

__all__ = ["Initializer", "Pad", "Symbol", "Twin", "changed", "torch_uniform"]

Flavour = Literal["nnx", "linen"]


@dataclass(frozen=True)
class Symbol:
    """A function or a dtype of JAX, by the name that source code gives it.

    Args:
        name: Such as ``"jax.nn.relu"`` or ``"jnp.bfloat16"``.

    >>> Symbol("jnp.bfloat16")
    jnp.bfloat16
    """

    name: str

    def __repr__(self) -> str:
        return self.name

    def load(self) -> Any:
        """The thing itself."""
        module, _, name = self.name.replace("jnp.", "jax.numpy.").rpartition(".")
        return getattr(import_module(module), name)


@dataclass(frozen=True)
class Initializer:
    """A call of a function of ``flax.nnx.initializers``, which ``flax.linen.initializers`` has too.

    Args:
        name: The function.
        arguments: What it is called with.

    >>> print(Initializer("variance_scaling", (1 / 3, "fan_in", "uniform")))
    initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    """

    name: str
    arguments: tuple[object, ...] = ()

    def __str__(self) -> str:
        return f"initializers.{self.name}({', '.join(map(_source, self.arguments))})"

    def load(self) -> Callable[..., Any]:
        """The initializer itself."""
        from flax.nnx import initializers

        return getattr(initializers, self.name)(*self.arguments)


@dataclass(frozen=True)
class Pad:
    """What ``jnp.pad`` must do to the input in front of the layer.

    Args:
        widths: Before and after on every axis of ``(N, *space, C)``.
        mode: The ``mode`` of ``jnp.pad``.

    >>> print(Pad(((0, 0), (1, 1), (0, 0)), "edge"))
    jnp.pad(x, ((0, 0), (1, 1), (0, 0)), mode="edge")
    """

    widths: tuple[tuple[int, int], ...]
    mode: str

    def __str__(self) -> str:
        return self.source("x")

    def source(self, x: str) -> str:
        """The call on an expression."""
        return f"jnp.pad({x}, {self.widths}, mode={_source(self.mode)})"


@dataclass(frozen=True)
class Twin:
    """The Flax layer that is the counterpart of one torch layer.

    Args:
        flax: The name of its class in ``flax.nnx`` (``"Conv"``), or in ``flax.linen`` where ``flavour`` says so.
        sizes: The positional arguments by name, in order. A recurrent layer has other twins there: its cells.
        settings: The keyword arguments that differ from Flax's defaults.
        initializers: The keyword arguments that start the weights as torch does, where Flax has the function. Flax
            has none for torch's biases, which are uniform with a bound of the fan-in; they start at zero.
        pad: What must be done to the input first, or None.
        own: The class is one of `torchjax_bridge.weights.layers`, since Flax's cannot compute it.
        call: Keyword arguments of every call of the layer.
        notes: How the layer differs from torch's in training, though outputs are the same.
        flavour: The library whose names these are.

    >>> twin = Twin("Linear", {"in_features": 3, "out_features": 4}, {"use_bias": False})
    >>> print(twin)
    nnx.Linear(3, 4, use_bias=False, rngs=rngs)
    >>> print(twin.in_linen())
    linen.Dense(4, use_bias=False)
    """

    flax: str
    sizes: Mapping[str, object] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)
    initializers: Mapping[str, Initializer] = field(default_factory=dict)
    pad: Pad | None = None
    own: bool = False
    call: Mapping[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    flavour: Flavour = "nnx"

    def in_linen(self) -> "Twin":
        """The same layer in linen's names. linen reads the sizes of the input from the input.

        Raises:
            SettingsError: A recurrent layer has dropout between its layers, which linen cannot tell the mode.
        """
        if self.flavour == "linen":
            return self
        layers = self.sizes.get("layers")
        if isinstance(layers, tuple) and any(layer.flax == "Dropout" for layer in layers):
            raise SettingsError(
                "a linen.Sequential tells its Dropout no mode: call the layers of a recurrent layer with dropout "
                "one by one"
            )
        initializers = dict(self.initializers)
        if self.flax in _STACKED_IN_NNX:
            initializers["kernel_init"] = torch_uniform("fan_out")
        return replace(
            self,
            flax=_LINEN_CLASSES.get(self.flax, self.flax),
            sizes={
                _LINEN_SIZES[name]: _in_linen(size)
                for name, size in self.sizes.items()
                if name in _LINEN_SIZES
            },
            settings={name: value for name, value in self.settings.items() if name not in _NNX_ALONE},
            initializers=initializers,
            own=self.own and self.flax in _OWN_IN_LINEN,
            flavour="linen",
        )

    def nnx(self, rngs: Any) -> Any:
        """Build the nnx module.

        Args:
            rngs: The ``nnx.Rngs`` that start its weights, and its dropout.
        """
        if self.flavour != "nnx":
            raise TypeError("a twin in linen's names makes no nnx module; ask the twin that it was made of")
        return self._build(rngs)

    def linen(self) -> Any:
        """Build the linen module."""
        return self.in_linen()._build(None)

    def _build(self, rngs: Any) -> Any:
        if self.own:
            from ..layers import linen, nnx

            holder: Any = {"nnx": nnx, "linen": linen}[self.flavour]
        else:
            holder = import_module(f"flax.{self.flavour}")
        keywords = {
            name: _load(value, rngs) for name, value in {**self.settings, **self.initializers}.items()
        }
        if self._takes_rngs:
            keywords["rngs"] = rngs
        return getattr(holder, self.flax)(*(_load(size, rngs) for size in self._positional), **keywords)

    @property
    def _takes_rngs(self) -> bool:
        return self.flavour == "nnx" and self.flax not in _WITHOUT_RNGS

    @property
    def _positional(self) -> tuple[object, ...]:
        """The positional arguments: nnx takes the layers of a ``Sequential`` one by one."""
        layers = self.sizes.get("layers")
        if self.flavour == "nnx" and isinstance(layers, tuple):
            return layers
        return tuple(self.sizes.values())

    def __str__(self) -> str:
        keywords = {**self.settings, **self.initializers}
        arguments = [
            *map(_source, self._positional),
            *(f"{name}={_source(value)}" for name, value in keywords.items()),
            *(["rngs=rngs"] if self._takes_rngs else []),
        ]
        return f"{'layers.' if self.own else ''}{self.flavour}.{self.flax}({', '.join(arguments)})"


_LINEN_CLASSES = {"Linear": "Dense", "MultiHeadAttention": "MultiHeadDotProductAttention"}
# What linen calls each size; it has no others, and reads those from the input.
_LINEN_SIZES = {
    **{
        name: name
        for name in ("kernel_size", "num_groups", "num_embeddings", "features", "num_heads", "rate")
    },
    **{name: name for name in ("cell", "forward_rnn", "backward_rnn", "layers")},
    "out_features": "features",
    "hidden_features": "features",
}
_NNX_ALONE = frozenset({"decode", "in_kv_features"})  # linen's default of the first is what torch does
_WITHOUT_RNGS = frozenset({"PReLU", "RNN", "Bidirectional", "Sequential"})
_STACKED_IN_NNX = frozenset({"OptimizedLSTMCell", "GRUCell"})  # linen has a kernel a gate
_OWN_IN_LINEN = frozenset({"BatchNorm", "PReLU"})  # the others linen has


def changed(**settings: tuple[object, object]) -> dict[str, object]:
    """The settings whose value is not Flax's default, from pairs of both."""
    return {name: value for name, (value, default) in settings.items() if value != default}


def torch_uniform(fan: str = "fan_in", scale: float = 1.0) -> Initializer:
    """Torch's ``U(-1 / sqrt(fan), 1 / sqrt(fan))``, whose variance is a third of that of ``1 / fan``.

    Args:
        fan: The fan of the Flax kernel that torch's bound is made of.
        scale: How many times the fan of torch's that fan is.
    """
    return Initializer("variance_scaling", (scale / 3, fan, "uniform"))


def _in_linen(value: object) -> object:
    if isinstance(value, tuple):
        return tuple(map(_in_linen, value))
    return value.in_linen() if isinstance(value, Twin) else value


def _load(value: object, rngs: Any) -> object:
    if isinstance(value, tuple):
        return tuple(_load(one, rngs) for one in value)
    if isinstance(value, Twin):
        return value._build(rngs)
    return value.load() if isinstance(value, Symbol | Initializer) else value


def _source(value: object) -> str:
    """A value as source code: a third as ``1 / 3``, strings in double quotes."""
    if isinstance(value, float):
        near = Fraction(value).limit_denominator(99)
        exact = near.numerator / near.denominator == value
        return min([repr(value), *([f"{near.numerator} / {near.denominator}"] if exact else [])], key=len)
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, tuple):
        return f"({', '.join(map(_source, value))}{',' if len(value) == 1 else ''})"
    return str(value) if isinstance(value, Initializer | Twin) else repr(value)
