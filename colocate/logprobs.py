"""Log-probabilities of completions by a transformers model: sequences packed, the vocabulary in chunks.

Only the hidden states that predict a completion's token go through the head, so many at a time that their logits stay
below CHUNK_BYTES in float32; a step of 16,384 tokens and 151,936 words would need 10 GB for them at once.

Shapes in names as in `grpo`, and: H elements of a state, V vocabulary, n tokens of a chunk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from colocate.attention import VARLEN
from colocate.grpo import Batch, collate

CHUNK_BYTES = 512 * 2**20


@dataclasses.dataclass(frozen=True)
class Route:
    """How a model's log-probabilities are computed. `find_route` finds out what its class can do.

    packed: several sequences in one row. masked: a mask tells them apart, where transformers does not see it from their
    positions (OPT). by_head: the base model makes states, which `logits` turns into logits; otherwise the model's own
    forward makes all logits at once.
    """

    packed: bool = True
    masked: bool = False
    by_head: bool = True

    def __str__(self) -> str:
        return f"{'packed' if self.packed else 'padded'} sequences, logits {'in chunks' if self.by_head else 'at once'}"


ROUTES = (  # the best first
    Route(),
    Route(masked=True),
    Route(packed=False),
    Route(by_head=False),
    Route(masked=True, by_head=False),
    Route(packed=False, by_head=False),
)


def states(model: torch.nn.Module, batch: Batch, route: Route) -> torch.Tensor:
    """(N, H): what the head makes the logits of completion tokens from; with `not route.by_head` the logits, (N, V).

    Raises ValueError if a mask was to tell sequences apart and some layers have windows, which it would hide.
    """
    inputs = {"input_ids": batch.ids_BL, "attention_mask": batch.attention_BL, "use_cache": False}
    if route.packed:
        inputs["position_ids"] = batch.positions_BL
    if route.masked:
        text = model.config.get_text_config()
        if getattr(text, "sliding_window", None) or getattr(text, "attention_chunk_size", None):
            raise ValueError(f"{type(model).__name__} has layers with windows, which take no mask of ours")
        inputs["attention_mask"] = packed_mask(batch, model)
    elif route.packed and model.config._attn_implementation == VARLEN:
        ends = batch.ends_S1
        longest = batch.longest
        inputs |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
        # A mask of four dimensions is taken as it is. With none, transformers would look for packed sequences, and wait
        # for the GPU to answer.
        inputs["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ends.device)
    base = getattr(model, "run_base", model.base_model)  # of a sharded model, see sharding.Shard
    found_BLH = base(**inputs).last_hidden_state if route.by_head else model(**inputs).logits
    return found_BLH.flatten(0, 1).index_select(0, batch.predictors_N)


def packed_mask(batch: Batch, model: torch.nn.Module) -> torch.Tensor:
    """(1, 1, L, L): which tokens of the row each one sees, those before it in its sequence. For eager it is added."""
    sequence_L = (batch.positions_BL[0] == 0).cumsum(0)
    visible_LL = (sequence_L[:, None] == sequence_L).tril()[None, None]
    if model.config._attn_implementation != "eager":
        return visible_LL
    return torch.zeros_like(visible_LL, dtype=model.dtype).masked_fill(~visible_LL, torch.finfo(model.dtype).min)


def logits(model: torch.nn.Module, states_nH: torch.Tensor, route: Route) -> torch.Tensor:
    """(n, V), in the model's dtype. The three ways in which transformers' models change what their head returns."""
    if not route.by_head:
        return states_nH
    logits_nV = model.get_output_embeddings()(states_nH)
    config = model.config.get_text_config()
    if scale := getattr(config, "logit_scale", None):  # Cohere
        logits_nV = logits_nV * scale
    if divisor := getattr(config, "logits_scaling", None):  # Granite
        logits_nV = logits_nV / divisor
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma
        logits_nV = torch.tanh(logits_nV / cap) * cap
    return logits_nV


class TokenLogprobs(torch.autograd.Function):
    """(n,) float32, nats: log_softmax(logits)[target]. In backward the log-softmax turns into the gradient in place."""

    @staticmethod
    def forward(ctx, logits_nV: torch.Tensor, targets_n: torch.Tensor) -> torch.Tensor:
        logprobs_nV = logits_nV.float().log_softmax(-1)
        ctx.save_for_backward(logprobs_nV, targets_n)
        ctx.dtype = logits_nV.dtype
        return logprobs_nV.gather(1, targets_n[:, None])[:, 0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_n: torch.Tensor) -> tuple[torch.Tensor, None]:
        logprobs_nV, targets_n = ctx.saved_tensors
        probabilities_nV = logprobs_nV.exp_()
        target_n1 = probabilities_nV.gather(1, targets_n[:, None])
        grad_nV = torch.empty_like(probabilities_nV, dtype=ctx.dtype)
        torch.mul(probabilities_nV, -grad_n[:, None], out=grad_nV)
        grad_nV.scatter_(1, targets_n[:, None], ((1 - target_n1) * grad_n[:, None]).to(ctx.dtype))
        return grad_nV, None


def token_logprobs(
    model: torch.nn.Module, states_nH: torch.Tensor, targets_n: torch.Tensor, route: Route, temperature: float = 1.0
) -> torch.Tensor:
    """(n,) float32, nats: log-probability of each target at this temperature."""
    logits_nV = logits(model, states_nH, route)
    if temperature != 1.0:  # in float32, as vLLM does it
        logits_nV = logits_nV.float() / temperature
    return TokenLogprobs.apply(logits_nV, targets_n)


def chunk_tokens(model: torch.nn.Module) -> int:
    """How many tokens go through the head at a time."""
    return max(1, CHUNK_BYTES // (4 * model.get_output_embeddings().weight.shape[0]))


@torch.no_grad()
def logprobs_of(model: torch.nn.Module, batch: Batch, route: Route, temperature: float = 1.0) -> torch.Tensor:
    """(N,) float32, nats: log-probabilities of the completions' tokens. Without gradient."""
    n = chunk_tokens(model)
    chunks = zip(states(model, batch, route).split(n), batch.targets_N.split(n), strict=True)
    return torch.cat([token_logprobs(model, states_nH, ids_n, route, temperature) for states_nH, ids_n in chunks])


