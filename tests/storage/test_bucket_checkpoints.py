"""Checkpoints in a bucket: what counts, what a kill leaves, and what happens where the store fails."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.checkpoints import Checkpoints, committing, load, recover, resolve, verifying
from gpt_jax.errors import InputError
from gpt_jax.files import as_path

FOLDER = 'gs://bucket/run/checkpoints'
KEY = 'run/checkpoints'


def params(step):
    return {'w': jnp.arange(12.0).reshape(3, 4) + step, 'b': jnp.full(3, step, jnp.bfloat16)}


def save(checkpoints, *steps, loss=1.0):
    for step in steps:
        checkpoints.save(step, params(step), None, {'n': step}, loss)
    checkpoints.wait()


def assert_same(tree, expected):
    jax.tree.map(np.testing.assert_array_equal, tree, expected)


def shapes(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def test_what_is_saved_is_what_is_read(bucket):
    with Checkpoints(FOLDER, keep_latest=1, keep_best=1) as checkpoints:
        for step, loss in ((1, 2.0), (2, 1.0), (3, 1.5)):
            checkpoints.save(step, params(step), {'mu': params(-step)}, {'n': step}, loss)
        checkpoints.wait()
        assert checkpoints.steps() == [2, 3]  # the latest, and the best
        assert (checkpoints.latest_step(), checkpoints.best_step()) == (3, 2)
        restored, optimizer, meta = checkpoints.restore(3, shapes(params(3)), {'mu': shapes(params(3))})
    assert_same((restored, optimizer['mu']), (params(3), params(-3)))
    assert meta['n'] == 3
    assert recover(FOLDER)['step'] == 3
    for name in ('gs://bucket/run', FOLDER, f'{FOLDER}/2'):
        assert_same(load(name).params, params(2))
    assert load('gs://bucket/run', step=3).meta['n'] == 3
    assert {name.split('/')[2] for name in bucket.names(KEY)} == {'2', '3'}
    with pytest.raises(InputError, match='has no checkpoint of step 9: it has 2, 3'):
        resolve('gs://bucket/run', 9)
    with pytest.raises(InputError, match='checkpoint gs://bucket/nothing does not exist'):
        resolve('gs://bucket/nothing')
    # A step is removed as a whole: the manifest goes first, and what is left then never counts.
    seen = []
    bucket.fails = lambda method, url: seen.append(url) if method == 'DELETE' else None
    committing.remove(as_path(f'{FOLDER}/3'))
    assert seen[0].endswith(f'3/{verifying.NAME}')
    assert seen[-1].endswith('3.unfinished')
    assert {name.split('/')[2] for name in bucket.names(KEY)} == {'2'}


def test_a_step_counts_from_its_manifest_on(bucket):
    """What is left by a kill while orbax writes, before the manifest, after it, and while a step is removed."""
    with Checkpoints(FOLDER, keep_latest=9) as checkpoints:
        save(checkpoints, 1, 2, 3)
    marker = b'x'
    bucket.write(f'{KEY}/2.unfinished', marker)  # killed after the manifest of 2: it counts
    bucket.write(f'{KEY}/3.unfinished', marker)  # killed before that of 3, or after it was removed
    manifest = as_path(f'{FOLDER}/3') / verifying.NAME
    manifest.unlink()
    bucket.write(f'{KEY}/4.unfinished', marker)  # killed while orbax wrote
    bucket.write(f'{KEY}/4/params/ocdbt.process_0/d/1', b'half')
    bucket.write(f'{KEY}/5.unfinished', marker)  # killed before it wrote anything
    assert [resolve('gs://bucket/run', step).step for step in (1, 2)] == [1, 2]
    with pytest.raises(InputError, match=r'it has 1, 2$'):
        resolve('gs://bucket/run', 3)
    assert recover(FOLDER, pytest.fail)['step'] == 2
    assert {f'{KEY}/4/params/ocdbt.process_0/d/1', f'{KEY}/5.unfinished'} <= set(bucket.names(KEY))  # not ours to clear
    with Checkpoints(FOLDER, keep_latest=9) as checkpoints:
        assert checkpoints.steps() == [1, 2]
        save(checkpoints, 3, 4)
        assert checkpoints.steps() == [1, 2, 3, 4]
        assert_same(load(FOLDER, step=4).params, params(4))
    assert not [name for name in bucket.names(KEY) if name.endswith('.unfinished') or name.endswith('d/1')]


def test_the_requests_of_a_save_hardly_grow_with_the_steps_that_are_kept(bucket):
    asked, others = [], range(3, 15)
    bucket.fails = lambda method, url: asked.append(url)

    def requests(step):
        """Those before `save` returns, for which training waits, and all until the step is finished."""
        asked.clear()
        checkpoints.save(step, params(step), None, {'n': step}, float(step))
        waited_for = len(asked)
        checkpoints.wait()
        return waited_for, len(asked)

    with Checkpoints(FOLDER, keep_every_steps=1) as checkpoints:
        requests(1)  # and those that look for leftovers
        few = requests(2)
        for name in bucket.names(f'{KEY}/1/'):
            for step in others:
                bucket.write(name.replace(f'{KEY}/1/', f'{KEY}/{step}/'), bucket.read(name))
        first, many = requests(20), requests(21)
        assert checkpoints.steps() == [1, 2, *others, 20, 21]
    assert first[1] <= few[1] + 10 * (len(others) + 2)  # the records of those that others saved are read once
    assert many[0] <= few[0] + 2  # orbax's own vary
    assert many[1] <= few[1] + 5 + 2 * (len(others) + 2)


def test_losses_that_are_known_follow_what_is_recorded_and_saved_again(bucket):
    with Checkpoints(FOLDER, keep_latest=1, keep_best=2) as checkpoints:
        save(checkpoints, 1, loss=3.0)
        save(checkpoints, 2, loss=None)
        assert (checkpoints.best_step(), checkpoints.best_loss()) == (1, 3.0)
        checkpoints.record_loss(2, 1.0)
        assert (checkpoints.best_step(), checkpoints.best_loss()) == (2, 1.0)
        as_path(f'{FOLDER}/2/{verifying.NAME}').unlink()
        assert (checkpoints.best_step(), checkpoints.best_loss()) == (1, 3.0)
        save(checkpoints, 2, loss=4.0)  # in the place of the damaged one, which is set aside
        assert (checkpoints.best_step(), checkpoints.best_loss()) == (1, 3.0)
        save(checkpoints, 3, loss=2.0)
        assert checkpoints.steps() == [1, 3]
        assert (checkpoints.best_step(), checkpoints.best_loss()) == (3, 2.0)
        assert Checkpoints(FOLDER).best_loss() == 2.0


@pytest.mark.slow
def test_damaged_steps_are_set_aside(bucket):
    """A flipped byte, an object and a manifest that are gone."""
    with Checkpoints(FOLDER, keep_latest=9) as checkpoints:
        save(checkpoints, 1, 2, 3, 4)
    of_2, of_3 = (next(name for name in bucket.names(f'{KEY}/{n}/params') if '/d/' in name) for n in (2, 3))
    data = bytearray(bucket.read(of_2))
    data[len(data) // 2] ^= 1
    bucket.write(of_2, bytes(data))
    as_path(f'gs://bucket/{of_3}').unlink()
    as_path(f'{FOLDER}/4/{verifying.NAME}').unlink()
    before, said = [name for name in bucket.names(f'{KEY}/') if f'{KEY}/1/' not in name], []
    assert resolve('gs://bucket/run').step == 1
    assert recover(FOLDER, said.append)['step'] == 1
    assert [line.rpartition(' ')[2] for line in said] == [f'{FOLDER}/damaged-{step}' for step in (4, 3, 2)]
    assert 'is damaged (its sha256 differs)' in said[2]
    assert f'gs://bucket/{of_3} is missing' in said[1]
    aside = {name.replace(f'{KEY}/', f'{KEY}/damaged-') for name in before}
    assert {name for name in bucket.names(f'{KEY}/') if 'damaged' in name} == aside
    with Checkpoints(FOLDER, keep_latest=9) as checkpoints:
        save(checkpoints, 2)
        assert checkpoints.steps() == [1, 2]
    assert aside <= set(bucket.names(KEY))


def test_a_store_out_of_reach_is_no_damage(bucket):
    """A good step must not be set aside for it."""
    with Checkpoints(FOLDER) as checkpoints:
        save(checkpoints, 1)
    names = bucket.names()
    bucket.fails = lambda method, url: 403 if '/params/' in url else None
    with pytest.raises(InputError, match=r'gs://bucket/run/checkpoints/1.*Forbidden') as error:
        recover(FOLDER, pytest.fail)
    assert not isinstance(error.value, verifying.DamagedError)
    assert bucket.names() == names


def test_one_save_may_fail_and_a_second_one_in_a_row_ends_the_run(bucket, capsys):
    checkpoints = Checkpoints(FOLDER, keep_best=0)
    save(checkpoints, 1)
    bucket.fails = lambda method, url: 403 if method == 'POST' and 'commit_success' in url else None
    checkpoints.save(2, params(2), None, {'n': 2})
    with pytest.raises(InputError, match='Forbidden'):
        checkpoints._pending.result()
    bucket.fails = lambda method, url: None
    checkpoints.save(3, params(3), None, {'n': 3})
    checkpoints.wait()
    assert checkpoints.steps() == [3]
    told = capsys.readouterr().err
    assert 'warning: gs://bucket/run/checkpoints/2: ' in told
    assert 'the run goes on to the next save' in told
    bucket.fails = lambda method, url: 403 if method == 'POST' and 'commit_success' in url else None
    checkpoints.save(4, params(4), None, {'n': 4})
    checkpoints.save(5, params(5), None, {'n': 5})
    with pytest.raises(InputError, match='gs://bucket/run/checkpoints/5: Forbidden'):
        checkpoints.save(6, params(6), None, {'n': 6})
    bucket.fails = lambda method, url: None
    checkpoints.close()
    assert recover(FOLDER, pytest.fail)['step'] == 3
