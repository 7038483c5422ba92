"""The debugger at a terminal or on a pipe."""

import sys
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gpt_jax.checkpoints import LanguageModel
from gpt_jax.errors import InputError
from gpt_jax.inference.debug import picture, views
from gpt_jax.inference.debug.microscope import Microscope
from gpt_jax.inference.debug.session import Debugger, Reply
from gpt_jax.inference.sampling import Sampling

READY = '(debug) '
PIPE_WIDTH = 160  # columns, where no terminal says how many it has


def run(ready: LanguageModel, prompts: Sequence[str], sampling: Sampling, max_new_tokens: int, seed: int = 0) -> None:
    """Generates under commands from standard input, until it ends or one says quit.

    Args:
      ready: the model.
      prompts: the one text to continue; empty starts a new document.
      sampling: how tokens are chosen.
      max_new_tokens: where the command `run` stops.
      seed: of the draws; the text is that of the first sample that `generate` draws with it.

    Raises:
      InputError: several prompts, a prompt that is too long, or max_new_tokens below 1.
    """
    if len(prompts) != 1:
        raise InputError(f'--debug takes one prompt, and there are {len(prompts)}; --noprompt_lines joins lines')
    tokens = ready.tokenizer.encode(prompts[0])
    debugger = Debugger(Microscope(ready.model, ready.params), ready.tokenizer, tokens, max_new_tokens)
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    state, reply = debugger.start(sampling, seed)
    show(reply, console)
    for line in _commands(console):
        try:
            state, reply = debugger.respond(state, line)
        except KeyboardInterrupt:
            # The command is given up, the session is not.
            reply = ['interrupted; nothing has changed']
        show(reply, console)
        if state.done:
            break


def show(reply: Reply, console: Console) -> None:
    """Prints tables and lines, and writes pictures."""
    for part in reply:
        if isinstance(part, views.Table):
            console.print(Text(part.title, style='bold'), soft_wrap=True)
            _print_table(part, console)
        elif isinstance(part, picture.Picture):
            console.print(_saved(part), soft_wrap=True)
        else:
            console.print(part, soft_wrap=True)


def _saved(part: picture.Picture) -> str:
    try:
        picture.save(part)
    except InputError as error:
        return f'error: {error}'
    return f'written: {part.path}'


def _print_table(table: views.Table, console: Console) -> None:
    shown = Table(box=None, header_style='dim', pad_edge=False)
    for name in table.header:
        shown.add_column(Text(name), no_wrap=True)
    for index, row in enumerate(table.rows):
        shown.add_row(*map(Text, row), style='bold green' if index == table.marked else None)
    with console.capture() as captured:
        console.print(shown)
    # Cells are padded to the width of their column, the last one in vain.
    console.file.writelines(f'{line.rstrip()}\n' for line in captured.get().splitlines())


def _commands(console: Console) -> Iterator[str]:
    if sys.stdin.isatty():
        import readline  # noqa: F401 - importing it gives `input` its history and editing

        while True:
            try:
                yield input(READY)
            except EOFError:
                console.print()
                return
    sys.stdin.reconfigure(errors='replace')
    for line in sys.stdin:
        # So that what comes out reads like a session.
        console.print(f'{READY}{line.rstrip()}', soft_wrap=True)
        yield line
