"""Chips, and slices of them that a program can be compiled for without having one."""

import os
import re
from typing import Any, NamedTuple

from contrastive_jax.config import UserError, choose

GiB = 2**30


class Chip(NamedTuple):
    """A device as XLA sees it.

    Peak dense bfloat16 FLOP/s, memory in bytes, its bandwidth and the interconnect's in one
    direction (all links together) in bytes/s, links.
    """

    kind: str  # libtpu's name; a GPU's own
    flops: float
    memory: float
    memory_rate: float
    link_rate: float
    links: int
    one_device: bool = False  # whether a chip's two cores must be asked for as one device
    target: str = ''  # of a GPU: what XLA must know of it, as a GpuTargetConfig
    network_rate: float = 0.0  # of a GPU's own network card, in bytes/s and one direction
    options: dict[str, Any] | None = None  # of its compiler

    def rate(self, op: str, devices: list[Any]) -> float:
        """Bytes/s at which a collective arrives on a device.

        On a TPU a permute takes one link, all else every link. GPUs of a node are linked by
        switches; what goes round several nodes is as fast as the slowest hop, and in a permute
        (or where everyone speaks to everyone) one network card has to bring it. Reductions and
        gathers go round in as many rings as a node has cards (NCCL).
        """
        nodes = len({d.process_index for d in devices}) if self.network_rate else 1
        if nodes == 1:
            return self.link_rate / (self.links if op == 'collective-permute' else 1)
        if op in ('collective-permute', 'all-to-all', 'ragged-all-to-all'):
            return self.network_rate
        return min(self.link_rate, self.network_rate * len(devices) / nodes)


# What XLA asks of a GPU that is not there; the numbers are those of openxla/xla (Apache-2.0),
# backends/gpu/target_config/specs/h100_sxm.txtpb. To compile, neither cuDNN nor CUDA is needed, but
# XLA must be told which versions to compile for.
H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 8 }
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800
  memory_bandwidth: 3350000000000
  device_memory_size: 84942979072
  device_interconnect_info { active_links: 18 }
}
"""

# TPUs: https://cloud.google.com/tpu/docs (2026); v5e's memory as its compiler states it; a 7x chip
# is two devices. H100: the SXM data sheet of NVIDIA, InfiniBand NDR with a card a GPU.
CHIPS = {
    'v4': Chip('v4', 275e12, 32 * GiB, 1.2e12, 300e9, 6, one_device=True),
    'v5e': Chip('v5e', 197e12, 15.75 * GiB, 0.819e12, 200e9, 4),
    'v5p': Chip('v5p', 459e12, 95 * GiB, 2.765e12, 600e9, 6),
    'v6e': Chip('v6e', 918e12, 31.25 * GiB, 1.638e12, 400e9, 4),
    '7x': Chip('tpu7x', 1153e12, 94.75 * GiB, 3.69e12, 300e9, 6),
    'h100': Chip(
        'NVIDIA H100 80GB HBM3',
        989e12,
        84942979072,
        3.35e12,
        450e9,
        1,
        target=H100,
        network_rate=50e9,
        # With no GPU to tune on, XLA cuts products that it gives to Triton into partial sums in
        # float32 that a run might not hold; those of cuBLAS come as they are.
        options={'xla_gpu_enable_triton_gemm': False},
    ),
}


def devices(topology: str) -> tuple[Chip, list[Any]]:
    """The chip and the devices of a slice: 'v5e:4x8', 'h100:8' or, of four nodes, 'h100:4x8'.

    A GPU's memory is the share that JAX takes of it: three quarters, unless the environment says
    otherwise by XLA_CLIENT_MEM_FRACTION.

    Raises:
        UserError: an unknown chip or grid; the compiler for it is not installed.
    """
    kind, _, grid = topology.partition(':')
    chip = choose('chip', kind, CHIPS, '--topology')
    sides, example = ('{0,1}', '8') if chip.target else ('{1,2}', '2x4')
    if not re.fullmatch(rf'[1-9]\d*(x[1-9]\d*){sides}', grid):
        raise UserError(f"--topology: got {topology!r}; expected a grid, as in '{kind}:{example}'.")
    try:
        if not chip.target:
            return chip, _tpus(chip, grid)
        names = ('XLA_CLIENT_MEM_FRACTION', 'XLA_PYTHON_CLIENT_MEM_FRACTION')
        share = next((float(os.environ[n]) for n in names if os.environ.get(n)), 0.75)
        return chip._replace(memory=share * chip.memory), _gpus(chip, grid)
    except UserError:
        raise
    except Exception as error:  # XlaRuntimeError and several others
        raise UserError(f'--topology: {topology!r}: {str(error).splitlines()[0]}') from error


def _tpus(chip: Chip, grid: str) -> list[Any]:
    # Read when libtpu is loaded; it would otherwise look for the TPU of this machine, and its lock.
    os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
    os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
    os.environ.setdefault('TPU_STDERR_LOG_LEVEL', '3')
    from jax.experimental import topologies

    options: dict[str, Any] = {}
    if chip.one_device:
        options = {'chip_config_name': 'megacore', 'chips_per_host_bounds': (2, 2, 1)}
    try:
        found = topologies.get_topology_desc(
            platform='tpu', topology_name=f'{chip.kind}:{grid}', **options
        )
    except Exception as error:
        if 'libtpu' in str(error).lower() and 'INVALID' not in str(error):
            raise UserError(
                "plan: compiling for a TPU needs libtpu: pip install 'contrastive-jax[tpu]'"
            ) from error
        raise
    return list(found.devices)


def _gpus(chip: Chip, grid: str) -> list[Any]:
    import jax
    from jax.experimental import topologies

    nodes, _, gpus = grid.rpartition('x')
    try:
        # Parts that are linked among themselves, hosts of a part, GPUs of a host.
        found = topologies.get_topology_desc(
            platform='cuda', target_config=chip.target, topology=f'{nodes or 1}x1x{gpus}'
        )
    except NotImplementedError as error:
        packages = ' '.join(f'jax-cuda12-{p}=={jax.__version__}' for p in ('pjrt', 'plugin'))
        raise UserError(
            "plan: compiling for a GPU needs XLA's plugin for it (no CUDA and no GPU): "
            f'pip install --no-deps {packages}'
        ) from error
    return list(found.devices)
