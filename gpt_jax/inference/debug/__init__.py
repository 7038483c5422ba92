"""Generating step by step, with a look at what the model sees: `generate --debug`.

choice.py     what a model and each filter make of the next token, and the draw: those of `generate`
session.py    commands -> replies: the state and what changes it
views.py      what there is to see, as tables, and attention as a PNG
terminal.py   commands from a terminal or a pipe, replies to it
"""

from gpt_jax.inference.debug.choice import ModelInspector
from gpt_jax.inference.debug.session import Debugger, SessionState
from gpt_jax.inference.debug.terminal import run_debugger

__all__ = ['Debugger', 'ModelInspector', 'SessionState', 'run_debugger']
