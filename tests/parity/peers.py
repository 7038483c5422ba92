"""The models of `transformers`, with weights of which none is zero, one or symmetric; and their arrays in our tree.

The correspondence is written out here in numpy, apart from the one in `gpt_jax.models.huggingface`.
"""

import numpy as np
import torch
import transformers

torch.set_num_threads(2)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

NO_DROPOUT = {'gpt2': ('resid_pdrop', 'embd_pdrop', 'attn_pdrop')}
NO_DROPOUT['gpt_neo'] = ('resid_dropout', 'embed_dropout', 'attention_dropout')


def gpt2(seed=0, **changes):
    """A GPT2LMHeadModel; the defaults have 300 tokens, so that our tables of 384 rows are padded."""
    sizes = {'vocab_size': 300, 'n_positions': 24, 'n_embd': 32, 'n_layer': 2, 'n_head': 4}
    return _made('gpt2', transformers.GPT2LMHeadModel, transformers.GPT2Config, sizes | changes, seed)


def gpt_neo(seed=0, kinds=('global', 'local'), **changes):
    """A GPTNeoForCausalLM of one layer for each of `kinds`; a local one sees 5 tokens."""
    sizes = {'vocab_size': 300, 'max_position_embeddings': 24, 'hidden_size': 32, 'num_heads': 4, 'window_size': 5}
    sizes |= {'num_layers': len(kinds), 'attention_types': [[list(kinds), 1]]}
    return _made('gpt_neo', transformers.GPTNeoForCausalLM, transformers.GPTNeoConfig, sizes | changes, seed)


def _made(family, model_class, config_class, sizes, seed):
    torch.manual_seed(seed)
    rates = dict.fromkeys(NO_DROPOUT[family], 0.0)
    model = model_class(config_class(**(rates | {'bos_token_id': 0, 'eos_token_id': 0} | sizes)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def tree(model, of=lambda parameter: parameter.detach()):
    """Our parameter tree of what `of` takes from each PyTorch parameter; rows of padding are zero."""
    arrays = {name: of(parameter).numpy() for name, parameter in model.named_parameters()}
    c = model.config
    layers, heads, d = c.num_hidden_layers, c.num_attention_heads, c.hidden_size

    def one(name):
        return arrays[f'transformer.{name}']

    def stack(name, shape, transposed=False):
        per_layer = [one(f'h.{layer}.{name}') for layer in range(layers)]
        return np.stack([(array.T if transposed else array).reshape(shape) for array in per_layer])

    def padded(table):
        return np.pad(table, ((0, -len(table) % 128), (0, 0)))

    def norm(name):
        return {'scale': stack(f'{name}.weight', (d,)), 'bias': stack(f'{name}.bias', (d,))}

    head = (heads, d // heads)
    neo = c.model_type == 'gpt_neo'
    width = one('h.0.mlp.c_fc.bias').shape[0]
    if neo:
        parts = [stack(f'attn.attention.{part}_proj.weight', (d, *head), transposed=True) for part in 'qkv']
        qkv = {'kernel': np.stack(parts, axis=2)}
        out = 'attn.attention.out_proj'
    else:
        qkv = {'kernel': stack('attn.c_attn.weight', (d, 3, *head)), 'bias': stack('attn.c_attn.bias', (3, *head))}
        out = 'attn.c_proj'
    ours = {
        'wte': padded(one('wte.weight')),
        'wpe': one('wpe.weight'),
        'blocks': {
            'ln_1': norm('ln_1'),
            'ln_2': norm('ln_2'),
            'attention': {
                'qkv': qkv,
                'out': {'kernel': stack(f'{out}.weight', (*head, d), neo), 'bias': stack(f'{out}.bias', (d,))},
            },
            'mlp': {
                'up': {'kernel': stack('mlp.c_fc.weight', (d, width), neo), 'bias': stack('mlp.c_fc.bias', (width,))},
                'down': {'kernel': stack('mlp.c_proj.weight', (width, d), neo), 'bias': stack('mlp.c_proj.bias', (d,))},
            },
        },
        'ln_f': {'scale': one('ln_f.weight'), 'bias': one('ln_f.bias')},
    }
    if not c.tie_word_embeddings:
        ours['lm_head'] = padded(arrays['lm_head.weight'])
    return ours
