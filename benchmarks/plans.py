"""Plans of the shipped recipes for slices that are not there, as JSON lines and as a table.

    python benchmarks/plans.py OUT.jsonl [PART_OF_CONFIG_OR_TOPOLOGY ...]

The table is that of docs/plans.md. Runs `python -m contrastive_jax.plan` for each case, one after
the other, minutes each; plans that OUT.jsonl has already are not made again. TPUs need libtpu (the
[tpu] extra), GPUs XLA's plugin for them; the command says how to install what is missing.
"""

import json
import pathlib
import subprocess
import sys

CASES = {
    'configs/simclr_vit.py:cifar10': ('v5e:2x4', 'v5p:2x2x2', 'h100:8'),
    'configs/simclr_vit.py:imagenet': ('v5e:4x8', 'v6e:4x4', 'v4:2x2x4', 'h100:8', 'h100:4x8'),
    'configs/simclr_vit.py:folder': ('v5e:2x4', 'h100:8'),
    'configs/simclr_resnet.py:cifar10': ('v5e:2x4', 'v5p:2x2x2', 'h100:8'),
    'configs/simclr_resnet.py:imagenet': ('v5e:4x8', 'v6e:4x4', 'v4:2x2x4', 'h100:8', 'h100:4x8'),
    'configs/simclr_resnet.py:folder': ('v5e:2x4', 'h100:8'),
    'configs/moco.py:imagenet': ('h100:8',),
    'configs/moco_v3.py:imagenet': ('v5e:4x8',),
    'configs/nnclr.py:imagenet': ('v5e:4x8',),
    'configs/pcl.py:imagenet': ('h100:8',),
    'configs/sup_con.py:imagenet': ('v5e:4x8',),
    'configs/simsiam.py:imagenet': ('h100:8',),
    'configs/byol.py:imagenet': ('v5e:4x8',),
    'configs/swav.py:imagenet': ('v5e:4x8', 'h100:4x8'),
    'configs/swav.py:imagenet_256': ('h100:8',),
    'configs/barlow_twins.py:imagenet': ('v5e:4x8',),
    'configs/vicreg.py:imagenet': ('v5e:4x8',),
    'configs/dino.py:imagenet': ('v5e:4x8', 'h100:4x8'),
    'configs/dinov2.py:imagenet': ('v5e:8x8', 'h100:4x8'),
    'configs/metric_learning.py:imagenet': ('h100:8',),
    'configs/moco.py:imagenet_v1': ('h100:8',),
    'configs/moco_v3.py:imagenet_resnet': ('v5e:4x8',),
    'configs/clip_vit.py:openai': ('v5e:8x8', 'h100:4x8'),
    'configs/siglip_vit.py:webli': ('v5e:8x8', 'h100:4x8'),
    **{
        f'configs/{name}_vit.py:{preset}': slices
        for name in ('clip', 'siglip')
        for preset, slices in {'webdataset': ('h100:8',), 'captions': ('h100:1',)}.items()
    },
    **{
        f'configs/{name}.py:{preset}': ('h100:1',)
        for name in (
            *('moco', 'moco_v3', 'nnclr', 'pcl', 'sup_con', 'simsiam', 'byol', 'swav'),
            *('barlow_twins', 'vicreg', 'dino', 'dinov2', 'metric_learning'),
        )
        for preset in ('cifar10', 'folder')
    },
}
# Images that a source without a size of its own is taken to have: a folder, CC3M, LAION-400M, and
# WebLI's for SigLIP's 9 billion examples.
IMAGES = {
    'folder': 100_000,
    'captions': 100_000,
    'webdataset': 3_000_000,
    'openai': 400_000_000,
    'webli': 9_000_000_000,
}
GiB = 2**30


def planned(config: str, topology: str) -> dict:
    command = [sys.executable, '-m', 'contrastive_jax.plan', '--json']
    command += [f'--config={config}', f'--topology={topology}']
    if images := IMAGES.get(config.partition(':')[2]):
        command += [f'--images={images}']
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return {'config': config, **json.loads(out.stdout.splitlines()[-1])}


def row(p: dict) -> str:
    memory = f'{p["needed_bytes"] / GiB:.2f} of {p["hbm_bytes"] / GiB:.2f}'
    cells = [f'`{pathlib.Path(p["config"]).name}`', p['topology'], f'{p["global_batch"]:,}', memory]
    if 'seconds' in p:
        s = {k: 1e3 * v for k, v in p['seconds'].items()}
        cells += [
            f'{p["model_flops"]:.3g}',
            f'{p["program_flops"] / p["model_flops"]:.2f}',
            f'{s["compute"]:.1f} / {s["memory"]:.1f} / {s["collectives"]:.1f}',
            f'{p["images_per_second"]:,.0f}',
            f'{p["hours"]:.1f}',
        ]
    else:
        cells += ['does not compile', '', '', '', '']
    fitting = [name for name, tried in p.get('remedies', {}).items() if tried['fits']]
    cells.append('yes' if p['fits'] else 'no; with ' + ', or '.join(f'`{f}`' for f in fitting))
    return '| ' + ' | '.join(cells) + ' |'


def main() -> None:
    out, *parts = sys.argv[1:]
    path = pathlib.Path(out)
    lines = path.read_text().splitlines() if path.exists() else []
    done = {(p['config'], p['topology']): p for p in map(json.loads, lines)}
    print(
        '| config | slice | batch | GiB needed of a device | model FLOPs a step | program/model '
        '| ms: compute / memory / collectives | images/s, roofline | hours | fits |'
    )
    print('|---|---|---|---|---|---|---|---|---|---|', flush=True)
    for config, topologies in CASES.items():
        for topology in topologies:
            if parts and not any(part in f'{config} {topology}' for part in parts):
                continue
            if (config, topology) not in done:
                done[config, topology] = planned(config, topology)
                with path.open('a') as file:
                    file.write(json.dumps(done[config, topology]) + '\n')
            print(row(done[config, topology]), flush=True)


if __name__ == '__main__':
    main()
