import json
import pathlib

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from gpt_jax.checkpoints import Checkpoints, load
from gpt_jax.models import huggingface
from gpt_jax.parallel import MeshConfig, make_mesh, tree_shardings


@pytest.fixture(scope='session')
def exported(finished_run, tmp_path_factory):
    """The finished run as a Hugging Face directory."""
    from gpt_jax.checkpoints import export_huggingface

    folder = tmp_path_factory.mktemp('exported') / 'hf'
    export_huggingface(finished_run.workdir, folder)
    return folder


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_help_names_the_flags_and_exits_0(process):
    result = process('convert', '--help')
    assert (result.returncode, result.stderr) == (0, '')
    assert 'python -m gpt_jax.convert --source=' in result.stdout
    for flag in ('source', 'target', 'step', 'dtype', 'mesh'):
        assert f'  --{flag}: ' in result.stdout


def test_a_run_becomes_a_directory_with_all_that_transformers_reads(verb, finished_run, exported, tmp_path):
    target = tmp_path / 'hf'
    status, output, errors = verb('convert', f'--source={finished_run.workdir}', f'--target={target}')
    assert (status, errors) == (0, '')
    assert f'{finished_run.workdir} -> Hugging Face directory {target}' in output
    assert files(target) == files(exported)
    assert sorted(files(target)) == [
        'config.json',
        'generation_config.json',
        'model.safetensors',
        'tokenizer.json',
        'tokenizer_config.json',
    ]
    end = finished_run.tokenizer.end_of_text
    for name in ('config.json', 'generation_config.json'):
        document = json.loads((target / name).read_text())
        assert document['bos_token_id'] == document['eos_token_id'] == end
    assert load_file(target / 'model.safetensors')['transformer.wte.weight'].shape[0] == end + 1


def test_on_a_mesh_the_files_are_the_same_there_and_back(verb, exported, tmp_path):
    for number, mesh in enumerate(('fsdp:8', 'data:2,fsdp:2,tensor:2')):
        checkpoint, back = tmp_path / f'checkpoint {number}', tmp_path / f'back {number}'
        # Saved from eight devices, read by eight and by one.
        assert verb('convert', f'--source={exported}', f'--target={checkpoint}', f'--mesh={mesh}')[0] == 0
        for there, flags in ((back, [f'--mesh={mesh}']), (tmp_path / f'one {number}', [])):
            assert verb('convert', f'--source={checkpoint}', f'--target={there}', *flags)[0] == 0
            assert files(there) == files(exported)


def test_a_checkpoint_that_eight_devices_saved_is_converted_by_one(process, finished_run, exported, tmp_path):
    loaded = load(finished_run.workdir)
    shardings = tree_shardings(make_mesh(MeshConfig(data=1, fsdp=8)), loaded.params, loaded.params)
    with Checkpoints(tmp_path / 'run' / 'checkpoints') as checkpoints:
        checkpoints.save(6, jax.device_put(loaded.params, shardings), None, loaded.meta)
    converted = process('convert', f'--source={tmp_path / "run"}', f'--target={tmp_path / "hf"}')
    assert (converted.returncode, converted.stderr) == (0, '')
    assert files(tmp_path / 'hf') == files(exported)


def test_there_and_back_gives_the_same_files_and_the_same_text(verb, finished_run, exported, tmp_path):
    checkpoint, back = tmp_path / 'checkpoint', tmp_path / 'back'
    status, output, errors = verb('convert', f'--source={exported}', f'--target={checkpoint}')
    assert (status, errors) == (0, '')
    assert f'-> checkpoint {checkpoint}' in output
    assert f'python -m gpt_jax.generate --checkpoint={checkpoint}' in output
    assert verb('convert', f'--source={checkpoint}', f'--target={back}')[0] == 0
    assert files(back) == files(exported)
    arguments = ('--prompt=the ', '--strategy=greedy', '--max_new_tokens=9', '--json')
    texts = {
        verb('generate', f'--checkpoint={folder}', *arguments)[:2]
        for folder in (finished_run.workdir, exported, checkpoint, back)
    }
    assert len(texts) == 1
    assert texts.pop()[0] == 0


