"""Our side of every pair: trains and translates as s2s.train and s2s.translate do, on request.

Decides how a request becomes a config and which of s2s's own parts answer it. Must not know the
peers, nor what is done with the times.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.data import plan_of_sentences
from benchmarks.peers import protocol
from s2s import config as config_lib
from s2s.batch import Batch
from s2s.data import corpora, encode, pipeline, plan, vocab_training
from s2s.infra import sharding
from s2s.learn import optim
from s2s.learn import step as step_lib
from s2s.sweep import flops
from s2s.translator import Translator


class Worker:
    """A model, its training state and where its batches come from."""

    def load(
        self,
        config: dict[str, Any],
        batches: str | None = None,
        vocab_sizes: tuple[int, int] = (0, 0),
        batch_sentences: int | None = None,
        precision: str | None = None,
    ) -> dict[str, Any]:
        """Builds model and state as s2s.train does.

        Args:
          config: dotted names of fields and their values.
          batches: an .npz file of `benchmarks.data.save_batches`; None: the pipeline of config.data.
          vocab_sizes: entries of both vocabularies, where the batches are given.
          batch_sentences: pairs in a batch, on average; decides config.data.batch_tokens. None: it stays.
          precision: of products, as jax_default_matmul_precision has it.
        """
        began = time.perf_counter()
        jax.config.update("jax_default_matmul_precision", precision)
        mutable = config_lib.default()
        for name, value in config.items():
            mutable.update_from_flattened_dict({name: value})
        self.cfg = config_lib.freeze(mutable)
        self.mesh = sharding.make_mesh()
        answer: dict[str, Any] = {}
        if batches is None:
            self.vocabs, self.batches, answer["plan"] = self._pipeline(batch_sentences)
            vocab_sizes = self.vocabs.source.size, self.vocabs.target.size
        else:
            with np.load(batches) as arrays:
                self.batches = itertools.cycle([_batch(arrays, n) for n in range(int(arrays["count"]))])
                self._distinct = int(arrays["count"])
        cfg = self.cfg
        optimizer = optim.make_optimizer(
            cfg.optim, optim.make_schedule(cfg.optim, steps_per_epoch=1000, total_steps=10000)
        )
        self.graphdef, params = step_lib.abstract_params(cfg.model, *vocab_sizes)
        initialize = functools.partial(step_lib.init_state, cfg, *vocab_sizes, optimizer, cfg.run.seed)
        self.state = sharding.jit_init(lambda: initialize()[1], self.mesh)()
        self.target_vocab = vocab_sizes[1]
        self.step = sharding.jit_train_step(
            step_lib.make_train_step(self.graphdef, cfg, optimizer), self.mesh
        )
        self.translators: dict[str, Translator] = {}
        return {
            **answer,
            "parameters": step_lib.parameter_count(params),
            "seconds": time.perf_counter() - began,
            "version": f"jax {jax.__version__}",
        }

    def _pipeline(self, sentences: int | None) -> tuple[Any, Iterator[Batch], dict[str, Any]]:
        data, seed = self.cfg.data, self.cfg.run.seed
        corpus = corpora.open_corpus(data, "train", seed=seed, progress=False)
        vocabs = vocab_training.train_vocabularies(corpus, data.vocab, seed=seed)
        encoded = encode.encode_corpus(
            corpus,
            vocabs,
            max_source=data.max_source_length,
            max_target=data.max_target_length,
            cache=data.cache,
            progress=False,
        )
        make = functools.partial(
            plan.make_plan,
            encoded.source_lengths,
            encoded.target_lengths,
            max_shapes=data.max_shapes,
            rows_multiple=data.rows_multiple,
            seed=seed,
        )
        layout = (
            make(batch_tokens=data.batch_tokens)
            if sentences is None
            else plan_of_sentences(make, len(encoded), float(encoded.target_lengths.mean()), sentences)
        )
        self._encoded, self._layout = encoded, layout

        def endless() -> Iterator[Batch]:
            for epoch in itertools.count():
                yield from pipeline.batches(encoded, layout, epoch=epoch, prefetch=data.prefetch)

        told = {
            "shapes": [list(bucket) for bucket in layout.buckets],
            "padding": layout.padding,
            "pairs_a_batch": len(encoded) / layout.batches_per_epoch,
            "target_tokens_a_batch": float(encoded.target_lengths.sum()) / layout.batches_per_epoch,
            "vocabularies": [vocabs.source.size, vocabs.target.size],
        }
        return vocabs, endless(), told

    def save_weights(self, file: str) -> dict[str, Any]:
        """Saves the parameters by dotted name."""
        np.savez(file, **dict(_flat(jax.device_get(self.state.params))))
        return {}

    def warm_up(self) -> dict[str, Any]:
        """Compiles every batch shape and runs it once."""
        began = time.perf_counter()
        if hasattr(self, "_layout"):
            empty = np.zeros(0, np.int64)
            for index, bucket in enumerate(self._layout.buckets):
                ids = next((batch.ids for batch in self._layout.epoch(0) if batch.bucket == index), empty)
                self._update(pipeline.pad_batch(self._encoded, ids, bucket))
        else:
            for _ in range(self._distinct):
                self._update(next(self.batches))
        jax.block_until_ready(self.state)
        return {"seconds": time.perf_counter() - began}

    def _update(self, batch: Batch) -> Any:
        with jax.transfer_guard("disallow"):
            self.state, metrics = self.step(self.state, sharding.to_global(batch, self.mesh))
        return metrics

    def train(self, steps: int) -> dict[str, Any]:
        """Makes updates on the next batches."""
        began = time.perf_counter()
        metrics, work = [], 0.0
        batches = [next(self.batches) for _ in range(steps)] if hasattr(self, "_distinct") else None
        for batch in batches or itertools.islice(self.batches, steps):
            metrics.append(self._update(batch))
            if batches:
                work += self._flops(batch)
        jax.block_until_ready(self.state)
        seconds = time.perf_counter() - began
        sums = [one.sums for one in jax.device_get(metrics)]
        return {
            "seconds": seconds,
            "tokens": int(sum(one.tokens for one in sums)),
            "steps": steps,
            "flops": work,
            "losses": [float(one.loss / one.tokens) for one in sums],
        }

    def _flops(self, batch: Batch) -> float:
        tokens = flops.Tokens(
            sentences=int((batch.source_length_B > 0).sum()),
            source=int(batch.source_length_B.sum()),
            target=int(batch.target_length_B.sum()),
            looks=int((batch.source_length_B.astype(np.int64) * batch.target_length_B).sum()),
        )
        return flops.train_flops(self.cfg.model, self.target_vocab, tokens)

    def decode(
        self, file: str, sentences: int, beam: int, batch: int, exact_length: int | None, longest: int
    ) -> dict[str, Any]:
        """Translates the first lines of a file.

        Args:
          file: a source sentence a line.
          sentences: lines to translate.
          beam: hypotheses kept; 1 is greedy.
          batch: sentences decoded together.
          exact_length: every output has so many tokens; None: the model ends it.
          longest: most tokens of an output.
        """
        with open(file, encoding="utf-8") as stream:
            texts = [line.rstrip("\n") for line in itertools.islice(stream, sentences)]
        search = dataclasses.replace(
            self.cfg.search,
            name="greedy" if beam == 1 else "beam",
            beam=beam,
            batch_sentences=batch,
            min_length=exact_length or 0,
            max_length_factor=0.0,
            max_length_extra=exact_length or longest,
        )
        key = repr(search)
        if key not in self.translators:
            self.translators[key] = Translator(self.graphdef, self.vocabs, search)
        began = time.perf_counter()
        found = self.translators[key](self.state.params, texts)
        seconds = time.perf_counter() - began
        return {
            "seconds": seconds,
            "sentences": len(texts),
            "tokens": sum(len(one.hypotheses[0].tokens) for one in found if one.hypotheses),
        }

    def peak(self, seconds: float = 2.0) -> dict[str, Any]:
        """FLOPs a second of large float32 products through XLA: the best size's median."""
        best = {"flops_per_second": 0.0, "size": 0}
        for size in (1024, 2048, 4096):
            left, right = (jax.random.normal(jax.random.key(n), (size, size), jnp.float32) for n in (0, 1))
            product = jax.jit(jnp.matmul)
            product(left, right).block_until_ready()
            times: list[float] = []
            while sum(times) < seconds / 3 or len(times) < 3:
                began = time.perf_counter()
                product(left, right).block_until_ready()
                times.append(time.perf_counter() - began)
            rate = 2.0 * size**3 / float(np.median(times))
            if rate > best["flops_per_second"]:
                best = {"flops_per_second": rate, "size": size}
        return best


def _batch(arrays: Any, number: int) -> Batch:
    source, source_length, target, target_length = (
        arrays[f"{name}_{number}"] for name in ("source", "source_length", "target", "target_length")
    )
    return Batch(source, source_length, target, target_length, np.arange(len(source), dtype=np.int32))


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    if not isinstance(tree, dict):
        yield prefix, np.asarray(tree)
        return
    for name, value in tree.items():
        yield from _flat(value, f"{prefix}.{name}" if prefix else name)


if __name__ == "__main__":
    worker = Worker()
    protocol.serve(
        {
            name: getattr(worker, name)
            for name in ("load", "save_weights", "warm_up", "train", "decode", "peak")
        }
    )
