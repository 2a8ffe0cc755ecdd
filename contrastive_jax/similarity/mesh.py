"""The current mesh, as `jax.set_mesh` has set it: the devices that rows are sharded over."""

import jax


def axis() -> str:
    """The axis that rows are sharded over: the first of the current mesh."""
    return jax.sharding.get_abstract_mesh().axis_names[0]


def device_count() -> int:
    """Devices that rows are sharded over: the size of the current mesh's first axis."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape[mesh.axis_names[0]]


def on_cpus() -> bool:
    """Whether the current mesh is of CPU devices."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device is not None and device.platform == 'cpu'
