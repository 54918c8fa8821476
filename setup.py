"""Builds the native modules through CMake and Ninja; everything else is in pyproject.toml.

GRADVAC_SANITIZE=address,undefined builds with these sanitizers. GRADVAC_BUILD_CUDA=1 insists on the CUDA kernels, 0
leaves them out; by default they are built where nvcc is found.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """One CMake project, ``csrc``, for all extensions."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.inplace or self.editable_mode:  # one folder for both, to compile only what has changed since
            self.build_temp = str(ROOT / "build" / f"inplace.{sysconfig.get_config_var('SOABI')}")

    def build_extensions(self) -> None:
        target = Path(self.get_ext_fullpath(self.extensions[0].name)).parent.resolve()
        ninja = shutil.which("ninja")
        if ninja is None:
            raise RuntimeError("ninja is not on PATH: pip install ninja")
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",  # an isolated build's ninja is gone the next time
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_INSTALL_PREFIX={target}",
            f"-DGRADVAC_SANITIZE={os.environ.get('GRADVAC_SANITIZE', '')}",
            f"-DGRADVAC_BUILD_CUDA={os.environ.get('GRADVAC_BUILD_CUDA', 'auto')}",
            str(ROOT / "csrc"),
        ]
        subprocess.run(configure, cwd=build, check=True)
        subprocess.run(["cmake", "--build", ".", "--target", "install"], cwd=build, check=True)


EXTENSIONS = [
    Extension("gradvac_kernels._cpu", sources=[]),
    Extension("gradvac_kernels._cuda", sources=[], optional=True),  # may be left out
]
setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": CMakeBuild})
