from dataclasses import replace

import pytest
import torch
from torch import nn

from dalle2.config import PRESETS
from dalle2.optimizer import Muon, build_optimizers, orthogonalize

CONFIG = replace(PRESETS["base"].prior.train, weight_decay=0.1)


def build_module():
    return nn.Sequential(nn.Linear(9, 12), nn.GroupNorm(1, 12), nn.Conv2d(12, 16, 3),
                         nn.Conv2d(16, 3, 3), nn.Embedding(40, 16))


def test_only_matrices_decay_and_muon_takes_those_of_layers():
    module = build_module()
    (optimizer,) = build_optimizers(module, CONFIG)
    decayed, others = optimizer.param_groups
    assert [p.ndim for p in decayed["params"]] == [2, 4, 4, 2] and decayed["weight_decay"] == 0.1
    assert {p.ndim for p in others["params"]} == {1} and others["weight_decay"] == 0
    adamw, muon = build_optimizers(module, replace(CONFIG, muon_lr=0.05))
    (group,) = muon.param_groups
    assert [id(p) for p in group["params"]] == [id(module[0].weight), id(module[2].weight)]
    assert group["peak_lr"] == 0.05 and group["weight_decay"] == 0.1
    assert [g["peak_lr"] for g in adamw.param_groups] == [CONFIG.lr] * 2
    assert sum(len(g["params"]) for g in adamw.param_groups) + 2 == len(list(module.parameters()))


@pytest.mark.parametrize("shape", [(8, 8), (8, 300), (128, 200)])
def test_orthogonalized_matrices_keep_their_directions(shape):
    """Singular values near 1, singular vectors those of before; against the iteration on X."""
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape)
    out = orthogonalize(matrices)
    values = torch.linalg.svdvals(out)
    assert values.max() < 1.3 and values.median() > 0.6
    x = matrices / matrices.flatten(1).norm(dim=1)[:, None, None]
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    torch.testing.assert_close(out, x, atol=2e-3, rtol=0)


def test_muon_moves_each_matrix_by_its_learning_rate():
    weight, kernel = nn.Parameter(torch.randn(16, 8)), nn.Parameter(torch.randn(8, 16, 3, 3))
    before = weight.detach().clone(), kernel.detach().clone()
    optimizer = Muon([weight, kernel], lr=0.1)
    weight.grad, kernel.grad = 1e3 * torch.randn(16, 8), 1e-3 * torch.randn(8, 16, 3, 3)
    optimizer.step()
    for param, old, scale in ((weight, before[0], 2 ** 0.5), (kernel, before[1], 1)):
        moved = torch.linalg.svdvals((param.detach() - old).flatten(1)) / 0.1 / scale
        assert 0.5 < moved.min() and moved.max() < 1.3
