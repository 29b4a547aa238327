"""GRPO: advantages within groups, and the clipped loss over a micro-batch. Knows neither optimizers nor Ray.

The advantages are DeepSeekMath's (https://arxiv.org/abs/2402.03300). The loss is averaged over all tokens of the step,
as in DAPO (https://arxiv.org/abs/2503.14476).

Shapes in names: B sequences of a micro-batch, L tokens of the longest of them, T = L - 1 predictions (of token t + 1 at
t), V vocabulary.
A sample is {"prompt": [ids], "tokens": [ids], "logprobs": [nats, the sampler's, one for each of tokens], "advantage"}.
"""

from __future__ import annotations

import torch


def advantages(rewards: list[float], group_size: int) -> list[float]:
    """How much better each completion is than the others of its prompt: (reward - mean) / standard deviation.

    rewards: group after group. A group whose rewards are all equal teaches nothing: its advantages are 0.
    """
    groups = torch.tensor(rewards, dtype=torch.float64).view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True) + 1e-4)).flatten().tolist()


def collate(samples: list[dict], device: torch.device) -> dict[str, torch.Tensor]:
    """Right-padded tensors of samples: ids and attention int64, the others float32.

    mask_BT is 1 where a token of the completion is predicted.
    """
    B = len(samples)
    L = max(len(s["prompt"]) + len(s["tokens"]) for s in samples)
    batch = {
        "ids_BL": torch.zeros(B, L, dtype=torch.int64),
        "attention_BL": torch.zeros(B, L, dtype=torch.int64),
        "mask_BT": torch.zeros(B, L - 1),
        "sampler_BT": torch.zeros(B, L - 1),
        "advantage_B1": torch.tensor([[s["advantage"]] for s in samples], dtype=torch.float32),
    }
    for b, s in enumerate(samples):
        start = len(s["prompt"])
        end = start + len(s["tokens"])
        batch["ids_BL"][b, :end] = torch.tensor([*s["prompt"], *s["tokens"]])
        batch["attention_BL"][b, :end] = 1
        batch["mask_BT"][b, start - 1 : end - 1] = 1
        batch["sampler_BT"][b, start - 1 : end - 1] = torch.tensor(s["logprobs"])
    return {name: tensor.to(device) for name, tensor in batch.items()}


def token_logprobs(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(B, T) float32, nats: log-probability of each token but the first given those before it, at temperature 1."""
    logits_BTV = model(input_ids=batch["ids_BL"], attention_mask=batch["attention_BL"], use_cache=False).logits[:, :-1]
    targets_BT1 = batch["ids_BL"][:, 1:, None]
    return logits_BTV.float().log_softmax(-1).gather(2, targets_BT1)[..., 0]


def grpo_loss(
    logprobs_BT: torch.Tensor,
    batch: dict[str, torch.Tensor],
    total_tokens: int,
    clip_range: float,
    reference_BT: torch.Tensor | None = None,
    kl_coef: float = 0.0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Clipped policy-gradient loss, summed over this micro-batch's tokens and divided by those of the whole step.

    So the losses, and the gradients, of all micro-batches on all replicas add up to those of one big batch.
    With one optimizer step per rollout the ratio differs from 1 only where trainer and sampler compute differently, and
    the clip bounds what such tokens can do. Returns (loss, sums over tokens for the metrics). KL is the estimator
    r - log r - 1 with r = reference / policy, which is never negative (http://joschu.net/blog/kl-approx.html).
    """
    mask_BT = batch["mask_BT"]
    log_ratio_BT = (logprobs_BT - batch["sampler_BT"]) * mask_BT
    ratio_BT = log_ratio_BT.exp()
    plain_BT = ratio_BT * batch["advantage_B1"]
    clipped_BT = ratio_BT.clamp(1 - clip_range, 1 + clip_range) * batch["advantage_B1"]
    objective_BT = torch.minimum(plain_BT, clipped_BT)
    sums = {
        "logprob_gap": log_ratio_BT.abs(),
        "ratio": ratio_BT * mask_BT,
        "clipped": (clipped_BT < plain_BT) * mask_BT,
    }
    if reference_BT is not None:
        log_r_BT = (reference_BT - logprobs_BT) * mask_BT
        kl_BT = log_r_BT.exp() - log_r_BT - 1
        objective_BT = objective_BT - kl_coef * kl_BT
        sums["kl"] = kl_BT
    loss = -(objective_BT * mask_BT).sum() / total_tokens
    return loss, {name: x.detach().sum() for name, x in sums.items()}
