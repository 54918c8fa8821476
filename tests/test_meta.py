"""Meta-gradients of adapters against exact second-order autograd, and weights that come back bit for bit."""

import copy
import math

import pytest
import torch
from torch import nn

from gradvac_kernels import TaskGradients, meta

LANGUAGES = ("de", "fr", "hi")


class Adapted(nn.Module):
    """Shared layers with an adapter for each language in between."""

    def __init__(self, activation=torch.tanh):
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 3)
        self.unused = nn.Linear(2, 2)
        self.adapters = nn.ModuleDict({name: nn.Linear(6, 6) for name in LANGUAGES})
        self.activation = activation
        self.register_buffer("mix", torch.eye(6) + 0.25)

    def forward(self, x, language):
        hidden = self.activation(self.first(x)) @ self.mix
        return self.last(hidden + self.activation(self.adapters[language](hidden)))

    def theta(self):
        return [*self.first.parameters(), *self.last.parameters(), *self.unused.parameters()]

    def phi(self, language):
        return list(self.adapters[language].parameters())


def network(dtype=torch.float64, activation=torch.tanh):
    torch.manual_seed(0)
    return Adapted(activation).to(dtype)


def loss(model, language, part, dtype=torch.float64):
    """The scalar loss of a language's training or validation batch."""
    generator = torch.Generator().manual_seed(10 * LANGUAGES.index(language) + (part == "validation"))
    x, y = (torch.randn(8, n, generator=generator).to(dtype) for n in (5, 3))
    return (model(x, language) - y).square().mean()


def mean_validation_loss(model, dtype=torch.float64):
    return sum(loss(model, language, "validation", dtype) for language in LANGUAGES) / len(LANGUAGES)


def direction_of(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tensor.shape, generator=generator).to(tensor.dtype) for tensor in model.theta()]


def flat(tensors):
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def exact_mixed(model, direction, language="hi"):
    """grad_phi <grad_theta L, v> by differentiating twice."""
    first = torch.autograd.grad(
        loss(model, language, "train"), model.theta(), create_graph=True, allow_unused=True, materialize_grads=True
    )
    product = sum((gradient * v).sum() for gradient, v in zip(first, direction))
    return flat(torch.autograd.grad(product, model.phi(language)))


def exact_adapter_gradient(model, inner_lr, language="hi"):
    """Eq. 3 by differentiating through the step of the shared parameters."""
    names = {id(tensor): name for name, tensor in model.named_parameters()}
    first = torch.autograd.grad(
        loss(model, language, "train"), model.theta(), create_graph=True, allow_unused=True, materialize_grads=True
    )
    stepped = {names[id(t)]: t - inner_lr * gradient for t, gradient in zip(model.theta(), first)}

    def stepped_model(x, language):
        return torch.func.functional_call(model, stepped, (x, language))

    return flat(torch.autograd.grad(mean_validation_loss(stepped_model), model.phi(language)))


def relative_error(found, truth):
    return float((flat(found) - truth).norm() / truth.norm())


# --------------------------------------------------------------------------------------------- the second-order term


