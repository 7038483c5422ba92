"""Twenty steps of our training, from the weights of a PyTorch model and beside its own."""

import math

import pytest

REASON = "compares with PyTorch: pip install -e '.[parity]'"
torch = pytest.importorskip('torch', reason=REASON)
pytest.importorskip('transformers', reason=REASON)

import jax  # noqa: E402
import numpy as np  # noqa: E402
import peers  # noqa: E402

from gpt_jax.models import GPT  # noqa: E402
from gpt_jax.parallel import MeshConfig, batch_sharding, make_mesh  # noqa: E402
from gpt_jax.training import resolve  # noqa: E402
from gpt_jax.training.optimizer import Lengths, make_optimizer, make_schedule  # noqa: E402
from gpt_jax.training.step import (  # noqa: E402
    TrainState,
    abstract_state,
    make_train_step,
)

STEPS, WARMUP, PEAK, FLOOR = 20, 4, 1e-2, 0.1
BETAS, EPSILON, DECAY, CLIP = (0.9, 0.95), 1e-8, 0.1, 0.5


def learning_rate(step):
    """Linear from PEAK / WARMUP to PEAK, then half a cosine down to FLOOR x PEAK at the last step."""
    if step < WARMUP:
        return PEAK * (step + 1) / WARMUP
    progress = (step - WARMUP) / (STEPS - WARMUP)
    return PEAK * (FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * progress)) / 2)


def train_pytorch(model, batches):
    """Losses and gradient norms of each step; matrices and embeddings decay, what has one dimension does not."""
    parameters = list(model.parameters())
    groups = [
        {'params': [p for p in parameters if p.dim() >= 2], 'weight_decay': DECAY},
        {'params': [p for p in parameters if p.dim() < 2], 'weight_decay': 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=BETAS, eps=EPSILON)
    rows = []
    for step, (tokens_BT, targets_BT) in enumerate(batches):
        for group in optimizer.param_groups:
            group['lr'] = learning_rate(step)
        logits = model(torch.from_numpy(tokens_BT).long()).logits.flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(targets_BT).long().flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        rows.append((loss.item(), norm.item()))
    return np.array(rows)


def train_ours(config, params, batches, experiment):
    mesh = make_mesh(MeshConfig(data=-1))
    model, schedule = GPT(config), make_schedule(experiment, Lengths(STEPS, WARMUP, STEPS))
    optimizer = make_optimizer(experiment.optimizer, schedule)
    step = make_train_step(model, optimizer, schedule, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model, optimizer, mesh))
    zero = np.zeros((), np.int32)
    # By way of the host: the step gives its state away, and the same buffer must not be given twice.
    state = jax.device_get(TrainState(zero, zero, params, optimizer.init(params), None, zero))
    state = jax.device_put(state, shardings)
    rows = []
    for tokens_BT, targets_BT in batches:
        batch = jax.device_put({'tokens': tokens_BT, 'targets': targets_BT}, batch_sharding(mesh))
        state, metrics = step(state, batch)
        rows.append((float(metrics['loss']), float(metrics['grad_norm'])))
    return state.params, np.array(rows)


@pytest.mark.slow
@pytest.mark.parametrize('make', [peers.gpt2, peers.gpt_neo])
def test_twenty_steps_of_adamw_follow_pytorchs(make, loaded, fidelity, tiny_config):
    peer = make(tie_word_embeddings=False)
    config, params = loaded(peer)
    optimizer = {'learning_rate': PEAK, 'beta1': BETAS[0], 'beta2': BETAS[1], 'epsilon': EPSILON}
    optimizer |= {'weight_decay': DECAY, 'clip_norm': CLIP}
    changes = {f'optimizer.{key}': value for key, value in optimizer.items()} | {'schedule.final_fraction': FLOOR}
    experiment = resolve(tiny_config(changes))
    # A text that can be learned: the next token is a function of the one before.
    rng = np.random.default_rng(0)
    texts = (np.arange(21) * 7 + rng.integers(0, 300, (STEPS, 8, 1))).astype(np.int32) % 300
    batches = [(np.ascontiguousarray(text[:, :-1]), np.ascontiguousarray(text[:, 1:])) for text in texts]

    trained, ours = train_ours(config, params, batches, experiment)
    theirs = train_pytorch(peer, batches)
    name = type(peer).__name__
    assert theirs[-1, 0] < theirs[0, 0] - 1  # it learned, so there was something to follow
    assert (theirs[:, 1] > CLIP).any()  # clipping had something to do
    fidelity('20 AdamW steps: losses', f'{name}, torch.optim.AdamW', np.abs(ours[:, 0] - theirs[:, 0]).max(), 1e-3)
    norms = np.abs(ours[:, 1] / theirs[:, 1] - 1).max()
    fidelity('20 AdamW steps: gradient norms, relative', f'{name}, torch.optim.AdamW', norms, 1e-3)
    errors = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - b), trained, peers.tree(peer))
    if 'bias' in errors['blocks']['attention']['qkv']:
        # A bias of the keys adds the same to every score of a query, so its gradient is zero but for rounding, and Adam
        # divides that rounding by itself.
        errors['blocks']['attention']['qkv']['bias'][:, 1] = 0
    error = max(leaf.max() for leaf in jax.tree.leaves(errors))
    fidelity('20 AdamW steps: parameters', f'{name}, torch.optim.AdamW', error, 1e-4)
