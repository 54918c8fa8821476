"""Compile the launches of the Triton backend for GPUs that are not there, and print what each needs, a JSON line each.

Run without TRITON_INTERPRET. The launchers are called on tensors in host memory, with their kernels replaced by
recorders: what is compiled is what would have been launched.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import gradvac_kernels as gvk
from gradvac_kernels.backends.triton import (
    coefficient_kernels,
    combine_kernels,
    cross_gram_kernels,
    device,
    gram_kernels,
)
from gradvac_kernels.backends.triton.plan import make_plan
from gradvac_kernels.numerics import precision

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
}


class Recorder:
    """Stands for a kernel and keeps what it would have been launched with."""

    def __init__(self, kernel, launches: list) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append((self.kernel, args, options))


def record(module, call) -> list:
    """The launches of ``call`` by ``module``."""
    launches: list = []
    kernels = {name: kernel for name, kernel in vars(module).items() if isinstance(kernel, triton.JITFunction)}
    for name, kernel in kernels.items():
        setattr(module, name, Recorder(kernel, launches))
    try:
        call()
    finally:
        for name, kernel in kernels.items():
            setattr(module, name, kernel)
    return launches


def specialise(kernel, args, options) -> tuple[ASTSource, dict]:
    """What Triton would compile on this launch, and with which options."""
    options = dict(options)
    names = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
    settings = {name: options.pop(name) for name in names if name in options}
    bound = inspect.signature(kernel.fn).bind(*args, **options).arguments
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = bound[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + _TYPES[value.dtype]
            if value.data_ptr() % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = parameter.annotation_type or "i32"
    return ASTSource(kernel, signature, constants, attributes), settings


def resources(compiled) -> dict:
    """Registers, bytes of stack and of shared memory, and the instructions that matter."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [_TOOLS / "cuobjdump", "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(re.search(rf"{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK")}
    ptx = compiled.asm["ptx"]  # to take the machine code apart would take as long as to compile
    wide = r"\S*\.(?:v4\.b32|v2\.b64)"
    return {
        "registers": found["REG"],
        "stack": found["STACK"],
        "shared": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        # to registers, or straight to shared memory
        "loads_16": len(re.findall(rf"\bld\.global{wide}|\bcp\.async\.c[ag]\.shared\.global .*, 0x10, ", ptx)),
        "stores_16": len(re.findall(rf"\bst\.global{wide}", ptx)),
        "fused": len(re.findall(r"\bfma\.rn\.f64", ptx)),
        "matrix": len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", ptx)),
    }


def cases() -> Iterator[tuple[str, list]]:
    """Every kind of configuration that the launchers choose, and its extremes; aligned rows, and some without."""
    groups = gvk.ParameterGroups.from_sizes({"short": 64, "long": 16384}, align=16)
    edges = tuple(groups.bounds.flatten().tolist())

    def buffer(T, dtype):
        return torch.zeros(T, groups.numel, dtype=dtype)

    for dtype, numbers in (
        (torch.float32, (1, 2, 7, 8, 10, 13, 16, 32, 64, 100)),
        (torch.bfloat16, (2, 3, 6, 16, 32, 64, 100)),
        (torch.float16, (2, 64)),
        (torch.float64, (8, 64)),
    ):
        for T in numbers:
            grads, plan = buffer(T, dtype), make_plan(edges, T, torch.device("cpu"))
            yield f"T={T} {_TYPES[dtype]}", record(gram_kernels, lambda a=(grads, plan): gram_kernels.measure(*a))
    for dtype, numbers in (
        (torch.float32, ((1, 1), (8, 8), (16, 3), (32, 20), (64, 64), (100, 2))),
        (torch.bfloat16, ((8, 8), (32, 32), (100, 100))),
        (torch.float16, ((8, 8), (64, 1))),
        (torch.float64, ((8, 8), (3, 64))),
    ):
        for T, U in numbers:
            plan = make_plan(edges, max(T, U), torch.device("cpu"))
            pair = (buffer(T, dtype), buffer(U, dtype), plan)
            name = f"T={T} U={U} {_TYPES[dtype]}"
            yield name, record(cross_gram_kernels, lambda a=pair: cross_gram_kernels.cross_measure(*a))
    odd = gvk.ParameterGroups.from_sizes({"short": 3, "long": 16384})
    for T in (8, 16):
        grads = torch.zeros(T, odd.numel)
        plan = make_plan(tuple(odd.bounds.flatten().tolist()), T, torch.device("cpu"))
        yield f"T={T} fp32 unaligned", record(gram_kernels, lambda a=(grads, plan): gram_kernels.measure(*a))
        pair = (grads, grads, plan)
        name = f"T={T} U={T} fp32 unaligned"
        yield name, record(cross_gram_kernels, lambda a=pair: cross_gram_kernels.cross_measure(*a))
    for T in (1, 4, 8, 100):
        for dtype, wide in (
            (torch.float32, torch.float32),
            (torch.bfloat16, torch.bfloat16),
            (torch.bfloat16, torch.float32),
            (torch.float16, torch.float16),
            (torch.float64, torch.float64),
        ):
            grads, out = buffer(T, dtype), torch.zeros(groups.numel, dtype=wide)
            plan = make_plan(edges, T, torch.device("cpu"))
            weights = torch.zeros(len(groups), T, dtype=torch.float64)
            name = f"T={T} {_TYPES[dtype]} to {_TYPES[wide]}"
            yield name, record(combine_kernels, lambda a=(grads, weights, plan, out): combine_kernels.combine(*a))
    ids, order = torch.arange(8), torch.zeros(2, 8, 7, dtype=torch.int64)
    none = {"task_ids": None, "vaccinated": None, "order": None}
    for T, given in (
        (1, {}),
        (2, {}),
        (8, {}),
        (100, {}),
        (300, {}),
        (8, {"task_ids": ids, "vaccinated": ids, "order": order}),
    ):
        G, arrived = torch.zeros(2, T, T, dtype=torch.float64), torch.zeros(2, dtype=torch.int32)
        for ema, target, step in ((torch.zeros_like(G), None, torch.zeros((), dtype=torch.int64)), (None, 0.5, 3)):
            call = functools.partial(
                coefficient_kernels.coefficients,
                *(G, arrived, ema),
                **{**none, **given},
                **{"beta": 0.01, "target": target, "seed": 0, "step": step, "first_group": 0},
                limits=precision(torch.float32),
            )
            yield f"T={T} {'ema' if target is None else 'target'}", record(coefficient_kernels, call)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kernel", nargs="?", default="", help="only launches whose kernel and case contain this")
    parser.add_argument("--capability", type=int, nargs="*", default=(80, 90, 100))
    chosen = parser.parse_args()
    for capability in chosen.capability:
        device.is_hopper = lambda _, capability=capability: capability // 10 == 9
        seen = set()
        for name, launches in cases():
            for kernel, args, options in launches:
                if chosen.kernel not in f"{kernel.fn.__name__} {name}":
                    continue
                source, settings = specialise(kernel, args, options)
                same = (source.hash(), *sorted(settings.items()))
                if same in seen:
                    continue
                seen.add(same)
                compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=settings)
                line = {"kernel": kernel.fn.__name__, "case": name, "capability": capability}
                print(json.dumps({**line, **resources(compiled)}), flush=True)
