"""GRPO: advantages within groups, micro-batches, and the clipped loss. Knows neither models, optimizers nor Ray.

The advantages are DeepSeekMath's (https://arxiv.org/abs/2402.03300). The loss is averaged over all tokens of the step,
as in DAPO (https://arxiv.org/abs/2503.14476).

Shapes in names: B rows of a micro-batch, L tokens of a row, S sequences, N tokens of completions.
A sample is {"prompt": [ids], "tokens": [ids], "logprobs": [nats, the sampler's, one for each of tokens], "advantage"}.
"""

from __future__ import annotations

import dataclasses
import itertools

import torch

MOST_PADDING = 0.1  # of the tokens that are computed, where sequences cannot be packed


def advantages(rewards: list[float], group_size: int) -> list[float]:
    """How much better each completion is than the others of its prompt: (reward - mean) / standard deviation.

    rewards: group after group. A group whose rewards are all equal teaches nothing: its advantages are 0.
    """
    groups = torch.tensor(rewards, dtype=torch.float64).view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True) + 1e-4)).flatten().tolist()


def length(sample: dict) -> int:
    return len(sample["prompt"]) + len(sample["tokens"])


def micro_batches(samples: list[dict], tokens: int, sequences: int | None, packed: bool) -> list[list[dict]]:
    """Samples in micro-batches of at most so many computed tokens and sequences; a longer sequence has its own.

    packed: as few micro-batches as hold them, about equally full. Otherwise rows of nearly equal length, of which at
    most MOST_PADDING is padding. The same samples always give the same micro-batches.
    """
    by_length = sorted(samples, key=length, reverse=True)
    most = sequences or len(samples)
    if not packed:
        found: list[list[dict]] = []
        for sample in by_length:
            rows = [*found[-1], sample] if found else [sample]
            computed = len(rows) * length(rows[0])
            padding = computed - sum(map(length, rows))
            if found and len(rows) <= most and computed <= tokens and padding <= MOST_PADDING * computed:
                found[-1] = rows
            else:
                found.append([sample])
        return found
    fewest = max(-(-sum(map(length, samples)) // tokens), -(-len(samples) // most))
    for count in range(fewest, len(samples)):
        parts: list[list[dict]] = [[] for _ in range(count)]
        sizes = [0] * count
        for sample in by_length:  # each to the emptiest
            i = min((i for i in range(count) if len(parts[i]) < most), key=lambda i: sizes[i])
            parts[i].append(sample)
            sizes[i] += length(sample)
        if max(sizes) <= tokens:
            return parts
    return [[sample] for sample in by_length]


@dataclasses.dataclass(frozen=True)
class Batch:
    """A micro-batch. Packed: one row, the sequences one after the other. Otherwise a row for each, padded on the right.

    positions_BL: int64, from 0 in each sequence. attention_BL: int64, 1 for tokens and 0 for padding; None if packed.
    ends_S1: int32, 0 and then the end of each sequence; longest: tokens of the longest one.
    The others are of the tokens of completions: predictors_N: int64, which of the B * L tokens comes before; targets_N:
    int64, its id; sampler_N: float32, nats, the sampler's log-probability; advantage_N: float32.
    """

    ids_BL: torch.Tensor
    positions_BL: torch.Tensor
    attention_BL: torch.Tensor | None
    ends_S1: torch.Tensor
    longest: int
    predictors_N: torch.Tensor
    targets_N: torch.Tensor
    sampler_N: torch.Tensor
    advantage_N: torch.Tensor


def collate(samples: list[dict], device: torch.device, packed: bool) -> Batch:
    """The micro-batch of these samples, on the device."""
    lengths = [length(s) for s in samples]
    longest = max(lengths)
    ends = [0, *itertools.accumulate(lengths)]
    starts = ends[:-1] if packed else range(0, len(samples) * longest, longest)
    shape = (1, ends[-1]) if packed else (len(samples), longest)
    ids_BL = torch.zeros(shape, dtype=torch.int64)
    positions_BL = torch.zeros(shape, dtype=torch.int64)
    attention_BL = torch.zeros(shape, dtype=torch.int64)
    predictors = []
    for sample, start in zip(samples, starts, strict=True):
        end = start + length(sample)
        ids_BL.view(-1)[start:end] = torch.tensor([*sample["prompt"], *sample["tokens"]])
        positions_BL.view(-1)[start:end] = torch.arange(end - start)
        attention_BL.view(-1)[start:end] = 1
        predictors.append(torch.arange(start + len(sample["prompt"]) - 1, end - 1))
    predictors_N = torch.cat(predictors)
    counts_S = torch.tensor([len(s["tokens"]) for s in samples])
    advantage_S = torch.tensor([s["advantage"] for s in samples], dtype=torch.float32)
    return Batch(
        ids_BL=ids_BL.to(device),
        positions_BL=positions_BL.to(device),
        attention_BL=None if packed else attention_BL.to(device),
        ends_S1=torch.tensor(ends, dtype=torch.int32).to(device),
        longest=longest,
        predictors_N=predictors_N.to(device),
        targets_N=ids_BL.view(-1)[predictors_N + 1].to(device),
        sampler_N=torch.tensor([x for s in samples for x in s["logprobs"]], dtype=torch.float32).to(device),
        advantage_N=advantage_S.repeat_interleave(counts_S).to(device),
    )


def grpo_loss(
    logprobs_N: torch.Tensor,
    sampler_N: torch.Tensor,
    advantage_N: torch.Tensor,
    total_tokens: int,
    clip_range: float,
    reference_N: torch.Tensor | None = None,
    kl_coef: float = 0.0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Clipped policy-gradient loss, summed over these tokens and divided by those of the whole step.

    So the losses, and the gradients, of all parts of micro-batches on all replicas add up to those of one big batch.
    With one optimizer step per rollout the ratio differs from 1 only where trainer and sampler compute differently, and
    the clip bounds what such tokens can do. Returns (loss, sums over tokens for the metrics). KL is the estimator
    r - log r - 1 with r = reference / policy, which is never negative (http://joschu.net/blog/kl-approx.html).
    """
    log_ratio_N = logprobs_N - sampler_N
    ratio_N = log_ratio_N.exp()
    plain_N = ratio_N * advantage_N
    clipped_N = ratio_N.clamp(1 - clip_range, 1 + clip_range) * advantage_N
    objective_N = torch.minimum(plain_N, clipped_N)
    sums = {"logprob_gap": log_ratio_N.abs(), "ratio": ratio_N, "clipped": clipped_N < plain_N}
    if reference_N is not None:
        log_r_N = reference_N - logprobs_N
        kl_N = log_r_N.exp() - log_r_N - 1
        objective_N = objective_N - kl_coef * kl_N
        sums["kl"] = kl_N
    loss = -objective_N.sum() / total_tokens
    return loss, {name: x.detach().sum() for name, x in sums.items()}
