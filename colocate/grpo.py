"""What the training actors learn, and how: reward, advantages, loss, and one optimizer step over all replicas.

GRPO's advantages (DeepSeekMath, https://arxiv.org/abs/2402.03300), the loss averaged over all tokens of the step as in
DAPO (https://arxiv.org/abs/2503.14476), one optimizer step per rollout. This is the file to replace by your trainer; it
knows nothing of vLLM, Ray or handles. All it promises to the rest: weights change in place (engines have them mapped),
and are bitwise the same in all replicas afterwards.

Shapes in names: B sequences of a micro-batch, L tokens of the longest of them, T = L - 1 predictions (of token t + 1 at
t), V vocabulary.
A sample is {"prompt": [ids], "tokens": [ids], "logprobs": [nats, the sampler's, one for each of tokens]}, and the
driver adds "advantage".
"""

from __future__ import annotations

import copy
import math
from pathlib import Path

import torch

STATE_FILE = "trainer_state.pt"  # beside an HF checkpoint: what `Learner` needs to go on


# ---------------------------------------------------------------------------------------------------------------------
# The task. Swap `reward` for yours: any Python function will do, of any scale.
# ---------------------------------------------------------------------------------------------------------------------


def reward(prompt: str | list[int], completion: str | list[int]) -> float:
    """Share of the completion's words that begin with a capital letter: Title Case, checked without any model.

    For models without a tokenizer (token ids in place of text): share of the ids that are multiples of 8.
    """
    if isinstance(completion, str):
        words = [w for w in completion.split() if w[0].isalpha()]
        return sum(w[0].isupper() for w in words) / max(len(words), 4)  # a short answer does not get around it
    return sum(t % 8 == 0 for t in completion) / len(completion)


def advantages(rewards: list[float], group_size: int) -> list[float]:
    """How much better each completion is than the others of its prompt: (reward - mean) / standard deviation.

    rewards: group after group. A group whose rewards are all equal teaches nothing: its advantages are 0.
    """
    groups = torch.tensor(rewards, dtype=torch.float64).view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True) + 1e-4)).flatten().tolist()


# ---------------------------------------------------------------------------------------------------------------------
# The loss
# ---------------------------------------------------------------------------------------------------------------------


def collate(samples: list[dict], device: torch.device) -> dict[str, torch.Tensor]:
    """Right-padded tensors of samples; mask_BT is 1 where a token of the completion is predicted."""
    B, L = len(samples), max(len(s["prompt"]) + len(s["tokens"]) for s in samples)
    ids_BL, attention_BL = torch.zeros(B, L, dtype=torch.int64), torch.zeros(B, L, dtype=torch.int64)
    mask_BT, sampler_BT = torch.zeros(B, L - 1), torch.zeros(B, L - 1)
    for b, s in enumerate(samples):
        start, end = len(s["prompt"]), len(s["prompt"]) + len(s["tokens"])
        ids_BL[b, :end] = torch.tensor([*s["prompt"], *s["tokens"]])
        attention_BL[b, :end] = 1
        mask_BT[b, start - 1 : end - 1] = 1
        sampler_BT[b, start - 1 : end - 1] = torch.tensor(s["logprobs"])
    advantage_B1 = torch.tensor([[s["advantage"]] for s in samples], dtype=torch.float32)
    batch = {"ids_BL": ids_BL, "attention_BL": attention_BL, "mask_BT": mask_BT, "sampler_BT": sampler_BT}
    return {k: v.to(device) for k, v in (batch | {"advantage_B1": advantage_B1}).items()}


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
    mask_BT, sampler_BT = batch["mask_BT"], batch["sampler_BT"]
    log_ratio_BT = (logprobs_BT - sampler_BT) * mask_BT
    ratio_BT = log_ratio_BT.exp()
    clipped_BT = ratio_BT.clamp(1 - clip_range, 1 + clip_range)
    objective_BT = torch.minimum(ratio_BT * batch["advantage_B1"], clipped_BT * batch["advantage_B1"])
    sums = {
        "logprob_gap": log_ratio_BT.abs(),
        "ratio": ratio_BT * mask_BT,
        "clipped": (clipped_BT * batch["advantage_B1"] < ratio_BT * batch["advantage_B1"]) * mask_BT,
    }
    if reference_BT is not None:
        log_r_BT = (reference_BT - logprobs_BT) * mask_BT
        kl_BT = log_r_BT.exp() - log_r_BT - 1
        objective_BT = objective_BT - kl_coef * kl_BT
        sums["kl"] = kl_BT
    loss = -(objective_BT * mask_BT).sum() / total_tokens
    return loss, {name: x.detach().sum() for name, x in sums.items()}


# ---------------------------------------------------------------------------------------------------------------------
# The step
# ---------------------------------------------------------------------------------------------------------------------


