"""Low-rank adapters (LoRA, https://arxiv.org/abs/2106.09685): of each linear layer two small factors are trained.

The model computes with the merged weights, W + scale * B A, rounded to the engines' dtype. So trainers and engines have
the very same weights, and a push is that of a model without adapters. The factors' gradients come from W's, which is
there for one layer at a time: dA = scale * B^T dW and dB = scale * dW A^T. Per parameter a trainer then holds twice the
dtype's bytes, instead of those and 16 more; a backward pass costs as much as one of all weights.

Knows neither Ray, vLLM nor handles.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from colocate.sharding import Whole

FOLDER = "adapter"  # in a checkpoint's: as PEFT writes it
SETTINGS = "adapter_config.json"  # in that
PLAIN = torch.nn.Linear.forward


def adapted_layers(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """{name: linear layer} of all but the head, whose weight is a parameter of its own.

    Routers that do more than a product are none, and experts that transformers keeps in one parameter neither.
    """
    head = model.get_output_embeddings()
    parameters = {name for name, _ in model.named_parameters()}
    layers = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}
    layers = {name: m for name, m in layers.items() if f"{name}.weight" in parameters}
    return {name: m for name, m in layers.items() if type(m).forward is PLAIN or type(m).__name__ == "FalconLinear"}


class Adapted(Whole):
    """A trainer with all of the model, of which it trains adapters.

    base: {parameter: its value at the start}. factors: {layer: (A, B)}, float32, of shapes (rank, in) and (out, rank).
    """

    def __init__(self, model: torch.nn.Module, rank: int, alpha: float, seed: int, base: str):
        """alpha: scale = alpha / rank. A is drawn as PEFT draws it, by the seed; B is 0. base: the model's name."""
        super().__init__(model)
        layers = adapted_layers(model)
        self.rank = rank
        self.alpha = alpha
        self.scale = alpha / rank
        self.base_model = base
        self.base = {name: p.detach().clone() for name, p in self.parameters.items()}
        model.requires_grad_(False)
        self.factors = {}
        generator = torch.Generator().manual_seed(seed)
        for name, layer in layers.items():
            bound = 1 / math.sqrt(layer.in_features)  # torch.nn.init.kaiming_uniform_ with a = sqrt(5)
            a_RI = torch.empty(rank, layer.in_features).uniform_(-bound, bound, generator=generator)
            b_OR = torch.zeros(layer.out_features, rank)
            self.factors[name] = (a_RI.to(layer.weight.device), b_OR.to(layer.weight.device))
            layer.weight.requires_grad_()
            layer.weight.register_post_accumulate_grad_hook(functools.partial(self._move_gradient, name))

    def _move_gradient(self, name: str, weight: torch.nn.Parameter) -> None:
        """Add a weight's gradient to those of its factors, as soon as it is there, and free it."""
        a_RI, b_OR = self.factors[name]
        d_OI = weight.grad.float()
        a_RI.grad.add_(b_OR.t() @ d_OI, alpha=self.scale)
        b_OR.grad.add_(d_OI @ a_RI.t(), alpha=self.scale)
        weight.grad = None

    def __str__(self) -> str:
        return f"a replica each, adapters of rank {self.rank} on {len(self.factors)} layers"

    def masters(self) -> list[torch.Tensor]:
        return [factor for pair in self.factors.values() for factor in pair]

    def master_names(self) -> list[str]:
        return [f"{name}.lora_{kind}" for name in self.factors for kind in "AB"]

    def trained(self) -> list[bool]:
        return [True] * len(self.master_names())

    def restore(self, masters: list[torch.Tensor]) -> None:
        torch._foreach_copy_(list(self.parameters.values()), list(self.base.values()))
        for name, (a_RI, b_OR) in self.factors.items():
            weight_OI = self.parameters[f"{name}.weight"]
            a_RI, b_OR = (factor.to(weight_OI.device) for factor in (a_RI, b_OR))  # they may be on the host
            weight_OI.copy_(torch.addmm(weight_OI.float(), b_OR, a_RI, alpha=self.scale))

    def starting_weights(self) -> list[torch.Tensor]:
        return list(self.base.values())

    @contextlib.contextmanager
    def computing_with(self, values: Iterable[torch.Tensor]) -> Iterator[None]:
        with torch.no_grad():
            torch._foreach_copy_(self._held(), list(values))
        try:
            yield
        finally:  # without a copy of what was there: it can be made again
            with torch.no_grad():
                self.restore(self.masters())

    def save(self, folder: Path) -> None:
        """Write the adapters beside the merged weights, as PEFT does: for PeftModel.from_pretrained, or vLLM."""
        from safetensors.torch import save_file

        where = folder / FOLDER
        where.mkdir(exist_ok=True)
        named = zip(self.master_names(), self.masters(), strict=True)
        tensors = {f"base_model.model.{name}.weight": factor.cpu() for name, factor in named}
        save_file(tensors, where / "adapter_model.safetensors", metadata={"format": "pt"})
        settings = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base_model,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": sorted({name.rpartition(".")[2] for name in self.factors}),
            "inference_mode": True,
        }
        (where / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")

    def load(self, folder: Path) -> None:
        """After the factors were read from `folder`: they belong to the model that its adapters name."""
        self.base_model = json.loads((folder / FOLDER / SETTINGS).read_text())["base_model_name_or_path"]
