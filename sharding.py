"""A TwoTower shared between processes by torch's FSDP2: what each reads, and how all write one
checkpoint. In a single process the same functions handle a whole model."""

from __future__ import annotations

import functools
import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (MixedPrecisionPolicy, fully_shard,
                                    register_fsdp_forward_method)
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from twotower import (BACKBONE, CHECKPOINT_FILE, DTYPES, INDEX, Router, TwoTower,
                      TwoTowerConfig, checkpoint_tensors, shards_of, write)

# under torchrun: this process, its place on this machine, and how many there are
RANK, LOCAL_RANK, WORLD = (int(os.environ.get(name, default)) for name, default in
                           (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))

# rows start to stop of a tensor of a context tower, by its name
Read = Callable[[str, int, int], Tensor]


def read_backbone(directory: Path) -> tuple[TwoTower, Read]:
    """A context tower on the meta device, shapes and dtypes as in the files, and what reads it."""
    model, files = TwoTower.skeleton(directory, towers="context", layout="any")
    keys, state = {}, model.state_dict()
    for key, name, part in checkpoint_tensors(model, files):
        keys.setdefault(name, []).append((key, part.dim() < state[name].dim()))

    def rows(key: str, which: slice = slice(None)) -> Tensor:
        with safe_open(files[key], "pt") as file:
            return file.get_slice(key)[which]

    def read(name: str, start: int, stop: int) -> Tensor:
        (key, one_by_one), *_ = keys[name]
        if not one_by_one:
            return rows(key, slice(start, stop))
        experts = [rows(key) for key, _ in keys[name][start:stop]]
        return torch.stack(experts) if experts else torch.empty(0, *state[name].shape[1:])

    return model, read


def twin(name: str) -> str | None:
    """The context tower's name of what a tensor starts as; None for the time conditioning."""
    for own, other in (("denoiser_tower.", "context_tower."), ("lm_head.", "context_lm_head.")):
        if name.startswith(own):
            return other + name.removeprefix(own)
    return name if name.startswith("context_") else None


def both_towers(recipe, config: TwoTowerConfig, read: Read, how: How) -> TwoTower:
    """A frozen context tower and a denoiser that starts as its copy. Each process reads what it
    will hold; the trained tensors are float32, the frozen ones what they are computed in."""
    with torch.device("meta"):
        model = TwoTower(config)
    if recipe.tied:
        model.denoiser_tower, model.lm_head = model.context_tower, model.context_lm_head
    elif not recipe.joins():
        for frozen in (model.context_tower, model.context_lm_head):
            frozen.requires_grad_(False).to(torch.bfloat16 if how.bf16 else torch.float32)
    how.share(model, model.denoiser_tower)
    model.to_empty(device=how.device)
    generator, D = torch.Generator().manual_seed(how.seed), config.hidden_size
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            local, start, stop = own_part(tensor)
            if twin(name):
                local.copy_(read(twin(name), start, stop))
                continue
            whole = torch.randn(tensor.shape, generator=generator)
            if name.startswith("scale_shift_tables."):
                whole /= D ** 0.5
                if recipe.gate == "copy":       # shift 0, scale 0, gate 1: at first t changes
                    whole = torch.tensor([0.0, 0.0, 1.0])[:, None].expand(3, D)     # nothing
            else:
                whole *= 0.0 if name.endswith(".bias") else config.initializer_range
                whole *= recipe.gate != "copy" or name != "t_block.1.weight"
            local.copy_(whole[start:stop])
    if recipe.timeless:
        model.t_embedder.register_forward_pre_hook(lambda _, args: (torch.zeros_like(args[0]),))
    return model


