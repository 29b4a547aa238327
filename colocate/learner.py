"""The trainers' optimizer: one step over all replicas, and its state on disk. This is the file to replace by yours.

Knows nothing of vLLM, Ray or handles. It promises two things to the rest: weights change in place, since engines have
them mapped, and after a step they are bitwise the same in all replicas.
"""

from __future__ import annotations

import copy
import datetime
import math
from pathlib import Path

import torch

from colocate.grpo import collate, grpo_loss, token_logprobs

STATE_FILE = "trainer_state.pt"  # beside a Hugging Face checkpoint: what `Learner` needs to go on


def join_group(rank: int, addresses: list[str], timeout_s: float, device: torch.device) -> None:
    """Meet the other trainers in torch.distributed's default process group. One trainer needs none.

    addresses: host:port of each trainer, in the order of ranks; they meet at the first. timeout_s: how long an
    all-reduce waits for a peer.
    """
    if len(addresses) == 1:
        return
    torch.distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        f"tcp://{addresses[0]}",
        rank=rank,
        world_size=len(addresses),
        timeout=datetime.timedelta(seconds=timeout_s),
    )


def default_learning_rate(model: torch.nn.Module, random_weights: bool) -> float:
    """Random weights stand much larger steps, which shrink with the width (https://arxiv.org/abs/2203.03466)."""
    return min(1e-2, 2.56 / model.get_input_embeddings().embedding_dim) if random_weights else 1e-5


class Learner:
    """AdamW on float32 master weights, from which the model's (bf16) weights are rounded in place.

    Masters and the optimizer's two moments take 12 bytes per parameter; with `offload` they are in host memory between
    steps. The gradient, one flat float32 tensor for a single all-reduce, takes 4 bytes more during a step. With several
    replicas, call `join_group` first, and `step` on all of them together.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        random_weights: bool = False,
        *,
        learning_rate: float | None,
        clip_range: float,
        kl_coef: float,
        micro_batch_size: int,
        offload: bool,
    ):
        """learning_rate: None for the default. kl_coef: above 0 it keeps a copy of the model as it is now."""
        self.model = model
        self.offload = offload
        self.clip_range = clip_range
        self.kl_coef = kl_coef
        self.micro_batch_size = micro_batch_size
        self.steps = 0
        self.metrics: dict[str, float] = {}  # what the last step returned
        self.parameters = list(model.parameters())  # tied weights come once
        self.device = self.parameters[0].device
        self.reference = copy.deepcopy(model).requires_grad_(False) if kl_coef else None
        self.masters = [p.detach().float().clone() for p in self.parameters]
        if learning_rate is None:
            learning_rate = default_learning_rate(model, random_weights)
        options = {"lr": learning_rate, "betas": (0.9, 0.95), "weight_decay": 0, "fused": True}
        self.optimizer = torch.optim.AdamW(self.masters, **options)
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            parameter.register_post_accumulate_grad_hook(lambda p, master=master: move_gradient(p, master))
        self._move_between_steps()

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
        del gradient, part  # before unused memory is given back
        self._move_between_steps()
        if not math.isfinite(norm):
            fix = "Check the rewards, or try a smaller --learning-rate"
            raise ValueError(f"the step has a gradient norm of {norm}, so the weights were left unchanged. {fix}")
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
        """Go on from `save`, at its learning rate unless one is given: bitwise as if there had been no break.

        Raises ValueError if only one of the two, the saved run or this one, has starting weights for the KL.
        """
        state = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
        if "reference" in state and not self.reference:
            raise ValueError(f"{folder} is of a run with --kl-coef. Give the same --kl-coef again")
        if self.reference and "reference" not in state:
            raise ValueError(f"{folder} is of a run without --kl-coef, and has no starting weights. Leave it out")
        self._move(self.device)
        for master, saved in zip(self.masters, state["masters"], strict=True):
            master.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        if learning_rate is not None:
            self.optimizer.param_groups[0]["lr"] = learning_rate
        self.steps = state["steps"]
        self.metrics = state.get("metrics", {})
        if self.reference:
            self.reference.load_state_dict(state["reference"])
        self.restore()
        self._move_between_steps()

    def _move_between_steps(self) -> None:
        self._move("cpu" if self.offload else self.device)

    def _move(self, device: torch.device | str) -> None:
        """Bring masters and moments to the device, and give unused GPU memory back: an engine may need it."""
        for master in self.masters:
            master.data = master.data.to(device)
        for state in self.optimizer.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = state[name].to(device)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def move_gradient(parameter: torch.nn.Parameter, master: torch.Tensor) -> None:
    """Add a parameter's gradient, as soon as it is there, to the float32 one of its master, and free it."""
    master.grad.add_(parameter.grad)
    parameter.grad = None
