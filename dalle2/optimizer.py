"""The optimizers: AdamW, and Muon for a network that must learn much from few samples.

Muon (Jordan 2024, kellerjordan.github.io/posts/muon) replaces the momentum of a matrix by the
nearest orthogonal one, so that every direction is learned at the same rate. `torch.optim.Muon`
takes matrices only; this one takes convolution kernels as well, as (out, in * height * width), and
it orthogonalizes in the small Gram matrix and matrices of one shape together: on two CPU cores
43 ms instead of 78 for the toy preset's base stage.

In a U-Net it needs weight decay: without it the maps of the deep levels grow until nothing passes
from them to the upper ones (docs/results/training.md).
"""

from collections import defaultdict

import torch
from torch import nn

from dalle2.sharding import gather, scatter_like

NEWTON_SCHULZ = 3.4445, -4.775, 2.0315  # coefficients of Jordan 2024
NEWTON_SCHULZ_STEPS = 5


def build_optimizers(module, config):
    """[AdamW] for a TrainConfig, or [AdamW, Muon] where `muon_lr` asks for it. Each group carries
    its `peak_lr`. Matrices and kernels decay; gains, biases and single vectors do not."""
    params = [p for p in module.parameters() if p.requires_grad]
    matrices = list_matrices(module) if config.muon_lr else []
    chosen = {id(p) for p in matrices}
    rest = [p for p in params if id(p) not in chosen]
    groups = [{"params": [p for p in rest if is_matrix(p)],
               "weight_decay": config.weight_decay, "peak_lr": config.lr},
              {"params": [p for p in rest if not is_matrix(p)],
               "weight_decay": 0.0, "peak_lr": config.lr}]
    optimizers = [torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.adam_beta2),
                                    eps=config.adam_eps, fused=True)]
    if matrices:
        optimizers.append(Muon([{"params": matrices, "peak_lr": config.muon_lr}],
                               lr=config.muon_lr, weight_decay=config.weight_decay))
    return optimizers


def is_matrix(param):
    return sum(side > 1 for side in param.shape) >= 2


def list_matrices(module):
    """The trainable weights of linear and convolution layers with eight or more rows and columns.
    """
    weights = [getattr(layer, name, None) for layer in module.modules()
               if isinstance(layer, (nn.Linear, nn.Conv2d, nn.MultiheadAttention))
               for name in ("weight", "in_proj_weight")]
    return list(dict.fromkeys(w for w in weights if w is not None and w.requires_grad
                              and min(w.flatten(1).shape) >= 8))


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalized; decoupled weight decay. Like torch's fused AdamW it leaves
    everything alone at a step where its attribute `found_inf`, a tensor, is not zero."""

    _step_supports_amp_scaling = True  # torch's GradScaler sets found_inf and waits for nothing

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if params:
                self._update(params, group["lr"], group["momentum"], group["weight_decay"])

    def _update(self, params, lr, momentum, weight_decay):
        """All in lists and stacks: on a GPU a launch costs more than what most of them compute."""
        grads, keep, keep_momentum = [param.grad for param in params], 1.0, momentum
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None:  # decided on the device: nothing waits for the answer
            keep = 1 - found_inf
            is_finite, zero = keep > 0, torch.zeros_like(keep)
            grads = [torch.where(is_finite, grad, zero) for grad in grads]
            keep_momentum = torch.where(is_finite, momentum, 1.0)
        for param in params:
            if not self.state[param]:
                self.state[param]["momentum"] = torch.zeros_like(param)
        momenta = [self.state[param]["momentum"] for param in params]
        torch._foreach_mul_(momenta, keep_momentum)
        torch._foreach_add_(momenta, grads)
        by_shape = defaultdict(list)
        for param, update in zip(params, torch._foreach_add(grads, momenta, alpha=momentum)):
            update = gather(update).flatten(1)
            is_tall = update.shape[0] > update.shape[1]
            by_shape[update.shape].append((param, update.T if is_tall else update))
        torch._foreach_mul_(params, 1 - keep * lr * weight_decay)
        for shape, rows in by_shape.items():
            updates = keep * orthogonalize(torch.stack([update for _, update in rows]))
            updates = updates.mT.contiguous() if shape[0] > shape[1] else updates
            same = [param for param, _ in rows]
            torch._foreach_add_(same, [scatter_like(update.view(param.shape), param)
                                       for param, update in zip(same, updates)],
                                alpha=-lr * max(1, shape[0] / shape[1]) ** 0.5)


def orthogonalize(matrices):
    """Wide matrices (B, R, C), R <= C, with all their singular values brought near 1: Newton-Schulz
    iterations X <- (a + b A + c A^2) X with A = X X^T. Where C is much larger than R they are
    carried out on A (B, R, R) alone."""
    a, b, c = NEWTON_SCHULZ
    x = matrices / (matrices.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    on_gram = x.shape[2] > 1.5 * x.shape[1]  # where both ways take the same multiplications
    gram = factor = product = None
    for step in range(NEWTON_SCHULZ_STEPS):
        gram = (torch.bmm(torch.bmm(factor, gram), factor) if step and on_gram
                else torch.bmm(x, x.mT))
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b A + c A^2
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        if not on_gram:
            x = torch.bmm(factor, x)
        else:
            product = factor if product is None else torch.bmm(factor, product)
    return torch.bmm(product, x) if on_gram else x
