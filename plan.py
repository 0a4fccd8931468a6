"""What training a denoiser takes, from a backbone's config.json alone: memory per GPU by purpose,
and an estimate of the time. `python train.py --backbone DIR --plan` prints the table."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from twotower import Layer, Pass, TwoTower, TwoTowerConfig


class Card(NamedTuple):
    rate: float                     # bfloat16 matrix products, dense, FLOP/s (data sheets)
    memory: float                   # bytes


CARDS = {"H100": Card(989e12, 80e9), "H200": Card(989e12, 141e9), "A100": Card(312e12, 80e9),
         "B200": Card(2250e12, 180e9), "L40S": Card(362e12, 48e9)}
SHARE = 0.3                         # of that rate, for estimates
SHARED = "frozen tower", "trained weights", "AdamW's moments", "gradients"
FILL = 0.9                          # of the memory; the rest is the allocator's and NCCL's


def flops_per_token(c: TwoTowerConfig, M: int, Q: int, recompute: bool) -> float:
    """Of a training step: 2 a weight in a forward pass, 4 in a backward pass; attention as far as
    tokens see, the scan as it is done."""
    with torch.device("meta"):
        tower = TwoTower(c, towers="context").context_tower
    share = c.num_experts_per_tok / c.n_routed_experts
    weights = sum(p.numel() * (share if ".experts." in name else 1)
                  for name, p in tower.layers.named_parameters() if p.dim() > 1)
    count = c.hybrid_override_pattern.count
    pairs = 4 * count("*") * c.num_attention_heads * c.head_dim         # FLOPs of a query and key
    scan = count("M") * (4 * c.d_inner * c.ssm_state_size + 2 * Q * (
        c.d_inner + c.n_groups * c.ssm_state_size))
    forward = 2 * weights + pairs * M / 2 + scan
    denoise = forward + pairs * Q / 2 + 2 * c.vocab_size * c.hidden_size
    return forward + denoise * (4 if recompute else 3)


def memory(c: TwoTowerConfig, processes: int, rows: int, M: int, Q: int, bf16: bool = True,
           recompute: bool = False) -> dict[str, float]:
    """Bytes that each of the processes which share a copy of the model needs, by purpose, in passes
    of `rows` sequences. What layers keep for the backward pass is found by running them without
    data."""
    n, item = rows * M // Q, 2 if bf16 else 4
    with FakeTensorMode():          # in bfloat16, as without data grouped_mm takes nothing else
        model = like(c, torch.bfloat16)
        layers, states, saved = model.denoiser_tower.layers, 0, {}
        at = Pass(torch.arange(M, 2 * M).expand(rows, M), torch.arange(rows)[:, None], 2 * M,
                  mask=torch.ones(rows, 1, M, 2 * M, dtype=torch.bool))
        for layer in layers:
            state = layer.kind in "M*" and layer.mixer.empty_state(
                n if layer.kind == "M" else rows, at.end)
            own = [part for part in vars(state).values() if part is not None] if state else []
            states += sum(part.numel() * max(item, part.itemsize) for part in own)
            if layer.kind not in saved:
                x = torch.empty(n, Q, c.hidden_size, dtype=torch.bfloat16)
                saved[layer.kind] = saved_bytes(layer, x, state, own, at, item)
        kept = sum(saved[layer.kind] for layer in layers)
        if recompute:
            kept = len(layers) * rows * M * c.hidden_size * item + max(saved.values())
        sizes = [*map(size, layers)]
        layer, pair = max(sizes), max(map(sum, zip(sizes, [*sizes[1:], 0])))
        tower, head = size(model.denoiser_tower), c.vocab_size * c.hidden_size
        trained = size(model) - tower - head
    sharded = processes > 1 or bf16
    # whole at once: head, time conditioning and embeddings, a layer and the next; in a backward
    # pass also the gradients of one of these, again as they are reduced in float32
    ends = trained - tower
    gathered = sharded * item * (ends + head + pair)
    reduced = sharded * (item + 4) * max(layer, ends)
    return {"frozen tower": item * (tower + head) / processes,
            "trained weights": 4 * trained / processes, "AdamW's moments": 8 * trained / processes,
            "gradients": 4 * trained / processes, "whole layers and ends": gathered,
            "context states": states, "activations": kept,
            "logits or reduction": max(12 * rows * M * c.vocab_size, reduced)}


def like(c: TwoTowerConfig, dtype: torch.dtype) -> TwoTower:
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        return TwoTower(c)
    finally:
        torch.set_default_dtype(before)


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def saved_bytes(layer: Layer, x: Tensor, state, own: list[Tensor], at: Pass,
                item: int) -> int:
    """What a layer that reads x (n, Q, D) keeps for backward, but for weights and states."""
    found, modulation = {}, tuple(x[:, :1].clone().requires_grad_() for _ in range(3))

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()              # kept, so that no other takes its place
        found[storage._cdata] = storage, storage.nbytes() * max(item // tensor.itemsize, 1)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = layer(x.requires_grad_(), state or None, at, modulation)
    known = {part.untyped_storage()._cdata for part in (*layer.parameters(), *own)}
    return sum(size for key, (_, size) in found.items() if key not in known and out is not None)


def table(c: TwoTowerConfig, recipe, how, card: str, shard: int | None) -> str:
    """For a Recipe and a How of train.py: GB per GPU by purpose and an estimate of the time, on 8
    to 512 GPUs that read a sequence each at a time; of what does not fit, what would."""
    counts, options = (8, 16, 64, 512), {"rows": 1, "Q": min(
        recipe.at(step).block_size for step in range(recipe.steps)), "bf16": how.bf16}
    rate, room = CARDS[card]

    @functools.cache
    def of_two(M: int, recompute: bool) -> dict:
        return memory(c, 2, M=M, recompute=recompute, **options)

    def needs(gpus: int, M: int = recipe.row, recompute: bool = how.checkpoint) -> dict:
        share = 2 / min(gpus, shard or gpus)
        return {name: value * (share if name in SHARED else 1)
                for name, value in of_two(M, recompute).items()}

    columns = [needs(gpus) for gpus in counts]
    lines = [f"{'GB per GPU (' + card + ', ' + format(room / 1e9, '.0f') + ' GB)':32}"
             + "".join(f"{gpus:>10}" for gpus in counts)]
    lines += [f"{name:32}" + "".join(f"{column[name] / 1e9:10.1f}" for column in columns)
              for name in columns[0]]
    totals = [sum(column.values()) for column in columns]
    lines.append(f"{'together':32}" + "".join(f"{total / 1e9:10.1f}" for total in totals))
    speed = SHARE * rate / flops_per_token(c, recipe.row, options["Q"], how.checkpoint)
    lines.append(f"{'tokens a second, an estimate':32}"
                 + "".join(f"{speed * gpus:10.3g}" for gpus in counts))
    lines.append(f"{'days for 10^11 tokens':32}"
                 + "".join(f"{1e11 / speed / gpus / 86400:10.1f}" for gpus in counts))
    lines.append(f"The estimate takes {SHARE:.0%} of {rate / 1e12:.0f} TFLOP/s, and one sequence "
                 f"of {recipe.row} tokens a GPU and pass.")
    tries = [(recompute, M) for M in (recipe.row, recipe.row // 2, recipe.row // 4)
             for recompute in (how.checkpoint, True)]
    for gpus, total in zip(counts, totals):
        if total > FILL * room:
            fits = [f"{gpus} GPUs with --length {M}" + " --checkpoint-activations" * recompute
                    for recompute, M in tries if M % options["Q"] == 0
                    and sum(needs(gpus, M, recompute).values()) <= FILL * room]
            more = [f"{other} GPUs" for other, sum_ in zip(counts, totals) if sum_ <= FILL * room]
            lines.append(f"{gpus} GPUs: does not fit; would: " + (", or ".join(
                fits[:1] + more[:1]) or "none of these counts; a card with more memory"))
    return "\n".join(lines)
