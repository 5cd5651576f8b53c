"""The configuration: one frozen dataclass a part, and nowhere else a default.

``default()`` makes the mutable ConfigDict that files in ``experiments/`` change and
the command line overrides; ``freeze()`` turns it back into the dataclass, checks
it across fields and refuses what cannot work, before any array exists. Must not
know any other file of s2s: what a value does is written where it is used.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any

from ml_collections import config_dict

CELLS = ("lstm", "gru", "tanh", "relu")
BRIDGES = ("copy", "dense", "zero")
ATTENTIONS = ("none", "fixed", "dot", "general", "concat")
WINDOWS = ("global",)
TIES = ("none", "target", "all")
DTYPES = ("float32", "bfloat16")
RECURRENCES = ("scan", "cudnn")
VOCABULARIES = ("unigram", "bpe", "char", "word", "symbols")
OPTIMIZERS = ("sgd", "adam", "adamw", "adadelta")
SCHEDULES = ("constant", "luong", "cosine", "linear", "inverse_sqrt", "exponential")
SEARCHES = ("greedy", "beam", "sample")
# Metrics that evaluation knows, and whether more is better.
METRICS = {
    "loss": False,
    "perplexity": False,
    "bleu": True,
    "chrf": True,
    "ter": False,
    "exact_match": True,
    "symbol_error_rate": False,
    "word_error_rate": False,
}
# Those of them that compare texts.
TEXT_METRICS = tuple(name for name in METRICS if name not in ("loss", "perplexity"))


@dataclass(frozen=True)
class VocabConfig:
    """How text becomes ids.

    Attributes:
      kind: a SentencePiece model ("unigram", "bpe", "char", "word") trained on the
        training part, or "symbols": plain symbols split by a separator.
      size: entries of a SentencePiece vocabulary, reserved ids included; ignored by "symbols".
      target_size: the same for the target side; None means ``size``.
      shared: one vocabulary for both sides.
      source_separator: "symbols" only: what stands between source symbols; "" splits
        into characters.
      target_separator: the same for the target side.
      normalization: SentencePiece's normalization rule ("nmt_nfkc", "nfkc", "identity", ...).
    """

    kind: str = "bpe"
    size: int = 8000
    target_size: int | None = None
    shared: bool = False
    source_separator: str = ""
    target_separator: str = " "
    normalization: str = "nmt_nfkc"


@dataclass(frozen=True)
class DataConfig:
    """Where pairs come from and how they are batched.

    Attributes:
      train: a generated task's name ("dates"), a prefix of parallel files
        (PREFIX.de and PREFIX.en), a .tsv or .jsonl file (all also .gz), or
        "tfds:NAME[/CONFIG][:SPLIT]".
      dev: the same; None: a generated task's own dev part.
      test: the same; None: a generated task's own test part.
      source: suffix of the parallel files, TSV column (name, or number from 0), JSON
        field or TFDS feature of the source.
      target: the same for the target; several by commas are several references
        (the first trains).
      task_size: training pairs a generated task makes.
      cache: folder of everything prepared (corpora, vocabularies, compiled programs); None: s2s in
        the user's cache folder.
      vocab: how text becomes ids.
      max_source_length: longest source kept in training, in ids with EOS.
      max_target_length: longest target kept in training, in ids with EOS.
      batch_tokens: target tokens in a batch, padding included, over all devices.
      max_shapes: most batch shapes, so most compilations of a step; as many are used as
        pay for their compilation in a run of some ten epochs.
      rows_multiple: rows of a batch are a multiple of this and of devices times pieces
        (``optim.accumulate``); numbers of devices that divide it all see the same batches, so a run
        gives the same numbers on them and may go on with another one.
      prefetch: batches made ahead of need.
    """

    train: str = "dates"
    dev: str | None = None
    test: str | None = None
    source: str = "source"
    target: str = "target"
    task_size: int = 20000
    cache: str | None = None
    vocab: VocabConfig = field(default_factory=VocabConfig)
    max_source_length: int = 100
    max_target_length: int = 100
    batch_tokens: int = 2048
    max_shapes: int = 8
    rows_multiple: int = 8
    prefetch: int = 16


@dataclass(frozen=True)
class ModelConfig:
    """The model (Luong et al. 2015); sizes in features.

    Attributes:
      embedding: word vector size E of both sides.
      hidden: decoder units H.
      encoder_hidden: encoder units a direction; None: H, or H / 2 if bidirectional.
      layers: decoder layers.
      encoder_layers: encoder layers; None: ``layers``.
      bidirectional: the encoder reads both ways.
      cell: "lstm", "gru", "tanh" or "relu".
      bridge: encoder's last state to decoder's first: "copy", "dense" or "zero".
      attention: "none" (the encoder's last state is all the decoder gets), "fixed" (the
        same summary fed at every step), "dot", "general" or "concat".
      window: which source positions are looked at: "global".
      input_feeding: the attentional vector joins the next step's input.
      tie: softmax weights shared with "none", the "target" embedding, or "all" (source too).
      dropout: rate on embeddings, between layers and on the attentional vector.
      embedding_dropout: its own rate for embeddings; None: ``dropout``.
      layer_dropout: its own rate between layers; None: ``dropout``.
      attentional_dropout: its own rate for the attentional vector; None: ``dropout``.
      dtype: "float32" or "bfloat16" compute; parameters stay float32.
      recurrence: "scan", our loop over time; or "cudnn" where the loop is the cell's alone (the encoder,
        and a decoder without input feeding or fixed context): LSTM, float32, trained on an NVIDIA GPU.
    """

    embedding: int = 128
    hidden: int = 256
    encoder_hidden: int | None = None
    layers: int = 1
    encoder_layers: int | None = None
    bidirectional: bool = True
    cell: str = "lstm"
    bridge: str = "dense"
    attention: str = "general"
    window: str = "global"
    input_feeding: bool = False
    tie: str = "none"
    dropout: float = 0.2
    embedding_dropout: float | None = None
    layer_dropout: float | None = None
    attentional_dropout: float | None = None
    dtype: str = "float32"
    recurrence: str = "scan"

    @property
    def encoder_units(self) -> int:
        """Encoder units of one direction."""
        if self.encoder_hidden is not None:
            return self.encoder_hidden
        return self.hidden // 2 if self.bidirectional else self.hidden

    @property
    def memory(self) -> int:
        """Features M of an encoder output."""
        return self.encoder_units * (2 if self.bidirectional else 1)

    @property
    def encoder_depth(self) -> int:
        """Encoder layers."""
        return self.layers if self.encoder_layers is None else self.encoder_layers


@dataclass(frozen=True)
class OptimConfig:
    """How parameters move.

    Attributes:
      name: "sgd", "adam", "adamw" or "adadelta".
      learning_rate: at its highest.
      schedule: "constant"; "luong" (times ``decay_factor`` every ``decay_every`` epochs
        from ``decay_start`` on); "cosine" or "linear" (to 0 at the end of the run);
        "inverse_sqrt" (of the step, after warm-up); "exponential" (times
        ``decay_factor`` every ``decay_every`` epochs, smoothly).
      warmup_steps: updates over which the rate rises from 0.
      decay_start: epochs, "luong" only.
      decay_every: epochs.
      decay_factor: a factor.
      clip_norm: gradients are scaled down to this global norm; 0: never.
      weight_decay: "adamw" only.
      beta1, beta2, epsilon: Adam's and AdamW's.
      label_smoothing: share of probability spread evenly over the vocabulary.
      accumulate: pieces a batch is cut into; gradients add up over them.
      ema: decay of the moving average of parameters that evaluation uses; 0: none.
    """

    name: str = "adam"
    learning_rate: float = 1e-3
    schedule: str = "constant"
    warmup_steps: int = 0
    decay_start: float = 5.0
    decay_every: float = 1.0
    decay_factor: float = 0.5
    clip_norm: float = 5.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    label_smoothing: float = 0.0
    accumulate: int = 1
    ema: float = 0.0


@dataclass(frozen=True)
class RunConfig:
    """How long, how often, what is kept.

    Attributes:
      epochs: passes over the training part; may be a fraction.
      steps: updates; given, it overrides ``epochs``.
      seed: initialisation, dropout, data order, generated tasks.
      replicas: models trained in one program, with the seeds ``seed``, ``seed`` + 1, ...; each gets a work
        directory of its own.
      log_every: updates between lines of progress and metrics.
      eval_every: updates between evaluations on dev; None: once an epoch.
      save_every: updates between checkpoints beside those of evaluations; None: none.
      metric: the dev metric that picks the best checkpoints.
      patience: evaluations without a better metric before stopping; 0: never stop early.
      keep_best: best checkpoints kept.
      keep_last: last checkpoints kept.
      average_last: the final model is the mean of this many last evaluated checkpoints; 0: the best one.
      eval_sentences: dev pairs decoded for text metrics at an evaluation; None: all.
    """

    epochs: float = 10.0
    steps: int | None = None
    seed: int = 1
    replicas: int = 1
    log_every: int = 50
    eval_every: int | None = None
    save_every: int | None = None
    metric: str = "loss"
    patience: int = 0
    keep_best: int = 1
    keep_last: int = 2
    average_last: int = 0
    eval_sentences: int | None = None


@dataclass(frozen=True)
class SearchConfig:
    """How output is chosen.

    Attributes:
      name: "greedy", "beam" or "sample".
      beam: hypotheses kept, K.
      length_penalty: alpha of GNMT's length penalty (Wu et al. 2016, eq. 14).
      coverage_penalty: beta of GNMT's coverage penalty (the same equation).
      min_length: fewest target tokens before EOS.
      max_length_factor, max_length_extra: the output of a source of n ids has at most
        factor * n + extra tokens, EOS included.
      temperature: "sample" only; divides the logits.
      top_k: "sample" only: from the k likeliest tokens; 0: all.
      top_p: "sample" only: from the fewest likeliest tokens with this much probability; 1: all.
      batch_sentences: sentences searched at a time; as one is done, the next takes its place.
    """

    name: str = "greedy"
    beam: int = 5
    length_penalty: float = 1.0
    coverage_penalty: float = 0.0
    min_length: int = 0
    max_length_factor: float = 2.0
    max_length_extra: int = 10
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    batch_sentences: int = 64


@dataclass(frozen=True)
class Config:
    """A whole experiment.

    Attributes:
      name: of the experiment; the default work directory is runs/NAME.
      data, model, optim, run, search: the parts.
    """

    name: str = "experiment"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    search: SearchConfig = field(default_factory=SearchConfig)


class ConfigError(ValueError):
    """A configuration that cannot work; the message names fields, values and a remedy."""


def default() -> config_dict.ConfigDict:
    """A locked, mutable ConfigDict with every field of `Config` at its default."""
    return _to_config_dict(Config)


def freeze(config: config_dict.ConfigDict) -> Config:
    """Turns the mutable config into the frozen dataclass and validates it.

    Raises:
      ConfigError: a field is unknown or of the wrong type, or fields contradict each other.
    """
    cfg = _build(Config, config.to_dict(), "config")
    validate(cfg)
    return cfg


def to_json(cfg: Config) -> str:
    """The resolved config as JSON text, for the work directory."""
    return json.dumps(dataclasses.asdict(cfg), indent=2, ensure_ascii=False) + "\n"


def from_json(text: str) -> Config:
    """Reads what `to_json` wrote.

    Raises:
      ConfigError: the text is no JSON, or as `freeze`.
    """
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"a saved config must be JSON: {error}") from error
    cfg = _build(Config, values, "config")
    validate(cfg)
    return cfg


def differences(cfg: Config, other: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted names of the fields in which two configs differ, with both values."""
    left, right = flat(cfg), flat(other)
    return {name: (left[name], right[name]) for name in left if left[name] != right[name]}


