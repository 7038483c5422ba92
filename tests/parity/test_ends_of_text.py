"""Several tokens that end a text, beside transformers' generate."""

import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')

import peers  # noqa: E402

from gpt_jax import inference  # noqa: E402
from gpt_jax.inference import Beams, Engine, Sampling, StoppingCriteria  # noqa: E402
from gpt_jax.models import GPT, huggingface  # noqa: E402

PROMPT, COUNT, VOCAB = [5, 17, 2], 12, 20


@pytest.mark.parametrize('beams', [None, pytest.param(3, marks=pytest.mark.slow)])
def test_texts_end_where_those_of_transformers_do(tmp_path, beams):
    peer = peers.gpt2(vocab_size=VOCAB, n_positions=32)
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.mul_(2)
    peer.save_pretrained(tmp_path)
    config, params = huggingface.load(tmp_path)
    engine, sampling = Engine(GPT(config), params), Sampling(greedy=True, min_new_tokens=2)
    strategy = None if beams is None else Beams(beams, num_return_sequences=beams)
    settings = {} if beams is None else {'num_beams': beams, 'num_return_sequences': beams}
    lengths = set()
    for ends in ((4, 9), (1, 8, 3, 12), tuple(range(0, VOCAB, 2))):
        made = peer.generate(
            torch.tensor([PROMPT]),
            attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long),
            max_new_tokens=COUNT,
            min_new_tokens=2,
            eos_token_id=list(ends),
            pad_token_id=ends[0],
            do_sample=False,
            **settings,
        )
        texts = [row[len(PROMPT) :].tolist() for row in made]
        texts = [text[: next((n for n, token in enumerate(text) if token in ends), None)] for text in texts]
        stopping = StoppingCriteria(COUNT, ends[0], eos_token_ids=ends)
        (found,) = inference.generate(engine, [PROMPT], sampling, stopping, strategy=strategy)
        assert [result.tokens for result in found] == texts
        lengths |= set(map(len, texts))
    assert len(lengths) > 1
