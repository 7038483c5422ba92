"""Every way to name a checkpoint finds the right one; everything else is refused in one line."""

import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gpt_jax.checkpoints import Checkpoints, Resolved, finding, load, loading, resolve, verifying
from gpt_jax.errors import InputError


@pytest.fixture
def run(workdir):
    """A workdir with steps 1 to 3; step 2 has the lowest validation loss."""
    with Checkpoints(workdir / 'checkpoints', keep_latest=3) as checkpoints:
        for step, loss in ((1, 3.0), (2, 1.5), (3, None)):
            params = {'block': {'w': jnp.full((8, 4), step, jnp.bfloat16)}, 'b': jnp.arange(3)}
            checkpoints.save(step, params, {'mu': params}, {'name': f'step {step}'}, loss)
    return workdir


def test_a_workdir_and_its_checkpoints_folder_give_the_best_step(run):
    for path in (run, run / 'checkpoints', str(run), f'{run}/'):
        assert resolve(path) == Resolved(run / 'checkpoints' / '2', 2, run)


def test_where_no_step_has_a_loss_the_latest_is_taken(run):
    for step in (1, 2):
        shutil.rmtree(run / 'checkpoints' / str(step))
    with Checkpoints(run / 'checkpoints', keep_latest=2) as checkpoints:
        checkpoints.save(10, {'w': jnp.ones(2)}, None, {})
    assert resolve(run).step == 10


def test_step_names_another(run):
    assert resolve(run, step=3).folder == run / 'checkpoints' / '3'
    assert resolve(run / 'checkpoints', step=1).step == 1


def test_a_step_folder_is_itself_and_may_be_copied_under_any_name(run, tmp_path):
    assert resolve(run / 'checkpoints' / '3') == resolve(run, 3) == Resolved(run / 'checkpoints' / '3', 3, run)
    assert resolve(run / 'checkpoints' / '3', step=3).step == 3
    copy = shutil.copytree(run / 'checkpoints' / '3', tmp_path / 'my model')
    shutil.rmtree(run)
    assert resolve(copy) == Resolved(copy, 3, None)
    assert load(copy).params['block']['w'].tolist() == [[3] * 4] * 8


def test_relative_paths_links_and_the_home_folder(run, tmp_path, monkeypatch):
    monkeypatch.chdir(run / 'checkpoints' / '2')
    assert resolve('.') == resolve('..') == resolve(run)
    (tmp_path / 'link').symlink_to(run)
    assert resolve(tmp_path / 'link') == resolve(run)
    monkeypatch.setenv('HOME', str(tmp_path))
    assert resolve('~/run') == resolve(run)


@pytest.mark.parametrize(
    ('path', 'step', 'message'),
    [
        ('nowhere', None, 'nowhere does not exist: give a workdir'),
        ('empty', None, 'empty holds no finished checkpoint'),
        ('file', None, 'file holds no finished checkpoint'),
        ('run', 7, 'run has no checkpoint of step 7: it has 1, 2, 3'),
        ('run/checkpoints/3', 2, 'is step 3, not 2'),
        ('run/checkpoints/2', None, 'has no manifest'),
        ('run\0', None, 'null byte'),
        ('long' * 100, None, 'File name too long'),
        ('loop', None, 'loop'),
    ],
)
def test_what_names_no_checkpoint_is_refused_in_one_line(run, tmp_path, path, step, message):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'file').write_text('x')
    (tmp_path / 'loop').symlink_to('loop')
    if path.endswith('/2'):
        (run / 'checkpoints' / '2' / verifying.NAME).unlink()
    with pytest.raises(InputError, match=message) as error:
        resolve(tmp_path / path, step)
    assert str(tmp_path / path.rstrip('\0')) in str(error.value)
    assert '\n' not in str(error.value)


def test_load_gives_the_params_and_the_meta_and_needs_no_optimizer(run):
    shutil.rmtree(run / 'checkpoints' / '2' / 'optimizer')
    loaded = load(run)
    assert (loaded.step, loaded.folder) == (2, run / 'checkpoints' / '2')
    assert (loaded.meta['name'], loaded.meta['val_loss']) == ('step 2', 1.5)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype.name), loaded.params) == {
        'block': {'w': ((8, 4), 'float32')},  # stored in bfloat16
        'b': ((3,), 'int32'),
    }
    assert loaded.params['block']['w'].tolist() == [[2] * 4] * 8
    assert loaded.params['b'].tolist() == [0, 1, 2]


