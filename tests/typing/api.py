"""What a type checker makes of every public name. Checked by mypy (``test_public_types.py``), never run."""

from collections.abc import Callable
from typing import Any, assert_type

import jax
import numpy as np
import optax
import torch
from flax import nnx

import torchjax_bridge as tb
from torchjax_bridge import errors
from torchjax_bridge.weights import (
    RULES,
    Entry,
    Fault,
    Flatten,
    LayerType,
    Permute,
    Plan,
    Rename,
    Report,
    Rule,
    load_flax,
    load_state_dict,
    save_flax,
    save_state_dict,
)


def exchange(tensor: torch.Tensor, array: jax.Array, tree: dict[str, Any]) -> None:
    assert_type(tb.to_jax(tensor), jax.Array)
    assert_type(tb.to_jax(torch.nn.Parameter(tensor), copy=False, device=torch.device("cpu")), jax.Array)
    assert_type(tb.to_jax(array), jax.Array)
    assert_type(tb.to_jax(tree, copy=None, device="cpu"), Any)
    assert_type(tb.to_torch(array, copy=True, device=jax.devices()[0]), torch.Tensor)
    assert_type(tb.to_torch(tensor), torch.Tensor)
    assert_type(tb.to_torch({"w": array}), Any)
    anything: Any = tree
    assert_type(tb.to_jax(anything), Any)
    assert_type(tb.jax_dtype(torch.float32), np.dtype[Any])
    assert_type(tb.torch_dtype("float32"), torch.dtype)
    assert_type(tb.jax_device("cpu"), jax.Device)
    assert_type(tb.torch_device("cpu"), torch.device)


def weights(module: torch.nn.Module, template: nnx.Module, variables: dict[str, Any]) -> None:
    rules: list[Rename | Flatten | LayerType] = [
        Rename("a", "b"),
        Flatten("fc", (16, 5, 5)),
        Flatten("fc", None),
        LayerType("x", torch.nn.Linear),
    ]
    made = tb.plan(module, template, rules=rules)
    assert_type(made, Plan)
    assert_type(made.ok, bool)
    assert_type(made.faults, tuple[Fault, ...])
    assert_type(made.report, Report)
    for fault in made.report:
        assert_type(fault.message, str)
    tb.to_flax(module, template, rules=rules, strict=False, copy=None)
    tb.to_flax(
        module.state_dict(),
        variables,
        rules=(*RULES, Rule(torch.nn.Linear, [Entry("w", "k", Permute((1, 0)))])),
    )
    module.load_state_dict(tb.to_state_dict(template, module))
    assert_type(tb.to_state_dict(variables, module), dict[str, Any])


def optimizers(module: torch.nn.Module, template: nnx.Module) -> None:
    adam = torch.optim.Adam(module.parameters())
    state = tb.to_optax(
        adam, nnx.Optimizer(template, optax.adam(1e-3), wrt=nnx.Param), module=module, template=template
    )
    back = tb.to_optimizer_state(state, adam, module=module, template=template)
    assert_type(back, dict[str, Any])
    adam.load_state_dict(back)


def files(module: torch.nn.Module, template: nnx.Module) -> None:
    assert_type(load_state_dict("net.safetensors"), dict[str, torch.Tensor])
    load_flax("net.safetensors", template, copy=True)
    save_state_dict("net.pt", module, metadata={"seed": "0"}, overwrite=False)
    save_flax("net", template, format="orbax")
    save_flax("net", template, format="pickle")  # type: ignore[arg-type]


def code(module: torch.nn.Module, flax_module: nnx.Module, tensor: torch.Tensor, array: jax.Array) -> None:
    ours = tb.as_torch_function(lambda x: x, static_argnums=0, static_argnames=("mode",))
    ours(tensor)
    ours.cache_clear()
    assert_type(ours.cache_info().hits, int)
    theirs = tb.as_jax_function(lambda x: x, residuals="recompute")
    jax.jit(theirs)(array)
    theirs.cache_clear()
    assert_type(theirs.cache_info().misses, int)
    tb.as_jax_function(lambda x: x, residuals="keep")  # type: ignore[arg-type]
    tb.as_jax_module(module, residuals="keep")  # type: ignore[arg-type]
    assert_type(tb.as_jax_module(module), tuple[Callable[..., Any], dict[str, dict[str, jax.Array]]])
    wrapped: torch.nn.Module = tb.as_torch_module(flax_module)
    wrapped.train()


def every_error(leaf: errors.UnsupportedLeafError, wide: errors.NarrowingError) -> None:
    as_builtins: tuple[TypeError, OverflowError, errors.BridgeError] = (leaf, wide, wide)
    for fault in leaf.faults:
        assert_type(fault, errors.ExchangeError)
    del as_builtins


def refused(tensor: torch.Tensor, module: torch.nn.Module) -> None:
    tb.to_jax(tensor, True)  # type: ignore[call-overload]  # options are keywords
    tb.to_jax(tensor, copy="always")  # type: ignore[call-overload]
    tb.to_jax(tensor).data_ptr()  # type: ignore[attr-defined]  # an array is no tensor
    tb.to_flax(module)  # type: ignore[call-arg]


def misspelt() -> None:
    del tb.to_flaxx  # type: ignore[attr-defined]
    del tb.wrap.as_jax_funktion  # type: ignore[attr-defined]
    del tb.weights.to_optaxx  # type: ignore[attr-defined]
