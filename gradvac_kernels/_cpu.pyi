# The native module (csrc/cpu/bindings.cpp). Tensors are addresses; nothing is checked here.

def gram(data: int, dtype: int, T: int, row_stride: int, bounds: int, K: int, G: int, threads: int) -> None: ...
def coefficients(
    G: int,
    K: int,
    T: int,
    ema: int,
    N: int,
    beta: float,
    target: float,
    max_target: float,
    noise: float,
    smallest: float,
    largest: float,
    task_ids: int,
    turnable: int,
    order: int,
    seed: int,
    step: int,
    first_group: int,
    weights: int,
    similarity: int,
    corrected: int,
    threads: int,
) -> None: ...
def combine(
    data: int,
    dtype: int,
    T: int,
    row_stride: int,
    bounds: int,
    K: int,
    weights: int,
    out: int,
    out_dtype: int,
    threads: int,
) -> None: ...
def vaccinate(
    data: int,
    dtype: int,
    T: int,
    row_stride: int,
    bounds: int,
    K: int,
    ema: int,
    N: int,
    beta: float,
    target: float,
    max_target: float,
    noise: float,
    smallest: float,
    largest: float,
    task_ids: int,
    turnable: int,
    order: int,
    seed: int,
    step: int,
    first_group: int,
    weights: int,
    similarity: int,
    corrected: int,
    G: int,
    out: int,
    out_dtype: int,
    threads: int,
) -> None: ...
def streaming_read(data: int, bytes: int, threads: int) -> float: ...
def multiply_add_peak(rounds: int, threads: int) -> float: ...
def instruction_set() -> str: ...
def instruction_sets() -> list[str]: ...
def use_instruction_set(name: str) -> None: ...
