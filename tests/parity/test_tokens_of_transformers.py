"""Added and special tokens, beside transformers' tokenizer of the same directory."""

import json

import pytest

from gpt_jax.data.tokenizer import gpt2, train_bpe

transformers = pytest.importorskip('transformers')

FLAGS = [
    {'content': '<|user turn|>', 'special': True},
    {'content': '<left>', 'lstrip': True},
    {'content': '<right>', 'rstrip': True, 'special': True},
    {'content': 'zword', 'single_word': True},
    {'content': '<日本>', 'normalized': True},
    {'content': '<both>', 'lstrip': True, 'rstrip': True, 'special': True},
]
TEXTS = [
    'hello <|user turn|> there',
    'a  <left>  b<right>   c zword zwordfish zword.',
    '<日本><both><|endoftext|> <both> ',
    'no mark at all',
]


@pytest.mark.parametrize('listed', ['added_tokens_decoder', 'tokenizer.json'])
def test_ids_and_texts_are_those_of_transformers(tmp_path, listed):
    base = train_bpe(['hello there, a word and a swordfish; no mark at all. ' * 20], 300)
    document = json.loads(base.to_json())
    blank = {'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False, 'special': False}
    added = {base.vocab_size + n: blank | flags for n, flags in enumerate(FLAGS)}
    config = {'tokenizer_class': 'PreTrainedTokenizerFast', 'eos_token': '<|endoftext|>'}
    if listed == 'tokenizer.json':
        document['added_tokens'] += [{'id': id_, **token} for id_, token in added.items()]
    else:
        everything = {0: blank | {'content': '<|endoftext|>', 'special': True}} | added
        config['added_tokens_decoder'] = {str(id_): token for id_, token in everything.items()}
    (tmp_path / 'tokenizer.json').write_text(json.dumps(document), encoding='utf-8')
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config), encoding='utf-8')
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), gpt2(tmp_path)
    for text in TEXTS:
        ids = theirs(text)['input_ids']
        assert ours.encode(text, special=True) == ids
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)
        assert ours.encode(text) == theirs(text, split_special_tokens=True)['input_ids']


def test_added_tokens_and_ends_come_back_from_a_checkpoint_as_they_went_in(tmp_path):
    import jax
    import jax.numpy as jnp

    from gpt_jax import checkpoints
    from gpt_jax.models import GPT, GPTConfig, huggingface

    base = train_bpe(['hello there ' * 20], 270)
    config = GPTConfig(300, 16, n_layer=1, n_head=1, d_model=8)
    params = jax.jit(GPT(config).init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))['params']
    source, step, target = (tmp_path / name for name in ('source', 'step', 'target'))
    source.mkdir()
    huggingface.save(source, config, params, 'f32', extra={'eos_token_id': [299, 0]})
    base.save(source / 'tokenizer.json')
    (source / 'added_tokens.json').write_text(json.dumps({'<|user turn|>': 298, '<é>': 299}), encoding='utf-8')
    (source / 'special_tokens_map.json').write_text(json.dumps({'additional_special_tokens': ['<|user turn|>']}))
    checkpoints.import_huggingface(source, step)
    checkpoints.export_huggingface(step, target)
    text = 'hello <|user turn|><é> there'
    loaded, theirs = checkpoints.load_model(target), transformers.AutoTokenizer.from_pretrained(target)
    assert loaded.eos_token_ids == (299, 0)
    assert (
        loaded.tokenizer.fingerprint == gpt2(source).fingerprint == checkpoints.load_model(step).tokenizer.fingerprint
    )
    ids = loaded.tokenizer.encode(text, special=True)
    assert theirs(text, split_special_tokens=False)['input_ids'] == ids
    assert [id_ for id_ in ids if id_ > 270] == [298, 299]
    assert loaded.tokenizer.decode(ids) == text
