"""The notebook runs from its first cell to its last, and is stored without outputs."""

import pathlib

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / 'colab' / 'quickstart.ipynb'

# In place of the cell tagged 'parameters': the same names, for a run of seconds on a small text.
SMALL = """
from configs import smoke

config = smoke.get_config()
config.data.update(path={corpus!r}, tokenizer='char', cache_dir={cache!r})
config.eval.batch_size = 16
workdir = {workdir!r}
prompt = 'the '
"""


def tagged(notebook, tag):
    (cell,) = [cell for cell in notebook.cells if tag in cell.metadata.get('tags', ())]
    return cell


@pytest.mark.slow
def test_the_notebook_trains_plots_and_writes(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv('PYTHONPATH', str(ROOT))  # importable, as where it is installed: the install cell does nothing
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setenv('JUPYTER_DATA_DIR', str(tmp_path / 'jupyter'))
    monkeypatch.setenv('IPYTHONDIR', str(tmp_path / 'ipython'))
    monkeypatch.delenv('XLA_FLAGS', raising=False)  # one device, as a reader has
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    workdir = tmp_path / 'run'
    tagged(notebook, 'parameters').source = SMALL.format(
        corpus=str(corpus), cache=str(tmp_path / 'data'), workdir=str(workdir)
    )

    NotebookClient(
        notebook, timeout=300, startup_timeout=300, resources={'metadata': {'path': str(NOTEBOOK.parent)}}
    ).execute()

    assert not tagged(notebook, 'install').outputs
    assert 'done: 20 steps' in ''.join(output.get('text', '') for output in notebook.cells[6].outputs)
    assert (workdir / 'loss.png').is_file()
    pictures = [output for cell in notebook.cells for output in cell.get('outputs', ()) if 'data' in output]
    assert ['image/png' in picture.data for picture in pictures] == [True]
    written = ''.join(output.text for output in notebook.cells[-1].outputs)
    assert written.startswith('the ')
    assert len(written) > len('the \n')


def test_the_notebook_is_stored_without_outputs_and_is_valid():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == 'code':
            assert cell.outputs == []
            assert cell.execution_count is None
