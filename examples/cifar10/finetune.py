"""Fine-tunes a converted network, with nnx and optax."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from . import terminal
from .data import Images


def finetune(
    model: nnx.Module, images: Images, *, steps: int, lr: float = 3e-3, batch_size: int = 64, seed: int = 0
) -> list[float]:
    """Train ``model`` in place on ``images`` with SGD and momentum, and leave it in evaluation mode.

    Args:
        model: Takes ``(N, 32, 32, 3)`` float32, returns ``(N, 10)`` logits.
        images: What to train on.
        steps: Gradient steps.
        lr: The learning rate.
        batch_size: Images per step, drawn without replacement; at most all of them.
        seed: The seed of the draws.

    Returns:
        The loss of each step.
    """
    pixels, labels = images.normalised(), images.labels.astype(np.int32)
    draws = np.random.default_rng(seed)
    optimizer = nnx.Optimizer(model, _sgd(lr), wrt=nnx.Param)
    # Weights from torch are committed to their device, new momenta are not. After the first step all are. So
    # without this the second step would compile again.
    (device,) = jax.tree.leaves(nnx.state(model))[0].devices()
    for part in (model, optimizer):
        nnx.update(part, jax.device_put(nnx.state(part), device))
    losses = []
    model.train()
    with terminal.progress() as bar:
        task = bar.add_task("fine-tuning in JAX", total=steps)
        for _ in range(steps):
            rows = draws.permutation(len(images))[:batch_size]
            losses.append(
                float(_step(model, optimizer, jnp.asarray(pixels[rows]), jnp.asarray(labels[rows])))
            )
            bar.update(task, advance=1, description=f"fine-tuning in JAX, loss {losses[-1]:.3f}")
    model.eval()
    return losses


@cache  # nnx.jit compiles again for each new transformation, so return the same one
def _sgd(lr: float) -> optax.GradientTransformation:
    return optax.sgd(lr, momentum=0.9)


@nnx.jit
def _step(model: nnx.Module, optimizer: nnx.Optimizer, pixels: jax.Array, labels: jax.Array) -> jax.Array:
    loss, gradients = nnx.value_and_grad(partial(_loss, pixels=pixels, labels=labels))(model)
    optimizer.update(model, gradients)
    return loss


def _loss(model: nnx.Module, pixels: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(model(pixels), labels))
