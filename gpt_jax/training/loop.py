"""The training loop, from a configuration to a finished run."""

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax

from gpt_jax.checkpoints import Checkpoints, latest_meta
from gpt_jax.config import RunConfig, parse
from gpt_jax.data import Batches, Tokenizer, prefetch
from gpt_jax.models import GPT
from gpt_jax.parallel import tree_shardings
from gpt_jax.training import workdir as workdirs
from gpt_jax.training.init_from import Source
from gpt_jax.training.metrics import MetricsLog, Throughput, Waits, model_flops_utilisation, read_rows
from gpt_jax.training.milestones import Milestones, Sampler, not_finite
from gpt_jax.training.progress import Progress, plot_loss
from gpt_jax.training.recipe import resolve
from gpt_jax.training.setup import Experiment, build, is_first_process
from gpt_jax.training.state import TrainState, abstract_state, init_state, start_state
from gpt_jax.training.step import make_put_batch, make_train_step
from gpt_jax.training.stopping import StopRequest


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


def train(
    config: Mapping[str, Any] | RunConfig, workdir: str | pathlib.Path, sample: Sampler | None = None
) -> TrainResult:
    """Trains as `config` says, in `workdir`; resumes where an earlier call with the same two stopped.

    Args:
      config: a ConfigDict of configs/base.py's keys, or a resolved RunConfig.
      workdir: the run's folder; made where missing.
      sample: writes the sampled previews, such as `gpt_jax.inference.sample_text`; None leaves these out.

    Raises:
      InputError: the configuration, the data or the folder cannot be used, or the loss became non-finite.
    """
    workdir = pathlib.Path(workdir).expanduser()
    recorded = latest_meta(workdir / 'checkpoints')
    start = recorded['step'] if recorded else 0
    path = parse(config).train.init_from
    run = resolve(config, None if path is None else Source.find(path, recorded))
    workdirs.check(workdir, run)
    log = print if is_first_process() else (lambda _: None)
    with Checkpoints(workdir / 'checkpoints', run.checkpoint.keep_latest, run.checkpoint.keep_best) as checkpoints:
        experiment = build(run, workdir, recorded, log)
        if _finished(experiment, start):
            log(f'finished already, at step {start}; nothing to do. {_how_to_generate(workdir)}')
            val_loss = recorded.get('val_loss')
            return TrainResult(workdir, start, None, val_loss, None, experiment.model, experiment.data.tokenizer)
        state = _first_state(experiment, checkpoints, start, log)
        if is_first_process():
            workdir.mkdir(parents=True, exist_ok=True)
            workdirs.write_config(workdir, run)
            experiment.data.tokenizer.save(workdir / 'tokenizer.json')
        return _Loop(experiment, checkpoints, start, sample, log).run(state)


def _first_state(
    experiment: Experiment, checkpoints: Checkpoints, start: int, log: Callable[[str], None]
) -> TrainState:
    """The state after step `start`: restored, or before the first one drawn or taken from another's weights."""
    e = experiment
    if not start and e.source is None:
        return init_state(e.model, e.optimizer, e.mesh, e.run.train.seed)
    if not start:
        params = e.source.load(e.run.model.block_size, lambda tree: tree_shardings(e.mesh, tree, tree), log)
        return start_state(e.model, e.optimizer, e.mesh, params)
    abstract = abstract_state(e.model, e.optimizer, e.mesh)
    params, optimizer, _ = checkpoints.restore(start, abstract.params, abstract.optimizer)
    return TrainState.join(params, optimizer)


def _finished(experiment: Experiment, start: int) -> bool:
    """Whether all steps are taken, and what follows the last one is done."""
    if start < experiment.lengths.total:
        return False
    rows = read_rows(experiment.workdir / 'metrics.jsonl')
    return any(row['step'] == start and 'val_loss' in row for row in rows)


def _how_to_generate(workdir: pathlib.Path) -> str:
    return f"Generate from it: python -m gpt_jax.generate --checkpoint={workdir} --prompt='...'"


