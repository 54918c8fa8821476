"""How each operation's use of a parameter is kept apart by task.

A rule calls the operation with the parameter detached, so that autograd computes everything but the parameter's
gradient, and taps the result: when the gradient of the tapped tensor arrives, it is multiplied, task by task, with what
was saved.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from .operations import is_in_place, is_pointwise, name_of, tensors_in
from .placement import place_of_part
from .places import Samples, aligned
from .slab import Table, Target
from .task_rows import TaskRows

if TYPE_CHECKING:
    from .capture import Capture

Saved = Sequence[torch.Tensor]
Into = Sequence[Any]  # of Target | None; an embedding's may be a Table
Grads = Callable[[TaskRows, Saved, torch.Tensor, int, Into], None]
"""``grads(rows, saved, grad, dim, into)`` adds, for each parameter i of a use, the gradient of task t to
``into[i].gradients[t]`` (``into[i]`` is None: not wanted), from what was saved and the gradient of the tapped tensor,
whose samples lie along ``dim``."""
Rule = Callable[["Capture", Callable[..., Any], Any, dict[str, Any]], Any]

_RULES: dict[Any, Rule] = {}


def register_rule(function: Callable[..., Any] | str) -> Callable[[Rule], Rule]:
    """Teach :meth:`TaskGradients.batch` an operation that has parameters: a decorator for its rule.

    The rule is called as ``rule(capture, function, args, kwargs)`` whenever samples and parameters meet in
    ``function``. It returns ``capture.tap(out, samples, parameters, saved, grads)``, or ``NotImplemented`` for the
    general way, one vector-Jacobian product a task::

        @gvk.register_rule(torch.ops.mine.scale)  # scale(x [..., D], weight [D])
        def rule(capture, function, args, kwargs):
            x, weight = args
            out = function(x, capture.plain(weight))
            return capture.tap(out, capture.of(x), [weight], [x], grads)

        def grads(rows, saved, grad, dim, into):
            rows.add_sums(rows.arranged(grad * saved[0], dim), into[0])

    Args:
        function: one that torch's function modes see: of torch, or a custom operator ``torch.ops.*``; or the name of a
            torch function, for all its spellings.
    """

    def register(rule: Rule) -> Rule:
        _RULES[function] = rule
        return rule

    return register


def rule_for(function: Callable[..., Any]) -> Rule:
    """The rule for a function in which samples and parameters meet."""
    try:
        own = _RULES.get(function)
    except TypeError:  # not hashable
        own = None
    name = name_of(function)
    return own or _RULES.get(name) or (_pointwise if is_pointwise(name) else general)


def has_rule(function: Callable[..., Any]) -> bool:
    """Other than the general one."""
    return rule_for(function) is not general


def _bound(args: Any, kwargs: dict[str, Any], **defaults: Any) -> list[Any]:
    values = dict(defaults)
    values.update(zip(defaults, args))
    unknown = kwargs.keys() - values.keys()
    if unknown or len(args) > len(defaults):
        raise TypeError(f"expected at most the arguments {list(defaults)}, got also {sorted(unknown)}")
    return list({**values, **kwargs}.values())


# -------------------------------------------------------------------------------------------------------- products


@register_rule("linear")
def _linear(capture: Capture, function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    x, weight, bias = _bound(args, kwargs, input=None, weight=None, bias=None)
    samples = capture.of(x)
    if not isinstance(samples, Samples) or samples.dim == x.dim() - 1 or capture.of(weight) is not None:
        return NotImplemented
    out = F.linear(x, capture.plain(weight), capture.plain(bias))
    return capture.tap(out, samples, [weight, bias], [x], _linear_grads)


def _linear_grads(rows: TaskRows, saved: Saved, grad: torch.Tensor, dim: int, into: Into) -> None:
    (x,), (weight, bias) = saved, into
    ys = rows.arranged(grad, dim).contiguous()
    if weight is not None:
        rows.add_products(_matrix(ys), _matrix(rows.arranged(x, dim)), weight)
    if bias is not None:
        rows.add_sums(ys, bias)


@register_rule("matmul")
@register_rule("mm")
def _matmul(capture: Capture, function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    if len(args) != 2 or kwargs:
        return NotImplemented
    x, weight = args
    samples = capture.of(x)
    if not isinstance(samples, Samples) or not capture.shared(weight):
        return NotImplemented
    if samples.dim == x.dim() - 1 or weight.dim() != 2:
        return NotImplemented
    return capture.tap(torch.matmul(x, capture.plain(weight)), samples, [weight], [x], _matmul_grads)


def _matmul_grads(rows: TaskRows, saved: Saved, grad: torch.Tensor, dim: int, into: Into) -> None:
    if into[0] is not None:
        rows.add_products(_matrix(rows.arranged(saved[0], dim)), _matrix(rows.arranged(grad, dim)), into[0])


@register_rule("addmm")
def _addmm(capture: Capture, function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    if len(args) != 3 or kwargs:
        return NotImplemented
    bias, x, weight = args
    samples = capture.of(x)
    if not isinstance(samples, Samples) or samples.dim != 0 or capture.of(weight) is not None or bias.dim() != 1:
        return NotImplemented
    out = torch.addmm(capture.plain(bias), x, capture.plain(weight))
    return capture.tap(out, samples, [weight, bias], [x], _addmm_grads)


def _addmm_grads(rows: TaskRows, saved: Saved, grad: torch.Tensor, dim: int, into: Into) -> None:
    _matmul_grads(rows, saved, grad, dim, into[:1])
    if into[1] is not None:
        rows.add_sums(rows.arranged(grad, dim), into[1])


@register_rule("_grouped_mm")
def _grouped(capture: Capture, function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """Each of E experts multiplies a run of the tokens."""
    x, weight, ends, bias, dtype = _bound(args, kwargs, mat_a=None, mat_b=None, offs=None, bias=None, out_dtype=None)
    samples = capture.of(x)
    if not isinstance(samples, Samples) or samples.dim != 0 or x.dim() != 2 or weight.dim() != 3 or bias is not None:
        return NotImplemented
    out = function(x, capture.plain(weight), offs=ends, out_dtype=dtype)
    return capture.tap(out, samples, [weight], [x], functools.partial(_grouped_grads, ends=ends.tolist()))


def _grouped_grads(rows: TaskRows, saved: Saved, grad: torch.Tensor, dim: int, into: Into, ends: list[int]) -> None:
    if into[0] is None:
        return
    gradients = into[0].gradients  # [T, E, I, J]
    for expert, (begin, end) in enumerate(zip([0, *ends], ends)):
        if begin < end:
            its = TaskRows(Samples(0, rows.rows[begin:end]), len(gradients), grad.device)
            x, y = its.arranged(saved[0][begin:end], 0), its.arranged(grad[begin:end], 0)
            its.add_products(x, y, Target(gradients[:, expert]))


def _matrix(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


# ------------------------------------------------------------------------------------------------------- embeddings


@register_rule("embedding")
def _embedding(capture: Capture, function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    if function is not F.embedding:
        return NotImplemented
    ids, weight, padding, max_norm, norm_type, by_frequency, _ = _bound(
        args, kwargs, input=None, weight=None, padding_idx=None, max_norm=None, norm_type=2.0,
        scale_grad_by_freq=False, sparse=False,
    )  # fmt: skip
    samples = capture.of(ids)
    if not isinstance(samples, Samples) or capture.of(weight) is not None:
        return NotImplemented
    out = F.embedding(ids, capture.plain(weight), padding, max_norm, norm_type)
    padding = None if padding is None else padding % len(weight)
    saved = [ids, _one_by_frequency(ids, samples, weight)] if by_frequency else [ids]
    grads = functools.partial(_embedding_grads, padding=padding)
    return capture.tap(out, samples, [weight], saved, grads, looked_up=ids)


def _one_by_frequency(ids: torch.Tensor, samples: Samples, weight: torch.Tensor) -> torch.Tensor:
    """1 / how often a task has the index."""
    rows = samples.rows.view([-1 if d == samples.dim else 1 for d in range(ids.dim())]).to(ids.device)
    _, which, counts = (rows * len(weight) + ids).unique(return_inverse=True, return_counts=True)
    return counts.to(weight.dtype).reciprocal()[which]


def _embedding_grads(
    rows: TaskRows, saved: Saved, grad: torch.Tensor, dim: int, into: Into, padding: int | None
) -> None:
    (weight,), (ids, *scale) = into, saved
    if weight is None:
        return
    if scale:
        grad = grad * scale[0][..., None]
    if padding is not None:
        grad = grad.masked_fill((ids == padding)[..., None], 0.0)
    if isinstance(weight, Table):
        ids = torch.searchsorted(weight.rows, ids)
    ids, ys = rows.arranged(ids, dim), rows.arranged(grad, dim)
    for row, its, values in zip(weight.gradients, rows.split(ids), rows.split(ys)):
        its, values = its.flatten(), _matrix(values).to(row.dtype)
        if row.device.type == "cpu":
            row.index_add_(0, its, values)
        else:
            row.index_put_((its,), values, accumulate=True)  # index_add_ has no fixed order on a GPU


# ------------------------------------------------------------------------------------------- normalisations, filters


@register_rule("layer_norm")
def _layer_norm(capture: Capture, function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    if function is not F.layer_norm:
        return NotImplemented
    x, shape, weight, bias, eps = _bound(
        args, kwargs, input=None, normalized_shape=None, weight=None, bias=None, eps=1e-5
    )
    samples = capture.of(x)
    if not isinstance(samples, Samples) or samples.dim >= x.dim() - len(shape):
        return NotImplemented
    out = F.layer_norm(x, shape, capture.plain(weight), capture.plain(bias), eps)
    normalised = functools.partial(F.layer_norm, normalized_shape=shape, eps=eps)
    return capture.tap(out, samples, [weight, bias], [x], functools.partial(_scale_grads, normalised=normalised))


@register_rule("rms_norm")
def _rms_norm(capture: Capture, function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    if function is not F.rms_norm:
        return NotImplemented
    x, shape, weight, eps = _bound(args, kwargs, input=None, normalized_shape=None, weight=None, eps=None)
    samples = capture.of(x)
    if not isinstance(samples, Samples) or samples.dim >= x.dim() - len(shape):
        return NotImplemented
    out = F.rms_norm(x, shape, capture.plain(weight), eps)
    normalised: Normalised = functools.partial(F.rms_norm, normalized_shape=shape, eps=eps)
    if eps is None:  # what that is depends on the type
        normalised = functools.partial(_in_type, x.dtype, normalised)
    return capture.tap(out, samples, [weight, None], [x], functools.partial(_scale_grads, normalised=normalised))


Normalised = Callable[[torch.Tensor], torch.Tensor]


def _in_type(dtype: torch.dtype, normalised: Normalised, tensor: torch.Tensor) -> torch.Tensor:
    return normalised(tensor.to(dtype)).to(tensor.dtype)


@register_rule("group_norm")
def _group_norm(capture: Capture, function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    if function is not F.group_norm:
        return NotImplemented
    x, groups, weight, bias, eps = _bound(args, kwargs, input=None, num_groups=None, weight=None, bias=None, eps=1e-5)
    samples = capture.of(x)
    if not isinstance(samples, Samples) or samples.dim != 0:
        return NotImplemented
    out = F.group_norm(x, groups, capture.plain(weight), capture.plain(bias), eps)
    normalised = functools.partial(F.group_norm, num_groups=groups, eps=eps)
    grads = functools.partial(_scale_grads, normalised=normalised, channels=(x.shape[1], *[1] * (x.dim() - 2)))
    return capture.tap(out, samples, [weight, bias], [x], grads)


def _scale_grads(
    rows: TaskRows,
    saved: Saved,
    grad: torch.Tensor,
    dim: int,
    into: Into,
    normalised: Callable[[torch.Tensor], torch.Tensor],
    channels: tuple[int, ...] | None = None,
) -> None:
    """For ``out = normalised(x) * weight + bias``."""
    for which, target in enumerate(into):
        if target is not None:
            values = grad if which else normalised(saved[0].to(target.dtype)).mul_(grad)
            rows.add_sums(rows.arranged(values, dim), target, channels)


@register_rule("conv1d")
@register_rule("conv2d")
@register_rule("conv3d")
def _convolution(capture: Capture, function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    x, weight, bias, stride, padding, dilation, groups = _bound(
        args, kwargs, input=None, weight=None, bias=None, stride=1, padding=0, dilation=1, groups=1
    )
    samples = capture.of(x)
    if not isinstance(samples, Samples) or samples.dim != 0 or x.dim() != weight.dim() or isinstance(padding, str):
        return NotImplemented
    if capture.of(weight) is not None:
        return NotImplemented
    out = function(x, capture.plain(weight), capture.plain(bias), stride, padding, dilation, groups)
    space = x.dim() - 2
    geometry = [[n] * space if isinstance(n, int) else list(n) for n in (stride, padding, dilation)]
    grads = functools.partial(_convolution_grads, geometry=geometry, groups=groups)
    return capture.tap(out, samples, [weight, bias], [x], grads)


def _convolution_grads(
    rows: TaskRows, saved: Saved, grad: torch.Tensor, dim: int, into: Into, geometry: list[list[int]], groups: int
) -> None:
    weight, bias = into
    ys = rows.arranged(grad, dim)
    if bias is not None:
        rows.add_sums(ys, bias, (grad.shape[1], *[1] * (grad.dim() - 2)))
    if weight is None:
        return
    stride, padding, dilation = geometry
    xs = rows.arranged(saved[0], dim)
    for row, x, y in zip(weight.gradients, rows.split(xs), rows.split(ys)):
        if len(x):
            shape_only = row.new_empty(1).expand(row.shape)
            _, found, _ = torch.ops.aten.convolution_backward(
                y.to(row.dtype), x.to(row.dtype), shape_only, None, stride, padding, dilation, False, [0] * len(stride),
                groups, [False, True, False],
            )  # fmt: skip
            row += found


# -------------------------------------------------------------------------------------------------------- attention

_ATTENTION = inspect.signature(F.multi_head_attention_forward)


@register_rule(F.multi_head_attention_forward)
def _attention(capture: Capture, function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """Batch first: torch's own way goes over to ``[L, B, E]`` and back, and a task's samples lie apart there."""
    call = _ATTENTION.bind(*args, **kwargs)
    call.apply_defaults()
    given = types.SimpleNamespace(**call.arguments)
    query, key = given.query, given.key
    place = capture.of(query)
    special = (given.bias_k, given.bias_v, given.static_k, given.static_v)
    if (
        given.need_weights
        or given.use_separate_proj_weight
        or given.add_zero_attn
        or any(part is not None for part in special)
        or query.dim() != 3
        or not isinstance(place, Samples)
        or place.dim != 1
        or (given.key is not given.value and given.key.shape != given.value.shape)
    ):
        return NotImplemented
    mask = given.attn_mask
    causal = given.is_causal and mask is not None and given.key_padding_mask is None
    with capture:
        batch, heads, width = query.shape[1], given.num_heads, query.shape[2]
        inputs = [query, key, given.value]
        together = 3 if key is query and given.value is key else 2 if given.value is key else 1
        projected: list[torch.Tensor] = []
        for first, last in {3: [(0, 3)], 2: [(0, 1), (1, 3)], 1: [(0, 1), (1, 2), (2, 3)]}[together]:
            rows = slice(first * width, last * width)
            bias = None if given.in_proj_bias is None else given.in_proj_bias[rows]
            found = F.linear(inputs[first].transpose(0, 1), given.in_proj_weight[rows], bias)  # [B, L, n E]
            projected += found.chunk(last - first, -1)
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in projected)  # [B, H, L, D]
        if causal:
            mask = None
        elif mask is not None:
            mask = _additive(mask, query.dtype)
            mask = mask if mask.dim() == 2 else mask.unflatten(0, (batch, heads))
        if given.key_padding_mask is not None:
            padding = _additive(given.key_padding_mask, query.dtype)[:, None, None]  # [B, 1, 1, S]
            mask = padding if mask is None else mask + padding
        dropout = given.dropout_p if given.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)  # [B, H, L, D]
        out = out.transpose(1, 2).flatten(2)  # [B, L, E]
        return F.linear(out, given.out_proj_weight, given.out_proj_bias).transpose(0, 1), None


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else mask


# ------------------------------------------------------------------------------------------------- everything else


def _pointwise(capture: Capture, function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """The parameter is broadcast to the samples first, so that its gradient arrives before it is summed over them."""
    operands = list(tensors_in((*args, kwargs)))
    if is_in_place(function) and capture.shared(args[0]):
        return NotImplemented
    shape = torch.broadcast_shapes(*(operand.shape for operand in operands))
    samples = aligned(capture.deciding(operands), shape)
    return function(*_tapped(capture, args, shape, samples), **_tapped(capture, kwargs, shape, samples))


@register_rule("masked_fill")
def _masked_fill(capture: Capture, function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    x, mask, value = _bound(args, kwargs, input=None, mask=None, value=None)
    if not capture.shared(value):
        return _pointwise(capture, function, args, kwargs)
    if is_in_place(function):
        return NotImplemented
    return _pointwise(capture, torch.where, (mask, value, x), {})  # it takes no value of a shape


@register_rule("setitem")
def _setitem(capture: Capture, function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    tensor, index, value = args
    region = tensor[index]
    place = place_of_part(capture.tracker, tensor, index, region)
    if not capture.shared(value) or not isinstance(place, Samples):
        return NotImplemented
    return function(tensor, index, _tap_operand(capture, value, region.shape, place))


@register_rule("cat")
@register_rule("stack")
def _joined(capture: Capture, function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    parts = args[0] if args else kwargs["tensors"]
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % parts[0].dim() if name_of(function) == "cat" else None
    _, samples = next((pair for pair in capture.deciding(parts)), (None, None))
    if samples is None or samples.dim == dim:
        return NotImplemented
    tapped = [_tap_operand(capture, part, part.shape, samples) if capture.shared(part) else part for part in parts]
    return function(tapped, *args[1:], **{name: value for name, value in kwargs.items() if name != "tensors"})


def _tapped(capture: Capture, values: Any, shape: torch.Size, samples: Samples) -> Any:
    if isinstance(values, torch.Tensor):
        return _tap_operand(capture, values, shape, samples) if capture.shared(values) else values
    if isinstance(values, dict):
        return {name: _tapped(capture, value, shape, samples) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return type(values)(_tapped(capture, value, shape, samples) for value in values)
    return values


def _tap_operand(capture: Capture, value: torch.Tensor, shape: torch.Size, samples: Samples) -> torch.Tensor:
    for dim, (size, stride) in enumerate(zip(value.shape, value.stride())):
        if size > 1 and stride == 0:  # it was expanded already
            value = value.narrow(dim, 0, 1)
            capture.tracker.note(value, None)
    own = samples.dim - (len(shape) - value.dim())  # the dimension of the samples in value, if it has it
    if own >= 0 and value.shape[own] > 1:
        grads: Grads = functools.partial(_part_grads, own=own)
    else:
        grads = _broadcast_grads
    return capture.tap(capture.plain(value).expand(shape), samples, [value], [], grads)


def _broadcast_grads(rows: TaskRows, saved: Saved, grad: torch.Tensor, dim: int, into: Into) -> None:
    (target,) = into
    if target is not None:
        own = dim - (grad.dim() - len(target.size))
        size = tuple(target.size) if own < 0 else (*target.size[:own], *target.size[own + 1 :])
        # arranged moves the samples, which are one entry here, to the front
        rows.add_sums(rows.arranged(grad, dim), target, size)


def _part_grads(rows: TaskRows, saved: Saved, grad: torch.Tensor, dim: int, into: Into, own: int) -> None:
    """The operand has an entry of its own for each sample: that of a task is zero at the others' samples."""
    if into[0] is None:
        return
    for t, row in enumerate(into[0].gradients):
        mine = (rows.rows == t).nonzero().flatten().to(grad.device)
        values = grad.index_select(dim, mine).sum_to_size(
            [len(mine) if d == own else size for d, size in enumerate(row.shape)]
        )
        row.index_add_(own, mine, values.to(row.dtype))


