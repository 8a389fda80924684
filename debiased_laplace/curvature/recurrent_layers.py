r"""Recurrent layers as linear maps, computed step by step instead of in one call of torch.

A recurrent layer maps its inputs $x_t$ and its state $h_{t-1}$ linearly; cells differ in what they make of the two
images $W x_t + b$ and $V h_{t-1} + c$. Over all steps both are linear maps at T positions of a sample, whose cotangents
give the rows of W, V, b and c. The cotangents of the second map are gradients with respect to zeros that are added to
its images, because its inputs become known one step at a time.

References:
    Hochreiter & Schmidhuber (1997), Neural Computation 9(8); Cho et al. (2014), arXiv 1406.1078, with the reset gate
    after the product, as in torch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

State = tuple[Tensor, ...]
Cell = Callable[[Tensor, Tensor, State], State]
"""Map from the image of the input, the image of the state and the state to the next state, the output first."""


@dataclass(frozen=True, eq=False)
class StepMap:
    """A linear map that a recurrent layer applies at every step.

    Attributes:
        arguments: inputs (T, N, i), weight (o, i) and bias (o,) or None.
        output: (T, N, o).
        edge: where its cotangents arrive; None without a graph.
    """

    arguments: tuple[Tensor, Tensor, Tensor | None]
    output: Float[Tensor, "T N o"]
    edge: Any


def _lstm(x: Tensor, h: Tensor, state: State) -> State:
    i, f, g, o = (x + h).chunk(4, dim=-1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(x: Tensor, h: Tensor, state: State) -> State:
    (r, z, n), (of_r, of_z, of_n) = x.chunk(3, dim=-1), h.chunk(3, dim=-1)
    new = (n + (r + of_r).sigmoid() * of_n).tanh()
    z = (z + of_z).sigmoid()
    return (new + z * (state[0] - new),)


def _tanh(x: Tensor, h: Tensor, _: State) -> State:
    return ((x + h).tanh(),)


def _relu(x: Tensor, h: Tensor, _: State) -> State:
    return ((x + h).relu(),)


_CELLS: dict[Any, Cell] = {
    torch.lstm: _lstm,
    torch.gru: _gru,
    torch.rnn_tanh: _tanh,
    torch.rnn_relu: _relu,
}
_SINGLE_CELLS: dict[Any, Cell] = {
    torch.lstm_cell: _lstm,
    torch.gru_cell: _gru,
    torch.rnn_tanh_cell: _tanh,
    torch.rnn_relu_cell: _relu,
}


def as_steps(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, list[StepMap]] | None:
    """Compute a recurrent layer step by step.

    Args:
        function: a function of torch.
        args: its arguments.

    Returns:
        What the function returns, and the linear maps in it; None for other functions, for packed sequences, and for
        dropout between layers.
    """
    if function in _SINGLE_CELLS:
        x, state, *parameters = args
        states = tuple(state) if isinstance(state, list | tuple) else (state,)
        layer = _Layer(_SINGLE_CELLS[function], *parameters[:2], *(parameters[2:] or (None, None)))
        steps, maps = layer.run(x[None], states)
        return tuple(s[0] for s in steps) if len(steps) > 1 else steps[0][0], maps
    if function not in _CELLS or not isinstance(args[2], list | tuple):
        return None
    x, state, parameters, has_biases, n_layers, dropout, training, bidirectional, batch_first = args
    if training and dropout:
        return None
    n_directions = 2 if bidirectional else 1
    n_parameters = len(parameters) // (n_layers * n_directions)
    states = tuple(state) if isinstance(state, list | tuple) else (state,)
    h, last, maps = x.transpose(0, 1) if batch_first else x, [], []
    for number in range(n_layers):
        outputs = []
        for direction in range(n_directions):
            i = number * n_directions + direction
            own = list(parameters[i * n_parameters : (i + 1) * n_parameters])
            if not has_biases:
                own[2:2] = [None, None]
            steps, of_run = _Layer(_CELLS[function], *own).run(
                h.flip(0) if direction else h, tuple(s[i] for s in states)
            )
            outputs.append(steps[0].flip(0) if direction else steps[0])
            last.append([s[-1] for s in steps])
            maps += of_run
        h = torch.cat(outputs, dim=-1)
    final = [torch.stack(s) for s in zip(*last, strict=True)]
    return (h.transpose(0, 1) if batch_first else h, *final), maps


@dataclass(frozen=True, eq=False)
class _Layer:
    """A layer in one direction.

    Attributes:
        cell: of the layer.
        of_input: weight of the inputs.
        of_state: weight of the state.
        input_bias: added to the image of the inputs; None: nothing.
        state_bias: added to the image of the state; None: nothing.
        projection: weight that maps the output of a cell to its next state; None: the identity.
    """

    cell: Cell
    of_input: Tensor
    of_state: Tensor
    input_bias: Tensor | None
    state_bias: Tensor | None
    projection: Tensor | None = None

    def run(self, x: Float[Tensor, "T N i"], state: State) -> tuple[list[Tensor], list[StepMap]]:
        """Return the states after every step, stacked, and the linear maps."""
        images = linear(x, self.of_input, self.input_bias)
        of_state = _Steps(self.of_state, self.state_bias, images)
        projected = None if self.projection is None else _Steps(self.projection, None, images)
        states = []
        for image in images:
            state = self.cell(image, of_state(state[0]), state)
            if projected is not None:
                state = (projected(state[0]), *state[1:])
            states.append(state)
        maps = [StepMap((x, self.of_input, self.input_bias), images, _edge(images)), of_state.taken()]
        maps += [] if projected is None else [projected.taken()]
        return [torch.stack(s) for s in zip(*states, strict=True)], maps


class _Steps:
    """A linear map that is applied at one step after another."""

    def __init__(self, weight: Tensor, bias: Tensor | None, like: Float[Tensor, "T N _"]):
        self.weight, self.bias = weight, bias
        needs_graph = torch.is_grad_enabled()
        self.zeros = like.new_zeros(*like.shape[:2], len(weight)).requires_grad_(needs_graph)
        self._left: Iterator[Tensor] = iter(self.zeros.unbind())
        self._inputs: list[Tensor] = []
        self._outputs: list[Tensor] = []

    def __call__(self, x: Float[Tensor, "N i"]) -> Float[Tensor, "N o"]:
        image = linear(x, self.weight, self.bias) + next(self._left)
        self._inputs.append(x.detach())
        self._outputs.append(image.detach())
        return image

    def taken(self) -> StepMap:
        """Return all steps as one map."""
        inputs, outputs = torch.stack(self._inputs), torch.stack(self._outputs)
        return StepMap((inputs, self.weight, self.bias), outputs, _edge(self.zeros))


def _edge(x: Tensor) -> Any:
    return torch.autograd.graph.get_gradient_edge(x) if x.requires_grad else None
