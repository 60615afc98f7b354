"""An nn.Module as a pure JAX function of its variables, under jit, grad and vmap, and through training."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from examples.cifar10.torch_nets import Net, ResNet20
from tests.marking import slow_but
from torchjax_bridge import as_jax_module, errors

KEY = jax.random.key(0)


def rand(*shape):
    return torch.from_numpy(np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x).relu())


class Buffers(nn.Module):
    """One buffer that is read, one that is replaced rather than written in place."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(3, 3)
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0]))
        self.register_buffer("count", torch.tensor(0))

    def forward(self, x):
        if self.training:
            self.count = self.count + 1
        return self.lin(x) * self.scale


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Bilinear(3, 3, 2)

    def forward(self, x, y):
        return self.mix(x, y)


class DictOut(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(3, 2)

    def forward(self, x):
        return {"logits": self.lin(x), "best": self.lin(x).argmax(-1)}


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 5, batch_first=True)

    def forward(self, x):
        return self.lstm(x)[0]


def frozen():
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    net[0].requires_grad_(False)
    return net


MODULES = {
    "linear": (lambda: nn.Linear(3, 2), [rand(4, 3)]),
    "frozen": (frozen, [rand(4, 3)]),
    "batch norm": (lambda: nn.BatchNorm1d(3), [rand(4, 3)]),
    "conv and batch norm": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        [rand(2, 3, 6, 6)],
    ),
    "embedding": (lambda: nn.Embedding(7, 3), [torch.tensor([1, 5, 2], dtype=torch.int32)]),
    "tied": (Tied, [rand(4, 3)]),
    "buffers": (Buffers, [rand(4, 3)]),
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), [rand(2, 5, 8)]),
    "lstm": (Recurrent, [rand(2, 4, 3)]),
    "dropout": (lambda: nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)), [rand(4, 3)]),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(3, 2)), [rand(4, 3)]),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Linear(3, 2)), [rand(4, 3)]),
    "two inputs": (TwoInputs, [rand(4, 3), rand(4, 3)]),
    "dict out": (DictOut, [rand(4, 3)]),
}
USUAL = ("linear", "conv and batch norm", "embedding", "tied", "lstm", "dropout", "weight norm")
DRAWS = ("encoder", "dropout")


def to_jnp(tensors):
    return [jnp.asarray(t.detach().numpy()) for t in tensors]


def floats(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]


def close(a, b, atol=1e-5):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=atol, rtol=1e-4)


@pytest.fixture(params=slow_but(USUAL, MODULES))
def case(request):
    torch.manual_seed(0)
    make, inputs = MODULES[request.param]
    module = make().eval()
    apply, variables = as_jax_module(module)
    return request.param, module, inputs, apply, variables


@pytest.mark.every(3)
def test_every_kind_of_module_under_jit_grad_and_vmap(case):
    _, module, inputs, apply, variables = case
    arrays = to_jnp(inputs)
    for ours, theirs in zip(
        jax.tree.leaves(jax.jit(apply)(variables, *arrays)), jax.tree.leaves(module(*inputs)), strict=True
    ):
        close(ours, theirs.detach())

    def loss(params, *args):
        return sum((leaf**2).sum() for leaf in floats(apply({**variables, "params": params}, *args)))

    slopes = jax.jit(jax.grad(loss))(variables["params"], *arrays)
    module.requires_grad_(True)
    outputs = jax.tree.leaves(module(*inputs))
    sum((leaf**2).sum() for leaf in outputs if leaf.is_floating_point()).backward()
    assert slopes.keys() == dict(module.named_parameters()).keys()
    for name, parameter in module.named_parameters():
        close(slopes[name], parameter.grad, atol=1e-4)

    lanes = [jnp.stack([a, a[::-1]]) for a in arrays]
    batched = jax.jit(jax.vmap(jax.grad(loss), (None,) + (0,) * len(lanes)))(variables["params"], *lanes)
    turned = jax.grad(loss)(variables["params"], *[a[::-1] for a in arrays])
    for name in slopes:
        close(batched[name][0], slopes[name], atol=1e-4)
        close(batched[name][1], turned[name], atol=1e-4)


