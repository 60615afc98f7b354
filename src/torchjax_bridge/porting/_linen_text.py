"""What a linen file looks like: arguments as fields, ``setup``, linen's names, and the classes that it needs."""

import ast
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from flax import linen

from ._annotations import linen_annotation
from ._definition import Definition
from ._linen_calls import MODE
from ._linen_layers import SEQUENTIAL

__all__ = ["in_linen_names", "linen_helpers", "setup_lines"]


def setup_lines(definition: Definition, typed: Sequence[str]) -> list[str]:
    """The fields and ``setup`` of a class.

    Args:
        definition: The class.
        typed: Its arguments, with types and defaults.
    """
    lines = [f"    {argument}" for argument in typed]

    def in_self(text: str) -> str:
        return _with_self(text, definition.params)

    def assigned(name: str, text: str) -> list[str]:
        value = in_self(text)
        if name == "super()":
            return [f"self.base = {value}", "nnx.share_scope(self, self.base)"]
        return [f"self.{name}{linen_annotation(value)} = {value}"] if value != f"self.{name}" else []

    made = definition.attribute_lines(assigned, in_self)
    if made:
        head = ["    def setup(self) -> None:", '        """Make the layers."""']
        lines += [*([""] if lines else []), *head, *made]
    return lines


def _with_self(text: str, names: Iterable[str]) -> str:
    """An expression whose arguments are fields."""
    names = set(names)
    if not names.intersection(re.findall(r"\w+", text)):
        return text
    places = [
        node.col_offset
        for node in ast.walk(ast.parse(text, mode="eval"))
        if isinstance(node, ast.Name) and node.id in names
    ]
    encoded = text.encode()
    for place in sorted(places, reverse=True):
        encoded = encoded[:place] + b"self." + encoded[place:]
    return encoded.decode()


def in_linen_names(line: str) -> str:
    """A line with ``nnx.relu`` as ``nn.relu``; what linen lacks is ``jax.nn``'s."""
    return re.sub(
        r"(?<![\w.])nnx\.(\w+)",
        lambda found: f"{'nn' if hasattr(linen, found[1]) else 'jax.nn'}.{found[1]}",
        line,
    )


def linen_helpers(
    helpers: Mapping[str, str], definitions: Sequence[Definition], told: Collection[str] = ()
) -> dict[str, str]:
    """The helper functions and classes that a linen file may hold.

    Args:
        helpers: Those that a file of nnx may hold.
        definitions: The classes of the file.
        told: The imported classes whose calls take the mode.
    """
    found = {name: text for name, text in helpers.items() if not text.strip().startswith("class ")}
    return {**_LAYERS, SEQUENTIAL: _sequential(definitions, told), **found}


def _sequential(definitions: Sequence[Definition], told: Collection[str]) -> str:
    """The class of Sequentials that hold layers with a mode."""
    inside = set(_called_in_sequentials(definitions))
    asked = [
        (kind, f"{keyword}=not {MODE}")
        for kind, keyword in (("nnx.BatchNorm", "use_running_average"), ("nnx.Dropout", "deterministic"))
        if kind in inside or (kind == "nnx.BatchNorm" and "UnbiasedBatchNorm" in inside)
    ]
    classes = [one.name for one in definitions if one.has_mode and one.name in inside]
    classes += sorted(inside.intersection(told))
    classes += [SEQUENTIAL] if SEQUENTIAL in inside else []
    if classes:
        asked.append((classes[0] if len(classes) == 1 else f"({', '.join(classes)})", f"{MODE}={MODE}"))
    lines = [
        f"class {SEQUENTIAL}(nnx.Module):",
        '    """Layers in order, each told whether the model trains."""',
        "",
    ]
    lines += ["    layers: Sequence[Callable[..., Any]]", ""]
    lines += [f"    def __call__(self, x: jax.Array, {MODE}: bool = False) -> jax.Array:"]
    lines += ['        """The result of the last layer."""', "        for layer in self.layers:"]
    for place, (kind, told) in enumerate(asked):
        lines.append(f"            {'elif' if place else 'if'} isinstance(layer, {kind}):")
        lines.append(f"                x = layer(x, {told})")
    lines += ["            else:", "                x = layer(x)"] if asked else ["            x = layer(x)"]
    if len(asked) == 1:
        kind, told = asked[0]
        lines[-4:] = [f"            x = layer(x, {told}) if isinstance(layer, {kind}) else layer(x)"]
    lines.append("        return x")
    return "\n".join(lines)


def _called_in_sequentials(definitions: Sequence[Definition]) -> Iterator[str]:
    """The classes of the layers that a Sequential with a mode holds."""
    for definition in definitions:
        for text in definition.fields.values():
            for node in ast.walk(ast.parse(text, mode="eval")) if f"{SEQUENTIAL}(" in text else ():
                if isinstance(node, ast.Call) and ast.unparse(node.func) == SEQUENTIAL:
                    layers = (inner for arg in node.args for inner in ast.walk(arg))
                    yield from (ast.unparse(inner.func) for inner in layers if isinstance(inner, ast.Call))


_LAYERS = {
    "UnbiasedBatchNorm": '''
class UnbiasedBatchNorm(nnx.BatchNorm):
    """``nn.BatchNorm`` that averages the unbiased variance of each batch, as PyTorch does."""

    @nnx.compact
    def __call__(
        self, x: jax.Array, use_running_average: bool | None = None, *, mask: jax.Array | None = None
    ) -> jax.Array:
        """The normalised ``x``; in training, its statistics are kept."""
        evaluates = nnx.merge_param("use_running_average", self.use_running_average, use_running_average)
        if evaluates or self.is_initializing():
            return super().__call__(x, evaluates, mask=mask)
        kept = self.momentum * self.get_variable("batch_stats", "var")
        y = super().__call__(x, evaluates, mask=mask)
        count = x.size // x.shape[-1]
        biased: jax.Array = self.get_variable("batch_stats", "var")
        self.put_variable("batch_stats", "var", kept + (biased - kept) * (count / (count - 1)))
        return y
''',
    "ChannelPReLU": '''
class ChannelPReLU(nnx.Module):
    """``nn.PReLU`` with one slope a channel."""

    features: int
    negative_slope_init: float = 0.25

    @nnx.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``x`` where it is positive, else ``x`` times the slope of its channel."""
        start = initializers.constant(self.negative_slope_init)
        slope = self.param("negative_slope", start, (self.features,))
        return jnp.where(x >= 0, x, slope * x)
''',
}
