"""What a piece of code compiles."""

import contextlib

import jax


@contextlib.contextmanager
def programs():
    """The names of what is lowered, each a program to compile."""
    names, name = [], "/jax/core/compile/jaxpr_to_mlir_module_duration"

    def hear(event, seconds, **facts):
        if event == name:
            names.append(facts.get("fun_name", "").removeprefix("jit(").removesuffix(")"))

    jax.monitoring.register_event_duration_secs_listener(hear)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(hear)
