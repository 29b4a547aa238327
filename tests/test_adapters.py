"""Adapters: their steps are PEFT's own, PEFT loads their folder, and a run goes on bitwise from a checkpoint."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from test_grpo import family, padded_logprobs, total
from test_grpo import samples as some_samples

from colocate import grpo, memory
from colocate.adapters import FOLDER, Adapted, adapted_layers
from colocate.config import USAGE, Config, Stop, check_layout
from colocate.learner import Learner
from colocate.preflight import check_resume

RANK, ALPHA = 4, 8.0


def adapted(model, alpha: float = ALPHA, **options) -> Learner:
    options = {"learning_rate": 1e-2, "epsilon": 0.2, "kl_coef": 0.0, "micro_batch_size": 3, "offload": False} | options
    return Learner(model, held=Adapted(model, rank=RANK, alpha=alpha, seed=3, base="org/base"), **options)


def samples(model) -> list[dict]:
    found = some_samples()
    with torch.no_grad():
        for s, logprobs_T in zip(found, padded_logprobs(model, found), strict=True):
            s["logprobs"] = logprobs_T.tolist()
    return found


def as_peft(model, folder):
    peft = pytest.importorskip("peft")
    return peft.PeftModel.from_pretrained(model, folder / FOLDER, is_trainable=True)


def factors_of(peft_model) -> dict[str, torch.Tensor]:
    return {n: p for n, p in peft_model.named_parameters() if "lora_" in n}


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2"])
def test_steps_are_those_of_peft(tmp_path, name):
    model = family(name)
    reference = copy.deepcopy(model)
    found = samples(model)
    ours = adapted(model)
    ours.held.save(tmp_path)
    theirs = as_peft(reference, tmp_path)
    optimizer = torch.optim.AdamW(factors_of(theirs).values(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(3):
        logprobs_N = torch.cat(padded_logprobs(theirs, found))
        sampler_N = torch.cat([torch.tensor(s["logprobs"]) for s in found])
        advantage_N = torch.cat([torch.full((len(s["tokens"]),), s["advantage"]) for s in found])
        grpo.grpo_loss(logprobs_N, sampler_N, advantage_N, total(found), 0.2)[0].backward()
        torch.nn.utils.clip_grad_norm_(factors_of(theirs).values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ours.step(found, total(found))
    their = factors_of(theirs)
    for name, pair in ours.held.factors.items():
        for kind, factor in zip("AB", pair, strict=True):
            assert factor.abs().max() > 0
            # Adam moves what has hardly a gradient as far as the rest, in whichever direction.
            other = their[f"base_model.model.{name}.lora_{kind}.default.weight"].detach()
            torch.testing.assert_close(factor, other, atol=1e-3, rtol=0)
    with torch.no_grad():
        for mine, other in zip(padded_logprobs(model, found), padded_logprobs(theirs, found), strict=True):
            torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


def test_peft_loads_what_a_checkpoint_has(tmp_path):
    model = family("qwen2")
    found = samples(model)
    start = copy.deepcopy(model)
    ours = adapted(model)
    ours.step(found, total(found))
    ours.save(tmp_path)
    theirs = as_peft(start, tmp_path)
    with torch.no_grad():
        for mine, other in zip(padded_logprobs(model, found), padded_logprobs(theirs, found), strict=True):
            torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_adapted_weights_change_and_noise_goes_again(dtype):
    model = family("llama", dtype=dtype)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    ours = adapted(model)
    ours.step(samples(model), 100)
    layers = {f"{name}.weight" for name in adapted_layers(model)}
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == layers and not any("head" in n or "embed" in n for n in layers)
    after = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():  # as the proof of the push does
            p.add_(torch.randn(p.shape).to(p))
    ours.restore()
    assert all(torch.equal(p, after[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_save_and_load_go_on_bitwise(tmp_path, kl_coef):
    model = family("llama", dtype=torch.bfloat16)
    found = samples(model)
    first = adapted(model, kl_coef=kl_coef)
    for _ in range(2):
        first.step(found, total(found))
    first.save(tmp_path)
    second = adapted(copy.deepcopy(model), kl_coef=kl_coef)  # from the merged weights, as --resume
    second.held.base_model = "somewhere else"
    second.load(tmp_path)
    assert second.held.base_model == "org/base"
    assert [first.step(found, total(found)) for _ in range(2)] == [second.step(found, total(found)) for _ in range(2)]
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    settings = json.loads((tmp_path / FOLDER / "adapter_config.json").read_text())
    assert settings["r"] == RANK and settings["lora_alpha"] == ALPHA


def test_adapters_take_a_fraction_of_the_memory():
    shape = {"hidden_size": 4096}
    config = Config(dtype="bfloat16", lora_rank=16)
    trained = memory.trained_parameters(config, shape, 10**9)
    assert trained == 7_812_500
    assert memory.trainer_bytes(config, 10**9, trained) == (4 * 10**9 + 12 * trained, 4 * 10**9 + 16 * trained)
    assert memory.checkpoint_bytes(config, 10**9, trained) == 4 * 10**9 + 12 * trained
    all_of_them = Config(dtype="bfloat16")
    assert memory.trained_parameters(all_of_them, shape, 10**9) == 10**9


@pytest.mark.parametrize(
    "flags, says",
    [
        ({"trainer": "fsdp"}, "--lora-rank 8 does not work with shards. Leave out: --trainer fsdp"),
        ({"push": "gather"}, "Leave out: --push gather"),
        ({"shard_size": 2}, "Leave out: --shard-size 2"),
        ({"lora_rank": 0, "lora_alpha": 8.0}, "--lora-alpha 8 scales adapters, and none are trained. Try: --lora-rank"),
        ({"lora_rank": -1}, "--lora-rank -1 .* at least 0"),
    ],
)
def test_wrong_flags_are_refused(flags, says):
    with pytest.raises(Stop, match=says) as stop:
        check_layout(Config(**{"lora_rank": 8} | flags))
    assert stop.value.code == USAGE


def test_a_checkpoint_of_adapters_goes_on_with_adapters_only(tmp_path):
    model = family("llama", dtype=torch.bfloat16)
    adapted(model).save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"dtype": "bfloat16"}))
    parameters = sum(p.numel() for p in model.parameters())
    same = {"resume": str(tmp_path), "lora_rank": RANK, "lora_alpha": ALPHA}
    check_resume(Config(**same), parameters)
    for other in ({"lora_rank": 0}, {"lora_rank": 8}, {"lora_alpha": 32.0}):
        with pytest.raises(Stop, match="is of a run with --lora-rank 4 --lora-alpha 8"):
            check_resume(Config(**same | other), parameters)
    (tmp_path / FOLDER / "adapter_config.json").unlink()
    with pytest.raises(Stop, match=r"has no adapter/adapter_config\.json"):
        check_resume(Config(**same), parameters)


def test_a_router_is_no_linear_layer():
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = AutoConfig.for_model("phimoe", **sizes, num_key_value_heads=2, vocab_size=97, num_local_experts=4)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert {name.rpartition(".")[2] for name in adapted_layers(model)} == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_what_the_kl_computes_with_goes_again():
    model = family("llama", dtype=torch.bfloat16)
    ours = adapted(model, kl_coef=0.1)
    ours.step(samples(model), 100)
    before = [p.detach().clone() for p in model.parameters()]
    with ours.held.computing_with(ours.reference):
        assert all(torch.equal(p, b) for p, b in zip(model.parameters(), ours.reference, strict=True))
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("offload", [False, True])
def test_adapters_are_trained_on_a_gpu(tmp_path, offload):
    model = family("llama", torch.bfloat16, torch.device("cuda"))
    found = samples(family("llama"))
    ours = adapted(model, offload=offload)
    ours.restore()  # as before the first step
    for _ in range(2):
        ours.step(found, total(found))
    ours.save(tmp_path)
    other = adapted(copy.deepcopy(model), offload=offload)
    other.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.model.parameters(), strict=True))
    assert all(factor.is_cuda != offload for pair in ours.held.factors.values() for factor in pair)
