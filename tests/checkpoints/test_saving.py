"""What is saved comes back to the bit, the right steps stay, and anything that does not fit is refused by name."""

import functools
import json
import math
import resource
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gpt_jax.checkpoints import Checkpoints, load, verifying
from gpt_jax.errors import InputError


@pytest.fixture
def folder(workdir):
    return workdir / 'checkpoints'


@pytest.fixture
def saved(folder, ckpt):
    """A folder with steps 1 and 2, and their two states."""
    states = {step: ckpt.make_state(step) for step in (1, 2)}
    with Checkpoints(folder, keep_latest=2, keep_best=0) as checkpoints:
        for step, state in states.items():
            checkpoints.save(step, *state, ckpt.meta)
    return folder, states


def test_a_state_of_every_kind_of_leaf_comes_back_to_the_bit(saved, ckpt):
    folder, states = saved
    with Checkpoints(folder) as checkpoints:
        for step, state in states.items():
            params, optimizer, meta = checkpoints.restore(step, *ckpt.abstract(state))
            ckpt.assert_same_bits((params, optimizer), state)
            assert meta == checkpoints.read_meta(step)
            assert meta | ckpt.meta == meta
            assert (meta['step'], meta['val_loss']) == (step, None)
            assert meta['versions']['jax'] == jax.__version__
            assert set(meta['versions']) >= {'python', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'gpt_jax'}


def test_python_numbers_come_back_as_the_arrays_that_eval_shape_describes(folder, ckpt):
    optimizer = {'count': 7, 'scale': 65536.0, 'flag': True, 'numpy': np.float32(0.5)}
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, {'w': jnp.ones(2)}, optimizer, {})
        expected = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, optimizer))
        _, restored, _ = checkpoints.restore(1, ckpt.abstract({'w': jnp.ones(2)}), expected)
    ckpt.assert_same_bits(restored, jax.tree.map(jnp.asarray, optimizer))


@pytest.mark.parametrize(
    'leaf',
    [np.zeros(2, np.int64), 'text', np.array([object()]), jax.random.key(0)],
    ids=['int64', 'text', 'object', 'random key'],
)
def test_a_leaf_that_would_come_back_changed_is_refused_by_name(folder, leaf):
    with Checkpoints(folder) as checkpoints, pytest.raises(TypeError, match='a/b'):
        checkpoints.save(1, {'a': {'b': leaf}}, None, {})


def test_a_meta_that_is_not_json_is_refused_before_anything_is_written(folder):
    with Checkpoints(folder) as checkpoints, pytest.raises(TypeError):
        checkpoints.save(1, {'w': jnp.ones(2)}, None, {'bad': object()})
    assert not folder.exists()


def test_buffers_may_be_donated_as_soon_as_save_returns_and_after_restore(folder, ckpt):
    @functools.partial(jax.jit, donate_argnums=0)
    def step(tree):
        return jax.tree.map(lambda leaf: leaf + 1, tree)

    params = {f'layer_{i}': jnp.full((256, 256), float(i)) for i in range(8)}
    expected = jax.tree.map(np.array, params)
    with Checkpoints(folder, keep_latest=5) as checkpoints:
        for n in range(5):
            checkpoints.save(n, params, None, {})
            params = step(params)
        for n in range(5):
            restored, _, _ = checkpoints.restore(n, ckpt.abstract(params), None)
            ckpt.assert_same_bits(restored, jax.tree.map(lambda leaf, n=n: jnp.asarray(leaf + n), expected))
            ckpt.assert_same_bits(step(restored), jax.tree.map(lambda leaf, n=n: jnp.asarray(leaf + n + 1), expected))


def test_a_sharded_state_restores_in_another_sharding_and_loads_on_one_device(workdir, folder, ckpt):
    devices = np.array(jax.devices())
    assert len(devices) == 8
    wide = NamedSharding(Mesh(devices, 'x'), PartitionSpec('x'))
    square = NamedSharding(Mesh(devices.reshape(4, 2), ('a', 'b')), PartitionSpec('b', 'a'))
    params = {'w': jax.device_put(jnp.arange(16 * 8, dtype=jnp.float32).reshape(16, 8), wide)}
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, params, {'mu': params}, {})
        shapes = ckpt.abstract(params, square)
        restored, optimizer, _ = checkpoints.restore(1, shapes, {'mu': shapes})
    assert restored['w'].sharding == optimizer['mu']['w'].sharding == square
    ckpt.assert_same_bits(restored, params)
    ckpt.assert_same_bits(optimizer, {'mu': params})
    alone = load(workdir).params['w']
    assert alone.sharding == jax.sharding.SingleDeviceSharding(jax.devices()[0])
    np.testing.assert_array_equal(alone, params['w'])


