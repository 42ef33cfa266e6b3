"""The selector in PyTorch, with the weights of ours: what the benchmarks compare JAX with.

Written as a PyTorch user would for speed: one batched encode, no Python loop over queries or
candidates, and only the operators that `torch.compile` takes whole. Nothing trains or samples
with it but the benchmarks.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from lever_jax.errors import InputError
from lever_jax.masking import MASKED
from lever_jax.selector import MAX_LOG_SCALE, SIZE, SelectorConfig

EPSILON = 1e-6
"""Of layer norms, as Flax has it; PyTorch's own default is 1e-5."""


class Encoding(NamedTuple):
    """As `lever_jax.selector.Encoding`, batched."""

    start: torch.Tensor
    query: torch.Tensor
    keys: torch.Tensor
    inputs: torch.Tensor


class TorchSelector(nn.Module):
    """The network of `lever_jax.selector`, over batches of queries.

    Args:
      config: its size.
      parts: column range [lo, hi) of each part of an embedding.
    """

    def __init__(self, config: SelectorConfig, parts: dict[str, tuple[int, int]]):
        super().__init__()
        width, self.width, self.heads = config.width, config.width, config.heads
        self.parts = tuple((name, *span) for name, span in sorted(parts.items()))
        self.project = nn.ModuleDict(
            {name: nn.Linear(2 * (hi - lo), width) for name, lo, hi in self.parts}
        )
        self.role = nn.Parameter(torch.zeros(2, width))
        self.blocks = nn.ModuleList(_Block(width, config.heads) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width, eps=EPSILON)
        self.direct_query, self.direct_key = nn.Linear(width, width), nn.Linear(width, width)
        self.start, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.inputs = nn.Linear(width, 3 * width)
        self.recur = nn.Linear(width, 3 * width, bias=False)
        self.point, self.gate = nn.Linear(width, width), nn.Linear(width, width)
        self.weigh = nn.Linear(width, len(self.parts))
        self.log_scale = nn.Parameter(torch.zeros(()))

    def encode(self, query, embeddings, mask) -> Encoding:
        """Queries [B, D] and pools [B, K, D] with mask [B, K], once for all pointers."""
        seen = functional.pad(mask, (1, 0), value=True)  # [B, 1 + K]
        rows = torch.cat([query[:, None], embeddings], 1)
        scaled = [_scale(rows[..., lo:hi], seen) for _, lo, hi in self.parts]
        tokens = sum(self.project[name](x) for (name, _, _), x in zip(self.parts, scaled))
        relative = [x[..., x.shape[-1] // 2 :] for x in scaled]
        similarity = torch.stack(
            [_standardise((x[:, 1:] @ x[:, 0, :, None])[..., 0], mask) for x in relative], -1
        )
        role = torch.cat([self.role[:1], self.role[1:].expand(embeddings.shape[1], -1)])
        read = tokens + role
        for block in self.blocks:
            read = block(read, seen)
        read = self.norm(read)
        keys = [self.key(read[:, 1:]), self.direct_key(tokens[:, 1:]), similarity]
        return Encoding(
            start=torch.tanh(self.start(read[:, 0])),
            query=self.direct_query(tokens[:, 0]),
            keys=torch.cat(keys, -1),
            inputs=self.inputs(read[:, 1:]),
        )

    def logits(self, encoding: Encoding, state):
        """Unmasked logits [B, G, K] of states [B, G, w]."""
        direct = encoding.query[:, None] * (1.0 + self.gate(state))
        pointer = torch.cat([self.point(state), direct], -1) / math.sqrt(self.width)
        pointer = torch.cat([pointer, self.weigh(state)], -1)
        scale = torch.exp(self.log_scale.clamp(-MAX_LOG_SCALE, MAX_LOG_SCALE))
        return scale * (pointer @ encoding.keys.transpose(1, 2))

    def update(self, encoding: Encoding, state, action):
        """States [B, G, w] after the actions [B, G]; from states [B, 1, w], if all share one."""
        index = action[..., None].expand(-1, -1, encoding.inputs.shape[-1])
        reset, keep, new = encoding.inputs.gather(1, index).chunk(3, -1)
        reset_state, keep_state, new_state = self.recur(state).chunk(3, -1)
        keep = torch.sigmoid(keep + keep_state)
        new = torch.tanh(new + torch.sigmoid(reset + reset_state) * new_state)
        return keep * state + (1.0 - keep) * new

    def step_log_probs(self, encoding: Encoding, state, available):
        """Log-probabilities [B, G, K] of the next pick over what is `available` [B, G, K]."""
        logits = self.logits(encoding, state).masked_fill(~available, -torch.inf)
        return torch.log_softmax(logits, -1).masked_fill(~available, MASKED)

    def pointer_log_probs(self, query, embeddings, mask, pointers):
        """Log-probabilities [B, G] of pointers [B, G, S], and their steps' [B, G, S, K]."""
        encoding = self.encode(query, embeddings, mask)
        count = pointers.shape[1]
        available = mask[:, None].expand(-1, count, -1)
        # The first pick has one distribution a query.
        first = self.step_log_probs(encoding, encoding.start[:, None], mask[:, None])
        steps = [first.expand(-1, count, -1)]
        state = encoding.start[:, None]
        for shot in range(1, pointers.shape[2]):
            previous = pointers[..., shot - 1]
            state = self.update(encoding, state, previous)
            available = available.scatter(2, previous[..., None], False)
            steps.append(self.step_log_probs(encoding, state, available))
        steps = torch.stack(steps, 2)
        return steps.gather(3, pointers[..., None])[..., 0].sum(-1), steps


class _Block(nn.Module):
    """Pre-norm self-attention over masked sets [B, N, w]."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=EPSILON) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, tokens, mask):
        batch, count, width = tokens.shape
        qkv = self.qkv(self.norms[0](tokens)).view(batch, count, 3, self.heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask[:, None, None, :]
        )
        tokens = tokens + self.out(attended.transpose(1, 2).reshape(batch, count, width))
        hidden = functional.gelu(self.wide(self.norms[1](tokens)), approximate="tanh")
        return tokens + self.narrow(hidden)


def from_flax(config: SelectorConfig, parts, params) -> TorchSelector:
    """A `TorchSelector` with the weights of our selector's `params`.

    Raises:
      InputError: the selector has options that this port lacks: only its size may differ.
    """
    options = ", ".join(f"{k}={v}" for k, v in config.recipe().items() if k not in SIZE)
    if options:
        raise InputError(f"the PyTorch selector has the default options only, not {options}")
    model = TorchSelector(config, parts)

    def dense(layer, given):
        _set(layer.weight, np.asarray(given["kernel"]).T)
        if layer.bias is not None:
            _set(layer.bias, given["bias"])

    def norm(layer, given):
        _set(layer.weight, given["scale"])
        _set(layer.bias, given["bias"])

    for name, layer in model.project.items():
        dense(layer, params[f"project_{name}"])
    for i, block in enumerate(model.blocks):
        given = params[f"block_{i}"]
        attention = given["MultiHeadDotProductAttention_0"]
        heads = [attention[name] for name in ("query", "key", "value")]
        width = block.out.in_features
        kernels = [np.asarray(h["kernel"]).reshape(width, width).T for h in heads]
        _set(block.qkv.weight, np.concatenate(kernels))
        _set(block.qkv.bias, np.concatenate([np.asarray(h["bias"]).ravel() for h in heads]))
        _set(block.out.weight, np.asarray(attention["out"]["kernel"]).reshape(width, width).T)
        _set(block.out.bias, attention["out"]["bias"])
        for i, layer in enumerate(block.norms):
            norm(layer, given[f"LayerNorm_{i}"])
        dense(block.wide, given["Dense_0"])
        dense(block.narrow, given["Dense_1"])
    norm(model.norm, params["norm"])
    names = "direct_query direct_key start key inputs recur point gate weigh".split()
    for name in names:
        dense(getattr(model, name), params[name])
    _set(model.role, params["role"])
    _set(model.log_scale, params["log_scale"])
    return model


def _set(parameter, value):
    value = torch.from_numpy(np.array(value, np.float32))
    if value.shape != parameter.shape:
        raise ValueError(f"weights {tuple(value.shape)} for {tuple(parameter.shape)}")
    parameter.data.copy_(value)


def _scale(rows, seen):
    """As `lever_jax.selector.set_encoder.scale_part`: rows [B, 1 + K, d] to [B, 1 + K, 2d]."""
    rows = rows * seen[..., None]
    mean = rows[:, 1:].sum(1, keepdim=True) / seen[:, 1:].sum(1).clamp(min=1)[:, None, None]
    empty = (rows == 0.0).all(-1, keepdim=True)
    relative = (rows - mean).masked_fill(empty, 0.0)
    size = rows.square().mean(-1, keepdim=True)
    spread = relative.square().mean(-1, keepdim=True) + 1e-6 * size
    return torch.cat([rows * (size + 1e-12).rsqrt(), relative * (spread + 1e-12).rsqrt()], -1)


def _standardise(x, mask):
    """As `lever_jax.selector.set_encoder.standardise`, for [B, K]."""
    count = mask.sum(-1, keepdim=True).clamp(min=1)
    x = (x - (x * mask).sum(-1, keepdim=True) / count) * mask
    return x * (x.square().sum(-1, keepdim=True) / count + 1e-6).rsqrt()
