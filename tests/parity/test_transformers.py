"""What is exported opens in `transformers`, and does there what it did here; what is imported goes back unchanged."""

import json

import pytest

REASON = "compares with transformers: pip install -e '.[parity]'"
torch = pytest.importorskip('torch', reason=REASON)
transformers = pytest.importorskip('transformers', reason=REASON)

import jax  # noqa: E402
import numpy as np  # noqa: E402
import peers  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

from gpt_jax import checkpoints, inference  # noqa: E402
from gpt_jax.data.tokenizer import Tokenizer, gpt2, train_bpe, train_char  # noqa: E402
from gpt_jax.models import GPT, GPTConfig, huggingface  # noqa: E402

TEXT = 'The quick brown fox jumps over the lazy dog.\nNaïve café, über straße: 42 ÷ 7 = 6.\n\n    def f(x):\n'
GREEDY = inference.Sampling(greedy=True)


def greedy_in_transformers(model, prompt, count):
    prompt = torch.tensor([prompt])
    made = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=count)
    return made[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize('make', [peers.gpt2, peers.gpt_neo])
def test_greedy_continuations_are_those_of_transformers_token_for_token(make, loaded):
    peer = make()
    peer.generation_config.eos_token_id = None
    config, params = loaded(peer)
    prompt = [5, 17, 200, 31, 2]
    engine = inference.Engine(GPT(config), params)
    ((ours,),) = inference.generate(engine, [prompt], GREEDY, inference.StoppingCriteria(19, end_of_text=-1))
    expected = greedy_in_transformers(peer, prompt, 19)
    assert len(set(expected)) > 3  # not one token over and over
    assert ours.tokens == expected
    print(f'\nfidelity: | greedy continuation, 19 tokens | {type(peer).__name__}.generate | identical | identical |')


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
@pytest.mark.parametrize('make', [peers.gpt2, peers.gpt_neo])
def test_there_and_back_gives_the_same_bits(make, dtype, tmp_path):
    peer = make(tie_word_embeddings=False).to(getattr(torch, dtype))
    peer.save_pretrained(tmp_path / 'hf')
    config, params = huggingface.load(tmp_path / 'hf')
    huggingface.save(tmp_path / 'back', config, params, dtype={'float32': 'f32', 'float16': 'fp16'}.get(dtype, 'bf16'))
    there, back = (load_file(tmp_path / name / 'model.safetensors') for name in ('hf', 'back'))
    assert there.keys() == back.keys()
    assert all((there[name].tobytes(), there[name].dtype) == (back[name].tobytes(), back[name].dtype) for name in there)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'back', dtype='auto')
    assert again.dtype == getattr(torch, dtype)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, peer(tokens).logits)
    name = type(peer).__name__
    print(f'\nfidelity: | files in {dtype}: there and back | {name}.save_pretrained | identical | identical |')


RATES = {'resid_pdrop': 0.3, 'embd_pdrop': 0.2, 'attn_pdrop': 0.1}
NEO_RATES = {'resid_dropout': 0.3, 'embed_dropout': 0.2, 'attention_dropout': 0.1}


@pytest.mark.parametrize(
    ('make', 'changes'),
    [
        (peers.gpt2, RATES | {'layer_norm_epsilon': 1e-3, 'scale_attn_weights': False, 'n_inner': 64}),
        (peers.gpt_neo, NEO_RATES | {'layer_norm_epsilon': 1e-3, 'window_size': 3, 'intermediate_size': 64}),
    ],
)
def test_the_config_there_and_back_describes_the_same_model(make, changes, loaded, tmp_path):
    peer = make(tie_word_embeddings=False, **changes)
    huggingface.save(tmp_path / 'back', *loaded(peer))
    back = transformers.AutoConfig.from_pretrained(tmp_path / 'back')
    sizes = ('vocab_size', 'hidden_size', 'num_hidden_layers', 'num_attention_heads', 'max_position_embeddings')
    for key in (*changes, *sizes, 'tie_word_embeddings', 'activation_function', 'model_type', 'architectures'):
        assert getattr(back, key) == getattr(peer.config, key), key
    assert getattr(back, 'attention_layers', None) == getattr(peer.config, 'attention_layers', None)


