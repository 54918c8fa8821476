# The native module (csrc/cuda/bindings.cpp). Tensors are addresses, the structs of csrc/include/gradvac/cuda.h are
# tuples of their members; nothing is checked here.
from typing import Any

RUN: int
TILE: int

def use_device(device: int) -> None: ...
def gram(grads: tuple[Any, ...], plan: tuple[int, ...], scratch: tuple[int, ...], G: int, stream: int) -> None: ...
def coefficients(G: int, K: int, T: int, vaccine: tuple[Any, ...], scratch: tuple[int, ...], stream: int) -> None: ...
def combine(grads: tuple[Any, ...], weights: int, plan: tuple[int, ...], out: tuple[Any, ...], stream: int) -> None: ...
def vaccinate(
    grads: tuple[Any, ...],
    plan: tuple[int, ...],
    vaccine: tuple[Any, ...],
    scratch: tuple[int, ...],
    G: int,
    out: tuple[Any, ...],
    one_pass: bool,
    stream: int,
) -> None: ...
def has_one_pass(grads: tuple[Any, ...], out: tuple[Any, ...]) -> bool: ...