@pytest.mark.parametrize(
    ('keep_latest', 'keep_best', 'keep_every_steps', 'left'),
    [
        (1, 1, 0, [2, 6]),
        (2, 1, 0, [2, 5, 6]),
        (1, 2, 0, [2, 4, 6]),
        (1, 0, 0, [6]),
        (1, 9, 0, [1, 2, 4, 5, 6]),
        (1, 1, 3, [2, 3, 6]),
        (1, 0, 5, [5, 6]),
    ],
)
def test_the_latest_and_the_best_stay_and_every_so_many_steps(
    folder, ckpt, keep_latest, keep_best, keep_every_steps, left
):
    losses = {1: 5.0, 2: 1.0, 3: None, 4: 2.0, 5: math.nan, 6: 3.0}
    if keep_best == 9:
        losses[5] = 9.0
    with Checkpoints(folder, keep_latest, keep_best, keep_every_steps) as checkpoints:
        assert (checkpoints.latest_step(), checkpoints.best_step(), checkpoints.best_loss()) == (None, None, None)
        for step, loss in losses.items():
            checkpoints.save(step, {'w': jnp.full(2, step)}, None, {}, loss)
        checkpoints.wait()
        assert checkpoints.steps() == left
        assert sorted(path.name for path in folder.iterdir()) == sorted(map(str, left))
        assert checkpoints.latest_step() == 6
        best = (2, 1.0) if keep_best else (6, 3.0)
        assert (checkpoints.best_step(), checkpoints.best_loss()) == best


def test_a_loss_that_is_known_later_tells_the_best_as_any_other(folder):
    with Checkpoints(folder, keep_latest=9) as checkpoints:
        for step, loss in ((1, 3.0), (2, None), (3, 2.0)):
            checkpoints.save(step, {'w': jnp.ones(2)}, None, {}, loss)
        checkpoints.wait()
        checkpoints.record_loss(2, 1.0)
        checkpoints.record_loss(3, 0.5)  # known already, and so left
        assert (checkpoints.best_step(), checkpoints.best_loss()) == (2, 1.0)
        assert load(folder).step == 2
    for damage in ('', '{"val_loss": "low"}', '[1.0]'):
        (folder / '2' / 'val_loss.json').write_text(damage, encoding='utf-8')
        assert Checkpoints(folder).best_step() == 3


@pytest.mark.parametrize('diverged', [math.nan, math.inf, -math.inf])
def test_a_diverged_loss_is_never_the_best_and_is_stored_as_json(folder, diverged):
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, {'w': jnp.ones(2)}, None, {}, diverged)
        checkpoints.wait()
        assert checkpoints.read_meta(1)['val_loss'] is None
        assert checkpoints.best_step() is None
        checkpoints.save(2, {'w': jnp.ones(2)}, None, {}, 2.0)
        checkpoints.wait()
        assert (checkpoints.steps(), checkpoints.best_step()) == ([2], 2)


def test_retention_goes_on_where_an_earlier_process_left_off(folder):
    for step, loss in ((1, 1.0), (2, 2.0), (3, None), (4, 3.0)):
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(step, {'w': jnp.ones(2)}, None, {}, loss)
    assert Checkpoints(folder).steps() == [1, 4]


def test_a_step_saved_behind_a_later_one_is_not_thrown_away(folder):
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(6, {'w': jnp.ones(2)}, None, {})
        checkpoints.save(5, {'w': jnp.ones(2)}, None, {})
        checkpoints.wait()
        assert checkpoints.steps() == [5, 6]


def test_saving_a_step_twice_leaves_the_first(folder, ckpt):
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.save(1, {'w': jnp.ones(2)}, None, {'n': 1})
        assert not checkpoints.save(1, {'w': jnp.zeros(2)}, None, {'n': 2})
        assert checkpoints.read_meta(1)['n'] == 1
    with Checkpoints(folder) as checkpoints:
        assert not checkpoints.save(1, {'w': jnp.zeros(2)}, None, {'n': 3})
    assert load(folder).params['w'].tolist() == [1, 1]


def test_only_real_leftovers_are_cleared_away_and_only_by_a_save(saved, ckpt, tmp_path):
    folder, states = saved
    for leftover in ('3.removed', '7.orbax-checkpoint-tmp', 'saving_9', 'saving_11.orbax-checkpoint-tmp'):
        (folder / leftover).mkdir()
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other' / 'file').touch()
    (folder / 'saving_12.orbax-checkpoint-tmp').symlink_to(tmp_path / 'other')
    (folder / 'notes').mkdir()
    (folder / '8').mkdir()
    (folder / '8' / 'thesis.txt').write_text('mine')
    before = sorted(path.name for path in folder.iterdir())
    with Checkpoints(folder, keep_latest=3) as checkpoints:
        assert checkpoints.steps() == [1, 2]
        assert sorted(path.name for path in folder.iterdir()) == before
        checkpoints.save(12, *states[2], ckpt.meta)
        ckpt.assert_same_bits(checkpoints.restore(12, *ckpt.abstract(states[2]))[:2], states[2])
        with pytest.raises(InputError, match='8 is in the way and no checkpoint'):
            checkpoints.save(8, *states[2], ckpt.meta)
    assert sorted(path.name for path in folder.iterdir()) == ['1', '12', '2', '8', 'notes']
    assert (tmp_path / 'other' / 'file').exists()
    assert (folder / '8' / 'thesis.txt').read_text() == 'mine'


