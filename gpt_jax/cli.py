"""What every verb does alike: `--help`, one line for bad input, the compilation cache."""

import logging
import os
import pathlib
import re
import sys
from collections.abc import Callable, Sequence

from absl import flags

from gpt_jax.errors import InputError


def run(main: Callable[[], int | None], doc: str, key_flags: Sequence[str]) -> None:
    """Parses the flags, calls `main`, and exits: 0 on success and after --help, 1 with one line on bad input.

    Args:
      main: the verb's work; what it returns is the exit status (None: 0).
      doc: the verb's module docstring, printed by --help.
      key_flags: the names of the verb's flags, in the order of --help.
    """
    if any(argument in ('--help', '-help', '-h', '--helpfull', '--helpshort') for argument in sys.argv[1:]):
        print(_help(doc, key_flags))
        sys.exit(0)
    try:
        rest = flags.FLAGS(sys.argv)[1:]
        if rest:
            raise InputError(f'unexpected argument {rest[0]!r}; flags are written --name=value')
        _quieten()
        sys.exit(main())
    except KeyboardInterrupt:
        print('interrupted; nothing was in progress that needed saving', file=sys.stderr)
        sys.exit(130)
    except (InputError, flags.Error) as error:
        _complain(error)
    except (AttributeError, KeyError, TypeError, FileNotFoundError, ImportError, SyntaxError) as error:
        # ml_collections lets these out for a mistyped key or a wrong file; any other place is a bug of ours.
        if flags.FLAGS.is_parsed():
            raise
        _complain(error)


def _complain(error: Exception) -> None:
    message = ' '.join(str(error).split()) or type(error).__name__
    print(f'error: {message}', file=sys.stderr)
    sys.exit(1)


def _help(doc: str, key_flags: Sequence[str]) -> str:
    lines = [doc.strip(), '', 'Flags:']
    for name in key_flags:
        flag = flags.FLAGS[name]
        default = '' if flag.default in (None, '') else f' (default: {flag.default})'
        help_text = re.sub(r'^path to config file\.$', 'the experiment, a file of configs/', flag.help)
        lines.append(f'  --{name}: {help_text}{default}')
    return '\n'.join(lines)


def _quieten() -> None:
    """Libraries report what a user can do nothing about; our own lines are enough."""
    for name in ('absl', 'orbax', 'jax._src.xla_bridge', 'grain'):
        logging.getLogger(name).setLevel(logging.ERROR)


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, unless JAX_COMPILATION_CACHE_DIR names another or is ''."""
    import jax
    import platformdirs

    if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
        folder = pathlib.Path(platformdirs.user_cache_dir('gpt_jax'), 'xla')
        jax.config.update('jax_compilation_cache_dir', str(folder))
    # jax's default of one second would leave out most of a small model's programs.
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)
