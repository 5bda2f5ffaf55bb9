"""Multinomial logistic regression by L-BFGS, over the rows of all processes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from densessl.evaluation._together import summed

_BLOCK = 1 << 14  # rows whose logits are held at once


def logistic_regression(rows: Tensor, labels: Tensor, classes: int, c: float, iterations: int) -> Tensor:
    """Weights and biases (C + 1, classes) with the least ``c * sum of cross entropies + half the squared weights``.

    The bias is not penalised. A class without a row gets no weight and a bias of minus infinity.

    Args:
        rows: The features that this process holds, floating point ``(N, C)``.
        labels: Class of each row, int64 ``(N,)``.
        classes: Number of classes.
        c: The inverse of the penalty, as scikit-learn and cuML have it.
        iterations: Greatest number of iterations of L-BFGS.
    """
    try:
        from scipy.optimize import minimize
    except ImportError as error:
        raise ImportError("logistic regression needs SciPy: pip install 'densessl[evaluation]'") from error
    counts = summed(torch.bincount(labels, minlength=classes))
    present = counts.nonzero()[:, 0]
    compact = torch.zeros(classes, dtype=torch.int64, device=labels.device)
    compact[present] = torch.arange(len(present), device=labels.device)
    targets, total, shape = compact[labels], int(counts.sum()), (rows.shape[1] + 1, len(present))

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weight = torch.from_numpy(flat).view(shape).to(rows.device)
        # The last row of the sums is that of the bias; the very last entry is the loss.
        sums = torch.zeros(shape[0] * shape[1] + 1, dtype=torch.float64, device=rows.device)
        gradient = sums[:-1].view(shape)
        for part, target in zip(rows.split(_BLOCK), targets.split(_BLOCK), strict=True):
            values = part.double()
            logs = F.log_softmax(torch.addmm(weight[-1], values, weight[:-1]), dim=1)
            sums[-1] -= logs.gather(1, target[:, None]).sum()
            errors = logs.exp()
            errors[torch.arange(len(target), device=target.device), target] -= 1
            gradient[:-1] += values.mT @ errors
            gradient[-1] += errors.sum(0)
        sums = summed(sums) / total
        loss = float(sums[-1] + weight[:-1].square().sum() / (2 * c * total))
        gradient = sums[:-1].view(shape)
        gradient[:-1] += weight[:-1] / (c * total)
        return loss, gradient.flatten().cpu().numpy()

    options = {"maxiter": iterations, "maxcor": 5, "maxls": 50, "ftol": 1e-12, "gtol": 1e-8}
    start = np.zeros(shape[0] * shape[1])
    best = minimize(objective, start, jac=True, method="L-BFGS-B", options=options).x
    weight = torch.zeros(shape[0], classes, dtype=torch.float64)
    weight[-1] = -torch.inf
    weight[:, present.cpu()] = torch.from_numpy(best).view(shape)
    return weight.to(rows.device)