@pytest.mark.every(3)
def test_train_mode_returns_new_buffers_and_leaves_the_module(case):
    name, module, inputs, apply, variables = case
    before = {k: v.clone() for k, v in module.state_dict().items()}

    def loss(params):
        out, buffers = apply({**variables, "params": params}, *to_jnp(inputs), train=True, key=KEY)
        return sum((leaf**2).sum() for leaf in floats(out)), (out, buffers)

    (_, (out, buffers)), _ = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
    plain, plain_buffers = jax.jit(lambda v: apply(v, *to_jnp(inputs), train=True, key=KEY))(variables)
    assert not module.training
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    module.train()
    expected = module(*inputs)
    assert buffers.keys() == dict(module.named_buffers()).keys()
    for key, buffer in module.named_buffers():
        close(buffers[key], buffer)
        close(plain_buffers[key], buffer)
        assert buffers[key].dtype == variables["buffers"][key].dtype
    for a, b, c in zip(*map(jax.tree.leaves, (out, plain, expected)), strict=True):
        close(a, b)
        if name not in DRAWS:
            close(a, c.detach())


def test_variables_have_torch_s_names_and_are_copies():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    _, variables = as_jax_module(module)
    assert set(variables) == {"params", "buffers"}
    assert set(variables["params"]) | set(variables["buffers"]) == set(module.state_dict())
    with torch.no_grad():
        module[0].weight.zero_()
    assert (variables["params"]["0.weight"] != 0).any()


def test_tied_parameters_are_one_variable():
    _, variables = as_jax_module(Tied())
    assert set(variables["params"]) == {"a.weight", "a.bias", "b.bias"}


def test_missing_and_unknown_variables_are_named_together():
    apply, variables = as_jax_module(nn.Linear(3, 2))
    wrong = {"params": {"weight": variables["params"]["weight"], "wieght": 0, "biass": 0}}
    with pytest.raises(errors.ArgumentError, match=r"missing params 'bias'.*'wieght'.*'biass'"):
        apply(wrong, jnp.ones((1, 3)))
    assert apply({"params": variables["params"]}, jnp.ones((1, 3))).shape == (1, 2)


def test_keyword_arguments_reach_forward():
    class Scaled(nn.Module):
        def forward(self, x, *, scale, mode="up"):
            return x * scale if mode == "up" else x / scale

    apply, variables = as_jax_module(Scaled())
    close(apply(variables, jnp.ones(2), scale=jnp.float32(3)), [3, 3])
    close(apply(variables, jnp.ones(2), scale=2.0, mode="down"), [0.5, 0.5])


def test_eval_is_the_default_whatever_mode_the_module_is_in():
    module = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).train()
    apply, variables = as_jax_module(module)
    x = rand(4, 3)
    close(apply(variables, *to_jnp([x])), module.eval()(x).detach())
    with pytest.raises(errors.TransformError, match="key="):
        apply(variables, *to_jnp([x]), train=True)


def test_vmap_over_parameters_is_an_ensemble():
    apply, variables = as_jax_module(nn.Linear(3, 2))
    many = jax.tree.map(lambda v: jnp.stack([v, 2 * v]), variables)
    x = jnp.ones((4, 3))
    out = jax.vmap(apply, (0, None))(many, x)
    close(out[1], apply(jax.tree.map(lambda v: 2 * v, variables), x))


@pytest.mark.slow
def test_hessian_of_attention_where_fused_kernels_have_no_second_derivative():
    torch.manual_seed(0)
    apply, variables = as_jax_module(nn.TransformerEncoderLayer(4, 2, 4, batch_first=True, activation="gelu"))
    x = jnp.asarray(rand(1, 2, 4).numpy())
    f = lambda t: (apply(variables, x * t) ** 2 * x).sum()  # noqa: E731
    slope = jax.grad(f)
    numeric = (slope(1.01) - slope(0.99)) / 0.02
    close(jax.grad(slope)(1.0), numeric, atol=2e-2)


