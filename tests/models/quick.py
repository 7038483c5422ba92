"""Compilation for tests: tiny programs run once, so most of their time is LLVM's."""

import functools

import jax

# The same HLO, to machine code that LLVM does not optimise: a third of the time to compile.
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})
