"""Settings with which programs compile quickly; what they compute is tested, not how fast.

    eval "$(python -m tests.quick)"

takes the environment into a shell, for other programs that are only to run.
"""

import importlib.metadata
import shlex

_FLAGS = {
    # A release that does not know a flag ends the process. Programs are too small to be compiled
    # in parts; 0.10 compiles a third longer with these emitters.
    "0.10": "--xla_cpu_parallel_codegen_split_count=1 --xla_cpu_use_fusion_emitters=false",
    "0.12": "--xla_cpu_parallel_codegen_split_count=1",
}
ENVIRONMENT = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "XLA_FLAGS": _FLAGS.get(".".join(importlib.metadata.version("jaxlib").split(".")[:2]), ""),
}


def share_context():
    """From here on programs are lowered in a new MLIR context, and all in the same.

    JAX loads all dialects anew for each program, a fifth of the time of a small one. A context
    keeps what its programs are made of, large constants too: call this again now and then.
    """
    from jax._src.interpreters import mlir
    from jax._src.lib.mlir import ir

    make = getattr(mlir.make_ir_context, "original", mlir.make_ir_context)
    context = make()

    def shared():
        # A program that is lowered in the middle of another one must not become a part of it.
        return context if ir.Context.current is None else make()

    shared.original = make
    mlir.make_ir_context = shared


if __name__ == "__main__":
    for name, value in ENVIRONMENT.items():
        print(f"export {name}={shlex.quote(value)}")
