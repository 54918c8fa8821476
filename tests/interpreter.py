"""Triton's interpreter, with less to do, as it takes most of the tests' time; and one fault of it mended."""

import dataclasses
import functools
import math

import triton
from triton.language import core, semantic
from triton.runtime import interpreter


def repair() -> None:
    """Triton 3.9 makes bytes of a scalar mask where it is spread over a block, and refuses them where it is used."""
    builder = interpreter.InterpreterBuilder

    def of_bools(use, position):
        def call(self, *args):
            mask = args[position]
            mask = interpreter.TensorHandle(mask.data.astype(bool, copy=False), mask.dtype)
            return use(self, *args[:position], mask, *args[position + 1 :])

        return call

    builder.create_masked_load = of_bools(builder.create_masked_load, 1)
    builder.create_masked_store = of_bools(builder.create_masked_store, 2)


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
    """Every value makes its type and its shape of objects, and compares them by making more."""
    make_block, equal_types, types = core.block_type.__init__, core.dtype.__eq__, {}
    broadcast, find_dtype, dtypes = semantic.TritonSemantic.broadcast_impl_value, interpreter._get_np_dtype, {}

    def value_of(size):
        return size.value if isinstance(size, core.constexpr) else size

    def block(self, element_ty, shape):
        key = element_ty.name, *map(value_of, shape)
        if key not in types:
            make_block(self, element_ty, shape)
            types[key] = self.__dict__
        self.__dict__ = types[key]  # nobody changes a type

    def equal_shapes(self, other):
        return core.constexpr([*map(value_of, self.values)] == [*map(value_of, other)])

    def broadcast_if_needed(self, a, b):
        if a.type.is_block() and b.type.is_block() and a.type.shape.values == b.type.shape.values:
            return a, b
        return broadcast(self, a, b)

    @functools.cache
    def shape(sizes):
        return core.tuple([core.constexpr(size) for size in sizes]), core.constexpr(math.prod(sizes))

    def tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shape(tuple(type.shape.values) if type.is_block() else ())

    def dtype(type):
        name = type.scalar.name
        if name not in dtypes:
            dtypes[name] = find_dtype(type)
        return dtypes[name]

    core.block_type.__init__ = block
    core.block_type.__eq__ = lambda self, other: isinstance(other, core.block_type) and self.name == other.name
    core.dtype.__eq__ = lambda self, other: self is other or equal_types(self, other)
    core.tuple.__eq__ = equal_shapes
    core.tensor.__init__ = tensor
    semantic.TritonSemantic.broadcast_impl_value = broadcast_if_needed
    interpreter._get_np_dtype = dtype