def test_eight_threads_apply_one_module_with_different_variables():
    module = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    apply, variables = as_jax_module(module)
    run = jax.jit(apply)
    x = jnp.asarray(rand(4, 16).numpy())
    versions = [jax.tree.map(lambda v, i=i: v * i, variables) for i in range(8)]
    expected = [np.asarray(run(v, x)) for v in versions]
    failures = []

    def work(i):
        failures.extend(i for _ in range(50) if not np.array_equal(run(versions[i], x), expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_module_that_caches_on_its_first_call_is_not_spoiled_by_the_trace():
    class Caching(nn.Module):
        table = None

        def forward(self, x):
            if self.table is None:
                self.table = torch.arange(3.0) + 1
            return x * self.table

    module = Caching()
    apply, variables = as_jax_module(module)
    for _ in range(2):
        close(jax.jit(apply)(variables, jnp.ones(3)), [1, 2, 3])
    close(jax.grad(lambda x: apply(variables, x).sum())(jnp.ones(3)), [1, 2, 3])
    assert module.table is None


@pytest.mark.slow
def test_resnet20_forward_gradient_and_statistics():
    torch.manual_seed(0)
    module = ResNet20()
    apply, variables = as_jax_module(module)
    x = rand(2, 3, 32, 32)

    def loss(params, x):
        logits, buffers = apply({**variables, "params": params}, x, train=True)
        return (logits**2).sum(), (logits, buffers)

    (_, (logits, buffers)), slopes = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        variables["params"], *to_jnp([x])
    )
    out = module(x)
    (out**2).sum().backward()
    close(logits, out.detach(), atol=1e-4)
    for name, parameter in module.named_parameters():
        scale = float(parameter.grad.abs().max()) + 1e-6
        close(slopes[name] / scale, parameter.grad / scale, atol=1e-3)
    for name, buffer in module.named_buffers():
        close(buffers[name], buffer, atol=1e-4)
    close(
        jax.jit(apply)({**variables, "buffers": buffers}, *to_jnp([x])), module.eval()(x).detach(), atol=1e-3
    )


def test_net_trains_from_a_jax_loop_with_the_losses_of_native_torch(shared):
    """20 steps of SGD with momentum on real images: optax on torch's gradients against torch.optim."""
    data = np.load(shared / "data" / "cifar10" / "train.npz")
    pixels = next(data[key] for key in data.files if data[key].ndim == 4)[:320]
    labels = next(data[key] for key in data.files if data[key].ndim == 1)[:320].astype(np.int64)
    pixels = (pixels if pixels.shape[1] == 3 else pixels.transpose(0, 3, 1, 2)).astype(np.float32) / 255 - 0.5
    batches = [(pixels[i : i + 16], labels[i : i + 16]) for i in range(0, 320, 16)]
    torch.manual_seed(0)
    module = Net()
    apply, variables = as_jax_module(module)
    optimizer = optax.sgd(0.05, momentum=0.9)

    @jax.jit
    def step(params, state, x, y):
        def loss(params):
            logits, _ = apply({"params": params}, x, train=True)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        value, slopes = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(slopes, state)
        return optax.apply_updates(params, updates), state, value

    params, state, ours = variables["params"], optimizer.init(variables["params"]), []
    for x, y in batches:
        params, state, value = step(params, state, x, y)
        ours.append(float(value))

    native, theirs = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9), []
    for x, y in batches:
        native.zero_grad()
        value = nn.functional.cross_entropy(module(torch.from_numpy(x)), torch.from_numpy(y))
        value.backward()
        native.step()
        theirs.append(value.item())
    assert len(ours) == 20
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    for name, parameter in module.named_parameters():
        close(params[name], parameter.detach(), atol=1e-4)


