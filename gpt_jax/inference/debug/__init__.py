"""Generating step by step, with a look at what the model sees: `generate --debug`.

microscope.py   a model: layers' guesses at the next token, and attention
choice.py       what each filter does, and the draw: those of `generate`
moment.py       one choice: distributions before and after each filter, entropy, rank
session.py      commands -> replies: the state and what changes it
views.py        moments, lenses and attention as tables
picture.py      attention as a PNG
terminal.py     commands from a terminal or a pipe, replies to it
"""

from gpt_jax.inference.debug.session import Debugger, State
from gpt_jax.inference.debug.terminal import run

__all__ = ['Debugger', 'State', 'run']
