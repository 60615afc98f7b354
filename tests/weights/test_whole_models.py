"""Whole models, written by hand in three ways: the same outputs, and the same bits when the weights come back."""

from functools import partial

import flax.linen as ln
import jax
import jax.numpy as jnp
import pytest
import torch
from flax import nnx
from torch import Tensor, nn

from examples.cifar10.networks import NETWORKS, Network
from tests.weights.transformers import HEADS, WIDE, WIDTH, LinenStack, NnxStack
from tests.weights.twins import as_is, assert_twins, draw
from torchjax_bridge.weights import layers, plan

IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
WORDS, FEATURES, HIDDEN, CLASSES = 10, 6, 4, 3


# --- a multilayer perceptron ---------------------------------------------------------------------------


class LinenMlp(ln.Module):
    @ln.compact
    def __call__(self, x):
        for width in (7, 6):
            x = ln.sigmoid(ln.Dense(width)(x))
        return ln.Dense(2)(x)


def nnx_mlp(rngs: nnx.Rngs) -> nnx.Module:
    return nnx.Sequential(
        nnx.Linear(5, 7, rngs=rngs),
        nnx.sigmoid,
        nnx.Linear(7, 6, rngs=rngs),
        nnx.sigmoid,
        nnx.Linear(6, 2, rngs=rngs),
    )


@pytest.mark.parametrize("flax", [LinenMlp(), nnx_mlp], ids=["linen", "nnx"])
def test_a_perceptron_with_sigmoids(flax) -> None:
    module = nn.Sequential(nn.Linear(5, 7), nn.Sigmoid(), nn.Linear(7, 6), nn.Sigmoid(), nn.Linear(6, 2))
    assert_twins(module, flax, draw(4, 5), within=5e-7, axes=as_is)


# --- convolutional networks ----------------------------------------------------------------------------


@pytest.mark.parametrize("flavour", ["linen", "nnx"])
@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.name)
def test_a_small_convolutional_network_and_a_resnet_of_twenty_layers(network: Network, flavour: str) -> None:
    module = network.make_torch()
    flax = (
        network.make_linen() if flavour == "linen" else lambda rngs: evaluating(network.make_nnx(rngs=rngs))
    )
    assert_twins(module, flax, draw(2, 3, 32, 32), within=1e-5, rules=network.rules)


def evaluating(module: nnx.Module) -> nnx.Module:
    module.eval()
    return module


# --- recurrent networks --------------------------------------------------------------------------------


class Tagger(nn.Module):
    """A label for every word, from both sides of it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, FEATURES, padding_idx=0)
        self.lstm = nn.LSTM(FEATURES, HIDDEN, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(2 * HIDDEN, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(ids))[0])


class LinenTagger(ln.Module):
    """Under automatic names."""

    @ln.compact
    def __call__(self, ids):
        x = ln.Embed(WORDS, FEATURES)(ids)
        for _ in range(2):
            forward, backward = ln.OptimizedLSTMCell(HIDDEN), ln.OptimizedLSTMCell(HIDDEN)
            x = ln.Bidirectional(ln.RNN(forward), ln.RNN(backward))(x)
        return ln.Dense(CLASSES)(x)


class NnxTagger(nnx.Module):
    """Under torch's names."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        def direction(features: int) -> nnx.Module:
            return nnx.RNN(nnx.LSTMCell(features, HIDDEN, rngs=rngs))

        self.embedding = nnx.Embed(WORDS, FEATURES, rngs=rngs)
        self.lstm = nnx.List(
            [nnx.Bidirectional(direction(size), direction(size)) for size in (FEATURES, 2 * HIDDEN)]
        )
        self.head = nnx.Linear(2 * HIDDEN, CLASSES, rngs=rngs)

    def __call__(self, ids):
        x = self.embedding(ids)
        for layer in self.lstm:
            x = layer(x)
        return self.head(x)


@pytest.mark.parametrize("flax", [LinenTagger(), NnxTagger], ids=["linen", "nnx"])
def test_an_lstm_tagger(flax) -> None:
    assert_twins(Tagger(), flax, IDS, within=5e-7, axes=as_is)


