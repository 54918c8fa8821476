"""The CUDA sources compiled for the host, where fibers play the device: see ``cuda_host.h``."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11

_HERE = Path(__file__).parent
_CSRC = _HERE.parent.parent / "csrc"
_BUILT = _HERE.parent.parent / "build" / "cuda_host"
_SOURCES = (_HERE / "cuda_host.cpp", *sorted((_CSRC / "cuda").glob("*.cu")), _CSRC / "cuda" / "bindings.cpp")
_FLAGS = (
    *("-std=c++17", "-O2", "-march=native", "-fPIC", "-fvisibility=hidden", "-w"),
    "-ffp-contract=off",  # as nvcc --fmad=false
    "-U_FORTIFY_SOURCE",  # it takes a jump to another fiber's stack for a mistake
    "-DGRADVAC_CUDA_HOST",
    *(f"-I{path}" for path in (_HERE, _CSRC / "include", _CSRC / "cuda")),
    *(f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))),
)


def why_unavailable() -> str | None:
    """None where it can be built."""
    return None if shutil.which("g++") else "no g++"


def load() -> ModuleType:
    """The module ``_cuda_host``: the face of ``gradvac_kernels._cuda``, and the controls of the host. Built once."""
    digest = hashlib.sha256(repr(_FLAGS).encode())
    for path in sorted((*_CSRC.rglob("*.*"), *_HERE.glob("*.*"))):
        if path.suffix in (".h", ".cpp", ".cu"):
            digest.update(path.read_bytes())
    target = _BUILT / digest.hexdigest()[:16] / ("_cuda_host" + sysconfig.get_config_var("EXT_SUFFIX"))
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(_BUILT / "lock", "w") as lock:  # other processes wait for it
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            _build(target)
    spec = importlib.util.spec_from_file_location("_cuda_host", target)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _build(target: Path) -> None:
    def compile_one(source: Path) -> Path:
        made = target.with_name(source.name + ".o")
        subprocess.run(["g++", *_FLAGS, "-x", "c++", "-c", source, "-o", made], check=True)
        return made

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, _SOURCES))
    unfinished = target.with_suffix(".part")
    subprocess.run(["g++", "-shared", *objects, "-o", unfinished], check=True)
    unfinished.rename(target)
