"""Recurrent layers: `rnn`, `gru` and `lstm`."""

import torch

from funcnet.core import Layer
from funcnet.initializers import Initializer
from funcnet.layers.recurrent_formulas import GRU, LSTM
from funcnet.layers.recurrent_stack import Stack, plain_cell, recurrent


def rnn(
    hidden_size: int,
    num_layers: int = 1,
    nonlinearity: str = "tanh",
    bias: bool = True,
    batch_first: bool = False,
    dropout: float = 0.0,
    bidirectional: bool = False,
    *,
    weight_init: Initializer | None = None,
    bias_init: Initializer | None = None,
    dtype: torch.dtype | None = None,
) -> Layer:
    """``h_t = tanh(weight_ih x_t + bias_ih + weight_hh h_(t-1) + bias_hh)``.

    Args:
        hidden_size: the number of features of h. Torch's ``input_size``, before it, is not
            given: init finds it from x.
        num_layers: how many layers there are, each of the output of the one before.
        nonlinearity: "tanh" or "relu".
        bias: whether biases are learned.
        batch_first: whether the batch is the first dimension of x and y, not the second. That
            of ``hx`` and ``h_n`` is the second in any case.
        dropout: the probability that, in training, a value between two layers is dropped.
        bidirectional: whether each layer has a second cell that starts at the last step; y has
            the features of both.
        weight_init: default U(-b, b) with ``b = 1 / sqrt(hidden_size)``, as torch.nn.RNN.
        bias_init: default the same U(-b, b).
        dtype: of the parameters; default that of the input.

    Inputs:
        x, an input of shape (steps, batch, features) or (steps, features), floating; or a tuple
        (input, hx); or a dict with ``input`` and, if wanted, ``hx`` and ``lengths``. ``hx``, the
        first states, is of shape ``(num_layers * directions, batch, hidden_size)``, zeros by
        default. ``lengths``, int32 or int64 of shape (batch,), in any order, says how many steps
        each sequence has, in place of torch's PackedSequence; what is behind them is not read. A
        key when ``train=True``, if there is dropout.
    Returns:
        y = (output, h_n), of shapes ``(steps, batch, directions * hidden_size)`` and of hx. Given
        lengths, a sequence has the output 0 behind its last step, h_n is of its last step, and the
        other direction starts there. Where the values are not to be had, under jit and vmap, a
        length of 0 gives the first state, and one above the number of steps stands for that number.
    Learned params:
        for each layer k ``weight_ih_lk`` (hidden_size, features), ``weight_hh_lk`` (hidden_size,
        hidden_size), ``bias_ih_lk`` and ``bias_hh_lk`` (hidden_size,), and for the other direction
        the same names with ``_reverse`` at the end.
    VJP:
        ``da_t = (dy_t + dh_t) (1 - h_t^2)``, ``dh_(t-1) = weight_hh^T da_t``,
        ``dweight_ih = sum_t da_t x_t^T``, ``dweight_hh = sum_t da_t h_(t-1)^T``,
        ``dbias_ih = dbias_hh = sum_t da_t``, ``dx_t = weight_ih^T da_t``.
    Raises:
        ValueError: other shapes, and lengths outside of [1, steps].
        TypeError: other dtypes.

    Source: ``torch.nn.RNN``; Elman 1990.

    >>> import funcnet as fn
    >>> one = fn.initializers.ones()
    >>> layer = fn.rnn(1, nonlinearity="relu", bias=False, weight_init=one)
    >>> x = torch.tensor([[1.0], [2.0], [3.0]])
    >>> params, _ = layer.init(fn.key(0), x)
    >>> (output, h_n), pullback, _ = layer.vjp(params, x)
    >>> output.T, h_n
    (tensor([[1., 3., 6.]]), tensor([[6.]]))
    >>> pullback((torch.ones(3, 1), torch.zeros(1, 1)))[1].T
    tensor([[3., 2., 1.]])
    """
    cell = plain_cell("rnn", nonlinearity)
    options = hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0
    return recurrent(Stack("rnn", cell, *options), (weight_init, bias_init), dtype)


