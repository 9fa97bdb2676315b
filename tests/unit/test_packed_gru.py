"""The packed GRU against torch's, and its gradients against finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from gru4recf_dist.model.packed_gru import PackedGRU

SIZES = {"one step": [4], "one sequence": [1, 1, 1], "equal": [3, 3, 3], "falling": [5, 5, 3, 2, 2, 1], "one": [1]}


def _both(layers: int, dtype: torch.dtype = torch.float64) -> tuple[nn.GRU, PackedGRU]:
    torch.manual_seed(layers)
    theirs, ours = nn.GRU(6, 4, layers, bias=False).to(dtype), PackedGRU(6, 4, layers).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def _run(gru: nn.GRU, events: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
    """Output, and gradients of a sum with fixed weights for the events and every parameter."""
    events = events.clone().requires_grad_()
    found = gru(PackedSequence(events, torch.tensor(sizes)))
    output = (found if isinstance(found, PackedSequence) else found[0]).data
    weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view_as(output)
    (output * weights).sum().backward()
    return [output.detach(), events.grad, *(parameter.grad for parameter in gru.parameters())]


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("layers", [1, 2])
def test_outputs_and_all_gradients_are_torchs(sizes, layers):
    theirs, ours = _both(layers)
    events = torch.randn(sum(sizes), 6, dtype=torch.float64)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    for found, expected in zip(_run(ours, events, sizes), _run(theirs, events, sizes), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_saturated_gates_give_torchs_gradients_in_float32_too():
    theirs, ours = _both(1, torch.float32)
    events = 40 * torch.randn(sum(SIZES["falling"]), 6)
    for found, expected in zip(
        _run(ours, events, SIZES["falling"]), _run(theirs, events, SIZES["falling"]), strict=True
    ):
        assert found.isfinite().all()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", ["forward", "_by_torch"])
def test_dropout_acts_between_the_layers_alone(way):
    torch.manual_seed(1)
    ours = PackedGRU(6, 4, 3, dropout=0.4).double()
    layers = [nn.GRU(width, 4, bias=False).double() for width in (6, 4, 4)]
    for number, layer in enumerate(layers):
        layer.load_state_dict({f"weight_{part}_l0": getattr(ours, f"weight_{part}_l{number}") for part in ("ih", "hh")})
    sizes = torch.tensor(SIZES["falling"])
    events = torch.randn(int(sizes.sum()), 6, dtype=torch.float64)
    torch.manual_seed(5)
    found = getattr(ours.train(), way)(PackedSequence(events, sizes)).data
    torch.manual_seed(5)
    masks = [nn.functional.dropout(torch.ones(len(events), 4, dtype=torch.float64), 0.4) for _ in range(2)]
    assert (masks[0] == 0).any() and (masks[0] > 0).any() and not torch.equal(*masks)
    expected = events
    for layer, mask in zip(layers, [None, *masks], strict=True):
        expected = layer(PackedSequence(expected if mask is None else expected * mask, sizes))[0].data
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    whole = ours.eval()(PackedSequence(events, sizes)).data
    for layer in layers:
        events = layer(PackedSequence(events, sizes))[0].data
    torch.testing.assert_close(whole, events, rtol=1e-12, atol=1e-12)


def test_one_layer_draws_no_mask():
    ours = PackedGRU(6, 4, 1, dropout=0.4).train()
    before = torch.get_rng_state()
    for way in (ours.forward, ours._by_torch):
        way(PackedSequence(torch.ones(3, 6), torch.tensor([2, 1])))
    assert torch.equal(torch.get_rng_state(), before)


def test_it_passes_gradcheck():
    _, ours = _both(1)
    sizes = torch.tensor([3, 2, 1])
    events = torch.randn(6, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda value: ours(PackedSequence(value, sizes)).data, (events,))


def test_a_backward_can_be_repeated_and_changes_no_input():
    _, ours = _both(1)
    events = torch.randn(6, 6, dtype=torch.float64, requires_grad=True)
    before = [events.detach().clone(), *(parameter.detach().clone() for parameter in ours.parameters())]
    output = ours(PackedSequence(events, torch.tensor([3, 2, 1]))).data
    first = torch.autograd.grad(output.sum(), events, retain_graph=True)
    second = torch.autograd.grad(output.sum(), events)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(before, [events, *ours.parameters()], strict=True))


def test_half_precision_is_left_to_torch():
    theirs, ours = _both(1, torch.float32)
    packed = PackedSequence(torch.randn(6, 6), torch.tensor([3, 2, 1]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(packed).data, theirs(packed)[0].data)
