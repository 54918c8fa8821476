"""The CUDA kernels as they were compiled, held to budgets: what their launches count on."""

import os
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

triton = pytest.importorskip("triton", reason="its cuobjdump is used")
_cuda = pytest.importorskip("gradvac_kernels._cuda", reason="the CUDA kernels are not built: no nvcc")

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
REGISTERS = 65536  # of a multiprocessor
ELEMENTS = {"Float32": 4, "Bfloat16": 8, "Float16": 8, "Float64": 2}  # of 16 bytes

MATRIX_KERNELS = ("measure_many_rows", "measure_cross")


class Kernel(NamedTuple):
    """One instance of a kernel, as it is in the module."""

    name: str
    element: str  # of ELEMENTS, or ""
    rows: int  # of Packed or Matrix, or read at once by combine
    square: bool
    capability: int
    registers: int
    memory: int  # bytes of stack and local memory of a thread
    instructions: Counter[str]

    def count(self, pattern: str) -> int:
        return sum(times for name, times in self.instructions.items() if re.match(pattern, name))


def instructions(listing: str) -> Counter[str]:
    """How often each occurs in a function's listing."""
    return Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@\S+ )?([A-Z][\w.]*)", listing, flags=re.MULTILINE))


def dump(*flags: str) -> str:
    return subprocess.run([CUOBJDUMP, *flags, _cuda.__file__], capture_output=True, text=True, check=True).stdout


def capabilities() -> list[int]:
    """The architectures that were asked for: those of csrc/CMakeLists.txt, or CUDAARCHS."""
    return sorted({int(name) for name in re.findall(r"sm_(\d+)\.cubin", dump("--list-elf"))})


@pytest.fixture(scope="module")
def kernels():
    """All of them, for every architecture."""
    found = []
    for capability in capabilities():
        arch = f"sm_{capability}"
        usage = re.findall(
            r"Function (_Z\S+):\n\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", dump("-res-usage", "-arch", arch)
        )
        listings = dump("-sass", "-arch", arch).split("Function : ")[1:]
        code = {symbol: instructions(listing) for symbol, listing in (each.split("\n", 1) for each in listings)}
        for symbol, registers, stack, local in usage:
            rest = symbol[symbol.index("4cuda") + len("4cuda") :]
            length = re.match(r"\d+", rest).group()
            name = rest[len(length) :][: int(length)]
            element = re.search(r"\d(Float32|Bfloat16|Float16|Float64)E", symbol)
            packed, matrix = re.search(r"PackedILi(\d+)E", symbol), re.search(r"MatrixILi(\d+)ELb(\d)E", symbol)
            packed = packed or re.search(r"[Ff]loat\d+ELi(\d+)EE", symbol)  # the rows that combine loads at once
            found.append(
                Kernel(
                    name,
                    element.group(1) if element else "",
                    int(packed.group(1)) if packed else 8 * int(matrix.group(1)) if matrix else 0,
                    bool(matrix and matrix.group(2) == "1"),
                    capability,
                    int(registers),
                    int(stack) + int(local),
                    code[symbol],
                )
            )
    return found


def threads_and_blocks(kernel: Kernel) -> tuple[int, int]:
    """Threads of a block, and how many blocks a multiprocessor is to hold."""
    short = ELEMENTS.get(kernel.element) == 8
    if kernel.name == "measure_few_rows":
        threads = 128 if kernel.rows < 8 else 256
        return threads, (512 if short else 768) // threads
    if kernel.name == "vaccinate_in_one_launch":
        threads = 128 if kernel.rows < 8 else 256
        return threads, 768 // threads
    if kernel.name in MATRIX_KERNELS:
        return 128, (4 if kernel.square else 5) if kernel.rows == 16 else 2 if kernel.square else 3
    if kernel.name == "combine_rows":
        return 128, 5 if not short else 8 if kernel.rows < 4 else 7
    return (32, 16) if kernel.name == "solve_rows" else (256, 2)


