"""A GRU over packed sequences, faster on the CPU than torch's own: few large matrix products, few passes.

Shapes: T packed events, L time steps, H hidden size; step t has b_t events, b falling.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import PackedSequence


class PackedGRU(nn.GRU):
    """`torch.nn.GRU` without bias, for packed sequences from a zero state: same parameters, equations and results.

    On a GPU and in half precision it is torch's.

    Args:
        dropout: on what each layer but the last hands to the next one, while training; as `torch.nn.GRU`'s.
    """

    def __init__(self, input_size: int, hidden_size: int, num_layers: int, dropout: float = 0.0) -> None:
        super().__init__(input_size, hidden_size, num_layers, bias=False, dropout=dropout if num_layers > 1 else 0.0)

    def forward(self, packed: PackedSequence) -> PackedSequence:
        """Outputs of the last layer, in the layout of ``packed``."""
        events, batch_sizes = packed.data, packed.batch_sizes
        if events.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return self._by_torch(packed)
        sizes = batch_sizes.tolist()
        for layer in range(self.num_layers):
            weights = getattr(self, f"weight_ih_l{layer}"), getattr(self, f"weight_hh_l{layer}")
            events = _PackedLayer.apply(self._between(layer, events), *weights, sizes)
        return packed._replace(data=events)

    def _by_torch(self, packed: PackedSequence) -> PackedSequence:
        if not (self.dropout and self.training):
            return super().forward(packed)[0]
        # A layer at a time: cuDNN's own dropout has a generator that no seed of a step resets.
        events, batch_sizes = packed.data, packed.batch_sizes
        for layer in range(self.num_layers):
            events = self._between(layer, events)
            weights = [getattr(self, f"weight_ih_l{layer}"), getattr(self, f"weight_hh_l{layer}")]
            start = events.new_zeros(1, int(batch_sizes[0]), self.hidden_size)
            events, _ = torch._VF.gru(events, batch_sizes, start, weights, False, 1, 0.0, True, False)
        return packed._replace(data=events)

    def _between(self, layer: int, events: torch.Tensor) -> torch.Tensor:
        """What a layer sees of the ``events`` that the one before it gave."""
        return nn.functional.dropout(events, self.dropout, self.training) if layer and self.dropout else events


class _PackedLayer(torch.autograd.Function):
    """One layer: r = sigmoid, z = sigmoid, n = tanh(input part + r * recurrent part), h = n + z * (last h - n).

    Backward has one product a step, as the recurrence demands; those for inputs and weights are of all T events at
    once. torch's own makes one of each kind a step.
    """

    @staticmethod
    def forward(ctx, events, input_weight, recurrent_weight, sizes):
        hidden = recurrent_weight.shape[1]
        gates = events @ input_weight.T  # [T, 3H]: r, z, n
        recurrent = gates.new_zeros(len(events), hidden)  # of n, before r scales it
        output = gates.new_empty(len(events), hidden)
        for_gates, for_candidate = recurrent_weight[: 2 * hidden].T, recurrent_weight[2 * hidden :].T
        start = last = 0
        for step, size in enumerate(sizes):
            stop = start + size
            own, candidate = gates[start:stop, : 2 * hidden], gates[start:stop, 2 * hidden :]
            if step:
                state = output[last : last + size]
                own.addmm_(state, for_gates)
                torch.mm(state, for_candidate, out=recurrent[start:stop])
            own.sigmoid_()
            candidate.addcmul_(own[:, :hidden], recurrent[start:stop]).tanh_()
            if step:
                torch.sub(state, candidate, out=output[start:stop])
            else:
                torch.neg(candidate, out=output[start:stop])
            output[start:stop].mul_(own[:, hidden:]).add_(candidate)
            last, start = start, stop
        ctx.save_for_backward(events, input_weight, recurrent_weight, gates, recurrent, output)
        ctx.sizes = sizes
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        events, input_weight, recurrent_weight, gates, recurrent, output = ctx.saved_tensors
        sizes, hidden = ctx.sizes, output.shape[1]
        states = _states_before(output, sizes)
        reset, update, candidate = gates.split(hidden, dim=1)
        # Everything that a step's gradient is multiplied by is known before the recurrence: made for all steps at once.
        of_candidate = (1 - update).mul_(1 - candidate.square())
        factors = torch.stack(
            [
                (of_candidate * recurrent).mul_(reset).mul_(1 - reset),
                (states - candidate).mul_(update).mul_(1 - update),
                of_candidate * reset,
            ],
            dim=1,
        )  # [T, 3, H]
        total = gradient.clone()  # [T, H], gets the gradients from the steps after
        stop = len(output)
        for step in range(len(sizes) - 1, -1, -1):
            start = stop - sizes[step]
            own, part = total[start:stop], factors[start:stop]
            part.mul_(own[:, None])
            if step:
                carried = (own * update[start:stop]).addmm_(part.view(-1, 3 * hidden), recurrent_weight)
                before = start - sizes[step - 1]
                total[before : before + sizes[step]] += carried
            stop = start
        through = factors.view(-1, 3 * hidden)
        recurrent_gradient = through[sizes[0] :].T @ states[sizes[0] :]
        # The input reaches the candidate without the reset gate.
        torch.mul(total, of_candidate, out=through[:, 2 * hidden :])
        return through @ input_weight, through.T @ events, recurrent_gradient, None


def _states_before(output: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """The state that each packed event was met with, [T, H]."""
    states = torch.zeros_like(output)
    start = last = 0
    for step, size in enumerate(sizes):
        if step:
            states[start : start + size] = output[last : last + size]
        last, start = start, start + size
    return states
