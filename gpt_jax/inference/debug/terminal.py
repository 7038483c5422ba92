"""The debugger at a terminal or on a pipe."""

import cmd
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gpt_jax.checkpoints import LanguageModel
from gpt_jax.errors import InputError
from gpt_jax.inference.debug import views
from gpt_jax.inference.debug.choice import ModelInspector
from gpt_jax.inference.debug.session import COMMANDS, Debugger, Reply, settings
from gpt_jax.inference.sampling import Sampling

PROMPT = '(debug) '
PIPE_WIDTH = 160  # columns, where no terminal says how many it has


def run_debugger(
    loaded: LanguageModel, prompts: Sequence[str], sampling: Sampling, max_new_tokens: int, seed: int = 0
) -> None:
    """Generates under commands from standard input, until it ends or one says quit.

    Args:
      loaded: the model.
      prompts: the one text to continue; empty starts a new document.
      sampling: how tokens are chosen.
      max_new_tokens: where the command `run` stops.
      seed: of the draws; the text is that of the first sample that `generate` draws with it.

    Raises:
      InputError: several prompts, a prompt that is too long, or max_new_tokens below 1.
    """
    if len(prompts) != 1:
        raise InputError(f'--debug takes one prompt, and there are {len(prompts)}; --noprompt_lines joins lines')
    tokens = loaded.tokenizer.encode(prompts[0])
    debugger = Debugger(ModelInspector(loaded.model, loaded.params), loaded.tokenizer, tokens, max_new_tokens)
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    DebugPrompt(debugger, sampling, seed, console).cmdloop()


class DebugPrompt(cmd.Cmd):
    """Lines from standard input to the debugger, its replies to a console; Tab completes on a terminal."""

    def __init__(self, debugger: Debugger, sampling: Sampling, seed: int, console: Console):
        super().__init__(stdin=sys.stdin)
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
    shown = Table(box=None, header_style='dim', pad_edge=False)
    for name in table.header:
        shown.add_column(Text(name), no_wrap=True)
    for index, row in enumerate(table.rows):
        shown.add_row(*map(Text, row), style='bold green' if index == table.marked else None)
    with console.capture() as captured:
        console.print(shown)
    # Cells are padded to the width of their column, the last one in vain.
    console.file.writelines(f'{line.rstrip()}\n' for line in captured.get().splitlines())
