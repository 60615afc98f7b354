"""One process of a job that torch and JAX share: runs every case, and writes what became of each.

``python worker.py RANK COUNT TORCH_PORT JAX_PORT FOLDER``.
"""

import json
import os
import pathlib
import sys
import traceback

import jax
import torch

NO_COLLECTIVES = 77


def main(rank: int, count: int, torch_port: str, jax_port: str, folder: pathlib.Path) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=torch_port)
    torch.set_num_threads(1)
    try:
        torch.distributed.init_process_group("gloo", rank=rank, world_size=count)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        # JAX counts the processes the other way round, so that nothing can take one number for the other.
        jax.distributed.initialize(
            f"127.0.0.1:{jax_port}",
            count,
            count - 1 - rank,
            initialization_timeout=60,
            heartbeat_timeout_seconds=20,
        )
        jax.devices()
    except (AttributeError, RuntimeError, ValueError) as err:
        sys.stderr.write(f"no collectives between processes: {err}\n")
        raise SystemExit(NO_COLLECTIVES) from err
    sys.path.insert(0, str(pathlib.Path(__file__).parent))
    from all_cases import cases

    results = {}
    for name, case in cases(count).items():
        try:
            case()
            results[name] = "passed"
        except BaseException:
            results[name] = traceback.format_exc()
            sys.stderr.write(results[name])
            break  # the others may wait for this rank
        sys.stderr.write(f"passed {name}\n")
    part = folder / f"{rank}.part"
    part.write_text(json.dumps(results))
    part.rename(folder / f"{rank}.json")


if __name__ == "__main__":
    rank, count, torch_port, jax_port, folder = sys.argv[1:]
    main(int(rank), int(count), torch_port, jax_port, pathlib.Path(folder))
