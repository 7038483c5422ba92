"""What is due between steps: evaluation, previews, checkpoints."""

import dataclasses
import math
from typing import Any, Protocol

import jax

from gpt_jax.checkpoints import Checkpoints
from gpt_jax.data import Tokenizer
from gpt_jax.errors import InputError
from gpt_jax.models import GPT
from gpt_jax.training.evaluate import evaluate, make_teacher_forced_preview
from gpt_jax.training.metrics import MetricsLog
from gpt_jax.training.progress import Progress
from gpt_jax.training.setup import Experiment, is_first_process
from gpt_jax.training.state import TrainState
from gpt_jax.training.step import make_eval_step
from gpt_jax.training.stopping import StopRequest
from gpt_jax.training.workdir import NOTHING, SampleLog


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


def not_finite(checkpoints: Checkpoints, numbers: str, step: int) -> InputError:
    """What to raise where `numbers` of `step` are not finite, before anything is saved of it."""
    checkpoints.wait()
    last = checkpoints.latest_step()
    kept = f'the last good checkpoint, step {last}, is kept' if last else 'no checkpoint had been saved yet'
    return InputError(
        f'{numbers} at step {step} is not finite; {kept}; '
        'lower optimizer.learning_rate, lengthen schedule.warmup_steps, or use precision.compute=f32'
    )


class Milestones:
    """Knows which steps something follows, and does it."""

    def __init__(
        self,
        experiment: Experiment,
        checkpoints: Checkpoints,
        total: int,
        sample: Sampler | None,
        log: MetricsLog | None,
        progress: Progress,
        start: int,
    ):
        self._experiment, self._checkpoints, self._total = experiment, checkpoints, total
        self._sample, self._log, self._progress = sample, log, progress
        self._samples = SampleLog(experiment.workdir, start or NOTHING) if is_first_process() else None
        run = experiment.run
        self._every = {'eval': run.eval.every_steps, 'preview': run.preview.every_steps}
        self._every['checkpoint'] = run.checkpoint.every_steps
        self._eval_batch_size = run.eval.batch_size or run.train.batch_size // run.train.accumulation_steps
        self._eval_step = make_eval_step(experiment.model, experiment.mesh)
        self._teacher_forced = make_teacher_forced_preview(
            experiment.model, experiment.data, experiment.document_separator
        )
        self._description = experiment.describe()
        self._best_loss = checkpoints.best_loss()
        self.val_loss: float | None = None

    def due(self, step: int, *kinds: str) -> bool:
        """Whether any of `kinds` ('eval', 'preview', 'checkpoint'; none given: all) follows `step`."""
        every = (self._every[kind] for kind in kinds or self._every)
        return step == self._total or any(count > 0 and step % count == 0 for count in every)

    def reach(self, step: int, state: TrainState, stop: StopRequest, stopped: bool) -> bool:
        """Does what is due after `step`, and saves where the run is to stop; returns whether it is."""
        val_loss, improved = None, False
        if self.due(step, 'eval'):
            val_loss = self._evaluate(step, state, stop)
            improved = val_loss is not None and self._is_best(val_loss)
            # An evaluation that was broken off is made up for on resume, so nothing may come after this step.
            stopped = stopped or val_loss is None
        if self.due(step, 'preview') and not (self.due(step, 'eval') and val_loss is None):
            self._preview(step, state)
        if stopped or improved or self.due(step, 'checkpoint'):
            if self._log is not None:
                self._log.sync()
            self._checkpoints.save(step, state.params, state.optimizer, self._description, val_loss)
        return stopped

    def look_at_start(self, state: TrainState, stop: StopRequest) -> bool:
        """Shows what the weights of another checkpoint are worth before the first step; returns whether to stop there.

        Their loss is not held against later ones, since they are saved elsewhere already.
        """
        if self.due(0, 'eval') and self._evaluate(0, state, stop) is None:
            return True
        if self.due(0, 'preview'):
            self._preview(0, state)
        return False

    def catch_up(self, step: int, state: TrainState, stop: StopRequest) -> bool:
        """Does what a run that was stopped during an evaluation left undone; returns whether to stop again."""
        missing = self.due(step, 'eval') and self._log is not None and step not in self._log.evaluated
        # Several processes never break an evaluation off.
        if not missing or jax.process_count() > 1:
            return False
        return self.reach(step, state, stop, stopped=False)

    def _evaluate(self, step: int, state: TrainState, stop: StopRequest) -> float | None:
        """The validation loss, logged; None where a signal broke the evaluation off."""
        e = self._experiment
        alone = jax.process_count() == 1
        values = evaluate(
            self._eval_step,
            e.mesh,
            state.params,
            e.data,
            self._eval_batch_size,
            e.run.model.block_size,
            e.document_separator,
            should_stop=lambda: alone and stop.signal is not None,
        )
        if values is None:
            return None
        if not math.isfinite(values['val_loss']):
            if not step:
                raise InputError(
                    f'train.init_from={e.run.train.init_from}: its validation loss is not finite; '
                    'start from another checkpoint'
                )
            raise not_finite(self._checkpoints, f'validation loss {values["val_loss"]}', step)
        self.val_loss = values['val_loss']
        if self._log is not None:
            self._log.write({'step': step, **values})
        self._progress.line(
            f'step {step}/{self._total}  validation loss {values["val_loss"]:.4f}  '
            f'perplexity {values["val_perplexity"]:.2f}  {values["val_bits_per_byte"]:.4f} bits per byte'
        )
        return self.val_loss

    def _is_best(self, val_loss: float) -> bool:
        """Whether a checkpoint is to be saved for `val_loss`, which is remembered."""
        if self._best_loss is not None and val_loss >= self._best_loss:
            return False
        self._best_loss = val_loss
        return self._experiment.run.checkpoint.keep_best > 0

    def _preview(self, step: int, state: TrainState) -> None:
        e = self._experiment
        previews = self._teacher_forced(state.params)
        if self._sample is not None:
            settings = dataclasses.asdict(e.run.preview)
            del settings['every_steps']
            sampled = self._sample(e.model, state.params, e.data.tokenizer, seed=e.run.train.seed, **settings)
            previews['sampled'] = sampled
            if step == self._total:
                self._progress.line(f'sample:\n{sampled}')
        if self._samples is not None:
            self._samples.write(step, previews)
