"""Training as one story: from an experiment to a finished run.

`train` reads top to bottom: take the workdir, resolve the experiment, build its parts, restore or begin, and go.
`Trainer` holds what is built and what changes on the way; its methods stand in the order in which they come about.
"""

import contextlib
import dataclasses
import functools
import math
import pathlib
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils

from gpt_jax.checkpoints import Checkpoints, PretrainedWeights, fingerprint, recover
from gpt_jax.checkpoints.finding import describe_save, while_there
from gpt_jax.checkpoints.loading import read_converted
from gpt_jax.config import WEIGHTS_KEYS, RunConfig, as_dict, as_record, differing_keys, parse, read_record
from gpt_jax.data import Batches, Tokenizer, TrainingData, prefetch, prepare
from gpt_jax.errors import InputError
from gpt_jax.models import GPT, attention_kernels
from gpt_jax.parallel import global_batch, make_mesh, processes
from gpt_jax.training import workdir as workdirs
from gpt_jax.training.evaluate import evaluate, make_teacher_forced_preview
from gpt_jax.training.logs import (
    NOTHING,
    MetricsLog,
    Output,
    Progress,
    SampleLog,
    plot_loss,
    read_rows,
    surviving,
)
from gpt_jax.training.optimizer import (
    Lengths,
    as_f32,
    batch_sizes,
    check_rates,
    lengths,
    make_optimizer,
    make_schedule,
    resumed_lengths,
)
from gpt_jax.training.recipe import find_beginning, model_config, resolve
from gpt_jax.training.restoring import initial_params, restore_state
from gpt_jax.training.speed import Throughput
from gpt_jax.training.step import (
    GRADIENT_SPIKE,
    LOSS_SPIKE,
    NOT_FINITE,
    OVERFLOW,
    Batch,
    StepSettings,
    TrainState,
    abstract_state,
    check_memory,
    check_mesh,
    check_multipliers,
    find_not_finite,
    init_state,
    make_eval_step,
    make_train_step,
    micro_batches,
)
from gpt_jax.training.stopping import StopRequest
from gpt_jax.training.tracing import Trace
from gpt_jax.training.trackers import parse_trackers
from gpt_jax.training.watchdog import Watchdog


@dataclasses.dataclass(frozen=True, eq=False)
class TrainResult:
    """How a run ended.

    Attributes:
      workdir: where everything is.
      step: steps taken in all.
      loss: training loss of the last step read, or None where none was taken.
      val_loss: the last one measured, in nats a token, or None.
      params: the parameters after `step`, or None where nothing was left to do.
      model, tokenizer: what they belong to.
      signal: number of the signal that stopped the run, or None.
    """

    workdir: pathlib.Path
    step: int
    loss: float | None
    val_loss: float | None
    params: Any
    model: GPT
    tokenizer: Tokenizer
    signal: int | None = None


class Sampler(Protocol):
    """Writes a sampled preview, as `gpt_jax.inference.sample_text`; handed in, since training knows no inference."""

    def __call__(
        self,
        model: GPT,
        params: Any,
        tokenizer: Tokenizer,
        *,
        prompt: str,
        max_new_tokens: int,
        temperature: float,
        top_k: int,
        seed: int,
    ) -> str:
        """Prompt and continuation."""


def train(
    config: Mapping[str, Any] | RunConfig,
    workdir: str | pathlib.Path,
    sample: Sampler | None = None,
    profile: tuple[int, int] | None = None,
) -> TrainResult:
    """Trains as `config` says, in `workdir`; resumes where an earlier call with the same two stopped.

    Args:
      config: a ConfigDict of `gpt_jax.config.base`'s keys, or a RunConfig.
      workdir: the run's folder; made where missing, and nobody else's until this returns.
      sample: writes the sampled previews, such as `gpt_jax.inference.sample_text`; None leaves these out.
      profile: the first and the last step to trace, into WORKDIR/profile; None: none.

    Raises:
      InputError: the configuration, the data or the folder cannot be used, or steps were skipped in a row once more
        after the run went back for it.
    """
    with processes.ended_together():
        processes.check_alike(_own(config, workdir))
    output = Output(jax.process_index() == 0)
    with workdirs.locked(workdir) as workdir, processes.ended_together():
        recorded = recover(workdir / 'checkpoints', output.line)
        weights = find_beginning(parse(config), recorded, verify=recorded is None)
        run = resolve(config, weights)
        workdirs.check(workdir, run, resumed=recorded is not None)
        checkpoints = Checkpoints(
            workdir / 'checkpoints',
            run.checkpoint.keep_latest,
            run.checkpoint.keep_best,
            run.checkpoint.keep_every_steps,
        )
        with checkpoints, processes.ended_together():
            trainer = Trainer(run, workdir, weights, recorded, checkpoints, sample, output, profile)
            if trainer.is_finished():
                trainer.say(f'finished already, at step {trainer.start}; nothing to do. {trainer.how_to_generate()}')
                val_loss = recorded.get('val_loss')
                return TrainResult(workdir, trainer.start, None, val_loss, None, trainer.model, trainer.data.tokenizer)
            state = trainer.first_state()
            trainer.record()
            with trainer.logs(), StopRequest() as stop, trainer.watchdog():
                step, state = trainer.take_steps(state, stop)
                checkpoints.wait()
            trainer.say(trainer.ending(step, stop.signal))
            return TrainResult(
                workdir,
                step,
                trainer.loss,
                trainer.val_loss,
                state.params,
                trainer.model,
                trainer.data.tokenizer,
                stop.signal,
            )


