"""Auxiliary losses of routers. Each is computed per router and averaged over the routers; padded tokens count for nothing.

With P_i the mean over tokens of softmax(logits)_i, and n_i the mean number of times that a token chooses expert i (sum n_i = k):
- "switch": N sum_i (n_i / k) P_i. Minimum 1, at uniform load (Switch Transformers, arXiv 2101.03961, eq. 4; for k > 1 divided by k).
- "mixtral": N sum_i n_i P_i. Minimum k (Mixtral in transformers: load_balancing_loss_func; MixLoRA, arXiv 2404.15159, uses it).
- "cv2": the squared coefficient of variation over the experts of their summed gates (Shazeer et al., arXiv 1701.06538, eq. 7). Where task
  types are given, LoRAMoE's localized balance constraint instead (`localized_balance`).
- z-loss: mean of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, eq. 5).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from fusedmerge.errors import ShapeError

if TYPE_CHECKING:
    from fusedmerge.moe.config import LoRAMoEConfig
    from fusedmerge.moe.routing import Record

__all__ = ["balance_loss", "localized_balance", "total_loss", "z_loss"]

_DELTA = 0.1  # LoRAMoE's delta


def total_loss(
    records: Sequence[Record],
    config: LoRAMoEConfig,
    mask: torch.Tensor | None,
    task_types: torch.Tensor | None = None,
    device: torch.device | None = None,
) -> torch.Tensor:
    """balance_loss_coef * mean balance loss + z_loss_coef * mean z-loss, over the routers in `records`; 0 for none."""
    assert config.balance_loss_coef is not None
    losses = []
    for record in records:
        weights = _token_weights(record, mask)
        loss = record.logits.new_zeros(())
        if config.balance_loss_coef and config.balance_loss != "none":
            if task_types is not None and config.expert_types is not None:
                balance = localized_balance(record, task_types, config.expert_types, weights)
            else:
                balance = balance_loss(record, str(config.balance_loss), weights)
            loss = loss + config.balance_loss_coef * balance
        if config.z_loss_coef:
            loss = loss + config.z_loss_coef * z_loss(record, weights)
        losses.append(loss)
    return torch.stack([loss.to(losses[0].device) for loss in losses]).mean() if losses else torch.zeros((), device=device)


def balance_loss(record: Record, kind: str, weights: torch.Tensor | None = None) -> torch.Tensor:
    """One router's balance loss, "switch", "mixtral" or "cv2". weights [T]: 0 for padding."""
    logits, k = record.logits.reshape(-1, record.logits.shape[-1]), record.ids.shape[-1]
    weights = torch.ones_like(logits[:, 0]) if weights is None else weights.to(logits.dtype)
    if kind == "cv2":
        importance = (_per_expert(record, record.gates) * weights[:, None]).sum(0)  # [N]
        return importance.var(unbiased=False) / importance.mean().square().clamp_min(1e-20)
    count = weights.sum().clamp_min(1)
    load = (_per_expert(record, torch.ones_like(record.gates)) * weights[:, None]).sum(0) / count  # [N]
    mean_probability = (torch.softmax(logits, dim=-1) * weights[:, None]).sum(0) / count
    return logits.shape[-1] * (load * mean_probability).sum() / (k if kind == "switch" else 1)


def _per_expert(record: Record, values: torch.Tensor) -> torch.Tensor:
    """values [..., k] of the chosen experts -> [T, N]. An empty slot (a token whose logits are NaN has nothing else) counts nowhere."""
    logits, ids = record.logits.reshape(-1, record.logits.shape[-1]), record.ids.reshape(-1, record.ids.shape[-1]).long()
    counted = values.reshape(ids.shape).to(logits.dtype) * (ids >= 0)
    return torch.zeros_like(logits).scatter_add(1, ids.clamp_min(0), counted)


def z_loss(record: Record, weights: torch.Tensor | None = None) -> torch.Tensor:
    """One router's z-loss. weights [T]: 0 for padding."""
    squares = torch.logsumexp(record.logits, dim=-1).square().reshape(-1)
    if weights is None:
        return squares.mean()
    return (squares * weights.to(squares.dtype)).sum() / weights.sum().clamp_min(1).to(squares.dtype)


def localized_balance(
    record: Record, task_types: torch.Tensor, expert_types: Sequence[int], weights: torch.Tensor | None = None
) -> torch.Tensor:
    """LoRAMoE's localized balance constraint (arXiv 2312.09979, section 3.3): var(Z) / mean(Z) over all entries of Z = I * Q [N, B].

    Q is the gates' sum over a sample's tokens; I is 1 + delta where the expert's type is the sample's, else 1 - delta (delta = 0.1).
    task_types [B], one for each sample of a batch [B, T]; expert_types: N. Raises ShapeError.
    """
    batch = record.logits.shape[0]
    if task_types.shape != (batch,):
        raise ShapeError("aux_loss", "task_types", f"[{batch}], one for each sample", list(task_types.shape))
    gates = _per_expert(record, record.gates)  # [T, N]
    if weights is not None:
        gates = gates * weights.to(gates.dtype)[:, None]
    importance = gates.reshape(batch, -1, gates.shape[-1]).sum(1)  # [B, N]
    experts = torch.tensor(expert_types, device=task_types.device)
    same = (task_types[:, None] == experts[None, :]).to(importance.device)
    z = importance * torch.where(same, 1.0 + _DELTA, 1.0 - _DELTA).to(importance.dtype)
    return z.var(unbiased=False) / z.mean().clamp_min(1e-20)


def _token_weights(record: Record, mask: torch.Tensor | None) -> torch.Tensor | None:
    """[T], 1 for tokens that count; None: all do (no mask, or one that is not [batch, tokens])."""
    if mask is None or mask.dim() != 2:
        return None
    tokens = record.logits.shape[:-1]
    length = tokens[1] if len(tokens) == 2 else mask.shape[1]
    weights = mask[:, -length:].reshape(-1)  # with a key-value cache the mask covers earlier tokens too
    return weights.to(record.logits.device) if weights.numel() == tokens.numel() else None