def spilled_outside_of_loops(kernel: Kernel) -> int:
    """Bytes that may be, as a kernel of several parts has more to remember than each of them works with."""
    return 16 if kernel.name in ("measure_few_rows", "vaccinate_in_one_launch") else 0


def described(kernel: Kernel) -> str:
    return str(kernel[:-1])


def test_every_kernel_is_there_for_every_architecture(kernels):
    few = {(element, rows, False) for element in ("Float32", "Bfloat16", "Float16") for rows in (2, 4, 8)}
    many = {
        (element, 8 * blocks, square)
        for element in ("Float32", "Bfloat16", "Float16")
        for blocks, square in ((2, False), (4, False), (4, True))
    }
    expected = {("measure_few_rows", *instance) for instance in few}
    expected |= {("vaccinate_in_one_launch", *instance) for instance in few}
    expected |= {("measure_many_rows", *instance) for instance in many}
    expected |= {
        ("measure_cross", element, rows, True) for element in ("Float32", "Bfloat16", "Float16") for rows in (16, 32)
    }
    expected |= {("combine_rows", element, rows, False) for element in ELEMENTS for rows in (2, 4, 8)}
    expected |= {(name, "Float64", 0, False) for name in ("measure_in_double", "measure_cross_in_double")}
    expected |= {(name, "", 0, False) for name in ("add_up_groups", "add_up_cross", "solve_rows")}
    assert capabilities()
    for capability in capabilities():
        assert {kernel[:4] for kernel in kernels if kernel.capability == capability} == expected
    if "CUDAARCHS" not in os.environ:
        assert capabilities()[:2] == [80, 90]
        assert "sm_80" in dump("--list-ptx")  # for others


def test_no_stack(kernels):
    """Nothing is spilled where it would take time, and no array lives in memory."""
    for kernel in kernels:
        assert kernel.memory <= spilled_outside_of_loops(kernel), described(kernel)


def test_the_blocks_fit_the_registers(kernels):
    for kernel in kernels:
        threads, blocks = threads_and_blocks(kernel)
        granted = -(-kernel.registers // 8) * 8 * 32 * -(-threads // 32)  # in units of 256 a warp
        assert blocks * granted <= REGISTERS, described(kernel)


def test_loads_and_stores_of_16_bytes(kernels):
    for kernel in kernels:
        loads, stores = kernel.count(r"LDG\S*\.128"), kernel.count(r"STG\S*\.128")
        if kernel.name == "measure_few_rows":
            assert loads >= (8 if kernel.element == "Float32" else 16), described(kernel)
        elif kernel.name in MATRIX_KERNELS:
            assert loads >= kernel.rows // 8 * (1 + kernel.square), described(kernel)
        elif kernel.name == "combine_rows":
            ahead = 2 if kernel.rows == 2 else 1  # of few loads those of the next step too
            assert loads >= (ahead * kernel.rows if ELEMENTS[kernel.element] == 8 else 8), described(kernel)
            assert stores > 0, described(kernel)
        elif kernel.name == "vaccinate_in_one_launch":
            assert loads >= 8 + kernel.rows, described(kernel)  # measured, and combined
            assert stores > 0, described(kernel)


def test_products_are_made_by_the_units_that_are_meant(kernels):
    for kernel in kernels:
        few = kernel.name in ("measure_few_rows", "vaccinate_in_one_launch")
        # Of two times 16 columns; of three parts of each, where rows meet themselves fewer.
        products = 2 if few or kernel.element != "Float32" else 4 if kernel.rows == 16 and not kernel.square else 6
        if kernel.name in MATRIX_KERNELS:
            strips = kernel.rows // 16
            tiles = strips * kernel.rows // 8 if kernel.square else strips * (strips + 1)
            assert kernel.count("HMMA.16816.F32") >= tiles * products, described(kernel)
        elif few:
            assert kernel.count("HMMA.16816.F32") >= 8 * products, described(kernel)  # of as many vectors
        else:
            assert kernel.count("HMMA") == 0, described(kernel)
