"""Which attention a trainer computes: the model's own, by the fastest way that is right for it.

transformers' default, sdpa, leaves out what it does not know (soft caps, sinks): the trainer would learn another model
than the engine serves. And cuDNN's attention, torch's first choice for sdpa on H100s, builds a plan for each new shape,
which takes up to seconds; text has new shapes at each step. So on a GPU sequences go packed, without padding, into
torch's variable-length flash attention.

Shapes in names: T tokens of all sequences together, H heads, K heads of keys and values, D elements of a head.
"""

from __future__ import annotations

import inspect
import sys

import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PreTrainedConfig

try:
    from torch.nn.attention.varlen import varlen_attn  # torch 2.10 and newer
except ImportError:
    varlen_attn = None
# torch 2.12 and newer want grouped queries said, older ones just do them.
TAKES_GROUPS = varlen_attn is not None and "enable_gqa" in inspect.signature(varlen_attn).parameters

VARLEN = "colocate_varlen"  # under this name transformers knows `varlen_attention`


def attention_for(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> str:
    """The `attn_implementation` to load a model with: VARLEN, "sdpa" or "eager".

    On CUDA it also turns cuDNN's attention off in this process, for sdpa's sake. Raises ValueError if the model's class
    is unknown, or if it does not compute the soft caps that its config asks for.
    """
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(f"transformers has no causal language model for a config of type {config.model_type}")
    model_class = AutoModelForCausalLM._model_mapping[type(config)]
    text = config.get_text_config()
    cap = getattr(text, "attn_logit_softcapping", None)
    if cap:
        if "attn_logit_softcapping" not in inspect.getsource(sys.modules[model_class.__module__]):
            raise ValueError(f"{model_class.__name__} does not compute its config's attn_logit_softcapping")
        return "eager"
    if not model_class._supports_sdpa:  # sinks, among others
        return "eager"
    if device.type != "cuda":
        return "sdpa"
    torch.backends.cuda.enable_cudnn_sdp(False)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    # What flash attention can compute for a class comes to it as arguments; the rest would be in a mask, which it
    # does not get: chunks. Heads whose values are narrower (MLA) do not fit either.
    fits = (
        model_class._supports_flash_attn
        and model_class._supports_attention_backend
        and not getattr(text, "attention_chunk_size", None)
        and not hasattr(text, "v_head_dim")
        and varlen_is_right(text.num_attention_heads, kv_heads, head_dim, device, dtype)
    )
    return VARLEN if fits else "sdpa"


def varlen_is_right(heads: int, kv_heads: int, head_dim: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel takes such heads, and agrees with plain arithmetic: outputs and gradients, with a window too.

    Asked of the kernel itself, because what it takes differs between versions of torch and between GPUs.
    """
    generator = torch.Generator(device).manual_seed(0)
    lengths = [5, 11]
    ends_S = torch.tensor([0, 5, 16], dtype=torch.int32, device=device)
    shapes = [(16, heads, head_dim), (16, kv_heads, head_dim), (16, kv_heads, head_dim)]
    inputs = [torch.randn(shape, device=device, dtype=dtype, generator=generator) for shape in shapes]
    for window in (None, 4):
        leaves = [x.clone().requires_grad_() for x in inputs]
        exact = [x.double().requires_grad_() for x in inputs]
        try:
            found = flash_attention(*leaves, ends_S, max(lengths), head_dim**-0.5, window)
            found.float().square().sum().backward()
        except (TypeError, ValueError, RuntimeError):  # NotImplementedError is a RuntimeError
            return False
        expected = plain_attention(*exact, lengths, head_dim**-0.5, window)
        expected.square().sum().backward()
        pairs = [(found.detach(), expected.detach()), *((a.grad, b.grad) for a, b in zip(leaves, exact, strict=True))]
        if any(float((a.double() - b).norm() / b.norm()) > 0.03 for a, b in pairs):
            return False
    return True


def flash_attention(
    query_THD: torch.Tensor,
    key_TKD: torch.Tensor,
    value_TKD: torch.Tensor,
    ends_S: torch.Tensor,
    longest: int,
    scale: float | None,
    window: int | None,
) -> torch.Tensor:
    """(T, H, D): causal attention within each sequence; ends_S: int32, 0 and then the end of each sequence."""
    options = {}
    if TAKES_GROUPS and query_THD.shape[1] != key_TKD.shape[1]:
        options["enable_gqa"] = True
    reach = window - 1 if window else -1  # transformers counts a token itself into its window
    sizes = (ends_S, ends_S, longest, longest)
    return varlen_attn(query_THD, key_TKD, value_TKD, *sizes, scale=scale, window_size=(reach, 0), **options)


def plain_attention(
    query_THD: torch.Tensor,
    key_TKD: torch.Tensor,
    value_TKD: torch.Tensor,
    lengths: list[int],
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """The same as `flash_attention`, written out."""
    group = query_THD.shape[1] // key_TKD.shape[1]
    parts = [x.split(lengths) for x in (query_THD, key_TKD, value_TKD)]
    outputs = []
    for query, key, value in zip(*parts, strict=True):
        scores_Htt = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(group, 1)) * scale
        visible_tt = torch.ones(scores_Htt.shape[1:], dtype=torch.bool, device=query.device).tril()
        if window:
            visible_tt &= ~visible_tt.tril(-window)
        shares_Htt = scores_Htt.masked_fill(~visible_tt, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", shares_Htt, value.repeat_interleave(group, 1)))
    return torch.cat(outputs)


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **options,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface, with the arguments of its flash attention. Tensors are (rows, heads, L, D).

    Without cu_seq_lens_q each row is one sequence. Raises ValueError for what the kernel does not compute.
    """
    for name in ("softcap", "s_aux", "position_bias", "cache"):
        if options.get(name) is not None:
            raise ValueError(f"variable-length attention does not compute {name}, which {type(module).__name__} needs")
    rows, heads, length, head_dim = query.shape
    if key.shape[2] != length or options.get("is_causal") is False:
        raise ValueError("variable-length attention serves whole sequences under a causal mask, and no cache")
    if cu_seq_lens_q is None:
        cu_seq_lens_q = torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=query.device)
        max_length_q = length
    flat = [x.transpose(1, 2).reshape(rows * length, x.shape[1], head_dim) for x in (query, key, value)]
    window = sliding_window if sliding_window and sliding_window < max_length_q else None
    output_THD = flash_attention(*flat, cu_seq_lens_q, max_length_q, scaling, window)
    return output_THD.view(rows, length, heads, head_dim), None


def varlen_mask(*, attention_mask: torch.Tensor | None = None, use_vmap: bool = False, **options) -> None:
    """transformers' mask interface. A causal mask and a window need no tensor, and padding on the right none either.

    Raises ValueError for other masks.
    """
    if use_vmap or "allow_is_bidirectional_skip" in options:
        raise ValueError("variable-length attention computes causal masks and windows only")
    if attention_mask is not None and not bool(attention_mask[:, 0].all()):
        raise ValueError("variable-length attention takes padding on the right only")


AttentionInterface.register(VARLEN, varlen_attention)
AttentionMaskInterface.register(VARLEN, varlen_mask)