class _Loop:
    """One run in progress."""

    def __init__(
        self,
        experiment: Experiment,
        checkpoints: Checkpoints,
        start: int,
        sample: Sampler | None,
        log: Callable[[str], None],
    ):
        self._experiment, self._checkpoints, self._start = experiment, checkpoints, start
        self._total = max(start, experiment.lengths.total)
        self._loss: float | None = None
        count = experiment.model.config.num_parameters
        log(
            f'model: {count:,} parameters; {self._total:,} steps of {experiment.tokens_per_step:,} tokens '
            f'on {jax.device_count()} {jax.devices()[0].platform} device(s)'
        )
        if start:
            log(f'resuming from step {start}')
        self._log = MetricsLog(experiment.workdir, start or workdirs.NOTHING) if is_first_process() else None
        self._progress = Progress(start, self._total, is_first_process())
        self._throughput, self._waits = Throughput(), Waits()
        self._milestones = Milestones(experiment, checkpoints, self._total, sample, self._log, self._progress, start)

    def run(self, state: TrainState) -> TrainResult:
        """All steps that are left, and what is due before, between and after them."""
        e = self._experiment
        with contextlib.ExitStack() as stack:
            stack.callback(self._close)
            stop = stack.enter_context(StopRequest())
            step, state = self._steps(state, stop)
            self._checkpoints.wait()
        self._say_how_it_ended(step, stop.signal)
        val_loss = self._milestones.val_loss
        return TrainResult(e.workdir, step, self._loss, val_loss, state.params, e.model, e.data.tokenizer, stop.signal)

    def _steps(self, state: TrainState, stop: StopRequest) -> tuple[int, TrainState]:
        e, train = self._experiment, self._experiment.run.train
        rows = (train.batch_size, e.run.model.block_size, train.seed, jax.process_index(), jax.process_count())
        batches = Batches(e.data.train, *rows, e.document_separator)
        train_step = make_train_step(e.model, e.optimizer, e.schedule, e.mesh, train.accumulation_steps, train.seed)
        step, unread = self._start, None
        if step and self._milestones.catch_up(step, state, stop):
            return step, state
        if not step and e.source is not None and self._milestones.look_at_start(state, stop):
            return step, state
        self._throughput.start(step)
        stream = prefetch(batches, step, self._total, make_put_batch(e.mesh), on_wait=self._waits.add)
        with contextlib.closing(stream):
            for batch in stream:
                state, metrics = train_step(state, batch)
                step += 1
                # The device works on this step while the host reads the one before; reading every step also bounds
                # how many are in flight.
                if unread is not None:
                    self._read(*unread)
                unread = (step, metrics)
                stopped = self._must_stop(step, stop)
                if stopped or self._milestones.due(step):
                    self._read(*unread)
                    unread = None
                    with self._throughput.left_out():
                        stopped = self._milestones.reach(step, state, stop, stopped)
                if stopped:
                    break
        return step, state

    def _must_stop(self, step: int, stop: StopRequest) -> bool:
        """Whether to stop after this step; several processes have to ask each other, so they do it now and then."""
        if jax.process_count() > 1 and step % self._experiment.run.train.log_every_steps:
            return False
        return stop.agreed() is not None

    def _read(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Waits for a step, and logs it where its turn is.

        Raises:
          InputError: its loss or gradient is not finite.
        """
        values = {name: value.item() for name, value in jax.device_get(metrics).items()}
        # Under fp16 an infinite gradient is part of the search for the loss scale: that step changed nothing.
        skipped = 'loss_scale' in values and not math.isfinite(values['grad_norm'])
        if not math.isfinite(values['loss']) or not (skipped or math.isfinite(values['grad_norm'])):
            self._fail(step, values)
        self._loss = values['loss']
        self._progress.step(step, values['loss'], values['learning_rate'])
        if step not in (1, self._total) and step % self._experiment.run.train.log_every_steps:
            return
        rate = self._throughput.lap(step, self._experiment.tokens_per_step)
        row = {'step': step, 'tokens': step * self._experiment.tokens_per_step, **values}
        row |= {'tokens_per_second': rate, 'mfu': model_flops_utilisation(self._experiment.model.config, rate)}
        row['data_wait_ms'] = self._waits.lap()
        if skipped:
            row['grad_norm'] = None  # JSON has no infinity
        if self._log is not None:
            self._log.write(row)
        self._progress.row(row)

    def _fail(self, step: int, values: dict[str, float]) -> None:
        numbers = f'loss {values["loss"]} or gradient norm {values["grad_norm"]}'
        raise not_finite(self._checkpoints, numbers, step)

    def _close(self) -> None:
        self._progress.close()
        if self._log is not None:
            self._log.close()
            plot_loss(self._experiment.workdir)

    def _say_how_it_ended(self, step: int, signal: int | None) -> None:
        workdir = self._experiment.workdir
        if not is_first_process():
            return
        if signal is not None and not step:
            print('stopped before the first step, so nothing is saved; the same command starts anew', flush=True)
            return
        if signal is not None:
            print(f'stopped and saved at step {step} in {workdir}; the same command goes on from there', flush=True)
            return
        print(
            f'done: {step} steps; checkpoints, metrics.jsonl, tensorboard, loss.png and samples.txt are in {workdir}. '
            f'{_how_to_generate(workdir)}',
            flush=True,
        )
