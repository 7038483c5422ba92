"""A loop of prompts: each is continued by itself, nothing is remembered but the lines that were typed."""

import contextlib
import itertools
import pathlib
import sys
from collections.abc import Callable, Iterator

import platformdirs

from gpt_jax.errors import InputError

HISTORY_LINES = 1000


def converse(write: Callable[[list[str], int], None]) -> None:
    """Asks for prompts until the input ends (Ctrl-D), and gives each to `write`, with its number from 0.

    Ctrl-C ends a continuation, and where none is under way the loop: KeyboardInterrupt. What a prompt cannot be is said
    in one line, and the next one asked for.
    """
    terminal = sys.stdin.isatty()
    with _history() if terminal else contextlib.nullcontext():
        for number in itertools.count():
            try:
                prompt = input('> ' if terminal else '')
            except EOFError:
                if terminal:
                    print()
                return
            except UnicodeDecodeError:
                raise InputError('standard input is not UTF-8; convert it, e.g. with iconv') from None
            try:
                write([prompt], number)
            except InputError as error:
                print(f'error: {error}', file=sys.stderr)
            except KeyboardInterrupt:
                if not terminal:
                    raise
                print('interrupted; Ctrl-D leaves', file=sys.stderr)


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """Line editing, and the lines of earlier sessions."""
    try:
        import readline
    except ImportError:  # Python can be built without it
        yield
        return
    path = pathlib.Path(platformdirs.user_state_dir('gpt_jax'), 'prompts')
    readline.set_history_length(HISTORY_LINES)
    with contextlib.suppress(FileNotFoundError):
        readline.read_history_file(path)
    try:
        yield
    finally:
        path.parent.mkdir(parents=True, exist_ok=True)
        readline.write_history_file(path)
