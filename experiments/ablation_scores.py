"""A sweep: three scores by two hidden sizes by three seeds, on the built-in task of reversing.

Claim: 18 small runs that a laptop trains in some minutes, as six programs or fewer.

    python -m s2s.sweep --config experiments/ablation_scores.py --workdir runs/ablation_scores
"""

from ml_collections import config_dict

from s2s import axes
from s2s import config as config_lib


def get_config() -> config_dict.ConfigDict:
    """What all cells have in common."""
    config = config_lib.default()
    config.name = "ablation_scores"
    config.data.train = "reverse"
    config.data.task_size = 4000
    config.data.vocab.kind = "symbols"
    config.data.vocab.source_separator = " "
    config.data.batch_tokens = 512
    config.data.max_shapes = 2
    config.model.embedding = 32
    config.model.dropout = 0.1
    config.optim.learning_rate = 5e-3
    config.optim.schedule = "cosine"
    config.run.epochs = 6.0
    config.run.metric = "exact_match"
    config.run.eval_sentences = 200
    return config


def sweep() -> axes.Axis:
    """Every score with every size, each from three seeds."""
    return axes.product(
        axes.grid({"model.attention": ["dot", "general", "concat"], "model.hidden": [32, 64]}),
        axes.seeds(3),
    )