def test_every_damaged_file_is_refused_by_name_with_the_step_to_go_on_from(saved, ckpt):
    folder, states = saved
    shapes = ckpt.abstract(states[2])
    files = [path for path in sorted((folder / '2').rglob('*')) if path.is_file() and path.name != verifying.NAME]
    assert len(files) > 10
    with Checkpoints(folder) as checkpoints:
        for path in files:
            whole = path.read_bytes()
            middle = len(whole) // 2
            for damaged in (whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :], whole[:-1], None):
                path.unlink() if damaged is None else path.write_bytes(damaged)
                with pytest.raises(InputError) as error:
                    checkpoints.restore(2, *shapes)
                assert str(path) in str(error.value)
                assert str(error.value).endswith(f'remove the folder {folder / "2"} to go on from step 1')
                assert '\n' not in str(error.value)
            path.write_bytes(whole)
        ckpt.assert_same_bits(checkpoints.restore(2, *shapes)[:2], states[2])


def test_damage_of_one_step_does_not_keep_another_from_being_saved(saved, ckpt):
    folder, states = saved
    (folder / '1' / '_CHECKPOINT_METADATA').write_text('{')
    with Checkpoints(folder, keep_latest=3) as checkpoints:
        checkpoints.save(3, *states[1], ckpt.meta)
        ckpt.assert_same_bits(checkpoints.restore(3, *ckpt.abstract(states[1]))[:2], states[1])


def test_the_only_checkpoint_when_damaged_names_another_way_out(folder, ckpt):
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, {'w': jnp.ones(2)}, None, {})
        checkpoints.wait()
        (folder / '1' / 'params' / '_METADATA').unlink()
        with pytest.raises(InputError, match='to start anew'):
            checkpoints.restore(1, ckpt.abstract({'w': jnp.ones(2)}), None)


SHAPE = jax.ShapeDtypeStruct


@pytest.mark.parametrize(
    ('params', 'optimizer', 'message'),
    [
        ({'a': SHAPE((2, 3), 'bfloat16')}, {'n': SHAPE((), 'int32')}, 'params .* a has dtype float32, .* bfloat16'),
        ({'a': SHAPE((3, 2), 'float32')}, {'n': SHAPE((), 'int32')}, r'params .* a has shape \(2, 3\), .* \(3, 2\)'),
        ({'b': SHAPE((2, 3), 'float32')}, {'n': SHAPE((), 'int32')}, 'params .* b is not in it'),
        ({}, {'n': SHAPE((), 'int32')}, 'params .* a has no place'),
        ({'a': SHAPE((2, 3), 'float32')}, {'n': SHAPE((), 'uint32')}, 'optimizer .* n has dtype int32, .* uint32'),
        ({'a': SHAPE((2, 3), 'float32')}, {'m': {'n': SHAPE((), 'int32')}}, 'optimizer .* m/n is not in it'),
        ({'a': SHAPE((2, 3), 'float32')}, None, 'optimizer .* n has no place'),
    ],
)
def test_a_tree_that_does_not_fit_is_refused_by_name(folder, params, optimizer, message):
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, {'a': jnp.ones((2, 3))}, {'n': jnp.int32(1)}, {})
        with pytest.raises(InputError, match=message) as error:
            checkpoints.restore(1, params, optimizer)
    assert '\n' not in str(error.value)


def test_of_many_differences_the_first_are_named_and_the_rest_counted(folder):
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, {name: jnp.ones(2) for name in 'abcde'}, None, {})
        narrow = {name: SHAPE((1,), 'float32') for name in 'abcde'}
        with pytest.raises(InputError) as error:
            checkpoints.restore(1, narrow, None)
    each = [f'{name} has shape (2,), this model needs (1,)' for name in 'abc']
    assert f'{"; ".join(each)}; and 2 more: use the config' in str(error.value)


def test_a_checkpoint_without_optimizer_loads_but_does_not_resume(folder, ckpt):
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(0, {'w': jnp.ones(2)}, None, {})
        restored, optimizer, _ = checkpoints.restore(0, ckpt.abstract({'w': jnp.ones(2)}), None)
        assert optimizer is None
        with pytest.raises(InputError, match='holds no optimizer: it can start a run but not resume one'):
            checkpoints.restore(0, ckpt.abstract({'w': jnp.ones(2)}), {'n': SHAPE((), 'int32')})
    ckpt.assert_same_bits(restored, load(folder).params)


