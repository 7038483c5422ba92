"""The engine's prefill and steps against whole forward passes, one row at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.errors import InputError
from gpt_jax.inference import Beams, Contrastive, Engine, Request, Sampling, SamplingBatch, StoppingCriteria, generate
from gpt_jax.inference.engine import padded_length, power_of_two
from gpt_jax.inference.generate import decode
from gpt_jax.models import GPT, GPTConfig
from gpt_jax.models.cache import take_rows, truncate
from gpt_jax.parallel import MeshConfig, make_mesh, tree_shardings

# Bands of 5 tokens, so that prompts and continuations are longer than one.
VOCAB, BLOCK, BAND = 60, 64, 5
SIZES = {'n_layer': 3, 'n_head': 2, 'd_model': 32, 'attention_pattern': 'alternating', 'band_size': BAND}
LENGTHS = (3, 17, 1, 9)
GREEDY = Sampling(greedy=True)


@pytest.fixture(scope='module')
def model():
    return GPT(GPTConfig(VOCAB, BLOCK, **SIZES))


@pytest.fixture(scope='module')
def params(model):
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))['params']
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: leaf + 0.2 * rng.standard_normal(leaf.shape, np.float32), params)


@pytest.fixture(scope='module')
def engine(model, params):
    return Engine(model, params)


@pytest.fixture(scope='module')
def forward(model, params):
    """tokens -> logits of the token after them, from one forward pass without a cache."""
    apply = jax.jit(lambda tokens: model.apply({'params': params}, tokens))

    def run(tokens):
        padded = np.zeros((1, BLOCK), np.int32)
        padded[0, : len(tokens)] = tokens
        return np.asarray(apply(padded))[0, len(tokens) - 1]

    return run


@pytest.fixture(scope='module')
def texts():
    rng = np.random.default_rng(1)
    return [rng.integers(0, VOCAB, length + 12).tolist() for length in LENGTHS]


def follow(engine, texts, lengths, steps, **settings):
    """Logits after each prompt, then after each of `steps` more tokens: [1 + steps, batch, vocab]."""
    logits, cache = engine.prefill(
        [text[:length] for text, length in zip(texts, lengths, strict=True)], max(lengths) + steps
    )
    found = [np.asarray(logits)]
    for step in range(steps):
        tokens = np.array([text[length + step] for text, length in zip(texts, lengths, strict=True)], np.int32)
        logits, cache = engine.step(cache, tokens)
        found.append(np.asarray(logits))
    return np.stack(found), cache


def test_rows_of_different_lengths_follow_the_forward_pass_and_are_as_if_alone(engine, forward, texts):
    together, cache = follow(engine, texts, LENGTHS, 12)
    np.testing.assert_array_equal(cache['lengths'], np.array(LENGTHS) + 12)
    for row, (text, length) in enumerate(zip(texts, LENGTHS, strict=True)):
        expected = [forward(text[: length + step]) for step in range(13)]
        np.testing.assert_allclose(together[:, row], expected, atol=1e-4)
        alone, _ = follow(engine, [text], [length], 12)
        np.testing.assert_allclose(together[:, row], alone[:, 0], atol=1e-5)


def test_rows_can_be_repeated_and_reordered(engine, forward, texts):
    _, cache = engine.prefill([text[:length] for text, length in zip(texts, LENGTHS, strict=True)], 21)
    order = jnp.array([1, 1, 0])
    logits, cache = engine.step(take_rows(cache, order), np.array([7, 8, 9]))
    for found, row, token in zip(logits, (1, 1, 0), (7, 8, 9), strict=True):
        np.testing.assert_allclose(found, forward([*texts[row][: LENGTHS[row]], token]), atol=1e-4)
    assert cache['lengths'].tolist() == [18, 18, 4]


@pytest.mark.parametrize('back', [1, 4])
def test_tokens_that_are_taken_back_leave_no_trace(engine, forward, texts, back):
    # 4 tokens are read beyond the prompt and some are taken back: each band then reaches tokens it had moved on from.
    text, length = texts[1], LENGTHS[1]
    _, cache = engine.prefill([text[:length]], length + 12, undoable=4)
    for token in (50, 51, 52, 53):
        _, cache = engine.step(cache, np.array([token]))
    kept = [50, 51, 52, 53][: 4 - back]
    cache = truncate(cache, jnp.array([length + len(kept)]))
    for token in (20, 21, 22):
        kept.append(token)
        logits, cache = engine.step(cache, np.array([token]))
        np.testing.assert_allclose(logits[0], forward(text[:length] + kept), atol=1e-4)


def test_a_narrower_cache_is_nearly_as_good_and_half_the_size(model, params, engine, texts):
    narrow = Engine(model, params, cache_dtype='bf16')
    exact, _ = follow(engine, texts, LENGTHS, 12)
    found, cache = follow(narrow, texts, LENGTHS, 12)
    assert {array.dtype for array in (*cache['key'], *cache['value'])} == {jnp.dtype(jnp.bfloat16)}
    assert found.dtype == np.float32
    error = np.abs(found - exact).max(axis=(1, 2))
    assert error[0] < 1e-5  # a prompt is read without its cache
    assert 1e-4 < error[1:].max() < 0.05 * np.abs(exact).max()


def test_banded_layers_hold_their_band_alone(engine, texts):
    _, cache = engine.prefill([texts[1][:17]], 29, undoable=3)
    assert [array.shape[2] for array in cache['key']] == [32, BAND + 3, 32]


@pytest.mark.slow
def test_a_mesh_continues_as_one_device_does(model, params, engine, texts):
    prompts = [text[:length] for text, length in zip(texts, LENGTHS, strict=True)]
    spread = Engine(model, params, mesh=make_mesh(MeshConfig(data=2, fsdp=4)))
    kernel = spread.params['blocks'][0]['mlp']['up']['kernel']
    assert kernel.addressable_shards[0].data.shape == (8, 128)
    for sampling in (GREEDY, Sampling(top_k=20)):
        alone, together = (generate(e, prompts, sampling, StoppingCriteria(10, -1)) for e in (engine, spread))
        assert [r.tokens for (r,) in together] == [r.tokens for (r,) in alone]
        np.testing.assert_allclose([r.logprobs for (r,) in together], [r.logprobs for (r,) in alone], atol=1e-4)


@pytest.mark.slow
def test_a_mesh_searches_as_one_device_does(model, params, engine, texts):
    prompts = [text[:length] for text, length in zip(texts, LENGTHS, strict=True)]
    spread = Engine(model, params, mesh=make_mesh(MeshConfig(data=2, fsdp=4)))

    def found(engine):
        for beams in (Beams(3), Beams(4, num_beam_groups=2, diversity_penalty=0.5)):
            for (result,) in generate(engine, prompts, GREEDY, StoppingCriteria(8, -1), strategy=beams):
                yield result.tokens, result.score
        for (result,) in generate(engine, prompts, GREEDY, StoppingCriteria(8, -1), strategy=Contrastive()):
            yield result.tokens, sum(result.logprobs)

    for alone, together in zip(found(engine), found(spread), strict=True):
        assert together[0] == alone[0]
        assert together[1] == pytest.approx(alone[1], rel=1e-4)


def test_buckets_are_few_and_waste_little():
    sizes = [padded_length(length) for length in range(1, 4097)]
    assert all(size >= length for length, size in enumerate(sizes, 1))
    assert all(size <= 1.25 * length for length, size in enumerate(sizes, 1) if length > 256)
    assert sorted(set(sizes))[:8] == [32, 64, 128, 256, 320, 384, 448, 512]
    assert len(set(sizes)) == 32
    assert padded_length(900, 1024) == 960
    assert padded_length(40, 48) == 48


def test_batches_have_few_sizes_that_a_mesh_can_split(model, params, engine):
    assert [power_of_two(count) for count in (0, 1, 2, 3, 5, 8)] == [1, 1, 2, 4, 8, 8]
    assert [engine.batch_size(rows) for rows in (1, 2, 3, 5, 8)] == [1, 2, 4, 8, 8]
    spread = Engine(model, params, mesh=make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), weights='share')
    assert [spread.batch_size(rows) for rows in (1, 4, 5, 9)] == [4, 4, 8, 16]


def live_bytes():
    return sum(array.nbytes for array in jax.live_arrays())


def test_weights_are_held_once_where_the_engine_takes_them(texts):
    model = GPT(GPTConfig(VOCAB, BLOCK, n_layer=4, n_head=2, d_model=64))
    before = live_bytes()
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))['params']
    size = live_bytes() - before
    copied = Engine(model, params)
    assert live_bytes() - before > 1.9 * size
    (expected,) = generate(copied, [texts[0]], GREEDY, StoppingCriteria(9, -1))
    del copied
    taken = Engine(model, params, weights='take')
    assert live_bytes() - before < 1.05 * size
    assert generate(taken, [texts[0]], GREEDY, StoppingCriteria(9, -1))[0][0].tokens == expected[0].tokens
    assert params['blocks']['mlp']['up']['kernel'].is_deleted()


@pytest.mark.slow
@pytest.mark.parametrize('mesh', [None, (2, 4)], ids=['one device', 'mesh'])
def test_shared_weights_are_decoded_from_without_a_copy(model, params, engine, texts, mesh):
    if mesh is not None:
        mesh = make_mesh(MeshConfig(data=mesh[0], fsdp=mesh[1]))
        params = jax.device_put(params, tree_shardings(mesh, params, params))
    shared = Engine(model, params, weights='share')
    assert jax.tree.all(jax.tree.map(lambda ours, given: ours is given, shared.params, params))
    prompts = [text[:length] for text, length in zip(texts, LENGTHS, strict=True)]
    for sampling in (GREEDY, Sampling(top_k=20)):
        expected, found = (generate(e, prompts, sampling, StoppingCriteria(10, -1), seed=2) for e in (engine, shared))
        assert [r.tokens for (r,) in found] == [r.tokens for (r,) in expected]


@pytest.mark.slow
def test_a_decoding_loop_makes_no_copy_of_shared_weights(as_users):
    model = GPT(GPTConfig(VOCAB, BLOCK, n_layer=8, n_head=2, d_model=64))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))['params']
    shared = Engine(model, params, weights='share')
    batch = SamplingBatch(shared, 1, 20, GREEDY, StoppingCriteria(10, -1))
    batch.add([Request([1, 2, 3])])
    batch.advance(1)
    lowered = decode.lower(model, None, shared.params, batch._state, 8, 10, batch._chain)
    program = lowered.compile(compiler_options=as_users)
    blocks = sum(leaf.nbytes for leaf in jax.tree.leaves(params['blocks']))
    assert program.memory_analysis().temp_size_in_bytes < 0.5 * blocks


def test_a_mesh_that_splits_texts_is_refused(model, params):
    with pytest.raises(InputError, match=r'mesh.context=2 must be 1'):
        Engine(model, params, mesh=make_mesh(MeshConfig(data=4, context=2)))


def test_logits_that_are_not_finite_are_refused(model, params):
    for factor in (1e38, jnp.nan):
        engine = Engine(model, jax.tree.map(lambda leaf, factor=factor: leaf * factor, params))
        with pytest.raises(InputError, match='logits are not finite'):
            engine.prefill([[1, 2, 3]], 8)
