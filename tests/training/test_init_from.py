"""Runs that start from the weights of a Hugging Face directory or of a checkpoint."""

import dataclasses
import hashlib
import json
import shutil
import signal

import jax
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file

from gpt_jax.checkpoints import load
from gpt_jax.config import WEIGHTS_KEYS, as_dict
from gpt_jax.data import Batches, DataConfig, Tokenizer, prepare
from gpt_jax.errors import InputError
from gpt_jax.inference import sample_text
from gpt_jax.models import GPT, GPTConfig, huggingface
from gpt_jax.parallel import MeshConfig, make_mesh, tree_shardings
from gpt_jax.training import evaluate as evaluation
from gpt_jax.training import resolve, train, trainer
from gpt_jax.training.recipe import model_config

OWN = {f'{kind}_dropout' for kind in ('embedding', 'attention', 'mlp', 'resid')} | {
    'remat',
    'scan_layers',
    'compute_dtype',
}
UNSET = dict.fromkeys(('model.block_size', 'model.n_layer', 'model.n_head', 'model.d_model', 'data.tokenizer'))
CONSTANT = {'schedule.warmup_steps': 0, 'schedule.final_fraction': 1.0}


@pytest.fixture(scope='session')
def tune_config(tiny_config):
    """A function: a source, changed keys -> the tiny experiment, which leaves its architecture to the source."""
    return lambda source, changes=(): tiny_config(UNSET | CONSTANT | {'train.init_from': str(source)} | dict(changes))


@pytest.fixture
def resolved(tune_config, tiny_gpt2):
    """A function: changed keys -> the resolved run that starts from the tiny GPT-2."""
    return lambda changes=(): resolve(tune_config(tiny_gpt2, changes))


def refusal(call, *arguments):
    with pytest.raises(InputError) as error:
        call(*arguments)
    assert '\n' not in str(error.value)
    return str(error.value)


def rows(workdir):
    return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()]


def held_out_loss(model, params, tokenizer, corpus, block_size):
    """Nats a token over the last tenth of the text, window by window, from whole logits in float64."""
    text = corpus.read_text(encoding='utf-8')
    tokens = [*tokenizer.encode(text[int(len(text) * 0.9) :]), tokenizer.end_of_text]
    windows = [tokens[start : start + block_size + 1] for start in range(0, len(tokens) - 1, block_size)]
    padded = np.zeros((len(windows), block_size + 1), np.int32)
    for row, window in zip(padded, windows, strict=True):
        row[: len(window)] = window
    logits = np.asarray(model.apply({'params': params}, padded[:, :-1]), np.float64)
    losses = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, padded[:, 1:, None], -1)[..., 0]
    counted = np.arange(block_size) < np.array([len(window) - 1 for window in windows])[:, None]
    return losses[counted].mean()


# What the configuration becomes


def test_every_field_of_an_architecture_is_the_sources_or_the_runs():
    assert {field.name for field in dataclasses.fields(GPTConfig)} == {*WEIGHTS_KEYS, *OWN}
    assert not OWN & set(WEIGHTS_KEYS)


def test_unset_keys_of_the_architecture_are_the_sources_and_the_others_the_runs(resolved, tiny_gpt2):
    config, _ = huggingface.load(tiny_gpt2)
    run = resolved({'model.dropout': 0.3, 'model.remat': 'full', 'precision.compute': 'bf16'})
    ours = model_config(run, config.vocab_size)
    assert {key: getattr(ours, key) for key in WEIGHTS_KEYS} == {key: getattr(config, key) for key in WEIGHTS_KEYS}
    assert (ours.layer_norm_epsilon, run.data.tokenizer) == (1e-2, 'bpe')
    assert (ours.resid_dropout, ours.remat, ours.compute_dtype) == (0.3, 'full', 'bf16')
    assert resolve(as_dict(run)) == run


