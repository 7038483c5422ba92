"""What a run tells while it goes: metrics.jsonl, TensorBoard, samples.txt, its lines or bar, and loss.png at its end.

Only the first of several processes writes and prints.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import sys
import tempfile
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from gpt_jax.errors import first_line
from gpt_jax.files import appending, is_address, read_bytes, replacing
from gpt_jax.training.trackers import TENSORBOARD, Tracker, in_groups, open_tracker

# tensorboardX imports PyTorch where it is installed, which takes seconds, for what is not used here. A module that is
# None in sys.modules counts as one that is not installed.
_without_torch = 'torch' not in sys.modules
if _without_torch:
    sys.modules['torch'] = None
try:
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.summary import scalar
finally:
    if _without_torch:
        del sys.modules['torch']

# In place of the last step to keep in a log: a run without a checkpoint starts anew, and writes of step 0 again.
NOTHING = -1
MOST_LOG_BYTES = 2**31  # of metrics.jsonl and samples.txt: those of a run of millions of steps have a few hundred MB
TENSORBOARD_SECONDS = 60  # between the writings of its file


class Output:
    """Standard output, which only shows a run: where it is gone, nothing is lost but the lines."""

    def __init__(self, show: bool = True):
        self._show = show

    def line(self, text: str, write: Callable[[str], None] | None = None) -> None:
        """Prints a line; `write` does so above a bar. Where that fails, it is said once, on standard error."""
        if not self._show:
            return
        write = write or functools.partial(print, flush=True)
        try:
            try:
                write(text)
            except UnicodeEncodeError:
                encoding = getattr(sys.stdout, 'encoding', None) or 'ascii'
                write(text.encode(encoding, 'backslashreplace').decode(encoding))
        except (OSError, ValueError) as error:  # a reader that left, a full disk; a stream that was closed
            self._show = False
            complain(f'standard output cannot be written to ({first_line(error)}); the run goes on without')


def complain(message: str) -> None:
    """Prints a line to standard error."""
    with contextlib.suppress(OSError, ValueError):  # there is no other place left to say it
        print(' '.join(message.split()), file=sys.stderr, flush=True)


@contextlib.contextmanager
def surviving(what: str) -> Iterator[None]:
    """Reports an error of the block in a line on standard error, and lets the run go on.

    For what only shows a run. Whatever is the matter with it, it is worth less than the steps that are still to come.
    """
    try:
        yield
    except Exception as error:
        complain(f'{what}: {type(error).__name__}: {first_line(error)}; the run goes on without')


# How every row of metrics.jsonl begins: where a damaged line swallowed the next one, that one is still found.
_ROW_START = re.compile(rb'(?=\{"step": )')


def read_rows(path: pathlib.Path, last_step: int | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a metrics.jsonl, up to `last_step`; what is damaged, or was torn by a crash, is left out.

    Raises:
      InputError: it is no regular file, or cannot be read.
    """
    return (row for row in _rows_and_damage(path)[0] if last_step is None or row['step'] <= last_step)


def _rows_and_damage(path: pathlib.Path) -> tuple[list[dict[str, Any]], int]:
    """All rows that are whole, and how many are not."""
    rows, damaged = [], 0
    for line in _lines(path):
        intact = line.endswith(b'\n')
        for piece in _ROW_START.split(line):
            # What stands behind the row is not its own: the damage may be to the end of its line.
            row = _row(piece[: piece.rfind(b'}') + 1])
            if row is not None:
                rows.append(row)
            intact = intact and (row is not None or not piece.strip())
        damaged += not intact
    return rows, damaged


def _lines(path: pathlib.Path) -> list[bytes]:
    """Of a log, with their ends; none where there is no file."""
    if not path.exists():
        return []
    return re.findall(rb'[^\n]*\n|[^\n]+', read_bytes(path, most=MOST_LOG_BYTES))


def _keep_aside(path: pathlib.Path) -> None:
    """Gives the log of a run without a checkpoint, which begins anew, another name: it may be all that is left."""
    names = (path.with_name(f'{path.stem}-before-{number}{path.suffix}') for number in itertools.count(1))
    if is_address(path):
        from gpt_jax import storage

        storage.move(path, aside := next(name for name in names if not name.exists()))
    else:
        os.rename(path, aside := next(name for name in names if not os.path.lexists(name)))
    complain(f'{path}: there is no checkpoint that it goes with, so it is kept as {aside.name}')