def general(capture: Capture, function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """Any operation: one vector-Jacobian product a task, through a graph of its own."""
    if is_in_place(function):
        raise ValueError(f"batch: expected {name_of(function)} of samples and parameters out of place, got it in place")
    inner: dict[int, torch.Tensor] = {}
    operands = {id(t): t for t in tensors_in((*args, kwargs)) if t.requires_grad}
    with torch.enable_grad():
        for key, operand in operands.items():
            inner[key] = operand.detach().requires_grad_()
        found = function(*_replaced(args, inner), **_replaced(kwargs, inner))
    name = name_of(function)
    known = [(operand, capture.of(operand)) for operand in tensors_in((*args, kwargs))]
    capture.tracker.follow(name, function, args, kwargs, found, known)
    parameters = [operand for operand in operands.values() if capture.shared(operand)]
    others = [operand for operand in operands.values() if not capture.shared(operand)]
    wanted = [inner[id(parameter)] for parameter in parameters]
    results = {}
    for out in tensors_in((found,)):
        if out.requires_grad:
            grads = functools.partial(_general_grads, out=out, wanted=wanted)
            around = _Around.apply([out], [inner[id(other)] for other in others], *others)
            results[id(out)] = capture.tap(around, capture.place_for_parameters(out, name), parameters, [], grads)
    return _replaced((found,), results)[0]


def _general_grads(
    rows: TaskRows,
    saved: Saved,
    grad: torch.Tensor,
    dim: int,
    into: Into,
    out: torch.Tensor,
    wanted: list[torch.Tensor],
) -> None:
    for t, count in enumerate(rows.counts):
        if count:
            mine = (rows.rows == t).to(grad.device)
            masked = grad.where(mine.view([-1 if d == dim else 1 for d in range(grad.dim())]), grad.new_zeros(()))
            with torch._C._EnableTorchFunction():  # what a checkpoint recomputes is to be seen
                found = torch.autograd.grad(out, wanted, masked, retain_graph=True, allow_unused=True)
            for target, part in zip(into, found):
                if target is not None and part is not None:
                    target.gradients[t] += part


class _Around(torch.autograd.Function):
    """The result of an operation that ran in a graph of its own, as that of its inputs."""

    @staticmethod
    def forward(ctx: Any, result: list[torch.Tensor], inner: list[torch.Tensor], *others: torch.Tensor) -> torch.Tensor:
        (ctx.out,), ctx.inner = result, inner  # in a list: not an input of this node
        return ctx.out.detach().clone()  # what comes after may write to it

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        if not ctx.inner:
            return None, None
        return None, None, *torch.autograd.grad(ctx.out, ctx.inner, grad, retain_graph=True, allow_unused=True)


def _replaced(values: Any, inner: dict[int, torch.Tensor]) -> Any:
    if isinstance(values, torch.Tensor):
        return inner.get(id(values), values)
    if isinstance(values, dict):
        return {name: _replaced(value, inner) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return type(values)(_replaced(value, inner) for value in values)
    return values
