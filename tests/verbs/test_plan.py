import importlib.util
import json
import re
import runpy
import types

import pytest

from gpt_jax.data import prepare
from gpt_jax.data.batches import Batches
from gpt_jax.models import attention_kernels as kernels
from gpt_jax.parallel.devices import DEVICES
from gpt_jax.planning import Compiled, render
from gpt_jax.training import resolve
from gpt_jax.training.optimizer import batch_sizes

POD = (
    '--config=configs/gpt3.py:175b',
    '--devices=512',
    *('--config.mesh.data=1', '--config.mesh.fsdp=512', '--config.mesh.tensor=1'),
    *('--config.model.remat=none', '--config.train.accumulation_steps=1'),
)


def test_help_names_the_flags_and_exits_0(process):
    result = process('plan', '--help')
    assert (result.returncode, result.stderr) == (0, '')
    for text in ('python -m gpt_jax.plan --config=', '--topology: ', '--mfu: ', '--dollars_per_device_hour: '):
        assert text in result.stdout


def test_a_plan_of_175b_says_everything_with_its_unit_on_about_a_screen(verb):
    arguments = ('--config.model.remat=full', '--device_kind=TPU v5p', '--dollars_per_device_hour=2')
    status, output, errors = verb('plan', *POD, '--config.train.batch_size=1536', *arguments)
    assert (status, errors) == (0, '')
    for line in (
        r'optimizer.beta2 +0.95 +paper: GPT-3, appendix B',
        r'model.dropout +0 +assumed: the paper states none',
        r'train.batch_size +1,536 +set by the config; batch_size=1,600 \(paper: GPT-3, table 2.1\)',
        r'band_size +256 +assumed: ',
        r'ramp_tokens +12,000,000,000 +assumed: ',
        r'total +174,604,259,328',
        r'total without embeddings +173,961,535,488',
        r'in all +3.191e\+23 FLOP +300,001,787,904 tokens',
        r'parameters +1.33 GiB +as precision.params',
        r'optimizer +2.66 GiB',
        r'total +[\d.]+ GiB +\d+% of the 95.00 GiB of a TPU v5p',
        r'1 x 2,048 tokens +5.06 GiB +9.00 GiB if all layers were dense',
        r'wall time +[\d.]+ days +459 TFLOP/s a device, of which 40% are used',
        r'cost +[\d,]+ USD',
    ):
        assert re.search(rf'^ *{line}', output, re.MULTILINE), line
    assert len(output.splitlines()) < 65


@pytest.mark.slow
def test_what_does_not_fit_comes_with_the_changes_that_would(verb):
    _, output, _ = verb('plan', *POD, '--config.train.batch_size=1536', '--device_kind=TPU v5p')
    assert re.search(
        r'^What would fit, by the estimate\n +[\d.]+ GiB  --config.model.remat=full$', output, re.MULTILINE
    )


def test_json_is_one_object_with_the_same_numbers(verb):
    status, output, _ = verb('plan', *POD, '--config.train.batch_size=512', '--peak_tflops=100', '--mfu=0.5', '--json')
    assert status == 0
    plan = json.loads(output)
    assert plan['parameters']['total'] == sum(plan['parameters']['parts'].values()) == 174_604_259_328
    assert plan['recipe']['optimizer.learning_rate'] == {'value': 6e-5, 'source': 'paper: GPT-3, table 2.1'}
    assert plan['memory']['mesh'] == {'data': 1, 'fsdp': 512, 'tensor': 1, 'context': 1}
    parts = [value for key, value in plan['memory'].items() if key.endswith('_bytes') and key not in TOTALS]
    assert sum(parts) == plan['memory']['total_bytes']
    seconds = plan['training_flops']['total'] / (512 * 100e12 * 0.5)
    assert plan['cost']['days'] == pytest.approx(seconds / 86400)
    assert plan['cost']['dollars'] is None


TOTALS = ('total_bytes', 'device_bytes')


