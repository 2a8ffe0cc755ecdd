"""What evaluators share: the encoder and the data to try it on, and solvers."""
