"""What every verb does alike: `--help`, one line for bad input, signals, output streams, the compilation cache."""

import contextlib
import errno
import io
import logging
import os
import pathlib
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from gpt_jax import signals
from gpt_jax.config import FIELDS, help_text
from gpt_jax.errors import InputError, first_line
from gpt_jax.files import WriteError, cache_folder, check_regular, check_writable

if TYPE_CHECKING:
    from jax.sharding import Mesh

# Why standard output may end: a full disk, a terminal that went away.
LOST = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF}

flags.disclaim_key_flags()  # what is defined here for several verbs is the flag of the verb that asked for it


def run(main: Callable[[], int | None], doc: str, key_flags: Sequence[str]) -> None:
    """Parses the flags, calls `main`, and exits: 0 on success and after --help, 1 with one line on bad input.

    Ctrl-C, SIGTERM and SIGHUP end it with 130, 143 and 129, a reader that wants no more of the output with 141.
    A verb that takes an experiment also has --help_config, which prints every key of one.

    Args:
      main: the verb's work; what it returns is the exit status (None: 0).
      doc: the verb's module docstring, printed by --help.
      key_flags: the names of the verb's flags, in the order of --help.
    """
    _use_streams()
    try:
        with signals.unwinding():
            if any(argument in ('--help', '-help', '-h', '--helpfull', '--helpshort') for argument in sys.argv[1:]):
                print(_help(doc, key_flags), flush=True)
                sys.exit(0)
            if 'config' in key_flags and '--help_config' in sys.argv[1:]:
                print(help_text(), flush=True)
                sys.exit(0)
            _parse_flags(key_flags)
            status = main()
            sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read the output wants no more.
        discard_output()
        sys.exit(141)
    except InputError as error:
        _complain(str(error))
    except (KeyboardInterrupt, SystemExit, Exception) as error:
        # A library may have made another error of the exception that the signal raised.
        number = signals.noted() or (signal.SIGINT if isinstance(error, KeyboardInterrupt) else None)
        if number is not None:
            _say_ended(number, error)
            if signals.noted() is not None:
                # What was held is released. Libraries that were stopped in the middle of something would complain at
                # Python's end, or wait for what never comes.
                _flush()
                os._exit(128 + number)
            sys.exit(128 + number)
        if isinstance(error, OSError) and error.errno in LOST and error.filename is None:
            discard_output()
            _complain(f'the output cannot be written ({error.strerror})')
        if isinstance(error, RuntimeError) and 'backend' in str(error) and 'JAX_PLATFORMS' in str(error):
            _complain(f'{first_line(error)}; JAX_PLATFORMS=cpu takes the CPU')
        raise  # the end of --help, or a bug of ours
    sys.exit(status)


def _use_streams() -> None:
    """Makes the standard streams such that what is printed can never fail for its characters, or for want of a stream.

    A stream that the caller closed (`>&-`) is None in Python, and the next file that anybody opens takes its number:
    what the system's libraries print would go into a checkpoint.
    """
    for number, name, mode in ((0, 'stdin', 'r'), (1, 'stdout', 'w'), (2, 'stderr', 'w')):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, encoding='utf-8', closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a notebook has others
            stream.reconfigure(errors='backslashreplace')


def discard_output() -> None:
    """Where standard output can be written to no more, has it lead nowhere: Python flushes it once more at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # gone, or closed
            stream.flush()


def _say_ended(number: int, error: BaseException) -> None:
    meanwhile = '' if isinstance(error, SystemExit | KeyboardInterrupt) else f' ({type(error).__name__} on the way)'
    name = 'interrupted' if number == signal.SIGINT else signal.Signals(number).name
    print(f'{name}; nothing was in progress that needed saving{meanwhile}', file=sys.stderr)


def _parse_flags(key_flags: Sequence[str]) -> None:
    """Parses the command line; an experiment's own code runs meanwhile. Raises InputError."""
    if 'config' in key_flags and (path := _experiment_path()) is not None:
        check_regular(path, f'--config={path}')
    _quieten()
    try:
        rest = flags.FLAGS(_without_unset_keys(sys.argv))[1:]
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        signals.check()  # or it is of a signal
        raise InputError(_explain(error)) from None
    if rest:
        raise InputError(f'unexpected argument {rest[0]!r}; flags are written --name=value')