@dataclasses.dataclass(frozen=True)
class Diverged:
    """Why a run cannot go on as it does: a sentence on what was measured at `step`; whether these were `spikes`."""

    step: int
    reason: str
    spikes: bool = False


class Trainer:
    """A run: what it is made of, and how far it has come.

    Attributes:
      start: the step that it goes on from, 0 for a new one.
      total: the step that it ends with.
      mesh, data, model, lengths, schedule, optimizer: its parts, which do not change.
      loss: of the last step read, or None.
      val_loss: the last one measured, or None.
    """

    def __init__(
        self,
        run: RunConfig,
        workdir: pathlib.Path,
        weights: PretrainedWeights | None,
        recorded: dict[str, Any] | None,
        checkpoints: Checkpoints,
        sample: Sampler | None,
        output: Output,
        profile: tuple[int, int] | None = None,
    ):
        """Builds the parts, those of a resumed run held against its checkpoint.

        Args:
          run: the experiment, resolved.
          workdir: its folder.
          weights: what a new run starts from, or the whole of another run; None: from drawn ones.
          recorded: the `describe()` of the checkpoint that the run goes on from, if any.
          checkpoints: those of the workdir.
          sample: writes the sampled previews.
          output: where the run says what it does.
          profile: the steps to trace.

        Raises:
          InputError: the batch does not fit the mesh, the data cannot be had or are not those of the checkpoint, ...
        """
        self._run, self._workdir = run, workdir
        # Of a new run one of these two may be set: weights to start from, or a run to go on from.
        self._weights = self._other = None
        if recorded is None and weights is not None:
            self._weights, self._other = (weights, None) if weights.meta is None else (None, weights)
        self._checkpoints, self._sample, self._output = checkpoints, sample, output
        self._is_first_process = jax.process_index() == 0
        # What it goes on from: its own checkpoint, or that of another run.
        before = self._other.meta if self._other else recorded or {}
        self.start = before.get('step', 0)
        self._resumes = recorded is not None
        # What the first weights were, and what the state of another run, for the description of checkpoints.
        self._init_from = before.get('init_from')
        self._restored_from = (recorded or {}).get('restore_from')
        self._trace = Trace(profile, workdir)
        self._trackers = parse_trackers(run.train.trackers)
        self.mesh = make_mesh(run.mesh)
        planned = model_config(run, run.model.vocab_size or 1)
        check_mesh(run, self.mesh.shape, planned)
        check_memory(run, planned, self.mesh)
        check_multipliers(run, planned)
        if run.train.steps is not None:  # else the data tell how long it is
            self._check_steps_are_left(run.train.steps)
        self.data = prepare(run.data, tokenizer=weights and weights.tokenizer, log=self.say)
        alike = {
            'data': self.data.fingerprint,
            'tokenizer': self.data.tokenizer.fingerprint,
            'resuming from': self.start,
        }
        processes.check_alike(alike)
        if recorded is not None:
            _check_same_data(self.data, recorded, workdir)
        self.lengths = lengths(run, sum((len(source.tokens) - 1) // run.model.block_size for source in self.data.train))
        # The schedules that earlier steps followed, each with the step at which another took its place.
        self._earlier_schedules = list(before.get('earlier_schedules', ()))
        if recorded is not None:
            self._go_on_with_lengths(recorded)
        self._settings, self._sizes = StepSettings.of(run), batch_sizes(run)
        if self._other is not None:
            self._go_on_from(self._other)
        if self.start < self.lengths.total and (notice := check_rates(run, self.lengths, self.start)):
            self.say(notice)
        self.schedule = make_schedule(run, self.lengths)
        self.optimizer = make_optimizer(run.optimizer, self.schedule, run.precision.moments, run.train.seed)
        self.model = GPT(model_config(run, self.data.tokenizer.vocab_size))
        self.total = max(self.start, self.lengths.total)  # its length may be changed to less than it has come
        if profile is not None and profile[0] > self.total:
            raise InputError(f'--profile={profile[0]}:{profile[1]}: the run has {self.total} steps; name some of them')
        if profile is not None and profile[1] <= self.start:
            self.say(f'--profile={profile[0]}:{profile[1]}: these steps are taken; nothing is traced')
        self.loss: float | None = None
        self.val_loss: float | None = None
        self._in_a_row = 0  # steps skipped until now
        self._put_off = False  # whether a save waits for a step that is not skipped
        self._is_ours = True  # whether the workdir still is
        # Where it went back to an earlier checkpoint, and the rows of the data that it has left out since.
        self._went_back = list((recorded or {}).get('went_back', ()))
        self._separator = self.data.tokenizer.end_of_text if run.data.mask_documents else None

    def _go_on_with_lengths(self, recorded: dict[str, Any]) -> None:
        """Sets the lengths of a resumed run, whose schedule goes on or is replaced from here on.

        Raises:
          InputError: the schedule of steps that were taken is another one.
        """
        run_before = read_record(recorded['config'], 'the checkpoint of this run')
        before = Lengths(**recorded['lengths'])
        self.lengths, is_new = resumed_lengths(self._run, self.lengths, run_before, before, self.start)
        if is_new and self.start < self.lengths.total:
            self._earlier_schedules.append(_described_schedule(run_before, before) | {'until': self.start})
            self.say(
                f'schedule: another one from step {self.start + 1} on, its decay ends at step {self.lengths.decay}; '
                f'that of the steps before ended at step {before.decay}'
            )

    def _go_on_from(self, other: PretrainedWeights) -> None:
        """Takes the place of another run after its last step: in the order of the data, and in what is recorded.

        Steps and the learning rate are this run's own, counted from step 0. Rows go on behind those that were read,
        however large the batches were.

        Raises:
          InputError: no step is left, or a newer gpt_jax wrote the checkpoint.
        """
        self._check_steps_are_left(self.lengths.total)
        step, meta, where = self.start, other.meta, f'checkpoint.restore_from={other.path}'
        run_before, lengths_before = read_record(meta['config'], where), Lengths(**meta['lengths'])
        restored, went_back = meta.get('restore_from') or {}, meta.get('went_back') or [{'rows_left_out': 0}]
        rows = batch_sizes(run_before).rows_before(step) + restored.get('rows_ahead', 0)
        self._restored_from = {
            'path': other.path,
            'step': step,
            'sha256': fingerprint(other.found),
            'rows_ahead': rows - self._sizes.rows_before(step),
            'rows_left_out': restored.get('rows_left_out', 0) + went_back[-1]['rows_left_out'],
        }
        processes.check_alike({'the checkpoint that is restored': self._restored_from['sha256']})
        schedule_before, schedule = (
            _described_schedule(*parts) for parts in ((run_before, lengths_before), (self._run, self.lengths))
        )
        if schedule_before != schedule:
            self._earlier_schedules.append(schedule_before | {'until': step})
        brought = {f'model.{name}' for name in WEIGHTS_KEYS} | {'data.tokenizer', 'data.vocab_size'}
        brought |= {'train.init_from', 'train.init_weights', 'checkpoint.restore_from'}
        differing = differing_keys(meta['config'], self._run, where)
        others = [line for line in differing if line.partition(':')[0] not in brought]
        if self.data.fingerprint != meta['data_fingerprint']:
            others.append(f'data: {meta["data_fingerprint"][:12]} -> {self.data.fingerprint[:12]}')
        if lengths_before.decay != self.lengths.decay:
            others.append(f"the end of the schedule's decay: step {lengths_before.decay} -> {self.lengths.decay}")
        differs = f'; other than there: {", ".join(others)}' if others else ''
        self.say(f'restoring step {step} of {other.path}, with its optimizer{differs}')

    def _check_steps_are_left(self, total: int) -> None:
        """Raises InputError where the run that this one goes on from has come to its end of `total` steps."""
        if self._other is not None and self.start >= total:
            raise InputError(
                f'checkpoint.restore_from={self._other.path}: the run there has come to step {self.start}, and this '
                f'one ends at step {total}: nothing is left to do; give a train.steps above that, or name an earlier '
                'checkpoints/STEP'
            )

    def is_finished(self) -> bool:
        """Whether all steps are taken, and what follows the last one is done."""
        if self.start < self.lengths.total:
            return False
        rows = read_rows(self._workdir / 'metrics.jsonl')
        return any(row['step'] == self.start and 'val_loss' in row for row in rows)

    def first_state(self) -> TrainState:
        """The state after step `start`: restored, or before the first one drawn or taken from another's weights."""
        abstract = abstract_state(self.model, self.optimizer, self.mesh, self._settings)
        if self._resumes:
            return restore_state(
                self._checkpoints.folder / str(self.start),
                abstract,
                self.mesh,
                lambda *trees: self._checkpoints.restore(self.start, *trees, verify=False)[:2],
            )
        if self._other is not None:
            try:
                return while_there(
                    dataclasses.replace(self._other.found, chosen_from=None),
                    lambda found: restore_state(
                        found.folder,
                        abstract,
                        self.mesh,
                        lambda *trees: read_converted(found.folder, params=trees[0], optimizer=trees[1]).values(),
                    ),
                )
            except InputError as error:
                raise InputError(f'checkpoint.restore_from={self._other.path}: {error}') from None
        params = None if self._weights is None else self._load_weights(self._weights)
        return init_state(self.model, self.optimizer, self.mesh, self._run.train.seed, params, self._settings)

    def _load_weights(self, weights: PretrainedWeights) -> Any:
        """The parameters that a new run starts from; says and remembers what they are."""
        params, self._init_from, what = initial_params(weights, self.mesh, self._run.model.block_size)
        self.say(f'weights: {weights.path} ({what})')
        return params

    def record(self) -> None:
        """Writes config.json and tokenizer.json, once all is known to be usable."""
        if self._is_first_process:
            workdirs.write_config(self._workdir, self._run)
            path, tokenizer = self._workdir / 'tokenizer.json', self.data.tokenizer
            if path.is_file() and path.read_bytes() != tokenizer.to_json().encode():
                self.say(f'{path} was damaged, or of another model: restored')
            tokenizer.save(path)

    @contextlib.contextmanager
    def logs(self):
        """Opens the logs, cut back to `start`, for the length of a block; loss.png is drawn at its end."""
        devices = f'{jax.device_count()} {jax.devices()[0].platform} device(s)'
        kernels = attention_kernels(
            self.model.config,
            self.mesh.devices.flat[0],
            documents=self._separator is not None,
            time_is_split=self.mesh.shape['context'] > 1,
        )
        sizes = sorted({size * self._run.model.block_size for _, _, size in self._sizes.stages})
        tokens = f'{sizes[0]:,}' if len(sizes) == 1 else f'{sizes[0]:,} to {sizes[-1]:,}'
        self.say(
            f'model: {self.model.config.num_parameters:,} parameters; {self.total:,} steps of '
            f'{tokens} tokens on {devices}; attention: {" and ".join(kernels)}'
        )
        if self._resumes:
            self.say(f'resuming from step {self.start}')
        # What is there of a run without a checkpoint is of one that begins again.
        self._open_logs(self.start if self._resumes else NOTHING)
        try:
            yield
        finally:
            self._stop_trace()
            self._close_logs()
            if self._is_ours and self._is_first_process:
                with surviving('loss.png'):
                    plot_loss(self._workdir)

    def _stop_trace(self) -> None:
        with surviving('profile'):
            if (place := self._trace.stop()) is not None:
                self.say(f'profile: in {place}; tensorboard --logdir={place} shows it, with xprof installed')

    def _open_logs(self, last_step: int) -> None:
        self._metrics = None
        if self._is_first_process:
            self._metrics = MetricsLog(self._workdir, last_step, self._trackers, as_record(self._run))
        self._samples = SampleLog(self._workdir, last_step) if self._is_first_process else None
        self._progress = Progress(self.start, self.total, self._is_first_process, self._output)
        self._throughput = Throughput()
        self._rows_read = self._rows_before(self.start)  # until the last row of metrics.jsonl

    def _close_logs(self) -> None:
        self._progress.close()
        if self._is_ours and self._metrics is not None:  # else it would write what is left into another run's
            self._metrics.close()

    def watchdog(self) -> Watchdog:
        """What complains where the run hangs, for the length of a block."""
        self._watchdog = Watchdog(self._run.train.hang_seconds, self._run.train.ends_when_hung)
        return self._watchdog

    def take_steps(self, state: TrainState, stop: StopRequest) -> tuple[int, TrainState]:
        """All steps that are left, and what is due before, between and after them; the last step and its state.

        Raises:
          InputError: too many steps in a row were skipped, or an evaluation was not finite, after the run had gone back
            for it once.
        """
        train = self._run.train
        # The batch of a ramp grows in micro-batches of about the same size.
        counts = {size: micro_batches(self._run, size, self._row_devices) for _, _, size in self._sizes.stages}
        steps = {
            count: make_train_step(
                self.model, self.optimizer, self.schedule, self.mesh, count, train.seed, self._settings
            )
            for count in set(counts.values())
        }
        self._train_steps = {size: steps[count] for size, count in counts.items()}
        self._eval_step = make_eval_step(self.model, self.mesh)
        self._teacher_forced = make_teacher_forced_preview(self.model, self.data, self.mesh, self._separator)
        self._best_loss, self._saved = self._checkpoints.best_loss(), time.monotonic()
        if self._stops_before_the_first_step(state, stop):
            return self.start, state
        while True:
            step, state, diverged = self._take_steps_from(state, stop)
            if diverged is None:
                return step, state
            if self._went_back:
                raise self._not_finite(diverged, state)
            del state  # before the other takes its place
            state = self._go_back(diverged)

    @property
    def _row_devices(self) -> int:
        """Devices that split the rows of a batch."""
        return self.mesh.shape['data'] * self.mesh.shape['fsdp']

    def _take_steps_from(self, state: TrainState, stop: StopRequest) -> tuple[int, TrainState, Diverged | None]:
        """Steps from `start` on: to the end, to a signal, or to where the run has diverged."""
        unread, step, compiled = None, self.start, set()
        self._in_a_row = int(state.skipped_in_a_row)
        self._put_off = False
        self._throughput.start()
        batches = self._batches()
        with contextlib.closing(batches.ahead(self.start, self.total, self._throughput.waited)) as ahead:
            for batch in ahead:
                train_step = self._train_steps[self._sizes.at(step)]
                if train_step not in compiled:
                    self._watchdog.at('compiling')
                    with self._throughput.compiling():
                        train_step.lower(state, batch).compile()  # the call below finds it
                    compiled.add(train_step)
                    self._watchdog.at('a step')
                self._trace.before(step + 1)
                state, metrics = train_step(state, batch)
                step += 1
                # The device works on this step while the host reads the one before; reading every step also bounds
                # how many are in flight. Where one more skipped step is the last, it is read before another is taken.
                if unread is not None:
                    self._read(*unread)
                unread = (step, metrics)
                stopped = self._must_stop(step, stop)
                is_last_chance = self._in_a_row + 1 >= self._run.train.max_skipped_in_a_row
                is_due = stopped or self._put_off or self._due(step) or self._is_time_to_save(step)
                if is_due or is_last_chance or self._trace.ends_with(step):
                    diverged = self._read(*unread)
                    unread = None
                    if self._trace.ends_with(step):
                        self._stop_trace()
                    if diverged is None and is_due:
                        with self._throughput.left_out():
                            stopped, diverged = self._follow_up(step, state, stop, stopped)
                    if diverged is not None:
                        return step, state, diverged
                if stopped:
                    break
        return step, state, None

    def _batches(self) -> '_DeviceBatches':
        run = self._run
        left_out = self._went_back[-1]['rows_left_out'] if self._went_back else 0
        if self._restored_from is not None:
            left_out += self._restored_from['rows_ahead'] + self._restored_from['rows_left_out']
        return _DeviceBatches(
            Batches(
                self.data.train, self._sizes, run.model.block_size, run.train.seed, self._separator, left_out=left_out
            ),
            self.mesh,
        )

    def _rows_before(self, step: int) -> int:
        """Rows of the data that were read by the steps before `step`, counted from 0, also those of another run."""
        ahead = 0 if self._restored_from is None else self._restored_from['rows_ahead']
        return self._sizes.rows_before(step) + ahead

    def _go_back(self, diverged: Diverged) -> TrainState:
        """The state of the last checkpoint, or the first one, from where the run goes on with data that lie ahead.

        Where it is killed before it has saved again it does all of this once more: no record of it is needed.
        """
        self._checkpoints.wait()
        recorded = recover(self._checkpoints.folder, self._progress.line)
        self._resumes = recorded is not None
        to = recorded['step'] if recorded else self._other.found.step if self._other else 0
        left_out = self._sizes.rows_before(diverged.step) - self._sizes.rows_before(to)
        self._went_back.append({'from': diverged.step, 'to': to, 'rows_left_out': left_out})
        where = f'step {to}, the last good checkpoint' if to else 'the start, as there is no checkpoint yet'
        if to and not self._resumes:
            where = f'step {to} of {self._other.path}, as there is no checkpoint yet'
        self._progress.line(
            f'{diverged.reason}: going back to {where}, and on with the data after those of step {diverged.step}; '
            'the next time the run ends'
        )
        self.start = to
        self._close_logs()
        state = self.first_state()
        self._best_loss = self._checkpoints.best_loss()
        self._open_logs(to if self._resumes else 0)
        return state

    def _must_stop(self, step: int, stop: StopRequest) -> bool:
        """Whether to stop after this step; several processes have to ask each other, so they do it now and then."""
        if jax.process_count() > 1 and step % self._run.train.log_every_steps:
            return False
        return stop.agreed() is not None

    def _read(self, step: int, metrics: dict[str, jax.Array]) -> Diverged | None:
        """Waits for a step, says where it was skipped, and logs it where its turn is.

        Returns:
          What to make of it where it was skipped and is one too many in a row.
        """
        norms = metrics.pop('norms', {})
        values = {name: value.item() for name, value in jax.device_get(metrics).items()}
        self._throughput.finished()
        self._watchdog.finished(step)
        every = self._run.train.norms_every_steps
        if every and step % every == 0 and self._metrics is not None:
            self._metrics.write(
                {'step': step, **{name: _number(norm.item()) for name, norm in jax.device_get(norms).items()}}
            )
        reason, self._in_a_row = values.pop('skip_reason'), values.pop('skipped_in_a_row')
        if reason in (NOT_FINITE, LOSS_SPIKE, GRADIENT_SPIKE):
            self._say_skipped(step, reason, values)
        if math.isfinite(values['loss']):
            self.loss = values['loss']
        self._progress.step(step, values['loss'], values['learning_rate'])
        if step in (1, self.total) or step % self._run.train.log_every_steps == 0:
            rows = self._rows_before(step)
            tokens = (rows - self._rows_read) * self._run.model.block_size
            self._rows_read = rows
            row = {'step': step, 'tokens': rows * self._run.model.block_size, **values}
            row |= self._throughput.lap(tokens, self.model.config)
            self._progress.row(row)
            row |= {name: _number(row[name]) for name in ('loss', 'grad_norm')}
            if self._metrics is not None:
                self._metrics.write(row)
        if self._in_a_row < self._run.train.max_skipped_in_a_row:
            return None
        what = 'not finite' if reason in (NOT_FINITE, OVERFLOW) else 'a spike'
        return Diverged(
            step,
            f'loss {values["loss"]} or gradient norm {values["grad_norm"]} at step {step} is {what}, and '
            f'{self._in_a_row} step(s) in a row were skipped',
            spikes=reason not in (NOT_FINITE, OVERFLOW),
        )

    def _say_skipped(self, step: int, reason: int, values: dict[str, float]) -> None:
        """In one line: why a step changed nothing, and which rows of the data it had."""
        numbers = f'loss {values["loss"]:.4f}, gradient norm {values["grad_norm"]:.4f}'
        why = {
            NOT_FINITE: 'not finite',
            LOSS_SPIKE: f'the loss is more than {self._run.train.spike_loss_deviations} deviations above its mean',
            GRADIENT_SPIKE: (
                f'the gradient norm is more than {self._run.train.spike_grad_norm_deviations} deviations above its mean'
            ),
        }[reason]
        batches = self._batches().batches
        first, count = batches.first_row(step - 1), self._sizes.at(step - 1)
        source, place = batches.origin(first)
        source = f' of {source}' if source else ''
        self._progress.line(
            f'step {step} skipped: {numbers}: {why}; {self._in_a_row} in a row, {values["skipped_steps"]} in all; rows '
            f'{first} to {first + count - 1} of the data, the first at token {place}{source}'
        )

    def _due(self, step: int, *kinds: str) -> bool:
        """Whether any of `kinds` ('eval', 'preview', 'checkpoint'; none given: all) follows `step`."""
        kinds = kinds or ('eval', 'preview', 'checkpoint')
        every = [getattr(self._run, kind).every_steps for kind in kinds]
        if 'checkpoint' in kinds:  # what is to stay has to be saved
            every.append(self._run.checkpoint.keep_every_steps)
        return step == self.total or any(count > 0 and step % count == 0 for count in every)

    def _stops_before_the_first_step(self, state: TrainState, stop: StopRequest) -> bool:
        """Does what is due before any step is taken; returns whether a signal came meanwhile.

        A resumed run makes up for an evaluation that it was stopped in, and for a preview that was lost after its
        step was saved. A new one shows what the weights of another checkpoint are worth; their loss is not held
        against later ones, since they are saved elsewhere already. The step of another run has been shown there.
        """
        if self._other is not None and not self._resumes:
            return False
        if self._resumes:
            done = np.zeros(2, bool)
            if self._is_first_process:  # which has the logs
                done[:] = self.start in self._metrics.evaluated, self.start in self._samples.steps
            is_evaluated, is_shown = multihost_utils.broadcast_one_to_all(done)
            if self._due(self.start, 'eval') and not is_evaluated:
                stopped, diverged = self._follow_up(self.start, state, stop, stopped=False)
                if diverged is not None:
                    raise InputError(f'{diverged.reason}, that of the checkpoint: remove it, and an older one is used')
                if self.val_loss is not None:
                    # It was saved without, when a signal broke the evaluation off, and may yet be the best.
                    self._checkpoints.record_loss(self.start, self.val_loss)
                return stopped
            if self._due(self.start, 'preview') and not is_shown:
                self._preview(self.start, state)
            return False
        if self._weights is None:
            return False
        if self._due(0, 'eval') and self._evaluate(0, state, stop) is None:
            return True
        if self._due(0, 'preview'):
            self._preview(0, state)
        return False

    def _follow_up(
        self, step: int, state: TrainState, stop: StopRequest, stopped: bool
    ) -> tuple[bool, Diverged | None]:
        """Does what is due after `step`, and saves where the run is to stop; returns whether it is.

        It is saved as soon as it is known whether it is the best, and before anything that only shows it. Where the
        latest steps were skipped nothing is saved before there is one that was not, or the run is at its end: the
        last checkpoint stays the one from before, to which the run may have to go back.
        """
        val_loss, is_best = None, False
        if self._due(step, 'eval'):
            try:
                self._watchdog.at(f'the evaluation of step {step}')
                val_loss = self._evaluate(step, state, stop)
            except Exception:
                # Most often for want of memory, in a batch larger than training's: not the steps' fault.
                self._save(step, state, None)
                raise
            if val_loss is not None and not math.isfinite(val_loss):
                # Nothing of this step is to be kept.
                return stopped, Diverged(step, f'validation loss {val_loss} at step {step} is not finite')
            # An evaluation that was broken off is made up for on resume, so nothing may come after this step.
            stopped = stopped or val_loss is None
            is_best = val_loss is not None and (self._best_loss is None or val_loss < self._best_loss)
        saves_it = is_best and self._run.checkpoint.keep_best > 0
        if stopped or saves_it or self._put_off or self._due(step, 'checkpoint') or self._is_time_to_save(step):
            self._put_off = self._in_a_row > 0 and step < self.total
            if not self._put_off:
                self._save(step, state, val_loss)
                if is_best:  # one that is put off is not: no checkpoint would hold what the next ones are held against
                    self._best_loss = val_loss
        if self._due(step, 'preview') and not (self._due(step, 'eval') and val_loss is None):
            self._preview(step, state)
        return stopped, None

    def _is_time_to_save(self, step: int) -> bool:
        """Whether `checkpoint.every_minutes` have passed, by the clock of process 0."""
        minutes, alone = self._run.checkpoint.every_minutes, jax.process_count() == 1
        if not minutes or (not alone and step % self._run.train.log_every_steps):
            return False
        is_over = time.monotonic() - self._saved >= 60 * minutes
        return is_over if alone else bool(multihost_utils.broadcast_one_to_all(np.asarray(is_over)))

    def _save(self, step: int, state: TrainState, val_loss: float | None) -> None:
        self._watchdog.at(f'saving step {step}, or at the end of the save before')
        try:
            workdirs.check_still_ours(self._workdir)
        except InputError:
            self._is_ours = False
            raise
        self._saved = time.monotonic()
        if self._metrics is not None:
            self._metrics.sync()
        self._checkpoints.save(step, state.params, state.optimizer, self.describe(), val_loss, ema=state.ema)

    def _evaluate(self, step: int, state: TrainState, stop: StopRequest) -> float | None:
        """The validation loss, logged; None where a signal broke the evaluation off."""
        run, alone = self._run, jax.process_count() == 1

        def measure(params: Any) -> dict[str, float] | None:
            return evaluate(
                self._eval_step,
                self.mesh,
                params,
                self.data,
                run.eval.batch_size or run.train.batch_size // run.train.accumulation_steps,
                run.model.block_size,
                self._separator,
                should_stop=lambda: alone and stop.signal is not None,
            )

        values = measure(state.params)
        if values is None:
            return None
        if not math.isfinite(values['val_loss']):
            if not step:
                raise InputError(
                    f'train.init_from={run.train.init_from}: its validation loss is not finite; '
                    'start from another checkpoint'
                )
            return values['val_loss']
        of_average = ''
        if state.ema is not None:
            averaged = measure(state.ema)
            if averaged is None:
                return None
            of_average = f'  of the average {averaged["val_loss"]:.4f}'
            if math.isfinite(averaged['val_loss']):
                values['val_loss_ema'] = averaged['val_loss']
        self.val_loss = values['val_loss']
        if self._metrics is not None:
            self._metrics.write({'step': step, **values})
        self._progress.line(
            f'step {step}/{self.total}  validation loss {values["val_loss"]:.4f}  '
            f'perplexity {values["val_perplexity"]:.2f}  {values["val_bits_per_byte"]:.4f} bits per byte{of_average}'
        )
        return self.val_loss

    def _preview(self, step: int, state: TrainState) -> None:
        self._watchdog.at(f'the preview of step {step}')
        previews, params = {}, state.params
        if self._settings.params != 'f32':
            params = jax.jit(as_f32)(params)
        with surviving(f'preview of step {step}'):
            previews |= self._teacher_forced(params)
        if self._sample is not None:
            asked = dataclasses.asdict(self._run.preview)
            del asked['every_steps']
            with surviving(f'sampled preview of step {step}'):
                sampled = self._sample(self.model, params, self.data.tokenizer, seed=self._run.train.seed, **asked)
                previews['sampled'] = sampled
                if step == self.total:
                    self._progress.line(f'sample:\n{sampled}')
        if self._samples is not None and previews:
            with surviving('samples.txt'):
                self._samples.write(step, previews)

    def describe(self) -> dict[str, Any]:
        """What a checkpoint says of itself: enough to use the model, and to know how to go on with the run."""
        return {
            'config': as_record(self._run),
            'model': dataclasses.asdict(self.model.config),
            'tokenizer': self.data.tokenizer.to_json(),
            'tokenizer_fingerprint': self.data.tokenizer.fingerprint,
            'data_fingerprint': self.data.fingerprint,
            'lengths': dataclasses.asdict(self.lengths),
            'earlier_schedules': self._earlier_schedules,
            'went_back': self._went_back,
            'init_from': self._init_from,
            'restore_from': self._restored_from,
        }

    def say(self, line: str) -> None:
        """Prints a line, in the first of several processes."""
        self._output.line(line)

    def how_to_generate(self) -> str:
        """The command that makes text from this run."""
        checkpoint = shlex.quote(f'--checkpoint={self._workdir}')
        return f"Generate from it: python -m gpt_jax.generate {checkpoint} --prompt='...'"

    def ending(self, step: int, signal: int | None) -> str:
        """How the run ended, and what comes next."""
        if signal is None:
            return (
                f'done: {step} steps; checkpoints, metrics.jsonl, tensorboard, loss.png and samples.txt are in '
                f'{self._workdir}. {self.how_to_generate()}'
            )
        if not step:
            return 'stopped before the first step, so nothing is saved; the same command starts anew'
        if self._put_off:
            last = self._checkpoints.latest_step()
            began = 'the start' if self._other is None else f'step {self._other.found.step} of {self._other.path}'
            return (
                f'stopped at step {step}, where steps were being skipped: it is not saved; the same command goes on '
                f'from {f"step {last}" if last else began}'
            )
        return f'stopped and saved at step {step} in {self._workdir}; the same command goes on from there'

    def _not_finite(self, diverged: Diverged, state: TrainState) -> InputError:
        """What to raise where the run has diverged once more, before anything is saved of it."""
        self._checkpoints.wait()
        last, before = self._checkpoints.latest_step(), self._went_back[-1]
        kept = f'the last good checkpoint, step {last}, is kept' if last else 'no checkpoint had been saved yet'
        precise = '' if self._run.precision.compute == 'f32' else ', or use precision.compute=f32'
        size = self._sizes.at(diverged.step - 1)
        batch = self._batches().make(diverged.step - 1)
        count = micro_batches(self._run, size, self._row_devices)
        first = find_not_finite(self.model, self.mesh, state, batch, count, self._run.train.seed, self._settings)
        first = f'; the first to be not finite: {first}' if first else ''
        way_out = f'lower optimizer.learning_rate or lengthen schedule.warmup_steps{precise}'
        if diverged.spikes:
            way_out = (
                'raise train.spike_loss_deviations, train.spike_grad_norm_deviations (None: no spikes) or '
                'train.max_skipped_in_a_row, or lower optimizer.learning_rate'
            )
        return InputError(
            f'{diverged.reason}{first}; the run had gone back already, from step {before["from"]} to step '
            f'{before["to"]}; {kept}; {way_out}'
        )


class _DeviceBatches:
    """Training batches as arrays over all devices of a mesh."""

    def __init__(self, batches: Batches, mesh: Any):
        self.batches, self._mesh = batches, mesh

    def make(self, step: int) -> Batch:
        """That of `step`, counted from 0."""
        shape = (self.batches.sizes.at(step), self.batches.block_size)
        return global_batch(functools.partial(self.batches.rows, step), shape, self._mesh)

    def ahead(self, start: int, stop: int, on_wait: Callable[[float], None]) -> Iterator[Batch]:
        """Those of steps [start, stop), made ahead by a thread."""
        return prefetch(self.make, start, stop, on_wait=on_wait)


def _described_schedule(run: RunConfig, lengths: Lengths) -> dict[str, Any]:
    """The schedule of a run as `earlier_schedules` records it."""
    shape = ('final_fraction', 'shape', 'cooldown_fraction')
    described = {name: getattr(run.schedule, name) for name in shape}
    return {'warmup': lengths.warmup, 'decay': lengths.decay} | described


def _number(value: float) -> float | None:
    """As a row has it: JSON has neither infinity nor NaN."""
    return value if math.isfinite(value) else None


# Where a process finds its data: hosts may have them in different places.
_OF_A_HOST = ('data.path', 'data.cache_dir', 'data.num_workers')


def _own(given: Mapping[str, Any] | RunConfig, workdir: str | pathlib.Path) -> dict[str, Any]:
    """What must be the same in all processes of a run, by name; values that cannot be used among it."""
    given = given.to_dict() if hasattr(given, 'to_dict') else given
    sections = as_dict(given) if isinstance(given, RunConfig) else given
    keys = {
        f'{section}.{name}': value if value is None or isinstance(value, (int, str)) else repr(value)
        for section, keys in sections.items()
        if isinstance(keys, Mapping)
        for name, value in keys.items()
    }
    versions = {f'version of {name}': version for name, version in describe_save(0)['versions'].items()}
    return {
        **{name: value for name, value in keys.items() if name not in _OF_A_HOST},
        'workdir': str(workdir),
        'devices of each process': jax.local_device_count(),
        **versions,
    }


def _check_same_data(data: TrainingData, recorded: dict[str, Any], workdir: pathlib.Path) -> None:
    same_tokenizer = data.tokenizer.fingerprint == recorded['tokenizer_fingerprint']
    if data.fingerprint == recorded['data_fingerprint'] and same_tokenizer:
        return
    # A tokenizer that is trained on the corpus changes with it: the corpus is what to look at first.
    what = 'the corpus is' if same_tokenizer else 'the corpus, or its tokenizer, is'
    raise InputError(
        f'{what} not the one that {workdir} was trained on (fingerprint {data.fingerprint[:12]}, recorded '
        f'{recorded["data_fingerprint"][:12]}; python_docs changes with the Python release); restore what data.path, '
        'data.corpus or data.mixture names, or start anew in another --workdir'
    )
