"""The model's folder: where it is, and whether trainer and engine can take what is in it."""

from __future__ import annotations

import contextlib
import json
import threading
from pathlib import Path

from colocate.config import DEFAULT_MODEL, Config, require

# transformers' OPTConfig() describes the default model; the rehearsal takes a smaller one of its architecture, with a
# tenth of its words: a training step is mostly the softmax over them. At TP=2 both pad the vocabulary by 32 rows.
OPT_125M = {"architectures": ["OPTForCausalLM"], "model_type": "opt", "num_attention_heads": 12, "vocab_size": 50272}
OPT_SMALL = {"hidden_size": 256, "word_embed_proj_dim": 256, "ffn_dim": 1024, "num_hidden_layers": 4}
OPT_SMALL |= {"num_attention_heads": 8, "vocab_size": 5024}


def check_heads(config: Config, model_config: dict) -> None:
    """Raise Stop(USAGE) if vLLM could not cut this model's attention heads into tensor_parallel_size parts."""
    text = model_config.get("text_config", model_config)
    heads = text.get("num_attention_heads")
    if not heads:
        return
    kv_heads = text.get("num_key_value_heads") or heads
    fits = [t for t in range(1, config.num_gpus + 1) if heads % t == 0 == config.num_gpus % t]
    fits = [t for t in fits if kv_heads % t == 0 or t % kv_heads == 0]
    require(
        config.tensor_parallel_size in fits,
        f"a model with {heads} attention heads and {kv_heads} KV heads",
        f"counts that --tensor-parallel-size {config.tensor_parallel_size} divides",
        f"type --tensor-parallel-size {max(fits)}",
    )


def find_model(config: Config, rehearsal: bool, scratch: Path) -> tuple[Path, str, str]:
    """Resolve --model to a folder. Returns (folder, load format, note).

    Raises Stop(USAGE) for a model that the user named and that cannot be had; the default model is replaced by its
    architecture with random weights then.
    """
    model, needed = config.resume or config.model or DEFAULT_MODEL, "a Hugging Face checkpoint"
    folder = Path(model).expanduser()
    if folder.is_dir() or model.startswith((".", "/", "~")):
        require((folder / "config.json").is_file(), f"no {folder}/config.json", needed, "check --model")
        weights = config.load_format == "dummy" or has_weights(folder)
        fix = "check --model, or type --load-format dummy for seeded random weights"
        require(weights, f"no weights (*.safetensors, *.bin) in {folder}", needed, fix)
        return folder.resolve(), "auto" if config.resume else config.load_format, ""
    answer: list = []
    # A thread, since a hub that does not answer can hold the client for much longer than anyone wants to wait.
    fetch = threading.Thread(target=lambda: answer.append(_from_hub(model, config.load_format)), daemon=True)
    fetch.start()
    fetch.join(10)
    result = answer[0] if answer else "the hub did not answer within 10 s"
    if result is None:  # it is there: now the download may take its time
        result = _from_hub(model, config.load_format, download=True)
    if isinstance(result, Path):
        return result, config.load_format, ""
    fix = "check --model, HF_TOKEN and HF_HUB_OFFLINE"
    needed = "a folder, a cached hub id or a hub that can be reached"
    require(not config.model, f"no model {model!r} ({result})", needed, fix)
    (scratch / "config.json").write_text(json.dumps(OPT_125M | (OPT_SMALL if rehearsal else {})))
    kind = "a small model of its architecture" if rehearsal else "its architecture"
    return scratch, "dummy", f"{model} cannot be had ({result}): using {kind} with seeded random weights"


def has_weights(folder: Path) -> bool:
    return bool([*folder.glob("*.safetensors"), *folder.glob("*.bin")])


def _from_hub(model: str, load_format: str, download: bool = False) -> Path | str | None:
    """A cached or downloaded snapshot; None if it can be downloaded; or why not."""
    import huggingface_hub as hub

    patterns = ["*.json", "*.txt", "*.model"] + ([] if load_format == "dummy" else ["*.safetensors"])
    with contextlib.suppress(Exception):
        folder = Path(hub.snapshot_download(model, allow_patterns=patterns, local_files_only=True))
        if load_format == "dummy" or has_weights(folder):
            return folder
    try:
        files = [f.rfilename for f in hub.model_info(model, timeout=5).siblings]
        if not download:
            return None
        if not any(f.endswith(".safetensors") for f in files):
            patterns[-1:] = ["*.bin"] if load_format == "auto" else []
        return Path(hub.snapshot_download(model, allow_patterns=patterns))
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