def read_experiment(flag: flags.FlagHolder) -> ConfigDict:
    """The value of a config flag.

    Raises:
      InputError: the flag is missing, or names a file that gives no experiment.
    """
    if not flag.present:
        raise InputError(f'--{flag.name} is missing; try --{flag.name}=configs/quickstart.py')
    try:
        is_experiment = isinstance(flag.value, ConfigDict)
        flag.value.lock()  # an error while the file was opened or run is reported on first use alone
    except OSError as error:
        raise InputError(_explain(error)) from None
    except AttributeError:
        is_experiment = False
    if not is_experiment:
        raise InputError(
            f'--{flag.name}={_experiment_path()}: get_config() must return a ConfigDict, not '
            f'{type(flag.value).__name__}; begin with gpt_jax.config.base()'
        )
    for section, key in _unset_keys(sys.argv):
        flag.value[section][key] = None
    return flag.value


def config_name() -> str:
    """The experiment of --config as a name of folders: 'configs/gpt3.py:1.3b' -> 'gpt3-1.3b'."""
    path, _, argument = config_flags.get_config_filename(flags.FLAGS['config']).partition(':')
    name = pathlib.Path(path).stem
    return f'{name}-{argument}' if argument else name


# ml_collections would read the None as a number, or as the text 'None'.
_UNSET = re.compile(r'--?config\.(\w+)\.(\w+)=None')


def _unset_keys(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """The section and key of each --config.SECTION.KEY=None; a mistyped one is left to the parser of flags."""
    found = [match.groups() for argument in arguments if (match := _UNSET.fullmatch(argument))]
    return [key for key in found if key in {(section, name) for section, name, _ in FIELDS}]


def _without_unset_keys(arguments: Sequence[str]) -> list[str]:
    unset = {f'config.{section}.{key}=None' for section, key in _unset_keys(arguments)}
    return [argument for argument in arguments if argument.lstrip('-') not in unset]


def define_mesh_flag() -> flags.FlagHolder:
    """Defines --mesh, the same for every verb that uses a trained model; `read_mesh` reads it."""
    return flags.DEFINE_string(
        'mesh',
        None,
        'devices to split the model over, e.g. fsdp:8,tensor:2; -1: all that are left (default: one device)',
    )


def define_weights_flag() -> flags.FlagHolder:
    """Defines --weights, the same for every verb that reads a checkpoint."""
    return flags.DEFINE_enum(
        'weights',
        'raw',
        ['raw', 'ema'],
        'of the checkpoint: as they were trained, or their average (of a run with optimizer.ema_decay)',
    )


def read_mesh() -> 'Mesh | None':
    """The mesh that --mesh names, over all devices; None without the flag. Raises InputError, naming the flag."""
    text = flags.FLAGS['mesh'].value
    if text is None:
        return None
    from gpt_jax.parallel import make_mesh, parse_mesh

    config = parse_mesh(text)
    try:
        return make_mesh(config)
    except InputError as error:
        raise InputError(f'--mesh={text}: {error}') from None


def check_exclusive(*names: str) -> None:
    """Raises InputError where more than one of these flags is given."""
    given = [f'--{name}' for name in names if flags.FLAGS[name].present]
    if len(given) > 1:
        raise InputError(f'{" and ".join(given)} exclude each other; give one of them')


def own_flags() -> list[str]:
    """The names of the flags that the verb defines, in its order."""
    return [flag.name for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0])]


def values(given_alone: bool = False) -> dict[str, Any]:
    """The verb's flags by name; with `given_alone`, those on the command line."""
    found = (flags.FLAGS[name] for name in own_flags())
    return {flag.name: flag.value for flag in found if flag.present or not given_alone}


