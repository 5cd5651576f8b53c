"""What a corpus makes of the steps of a run: measured before any model exists.

Decides how a plan looks at data: it is prepared and kept just as the run itself will want it, so
nothing is done twice. Must not know what steps cost.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from s2s import config as config_lib
from s2s.config import Config
from s2s.data import corpora, encode, plan, vocab_training
from s2s.sweep.cost import Sizes
from s2s.sweep.flops import Tokens


class Measured:
    """Sizes by configuration; runs whose corpora are as large are looked at once.

    Generated tasks of other seeds are other pairs, but as many and as long.
    """

    def __init__(self) -> None:
        self._found: dict[str, Sizes] = {}

    def __call__(self, cfg: Config) -> Sizes:
        """Measures what `s2s.train.prepare` will find.

        Raises:
          CorpusError, VocabularyError: the data is not there, or makes no vocabulary.
        """
        bare = dataclasses.replace(config_lib.Config(), data=cfg.data)
        key = config_lib.to_json(bare) + str(cfg.optim.accumulate)
        if key not in self._found:
            self._found[key] = _measure(cfg)
        return self._found[key]


def _measure(cfg: Config) -> Sizes:
    data, seed = cfg.data, cfg.run.seed
    corpus = corpora.open_corpus(data, "train", seed=seed)
    for part in ("dev", "test"):
        # What is wrong with them is better known now than after training.
        if corpora.has_part(data, part) and getattr(data, part) is not None:
            corpora.open_corpus(data, part, seed=seed)
    vocabs = vocab_training.open_vocabularies(corpus, data.vocab, seed=seed, cache=data.cache)
    encoded = encode.encode_corpus(
        corpus,
        vocabs,
        max_source=data.max_source_length,
        max_target=data.max_target_length,
        cache=data.cache,
    )
    layout = plan.make_plan(
        encoded.source_lengths,
        encoded.target_lengths,
        batch_tokens=data.batch_tokens,
        max_shapes=data.max_shapes,
        rows_multiple=math.lcm(data.rows_multiple, cfg.optim.accumulate),
        seed=seed,
    )
    source = np.asarray(encoded.source_lengths, np.int64)
    target = np.asarray(encoded.target_lengths, np.int64)
    batches = layout.batches_per_epoch
    buckets = [layout.buckets[index] for index, _ in layout.epoch(0)]
    largest = max(layout.buckets, key=lambda bucket: bucket.rows * (bucket.source + bucket.target))
    return Sizes(
        source_vocab=vocabs.source.size,
        target_vocab=vocabs.target.size,
        pairs=len(source),
        batches=batches,
        tokens=Tokens(
            len(source) / batches,
            float(source.sum()) / batches,
            float(target.sum()) / batches,
            float((source * target).sum()) / batches,
        ),
        source=sum(bucket.source for bucket in buckets) / batches,
        target=sum(bucket.target for bucket in buckets) / batches,
        padding=layout.padding,
        largest=(largest.rows, largest.source, largest.target),
    )
