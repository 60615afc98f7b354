"""Fine-tuning in JAX: the loss falls, the seed decides, and the module is left in evaluation mode."""

import jax
import numpy as np
from flax import nnx

from examples.cifar10 import data, finetune, nnx_nets


def test_the_loss_falls_and_the_seed_decides() -> None:
    images = data.packaged()

    def tuned(seed: int) -> tuple[list[float], list[np.ndarray]]:
        net = nnx_nets.Net(rngs=nnx.Rngs(0))
        losses = finetune.finetune(net, images, steps=40, batch_size=10, lr=0.02, seed=seed)
        return losses, [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(net))]

    (losses, weights), (again, same), (others, _) = tuned(1), tuned(1), tuned(2)
    assert len(losses) == 40
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert again == losses
    assert all((one == other).all() for one, other in zip(weights, same, strict=True))
    assert others != losses


def test_running_statistics_move_while_training_and_rest_afterwards() -> None:
    images = data.packaged()
    block = nnx.Sequential(
        nnx_nets._batch_norm(3, rngs=nnx.Rngs(0)),
        lambda x: x.reshape(len(x), -1),
        nnx.Linear(3072, 10, rngs=nnx.Rngs(0)),
    )
    finetune.finetune(block, images, steps=1)
    norm = block.layers[0]
    moved = np.asarray(norm.mean[...])
    # momentum 0.9 counts the old mean, which was zero
    np.testing.assert_allclose(moved, 0.1 * images.normalised().mean((0, 1, 2)), rtol=1e-3)
    block(images.normalised())
    np.testing.assert_array_equal(norm.mean[...], moved)