@pytest.mark.parametrize('masked', [False, True])
def test_the_cpu_compiler_says_what_the_real_step_needs_beside_the_estimate(verb, masked):
    arguments = ('--config=configs/smoke.py', '--topology=cpu:2', '--config.mesh.fsdp=2', '--json')
    status, output, _ = verb('plan', *arguments, '--config.mesh.data=1', f'--config.data.mask_documents={masked}')
    assert status == 0
    plan = json.loads(output)
    compiled = plan['compiled']
    assert (compiled['topology'], compiled['compiler'], compiled['fits']) == ('cpu:2', 'the CPU compiler', True)
    assert compiled['needed_bytes'] == sum(
        compiled[f'{name}_bytes'] for name in ('arguments', 'outputs', 'temporaries')
    )
    # What goes in is what the estimate says exactly: the state and the batch, but for the counters. A document mask
    # takes two arrays more than tokens and targets.
    assert plan['memory']['batch_bytes'] == (4 if masked else 2) * 4 * 8 * 32 / 2
    given = sum(plan['memory'][f'{name}_bytes'] for name in ('parameters', 'optimizer', 'batch'))
    assert 0 <= compiled['arguments_bytes'] - given < 64
    assert compiled['attention'] == ['blockwise']
    if masked:
        return
    _, text, _ = verb('plan', *arguments[:-1], '--config.mesh.data=1')
    assert re.search(r'^Memory of a device, by the CPU compiler \(cpu:2, 2 simulated devices\)$', text, re.MULTILINE)
    assert re.search(r'^  attention +blockwise$', text, re.MULTILINE)


@pytest.mark.parametrize('masked', [False, True])
def test_the_step_that_is_compiled_reads_what_that_of_the_run_does(verb, experiment, monkeypatch, masked):
    lowered = []

    def look(lower):
        lowered.append(lower())
        return Compiled(1, 1, 1, needed=3)

    monkeypatch.setattr('gpt_jax.planning.compile_step', look)
    status, _, _ = verb('plan', f'--config={experiment}', '--topology=cpu:8', f'--config.data.mask_documents={masked}')
    assert status == 0
    config = runpy.run_path(experiment)['get_config']()
    config.data.mask_documents = masked
    run = resolve(config)
    data = prepare(run.data, log=lambda _: None)
    separator = data.tokenizer.end_of_text if masked else None
    batch = Batches(data.train, batch_sizes(run), run.model.block_size, run.train.seed, separator).rows(0)
    ((_, planned), _) = lowered[0].in_avals
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in planned.items()} == {
        name: (rows.shape, rows.dtype) for name, rows in batch.items()
    }


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='needs libtpu, the TPU compiler: [tpu-aot]')
def test_the_tpu_compiler_allocates_what_the_estimate_says(verb):
    sizes = ('--config.model.n_layer=4', '--config.model.block_size=256', '--config.train.batch_size=64')
    mesh = ('--config.mesh.data=1', '--config.mesh.fsdp=4', '--topology=v5e:2x2')
    status, output, _ = verb('plan', '--config=configs/gpt3.py:125m', *sizes, *mesh, '--json')
    assert status == 0
    memory, compiled = (json.loads(output)[section] for section in ('memory', 'compiled'))
    assert (compiled['compiler'], compiled['fits']) == ('the TPU compiler', True)
    assert memory['total_bytes'] == pytest.approx(compiled['needed_bytes'], rel=0.15)
    # Parameters and Adam's moments, split over four, and the batch: what goes in, but for the layout's padding (4.7 %
    # with libtpu 0.0.42).
    given = sum(memory[f'{name}_bytes'] for name in ('parameters', 'optimizer', 'batch'))
    assert given <= compiled['arguments_bytes'] <= 1.05 * given


SMALL = ('--config=configs/gpt3.py:125m', '--config.model.n_layer=2', '--config.model.vocab_size=512')
H100 = '--device_kind=NVIDIA H100 80GB HBM3'
SEARCH = ('SMOKE', '--search', '--devices=8', H100)


def test_what_a_search_finds_is_planned_the_same_when_it_is_pasted(verb):
    status, output, _ = verb('plan', *SMALL, '--devices=16', H100, '--search', '--json')
    assert status == 0
    search = json.loads(output)['search']
    assert (search['fits'], search['certified'], len(search['best'])) == (True, None, 8)
    assert search['tried'] >= search['fitting'] > 8
    last = search['best'][-1]
    _, output, _ = verb('plan', *SMALL, '--devices=16', H100, '--json', *last['flags'].split())
    memory = json.loads(output)['memory']
    assert (memory['total_bytes'], memory['mesh']) == (last['total_bytes'], last['mesh'])


