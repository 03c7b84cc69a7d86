"""Lookahead against its formula, written out."""

import torch
from torch import nn

from fieldmark.training.lookahead import Lookahead


def test_the_exchange_follows_the_formula_and_the_end_adopts_the_slow() -> None:
    network = nn.Linear(1, 1, bias=False)
    network.weight.data.fill_(1.0)
    ahead = Lookahead(network, decay=0.9, every=2, total_steps=6)
    slow, fast = 1.0, 1.0
    for step in range(1, 7):
        network.weight.data += 1.0
        fast += 1.0
        ahead.update(step)
        if step == 6:
            fast = slow
        elif step % 2 == 0:
            kept = 0.9**2 * (step / 6) ** 3
            slow = fast = kept * slow + (1 - kept) * fast
        assert abs(network.weight.item() - fast) < 1e-6
    assert fast < 7  # pulled back


def test_a_skipped_update_exchanges_nothing() -> None:
    network = nn.Linear(1, 1, bias=False)
    ahead = Lookahead(network, decay=0.5, every=1, total_steps=9)
    network.weight.data += 5
    before = network.weight.clone()
    ahead.update(3, torch.tensor(False))
    assert torch.equal(network.weight, before)
    ahead.update(3, torch.tensor(True))
    assert not torch.equal(network.weight, before)
    assert torch.equal(ahead.state_dict()["slow"][0], network.weight)


def test_a_state_goes_on_where_it_was() -> None:
    network = nn.Linear(2, 2)
    ahead = Lookahead(network, decay=0.5, every=1, total_steps=9)
    with torch.no_grad():
        network.weight += 1
    ahead.update(1)
    kept = [tensor.clone() for tensor in ahead.state_dict()["slow"]]
    again = Lookahead(nn.Linear(2, 2), decay=0.5, every=1, total_steps=9)
    again.load_state_dict({"slow": kept})
    for a, b in zip(again.state_dict()["slow"], kept, strict=True):
        assert torch.equal(a, b)
