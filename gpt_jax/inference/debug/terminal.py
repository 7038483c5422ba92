"""The debugger at a terminal or on a pipe."""

import cmd
import os
import sys
from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gpt_jax.checkpoints import LanguageModel
from gpt_jax.errors import InputError
from gpt_jax.inference.debug import views
from gpt_jax.inference.debug.choice import ModelInspector
from gpt_jax.inference.debug.session import COMMANDS, Debugger, Reply, settings
from gpt_jax.inference.generate import StoppingCriteria
from gpt_jax.inference.sampling import Sampling

PROMPT = '(debug) '
PIPE_WIDTH = 160  # columns, where no terminal says how many it has
LEAST_WIDTH = 40  # columns that tables are made for
GAP = 2  # columns between two of a table
LONGEST_LINE = 2**16  # characters of a command


def run_debugger(
    loaded: LanguageModel, prompts: Sequence[Sequence[int]], sampling: Sampling, max_new_tokens: int, seed: int = 0
) -> None:
    """Generates under commands from standard input, until it ends or one says quit.

    Args:
      loaded: the model.
      prompts: the one text to continue, as token ids; empty starts a new document.
      sampling: how tokens are chosen.
      max_new_tokens: where the command `run` stops.
      seed: of the draws; the text is that of the first sample that `generate` draws with it.

    Raises:
      InputError: several prompts, a prompt that is too long, or max_new_tokens below 1.
    """
    if len(prompts) != 1:
        raise InputError(f'--debug takes one prompt, and there are {len(prompts)}; --noprompt_lines joins lines')
    inspector = ModelInspector(loaded.model, loaded.params, loaded.tokenizer)
    ends = StoppingCriteria.of(loaded, max_new_tokens).ends
    debugger = Debugger(inspector, loaded.tokenizer, prompts[0], max_new_tokens, ends)
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal and 'COLUMNS' not in os.environ:
        console.width = PIPE_WIDTH
    DebugPrompt(debugger, sampling, seed, console).cmdloop()


class Lines:
    """Lines of standard input, which may be a pipe without an end."""

    def readline(self) -> str:
        """The next line; raises InputError where it is too long for a command."""
        line = sys.stdin.readline(LONGEST_LINE + 1)
        if len(line) > LONGEST_LINE:
            raise InputError(f'a command has more than {LONGEST_LINE:,} characters; give one a line')
        return line


class DebugPrompt(cmd.Cmd):
    """Lines from standard input to the debugger, its replies to a console; Tab completes on a terminal."""

    def __init__(self, debugger: Debugger, sampling: Sampling, seed: int, console: Console):
        if sys.stdin is None:
            raise InputError('--debug takes commands from standard input, which is closed')
        super().__init__(stdin=Lines())
        self._debugger, self._console = debugger, console
        self._state, reply = debugger.start(sampling, seed)
        show(reply, console)
        self.use_rawinput = sys.stdin.isatty()
        self.prompt = PROMPT if self.use_rawinput else ''
        if not self.use_rawinput:
            sys.stdin.reconfigure(errors='replace')

    def precmd(self, line: str) -> str:
        """Lines of a pipe are told of, so that what comes out reads like a session."""
        if not self.use_rawinput and line != 'EOF':
            self._console.print(f'{PROMPT}{line.rstrip()}', soft_wrap=True)
        return line

    def onecmd(self, line: str) -> bool:
        """Obeys a line, and tells whether it was the last; `cmd` says 'EOF' at the end of the input."""
        if line == 'EOF':
            if self.use_rawinput:
                self._console.print()
            return True
        try:
            self._state, reply = self._debugger.respond(self._state, line)
        except KeyboardInterrupt:
            # The command is given up, the session is not.
            reply = ['interrupted; nothing has changed']
        show(reply, self._console)
        return self._state.done

    def completenames(self, text: str, *_: object) -> list[str]:
        """The commands that begin so."""
        return [name for name, _, _ in COMMANDS if name.startswith(text)]

    def complete_set(self, text: str, *_: object) -> list[str]:
        """The settings that begin so."""
        return [f'{name}=' for name in settings(self._state.sampling) if name.startswith(text)]


def show(reply: Reply, console: Console) -> None:
    """Prints tables and lines, and writes pictures."""
    for part in reply:
        if isinstance(part, views.Table):
            console.print(Text(part.title, style='bold'), soft_wrap=True)
            _print_table(part, console)
        elif isinstance(part, views.Picture):
            console.print(_saved(part), soft_wrap=True)
        else:
            console.print(part, soft_wrap=True)


def _saved(part: views.Picture) -> str:
    try:
        views.save_picture(part)
    except InputError as error:
        return f'error: {error}'
    return f'written: {part.path}'


def _print_table(table: views.Table, console: Console) -> None:
    """Prints a table whole, or where the terminal is too narrow in parts that each fit beside the names of its rows."""
    widths = [max(map(cell_len, column)) for column in zip(table.header, *table.rows, strict=True)]
    if sum(widths) + GAP * (len(widths) - 1) <= console.width:
        return _print_columns(table, range(len(widths)), console)
    if console.width < LEAST_WIDTH:
        console.print(f'(this terminal has {console.width} columns; tables need {LEAST_WIDTH})', soft_wrap=True)
    # The names take up to half of the line; what is longer is folded into several.
    names = range(table.names)
    taken = sum(min(widths[name], console.width // 2) + GAP for name in names)
    parts, room = [[]], console.width - taken
    for index in range(table.names, len(widths)):
        if parts[-1] and widths[index] > room:
            parts.append([])
            room = console.width - taken
        parts[-1].append(index)
        room -= widths[index] + GAP
    for part in parts:
        _print_columns(table, [*names, *part], console)
    return None


def _print_columns(table: views.Table, columns: Sequence[int], console: Console) -> None:
    shown = Table(box=None, header_style='dim', pad_edge=False)
    for index in columns:
        shown.add_column(Text(table.header[index]), overflow='fold')
    for index, row in enumerate(table.rows):
        style = 'bold green' if index == table.marked else None
        shown.add_row(*(Text(row[column]) for column in columns), style=style)
    with console.capture() as captured:
        console.print(shown)
    # Cells are padded to the width of their column, the last one in vain.
    console.file.writelines(f'{line.rstrip()}\n' for line in captured.get().splitlines())
