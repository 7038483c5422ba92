"""GPT-2 and GPT-3 language models in JAX/Flax. The rooms are laid out in docs/ARCHITECTURE.md."""

import sys

__version__ = '0.1.0'

# `python -m gpt_jax.VERB` imports this first, with '-m' in place of the program's name. What the verb imports next
# takes a moment, in which Ctrl-C would end in a traceback.
if sys.argv[:1] == ['-m'] and any(argument.startswith('gpt_jax.') for argument in sys.orig_argv):
    from gpt_jax.signals import end_at_once

    end_at_once()
