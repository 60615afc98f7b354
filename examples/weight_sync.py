"""Train a torch policy whose nnx twin acts: 200 rounds of acting in JAX, one AdamW step in torch, and a push.

Run ``python -m examples.weight_sync``. It compares every reward with a run that converts the policy afresh each
round, counts how often the acting code is traced and compiled, and measures the memory. It prints plain text, and
a progress bar on stderr if that is a terminal.

The task is small: a point on a line, moved by a force of -1, 0 or 1, earns more the nearer it stays to the origin.
The environment is pure functions in the manner of gymnax, so a whole batch of episodes is one compiled call. The
policy is trained by REINFORCE with the mean return as its baseline.
"""

import argparse
import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch import nn

from torchjax_bridge import link, to_flax, to_torch

EPISODES, STEPS, HIDDEN = 64, 32, 64


# --- the environment, in the manner of gymnax ---------------------------------------------------------


class State(NamedTuple):
    """A point on a line: its position and velocity, each of shape ``()``."""

    position: jax.Array
    velocity: jax.Array


def reset(key: jax.Array) -> tuple[jax.Array, State]:
    """The first observation, of shape ``(2,)``, and the first state."""
    position, velocity = jax.random.uniform(key, (2,), minval=-1.0, maxval=1.0)
    state = State(position, velocity)
    return jnp.stack(state), state


def step(state: State, action: jax.Array) -> tuple[jax.Array, State, jax.Array]:
    """Apply the force ``action - 1`` for a tenth of a second: the observation, the state and the reward."""
    velocity = 0.95 * state.velocity + 0.1 * (action - 1)
    state = State(jnp.clip(state.position + 0.1 * velocity, -2.0, 2.0), velocity)
    return jnp.stack(state), state, -jnp.square(state.position)


# --- the policy, twice ------------------------------------------------------------------------------------


def torch_policy() -> nn.Sequential:
    """Observations of shape ``(batch, 2)`` to logits of shape ``(batch, 3)``."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(2, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 3)
    )


def nnx_policy() -> nnx.Sequential:
    """The same in nnx."""
    rngs = nnx.Rngs(0)
    return nnx.Sequential(
        nnx.Linear(2, HIDDEN, rngs=rngs),
        jnp.tanh,
        nnx.Linear(HIDDEN, HIDDEN, rngs=rngs),
        jnp.tanh,
        nnx.Linear(HIDDEN, 3, rngs=rngs),
    )


class Batch(NamedTuple):
    """What a batch of episodes gives; each field has the axes ``(step, episode)``."""

    observations: jax.Array
    actions: jax.Array
    rewards: jax.Array


class Acting:
    """The compiled acting code, which counts how often it is traced and compiled."""

    def __init__(self) -> None:
        self.traces = 0
        self.act = nnx.jit(self._act)

    def _act(self, policy: nnx.Module, key: jax.Array) -> Batch:
        self.traces += 1
        start, *keys = jax.random.split(key, 1 + STEPS)
        observation, state = jax.vmap(reset)(jax.random.split(start, EPISODES))

        def one(carry: Any, key: jax.Array) -> tuple[Any, Batch]:
            observation, state = carry
            action = jax.random.categorical(key, policy(observation))
            following, state, reward = jax.vmap(step)(state, action)
            return (following, state), Batch(observation, action, reward)

        return jax.lax.scan(one, (observation, state), jnp.stack(keys))[1]


def learn(policy: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    """One step of REINFORCE in torch."""
    observations, actions, rewards = (to_torch(one, copy=True) for one in batch)
    returns = rewards.flip(0).cumsum(0).flip(0)
    advantages = returns - returns.mean(1, keepdim=True)
    advantages = advantages / (advantages.std() + 1e-6)
    chosen = policy(observations).log_softmax(-1).gather(-1, actions.long().unsqueeze(-1)).squeeze(-1)
    optimizer.zero_grad()
    (-(chosen * advantages).mean()).backward()
    optimizer.step()


# --- two runs ---------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What a run gives."""

    rewards: list[bytes]
    """The rewards of each round, as bytes, so that two runs are compared to the bit."""
    means: list[float]
    """The mean return of each round."""
    traces: int
    compilations: int
    """Compilations after the first round."""
    grown: int
    """Bytes by which the peak of memory rose after the first tenth of the rounds."""


def train(
    rounds: int, twin_of: Callable[[nn.Module], Callable[[], nnx.Module]], show: Callable[[int], None]
) -> Run:
    """Train for some rounds; ``twin_of`` gives what makes or refreshes the acting twin."""
    policy, acting = torch_policy(), Acting()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    refresh = twin_of(policy)
    compiled: list[str] = []

    def note(event: str, duration_secs: float, **_: Any) -> None:
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    result = Run([], [], 0, 0, 0)
    settled = 0
    try:
        for number in range(rounds):
            batch = acting.act(refresh(), jax.random.key(number))
            learn(policy, optimizer, batch)
            rewards = np.asarray(batch.rewards)
            result.rewards.append(rewards.tobytes())
            result.means.append(float(rewards.sum(0).mean()))
            if number == 0:
                compiled.clear()
            if number <= rounds // 10:
                settled = _peak()
            show(number + 1)
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    result.traces, result.compilations, result.grown = acting.traces, len(compiled), _peak() - settled
    return result


def linked(policy: nn.Module) -> Callable[[], nnx.Module]:
    """A twin that a link refreshes in place."""
    return link(policy, nnx_policy()).push


def converted(policy: nn.Module) -> Callable[[], nnx.Module]:
    """A twin that is made anew each time."""
    template = nnx_policy()
    return lambda: to_flax(policy, template)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _progress(label: str, rounds: int) -> Callable[[int], None]:
    """A progress bar in plain text, for terminals."""

    def show(done: int) -> None:
        if sys.stderr.isatty():
            filled = 30 * done // rounds
            bar = "#" * filled + "." * (30 - filled)
            print(f"\r{label} [{bar}] {done}/{rounds}", end="\n" if done == rounds else "", file=sys.stderr)

    return show


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the example; the exit code says whether every promise held."""
    parser = argparse.ArgumentParser(description="Sync the weights of a torch policy to its nnx twin.")
    parser.add_argument(
        "--rounds", type=int, default=200, help="rounds of acting, learning and pushing (200)"
    )
    rounds = parser.parse_args(arguments).rounds
    if rounds < 2:
        parser.error("--rounds must be at least 2")
    ours = train(rounds, linked, _progress("linked   ", rounds))
    theirs = train(rounds, converted, _progress("converted", rounds))
    equal = ours.rewards == theirs.rewards
    best = max(1, rounds // 10)
    print(f"mean return, first {best} rounds   {np.mean(ours.means[:best]):8.3f}")
    print(f"mean return, last {best} rounds    {np.mean(ours.means[-best:]):8.3f}")
    print(
        f"rewards as by new conversions  {'equal to the bit' if equal else 'DIFFERENT'}, in {rounds} rounds"
    )
    print(f"times the acting was traced    {ours.traces}")
    print(f"compilations after round 1     {ours.compilations}")
    print(f"memory grown after round {rounds // 10 + 1:<5} {ours.grown / 1e6:.1f} MB")
    flat = ours.grown < 32 << 20
    return 0 if equal and ours.traces == 1 and ours.compilations == 0 and flat else 1


if __name__ == "__main__":
    sys.exit(main())
