# The native module (csrc/cuda/bindings.cpp). Tensors are addresses, the structs of csrc/include/gradvac/cuda.h are
# tuples of their members; nothing is checked here.
from typing import Any

RUN: int
TILE: int

def why_unavailable(device: int) -> str: ...
def use_device(device: int) -> None: ...
def gram(grads: tuple[Any, ...], plan: tuple[int, ...], scratch: tuple[int, ...], G: int, stream: int) -> None: ...
def cross_gram(
    a: tuple[Any, ...], b: tuple[Any, ...], plan: tuple[int, ...], sums: int, C: int, stream: int
) -> None: ...
def coefficients(G: int, K: int, T: int, vaccine: tuple[Any, ...], scratch: tuple[int, ...], stream: int) -> None: ...
def combine(grads: tuple[Any, ...], weights: int, plan: tuple[int, ...], out: tuple[Any, ...], stream: int) -> None: ...
def vaccinate(
    grads: tuple[Any, ...],
    plan: tuple[int, ...],
    vaccine: tuple[Any, ...],
    scratch: tuple[int, ...],
    G: int,
    out: tuple[Any, ...],
    one_launch: bool,
    stream: int,
) -> None: ...
