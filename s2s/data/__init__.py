"""From text to batches: corpora, vocabularies, the batch plan and the pipeline."""
