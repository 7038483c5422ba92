"""The one exception that means: the user gave something wrong.

Every room may raise it. Its message is one line that names the key or file, the value and the way out; the verbs
print that line and exit with status 1 (see `gpt_jax.cli`). Anything else that escapes is a bug and keeps its traceback.
"""

import re


class InputError(ValueError):
    """What the user gave cannot be used; `str(error)` is one line that says what, and what to do instead."""

    def __init__(self, message: str = ''):
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """`text` with what would break its line, such as a line end in a file's name, written as Python writes it."""
    return re.sub(r'[\x00-\x1f\x7f]', lambda found: repr(found[0])[1:-1], text)


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line; its type where it says nothing."""
    return printable(next(iter(str(error).splitlines()), type(error).__name__))


def printable(text: str, most: int = 500) -> str:
    """Text that somebody else chose, for one line of a message: what a terminal might obey is escaped."""
    text = ''.join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text[:most])
    return text if len(text) < most else f'{text[:most]}...'
