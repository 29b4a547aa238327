"""What `record_loaders` finds out about loaders of many kinds, on a model of two layers. No vLLM, no GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from colocate import verify
from rlhf_utils import (
    VERSION,
    ColocateWorkerExtension,
    CopyPlan,
    HandleError,
    NotHandled,
    Piece,
    Slice,
    covered_once,
    record_loaders,
)

BF16 = SimpleNamespace(dtype=torch.bfloat16)  # what a 16-bit model's configuration says


class Model(torch.nn.Module):
    """Two parameters, `fused` (6, 4) and `scale` (4); `load` is what a test lets its loader do with a weight."""

    def __init__(self, load, dtype=torch.float32):
        super().__init__()
        self.fused = torch.nn.Parameter(torch.randn(6, 4).to(dtype), requires_grad=False)
        self.scale = torch.nn.Parameter(torch.randn(4), requires_grad=False)
        self.load = load

    def load_weights(self, weights) -> None:
        self.seen: dict[str, torch.Tensor] = {}
        for name, weight in weights:
            self.seen[name] = weight
            self.load(self, name, weight)


def plainly(model: Model, name: str, weight: torch.Tensor) -> None:
    """`upper` and `lower` make up `fused`."""
    target = {"upper": model.fused[:3], "lower": model.fused[3:], "scale": model.scale}[name]
    target.data.copy_(weight)


def pieces(values: dict[str, torch.Tensor], version: torch.Tensor) -> dict[str, list[Piece]]:
    """Whole weights, as a trainer that is not sharded has them."""
    return {n: [Piece.of(t)] for n, t in (values | {VERSION: version}).items()}


def weights(**shapes) -> dict:
    return {name: (shape, torch.float32) for name, shape in shapes.items()}


THREE = weights(upper=(3, 4), lower=(3, 4), scale=(4,))
TWO = weights(fused=(6, 4), scale=(4,))


def record(load, given: dict = THREE, tp_size: int = 1, **options):
    model = Model(load, **options)
    before = {n: p.clone() for n, p in model.named_parameters()}
    try:
        return record_loaders(model, BF16, given, tp_size)
    finally:
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters()), "a recording writes nothing"
        assert [n for n, _ in model.named_parameters()] == list(before)


def push(load, given: dict = THREE, order=lambda w: w) -> tuple[Model, dict[str, torch.Tensor], CopyPlan]:
    """A model after a push, the weights that were pushed, and how. order: gives a weight other strides."""
    model = Model(load)
    values = {n: order(torch.randn(shape)) for n, (shape, _) in given.items()}
    recording = record_loaders(model, BF16, given, 1)
    plan = CopyPlan(model, None, recording, pieces(values, torch.tensor(5)))
    plan.push(5)
    return model, values, plan


def whole(load):
    """A loader of `fused` and `scale`, of which this does the first."""

    def loader(model, name, weight):
        if name == "fused":
            load(model, weight)
        else:
            model.scale.data.copy_(weight)

    return loader


def test_slices_are_in_coordinates_of_the_whole_weight():
    second_rank = whole(lambda m, w: m.fused.data.copy_(w.narrow(0, 6, 6).narrow(1, 4, 4)))
    recording = record(second_rank, weights(fused=(12, 8), scale=(4,)), tp_size=4)
    copy = next(c for c in recording.copies if c.weight == "fused")
    assert copy.source == Slice((6, 4), (8, 1), 6 * 8 + 4)
    assert copy.source.box((12, 8)) == [(6, 12), (4, 8)]
    assert copy.target.box((6, 4)) == [(0, 6), (0, 4)]
    assert not recording.loaders and not recording.padding


def test_a_transposed_slice_is_a_box_too():
    recording = record(whole(lambda m, w: m.fused.data.copy_(w.t())), weights(fused=(4, 6), scale=(4,)))
    source = next(c.source for c in recording.copies if c.weight == "fused")
    assert source.box((4, 6)) == [(0, 4), (0, 6)] and source.size == (6, 4)


@pytest.mark.parametrize("order", [lambda w: w, lambda w: w.t().contiguous().t() if w.dim() == 2 else w])
@pytest.mark.parametrize(
    "read",
    [
        lambda w: w,
        lambda w: w.to("cpu"),
        lambda w: w.to(torch.float32),
        lambda w: w.contiguous(),
        lambda w: w.view(3, 2, 4).view(6, 4),
        lambda w: torch.stack([w])[0],
        lambda w: torch.cat([w[:2], w[2:]]),
        lambda w: torch.cat([*w.chunk(3)[::-1]]),
        lambda w: w + 1,
        lambda w: w.to(torch.float64),
        lambda w: torch.empty(6, 4).copy_(w),
        lambda w: torch.where(torch.ones(6, 4) > 0, w, 0.0),
    ],
)
def test_a_push_does_what_the_loader_does(read, order):
    model, values, _ = push(whole(lambda m, w: m.fused.data.copy_(read(w))), TWO, order)
    assert torch.equal(model.fused, read(values["fused"]).float())
    assert torch.equal(model.scale, values["scale"])


def test_copies_bring_in_what_is_only_moved_and_loaders_what_is_computed():
    _, _, plan = push(plainly)
    assert (len(plan.rounds[0].local), plan.recording.loaders) == (3, [])
    for moved in (lambda w: w.to("cpu", copy=False), lambda w: w.narrow(0, 0, 6), lambda w: w[...].detach()):
        assert not record(whole(lambda m, w, moved=moved: m.fused.data.copy_(moved(w))), TWO).loaders
    recording = record(whole(lambda m, w: m.fused.data.copy_(w + 1)), TWO)
    assert recording.loaders == ["fused"] and [c.weight for c in recording.copies] == ["scale"]


def transformed_in_place(model, name, weight):
    plainly(model, name, weight)
    if name == "scale":
        model.scale.data.copy_(-model.scale.exp())


def filled_afterwards(model, name, weight):
    plainly(model, name, weight)
    if name == "scale":
        model.scale.data.mul_(2)


def made_anew(model, name, weight):
    if name == "scale":
        model.scale = torch.nn.Parameter(torch.zeros(4), requires_grad=False)
    plainly(model, name, weight)


@pytest.mark.parametrize("load", [transformed_in_place, filled_afterwards, made_anew])
def test_a_parameter_that_is_changed_after_its_copy_goes_through_the_loaders(load):
    model, values, plan = push(load)
    assert plan.recording.loaders == ["scale"]
    if load is transformed_in_place:
        assert torch.equal(model.scale, -values["scale"].exp())


def at_the_last(model, name, weight):
    """Stacks two weights when both are there: neither can be loaded alone."""
    if name == "scale":
        plainly(model, name, weight)
    elif {"upper", "lower"} <= {*model.seen}:
        model.fused.data.copy_(torch.cat([model.seen["upper"], model.seen["lower"]]))


def test_weights_that_are_loaded_together_stay_together():
    model, values, plan = push(at_the_last)
    assert plan.recording.loaders == ["lower", "upper"]
    assert torch.equal(model.fused, torch.cat([values["upper"], values["lower"]]))


def only_with_all(model, name, weight):
    if len(model.seen) == 3:
        model.fused.data.copy_(torch.cat([model.seen["upper"], model.seen["lower"]]))
        model.scale.data.copy_(model.seen["scale"])


def test_weights_that_a_loader_takes_only_with_all_others_bring_these_along():
    assert record(only_with_all).loaders == ["lower", "scale", "upper"]


def twice(model, name, weight):
    plainly(model, name, weight)
    if name == "upper":
        model.fused[2:5].data.copy_(weight)


def needs_values(model, name, weight):
    if weight.sum().item() > 0:
        plainly(model, name, weight)


def changes_the_trainer(model, name, weight):
    plainly(model, name, weight.mul_(2))


def by_index(model, name, weight):
    if name == "scale":
        model.scale.data[torch.tensor([0, 1, 2, 3])] = weight
    else:
        plainly(model, name, weight)


@pytest.mark.parametrize(
    ("load", "says"),
    [
        (twice, "each element of fused exactly once"),
        (needs_values, r"do not take upper \(3, 4\): RuntimeError"),
        (changes_the_trainer, "writes into the trainer's upper"),
    ],
)
def test_a_model_that_cannot_be_pushed_is_refused_as_such(load, says):
    with pytest.raises(NotHandled, match=f"Model is not handled, nothing was loaded: .*{says}"):
        record(load)


def of(**changes) -> dict:
    given = THREE | {n: c for n, c in changes.items() if c}
    return {n: spec for n, spec in given.items() if changes.get(n, True)}


def test_a_weight_that_its_loader_does_not_take_is_named():
    with pytest.raises(NotHandled, match=r"loaders do not take upper \(2, 4\): RuntimeError: The expanded size"):
        record(plainly, of(upper=((2, 4), torch.float32)))
    with pytest.raises(NotHandled, match=r"loaders do not take x \(2,\): KeyError"):
        record(plainly, of(x=((2,), torch.float32)))


@pytest.mark.parametrize(
    ("load", "given", "says"),
    [
        (plainly, of(scale=None), "missing: scale"),
        (plainly, of(lower=None), "missing: fused: 12 of 24 elements are written"),
        (by_index, THREE, "missing: scale"),
        (lambda m, n, w: plainly(m, n, w) if n != "x" else None, of(x=((2,), torch.float32)), "unexpected: x"),
        (plainly, of(scale=((4,), torch.float64)), "wrong dtype: scale: float64, and scale is float32"),
        (lambda m, n, w: plainly(m, n, w[:3] if n != "scale" else w), of(upper=((5, 4), torch.float32)), "wrong shape"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(load, given, says):
    with pytest.raises(HandleError, match=f"Model, nothing was loaded: .*{says}"):
        record(load, given)


def test_a_float32_parameter_of_a_16_bit_model_is_cast():
    bf16 = {name: (shape, torch.bfloat16) for name, (shape, _) in THREE.items()}
    assert record(plainly, bf16, dtype=torch.bfloat16).loaders == ["scale"]


def test_a_slice_that_another_rank_reads_is_no_wrong_shape():
    half = whole(lambda m, w: m.fused.data.copy_(w[:6]))
    wide = weights(fused=(12, 4), scale=(4,))
    assert record(half, wide, tp_size=2).copies
    with pytest.raises(HandleError, match=r"wrong shape: fused: \(12, 4\), of which .* take 24 elements"):
        record(half, wide, tp_size=1)


def test_the_vocabulary_s_padding_is_named_and_counted():
    def load(model, name, weight):
        if name == "scale":
            model.scale.data.copy_(weight)
        else:
            model.fused[:5].data.copy_(weight)
            model.fused[5:].data.fill_(0)

    given = weights(fused=(5, 4), scale=(4,))
    with pytest.raises(HandleError, match="missing: fused: 20 of 24 elements"):
        record_loaders(Model(load), BF16, given, 1)
    model = Model(load)
    model.embedding = torch.nn.Module()
    model.embedding.weight = model.fused
    model.embedding.shard_indices = SimpleNamespace(num_org_elements=5)
    del model._parameters["fused"]
    model.__dict__["fused"] = model.embedding.weight
    recording = record_loaders(model, BF16, given, 1)
    assert recording.padding == {"embedding.weight": 4} and not recording.loaders


def test_parameters_that_share_memory_count_once():
    model = Model(plainly)
    model.head = torch.nn.Module()
    model.head.weight = torch.nn.Parameter(model.fused.data, requires_grad=False)
    recording = record_loaders(model, BF16, THREE, 1)
    assert {c.parameter for c in recording.copies} == {"fused", "scale"}


def test_a_push_of_another_version_is_refused():
    """The word is read before and after the copies: a step that ends, and one that begins meanwhile, both show."""
    values = {n: torch.randn(shape) for n, (shape, _) in THREE.items()}
    model = Model(plainly)
    version = torch.tensor(5)
    plan = CopyPlan(model, None, record_loaders(model, BF16, THREE, 1), pieces(values, version))
    plan.push(5)
    with pytest.raises(HandleError, match="at version 5, the push is of 6"):
        plan.push(6)

    class Interrupts(torch.Tensor):
        """A weight during whose copy the trainer goes on."""

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func is torch.Tensor.copy_:
                version.fill_(cls.then)
            return super().__torch_function__(func, types, args, kwargs or {})

    for first, then, says in ((5, -1, "version 5 then -1"), (-1, 5, "version -1 then 5")):
        version.fill_(first)
        Interrupts.then = then
        copies = plan.rounds[0].local
        copies[1] = (copies[1][0], values["lower"].as_subclass(Interrupts))
        with pytest.raises(HandleError, match=f"{says}, the push is of 5"):
            plan.push(5)


def test_coverage_is_exact():
    def part(*box: tuple[int, int]) -> Slice:
        view = torch.empty(4, 6)[tuple(slice(*b) for b in box)]
        return Slice(tuple(view.shape), view.stride(), view.storage_offset())

    upper = part((0, 2), (0, 6))
    lower = part((2, 4), (0, 6))
    assert covered_once((upper, lower), (4, 6)) == 24
    assert covered_once((upper,), (4, 6)) == 12
    assert covered_once((upper, part((1, 3), (0, 6))), (4, 6)) is None
    assert covered_once((part((0, 4), (0, 3)), part((0, 4), (3, 6))), (4, 6)) == 24
    assert covered_once((Slice((3, 3), (1, 1), 0),), (4, 6)) is None, "no box"
    assert covered_once((), (4, 6)) == 0


def test_an_engine_whose_workers_share_out_layers_or_experts_is_refused():
    worker = ColocateWorkerExtension()
    worker.parallel_config = SimpleNamespace(pipeline_parallel_size=2, enable_expert_parallel=True, enable_eplb=False)
    with pytest.raises(NotHandled, match="pipeline and expert parallelism are not handled"):
        worker.connect_weights({})


def test_attention_sinks_that_a_kernel_has_copied_are_refused():
    model = Model(plainly)
    model.attention = torch.nn.Module()
    model.attention.impl = SimpleNamespace(_sinks_source=torch.zeros(4, dtype=torch.bfloat16))
    with pytest.raises(NotHandled, match="float32 copy of the attention sinks of attention"):
        record_loaders(model, BF16, THREE, 1)
    model.attention.impl._sinks_source = torch.zeros(4)  # the kernel reads the parameter itself
    assert record_loaders(model, BF16, THREE, 1).copies


def test_latent_attention_that_keeps_views_of_its_weights_takes_copies():
    model = Model(plainly)
    model.kv_b_proj = torch.nn.Module()
    model.kv_b_proj.weight = model.fused
    model.W_UV = torch.nn.Parameter(model.fused.data.view(2, 3, 4).transpose(0, 1), requires_grad=False)
    assert record_loaders(model, BF16, THREE, 1).loaders == []


def test_a_model_may_say_that_it_packs_no_layers():
    model = torch.nn.Linear(2, 2)
    model.packed_modules_mapping = None  # as vLLM 0.26's Bloom
    assert verify._packed_layers(model) == {}
