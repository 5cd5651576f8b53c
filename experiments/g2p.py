"""Pronunciation: Icelandic words to phones (SIGMORPHON 2020 task 1, Gorman et al. 2020).

Claim: 11.3 % word error rate on test with beam 5 (mean of seeds 1 to 3, version 0.1.0), beside the published
attention LSTM's 10.0, which is the pick of 36 settings on dev.

    python -m s2s.main --config experiments/g2p.py --config.data.train=DIR/train/ice_train.tsv.gz \
        --config.data.dev=DIR/dev/ice_dev.tsv --config.data.test=DIR/test/ice_test.tsv --config.run.seed=1
"""

from ml_collections import config_dict

from s2s import config as config_lib


def get_config() -> config_dict.ConfigDict:
    """The experiment's differences from the defaults."""
    config = config_lib.default()
    config.name = "g2p"
    config.data.train = "data/sigmorphon2020_g2p/train/ice_train.tsv.gz"
    config.data.dev = "data/sigmorphon2020_g2p/dev/ice_dev.tsv"
    config.data.test = "data/sigmorphon2020_g2p/test/ice_test.tsv"
    config.data.source = "0"
    config.data.target = "1"
    config.data.vocab.kind = "symbols"
    config.data.vocab.source_separator = ""
    config.data.vocab.target_separator = " "
    config.data.batch_tokens = 1024
    config.model.embedding = 128
    config.model.hidden = 512
    config.model.attention = "general"
    config.model.dropout = 0.5
    config.optim.label_smoothing = 0.1
    config.optim.learning_rate = 2e-3
    config.optim.schedule = "cosine"
    config.optim.warmup_steps = 100
    config.run.epochs = 35.0
    config.run.eval_every = 200
    config.run.metric = "word_error_rate"
    config.search.name = "beam"
    config.search.beam = 5
    return config