def test_a_gpt_neo_brings_its_attention_along(tune_config, tiny_gpt2, tmp_path):
    config, params = huggingface.load(tiny_gpt2)
    neo = dataclasses.replace(
        config, qkv_bias=False, attention_scale=1.0, attention_pattern='alternating', band_size=8, mlp_expansion=4
    )
    del params['blocks']['attention']['qkv']['bias']
    huggingface.save(tmp_path / 'neo', neo, params)
    shutil.copy(tiny_gpt2 / 'tokenizer.json', tmp_path / 'neo')
    model = resolve(tune_config(tmp_path / 'neo')).model
    assert (model.qkv_bias, model.attention_scale) == (False, 1.0)
    assert (model.attention_pattern, model.band_size) == ('alternating', 8)


def test_keys_that_are_set_to_what_the_source_has_are_no_conflict(resolved):
    same = {'model.n_layer': 2, 'model.block_size': 32, 'model.mlp_expansion': 4, 'data.tokenizer': 'bpe'}
    assert resolved(same | {'model.qkv_bias': True, 'model.layer_norm_epsilon': 1e-2}) == resolved()


@pytest.mark.parametrize(
    ('key', 'value', 'there'),
    [
        ('model.n_layer', 3, 2),
        ('model.n_head', 4, 2),
        ('model.d_model', 64, 32),
        ('model.block_size', 33, 32),
        ('model.vocab_size', 301, 300),
        ('model.mlp_expansion', 3, 4),
        ('model.attention_pattern', 'alternating', 'dense'),
        ('model.band_size', 8, 256),
        ('model.qkv_bias', False, True),
        ('model.attention_scale', 1.0, None),
        ('model.tie_embeddings', False, True),
        ('model.layer_norm_epsilon', 1e-5, 1e-2),
        ('data.tokenizer', 'char', 'bpe'),
    ],
)
def test_a_key_that_is_set_to_something_else_is_named_with_both_values(resolved, tiny_gpt2, key, value, there):
    message = refusal(resolved, {key: value})
    assert f'train.init_from={tiny_gpt2}' in message
    assert f'{key}={value} and there {there}' in message


def test_all_conflicts_are_named_at_once_and_the_preset_that_makes_them(resolved):
    message = refusal(resolved, {'model.preset': 'gpt2-xl'})
    for conflict in ('n_layer=48 and there 2', 'd_model=1600 and there 32', 'block_size=1024 and there 32'):
        assert f'here model.{conflict}' in message
    assert 'model.preset=gpt2-xl sets some of them' in message


def test_a_shorter_context_is_allowed(resolved):
    assert resolved({'model.block_size': 8}).model.block_size == 8


def spoil_config(folder, **changes):
    document = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps(document | changes))


@pytest.mark.parametrize(
    ('spoil', 'message'),
    [
        (shutil.rmtree, 'does not exist'),
        (lambda folder: [path.unlink() for path in folder.iterdir()], 'holds no finished checkpoint'),
        (lambda folder: spoil_config(folder, model_type='llama'), "model_type='llama' cannot be read"),
        (lambda folder: (folder / 'tokenizer.json').unlink(), 'has no tokenizer'),
        (lambda folder: (folder / 'config.json').write_text('{"model_'), 'config.json is not JSON'),
        (lambda folder: (folder / 'model.safetensors').unlink(), 'safetensors'),
        (lambda folder: cut_in_half(folder / 'model.safetensors'), 'model.safetensors'),
    ],
)
def test_a_source_that_cannot_be_used_is_one_line_and_leaves_no_workdir(
    tune_config, tiny_gpt2, tmp_path, spoil, message
):
    source = shutil.copytree(tiny_gpt2, tmp_path / 'source')
    spoil(source)
    error = refusal(train, tune_config(source), tmp_path / 'run')
    assert error.startswith(f'train.init_from={source}: ')
    assert message in error
    assert not (tmp_path / 'run').exists()


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_weights_that_are_no_numbers_are_refused_before_the_first_step(tune_config, tiny_gpt2, tmp_path):
    shutil.copytree(tiny_gpt2, tmp_path / 'nan')
    tensors = load_file(tmp_path / 'nan' / 'model.safetensors')
    save_file(tensors | {'transformer.ln_f.bias': np.full(32, np.nan, 'f')}, tmp_path / 'nan' / 'model.safetensors')
    message = refusal(train, tune_config(tmp_path / 'nan'), tmp_path / 'run')
    assert 'transformer.ln_f.bias has values that are NaN or infinite' in message
    assert not (tmp_path / 'run' / 'checkpoints').exists()


