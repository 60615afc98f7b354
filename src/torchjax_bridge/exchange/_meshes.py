"""The mesh map: torch's ``DeviceMesh`` <-> JAX's ``Mesh``, over the same processes.

A dimension of the one is an axis of the other, in the same order. A rank is the JAX device of the process that has
this rank. Ranks tell each other their devices, once for each mesh: ids of devices do not follow from ranks. A
part of a mesh (``mesh["dp"]``) is a part of its whole mesh, never a mesh of its own: as that it would hold
other devices on every rank, and its arrays would have nothing to do with each other.

Refuses a job that JAX does not know of, and a process with several JAX devices. ``torch.distributed`` is used only
when one of these functions is called.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import torch
from jax.sharding import Mesh

from torchjax_bridge.errors import DeviceError

from ._devices import jax_device, torch_device

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "axes_of",
    "device_of_this_rank",
    "gather_from_ranks",
    "jax_mesh",
    "matching_axes",
    "ranks_of",
    "torch_mesh",
    "whole_mesh",
]

# Each is filled on all ranks at the same calls, and keeps what it has: a rank that had forgotten an entry
# would wait for the others to tell it again.
_jax_meshes: dict[Any, Mesh] = {}
_torch_meshes: dict[Any, Any] = {}


def jax_mesh(device_mesh: Any) -> Mesh:
    """The JAX mesh over the processes of a torch mesh.

    Args:
        device_mesh: A ``torch.distributed.device_mesh.DeviceMesh``; or a ``jax.sharding.Mesh``, returned as it is.

    Returns:
        A ``Mesh`` with an axis for each dimension, in the same order. Axes have the names of the dimensions,
        and are called ``dim_0``, ``dim_1``, ... where these have none. A part of a mesh gives the whole mesh.

    Raises:
        DeviceError: It is no mesh; its ranks do not ascend along an axis; ``jax.distributed`` was not initialized
            in every process; or a process has several JAX devices.

    The first call for a mesh is collective: every rank of the mesh must make it. Later calls are not. A rank is
    matched with the device of its process, whatever the order in which JAX counts processes.
    """
    if isinstance(device_mesh, Mesh):
        return device_mesh
    _check_device_mesh(device_mesh)
    whole = whole_mesh(device_mesh)
    if whole.get_coordinate() is None:
        rank = torch.distributed.get_rank()
        raise DeviceError(
            f"the mesh has the ranks {ranks_of(whole)}, and rank {rank} is none of them. Call it there only."
        )
    if whole not in _jax_meshes:
        _check_order(whole)
        found = gather_from_ranks(whole, _own_device_or_refusal(whole))
        refusals = [answer for answer in found.values() if isinstance(answer, str)]
        if refusals:
            raise DeviceError(refusals[0])
        by_id = {device.id: device for device in jax.devices(_backend(whole))}
        devices = [by_id.get(found[rank]) for rank in whole.mesh.flatten().tolist()]
        if None in devices or len(set(devices)) < len(devices):
            raise DeviceError(_no_job(len(devices), jax.process_count(_backend(whole))))
        names = whole.mesh_dim_names or tuple(f"dim_{place}" for place in range(whole.ndim))
        _jax_meshes[whole] = Mesh(_grid(devices, whole.shape), names)
        _torch_meshes.setdefault(_key(_jax_meshes[whole]), whole)
    return _jax_meshes[whole]


def torch_mesh(mesh: Any) -> "DeviceMesh":
    """The torch mesh over the processes of a JAX mesh.

    Args:
        mesh: A ``jax.sharding.Mesh`` with one device of each process; or a ``DeviceMesh``, returned as it is.

    Returns:
        A ``DeviceMesh`` with a dimension for each axis, of the same name and in the same order. It is the one that
        `jax_mesh` was called with, if ``mesh`` is its result.

    Raises:
        DeviceError: It is no mesh, ``torch.distributed`` is not initialized, a process has several of its
            devices, or these do not lie in the order of the ranks.

    The first call for a mesh is collective: every rank of the job must make it, because torch makes process groups.
    """
    if not isinstance(mesh, Mesh):
        _check_device_mesh(mesh)
        return mesh
    if _key(mesh) not in _torch_meshes:
        from torch.distributed.device_mesh import DeviceMesh

        if not torch.distributed.is_initialized():
            raise DeviceError(
                "torch has no processes for this mesh. Call torch.distributed.init_process_group first."
            )
        (kind,) = {torch_device(device).type for device in mesh.local_devices} or {"cpu"}
        answers: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(answers, [device.id for device in mesh.local_devices])
        rank_of = {own: rank for rank, owned in enumerate(answers) for own in owned}
        if any(len(owned) > 1 for owned in answers) or len(rank_of) < mesh.size:
            raise DeviceError(
                f"the mesh has {mesh.size} devices, {[len(owned) for owned in answers]} of which belong to "
                "torch's ranks; torch needs one of each rank. Give each process one JAX device, and call "
                "jax.distributed.initialize in each before the first JAX call."
            )
        ranks = np.array([rank_of[device.id] for device in mesh.devices.flat]).reshape(mesh.devices.shape)
        _check_ascending(ranks, f"the devices of {mesh}")
        made = DeviceMesh(kind, torch.from_numpy(ranks), mesh_dim_names=tuple(map(str, mesh.axis_names)))
        _torch_meshes[_key(mesh)] = made
        _jax_meshes.setdefault(made, mesh)
    return _torch_meshes[_key(mesh)]


def device_of_this_rank(device_mesh: "DeviceMesh") -> jax.Device:
    """The JAX device of this process in the mesh; the mesh has this rank."""
    whole = whole_mesh(device_mesh)
    return _device_of_rank(whole)[torch.distributed.get_rank()]


def ranks_of(device_mesh: "DeviceMesh") -> tuple[int, ...]:
    """The ranks of a torch mesh, in row-major order."""
    return tuple(device_mesh.mesh.flatten().tolist())


@lru_cache(maxsize=256)
def axes_of(device_mesh: "DeviceMesh", mesh: Mesh) -> tuple[tuple[int, ...], ...] | None:
    """For each dimension of a torch mesh the axes of a JAX mesh that it is, the slowest first.

    A dimension of several axes is a flattened one. The torch mesh may be a part of the JAX mesh: then some
    axes belong to no dimension. None if the devices lie otherwise.
    """
    _check_order(device_mesh)
    device_of_rank = _device_of_rank(whole_mesh(device_mesh))
    grid = _grid([device_of_rank[rank] for rank in ranks_of(device_mesh)], device_mesh.shape)
    axes = matching_axes(grid, mesh.devices)
    if axes is None:
        return None
    named = {name: place for place, name in enumerate(mesh.axis_names) if mesh.shape[name] == 1}
    names = device_mesh.mesh_dim_names or (None,) * grid.ndim
    return tuple(
        group if group or name not in named else (named[name],)
        for group, name in zip(axes, names, strict=True)
    )


def matching_axes(grid: np.ndarray, devices: np.ndarray) -> tuple[tuple[int, ...], ...] | None:
    """For each dimension of ``grid`` the axes of ``devices`` that it is, as `axes_of`."""
    if grid.shape == devices.shape and (grid == devices).all():
        return tuple((place,) for place in range(grid.ndim))
    start = np.argwhere(devices == grid.flat[0])
    for axes in _choices(grid.shape, devices.shape) if len(start) else ():
        chosen = list(itertools.chain(*axes))
        others = [axis for axis in range(devices.ndim) if axis not in chosen]
        here = [slice(at, at + 1) if axis in others else slice(None) for axis, at in enumerate(start[0])]
        part = devices[tuple(here)].transpose([*chosen, *others]).reshape(grid.shape)
        if (part == grid).all():
            return axes
    return None


def _choices(
    sizes: Sequence[int], of: Sequence[int], taken: tuple[int, ...] = ()
) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Every way to make up each size of axes of the sizes ``of``, each used at most once."""
    if not sizes:
        yield ()
        return
    free = [axis for axis in range(len(of)) if axis not in taken and of[axis] > 1]
    for count in range(len(free) + 1):
        for axes in itertools.permutations(free, count):
            if math.prod(of[axis] for axis in axes) == sizes[0]:
                for rest in _choices(sizes[1:], of, (*taken, *axes)):
                    yield (axes, *rest)


