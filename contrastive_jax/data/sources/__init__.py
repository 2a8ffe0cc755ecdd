"""One file a kind of data; each exports `make(argument, root, holdout) -> {split: Source}`."""