def _experiment_path() -> str | None:
    """The file that --config names, without the argument behind a colon; None where the flag is not given."""
    for number, argument in reversed(list(enumerate(sys.argv))):
        flag, equals, value = argument.partition('=')
        if flag in ('--config', '-config'):
            value = value if equals else ''.join(sys.argv[number + 1 : number + 2])
            return value.partition(':')[0]
    return None


def _explain(error: BaseException) -> str:
    """One line for what is raised while flags are parsed: the flag it is about, or the line of the experiment."""
    path = _experiment_path()
    given = [a for a in sys.argv[1:] if a.startswith('--config')]
    one: BaseException | None = error
    while path is not None and one is not None:
        lines = [frame.lineno for frame in traceback.extract_tb(one.__traceback__) if frame.filename == path]
        if isinstance(one, SyntaxError) and one.filename == path:
            lines = [one.lineno]
        if lines:
            what = one.msg if isinstance(one, SyntaxError) else first_line(one)
            return f'--config={path}: line {lines[-1]}: {type(one).__name__}: {what}'
        one = one.__cause__ or one.__context__
    text = str(error.args[0] if error.args else error)
    if isinstance(error, flags.Error):
        # A config that raises comes with its whole traceback as the message.
        return f'--config={path}: {text.strip().splitlines()[-1]}' if 'Traceback' in text else text
    if 'get_config' in text and isinstance(error, AttributeError):
        return f'--config={path} defines no get_config(); configs/base.py shows one'
    missing = re.match(r"[\W]*'(\w+)\W", text)
    if missing:
        hint = re.search(r'Did you mean "(\w+)"', text)
        wrong = [a.split('=')[0] for a in sys.argv[1:] if re.search(rf'\.{missing[1]}(\.|$)', a.split('=')[0])]
        advice = f'did you mean {hint[1]}?' if hint else '--help_config lists the keys'
        return f'{wrong[0] if wrong else missing[1]}: there is no such key; {advice}'
    return f'{" ".join(given)}: {type(error).__name__}: {text}'


def _complain(message: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads it: the status says it as well
        print(f'error: {" ".join(message.split())}', file=sys.stderr, flush=True)
    sys.exit(1)


def _help(doc: str, key_flags: Sequence[str]) -> str:
    lines = [doc.strip(), '', 'Flags:']
    for name in key_flags:
        flag = flags.FLAGS[name]
        default = '' if flag.default in (None, '') else f' (default: {flag.default})'
        help_text = re.sub(r'^path to config file\.$', 'the experiment, a file of configs/', flag.help)
        lines.append(f'  --{name}: {help_text}{default}')
    if 'config' in key_flags:
        lines.append('  --help_config: print every key of an experiment, with its default and what it means')
    return '\n'.join(lines)


def _quieten() -> None:
    """Libraries report what a user can do nothing about; our own lines are enough."""
    for name in ('absl', 'orbax', 'grain', 'matplotlib'):
        logging.getLogger(name).setLevel(logging.ERROR)
    usual = sys.unraisablehook

    def unless_closed_loop(unraisable: Any) -> None:
        if not (isinstance(unraisable.exc_value, RuntimeError) and 'loop is closed' in str(unraisable.exc_value)):
            usual(unraisable)

    # Where a read or write of a checkpoint fails, tensorstore tells of each other one, at any time later, that its
    # event loop is closed.
    sys.unraisablehook = unless_closed_loop


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, unless JAX_COMPILATION_CACHE_DIR names another or is ''.

    Where that folder cannot be written to, says so and does without: jax would warn at every program.
    """
    import jax

    folder = os.environ.get('JAX_COMPILATION_CACHE_DIR', str(cache_folder('xla')))
    if folder and '://' not in folder:  # jax itself knows object storage
        try:
            check_writable(folder)
        except WriteError as error:
            print(
                f'notice: compiled programs are not kept: {folder} cannot be written ({error.strerror}); '
                'JAX_COMPILATION_CACHE_DIR names another folder',
                file=sys.stderr,
            )
            folder = ''
    jax.config.update('jax_compilation_cache_dir', folder or None)
    # jax's default of one second would leave out most of a small model's programs.
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)