def test_the_error_falls_with_the_square_of_the_radius():
    """In float64, where rounding is far below: what is left is radius^2 / 6 of a derivative, and then radius^4."""
    model = network()
    direction = direction_of(model)
    truth = exact_mixed(model, direction)

    def found(radius):
        return meta.finite_difference(
            lambda: loss(model, "hi", "train"), model.theta(), model.phi("hi"), direction, radius=radius
        )

    coarse, fine = found(0.02), found(0.01)
    # tanh and its derivatives are of order 1, and so is their chain over a few layers
    assert relative_error(fine, truth) <= 0.01**2
    # the next term is a factor of radius^2 less
    assert relative_error(coarse, truth) / relative_error(fine, truth) == pytest.approx(4, rel=10 * 0.02**2)
    better = [(4 * a - b) / 3 for a, b in zip(fine, coarse)]  # without the term of radius^2
    assert relative_error(better, truth) <= 10 * 0.02**4


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float64, 2.0**-53), (torch.float32, 2.0**-24)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_only_rounding_is_left_where_the_loss_is_quadratic(dtype, unit, scale):
    """Without activations the loss is quadratic in the last layer: a central difference is exact."""
    exact, model = (network(kind, activation=lambda x: x) for kind in (torch.float64, dtype))
    model.load_state_dict(exact.state_dict())
    exact.load_state_dict(model.state_dict())
    direction = [None, None, *direction_of(exact)[2:4], None, None]
    direction = [None if v is None else scale * v for v in direction]
    truth = exact_mixed(exact, [torch.zeros_like(t) if v is None else v for t, v in zip(exact.theta(), direction)])
    found = meta.finite_difference(lambda: loss(model, "hi", "train", dtype), model.theta(), model.phi("hi"), direction)
    gradient = flat(torch.autograd.grad(loss(exact, "hi", "train"), exact.phi("hi")))
    length = math.sqrt(sum(float(v.square().sum()) for v in direction if v is not None))
    # Two gradients, each off by a handful of roundings (five operations deep, in random directions: about 3), and the
    # weights they are taken at, off by half a unit, are divided by 2 radius / |v|. For float32 about 1e-5.
    bound = 3 * unit * float(gradient.norm()) * length / 0.01 / float(truth.norm())
    assert relative_error(found, truth) <= bound
    assert all(tensor.dtype == dtype for tensor in found)


def test_a_direction_of_zero():
    model = network()
    for direction in ([torch.zeros_like(tensor) for tensor in model.theta()], [None] * 6):
        found = meta.finite_difference(lambda: loss(model, "hi", "train"), model.theta(), model.phi("hi"), direction)
        assert [tensor.shape for tensor in found] == [tensor.shape for tensor in model.phi("hi")]
        assert not flat(found).any()


def test_what_the_loss_does_not_use_is_zero():
    model = network()
    direction = direction_of(model)
    found = meta.finite_difference(
        lambda: loss(model, "hi", "train"), model.theta(), [*model.phi("hi"), *model.phi("de")], direction
    )
    assert flat(found[:2]).all()
    assert not flat(found[2:]).any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_direction_shows(value):
    model = network()
    direction = direction_of(model)
    direction[0][0, 0] = value
    found = meta.finite_difference(lambda: loss(model, "hi", "train"), model.theta(), model.phi("hi"), direction)
    assert not flat(found).isfinite().any()


# --------------------------------------------------------------------------------------------------- the meta-step


def meta_step(model, dtype=torch.float64, inner_lr=0.5, language="hi", **arguments):
    return meta.adapter_gradients(
        lambda: loss(model, language, "train", dtype),
        lambda: mean_validation_loss(model, dtype),
        model.theta(),
        model.phi(language),
        inner_lr=inner_lr,
        model=model,
        **arguments,
    )


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_adapter_s_gradient_is_that_through_the_step(language):
    model = network()
    found = meta_step(model, language=language)
    truth = exact_adapter_gradient(model, 0.5, language)
    assert relative_error(found.gradients, truth) <= 0.01**2  # as above; the second-order term is a part of it
    first_order = meta_step(model, inner_lr=0.0, language=language)
    assert relative_error(first_order.gradients, truth) > 0.05  # and it matters here
    direct = torch.autograd.grad(mean_validation_loss(model), model.phi(language))
    assert all(torch.equal(a, b) for a, b in zip(first_order.gradients, direct))
    assert float(found.train_loss) == float(loss(model, language, "train"))
    assert float(first_order.validation_loss) == float(mean_validation_loss(model))
    assert not found.train_loss.requires_grad


def test_steps_along_it_lower_the_validation_loss():
    model = network()
    start = float(meta_step(model).validation_loss)
    for _ in range(20):
        found = meta_step(model)
        with torch.no_grad():
            for parameter, gradient in zip(model.phi("hi"), found.gradients):
                parameter -= 0.1 * gradient
    assert float(meta_step(model).validation_loss) < start


