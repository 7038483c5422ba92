"""A run that is killed again and again, held against the same run left alone.

    report = campaign([sys.executable, '-m', 'gpt_jax.main', '--config=...'], run, folder, kills=20)
    report.proven                               # no difference between the two, and nothing else went wrong

Every kill has an aim: while the run starts, takes steps, evaluates or saves. Where it hit is read from what the run had
printed and from the folder of its checkpoints, right before the signal. A killed run is started again by the same
command, until it is done; where kills are left, another one begins.
"""

import contextlib
import dataclasses
import itertools
import math
import pathlib
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from gpt_jax.checkpoints.committing import REMOVED, SAVING
from gpt_jax.checkpoints.finding import finished_steps, read_step_meta
from gpt_jax.checkpoints.loading import leaf_name, read_items, stored_shapes
from gpt_jax.config import RunConfig
from gpt_jax.errors import InputError, first_line
from gpt_jax.training.logs import read_rows
from gpt_jax.training.speed import OF_THE_CLOCK

# What is done to a run, most of all what no program can answer to. A fixed order covers each pair of signal and aim.
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT)
AIMS = ('start', 'save', 'steps', 'evaluation', 'save')
POLL_SECONDS = 0.003  # a save of a small model takes some ten milliseconds


@dataclasses.dataclass(frozen=True)
class Kill:
    """One end that was not the run's own.

    Attributes:
      signal: what it was sent.
      phase: what it was at: 'start', 'steps', 'evaluation', 'save', or 'removal' of an older checkpoint.
      seconds: how long it had run for.
      step: the last step that it had printed, 0 for none.
    """

    signal: signal.Signals
    phase: str
    seconds: float
    step: int


@dataclasses.dataclass(frozen=True)
class Report:
    """What a campaign found.

    Attributes:
      kills: in their order.
      arrays, values, rows: how many arrays, numbers in them and rows of metrics.jsonl were held against each other.
      runs: how many runs these were of.
      differences: what was not the same, and what else went wrong, a line each.
    """

    kills: list[Kill]
    runs: int
    arrays: int
    values: int
    rows: int
    differences: list[str]

    @property
    def proven(self) -> bool:
        """Whether every run that was killed ended as the one that was left alone."""
        return not self.differences

    def table(self) -> str:
        """The kills, by what the run was at and by signal."""
        counts = Counter((kill.phase, kill.signal.name) for kill in self.kills)
        names = list(dict.fromkeys(number.name for number in SIGNALS))
        phases = [phase for phase in (*dict.fromkeys(AIMS), 'removal') if any(key[0] == phase for key in counts)]
        lines = [' '.join([f'{"killed in":12}', *(f'{name:>8}' for name in names), f'{"in all":>8}'])]
        for phase in (*phases, 'in all'):
            row = [sum(count for key, count in counts.items() if phase in (key[0], 'in all') and key[1] == name)
                   for name in names]  # fmt: skip
            lines.append(' '.join([f'{phase:12}', *(f'{count:8}' for count in row), f'{sum(row):8}']))
        return '\n'.join(lines)


def campaign(
    command: Sequence[str],
    run: RunConfig,
    folder: pathlib.Path,
    kills: int,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> Report:
    """Runs `command` undisturbed, then killed `kills` times, and compares all that is left at the end of each.

    Args:
      command: trains; the workdir is added to it.
      run: what it trains, for its cadences.
      folder: where the runs go, which must not be there or be empty. Runs without a difference are removed at once.
      kills: how many; it takes about as many starts of the program.
      seed: of the moments.
      say: is told each kill, in a line.

    Raises:
      InputError: the run fails by itself, or `folder` is in use.
    """
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f'--workdir={folder} is not empty; name a new folder, or remove it')
    folder.mkdir(parents=True, exist_ok=True)
    alone, rng = _Run(command, run, folder / 'undisturbed'), random.Random(seed)
    with alone.started():
        alone.start_up()
        alone.end()
    alone.check_finished()
    first_step = min(alone.first_step, alone.seconds)
    say(f'undisturbed: {alone.seconds:.1f} s, its first step after {first_step:.1f} s')
    todo = list(itertools.islice(zip(itertools.cycle(SIGNALS), itertools.cycle(AIMS), strict=False), kills))
    done: list[Kill] = []
    differences, compared, number = [], (0, 0, 0), 0
    while todo:
        number += 1
        killed = _Run(command, run, folder / f'killed-{number}')
        while True:
            with killed.started():
                if not todo or not killed.reach(todo[0][1], rng, first_step, alone.step):
                    killed.end()
                    break
                kill = Kill(todo[0][0], killed.phase, killed.seconds, killed.step)
                first_step = min(first_step, killed.first_step)  # the first of all may have had to compile
                if not killed.end(kill.signal):
                    break
            del todo[0]
            done.append(kill)
            say(f'{len(done)}/{kills}: {kill.signal.name} after {kill.seconds:.1f} s, step {kill.step}: {kill.phase}')
            differences += killed.misbehaviour(kill.signal)
        if todo:  # the run was done before the moment came: it may have none of that kind
            todo[0] = (todo[0][0], 'steps')
        killed.check_finished()
        found, compared = _compare(alone.workdir, killed.workdir)
        differences += [f'{killed.workdir}: {difference}' for difference in found]
        if not found:
            shutil.rmtree(killed.workdir)
    if any('differ' in difference for difference in differences):
        differences += _noise(command, run, folder, alone)
    return Report(done, number, *compared, differences)


