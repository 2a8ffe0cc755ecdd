"""One file a method; each exports `make(model, **options) -> contrastive_jax.method.Method`."""