class Classifier(nn.Module):
    """One label for a sequence, from the last state."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, FEATURES)
        self.gru = nn.GRU(FEATURES, HIDDEN, batch_first=True)
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        _, last = self.gru(self.embedding(ids))
        return self.head(self.norm(last[-1]))


class LinenClassifier(ln.Module):
    def setup(self) -> None:
        self.embedding = ln.Embed(WORDS, FEATURES)
        self.gru = ln.RNN(ln.GRUCell(HIDDEN), return_carry=True)
        self.norm = ln.LayerNorm(epsilon=1e-5, use_fast_variance=False)
        self.head = ln.Dense(CLASSES)

    def __call__(self, ids):
        last, _ = self.gru(self.embedding(ids))
        return self.head(self.norm(last))


class NnxClassifier(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embedding = nnx.Embed(WORDS, FEATURES, rngs=rngs)
        self.gru = nnx.RNN(layers.nnx.GRUCell(FEATURES, HIDDEN, rngs=rngs), return_carry=True)
        self.norm = nnx.LayerNorm(HIDDEN, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
        self.head = nnx.Linear(HIDDEN, CLASSES, rngs=rngs)

    def __call__(self, ids):
        last, _ = self.gru(self.embedding(ids))
        return self.head(self.norm(last))


@pytest.mark.parametrize("flax", [LinenClassifier(), NnxClassifier], ids=["linen", "nnx"])
def test_a_gru_classifier(flax) -> None:
    assert_twins(Classifier(), flax, IDS, within=1e-6, axes=as_is)


# --- transformers --------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Words with learned positions, torch's own encoder, the mean over the words."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.positions = nn.Parameter(torch.zeros(1, 5, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, WIDE, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.words(ids) + self.positions).mean(1))


class LinenEncoder(ln.Module):
    def setup(self) -> None:
        self.words = ln.Embed(WORDS, WIDTH)
        self.positions = self.param("positions", ln.initializers.zeros, (1, 5, WIDTH))
        self.encoder = LinenStack()
        self.head = ln.Dense(CLASSES)

    def __call__(self, ids):
        return self.head(self.encoder(self.words(ids) + self.positions).mean(1))


class NnxEncoder(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.words = nnx.Embed(WORDS, WIDTH, rngs=rngs)
        self.positions = nnx.Param(jnp.zeros((1, 5, WIDTH)))
        self.encoder = NnxStack(rngs)
        self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, ids):
        return self.head(self.encoder(self.words(ids) + self.positions[...]).mean(1))


@pytest.mark.parametrize("flax", [LinenEncoder(), NnxEncoder], ids=["linen", "nnx"])
def test_a_transformer_encoder(flax) -> None:
    assert_twins(Encoder(), flax, IDS, within=4e-6, axes=as_is)


class VitBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, eps=1e-6), nn.LayerNorm(WIDTH, eps=1e-6)
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDE), nn.GELU(), nn.Linear(WIDE, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Vit(nn.Module):
    """A vision transformer on 8x8 images in patches of 4x4."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, WIDTH))
        self.patch_embed = nn.Conv2d(3, WIDTH, 4, stride=4)
        self.blocks = nn.Sequential(VitBlock(), VitBlock())
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


class LinenVitBlock(ln.Module):
    def setup(self) -> None:
        self.norm1, self.norm2 = ln.LayerNorm(), ln.LayerNorm()  # whose epsilon is 1e-6 as well
        self.attn = ln.MultiHeadDotProductAttention(HEADS)
        gelu = lambda x: ln.gelu(x, approximate=False)  # noqa: E731
        self.mlp = ln.Sequential([ln.Dense(WIDE), gelu, ln.Dense(WIDTH)])

    def __call__(self, x):
        y = self.norm1(x)
        x = x + self.attn(y, y)
        return x + self.mlp(self.norm2(x))


