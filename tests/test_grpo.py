"""What the trainers learn: advantages, the loss against its formula, replicas against one process, save and load."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from running import deadline

torch = pytest.importorskip("torch")

from colocate import attention, grpo, logprobs  # noqa: E402
from colocate.attention import VARLEN, attention_for  # noqa: E402
from colocate.config import Config  # noqa: E402
from colocate.learner import (  # noqa: E402
    Learner,
    default_learning_rate,
    join_group,
    learning_rate_factor,
    sample_tokens,
)
from colocate.logprobs import ROUTES, Route  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MLP = {"intermediate_size": 64, "max_position_embeddings": 64}
WINDOW = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
CAPS = {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 0.7}
# Each with what makes it different: grouped heads, windows, caps, scales, learned positions, projections.
FAMILIES = {
    "llama": SIZES | MLP | {"num_key_value_heads": 2},
    "qwen2": SIZES | MLP | WINDOW | {"num_key_value_heads": 1, "use_sliding_window": True},
    "qwen3": SIZES | MLP | {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True},
    "gemma2": SIZES | MLP | WINDOW | CAPS | {"num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 4},
    "opt": SIZES | {"ffn_dim": 64, "max_position_embeddings": 64, "word_embed_proj_dim": 16},
    "gpt2": SIZES | {"n_positions": 64, "scale_attn_by_inverse_layer_idx": True},
    "cohere": SIZES | MLP | {"num_key_value_heads": 2, "logit_scale": 0.25},
    "granite": SIZES | MLP | {"num_key_value_heads": 2, "logits_scaling": 4.0, "attention_multiplier": 0.4},
}
MORE = {  # of which some cannot be packed
    "gpt_oss": SIZES | MLP | WINDOW | {"num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4},
    "qwen3_moe": SIZES | MLP | {"num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2},
    "bloom": SIZES | {},
    "mamba": {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
}


@pytest.fixture(autouse=True)
def one_thread():
    """Threads only cost time where tensors are this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def family(name: str, dtype=torch.float32, device=CPU, implementation: str | None = None):
    """A tiny model of the family with weights so large that each mistake shows, and the attention chosen for it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(name, **(FAMILIES | MORE)[name], initializer_range=0.3, **options)
    torch.manual_seed(0)
    chosen = implementation or attention_for(config, device, dtype)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=chosen, dtype=dtype).to(device)
    with torch.no_grad():
        for p in model.parameters():  # biases, norms, sinks start as constants
            p.add_(torch.randn(p.shape).to(p) * 0.1)
    return model.eval()


def padded_logprobs(model, found: list[dict]) -> list:
    """Each completion's log-probabilities by the model's own forward pass over padded rows: the plain way."""
    lengths = [grpo.length(s) for s in found]
    ids_BL = torch.zeros(len(found), max(lengths), dtype=torch.int64)
    attention_BL = torch.zeros_like(ids_BL)
    for b, s in enumerate(found):
        ids_BL[b, : lengths[b]] = torch.tensor([*s["prompt"], *s["tokens"]])
        attention_BL[b, : lengths[b]] = 1
    device = next(model.parameters()).device
    ids_BL = ids_BL.to(device)
    logits_BLV = model(input_ids=ids_BL, attention_mask=attention_BL.to(device), use_cache=False).logits
    all_BT = logits_BLV[:, :-1].float().log_softmax(-1).gather(2, ids_BL[:, 1:, None])[..., 0]
    return [all_BT[b, len(s["prompt"]) - 1 : lengths[b] - 1] for b, s in enumerate(found)]


def tiny(seed: int = 0):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=64)).to(torch.bfloat16).eval()


def samples(n: int = 8) -> list[dict]:
    generator = torch.Generator().manual_seed(7)
    found = []
    for i in range(n):
        prompt, tokens = (
            torch.randint(0, 97, (length,), generator=generator).tolist() for length in (3 + i % 3, 2 + i)
        )
        found.append({"prompt": prompt, "tokens": tokens, "advantage": (-1) ** i * (1 + i / 4)})
    with torch.no_grad():  # as if sampled from the model itself
        for s, logprobs_T in zip(found, padded_logprobs(tiny(), found), strict=True):
            s["logprobs"] = logprobs_T.tolist()
    return found


def learner(model=None, **options):
    defaults = {"learning_rate": 1e-2, "epsilon": 0.2, "kl_coef": 0.0, "micro_batch_size": 3, "offload": False}
    return Learner(model or tiny(), **defaults | options)


def total(found: list[dict]) -> int:
    return sum(len(s["tokens"]) for s in found)


def test_advantages_are_normalised_within_each_group():
    found = grpo.advantages([0, 1, 2, 3, 5, 5, 5, 5], 4)
    assert sum(found[:4]) == pytest.approx(0) and found[3] == pytest.approx(1.5 / math.sqrt(5 / 3), rel=1e-3)
    assert found[4:] == [0, 0, 0, 0], "equal rewards teach nothing"


def test_advantages_are_scaled_by_the_group_the_batch_or_not_at_all():
    rewards = [0, 2, 5, 5]
    centred = [-1, 1, 0, 0]
    deviation = torch.tensor(rewards, dtype=torch.float64).std()
    assert grpo.advantages(rewards, 2, "none") == centred
    assert grpo.advantages(rewards, 2, "batch") == pytest.approx([c / float(deviation) for c in centred], rel=1e-3)
    assert grpo.advantages(rewards, 2, "group") == pytest.approx([c / math.sqrt(2) for c in centred], rel=1e-3)


def test_the_correction_is_not_of_the_kl():
    """As in TRL: a sequence that is masked for its ratio still pulls towards the starting weights."""
    given = (torch.zeros(1), torch.zeros(1), torch.ones(1), 1, 0.2, torch.full((1,), 0.5), 0.1)
    loss, sums = grpo.grpo_loss(*given, weight_N=torch.full((1,), 2.0), correction_N=torch.zeros(1))
    assert float(loss) == pytest.approx(2 * 0.1 * (math.exp(0.5) - 0.5 - 1)) and int(sums["masked"]) == 1


@pytest.mark.parametrize(
    "ratio, advantage, objective", [(1.5, 1, 1.2), (0.5, -1, -0.8), (0.5, 1, 0.5), (1.5, -1, -1.5)]
)
def test_the_ratio_is_clipped_where_that_is_the_worse(ratio, advantage, objective):
    given = (torch.tensor([math.log(ratio)]), torch.zeros(1), torch.tensor([advantage]), 1, 0.2)
    assert float(grpo.grpo_loss(*given)[0]) == pytest.approx(-objective)
    higher = 1.28 if (ratio, advantage) == (1.5, 1) else objective
    assert float(grpo.grpo_loss(*given, epsilon_high=0.28)[0]) == pytest.approx(-higher)
    apart = grpo.mismatch(*given[:2])
    assert float(apart["logprob_gap"]) == pytest.approx(abs(math.log(ratio)))
    assert float(apart["sampler_kl"]) == pytest.approx(ratio - 1 - math.log(ratio))


def weighted(loss_type: str, **options) -> tuple[list[float], list[dict]]:
    """(each completion's share of the loss if every token's objective is 1, the samples), of lengths 1, 2, 3 and 4."""
    found = [{"tokens": [7] * n, "prompt": [5], "reward": n % 2, "truncated": n == 4} for n in (1, 2, 3, 4)]
    grpo.credit(found, Config(group_size=2, max_tokens=4, loss_type=loss_type, **options))
    count = grpo.learned_tokens(found)
    return [s.get("weight", 1.0) * grpo.learned_tokens([s]) / count for s in found], found


def test_the_loss_is_a_mean_over_tokens_or_completions():
    assert weighted("dapo")[0] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert weighted("grpo")[0] == pytest.approx([0.25] * 4)
    assert weighted("dr_grpo")[0] == pytest.approx([n / 16 for n in (1, 2, 3, 4)])
    shares, found = weighted("dapo", mask_truncated_completions=True)
    assert shares == pytest.approx([1 / 6, 1 / 3, 1 / 2, 0]) and found[3]["mask"] == [0] * 4 and "mask" not in found[0]
    assert all("weight" not in s for s in found), "dapo needs none, and its bits stay as they are"


@pytest.mark.parametrize(
    "kind, factors",
    [("token", [2, 0.25, 3]), ("sequence", [2.0] * 3), ("sequence_mask", [2.0] * 3)],
)
def test_the_correction_weighs_tokens_or_sequences(kind, factors):
    old = [math.log(x) for x in (0.4, 0.1, 0.8)]
    sample = {"tokens": [7] * 4, "mask": [1, 1, 0, 1], "logprobs": [math.log(x) for x in (0.2, 0.4, 1, 0.2)]}
    grpo.correct_sample(sample, old, kind, 3.0)
    assert sample["correction"] == pytest.approx(factors) and sample["old"] == old
    grpo.correct_sample(sample, old, kind, 1.5)
    capped = {"token": [1.5, 0.25, 1.5], "sequence": [1.5] * 3, "sequence_mask": [0] * 3}
    assert sample["correction"] == pytest.approx(capped[kind])


def test_tokens_that_are_masked_are_not_learned_from():
    """As if the loss had been summed over the others alone, with their tokens still in the context."""
    found = samples()
    for i, s in enumerate(found):
        s["mask"] = [0] * len(s["tokens"]) if i == 2 else [int(t % 3 > 0) for t in range(len(s["tokens"]))]
    both = {}
    for packed in (True, False):
        batch = grpo.collate(found, CPU, packed)
        ids = batch.ids_BL.view(-1)[batch.predictors_N + 1]
        assert torch.equal(ids, batch.targets_N) and len(ids) == grpo.learned_tokens(found) == len(batch.weight_N)
        both[packed] = batch
    assert torch.equal(both[True].sampler_N, both[False].sampler_N)
    expected = [x for s in found for x, m in zip(s["logprobs"], s["mask"], strict=True) if m]
    assert both[True].sampler_N.tolist() == pytest.approx(expected)
    it = learner()
    metrics = it.step(found, grpo.learned_tokens(found))
    assert metrics["logprob_gap"] < 0.05 and metrics["masked"] == 0
    none = learner()
    before = [p.clone() for p in none.model.parameters()]
    metrics = none.step([s | {"mask": [0] * len(s["tokens"])} for s in found], 1)
    assert metrics["grad_norm"] == 0 and all(map(torch.equal, before, none.model.parameters()))


def test_without_a_mismatch_the_corrections_change_nothing():
    """The sampler's log-probabilities are the trainer's own, so that all factors are 1."""
    found = samples()
    it = learner()
    own_N = logprobs.logprobs_of(it.model, grpo.collate(found, CPU, True), it.route)
    for s, x in zip(found, own_N.split([len(s["tokens"]) for s in found]), strict=True):
        s["logprobs"] = x.tolist()
    plain = it.step([dict(s) for s in found], total(found))
    for kind in ("token", "sequence", "sequence_mask"):
        other = learner(correction=kind)
        metrics = other.step([dict(s) for s in found], total(found))
        assert metrics["loss"] == pytest.approx(plain["loss"], abs=1e-4)
        assert metrics["effective"] == pytest.approx(1, abs=1e-3) and metrics["worst_token"] < 0.05
    found[0]["logprobs"] = [x - 2 for x in found[0]["logprobs"]]
    metrics = learner(correction="sequence_mask").step([dict(s) for s in found], total(found))
    assert metrics["masked"] == pytest.approx(len(found[0]["tokens"]) / total(found))
    assert metrics["worst_token"] == pytest.approx(2, abs=0.1) and metrics["effective"] < 0.9


def test_several_optimizer_steps_on_a_rollout_count_as_one():
    found = samples()
    once, twice, again = learner(), learner(num_iterations=2), learner()
    first = once.step(found, total(found))
    metrics = twice.step(found, total(found))
    again.step(found, total(found))
    again.step(found, total(found))
    assert twice.steps == 1 and metrics["logprob_gap"] == first["logprob_gap"] and metrics["loss"] != first["loss"]
    assert all(map(torch.equal, twice.model.parameters(), again.model.parameters()))


def test_a_temperature_divides_the_logits():
    found = samples()
    it = learner(temperature=0.5)
    batch = grpo.collate(found, CPU, it.route.packed)
    states_NH = logprobs.states(it.model, batch, it.route)
    expected_NV = (logprobs.logits(it.model, states_NH, it.route).float() / 0.5).log_softmax(-1)
    expected_N = expected_NV.gather(1, batch.targets_N[:, None])[:, 0]
    assert torch.allclose(logprobs.logprobs_of(it.model, batch, it.route, 0.5), expected_N, atol=1e-5)
    for s, x in zip(found, expected_N.split([len(s["tokens"]) for s in found]), strict=True):
        s["logprobs"] = x.tolist()
    assert it.step(found, total(found))["logprob_gap"] < 1e-4


def test_the_learning_rate_follows_its_schedule():
    rates = {kind: [learning_rate_factor(i, kind, 2, 6) for i in range(8)] for kind in ("constant", "linear", "cosine")}
    assert rates["constant"] == [0.5, 1, 1, 1, 1, 1, 1, 1]
    assert rates["linear"] == [0.5, 1, 1, 0.75, 0.5, 0.25, 0, 0]
    assert rates["cosine"] == pytest.approx([0.5, 1, 1, 0.8536, 0.5, 0.1464, 0, 0], abs=1e-4)
    found = samples()
    it = learner(lr_scheduler="linear", scheduled_steps=2)
    assert [it.step(found, total(found))["learning_rate"] for _ in range(3)] == [1e-2, 5e-3, 0]


def uneven(n: int = 40, longest: int = 60) -> list[dict]:
    """Sequences of 3 to `longest` tokens, most of them short, with made-up log-probabilities."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for i in range(n):
        size = 3 + int((longest - 3) * float(torch.rand((), generator=generator)) ** 2)
        ids = torch.randint(3, 97, (size,), generator=generator).tolist()
        start = 1 + i % 2
        logprobs = (-5 * torch.rand(size - start, generator=generator)).tolist()
        advantage = (-1) ** i * (1 + i / 4)
        found.append({"prompt": ids[:start], "tokens": ids[start:], "logprobs": logprobs, "advantage": advantage})
    return found


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("tokens, sequences", [(100, None), (100, 3), (1, None), (10**6, None), (10**6, 7)])
def test_micro_batches_hold_every_sample_once_and_hardly_any_padding(tokens, sequences, packed):
    found = uneven()
    parts = grpo.micro_batches(found, tokens, sequences, packed)
    assert sorted(id(s) for part in parts for s in part) == sorted(map(id, found))
    batches = [grpo.collate(part, CPU, packed) for part in parts]
    for part, batch in zip(parts, batches, strict=True):
        assert len(part) <= (sequences or len(found))
        assert len(part) == 1 or batch.ids_BL.numel() <= tokens
        assert len(batch.predictors_N) == total(part)
    computed = sum(batch.ids_BL.numel() for batch in batches)
    padding = computed - sum(map(grpo.length, found))
    assert padding <= (0 if packed else 0.1 * computed)
    assert parts == grpo.micro_batches(found, tokens, sequences, packed)