# What the run becomes


@pytest.fixture(scope='module')
def tuned(tune_config, tiny_gpt2, tmp_path_factory):
    """Four steps from the tiny GPT-2, with dropout."""
    changes = {'train.steps': 4, 'checkpoint.every_steps': 2, 'eval.every_steps': 2, 'preview.every_steps': 4}
    return train(tune_config(tiny_gpt2, changes), tmp_path_factory.mktemp('runs') / 'tuned', sample=sample_text)


def test_the_first_row_is_the_loss_of_the_unchanged_weights(tuned, tiny_gpt2, corpus):
    config, params = huggingface.load(tiny_gpt2)
    expected = held_out_loss(GPT(config), params, Tokenizer.load(tiny_gpt2 / 'tokenizer.json'), corpus, 32)
    first, *later = rows(tuned.workdir)
    assert first['step'] == 0
    assert first['val_loss'] == pytest.approx(expected, rel=1e-5)
    assert [row['step'] for row in later if 'loss' in row] == [1, 2, 3, 4]
    assert tuned.val_loss < first['val_loss']
    assert (tuned.workdir / 'samples.txt').read_text(encoding='utf-8').startswith('step 0\n')


def test_a_checkpoint_says_where_its_weights_are_from_and_keeps_their_epsilon(tuned, tiny_gpt2):
    meta = load(tuned.workdir).meta
    weights = hashlib.sha256((tiny_gpt2 / 'model.safetensors').read_bytes()).digest()
    assert meta['init_from'] == {
        'path': str(tiny_gpt2),
        'step': None,
        'model': dataclasses.asdict(huggingface.load(tiny_gpt2)[0]),
        'sha256': hashlib.sha256(weights).hexdigest(),
    }
    assert meta['model']['layer_norm_epsilon'] == meta['config']['model']['layer_norm_epsilon'] == 1e-2
    assert meta['tokenizer_fingerprint'] == Tokenizer.load(tiny_gpt2 / 'tokenizer.json').fingerprint


@pytest.mark.slow
def test_it_resumes_without_its_source_and_ends_with_the_same_bits(
    tune_config, tuned, tiny_gpt2, tmp_path, assert_same_bits
):
    source = shutil.copytree(tiny_gpt2, tmp_path / 'source')
    changes = {'train.steps': 2, 'checkpoint.every_steps': 2, 'eval.every_steps': 2}
    train(tune_config(source, changes), tmp_path / 'run')
    shutil.rmtree(source)
    resumed = train(tune_config(source, changes | {'train.steps': 4}), tmp_path / 'run')
    assert_same_bits(resumed.params, tuned.params)
    assert [row['step'] for row in rows(tmp_path / 'run') if 'val_loss' in row] == [0, 2, 4]
    ours, theirs = (load(workdir).meta['init_from'] for workdir in (tmp_path / 'run', tuned.workdir))
    assert ours['sha256'] == theirs['sha256']
    # The recorded source is the run's: another one is refused, whether it is there or not.
    message = refusal(train, tune_config(tiny_gpt2, changes), tmp_path / 'run')
    assert f'train.init_from: {source} -> {tiny_gpt2}' in message


@pytest.mark.slow
def test_a_signal_before_the_first_step_saves_nothing_and_the_next_run_starts_anew_with_one_adamw_step(
    tune_config, tiny_gpt2, tmp_path, monkeypatch, capfd, assert_close
):
    def interrupted(*arguments, **keywords):
        signal.raise_signal(signal.SIGINT)
        return evaluation.evaluate(*arguments, **keywords)

    # The gradient of a key's bias is zero but for rounding, which Adam would blow up to a whole step with its usual
    # epsilon.
    changes = {'train.steps': 1, 'model.dropout': 0.0, 'eval.every_steps': 1, 'optimizer.epsilon': 1e-3}
    config = tune_config(tiny_gpt2, changes)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, 'evaluate', interrupted)
        stopped = train(config, tmp_path)
    assert (stopped.step, stopped.signal) == (0, signal.SIGINT)
    assert 'stopped before the first step, so nothing is saved' in capfd.readouterr().out
    assert not (tmp_path / 'checkpoints').exists()

    # What a run leaves that is killed after its look at the weights.
    (tmp_path / 'metrics.jsonl').write_text('{"step": 0, "val_loss": 9.0, "time": 0.0}\n', encoding='utf-8')
    result = train(config, tmp_path)
    assert [row['step'] for row in rows(tmp_path)] == [0, 1, 1]
    assert_close(result.params, one_step(config, tiny_gpt2, result.tokenizer), rtol=1e-4, atol=2e-5)


