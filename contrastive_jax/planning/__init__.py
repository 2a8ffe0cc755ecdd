"""Needs of a compiled program, counted for hardware that is not there."""