def _row(text: bytes) -> dict[str, Any] | None:
    """A row as `MetricsLog` writes it, `step` and finite numbers or nulls; None for anything else."""
    try:
        row = json.loads(text)  # bytes that are no UTF-8 are a ValueError as well
        if not isinstance(row, dict) or type(row.get('step')) is not int or not 0 <= row['step'] < 2**63:
            return None
        numbers = [value for value in row.values() if value is not None]
        if all(type(value) in (int, float) and math.isfinite(float(value)) for value in numbers):
            return row
    except (ValueError, RecursionError, OverflowError):
        pass
    return None


class _Spool:
    """What a run adds to: the file or folder itself, or a local copy of what is on object storage.

    Nothing can be added to an object. So the copy is uploaded as a whole, when what is in it should last: before a
    checkpoint is saved, after an evaluation, and at the end. Where that fails it is said once, and the next upload has
    all of it.

    Attributes:
      path: to write to; local.
    """

    def __init__(self, path: pathlib.Path):
        self._address = path if is_address(path) else None
        self.path = path
        if self._address is not None:
            place = tempfile.mkdtemp(prefix='gpt_jax-')
            weakref.finalize(self, shutil.rmtree, place, ignore_errors=True)
            self.path = pathlib.Path(place, path.name)
        self._uploaded: dict[pathlib.Path, tuple[int, int]] = {}
        self._failed = False

    def upload(self) -> None:
        """Makes the object, or those of a folder, what the copy is; what has not changed is left out."""
        if self._address is None:
            return
        from gpt_jax import storage

        for path in sorted(self.path.iterdir()) if self.path.is_dir() else [self.path]:
            try:
                status = path.stat()
                version = status.st_size, status.st_mtime_ns
                if self._uploaded.get(path) != version:
                    storage.upload(path, self._address if path == self.path else self._address / path.name)
                    self._uploaded[path] = version
                self._failed = False
            except OSError as error:
                if not self._failed:
                    complain(f'{self._address} cannot be written ({error.strerror}); it waits until it can')
                self._failed = True


