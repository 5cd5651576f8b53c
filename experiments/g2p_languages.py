"""A sweep: pronunciation in ten languages, three seeds each (SIGMORPHON 2020 task 1, Gorman et al. 2020).

Claim: one model of 128 units for all languages, untuned, in one command and one table: word error rates on
test of 9.7 % (Hungarian) to 48.6 % (Korean), in a quarter of an hour on 2 CPU cores. README.md has all of
them beside the published attention LSTMs, each of which is the pick of 36 settings on dev.

    python -m s2s.sweep --config experiments/g2p_languages.py:DIR --workdir runs/g2p_languages

DIR is the folder of the data set's train, dev and test; without it, data/sigmorphon2020_g2p.
"""

from ml_collections import config_dict

from s2s import axes
from s2s import config as config_lib

FOLDER = "data/sigmorphon2020_g2p"
LANGUAGES = ("arm", "bul", "fre", "geo", "gre", "hin", "hun", "ice", "kor", "lit")


def get_config(folder: str = FOLDER) -> config_dict.ConfigDict:
    """What all cells have in common, for Icelandic."""
    config = config_lib.default()
    config.name = "g2p_languages"
    config.update_from_flattened_dict(languages(["ice"], folder)[0].changes)
    config.data.source = "0"
    config.data.target = "1"
    config.data.vocab.kind = "symbols"
    config.data.vocab.source_separator = ""
    config.data.vocab.target_separator = " "
    config.data.batch_tokens = 320  # some 32 words
    config.model.embedding = 128
    config.model.hidden = 128
    config.model.attention = "general"
    config.model.dropout = 0.3
    config.optim.label_smoothing = 0.1
    config.optim.learning_rate = 2e-3
    config.optim.schedule = "cosine"
    config.optim.warmup_steps = 100
    config.run.epochs = 20.0
    config.run.eval_every = 400
    config.run.metric = "word_error_rate"
    config.search.name = "beam"
    config.search.beam = 5
    return config


def languages(names: list[str], folder: str) -> axes.Axis:
    """The axis of languages."""
    return axes.corpora(
        names,
        name="language",
        train=f"{folder}/train/{{}}_train.tsv.gz",
        dev=f"{folder}/dev/{{}}_dev.tsv",
        test=f"{folder}/test/{{}}_test.tsv",
    )


def sweep(folder: str = FOLDER) -> axes.Axis:
    """Every language from three seeds."""
    return axes.product(languages(list(LANGUAGES), folder), axes.seeds(3))
