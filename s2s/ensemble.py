"""What search and forced decoding ask of a model: of one, or of several that answer as one.

Decides how the distributions and attentions of an ensemble's members become one, and which models
can be members of the same ensemble. Must not know how a search uses them, nor read or write text.

Members of equal structure are stacked and computed as one by ``jax.vmap``, the others one after
another. Memories and states keep sentences (and hypotheses) as their first axes, because search
moves them about; the members' axis follows: [B, R, ...] and [B, K, R, ...].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from s2s.batch import Batch
from s2s.config import Config
from s2s.data.vocab import Vocabularies
from s2s.learn import step as step_lib
from s2s.learn.loss import Sums, token_log_probs
from s2s.nn.attention import Attention
from s2s.search.pick import Distribution, survey
from s2s.workdir import Workdir, WorkdirError


def mean(members_R: Distribution) -> Distribution:
    """log p = log(1/R sum_r p_r): the mean of the members' probabilities, leaves [R, ...] -> [...].

    What Sockeye calls linear. A token is impossible where it is so to every member.
    """
    log_probs_R = members_R.logits - members_R.total[..., None]
    found = survey(jax.nn.logsumexp(log_probs_R, axis=0) - math.log(len(log_probs_R)))
    # It is what rounding has left.
    return found._replace(total=jnp.zeros_like(found.total))


def geometric(members_R: Distribution) -> Distribution:
    """log p = 1/R sum_r log p_r - log Z: the geometric mean of the members' probabilities, normalised.

    What Sockeye calls log-linear and normalises likewise; a logarithmic opinion pool (Hinton 2002,
    section 1). A token is impossible where it is so to any member. Shapes as in `mean`.
    """
    # Each member's total moves all its logits alike, and so is gone with Z.
    return survey(jnp.mean(members_R.logits, axis=0))


COMBINATIONS: dict[str, Callable[[Distribution], Distribution]] = {"mean": mean, "geometric": geometric}


@dataclass(frozen=True)
class Ensemble:
    """The structure of an ensemble, as a graph definition is that of one model.

    Its parameters are a tuple: for each graph definition, those of its models stacked, leaves [R, ...].

    Attributes:
      graphdefs: the different structures among the members.
      combination: a name in `COMBINATIONS`.
    """

    graphdefs: tuple[Any, ...]
    combination: str = "mean"


class Speaker(Protocol):
    """A model, or an ensemble, as search and forced decoding see it.

    Attributes:
      entries: of the target vocabulary.
    """

    entries: int

    def encode(self, batch: Batch) -> Any:
        """What is remembered of the sources, leaves [B, ...]."""
        ...

    def start(self, memory: Any) -> Any:
        """The state before BOS is read, leaves [B, 1, ...]."""
        ...

    def read_all(self) -> Any:
        """What `advance` may look up in place of reading tokens one by one."""
        ...

    def advance(
        self, memory: Any, state: Any, token_BK: jax.Array, gates: Any = None
    ) -> tuple[Any, Distribution, jax.Array]:
        """Reads one token a hypothesis: next state, the next token's distribution_BK and align_BKS."""
        ...

    def forced(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """token_log_prob_BT of given targets in nats, 0 on pads, and align_BTS."""
        ...

    def sums(self, batch: Batch) -> Sums:
        """Sums over the given targets; ``loss`` is ``nll``."""
        ...


def assemble(structure: Any, params: Any) -> Speaker:
    """Puts a structure (`Ensemble`, or one model's graph definition) and its parameters together."""
    return _Several(structure, params) if isinstance(structure, Ensemble) else _One(structure, params)


class _One:
    """One model."""

    def __init__(self, graphdef: Any, params: Any):
        self._graphdef, self._params = graphdef, params
        self.model = step_lib.merge(graphdef, params)
        self.entries = self.model.target_embedding.shape[0]
        self.encode = self.model.encode
        self.read_all = self.model.read_all

    def start(self, memory: Any) -> Any:
        return self.model.start(memory, 1)

    def advance(
        self, memory: Any, state: Any, token_BK: jax.Array, gates: Any = None
    ) -> tuple[Any, Distribution, jax.Array]:
        state, output_BKE, align_BKS = self.model.advance(memory, state, token_BK, gates)
        return state, _distribution(self.model, output_BKE), align_BKS

    def forced(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        output_BTH, align_BTS = self.model(batch)
        target = batch.target_BT, batch.target_mask_BT
        return token_log_probs(output_BTH, self.model.softmax(), *target), align_BTS

    def sums(self, batch: Batch) -> Sums:
        return step_lib.make_eval_step(self._graphdef)(self._params, batch)


class _Several:
    """Several models that answer as one.

    The attention of an ensemble is the mean over the members that have one.
    """

    def __init__(self, ensemble: Ensemble, params: Sequence[Any]):
        self._groups = list(zip(ensemble.graphdefs, params, strict=True))
        self._combine = COMBINATIONS[ensemble.combination]
        models = [step_lib.merge(*one) for one in self._groups]
        # The first axis of a stacked table is the members'.
        self.entries = models[0].target_embedding.shape[1]
        self._attend = [isinstance(model.decoder.attention, Attention) for model in models]

    def encode(self, batch: Batch) -> Any:
        return self._each(lambda model: model.encode(batch), out_axes=1)

    def start(self, memory: Any) -> Any:
        return self._each(lambda model, memory: model.start(memory, 1), (1, memory), out_axes=2)

    def read_all(self) -> Any:
        return self._each(lambda model: model.read_all(), out_axes=0)

    def advance(
        self, memory: Any, state: Any, token_BK: jax.Array, gates: Any = None
    ) -> tuple[Any, Distribution, jax.Array]:
        def one(model: Any, memory: Any, state: Any, gates: Any) -> Any:
            state, output_BKE, align_BKS = model.advance(memory, state, token_BK, gates)
            return state, _distribution(model, output_BKE), align_BKS

        gates = [None] * len(self._groups) if gates is None else gates
        found = self._each(one, (1, memory), (2, state), (0, gates), out_axes=(2, 0, 0))
        states, distributions, aligns = zip(*found, strict=True)
        return states, self._combine(_all_members(distributions)), self._attention(aligns)

    def forced(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        token_log_prob_BT, _, align_BTS = self._forced(batch)
        return token_log_prob_BT, align_BTS

    def sums(self, batch: Batch) -> Sums:
        token_log_prob_BT, right_BT, _ = self._forced(batch)
        nll = -jnp.sum(token_log_prob_BT)
        tokens = jnp.sum(batch.target_mask_BT, dtype=nll.dtype)
        return Sums(nll, nll, jnp.sum(right_BT, dtype=nll.dtype), tokens)

    def _forced(self, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Log-probability of every real target token, whether it is the likeliest, and the attention."""
        outputs, aligns = zip(*self._each(lambda model: model(batch), out_axes=(2, 0)), strict=True)

        def position(inputs: Any) -> tuple[jax.Array, jax.Array]:
            outputs, target_B = inputs
            logits_BV, total_B, _ = self._combine(
                _all_members(self._each(_distribution, (1, outputs), out_axes=0))
            )
            chosen_B = jnp.take_along_axis(logits_BV, target_B[:, None], axis=1)[:, 0]
            return chosen_B - total_B, jnp.argmax(logits_BV, axis=1) == target_B

        # One position at a time: the logits of all members for all positions are not to exist at once.
        by_position = jax.tree.map(lambda x_BTRH: jnp.swapaxes(x_BTRH, 0, 1), outputs)
        token_TB, right_TB = lax.map(position, (by_position, jnp.asarray(batch.target_BT).T))
        mask_BT = batch.target_mask_BT
        token_BT = jnp.where(mask_BT, token_TB.T, 0)
        return token_BT, mask_BT & right_TB.T, self._attention(aligns)

    def _each(self, function: Callable[..., Any], *inputs: tuple[int, Sequence[Any]], out_axes: Any) -> Any:
        """``function(model, *inputs)`` of every member: for each group one tree, members on ``out_axes``.

        Args:
          function: of one model and its own part of the inputs.
          inputs: the members' axis, and for each group a tree.
          out_axes: as for ``jax.vmap``.
        """
        found = []
        for number, (graphdef, params) in enumerate(self._groups):

            def one(params: Any, *own: Any, graphdef: Any = graphdef) -> Any:
                return function(step_lib.merge(graphdef, params), *own)

            axes = (0, *(axis for axis, _ in inputs))
            mapped = jax.vmap(one, in_axes=axes, out_axes=out_axes)
            found.append(mapped(params, *(trees[number] for _, trees in inputs)))
        return tuple(found)

    def _attention(self, aligns: Sequence[jax.Array]) -> jax.Array:
        """The mean of the attentions there are, each [R, ...]; zeros where there is none."""
        own = [align for align, attends in zip(aligns, self._attend, strict=True) if attends]
        return jnp.mean(jnp.concatenate(own or aligns), axis=0)


def _distribution(model: Any, output: jax.Array) -> Distribution:
    """Of a model's next tokens, from what its softmax reads."""
    softmax = model.softmax()
    return survey(softmax.product(output), softmax.bias_V)


def _all_members(distributions: Sequence[Distribution]) -> Distribution:
    """Those of every group, one after another."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *distributions)


def members(structure: Any, params: Any) -> int:
    """How many models answer as one."""
    if not isinstance(structure, Ensemble):
        return 1
    return sum(len(jax.tree.leaves(stacked)[0]) for stacked in params)


def each_replica(params_R: Any) -> Iterator[Any]:
    """The parameters of every replica in turn, of leaves [R, ...]."""
    for number in range(len(jax.tree.leaves(params_R)[0])):
        yield jax.tree.map(lambda leaf, number=number: leaf[number], params_R)


def open_models(
    folders: Sequence[str | Path], combination: str = "mean"
) -> tuple[Config, Vocabularies, Any, Any]:
    """Opens trained models to answer as one; a single one is itself.

    Args:
      folders: work directories; one that holds replicas stands for all of them.
      combination: a name in `COMBINATIONS`.

    Returns:
      The first one's configuration, the vocabularies, structure and parameters.

    Raises:
      WorkdirError: there is no model in one of them, or their vocabularies differ.
    """
    works = [one for folder in folders for one in Workdir(folder).replicas or [Workdir(folder)]]
    first, *others = [work.load() for work in works]
    for work, other in zip(works[1:], others, strict=True):
        for side, ours, theirs in zip(Vocabularies._fields, first[1], other[1], strict=True):
            if ours.fingerprint != theirs.fingerprint:
                raise WorkdirError(
                    f"{works[0].path} and {work.path} make no ensemble: their {side} vocabularies differ "
                    f"(one has {ours.size} entries, the other {theirs.size}); train them on the same "
                    "training part with the same config.data.vocab"
                )
    cfg, vocabs, graphdef, params = first
    if not others:
        return cfg, vocabs, graphdef, params
    structure, stacked = group([(graphdef, params) for _, _, graphdef, params in (first, *others)])
    return cfg, vocabs, Ensemble(structure, combination), stacked


def group(models: Sequence[tuple[Any, Any]]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Stacks the parameters of models of equal structure.

    Args:
      models: graph definition and parameters of each.

    Returns:
      The different graph definitions, and for each the parameters of its models, leaves [R, ...].
    """
    found: list[tuple[Any, Any, list[Any]]] = []
    for graphdef, params in models:
        # A graph definition does not know the sizes of its parameters.
        shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params)
        same = next((one[2] for one in found if one[:2] == (graphdef, shapes)), None)
        if same is None:
            found.append((graphdef, shapes, [params]))
        else:
            same.append(params)
    stacked = tuple(jax.tree.map(lambda *leaves: jnp.stack(leaves), *one) for _, _, one in found)
    return tuple(graphdef for graphdef, _, _ in found), stacked
