"""Every model folder is whole, or is refused by name. Folders are built here; no Ray, no vLLM, no GPU."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from colocate import memory
from colocate import model_folder as mf
from colocate.config import MISSING, USAGE, Config, Stop

GIB = 2**30
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 1024, "vocab_size": 300, "tie_word_embeddings": False}
UP = "model.layers.1.mlp.up_proj.weight"
ROWS = 300


def write_tokenizer(folder: Path, size: int = 256) -> None:
    """Of single bytes, with a special token after them."""
    vocabulary = {f"<0x{b:02X}>": b for b in range(size)}
    model = {"type": "BPE", "vocab": vocabulary, "merges": [], "byte_fallback": True}
    added = {"content": "</s>", "id": size, "special": True, "single_word": False, "lstrip": False, "rstrip": False}
    content = {"version": "1.0", "added_tokens": [added | {"normalized": False}], "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


def save(folder: Path, model, **options) -> Path:
    folder.mkdir(exist_ok=True)
    model.save_pretrained(folder, **options)
    write_tokenizer(folder)
    return folder


def llama(**more):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES | more))


@pytest.fixture(scope="session")
def whole_model(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("whole"), llama())


@pytest.fixture(scope="session")
def whole_shards(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("shards"), llama(), max_shard_size="20KB")


@pytest.fixture
def folder(whole_model, tmp_path) -> Path:
    """A whole Llama, for a test to spoil."""
    return Path(shutil.copytree(whole_model, tmp_path / "model"))


@pytest.fixture
def shards(whole_shards, tmp_path) -> Path:
    return Path(shutil.copytree(whole_shards, tmp_path / "shards"))


def check(folder: Path, **flags) -> mf.Model:
    scratch = folder.parent / "scratch"
    scratch.mkdir()
    flags = {"num_gpus": 1, "tensor_parallel_size": 1} | flags
    return mf.check_model(Config(model=str(folder), **flags), True, scratch)


def refused(folder: Path, code: int, *says: str, **flags) -> None:
    with pytest.raises(Stop) as stop:
        check(folder, **flags)
    message = str(stop.value)
    assert stop.value.code == code, message
    assert "\n" not in message
    for text in says:
        assert text in message, message


def edit_weights(folder: Path, change) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def edit_json(path: Path, **more) -> None:
    """None takes an entry out."""
    content = json.loads(path.read_text()) | more
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


# --- Whole models ----------------------------------------------------------------------------------------------------


def parameters_of(model) -> int:
    return sum(p.numel() for p in model.parameters())


def test_a_whole_model_is_read_where_it_is(folder):
    model = check(folder)
    assert (model.folder, model.source, model.load_format) == (folder, folder, "auto")
    assert (model.architecture, model.has_tokenizer, model.notes) == ("LlamaForCausalLM", True, ())
    assert model.parameters == parameters_of(llama())


def test_shards_are_a_whole_model(shards):
    assert len(list(shards.glob("*.safetensors"))) > 2
    assert check(shards).parameters == parameters_of(llama())


@pytest.mark.parametrize("new_format", [True, False])
def test_a_pickle_is_a_whole_model(folder, new_format):
    import torch

    state = llama().state_dict()
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=new_format)
    (folder / "model.safetensors").unlink()
    assert check(folder).parameters == parameters_of(llama())


def test_a_tied_model_with_its_head_in_the_file(tmp_path):
    model = llama(tie_word_embeddings=True)
    folder = save(tmp_path / "model", model)
    edit_weights(folder, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    assert check(folder).parameters == parameters_of(model), "tied weights count once"


def test_two_dtypes_in_one_file(folder):
    edit_weights(folder, lambda w: w.update({UP: w[UP].bfloat16()}))
    check(folder)


def test_old_rotary_entries(folder):
    import torch

    edit_weights(folder, lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    check(folder)


def test_old_causal_masks(tmp_path):
    import torch
    from transformers import GPTJConfig, GPTJForCausalLM

    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4, "vocab_size": ROWS}
    folder = save(tmp_path / "model", GPTJForCausalLM(GPTJConfig(**sizes)))
    masks = {f"transformer.h.0.attn.{name}": torch.ones(1) for name in ("bias", "masked_bias")}
    edit_weights(folder, lambda w: w.update(masks))
    check(folder)


def test_a_config_without_architectures(folder):
    edit_json(folder / "config.json", architectures=None)
    assert check(folder).architecture == "LlamaForCausalLM"


def test_no_pad_token_and_no_generation_config(folder):
    edit_json(folder / "config.json", pad_token_id=None)
    (folder / "generation_config.json").unlink()
    check(folder)


def test_code_of_a_checkpoint_that_transformers_knows_is_not_run(folder):
    edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"})
    (folder / "modeling_own.py").write_text("raise SystemExit('ran')\n")
    check(folder)
    load(folder)


def test_a_folder_without_tokenizer_says_so(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    model = check(folder)
    assert not model.has_tokenizer and "token ids" in model.notes[0]


def test_dummy_weights_come_from_the_config(folder):
    (folder / "model.safetensors").unlink()
    model = check(folder, load_format="dummy")
    assert (model.load_format, model.parameters) == ("dummy", parameters_of(llama()))


def test_gpt2s_names_are_filled_in(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "vocab_size": ROWS}
    model = check(save(tmp_path / "model", GPT2LMHeadModel(GPT2Config(**sizes))))
    assert (model.config["num_hidden_layers"], model.config["num_attention_heads"]) == (2, 4)


def test_experts_are_counted_and_one_that_is_missing_is_named(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))
    folder = save(tmp_path / "model", model)
    assert check(folder).parameters == parameters_of(model)
    (tmp_path / "scratch").rmdir()
    edit_weights(folder, lambda w: w.pop(next(n for n in w if ".experts.3." in n and "layers.1" in n)))
    refused(folder, USAGE, "experts", "model.safetensors")


@pytest.mark.parametrize(
    "rope, length",
    [
        ({"rope_type": "default"}, 1024),
        ({"rope_type": "linear", "factor": 4.0}, 4096),
        ({"rope_type": "dynamic", "factor": 2.0}, 2048),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}, 4096),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}, 1024),
        (
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
            | {"original_max_position_embeddings": 256},
            1024,
        ),
    ],
)
def test_scaled_rope_stretches_the_context(folder, rope, length):
    edit_json(folder / "config.json", rope_parameters=rope | {"rope_theta": 10_000.0}, rope_scaling=None)
    config = mf.read_config(folder)
    mf.check_length(Config(max_model_len=length), config)
    with pytest.raises(Stop, match=f"Try: --max-model-len {length}$"):
        mf.check_length(Config(max_model_len=length + 1), config)


# --- The weights do not fit the model --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [UP, "lm_head.weight", "model.embed_tokens.weight"])
def test_a_missing_tensor_is_named(folder, name):
    edit_weights(folder, lambda w: w.pop(name))
    refused(folder, USAGE, name, str(folder / "model.safetensors"))


def test_a_tied_model_without_its_embedding(tmp_path):
    folder = save(tmp_path / "model", llama(tie_word_embeddings=True))
    edit_weights(folder, lambda w: w.pop("model.embed_tokens.weight"))
    refused(folder, USAGE, "embed_tokens.weight")


def test_another_shape_is_named_with_both(folder):
    edit_weights(folder, lambda w: w.update({UP: w[UP][:46].clone()}))
    refused(folder, USAGE, UP, "(46, 32)", "(48, 32)", "model.safetensors")


def test_wrapped_names_are_told(folder):
    edit_weights(folder, lambda w: [w.update({f"_orig_mod.{name}": w.pop(name)}) for name in list(w)])
    refused(folder, USAGE, "_orig_mod.lm_head.weight", "has no lm_head.weight", "and 19 more")


def test_a_tensor_without_a_place_is_named(folder):
    edit_weights(folder, lambda w: w.update({"v_head.summary.weight": w[UP].clone()}))
    refused(folder, USAGE, "v_head.summary.weight")


# --- Files that are not what their names say -------------------------------------------------------------------------

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'5e' * 32}\nsize 1234567\n"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_pointer_of_git_lfs(folder, name):
    (folder / name).write_text(POINTER)
    refused(folder, USAGE, name, "git lfs pull")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_an_empty_file(folder, name):
    (folder / name).write_bytes(b"")
    refused(folder, USAGE, name, "is empty")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_link_to_nowhere(folder, name):
    (folder / name).unlink()
    (folder / name).symlink_to("../../blobs/5e5e")
    refused(folder, USAGE, str(folder / name), "../../blobs/5e5e")


def test_a_truncated_file(folder):
    path, size = folder / "model.safetensors", (folder / "model.safetensors").stat().st_size
    path.write_bytes(path.read_bytes()[: size // 2])
    refused(folder, USAGE, str(path), f"{size // 2} bytes", f"describes {size}")


@pytest.mark.parametrize("content", [b"\x00" * 4, b"\x10" + b"\x00" * 7 + b"not JSON at all.", b"<html>Sign in</html>"])
def test_another_kind_of_file(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    refused(folder, USAGE, "model.safetensors", "not a whole file")


def test_a_truncated_pickle(folder):
    import torch

    path = folder / "pytorch_model.bin"
    torch.save(llama().state_dict(), path)
    path.write_bytes(path.read_bytes()[:5000])
    (folder / "model.safetensors").unlink()
    refused(folder, USAGE, "pytorch_model.bin", "not a whole file")


def test_a_shard_that_is_not_there(shards):
    path = sorted(shards.glob("model-*.safetensors"))[1]
    path.unlink()
    refused(shards, USAGE, path.name, "model.safetensors.index.json")


def test_an_index_that_names_a_tensor_which_its_file_lacks(shards):
    path = shards / "model.safetensors.index.json"
    places = json.loads(path.read_text())["weight_map"]
    other = next(file for file in places.values() if file != places[UP])
    edit_json(path, weight_map=places | {UP: other})
    refused(shards, USAGE, UP, other, path.name)


def test_an_index_of_pickles(shards):
    (shards / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {UP: "pytorch_model-1.bin"}}))
    (shards / "model.safetensors.index.json").unlink()
    refused(shards, USAGE, "pytorch_model-1.bin", "pytorch_model.bin.index.json")


# --- Folders of something else ---------------------------------------------------------------------------------------


def test_no_folder(tmp_path):
    refused(tmp_path / "nowhere", USAGE, str(tmp_path / "nowhere"))


def test_no_model_of_that_name(tmp_path, monkeypatch):
    monkeypatch.setattr(mf, "_from_hub", lambda *_: "ConnectError: no network")
    with pytest.raises(Stop, match=r"some/model \(ConnectError: no network\)") as stop:
        mf.check_model(Config(model="some/model"), True, tmp_path)
    assert stop.value.code == USAGE


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    refused(folder, USAGE, "no model.safetensors", "--load-format dummy")


def test_an_adapter(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base"}))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    refused(folder, USAGE, "adapter of some/base")


@pytest.mark.parametrize(
    "name, says",
    [
        ("model-Q4_K_M.gguf", "GGUF"),
        ("consolidated.safetensors", "consolidated.safetensors"),
        ("consolidated.00.pth", "consolidated.00.pth"),
        ("model-00001-of-00002.safetensors", "without an index"),
    ],
)
@pytest.mark.parametrize("with_config", [True, False])
def test_weights_in_another_form_alone(folder, name, says, with_config):
    (folder / "model.safetensors").rename(folder / name)
    if not with_config:
        (folder / "config.json").unlink()
    refused(folder, USAGE, says)


def test_other_weights_beside_a_checkpoint_are_left_out_on_both_sides(shards):
    import torch

    torch.save(llama().state_dict(), shards / "pytorch_model.bin")
    for name in ("consolidated.safetensors", "params.json", "modeling_own.py"):
        (shards / name).write_text("{}")
    model = check(shards)
    assert model.source == shards != model.folder
    names = {file.name for file in model.folder.iterdir()}
    assert names == {file.name for file in [*shards.glob("model*.safetensors*"), *shards.glob("tokenizer*")]} | {
        "config.json",
        "generation_config.json",
    }
    assert all(file.exists() for file in model.folder.iterdir())
    assert "consolidated.safetensors, params.json, pytorch_model.bin" in model.notes[0]
    assert model.parameters == parameters_of(llama()), "the weights count once"


# --- config.json -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code, says, settings",
    [
        (USAGE, "LlamaForSequenceClassification", {"architectures": ["LlamaForSequenceClassification"]}),
        (USAGE, "LlamaModel", {"architectures": ["LlamaModel"]}),
        (USAGE, "T5ForConditionalGeneration", {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}),
        (USAGE, "BartForCausalLM", {"model_type": "bart", "architectures": None, "is_encoder_decoder": True}),
        (
            USAGE,
            "Gemma3ForConditionalGeneration",
            {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "vision_config": {"a": 1}},
        ),
        (USAGE, "quantization_config (fp8)", {"quantization_config": {"quant_method": "fp8"}}),
        (USAGE, "auto_map", {"model_type": "own", "auto_map": {"AutoConfig": "modeling_own.OwnConfig"}}),
        (USAGE, "transformers_weights", {"transformers_weights": "other.safetensors"}),
        (MISSING, "model_type 'own'", {"model_type": "own"}),
        (MISSING, "model_type None", {"model_type": None}),
        (MISSING, "CTRLLMHeadModel", {"model_type": "ctrl", "architectures": ["CTRLLMHeadModel"]}),
        (USAGE, "config.json", {"hidden_size": "wide"}),
    ],
)
def test_what_config_json_says(folder, code, says, settings):
    (folder / "modeling_own.py").write_text("raise SystemExit('ran')\n")
    edit_json(folder / "config.json", **settings)
    refused(folder, code, says)


@pytest.mark.parametrize("content", ["[]", "{", "null"])
def test_config_json_is_no_object(folder, content):
    (folder / "config.json").write_text(content)
    refused(folder, USAGE, str(folder / "config.json"))


def test_a_short_context(folder):
    edit_json(folder / "config.json", max_position_embeddings=256)
    refused(folder, USAGE, "--max-model-len 512", "max_position_embeddings", "Try: --max-model-len 256")


def test_heads_that_do_not_divide():
    smollm2 = {"num_attention_heads": 9, "num_key_value_heads": 3}
    with pytest.raises(Stop, match="Try: --tensor-parallel-size 1"):
        mf.check_heads(Config(), smollm2)
    mf.check_heads(Config(num_gpus=3, tensor_parallel_size=3), smollm2)
    mf.check_heads(Config(), {"num_attention_heads": 4, "num_key_value_heads": 1})  # one KV head, on both ranks


# --- The trainers' own load, which --resume goes through as well ------------------------------------------------------


def load(folder: Path):
    import torch

    return mf.load_model(str(folder), "auto", "float32", 0, torch.device("cpu"))


def test_a_trainer_loads_a_whole_model(folder):
    assert parameters_of(load(folder)) == parameters_of(llama())


def test_a_trainer_refuses_what_transformers_would_fill_with_random_numbers(folder):
    edit_weights(folder, lambda w: w.update({UP: w[UP][:46].clone(), "extra": w.pop("model.norm.weight")}))
    with pytest.raises(ValueError, match=r"no model\.norm\.weight") as error:
        load(folder)
    assert all(text in str(error.value) for text in (str(folder), "extra", UP, "(46, 32)", "(48, 32)"))


def test_a_trainer_refuses_two_heads_where_the_config_ties_them(tmp_path):
    """vLLM would leave the second one out."""
    folder = save(tmp_path / "model", llama(tie_word_embeddings=True))
    edit_weights(folder, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"] + 1}))
    with pytest.raises(ValueError, match="ties the head to the embedding"):
        load(folder)


def test_a_trainer_computes_gemma2s_caps(tmp_path):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    model = Gemma2ForCausalLM(Gemma2Config(**SIZES | {"tie_word_embeddings": True}, head_dim=8))
    assert load(save(tmp_path / "model", model)).config._attn_implementation == "eager"


# --- The tokenizer ---------------------------------------------------------------------------------------------------


def test_a_tokenizer_larger_than_the_embedding(tmp_path):
    folder = save(tmp_path / "model", llama(vocab_size=250))
    refused(folder, USAGE, "255", "250 rows", "tokenizer.json")


def test_special_tokens_may_lie_beyond_the_embedding(tmp_path):
    folder = save(tmp_path / "model", llama(vocab_size=256))  # </s> is 256
    assert check(folder).has_tokenizer


def test_a_tokenizer_that_is_announced_and_not_there(folder):
    (folder / "tokenizer.json").unlink()
    refused(folder, USAGE, "tokenizer_config.json", "tokenizer.json")


def test_a_broken_tokenizer(folder):
    path = folder / "tokenizer.json"
    path.write_text(path.read_text()[:500])
    refused(folder, USAGE, "tokenizer.json")


# --- The default model -----------------------------------------------------------------------------------------------


def test_the_default_model_falls_back_to_random_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(mf, "_from_hub", lambda *_: "ConnectError: no network")
    model = mf.check_model(Config(), False, tmp_path)
    assert model.load_format == "dummy" and "no network" in model.notes[0]
    assert model.architecture == "OPTForCausalLM" and model.parameters == 125_239_296


def test_the_rehearsal_takes_a_small_model_and_asks_no_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(mf, "_from_hub", lambda *_: pytest.fail("it asked"))
    model = mf.check_model(Config(), True, tmp_path)
    assert model.load_format == "dummy" and "a small one" in model.notes[0]
    assert model.architecture == "OPTForCausalLM" and model.config["num_hidden_layers"] == 4


# --- Memory ----------------------------------------------------------------------------------------------------------


def gpu(total_gib: float = 80, free_gib: float = 79) -> list[dict]:
    return [{"index": "0", "uuid": "GPU-0", "name": "H100", "total": total_gib * 1024, "free": free_gib * 1024}]


def test_the_optimizer_counts():
    """3.5 x 2**30 parameters: 7 GiB of weights beside an engine of 32 of 80 GiB."""
    parameters = int(3.5 * GIB)
    assert memory.trainer_bytes(Config(), parameters) == (49 * GIB, 63 * GIB)
    assert memory.trainer_bytes(Config(steps=0), parameters) == (7 * GIB, 7 * GIB)
    assert memory.trainer_bytes(Config(kl_coef=0.1), parameters) == (56 * GIB, 77 * GIB)
    assert memory.trainer_bytes(Config(dtype="float32"), parameters) == (56 * GIB, 70 * GIB)
    with pytest.raises(Stop, match=r"needs 81\.0") as stop:
        memory.check_gpu_memory(Config(), {}, parameters, gpu())
    assert stop.value.code == MISSING
    memory.check_gpu_memory(Config(offload_optimizer=True), {}, parameters, gpu())
    with pytest.raises(Stop, match=r"needs 95\.0"):
        memory.check_gpu_memory(Config(offload_optimizer=True, sleep_level=0), {}, parameters, gpu())
    memory.check_gpu_memory(Config(steps=0), {}, parameters, gpu())
    memory.check_gpu_memory(Config(), {}, parameters, [gpu()[0] | {"free": None}])


LLAMA_8B = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}


def test_the_engines_share_holds_weights_and_one_sequence():
    with pytest.raises(Stop, match=r"40\.0 GiB"):
        memory.check_gpu_memory(Config(gpu_memory_utilization=0.4, steps=0), {}, 40 * GIB, gpu())
    long = Config(max_model_len=2**20, steps=0)
    assert memory.kv_bytes(long, LLAMA_8B, 2**20) == 64 * GIB, "each rank of two has half of the KV heads"
    with pytest.raises(Stop, match=r"Try: --max-model-len 262144"):
        memory.check_gpu_memory(long, LLAMA_8B, 8 * GIB, gpu())
    memory.check_gpu_memory(long, LLAMA_8B | {"sliding_window": 4096}, 8 * GIB, gpu())


def test_engines_in_8_bits_take_less():
    """A model of 2**30 parameters, of which 2**28 are embeddings, and as many the head."""
    shape = {"vocab_size": 2**16, "hidden_size": 4096}
    fp8 = Config(rollout_quantization="fp8")
    assert memory.engine_bytes(Config(), shape, GIB) == 2 * GIB
    assert memory.engine_bytes(fp8, shape, GIB) == 1.5 * GIB
    assert memory.engine_bytes(fp8, shape | {"tie_word_embeddings": True}, GIB) == 1.25 * GIB
    assert memory.engine_bytes(fp8, {}, GIB) == GIB
    cache = Config(kv_cache_dtype="fp8")
    assert memory.kv_bytes(cache, LLAMA_8B, 2**20) == 32 * GIB == memory.kv_bytes(Config(), LLAMA_8B, 2**20) / 2
    tight = {"gpu_memory_utilization": 0.2, "steps": 0}
    with pytest.raises(Stop, match=r"the weights takes 20\.0"):
        memory.check_gpu_memory(Config(**tight), {}, 20 * GIB, gpu())
    memory.check_gpu_memory(Config(**tight, rollout_quantization="fp8"), {}, 20 * GIB, gpu())


def test_the_rehearsal_counts_all_trainers_and_engines():
    one = Config(num_gpus=1, tensor_parallel_size=1, dtype="float32")
    memory.check_host_memory(one, {}, 10**8, 8 * GIB)
    with pytest.raises(Stop, match="--num-gpus 1") as stop:
        memory.check_host_memory(Config(dtype="float32"), {}, 10**8, 8 * GIB)
    assert stop.value.code == MISSING
    with pytest.raises(Stop, match="--max-model-len 2000000"):
        memory.check_host_memory(Config(max_model_len=2_000_000), LLAMA_8B, 10**6, 10**15)


def test_the_rehearsals_cache_holds_all_sequences_whole():
    """64 sequences of 400 tokens and a prompt, in 5 blocks of 128: SmolLM2-135M has 30 layers, 3 KV heads of 64."""
    smollm2 = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}
    config = Config(num_gpus=1, tensor_parallel_size=1, max_tokens=400)
    assert memory.rehearsal_kv_bytes(config, smollm2) == 64 * 5 * 128 * 30 * 2 * 3 * 64 * 2
    assert memory.rehearsal_kv_bytes(Config(), {"num_attention_heads": 12}) == 64 * 2**20, "at least"


def test_no_scratch_is_left_in_the_users_folder(folder):
    before = sorted(os.listdir(folder))
    check(folder)
    assert sorted(os.listdir(folder)) == before