def one_step(config, source, tokenizer):
    """The parameters after one step of optax's own AdamW on the whole batch, from whole logits."""
    model_config, params = huggingface.load(source)
    data = prepare(DataConfig(path=config.data.path, cache_dir=config.data.cache_dir), tokenizer, lambda _: None)
    batch = Batches(data.train, config.train.batch_size, 32, config.train.seed).rows(0)

    def loss(params):
        logits = GPT(model_config).apply({'params': params}, batch['tokens'])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch['targets']).mean()

    run = resolve(config).optimizer
    decays = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in ('kernel', 'wte', 'wpe'), params)
    adamw = optax.adamw(
        run.learning_rate, run.beta1, run.beta2, run.epsilon, weight_decay=run.weight_decay, mask=decays
    )
    optimizer = optax.chain(optax.clip_by_global_norm(run.clip_norm), adamw)
    updates, _ = optimizer.update(jax.grad(loss)(params), optimizer.init(params), params)
    return optax.apply_updates(params, updates)


@pytest.mark.slow
def test_a_run_starts_from_the_best_step_of_another_with_a_shorter_context_on_another_mesh(
    tune_config, finished_run, tmp_path, corpus
):
    best = load(finished_run.workdir)
    changes = {'model.block_size': 16, 'mesh.data': 1, 'mesh.fsdp': 4, 'mesh.tensor': 2, 'train.steps': 1}
    result = train(tune_config(finished_run.workdir, changes), tmp_path)
    cut = best.params | {'wpe': best.params['wpe'][:16]}
    model = GPT(dataclasses.replace(finished_run.model.config, block_size=16))
    expected = held_out_loss(model, cut, finished_run.tokenizer, corpus, 16)
    assert rows(tmp_path)[0]['val_loss'] == pytest.approx(expected, rel=1e-5)
    assert result.params['wpe'].shape == (16, 32)
    assert result.tokenizer.fingerprint == finished_run.tokenizer.fingerprint
    record = load(tmp_path).meta['init_from']
    manifest = (best.folder / 'manifest.sha256.json').read_bytes()
    assert record['sha256'] == hashlib.sha256(hashlib.sha256(manifest).digest()).hexdigest()
    assert (record['step'], record['model']['block_size']) == (best.step, 32)


@pytest.mark.slow
def test_weights_arrive_on_the_devices_where_they_belong(tune_config, tiny_gpt2, tmp_path, capsys):
    changes = {'model.block_size': 8, 'mesh.data': 1, 'mesh.fsdp': 4, 'mesh.tensor': 2, 'train.steps': 1}
    # At a rate that float32 loses beside any weight a step changes nothing: what comes back is what was loaded.
    params = train(tune_config(tiny_gpt2, changes | {'optimizer.learning_rate': 1e-30}), tmp_path).params
    assert (
        f'weights: {tiny_gpt2} (a Hugging Face directory, the first 8 of its 32 positions)\n' in capsys.readouterr().out
    )
    _, expected = huggingface.load(tiny_gpt2)
    expected['wpe'] = expected['wpe'][:8]
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2), devices=jax.devices())
    jax.tree.map(
        lambda leaf, where: np.testing.assert_equal(leaf.sharding, where), params, tree_shardings(mesh, params, params)
    )
    up = params['blocks']['mlp']['up']['kernel']
    assert up.addressable_shards[0].data.size == up.size // 8
