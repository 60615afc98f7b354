"""What converting a model's weights costs: with copies, against cloning them; as views, per leaf."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from torchjax_bridge import plan, to_flax, to_state_dict
from torchjax_bridge.weights import Flatten

from .._case import Candidate, Findings, WrongResultError, ask
from .._record import Promise
from .._setting import Setting
from ._models import Description, nnx_template, torch_module

__all__ = ["conversion", "sharing"]

CLONE = "clone of the state_dict"
OURS = "to_flax"
BACK = "to_state_dict"
PLAN = "plan"
RECIPE = "jnp.array(v.numpy().transpose(...))"
_NAMES = {"weight": "kernel", "bias": "bias", "running_mean": "mean", "running_var": "var"}


def conversion(name: str, description: Description, setting: Setting) -> Findings:
    """``copy=True``, planning included, against ``{k: v.clone()}``, and against the usual recipe."""
    module = torch_module(description).to(setting.torch_device)
    template = nnx_template(description)
    nbytes = sum(tensor.nbytes for tensor in module.state_dict().values())
    twin = to_flax(module, template)
    case, rounds = ask(
        f"weights/{name}",
        f"What does it cost to convert the weights of a {name} model ({nbytes / 1e6:,.0f} MB) into new memory?",
        [
            Candidate(CLONE, _clone, module, _check_clone(module)),
            Candidate(OURS, lambda source: to_flax(source, template), module, _check_flax(module), ours=True),
            Candidate(RECIPE, _recipe, module, _check_recipe(module)),
            Candidate(
                BACK, lambda source: to_state_dict(source, module), twin, _check_clone(module), ours=True
            ),
        ],
        setting,
        nbytes=nbytes,
        effort=8,
        cold=True,
    )
    return Findings(
        [case],
        [
            Promise(f"to_flax of a {name} model / clone", "at most", 1.0, "x", rounds.ratio(OURS, CLONE)),
            Promise(
                f"the usual recipe for a {name} model / to_flax",
                "at least",
                4.0,
                "x",
                rounds.ratio(RECIPE, OURS),
            ),
            Promise(
                f"to_state_dict of a {name} model / clone", "reported", None, "x", rounds.ratio(BACK, CLONE)
            ),
        ],
    )


def sharing(name: str, description: Description, setting: Setting) -> Findings:
    """``copy=False``: no byte moves, so it is a cost per leaf."""
    module = torch_module(description).to(setting.torch_device)
    template = nnx_template(description)
    leaves = len(jax.tree.leaves(nnx.state(template)))
    call = "to_flax, copy=False"
    case, rounds = ask(
        f"weights/{name}/views",
        f"What does it cost to see the {leaves} weights of a {name} model from JAX without moving a byte?",
        [
            Candidate(CLONE, _clone, module, _check_clone(module)),
            Candidate(PLAN, lambda source: plan(source, template), module, lambda _: None),
            Candidate(
                call,
                lambda source: to_flax(
                    source, template, copy=False, rules=[Flatten("fc", None)] if "fc" in description else []
                ),
                module,
                _check_views(module),
                ours=True,
            ),
        ],
        setting,
        effort=4,
    )
    per_leaf = rounds.combine(lambda seconds: 1e6 * (seconds[call] - seconds[PLAN]) / leaves)
    text = f"to_flax of a {name} model as views, beyond its plan, per leaf"
    return Findings([case], [Promise(text, "at most", 25.0, "us", per_leaf)])


# --- the others --------------------------------------------------------------------------------------


def _clone(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def _recipe(module: torch.nn.Module) -> dict[str, jax.Array]:
    """What people write by hand, leaf by leaf."""
    axes = {4: (2, 3, 1, 0), 2: (1, 0)}
    return {
        key: jnp.array(value.cpu().numpy().transpose(axes.get(value.ndim, range(value.ndim))))
        for key, value in module.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }


# --- checks ------------------------------------------------------------------------------------------


def _expected(value: torch.Tensor) -> np.ndarray[Any, Any]:
    array = value.cpu().numpy()
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def _flat(twin: nnx.Module) -> dict[str, jax.Array]:
    return {
        ".".join(map(str, path)): variable.get_value()
        for path, variable in nnx.to_flat_state(nnx.state(twin))
    }


def _flax_key(key: str, module: torch.nn.Module) -> str:
    path, _, leaf = key.rpartition(".")
    norm = leaf == "weight" and module.get_parameter(key).ndim == 1
    return f"{path}.{'scale' if norm else _NAMES[leaf]}"


def _check_clone(module: torch.nn.Module) -> Callable[[dict[str, torch.Tensor]], None]:
    def check(result: dict[str, torch.Tensor]) -> None:
        for key, value in module.state_dict().items():
            if not torch.equal(result[key], value):
                raise WrongResultError(f"{key} differs")

    return check


def _check_recipe(module: torch.nn.Module) -> Callable[[dict[str, jax.Array]], None]:
    def check(result: dict[str, jax.Array]) -> None:
        for key, array in result.items():
            if not np.array_equal(np.asarray(array), _expected(module.state_dict()[key])):
                raise WrongResultError(f"{key} differs")

    return check


def _check_flax(module: torch.nn.Module, *, shared: bool = False) -> Callable[[nnx.Module], bool]:
    def check(twin: nnx.Module) -> bool:
        leaves = _flat(twin)
        for key, value in module.state_dict().items():
            if key.endswith("num_batches_tracked"):
                continue
            array = leaves[_flax_key(key, module)]
            if not np.array_equal(np.asarray(array), _expected(value)):
                raise WrongResultError(f"{key} differs")
            if (array.unsafe_buffer_pointer() == value.data_ptr()) != shared:
                raise WrongResultError(f"{key} {'was copied' if shared else 'aliases the module'}")
        return shared

    return check


def _check_views(module: torch.nn.Module) -> Callable[[nnx.Module], bool]:
    return _check_flax(module, shared=True)