def layers_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Those that transformers can checkpoint: they hold nearly all of a model. Some models have none."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def compile_layers(model: torch.nn.Module) -> None:
    """Let torch fuse what is between a layer's matrix products, at its first use. Call `checkpoint_layers` afterwards.

    Layers of one kind share their code, which is made for any number of tokens.
    """
    for layer in layers_of(model):
        layer.forward = torch.compile(layer.forward, dynamic=True)


@contextlib.contextmanager
def naming_compile_errors() -> Iterator[None]:
    """Say in ValueError what to do about a layer that torch cannot compile."""
    try:
        yield
    except torch._dynamo.exc.TorchDynamoException as error:
        what = " ".join(str(error).split())[:300]
        raise ValueError(f"torch cannot compile the model's layers ({what}). Try: --no-compile") from error


def checkpoint_layers(model: torch.nn.Module) -> None:
    """Keep only the inputs of the model's layers for the backward pass, which computes the rest again.

    transformers' own switch works in training mode only, and that turns dropout on. Raises ValueError if the model has
    no layers that are made for it.
    """
    layers = layers_of(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no gradient checkpointing. Leave --gradient-checkpointing out")
    for layer in layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


@torch.no_grad()
def find_route(model: torch.nn.Module) -> Route:
    """The best route that computes what the model itself does, with plain attention, one sequence at a time.

    Three short sequences are tried. Raises ValueError if no route does.
    """
    size = model.get_input_embeddings().weight.shape[0]
    device = model.get_input_embeddings().weight.device
    ids = [(7 + 13 * i) % size for i in range(24)]
    sequences = [ids[:6], ids[6:13], ids[13:]]
    samples = [{"prompt": s[:2], "tokens": s[2:], "logprobs": [0.0] * len(s[2:]), "advantage": 0.0} for s in sequences]
    other = samples[0] | {"prompt": ids[-2:]}  # what it holds must not reach its neighbours
    chosen = model.config._attn_implementation
    model.set_attn_implementation("eager")
    whole = Route(packed=False, by_head=False)
    expected = [states(model, collate([s], device, packed=False), whole) for s in samples]
    model.set_attn_implementation(chosen)
    # Half precision rounds each layer's output; a wrong position or mask changes it by its own size.
    tolerance = 1e-3 if expected[0].dtype == torch.float32 else 0.1
    for route in ROUTES:
        try:
            found, beside_other = (
                logits(model, states(model, collate([first, *samples[1:]], device, route.packed), route), route)
                for first in (samples[0], other)
            )
        except torch.OutOfMemoryError:
            raise
        except (
            TypeError,
            ValueError,
            IndexError,
            RuntimeError,
        ):  # an argument or a mask that it does not know
            continue
        rest = slice(len(samples[0]["tokens"]), None)
        right = difference(found, torch.cat(expected)) < tolerance
        apart = difference(beside_other[rest], found[rest]) < tolerance / 10
        if right and apart:
            return route
    raise ValueError(
        f"{type(model).__name__} computes other logits with {chosen} attention than with its plain one. "
        'Load it with attn_implementation="eager"'
    )


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-30))
