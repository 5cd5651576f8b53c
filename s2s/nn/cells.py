"""Recurrent cells: one step of each equation, its parameters and how they start.

A cell is a pair of functions. `project` is the input's share of all gates, which
depends on no state, so a caller does it for all time steps in one product; `step`
adds the state's share and moves the state. Must not know time, masks or layers:
leading axes ("...") are whatever the caller has ([S, B] outside a scan, [B] inside,
[B, K] in a search).

Input kernels start Glorot uniform and recurrent ones orthogonal, both gate by gate
(a gate is a layer of its own); biases at 0, the LSTM's forget gate at 1.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from s2s.nn.product import add_bias, product

State = tuple[jax.Array, ...]


def init_gates(initializer: Any, rngs: nnx.Rngs, rows: int, hidden: int, gates: int, dtype: Any) -> nnx.Param:
    """A parameter [rows, gates * hidden], each gate's block drawn by itself."""
    blocks = [initializer(rngs.params(), (rows, hidden), dtype) for _ in range(gates)]
    return nnx.Param(jnp.concatenate(blocks, axis=1))


class Cell(nnx.Module):
    """What all cells share: stacked kernels, the input product, the zero state.

    Attributes:
      gates: blocks of ``hidden`` columns in the kernels, so G = gates * H.
      state_size: arrays in a state; the first is h, the output.
      gate_names: what `opened` gives, in the order of the kernels' blocks; none where the only
        block is the state itself before its nonlinearity.
    """

    gates = 1
    state_size = 1
    gate_names: tuple[str, ...] = ()
    recurrent_init: Any = staticmethod(initializers.orthogonal())

    def __init__(
        self,
        in_features: int,
        hidden: int,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
    ):
        self.hidden = hidden
        self.dtype = jnp.dtype(dtype)
        self.input_kernel = init_gates(
            initializers.glorot_uniform(), rngs, in_features, hidden, self.gates, param_dtype
        )
        self.recurrent_kernel = init_gates(self.recurrent_init, rngs, hidden, hidden, self.gates, param_dtype)
        self.bias = nnx.Param(jnp.zeros(self.gates * hidden, param_dtype))

    def project(self, x: jax.Array) -> jax.Array:
        """The input's share of the gates, W x + b: [..., E] -> [..., G]."""
        gates = product(x, self.input_kernel[...].astype(self.dtype))
        return add_bias(gates, self.bias[...].astype(self.dtype))

    def step(self, state: State, gates: jax.Array) -> State:
        """The next state, from the state [..., H] and the input's share of the gates [..., G]."""
        raise NotImplementedError

    def opened(self, state: State, gates: jax.Array) -> tuple[jax.Array, ...]:
        """What `step` makes of the same arguments on its way: a value [..., H] for each of ``gate_names``,
        after its nonlinearity.
        """
        return ()

    def zero_state(self, shape_prefix: tuple[int, ...]) -> State:
        """The state before any input: zeros [*shape_prefix, H]."""
        return (jnp.zeros((*shape_prefix, self.hidden), self.dtype),) * self.state_size

    def _recur(self, h: jax.Array) -> jax.Array:
        return product(h, self.recurrent_kernel[...].astype(self.dtype))


def _sigmoid(x: jax.Array) -> jax.Array:
    """1 / (1 + exp(-x)), for which XLA has a faster way in tanh than in exp."""
    return 0.5 * jnp.tanh(0.5 * x) + 0.5


@jax.custom_vjp
def _lstm(c: jax.Array, gates: jax.Array) -> State:
    """The LSTM's next state, from c [..., H] and all shares of the gates together [..., 4 H]."""
    return _lstm_forward(c, gates)[0]


def _lstm_forward(c: jax.Array, gates: jax.Array) -> tuple[State, tuple[jax.Array, ...]]:
    hidden = c.shape[-1]
    open_ = _sigmoid(gates[..., : 3 * hidden])
    g = jnp.tanh(gates[..., 3 * hidden :])
    i, f, o = jnp.split(open_, 3, axis=-1)
    new = f * c + i * g
    return (o * jnp.tanh(new), new), (c, open_, g)