@lru_cache(maxsize=64)
def _device_of_rank(whole: "DeviceMesh") -> dict[int, jax.Device]:
    return dict(zip(ranks_of(whole), jax_mesh(whole).devices.flat, strict=True))


def whole_mesh(device_mesh: "DeviceMesh") -> "DeviceMesh":
    """The mesh that this one is a part of, or itself."""
    find = getattr(device_mesh, "_get_root_mesh", None)  # torch has no public name for it
    if find is not None:
        return find()
    if device_mesh.size() < torch.distributed.get_world_size():
        raise DeviceError(
            f"this torch does not say which mesh the ranks {ranks_of(device_mesh)} are a part of. Use a mesh of "
            "all ranks."
        )
    return device_mesh


def gather_from_ranks(whole: "DeviceMesh", answer: Any) -> dict[int, Any]:
    """The answers of all ranks of a mesh, by rank. Each dimension passes on what the last has gathered."""
    answers = {torch.distributed.get_rank(): answer}
    for dimension in range(whole.ndim):
        boxes: list[Any] = [None] * whole.size(dimension)
        if len(boxes) > 1:
            torch.distributed.all_gather_object(boxes, answers, group=whole.get_group(dimension))
            answers = {rank: one for box in boxes for rank, one in box.items()}
    return answers