def test_directories_of_several_files_are_read_as_one(loaded, tmp_path):
    peer = peers.gpt2()
    _, params = loaded(peer, max_shard_size='30KB')
    files = json.loads((tmp_path / 'hf' / 'model.safetensors.index.json').read_text())['weight_map'].values()
    assert len(set(files)) > 2
    expected = peers.tree(peer)
    np.testing.assert_array_equal(params['blocks']['mlp']['up']['kernel'], expected['blocks']['mlp']['up']['kernel'])
    np.testing.assert_array_equal(params['wte'], expected['wte'])


def test_the_base_model_without_a_head_is_read(tmp_path):
    peer = peers.gpt2()
    peer.transformer.save_pretrained(tmp_path / 'base')  # names without `transformer.`
    _, params = huggingface.load(tmp_path / 'base')
    np.testing.assert_array_equal(params['wte'], peers.tree(peer)['wte'])


def test_a_trained_checkpoint_writes_the_same_greedy_text_in_transformers(finished_run, tmp_path):
    checkpoints.export_huggingface(finished_run.workdir, tmp_path / 'hf')
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / 'hf')
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'hf')
    loaded = checkpoints.load(finished_run.workdir)
    engine = inference.Engine(GPT(GPTConfig(**loaded.meta['model'])), loaded.params)
    stopping = inference.StoppingCriteria(20, finished_run.tokenizer.end_of_text)
    for prompt in ('the quick ', 'café', 'a'):
        ids = finished_run.tokenizer.encode(prompt)
        assert tokenizer(prompt)['input_ids'] == ids
        ((made,),) = inference.generate(engine, [ids], GREEDY, stopping)
        theirs = greedy_in_transformers(model, ids, 20)
        assert tokenizer.decode(theirs, skip_special_tokens=True) == finished_run.tokenizer.decode(made.tokens)
    print('\nfidelity: | greedy text of a trained checkpoint | transformers, its export | identical | identical |')


@pytest.fixture(params=['bpe', 'char', "GPT-2's files"])
def tokenizer(request, tmp_path):
    if request.param == 'char':
        return train_char([TEXT])
    bpe = train_bpe([TEXT], 300)
    if request.param == 'bpe':
        return bpe
    model = json.loads(bpe.to_json())['model']
    (tmp_path / 'vocab.json').write_text(json.dumps(model['vocab']))
    merges = '\n'.join(' '.join(pair) for pair in model['merges'])
    (tmp_path / 'merges.txt').write_text(f'#version: 0.2\n{merges}\n')
    return gpt2(tmp_path)


def test_the_exported_tokenizer_gives_the_same_ids_and_text(tokenizer, tmp_path):
    config = GPTConfig(vocab_size=tokenizer.vocab_size, block_size=16, n_layer=1, n_head=1, d_model=8)
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), huggingface.parameter_shapes(config))
    huggingface.save(tmp_path / 'first', config, params)
    tokenizer.save(tmp_path / 'first' / 'tokenizer.json')
    checkpoints.import_huggingface(tmp_path / 'first', tmp_path / 'checkpoint')
    checkpoints.export_huggingface(tmp_path / 'checkpoint', tmp_path / 'hf')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'hf')
    texts = (TEXT, 'quick', ' two  spaces ', 'ÄÖ🙂 unknown', "don't . stop , here", 'a<|endoftext|>b', '')
    for text in texts:
        ids = tokenizer.encode(text)
        assert theirs(text)['input_ids'] == ids
        assert theirs.decode(ids) == tokenizer.decode(ids)
    assert theirs.bos_token_id == theirs.eos_token_id == tokenizer.end_of_text
    unknown = tokenizer.encode('中')[0] if tokenizer.kind == 'char' else tokenizer.end_of_text
    assert theirs.unk_token_id == unknown
    assert theirs.vocab_size <= len(theirs) == tokenizer.vocab_size
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'hf')
    assert again.generation_config.eos_token_id == tokenizer.end_of_text


def test_a_tokenizer_saved_by_transformers_is_taken_along(tmp_path):
    ours = train_bpe([TEXT], 300)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=ours._inner, bos_token='<|endoftext|>', eos_token='<|endoftext|>', unk_token='<|endoftext|>'
    )
    peer = peers.gpt2(vocab_size=ours.vocab_size, bos_token_id=ours.end_of_text, eos_token_id=ours.end_of_text)
    peer.save_pretrained(tmp_path / 'hf')
    fast.save_pretrained(tmp_path / 'hf')
    taken = Tokenizer.from_json(checkpoints.load(tmp_path / 'hf').meta['tokenizer'])
    assert taken.encode(TEXT) == ours.encode(TEXT) == fast(TEXT)['input_ids']
    assert taken.end_of_text == ours.end_of_text
