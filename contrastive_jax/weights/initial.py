"""The file of weights that a run starts from: config.init_from."""

from contrastive_jax import weights
from contrastive_jax.config import Config


def read_for(config: Config) -> weights.Weights:
    """The encoder in the file that config.init_from names, for what config.inputs shows.

    Raises:
        UserError: see `weights.read`.
    """
    inputs = config.inputs
    return weights.read(config.init_from, image_size=inputs.get('view_size') or inputs.get('size'))


def complete(config: Config) -> Config:
    """With what only the file of weights knows, where config.init_from is one.

    What config.model and config.text do not set is as the file's encoders have it: activation,
    epsilon, positions, ... What they set stays, and must fit.

    Raises:
        UserError: see `weights.read`.
    """
    if not config.init_from or not weights.is_file(config.init_from):
        return config
    theirs = read_for(config).config
    config = config.copy_and_resolve_references()
    with config.unlocked():
        for key in ('model', 'text'):
            ours = config[key].to_dict()
            if ours and theirs[key].get('name') == ours.get('name'):
                # 'size' stands for these, and the shapes are compared later.
                sized = ('width', 'depth', 'heads', 'blocks', 'widths', 'block')
                known = theirs[key].to_dict()
                known = {k: v for k, v in known.items() if 'size' not in ours or k not in sized}
                config[key] = known | ours
    return config
