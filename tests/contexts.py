"""One MLIR context for many programs: JAX loads all dialects anew for each.

That takes a fifth of the time of a small program, and the suite compiles tens of thousands.
"""

from jax._src.interpreters import mlir

_make = mlir.make_ir_context


def share():
    """From here on programs are lowered in a new context, and all in the same.

    It keeps what they are made of, large constants too: call this again now and then.
    """
    context = _make()
    mlir.make_ir_context = lambda: context
