"""Examples in docstrings do what they show, and every loss has one."""

import doctest
import importlib
import pathlib

import pytest

import contrastive_jax
from contrastive_jax import losses

PACKAGE = pathlib.Path(contrastive_jax.__file__).parent


def examples():
    """Names of all modules that show one."""
    paths = [p for p in sorted(PACKAGE.rglob('*.py')) if '>>>' in p.read_text()]
    names = [p.relative_to(PACKAGE.parent).with_suffix('').parts for p in paths]
    return ['.'.join(name[:-1] if name[-1] == '__init__' else name) for name in names]


@pytest.mark.parametrize('name', examples())
def test_examples_do_what_they_show(name):
    failed, tried = doctest.testmod(importlib.import_module(name), verbose=False)
    assert tried > 0
    assert failed == 0


@pytest.mark.parametrize('name', losses.__all__)
def test_every_loss_shows_an_example(name):
    # A docstring's examples are found by the module that the loss is defined in.
    module = importlib.import_module(getattr(losses, name).__module__)
    (found,) = doctest.DocTestFinder(recurse=False).find(getattr(losses, name), name, module)
    assert any(example.want for example in found.examples)