class _Run:
    """One workdir, and the process that trains there, watched from outside."""

    def __init__(self, command: Sequence[str], run: RunConfig, workdir: pathlib.Path):
        self.workdir, self._run = workdir, run
        self._command = [*command, f'--workdir={workdir}']
        self._output, self._errors = (workdir.with_name(f'{workdir.name}.{name}.txt') for name in ('out', 'err'))
        self._process: subprocess.Popen | None = None
        self._left_over: set[str] = set()
        self._began = self._ended = 0.0
        self.first_step = math.inf  # the fewest seconds to a first step that was waited for

    @contextlib.contextmanager
    def started(self) -> Iterator[None]:
        """The process, for the length of the block, in a session of its own: Ctrl-C is not for it."""
        with self._output.open('wb') as output, self._errors.open('wb') as errors:
            self._began, self._ended = time.monotonic(), 0.0
            self._left_over = self._unfinished()  # by a process that was killed before
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, start_new_session=True
            )
            try:
                yield
            finally:
                self._process.kill()
                self._process.wait()

    @property
    def seconds(self) -> float:
        """Since it was started, until it ended."""
        return (self._ended or time.monotonic()) - self._began

    @property
    def step(self) -> int:
        """The last one that it has printed."""
        found = re.findall(rb'^step (\d+)/', self._output.read_bytes(), re.MULTILINE)
        return int(found[-1]) if found else 0

    @property
    def phase(self) -> str:
        """What it is at."""
        unfinished = self._unfinished() - self._left_over
        if unfinished:
            return 'save' if any(name.startswith(SAVING) for name in unfinished) else 'removal'
        lines = re.findall(rb'^step (\d+)/\d+ +(\w+)', self._output.read_bytes(), re.MULTILINE)
        if not lines:
            return 'start'
        step, what = lines[-1]
        every = self._run.eval.every_steps
        return 'evaluation' if what == b'loss' and every and int(step) % every == 0 else 'steps'

    def _unfinished(self) -> set[str]:
        """The checkpoints that are being written or removed."""
        with contextlib.suppress(OSError):  # there is no such folder yet
            names = {path.name for path in (self.workdir / 'checkpoints').iterdir()}
            return {name for name in names if name.startswith(SAVING) or name.endswith(REMOVED)}
        return set()

    def until(self, happens: Callable[[], bool], seconds: float = float('inf')) -> bool:
        """Waits; whether it happened before the process was done, or the time was."""
        deadline = time.monotonic() + seconds
        while not happens():
            if self._process.poll() is not None or time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
        return self._process.poll() is None

    def start_up(self) -> None:
        """Waits for its first step."""
        if self.until(lambda: self.step > 0):
            self.first_step = min(self.first_step, self.seconds)

    def reach(self, aim: str, rng: random.Random, first_step: float, steps: int) -> bool:
        """Waits for a moment of what is aimed at; False where the process was done before it came.

        `first_step` are the seconds in which a run has come to its first step, and `steps` those that it has.
        """
        # A start that is faster than those before, and a run that goes on behind the step, are hit as well.
        if aim == 'start':
            self.until(lambda: self.step > 0, rng.uniform(0, first_step))
            return self._process.poll() is None
        self.start_up()
        if aim == 'steps':
            step = rng.randint(1, max(1, steps))
            return self.until(lambda: self.step >= step)
        # Some of the evaluations and saves pass by, so that it is not always the first.
        for _ in range(rng.randrange(1, 3)):
            if not self.until(lambda: self.phase != aim) or not self.until(lambda: self.phase == aim):
                return False
        self.until(lambda: False, rng.choice((0.0, 0.003, 0.01, 0.03)))
        return self._process.poll() is None

    def end(self, number: signal.Signals | None = None) -> bool:
        """Sends a signal, if any, and waits; whether the process had not ended by itself."""
        if number is not None:
            self._process.send_signal(number)
        status = self._process.wait()
        self._ended = time.monotonic()
        return status != 0

    def misbehaviour(self, number: signal.Signals) -> list[str]:
        """What was wrong with how the process answered to a signal: it ends with 128 + its number and no traceback."""
        status, errors = self._process.returncode, self._errors.read_text(encoding='utf-8', errors='replace')
        if status == -number:  # killed; or hit before Python had read the first line of gpt_jax
            return []
        if status != 128 + number:
            return [f'{self.workdir}: {number.name} ended it with status {status}: {first_line(errors.strip())}']
        traceback = 'Traceback (most recent call last)' in errors
        return [f'{self.workdir}: {number.name} ended it with a traceback: see {self._errors}'] if traceback else []

    def check_finished(self) -> None:
        """Raises InputError where the process failed, and nothing had been done to it."""
        if self._process.returncode != 0:
            lines = self._errors.read_text(encoding='utf-8', errors='replace').strip().splitlines() or ['no message']
            raise InputError(
                f'the run in {self.workdir} ended by itself with status {self._process.returncode}: '
                f'{lines[-1].removeprefix("error: ")}'
            )


