"""The trainers' optimizer: one step over all replicas, and its state on disk. This is the file to replace by yours.

Knows nothing of vLLM, Ray or handles; of shards and adapters only what they have in common with `sharding.Whole`. It
promises two things to the rest: weights change in place, since engines have them mapped, and after a step they are
bitwise the same in all replicas.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import weakref
from pathlib import Path

import torch

from colocate import trainer_state
from colocate.adapters import Adapted
from colocate.attention import VARLEN
from colocate.grpo import MISMATCH, Batch, collate, correct_sample, grpo_loss, learned_tokens, micro_batches, mismatch
from colocate.logprobs import (
    CHUNK_BYTES,
    checkpoint_layers,
    chunk_tokens,
    compile_layers,
    find_route,
    layers_of,
    logprobs_of,
    naming_compile_errors,
    states,
    token_logprobs,
)
from colocate.model_folder import LENGTHS
from colocate.sharding import Gathered, Shard, Whole

# Makes a trainer of shards that has no more samples go along with the others: its gradient is 0.
DUMMY = {"prompt": [0], "tokens": [0], "logprobs": [0.0], "advantage": 0.0}
# Tokens of a micro-batch on a GPU, at most. One step of Qwen2.5-0.5B's shape with 64 x 272 tokens on an H100, with
# micro-batches of 4,400, 6,000, 9,000 and 18,000 tokens: 0.51, 0.45, 0.34 and 0.37 s; 15.3, 17.5, 21.0 and 32.3 GiB,
# before layers were compiled. Few tokens should be one micro-batch, as they wait for the host rather than for the GPU:
# 64 uneven completions of up to 256 tokens, 9,600 with their prompts, take 0.24 s so, and took 0.35 s as two.
ENOUGH_TOKENS = 12_000
CHECKPOINTED_TOKENS = 36_000  # with gradient checkpointing, where a token takes a small part of that memory
MASKED_TOKENS = 2048  # where attention takes a mask, whose cost grows with the square of the tokens
CPU_TOKENS = 1024
MOMENTS = ("exp_avg", "exp_avg_sq")


def join_group(rank: int, addresses: list[str], timeout_s: float, device: torch.device, sharded: bool = False) -> None:
    """Meet the other trainers in torch.distributed's default process group. One trainer needs none, unless `sharded`.

    addresses: host:port of each trainer, in the order of ranks; they meet at the first. timeout_s: how long an
    all-reduce waits for a peer.
    """
    if len(addresses) == 1 and not sharded:
        return
    if name := interface_of(addresses[rank].rpartition(":")[0]):
        # Else gloo takes the address to which the host's name leads, which may be one that other nodes cannot reach.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
    torch.distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        f"tcp://{addresses[0]}",
        rank=rank,
        world_size=len(addresses),
        timeout=datetime.timedelta(seconds=timeout_s),
    )


def interface_of(address: str) -> str:
    """The network interface of this host that has this address; "" if none has, or it is the loopback's."""
    import psutil

    for name, entries in psutil.net_if_addrs().items():
        if name != "lo" and any(entry.address == address for entry in entries):
            return name
    return ""


def hold(
    model: torch.nn.Module, device: torch.device, shards: int, bucket_bytes: int | None, lora: dict | None = None
) -> Whole:
    """All of the model (shards: 0), or a shard that this trainer shares with so many. bucket_bytes: of `Gathered`.

    lora: of `Adapted`, if it is to train adapters.
    """
    if lora:
        return Adapted(model, **lora)
    if not shards:
        return Whole(model)
    return Gathered(model, shards, device, bucket_bytes) if bucket_bytes else Shard(model, shards, device)


def default_learning_rate(model: torch.nn.Module, random_weights: bool, adapters: bool = False) -> float:
    """Random weights stand much larger steps, which shrink with the width (https://arxiv.org/abs/2203.03466), and
    adapters ten times as large ones (https://thinkingmachines.ai/blog/lora/)."""
    if random_weights:
        return min(1e-2, 2.56 / model.get_input_embeddings().embedding_dim)
    return 1e-4 if adapters else 1e-5


