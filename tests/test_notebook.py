"""Each notebook runs from its first cell to its last, and is stored without outputs."""

import json
import pathlib

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).resolve().parent.parent
COLAB = ROOT / 'colab'

# In place of the cells tagged 'parameters': the same names, for runs of seconds on a small text.
QUICKSTART = """
from configs import smoke

config = smoke.get_config()
config.data.update(path={corpus!r}, tokenizer='char', cache_dir={cache!r})
config.eval.batch_size = 16
workdir = {workdir!r}
prompt = 'the '
"""


FINETUNE = """
from configs import finetune_gpt2

config = finetune_gpt2.get_config()
config.train.update(steps=4, batch_size=8, accumulation_steps=1)
config.eval.update(every_steps=2, batch_size=16)
config.optimizer.learning_rate = 1e-2
config.data.cache_dir = {cache!r}
weights = {weights!r}
corpus = {corpus!r}
workdir = {workdir!r}
prompt = 'the '
"""


def tagged(notebook, tag):
    (cell,) = [cell for cell in notebook.cells if tag in cell.metadata.get('tags', ())]
    return cell


@pytest.fixture
def execute(tmp_path, monkeypatch, one_device):
    """A function: name of a notebook, source of its cell of parameters -> the notebook with its outputs."""
    monkeypatch.setenv('PYTHONPATH', str(ROOT))  # importable, as where it is installed: the install cell does nothing
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setenv('JUPYTER_DATA_DIR', str(tmp_path / 'jupyter'))
    monkeypatch.setenv('IPYTHONDIR', str(tmp_path / 'ipython'))
    for name, value in one_device.items():
        monkeypatch.setenv(name, value)

    def run(name, parameters):
        notebook = nbformat.read(COLAB / name, as_version=4)
        tagged(notebook, 'parameters').source = parameters
        resources = {'metadata': {'path': str(COLAB)}}
        NotebookClient(notebook, timeout=300, startup_timeout=300, resources=resources).execute()
        assert not tagged(notebook, 'install').outputs
        return notebook

    return run


def output_of(cells):
    return ''.join(output.get('text', '') for cell in cells for output in cell.get('outputs', ()))


def pictures(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get('outputs', ()) if 'data' in output]
    assert all('image/png' in output.data for output in outputs)
    return outputs


@pytest.mark.slow
def test_quickstart_trains_plots_and_writes(execute, corpus, tmp_path):
    workdir = tmp_path / 'run'
    small = QUICKSTART.format(corpus=str(corpus), cache=str(tmp_path / 'data'), workdir=str(workdir))
    notebook = execute('quickstart.ipynb', small)
    assert 'done: 20 steps' in ''.join(output.get('text', '') for output in notebook.cells[6].outputs)
    assert (workdir / 'loss.png').is_file()
    assert len(pictures(notebook)) == 1
    written = ''.join(output.text for output in notebook.cells[-1].outputs)
    assert written.startswith('the ')
    assert len(written) > len('the \n')


@pytest.mark.slow
def test_the_showcase_prepares_looks_trains_watches_and_writes(execute, corpus, tmp_path):
    small = QUICKSTART.format(corpus=str(corpus), cache=str(tmp_path / 'data'), workdir=str(tmp_path / 'run'))
    notebook = execute('training_showcase.ipynb', small)
    printed = {cell.id: output_of([cell]) for cell in notebook.cells}
    assert 'tokens: ' in printed['prepare']
    assert 'every sha256 verified' in printed['inspect']
    assert 'data: reused from' in printed['train']
    assert 'done: 20 steps' in printed['train']
    assert len(pictures(notebook)) == 2
    assert 'step 20' in printed['previews']
    assert printed['generate'].count('the ') >= 3


@pytest.mark.slow
def test_generate_writes_with_each_strategy_and_draws_what_the_model_thought(execute, finished_run):
    parameters = f"checkpoint, prompt, max_new_tokens = {str(finished_run.workdir)!r}, 'the quick', 5"
    notebook = execute('generate.ipynb', parameters)

    written = {
        cell.id: ''.join(output.get('text', '') for output in cell.get('outputs', ())) for cell in notebook.cells
    }
    for cell, count in (('write', 6), ('temperature', 4)):
        assert written[cell].count('\nthe quick') == written[cell].count('--- ') == count
    assert len(pictures(notebook)) == 4


@pytest.mark.slow
def test_a_tiny_gpt2_is_fine_tuned_and_writes_before_and_after(execute, tiny_gpt2, corpus, tmp_path):
    folders = {'cache': str(tmp_path / 'data'), 'workdir': str(tmp_path / 'run')}
    notebook = execute('finetune.ipynb', FINETUNE.format(weights=str(tiny_gpt2), corpus=str(corpus), **folders))
    printed = output_of(notebook.cells)
    assert len(pictures(notebook)) == 1
    assert f'weights: {tiny_gpt2} (a Hugging Face directory)' in printed
    assert 'step 0/4  validation loss' in printed
    assert 'done: 4 steps' in printed
    rows = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
    losses = [row['val_loss'] for row in rows if 'val_loss' in row]
    assert losses[-1] < losses[0]
    before, after = output_of([notebook.cells[-1]]).removeprefix('--- before ---\n').split('--- after ---\n')
    assert before.startswith('the ')
    assert after.startswith('the ')
    assert before.strip() != after.strip()


@pytest.mark.parametrize('path', sorted(COLAB.glob('*.ipynb')), ids=lambda path: path.name)
def test_a_notebook_is_stored_without_outputs_and_is_valid(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == 'code':
            assert cell.outputs == []
            assert cell.execution_count is None
