"""The equations in NumPy: float64, plain loops, one sentence at a time, no JAX.

An oracle reads the parameters of the module it judges as a nested dict of arrays
and is written from the equation, not from the module: inputs are joined into one
vector where the module splits its kernels.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Parameters = dict[Any, Any]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    weights = np.exp(x - x.max())
    return weights / weights.sum()


# Cells: one step of one sentence; x_E is all that the cell reads, kernel_EG its kernel.


def lstm(p: Parameters, x_E, state):
    h, c = state
    H = len(h)
    z = x_E @ p["input_kernel"] + p["bias"] + h @ p["recurrent_kernel"]
    i, f, o, g = sigmoid(z[:H]), sigmoid(z[H : 2 * H]), sigmoid(z[2 * H : 3 * H]), np.tanh(z[3 * H :])
    c = f * c + i * g
    return o * np.tanh(c), c


def gru(p: Parameters, x_E, state):
    (h,) = state
    H = len(h)
    W, U, b = p["input_kernel"], p["recurrent_kernel"], p["bias"]
    r = sigmoid(x_E @ W[:, :H] + b[:H] + h @ U[:, :H])
    z = sigmoid(x_E @ W[:, H : 2 * H] + b[H : 2 * H] + h @ U[:, H : 2 * H])
    n = np.tanh(x_E @ W[:, 2 * H :] + b[2 * H :] + r * (h @ U[:, 2 * H :] + p["candidate_bias"]))
    return ((1 - z) * n + z * h,)


def tanh(p: Parameters, x_E, state):
    return (np.tanh(x_E @ p["input_kernel"] + p["bias"] + state[0] @ p["recurrent_kernel"]),)


def relu(p: Parameters, x_E, state):
    return (np.maximum(0, x_E @ p["input_kernel"] + p["bias"] + state[0] @ p["recurrent_kernel"]),)


CELLS = {"lstm": lstm, "gru": gru, "tanh": tanh, "relu": relu}


def zero_state(cell: str, hidden: int):
    return (np.zeros(hidden),) * (2 if cell == "lstm" else 1)


def run(cell: str, p: Parameters, x_SE, length: int, state, reverse: bool = False):
    """Outputs [S, H], zeros past ``length``, and the last state."""
    outputs_SH = np.zeros((len(x_SE), len(state[0])))
    for j in reversed(range(length)) if reverse else range(length):
        state = CELLS[cell](p, x_SE[j], state)
        outputs_SH[j] = state[0]
    return outputs_SH, state


def encoder(cell: str, p: Parameters, x_SE, length: int):
    """Memory [S, M] and the last states by layer, directions joined."""
    states = []
    for layer in range(len(p["forward"])):
        ways = [(p["forward"][layer], False)]
        if p.get("backward"):
            ways.append((p["backward"][layer], True))
        read = []
        for parameters, reverse in ways:
            zero = zero_state(cell, len(parameters["recurrent_kernel"]))
            read.append(run(cell, parameters, x_SE, length, zero, reverse))
        x_SE = np.concatenate([outputs for outputs, _ in read], axis=1)
        states.append(tuple(np.concatenate(part) for part in zip(*(state for _, state in read), strict=True)))
    return x_SE, states


# Bridges: states of the encoder's layers -> states of the decoder's.


def bridge(name: str, p: Parameters, states, layers: int, hidden: int):
    if name == "copy":
        return states
    if name == "zero":
        return [(np.zeros(hidden),) * len(states[0])] * layers
    crossed = []
    for layer in range(layers):
        state = states[layer] if len(states) == layers else states[-1]
        linear = p["hidden_maps"][layer]
        new = [np.tanh(state[0] @ linear["kernel"] + linear["bias"])]
        if len(state) == 2:
            linear = p["cell_maps"][layer]
            new.append(state[1] @ linear["kernel"] + linear["bias"])
        crossed.append(tuple(new))
    return crossed


# Scores: of one query and one source position.


def dot(p: Parameters, s_H, h_M):
    return sum(s * h for s, h in zip(s_H, h_M, strict=True))


def general(p: Parameters, s_H, h_M):
    return s_H @ (p["memory_kernel"].T @ h_M)


def concat(p: Parameters, s_H, h_M):
    W_a = np.concatenate([p["query_kernel"], p["memory_kernel"]])
    return p["vector"] @ np.tanh(W_a.T @ np.concatenate([s_H, h_M]))


SCORES = {"dot": dot, "general": general, "concat": concat}


def attend(scores_S, length: int, memory_SM):
    """Context [M] and weights [S] over the first ``length`` positions; zeros if there are none."""
    align_S = np.zeros(len(scores_S))
    if length:
        align_S[:length] = softmax(scores_S[:length])
    return sum(a * h for a, h in zip(align_S, memory_SM, strict=True)), align_S


def seq2seq(cfg, p: Parameters, source_S, source_length: int, target_T, bos: int):
    """Logits [T, V] and weights [T, S] of one sentence pair, ``cfg`` being a ModelConfig."""
    target_table = p["target_embedding"]
    source_table = target_table if cfg.tie == "all" else p["source_embedding"]
    memory_SM, states = encoder(cfg.cell, p["encoder"], source_table[source_S], source_length)
    summary_M = states[-1][0]
    decoder = p["decoder"]
    states = list(bridge(cfg.bridge, decoder.get("bridge", {}), states, cfg.layers, cfg.hidden))
    first = dict(decoder["stack"]["cells"][0])
    kernels = [first["input_kernel"], decoder.get("feed_kernel"), decoder.get("summary_kernel")]
    first["input_kernel"] = np.concatenate([kernel for kernel in kernels if kernel is not None])
    cells = [first] + [decoder["stack"]["cells"][layer] for layer in range(1, cfg.layers)]

    s_tilde = np.zeros(cfg.hidden)
    logits, align = [], []
    for t in range(len(target_T)):
        x = target_table[target_T[t - 1] if t else bos]
        if cfg.input_feeding:
            x = np.concatenate([x, s_tilde])
        if cfg.attention == "fixed":
            x = np.concatenate([x, summary_M])
        for layer in range(cfg.layers):
            states[layer] = CELLS[cfg.cell](cells[layer], x, states[layer])
            x = states[layer][0]
        s_t, align_S = x, np.zeros(len(memory_SM))
        if cfg.attention == "none":
            read = s_t
        elif cfg.attention == "fixed":
            read = np.concatenate([summary_M, s_t])
        else:
            parameters = decoder.get("attention", {}).get("score", {})
            scores_S = np.array([SCORES[cfg.attention](parameters, s_t, h) for h in memory_SM])
            context_M, align_S = attend(scores_S, source_length, memory_SM)
            read = np.concatenate([context_M, s_t])
        s_tilde = np.tanh(read @ decoder["attentional_kernel"])
        if cfg.tie == "none":
            scores_V = s_tilde @ p["softmax_kernel"]
        else:
            out = s_tilde @ p["to_embedding"]["kernel"] if cfg.embedding != cfg.hidden else s_tilde
            scores_V = target_table @ out
        logits.append(scores_V + p["softmax_bias"])
        align.append(align_S)
    return np.array(logits), np.array(align)
