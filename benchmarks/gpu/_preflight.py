"""What is there and what is missing, before the first second of a GPU is spent. Imports nothing but Python.

torch and JAX are asked in a process of their own, so that one that crashes at its import does no harm.
"""

import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass

__all__ = ["Found", "look"]

# Package -> what lacks without it; the first ones stop the run.
_NEEDED = {"torch": "", "jax": "", "jaxlib": "", "numpy": ""}
_OPTIONAL = {
    "flax": "the suites weights and wrap, the link, the flagship",
    "optax": "the flagship",
    "pytest": "all tests",
    "hypothesis": "the tests of the exchange",
    "typer": "doctor",
    "rich": "doctor and the flagship",
    "safetensors": "reading and writing checkpoints; the flagship's is read without it",
    "pillow": "the flagship",
    "foolbox": "real images for the flagship; random ones are taken",
    "matplotlib": "the pictures; `python -m benchmarks report` draws them elsewhere",
}
_TOOLS = {
    "nvidia-smi": "the state of the card",
    "compute-sanitizer": "the check of memory and order by the tool",
}

_ASK = """
import json
answer = {"gpus": {}, "why": {}}
try:
    import torch
    if torch.cuda.is_available():
        answer["gpus"]["torch"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    else:
        built = torch.version.cuda or "no"
        answer["why"]["torch"] = f"torch {torch.__version__} sees no CUDA device (it was built with {built} CUDA)"
except Exception as err:
    answer["why"]["torch"] = f"torch cannot be asked: {type(err).__name__}: {err}"
try:
    import jax
    answer["gpus"]["jax"] = [str(device) for device in jax.devices("gpu")]
except Exception as err:
    answer["why"]["jax"] = f"JAX sees no CUDA device: {type(err).__name__}: {err}"
print("ANSWER" + json.dumps(answer))
"""


@dataclass(frozen=True)
class Found:
    """What this machine has."""

    python: str
    versions: dict[str, str]
    missing: dict[str, str]
    """What is not there -> what is skipped for that."""
    gpus: dict[str, list[str]]
    """Framework -> the GPUs it sees."""
    card: str
    """What nvidia-smi says of the driver and the cards; empty without it."""
    blockers: tuple[str, ...]
    """Why nothing can run; empty if it can."""

    def document(self) -> dict[str, object]:
        """For a JSON file."""
        return asdict(self)


def look(environment: Mapping[str, str], *, rehearse: bool, seconds: float = 90) -> Found:
    """See what is installed and which GPUs torch and JAX see.

    Args:
        environment: For the process that asks them.
        rehearse: The CPU plays the GPU, so that none is needed.
        seconds: How long they may take to answer.
    """
    versions, missing, blockers = {}, {}, []
    for name, lacks in (_NEEDED | _OPTIONAL).items():
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing[name] = lacks
            if name in _NEEDED:
                blockers.append(f"{name} is not installed in {sys.executable}")
    missing |= {tool: lacks for tool, lacks in _TOOLS.items() if shutil.which(tool) is None}
    if sys.version_info < (3, 11):  # noqa: UP036 (this may be run by any Python)
        blockers.append(f"Python {platform.python_version()} is too old; 3.11 is needed")
    gpus: dict[str, list[str]] = {}
    if not blockers and not rehearse:
        gpus, why = _ask(environment, seconds)
        blockers += why
    return Found(platform.python_version(), versions, missing, gpus, _card(), tuple(blockers))


def _card() -> str:
    asked = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return " ".join(done.stdout.split()) if done.returncode == 0 else ""


def _ask(environment: Mapping[str, str], seconds: float) -> tuple[dict[str, list[str]], list[str]]:
    try:
        done = subprocess.run(
            [sys.executable, "-c", _ASK],
            env=dict(environment),
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {}, [f"torch and JAX did not answer within {seconds:g} s"]
    for line in done.stdout.splitlines():
        if line.startswith("ANSWER"):
            answer = json.loads(line.removeprefix("ANSWER"))
            return answer["gpus"], list(answer["why"].values())
    said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
    return {}, [f"the process that asks torch and JAX ended with status {done.returncode}, and said: {said}"]
