"""Where prompts come from: a flag, a file or standard input, in UTF-8."""

import os
import pathlib
import sys

from gpt_jax.errors import InputError


def read_prompts(text: str | None, path: str | os.PathLike | None, one_a_line: bool) -> list[str]:
    """The prompt `text`, or those of the file `path`, or those of standard input where both are None.

    Args:
      text: a prompt, of any number of lines.
      path: a file.
      one_a_line: each line is a prompt, an empty one too; else all of it is one prompt. The line end at the end of the
        input is no part of it. Input without a byte is one empty prompt.

    Raises:
      InputError: the file cannot be read, or the bytes are not UTF-8.
    """
    if text is not None:
        return [text]
    if path is None and sys.stdin.isatty():
        print('prompts, one a line, ended by Ctrl-D:' if one_a_line else 'prompt, ended by Ctrl-D:', file=sys.stderr)
    name = 'standard input' if path is None else f'--prompt_file={path}'
    try:
        data = sys.stdin.buffer.read() if path is None else pathlib.Path(path).expanduser().read_bytes()
    except OSError as error:
        raise InputError(f'{name} cannot be read ({error.strerror}); name a text file') from None
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b'\n', 0, error.start) + 1
        wrong = f'byte 0x{data[error.start]:02x} in line {line}, at offset {error.start}'
        raise InputError(f'{name} is not UTF-8 ({wrong}); convert it, e.g. with iconv') from None
    text = text.removesuffix('\n').removesuffix('\r')
    return [line.removesuffix('\r') for line in text.split('\n')] if one_a_line else [text]