def test_load_places_the_params_where_sharding_says(run):
    mesh = Mesh(np.array(jax.devices()), 'x')
    replicated = NamedSharding(mesh, PartitionSpec())
    assert {leaf.sharding for leaf in jax.tree.leaves(load(run, sharding=replicated).params)} == {replicated}
    split = NamedSharding(mesh, PartitionSpec('x'))

    def by_shape(params):
        return jax.tree.map(lambda leaf: split if leaf.ndim == 2 else replicated, params)

    params = load(run, sharding=by_shape).params
    assert (params['block']['w'].sharding, params['b'].sharding) == (split, replicated)
    with jax.default_device(jax.devices()[-1]):
        assert load(run).params['b'].devices() == {jax.devices()[-1]}


@pytest.mark.parametrize('address', ['az://bucket/run', 'https://bucket/run', 'hf://user/model', 'file:///tmp/run'])
def test_an_address_is_refused_by_its_scheme(address):
    with pytest.raises(InputError, match=f'{address}: {address.split(":")[0]}: is no place on this machine'):
        resolve(address)


# Damage. The tests of saving go through every kind of it.


def damage(path):
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))


def test_a_damaged_step_that_was_named_is_refused_by_its_file_and_one_that_was_not_is_passed_over(run, capfd):
    for path in sorted((run / 'checkpoints' / '2').rglob('*')):
        if path.is_file() and 'optimizer' not in path.parts and path.name != verifying.NAME:
            whole = path.read_bytes()
            damage(path)
            with pytest.raises(InputError, match=r'is damaged .* to go on from step 3') as error:
                load(run, step=2)
            assert str(path) in str(error.value)
            capfd.readouterr()
            loaded = load(run)
            assert (loaded.step, loaded.params['block']['w'][0, 0]) == (1, 1)  # the best of those that are left
            said = f'warning: {path} is damaged (its sha256 differs); step 1 is used instead\n'
            assert capfd.readouterr().err == said
            path.write_bytes(whole)
    assert load(run).step == 2
    assert capfd.readouterr().err == ''


def test_where_no_step_is_good_one_line_says_so(run):
    for step in '123':
        damage(run / 'checkpoints' / step / 'params' / '_METADATA')
    with pytest.raises(InputError, match=r'holds no good checkpoint: .*/3/params/_METADATA is damaged') as error:
        load(run)
    assert '\n' not in str(error.value)
    for step in '123':
        (run / 'checkpoints' / step / verifying.NAME).unlink()
    with pytest.raises(InputError, match=f'{run} holds no good checkpoint: .*/3 has no manifest'):
        resolve(run)


def snapshot(folder: pathlib.Path) -> dict:
    return {path: (path.stat().st_mtime_ns, path.stat().st_mode) for path in [folder, *folder.rglob('*')]}


def test_reading_writes_nothing_and_works_in_a_read_only_folder(run, ckpt):
    paths = [run, *run.rglob('*')]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = snapshot(run)
    try:
        params = load(run).params
        checkpoints = Checkpoints(run / 'checkpoints')
        shapes = loading.stored_shapes(run / 'checkpoints' / '2', 'params')
        restored = checkpoints.restore(2, shapes, {'mu': shapes})[0]
        ckpt.assert_same_bits(jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), restored, params), params)
        assert (checkpoints.latest_step(), checkpoints.best_step()) == (3, 2)
        checkpoints.close()
        assert snapshot(run) == before
    finally:
        for path in paths:
            path.chmod(0o755)


def test_a_checkpoint_of_eight_devices_loads_on_one_without_a_word(run):
    params = {
        'w': jax.device_put(jnp.arange(16.0), NamedSharding(Mesh(np.array(jax.devices()), 'x'), PartitionSpec('x')))
    }
    assert len(params['w'].sharding.device_set) == 8
    with Checkpoints(run / 'checkpoints') as checkpoints:
        checkpoints.save(4, params, {'mu': params}, {})
    # absl at INFO, as under a verb with --verbosity=0: orbax must stay silent there too
    code = """if True:
        import sys, warnings
        warnings.simplefilter('error')
        from absl import logging
        logging.use_absl_handler()
        logging.set_verbosity(logging.INFO)
        import jax
        jax.devices()
        print('start', file=sys.stderr)
        from gpt_jax.checkpoints import Checkpoints, load
        params = load(sys.argv[1], 4).params
        with Checkpoints(sys.argv[1] + '/checkpoints') as checkpoints:
            checkpoints.save(5, params, None, {})
        print(jax.device_count(), load(sys.argv[1], 5).params['w'].tolist() == list(range(16)))
    """
    environment = {**os.environ, 'XLA_FLAGS': '', 'JAX_PLATFORMS': 'cpu'}
    child = subprocess.run(
        [sys.executable, '-c', code, run], capture_output=True, text=True, env=environment, check=False
    )
    assert (child.returncode, child.stdout) == (0, '1 True\n'), child.stderr
    assert child.stderr.partition('start\n')[2] == ''


