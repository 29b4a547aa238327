"""What a trainer holds of the model: all of it (`Whole`), or the shards of FSDP2 (`Shard`). `Learner` works on both.
`Gathered` has shards, and a buffer through which an engine reads all of the model.

A replica is the model and its optimizer once: one trainer with all of it, or neighbours with a shard each, which is
hybrid sharding (HSDP) if there are several replicas. Every forward and backward pass of a sharded model gathers its
weights layer by layer, so all trainers must make each of them together.
https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html

Knows neither Ray, vLLM nor handles.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor


def decoder_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers of a transformers model, by its config's count of them; none if they are not found."""
    count = model.config.get_text_config().num_hidden_layers
    lists = (m for m in model.base_model.modules() if isinstance(m, torch.nn.ModuleList))
    return next((list(layers) for layers in lists if len(layers) == count), [])


def rank_of(trainer: int, size: int, tp: int) -> int:
    """The rank of the trainer on a bundle, among all trainers with replicas of `size`: it decides about its shard.

    An engine's worker on the same GPU reads the part of the model that belongs to its tensor-parallel rank. So the
    trainers beside workers of one rank come one after the other: with TP=2 and shards of 4, trainers 0 and 2, then 1
    and 3. benchmarks/shard_scaling.py counts what that spares NVLink, for 7B there 7.05 GB and 4.37.
    """
    if size % tp:
        return trainer
    first = trainer - trainer % size
    i = trainer % size
    return first + i % tp * (size // tp) + i // tp


class Whole:
    """A trainer with all of the model, in the engines' dtype. With several of them each one is a replica.

    memory: {parameter: its values in the engines' dtype, changed in place}.
    round_of: {parameter: the one of `rounds` in which engines can read it}.
    group: of torch.distributed, with the trainers of this replica; None for one alone. position: in it.
    """

    group = None
    position = 0
    base: Mapping[str, torch.Tensor] = MappingProxyType({})  # what adapters are added to
    round_of: Mapping[str, int] = MappingProxyType({})  # all of it is always there

    def __init__(self, model: torch.nn.Module):
        self.model = model
        self.parameters = dict(model.named_parameters())  # tied weights come once
        self.memory = self.parameters

    def blocks(self) -> list[torch.Tensor]:
        """What engines map. It stays where it is."""
        return list(self.memory.values())

    def exported(self) -> dict[str, torch.Tensor]:
        """{parameter: where engines read it}, in `blocks`."""
        return self.memory

    def rounds(self) -> Iterator[int]:
        """Bring what is in `memory` to `exported`, some of it in each round. It is there already, all at once."""
        yield 0

    def __str__(self) -> str:
        return "a replica each"

    def masters(self) -> list[torch.Tensor]:
        """The parameters in float32, for an optimizer: copies. Gradients go to them from now on."""
        masters = [p.detach().float().clone() for p in self.parameters.values()]
        for parameter, master in zip(self.parameters.values(), masters, strict=True):
            if not parameter.requires_grad:
                continue
            parameter.register_post_accumulate_grad_hook(lambda p, master=master: move_gradient(p, master))
        return masters

    def master_names(self) -> list[str]:
        return list(self.memory)

    def trained(self) -> list[bool]:
        """Of each master, whether it gets a gradient."""
        return [p.requires_grad for p in self.parameters.values()]

    def restore(self, masters: list[torch.Tensor]) -> None:
        """Set what is in `memory` to the masters, rounded to its dtype."""
        torch._foreach_copy_(list(self.memory.values()), masters)

    def starting_weights(self) -> list[torch.Tensor]:
        """A copy of what is in `memory`, for the KL."""
        return [w.detach().clone() for w in self.memory.values()]

    def save(self, folder: Path) -> None:
        """Write what a checkpoint has besides weights and masters. Nothing."""

    def load(self, folder: Path) -> None:
        """Read it."""

    def begin_step(self, masters: list[torch.Tensor], device: torch.device) -> None:
        """Make room for the gradient: one flat float32 tensor, for a single all-reduce."""
        sizes = [m.numel() for m in masters]
        self.gradient = torch.zeros(sum(sizes), device=device)
        parts = self.gradient.split(sizes)
        for trained, master, part in zip(self.trained(), masters, parts, strict=True):
            if trained:
                master.grad = part.view(master.shape)

    def sum_gradients(self, masters: list[torch.Tensor]) -> None:
        """Let every master have the sum of all trainers' gradients."""
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.gradient)

    def release(self) -> None:
        """Give back what is only needed in a step. Masters must have let their gradients go."""
        self.gradient = None

    def norm(self, norm: torch.Tensor) -> torch.Tensor:
        """The gradient's norm over the whole replica, from that of this trainer's masters."""
        return norm

    def most(self, count: int) -> int:
        """How many forward and backward passes this trainer must make if it needs `count`."""
        return count

    def gather_names(self, name: str) -> list[str]:
        """Those that the trainers of this replica call this with, in the order of ranks; none if it is alone."""
        return []

    @contextlib.contextmanager
    def computing_with(self, values: Iterable[torch.Tensor]) -> Iterator[None]:
        """The model has these values for the time: as many as in `memory`, and of these shapes."""
        held = self._held()
        before = [t.clone() for t in held]
        with torch.no_grad():
            torch._foreach_copy_(held, list(values))
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(held, before)

    def _held(self) -> list[torch.Tensor]:
        """What the model computes with."""
        return list(self.parameters.values())

    def computing_as_engines(self) -> contextlib.AbstractContextManager:
        """The model has the values in `memory` for the time."""
        return contextlib.nullcontext()

    def placed(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of a parameter's size on this trainer, with its place in the replica: for DCP, and to gather it."""
        return tensor

    def gather(self) -> dict[str, torch.Tensor] | None:
        """The model's state dict out of `memory`; with shards on the host, and on the replica's first trainer alone."""
        return self.model.state_dict()


class Shard(Whole):
    """A trainer with its shard of each parameter in float32: the optimizer's masters. It computes in the model's dtype.

    Beside them it keeps a copy in that dtype, which engines read. Per parameter that is 4 + 2 bytes divided by the size
    of a replica; AdamW's moments add 8, and a gradient 4. One layer at a time is gathered, in the model's dtype, and
    embedding and head as long as one forward and backward pass takes.
    """

    def __init__(self, model: torch.nn.Module, size: int, device: torch.device):
        """Shard the model in place over `size` neighbours. All trainers at once, after `learner.join_group`.

        model: on the device, or on the host, where it may be larger than a GPU: one layer after the other goes there.
        Raises ValueError if its layers are not found.
        """
        layers = decoder_layers(model)
        if not layers:
            raise ValueError(f"the layers of {type(model).__name__} were not found. Try: --trainer replicated")
        world = torch.distributed.get_world_size()
        mesh = init_device_mesh(device.type, (world // size, size), mesh_dim_names=("replicate", "shard"))
        self.group = mesh.get_group("shard")
        self.position = mesh.get_local_rank("shard")
        self.size = size
        dtypes = {name: p.dtype for name, p in model.named_parameters()}
        policy = MixedPrecisionPolicy(param_dtype=model.dtype, reduce_dtype=torch.float32)
        options = {"mesh": mesh if world > size else mesh["shard"], "mp_policy": policy}
        for module in (*layers, model):
            for p in module.parameters():
                if p.dtype != torch.float32:  # those that are sharded already have it
                    p.data = p.data.to(device).float()
            # The root's weights stay gathered after its forward pass: the head is called outside of it.
            fully_shard(module, **options, reshard_after_forward=module is not model)
            module.set_gradient_divide_factor(1.0)  # the loss is divided by all trainers' tokens already
            module.set_force_sum_reduction_for_comms(True)  # gloo cannot multiply while it adds up
        model.run_base = lambda **inputs: model.base_model(**inputs)
        register_fsdp_forward_method(model, "run_base")
        super().__init__(model)
        self.memory = {n: p.to_local().detach().to(dtypes[n], copy=True) for n, p in self.parameters.items()}
        if device.type == "cuda":
            torch.cuda.empty_cache()  # of the whole layers: an engine may need it

    def __str__(self) -> str:
        return f"FSDP2 in shards of {self.size}"

    def masters(self) -> list[torch.Tensor]:
        """This trainer's shards, in place."""
        return self._held()

    def begin_step(self, masters: list[torch.Tensor], device: torch.device) -> None:
        """FSDP makes room for gradients itself."""

    def sum_gradients(self, masters: list[torch.Tensor]) -> None:
        """FSDP has done it, over replicas too: with each backward pass."""
        for parameter, master in zip(self.parameters.values(), masters, strict=True):
            grad = parameter.grad.to_local() if parameter.grad is not None else None
            # A parameter that took no part decays all the same, as a replica's does.
            master.grad = torch.zeros_like(master) if grad is None and parameter.requires_grad else grad

    def release(self) -> None:
        """Gradients, and what forward passes have left gathered: the next one gathers it anew, as it is by then."""
        for parameter in self.parameters.values():
            parameter.grad = None
        self.model.reshard()

    def norm(self, norm: torch.Tensor) -> torch.Tensor:
        square = norm.square()
        torch.distributed.all_reduce(square, group=self.group)
        return square.sqrt()

    def most(self, count: int) -> int:
        """As many as the trainer that needs most: each gathers and reduces, and would wait for the others."""
        most = torch.tensor(count, device=next(iter(self.memory.values())).device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        return int(most)

    def gather_names(self, name: str) -> list[str]:
        names = [""] * self.size
        torch.distributed.all_gather_object(names, name, group=self.group)
        return names

    @contextlib.contextmanager
    def computing_with(self, values: Iterable[torch.Tensor]) -> Iterator[None]:
        self.model.reshard()  # so that the weights are gathered anew, here and afterwards
        with super().computing_with(values):
            try:
                yield
            finally:
                self.model.reshard()

    def _held(self) -> list[torch.Tensor]:
        return [p.to_local().detach() for p in self.parameters.values()]

    def computing_as_engines(self) -> contextlib.AbstractContextManager:
        return self.computing_with(self.memory.values())

    def placed(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        # DTensor.from_local would bring a tensor that is offloaded to the GPU.
        return DTensor(tensor, self.parameters[name]._spec, requires_grad=False)

    def gather(self) -> dict[str, torch.Tensor] | None:
        """One parameter at a time. All trainers of the replica must call it."""
        gathered = {}
        for name, parameter in self.parameters.items():
            whole = self.placed(name, self.memory[name]).full_tensor()
            if self.position == 0:
                gathered[id(parameter)] = whole.cpu()
        if self.position != 0:
            return None
        return {key: gathered.get(id(t), t) for key, t in self.model.state_dict(keep_vars=True).items()}


class Gathered(Shard):
    """Shards, and a buffer through which an engine reads all of the model, in rounds: for GPUs without peer access.

    It has bucket_bytes, or as many as the largest parameter. A parameter takes as much again while it is gathered.
    """

    def __init__(self, model: torch.nn.Module, size: int, device: torch.device, bucket_bytes: int):
        super().__init__(model, size, device)
        self.round_of = {}
        self.place = {}  # parameter -> its bytes in the buffer
        number = end = largest = 0
        for name, parameter in self.parameters.items():
            nbytes = parameter.numel() * self.memory[name].itemsize
            if end and end + nbytes > bucket_bytes:
                number += 1
                end = 0
            self.round_of[name] = number
            self.place[name] = slice(end, end + nbytes)
            end += -(-nbytes // 64) * 64
            largest = max(largest, end)
        self.buffer = torch.empty(largest, dtype=torch.uint8, device=device)

    def __str__(self) -> str:
        return f"{super().__str__()}, gathered for each push in {max(self.round_of.values()) + 1} rounds"

    def blocks(self) -> list[torch.Tensor]:
        return [self.buffer]

    def exported(self) -> dict[str, torch.Tensor]:
        dtypes = {name: held.dtype for name, held in self.memory.items()}
        return {n: self.buffer[at].view(dtypes[n]).view(self.parameters[n].shape) for n, at in self.place.items()}

    def rounds(self) -> Iterator[int]:
        """One parameter at a time. All trainers of the replica must go through all rounds together."""
        views = self.exported()
        last = max(self.round_of.values())
        for number, names in itertools.groupby(self.round_of, self.round_of.get):
            for name in names:
                views[name].copy_(self.placed(name, self.memory[name]).full_tensor().detach())
            if number == last and self.buffer.is_cuda:
                torch.cuda.empty_cache()  # of the largest: an engine may need it
            yield number

    def gather_names(self, name: str) -> list[str]:
        """None: a worker finds all that it needs on its own GPU."""
        return []


def move_gradient(parameter: torch.nn.Parameter, master: torch.Tensor) -> None:
    """Add a parameter's gradient, as soon as it is there, to the float32 one of its master, and free it."""
    master.grad.add_(parameter.grad)
    parameter.grad = None
