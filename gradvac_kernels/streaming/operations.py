"""What an operation is called, and of which kind it is: the names that ``placement`` has rules for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

_PLAIN_NAMES = {"radd": "add", "iadd": "add", "rsub": "sub", "isub": "sub", "rmul": "mul", "imul": "mul"}
_PLAIN_NAMES |= {
    "truediv": "div",
    "rtruediv": "div",
    "itruediv": "div",
    "idiv": "div",
    "rdiv": "div",
    "true_divide": "div",
}
_PLAIN_NAMES |= {"rpow": "pow", "ipow": "pow", "multiply": "mul", "divide": "div", "subtract": "sub", "negative": "neg"}
_PLAIN_NAMES |= {"floordiv": "floor_divide", "rfloordiv": "floor_divide", "mod": "remainder", "concat": "cat"}
_IN_PLACE = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "div", "floordiv", "mod", "pow", "matmul")}
_IN_PLACE |= {"__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__", "__setitem__"}
_PLAIN_NAMES |= {"absolute": "abs", "iand": "and", "ior": "or", "concatenate": "cat"}


@functools.cache
def name_of(function: Callable[..., Any]) -> str:
    """``add`` for torch.add, Tensor.add_, Tensor.__iadd__ and torch.ops.aten.add.Tensor; ``get T`` for properties."""
    if function is torch.nn.functional.unfold:
        return "im2col"  # Tensor.unfold is another operation
    name = getattr(function, "__name__", "") or type(function).__name__
    if name == "__get__":
        return "get " + function.__self__.__name__  # type: ignore[attr-defined]
    if name.startswith("__") and name.endswith("__"):
        name = name[2:-2]
    else:
        name = name.split(".")[0]
        if name.endswith("_") and not name.startswith("_"):
            name = name.rstrip("_")
    return _PLAIN_NAMES.get(name, name)


@functools.cache
def is_in_place(function: Callable[..., Any]) -> bool:
    """It writes to its first argument."""
    name = getattr(function, "__name__", "").split(".")[0]
    return name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))


@functools.cache
def is_pointwise(name: str) -> bool:
    """As torch itself says of its operators."""
    if name in SAME:
        return True
    packet = getattr(torch.ops.aten, name, None)
    if packet is None:
        return False
    return any(torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads())


def tensors_in(values: Any) -> Iterator[torch.Tensor]:
    """The tensors among arguments, in lists, tuples and dicts too."""
    for value in values.values() if isinstance(values, dict) else values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple, dict)):
            yield from tensors_in(value)


SAME = {"to", "type_as", "type", "float", "double", "half", "bfloat16", "int", "long", "bool", "cpu", "cuda"}
SAME |= {
    "contiguous",
    "detach",
    "dropout",
    "native_dropout",
    "alpha_dropout",
    "feature_dropout",
    "alias",
    "requires_grad",
}
SAME |= {
    "as_tensor",
    "asarray",
    "logsigmoid",
    "log_sigmoid",
    "hardswish",
    "and",
    "or",
    "xor",
    "invert",
    "tril",
    "triu",
    "get data",
}
SAME |= {"zero", "lshift", "rshift", "ilshift", "irshift"}
SAME |= {"floor_divide", "bernoulli", "view", "nan_to_num", "lt", "gt", "le", "ge", "copy", "get real", "get imag"}
RESHAPES = {"reshape", "view_as", "reshape_as", "flatten", "unflatten", "_unsafe_view", "ravel"}
VIEWS = {
    "permute",
    "transpose",
    "t",
    "get T",
    "get mT",
    "get H",
    "get mH",
    "swapaxes",
    "swapdims",
    "movedim",
    "moveaxis",
}
VIEWS |= {"unsqueeze", "squeeze", "select", "narrow", "unbind", "split", "chunk", "tensor_split", "split_with_sizes"}
VIEWS |= {"unfold", "diagonal", "unsafe_chunk", "unsafe_split"}
INDEXING = {"getitem", "index_select", "gather", "take_along_dim"}
REDUCTIONS = dict.fromkeys(
    ("sum", "mean", "amax", "amin", "max", "min", "logsumexp", "var", "std", "argmax", "argmin"), 1
)
REDUCTIONS |= dict.fromkeys(("all", "any", "prod", "nansum", "nanmean", "median", "var_mean", "std_mean", "aminmax"), 1)
REDUCTIONS |= {"norm": 2, "linalg_vector_norm": 2, "vector_norm": 2, "count_nonzero": 1}  # where dim stands
ALONG = {"softmax": 1, "log_softmax": 1, "cumsum": 1, "cumprod": 1, "logcumsumexp": 1, "sort": 1, "argsort": 1}
ALONG |= {"glu": 1, "topk": 2, "cummax": 1, "cummin": 1, "diff": 2, "fft_fft": 2, "fft_rfft": 2, "fft_ifft": 2}
WITHIN = {*REDUCTIONS, *ALONG, "flip", "roll"}
"""Names of operations whose result has nothing but what was in their argument."""
OF_THE_FIRST = {"to", "type_as", "type", "expand_as", "view_as", "reshape_as", "as_tensor", "asarray"}
"""Names of operations that take nothing but type, device or shape from their other arguments."""
FIRST = {f"{kind}{n}d" for kind in ("conv", "conv_transpose", "max_pool", "avg_pool") for n in (1, 2, 3)}
FIRST |= {f"adaptive_{kind}_pool{n}d" for kind in ("avg", "max") for n in (1, 2, 3)}
FIRST |= {
    "group_norm",
    "instance_norm",
    "batch_norm",
    "im2col",
    "col2im",
    "upsample_nearest1d",
    "upsample_nearest2d",
    "upsample_linear1d",
    "upsample_bilinear2d",
    "upsample_bicubic2d",
    "stft",
    "pixel_shuffle",
}


RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"}
PACKING = {"_pack_padded_sequence", "_pad_packed_sequence"}
WRITING = {"setitem", "index_add", "index_copy"}
COLLATING = {"stack", "cat"}

KNOWN = {*SAME, *RESHAPES, *VIEWS, *INDEXING, *REDUCTIONS, *ALONG, *FIRST}
"""Names of operations, other than pointwise ones, that are followed as a whole."""
KNOWN |= {"matmul", "bmm", "mm", "mv", "addmm", "baddbmm", "addmv", "scaled_dot_product_attention", "einsum"}
KNOWN |= {"one_hot", "cat", "stack", "repeat", "tile", "expand", "expand_as", "broadcast_to", "repeat_interleave"}
KNOWN |= {"setitem", "prelu", "flip", "roll"}
