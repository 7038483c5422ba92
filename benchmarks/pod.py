"""How the eight sizes of GPT-3 train on pods, without one: the tables of docs/SCALING.md, made by the compilers.

    python benchmarks/pod.py --rows=13b@v5p:4x8x8                    one row: size @ topology
    python benchmarks/pod.py --rows=shipped                          13b and 175b as configs/gpt3.py ships them
    python benchmarks/pod.py --rows=v5e,v5p,v6e,h100                 all sizes on these (hours)
    python benchmarks/pod.py --suite                                 all of it
    python benchmarks/pod.py --show                                  the tables of what has been made so far

Each row is a `python -m gpt_jax.plan --search --topology=...` (of those that are shipped without --search), one at a
time. It needs libtpu for TPUs (pip install -e '.[tpu-aot]') and the GPU compiler for GPUs ('.[gpu-aot]'), and neither a
TPU nor a GPU. A row that is there is not made again, so that this can be stopped and go on. Level: every row fits.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time

SIZES = ('125m', '350m', '760m', '1.3b', '2.7b', '6.7b', '13b', '175b')
# Of each kind a slice for each size that has room for it and divides its batch: 256 to 1,600 sequences.
SLICES = {
    'v5e': ('2x4', '4x4', '4x4', '4x8', '8x8', '8x16', '16x16', '16x16'),
    'v5p': ('2x2x1', '2x2x2', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x8x8', '8x8x20'),
    'v6e': ('2x4', '2x4', '4x4', '4x4', '4x8', '8x8', '8x16', '16x16'),
    'h100': ('8', '8', '8', '2x8', '4x8', '8x8', '16x8', '128x8'),
}
SHIPPED = ('13b@v5p:4x8x8 as shipped', '175b@v5p:8x8x20 as shipped')


def main() -> None:
    """Makes what is asked for, prints the tables, and exits with 1 where a row does not fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rows', default='shipped', help="to make: 'shipped', kinds of devices, or SIZE@TOPOLOGY")
    parser.add_argument('--suite', action='store_true', help='make all rows')
    parser.add_argument('--show', action='store_true', help='make nothing')
    parser.add_argument('--output', default='pod.jsonl', help='where rows are kept, one JSON object a line')
    arguments = parser.parse_args()
    path = pathlib.Path(arguments.output)
    done = {row['row']: row for row in map(json.loads, path.read_text().splitlines())} if path.exists() else {}
    wanted = ['shipped', *SLICES] if arguments.suite else arguments.rows.split(',')
    for row in () if arguments.show else named(wanted):
        if row not in done:
            done[row] = make(row)
            with path.open('a', encoding='utf-8') as file:
                file.write(json.dumps(done[row]) + '\n')
            print(line(done[row]), flush=True)
    show(done)
    missing = [name for name, row in done.items() if 'error' in row or not row['plan']['compiled']['fits']]
    print(f'\nmissed: {", ".join(missing)}' if missing else f'\nmet: all of {len(done)} rows fit')
    sys.exit(1 if missing else 0)


def named(names: list[str]) -> list[str]:
    """The rows that --rows names: SIZE@TOPOLOGY, with ' as shipped' where nothing is searched."""
    rows: list[str] = []
    for name in names:
        if name == 'shipped':
            rows += SHIPPED
        elif name in SLICES:
            rows += [f'{size}@{name}:{slice_}' for size, slice_ in zip(SIZES, SLICES[name], strict=True)]
        else:
            rows.append(name)
    return rows


def make(row: str) -> dict:
    """Plans one row; `plan` is what the verb printed, or `error` its line."""
    size, _, topology = row.removesuffix(' as shipped').partition('@')
    command = [sys.executable, '-m', 'gpt_jax.plan', f'--config=configs/gpt3.py:{size}', f'--topology={topology}']
    command += ['--json'] + ([] if row.endswith('shipped') else ['--search'])
    started = time.monotonic()
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    found = {'row': row, 'seconds': round(time.monotonic() - started)}
    if ended.returncode:
        return found | {'error': ended.stderr.strip().split('\n')[-1]}
    return found | {'plan': json.loads(ended.stdout)}


def line(found: dict) -> str:
    """A row of the tables."""
    size, _, topology = found['row'].removesuffix(' as shipped').partition('@')
    if 'error' in found:
        return f'| {size} | `{topology}` | {found["error"]} |'
    plan = found['plan']
    memory, compiled = plan['memory'], plan['compiled']
    mesh = ' x '.join(f'{axis} {count}' for axis, count in memory['mesh'].items() if count > 1)
    fits = f'{compiled["needed_bytes"] / 2**30:.1f} GiB' if compiled['fits'] else 'does not fit'
    cells = [size, f'`{topology}`', f'{memory["devices"]:,}', mesh, memory['remat']]
    cells += [f'{memory["accumulation_steps"]} x {memory["rows_per_device"]}', fits]
    program = compiled['program'] or {}
    sent: dict[str, list[int]] = {}
    for one in program.get('collectives', ()):
        kind = sent.setdefault(one['kind'], [0, 0])
        kind[0] += one['count']
        kind[1] += one['sent_bytes']
    cells.append(', '.join(f'{count:,} {kind} {size / 1e9:.1f} GB' for kind, (count, size) in sent.items()))
    if 'search' in plan:
        best = next(b for b in plan['search']['best'] if b['mesh'] == memory['mesh'] and b['remat'] == memory['remat'])
        seconds, mfu = best['step_seconds'], best['mfu']
        cells.append(f'{seconds:.2f} s, {mfu:.0%}')
        if program.get('step_seconds'):
            cells[-1] += f'; roofline {program["step_seconds"]:.2f} s, {program["mfu"]:.0%}'
    return '| ' + ' | '.join(cells) + ' |'


def show(done: dict[str, dict]) -> None:
    """The tables in Markdown: what is shipped, and each kind of device."""
    head = ['size', 'slice', 'devices', 'mesh', 'remat', 'micro-batches x rows', 'memory, compiled', 'sent a step']
    tables = {'as shipped': SHIPPED} | {kind: named([kind]) for kind in SLICES}
    for name, rows in tables.items():
        made = [done[row] for row in rows if row in done]
        if made:
            cells = head + ([] if name == 'as shipped' else ['step and MFU, estimated'])
            print(f'\n{name}\n\n| {" | ".join(cells)} |\n|{"---|" * len(cells)}')
            print('\n'.join(line(one) for one in made))
    others = [one for row, one in done.items() if not any(row in rows for rows in tables.values())]
    print(''.join(f'\n{line(one)}' for one in others))


if __name__ == '__main__':
    main()
