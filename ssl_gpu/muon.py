"""Muon, an optimiser for the matrices inside a network: the momentum, with all its singular values made nearly one.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks" (kellerjordan.github.io/posts/muon), at
the scale of Liu et al. 2025, "Muon is Scalable for LLM Training" (arXiv 2502.16982, eq. 4). torch.optim.Muon
with adjust_lr_fn="match_rms_adamw" is the same for 2-D weights, in bfloat16; the Conformer's pointwise convolutions
have three dimensions, and this one takes matrices of one shape together.
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ssl_gpu import runtime

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Jordan et al.: steepest at 0, so that small singular values grow fastest
ITERATIONS = 5
WIDE = 2  # times as many columns as rows: from there on it is quicker to iterate on products of rows. On a CPU a
# [128, 512] matrix takes 0.6 of the time so, a [128, 256] one 0.85, a square one would take 1.5 times as long.
UPDATE_RMS = 0.2  # of Liu et al.: the usual size of AdamW's update, so that both take one learning rate
SMALLEST = 64  # rows and columns: narrower ones, of 8 to 24 here, have hardly a spectrum to level


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The weights inside a model that train and act as matrices of at least SMALLEST rows and columns.

    Of all linear layers and convolutions but the last one registered, which is the output; convolutions as their
    outputs by all the rest. Filters of one channel each, of a waveform or depthwise, and tables are no such matrices.
    """
    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d))]
    return [layer.weight for layer in layers[:-1] if layer.weight.requires_grad and layer.weight.shape[1] > 1
            and min(layer.weight.flatten(1).shape) >= SMALLEST]


def orthogonalised(matrix: Tensor) -> Tensor:
    """[..., row, column] -> the same singular vectors, singular values from 0.68 to 1.21 where they were above
    0.15 % of the Frobenius norm: the Newton-Schulz iteration of Jordan et al. Cheapest with rows <= columns. In the
    matrix's dtype, whatever autocast says.
    """
    first, third, fifth = COEFFICIENTS
    with runtime.autocast(matrix.device, False):
        x = matrix / torch.linalg.matrix_norm(matrix, keepdim=True).clamp(min=1e-7)
        x = x.reshape(-1, *matrix.shape[-2:])
        if x.shape[-1] >= WIDE * x.shape[-2] and has_whole_products(x):
            return (polynomial_of_gram(x @ x.mT) @ x).reshape(matrix.shape)
        for _ in range(ITERATIONS):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=third, alpha=fifth), x, beta=first)
        return x.reshape(matrix.shape)


def has_whole_products(matrix: Tensor) -> bool:
    """Whether products of such matrices are known to have the 24 bits of float32 or more, not TF32's 11 or bfloat16's
    8."""
    if matrix.dtype == torch.float64:
        return True
    try:
        return matrix.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # where torch.backends...fp32_precision has set less for one backend, torch has no answer
        return False


def polynomial_of_gram(gram: Tensor) -> Tensor:
    """[batch, row, row], X X' of a matrix X -> P with P X the result of the iteration on X.

    Every iteration multiplies X by a polynomial of X X', so P and the next X X' follow from X X' alone: 17 products of
    [row, row] and 2 with X, instead of 5 and 10. The price is precision: roundings make small eigenvalues of X X'
    negative, every iteration multiplies these by 11.9, and below 0 the polynomials have no bound. In float32 P X is
    off by up to 3e-4, relative, in the cases of tests/test_muon.py, where the plain iteration is by 5e-6; in bfloat16
    it came out 2,000 times too large.
    """
    first, third, fifth = COEFFICIENTS
    product = None
    for index in range(ITERATIONS):
        rest = torch.baddbmm(gram, gram, gram, beta=third, alpha=fifth)   # the factor of X, less `first`
        if product is None:
            product = rest + first * torch.eye(rest.shape[-1], dtype=rest.dtype, device=rest.device)
        else:
            product = torch.baddbmm(product, rest, product, beta=first)
        if index < ITERATIONS - 1:
            half = torch.baddbmm(gram, rest, gram, beta=first)
            gram = torch.baddbmm(half, half, rest, beta=first)
    return product


class Muon(torch.optim.Optimizer):
    """params: weights of two dimensions or more, each as the matrix [first, rest]. Every step moves a weight by lr
    times an update, of RMS near UPDATE_RMS where gradients have full rank, after a decay by lr * weight_decay as
    AdamW's.

    lr: of a group it may also be a tensor [] on the weights' device, as for torch's, that a CUDA graph reads anew.
    momentum: decay of the average of the gradients, with Nesterov's look ahead.

    Raises ValueError for a weight of fewer dimensions.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.ndim < 2:
                    raise ValueError(f"Muon takes weights of two dimensions or more, got shape {list(weight.shape)}")

    @torch.no_grad()
    def step(self) -> None:
        """One update of every weight that has a gradient."""
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            for weight in weights:
                if not self.state[weight]:
                    self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
            averages, grads = [self.state[weight]["momentum_buffer"] for weight in weights], [w.grad for w in weights]
            torch._foreach_lerp_(averages, grads, 1 - group["momentum"])
            updates = self._updates(torch._foreach_lerp(grads, averages, group["momentum"]))
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            if isinstance(group["lr"], Tensor):                         # alpha must be a number
                torch._foreach_mul_(updates, group["lr"])
                torch._foreach_sub_(weights, updates)
            else:
                torch._foreach_add_(weights, updates, alpha=-group["lr"])

    @staticmethod
    def _updates(gradients: Sequence[Tensor]) -> list[Tensor]:
        """Of the matrices [first, rest] alike, all that have one shape, upright or not, together."""
        upright = [len(gradient) > gradient[0].numel() for gradient in gradients]
        flat = [gradient.flatten(1).mT if up else gradient.flatten(1) for gradient, up in zip(gradients, upright)]
        same: dict[torch.Size, list[int]] = {}
        for index, matrix in enumerate(flat):
            same.setdefault(matrix.shape, []).append(index)
        for (_, columns), indices in same.items():
            scaled = UPDATE_RMS * columns ** 0.5 * orthogonalised(torch.stack([flat[index] for index in indices]))
            for index, update in zip(indices, scaled):
                flat[index] = update.mT if upright[index] else update
        # With a transposed tensor among them, _foreach_add_ would add one at a time.
        return [matrix.reshape(gradient.shape).contiguous() for matrix, gradient in zip(flat, gradients)]