class Learner:
    """A model's optimizer: AdamW on float32 master weights, from which the model's (bf16) weights are rounded in place.

    Masters and the optimizer's two moments take 12 bytes per parameter; with `offload` they are in host memory between
    steps. The gradient, one flat float32 tensor for a single all-reduce, takes 4 bytes more during a step. With several
    replicas, torch.distributed must be initialized, and all call `step` together.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        learning_rate: float,
        clip_range: float,
        kl_coef: float,
        micro_batch_size: int,
        offload: bool,
    ):
        self.model, self.offload = model, offload
        self.steps, self.metrics = 0, {}  # of the last step: what it returned
        self.clip_range, self.kl_coef, self.micro_batch_size = clip_range, kl_coef, micro_batch_size
        self.parameters = list(model.parameters())  # tied weights come once
        self.device = self.parameters[0].device
        self.reference = copy.deepcopy(model).requires_grad_(False) if kl_coef else None
        self.masters = [p.detach().float().clone() for p in self.parameters]
        options = {"betas": (0.9, 0.95), "weight_decay": 0, "fused": True}
        self.optimizer = torch.optim.AdamW(self.masters, lr=learning_rate, **options)
        for i, p in enumerate(self.parameters):
            p.register_post_accumulate_grad_hook(lambda p, i=i: self._collect(p, i))
        self._move("cpu" if offload else self.device)

    def step(self, samples: list[dict], total_tokens: int) -> dict[str, float]:
        """One optimizer step on all replicas' samples; these are this replica's. total_tokens: of all completions.

        Returns {"loss", "grad_norm", "logprob_gap", "ratio", "clipped"[, "kl"]}: means over all tokens, the same on
        every replica. Raises ValueError, with the weights untouched, if the gradient is not finite.
        """
        self._move(self.device)
        sizes = [p.numel() for p in self.parameters]
        gradient = torch.zeros(sum(sizes), device=self.device)
        for master, part in zip(self.masters, gradient.split(sizes), strict=True):
            master.grad = part.view(master.shape)
        totals: dict[str, torch.Tensor] = {}
        for i in range(0, len(samples), self.micro_batch_size):
            batch = collate(samples[i : i + self.micro_batch_size], self.device)
            reference_BT = None
            if self.reference:
                with torch.no_grad():
                    reference_BT = token_logprobs(self.reference, batch)
            logprobs_BT = token_logprobs(self.model, batch)
            loss, sums = grpo_loss(logprobs_BT, batch, total_tokens, self.clip_range, reference_BT, self.kl_coef)
            loss.backward()
            for name, value in (sums | {"loss": loss.detach() * total_tokens}).items():
                totals[name] = totals.get(name, 0) + value.double()
        numbers = torch.stack([totals[name] for name in sorted(totals)])
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(gradient)
            torch.distributed.all_reduce(numbers)
        norm = float(torch.nn.utils.clip_grad_norm_(self.masters, 1.0))
        if math.isfinite(norm):
            self.optimizer.step()
            self.restore()
            self.steps += 1
            means = dict(zip(sorted(totals), (numbers / total_tokens).tolist(), strict=True))
            self.metrics = means | {"grad_norm": norm}
        self.optimizer.zero_grad(set_to_none=True)
        del gradient, part
        self._move("cpu" if self.offload else self.device)
        if not math.isfinite(norm):
            raise ValueError(f"found a gradient norm of {norm}, needed a finite one: the weights are unchanged")
        return self.metrics

    @torch.no_grad()
    def restore(self) -> None:
        """Set the model's weights to the masters, rounded to their dtype."""
        for p, master in zip(self.parameters, self.masters, strict=True):
            p.copy_(master)

    def save(self, folder: Path) -> None:
        """Write the optimizer's state beside the model's checkpoint."""
        state = {"steps": self.steps, "metrics": self.metrics, "masters": self.masters}
        state["optimizer"] = self.optimizer.state_dict()
        if self.reference:
            state["reference"] = self.reference.state_dict()
        torch.save(state, folder / STATE_FILE)

    def load(self, folder: Path, learning_rate: float | None = None) -> None:
        """Go on from `save`, at its learning rate unless one is given: bitwise as if there had been no break."""
        state = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
        if ("reference" in state) != bool(self.reference):
            found, fix = ("with", "type it again") if "reference" in state else ("without", "leave it out")
            raise ValueError(f"found a checkpoint of a run {found} --kl-coef, whose starting weights it needs: {fix}")
        self._move(self.device)
        for master, saved in zip(self.masters, state["masters"], strict=True):
            master.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        if learning_rate is not None:
            self.optimizer.param_groups[0]["lr"] = learning_rate
        self.steps, self.metrics = state["steps"], state.get("metrics", {})
        if self.reference:
            self.reference.load_state_dict(state["reference"])
        self.restore()
        self._move("cpu" if self.offload else self.device)

    def _collect(self, parameter: torch.nn.Parameter, i: int) -> None:
        """Add a parameter's gradient, as soon as it is there, to the float32 one, and free it."""
        self.masters[i].grad.add_(parameter.grad)
        parameter.grad = None

    def _move(self, device: torch.device | str) -> None:
        """Bring masters and moments to the device, and give unused GPU memory back: an engine may need it."""
        for master in self.masters:
            master.data = master.data.to(device)
        for state in self.optimizer.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = state[name].to(device)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
