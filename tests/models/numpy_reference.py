"""GPT-2 in NumPy and float64, written from the paper and not from gpt_jax: what the models' tests compare against."""

import jax
import numpy as np


def float64(tree):
    return jax.tree.map(lambda array: np.asarray(array, np.float64), tree)


def log_softmax(scores):
    scores = scores - scores.max(axis=-1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))


def layer_norm(x, scale, bias, epsilon=1e-5):
    mean = x.mean(axis=-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(axis=-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + epsilon) * scale + bias


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def causal_weights(q_BNTK, k_BNTK, band=None, scale=None, documents_BT=None):
    scale = 1 / np.sqrt(q_BNTK.shape[-1]) if scale is None else scale
    scores_BNTS = np.einsum('bntk,bnsk->bnts', q_BNTK, k_BNTK) * scale
    hidden_TS = np.triu(np.ones(scores_BNTS.shape[-2:], bool), 1)
    if band is not None:
        # Query t sees the keys t - band + 1 ... t.
        hidden_TS |= np.tril(np.ones_like(hidden_TS), -band)
    if documents_BT is not None:
        others_BTS = documents_BT[:, :, None] != documents_BT[:, None, :]
        hidden_TS = hidden_TS | others_BTS[:, None]
    return np.exp(log_softmax(np.where(hidden_TS, -np.inf, scores_BNTS)))


def causal_attention(q_BNTK, k_BNTK, v_BNTK, band=None, scale=None, documents_BT=None):
    return np.einsum('bnts,bnsk->bntk', causal_weights(q_BNTK, k_BNTK, band, scale, documents_BT), v_BNTK)


def causal_attention_gradients(q_BNTK, k_BNTK, v_BNTK, dy_BNTK, band=None, scale=None, documents_BT=None):
    """(dq, dk, dv) by the chain rule through y = w v, w = softmax(s), s = scale q k."""
    scale = 1 / np.sqrt(q_BNTK.shape[-1]) if scale is None else scale
    w = causal_weights(q_BNTK, k_BNTK, band, scale, documents_BT)
    dw = np.einsum('bntk,bnsk->bnts', dy_BNTK, v_BNTK)
    ds = w * (dw - (w * dw).sum(axis=-1, keepdims=True)) * scale
    dq = np.einsum('bnts,bnsk->bntk', ds, k_BNTK)
    dk = np.einsum('bnts,bntk->bnsk', ds, q_BNTK)
    dv = np.einsum('bnts,bntk->bnsk', w, dy_BNTK)
    return dq, dk, dv


def self_attention(x_BTD, p, band=None, scale=None):
    """`p` is the float64 tree of one layer's `attention`: qkv/kernel [D, 3, N, K], out/kernel [N, K, D]."""
    q, k, v = (np.einsum('btd,dnk->bntk', x_BTD, p['qkv']['kernel'][:, i]) for i in range(3))
    if 'bias' in p['qkv']:
        q, k, v = (y + p['qkv']['bias'][i][:, None] for i, y in enumerate((q, k, v)))
    return np.einsum('bntk,nkd->btd', causal_attention(q, k, v, band, scale), p['out']['kernel']) + p['out']['bias']


def mlp(x_BTD, p):
    hidden_BTF = gelu(x_BTD @ p['up']['kernel'] + p['up']['bias'])
    return hidden_BTF @ p['down']['kernel'] + p['down']['bias']


def block(x_BTD, p, band=None, scale=None):
    x_BTD = x_BTD + self_attention(layer_norm(x_BTD, **p['ln_1']), p['attention'], band, scale)
    return x_BTD + mlp(layer_norm(x_BTD, **p['ln_2']), p['mlp'])


def gpt_logits(params, tokens_BT, vocab_size, band=None, scale=None):
    """Logits [batch, time, vocab_size] of a whole model, its rows beyond `vocab_size` never touched.

    With a `band` every second layer sees no more than that, the first one all (GPT-3, section 2.1).
    """
    p = float64(params)
    wte = p['wte'][:vocab_size]
    head = p['lm_head'][:vocab_size] if 'lm_head' in p else wte
    x_BTD = wte[np.asarray(tokens_BT)] + p['wpe'][: tokens_BT.shape[1]]
    for layer in range(p['blocks']['ln_1']['scale'].shape[0]):
        layer_params = jax.tree.map(lambda array, layer=layer: array[layer], p['blocks'])
        x_BTD = block(x_BTD, layer_params, band if layer % 2 == 1 else None, scale)
    return layer_norm(x_BTD, **p['ln_f']) @ head.T


def cross_entropy(logits_BTV, targets_BT):
    return -np.take_along_axis(log_softmax(logits_BTV), np.asarray(targets_BT)[..., None], axis=-1)[..., 0]