def _lstm_backward(
    kept: tuple[jax.Array, ...], gradients: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    # By hand, as autodiff keeps ten arrays of H where five do: an eighth of a layer's time.
    c, open_, g = kept
    d_h, d_new = gradients
    i, f, o = jnp.split(open_, 3, axis=-1)
    tanh_new = jnp.tanh(f * c + i * g)
    d_new = d_new + d_h * o * (1 - tanh_new * tanh_new)
    d_open = jnp.concatenate([d_new * g, d_new * c, d_h * tanh_new], axis=-1) * (open_ * (1 - open_))
    return d_new * f, jnp.concatenate([d_open, d_new * i * (1 - g * g)], axis=-1)


_lstm.defvjp(_lstm_forward, _lstm_backward)


class LSTM(Cell):
    """Long short-term memory with a forget gate (Gers et al. 2000), no peepholes.

    [i; f; o; g] = W x_t + b + U h_{t-1}
    c_t = sigmoid(f) * c_{t-1} + sigmoid(i) * tanh(g);  h_t = sigmoid(o) * tanh(c_t)

    The forget gate's bias starts at 1 (Jozefowicz et al. 2015). A state is (h, c).
    """

    gates = 4
    state_size = 2
    gate_names = ("input", "forget", "output", "candidate")

    def __init__(self, in_features: int, hidden: int, **keywords: Any):
        super().__init__(in_features, hidden, **keywords)
        self.bias = nnx.Param(self.bias[...].at[hidden : 2 * hidden].set(1))

    def step(self, state: State, gates: jax.Array) -> State:
        h, c = state
        return _lstm(c, gates + self._recur(h))

    def opened(self, state: State, gates: jax.Array) -> tuple[jax.Array, ...]:
        h, c = state
        _, open_, g = _lstm_forward(c, gates + self._recur(h))[1]
        return (*jnp.split(open_, 3, axis=-1), g)


class GRU(Cell):
    """Gated recurrent unit (Cho et al. 2014), reset after the recurrent product as in cuDNN.

    r = sigmoid(W_r x_t + b_r + U_r h_{t-1});  z = sigmoid(W_z x_t + b_z + U_z h_{t-1})
    n = tanh(W_n x_t + b_n + r * (U_n h_{t-1} + c_n));  h_t = (1 - z) * n + z * h_{t-1}

    Cho et al. reset h before the product, which then cannot join the other two gates' product.
    """

    gates = 3
    gate_names = ("reset", "update", "candidate")

    def __init__(self, in_features: int, hidden: int, *, param_dtype: Any = jnp.float32, **keywords: Any):
        super().__init__(in_features, hidden, param_dtype=param_dtype, **keywords)
        self.candidate_bias = nnx.Param(jnp.zeros(hidden, param_dtype))

    def step(self, state: State, gates: jax.Array) -> State:
        (h,) = state
        _, z, n = self.opened(state, gates)
        return ((1 - z) * n + z * h,)

    def opened(self, state: State, gates: jax.Array) -> tuple[jax.Array, ...]:
        (h,) = state
        hidden = h.shape[-1]
        recurred = self._recur(h)
        r, z = jnp.split(_sigmoid(gates[..., : 2 * hidden] + recurred[..., : 2 * hidden]), 2, axis=-1)
        n_h = recurred[..., 2 * hidden :]
        n_h = n_h + jnp.broadcast_to(self.candidate_bias[...].astype(self.dtype), n_h.shape)
        return r, z, jnp.tanh(gates[..., 2 * hidden :] + r * n_h)


class Tanh(Cell):
    """Plain recurrence (Elman 1990): h_t = tanh(W x_t + b + U h_{t-1})."""

    def step(self, state: State, gates: jax.Array) -> State:
        return (jnp.tanh(gates + self._recur(state[0])),)


class Relu(Cell):
    """Rectified recurrence that starts as identity (Le et al. 2015): h_t = relu(W x_t + b + U h_{t-1})."""

    recurrent_init = staticmethod(lambda key, shape, dtype: jnp.eye(shape[0], dtype=dtype))

    def step(self, state: State, gates: jax.Array) -> State:
        return (jax.nn.relu(gates + self._recur(state[0])),)


CELLS: dict[str, type[Cell]] = {"lstm": LSTM, "gru": GRU, "tanh": Tanh, "relu": Relu}