class MetricsLog:
    """Appends rows to metrics.jsonl and to the trackers of the run, which are shown `config`.

    On opening, the file and TensorBoard are cut back to `last_step`, so that after a resume no step stands there twice.
    TensorBoard's files cannot be cut, so they are written anew from the rows that stay. A damaged row is left out, and
    said.

    A disk that is full does not end the run: its checkpoint may still find room, and is worth more. Rows wait until
    they can be written.

    Raises InputError where metrics.jsonl cannot be read or written at the start.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        last_step: int,
        trackers: Sequence[str] = (TENSORBOARD,),
        config: Mapping[str, Any] | None = None,
    ):
        self.path = workdir / 'metrics.jsonl'
        found, damaged = _rows_and_damage(self.path)
        if found and last_step == NOTHING:
            _keep_aside(self.path)
            found = []
        rows = [row for row in found if row['step'] <= last_step]
        if damaged:
            complain(f'{self.path}: {damaged} damaged line(s) left out, {len(rows)} row(s) kept')
        self._spool = _Spool(self.path)
        for path in dict.fromkeys((self.path, self._spool.path)):
            with replacing(path) as file:
                file.write(b''.join(map(_encoded, rows)))
        self._file = appending(self._spool.path)
        self._waiting = b''
        self._failed = False
        self._trackers: dict[str, Tracker] = {}
        for name in trackers:
            with surviving(name):
                if name == TENSORBOARD:
                    # Without any row there is nothing to write them anew from: they may be all that is left of the run.
                    keep = last_step > 0 and not rows
                    self._trackers[name] = _TensorBoard(workdir / TENSORBOARD, keep)
                else:
                    self._trackers[name] = open_tracker(name, workdir, dict(config or {}))
        for row in rows if TENSORBOARD in self._trackers else ():
            self._show(TENSORBOARD, row)
        self.evaluated = {row['step'] for row in rows if 'val_loss' in row}

    def write(self, row: dict[str, Any]) -> None:
        """Adds a row: `step`, and any numbers; the wall-clock `time` is added to it."""
        row = row | {'time': round(time.time(), 3)}
        self._waiting += _encoded(row)
        self._write_waiting()
        for name in list(self._trackers):
            self._show(name, row)
        if 'val_loss' in row:
            self.evaluated.add(row['step'])
            self._spool.upload()

    def sync(self) -> None:
        """Makes sure that all rows are on disk: before the checkpoint that they lead up to."""
        self._write_waiting()
        with surviving(str(self.path)):
            os.fsync(self._file.fileno())
        self._spool.upload()
        for name, tracker in self._trackers.items():
            with surviving(name):
                tracker.sync()

    def close(self) -> None:
        """Writes out what is left."""
        self._write_waiting()
        if self._waiting:
            complain(f'{self.path}: the last {self._waiting.count(bytes([10]))} row(s) could not be written')
        with surviving(str(self.path)):
            self._file.close()
        self._spool.upload()
        for name, tracker in self._trackers.items():
            with surviving(name):
                tracker.close()

    def _write_waiting(self) -> None:
        try:
            while self._waiting:
                # It may take a part: the rest goes behind it as soon as there is room again.
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if not self._failed:
                complain(f'{self.path} cannot be written ({error.strerror}); its rows wait until it can')
            self._failed = True

    def _show(self, name: str, row: dict[str, Any]) -> None:
        try:
            self._trackers[name].write(row)
        except Exception as error:  # as in `surviving`, and then no more of it: a torn file takes no further event
            del self._trackers[name]
            complain(f'{name}: {type(error).__name__}: {first_line(error)}; the run goes on without')


def _encoded(row: dict[str, Any]) -> bytes:
    return (json.dumps(row) + '\n').encode()


class _TensorBoard:
    """An event file of scalars, written by the caller's thread.

    tensorboardX's SummaryWriter has a thread and a queue: when that thread dies of a full disk the queue fills up, and
    the training waits for it for ever.
    """

    def __init__(self, folder: pathlib.Path, keep: bool):
        if folder.is_symlink() or folder.is_file():
            folder.unlink()  # what a link leads to is not the run's to remove or to fill
        elif is_address(folder):
            if not keep:
                folder.rmtree()
        elif not keep:
            shutil.rmtree(folder, ignore_errors=True)
        self._spool = _Spool(folder)
        self._spool.path.mkdir(exist_ok=True)
        self._writer = EventsWriter(str(self._spool.path / 'events'))
        self._flushed = time.monotonic()

    def write(self, row: dict[str, Any]) -> None:
        for name, value in in_groups(row).items():
            event = Event(step=row['step'], wall_time=row.get('time', 0), summary=scalar(name, value))
            self._writer.write_event(event)
        if time.monotonic() - self._flushed > TENSORBOARD_SECONDS:
            self._flush()

    def sync(self) -> None:
        self._flush()
        self._spool.upload()

    def _flush(self) -> None:
        self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self._writer.close()
        self._spool.upload()


# A line of samples.txt: the heading of a block; the name of a preview, or a line of its text.
_HEADING = re.compile(rb'step (\d{1,18})\n')
_INDENTED = re.compile(rb'  [^ \n][^\n]*:\n|    \| [^\n]*\n')


class SampleLog:
    """samples.txt: a heading a step, previews indented below it; cut back to `last_step` on opening.

    Text is indented so that nothing a model writes can look like a heading. A damaged block is left out, and said.

    Attributes:
      steps: those that have previews.

    Raises InputError where samples.txt cannot be read or written at the start.
    """

    def __init__(self, workdir: pathlib.Path, last_step: int):
        self._path = workdir / 'samples.txt'
        lines = _lines(self._path)
        blocks, damaged = _blocks(lines)
        if blocks and last_step == NOTHING:
            _keep_aside(self._path)
            lines, blocks = [], []
        kept = [(step, text) for step, text in blocks if step <= last_step]
        self.steps = {step for step, _ in kept}
        if damaged:
            complain(f'{self._path}: {damaged} damaged block(s) left out, {len(kept)} kept')
        text = b''.join(text for _, text in kept)
        self._spool = _Spool(self._path)
        if text != b''.join(lines) or self._path.is_symlink():
            with replacing(self._path) as file:
                file.write(text)
        if self._spool.path != self._path:
            self._spool.path.write_bytes(text)

    def write(self, step: int, previews: dict[str, Any]) -> None:
        """Adds the named previews of `step`."""
        lines = [f'step {step}']
        for name, text in previews.items():
            lines.append(f'  {name}:')
            lines += [f'    | {line}' for line in str(text).splitlines()]
        with appending(self._spool.path) as file:
            file.write(('\n'.join(lines) + '\n').encode('utf-8', 'replace'))
        self._spool.upload()
        self.steps.add(step)


@dataclasses.dataclass
class _Block:
    """Of samples.txt; `step` is None for lines that belong to none."""

    step: int | None
    lines: list[bytes]


def _blocks(lines: list[bytes]) -> tuple[list[tuple[int, bytes]], int]:
    """The blocks of a samples.txt with their steps, and how many are damaged: of these, what stands before is kept."""
    blocks: list[_Block] = []
    for line in lines:
        if heading := _HEADING.fullmatch(line):
            blocks.append(_Block(int(heading[1]), [line]))
        elif _INDENTED.fullmatch(line) and _is_utf8(line) and blocks:
            if line.startswith(b'  ') and line[2:3] != b' ' and line in blocks[-1].lines:
                # No preview stands twice in a block: the heading between them lost the end of line before it.
                blocks.append(_swallowed(blocks[-1].lines[-1]) or _Block(None, []))
            blocks[-1].lines.append(line)
        else:
            if not blocks or blocks[-1].step is not None:
                blocks.append(_Block(None, [line]))
            if (after := _swallowed(line)) is not None:
                blocks.append(after)
    if lines and lines[-1].startswith(b' ') and not lines[-1].endswith(b'\n') and len(blocks) > 1:
        del blocks[-2]  # a crash tore its writing: the rest of it is worth nothing
    whole = [(block.step, b''.join(block.lines)) for block in blocks if block.step is not None]
    return whole, len(blocks) - len(whole)


def _swallowed(line: bytes) -> _Block | None:
    """The block that begins at the end of a damaged line, which lost the end of line before its heading; or None."""
    heading = re.search(rb'step (\d{1,18})\n\Z', line)
    return heading and _Block(int(heading[1]), [heading[0]])


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


class Progress:
    """The progress of steps `start`..`total`, a bar in a terminal and plain lines elsewhere; silent without `show`."""

    def __init__(self, start: int, total: int, show: bool, output: Output | None = None):
        self._start, self._total = start, total
        self._output = output or Output(show)
        self._began = time.perf_counter()
        self._rate: dict[str, str] = {}
        self._bar: tqdm | None = None
        if show and sys.stderr is not None and sys.stderr.isatty():
            with self._bar_may_go():
                self._bar = tqdm(total=total, initial=start, unit='step', dynamic_ncols=True, file=sys.stderr)

    def step(self, step: int, loss: float, learning_rate: float) -> None:
        """Moves the bar to `step`."""
        if self._bar is not None:
            with self._bar_may_go():
                self._bar.set_postfix(loss=f'{loss:.3f}', lr=f'{learning_rate:.2e}', refresh=False, **self._rate)
                self._bar.update(step - self._bar.n)

    def row(self, row: dict[str, Any]) -> None:
        """Shows a logged row."""
        self._rate = {'tok/s': f'{row["tokens_per_second"]:,.0f}'}
        if self._bar is None:
            done = row['step'] - self._start
            left = (time.perf_counter() - self._began) / max(done, 1) * (self._total - row['step'])
            self.line(
                f'step {row["step"]}/{self._total}  loss {row["loss"]:.4f}  lr {row["learning_rate"]:.2e}  '
                f'{row["tokens_per_second"]:,.0f} tokens/s  {_clock(left)} left'
            )

    def line(self, text: str) -> None:
        """Prints a line, above the bar where there is one."""
        self._output.line(text, None if self._bar is None else functools.partial(self._bar.write, file=sys.stdout))

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            with self._bar_may_go():
                self._bar.close()

    @contextlib.contextmanager
    def _bar_may_go(self) -> Iterator[None]:
        """Does without a bar from where its terminal is gone: there is no place to say it either."""
        try:
            yield
        except (OSError, ValueError):
            self._bar = None


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'


def plot_loss(workdir: pathlib.Path) -> None:
    """Draws metrics.jsonl as loss.png: training and validation loss over steps."""
    from matplotlib.figure import Figure  # half a second, which the start of a run need not wait for

    rows = list(read_rows(workdir / 'metrics.jsonl'))
    training = [(row['step'], row['loss']) for row in rows if row.get('loss') is not None]
    validation = [(row['step'], row['val_loss']) for row in rows if 'val_loss' in row]
    figure = Figure(figsize=(8, 5), layout='constrained')
    axes = figure.subplots()
    if training:
        axes.plot(*zip(*training, strict=True), color='tab:blue', linewidth=1, alpha=0.7, label='training')
    if validation:
        last = validation[-1][1]
        label = f'validation ({last:.3f} at the end)'
        axes.plot(*zip(*validation, strict=True), color='tab:orange', marker='o', markersize=4, label=label)
    axes.set_xlabel('step')
    axes.set_ylabel('loss, nats per token')
    # A name is no formula, may hold bytes that are no text, and letters that the font has no shape for.
    axes.set_title(workdir.name.encode(errors='replace').decode(), parse_math=False)
    axes.grid(alpha=0.3)
    if training or validation:
        axes.legend()
    with replacing(workdir / 'loss.png') as file, warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph .* missing from')
        figure.savefig(file, format='png', dpi=120)