def gru(
    hidden_size: int,
    num_layers: int = 1,
    bias: bool = True,
    batch_first: bool = False,
    dropout: float = 0.0,
    bidirectional: bool = False,
    *,
    weight_init: Initializer | None = None,
    bias_init: Initializer | None = None,
    dtype: torch.dtype | None = None,
) -> Layer:
    """``h_t = (1 - z) n + z h_(t-1)`` with ``n = tanh(n_x + r n_h)``.

    The gates ``r = sigmoid(r_x + r_h)`` and ``z = sigmoid(z_x + z_h)``, and n, are of
    ``(r_x, z_x, n_x) = weight_ih x_t + bias_ih`` and
    ``(r_h, z_h, n_h) = weight_hh h_(t-1) + bias_hh``.

    Args:
        hidden_size: the number of features of h.
        num_layers, bias, batch_first, dropout, bidirectional: see `rnn`.
        weight_init: default U(-b, b) with ``b = 1 / sqrt(hidden_size)``, as torch.nn.GRU.
        bias_init: default the same U(-b, b).
        dtype: of the parameters; default that of the input.

    Inputs:
        see `rnn`.
    Returns:
        y = (output, h_n), see `rnn`.
    Learned params:
        those of `rnn`, with ``3 hidden_size`` rows for r, z and n.
    VJP:
        from the last step to the first: ``dn = dh_t (1 - z) (1 - n^2)``, ``dr = dn n_h r (1 - r)``,
        ``dz = dh_t (h_(t-1) - n) z (1 - z)``, and
        ``dh_(t-1) = dh_t z + weight_hh^T (dr, dz, r dn)``. The rest is that of `rnn`.
    Raises:
        as `rnn`.

    Source: ``torch.nn.GRU``; Cho et al. 2014.

    >>> import funcnet as fn
    >>> layer = fn.gru(4, bidirectional=True)
    >>> x = {"input": torch.ones(5, 2, 3), "lengths": torch.tensor([5, 1])}
    >>> params, _ = layer.init(fn.key(0), x)
    >>> (output, h_n), _ = layer.apply(params, x)
    >>> output.shape, h_n.shape, output[1:, 1].abs().sum()
    (torch.Size([5, 2, 8]), torch.Size([2, 2, 4]), tensor(0.))
    """
    options = hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0
    return recurrent(Stack("gru", GRU, *options), (weight_init, bias_init), dtype)


def lstm(
    hidden_size: int,
    num_layers: int = 1,
    bias: bool = True,
    batch_first: bool = False,
    dropout: float = 0.0,
    bidirectional: bool = False,
    proj_size: int = 0,
    *,
    weight_init: Initializer | None = None,
    bias_init: Initializer | None = None,
    dtype: torch.dtype | None = None,
) -> Layer:
    """``c_t = f c_(t-1) + i g``, ``h_t = o tanh(c_t)``.

    ``(i, f, g, o) = weight_ih x_t + bias_ih + weight_hh h_(t-1) + bias_hh``, sigmoids of i, f and
    o, tanh of g.

    Args:
        hidden_size: the number of features of c, and of h without projection.
        num_layers, bias, batch_first, dropout, bidirectional: see `rnn`.
        proj_size: if not 0, ``h_t = weight_hr (o tanh(c_t))`` has this many features.
        weight_init: default U(-b, b) with ``b = 1 / sqrt(hidden_size)``, as torch.nn.LSTM.
        bias_init: default the same U(-b, b).
        dtype: of the parameters; default that of the input.

    Inputs:
        see `rnn`, but ``hx`` is a tuple (h_0, c_0).
    Returns:
        y = (output, (h_n, c_n)), see `rnn`.
    Learned params:
        those of `rnn`, with ``4 hidden_size`` rows for i, f, g and o, and, with a projection,
        ``weight_hr_lk`` (proj_size, hidden_size).
    VJP:
        from the last step to the first: ``dc = dc_t + dh_t o (1 - tanh(c_t)^2)``,
        ``di = dc g i (1 - i)``, ``df = dc c_(t-1) f (1 - f)``, ``dg = dc i (1 - g^2)``,
        ``do = dh_t tanh(c_t) o (1 - o)``, ``dc_(t-1) = dc f`` and
        ``dh_(t-1) = weight_hh^T (di, df, dg, do)``. The rest is that of `rnn`.
    Raises:
        as `rnn`.

    Source: ``torch.nn.LSTM``; Hochreiter and Schmidhuber 1997; Sak et al. 2014 for the projection.

    >>> import funcnet as fn
    >>> layer = fn.lstm(4, num_layers=2, proj_size=3)
    >>> x = torch.ones(5, 2, 3)
    >>> params, _ = layer.init(fn.key(0), x)
    >>> (output, (h_n, c_n)), _ = layer.apply(params, x)
    >>> output.shape, h_n.shape, c_n.shape
    (torch.Size([5, 2, 3]), torch.Size([2, 2, 3]), torch.Size([2, 2, 4]))
    """
    options = hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size
    return recurrent(Stack("lstm", LSTM, *options), (weight_init, bias_init), dtype)