def test_a_search_walks_down_its_ranking_until_the_compiler_takes_one(verb, monkeypatch):
    answers = iter([100 * 2**30, 90 * 2**30, 2**30])
    monkeypatch.setattr('gpt_jax.planning.find_device', lambda *_, **__: DEVICES['NVIDIA H100 80GB HBM3'])
    monkeypatch.setattr('gpt_jax.planning.compile_step', lambda _: Compiled(1, 1, 1, needed=next(answers)))
    monkeypatch.setattr('gpt_jax.planning.render', lambda plan: f'{json.dumps(plan)}\n\n{render(plan)}')
    _, output, _ = verb('plan', *SMALL, '--topology=cpu:8', '--search')
    plan, _, text = output.partition('\n\n')
    plan = json.loads(plan)
    search = plan['search']
    assert [one['needed_bytes'] for one in search['refused']] == [100 * 2**30, 90 * 2**30]
    assert search['certified']['needed_bytes'] == plan['compiled']['needed_bytes'] == 2**30
    flags = [one['flags'] for one in (*search['refused'], search['certified'])]
    assert len(set(flags)) == 3
    mesh = plan['memory']['mesh']
    assert f'--config.mesh.fsdp={mesh["fsdp"]} --config.mesh.tensor={mesh["tensor"]}' in flags[-1]
    # The text says the same, and ends with what to paste.
    assert re.search(
        r'^\d+ ways to train were tried, \d+ fit by the estimate; the fastest, by a model', text, re.MULTILINE
    )
    assert text.count('Refused (') == 2
    assert f'To paste (compiled: it fits, with 1.00 GiB):\n  {flags[-1]}\n' in text


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec('jax_cuda12_plugin') is None, reason='needs the GPU compiler: [gpu-aot]')
@pytest.mark.parametrize('topology', ['h100:8x2', 'b200:16'])
def test_the_gpu_compiler_certifies_and_the_step_has_a_roofline(process, topology):
    result = process('plan', *SMALL, '--config.precision.compute=f32', f'--topology={topology}', '--search', '--json')
    assert result.returncode == 0, result.stderr
    plan = json.loads(result.stdout)
    compiled = plan['compiled']
    assert (compiled['devices'], compiled['fits']) == ('16 GPUs: 2 hosts of 8', True)
    program = compiled['program']
    assert any(one['across_hosts'] for one in program['collectives'])
    # No fewer products than the model's own count of what is not masked, on each of 16.
    tokens = 256 * 2048
    assert program['flops'] >= 0.9 * plan['training_flops']['per_token_causal'] * tokens / 16
    assert (
        program['step_seconds']
        >= program['kernel_seconds']
        > program['flops'] / DEVICES[plan['device_kind']].peak_flops
    )
    assert program['unknown_loops'] == 0


@pytest.mark.parametrize(('masked', 'kernel'), [(False, 'cudnn'), (True, 'blockwise')])
def test_the_kernel_is_named_that_the_run_takes_with_its_document_mask(verb, monkeypatch, masked, kernel):
    h100 = types.SimpleNamespace(platform='gpu', compute_capability='9.0')
    monkeypatch.setattr('gpt_jax.models.attention_kernels', lambda config, _, **case: kernels(config, h100, **case))
    monkeypatch.setattr('gpt_jax.planning.compile_step', lambda _: Compiled(1, 1, 1, needed=3))
    arguments = ('--config=configs/smoke.py', '--topology=cpu:8', '--config.precision.compute=bf16')
    _, output, _ = verb('plan', *arguments, f'--config.data.mask_documents={masked}')
    assert re.search(rf'^  attention +{kernel}$', output, re.MULTILINE)


def test_the_row_of_the_table_that_contradicts_itself_is_explained(verb):
    _, output, _ = verb('plan', '--config=configs/gpt3.py:1.3b')
    assert 'Table 2.1 gives 24 heads of 128 at width 2048' in output


def test_what_cannot_be_known_is_said_and_how_to_know_it(verb):
    _, output, _ = verb('plan', '--config=configs/suite_mini.py')
    assert 'the run is given in epochs; give --config.train.tokens' in output
    assert 'unknown: give --device_kind or --peak_tflops' in output
    assert 'set by the config; warmup_tokens=375,000,000' in output


