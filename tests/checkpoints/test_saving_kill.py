"""A process killed at any moment of a save leaves a folder to resume from."""

import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from gpt_jax.checkpoints import Checkpoints, load

# the child saves step 1 in peace, then step 2, and kills itself at the given moment of that
CHILD = """if True:
    import os, shutil, signal, sys, threading
    import jax.numpy as jnp
    from gpt_jax.checkpoints import Checkpoints, verifying

    def kill(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    folder, moment = sys.argv[1:]
    checkpoints = Checkpoints(folder)
    for step in (1, 2):
        params = {'w': jnp.full((64, 64), float(step))}
        if step == 2 and moment == 'before the manifest':
            verifying.write = kill
        if step == 2 and moment == 'within the manifest':
            os.replace = kill
        if step == 2 and moment == 'within the removal of the old step':
            shutil.rmtree = kill
        checkpoints.save(step, params, {'mu': params}, {'n': step}, 1.0 / step)
        if step == 2 and moment == 'after save':
            kill()
        checkpoints.wait()
    kill()
"""


@pytest.mark.parametrize(
    ('moment', 'finished'),
    [
        ('after save', None),
        ('before the manifest', [1]),
        ('within the manifest', [1]),
        ('within the removal of the old step', [2]),
        ('after wait', [2]),
    ],
)
def test_a_killed_save_leaves_a_folder_to_resume_from(tmp_path, ckpt, moment, finished):
    folder = tmp_path / 'checkpoints'
    environment = {**os.environ, 'XLA_FLAGS': '', 'JAX_PLATFORMS': 'cpu'}
    child = subprocess.run(
        [sys.executable, '-c', CHILD, folder, moment], capture_output=True, text=True, env=environment, check=False
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    with Checkpoints(folder) as checkpoints:
        # right after `save` the background may have come any far; elsewhere the outcome is known
        assert checkpoints.steps() in ([[1], [1, 2], [2]] if finished is None else [finished])
        latest = checkpoints.latest_step()
        shapes = ckpt.abstract({'w': jnp.zeros((64, 64))})
        params, optimizer, meta = checkpoints.restore(latest, shapes, {'mu': shapes})
        ckpt.assert_same_bits((params, optimizer['mu']), ({'w': jnp.full((64, 64), float(latest))},) * 2)
        assert meta['n'] == latest
        for step in (2, 3):  # the interrupted step can be saved again
            checkpoints.save(step, params, optimizer, {'n': step}, 1.0 / step)
        checkpoints.wait()
        assert checkpoints.steps() == [3]
    assert [path.name for path in folder.iterdir()] == ['3']
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), load(folder).params, params))