# Beside a live training, which removes steps.


def remove(step_folder):
    """As the training removes a step: its name goes at once."""
    shutil.rmtree(step_folder.rename(step_folder.with_name(f'{step_folder.name}.removed')))


def supersede(run):
    """What the training does when a better step is there: step 9 comes, step 2 goes."""
    with Checkpoints(run / 'checkpoints', keep_latest=9) as checkpoints:
        params = {'block': {'w': jnp.full((8, 4), 9, jnp.bfloat16)}, 'b': jnp.arange(3)}
        checkpoints.save(9, params, None, {'name': 'step 9'}, 1.0)
    remove(run / 'checkpoints' / '2')


def test_a_step_that_goes_between_resolving_and_reading_is_replaced_by_the_one_chosen_now(run):
    found = resolve(run)
    supersede(run)
    loaded = load(found)
    assert (loaded.step, loaded.meta['name'], loaded.params['block']['w'][0, 0]) == (9, 'step 9', 9)
    assert loaded.folder == run / 'checkpoints' / '9'


@pytest.mark.parametrize('moment', ['stored_shapes', 'read_items'])
def test_a_step_that_goes_while_it_is_read_is_replaced_too(run, monkeypatch, moment):
    original = getattr(loading, moment)

    def late(folder, *arguments, **items):
        if folder.name == '2':
            supersede(run)
        return original(folder, *arguments, **items)

    monkeypatch.setattr(loading, moment, late)
    loaded = load(run)
    assert (loaded.step, loaded.params['block']['w'][0, 0]) == (9, 9)


def test_a_step_that_was_named_is_not_replaced_when_it_goes(run):
    named = [resolve(run, 2), resolve(run / 'checkpoints' / '2')]
    supersede(run)
    for found in named:
        with pytest.raises(
            InputError, match=r'/2 was removed while it was read: .*\(checkpoint.keep_latest\)$'
        ) as error:
            load(found)
        assert '\n' not in str(error.value)


def test_steps_that_always_go_are_given_up_in_one_line(run, monkeypatch):
    def gone(folder, *_, **__):
        remove(folder)
        with Checkpoints(run / 'checkpoints') as checkpoints:
            checkpoints.save(int(folder.name) + 10, {'w': jnp.ones(2)}, None, {}, 0.5)
        raise OSError('no such file')

    monkeypatch.setattr(loading, 'stored_shapes', gone)
    with pytest.raises(InputError, match='was removed while it was read'):
        load(run)


def test_other_errors_of_reading_come_out_as_they_are(run, monkeypatch):
    def broken(*_, **__):
        raise OSError(5, 'Input/output error')

    monkeypatch.setattr(loading, 'read_items', broken)
    with pytest.raises(OSError, match='Input/output error'):
        load(run)


def test_a_step_that_goes_while_the_best_is_looked_for_does_not_count(run, monkeypatch):
    read = finding.read_step_meta

    def late(folder):
        if folder.name == '2':
            monkeypatch.setattr(finding, 'read_step_meta', read)
            supersede(run)
        return read(folder)

    monkeypatch.setattr(finding, 'read_step_meta', late)
    assert resolve(run).step in (1, 9)  # 9 came after the steps were listed
    assert resolve(run).step == 9


def test_a_list_of_steps_that_is_out_of_date_is_made_anew(run, monkeypatch):
    verify = verifying.verify
    for step in (1, 3):
        remove(run / 'checkpoints' / str(step))

    def late(folder, *args, **kwargs):
        if folder == run / 'checkpoints' / '2':
            monkeypatch.setattr(verifying, 'verify', verify)
            supersede(run)
        return verify(folder, *args, **kwargs)

    monkeypatch.setattr(verifying, 'verify', late)
    assert resolve(run).step == 9