# ------------------------------------------------------------------------------------------- weights, and what holds


def snapshot(model):
    """What must not change: bits, memory, types and gradients."""
    return [
        (tensor.data_ptr(), tensor.dtype, tensor.detach().clone().view(torch.uint8), tensor.grad, tensor._version)
        for tensor in (*model.parameters(), *model.buffers())
    ]


def unchanged(model, before):
    after = snapshot(model)
    return all(
        (a[:2], a[4]) == (b[:2], b[4]) and torch.equal(a[2], b[2]) and a[3] is b[3] for a, b in zip(before, after)
    )


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_come_back(dtype):
    model = network(dtype)
    model.first.weight.data[0, 0] = math.nan  # NaN has bits too
    model.first.weight.data[0, 1] = -0.0
    model.first.weight.grad = torch.ones_like(model.first.weight)
    before = snapshot(model)
    meta_step(model, torch.promote_types(dtype, torch.float32))
    assert unchanged(model, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", range(4))
def test_weights_come_back_after_an_exception(dtype, call):
    model, calls = network(dtype), []
    before = snapshot(model)
    runs_in = torch.promote_types(dtype, torch.float32)

    def evaluated(value):
        if len(calls) == call:
            raise KeyboardInterrupt
        calls.append(float(value))
        return value

    with pytest.raises(KeyboardInterrupt):
        meta.adapter_gradients(
            lambda: evaluated(loss(model, "hi", "train", runs_in)),
            lambda: evaluated(mean_validation_loss(model, runs_in)),
            model.theta(),
            model.phi("hi"),
            inner_lr=0.5,
            model=model,
        )
    assert len(calls) == call
    assert unchanged(model, before)


def test_weights_come_back_after_a_failing_backward():
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise ArithmeticError

    model = network()
    before = snapshot(model)
    with pytest.raises(ArithmeticError):
        meta.finite_difference(
            lambda: Broken.apply(loss(model, "hi", "train")), model.theta(), model.phi("hi"), direction_of(model)
        )
    assert unchanged(model, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_are_moved_in_float32(dtype):
    model = network(dtype)
    double = copy.deepcopy(model).double()
    found = meta_step(model, torch.float32)
    assert all(tensor.dtype == torch.float32 for tensor in found.gradients)
    truth = exact_adapter_gradient(double, 0.5)
    # that of the radius, 1e-4, and float32's rounding over the radius: a few 2^-24 / 0.01, about 2e-5
    assert relative_error(found.gradients, truth) <= 0.01**2 + 4 * 2.0**-24 / 0.01
    # In their own type most of the step is lost: less than half a unit of the weight.
    direction = direction_of(model)
    length = flat(direction).norm()
    lost = [tensor + 0.01 / float(length) * v == tensor for tensor, v in zip(model.theta(), direction)]
    if dtype == torch.bfloat16:
        assert flat(lost).mean() > 0.25


def test_the_model_trains_on_after_it():
    """Neither the type of a swapped weight nor a graph from before gets into autograd's way."""
    model = network(torch.bfloat16)
    tasks = TaskGradients(model, list(LANGUAGES))
    x = torch.ones(2, 5, dtype=torch.bfloat16)
    waiting = model(x, "hi").square().sum()  # a graph that holds the weights
    meta_step(model, torch.float32)
    waiting.backward()
    want = [None if tensor.grad is None else tensor.grad.clone() for tensor in model.parameters()]
    model.zero_grad()
    model(x, "hi").square().sum().backward()
    for tensor, gradient in zip(model.parameters(), want):
        assert (tensor.grad is None) == (gradient is None)
        assert gradient is None or (gradient.dtype == torch.bfloat16 and torch.equal(tensor.grad, gradient))
    model.zero_grad()
    with tasks.task("hi"):
        model(x, "hi").square().sum().backward()
        meta_step(model, torch.float32)
    tasks.apply()
    for tensor, gradient in zip(model.parameters(), want):
        assert gradient is None or torch.equal(tensor.grad, gradient)


def test_it_works_under_no_grad_and_takes_generators():
    model = network()
    want = meta_step(model)
    with torch.no_grad():
        found = meta.adapter_gradients(
            lambda: loss(model, "hi", "train"),
            lambda: mean_validation_loss(model),
            iter(model.theta()),
            model.adapters["hi"].parameters(),
            inner_lr=0.5,
        )
    assert all(torch.equal(a, b) for a, b in zip(found.gradients, want.gradients))


# ---------------------------------------------------------------------------------------------------------- bad input

MODEL = network()
BAD = {
    "theta a tensor": ({"theta": MODEL.first.weight}, TypeError, "theta: expected tensors, got Parameter"),
    "theta empty": ({"theta": []}, ValueError, "theta: expected at least one tensor, got none"),
    "a number": ({"phi": [1.0]}, TypeError, r"phi\[0\]: expected a tensor, got float"),
    "None": ({"phi": [None]}, TypeError, r"phi\[0\]: expected a tensor, got NoneType"),
    "frozen": ({"phi": [torch.ones(2)]}, ValueError, r"phi\[0\]: expected a leaf that requires grad"),
    "no leaf": ({"theta": [MODEL.first.weight * 1]}, ValueError, r"theta\[0\]: expected a leaf that requires grad"),
    "twice": ({"theta": [*MODEL.theta(), MODEL.first.weight]}, ValueError, r"theta\[6\]: expected every tensor once"),
    "in both": ({"phi": [MODEL.first.weight]}, ValueError, r"phi\[0\]: expected every tensor once, in theta or in phi"),
    "no radius": ({"radius": 0.0}, ValueError, "radius: expected a finite number above 0, got 0.0"),
    "a huge radius": ({"radius": 10**400}, ValueError, "radius: expected a finite number above 0, got inf"),
    "a radius of a str": ({"radius": "1"}, TypeError, "radius: expected a float, got '1'"),
    "no loss": ({"loss": 1.0}, TypeError, "loss: expected a callable, got float"),
    "a loss of None": ({"loss": lambda: None}, TypeError, "loss: expected a tensor, got NoneType"),
    "no model": ({"model": [MODEL]}, TypeError, "model: expected a torch.nn.Module, got list"),
    "a vector": ({"loss": lambda: MODEL.first.bias * 1}, ValueError, r"loss: expected a real scalar .* shape \[6\]"),
    "too short": ({"direction": [None]}, ValueError, "direction: expected 6 tensors, as in theta, got 1"),
    "a direction": ({"direction": torch.ones(6)}, TypeError, "direction: expected a sequence of tensors, got Tensor"),
    "another shape": (
        {"direction": [torch.ones(3), *[None] * 5]},
        ValueError,
        r"direction\[0\]: expected shape \[6, 5\], got \[3\]",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    changes, error, message = BAD[case]
    before = snapshot(MODEL)
    arguments = {
        "loss": lambda: loss(MODEL, "hi", "train"),
        "theta": MODEL.theta(),
        "phi": MODEL.phi("hi"),
        "direction": direction_of(MODEL),
    }
    with pytest.raises(error, match=message):
        meta.finite_difference(**(arguments | changes))
    assert unchanged(MODEL, before)


@pytest.mark.parametrize(
    ("inner_lr", "error", "message"),
    [
        (-0.1, ValueError, "inner_lr: expected a finite number of at least 0, got -0.1"),
        (math.inf, ValueError, "inner_lr: expected a finite number of at least 0, got inf"),
        (True, TypeError, "inner_lr: expected a float, got True"),
    ],
)
def test_bad_step_sizes(inner_lr, error, message):
    with pytest.raises(error, match=message):
        meta_step(MODEL, inner_lr=inner_lr)