def test_packed_micro_batches_are_as_few_as_can_be_and_equally_full():
    found = uneven()
    tokens = sum(map(grpo.length, found)) // 4
    sizes = [sum(map(grpo.length, part)) for part in grpo.micro_batches(found, tokens + 5, None, True)]
    assert len(sizes) == 4
    assert max(sizes) - min(sizes) < 10


def route_gradients(model, route: Route, found: list[dict], weight: torch.Tensor) -> tuple[list, dict]:
    """(log-probabilities of each completion, gradients by name of their weighted sum) on this route."""
    batch = grpo.collate(found, next(model.parameters()).device, route.packed)
    states_NH = logprobs.states(model, batch, route)
    logprobs_N = logprobs.token_logprobs(model, states_NH, batch.targets_N, route)
    return gradients(model, logprobs_N, weight), logprobs_N.detach().cpu()


def gradients(model, logprobs_N, weight: torch.Tensor) -> dict:
    (logprobs_N * weight.to(logprobs_N.device)).sum().backward()
    result = {name: p.grad.detach().float().cpu() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return result


def worst(found: dict, expected: dict) -> float:
    """The largest error of a parameter's gradient, as a share of the largest gradient's norm."""
    assert found.keys() == expected.keys()
    scale = max(float(g.norm()) for g in expected.values())
    return max(float((found[name] - expected[name]).norm()) for name in expected) / scale


def compare_routes(model, routes, tolerance: float, reference=None) -> None:
    """Every route against the padded one of `reference`, of the same weights: log-probabilities and gradients."""
    found = uneven(12, 50)
    weight = torch.randn(total(found), generator=torch.Generator().manual_seed(5))
    plain_N = torch.cat(padded_logprobs(reference or model, found))
    expected = gradients(reference or model, plain_N, weight)
    for route in routes:
        grads, logprobs_N = route_gradients(model, route, found, weight)
        assert float((logprobs_N - plain_N.detach().cpu()).abs().max()) < tolerance, route
        assert worst(grads, expected) < tolerance, route


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_sequences_and_the_head_alone_give_what_the_padded_model_gives(name):
    model = family(name)
    best = logprobs.find_route(model)
    assert best == Route(masked=name == "opt"), "transformers does not tell OPT's packed sequences apart"
    windows = "sliding_window" in FAMILIES[name]
    right = [r for r in ROUTES if not (r.masked and windows) and (r.masked or not r.packed or name != "opt")]
    compare_routes(model, right, 2e-5)
    if windows:
        with pytest.raises(ValueError, match="windows, which take no mask of ours"):
            logprobs.states(model, grpo.collate(uneven(2), CPU, True), Route(masked=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_variable_length_attention_gives_what_plain_attention_gives(name, monkeypatch):
    """The kernel is written out here; on GPUs the test below has the real one."""
    monkeypatch.setattr(attention, "flash_attention", written_out)
    if name == "gemma2":
        with pytest.raises(ValueError, match="does not compute softcap"):
            padded_logprobs(family(name, implementation=VARLEN), uneven(2))
        return
    model = family(name, implementation=VARLEN)
    assert logprobs.find_route(model) == Route()
    compare_routes(model, [r for r in ROUTES if not r.masked], 2e-5, family(name, implementation="eager"))


def written_out(query_THD, key_TKD, value_TKD, ends_S, longest, scale, window):
    lengths = ends_S.diff().tolist()
    assert max(lengths) == longest
    return attention.plain_attention(query_THD, key_TKD, value_TKD, lengths, scale, window)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*FAMILIES, "gpt_oss"])
def test_routes_agree_on_a_gpu(name):
    device = torch.device("cuda")
    torch.backends.cuda.matmul.allow_tf32 = False
    model = family(name, device=device)
    compare_routes(model, [logprobs.find_route(model)], 1e-3)
    half = family(name, torch.bfloat16, device)
    flash = name not in ("gemma2", "gpt_oss")
    assert (half.config._attn_implementation == VARLEN) == flash
    assert logprobs.find_route(half).packed or not flash
    exact = family(name, device=device, implementation="eager")
    exact.load_state_dict(half.state_dict())
    compare_routes(half, [logprobs.find_route(half)], 0.5, exact)


@pytest.mark.parametrize("name", MORE)
def test_a_model_that_cannot_be_packed_is_padded(name):
    model = family(name)
    route = logprobs.find_route(model)
    assert route == Route(packed=name == "qwen3_moe")
    compare_routes(model, [route], 2e-5)


def test_the_attention_is_the_models_own_or_refused():
    from transformers import AutoConfig

    def chosen(name: str, **options) -> str:
        return attention_for(AutoConfig.for_model(name, **(FAMILIES | MORE)[name] | options), CPU, torch.bfloat16)

    assert chosen("llama") == "sdpa"
    assert chosen("gemma2") == "eager", "sdpa leaves the caps out"
    assert chosen("gpt_oss") == "eager", "and sinks"
    with pytest.raises(ValueError, match="LlamaForCausalLM does not compute its config's attn_logit_softcapping"):
        chosen("llama", attn_logit_softcapping=30.0)
    with pytest.raises(ValueError, match="no causal language model for a config of type clip"):
        attention_for(AutoConfig.for_model("clip"), CPU, torch.bfloat16)
    with pytest.raises(ValueError, match=r"other logits with sdpa attention.*attn_implementation=\"eager\""):
        learner(family("gemma2", implementation="sdpa"))


def test_scaled_logits_that_are_not_known_are_left_to_the_model():
    """HyperCLOVA X multiplies by what Granite, under the same name, divides by."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("hyperclovax", **FAMILIES["llama"], logits_scaling=3.0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    route = logprobs.find_route(model)
    assert route == Route(by_head=False)
    compare_routes(model, [route], 2e-5)


def test_chunks_of_the_vocabulary_add_up_to_the_whole_and_bound_what_exists_at_once(monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = []

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            if isinstance(result, torch.Tensor) and result.shape[-1:] == (97,) and result.shape != (32, 97):
                largest.append(result.numel() // 97)
            return result

    found = uneven()
    results = []
    for size in (2**30, 4 * 97 * 10):
        monkeypatch.setattr(logprobs, "CHUNK_BYTES", size)
        largest.clear()
        it = learner(family("llama"), micro_batch_size=None, learning_rate=1e-3, kl_coef=0.1)
        with Largest():
            numbers = it.step(found, total(found))
        results.append((numbers, it.model.lm_head.weight.detach(), max(largest)))
    (whole, weight, most), (chunked, same_weight, few) = results
    assert most == total(found)
    assert few == 10
    assert chunked == pytest.approx(whole, rel=1e-5, abs=1e-5)
    assert torch.allclose(weight, same_weight, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "opt", "gemma2"])
def test_gradient_checkpointing_changes_nothing(name):
    found = uneven()
    plain = learner(family(name))
    saving = learner(family(name), gradient_checkpointing=True)
    assert plain.step(found, total(found)) == saving.step(found, total(found))
    for a, b in zip(plain.model.parameters(), saving.model.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="Linear has no gradient checkpointing"):
        logprobs.checkpoint_layers(torch.nn.Linear(2, 2))


def test_compiled_layers_compute_the_same(monkeypatch):
    """torch traces them here, with the CPU's attention, but does not compile: the test below does."""
    compiled = []

    def trace(function, **options):
        compiled.append(torch._dynamo.optimize_assert("eager", dynamic=options["dynamic"])(function))
        return compiled[-1]

    monkeypatch.setattr(torch, "compile", trace)
    found = uneven()
    expected = learner(family("qwen2"), compile=True).step(found, total(found))
    assert not compiled, "on a CPU layers stay as they are"
    it = learner(family("qwen2"))
    logprobs.compile_layers(it.model)
    assert len(compiled) == 2
    assert it.step(found, total(found)) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_layer_that_cannot_be_compiled_is_named(monkeypatch):
    def fail(graph, inputs):
        raise RuntimeError("no compiler on purpose")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=fail))
    it = learner(family("llama"))
    before = [w.clone() for w in it.held.memory.values()]
    logprobs.compile_layers(it.model)
    with pytest.raises(ValueError, match=r"torch cannot compile .*no compiler on purpose.* Try: --no-compile"):
        it.step(uneven(), total(uneven()))
    assert all(torch.equal(a, b) for a, b in zip(it.held.memory.values(), before, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3_moe"])
def test_layers_are_compiled_on_a_gpu(name, checkpointing):
    found = uneven()

    def gradient(model, **options):
        it = learner(model, gradient_checkpointing=checkpointing, kl_coef=0.1, **options)
        it.held.begin_step(it.masters, it.device)
        it._add_gradients(found, total(found))
        assert it.compile == bool(options)
        return it.held.gradient.cpu()

    exact = gradient(family(name, torch.bfloat16).float())
    plain = gradient(family(name, torch.bfloat16, torch.device("cuda")))
    fused = gradient(family(name, torch.bfloat16, torch.device("cuda")), compile=True)
    rounding = logprobs.difference(plain, exact)
    # Rounded in other places, a token on the edge goes to another expert.
    assert logprobs.difference(fused, exact) < max(1.2 * rounding, 0.15 if name == "qwen3_moe" else 0) < 0.3


@pytest.mark.parametrize("name", FAMILIES)
def test_two_runs_are_bitwise_the_same(name):
    found = uneven()
    first = learner(family(name))
    second = learner(family(name))
    for _ in range(2):
        assert first.step(found, total(found)) == second.step(found, total(found))
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("offload", [False, True])
def test_between_steps_a_trainer_holds_no_more_than_after_the_first(offload):
    found = uneven()
    it = learner(family("llama", torch.bfloat16, torch.device("cuda")), offload=offload)
    held = []
    for _ in range(4):
        it.step(found, total(found))
        held.append(torch.cuda.memory_reserved())
    assert max(held[1:]) <= held[0]


@pytest.mark.gpu
def test_what_is_offloaded_comes_back_bitwise(tmp_path):
    """After steps, one of which is refused, and from a checkpoint."""
    found = uneven()
    refused = [sample | {"advantage": math.nan} for sample in found]

    def make(offload: bool) -> Learner:
        return learner(family("llama", torch.bfloat16, torch.device("cuda")), offload=offload)

    kept, sent = make(False), make(True)

    def step(it: Learner, samples: list[dict]) -> dict | None:
        with contextlib.suppress(ValueError):
            return it.step(samples, total(samples))

    for samples in (found, refused, found):
        assert step(kept, samples) == step(sent, samples)
    sent.save(tmp_path)
    resumed = make(True)
    resumed.load(tmp_path)
    assert all(master.device.type == "cpu" and master.is_pinned() for master in (*sent.masters, *resumed.masters))
    assert step(kept, found) == step(sent, found) == step(resumed, found)


def test_fresh_samples_have_ratio_1():
    found = samples()
    numbers = learner().step(found, total(found))
    assert numbers["ratio"] == pytest.approx(1, rel=0.02)
    assert numbers["logprob_gap"] < 0.02


def test_a_step_changes_the_weights_in_place_and_makes_better_completions_likelier():
    found, it = samples(), learner()
    addresses = [p.data_ptr() for p in it.model.parameters()]
    for _ in range(4):
        it.step(found, total(found))
    assert [p.data_ptr() for p in it.model.parameters()] == addresses
    batch = grpo.collate(found, CPU, packed=True)
    moved_N = logprobs.logprobs_of(it.model, batch, it.route) - batch.sampler_N
    assert float((moved_N * batch.advantage_N).sum()) > 0


def test_kl_to_the_starting_weights():
    found, it = samples(), learner(kl_coef=0.1)
    assert it.step(found, total(found))["kl"] == pytest.approx(0, abs=1e-6)
    assert it.step(found, total(found))["kl"] > 0


def test_a_gradient_that_is_not_finite_leaves_the_weights_alone():
    found, it = samples(), learner()
    before = [p.clone() for p in it.model.parameters()]
    found[0]["advantage"] = math.nan
    with pytest.raises(ValueError, match="gradient norm of nan"):
        it.step(found, total(found))
    assert all(torch.equal(a, b) for a, b in zip(before, it.model.parameters(), strict=True))


@pytest.mark.parametrize("offload", [False, True])
def test_save_and_load_go_on_bitwise(tmp_path, offload):
    found, it = samples(), learner(offload=offload)
    it.step(found, total(found))
    it.save(tmp_path)
    other = learner(offload=offload)
    other.load(tmp_path)
    assert other.steps == 1
    assert it.step(found, total(found)) == other.step(found, total(found))
    for a, b in zip(it.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)


REPLICA = """
import json, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import torch
from colocate.learner import join_group
from test_grpo import learner, samples, total
rank, addresses = int(sys.argv[1]), sys.argv[2].split(",")
torch.set_num_threads(1)
join_group(rank, addresses, 120, torch.device("cpu"))
found, it = samples(), learner()
numbers = it.step(found[rank :: len(addresses)], total(found))
torch.save([p for p in it.model.parameters()], f"{{sys.argv[3]}}/{{rank}}.pt")
print(json.dumps(numbers))
"""


def test_three_replicas_do_what_one_process_does_with_the_whole_batch(tmp_path):
    script = REPLICA.format(root=str(ROOT))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    args = [",".join([address] * 3), str(tmp_path)]
    commands = [[sys.executable, "-c", script, str(rank), *args] for rank in range(3)]
    running = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for c in commands]
    outputs = [p.communicate(timeout=deadline(120)) for p in running]
    assert not any(p.returncode for p in running), outputs
    numbers = [json.loads(out) for out, _ in outputs]
    found, it = samples(), learner()
    alone = it.step(found, total(found))
    assert numbers[0] == numbers[1] == numbers[2]
    # One token's rounding in bf16 depends on what it shares a micro-batch with: so each replica's part is done alone.
    worst = [learner().step(found[rank::3], total(found))["worst_token"] for rank in range(3)]
    assert numbers[0].pop("worst_token") == max(worst)
    del alone["worst_token"]
    assert numbers[0] == pytest.approx(alone, rel=1e-3, abs=1e-4)
    replicas = [torch.load(tmp_path / f"{rank}.pt") for rank in range(3)]
    for first, *others, one in zip(*replicas, it.model.parameters(), strict=True):
        assert all(torch.equal(first, other) for other in others), "replicas are bitwise identical"
        # The first step of Adam moves each weight by the learning rate, whatever the gradient's size.
        assert float((first - one).detach().abs().max()) <= 1e-2 * 2.1
        assert float((first != one).float().mean()) < 0.05


def test_a_checkpoint_knows_whether_it_has_starting_weights(tmp_path):
    found, it = samples(), learner(kl_coef=0.1)
    it.step(found, total(found))
    it.save(tmp_path)
    with pytest.raises(ValueError, match="Give the same --kl-coef again"):
        learner().load(tmp_path)
    other = learner(kl_coef=0.1)
    other.load(tmp_path)
    assert it.step(found, total(found)) == other.step(found, total(found))


def test_one_trainer_needs_no_process_group():
    join_group(0, ["nowhere:1"], 1, torch.device("cpu"))
    assert not torch.distributed.is_initialized()


def test_random_weights_learn_faster_unless_a_rate_is_given():
    model = tiny()
    assert default_learning_rate(model, random_weights=False) == 1e-5
    assert default_learning_rate(model, random_weights=True) == 1e-2, "a hidden size of 32"
    options = {"epsilon": 0.2, "kl_coef": 0.0, "offload": False}
    rates = [Learner(model, True, learning_rate=rate, **options).optimizer.defaults["lr"] for rate in (None, 3e-4)]
    assert rates == [1e-2, 3e-4]


@pytest.mark.parametrize("name", [*FAMILIES, *MORE])
def test_the_first_forward_pass_fits_the_models_context(name):
    from transformers import AutoConfig

    config = AutoConfig.for_model(name, **(FAMILIES | MORE)[name])
    longest = getattr(config, "max_position_embeddings", None)  # Bloom and Mamba have none
    assert sample_tokens(config) == min(512, longest or 512)


def test_learning_rate_zero_moves_nothing():
    found, it = samples(), learner(learning_rate=0.0)
    before = [p.clone() for p in it.model.parameters()]
    it.step(found, total(found))
    assert all(torch.equal(a, b) for a, b in zip(before, it.model.parameters(), strict=True))
