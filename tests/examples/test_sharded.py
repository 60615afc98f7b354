"""The example of sharded models: one command, and every check of it holds in every process."""

import pytest

from examples.sharded import __main__ as example


@pytest.mark.slow
@pytest.mark.xdist_group("jobs")
def test_a_sharded_model_trains_in_torch_in_jax_and_in_torch_again(capfd: pytest.CaptureFixture[str]) -> None:
    assert example.main(["--steps", "25"]) == 0
    said = capfd.readouterr().out
    assert "JAX computes what torch computed" in said
    assert "torch computes what JAX computed" in said
    assert "JAX computes what torch saved" in said
    losses = [line.split("loss ")[1].split(" -> ") for line in said.splitlines() if "loss" in line]
    first, last = float(losses[0][0]), float(losses[-1][1])
    assert len(losses) == 3
    assert last < 0.75 * first