def test_remat_micro_batches_and_fsdp_make_the_plan_smaller(verb):
    def total(*arguments):
        _, output, _ = verb(
            'plan', '--config=configs/quickstart.py', '--config.model.scan_layers=True', '--json', *arguments
        )
        return json.loads(output)['memory']['total_bytes']

    assert total() > total('--config.model.remat=names') > total('--config.model.remat=full')
    assert total() > total('--config.train.accumulation_steps=4')
    assert total('--devices=8') > total('--devices=8', '--config.mesh.fsdp=8')


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ([], '--config is missing; try --config=configs/quickstart.py'),
        (['--config=configs/gpt3.py:4b'], "there is no size '4b'"),
        (['SMOKE', '--mfu=0'], '--mfu=0.0 must be above 0 and at most 1'),
        (['SMOKE', '--mfu=1.5'], '--mfu=1.5 must be above 0 and at most 1'),
        (['SMOKE', '--mfu=1e-320'], 'must be above 0'),
        (['SMOKE', '--peak_tflops=1e308'], '--peak_tflops=1e+308 must be above 0, and at most 1e12'),
        (['SMOKE', '--topology=cpu:99999999'], '--topology=cpu:99999999: at most 4,096 devices'),
        (['SMOKE', f'--topology=cpu:{"1" * 5000}'], 'at most 4,096 devices'),
        (['SMOKE', '--search'], '--search needs devices that are known: --topology=h100:8'),
        (['SMOKE', '--search', '--topology=cpu:2'], '--search needs devices that are known'),
        (['SMOKE', '--search', '--verify', '--topology=cpu:2'], '--search and --verify exclude each other'),
        (['SMOKE', '--topology=h300:8'], '--topology=h300:8 is not a kind and its devices, such as v5e:4x4'),
        (['SMOKE', '--topology=h100:12'], '--topology=h100:12: 12 GPUs are not whole hosts of 8'),
        (['SMOKE', '--topology=h100:9x16'], '--topology=h100:9x16: a host has at most 8 GPUs'),
        (['SMOKE', '--devices=0'], '--devices=0 must be above 0'),
        (['SMOKE', '--peak_tflops=-1'], '--peak_tflops=-1.0 must be above 0'),
        (['SMOKE', '--dollars_per_device_hour=inf'], '--dollars_per_device_hour=inf must be above 0'),
        (['SMOKE', '--devices=6', '--config.mesh.fsdp=4'], 'does not divide the 6 devices'),
        (
            ['SMOKE', '--devices=3', '--config.mesh.data=1', '--config.mesh.context=3'],
            'model.block_size=32 is not divisible by 2 x mesh.context=3',
        ),
        (['SMOKE', '--devices=32'], 'train.batch_size=8 in 1 micro-batches is not divisible by the 32 devices'),
        (
            ['SMOKE', '--devices=8', '--config.mesh.tensor=4'],
            'model.n_head=2 is not divisible by mesh.tensor=4; choose a multiple of 4, or another mesh.tensor',
        ),
        (['SMOKE', '--device_kind=H100'], '--device_kind=H100 is not one of'),
        (['SMOKE', '--decode_length=33'], '--decode_length=33 exceeds model.block_size=32'),
        (['SMOKE', '--config.model.remat=some'], "model.remat='some' must be one of"),
        (
            ['SMOKE', '--config.mesh.fsdp=5', '--devices=5', '--config.train.batch_size=5'],
            'model.d_model=32 is not divisible by mesh.fsdp=5',
        ),
        (['SMOKE', '--verify'], '--verify needs --topology'),
        (
            ['SMOKE', '--devices=8', '--config.optimizer.multipliers=nix:lr=1'],
            "optimizer.multipliers: 'nix' matches no parameter; there are blocks/attention/out/bias",
        ),
        (
            [*SEARCH, '--config.eval.batch_size=3'],
            'none of the meshes of 8 devices can train it. Of the last one: eval.batch_size=3 is not divisible by the '
            '4 devices of mesh.data=1 x mesh.fsdp=4',
        ),
        (
            [*SEARCH, '--config.schedule.batch_ramp_tokens=3000', '--config.schedule.initial_batch_size=2'],
            'Of the last one: a batch of 2 sequences, on the way from schedule.initial_batch_size to',
        ),
        (
            [*SEARCH, '--config.schedule.initial_batch_size=2'],
            'schedule.initial_batch_size=2: from there the batch does not grow; give schedule.batch_ramp_tokens',
        ),
        (
            ['SMOKE', '--config.train.init_weights=ema'],
            'train.init_weights=ema: of which checkpoint? Give train.init_from, or checkpoint.restore_from with',
        ),
        (['SMOKE', '--topology=h100:eight'], '--topology=h100:eight is not a kind and a number of devices'),
    ],
)
def test_what_cannot_be_is_one_line_and_status_1(refused, arguments, message):
    arguments = ['--config=configs/smoke.py' if argument == 'SMOKE' else argument for argument in arguments]
    assert message in refused('plan', *arguments)
