"""`python -m contrastive_jax.plan --config=configs/simclr_vit.py:imagenet --topology=v5e:4x8`.

Compiles a config's real training step for hardware that is not there, and says what it needs:
memory against the chip's, collectives, FLOPs and a roofline of the time. Where it does not fit, the
knobs that could help are tried, one compilation each. `--json` prints one object as the last line.

Needs XLA's compiler for the chips, but no chip: see `chips.devices`. A TPU's compiler spends most
of its time trying out tilings of products; here it does so with `--tuned` alone.
"""

import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from absl import flags

from contrastive_jax import cli
from contrastive_jax.config import Config, UserError
from contrastive_jax.planning import chips
from contrastive_jax.planning.chips import GiB

TOPOLOGY = flags.DEFINE_string(
    'topology', '', 'Chips and their grid, v5e:4x8 or v4:2x2x4; h100:4x8 are 4 nodes of 8 GPUs.'
)
JSON = flags.DEFINE_bool('json', False, 'Print one JSON object as the last line.')
TUNED = flags.DEFINE_bool('tuned', False, 'Compile for a TPU with all effort, as a run does.')
IMAGES = flags.DEFINE_integer('images', 0, 'Images of an epoch, if the data is not at hand.')

# Training images of data sets that configs name and that need not be here to plan.
IMAGES_OF = {'tfds:cifar10': 50_000, 'tfds:imagenet2012': 1_281_167}
# Two blocks of ViT-S on v5e:4x8 compile in 36 s instead of 156, to temporaries 1 % larger.
QUICK = {'exec_time_optimization_effort': -1.0}


def plan(config: Config, topology: str, images: int, tuned: bool = False) -> dict[str, Any]:
    """Compiles the step of a config for a slice, without running it.

    Args:
        config: as for `train.run`.
        topology: see `chips.devices`.
        images: of an epoch.
        tuned: whether a TPU's compiler works as hard as for a run.

    Returns:
        What `report` prints: bytes and FLOPs are of one device, `model_flops` and
        `images_per_second` of the whole slice.

    Raises:
        UserError: a mistake in the config or the topology.
    """
    import jax

    from contrastive_jax import experiment as programs
    from contrastive_jax import parallel
    from contrastive_jax.planning import flops, hlo

    chip, slice_ = chips.devices(topology)
    options = chip.options or (None if tuned else QUICK)
    mesh = parallel.make_mesh(slice_)
    with jax.set_mesh(mesh):
        program = programs.build(config, mesh, images)
        state_bytes = sum(
            leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
            for leaf in jax.tree.leaves(program.state)
        )
        traced = model = program.step.trace(program.state, program.batch)
        # What the model costs, without what is computed twice to save memory.
        plain = _changed(config, {'microbatch': 0, 'remat': False})
        if plain != config:
            model = programs.build(plain, mesh, images).step.trace(program.state, program.batch)
        result: dict[str, Any] = {
            'topology': topology,
            'devices': mesh.size,
            'global_batch': config.batch_size,
            'per_device_batch': config.batch_size / mesh.size,
            'parameters': sum(leaf.size for leaf in jax.tree.leaves(program.state.params)),
            'total_steps': program.total_steps,
            'state_bytes': state_bytes,
            'hbm_bytes': chip.memory,
            'model_flops': flops.jaxpr_flops(model.jaxpr.jaxpr, 'cuda' if chip.target else 'tpu'),
        }
        try:
            compiled = traced.lower().compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            if 'RESOURCE_EXHAUSTED' not in str(error) or 'hbm' not in str(error).lower():
                raise
            return result | {'fits': False, 'needed_bytes': said_to_need(str(error), state_bytes)}
    memory: Any = compiled.memory_analysis()
    needed = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    costs = hlo.costs(compiled.as_text() or '')
    seconds = {
        'compute': costs.flops / chip.flops,
        'memory': costs.bytes / chip.memory_rate,
        'collectives': sum(c.bytes / chip.rate(c.op, slice_) for c in costs.collectives),
    }
    step = max(seconds['compute'], seconds['memory']) + seconds['collectives']
    return result | {
        'fits': needed <= chip.memory,
        'needed_bytes': needed,
        'temp_bytes': memory.temp_size_in_bytes,
        'collectives': [c._asdict() for c in costs.collectives],
        'program_flops': costs.flops * mesh.size,
        'unread_loops': costs.unread_loops,
        'seconds': seconds,
        'step_seconds': step,
        'images_per_second': config.batch_size / step,
        'hours': step * program.total_steps / 3600,
        'chip_hours': step * program.total_steps / 3600 * mesh.size,
    }


def said_to_need(error: str, state_bytes: float) -> float | None:
    """Bytes that a TPU's compiler says a program would need that it does not compile."""
    size = r'([\d.]+)([KMGT])'
    found = re.search(rf'Used {size} of .* hbm', error)
    temporaries = re.search(rf'HLO temporaries \({size}\)', error)
    if match := found or temporaries:
        said = float(match.group(1)) * 1024.0 ** ' KMGT'.index(match.group(2))
        return said if found else said + state_bytes
    return None


