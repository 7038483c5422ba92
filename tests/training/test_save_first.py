"""What only shows a run takes no checkpoint with it and does not end it: its failure is a line on standard error."""

import io
import sys

import jax
import numpy as np
import pytest

from gpt_jax.checkpoints import load
from gpt_jax.data import prepare
from gpt_jax.inference import sample_text
from gpt_jax.parallel import MeshConfig, make_mesh
from gpt_jax.training import logs, resolve, train, trainer


def fail(*_, **__):
    raise RuntimeError('what only shows\nfailed')


def checkpoints(workdir):
    return sorted(int(path.name) for path in (workdir / 'checkpoints').iterdir())


@pytest.mark.slow
def test_a_run_goes_on_without_what_only_shows_it(tiny_config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trainer, 'make_teacher_forced_preview', lambda *_: fail)
    monkeypatch.setattr(trainer, 'plot_loss', fail)
    monkeypatch.setattr(logs.SampleLog, 'write', fail)
    monkeypatch.setattr(logs._TensorBoard, 'write', fail)
    samples = iter([RuntimeError('what only shows'), 'text'])

    def sample(*_, **__):
        if isinstance(made := next(samples), Exception):
            raise made
        return made

    result = train(tiny_config(), tmp_path, sample=sample)
    assert (result.step, max(checkpoints(tmp_path))) == (6, 6)
    lines = capsys.readouterr().err.splitlines()
    what = [
        'tensorboard',
        'preview of step 3',
        'sampled preview of step 3',
        'preview of step 6',
        'samples.txt',
        'loss.png',
    ]
    assert lines == [f'{name}: RuntimeError: what only shows; the run goes on without' for name in what]


def test_a_step_is_saved_before_it_is_shown_and_a_lost_preview_made_up_for(finished_run, tiny_config, tmp_path):
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


def test_a_step_whose_evaluation_fails_is_saved(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, 'evaluate', fail)
    with pytest.raises(RuntimeError):
        train(tiny_config(), tmp_path)
    assert checkpoints(tmp_path) == [3]


def test_a_run_of_the_largest_seed_and_spare_ids_ends_well_though_nobody_reads_its_output(
    tiny_config, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sys, 'stdout', Gone())
    config = tiny_config({'model.vocab_size': 4096, 'train.seed': 2**32 - 1, 'train.steps': 3})
    result = train(config, tmp_path)
    assert (
        capsys.readouterr().err
        == 'standard output cannot be written to ([Errno 32] Broken pipe); the run goes on without\n'
    )
    assert load(tmp_path).meta['config']['train']['seed'] == 2**32 - 1
    # Weights that would rather say what the tokenizer does not have than anything else.
    params = jax.tree.map(np.array, result.params)
    params['wte'][result.tokenizer.vocab_size :] *= 100
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    preview = trainer.make_teacher_forced_preview(result.model, prepare(resolve(config).data, log=str), mesh)
    assert [len(text) for text in preview(params).values()] == [32, 32]


class Gone(io.TextIOBase):
    """Standard output whose reader left."""

    encoding = 'utf-8'

    def write(self, _):
        raise BrokenPipeError(32, 'Broken pipe')


@pytest.mark.parametrize(('stream', 'times'), [('gone', 1), ('closed', 1), ('ascii', 0), ('none', 0)])
def test_standard_output_of_any_kind_is_said_once_and_raises_nothing(monkeypatch, capsys, stream, times):
    ascii_ = io.TextIOWrapper(io.BytesIO(), encoding='ascii')
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, 'stdout', {'gone': Gone(), 'closed': closed, 'ascii': ascii_, 'none': None}[stream])
    output = logs.Output()
    for _ in range(3):
        output.line('sample:\ncafé')
    assert capsys.readouterr().err.count('standard output cannot be written to') == times
    if stream == 'ascii':
        assert ascii_.buffer.getvalue() == b'sample:\ncaf\\xe9\n' * 3