def test_a_parameter_of_another_shape_is_named_and_never_broadcast():
    apply, variables = as_jax_module(nn.Linear(3, 2))
    wrong = {"params": {**variables["params"], "bias": jnp.ones(1)}}
    with pytest.raises(errors.ArgumentError, match=r"'bias' of shape \(1,\) for \(2,\)"):
        apply(wrong, jnp.ones((1, 3)))


def test_what_is_no_module_or_no_variables_is_refused():
    with pytest.raises(errors.ArgumentError, match=r"got a function.*as_jax_function"):
        as_jax_module(lambda x: x)
    apply, _ = as_jax_module(nn.Linear(3, 2))
    with pytest.raises(errors.ArgumentError, match="first argument of apply"):
        apply(jnp.ones((1, 3)))


def test_a_module_that_depends_on_values_runs_with_output_shape():
    module = nn.BatchNorm1d(3, momentum=None)  # reads its own counter as a number
    x = rand(4, 3)
    plain, variables = as_jax_module(module)
    with pytest.raises(errors.OutputError, match=r"output_shape= to .* as_jax_module"):
        plain(variables, *to_jnp([x]), train=True)
    apply, variables = as_jax_module(module, output_shape=lambda x: x)
    step = jax.jit(lambda v, x: apply(v, x, train=True))
    _, buffers = step(variables, *to_jnp([x]))
    out, buffers = step({**variables, "buffers": buffers}, *to_jnp([2 * x]))
    module.train()
    module(x)
    close(out, module(2 * x).detach())
    for name, buffer in module.named_buffers():
        close(buffers[name], buffer)
    close(apply({**variables, "buffers": buffers}, *to_jnp([x])), module.eval()(x).detach())


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("grows", [False, True])
def test_a_call_that_adds_or_removes_buffers_is_refused(grows, train):
    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("old", torch.zeros(()))

        def forward(self, x):
            if grows:
                self.register_buffer("new", x.sum())
            else:
                self.old = None
            return x

    apply, variables = as_jax_module(Changing())
    with pytest.raises(errors.OutputError, match=r"buffers \(new\)" if grows else r"buffers \(old\)"):
        apply(variables, jnp.ones(2), train=train)


@pytest.mark.parametrize(
    "hold", [lambda t: t, lambda t: [t], lambda t: {"a": (t,)}], ids=["bare", "list", "dict"]
)
def test_a_tensor_in_a_plain_attribute_is_read_and_writing_to_it_is_refused(hold):
    class Holding(nn.Module):
        def __init__(self, write):
            super().__init__()
            self.held, self.write = hold(torch.ones(2)), write

        def forward(self, x):
            (tensor,) = jax.tree.leaves(self.held)
            return x + (tensor.add_(1) if self.write else tensor)

    apply, variables = as_jax_module(Holding(False))
    close(apply(variables, jnp.ones(2)), [2, 2])
    module = Holding(True)
    with pytest.raises(errors.TransformError, match="not one of its arguments"):
        as_jax_module(module)[0](variables, jnp.ones(2))
    assert jax.tree.leaves(module.held)[0].tolist() == [1, 1]


def test_a_gradient_that_torch_does_not_have_names_the_params_as_the_way_out():
    apply, variables = as_jax_module(nn.BatchNorm1d(3))
    x = jnp.ones((4, 3))
    with pytest.raises(errors.TransformError, match=r"running_mean.*in the params"):
        jax.grad(lambda v: apply(v, x).sum(), allow_int=True)(variables)
    assert jax.grad(lambda p: apply({**variables, "params": p}, x).sum())(variables["params"])["bias"][0] == 4


def test_forward_may_have_an_argument_named_variables():
    class Model(nn.Module):
        def forward(self, x, variables):
            return x * variables

    apply, variables = as_jax_module(Model())
    close(apply(variables, jnp.ones(2), variables=jnp.full(2, 3.0)), [3, 3])