def _check_order(device_mesh: "DeviceMesh") -> None:
    _check_ascending(device_mesh.mesh.numpy(), f"the ranks of {device_mesh}")


def _check_ascending(ranks: np.ndarray, whose: str) -> None:
    """Refuse ranks that do not ascend along every axis: torch itself does not agree on who holds which shard.

    Its offsets follow the mesh. Its collectives, and so ``distribute_tensor``, ``full_tensor`` and FSDP, follow
    the process group, which sorts its ranks.
    """
    if any((np.diff(ranks, axis=axis) < 0).any() for axis in range(ranks.ndim)):
        raise DeviceError(
            f"{whose} are {ranks.tolist()}, by rank. Along an axis they must ascend: torch's collectives sort "
            "them, so its shards would not lie where the mesh says. Make the mesh in the order of the ranks, as "
            "jax_mesh(device_mesh) does."
        )


def _own_device_or_refusal(whole: "DeviceMesh") -> int | str:
    """The id of this process's device, or why it has none. A refusal is told to the others, who would wait."""
    ranks, processes = torch.distributed.get_world_size(), jax.process_count(_backend(whole))
    if ranks != processes:
        return _no_job(ranks, processes)
    count = len(jax.local_devices(backend=_backend(whole)))
    if ranks > 1 and count > 1:
        return (
            f"this process has {count} JAX devices and one torch rank. Pass local_device_ids=[local_rank] to "
            "jax.distributed.initialize, or give it one device (jax_num_cpu_devices)."
        )
    try:
        return jax_device(whole.device_type).id
    except DeviceError as err:
        return str(err)


def _no_job(ranks: int, processes: int) -> str:
    return (
        f"torch has {ranks} processes, JAX {processes}. Call jax.distributed.initialize in each before the first "
        "JAX call."
    )


def _backend(whole: "DeviceMesh") -> str:
    return "cpu" if whole.device_type == "cpu" else "gpu"


def _grid(devices: Sequence[Any], shape: Sequence[int]) -> np.ndarray:
    grid = np.empty(len(devices), dtype=object)
    grid[:] = devices
    return grid.reshape(shape)


def _key(mesh: Mesh) -> tuple[Any, ...]:
    return tuple(device.id for device in mesh.devices.flat), mesh.devices.shape, mesh.axis_names


def _check_device_mesh(mesh: Any) -> None:
    if not torch.distributed.is_available() or not isinstance(mesh, torch.distributed.device_mesh.DeviceMesh):
        raise DeviceError(
            f"{mesh!r} is no mesh: pass a torch.distributed.device_mesh.DeviceMesh or a jax.sharding.Mesh."
        )
