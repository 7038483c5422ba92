"""What only shows a run takes no checkpoint with it, and does not end it: it is reported in a line on standard error."""

import io
import json
import sys

import numpy as np
import pytest

from gpt_jax.checkpoints import load
from gpt_jax.inference import sample_text
from gpt_jax.training import logs, train, trainer


def fail(*_, **__):
    raise RuntimeError('what only shows\nfailed')


def no_preview(*_):
    return fail


def checkpoints(workdir):
    return sorted(int(path.name) for path in (workdir / 'checkpoints').iterdir())


@pytest.fixture
def short(tiny_config):
    """A function: a run of three steps with everything due at the last one, with these keys changed."""
    return lambda changes=(): tiny_config({'train.steps': 3, **dict(changes)})


@pytest.mark.parametrize(
    ('where', 'name', 'broken', 'said'),
    [
        (trainer, 'make_teacher_forced_preview', no_preview, 'preview of step 3: RuntimeError: what only shows'),
        (trainer, 'plot_loss', fail, 'loss.png: RuntimeError'),
        (logs.SampleLog, 'write', fail, 'samples.txt: RuntimeError'),
        (logs._TensorBoard, 'write', fail, 'tensorboard: RuntimeError'),
        (logs._TensorBoard, '__init__', fail, 'tensorboard: RuntimeError'),
    ],
)
def test_a_run_goes_on_without_what_only_shows_it(short, tmp_path, monkeypatch, capsys, where, name, broken, said):
    monkeypatch.setattr(where, name, broken)
    result = train(short(), tmp_path, sample=sample_text)
    assert (result.step, checkpoints(tmp_path)) == (3, [3])
    errors = capsys.readouterr().err
    assert errors.startswith(said)
    assert errors.endswith('; the run goes on without\n')
    assert errors.count('\n') == 1


def test_a_step_is_saved_before_it_is_shown(short, tmp_path):
    saved, running = [], None

    def sample(*_, **__):
        running.wait()
        saved.append(running.latest_step())
        return ''

    save = trainer.Checkpoints.save

    def remember(self, *arguments):
        nonlocal running
        running = self
        return save(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Checkpoints, 'save', remember)
        train(short(), tmp_path, sample=sample)
    assert saved == [3]


def test_a_step_whose_evaluation_fails_is_saved(short, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, 'evaluate', fail)
    with pytest.raises(RuntimeError):
        train(short(), tmp_path)
    assert checkpoints(tmp_path) == [3]
    monkeypatch.undo()
    result = train(short(), tmp_path)  # made up for
    assert result.val_loss is not None


def test_a_preview_that_was_lost_after_its_step_was_saved_is_made_up_for(finished_run, tiny_config, tmp_path):
    class Killed(BaseException):
        pass

    def killed(*_, **__):
        raise Killed

    with pytest.raises(Killed):
        train(tiny_config(), tmp_path, sample=killed)
    assert checkpoints(tmp_path) == [3]
    assert not (tmp_path / 'samples.txt').exists()
    train(tiny_config(), tmp_path, sample=sample_text)
    assert (tmp_path / 'samples.txt').read_bytes() == (finished_run.workdir / 'samples.txt').read_bytes()


class Gone(io.TextIOBase):
    """Standard output whose reader left."""

    encoding = 'utf-8'

    def write(self, _):
        raise BrokenPipeError(32, 'Broken pipe')


@pytest.mark.parametrize('stream', ['gone', 'closed', 'ascii', 'none'])
def test_standard_output_of_any_kind_ends_nothing(short, tmp_path, monkeypatch, capsys, stream):
    ascii_ = io.TextIOWrapper(io.BytesIO(), encoding='ascii')
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, 'stdout', {'gone': Gone(), 'closed': closed, 'ascii': ascii_, 'none': None}[stream])
    result = train(short(), tmp_path, sample=lambda *_, **__: 'café')
    assert (result.step, checkpoints(tmp_path)) == (3, [3])
    errors = capsys.readouterr().err
    assert errors.count('standard output cannot be written to') == (stream in ('gone', 'closed'))
    if stream == 'ascii':
        assert b'sample:\ncaf\\xe9\n' in ascii_.buffer.getvalue()


def test_ids_that_the_tokenizer_does_not_have_are_never_shown(short, tmp_path, capsys):
    result = train(short({'model.vocab_size': 4096}), tmp_path)
    assert 'goes on without' not in capsys.readouterr().err
    # Weights that would rather say anything else.
    params = dict(result.params)
    params['wte'] = np.asarray(params['wte']).copy()
    params['wte'][result.tokenizer.vocab_size :] *= 100
    preview = trainer.make_teacher_forced_preview(result.model, *preview_parts(result, short, tmp_path))
    assert all(len(text) <= 33 for text in preview(params).values())


def preview_parts(result, short, tmp_path):
    import jax

    from gpt_jax.data import prepare
    from gpt_jax.parallel import MeshConfig, make_mesh
    from gpt_jax.training import resolve

    return prepare(resolve(short()).data), make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.mark.parametrize('seed', [2**31, 2**32 - 1])
def test_seeds_up_to_32_bits_train(short, tmp_path, seed):
    result = train(short({'train.seed': seed}), tmp_path)
    assert result.step == 3
    assert load(tmp_path).meta['config']['train']['seed'] == seed
    rows = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    assert np.isfinite([row['loss'] for row in rows if 'loss' in row]).all()
