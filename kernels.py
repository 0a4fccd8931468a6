"""Triton versions of twotower.py's hot paths: same names, signatures and results.

    python kernels.py           check every kernel against twotower.py's function in float64, then
                                time it: ms, GB/s or TFLOP/s, share of what this GPU reaches
    python kernels.py --compile compile every launch of the released model's sizes for an H100 or
                                H200 (needs no GPU): registers, spills, shared memory

Each operation can be copied with the helpers above section 1: why it is hot and what it must move,
the kernel, the launcher that checks shapes and devices. The reference is the function of the same
name in twotower.py. `model.use("triton")` takes these; nothing is patched, and twotower.py does not
need this file.

    1  moe_experts        grouped matrix products over the experts that were hit
    2  ssd_scan, ssd_step the Mamba-2 recurrence, chunk by chunk or one token; ssd_rates makes its
                          dt and A
    3  causal_conv1d      depthwise convolution and SiLU
    4  norms              rms_norm, modulate_then_norm, norm_then_modulate, gated_rms_norm,
                          add_gated
    5  attention          few queries over many keys, split over the keys
    6  most_likely        argmax and its probability over the vocabulary, in one reading
    7  route              expert scores, group limit, top-k, in float64
    8  Passes             whole passes recorded as CUDA graphs
    9  checks and timings

Conventions: pointers are commented with their shapes; offsets are int64 where they could pass 2^31;
sums are float32 (float64 where the reference is); tails are masked, so any length works; NaN is
kept, since decoding stops at it. Letters: B rows, L tokens of this call, T = B L, D hidden size, E
experts of which A are active, F their width, V vocabulary; in attention H query heads, G key/value
heads, K head size, S keys (context and block, or all of the cache's capacity in a recorded pass);
in Mamba-2 b rows, H heads, P channels of a head, N state size, G groups, and A, B, C, D are
tensors. On a machine without a GPU the kernels run under TRITON_INTERPRET=1, slowly: that is how
CI checks them.
"""

from __future__ import annotations

import functools
import math
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def check(name: str, tensor: Tensor, shape: tuple, device: torch.device, dtypes=None):
    """Raise ValueError unless a launcher's argument is what its kernel reads."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, expected {device}")
    if dtypes is not None and tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")


def check_blocks(length: int, n: int):
    if length % n:
        raise ValueError(f"{length} are no {n} equal blocks")


def check_power_of_2(name: str, size: int):
    if size < 16 or size & (size - 1):
        raise ValueError(f"{name} is {size}, but the kernel needs a power of two from 16 up")


def launcher(function):
    """Run with the first tensor's GPU as the current one, which is where Triton launches; refuse
    tensors that want gradients, and CPUs unless kernels are interpreted."""
    @functools.wraps(function)
    def launch(*args, **kwargs):
        tensors = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            raise ValueError(f"{function.__name__} of kernels.py has no gradient; use backend="
                             "'torch' to train, and torch.no_grad() to evaluate")
        device = tensors[0].device
        if device.type == "cuda":
            with torch.cuda.device(device):
                return function(*args, **kwargs)
        if not INTERPRETED:
            raise ValueError(f"kernels.py needs a CUDA device, not {device} (or "
                             "TRITON_INTERPRET=1, to check it)")
        return function(*args, **kwargs)
    return launch


FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def precision(dtype: torch.dtype) -> str:
    """Of tl.dot, for float32 (16-bit types ignore it): one TF32 product would round the inputs to
    10 bits. (The scan makes them of three, which keeps float32's digits on the tensor cores.)"""
    return "ieee" if dtype == torch.float32 else "tf32"


def multiprocessors(device: torch.device) -> int:
    """Meta tensors stand for an H100 or H200; the interpreter has so few that it takes every
    path."""
    if device.type != "cuda":
        return 132 if device.type == "meta" else 8
    return torch.cuda.get_device_properties(device).multi_processor_count


# ---------------------------------------------------------------------------------------------
# 1. Routed experts
#
# Why: 23 of 52 layers, and nine tenths of the weights. A token uses A of E experts, so a block of
# 16 tokens hits dozens of them, and each expert hit must be read once: 2 F D numbers. At batch 1
# that reading is the whole cost; the products (4 F D FLOPs a token and expert) are small beside it.
#
# How: the T*A (token, expert) pairs, called slots, are put in order of their experts on the device;
# every expert's run of slots is padded to whole tiles of BLOCK_M rows, so that one tile has one
# expert. A first grouped product makes relu(x up^T)^2 for every slot, a second one multiplies by
# down^T and the routing weight. Slots of a token are then summed in a fixed order: the result does
# not depend on timing. The number of tiles is known on the device only; programs past it return at
# once, so the host never waits and the launch can be recorded in a CUDA graph.


@triton.jit
def _group_kernel(
        ids_ptr,            # (n,) int64: the expert of each slot
        slots_ptr,          # (tiles * TILE,) int64: slots by expert; n where a tile is padded
        tile_expert_ptr,    # (tiles,) int64
        n_tiles_ptr,        # (1,) int64: how many tiles there are in truth
        n, TILE: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr):
    expert = tl.program_id(0)           # a program for each; all count the slots of all experts
    e, i = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK)
    counts = tl.zeros((BLOCK_E,), tl.int32)
    for start in range(0, n, BLOCK):
        ids = tl.load(ids_ptr + start + i, start + i < n, other=0).to(tl.int32)
        counts += tl.histogram(ids, BLOCK_E, mask=start + i < n)
    tiles = (counts + TILE - 1) // TILE
    if expert == 0:
        tl.store(n_tiles_ptr, tl.sum(tiles, 0))
    first = tl.sum(tl.where(e < expert, tiles, 0), 0)
    end = first * TILE
    for start in range(0, n, BLOCK):
        own = tl.load(ids_ptr + start + i, start + i < n, other=-1) == expert
        tl.store(slots_ptr + end + tl.cumsum(own.to(tl.int32), 0) - 1, start + i, own)
        end += tl.sum(own.to(tl.int32), 0)
    last = (end + TILE - 1) // TILE
    padding = end + tl.arange(0, TILE)
    tl.store(slots_ptr + padding, n, padding < last * TILE)
    for tile in range(first, last):
        tl.store(tile_expert_ptr + tile, expert)


@triton.jit
def _grouped_product_kernel(
        x_ptr,              # (T, inputs), or (T*A, inputs) in the second product
        w_ptr,              # (E, outputs, inputs)
        bias_ptr,           # (E, outputs), if HAS_BIAS
        out_ptr,            # (T*A, outputs)
        scale_ptr,          # (T*A,) routing weights, in the second product
        slots_ptr, tile_expert_ptr, n_tiles_ptr,        # as _group_kernel writes them
        n_slots, outputs, inputs, A,
        FIRST: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr):
    tile = tl.program_id(1).to(tl.int64)
    if tile >= tl.load(n_tiles_ptr):
        return
    slots = tl.load(slots_ptr + tile * BLOCK_M + tl.arange(0, BLOCK_M))          # (BLOCK_M,)
    real = slots < n_slots
    rows = slots // A if FIRST else slots
    expert = tl.load(tile_expert_ptr + tile)
    columns = tl.program_id(0).to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inside = columns < outputs
    acc = tl.zeros((BLOCK_M, BLOCK_OUT), tl.float32)
    for start in range(0, inputs, BLOCK_IN):
        i = start + tl.arange(0, BLOCK_IN)
        x = tl.load(x_ptr + rows[:, None] * inputs + i, real[:, None] & (i < inputs), other=0.0)
        w = tl.load(w_ptr + (expert * outputs + columns)[None, :] * inputs + i[:, None],
                    inside[None, :] & (i < inputs)[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + expert * outputs + columns, inside, other=0.0).to(tl.float32)
    if FIRST:
        acc = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)
        acc = acc * acc
    else:
        acc *= tl.load(scale_ptr + slots, real, other=0.0).to(tl.float32)[:, None]
    tl.store(out_ptr + slots[:, None] * outputs + columns, acc.to(out_ptr.dtype.element_ty),
             real[:, None] & inside)


@triton.jit
def _sum_slots_kernel(
        slots_ptr,          # (T, A, D) f32
        out_ptr,            # (T, D)
        D, A, BLOCK_D: tl.constexpr):
    token, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for a in range(A):
        acc += tl.load(slots_ptr + (token * A + a) * D + d, d < D, other=0.0)
    tl.store(out_ptr + token * D + d, acc.to(out_ptr.dtype.element_ty), d < D)


