"""Text to batches: sources, vocabularies, stores, objectives and the order of examples."""