def test_a_step_and_a_type_are_chosen_by_their_flags(verb, refused, finished_run, tmp_path):
    source, target = f'--source={finished_run.workdir}', tmp_path / 'hf'
    assert verb('convert', source, f'--target={target}', '--step=6', '--dtype=bf16')[0] == 0
    assert {array.dtype for array in load_file(target / 'model.safetensors').values()} == {np.dtype(ml_dtypes.bfloat16)}
    _, params = huggingface.load(target)
    expected = load(finished_run.workdir, 6).params['wpe']
    np.testing.assert_array_equal(params['wpe'], np.asarray(expected).astype(ml_dtypes.bfloat16).astype(np.float32))
    assert 'has no checkpoint of step 5: it has 6' in refused(
        'convert', source, f'--target={tmp_path / "x"}', '--step=5'
    )


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ([], '--source is missing'),
        (['--source=SOURCE'], '--target is missing'),
        (['--source=nowhere', '--target=NEW'], 'checkpoint nowhere does not exist: give a workdir'),
        (['--source=configs', '--target=NEW'], 'configs holds no finished checkpoint'),
        (['--source=SOURCE', '--target=NEW', '--step=3'], 'is a Hugging Face directory, which has no steps'),
        (
            ['--source=SOURCE', '--target=NEW', '--dtype=bf16'],
            '--dtype=bf16: parameters of a checkpoint are always f32',
        ),
        (['--source=SOURCE', '--target=NEW', '--dtype=f64'], 'f64'),
        (['--source=SOURCE', '--target=SOURCE'], 'exists already; name a new folder'),
        (['--source=SOURCE', '--target=SOURCE/config.json/x'], 'cannot be made (Not a directory)'),
        (['--source=SOURCE', '--target=NEW', 'extra'], "unexpected argument 'extra'"),
    ],
)
def test_what_cannot_be_is_one_line_and_status_1(refused, exported, tmp_path, arguments, message):
    named = [a.replace('SOURCE', str(exported)).replace('NEW', str(tmp_path / 'new')) for a in arguments]
    before = files(exported)
    assert message in refused('convert', *named)
    assert files(exported) == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ('file', 'change', 'message'),
    [
        (
            'config.json',
            lambda data: data.replace(b'"gpt2"', b'"llama"'),
            "config.json: model_type='llama' cannot be read",
        ),
        ('model.safetensors', lambda data: data[:-100], 'model.safetensors: is no whole safetensors file'),
        (
            'config.json',
            lambda data: data.replace(b'"n_layer": 2', b'"n_layer": 3'),
            'transformer.h.2.ln_1.weight is missing',
        ),
        ('tokenizer.json', None, 'has no tokenizer; put tokenizer.json there'),
        ('model.safetensors', None, 'has neither model.safetensors nor'),
    ],
)
def test_a_directory_that_cannot_be_used_leaves_no_target(refused, exported, tmp_path, file, change, message):
    source = tmp_path / 'hf'
    source.mkdir()
    for name, data in files(exported).items():
        if name != file or change:
            pathlib.Path(source, name).write_bytes(change(data) if name == file else data)
    assert message in refused('convert', f'--source={source}', f'--target={tmp_path / "new"}')
    assert message in refused('generate', f'--checkpoint={source}', '--prompt=a')
    assert [path.name for path in tmp_path.iterdir()] == ['hf']


def test_a_damaged_checkpoint_is_named_and_leaves_no_target(verb, refused, exported, tmp_path):
    assert verb('convert', f'--source={exported}', f'--target={tmp_path / "checkpoint"}')[0] == 0
    damaged = max((tmp_path / 'checkpoint' / 'params').rglob('*'), key=lambda path: path.stat().st_size)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert damaged.name in refused('convert', f'--source={tmp_path / "checkpoint"}', f'--target={tmp_path / "back"}')
    assert [path.name for path in tmp_path.iterdir()] == ['checkpoint']
