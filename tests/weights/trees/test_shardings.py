"""The arrays of a result lie where the template has them, bit for bit; on four CPU devices, in another process."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

WORKER = pathlib.Path(__file__).with_name("shardings_worker.py")
CASES = re.findall(r"^def (\w+)\(\) -> None:$", WORKER.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.fixture(scope="module")
def said() -> str:
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }
    done = subprocess.run(
        [sys.executable, str(WORKER)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
        check=False,
    )
    return done.stdout + done.stderr


@pytest.mark.every(3)
@pytest.mark.parametrize("case", CASES)
def test_shardings_of_the_template(case: str, said: str) -> None:
    assert f"{case}: holds" in said, said
