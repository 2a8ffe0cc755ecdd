"""Evaluators of an encoder's features: one a file, each `make(**options) -> evaluate`.

`evaluate(subject)` yields (name, value) pairs: numbers, `evaluation.Measure`s, which are in the
closing table, and figures as the bytes of a PNG file. Most evaluators see the encoder through the
features of whole splits, which are computed once for all of them.
"""
