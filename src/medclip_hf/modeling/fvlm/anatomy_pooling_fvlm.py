"""Anatomy pooling: the tokens of each anatomy, of several levels of the tower, become one projected embedding."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FVLMAnatomyHead(nn.Module):
    """What belongs to one anatomy alone: its query into the volume and its projection into the shared space.

    A module of its own for each anatomy, so that anatomies can be added, trained and frozen one by one.
    """

    def __init__(self, hidden_size: int, projection_dim: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(hidden_size))
        self.projection = nn.Linear(hidden_size, projection_dim)

    def forward(self, pooled: Tensor) -> Tensor:
        """(B, hidden) -> (B, projection_dim)."""
        return self.projection(pooled)


class FVLMAnatomyPooling(nn.Module):
    """Multi-head attention of one query for each anatomy over the tokens of that anatomy.

    The numbers and the parameters are those of `nn.MultiheadAttention`, but no token is projected: with q, k, v linear,

        <W_q q, W_k x> = <W_k^T W_q q, x>    and    sum_j p_j W_v x_j = W_v sum_j p_j x_j,

    so the few queries are carried back to the space of the tokens and the few pooled vectors forward. For 4 anatomies
    and 4928 tokens this is 1/48 of the multiplications, and no key or value of a token is kept for the backward pass.
    The key's bias adds the same number to all scores of a query, so softmax cancels it; it is kept for conversion.
    """

    def __init__(self, hidden_size: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        check_heads(hidden_size, num_heads, "pooling_num_attention_heads")
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.attention_dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * hidden_size, hidden_size))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * hidden_size))
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, queries: Tensor, levels: Tensor, token_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled tokens (B, A, hidden) and the attention weights (B, heads, A, L, P).

        Args:
            queries: (A, hidden).
            levels: (B, L, P, hidden), tokens of L levels of one grid.
            token_mask: (B, A, P) bool; a row without any token gives zeros.
        """
        num_levels = levels.shape[1]
        tokens = levels.flatten(1, 2)  # (B, L * P, hidden)
        is_present = token_mask.any(dim=-1)
        # Rows without a token look at everything, so that softmax stays finite, and are set to zero afterwards.
        is_seen = (token_mask | ~is_present[..., None]).repeat(1, 1, num_levels)

        scores = self._scores(queries, tokens).masked_fill(~is_seen[:, None], -math.inf)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(tokens.dtype)  # (B, heads, A, L * P)
        kept = F.dropout(weights, p=self.attention_dropout, training=self.training)
        pooled = self.out_proj(self._values(kept, tokens))
        pooled = pooled.masked_fill(~is_present[..., None], 0.0)
        weights = weights.masked_fill(~is_present[:, None, :, None], 0.0).unflatten(-1, (num_levels, -1))
        return pooled, weights

    def _scores(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """(B, heads, A, tokens): <W_q q + b_q, W_k x + b_k> / sqrt(head_dim)."""
        query_weight, key_weight, _ = self.in_proj_weight.chunk(3)
        query_bias, key_bias, _ = self.in_proj_bias.chunk(3)
        projected = F.linear(queries, query_weight, query_bias) * self.head_dim**-0.5
        projected = projected.unflatten(-1, (self.num_heads, self.head_dim))  # (A, heads, head_dim)
        key_weight = key_weight.unflatten(0, (self.num_heads, self.head_dim))
        key_bias = key_bias.unflatten(0, (self.num_heads, self.head_dim))
        carried = torch.einsum("ahc,hcd->had", projected, key_weight).flatten(0, 1)  # (heads * A, hidden)
        offsets = torch.einsum("ahc,hc->ha", projected, key_bias)
        scores = F.linear(tokens, carried).transpose(1, 2).unflatten(1, (self.num_heads, -1))
        return scores + offsets[None, :, :, None]

    def _values(self, weights: Tensor, tokens: Tensor) -> Tensor:
        """(B, A, hidden): the heads' weighted sums of W_v x + b_v, side by side."""
        value_weight = self.in_proj_weight.chunk(3)[2].unflatten(0, (self.num_heads, self.head_dim))
        value_bias = self.in_proj_bias.chunk(3)[2].unflatten(0, (self.num_heads, self.head_dim))
        pooled = torch.matmul(weights.flatten(1, 2), tokens).unflatten(1, (self.num_heads, -1))  # (B, heads, A, hidden)
        values = torch.einsum("bhad,hcd->bahc", pooled, value_weight)
        # Dropped weights no longer sum to one, so neither does the bias that they carry.
        carried_bias = torch.einsum("bha,hc->bahc", weights.sum(dim=-1), value_bias)
        return (values + carried_bias).flatten(2)


def check_heads(hidden_size: int, num_heads: int, name: str) -> None:
    """Refuse a width that does not fall into so many heads."""
    if hidden_size % num_heads:
        raise ValueError(f"hidden_size {hidden_size} of the vision tower must be a multiple of {name} {num_heads}.")


__all__ = ["FVLMAnatomyHead", "FVLMAnatomyPooling"]
