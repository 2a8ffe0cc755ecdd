"""A run's workdir: its checkpoints, its records and what it was started on."""
