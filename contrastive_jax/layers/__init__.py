"""Flax modules that several models and methods are made of."""
