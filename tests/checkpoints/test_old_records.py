"""Checkpoints of earlier versions load; those of a later one are refused with the way out.

golden/meta-FORMAT-NAME.json are records (`meta/metadata` of a step folder) as gpt_jax 0.1.0 wrote them, byte for byte
but for the folder's name. They were made by 20 steps on a part of tinyshakespeare in a folder /tmp/golden:

    SMALL="--config=configs/smoke.py --config.data.path=/tmp/golden/text.txt --config.train.steps=20"
    CHAR=--config.data.tokenizer=char
    python -m gpt_jax.main $SMALL $CHAR --workdir=/tmp/golden/smoke
    python -m gpt_jax.main $SMALL $CHAR --config.train.init_from=/tmp/golden/smoke --workdir=/tmp/golden/tuned
    python -m gpt_jax.main $SMALL --config.data.tokenizer=bpe --config.model.version=gpt3 \
        --config.precision.compute=fp16 --workdir=/tmp/golden/gpt3

A release that changes what a record says adds records of its own; these stay.
"""

import dataclasses
import hashlib
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from gpt_jax import __version__, checkpoints
from gpt_jax.errors import InputError
from gpt_jax.models import GPT, GPTConfig

GOLDEN = {path.stem: path for path in sorted((pathlib.Path(__file__).parent / 'golden').glob('*.json'))}


def lay_out(folder: pathlib.Path, record: bytes) -> dict:
    """A step folder as 0.1.0 laid it out, around a record and parameters that fit it; returns the parameters.

    Written by hand: what the code of today writes is not what this is about.
    """
    document = json.loads(record)
    fields = {field.name for field in dataclasses.fields(GPTConfig)}
    config = GPTConfig(**{key: value for key, value in document['model'].items() if key in fields})
    params = jax.jit(GPT(config).init)(jax.random.key(1), jnp.zeros((1, 1), jnp.int32))['params']
    with ocp.Checkpointer(
        ocp.CompositeCheckpointHandler(params=ocp.StandardCheckpointHandler(), meta=ocp.JsonCheckpointHandler())
    ) as checkpointer:
        items = {'params': ocp.args.StandardSave(params), 'meta': ocp.args.JsonSave({})}
        checkpointer.save(folder, args=ocp.args.Composite(**items))
    (folder / 'meta' / 'metadata').write_bytes(record)
    files = {
        path.relative_to(folder).as_posix(): {
            'bytes': path.stat().st_size,
            'sha256': hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in folder.rglob('*')
        if path.is_file()
    }
    manifest = {'format': 'gpt_jax checkpoint manifest 1', 'files': files}
    (folder / 'manifest.sha256.json').write_text(json.dumps(manifest))
    return params


@pytest.mark.parametrize('name', GOLDEN)
def test_a_checkpoint_of_an_earlier_version_loads_with_its_model_and_tokenizer(name, tmp_path):
    record = GOLDEN[name].read_bytes()
    params = lay_out(tmp_path / 'checkpoints' / '20', record)
    loaded = checkpoints.load_model(tmp_path)
    # What came later has the value that changes nothing.
    later = {'activation': 'gelu_new', 'n_inner': None, 'scale_attn_by_inverse_layer_idx': False}
    assert dataclasses.asdict(loaded.model.config) == json.loads(record)['model'] | later
    assert loaded.tokenizer.fingerprint == json.loads(record)['tokenizer_fingerprint']
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    tokens = jnp.asarray([loaded.tokenizer.encode('The king')])
    assert np.isfinite(jax.jit(loaded.model.apply)({'params': loaded.params}, tokens)).all()
    assert checkpoints.recover(tmp_path / 'checkpoints') == json.loads(record)
    weights = checkpoints.find_weights(tmp_path)
    assert (weights.model, weights.found.step) == (loaded.model.config, 20)


def changed(changes: dict, model: dict) -> dict:
    """A golden record with other values."""
    record = json.loads(GOLDEN['meta-1-smoke'].read_bytes())
    return record | changes | {'model': record['model'] | model}


def test_keys_that_did_not_exist_yet_have_the_value_of_the_past(tmp_path):
    record = changed({}, {})
    needed = {name: record['model'][name] for name in ('vocab_size', 'block_size', 'n_layer', 'n_head', 'd_model')}
    lay_out(tmp_path / 'old', json.dumps(record | {'model': needed}).encode())
    assert checkpoints.load_model(tmp_path / 'old').model.config == GPTConfig(**needed)


NEWER = {'versions': {'gpt_jax': '7.8.9'}}
UPDATE = f'it was written by gpt_jax 7.8.9, this is {__version__}: update gpt_jax'


@pytest.mark.parametrize(
    ('changes', 'model', 'message'),
    [
        (NEWER, {'rotary': True}, f'model.rotary=True is unknown; {UPDATE}'),
        (NEWER | {'format': 2}, {}, f'format=2 of its record is unknown; {UPDATE}'),
        ({'versions': {}}, {'rotary': True}, 'it was written by gpt_jax of an unknown version'),
    ],
)
def test_a_record_of_a_later_version_is_refused_in_one_line(tmp_path, changes, model, message):
    lay_out(tmp_path / 'new', json.dumps(changed(changes, model)).encode())
    for read in (checkpoints.load_model, checkpoints.find_weights):
        with pytest.raises(InputError) as error:
            read(tmp_path / 'new')
        assert str(error.value).startswith(f'{tmp_path / "new"}: ')
        assert message in str(error.value)
        assert '\n' not in str(error.value)


def test_a_value_that_makes_no_model_is_refused_with_the_checkpoint():
    with pytest.raises(InputError, match=r"^here: model.remat='some' must be one of"):
        checkpoints.read_model_config(changed({}, {'remat': 'some'}), 'here')


def test_a_record_without_a_model_is_refused_in_one_line():
    with pytest.raises(InputError, match=r'^here does not describe a model; .* give a workdir'):
        checkpoints.read_model_config({'config': {}}, 'here')
    with pytest.raises(InputError, match=r'^here: model.n_head is missing from its record'):
        checkpoints.read_model_config({'model': {'vocab_size': 5, 'block_size': 2, 'n_layer': 1}}, 'here')


def test_a_record_says_its_format(workdir):
    with checkpoints.Checkpoints(workdir) as saved:
        saved.save(1, {'w': jnp.ones(2)}, None, {})
    assert checkpoints.recover(workdir)['format'] == 1