def own_part(tensor: Tensor) -> tuple[Tensor, int, int]:
    """What this process holds of a tensor: rows start to stop."""
    if not isinstance(tensor, DTensor):
        return tensor, 0, len(tensor)
    mesh, local = tensor.device_mesh, tensor.to_local()
    rows = -(-len(tensor) // mesh.size(mesh.ndim - 1))          # as torch.chunk shares them
    start = min(len(tensor), rows * mesh.get_local_rank(mesh.ndim - 1))
    return local, start, start + len(local)


@dataclass(frozen=True)
class How:
    """Where and how a model is trained; none of it changes what is learned but for rounding."""

    device: torch.device = torch.device("cpu")
    seed: int = 0
    bf16: bool = False              # compute in bfloat16; master weights and AdamW are float32
    autocast: bool = False          # only matrix products in bfloat16
    shard: int = WORLD              # processes that share a copy of the model
    accumulate: int = 1             # passes a step, each of as many sequences
    checkpoint: bool = False        # recompute each layer's activations in the backward pass

    def share(self, model: TwoTower, trained: nn.Module):
        """Shard every layer, head and tower over the processes by FSDP2, so that each is whole only
        while it is used."""
        if self.checkpoint:
            for layer in trained.layers:
                # the keys and values that it writes again are the same
                layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False,
                                                  preserve_rng_state=False)
        if not dist.is_initialized():
            return
        mesh = init_device_mesh(self.device.type, (WORLD // self.shard, self.shard),
                                mesh_dim_names=("replicate", "shard"))
        mesh = mesh if self.shard < WORLD else mesh["shard"]

        def apart(module: nn.Module, dtype: torch.dtype | None):
            # inputs are not cast: that would copy the states, which layers change
            fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(
                dtype, reduce_dtype=torch.float32, cast_forward_inputs=False))

        dtype = torch.bfloat16 if self.bf16 else None
        for module in model.modules():
            if isinstance(module, Router):
                apart(module, torch.float32)
        for tower in filter(None, {model.context_tower, model.denoiser_tower}):
            for part in (*tower.layers, tower):
                apart(part, dtype)
        apart(model.context_lm_head, dtype)
        apart(model, dtype)
        for method in ("context_logits", "diffusion_logits"):
            register_fsdp_forward_method(model, method)


def all_reduce(x: Tensor) -> Tensor:
    """The sum of x over the processes of a torchrun, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def export(model: TwoTower, skeleton: TwoTower, read: Read | None, directory: Path,
           files: dict[str, str]):
    """Write a checkpoint in the released layout, of a context tower alone as a backbone, and other
    files. Tensors are gathered one by one; the first process writes them, in the dtypes of the
    skeleton that training began with, and what was frozen as it was read."""
    with torch.device("meta"):
        like = TwoTower(model.config, towers="both" if model.denoiser_tower else "context")
    state, kinds = model.state_dict(), {k: v.dtype for k, v in skeleton.state_dict().items()}
    main = kinds["context_lm_head.weight"]
    like.load_state_dict({name: tensor.to(kinds.get(twin(name), main))
                          for name, tensor in like.state_dict().items()}, assign=True)

    def values() -> Iterator[Tensor]:           # every process takes part in gathering
        for name, tensor in like.state_dict().items():
            if read is not None and name.startswith("context_"):
                if RANK > 0:
                    continue
                value = read(name, 0, len(tensor))
            else:
                value = state[name]
                value = value.full_tensor() if isinstance(value, DTensor) else value
            value = value.to("cpu", tensor.dtype)
            yield from value if ".mixer.experts." in name else [value]

    alone = model.denoiser_tower is None
    expected = {key: part for key, _, part in checkpoint_tensors(like, ["backbone."] * alone)}
    shards, source = shards_of(expected, 5 * 10**9), values()
    config = model.config.to_dict() | (BACKBONE if alone else {}) | {
        "torch_dtype": str(main).removeprefix("torch.")}
    texts = {"config.json": config}
    if len(shards) > 1:
        texts[INDEX] = {
            "metadata": {"total_size": sum(part.nbytes for part in expected.values())},
            "weight_map": {key: name for name, shard in shards.items() for key in shard}}
    texts = {name: json.dumps(text, indent=2) + "\n" for name, text in texts.items()} | files
    saves = {directory / name: save_text(text) for name, text in texts.items()}
    for name, shard in shards.items():
        saves[directory / name] = lambda path, shard=shard: write_tensors(path, shard, source)

    def commit():
        try:
            write(saves, [path for path in directory.iterdir()
                          if CHECKPOINT_FILE.fullmatch(path.name)])
        finally:
            deque(source, 0)                    # or the others would wait for what is not gathered

    if RANK > 0:
        deque(source, 0)
    in_first(commit)


def save_text(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(text, encoding="utf-8")


def write_tensors(path: Path, expected: dict[str, Tensor], values: Iterator[Tensor]):
    """A safetensors file, of which memory holds one tensor at a time."""
    kinds, header, at = {dtype: kind for kind, dtype in DTYPES.items()}, {}, 0
    for key, part in expected.items():
        header[key] = {"dtype": kinds[part.dtype], "shape": list(part.shape),
                       "data_offsets": [at, at := at + part.nbytes]}
    text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, value in zip(expected, values):
            file.write(value.contiguous().flatten().view(torch.uint8).numpy())


def in_first(action: Callable[[], object]):
    """Do something in the first process alone; what goes wrong is raised in every one."""
    errors = [None]
    if RANK == 0:
        try:
            action()
        except (OSError, ValueError) as error:
            errors = [str(error)]
    if dist.is_initialized():
        dist.broadcast_object_list(errors)
    if errors[0] is not None:
        raise ValueError(errors[0])