class Learner:
    """AdamW on float32 master weights, from which the (bf16) weights that engines read are rounded in place.

    Masters and the optimizer's two moments take 12 bytes per parameter; with `offload` they are in host memory between
    steps (masters that are shards stay: FSDP computes with them). The gradient takes 4 bytes more during a step. With
    several trainers, call `join_group` first, and `step` on all of them together.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        random_weights: bool = False,
        *,
        learning_rate: float | None,
        epsilon: float,
        kl_coef: float,
        offload: bool,
        tokens_per_micro_batch: int | None = None,
        micro_batch_size: int | None = None,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        epsilon_high: float | None = None,
        temperature: float = 1.0,
        num_iterations: int = 1,
        correction: str = "none",
        correction_cap: float = 3.0,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        lr_scheduler: str = "constant",
        warmup_steps: int = 0,
        scheduled_steps: int = 0,
        held: Whole | None = None,
    ):
        """held: what this trainer holds of the model; None: all. learning_rate: None for the default. kl_coef: above 0
        it keeps a copy of the weights as they are now.

        temperature: of the sampler, whose log-probabilities have it in them. num_iterations: optimizer steps on the
        same samples. correction: see `grpo.correct_sample`. lr_scheduler, ...: see `learning_rate_factor`.

        tokens_per_micro_batch: prompts' and completions', at most; None: see `_fitting_tokens`. micro_batch_size:
        sequences, at most; None for no bound. compile: see `logprobs.compile_layers`. Only with VARLEN: on an H100 a
        tiny Gemma 2, whose attention is eager, took 80 s to compile.

        Raises ValueError if the model's attention is not its own (see `logprobs.find_route`), or if it has no gradient
        checkpointing and that is asked for.
        """
        self.model = model
        self.epsilon = epsilon
        self.epsilon_high = epsilon_high
        self.temperature = temperature
        self.num_iterations = num_iterations
        self.correction = correction
        self.correction_cap = correction_cap
        self.max_grad_norm = max_grad_norm
        self.schedule = (lr_scheduler, warmup_steps, scheduled_steps)
        self.kl_coef = kl_coef
        self.tokens_per_micro_batch = tokens_per_micro_batch
        self.micro_batch_size = micro_batch_size
        self.gradient_checkpointing = gradient_checkpointing
        self.workspace = 0  # bytes of GPU memory that the last step gave back
        self.host: dict[str, torch.Tensor] = {}  # with offload: see `_on_host`
        self.steps = 0
        self.updates = 0  # of the optimizer: num_iterations in each step
        self.interrupted = False  # in the middle of a step's iterations: there is no whole step to go on from
        self.metrics: dict[str, float] = {}  # what the last step returned
        self.held = held or Whole(model)
        self.device = next(iter(self.held.memory.values())).device
        self.offload = offload and self.device.type == "cuda"
        self.route = find_route(model)
        self.reference = self.held.starting_weights() if kl_coef else None
        self.compile = compile and model.config._attn_implementation == VARLEN and bool(layers_of(model))
        if self.compile:
            compile_layers(model)
        if gradient_checkpointing:
            checkpoint_layers(model)
        self.masters = self.held.masters()
        if learning_rate is None:
            learning_rate = default_learning_rate(model, random_weights, bool(self.held.base))
        options = {"lr": learning_rate, "betas": (0.9, 0.95), "weight_decay": weight_decay, "fused": True}
        self.optimizer = torch.optim.AdamW(self.masters, **options)
        self.optimizer.param_groups[0]["initial_lr"] = learning_rate
        self._move_between_steps()

    def __str__(self) -> str:
        """What was chosen for this model and this GPU."""
        attention = self.model.config._attn_implementation
        size = f"micro-batches of {self.tokens_per_micro_batch or '?'} tokens"
        compiled = ", layers compiled" if self.compile else ""
        return f"{self.held}, {attention} attention, {self.route}, {size}{compiled}"

    def step(self, samples: list[dict], total_tokens: int) -> dict[str, float]:
        """num_iterations optimizer steps on all trainers' samples; these are this one's. total_tokens: of all.

        Returns {"loss", "grad_norm", "logprob_gap", "ratio", "effective", "sampler_kl", "worst_token", "masked",
        "clipped"[, "kl"]}: means over all tokens, the same on every trainer; of the last optimizer step, but of the
        first what tells trainer and sampler apart: "effective" is the effective sample size, (sum r)^2 / sum r^2 with
        the ratio r, as a share of the tokens, and "worst_token" the largest |log r|. Raises ValueError, with the
        weights untouched, if the gradient is not finite, or torch cannot compile the layers.
        """
        self.interrupted = self.num_iterations > 1  # by a loss in the middle of them, if it stays so
        first = self._optimize(samples, total_tokens, correct=self.correction != "none")
        last = first
        for _ in range(1, self.num_iterations):
            last = self._optimize(samples, total_tokens)
        of_sampler = {*MISMATCH, "effective", "worst_token"}
        self.steps += 1
        self.interrupted = False
        self.metrics = last | {name: first[name] for name in first if name in of_sampler}
        return self.metrics

    def _optimize(self, samples: list[dict], total_tokens: int, correct: bool = False) -> dict[str, float]:
        """One optimizer step, the correction's forward pass before it. Returns its metrics."""
        self._reserve_workspace()
        self._bring_masters()
        self.held.begin_step(self.masters, self.device)
        with naming_compile_errors():
            if correct:
                self._correct(samples)
            totals = self._add_gradients(samples, total_tokens)
        self.held.sum_gradients(self.masters)
        worst = totals.pop("worst_token")
        numbers = torch.stack([totals[name] for name in sorted(totals)])
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(numbers)
            torch.distributed.all_reduce(worst, torch.distributed.ReduceOp.MAX)
        norm = self.held.norm(torch.nn.utils.get_total_norm([m.grad for m in self.masters if m.grad is not None]))
        torch.nn.utils.clip_grads_with_norm_(self.masters, self.max_grad_norm or math.inf, norm)
        norm = float(norm)
        metrics = dict(zip(sorted(totals), (numbers / total_tokens).tolist(), strict=True))
        if math.isfinite(norm):
            group = self.optimizer.param_groups[0]
            group["lr"] = group["initial_lr"] * learning_rate_factor(self.steps, *self.schedule)
            self._bring_moments()  # not before: activations may have their place until now
            self.optimizer.step()
            self.updates += 1
            self.restore()
            metrics |= {"grad_norm": norm, "worst_token": float(worst), "learning_rate": group["lr"]}
            metrics["effective"] = metrics["ratio"] ** 2 / max(metrics.pop("ratio_squared"), 1e-30)
        self.optimizer.zero_grad(set_to_none=True)
        self.workspace = self._move_between_steps()
        if not math.isfinite(norm):
            fix = "Check the rewards, or try a smaller --learning-rate"
            raise ValueError(f"the step has a gradient norm of {norm}, so the weights were left unchanged. {fix}")
        return metrics

    def _correct(self, samples: list[dict]) -> None:
        """Look up the trainer's own log-probabilities before the step."""
        parts, batches = self._micro_batches(samples)
        found = [logprobs_of(self.model, batch, self.route, self.temperature) for batch in batches]
        for part, found_N in zip(parts, found, strict=False):
            counts = [learned_tokens([sample]) for sample in part]
            for sample, old_T in zip(part, found_N.cpu().split(counts), strict=True):
                correct_sample(sample, old_T.tolist(), self.correction, self.correction_cap)

    def _micro_batches(self, samples: list[dict]) -> tuple[list[list[dict]], list[Batch]]:
        """(the samples in micro-batches, these on the device). Trainers with shards make as many passes as the one that
        needs most: batches of DUMMY follow.
        """
        if self.tokens_per_micro_batch is None:
            self.tokens_per_micro_batch = self._fitting_tokens()
        packed = self.route.packed
        parts = micro_batches(samples, self.tokens_per_micro_batch, self.micro_batch_size, packed)
        idle = self.held.most(len(parts)) - len(parts)
        # All are brought to the GPU before it has work: a copy from the host waits for what it does at the time.
        return parts, [collate(part, self.device, packed) for part in (*parts, *[[DUMMY]] * idle)]

    def _add_gradients(self, samples: list[dict], total_tokens: int) -> dict[str, torch.Tensor]:
        """Forward and backward passes of all micro-batches. Returns float64 sums over their tokens, for the metrics."""
        parts, batches = self._micro_batches(samples)
        references = [None] * len(batches)
        if self.reference:
            with self.held.computing_with(self.reference):
                references = [logprobs_of(self.model, b, self.route, self.temperature) for b in batches]
        totals: dict[str, torch.Tensor] = {}
        for batch, reference_N in zip(batches[: len(parts)], references, strict=False):
            self._add_gradient(batch, reference_N, total_tokens, totals)
        for batch in batches[len(parts) :]:
            self._add_gradient(batch, None, total_tokens, {})
        return totals

    def _add_gradient(
        self, batch: Batch, reference_N: torch.Tensor | None, total_tokens: int, totals: dict[str, torch.Tensor]
    ) -> None:
        """Forward and backward pass of a micro-batch, whose sums are added to `totals`. reference_N: for the KL.

        The head goes forward and back with one chunk of tokens at a time, so only one chunk's logits exist. The
        gradients at its inputs are put together, and go back through the rest of the model at once.
        """
        whole_NH = states(self.model, batch, self.route)
        n = chunk_tokens(self.model)
        chunks = [chunk.detach().requires_grad_() for chunk in whole_NH.split(n)]
        of_batch = (batch.targets_N, batch.sampler_N, batch.old_N, batch.advantage_N)
        of_batch += (batch.weight_N, batch.correction_N)
        references = [None] * len(chunks) if reference_N is None else reference_N.split(n)
        columns = [chunks, *(column_N.split(n) for column_N in of_batch), references]
        for states_nH, targets_n, sampler_n, old_n, advantage_n, weight_n, correction_n, reference_n in zip(
            *columns, strict=True
        ):
            logprobs_n = token_logprobs(self.model, states_nH, targets_n, self.route, self.temperature)
            rest = (total_tokens, self.epsilon, reference_n, self.kl_coef)
            options = {"epsilon_high": self.epsilon_high, "weight_N": weight_n, "correction_N": correction_n}
            loss, sums = grpo_loss(logprobs_n, old_n, advantage_n, *rest, **options)
            loss.backward()
            sums |= mismatch(logprobs_n, sampler_n) | {"loss": loss.detach() * total_tokens}
            for name, value in sums.items():
                totals[name] = totals.get(name, 0) + value.double()
            worst = torch.cat([(logprobs_n - sampler_n).detach().abs().double(), totals["loss"].new_zeros(1)]).max()
            totals["worst_token"] = torch.maximum(worst, totals.get("worst_token", worst))
        whole_NH.backward(torch.cat([chunk.grad for chunk in chunks]))

    def _fitting_tokens(self) -> int:
        """How many tokens a micro-batch may have: what three quarters of the free GPU memory hold of activations, and
        no more than the constants above say; on a CPU CPU_TOKENS.

        A forward pass of one sequence tells what a token takes; of compiled layers it takes less.
        """
        if self.device.type != "cuda":
            return CPU_TOKENS
        enough = CHECKPOINTED_TOKENS if self.gradient_checkpointing else ENOUGH_TOKENS
        if self.model.config._attn_implementation != VARLEN:
            enough = MASKED_TOKENS
        count = sample_tokens(self.model.config)
        sample = {"prompt": [0], "tokens": [0] * (count - 1), "logprobs": [0.0] * (count - 1), "advantage": 0.0}
        batch = collate([sample], self.device, self.route.packed)
        with torch.compiler.set_stance("force_eager"):  # layers need not be compiled for so small a batch
            with torch.no_grad():
                states(self.model, batch, self.route)  # FSDP leaves embedding and head gathered, which no token takes
            before = torch.cuda.memory_allocated(self.device)
            whole_NH = states(self.model, batch, self.route)
            per_token = (torch.cuda.memory_allocated(self.device) - before) / count
            del whole_NH
        free = torch.cuda.mem_get_info(self.device)[0] + torch.cuda.memory_reserved(self.device) - before
        if not self.optimizer.state and not self.offload:  # the first step makes the two moments
            free -= 8 * sum(m.numel() for m in self.masters)
        free -= 4 * sum(m.numel() for m in self.masters if m.grad is None)
        return max(1, min(enough, int((0.75 * free - 3 * CHUNK_BYTES) / per_token)))

    def _reserve_workspace(self) -> None:
        """Take as much memory as the last step gave back, in one piece, which torch's allocator then cuts up.

        Without that each step asks the driver for hundreds of pieces anew. Not with shards: FSDP works on streams of
        its own, which cannot use what was reserved on this one.
        """
        if self.workspace and not self.held.group:
            with contextlib.suppress(torch.OutOfMemoryError):
                torch.empty(self.workspace, dtype=torch.uint8, device=self.device)

    @torch.no_grad()
    def restore(self) -> None:
        """Set the weights that engines read to what the masters say."""
        self.held.restore(self.masters)

    def save(self, folder: Path) -> None:
        """Write the optimizer's state beside the model's checkpoint: all trainers of one replica together."""
        numbers = {"steps": self.steps, "metrics": self.metrics, "updates": self.updates}
        numbers["lr"] = self.optimizer.param_groups[0]["initial_lr"]
        numbers["with_reference"] = bool(self.reference)
        self.held.save(folder)
        trainer_state.write(folder, self._state(), numbers, self.held.group)
        self._move_between_steps()  # moments that were made for this

    def load(self, folder: Path, learning_rate: float | None = None) -> None:
        """Go on from `save`, at its learning rate unless one is given: bitwise as if there had been no break, if as
        many trainers make up a replica as then.

        Raises ValueError if only one of the two, the saved run or this one, has starting weights for the KL.
        """
        numbers = trainer_state.read_numbers(folder)
        if numbers["with_reference"] and not self.reference:
            raise ValueError(f"{folder} is of a run with --kl-coef. Give the same --kl-coef again")
        if self.reference and not numbers["with_reference"]:
            raise ValueError(f"{folder} is of a run without --kl-coef, and has no starting weights. Leave it out")
        trainer_state.read_tensors(folder, self._state())
        self.held.load(folder)
        self.steps = numbers["steps"]
        self.updates = numbers["updates"]
        self.metrics = numbers["metrics"]
        for state in self.optimizer.state.values():
            state["step"].fill_(self.updates)
        self.optimizer.param_groups[0]["initial_lr"] = numbers["lr"] if learning_rate is None else learning_rate
        self.restore()
        self._move_between_steps()

    def _state(self) -> dict[str, torch.Tensor]:
        """All tensors by name, for trainer_state. AdamW's moments are made if there has been no step."""
        state = {f"base.{name}": tensor for name, tensor in self.held.base.items()}
        if self.reference and not state:
            found = zip(self.held.memory, self.reference, strict=True)
            state = {f"reference.{name}": self.held.placed(name, tensor) for name, tensor in found}
        home = {moment: self._on_host(moment) for moment in MOMENTS} if self.offload else {}
        for i, (name, master) in enumerate(zip(self.held.master_names(), self.masters, strict=True)):
            moments = self.optimizer.state[master]
            if not moments:
                moments["step"] = torch.zeros((), device=self.device)
                for moment in MOMENTS:
                    moments[moment] = home[moment][i].zero_() if home else torch.zeros_like(master)
            tensors = {"master": master} | {moment: moments[moment] for moment in MOMENTS}
            state |= {f"{part}.{name}": self.held.placed(name, t) for part, t in tensors.items()}
        return state

    def _move_between_steps(self) -> int:
        """Bring masters and moments where they stay, and give unused GPU memory back: an engine may need it.

        Returns how many bytes were given back.
        """
        self.held.release()
        if self.offload:
            self._send_to_host()
        if self.device.type != "cuda":
            return 0
        reserved = torch.cuda.memory_reserved(self.device)
        torch.cuda.empty_cache()
        return reserved - torch.cuda.memory_reserved(self.device)

    def _bring_masters(self) -> None:
        """To the GPU, if they are not there."""
        for master in self.masters:
            master.data = master.data.to(self.device, non_blocking=True)

    def _bring_moments(self) -> None:
        for state in self.optimizer.state.values():
            state |= {name: state[name].to(self.device, non_blocking=True) for name in MOMENTS}

    def _send_to_host(self) -> None:
        """Masters, but for those that the model computes with, and moments."""
        if not self.held.group:
            for master, on_host in zip(self.masters, self._on_host("master"), strict=True):
                master.data = copied(master.data, on_host)
        for name in MOMENTS if self.optimizer.state else ():
            for master, on_host in zip(self.masters, self._on_host(name), strict=True):
                if state := self.optimizer.state.get(master):
                    state[name] = copied(state[name], on_host)
        torch.cuda.synchronize(self.device)

    def _on_host(self, name: str) -> list[torch.Tensor]:
        """Host memory for each master, or for its moment of this name: always the same, parts of one piece.

        It is page-locked, since copies are several times faster then; not by torch's own means, which take up to twice
        as much, as they go by powers of two.
        """
        sizes = [m.numel() for m in self.masters]
        if name not in self.host:
            memory = torch.empty(sum(sizes), dtype=torch.float32)
            torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)))
            weakref.finalize(memory, torch.cuda.cudart().cudaHostUnregister, memory.data_ptr())
            self.host[name] = memory
        return [part.view(m.shape) for part, m in zip(self.host[name].split(sizes), self.masters, strict=True)]


def copied(tensor: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
    """`to`, with the tensor's values, unless it is that already."""
    return to if tensor.data_ptr() == to.data_ptr() else to.copy_(tensor, non_blocking=True)


def sample_tokens(config) -> int:
    """Tokens of the sequence that tells what a token takes: 512, or what the model's context has if that is less."""
    config = config.get_text_config()
    return min(512, *(getattr(config, name, None) or 512 for name in LENGTHS))


def learning_rate_factor(step: int, kind: str, warmup_steps: int, scheduled_steps: int) -> float:
    """Of the learning rate in the step after so many: it rises linearly in the warm-up, then it is as `kind` says.

    "constant": 1; "linear", "cosine": down to 0 after scheduled_steps, of which the warm-up is a part.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if kind == "constant":
        return 1.0
    done = min(1.0, (step - warmup_steps) / max(1, scheduled_steps - warmup_steps))
    return 1 - done if kind == "linear" else 0.5 * (1 + math.cos(math.pi * done))
