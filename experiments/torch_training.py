"""A GRPO step in PyTorch, equal to that of `lever_jax.training`, for benchmark_training."""

import torch

from experiments.torch_selector import TorchSelector
from lever_jax.training import LossConfig


def grpo_step(
    model: TorchSelector,
    reference: TorchSelector,
    optimizer: torch.optim.Optimizer,
    config: LossConfig,
    compile_options: dict[str, object] | None = None,
):
    """Returns step(query, embeddings, mask, pointers, behaviour, rewards, counted) -> loss.

    The group advantage, the clipped ratio, the exact KL to `reference` and the clipped gradient
    norm are those of our step; the optimiser's rate is what the caller set. With options of
    `torch.compile` the loss is compiled, and so its backward pass.
    """

    def loss_of(query, embeddings, mask, pointers, behaviour, rewards, counted):
        with torch.no_grad():
            _, reference_steps = reference.pointer_log_probs(query, embeddings, mask, pointers)
        log_probs, steps = model.pointer_log_probs(query, embeddings, mask, pointers)
        number = counted.sum(1, keepdim=True).clamp(min=1)
        centred = (rewards - (rewards * counted).sum(1, keepdim=True) / number) * counted
        spread = (centred.square().sum(1, keepdim=True) / number).sqrt()
        advantages = centred / spread.masked_fill(spread == 0, 1.0)
        ratio = (log_probs - behaviour).clamp(max=20.0).exp()
        clipped = ratio.clamp(1.0 - config.clip_low, 1.0 + config.clip_high)
        objective = torch.minimum(ratio * advantages, clipped * advantages) * counted
        groups = (advantages != 0).any(1).float()
        loss = -(objective.sum(1) / number[:, 0] * groups).sum() / groups.sum().clamp(min=1)
        terms = (steps.exp() * (steps - reference_steps)).sum((2, 3)) * counted
        present = counted.any(1)
        kl = (terms.sum(1) / number[:, 0] * present).sum() / present.sum().clamp(min=1)
        return loss + config.kl_coef * kl, loss

    forward = loss_of if compile_options is None else torch.compile(loss_of, **compile_options)

    def step(*batch):
        optimizer.zero_grad(set_to_none=True)
        total, loss = forward(*batch)
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    return step