def test_a_step_that_is_not_there_is_refused_with_what_is(saved, ckpt):
    folder, states = saved
    with pytest.raises(InputError, match='no checkpoint of step 3: it has 1, 2'):
        Checkpoints(folder).restore(3, *ckpt.abstract(states[1]))
    with pytest.raises(InputError, match='no checkpoint of step 3: it has none'):
        Checkpoints(folder / 'elsewhere').restore(3, *ckpt.abstract(states[1]))


@pytest.mark.parametrize(('name', 'value'), [('keep_latest', 0), ('keep_best', -1)])
def test_impossible_retention_is_refused_by_key_and_value(folder, name, value):
    with pytest.raises(InputError, match=f'{name}={value}'):
        Checkpoints(folder, **{name: value})


def test_an_error_in_the_background_comes_out_of_wait_once(folder, monkeypatch):
    def full(_):
        raise OSError(28, 'No space left on device')

    checkpoints = Checkpoints(folder)
    monkeypatch.setattr(verifying, 'write', full)
    checkpoints.save(1, {'w': jnp.ones(2)}, None, {})
    with pytest.raises(OSError, match='No space left'):
        checkpoints.wait()
    assert checkpoints.steps() == []
    checkpoints.close()


def test_a_new_step_is_finished_before_the_old_one_goes(folder, monkeypatch):
    write = verifying.write

    def writing(step_folder):
        seen.append(sorted(path.name for path in folder.iterdir()))
        write(step_folder)

    seen = []
    monkeypatch.setattr(verifying, 'write', writing)
    with Checkpoints(folder) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {'w': jnp.ones(2)}, None, {})
    assert seen == [['saving_1'], ['1', 'saving_2']]
    assert Checkpoints(folder).steps() == [2]


def test_a_slow_disk_holds_up_the_next_save_alone_and_nothing_is_lost(folder, ckpt, monkeypatch):
    """`save` returns at once; the next one waits for the disk, with arrays that are as they were given."""
    write, at_work, may_go_on = verifying.write, threading.Event(), threading.Event()

    def slow_write(place):
        at_work.set()
        assert may_go_on.wait(60)
        return write(place)

    monkeypatch.setattr(verifying, 'write', slow_write)
    states = {step: ckpt.make_state(step) for step in (1, 2)}
    with Checkpoints(folder, keep_latest=2) as checkpoints:
        checkpoints.save(1, *states[1], ckpt.meta)
        assert at_work.wait(60)
        assert checkpoints.steps() == []  # the loop goes on, and the step does not count yet
        second = threading.Thread(target=checkpoints.save, args=(2, *states[2], ckpt.meta))
        second.start()
        second.join(0.2)
        assert second.is_alive()
        may_go_on.set()
        second.join(60)
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2]
        for step, state in states.items():
            restored = checkpoints.restore(step, *ckpt.abstract(state))
            ckpt.assert_same_bits(restored[:2], state)


def test_the_manifest_lists_every_file_that_orbax_wrote(saved):
    folder, _ = saved
    listed = set(json.loads((folder / '1' / verifying.NAME).read_text())['files'])
    there = {path.relative_to(folder / '1').as_posix() for path in (folder / '1').rglob('*') if path.is_file()}
    assert there == listed | {verifying.NAME}


def test_a_full_disk_is_told_in_one_line_and_the_last_checkpoint_is_whole(folder, ckpt, capfd):
    """A limit of a file's size stands for a full disk: the same errors, from the same libraries."""
    params = {str(n): jax.random.normal(jax.random.key(n), (64, 128)) for n in range(4)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, {'w': jnp.ones(2)}, None, {})
    checkpoints.wait()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        checkpoints.save(2, params, None, {})
        with pytest.raises(
            InputError, match=r'2 cannot be written \(File too large\); .* step 1, is whole; make room'
        ) as e:
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        checkpoints.close()
    assert '\n' not in str(e.value)
    assert capfd.readouterr() == ('', '')
    assert [path.name for path in folder.iterdir()] == ['1']
    assert load(folder).params['w'].tolist() == [1, 1]


def test_a_disk_that_is_full_at_the_manifest_keeps_the_step_from_counting(folder, monkeypatch):
    def full(*_):
        raise OSError(28, 'No space left on device')

    checkpoints = Checkpoints(folder)
    monkeypatch.setattr(verifying, 'sha256', full)
    checkpoints.save(1, {'w': jnp.ones(2)}, None, {})
    with pytest.raises(InputError, match=r'1 cannot be written .* no checkpoint was there yet; make room'):
        checkpoints.wait()
    checkpoints.close()
    assert list(folder.iterdir()) == []