def remedies(
    config: Config, topology: str, images: int, tuned: bool = False
) -> list[tuple[str, dict[str, Any]]]:
    """For every knob the first setting that makes a config fit, or the last one, with its plan."""
    from contrastive_jax import parallel

    B = config.batch_size
    halves = [2**k for k in range(1, 11)]
    mesh = parallel.make_mesh(chips.devices(topology)[1])

    def possible(setting: dict[str, Any]) -> bool:
        c = _changed(config, setting)
        try:
            parallel.check_batch(mesh, c.batch_size, c.accumulate, c.microbatch)
        except UserError:
            return False
        return c != config

    encoded = config.microbatch or B // config.accumulate
    knobs: list[list[dict[str, Any]]] = [
        [{'fsdp': True}],
        [{'remat': True}],
        [{'microbatch': encoded // h} for h in halves if encoded // h],
        [{'batch_size': B // h, 'microbatch': 0} for h in halves],
    ]
    knobs = [[s for s in settings if possible(s)] for settings in knobs]
    found = []
    for settings in knobs:
        for setting in settings:
            name = ' '.join(f'--config.{k}={v}' for k, v in setting.items())
            print(f'trying {name} ...', file=sys.stderr, flush=True)
            tried = plan(_changed(config, setting), topology, images, tuned)
            if tried['fits'] or setting is settings[-1]:
                found.append((name, tried))
                break
    return found


def report(p: dict[str, Any]) -> str:
    """A plan as text."""
    per_device = p['per_device_batch']
    lines = [
        f'{p["topology"]}: {p["devices"]} devices, global batch {p["global_batch"]} '
        f'({per_device:g} a device), {p["parameters"]:,} parameters, {p["total_steps"]:,} steps',
    ]
    have = f'{p["hbm_bytes"] / GiB:.2f} GiB'
    if 'temp_bytes' not in p:
        needs = f'{p["needed_bytes"] / GiB:.2f} GiB' if p['needed_bytes'] else 'more'
        over = p['needed_bytes'] and (p['needed_bytes'] - p['hbm_bytes']) / GiB
        lines.append(f'does NOT fit: needs {needs} of {have} a device')
        if over:
            lines[-1] += f', {over:.2f} GiB too much'
        return '\n'.join(lines)
    verdict = 'fits' if p['fits'] else 'does NOT fit'
    lines += [
        f'{verdict}: needs {p["needed_bytes"] / GiB:.2f} GiB of {have} a device; state '
        f'{p["state_bytes"] / GiB:.2f}, activations and temporaries {p["temp_bytes"] / GiB:.2f}, '
        f'headroom {(p["hbm_bytes"] - p["needed_bytes"]) / GiB:.2f}',
    ]
    for c in p['collectives']:
        how = 'asynchronous' if c['asynchronous'] else 'synchronous'
        lines.append(f'  {c["op"]}: {c["count"]} ({how}), {c["bytes"] / 2**20:.2f} MiB arrive')
    s = p['seconds']
    lines += [
        f'model {p["model_flops"]:.3g} FLOPs a step, program {p["program_flops"]:.3g}'
        + (f' ({p["unread_loops"]} loops counted once)' if p['unread_loops'] else ''),
        f'about {1e3 * p["step_seconds"]:.1f} ms a step: the larger of compute '
        f'{1e3 * s["compute"]:.1f} (bfloat16 peak) and memory {1e3 * s["memory"]:.1f} (every '
        f'instruction reads and writes all it names), and collectives '
        f'{1e3 * s["collectives"]:.1f} (nothing overlaps)',
        f'{p["images_per_second"]:,.0f} images/s, {p["hours"]:.1f} hours, '
        f'{p["chip_hours"]:,.0f} device-hours for the whole run',
    ]
    return '\n'.join(lines)


def _changed(config: Config, values: dict[str, Any]) -> Config:
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.update(values)
    return config


def _images(config: Config) -> int:
    """Records of an epoch: as the flag says, as is known, or as the data says."""
    source = config.data.source
    if IMAGES.value or source in IMAGES_OF:
        return IMAGES.value or IMAGES_OF[source]
    from contrastive_jax import data

    try:
        return len(data.open_splits(config.data)['train'])
    except UserError as error:
        raise UserError(f'{error} Without the data, --images=N says how many there are.') from error


def main(argv: Sequence[str]) -> None:
    del argv
    # The host compiles and never runs; whatever else it has stays untouched.
    os.environ['JAX_PLATFORMS'] = 'cpu'
    os.environ.setdefault('TPU_LOG_DIR', tempfile.gettempdir())
    config, topology = cli.CONFIG.value, TOPOLOGY.value
    images = _images(config)
    result = plan(config, topology, images, TUNED.value)
    print(report(result), flush=True)
    if not result['fits']:
        result['remedies'] = {}
        for name, tried in remedies(config, topology, images, TUNED.value):
            print(f'\nwith {name}\n{report(tried)}', flush=True)
            result['remedies'][name] = tried
    if JSON.value:
        print(json.dumps(result), flush=True)


if __name__ == '__main__':
    cli.command(main, [cli.CONFIG, TOPOLOGY])
