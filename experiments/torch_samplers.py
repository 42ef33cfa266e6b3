"""Beam search and sampling in PyTorch, in the two forms that ours are timed against.

`batched` works on all queries and beams at once, as ours do. `loop` is what systems with a pointer
selector commonly do at inference: one query at a time, a Python loop over its beams or draws, and
the whole network run again on every prefix.
"""

import torch

from experiments.torch_selector import TorchSelector
from lever_jax.masking import MASKED

METHODS = ("beam", "sample", "top_p")


@torch.no_grad()
def batched(model: TorchSelector, query, embeddings, mask, *, method, num, shots, top_p=0.9):
    """Pointers [B, num, S] and their log-probabilities [B, num]; every pool holds S candidates.

    Args:
      model: the selector.
      query: [B, D].
      embeddings: [B, K, D].
      mask: [B, K] bool.
      method: one of `METHODS`.
      num: G, pointers a query.
      shots: S.
      top_p: of the method `top_p`.
    """
    encoding = model.encode(query, embeddings, mask)
    grow = _beam if method == "beam" else _draw
    return grow(model, encoding, mask, num, shots, top_p if method == "top_p" else None)


def _draw(model, encoding, mask, num, shots, top_p):
    state, available = encoding.start[:, None], mask[:, None]
    total, actions = 0.0, []
    for shot in range(shots):
        log_probs = model.step_log_probs(encoding, state, available)
        if top_p is not None:
            log_probs = _nucleus(log_probs, top_p)
        if shot == 0:  # one distribution for all draws of a query
            log_probs = log_probs.expand(-1, num, -1)
            available = available.expand(-1, num, -1)
        # The smallest of exponentials with these rates is a draw; faster than multinomial.
        noise = torch.empty_like(log_probs).exponential_()
        action = (log_probs.exp() / noise).argmax(-1)
        actions.append(action)
        total = total + log_probs.gather(2, action[..., None])[..., 0]
        if shot + 1 < shots:
            state = model.update(encoding, state, action)
            available = available.scatter(2, action[..., None], False)
    return torch.stack(actions, -1), total


def _beam(model, encoding, mask, num, shots, _):
    size = mask.shape[1]
    state, available = encoding.start[:, None], mask[:, None]
    total = torch.zeros_like(state[..., 0])
    pointers = torch.empty((len(mask), 1, 0), dtype=torch.int64, device=mask.device)
    for shot in range(shots):
        scores = (total[..., None] + model.step_log_probs(encoding, state, available)).flatten(1)
        kept = min(num, scores.shape[1])
        total, best = scores.topk(kept, dim=1)
        parent, action = best // size, best % size
        pointers = torch.cat([_rows(pointers, parent), action[..., None]], 2)
        if shot + 1 < shots:
            # All prefixes share the state before the first pick.
            state = model.update(encoding, _rows(state, parent) if shot else state, action)
            available = _rows(available, parent).scatter(2, action[..., None], False)
    return pointers, total


def _rows(x, index):
    """Rows index [B, W] of x [B, n, ...]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def _nucleus(log_probs, top_p):
    """Log-probabilities renormalised over the nucleus; the last axis is sorted once."""
    ordered, order = log_probs.sort(dim=-1, descending=True)
    outside = ordered.exp().cumsum(-1) - ordered.exp() >= top_p
    outside[..., 0] = False
    ordered = ordered.masked_fill(outside, -torch.inf).log_softmax(-1)
    return torch.empty_like(log_probs).scatter_(-1, order, ordered)


@torch.no_grad()
def loop(model: TorchSelector, query, embeddings, mask, *, method, num, shots, top_p=0.9):
    """As `batched`, for ONE query [1, D]: Python over beams, the network anew for every prefix."""
    if method == "beam":
        beams = [((), 0.0)]
        for _ in range(shots):
            grown = []
            for prefix, total in beams:
                log_probs = _next(model, query, embeddings, mask, prefix)
                values, actions = log_probs.topk(min(num, log_probs.shape[0]))
                grown += [
                    ((*prefix, action), total + value)
                    for value, action in zip(values.tolist(), actions.tolist())
                    if value > MASKED / 2
                ]
            beams = sorted(grown, key=lambda beam: beam[1], reverse=True)[:num]
        return [pointer for pointer, _ in beams], [total for _, total in beams]
    pointers, totals = [], []
    for _ in range(num):
        prefix, total = (), 0.0
        for _ in range(shots):
            log_probs = _next(model, query, embeddings, mask, prefix)
            if method == "top_p":
                log_probs = _nucleus(log_probs, top_p)
            action = int(torch.multinomial(log_probs.exp(), 1))
            total += float(log_probs[action])
            prefix = (*prefix, action)
        pointers.append(prefix)
        totals.append(total)
    return pointers, totals


def _next(model, query, embeddings, mask, prefix):
    """Log-probabilities [K] after a prefix, from the query, the pool and the prefix alone."""
    encoding = model.encode(query, embeddings, mask)
    state, available = encoding.start[:, None], mask[:, None].clone()
    for action in prefix:
        state = model.update(encoding, state, torch.tensor([[action]], device=mask.device))
        available[..., action] = False
    return model.step_log_probs(encoding, state, available)[0, 0]