def validate(cfg: Config) -> None:
    """Checks a config across fields.

    Raises:
      ConfigError: with every problem found, one a line.
    """
    problems: list[str] = []

    def choice(name: str, value: Any, allowed: typing.Iterable[str]) -> None:
        allowed = tuple(allowed)
        if value not in allowed:
            close = difflib.get_close_matches(str(value), allowed, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            problems.append(f"config.{name}={value!r} is none of {', '.join(allowed)}{hint}")

    def at_least(name: str, value: float | None, low: float) -> None:
        if value is not None and value < low:
            problems.append(f"config.{name}={value} must be at least {low}")

    def share(name: str, value: float | None) -> None:
        if value is not None and not 0.0 <= value < 1.0:
            problems.append(f"config.{name}={value} must be in [0, 1)")

    data, model, optim, run, search = cfg.data, cfg.model, cfg.optim, cfg.run, cfg.search
    if not cfg.name.strip():
        problems.append(f"config.name={cfg.name!r} must not be blank: it names the work directory")
    choice("data.vocab.kind", data.vocab.kind, VOCABULARIES)
    choice("model.cell", model.cell, CELLS)
    choice("model.bridge", model.bridge, BRIDGES)
    choice("model.attention", model.attention, ATTENTIONS)
    choice("model.window", model.window, WINDOWS)
    choice("model.tie", model.tie, TIES)
    choice("model.dtype", model.dtype, DTYPES)
    choice("model.recurrence", model.recurrence, RECURRENCES)
    choice("optim.name", optim.name, OPTIMIZERS)
    choice("optim.schedule", optim.schedule, SCHEDULES)
    choice("run.metric", run.metric, METRICS)
    choice("search.name", search.name, SEARCHES)

    at_least("data.vocab.size", data.vocab.size, 8)
    at_least("data.vocab.target_size", data.vocab.target_size, 8)
    for name in ("task_size", "batch_tokens", "max_shapes", "rows_multiple", "prefetch"):
        at_least(f"data.{name}", getattr(data, name), 1)
    for name in ("max_source_length", "max_target_length"):
        at_least(f"data.{name}", getattr(data, name), 2)
    for name in ("embedding", "hidden", "encoder_hidden", "layers", "encoder_layers"):
        at_least(f"model.{name}", getattr(model, name), 1)
    for name in ("dropout", "embedding_dropout", "layer_dropout", "attentional_dropout"):
        share(f"model.{name}", getattr(model, name))
    for name in ("label_smoothing", "ema", "beta1", "beta2"):
        share(f"optim.{name}", getattr(optim, name))
    for name in ("learning_rate", "warmup_steps", "clip_norm", "weight_decay", "decay_start"):
        at_least(f"optim.{name}", getattr(optim, name), 0)
    at_least("optim.accumulate", optim.accumulate, 1)
    if optim.epsilon <= 0:
        problems.append(f"config.optim.epsilon={optim.epsilon} must be above 0")
    if optim.decay_every <= 0:
        problems.append(f"config.optim.decay_every={optim.decay_every} must be above 0 (epochs)")
    if not 0 < optim.decay_factor <= 1:
        problems.append(f"config.optim.decay_factor={optim.decay_factor} must be in (0, 1]")
    counts = ("steps", "log_every", "eval_every", "save_every", "keep_best", "keep_last", "eval_sentences")
    for name in (*counts, "replicas"):
        at_least(f"run.{name}", getattr(run, name), 1)
    for name in ("patience", "average_last", "seed"):
        at_least(f"run.{name}", getattr(run, name), 0)
    if run.steps is None and run.epochs <= 0:
        problems.append(f"config.run.epochs={run.epochs} must be above 0, or give config.run.steps")
    at_least("search.beam", search.beam, 1)
    at_least("search.batch_sentences", search.batch_sentences, 1)
    for name in ("length_penalty", "coverage_penalty", "min_length", "max_length_factor", "top_k"):
        at_least(f"search.{name}", getattr(search, name), 0)
    at_least("search.max_length_extra", search.max_length_extra, 1)
    if search.temperature <= 0:
        problems.append(f"config.search.temperature={search.temperature} must be above 0")
    if not 0 < search.top_p <= 1:
        problems.append(f"config.search.top_p={search.top_p} must be in (0, 1]")

    if model.bidirectional and model.encoder_hidden is None and model.hidden % 2:
        problems.append(
            f"config.model.hidden={model.hidden} cannot be halved for a bidirectional encoder: "
            "make it even or give config.model.encoder_hidden"
        )
    if model.attention == "dot" and model.memory != model.hidden:
        problems.append(
            f"config.model.attention='dot' multiplies encoder outputs of {model.memory} features with "
            f"decoder states of config.model.hidden={model.hidden}: make them equal, or use 'general'"
        )
    if model.bridge == "copy" and model.memory != model.hidden:
        problems.append(
            f"config.model.bridge='copy' hands a state of {model.memory} features to a decoder of "
            f"config.model.hidden={model.hidden}: make them equal, or use 'dense'"
        )
    if model.bridge == "copy" and model.encoder_depth != model.layers:
        problems.append(
            f"config.model.bridge='copy' hands one state a layer, but encoder_layers={model.encoder_depth} "
            f"and layers={model.layers}: make them equal, or use 'dense'"
        )
    if model.attention == "none" and model.bridge == "zero":
        problems.append(
            "config.model.bridge='zero' with config.model.attention='none' tells the decoder nothing of "
            "the source: use bridge 'copy' or 'dense', or an attention"
        )
    if model.recurrence == "cudnn" and (model.cell, model.dtype) != ("lstm", "float32"):
        problems.append(
            f"config.model.recurrence='cudnn' knows the LSTM in float32 alone, not config.model.cell="
            f"{model.cell!r} in config.model.dtype={model.dtype!r}: change these, or use 'scan'"
        )
    if model.tie == "all" and not data.vocab.shared:
        problems.append("config.model.tie='all' needs one vocabulary: set config.data.vocab.shared=True")
    if data.vocab.shared and data.vocab.target_size not in (None, data.vocab.size):
        problems.append(
            f"config.data.vocab.target_size={data.vocab.target_size} contradicts "
            "config.data.vocab.shared=True: leave it out"
        )
    if (
        data.vocab.shared
        and data.vocab.kind == "symbols"
        and (data.vocab.source_separator != data.vocab.target_separator)
    ):
        problems.append(
            f"config.data.vocab.shared=True needs one separator, but source_separator="
            f"{data.vocab.source_separator!r} and target_separator={data.vocab.target_separator!r}"
        )
    if data.batch_tokens < data.max_target_length:
        problems.append(
            f"config.data.batch_tokens={data.batch_tokens} cannot hold one target of "
            f"config.data.max_target_length={data.max_target_length}"
        )
    if problems:
        raise ConfigError("\n".join(problems))


def flat(cfg: Config) -> dict[str, Any]:
    """Every field by its dotted name."""
    return _dotted(dataclasses.asdict(cfg), "")


def _dotted(tree: dict[str, Any], prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def _to_config_dict(cls: type) -> config_dict.ConfigDict:
    config = config_dict.ConfigDict()
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        kind = hints[item.name]
        if dataclasses.is_dataclass(kind):
            config[item.name] = _to_config_dict(typing.cast(type, kind))
        elif item.default is None:
            # A plain None could never be overridden from the command line.
            config[item.name] = config_dict.placeholder(_plain_type(kind))
        else:
            config[item.name] = item.default
    return config.lock()


def _plain_type(kind: Any) -> Any:
    """X of ``X | None``, else the type itself."""
    if isinstance(kind, types.UnionType):
        return next(part for part in typing.get_args(kind) if part is not type(None))
    return kind


def _build(cls: type, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise ConfigError(f"{where}={values!r} must be a group of fields")
    hints = typing.get_type_hints(cls)
    names = [item.name for item in dataclasses.fields(cls)]
    for name in values:
        if name not in names:
            close = difflib.get_close_matches(name, names, 1)
            hint = f"did you mean {where}.{close[0]}?" if close else f"it has {', '.join(names)}"
            raise ConfigError(f"{where}.{name} does not exist: {hint}")
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        kind = hints[name]
        if dataclasses.is_dataclass(kind):
            arguments[name] = _build(typing.cast(type, kind), value, f"{where}.{name}")
        else:
            arguments[name] = _checked(f"{where}.{name}", value, kind)
    return cls(**arguments)


def _checked(name: str, value: Any, kind: Any) -> Any:
    plain = _plain_type(kind)
    if value is None and kind is not plain:
        return None
    if plain is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name}={value} must be a finite number")
    if not isinstance(value, plain) or (plain is int and isinstance(value, bool)):
        raise ConfigError(f"{name}={value!r} must be of type {getattr(plain, '__name__', plain)}")
    return value


def direction(metric: str) -> str:
    """ "highest" or "lowest", whichever is better."""
    return "highest" if METRICS[metric] else "lowest"