class LinenVit(ln.Module):
    def setup(self) -> None:
        self.cls_token = self.param("cls_token", ln.initializers.zeros, (1, 1, WIDTH))
        self.pos_embed = self.param("pos_embed", ln.initializers.zeros, (1, 5, WIDTH))
        self.patch_embed = ln.Conv(WIDTH, (4, 4), strides=(4, 4), padding="VALID")
        self.blocks = [LinenVitBlock() for _ in range(2)]
        self.norm, self.head = ln.LayerNorm(), ln.Dense(CLASSES)

    def __call__(self, x):
        x = self.patch_embed(x).reshape(len(x), -1, WIDTH)
        x = jnp.concatenate([jnp.tile(self.cls_token, (len(x), 1, 1)), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class NnxVitBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm1, self.norm2 = (nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2))
        self.attn = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        gelu = partial(nnx.gelu, approximate=False)
        self.mlp = nnx.Sequential(
            nnx.Linear(WIDTH, WIDE, rngs=rngs), gelu, nnx.Linear(WIDE, WIDTH, rngs=rngs)
        )

    def __call__(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class NnxVit(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.cls_token = nnx.Param(jnp.zeros((1, 1, WIDTH)))
        self.pos_embed = nnx.Param(jnp.zeros((1, 5, WIDTH)))
        self.patch_embed = nnx.Conv(3, WIDTH, (4, 4), strides=(4, 4), padding="VALID", rngs=rngs)
        self.blocks = nnx.List([NnxVitBlock(rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, x):
        x = self.patch_embed(x).reshape(len(x), -1, WIDTH)
        x = jnp.concatenate([jnp.tile(self.cls_token[...], (len(x), 1, 1)), x], 1) + self.pos_embed[...]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


@pytest.mark.parametrize("flax", [LinenVit(), NnxVit], ids=["linen", "nnx"])
def test_a_vision_transformer(flax) -> None:
    assert_twins(Vit(), flax, draw(2, 3, 8, 8), within=4e-6)


# --- a decoder with tied embeddings --------------------------------------------------------------------


class GptBlock(nn.Module):
    """Causal attention with one matrix for queries, keys and values, as in GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(WIDTH, 3 * WIDTH), "c_proj": nn.Linear(WIDTH, WIDTH)})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(WIDTH, WIDE), "c_proj": nn.Linear(WIDE, WIDTH)})

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        packed = self.attn["c_attn"](self.ln_1(x)).view(batch, length, 3, HEADS, -1)
        q, k, v = packed.permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn["c_proj"](y.transpose(1, 2).reshape(x.shape))
        y = nn.functional.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh")
        return x + self.mlp["c_proj"](y)


class Gpt(nn.Module):
    """A language model that reads and writes words with one table."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(WORDS, WIDTH), nn.Embedding(5, WIDTH)
        self.h = nn.ModuleList([GptBlock(), GptBlock()])
        self.ln_f = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, WORDS, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


def causal(packed: jax.Array) -> jax.Array:
    batch, length, width = packed.shape
    q, k, v = jnp.moveaxis(packed.reshape(batch, length, 3, HEADS, -1), 2, 0)
    return jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(batch, length, width // 3)


class Scope(ln.Module):
    """Dense layers under names."""

    sizes: dict[str, int]

    def setup(self) -> None:
        for name, size in self.sizes.items():
            setattr(self, name, ln.Dense(size))

    def __call__(self, x, name):
        return getattr(self, name)(x)


class LinenGptBlock(ln.Module):
    def setup(self) -> None:
        self.ln_1, self.ln_2 = ln.LayerNorm(epsilon=1e-5), ln.LayerNorm(epsilon=1e-5)
        self.attn = Scope({"c_attn": 3 * WIDTH, "c_proj": WIDTH})
        self.mlp = Scope({"c_fc": WIDE, "c_proj": WIDTH})

    def __call__(self, x):
        x = x + self.attn(causal(self.attn(self.ln_1(x), "c_attn")), "c_proj")
        return x + self.mlp(ln.gelu(self.mlp(self.ln_2(x), "c_fc")), "c_proj")


class LinenGpt(ln.Module):
    def setup(self) -> None:
        self.wte, self.wpe = ln.Embed(WORDS, WIDTH), ln.Embed(5, WIDTH)
        self.h = [LinenGptBlock() for _ in range(2)]
        self.ln_f = ln.LayerNorm(epsilon=1e-5)

    def __call__(self, ids):
        x = self.wte(ids) + self.wpe(jnp.arange(ids.shape[1]))
        for block in self.h:
            x = block(x)
        return self.wte.attend(self.ln_f(x))


class NnxGptBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.ln_1, self.ln_2 = (nnx.LayerNorm(WIDTH, epsilon=1e-5, rngs=rngs) for _ in range(2))
        attn, mlp = {"c_attn": (WIDTH, 3 * WIDTH), "c_proj": (WIDTH, WIDTH)}, {"c_fc": (WIDTH, WIDE)}
        mlp["c_proj"] = (WIDE, WIDTH)
        self.attn, self.mlp = (
            nnx.Dict({name: nnx.Linear(*sizes, rngs=rngs) for name, sizes in part.items()})
            for part in (attn, mlp)
        )

    def __call__(self, x):
        x = x + self.attn["c_proj"](causal(self.attn["c_attn"](self.ln_1(x))))
        return x + self.mlp["c_proj"](nnx.gelu(self.mlp["c_fc"](self.ln_2(x))))


class NnxGpt(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.wte, self.wpe = nnx.Embed(WORDS, WIDTH, rngs=rngs), nnx.Embed(5, WIDTH, rngs=rngs)
        self.h = nnx.List([NnxGptBlock(rngs) for _ in range(2)])
        self.ln_f = nnx.LayerNorm(WIDTH, epsilon=1e-5, rngs=rngs)

    def __call__(self, ids):
        x = self.wte(ids) + self.wpe(jnp.arange(ids.shape[1]))
        for block in self.h:
            x = block(x)
        return self.wte.attend(self.ln_f(x))


@pytest.mark.parametrize("flax", [LinenGpt(), NnxGpt], ids=["linen", "nnx"])
def test_a_decoder_that_reads_and_writes_with_one_table(flax) -> None:
    module = Gpt()
    # Bare keys leave the square c_proj in doubt where linen's names tell no class.
    filled = assert_twins(module, flax, IDS, within=4e-6, axes=as_is, bare=not isinstance(flax, ln.Module))
    assert plan(module, filled).ties == (("lm_head.weight", "wte.weight"),)
