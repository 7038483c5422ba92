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
from collections.abc import Mapping
from typing import Any, Protocol

import jax

from gpt_jax.checkpoints import Checkpoints, PretrainedWeights, fingerprint, load, recover
from gpt_jax.checkpoints.finding import describe_save
from gpt_jax.config import RunConfig, as_dict, as_record, parse, read_record
from gpt_jax.data import Batches, Tokenizer, TrainingData, prefetch, prepare
from gpt_jax.errors import InputError
from gpt_jax.models import GPT, attention_kernels
from gpt_jax.parallel import global_batch, make_mesh, processes, tree_shardings
from gpt_jax.training import workdir as workdirs
from gpt_jax.training.evaluate import evaluate, make_teacher_forced_preview
from gpt_jax.training.logs import (
    NOTHING,
    MetricsLog,
    Output,
    Progress,
    SampleLog,
    Throughput,
    model_flops_utilisation,
    plot_loss,
    read_rows,
    surviving,
)
from gpt_jax.training.optimizer import (
    Lengths,
    check_rates,
    lengths,
    make_optimizer,
    make_schedule,
    resumed_lengths,
)
from gpt_jax.training.recipe import find_initial_weights, model_config, resolve
from gpt_jax.training.step import (
    Batch,
    TrainState,
    abstract_state,
    check_memory,
    check_mesh,
    init_state,
    make_eval_step,
    make_train_step,
)
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
    config: Mapping[str, Any] | RunConfig, workdir: str | pathlib.Path, sample: Sampler | None = None
) -> TrainResult:
    """Trains as `config` says, in `workdir`; resumes where an earlier call with the same two stopped.

    Args:
      config: a ConfigDict of `gpt_jax.config.base`'s keys, or a RunConfig.
      workdir: the run's folder; made where missing, and nobody else's until this returns.
      sample: writes the sampled previews, such as `gpt_jax.inference.sample_text`; None leaves these out.

    Raises:
      InputError: the configuration, the data or the folder cannot be used, or the loss became non-finite.
    """
    with processes.ended_together():
        processes.check_alike(_own(parse(config), workdir))
    output = Output(jax.process_index() == 0)
    with workdirs.locked(workdir) as workdir, processes.ended_together():
        recorded = recover(workdir / 'checkpoints', output.line)
        path = parse(config).train.init_from
        weights = None if path is None else find_initial_weights(path, recorded)
        run = resolve(config, weights)
        workdirs.check(workdir, run, resumed=recorded is not None)
        checkpoints = Checkpoints(workdir / 'checkpoints', run.checkpoint.keep_latest, run.checkpoint.keep_best)
        with checkpoints, processes.ended_together():
            trainer = Trainer(run, workdir, weights, recorded, checkpoints, sample, output)
            if trainer.is_finished():
                trainer.say(f'finished already, at step {trainer.start}; nothing to do. {trainer.how_to_generate()}')
                val_loss = recorded.get('val_loss')
                return TrainResult(workdir, trainer.start, None, val_loss, None, trainer.model, trainer.data.tokenizer)
            state = trainer.first_state()
            trainer.record()
            with trainer.logs(), StopRequest() as stop:
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
    ):
        """Builds the parts, those of a resumed run held against its checkpoint.

        Args:
          run: the experiment, resolved.
          workdir: its folder.
          weights: what a new run starts from; None: from drawn ones.
          recorded: the `describe()` of the checkpoint that the run goes on from, if any.
          checkpoints: those of the workdir.
          sample: writes the sampled previews.
          output: where the run says what it does.

        Raises:
          InputError: the batch does not fit the mesh, the data cannot be had or are not those of the checkpoint, ...
        """
        self._run, self._workdir, self._weights = run, workdir, weights
        self._checkpoints, self._sample, self._output = checkpoints, sample, output
        self._is_first_process = jax.process_index() == 0
        self.start = recorded['step'] if recorded else 0
        # What the first weights were, for the description of checkpoints.
        self._init_from = (recorded or {}).get('init_from')
        self.mesh = make_mesh(run.mesh)
        planned = model_config(run, run.model.vocab_size or 1)
        check_mesh(run, self.mesh.shape, planned)
        check_memory(run, planned, self.mesh)
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
        self._earlier_schedules = list((recorded or {}).get('earlier_schedules', ()))
        if recorded is not None:
            self._go_on_with_lengths(recorded)
        if self.start < self.lengths.total and (notice := check_rates(run, self.lengths, self.start)):
            self.say(notice)
        self.schedule = make_schedule(run, self.lengths)
        self.optimizer = make_optimizer(run.optimizer, self.schedule)
        self.model = GPT(model_config(run, self.data.tokenizer.vocab_size))
        self.total = max(self.start, self.lengths.total)  # its length may be changed to less than it has come
        self.loss: float | None = None
        self.val_loss: float | None = None
        self._tokens_per_step = run.train.batch_size * run.model.block_size
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
            ended = {'until': self.start, 'warmup': before.warmup, 'decay': before.decay}
            self._earlier_schedules.append(ended | {'final_fraction': run_before.schedule.final_fraction})
            self.say(
                f'schedule: another one from step {self.start + 1} on, its decay ends at step {self.lengths.decay}; '
                f'that of the steps before ended at step {before.decay}'
            )

    def is_finished(self) -> bool:
        """Whether all steps are taken, and what follows the last one is done."""
        if self.start < self.lengths.total:
            return False
        rows = read_rows(self._workdir / 'metrics.jsonl')
        return any(row['step'] == self.start and 'val_loss' in row for row in rows)

    def first_state(self) -> TrainState:
        """The state after step `start`: restored, or before the first one drawn or taken from another's weights."""
        if self.start:
            abstract = abstract_state(self.model, self.optimizer, self.mesh)
            params, optimizer, _ = self._checkpoints.restore(
                self.start,
                abstract.params,
                abstract.optimizer,
                verify=False,  # `recover` did
            )
            return TrainState.join(params, optimizer)
        params = None if self._weights is None else self._load_weights(self._weights)
        return init_state(self.model, self.optimizer, self.mesh, self._run.train.seed, params)

    def _load_weights(self, weights: PretrainedWeights) -> Any:
        """The parameters that a new run starts from, each on its devices; says and remembers what they are.

        Raises:
          InputError: a file is missing or damaged.
        """
        try:
            loaded = load(weights.found, sharding=lambda tree: tree_shardings(self.mesh, tree, tree))
        except InputError as error:
            raise InputError(f'train.init_from={weights.path}: {error}') from None
        from_huggingface = weights.found.huggingface
        self._init_from = {
            'path': weights.path,
            'step': None if from_huggingface else loaded.step,
            'model': dataclasses.asdict(weights.model),
            'sha256': fingerprint(loaded),
        }
        what = 'a Hugging Face directory' if from_huggingface else f'step {loaded.step}'
        params, block_size, positions = loaded.params, self._run.model.block_size, len(loaded.params['wpe'])
        if block_size < positions:
            what += f', the first {block_size} of its {positions} positions'
            cut = jax.jit(lambda wpe_TD: wpe_TD[:block_size], out_shardings=params['wpe'].sharding)
            params['wpe'] = cut(params['wpe'])
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
        self.say(
            f'model: {self.model.config.num_parameters:,} parameters; {self.total:,} steps of '
            f'{self._tokens_per_step:,} tokens on {devices}; attention: {" and ".join(kernels)}'
        )
        if self.start:
            self.say(f'resuming from step {self.start}')
        last_step = self.start or NOTHING
        self._metrics = MetricsLog(self._workdir, last_step) if self._is_first_process else None
        self._samples = SampleLog(self._workdir, last_step) if self._is_first_process else None
        self._progress = Progress(self.start, self.total, self._is_first_process, self._output)
        self._throughput = Throughput()
        try:
            yield
        finally:
            self._progress.close()
            if self._metrics is not None:
                self._metrics.close()
                with surviving('loss.png'):
                    plot_loss(self._workdir)

    def take_steps(self, state: TrainState, stop: StopRequest) -> tuple[int, TrainState]:
        """All steps that are left, and what is due before, between and after them; the last step and its state."""
        train, step = self._run.train, self.start
        train_step = make_train_step(
            self.model, self.optimizer, self.schedule, self.mesh, train.accumulation_steps, train.seed
        )
        self._eval_step = make_eval_step(self.model, self.mesh)
        self._teacher_forced = make_teacher_forced_preview(self.model, self.data, self.mesh, self._separator)
        self._best_loss = self._checkpoints.best_loss()
        if self._stops_before_the_first_step(state, stop):
            return step, state

        unread = None
        self._throughput.start(step)
        with contextlib.closing(self._batches()) as batches:
            for batch in batches:
                state, metrics = train_step(state, batch)
                step += 1
                # The device works on this step while the host reads the one before; reading every step also bounds
                # how many are in flight.
                if unread is not None:
                    self._read(*unread)
                unread = (step, metrics)
                stopped = self._must_stop(step, stop)
                if stopped or self._due(step):
                    self._read(*unread)
                    unread = None
                    with self._throughput.left_out():
                        stopped = self._follow_up(step, state, stop, stopped)
                if stopped:
                    break
        return step, state

    def _batches(self):
        """Those of the steps that are left, on their devices, made ahead by a thread."""
        run = self._run
        shape = (run.train.batch_size, run.model.block_size)
        batches = Batches(self.data.train, *shape, run.train.seed, self._separator)

        def make(step: int) -> Batch:
            return global_batch(functools.partial(batches.rows, step), shape, self.mesh)

        return prefetch(make, self.start, self.total, on_wait=self._throughput.waited)

    def _must_stop(self, step: int, stop: StopRequest) -> bool:
        """Whether to stop after this step; several processes have to ask each other, so they do it now and then."""
        if jax.process_count() > 1 and step % self._run.train.log_every_steps:
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
            raise self._not_finite(f'loss {values["loss"]} or gradient norm {values["grad_norm"]}', step)
        self.loss = values['loss']
        self._progress.step(step, values['loss'], values['learning_rate'])
        if step not in (1, self.total) and step % self._run.train.log_every_steps:
            return
        rate, waited_ms = self._throughput.lap(step, self._tokens_per_step)
        row = {'step': step, 'tokens': step * self._tokens_per_step, **values}
        row |= {'tokens_per_second': rate, 'mfu': model_flops_utilisation(self.model.config, rate)}
        row['data_wait_ms'] = waited_ms
        if skipped:
            row['grad_norm'] = None  # JSON has no infinity
        if self._metrics is not None:
            self._metrics.write(row)
        self._progress.row(row)

    def _due(self, step: int, *kinds: str) -> bool:
        """Whether any of `kinds` ('eval', 'preview', 'checkpoint'; none given: all) follows `step`."""
        every = (getattr(self._run, kind).every_steps for kind in kinds or ('eval', 'preview', 'checkpoint'))
        return step == self.total or any(count > 0 and step % count == 0 for count in every)

    def _stops_before_the_first_step(self, state: TrainState, stop: StopRequest) -> bool:
        """Does what is due before any step is taken; returns whether a signal came meanwhile.

        A resumed run makes up for an evaluation that it was stopped in, and for a preview that was lost after its
        step was saved. A new one shows what the weights of another checkpoint are worth; their loss is not held
        against later ones, since they are saved elsewhere already.
        """
        if self.start:
            # Several processes never break an evaluation off, and only the first would know that a preview is lost.
            if jax.process_count() > 1:
                return False
            if self._due(self.start, 'eval') and self.start not in self._metrics.evaluated:
                return self._follow_up(self.start, state, stop, stopped=False)
            if self._due(self.start, 'preview') and self.start not in self._samples.steps:
                self._preview(self.start, state)
            return False
        if self._weights is None:
            return False
        if self._due(0, 'eval') and self._evaluate(0, state, stop) is None:
            return True
        if self._due(0, 'preview'):
            self._preview(0, state)
        return False

    def _follow_up(self, step: int, state: TrainState, stop: StopRequest, stopped: bool) -> bool:
        """Does what is due after `step`, and saves where the run is to stop; returns whether it is.

        It is saved as soon as it is known whether it is the best, and before anything that only shows it.
        """
        val_loss, is_best = None, False
        if self._due(step, 'eval'):
            try:
                val_loss = self._evaluate(step, state, stop)
            except InputError:
                raise  # it is not finite: nothing of this step is to be kept
            except Exception:
                # Most often for want of memory, in a batch larger than training's: not the steps' fault.
                self._save(step, state, None)
                raise
            # An evaluation that was broken off is made up for on resume, so nothing may come after this step.
            stopped = stopped or val_loss is None
            if val_loss is not None and (self._best_loss is None or val_loss < self._best_loss):
                self._best_loss = val_loss
                is_best = self._run.checkpoint.keep_best > 0
        if stopped or is_best or self._due(step, 'checkpoint'):
            self._save(step, state, val_loss)
        if self._due(step, 'preview') and not (self._due(step, 'eval') and val_loss is None):
            self._preview(step, state)
        return stopped

    def _save(self, step: int, state: TrainState, val_loss: float | None) -> None:
        if self._metrics is not None:
            self._metrics.sync()
        self._checkpoints.save(step, state.params, state.optimizer, self.describe(), val_loss)

    def _evaluate(self, step: int, state: TrainState, stop: StopRequest) -> float | None:
        """The validation loss, logged; None where a signal broke the evaluation off."""
        run, alone = self._run, jax.process_count() == 1
        values = evaluate(
            self._eval_step,
            self.mesh,
            state.params,
            self.data,
            run.eval.batch_size or run.train.batch_size // run.train.accumulation_steps,
            run.model.block_size,
            self._separator,
            should_stop=lambda: alone and stop.signal is not None,
        )
        if values is None:
            return None
        if not math.isfinite(values['val_loss']):
            if not step:
                raise InputError(
                    f'train.init_from={run.train.init_from}: its validation loss is not finite; '
                    'start from another checkpoint'
                )
            raise self._not_finite(f'validation loss {values["val_loss"]}', step)
        self.val_loss = values['val_loss']
        if self._metrics is not None:
            self._metrics.write({'step': step, **values})
        self._progress.line(
            f'step {step}/{self.total}  validation loss {values["val_loss"]:.4f}  '
            f'perplexity {values["val_perplexity"]:.2f}  {values["val_bits_per_byte"]:.4f} bits per byte'
        )
        return self.val_loss

    def _preview(self, step: int, state: TrainState) -> None:
        previews = {}
        with surviving(f'preview of step {step}'):
            previews |= self._teacher_forced(state.params)
        if self._sample is not None:
            asked = dataclasses.asdict(self._run.preview)
            del asked['every_steps']
            with surviving(f'sampled preview of step {step}'):
                sampled = self._sample(
                    self.model, state.params, self.data.tokenizer, seed=self._run.train.seed, **asked
                )
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
            'init_from': self._init_from,
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
        return f'stopped and saved at step {step} in {self._workdir}; the same command goes on from there'

    def _not_finite(self, numbers: str, step: int) -> InputError:
        """What to raise where `numbers` of `step` are not finite, before anything is saved of it."""
        self._checkpoints.wait()
        last = self._checkpoints.latest_step()
        kept = f'the last good checkpoint, step {last}, is kept' if last else 'no checkpoint had been saved yet'
        precise = '' if self._run.precision.compute == 'f32' else ', or use precision.compute=f32'
        return InputError(
            f'{numbers} at step {step} is not finite; {kept}; '
            f'lower optimizer.learning_rate or lengthen schedule.warmup_steps{precise}'
        )


# Where a process finds its data: hosts may have them in different places.
_OF_A_HOST = ('data.path', 'data.cache_dir', 'data.num_workers')


def _own(given: RunConfig, workdir: str | pathlib.Path) -> dict[str, Any]:
    """What must be the same in all processes of a run, by name."""
    keys = {f'{section}.{name}': value for section, keys in as_dict(given).items() for name, value in keys.items()}
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