def _compare(alone: pathlib.Path, killed: pathlib.Path) -> tuple[list[str], tuple[int, int, int]]:
    """What differs between two finished workdirs, and how many arrays, numbers and rows were compared."""
    steps, steps_there = (finished_steps(workdir / 'checkpoints') for workdir in (alone, killed))
    if steps[-1:] != steps_there[-1:]:
        return [f'its last checkpoint differs: of {steps_there} in place of {steps}'], (0, 0, 0)
    differences, arrays, values = [], 0, 0
    # A run that a signal has stopped saves where it is, and may keep that step in place of an older one.
    for step in sorted({*steps} & {*steps_there}):
        folders = [workdir / 'checkpoints' / str(step) for workdir in (alone, killed)]
        if read_step_meta(folders[0]) != read_step_meta(folders[1]):
            differences.append(f'the descriptions of step {step} differ')
        trees = [_arrays(folder) for folder in folders]
        wrong = [name for name in trees[0] | trees[1] if not _same_bits(*(tree.get(name) for tree in trees))]
        if wrong:
            differences.append(f'{len(wrong)} of {len(trees[0])} arrays of step {step} differ, {wrong[0]} among them')
        arrays += len(trees[0])
        values += sum(array.size for array in trees[0].values())
    rows, rows_there = (_rows(workdir) for workdir in (alone, killed))
    if rows != rows_there:
        first = next((i for i, pair in enumerate(zip(rows, rows_there, strict=False)) if pair[0] != pair[1]), None)
        which = f'at step {rows[first]["step"]}' if first is not None else f'{len(rows_there)} in place of {len(rows)}'
        differences.append(f'the rows of metrics.jsonl differ: {which}')
    samples = [path.read_bytes() if (path := workdir / 'samples.txt').exists() else b'' for workdir in (alone, killed)]
    if samples[0] != samples[1]:
        differences.append('samples.txt differs')
    return differences, (arrays, values, len(rows))


def _arrays(step_folder: pathlib.Path) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint by name: parameters, optimizer, and whatever else training keeps."""
    arrays = {}
    for item in sorted(path.name for path in step_folder.iterdir() if path.is_dir() and path.name != 'meta'):
        tree = read_items(step_folder, **{item: stored_shapes(step_folder, item)})[item]
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        arrays |= {f'{item}/{leaf_name(path)}': np.asarray(leaf) for path, leaf in leaves}
    return arrays


def _same_bits(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    if one is None or other is None or (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return one.tobytes() == other.tobytes()  # a NaN equals itself, and 0 is not -0


def _rows(workdir: pathlib.Path) -> list[dict[str, Any]]:
    rows = read_rows(workdir / 'metrics.jsonl')
    return [{name: value for name, value in row.items() if name not in OF_THE_CLOCK} for row in rows]


def _noise(command: Sequence[str], run: RunConfig, folder: pathlib.Path, alone: _Run) -> list[str]:
    """Whether the machine itself gives other bits each time: then no kill is to blame."""
    again = _Run(command, run, folder / 'undisturbed-again')
    with again.started():
        again.end()
    again.check_finished()
    if not _compare(alone.workdir, again.workdir)[0]:
        shutil.rmtree(again.workdir)
        return []
    return [
        f'but so does a second undisturbed run, {again.workdir}: this machine does not give the same bits twice '
        '(on GPUs XLA_FLAGS=--xla_gpu_deterministic_ops=true does)'
    ]
