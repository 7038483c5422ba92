"""What may be typed to the debugger: the commands, and their arguments."""

import dataclasses
import json

from gpt_jax.data import Tokenizer
from gpt_jax.errors import InputError
from gpt_jax.inference.sampling import Sampling

# Name, arguments, what it does. Of several that begin alike, their first letters mean the first one.
COMMANDS = (
    ('step', '', 'take the token marked >; so does an empty line'),
    ('run', '[N]', 'N steps, or all that max_new_tokens leaves'),
    ('back', '[N]', 'undo the last N tokens, or one'),
    ('pick', 'RANK', 'take the token of this rank instead'),
    ('force', 'TEXT', 'take the tokens of a text; "..." has escapes as in JSON, #ID is one token'),
    ('show', '', 'the candidates again'),
    ('top', 'N', 'how many candidates are shown'),
    ('lens', '', 'what each layer would say comes next'),
    ('attention', 'LAYER HEAD [FILE.png]', 'who looks at whom; both from 0, HEAD may be mean'),
    ('history', '', 'the tokens taken so far, with rank and probability'),
    ('text', '', 'prompt and text so far'),
    ('set', 'NAME=VALUE', 'change a setting of sampling from here on, e.g. temperature=0.7'),
    ('seed', 'N', 'draw with another seed from here on'),
    ('help', '', 'this list'),
    ('quit', '', 'leave; so does the end of the input'),
)

LARGEST_SEED = 2**32 - 1


def full_name(name: str) -> str:
    """The command that begins so; an empty line is a step. Raises InputError where none does."""
    for command, _, _ in COMMANDS:
        if command.startswith(name):
            return command
    raise InputError(f'{name!r} is no command; help lists them')


def number(argument: str, name: str, least: int, most: int | None = None) -> int:
    """A whole number from `least` to `most`. Raises InputError on anything else."""
    argument = argument.strip()
    if argument.isascii() and argument.isdigit() and least <= int(argument) and (most is None or int(argument) <= most):
        return int(argument)
    end = 'or more' if most is None else f'to {most}'
    raise InputError(f'{name}={argument!r} must be a whole number, {least} {end}')


def tokens(argument: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of a text as `force` takes it: as it stands, as a JSON string, or #ID.

    Raises:
      InputError: it is empty, not JSON though it begins with quotes, or an id that the vocabulary has not.
    """
    if argument.startswith('#'):
        return [number(argument[1:], '#ID', 0, tokenizer.vocab_size - 1)]
    text = argument
    if argument.startswith('"'):
        try:
            text = json.loads(argument)
        except ValueError:
            raise InputError(f'{argument}: not a JSON string; close the quotes, or write none') from None
    if not text:
        raise InputError('force needs a text, as in: force " the"')
    return tokenizer.encode(text)


def changed(sampling: Sampling, argument: str) -> Sampling:
    """The settings with NAME=VALUE in them. Raises InputError where there is no such setting, or no such value."""
    name, _, text = (part.strip() for part in argument.partition('='))
    kinds = {field.name: type(getattr(sampling, field.name)) for field in dataclasses.fields(sampling)}
    numbers = {known: kind for known, kind in kinds.items() if kind in (bool, int, float)}
    if name not in numbers:
        raise InputError(f'{name!r} is no setting; set takes NAME=VALUE, with one of {", ".join(numbers)}')
    try:
        value = json.loads(text) if numbers[name] is bool else numbers[name](text)
    except ValueError:
        value = None
    if not isinstance(value, numbers[name]):
        kind = {bool: 'true or false', int: 'a whole number', float: 'a number'}[numbers[name]]
        raise InputError(f'{name}={text}: must be {kind}')
    return dataclasses.replace(sampling, **{name: value})
