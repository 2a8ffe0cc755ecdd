"""What a compiled program needs of hardware that is not there."""
