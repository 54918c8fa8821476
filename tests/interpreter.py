"""Triton's interpreter, with less to do: it takes most of the tests' time."""

import dataclasses
import functools
import math

import triton
from triton.language import core
from triton.runtime import interpreter


def quicken() -> None:
    """Leave out of it what it does over and over; the values are the same."""
    if not triton.__version__.startswith("3.6."):
        return  # it may be built differently there
    # that no sum of 32-bit integers overflows takes a sixth of the time, and nothing here is that large
    interpreter.interpreter_builder.options = dataclasses.replace(
        interpreter.interpreter_builder.options, sanitize_overflow=False
    )
    _patch_the_language_once()
    _know_shapes_and_types()


def _patch_the_language_once() -> None:
    """A call from kernel to function does it each time and for good: once a module is enough."""
    patch_and_call, patched = interpreter.InterpretedFunction.__call__, set()

    def call(self, *args, **kwargs):
        if self.fn.__module__ in patched:
            return self.rewrite()(*args, **kwargs)
        patched.add(self.fn.__module__)
        return patch_and_call(self, *args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


def _know_shapes_and_types() -> None:
    """Every value makes its shape of objects, and looks its NumPy type up in a table that is made anew."""
    find_dtype, dtypes = interpreter._get_np_dtype, {}

    @functools.cache
    def shape(sizes):
        return core.tuple([core.constexpr(size) for size in sizes]), core.constexpr(math.prod(sizes))

    def tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shape(type.shape if type.is_block() else ())

    def dtype(type):
        name = type.scalar.name
        if name not in dtypes:
            dtypes[name] = find_dtype(type)
        return dtypes[name]

    core.tensor.__init__ = tensor
    interpreter._get_np_dtype = dtype