def group_by_expert(topk_ids: Tensor, E: int, tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """Slots in order of their experts, each expert's run padded to whole tiles.

    topk_ids (T, A) int64. Returns: slots (tiles * tile,) int64 with T*A where there is none, the
    expert of each tile (tiles,), and how many of the tiles hold slots (1,); what is after those is
    not written. `tiles` is the most there can be, known without asking the device.
    """
    n, device = topk_ids.numel(), topk_ids.device
    tiles = n if n < E else (n + E * (tile - 1)) // tile
    slots, tile_expert, n_tiles = (torch.empty(size, dtype=torch.long, device=device)
                                   for size in (tiles * tile, tiles, 1))
    # a slot for each of the 128 threads at least: of fewer, threads hold copies, which a histogram
    # with a mask counts as well (seen in the code that Triton 3.6 and 3.7 compile)
    BLOCK = min(1024, max(128, triton.next_power_of_2(n)))
    _group_kernel[E,](topk_ids.contiguous(), slots, tile_expert, n_tiles, n, TILE=tile,
                      BLOCK_E=triton.next_power_of_2(E), BLOCK=BLOCK)
    return slots, tile_expert, n_tiles


@launcher
def moe_experts(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, up: Tensor, down: Tensor,
                up_bias: Tensor | None = None, down_bias: Tensor | None = None) -> Tensor:
    """As twotower.moe_experts; x, up and down share a dtype."""
    (T, D), (E, F, _), A = x.shape, up.shape, topk_ids.shape[1]
    check("x", x, (T, D), x.device, FLOATS)
    check("topk_ids", topk_ids, (T, A), x.device, (torch.long,))
    check("topk_weights", topk_weights, (T, A), x.device)
    check("up", up, (E, F, D), x.device, (x.dtype,))
    check("down", down, (E, D, F), x.device, (x.dtype,))
    for name, bias, outputs in (("up_bias", up_bias, F), ("down_bias", down_bias, D)):
        if bias is not None:
            check(name, bias, (E, outputs), x.device, FLOATS)
    x, up, down = x.contiguous(), up.contiguous(), down.contiguous()
    # tiles of 16 rows while experts get few tokens each; taller ones read the weights less often
    BLOCK_M = 16 if T * A <= 16 * E else 64 if T * A <= 96 * E else 128
    slots, tile_expert, n_tiles = group_by_expert(topk_ids, E, BLOCK_M)
    scale, tiles = topk_weights.contiguous(), len(tile_expert)
    hidden = torch.empty(T * A, F, dtype=x.dtype, device=x.device)
    weighted = torch.empty(T * A, D, dtype=torch.float32, device=x.device)
    for first, source, w, bias, to in ((True, x, up, up_bias, hidden),
                                       (False, hidden, down, down_bias, weighted)):
        outputs, inputs = w.shape[1:]
        # a step loads 16 KB of weights in bfloat16, of rows no more (both fit the shared memory in
        # float32 too); narrow where few tiles would leave the GPU idle
        few = tiles * triton.cdiv(outputs, 128) < 2 * multiprocessors(x.device)
        BLOCK_OUT = max(16, min(32 if few else 128, triton.next_power_of_2(outputs)))
        BLOCK_IN = max(16, min(8192 // max(BLOCK_M, BLOCK_OUT), triton.next_power_of_2(inputs)))
        _grouped_product_kernel[triton.cdiv(outputs, BLOCK_OUT), tiles](
            source, w,
            w if bias is None else bias.contiguous(),   # what is not read still needs a tensor
            to, scale, slots, tile_expert, n_tiles, T * A, outputs, inputs, A, FIRST=first,
            HAS_BIAS=bias is not None, PRECISION=precision(x.dtype), BLOCK_M=BLOCK_M,
            BLOCK_OUT=BLOCK_OUT, BLOCK_IN=BLOCK_IN, num_warps=8 if BLOCK_M == 128 else 4)
    out = torch.empty_like(x)
    _sum_slots_kernel[T, triton.cdiv(D, 1024)](weighted, out, D, A, BLOCK_D=1024)
    return out


# ---------------------------------------------------------------------------------------------
# 2. The Mamba-2 scan
#
# Why: 23 of 52 layers. A block of 16 tokens needs the layer's state, H P N float32 numbers (2 MB a
# row at full size), once to read and, in the context tower, once to write; the chunk's products
# cost c (2 c (N + P) + 4 P N) FLOPs a head. Made of separate matrix products, the state and the
# c x c weights travel through memory several times.
#
# How: in a chunk of c tokens that begins with the state h, with s_l the sum of dt A up to token l,
#
#     y_l = exp(s_l) h C_l + sum over m <= l of exp(s_l - s_m) dt_m (C_l . B_m) x_m + D x_l
#     h'  = exp(s_c) h     + sum over m      of exp(s_c - s_m) dt_m x_m (x) B_m
#
# A program owns a chunk of a head, or a slice of its P channels, and walks over the N columns of
# the state, a few at a time: h C, the added states and C . B (which every slice repeats) come from
# that one walk. A block is one chunk: its state is read once and written once. A long prompt takes
# three launches, as in arXiv 2405.21060, section 6: what every chunk adds to a state, all at the
# same time; the state before every chunk, one after the other, which is a few operations a number;
# then the outputs, all at the same time. dt and A, a handful of small operations, are one more.


@triton.jit
def _rates_kernel(
        dt_ptr,             # (b, L, H)
        dt_bias_ptr,        # (H,)
        A_log_ptr,          # (H,)
        counts_ptr,         # (b,) int64: tokens of each row before its padding, if HAS_COUNTS
        out_ptr,            # (b, L, H) f32
        A_ptr,              # (H,) f32
        dt_row, dt_token, L, H, least, most, HAS_COUNTS: tl.constexpr, BLOCK_H: tl.constexpr):
    token, h = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_H)
    row, l, inside = token // L, token % L, h < H
    dt = tl.load(dt_ptr + row * dt_row + l * dt_token + h, inside, other=0.0).to(tl.float32)
    dt += tl.load(dt_bias_ptr + h, inside, other=0.0).to(tl.float32)
    # softplus is max(dt, 0) + log1p(small); the factor makes good what u = 1 + small loses
    small = tl.exp(-tl.abs(dt))
    u = 1 + small
    dt = tl.maximum(dt, 0.0) + tl.where(u == 1, small, tl.log(u) * small / (u - 1))
    dt = tl.maximum(dt, least, propagate_nan=tl.PropagateNan.ALL)
    dt = tl.minimum(dt, most, propagate_nan=tl.PropagateNan.ALL)
    if HAS_COUNTS:
        dt = tl.where(l < tl.load(counts_ptr + row), dt, 0.0)
    tl.store(out_ptr + token * H + h, dt, inside)
    if token == 0:                                      # the same for all
        A_log = tl.load(A_log_ptr + h, inside, other=0.0).to(tl.float32)
        tl.store(A_ptr + h, -tl.exp(A_log), inside)


@launcher
def ssd_rates(dt: Tensor, dt_bias: Tensor, A_log: Tensor, limit: tuple[float, float],
              counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As twotower.ssd_rates: dt (b, L, H) and A (H), float32, in one launch."""
    b, L, H = dt.shape
    check("dt", dt, (b, L, H), dt.device, FLOATS)
    check("dt_bias", dt_bias, (H,), dt.device, FLOATS)
    check("A_log", A_log, (H,), dt.device, FLOATS)
    if counts is not None:
        check("counts", counts, (b,), dt.device, (torch.long,))
    dt = dt if dt.stride(2) == 1 else dt.contiguous()           # a slice of what in_proj made
    out = torch.empty(b, L, H, dtype=torch.float32, device=dt.device)
    A = torch.empty(H, dtype=torch.float32, device=dt.device)
    _rates_kernel[b * L,](dt, dt_bias.contiguous(), A_log.contiguous(),
                          dt if counts is None else counts, out, A, dt.stride(0), dt.stride(1),
                          L, H, *map(float, limit), HAS_COUNTS=counts is not None,
                          BLOCK_H=triton.next_power_of_2(H))
    return out, A


@triton.jit
def _chunk_kernel(
        x_ptr,              # (b, L, H, P)
        dt_ptr,             # (b, L, H) f32
        A_ptr,              # (H,) f32, negative
        B_ptr, C_ptr,       # (b, L, G, N)
        D_ptr,              # (H,)
        state_ptr,          # (b, chunks, H, P, N) f32: before each chunk, if READ_STATE
        y_ptr,              # (b, L, H, P), if READ_STATE
        out_ptr,            # (b, chunks, H, P, N) f32: after it, or what it adds, if WRITE_STATE
        factor_ptr,         # (b, chunks, H) f32: exp(s_c), if only WRITE_STATE
        x_row, x_token, dt_row, dt_token, B_row, B_token, C_row, C_token,        # strides
        L, H, G,
        READ_STATE: tl.constexpr, WRITE_STATE: tl.constexpr, CHUNK: tl.constexpr,
        P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    row, head = tl.program_id(0).to(tl.int64) // H, tl.program_id(0).to(tl.int64) % H
    group, chunk = head // (H // G), tl.program_id(1).to(tl.int64)
    p = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    l = tl.arange(0, CHUNK)
    t = chunk * CHUNK + l
    real = t < L
    dt = tl.load(dt_ptr + row * dt_row + t * dt_token + head, real, other=0.0)
    steps = dt * tl.load(A_ptr + head)          # tails have dt 0: they decay nothing, add nothing
    log_decay, log_total = tl.cumsum(steps, 0), tl.sum(steps, 0)                 # s_l and s_c
    x = tl.load(x_ptr + row * x_row + t[:, None] * x_token + head * P + p[None, :],
                real[:, None], other=0.0).to(tl.float32)                         # (CHUNK, BLOCK_P)
    faded_x = tl.trans(x * (dt * tl.exp(log_total - log_decay))[:, None])   # to the chunk's end
    weight = tl.zeros((CHUNK, CHUNK), tl.float32)
    y = tl.zeros((CHUNK, BLOCK_P), tl.float32)
    this = (row * tl.num_programs(1) + chunk) * H + head
    cell = this * P * N + p[:, None] * N
    if not READ_STATE:
        tl.store(factor_ptr + this, tl.exp(log_total))
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        B = tl.load(B_ptr + row * B_row + t[:, None] * B_token + group * N + n[None, :],
                    real[:, None], other=0.0)                                    # (CHUNK, BLOCK_N)
        if READ_STATE:
            state = tl.load(state_ptr + cell + n[None, :])                      # (BLOCK_P, BLOCK_N)
            C = tl.load(C_ptr + row * C_row + t[:, None] * C_token + group * N + n[None, :],
                        real[:, None], other=0.0)
            # in x's dtype: products of 16 bits are exact in float32
            weight = tl.dot(C, tl.trans(B), weight, input_precision="tf32x3")
            y = tl.dot(C.to(tl.float32), tl.trans(state), y, input_precision="tf32x3")
        if WRITE_STATE:
            after = tl.dot(faded_x, B.to(tl.float32), input_precision="tf32x3")
            if READ_STATE:
                after += state * tl.exp(log_total)
            tl.store(out_ptr + cell + n[None, :], after)
    if READ_STATE:
        weight *= tl.exp(log_decay[:, None] - log_decay[None, :]) * dt[None, :]
        weight = tl.where(l[:, None] >= l[None, :], weight, 0.0)    # the rest may have overflowed
        y = y * tl.exp(log_decay)[:, None] + tl.load(D_ptr + head).to(tl.float32) * x
        y = tl.dot(weight, x, y, input_precision="tf32x3")
        tl.store(y_ptr + ((row * L + t[:, None]) * H + head) * P + p[None, :],
                 y.to(y_ptr.dtype.element_ty), real[:, None])


@triton.jit
def _pass_states_kernel(
        factor_ptr,         # (b, chunks, H) f32
        first_ptr,          # (b, H, P*N) f32: the state before the first chunk
        states_ptr,         # (b, chunks, H, P*N) f32: what chunks add -> the states before them
        last_ptr,           # (b, H, P*N) f32: the state after the last chunk, if KEEP_STATE
        chunks, H, cells,   # P*N
        KEEP_STATE: tl.constexpr, BLOCK: tl.constexpr):
    row, head = tl.program_id(0).to(tl.int64) // H, tl.program_id(0).to(tl.int64) % H
    cell = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = cell < cells
    state = tl.load(first_ptr + (row * H + head) * cells + cell, inside, other=0.0)
    this = row * chunks * H + head
    added, factor = tl.load(states_ptr + this * cells + cell, inside), tl.load(factor_ptr + this)
    for chunk in range(chunks):
        # loaded ahead: the compiler may not move a load before a store to the same array
        more = chunk + 1 < chunks
        next_added = tl.load(states_ptr + (this + H) * cells + cell, inside & more)
        next_factor = tl.load(factor_ptr + this + H, more)
        tl.store(states_ptr + this * cells + cell, state, inside)
        state = state * factor + added
        added, factor = next_added, next_factor
        this += H
    if KEEP_STATE:
        tl.store(last_ptr + (row * H + head) * cells + cell, state, inside)


@launcher
def ssd_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor,
             chunk_size: int, keep: str = "end"):
    """As twotower.ssd_scan; P and N powers of two of 16 or more. chunk_size is that of the states
    kept with "blocks"; else the chunks are the kernel's own."""
    keep_state, keep_chunks = keep == "end", keep == "blocks"
    (b, L, H, P), (G, N), f32 = x.shape, B.shape[2:], (torch.float32,)
    check_power_of_2("P", P)
    check_power_of_2("N", N)
    if keep_chunks:
        check_power_of_2("chunk_size", chunk_size)
    check("x", x, (b, L, H, P), x.device, FLOATS)
    check("dt", dt, (b, L, H), x.device, f32)
    check("A", A, (H,), x.device, f32)
    check("B", B, (b, L, G, N), x.device, (x.dtype,))
    check("C", C, (b, L, G, N), x.device, (x.dtype,))
    check("D", D, (H,), x.device, FLOATS)
    check("state", state, (b, H, P, N), x.device, f32)
    # the last two axes as one stretch of memory; rows and tokens may be strided, as slices are
    x, B, C = (v if v.stride()[2:] == (v.shape[3], 1) else v.contiguous() for v in (x, B, C))
    dt = dt if dt.stride(2) == 1 else dt.contiguous()
    state, A, D = state.contiguous(), A.contiguous(), D.contiguous()
    CHUNK = chunk_size if keep_chunks else 16 if L <= 16 else 64
    chunks = triton.cdiv(L, CHUNK)
    y = torch.empty(b, L, H, P, dtype=x.dtype, device=x.device)
    last = torch.empty_like(state) if keep_state else None
    # slices of a head fill the GPU at batch 1
    BLOCK_P = P if b * H * chunks >= 4 * multiprocessors(x.device) else 16
    strides = (*x.stride()[:2], *dt.stride()[:2], *B.stride()[:2], *C.stride()[:2])

    def over_chunks(before=None, after=None, factors=None):
        _chunk_kernel[b * H, chunks, P // BLOCK_P](
            x, dt, A, B, C, D, *(y if v is None else v for v in (before, y, after, factors)),
            *strides, L, H, G, READ_STATE=before is not None, WRITE_STATE=after is not None,
            CHUNK=CHUNK, P=P, N=N, BLOCK_P=BLOCK_P, BLOCK_N=min(N, 64 if BLOCK_P == 16 else 32))

    if chunks == 1 and not keep_chunks:
        over_chunks(before=state, after=last)
        return y, last
    factors = torch.empty(b, chunks, H, dtype=torch.float32, device=x.device)
    states = torch.empty(b, chunks, H, P, N, dtype=torch.float32, device=x.device)
    over_chunks(after=states, factors=factors)
    _pass_states_kernel[b * H, triton.cdiv(P * N, 1024)](
        factors, state, states, y if last is None else last, chunks, H, P * N,
        KEEP_STATE=last is not None, BLOCK=1024)
    over_chunks(before=states)
    return y, states if keep_chunks else last


@triton.jit
def _step_kernel(
        x_ptr,              # (b, H, P)
        dt_ptr,             # (b, H) f32
        A_ptr,              # (H,) f32
        B_ptr, C_ptr,       # (b, G, N)
        D_ptr,              # (H,)
        state_ptr,          # (b, H, P, N) f32
        y_ptr,              # (b, H, P)
        out_ptr,            # (b, H, P, N) f32, may be state_ptr: every cell is read before written
        x_row, B_row, C_row, H, G,
        P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr):
    row, head = tl.program_id(0).to(tl.int64) // H, tl.program_id(0).to(tl.int64) % H
    group = head // (H // G)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, N)
    cell = (row * H + head) * P * N + p[:, None] * N + n[None, :]
    dt = tl.load(dt_ptr + row * H + head)
    x = tl.load(x_ptr + row * x_row + head * P + p).to(tl.float32)
    B = tl.load(B_ptr + row * B_row + group * N + n).to(tl.float32)
    C = tl.load(C_ptr + row * C_row + group * N + n).to(tl.float32)
    state = tl.load(state_ptr + cell) * tl.exp(dt * tl.load(A_ptr + head))
    state += (dt * x)[:, None] * B[None, :]
    tl.store(out_ptr + cell, state)
    y = tl.sum(state * C[None, :], 1) + tl.load(D_ptr + head).to(tl.float32) * x
    tl.store(y_ptr + (row * H + head) * P + p, y.to(y_ptr.dtype.element_ty))


@launcher
def ssd_step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor,
             state: Tensor, in_place: bool = False) -> tuple[Tensor, Tensor]:
    """As twotower.ssd_step; P and N as for ssd_scan. The state is read once and written once,
    8 H P N bytes a row."""
    (b, H, P), (G, N), f32 = x.shape, B.shape[1:], (torch.float32,)
    check_power_of_2("P", P)
    check_power_of_2("N", N)
    check("x", x, (b, H, P), x.device, FLOATS)
    check("dt", dt, (b, H), x.device, f32)
    check("A", A, (H,), x.device, f32)
    check("B", B, (b, G, N), x.device, FLOATS)
    check("C", C, (b, G, N), x.device, FLOATS)
    check("D", D, (H,), x.device, FLOATS)
    check("state", state, (b, H, P, N), x.device, f32)
    if in_place and not state.is_contiguous():
        raise ValueError("state must be contiguous to be updated in place")
    # rows may be strided, as slices are
    x, B, C = (v if v.stride()[1:] == (v.shape[2], 1) else v.contiguous() for v in (x, B, C))
    dt, state, A, D = dt.contiguous(), state.contiguous(), A.contiguous(), D.contiguous()
    y = torch.empty(b, H, P, dtype=x.dtype, device=x.device)
    out = state if in_place else torch.empty_like(state)
    _step_kernel[b * H, P // 16](x, dt, A, B, C, D, state, y, out, x.stride(0), B.stride(0),
                                 C.stride(0), H, G, P=P, N=N, BLOCK_P=16)
    return y, out


# ---------------------------------------------------------------------------------------------
# 3. Causal convolution and SiLU
#
# Why: between the two large products of every Mamba-2 layer; W = 4 multiplications a channel are
# nothing, but written as shifted products torch reads the inputs W times and writes W times. Here
# every input is read once (neighbours' loads hit the cache) and every output written once.


@triton.jit
def _conv_kernel(
        inputs_ptr,         # (B, W-1+L, channels)
        weight_ptr,         # (channels, W)
        bias_ptr,           # (channels,), if HAS_BIAS
        out_ptr,            # (B, L, channels)
        row_stride, token_stride, L, channels,
        W: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    c = tl.program_id(2).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = (t < L)[:, None] & (c < channels)[None, :]
    acc = tl.zeros((BLOCK_L, BLOCK_C), tl.float32)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + c, c < channels, other=0.0).to(tl.float32)[None, :]
    for w in tl.static_range(W):                # input t + w is W-1-w tokens before token t
        tap = tl.load(weight_ptr + c * W + w, c < channels, other=0.0).to(tl.float32)
        x = tl.load(inputs_ptr + row * row_stride + (t[:, None] + w) * token_stride + c[None, :],
                    real, other=0.0)
        acc += x.to(tl.float32) * tap[None, :]
    out = acc / (1 + tl.exp(-acc))                                               # SiLU
    tl.store(out_ptr + (row * L + t[:, None]) * channels + c[None, :],
             out.to(out_ptr.dtype.element_ty), real)


@launcher
def causal_conv1d(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As twotower.causal_conv1d: inputs (B, W-1+L, channels) -> (B, L, channels), the first W-1
    being the state."""
    (B, length, channels), W = inputs.shape, weight.shape[-1]
    L = length - W + 1
    check("inputs", inputs, inputs.shape, inputs.device, FLOATS)
    check("weight", weight, (channels, 1, W), inputs.device, FLOATS)
    if bias is not None:
        check("bias", bias, (channels,), inputs.device, FLOATS)
        bias = bias.contiguous()
    inputs = inputs if inputs.stride(2) == 1 else inputs.contiguous()
    weight = weight.contiguous()
    out = torch.empty(B, L, channels, dtype=inputs.dtype, device=inputs.device)
    BLOCK_L, BLOCK_C = min(16, triton.next_power_of_2(L)), 128
    _conv_kernel[B, triton.cdiv(L, BLOCK_L), triton.cdiv(channels, BLOCK_C)](
        inputs, weight, weight if bias is None else bias, out, inputs.stride(0), inputs.stride(1),
        L, channels, W=W, HAS_BIAS=bias is not None, BLOCK_L=BLOCK_L, BLOCK_C=BLOCK_C)
    return out


# ---------------------------------------------------------------------------------------------
# 4. Norms
#
# Why: one per layer, a second in Mamba-2 layers, and one before the head. Each is a few operations
# on a row of D numbers, but as separate torch operations each reads and writes the whole stream and
# costs a launch. One program per token does all of a norm and of the modulation around it: x in,
# result out, 4 D bytes a token in bfloat16.


@triton.jit
def _norm_kernel(
        x_ptr,              # (tokens, D)
        weight_ptr,         # (D,)
        shift_ptr,          # (B, D), if MODULATE
        scale_ptr,          # (B, D)
        out_ptr,            # (tokens, D)
        D, eps, L,          # tokens of a row, which share a shift and a scale
        MODULATE: tl.constexpr,         # 0 not, 1 before the norm (Mamba-2, attention), 2 after it
        BLOCK_D: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    x = tl.load(x_ptr + token * D + d, inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + d, inside, other=0.0).to(tl.float32)
    if MODULATE:
        at = token // L * D + d
        shift = tl.load(shift_ptr + at, inside, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + at, inside, other=0.0).to(tl.float32)
        if MODULATE == 1:
            x = x * (1 + scale) + shift
    x = x * tl.rsqrt(tl.sum(x * x, 0) / D + eps) * weight
    if MODULATE == 2:
        x = x * (1 + scale) + shift
    tl.store(out_ptr + token * D + d, x.to(out_ptr.dtype.element_ty), inside)


@launcher
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As twotower.rms_norm: x (..., D) -> (..., D) in the weight's dtype."""
    D = x.shape[-1]
    check("x", x, x.shape, x.device, FLOATS)
    check("weight", weight, (D,), x.device, FLOATS)
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
    _norm_kernel[x.numel() // D,](x, weight, x, x, out, D, eps, 1, MODULATE=0,
                                  BLOCK_D=triton.next_power_of_2(D), num_warps=8)
    return out


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, eps: float,
                   order: int) -> Tensor:
    B, L, D = x.shape
    check("x", x, (B, L, D), x.device, FLOATS)
    check("weight", weight, (D,), x.device, FLOATS)
    check("shift", shift, (B, 1, D), x.device, FLOATS)
    check("scale", scale, (B, 1, D), x.device, FLOATS)
    x, weight, shift, scale = (v.contiguous() for v in (x, weight, shift, scale))
    out = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
    _norm_kernel[B * L,](x, weight, shift, scale, out, D, eps, L, MODULATE=order,
                         BLOCK_D=triton.next_power_of_2(D), num_warps=8)
    return out


@launcher
def modulate_then_norm(x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor,
                       eps: float) -> Tensor:
    """As twotower.modulate_then_norm: x (B, L, D), shift and scale (B, 1, D)."""
    return modulated_norm(x, shift, scale, weight, eps, 1)


@launcher
def norm_then_modulate(x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor,
                       eps: float) -> Tensor:
    """As twotower.norm_then_modulate: x (B, L, D), shift and scale (B, 1, D)."""
    return modulated_norm(x, shift, scale, weight, eps, 2)


@triton.jit
def _gated_norm_kernel(
        y_ptr, z_ptr,       # (tokens, groups * size)
        weight_ptr,         # (groups * size,)
        out_ptr,            # (tokens, groups * size)
        z_token, groups, size, eps, BLOCK: tl.constexpr):
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, BLOCK)
    inside, channel = i < size, group * size + i
    y = tl.load(y_ptr + token * groups * size + channel, inside, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + token * z_token + channel, inside, other=0.0).to(tl.float32)
    v = y * z / (1 + tl.exp(-z))
    v = v * tl.rsqrt(tl.sum(v * v, 0) / size + eps)
    v *= tl.load(weight_ptr + channel, inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * groups * size + channel, v.to(out_ptr.dtype.element_ty), inside)


@launcher
def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """As twotower.gated_rms_norm: the RMS norm of y silu(z) over each group; (..., d_inner)."""
    d_inner = y.shape[-1]
    check("y", y, y.shape, y.device, FLOATS)
    check("z", z, y.shape, y.device, FLOATS)
    check("weight", weight, (d_inner,), y.device, FLOATS)
    check_blocks(d_inner, groups)
    y, weight = y.contiguous(), weight.contiguous()
    z = z.flatten(0, -2)                                # a slice: its rows are strided
    z = z if z.stride(1) == 1 else z.contiguous()
    out, size = torch.empty_like(y), d_inner // groups
    _gated_norm_kernel[y.numel() // d_inner, groups](
        y, z, weight, out, z.stride(0), groups, size, eps, BLOCK=triton.next_power_of_2(size))
    return out


@triton.jit
def _add_gated_kernel(
        x_ptr, h_ptr,       # (tokens, D)
        gate_ptr,           # (B, D)
        out_ptr,            # (tokens, D)
        D, L, BLOCK_D: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    x = tl.load(x_ptr + token * D + d, inside, other=0.0).to(tl.float32)
    h = tl.load(h_ptr + token * D + d, inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + token // L * D + d, inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * D + d, (x + gate * h).to(out_ptr.dtype.element_ty), inside)


@launcher
def add_gated(x: Tensor, gate: Tensor, h: Tensor) -> Tensor:
    """As twotower.add_gated: x + gate h, x and h (B, L, D), gate (B, 1, D)."""
    B, L, D = x.shape
    check("x", x, (B, L, D), x.device, FLOATS)
    check("h", h, (B, L, D), x.device, FLOATS)
    check("gate", gate, (B, 1, D), x.device, FLOATS)
    x, gate, h = x.contiguous(), gate.contiguous(), h.contiguous()
    out = torch.empty_like(x)
    _add_gated_kernel[B * L,](x, h, gate, out, D, L, BLOCK_D=triton.next_power_of_2(D),
                              num_warps=8)
    return out


# ---------------------------------------------------------------------------------------------
# 5. Attention of few queries
#
# Why: 6 of 52 layers, the only ones whose cost grows with the context: all keys and values, 4 G K
# bytes a cached token in bfloat16, are read in every pass. The H/G query heads of a KV head and the
# L queries are rows of one product, 16 H/G = 256 for a block of 16, in tiles of up to 128 rows that
# each read the keys.
#
# How: with one row and two KV heads there is too little to keep a GPU busy, so the keys are split:
# each program goes over its share with a running maximum and sum (as FlashAttention does), and a
# second kernel joins the shares.

HIDDEN = tl.constexpr(-1.0e30)          # not -inf, which would make NaN of a share with no key


@triton.jit
def _attention_kernel(
        q_ptr,              # (B, H, L, K)
        k_ptr, v_ptr,       # (B, G, S, K)
        last_ptr,           # (B or 1, L) int64: the last key a query sees, if HAS_LAST
        mask_ptr,           # (B or 1, 1, L, S) bool, if HAS_MASK
        out_ptr,            # (B, L, H, K) if there is one share, else (shares, B, L, H, K) f32
        best_ptr, sum_ptr,  # (shares, B, L, H) f32
        q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token,  # strides
        last_row, mask_row, mask_token,
        H, G, L, S,
        share_size,         # keys in a share
        scale,              # 1 / sqrt(K)
        HAS_LAST: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr,
        ONE_SHARE: tl.constexpr, PRECISION: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr):
    row, group = tl.program_id(1).to(tl.int64) // G, tl.program_id(1).to(tl.int64) % G
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    head, query = group * (H // G) + m // L, m % L      # the rows of a KV head: head by head
    real = m < H // G * L
    d = tl.arange(0, BLOCK_K)
    at = row * q_row + head * q_head + query * q_token
    q = tl.load(q_ptr + at[:, None] + d[None, :],
                real[:, None] & (d < K)[None, :], other=0.0)            # (BLOCK_M, BLOCK_K)
    best = tl.full((BLOCK_M,), HIDDEN, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    first = tl.program_id(2).to(tl.int64) * share_size
    end = tl.minimum(first + share_size, S)
    last = query
    if HAS_LAST:
        last = tl.load(last_ptr + row * last_row + query, real, other=0)
    if HAS_LAST or IS_CAUSAL:
        end = tl.minimum(end, tl.max(tl.where(real, last, 0), 0) + 1)
    for start in range(first, end, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        cached = s < end                                # no query of this tile sees further
        seen = real[:, None] & cached[None, :]
        if HAS_LAST or IS_CAUSAL:
            seen = seen & (s[None, :] <= last[:, None])
        if HAS_MASK:
            seen = seen & (tl.load(mask_ptr + row * mask_row + query[:, None] * mask_token
                                   + s[None, :], seen, other=0) != 0)
        k = tl.load(k_ptr + row * k_row + group * k_head + s[:, None] * k_token + d[None, :],
                    cached[:, None] & (d < K)[None, :], other=0.0)
        v = tl.load(v_ptr + row * v_row + group * v_head + s[:, None] * v_token + d[None, :],
                    cached[:, None] & (d < K)[None, :], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        scores = tl.where(seen, scores, HIDDEN)
        higher = tl.maximum(best, tl.max(scores, 1))
        p = tl.where(seen, tl.exp(scores - higher[:, None]), 0.0)
        faded = tl.exp(best - higher)
        total = total * faded + tl.sum(p, 1)
        # the weights are rounded to v's dtype, as tensor cores want them
        acc = acc * faded[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        best = higher
    at = (row * L + query) * H + head
    inside = real[:, None] & (d < K)[None, :]
    if ONE_SHARE:
        out = acc / total[:, None]
        tl.store(out_ptr + at[:, None] * K + d[None, :], out.to(out_ptr.dtype.element_ty), inside)
    else:
        at += tl.program_id(2).to(tl.int64) * (tl.num_programs(1) // G) * H * L
        tl.store(out_ptr + at[:, None] * K + d[None, :], acc, inside)
        tl.store(best_ptr + at, best, real)
        tl.store(sum_ptr + at, total, real)


@triton.jit
def _join_shares_kernel(
        acc_ptr,            # (shares, rows, K) f32
        best_ptr, sum_ptr,  # (shares, rows) f32
        out_ptr,            # (rows, K)
        rows, shares, K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_SHARES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i, d = tl.arange(0, BLOCK_SHARES), tl.arange(0, BLOCK_K)
    there = i < shares
    best = tl.load(best_ptr + i * rows + row, there, other=HIDDEN)
    weight = tl.exp(best - tl.max(best, 0))
    total = tl.sum(weight * tl.load(sum_ptr + i * rows + row, there, other=0.0), 0)
    acc = tl.load(acc_ptr + (i[:, None] * rows + row) * K + d[None, :],
                  there[:, None] & (d < K)[None, :], other=0.0)
    out = tl.sum(acc * weight[:, None], 0) / total
    tl.store(out_ptr + row * K + d, out.to(out_ptr.dtype.element_ty), d < K)


@launcher
def attention(q: Tensor, k: Tensor, v: Tensor, last_seen: Tensor | None = None,
              is_causal: bool = False, mask: Tensor | None = None) -> Tensor:
    """As twotower.attention: q (B,H,L,K), k and v (B,G,S,K), which may be views of a larger cache,
    last_seen (B or 1, L) int64 or mask (B or 1, 1, L, S) bool. Every query must see a key."""
    (B, H, L, K), (G, S) = q.shape, k.shape[1:3]
    check("q", q, (B, H, L, K), q.device, FLOATS)
    check("k", k, (B, G, S, K), q.device, (q.dtype,))
    check("v", v, (B, G, S, K), q.device, (q.dtype,))
    if (last_seen is not None) + is_causal + (mask is not None) > 1:
        raise ValueError("attention takes one of last_seen, is_causal and mask")
    last_row = mask_row = mask_token = 0
    if last_seen is not None:
        check("last_seen", last_seen, (1 if len(last_seen) == 1 else B, L), q.device, (torch.long,))
        last_seen = last_seen if last_seen.stride(1) == 1 else last_seen.contiguous()
        last_row = last_seen.expand(B, L).stride(0)         # 0 where one row serves all
    if mask is not None:
        check("mask", mask, (1 if len(mask) == 1 else B, 1, L, S), q.device, (torch.bool,))
        mask = mask if mask.stride(3) == 1 else mask.contiguous()
        mask_row, mask_token = mask.expand(B, 1, L, S).stride(0), mask.stride(2)
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    queries = H // G * L
    BLOCK_M, BLOCK_S, num_warps = (
        (16, 64, 4) if queries <= 16 else
        (64, 32, 8) if q.dtype == torch.float32 else            # larger ones spill registers
        (64, 64, 4) if queries <= 64 else (128, 64, 8))
    BLOCK_K = max(16, triton.next_power_of_2(K))
    tiles = triton.cdiv(queries, BLOCK_M)
    # two programs for each multiprocessor, but shares of at least two tiles of keys
    wanted = triton.cdiv(2 * multiprocessors(q.device), tiles * B * G)
    shares = max(1, min(wanted, triton.cdiv(S, 2 * BLOCK_S)))
    share_size = triton.cdiv(triton.cdiv(S, shares), BLOCK_S) * BLOCK_S
    shares = triton.cdiv(S, share_size)
    out = torch.empty(B, L, H, K, dtype=q.dtype, device=q.device)   # as o_proj reads it
    acc, best, total = out, out, out
    if shares > 1:
        acc = torch.empty(shares, B, L, H, K, dtype=torch.float32, device=q.device)
        best, total = (torch.empty(shares, B, L, H, dtype=torch.float32, device=q.device)
                       for _ in range(2))
    _attention_kernel[tiles, B * G, shares](
        q, k, v, q if last_seen is None else last_seen,
        q if mask is None else mask.view(torch.uint8), acc, best, total, *q.stride()[:3],
        *k.stride()[:3], *v.stride()[:3], last_row, mask_row, mask_token, H, G, L, S,
        share_size, K**-0.5, HAS_LAST=last_seen is not None, IS_CAUSAL=is_causal,
        HAS_MASK=mask is not None, ONE_SHARE=shares == 1, PRECISION=precision(q.dtype), K=K,
        BLOCK_K=BLOCK_K, BLOCK_M=BLOCK_M, BLOCK_S=BLOCK_S, num_warps=num_warps)
    if shares > 1:
        _join_shares_kernel[B * H * L,](acc, best, total, out, B * H * L, shares, K=K,
                                        BLOCK_K=BLOCK_K,
                                        BLOCK_SHARES=triton.next_power_of_2(shares))
    return out.transpose(1, 2)


# ---------------------------------------------------------------------------------------------
# 6. The most likely token and its probability
#
# Why: the head writes V = 131,072 float32 logits a position, 8 MB a block of 16. A float32 softmax
# would write as much again, and argmax, maximum and sum would each read it. Here every logit is
# read once: a program keeps the maximum, its place and the sum of exponentials of its share of a
# row, and a second kernel joins the shares.


@triton.jit
def _most_likely_kernel(
        logits_ptr,         # (rows, V) f32
        best_ptr, sum_ptr,  # (rows, shares) f32
        id_ptr,             # (rows, shares) int64
        row_stride, V, share_size, mask_token_id,
        BLOCK_V: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1).to(tl.int64) * share_size
    best = tl.full((BLOCK_V,), float("-inf"), tl.float32)
    ids = tl.zeros((BLOCK_V,), tl.int64)
    total = tl.zeros((BLOCK_V,), tl.float32)
    broken = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(first, tl.minimum(first + share_size, V), BLOCK_V):
        i = start + tl.arange(0, BLOCK_V)
        x = tl.load(logits_ptr + row * row_stride + i, i < V, other=0.0)
        broken += tl.where(tl.abs(x) < float("inf"), 0.0, 1.0)      # NaN compares false
        x = tl.where((i < V) & (i != mask_token_id), x, float("-inf"))
        higher = tl.maximum(best, x)
        ids = tl.where(x > best, i, ids)
        total = tl.where(higher == float("-inf"), 0.0,
                         total * tl.exp(best - higher) + tl.exp(x - higher))
        best = higher
    top = tl.max(best, 0)
    # the first of equals, as argmax gives it
    chosen = tl.min(tl.where(best == top, ids, V), 0)
    total = tl.sum(tl.where(best == float("-inf"), 0.0, total * tl.exp(best - top)), 0)
    at = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(best_ptr + at, tl.where(tl.sum(broken, 0) > 0, float("nan"), top))
    tl.store(id_ptr + at, chosen)
    tl.store(sum_ptr + at, total)


@triton.jit
def _join_likely_kernel(
        best_ptr, sum_ptr,  # (rows, shares) f32
        share_id_ptr,       # (rows, shares) int64
        id_ptr,             # (rows,) int64
        confidence_ptr,     # (rows,) f32
        shares, V, BLOCK_SHARES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK_SHARES)
    best = tl.load(best_ptr + row * shares + i, i < shares, other=float("-inf"))
    total = tl.load(sum_ptr + row * shares + i, i < shares, other=0.0)
    ids = tl.load(share_id_ptr + row * shares + i, i < shares, other=0)
    broken = tl.sum(tl.where(best == best, 0, 1), 0) > 0
    top = tl.max(tl.where(best == best, best, float("-inf")), 0)
    chosen = tl.min(tl.where(best == top, ids, V), 0)
    total = tl.sum(tl.where(best > float("-inf"), total * tl.exp(best - top), 0.0), 0)
    # the best token's own exponential is 1; NaN says that a logit is not finite
    tl.store(id_ptr + row, tl.where(broken, 0, chosen))
    tl.store(confidence_ptr + row, tl.where(broken, float("nan"), 1.0 / total))


@launcher
def most_likely(logits: Tensor, mask_token_id: int | None = None) -> tuple[Tensor, Tensor]:
    """As twotower.most_likely: logits (..., V) float32 -> ids and their probabilities (...)."""
    V, shape = logits.shape[-1], logits.shape[:-1]
    check("logits", logits, (*shape, V), logits.device, (torch.float32,))
    logits = logits.reshape(-1, V)
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    rows, BLOCK_V = len(logits), min(1024, triton.next_power_of_2(V))
    share_size = triton.cdiv(V, 64 * BLOCK_V) * BLOCK_V      # at most 64 shares a row
    shares = triton.cdiv(V, share_size)
    best, total = (torch.empty(rows, shares, device=logits.device) for _ in range(2))
    share_ids = torch.empty(rows, shares, dtype=torch.long, device=logits.device)
    ids = torch.empty(rows, dtype=torch.long, device=logits.device)
    confidence = torch.empty(rows, device=logits.device)
    _most_likely_kernel[rows, shares](logits, best, total, share_ids, logits.stride(0), V,
                                      share_size, -1 if mask_token_id is None else mask_token_id,
                                      BLOCK_V=BLOCK_V)
    _join_likely_kernel[rows,](best, total, share_ids, ids, confidence, shares, V,
                               BLOCK_SHARES=triton.next_power_of_2(shares))
    return ids.view(shape), confidence.view(shape)


# ---------------------------------------------------------------------------------------------
# 7. Router
#
# Why: 23 of 52 layers. The release computes the scores in float64; written as there that is a dozen
# small operations, among them a float64 copy of the weights (8 E D bytes) for every layer and step.
# Here, for up to 64 tokens, each reads the float32 weights as they are (hence the limit; for more
# the library's product is worth the copy), every product and sum is float64, and the choice of A
# experts is one more kernel. A float32 router would choose others where two experts are closer than
# float32 can tell.


@triton.jit
def _scores_kernel(
        x_ptr,              # (T, D)
        weight_ptr,         # (E, D) f32
        scores_ptr,         # (T, E) f64
        D, E, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    acc = tl.zeros((BLOCK_E, BLOCK_D), tl.float64)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = tl.load(x_ptr + token * D + d, d < D, other=0.0).to(tl.float64)
        w = tl.load(weight_ptr + e[:, None] * D + d[None, :],
                    (e < E)[:, None] & (d < D)[None, :], other=0.0).to(tl.float64)
        acc += w * x[None, :]
    logits = tl.sum(acc, 1)
    tl.store(scores_ptr + token * E + e, 1 / (1 + tl.exp(-logits)), e < E)


@triton.jit
def _top_experts_kernel(
        scores_ptr,         # (T, E) f64
        bias_ptr,           # (E,) f32
        ids_ptr,            # (T, A) int64
        weights_ptr,        # (T, A) f64
        E, A, topk_group,
        FACTOR: tl.constexpr,           # as an argument it would be rounded to float32
        NORMALISE: tl.constexpr, GROUPS: tl.constexpr, BLOCK_E: tl.constexpr,
        BLOCK_A: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    scores = tl.load(scores_ptr + token * E + e, e < E, other=0.0)
    choice = scores + tl.load(bias_ptr + e, e < E, other=0.0).to(tl.float64)
    choice = tl.where(choice == choice, choice, float("inf"))   # NaN first, as torch's topk has it
    choice = tl.where(e < E, choice, float("-inf"))
    if GROUPS > 1:          # groups by the sum of their two best; the others' choices become 0
        groups = tl.reshape(choice, (GROUPS, BLOCK_E // GROUPS))
        place = tl.arange(0, BLOCK_E // GROUPS)[None, :]
        at = tl.argmax(groups, 1)
        best = tl.max(groups, 1)
        best += tl.max(tl.where(place == at[:, None], float("-inf"), groups), 1)
        g = tl.arange(0, GROUPS)
        stays = tl.zeros((GROUPS,), tl.int32)
        for _ in range(topk_group):
            chosen = tl.argmax(best, 0)
            stays = tl.where(g == chosen, 1, stays)
            best = tl.where(g == chosen, float("-inf"), best)
        choice = tl.reshape(tl.where(stays[:, None] > 0, groups, 0.0), (BLOCK_E,))
    a = tl.arange(0, BLOCK_A)
    ids, weights = tl.zeros((BLOCK_A,), tl.int32), tl.zeros((BLOCK_A,), tl.float64)
    for i in range(A):
        chosen = tl.argmax(choice, 0)
        ids = tl.where(a == i, chosen, ids)
        weights = tl.where(a == i, tl.sum(tl.where(e == chosen, scores, 0.0), 0), weights)
        choice = tl.where(e == chosen, float("-inf"), choice)
    if NORMALISE:
        weights /= tl.sum(weights, 0) + 1e-20
    tl.store(ids_ptr + token * A + a, ids, a < A)
    tl.store(weights_ptr + token * A + a, weights * FACTOR, a < A)


@launcher
def route(x: Tensor, weight: Tensor, bias: Tensor, config) -> tuple[Tensor, Tensor]:
    """As twotower.route: x (T, D) -> topk_ids (T, A) int64 and topk_weights (T, A) float64."""
    (T, D), E, A = x.shape, len(weight), config.num_experts_per_tok
    check("x", x, (T, D), x.device, FLOATS)
    check("weight", weight, (E, D), x.device, (torch.float32,))
    check("bias", bias, (E,), x.device, (torch.float32,))
    if config.n_group > 1 and E & (E - 1):
        raise ValueError(f"{E} experts in groups, but the kernel needs a power of two of them")
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    ids = torch.empty(T, A, dtype=torch.long, device=x.device)
    weights = torch.empty(T, A, dtype=torch.float64, device=x.device)
    if T > 64:                  # a product large enough for the library's, on float64 tensor cores
        scores = torch.sigmoid(x.double() @ weight.double().T)
    else:
        scores = torch.empty(T, E, dtype=torch.float64, device=x.device)
        _scores_kernel[T, triton.cdiv(E, 4)](x, weight, scores, D, E, BLOCK_E=4, BLOCK_D=512)
    _top_experts_kernel[T,](scores, bias, ids, weights, E, A, config.topk_group,
                            FACTOR=config.routed_scaling_factor, NORMALISE=config.norm_topk_prob,
                            GROUPS=config.n_group, BLOCK_E=triton.next_power_of_2(E),
                            BLOCK_A=triton.next_power_of_2(A), num_warps=1)
    return ids, weights


# ---------------------------------------------------------------------------------------------
# 8. Passes recorded as CUDA graphs
#
# Why: a pass makes about a dozen launches a layer, most of them small; at batch 1 the host cannot
# launch them as fast as the GPU runs them. By `python bench.py gpu` on an H200 an AR token of the
# full-size model takes 27 ms so, and 3.5 ms recorded once and replayed by one call (2026-11-26).
# Whatever a pass reads and writes must then stay where it is: inputs are copied into buffers, Mamba
# states are updated in place, the rows' lengths are on the device.


class Passes:
    """The passes that repeat while decoding, over the rows of one context: an AR token, a denoiser
    step, a block extension. On a GPU each is recorded when it first comes, for every number of
    tokens anew; elsewhere it just runs.

    behind: Pass.behind of twotower.py, which this file does not import.
    What they return, and so context.logits, stays valid until the same pass comes again.
    Raises: ValueError if the towers are on different devices.
    """

    recording = True                        # False: run them as they are on a GPU too

    def __init__(self, model, context, behind):
        tower = model.denoiser_tower
        if tower is not None and tower.device != context.device:
            raise ValueError("recorded passes need both towers on one device")
        self.model, self.behind, self.states = model, behind, context.states
        self.caches = [state for state in self.states if hasattr(state, "key_cache")]
        self.mamba = [state for state in self.states if hasattr(state, "ssm_state")]
        self.lengths = context.lengths.clone().to(context.device)                # (B,) int64
        self.capacity, self.recorded = 0, {}

    def anew(self, context) -> Passes:
        """The same for a context whose rows have changed."""
        return Passes(self.model, context, self.behind)

    def extend(self, context, tokens: Tensor, logits: str | None) -> Tensor | None:
        """tokens (B, L) int64 are read by the context tower; logits "last" returns (B, 1, V)
        float32, None nothing."""
        L = tokens.shape[1]
        changed = [x for state in self.mamba for x in (state.conv_state, state.ssm_state)]
        out = self._run(context, ("extend", L, logits),
                        lambda tokens: self._extend(tokens, logits), changed, tokens)
        self.lengths += L
        context.lengths = context.lengths + L
        context.logits = None if out is None else out[:, -1]
        return out

    def denoise(self, context, block: Tensor, t: Tensor) -> Tensor:
        """block (B, Q) int64 and t (B,) -> (B, Q, V) float32."""
        return self._run(context, ("denoise", block.shape[1]), self._denoise, [], block, t)

    def _extend(self, tokens: Tensor, logits: str | None) -> Tensor | None:
        at = self.behind(self.lengths, tokens.shape[1], self.capacity, causal=True, keep="end")
        hidden = self.model.context_tower(tokens, self.states, at)
        return self.model.context_lm_head(hidden[:, -1:]).float() if logits else None

    def _denoise(self, block: Tensor, t: Tensor) -> Tensor:
        at = self.behind(self.lengths, block.shape[1], self.capacity, causal=False)
        hidden = self.model.denoiser_tower(block, self.states, at, self.model._modulations(t))
        return self.model.lm_head(hidden).float()

    def _run(self, context, key, function, changed: list[Tensor], *inputs: Tensor) -> Tensor | None:
        needed = int(context.lengths.max()) + inputs[0].shape[1]
        if needed > self.capacity:                  # what was recorded has the old addresses
            for cache in self.caches:
                cache.reserve(needed)
            self.capacity = max((cache.key_cache.shape[2] for cache in self.caches), default=needed)
            self.recorded.clear()
        device = self.lengths.device
        if device.type != "cuda" or not self.recording:
            return function(*(x.to(device) for x in inputs))
        if key not in self.recorded:
            with torch.cuda.device(device):
                self.recorded[key] = record(function, [x.to(device, copy=True) for x in inputs],
                                            changed)
        graph, buffers, out = self.recorded[key]
        for buffer, x in zip(buffers, inputs):
            buffer.copy_(x, non_blocking=True)
        graph.replay()
        return out


capture_stream = functools.cache(torch.cuda.Stream)         # one a GPU


def record(function, inputs=(), changed=()):
    """function(*inputs) as a CUDA graph, which keeps its own memory; returns it, its inputs'
    buffers and its output.

    changed: tensors that the function updates; what the trial run does to them is undone. (Not that
    to the caches: a replay writes the same slots again.)
    """
    kept = [tensor.clone() for tensor in changed]
    function(*inputs)                               # Triton compiles, libraries take their memory
    for tensor, old in zip(changed, kept):
        tensor.copy_(old)
    graph = torch.cuda.CUDAGraph()
    # a stream of the current GPU: by default it is one of the GPU that recorded first
    with torch.cuda.graph(graph, stream=capture_stream(torch.cuda.current_device())):
        out = function(*inputs)
    return graph, inputs, out


# ---------------------------------------------------------------------------------------------
# 9. python kernels.py: every kernel against twotower.py's function in float64, then its speed

LIMITS = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-3}     # relative rms


@dataclass
class Case:
    """One call of a kernel, and what it cannot do without."""

    operation: str
    what: str
    args: tuple
    bytes: int          # that must be read or written once
    flops: int

    @property
    def limit(self) -> float:
        """Of `error`: the router is float64 inside, the others no better than their inputs."""
        dtype = next(arg.dtype for arg in self.args if isinstance(arg, Tensor))
        return 1e-12 if self.operation == "route" else LIMITS[dtype]

    def run(self) -> list[Tensor]:
        return self.outputs(globals()[self.operation](*self.args))

    def reference(self) -> list[Tensor]:
        """twotower.py's function on the same inputs in float64."""
        import twotower                         # only the checks need it
        args = [arg.double() if isinstance(arg, Tensor) and arg.is_floating_point() else arg
                for arg in self.args]
        return self.outputs(getattr(twotower, self.operation)(*args))

    def outputs(self, result) -> list[Tensor]:
        result = list(result) if isinstance(result, tuple) else [result]
        if self.operation == "route":           # which experts, in whatever order
            ids, weights = result
            ids, order = ids.sort(-1)
            result = [ids, weights.gather(-1, order)]
        return [tensor for tensor in result if tensor is not None]

    def error(self) -> float:
        """The largest relative rms error of the outputs; infinite where ids differ or shapes do."""
        errors = []
        for ours, right in zip(self.run(), self.reference(), strict=True):
            if ours.shape != right.shape or not ours.isfinite().all():
                return math.inf
            if not (ours.is_floating_point() or torch.equal(ours, right)):
                return math.inf
            errors.append(relative_rms(ours, right))
        return max(errors)


def relative_rms(ours: Tensor, right: Tensor) -> float:
    ours, right = ours.double(), right.double()
    return float((ours - right).square().mean().sqrt() / right.square().mean().sqrt())


def cases(dtype: torch.dtype, device: str, full_size: bool):
    """Inputs whose results are about 1: awkward and small, or those of the released model."""
    generator = None if device == "meta" else torch.Generator(device).manual_seed(0)

    def randn(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    def rand(*shape):
        return torch.rand(shape, generator=generator, device=device)

    f32, size = torch.float32, dtype.itemsize
    D, E, A, F_ = (2688, 128, 6, 1856) if full_size else (600, 8, 3, 40)
    for T in (1, 16, 256, 4096) if full_size else (1, 16, 57, 260):
        for routing in ("random", "one expert") if T in (16, 57) else ("random",):
            ids = rand(T, E).topk(A).indices
            if routing != "random":
                ids = torch.arange(A, device=device).expand(T, A).contiguous()
            hit = E if device == "meta" else len(ids.unique())
            args = (randn(T, D), ids, rand(T, A), randn(E, F_, D) / D**0.5, randn(E, D, F_) / F_)
            yield Case("moe_experts", f"{T} tokens, {hit} of {E} experts", args,
                       (hit * F_ + T) * 2 * D * size, T * A * 4 * F_ * D)
    if not full_size:
        yield Case("moe_experts", "with biases", (
            randn(9, D), rand(9, E).topk(A).indices, rand(9, A), randn(E, F_, D) / D**0.5,
            randn(E, D, F_), randn(E, F_), randn(E, D)), 0, 0)
    H, P, G, N = (64, 64, 8, 128) if full_size else (4, 32, 2, 64)
    for b, L, limit, counts in ((1, 16, (0.0, math.inf), None), (64, 16, (0.0, math.inf), None)
                                ) if full_size else (
                                (1, 5, (0.0, math.inf), None), (3, 9, (0.1, 2.0), (9, 1, 4))):
        counts = None if counts is None else torch.tensor(counts, device=device)
        dt = 4 * randn(b, L, 3 * H)[..., -H:]               # a slice, as in_proj gives it
        yield Case("ssd_rates", f"{b} x {L} tokens" + ", padding" * (counts is not None),
                   (dt, randn(H, dtype=f32), rand(H), limit, counts), b * L * H * (size + 4), 0)
    if not full_size:       # where 1 + exp(dt) has lost most of exp(dt)
        yield Case("ssd_rates", "small steps", (randn(1, 5, H) - 12, rand(H), rand(H),
                                                (0.0, math.inf)), 0, 0)
    for b, L, chunks in ((1, 16, False), (64, 16, False), (1, 2048, False), (1, 8192, False),
                         (1, 2048, True)) if full_size else (
                         (2, 1, False), (1, 15, False), (2, 16, False), (1, 17, False),
                         (9, 16, False), (3, 129, False), (2, 40, True)):
        args = (randn(b, L, H, P), rand(b, L, H), -rand(H), randn(b, L, G, N) / N**0.5,
                randn(b, L, G, N), rand(H), randn(b, H, P, N, dtype=f32) / N**0.5, 16,
                "blocks" if chunks else "end")
        c = min(L, 16)
        states = 1 + (-(-L // 16) if chunks else 1)
        yield Case("ssd_scan", f"{b} x {L} tokens" + ", every state kept" * chunks, args,
                   b * (2 * L * (H * P + G * N) * size + 4 * (L * H + H * P * N * states)),
                   b * L * H * (2 * c * (N + P) + 4 * P * N))
    for b in (1, 64) if full_size else (1, 3):
        args = (randn(b, H, P), rand(b, H), -rand(H), randn(b, G, N) / N**0.5, randn(b, G, N),
                rand(H), randn(b, H, P, N, dtype=f32) / N**0.5)
        yield Case("ssd_step", f"{b} rows", args, b * (8 * H * P * N + 2 * (H * P + G * N) * size),
                   b * H * P * N * 5)
    channels = H * P + 2 * G * N
    for b, L in ((1, 16), (64, 16), (1, 8192)) if full_size else ((2, 1), (1, 15), (2, 17)):
        args = (randn(b, 3 + L, channels), randn(channels, 1, 4), randn(channels))
        yield Case("causal_conv1d", f"{b} x {L} tokens", args,
                   b * (2 * L + 3) * channels * size, b * L * channels * 12)
    if not full_size:
        args = (randn(1, 12, channels), randn(channels, 1, 4), None)
        yield Case("causal_conv1d", "without bias", args, 0, 0)
    for b, L in ((1, 16), (64, 16)) if full_size else ((1, 1), (2, 6)):
        x, h, weight = randn(b, L, D), randn(b, L, D), randn(D)
        shift, scale, moved = randn(b, 1, D), randn(b, 1, D), 2 * b * L * D * size
        yield Case("rms_norm", f"{b} x {L} tokens", (x, weight, 1e-5), moved, 0)
        for operation in ("modulate_then_norm", "norm_then_modulate"):
            yield Case(operation, f"{b} x {L} tokens", (x, shift, scale, weight, 1e-5), moved, 0)
        yield Case("add_gated", f"{b} x {L} tokens", (x, scale, h), moved * 3 // 2, 0)
        z = randn(b, L, 2 * H * P)[..., :H * P]
        yield Case("gated_rms_norm", f"{b} x {L} tokens",
                   (randn(b, L, H * P), z, randn(H * P), G, 1e-5), 3 * b * L * H * P * size, 0)
    H, G, K = (32, 2, 128) if full_size else (4, 2, 24)
    for b, L, S, kind in ((1, 1, 2048, "all"), (1, 16, 2048, "all"), (1, 16, 32768, "all"),
                          (64, 16, 2048, "ragged"), (1, 2048, 2048, "causal")) if full_size else (
                          (2, 1, 70, "all"), (1, 15, 600, "all"), (3, 16, 90, "ragged"),
                          (2, 17, 90, "one row's end"), (2, 17, 90, "mask"),
                          (2, 33, 33, "causal")):
        q = randn(b, L, H, K).transpose(1, 2)
        k, v = (randn(b, G, S + 5, K)[:, :, :S] for _ in range(2))
        last_seen = mask = None
        if kind in ("ragged", "one row's end"):
            last_seen = (rand(b if kind == "ragged" else 1, L) * S).long()
        if kind == "mask":
            mask = (rand(b, 1, L, S) < 0.5).index_fill(3, torch.tensor(3, device=device), True)
        pairs = L * S / 2 if kind == "causal" else L * S
        yield Case("attention", f"{b} x {L} queries, {S} keys, {kind}",
                   (q, k, v, last_seen, kind == "causal", mask),
                   b * (2 * S * G + 2 * L * H) * K * size, int(4 * b * H * K * pairs))
    if not full_size:       # few enough tiles that the keys are split: late shares see no key
        yield Case("attention", "300 queries, causal, one head",
                   tuple(randn(1, 1, 300, K) for _ in range(3)) + (None, True), 0, 0)
    V = 131072 if full_size else 1500
    for rows in (16, 1024) if full_size else (1, 5):
        logits = randn(rows, V, dtype=f32)
        # as much as all others together, more or less
        best = math.log(1.65 * V) + randn(rows, dtype=f32)
        logits[torch.arange(rows), (5 + torch.arange(rows) * 7) % V] = best
        yield Case("most_likely", f"{rows} rows of {V}", (logits, 3), 4 * rows * V, 0)
    for T, n_group in ((16, 1), (4096, 1), (16, 8)) if full_size else (
                      (1, 1), (9, 1), (9, 4), (67, 1)):
        config = SimpleNamespace(num_experts_per_tok=A, n_group=n_group, topk_group=2,
                                 norm_topk_prob=True, routed_scaling_factor=2.5)
        args = (randn(T, D), randn(E, D, dtype=f32) / D**0.5, randn(E, dtype=f32) / 10, config)
        yield Case("route", f"{T} tokens, {n_group} groups", args, 4 * E * D + T * D * size,
                   2 * T * E * D)
    if not full_size:       # all but one choice below the 0 of the two experts in the dropped group
        config = SimpleNamespace(num_experts_per_tok=A, n_group=4, topk_group=3,
                                 norm_topk_prob=False, routed_scaling_factor=2.5)
        bias = torch.tensor([0.5, -2] + [-1.6] * 6, device=device)
        yield Case("route", "a dropped group wins", (
            randn(9, D), randn(E, D, dtype=f32) / D**0.5, bias, config), 0, 0)


class CompileOnly:
    """Stands for a kernel and compiles what would be launched, once for each set of types."""

    def __init__(self, kernel, found: dict):
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, **kwargs):
        from triton.backends.compiler import GPUTarget      # not needed to run a kernel
        from triton.compiler import ASTSource
        from triton.runtime.jit import mangle_type

        values = dict(zip(self.kernel.arg_names, args)) | kwargs
        signature, constants, aligned = {}, {}, {}
        for i, parameter in enumerate(self.kernel.params):
            value = values[parameter.name]
            if parameter.is_constexpr or isinstance(value, int) and value == 1:
                signature[parameter.name], constants[parameter.name] = "constexpr", value
                continue
            signature[parameter.name] = mangle_type(value)
            # as at a launch: tensors begin at multiples of 16 bytes, and some numbers are multiples
            if isinstance(value, Tensor) or isinstance(value, int) and value % 16 == 0:
                aligned[i,] = [["tt.divisibility", 16]]
        key = self.kernel.fn.__name__, str((signature, aligned)), str(constants)
        if key not in self.found:
            options = {name: values[name] for name in ("num_warps", "num_stages") if name in values}
            source = ASTSource(self.kernel, signature, constants, aligned)
            self.found[key] = triton.compile(source, target=GPUTarget("cuda", 90, 32),
                                             options=options)


def compile_all():
    """Every launch of every full-size case, on tensors without data; ptxas says what it takes."""
    found, used = {}, {name: value for name, value in globals().items()
                       if isinstance(value, triton.JITFunction)}
    globals().update({name: CompileOnly(kernel, found) for name, kernel in used.items()})
    for case in cases(torch.bfloat16, "meta", full_size=True):
        globals()[case.operation].__wrapped__(*case.args)
    for (name, _, constants), compiled in found.items():
        with tempfile.TemporaryDirectory() as folder:
            ptx = Path(folder) / "kernel.ptx"
            ptx.write_text(compiled.asm["ptx"])
            said = subprocess.run([triton.knobs.nvidia.ptxas.path, "-v", "-arch=sm_90a", ptx, "-o",
                                   ptx.with_suffix(".cubin")], capture_output=True, text=True)
        registers = re.search(r"Used (\d+) registers", said.stderr)
        spills = re.search(r"(\d+) bytes spill stores", said.stderr)
        shape = ", ".join(re.findall(r"'((?:BLOCK|CHUNK|MODULATE)\w*': \d+)", constants))
        print(f"{name:24} {registers[1]:>4} registers {spills[1]:>5} bytes spilled"
              f" {compiled.metadata.shared:>7} bytes shared  {shape.replace(chr(39), '')}")


def ceilings(seconds_of) -> tuple[float, float, float]:
    """What this GPU reaches: bytes a second in a copy, FLOPs a second in products of bfloat16 and
    of float64."""
    large = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    bandwidth = 2 * large.numel() / seconds_of(large.clone)
    rates = []
    for dtype in (torch.bfloat16, torch.float64):
        square = torch.randn(8192, 8192, device="cuda").to(dtype)
        rates.append(2 * 8192**3 / seconds_of(lambda: square @ square))
    print(f"copying {bandwidth / 1e9:.0f} GB/s, products of bfloat16 {rates[0] / 1e12:.0f}, of "
          f"float64 {rates[1] / 1e12:.0f} TFLOP/s: the ceilings")
    return bandwidth, *rates


def main():
    from triton.testing import do_bench

    if sys.argv[1:] == ["--compile"]:
        compile_all()
        return
    if sys.argv[1:]:
        sys.exit(f"kernels.py: unknown argument {sys.argv[1]!r}; there is only --compile")
    if not torch.cuda.is_available() and not INTERPRETED:
        sys.exit("kernels.py: no CUDA device; TRITON_INTERPRET=1 python kernels.py checks the "
                 "kernels without one")
    device = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else "Triton's interpreter"
    print(f"torch {torch.__version__}  triton {triton.__version__}  {where}")
    if device == "cuda":
        bandwidth, rate, rate_of_float64 = ceilings(lambda run: do_bench(run) / 1e3)
    failed = 0
    # the interpreter multiplies bfloat16 wrongly
    for dtype in (torch.float32, torch.float16) + (torch.bfloat16,) * (device == "cuda"):
        full_size = dtype == torch.bfloat16
        for case in cases(dtype, device, full_size):
            error, name = case.error(), str(dtype).removeprefix("torch.")
            line = f"{case.operation:19}{case.what:38}{name:9} error {error:.1e}"
            right = error <= case.limit                         # false for NaN
            failed += not right
            if not right:
                line += f"  FAILED, limit {case.limit:.0e}"
            elif full_size:
                operation = functools.partial(globals()[case.operation], *case.args)
                ms = do_bench(record(operation)[0].replay)      # without the host's launching
                gbs, tflops = case.bytes / ms / 1e6, case.flops / ms / 1e9
                fastest = rate_of_float64 if case.operation == "route" else rate
                roof = 1e3 * max(case.bytes / bandwidth, case.flops / fastest)
                line += (f"{ms:9.4f} ms{gbs:8.0f} GB/s{tflops:8.1f} TFLOP/s"
                         f"{100 * roof / ms:6.0f} % of the ceiling")
            print(line, flush=True)
    sys.exit(f"kernels.py: {failed} checks failed" if failed else 0)


if __name__ == "__main__":
    main()
