"""Auxiliary losses of routers. Each is computed per router and averaged over the routers; padded tokens count for nothing.

With P_i the mean over tokens of softmax(logits)_i, and n_i the mean number of times that a token chooses expert i (sum n_i = k):
- "switch": N sum_i (n_i / k) P_i. Minimum 1, at uniform load (Switch Transformers, arXiv 2101.03961, eq. 4; for k > 1 divided by k).
- "mixtral": N sum_i n_i P_i. Minimum k (Mixtral in transformers: load_balancing_loss_func; MixLoRA, arXiv 2404.15159, uses it).
- "cv2": the squared coefficient of variation over the experts of their summed gates (Shazeer et al., arXiv 1701.06538, eq. 7). Where task
  types are given, each summand is first weighted as in LoRAMoE's localized balance constraint (`localized`).
- z-loss: mean of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, eq. 5).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from fusedmerge.errors import ShapeError, StateError

if TYPE_CHECKING:
    from fusedmerge.moe.config import LoRAMoEConfig
    from fusedmerge.moe.routing import Record

__all__ = ["aux_loss", "balance_loss", "localized", "total_loss", "z_loss"]

_DELTA = 0.1  # LoRAMoE's delta


def aux_loss(model: torch.nn.Module) -> torch.Tensor:
    """The weighted auxiliary loss of the model's last forward: a scalar, differentiable, as it was added to outputs.loss.

    The forward must have been made with gradients on, with labels, or inside `structure(model).recording()`: others keep no logits.
    Raises StateError.
    """
    from fusedmerge.moe.structure import structure

    found = structure(model)
    if found.last_loss is None:
        raise StateError("aux_loss", "model", "a forward before it, with gradients on, with labels or in recording()", "none")
    return found.last_loss


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
            scale = None
            if task_types is not None and config.expert_types is not None:
                scale = localized(task_types, torch.tensor(config.expert_types, device=task_types.device), record.logits.shape)
            loss = loss + config.balance_loss_coef * balance_loss(record, str(config.balance_loss), weights, scale)
        if config.z_loss_coef:
            loss = loss + config.z_loss_coef * z_loss(record, weights)
        losses.append(loss)
    return torch.stack([loss.to(losses[0].device) for loss in losses]).mean() if losses else torch.zeros((), device=device)


def balance_loss(record: Record, kind: str, weights: torch.Tensor | None = None, scale: torch.Tensor | None = None) -> torch.Tensor:
    """One router's balance loss, "switch", "mixtral" or "cv2". weights [T]: 0 for padding. scale [T, N]: of the gates, for "cv2"."""
    num_experts = record.logits.shape[-1]
    logits, k = record.logits.reshape(-1, num_experts), record.ids.shape[-1]
    ids = record.ids.reshape(-1, k).long()
    gates = record.gates.reshape(-1, k)
    weights = torch.ones_like(logits[:, 0]) if weights is None else weights.to(logits.dtype)
    if kind == "cv2":
        per_expert = torch.zeros_like(logits).scatter_add(1, ids, gates.to(logits.dtype))  # [T, N]
        if scale is not None:
            per_expert = per_expert * scale
        importance = (per_expert * weights[:, None]).sum(0)
        return importance.var(unbiased=False) / importance.mean().square().clamp_min(1e-20)
    count = weights.sum().clamp_min(1)
    chosen = torch.zeros_like(logits).scatter_add(1, ids, torch.ones_like(gates).to(logits.dtype))  # [T, N]
    load = (chosen * weights[:, None]).sum(0) / count
    mean_probability = (torch.softmax(logits, dim=-1) * weights[:, None]).sum(0) / count
    return num_experts * (load.detach() * mean_probability).sum() / (k if kind == "switch" else 1)


def z_loss(record: Record, weights: torch.Tensor | None = None) -> torch.Tensor:
    """One router's z-loss. weights [T]: 0 for padding."""
    squares = torch.logsumexp(record.logits, dim=-1).square().reshape(-1)
    if weights is None:
        return squares.mean()
    return (squares * weights.to(squares.dtype)).sum() / weights.sum().clamp_min(1).to(squares.dtype)


def localized(task_types: torch.Tensor, expert_types: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """LoRAMoE's weights [T, N] (arXiv 2312.09979, section 3.3): 1 + delta where the sample's task type is the expert's, 1 - delta elsewhere.

    task_types [B], one for each sample; expert_types [N]; shape [B, ..., N] of the logits.
    """
    if task_types.dim() != 1 or task_types.shape[0] != shape[0]:
        raise ShapeError("aux_loss", "task_types", f"[{shape[0]}], one for each sample", list(task_types.shape))
    same = task_types[:, None] == expert_types[None, :]  # [B, N]
    weights = torch.where(same, 1.0 + _DELTA, 1.0 - _DELTA)
    return weights.repeat_interleave(shape[:-1].numel() // shape[0], dim=0)


def _token_weights(record: Record, mask: torch.Tensor | None) -> torch.Tensor | None:
    """[T], 1 for tokens that count; None: all do (no mask, or one that is not [batch, tokens])."""
    if mask is None or mask.dim() != 2:
        return None
    tokens = record.logits.shape[:-1]
    length = tokens[1] if len(tokens) == 2 else mask.shape[1]
    weights = mask[:, -length:].reshape(-1)  # with a key-value cache the mask covers earlier tokens too
    return weights.to(record.logits.device) if weights.numel() == tokens.numel() else None
