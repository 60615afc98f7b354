"""The example of weight sync: equal rewards, one trace, no compilation, flat memory, and a policy that learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples import weight_sync


def test_the_environment_moves_a_point_and_pays_for_nearness() -> None:
    observation, _ = weight_sync.reset(jax.random.key(0))
    assert observation.shape == (2,)
    still = weight_sync.State(jnp.float32(0.5), jnp.float32(0.0))
    _, moved, reward = weight_sync.step(still, jnp.int32(2))
    assert float(moved.velocity) == pytest.approx(0.1)
    assert float(moved.position) == pytest.approx(0.51)
    assert float(reward) == pytest.approx(-(0.51**2))
    assert float(weight_sync.step(still, jnp.int32(1))[1].position) == 0.5


def test_a_linked_run_is_a_converted_run_to_the_bit_and_traces_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert weight_sync.main(["--rounds", "12"]) == 0
    said = capsys.readouterr()
    assert "equal to the bit, in 12 rounds" in said.out
    assert "traced    1" in said.out
    assert said.err == ""  # no bar where stderr is no terminal


def test_the_comparison_sees_a_twin_that_is_not_refreshed() -> None:
    def stale(policy: object) -> object:
        refresh = weight_sync.linked(policy)  # type: ignore[arg-type]
        twin = refresh()
        return lambda: twin

    runs = [weight_sync.train(3, twin_of, lambda _: None) for twin_of in (weight_sync.linked, stale)]  # type: ignore[list-item]
    assert runs[0].rewards[0] == runs[1].rewards[0]
    assert runs[0].rewards[2] != runs[1].rewards[2]


@pytest.mark.slow
def test_the_policy_learns_in_200_rounds(capsys: pytest.CaptureFixture[str]) -> None:
    assert weight_sync.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    first, last = (float(line.split()[-1]) for line in lines[:2])
    assert last > first / 2
    assert np.isfinite(last)
