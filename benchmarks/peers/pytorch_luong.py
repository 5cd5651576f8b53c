"""The best-practice PyTorch model: LSTM encoder and decoder with general attention (Luong et al. 2015).

Decides how a careful PyTorch user writes the model that `benchmarks.worker_s2s` builds from a
config, and does everything PyTorch offers for speed on a CPU: packed sequences, sequence-level
LSTMs (oneDNN where nothing is packed), one batched attention, the softmax on real tokens only,
fused Adam. With input feeding, where no sequence-level LSTM exists, several ways to write the loop
are timed on a batch and the fastest is kept. Must not know s2s: it reads arrays.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import protocol
import torch
from torch import Tensor, nn
from torch.nn import functional

BOS = 1


class Luong(nn.Module):
    """h = LSTM(x), s = LSTM([y; fed]), a = softmax(s W_a h), s~ = tanh(W_c [a h; s]), p = softmax(W_s s~)."""

    def __init__(self, embedding: int, hidden: int, layers: int, sources: int, targets: int, feeding: bool):
        super().__init__()
        self.hidden, self.feeding, self.loop = hidden, feeding, "cells"
        self.source_embedding = nn.Embedding(sources, embedding)
        self.target_embedding = nn.Embedding(targets, embedding)
        self.encoder = nn.LSTM(embedding, hidden, layers, batch_first=True)
        self.keys = nn.Linear(hidden, hidden, bias=False)
        self.attentional = nn.Linear(2 * hidden, hidden, bias=False)
        self.softmax = nn.Linear(hidden, targets)
        if feeding:
            sizes = [embedding + hidden] + [hidden] * (layers - 1)
            self.cells = nn.ModuleList([nn.LSTMCell(size, hidden) for size in sizes])
        else:
            self.decoder = nn.LSTM(embedding, hidden, layers, batch_first=True)
        for name, parameter in self.named_parameters():
            # PyTorch keeps two biases where the equation has one.
            if "bias_hh" in name:
                nn.init.zeros_(parameter).requires_grad_(False)

    def forward(self, source: Tensor, source_length: Tensor, read: Tensor, chosen: Tensor) -> Tensor:
        """Logits of the real target tokens, whose flat positions are ``chosen``."""
        embedded = self.source_embedding(source)
        positions = torch.arange(source.shape[1])
        mask = positions[None, :] < source_length[:, None]
        if bool(mask.all()):  # nothing to pack, and oneDNN's LSTM is for unpacked ones
            memory, state = self.encoder(embedded)
        else:
            packed = nn.utils.rnn.pack_padded_sequence(
                embedded, source_length, batch_first=True, enforce_sorted=False
            )
            packed, state = self.encoder(packed)
            memory, _ = nn.utils.rnn.pad_packed_sequence(packed, batch_first=True, total_length=mask.shape[1])
        keys = self.keys(memory)
        bias = torch.zeros(mask.shape).masked_fill_(~mask, torch.finfo(torch.float32).min)[:, None, :]
        embedded = self.target_embedding(read)
        if self.feeding:
            attentional = LOOPS[self.loop](self, embedded, state, keys, memory, bias)
        else:
            query, _ = self.decoder(embedded, state)
            attentional = self.attend(query, keys, memory, bias)
        return self.softmax(attentional.reshape(-1, self.hidden)[chosen])

    def attend(self, query: Tensor, keys: Tensor, memory: Tensor, bias: Tensor) -> Tensor:
        """[B, T, H] queries to attentional vectors."""
        align = torch.softmax(torch.baddbmm(bias, query, keys.transpose(1, 2)), dim=-1)
        return torch.tanh(self.attentional(torch.cat([torch.bmm(align, memory), query], dim=-1)))


def loop_of_cells(
    model: Luong, embedded: Tensor, state: tuple[Tensor, Tensor], keys: Tensor, memory: Tensor, bias: Tensor
) -> Tensor:
    """The loop as tutorials have it: nn.LSTMCell on [y; s~]."""
    states = list(zip(*(part.unbind(0) for part in state), strict=True))
    fed = torch.zeros_like(states[0][0])
    outputs = []
    for y in embedded.unbind(1):
        x = torch.cat([y, fed], dim=-1)
        for layer, cell in enumerate(model.cells):
            states[layer] = cell(x, states[layer])
            x = states[layer][0]
        fed = model.attend(x[:, None, :], keys, memory, bias)[:, 0]
        outputs.append(fed)
    return torch.stack(outputs, dim=1)


def one_step(
    model: Luong,
    gates: Tensor,
    states: list[tuple[Tensor, Tensor]],
    fed: Tensor,
    weights: list[Tensor],
    keys: Tensor,
    memory: Tensor,
    bias: Tensor,
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """One step by hand: one product a layer, on [s~; h] or [x; h]."""
    x, new = fed, []
    for layer, (h, c) in enumerate(states):
        start = gates if layer == 0 else model.cells[layer].bias_ih
        i, f, g, o = torch.addmm(start, torch.cat([x, h], dim=-1), weights[layer]).chunk(4, dim=-1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        x = torch.sigmoid(o) * torch.tanh(c)
        new.append((x, c))
    return new, model.attend(x[:, None, :], keys, memory, bias)[:, 0]


compiled_step = torch.compile(one_step)


def loop_by_hand(
    model: Luong,
    embedded: Tensor,
    state: tuple[Tensor, Tensor],
    keys: Tensor,
    memory: Tensor,
    bias: Tensor,
    step: Any = one_step,
) -> Tensor:
    """The product of y leaves the loop; the rest is one product a layer."""
    split = embedded.shape[-1]
    first = model.cells[0]
    gates = functional.linear(embedded, first.weight_ih[:, :split], first.bias_ih)
    weights = []
    for layer, cell in enumerate(model.cells):
        reads = cell.weight_ih[:, split:] if layer == 0 else cell.weight_ih
        weights.append(torch.cat([reads, cell.weight_hh], dim=1).t())
    states = list(zip(*(part.unbind(0) for part in state), strict=True))
    fed = torch.zeros_like(states[0][0])
    outputs = []
    for gates_t in gates.unbind(1):
        states, fed = step(model, gates_t, states, fed, weights, keys, memory, bias)
        outputs.append(fed)
    return torch.stack(outputs, dim=1)


def loop_compiled(*arguments: Any) -> Tensor:
    """The same with torch.compile around a step."""
    return loop_by_hand(*arguments, step=compiled_step)


LOOPS = {"cells": loop_of_cells, "by hand": loop_by_hand, "by hand, torch.compile": loop_compiled}


class Peer:
    """A model, its optimizer and its batches."""

    def load(
        self, sizes: dict[str, Any], batches: str, learning_rate: float, clip: float, dtype: str
    ) -> dict[str, Any]:
        """Builds the model, and reads the batches that `benchmarks.data.save_batches` wrote.

        Args:
          sizes: keywords of `Luong`.
          batches: an .npz file.
          learning_rate: Adam's.
          clip: gradients are scaled down to this global norm.
          dtype: "bfloat16": products by torch.autocast, parameters as ever in float32.
        """
        torch.manual_seed(1)
        self.model = Luong(**sizes)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.Adam(self.trained, lr=learning_rate, fused=True)
        self.clip = clip
        self.low = dtype == "bfloat16"
        with np.load(batches) as arrays:
            self.batches = [self._read(arrays, number) for number in range(int(arrays["count"]))]
        return {
            "parameters": sum(parameter.numel() for parameter in self.trained),
            "threads": torch.get_num_threads(),
            "version": torch.__version__,
        }

    def _read(self, arrays: Any, number: int) -> tuple[Tensor, ...]:
        source, source_length, target, target_length = (
            arrays[f"{name}_{number}"].astype(np.int64)
            for name in ("source", "source_length", "target", "target_length")
        )
        # No empty rows and no more columns than the longest pair has: what a collate function makes.
        real = source_length > 0
        source, target = source[real][:, : source_length.max()], target[real][:, : target_length.max()]
        chosen = np.flatnonzero(np.arange(target.shape[1])[None, :] < target_length[real][:, None])
        read = np.concatenate([np.full_like(target[:, :1], BOS), target[:, :-1]], axis=1)
        tensors = source, source_length[real], read, chosen, target.reshape(-1)[chosen]
        return tuple(map(torch.from_numpy, tensors))

    def set_weights(self, file: str) -> dict[str, Any]:
        """Takes over the parameters that `benchmarks.worker_s2s` saved."""
        with np.load(file) as saved:
            given = {name: torch.from_numpy(saved[name]) for name in saved.files}

        def gates(name: str) -> Tensor:
            """[4 H, ...] as PyTorch has it; s2s keeps its columns in the order i, f, o, g."""
            i, f, o, g = given[name].T.chunk(4) if given[name].ndim == 2 else given[name].chunk(4)
            return torch.cat([i, f, g, o])

        def lstm(module: nn.LSTM, prefix: str) -> None:
            for layer in range(module.num_layers):
                for ours, theirs in KERNELS.items():
                    getattr(module, f"{theirs}_l{layer}").copy_(gates(f"{prefix}.{layer}.{ours}"))

        model = self.model
        with torch.no_grad():
            model.source_embedding.weight.copy_(given["source_embedding"])
            model.target_embedding.weight.copy_(given["target_embedding"])
            model.softmax.weight.copy_(given["softmax_kernel"].T)
            model.softmax.bias.copy_(given["softmax_bias"])
            model.keys.weight.copy_(given["decoder.attention.score.memory_kernel"].T)
            model.attentional.weight.copy_(given["decoder.attentional_kernel"].T)
            lstm(model.encoder, "encoder.forward")
            if not model.feeding:
                lstm(model.decoder, "decoder.stack.cells")
            else:
                for layer, cell in enumerate(model.cells):
                    for ours, theirs in KERNELS.items():
                        value = gates(f"decoder.stack.cells.{layer}.{ours}")
                        if layer == 0 and ours == "input_kernel":
                            value = torch.cat([value, gates("decoder.feed_kernel")], dim=1)
                        getattr(cell, theirs).copy_(value)
        return {}

    def train(self, first: int, steps: int) -> dict[str, Any]:
        """Makes updates on batches ``first``, ``first + 1``, ... (round and round)."""
        tokens, losses = 0, []
        began = time.perf_counter()
        for number in range(first, first + steps):
            *inputs, target = self.batches[number % len(self.batches)]
            with torch.autocast("cpu", torch.bfloat16, enabled=self.low):
                logits = self.model(*inputs)
            loss = functional.cross_entropy(logits.float(), target)
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.trained, self.clip, foreach=True)
            self.optimizer.step()
            tokens += len(target)
            losses.append(loss.item())
        return {"seconds": time.perf_counter() - began, "tokens": tokens, "steps": steps, "losses": losses}

    def warm_up(self, loops: Sequence[str] = ("cells", "by hand")) -> dict[str, Any]:
        """Runs every batch once; with input feeding, keeps the fastest of the loops for the first batch."""
        began = time.perf_counter()
        answer: dict[str, Any] = {}
        if self.model.feeding:
            seconds: dict[str, float | str] = {}
            for name in loops:
                self.model.loop = name
                try:
                    self.train(0, 1)
                    times = [self.train(0, 1)["seconds"] for _ in range(3)]
                    seconds[name] = statistics.median(times)
                except Exception as error:  # torch.compile needs a C++ compiler, which may be missing
                    seconds[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            self.model.loop = min(
                (name for name, value in seconds.items() if isinstance(value, float)), key=seconds.__getitem__
            )
            answer = {"loops": seconds, "loop": self.model.loop}
        self.train(0, len(self.batches))
        return {**answer, "seconds": time.perf_counter() - began}


# s2s's names of an LSTM's parameters, and PyTorch's.
KERNELS = {"input_kernel": "weight_ih", "recurrent_kernel": "weight_hh", "bias": "bias_ih"}


if __name__ == "__main__":
    peer = Peer()
    protocol.serve({name: getattr(peer, name) for name in ("load", "set_weights", "train", "warm_up")})
