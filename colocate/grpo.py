"""GRPO: what a sample counts, micro-batches, and the clipped loss. Knows neither models, optimizers nor Ray.

The advantages are DeepSeekMath's (https://arxiv.org/abs/2402.03300). The loss is averaged over all tokens of the step,
as in DAPO (https://arxiv.org/abs/2503.14476), unless --loss-type says otherwise.

Shapes in names: B rows of a micro-batch, L tokens of a row, S sequences, N tokens of completions.
A sample is {"prompt": [ids], "tokens": [ids], "logprobs": [nats, the sampler's, one for each of tokens], "advantage"}.
It may have "mask": [0 or 1, for each of tokens: whether it is learned from], "weight": of its tokens in the loss (1),
and with --correction "old" and "correction", see `correct_sample`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import torch

from colocate.config import Config

MOST_PADDING = 0.1  # of the tokens that are computed, where sequences cannot be packed


def credit(samples: list[dict], config: Config) -> None:
    """Give rewarded samples, group after group, what the loss wants: "advantage", "weight", and perhaps "mask".

    The weight of a token, with S completions and N tokens to learn from in the step: --loss-type dapo: 1, the mean over
    all N tokens. grpo (DeepSeekMath): N / (S * tokens of its completion), the mean over completions of their means.
    dr_grpo (https://arxiv.org/abs/2503.20783): N / (S * --max-tokens), a constant, so that length is no bias.
    """
    rewards = [sample["reward"] for sample in samples]
    for sample, a in zip(samples, advantages(rewards, config.group_size, config.scale_rewards), strict=True):
        sample["advantage"] = a
        if config.mask_truncated_completions and sample["truncated"]:  # DAPO's "overlong filtering"
            sample["mask"] = [0] * len(sample["tokens"])
    if config.loss_type == "dapo":
        return
    total = learned_tokens(samples)
    for sample in samples:
        own = config.max_tokens if config.loss_type == "dr_grpo" else max(1, learned_tokens([sample]))
        sample["weight"] = total / (len(samples) * own)


def advantages(rewards: list[float], group_size: int, scale: str = "group") -> list[float]:
    """How much better each completion is than the others of its prompt: (reward - mean) / standard deviation.

    rewards: group after group. A group whose rewards are all equal teaches nothing: its advantages are 0. scale: whose
    standard deviation it is, "group" or "batch" (https://arxiv.org/abs/2508.08221); "none": 1 (Dr. GRPO).
    """
    groups = torch.tensor(rewards, dtype=torch.float64).view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    if scale == "none":
        return centred.flatten().tolist()
    deviation = groups.std() if scale == "batch" else groups.std(1, keepdim=True)
    return (centred / (deviation + 1e-4)).flatten().tolist()


def learned_tokens(samples: list[dict]) -> int:
    """How many tokens of these completions the loss is about."""
    return sum(sum(sample["mask"]) if "mask" in sample else len(sample["tokens"]) for sample in samples)


def learned(sample: dict, key: str) -> list:
    """This list of the sample, of the tokens that are learned from."""
    return list(itertools.compress(sample[key], sample["mask"])) if "mask" in sample else sample[key]


def correct_sample(sample: dict, old: list[float], kind: str, cap: float) -> None:
    """Correct for the mismatch of sampler and trainer, whose kernels differ. Sets "old" and "correction".

    old: the trainer's log-probabilities of the tokens that are learned from, before the step. The loss then has its
    ratio to these, and each token a factor w = probability by the trainer / by the sampler. "token": w of the token, at
    most `cap` (https://fengyao.notion.site/off-policy-rl). "sequence": the product of all w of the completion, at most
    `cap`. "sequence_mask": the same, and 0 above `cap`, as in TRL (`vllm_importance_sampling_mode`).
    """
    log_w = [a - b for a, b in zip(old, learned(sample, "logprobs"), strict=True)]
    if kind == "token":
        factors = [min(math.exp(x), cap) for x in log_w]
    else:
        product = math.exp(min(sum(log_w), 700.0))  # the largest that a float holds
        too_large = 0.0 if kind == "sequence_mask" else cap
        factors = [product if product <= cap else too_large] * len(log_w)
    sample["old"] = old
    sample["correction"] = factors


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
    The others are of the tokens that are learned from: predictors_N: int64, which of the B * L tokens comes before;
    targets_N: int64, its id; and in float32 sampler_N and old_N: nats, log-probability by the sampler, and the one that
    the loss has its ratio to, mostly the same tensor; advantage_N; weight_N; correction_N, mostly 1.
    """

    ids_BL: torch.Tensor
    positions_BL: torch.Tensor
    attention_BL: torch.Tensor | None
    ends_S1: torch.Tensor
    longest: int
    predictors_N: torch.Tensor
    targets_N: torch.Tensor
    sampler_N: torch.Tensor
    old_N: torch.Tensor
    advantage_N: torch.Tensor
    weight_N: torch.Tensor
    correction_N: torch.Tensor


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
        before = torch.arange(start + len(sample["prompt"]) - 1, end - 1)
        predictors.append(before[torch.tensor(sample["mask"], dtype=torch.bool)] if "mask" in sample else before)
    predictors_N = torch.cat(predictors)
    counts_S = torch.tensor([learned_tokens([s]) for s in samples])
    advantage_S = torch.tensor([s["advantage"] for s in samples], dtype=torch.float32)
    weight_S = torch.tensor([s.get("weight", 1.0) for s in samples], dtype=torch.float32)
    weight_N = weight_S.repeat_interleave(counts_S)
    sampler_N = torch.tensor([x for s in samples for x in learned(s, "logprobs")], dtype=torch.float32).to(device)
    old_N = sampler_N
    correction_N = torch.ones_like(weight_N)
    if all("old" in s for s in samples):
        old_N = torch.tensor([x for s in samples for x in s["old"]], dtype=torch.float32).to(device)
        correction_N = torch.tensor([x for s in samples for x in s["correction"]], dtype=torch.float32)
    return Batch(
        ids_BL=ids_BL.to(device),
        positions_BL=positions_BL.to(device),
        attention_BL=None if packed else attention_BL.to(device),
        ends_S1=torch.tensor(ends, dtype=torch.int32).to(device),
        longest=longest,
        predictors_N=predictors_N.to(device),
        targets_N=ids_BL.view(-1)[predictors_N + 1].to(device),
        sampler_N=sampler_N,
        old_N=old_N,
        advantage_N=advantage_S.repeat_interleave(counts_S).to(device),
        weight_N=weight_N.to(device),
        correction_N=correction_N.to(device),
    )


def grpo_loss(
    logprobs_N: torch.Tensor,
    old_N: torch.Tensor,
    advantage_N: torch.Tensor,
    total_tokens: int,
    epsilon: float,
    reference_N: torch.Tensor | None = None,
    kl_coef: float = 0.0,
    *,
    epsilon_high: float | None = None,
    weight_N: torch.Tensor | None = None,
    correction_N: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Clipped policy-gradient loss, summed over these tokens and divided by those of the whole step.

    So the losses, and the gradients, of all parts of micro-batches on all replicas add up to those of one big batch.
    The ratio to old_N, the sampler's log-probabilities, is clipped to [1 - epsilon, 1 + epsilon_high] (PPO,
    https://arxiv.org/abs/1707.06347; a bound of its own upwards: DAPO). With one optimizer step per rollout it differs
    from 1 only where trainer and sampler compute differently, and the clip bounds what such tokens can do. Returns
    (loss, sums over tokens for the metrics). weight_N: of tokens; correction_N: for the mismatch, and as in TRL not of
    the KL. That is the estimator r - log r - 1 with r = reference / policy, which is never negative
    (http://joschu.net/blog/kl-approx.html).
    """
    ratio_N = (logprobs_N - old_N).exp()
    plain_N = ratio_N * advantage_N
    upper = epsilon if epsilon_high is None else epsilon_high
    clipped_N = ratio_N.clamp(1 - epsilon, 1 + upper) * advantage_N
    objective_N = torch.minimum(plain_N, clipped_N)
    sums = {"clipped": (clipped_N < plain_N).detach().sum()}
    if correction_N is not None:
        objective_N = objective_N * correction_N
        sums["masked"] = (correction_N == 0).sum()
    if reference_N is not None:
        log_r_N = reference_N - logprobs_N
        kl_N = log_r_N.exp() - log_r_N - 1
        objective_N = objective_N - kl_coef * kl_N
        sums["kl"] = kl_N.detach().sum()
    if weight_N is not None:
        objective_N = objective_N * weight_N
    return -objective_N.sum() / total_tokens, sums


MISMATCH = ("logprob_gap", "ratio", "ratio_squared", "sampler_kl")


def mismatch(logprobs_N: torch.Tensor, sampler_N: torch.Tensor) -> dict[str, torch.Tensor]:
    """How far trainer and sampler are apart, in sums over tokens: those of MISMATCH.

    With r = probability by the trainer / by the sampler: |log r|, r, r squared, and r - 1 - log r, an estimate of
    KL(sampler || trainer) that is never negative.
    """
    log_ratio_N = (logprobs_N - sampler_N).detach()
    ratio_N = log_ratio_N.exp()
    found = (log_ratio_N.abs(), ratio_N, ratio_N.square(), ratio_N - 1 - log_ratio_N)
    return {name: x_N.sum() for name, x_N in zip(MISMATCH, found, strict=True)}
