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


def causal_weights(q_BNTK, k_BNTK):
    scores_BNTS = np.einsum('bntk,bnsk->bnts', q_BNTK, k_BNTK) / np.sqrt(q_BNTK.shape[-1])
    hidden_TS = np.triu(np.ones(scores_BNTS.shape[-2:], bool), 1)
    return np.exp(log_softmax(np.where(hidden_TS, -np.inf, scores_BNTS)))


def causal_attention(q_BNTK, k_BNTK, v_BNTK):
    return np.einsum('bnts,bnsk->bntk', causal_weights(q_BNTK, k_BNTK), v_BNTK)


def causal_attention_gradients(q_BNTK, k_BNTK, v_BNTK, dy_BNTK):
    """(dq, dk, dv) by the chain rule through y = w v, w = softmax(s), s = q k / sqrt(K)."""
    w = causal_weights(q_BNTK, k_BNTK)
    dw = np.einsum('bntk,bnsk->bnts', dy_BNTK, v_BNTK)
    ds = w * (dw - (w * dw).sum(axis=-1, keepdims=True)) / np.sqrt(q_BNTK.shape[-1])
    dq = np.einsum('bnts,bnsk->bntk', ds, k_BNTK)
    dk = np.einsum('bnts,bntk->bnsk', ds, q_BNTK)
    dv = np.einsum('bnts,bntk->bnsk', w, dy_BNTK)
    return dq, dk, dv


def self_attention(x_BTD, p):
    """`p` is the float64 tree of one layer's `attention`: qkv/kernel [D, 3, N, K], out/kernel [N, K, D]."""
    q, k, v = (
        np.einsum('btd,dnk->bntk', x_BTD, p['qkv']['kernel'][:, i]) + p['qkv']['bias'][i][:, None] for i in range(3)
    )
    return np.einsum('bntk,nkd->btd', causal_attention(q, k, v), p['out']['kernel']) + p['out']['bias']


def mlp(x_BTD, p):
    hidden_BTF = gelu(x_BTD @ p['up']['kernel'] + p['up']['bias'])
    return hidden_BTF @ p['down']['kernel'] + p['down']['bias']


def block(x_BTD, p):
    x_BTD = x_BTD + self_attention(layer_norm(x_BTD, **p['ln_1']), p['attention'])
    return x_BTD + mlp(layer_norm(x_BTD, **p['ln_2']), p['mlp'])


def gpt_logits(params, tokens_BT, vocab_size):
    """Logits [batch, time, vocab_size] of a whole model, its rows beyond `vocab_size` never touched."""
    p = float64(params)
    wte = p['wte'][:vocab_size]
    head = p['lm_head'][:vocab_size] if 'lm_head' in p else wte
    x_BTD = wte[np.asarray(tokens_BT)] + p['wpe'][: tokens_BT.shape[1]]
    for layer in range(p['blocks']['ln_1']['scale'].shape[0]):
        x_BTD = block(x_BTD, jax.tree.map(lambda array, layer=layer: array[layer], p['blocks']))
    return layer_norm(x_BTD, **p['ln_f']) @ head.T


def cross_entropy(logits_BTV, targets_BT):
    return -np.take_along_axis(log_softmax(logits_BTV), np.asarray(targets_BT)[..., None], axis=-1)[..., 0]
