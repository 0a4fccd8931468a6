"""Triton versions of twotower.py's hot paths, and its passes recorded as CUDA graphs.

Each operation can be copied with the helpers above section 1. `model.use("triton")` takes these
instead of twotower.py's functions of the same names and signatures, with which test_twotower.py
compares them; `python bench.py kernels` counts launches and says what the compiler makes of each.

    1 moe_experts   2 ssd   3 attention   4 norm, add_gated, gated_rms_norm   5 causal_conv1d
    6 route         7 Passes: whole passes recorded as CUDA graphs

Offsets are int64 where they could pass 2^31; sums are float32 (float64 where the reference is);
tails are masked, so any size works; NaN is kept, since decoding stops at it. Letters are those of
twotower.py, F the width of an expert, S the number of keys: in a recorded pass the whole capacity.
Without a GPU the kernels run under TRITON_INTERPRET=1, slowly, which is how CI checks them.
"""

import copy
import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret
F32, LONG, FLOATS = [torch.float32], [torch.long], [torch.float32, torch.float16, torch.bfloat16]


def check(device: torch.device, **arguments: tuple):
    """Raise ValueError unless arguments are as they must be: a tensor (or None), shape, dtypes."""
    for name, (tensor, shape, dtypes) in arguments.items():
        for what, got, expected in () if tensor is None else (
                ("has shape", tuple(tensor.shape), [tuple(shape)]),
                ("is on", tensor.device, [device]), ("is", tensor.dtype, dtypes)):
            if got not in expected:
                raise ValueError(f"{name} {what} {got}, expected {' or '.join(map(str, expected))}")


def dense(x: Tensor, axes: int = 1) -> Tensor:
    """x with its last axes as one stretch of memory; those before may be strided, as slices are."""
    return x if x[(0,) * (x.dim() - axes)].is_contiguous() else x.contiguous()


def launcher(function):
    """Run with the first tensor's GPU as the current one, where Triton launches; refuse tensors
    that want gradients, and CPUs unless interpreted. (Meta tensors are for counting launches.)"""
    @functools.wraps(function)
    def launch(*args, **kwargs):
        tensors = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            raise ValueError(f"{function.__name__} of kernels.py has no gradient: train with "
                             "backend 'torch', evaluate under torch.no_grad()")
        device = tensors[0].device
        if not (INTERPRETED or device.type in ("cuda", "meta")):
            raise ValueError(f"kernels.py needs a CUDA device, not {device}, or TRITON_INTERPRET=1")
        with torch.cuda.device(device if device.type == "cuda" else -1):            # -1: no change
            return function(*args, **kwargs)
    return launch


def multiprocessors(device: torch.device) -> int:
    """The interpreter has so few that it takes every path; meta tensors stand for an H100."""
    if device.type != "cuda":
        return 132 if device.type == "meta" else 8
    return torch.cuda.get_device_properties(device).multi_processor_count


# Products of float32 are "ieee", as one of TF32 would round its factors to 10 bits, or in the scan
# "tf32x3": three products of two TF32 parts each, which keep float32's digits on tensor cores.

# ---- 1. Routed experts --------------------------------------------------------------------------
# Why: 23 of 52 layers, and nine tenths of the weights. A token uses A of E experts, so a block of
# 16 tokens hits dozens of them, and each expert hit must be read once: 2 F D numbers. At batch 1
# that reading is the whole cost; the products (4 F D FLOPs a token and expert) are small beside it.
#
# How: a (token, chosen expert) pair is a slot. A tile is BLOCK_M rows that share an expert: some of
# its slots, then padding, which is not stored. A first grouped product makes relu(x up^T)^2 for
# every slot, a second one multiplies by down^T and the routing weight; the norm after the layer
# sums a token's slots in their order, so that nothing depends on timing. Three tokens that chose
# two of three experts have six slots; with tiles of two rows:
#
#     token           0     1     2          expert 0 has slots 0 2      tile 0: 0 2
#     chosen         0 2   0 2   2 1         expert 1 has slot  5        tile 1: 5 -
#     slot           0 1   2 3   4 5         expert 2 has slots 1 3 4    tile 2: 1 3    tile 3: 4 -
#
# That list is made on the device, where alone its length is known: programs past the last tile
# return at once, so the host never waits and the launch can be recorded. Up to 16 tokens need no
# list, as no expert has more rows than a tile: its program finds them among the T A choices. The
# shared expert is then more experts, as many as it is wide, that every token chooses, so that its
# weights stream together with the others'. With more tokens it is the library's.
#
# Quantized weights become numbers of x's dtype in registers, without their scale: one for each
# output multiplies the sum at its end; one for every 32 inputs the product of those 32, at the cost
# of a second accumulator. The halves of bytes need no shuffle: they are two products.

# Up to so many slots for each expert: rows of a tile, outputs and inputs of a step, warps, stages;
# of 4-byte inputs a step takes half as many
TILES = (
    # the 16 rows of a tensor core's product; the rest was the fastest on an H200 for 1 and 16
    # tokens: many programs, each with 48 KB of weights on their way
    (16, (16, 64, 128, 2, 4)),
    # taller tiles read the weights less often; three stages fit the 99 KB of an RTX 50
    (96, (64, 128, 64, 8, 3)),
    # as tall as fits the registers of 8 warps
    (math.inf, (128, 128, 64, 8, 3)))


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
def product(x_ptr, rows, real, w_ptr, w_row, w_scale_ptr, columns, outputs, inputs,
            BITS: tl.constexpr, BLOCK_IN: tl.constexpr):
    """Rows of x times some columns of an expert (outputs, inputs) in BITS: (rows, columns) f32."""
    acc, inside = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32), columns < outputs
    w_ptr, x_ptr = w_ptr + columns[None, :] * w_row, x_ptr + rows[:, None] * inputs
    if BITS == 4:                       # a row is half as long: a byte holds two inputs, half apart
        for start in range(0, w_row, BLOCK_IN // 2):
            for group in tl.static_range(BLOCK_IN // 64):           # 32 inputs with one scale
                first = start + 32 * group
                i = first + tl.arange(0, 32)
                both = tl.load(w_ptr + i[:, None], inside[None, :] & (i < w_row)[:, None], other=0)
                for half in tl.static_range(2):
                    x = tl.load(x_ptr + (half * w_row + i), real[:, None] & (i < w_row), other=0.0)
                    scale = tl.load(w_scale_ptr + (half * w_row + first) // 32 * outputs + columns,
                                    inside & (first < w_row), other=0.0).to(tl.float32)
                    if half:            # 16 times the number, which saves a shift
                        w, scale = (both & -16).to(x.dtype), scale * 0.0625
                    else:
                        w = (both & 15).to(x.dtype) - 8
                    acc += tl.dot(x, w, input_precision="ieee") * scale
    else:
        for start in range(0, inputs, BLOCK_IN):
            i = start + tl.arange(0, BLOCK_IN)
            x = tl.load(x_ptr + i, real[:, None] & (i < inputs), other=0.0)
            w = tl.load(w_ptr + i[:, None], inside[None, :] & (i < inputs)[:, None], other=0)
            acc = tl.dot(x, w.to(x.dtype), acc, input_precision="ieee")
        if BITS == 8:
            acc *= tl.load(w_scale_ptr + columns, inside, other=0.0).to(tl.float32)
    return acc


@triton.jit
def _grouped_product_kernel(
        x_ptr,              # (T, inputs), or (T, SLOTS, inputs) in the second product
        w_ptr,              # (E, outputs, inputs); of BITS 4 (E, outputs, inputs/2)
        w_scale_ptr,        # of BITS 8 and 4 (E, GROUPS, outputs), else not read
        shared_ptr,         # (SHARED*outputs, inputs), or (outputs, SHARED*inputs): every token's
        bias_ptr,           # (E, outputs) or None
        out_ptr,            # (T, SLOTS, outputs): A chosen, then the shared ones
        scale_ptr,          # (T, A) routing weights, in the second product
        ids_ptr,            # (T, A) int64, if FEW, else
        slots_ptr, tile_expert_ptr, n_tiles_ptr,        # as _group_kernel writes them
        T, outputs, inputs, A, SLOTS, BITS: tl.constexpr, GROUPS: tl.constexpr, FIRST: tl.constexpr,
        FEW: tl.constexpr, SHARED: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_M: tl.constexpr,
        BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr):
    tile = tl.program_id(1).to(tl.int64)
    shared = tile < SHARED
    if FEW:                             # the rows of a tile are all tokens
        token, a = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_A)
        expert = tile - SHARED
        if T == 1:                      # a tile for each chosen expert, not for each expert
            expert = tl.load(ids_ptr + expert, expert >= 0, other=-1)
        ids = tl.load(ids_ptr + token[:, None] * A + a[None, :],
                      (token < T)[:, None] & (a < A)[None, :], other=-2)
        mine = (ids == expert).to(tl.int32)
        real = tl.where(shared, token < T, tl.max(mine, 1) > 0)
        if tl.max(real.to(tl.int32), 0) == 0:
            return
        choice = tl.where(shared, A + tile, tl.sum(mine * a[None, :], 1))
    else:
        if tile >= tl.load(n_tiles_ptr):
            return
        slots = tl.load(slots_ptr + tile * BLOCK_M + tl.arange(0, BLOCK_M))      # (BLOCK_M,)
        token, choice, real = slots // A, slots % A, slots < T * A
        expert = tl.load(tile_expert_ptr + tile)
    slot = token.to(tl.int64) * SLOTS + choice
    rows = token.to(tl.int64) if FIRST else slot
    columns = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)    # an expert takes 32 bits
    inside = columns < outputs
    shared_ptr += tile * inputs * (outputs if FIRST else 1)
    shared_row = inputs if FIRST else inputs * SHARED
    w_row = inputs if BITS > 4 else inputs // 2
    w_ptr += expert * outputs * w_row
    if BITS == 16 and SHARED:           # one loop for both, as each takes its own shared memory
        w_ptr, w_row = shared_ptr if shared else w_ptr, shared_row if shared else w_row
    if BITS < 16 and SHARED and shared:
        acc = product(x_ptr, rows, real, shared_ptr, shared_row, None, columns, outputs, inputs, 16,
                      BLOCK_IN)
    else:
        acc = product(x_ptr, rows, real, w_ptr, w_row, w_scale_ptr + expert * GROUPS * outputs,
                      columns, outputs, inputs, BITS, BLOCK_IN)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + expert * outputs + columns, inside, other=0.0).to(tl.float32)
    if FIRST:
        # a GPU's maximum gives the other argument where one is NaN
        acc = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)
        acc = acc * acc
    else:
        scale = tl.load(scale_ptr + token * A + choice, real & (choice < A), other=1.0)
        acc *= scale.to(tl.float32)[:, None]
    tl.store(out_ptr + slot[:, None] * outputs + columns, acc.to(out_ptr.dtype.element_ty),
             real[:, None] & inside)


@launcher
def moe_experts(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, up: Tensor, down: Tensor,
                up_bias: Tensor | None = None, down_bias: Tensor | None = None,
                shared=None) -> Tensor:
    """As twotower.moe_experts, but to be summed over the slots: (T, slots, D) float32. x, up and
    down share a dtype, or both weights are Quantized alike; no token may choose an expert twice."""
    (T, D), (E, width, _), A = x.shape, up.shape, topk_ids.shape[1]
    BITS = {"int8": 8, "int4": 4}.get(getattr(up, "kind", None), 16)
    (up, up_scale), (down, down_scale) = ((w, w) if BITS == 16 else (w.integers, w.scales)
                                          for w in (up, down))
    kinds, halves = ([x.dtype], 1) if BITS == 16 else ([torch.int8], 8 // BITS)
    check(x.device, x=(x, (T, D), FLOATS), topk_ids=(topk_ids, (T, A), LONG),
          topk_weights=(topk_weights, (T, A), [*FLOATS, torch.float64]),
          up=(up, (E, width, D // halves), kinds), down=(down, (E, D, width // halves), kinds),
          up_bias=(up_bias, (E, width), FLOATS), down_bias=(down_bias, (E, D), FLOATS))
    x, topk_ids, scale = x.contiguous(), topk_ids.contiguous(), topk_weights.contiguous()
    FEW, SHARED, shared_up, shared_down = T <= 16, 0, x, x
    if FEW and shared is not None and up_bias is down_bias is shared.up_proj.bias is None:
        shared_up, shared_down = shared.up_proj.weight, shared.down_proj.weight
        SHARED = len(shared_up) // width * (len(shared_up) % width == 0)
    BLOCK_M, BLOCK_OUT, BLOCK_IN, num_warps, num_stages = next(
        tile for most, tile in TILES if FEW or T * A <= most * E)
    BLOCK_M = min(BLOCK_M, 64) if BITS == 4 else BLOCK_M        # of two accumulators
    groups, tiles, n = [None] * 3, SHARED + (A if T == 1 else E), T * A
    if not FEW:
        tiles = n if n < E else (n + E * (BLOCK_M - 1)) // BLOCK_M      # the most there can be
        groups = [x.new_empty(size, dtype=torch.long) for size in (tiles * BLOCK_M, tiles, 1)]
        # a slot for each of the 128 threads at least: of fewer, threads hold copies, which a
        # histogram with a mask counts as well (seen in the code that Triton 3.6 and 3.7 compile)
        _group_kernel[E,](topk_ids, *groups, n, TILE=BLOCK_M, BLOCK_E=triton.next_power_of_2(E),
                          BLOCK=min(1024, max(128, triton.next_power_of_2(n))))
    SLOTS = A + (SHARED or shared is not None)
    hidden = torch.empty(T, SLOTS, width, dtype=x.dtype, device=x.device)
    out = torch.empty(T, SLOTS, D, dtype=torch.float32, device=x.device)
    for first, source, w, w_scale, more, bias, to in (
            (True, x, up, up_scale, shared_up, up_bias, hidden),
            (False, hidden, down, down_scale, shared_down, down_bias, out)):
        outputs, inputs = w.shape[1], source.shape[-1]
        _grouped_product_kernel[triton.cdiv(outputs, BLOCK_OUT), tiles](
            source, w.contiguous(), w_scale.contiguous(), more.contiguous(),
            bias if bias is None else bias.contiguous(), to, scale, topk_ids, *groups, T, outputs,
            inputs, A, SLOTS, BITS=BITS, GROUPS=w_scale.shape[1], FIRST=first, FEW=FEW,
            SHARED=SHARED, BLOCK_A=triton.next_power_of_2(A), BLOCK_M=BLOCK_M, BLOCK_OUT=BLOCK_OUT,
            BLOCK_IN=max(64 * (BITS == 4), BLOCK_IN * 2 // x.element_size()),
            num_warps=num_warps, num_stages=num_stages)
    if SLOTS > A + SHARED:
        out[:, A] = shared(x)
    return out


# ---- 2. The Mamba-2 scan ------------------------------------------------------------------------
# Why: 23 of 52 layers. A block of 16 tokens needs the layer's state, H P N float32 numbers (2 MB a
# row at full size), to read and in the context tower to write; a chunk's products cost c (2 c (N +
# P) + 4 P N) FLOPs a head.
#
# How: in a chunk of c tokens that begins with the state h, with s_l the sum of dt A up to token l,
#
#     y_l = exp(s_l) h C_l + sum over m <= l of exp(s_l - s_m) dt_m (C_l . B_m) x_m + D x_l
#     h'  = exp(s_c) h     + sum over m      of exp(s_c - s_m) dt_m x_m (x) B_m
#
# A program owns a slice of a head's P channels and goes from chunk to chunk; in each it walks over
# the N columns of the state, a few at a time: h C, the new state and C . B (which every slice
# repeats) come from that one walk. A block is one chunk, a single token the smallest, padded to 16
# rows, a product's. (Chunks at once, as in arXiv 2405.21060, section 6, would move their states.)


@triton.jit
def _scan_kernel(
        x_ptr, y_ptr,       # (b, L, H, P)
        dt_ptr,             # (b, L, H), as in_proj makes it
        B_ptr, C_ptr,       # (b, L, G, N)
        dt_bias_ptr, A_log_ptr, D_ptr,                  # (H,)
        counts_ptr,         # (b,) int64: tokens of each row before its padding; None: no padding
        state_ptr,          # (b, H, P, N) f32, or (b, chunks, H, P, N), if state_chunk is not 0:
                            # before each chunk; after the last not written but if UPDATE
        x_row, x_token, dt_row, dt_token, B_row, B_token, C_row, C_token, state_row, state_chunk,
        L, chunk_size, H, G, least, most, UPDATE: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
        CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    row, head = tl.program_id(0).to(tl.int64) // H, tl.program_id(0).to(tl.int64) % H
    group = head // (H // G)
    p, l = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, CHUNK)
    # where the row's first chunk begins; what lies within a chunk takes 32 bits
    x_ptr, y_ptr = x_ptr + row * x_row + head * P, y_ptr + (row * L * H + head) * P
    B_ptr, C_ptr = B_ptr + row * B_row + group * N, C_ptr + row * C_row + group * N
    dt_ptr, state_ptr = dt_ptr + row * dt_row + head, state_ptr + row * state_row + head * P * N
    dt_bias, D = tl.load(dt_bias_ptr + head).to(tl.float32), tl.load(D_ptr + head).to(tl.float32)
    A = -tl.exp(tl.load(A_log_ptr + head).to(tl.float32))
    end = L if counts_ptr is None else tl.load(counts_ptr + row).to(tl.int32)
    for first in range(0, L, chunk_size):
        real = (l < chunk_size) & (first + l < L)
        dt = tl.load(dt_ptr + l * dt_token, real, other=0.0).to(tl.float32) + dt_bias
        # a dt of 0 neither decays nor adds: padding
        dt = tl.where(real & (first + l < end), step_sizes(dt, least, most), 0.0)
        log_decay, log_total = tl.cumsum(dt * A, 0), tl.sum(dt * A, 0)           # s_l and s_c
        there = real[:, None] & (p < P)[None, :]
        x = tl.load(x_ptr + l[:, None] * x_token + p[None, :], there, other=0.0).to(tl.float32)
        faded_x = tl.trans(x * (dt * tl.exp(log_total - log_decay))[:, None])   # to the chunk's end
        weight, y = tl.zeros((CHUNK, CHUNK), tl.float32), tl.zeros((CHUNK, BLOCK_P), tl.float32)
        for start in range(0, N, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            cell, inside = p[:, None] * N + n[None, :], (p < P)[:, None] & (n < N)[None, :]
            read = real[:, None] & (n < N)[None, :]
            B = tl.load(B_ptr + l[:, None] * B_token + n[None, :], read, other=0.0)
            C = tl.load(C_ptr + l[:, None] * C_token + n[None, :], read, other=0.0)
            state = tl.load(state_ptr + cell, inside, other=0.0)                # (BLOCK_P, BLOCK_N)
            # in x's dtype: products of 16 bits are exact in float32
            weight = tl.dot(C, tl.trans(B), weight, input_precision="tf32x3")
            y = tl.dot(C.to(tl.float32), tl.trans(state), y, input_precision="tf32x3")
            if UPDATE or first + chunk_size < L:
                state *= tl.exp(log_total)
                state += tl.dot(faded_x, B.to(tl.float32), input_precision="tf32x3")
                tl.store(state_ptr + state_chunk + cell, state, inside)
        weight *= tl.exp(log_decay[:, None] - log_decay[None, :]) * dt[None, :]
        weight = tl.where(l[:, None] >= l[None, :], weight, 0.0)    # the rest may have overflowed
        y = tl.dot(weight, x, y * tl.exp(log_decay)[:, None] + D * x, input_precision="tf32x3")
        tl.store(y_ptr + l[:, None] * (H * P) + p[None, :], y.to(y_ptr.dtype.element_ty), there)
        tl.debug_barrier()                      # what is stored is read by other threads next
        x_ptr, y_ptr = x_ptr + chunk_size * x_token, y_ptr + chunk_size * (H * P)
        B_ptr, C_ptr = B_ptr + chunk_size * B_token, C_ptr + chunk_size * C_token
        dt_ptr, state_ptr = dt_ptr + chunk_size * dt_token, state_ptr + state_chunk


@triton.jit
def step_sizes(dt, least, most):
    """softplus(dt) within limits, which may not lose a NaN, as a GPU's maximum does."""
    small = tl.exp(-tl.abs(dt))         # softplus is max(dt, 0) + log1p(small)
    u = 1 + small                       # the factor makes good what this rounding loses
    dt = tl.maximum(dt, 0.0) + tl.where(u == 1, small, tl.log(u) * small / (u - 1))
    dt = tl.maximum(dt, least, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(dt, most, propagate_nan=tl.PropagateNan.ALL)


@launcher
def ssd(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor,
        state: Tensor, limit: tuple[float, float], counts: Tensor | None, chunk_size: int,
        keep: str) -> tuple[Tensor, Tensor | None]:
    """As twotower.ssd; but for keep "blocks" the chunks have a size of the kernel's own."""
    (b, L, H, P), (G, N) = x.shape, B.shape[2:]
    check(x.device, x=(x, (b, L, H, P), FLOATS), dt=(dt, (b, L, H), FLOATS),
          B=(B, (b, L, G, N), [x.dtype]), C=(C, (b, L, G, N), [x.dtype]),
          dt_bias=(dt_bias, (H,), FLOATS), A_log=(A_log, (H,), FLOATS), D=(D, (H,), FLOATS),
          state=(state, (b, H, P, N), F32), counts=(counts, (b,), LONG))
    if not state.is_contiguous():
        raise ValueError("state must be contiguous, as it is updated in place")
    x, dt, B, C = dense(x, 2), dense(dt), dense(B, 2), dense(C, 2)
    y, before = x.new_empty(x.shape), None
    if keep == "blocks":
        before = state.new_empty(b, triton.cdiv(L, chunk_size), H, P, N)
        before[:, 0], state = state, before
    else:
        chunk_size = 16 if L <= 16 else 32              # longer ones spill registers
        if keep != "end" and L > chunk_size:
            state = state.clone()                       # which goes from chunk to chunk
    # wider slices of a head repeat less of C . B, but leave a GPU idle at batch 1, and in float32
    # their chunks of 32 spill registers
    narrow = P % 32 or b * H < 2 * multiprocessors(x.device) or chunk_size * x.element_size() > 64
    BLOCK_P = 16 if narrow else 32
    _scan_kernel[b * H, triton.cdiv(P, BLOCK_P)](
        x, y, dt, B, C, dt_bias.contiguous(), A_log.contiguous(), D.contiguous(),
        counts, state, *x.stride()[:2], *dt.stride()[:2], *B.stride()[:2], *C.stride()[:2],
        state.stride(0), 0 if before is None else H * P * N, L, chunk_size, H, G,
        *map(float, limit), UPDATE=keep == "end", P=P, N=N, BLOCK_P=BLOCK_P,
        CHUNK=max(16, triton.next_power_of_2(chunk_size)),
        BLOCK_N=max(16, min(32, triton.next_power_of_2(N))))
    return y, before


# ---- 3. Attention of few queries ----------------------------------------------------------------
# Why: 6 of 52 layers, the only ones whose cost grows with the context: all keys and values, 4 G K
# bytes a cached token in bfloat16, are read in every pass. The H/G query heads of a KV head and the
# L queries are rows of one product, 16 H/G = 256 for a block of 16, in tiles of up to 128 rows. (A
# prefill is the library's: 0.4 of this one's time for 2,048 tokens on an H200.)
#
# How: one row's two KV heads would not keep a GPU busy, so the keys are split: a program goes over
# its share with a running maximum and sum (as FlashAttention does), and a second kernel joins the
# shares. Exponentials are powers of 2, as the hardware has them, of scores times log2(e).

HIDDEN = tl.constexpr(-1.0e30)          # not -inf, which would make NaN of a share with no key


@triton.jit
def _attention_kernel(
        q_ptr,              # (B, H, L, K)
        k_ptr, v_ptr,       # (B, G, S, K)
        last_ptr,           # (B, L) int64: the last key a query sees
        acc_ptr,            # (shares, B, L, H, K) f32
        best_ptr, sum_ptr,  # (shares, B, L, H) f32
        q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token, last_row,
        last_query, H, G, L, S,
        share_size, scale,  # keys in a share; log2(e) / sqrt(K)
        K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr):
    row, group = tl.program_id(1).to(tl.int64) // G, tl.program_id(1).to(tl.int64) % G
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    head, query = group * (H // G) + m // L, m % L      # the rows of a KV head: head by head
    d, real = tl.arange(0, BLOCK_K), m < H // G * L
    inside = real[:, None] & (d < K)[None, :]
    at = row * q_row + head * q_head + query * q_token
    q = tl.load(q_ptr + at[:, None] + d[None, :], inside, other=0.0)    # (BLOCK_M, BLOCK_K)
    best, total = tl.full((BLOCK_M,), HIDDEN, tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    # keys are counted from the share's first, in 32 bits
    first = tl.program_id(2).to(tl.int64) * share_size
    last = tl.load(last_ptr + row * last_row + query * last_query, real, other=-1) - first
    last = tl.minimum(tl.maximum(last, -1), tl.minimum(share_size, S - first) - 1).to(tl.int32)
    end = tl.max(last, 0) + 1                           # no query of this tile sees further
    k_ptr += row * k_row + group * k_head + first * k_token
    v_ptr += row * v_row + group * v_head + first * v_token
    for start in range(0, end, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        cached = (s < end)[:, None] & (d < K)[None, :]
        k = tl.load(k_ptr + s[:, None] * k_token + d[None, :], cached, other=0.0)
        v = tl.load(v_ptr + s[:, None] * v_token + d[None, :], cached, other=0.0)
        seen = s[None, :] <= last[:, None]
        scores = tl.where(seen, tl.dot(q, tl.trans(k), input_precision="ieee") * scale, HIDDEN)
        higher = tl.maximum(best, tl.max(scores, 1))
        p = tl.where(seen, tl.exp2(scores - higher[:, None]), 0.0)
        faded = tl.exp2(best - higher)
        total = total * faded + tl.sum(p, 1)
        # the weights are rounded to v's dtype, as tensor cores want them
        acc = acc * faded[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        best = higher
    at = ((tl.program_id(2) * (tl.num_programs(1) // G) + row) * L + query) * H + head
    tl.store(acc_ptr + at[:, None] * K + d[None, :], acc, inside)
    tl.store(best_ptr + at, best, real)
    tl.store(sum_ptr + at, total, real)


@triton.jit
def _join_shares_kernel(
        acc_ptr, best_ptr, sum_ptr,     # of the other, where B, L and H are rows
        out_ptr,            # (rows, K)
        rows, shares, K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_SHARES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i, d = tl.arange(0, BLOCK_SHARES), tl.arange(0, BLOCK_K)
    there = i < shares
    best = tl.load(best_ptr + i * rows + row, there, other=HIDDEN)
    weight = tl.exp2(best - tl.max(best, 0))
    total = tl.sum(weight * tl.load(sum_ptr + i * rows + row, there, other=0.0), 0)
    acc = tl.load(acc_ptr + (i[:, None] * rows + row) * K + d[None, :],
                  there[:, None] & (d < K)[None, :], other=0.0)
    out = tl.sum(acc * weight[:, None], 0) / total
    tl.store(out_ptr + row * K + d, out.to(out_ptr.dtype.element_ty), d < K)


@launcher
def attention(q: Tensor, k: Tensor, v: Tensor, last_seen: Tensor | None = None,
              is_causal: bool = False, mask: Tensor | None = None) -> Tensor:
    """As twotower.attention: q (B,H,L,K), k and v (B,G,S,K), which may be views of a larger cache,
    last_seen (B or 1, L) int64. Every query must see a key."""
    (B, H, L, K), (G, S) = q.shape, k.shape[1:3]
    check(q.device, q=(q, (B, H, L, K), FLOATS), k=(k, (B, G, S, K), [q.dtype]),
          v=(v, (B, G, S, K), [q.dtype]))
    if (last_seen is not None) + is_causal + (mask is not None) > 1:
        raise ValueError("attention takes one of last_seen, is_causal and mask")
    if is_causal or mask is not None:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, enable_gqa=True)
    last_seen = torch.full((1, 1), S - 1, device=q.device) if last_seen is None else last_seen
    last_seen = last_seen.expand(B, L)                          # strides of 0 where one serves all
    check(q.device, last_seen=(last_seen, (B, L), LONG))
    q, k, v, queries = dense(q), dense(k), dense(v), H // G * L
    wide = q.dtype == torch.float32                             # more would spill registers
    BLOCK_M, BLOCK_S, num_warps = (
        (16, 16 if wide else 64, 4) if queries <= 16 else       # 16: as in TILES
        (64, 16, 8) if wide else                                # taller ones read the keys less
        (64, 64, 4) if queries <= 64 else (128, 64, 8))
    tiles, BLOCK_K = triton.cdiv(queries, BLOCK_M), max(16, triton.next_power_of_2(K))
    # two programs for each multiprocessor, but shares of at least two tiles of keys
    wanted = triton.cdiv(2 * multiprocessors(q.device), tiles * B * G)
    share_size = max(2, triton.cdiv(triton.cdiv(S, wanted), BLOCK_S)) * BLOCK_S
    shares, out = triton.cdiv(S, share_size), q.new_empty(B, L, H, K)       # as o_proj reads it
    acc = q.new_empty(shares, B, L, H, K, dtype=torch.float32)
    best, total = acc.new_empty(2, shares, B, L, H)
    _attention_kernel[tiles, B * G, shares](
        q, k, v, last_seen, acc, best, total, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        *last_seen.stride(), H, G, L, S, share_size, math.log2(math.e) * K**-0.5, K=K,
        BLOCK_K=BLOCK_K, BLOCK_M=BLOCK_M, BLOCK_S=BLOCK_S, num_warps=num_warps)
    _join_shares_kernel[B * H * L,](acc, best, total, out, B * H * L, shares, K=K, BLOCK_K=BLOCK_K,
                                    BLOCK_SHARES=triton.next_power_of_2(shares))
    return out.transpose(1, 2)


# ---- 4. Norms, and what stands between two mixers -----------------------------------------------
# Why: 53 times a pass: a layer's output is summed over its slots, gated and added to the residual
# stream, which the next layer modulates and norms; in torch each of these moves rows of D numbers
# and costs a launch. Here a program does all for a token: add_gated only notes what is to be added,
# and the norm that follows adds it. A Mamba-2 layer's gated norm is the same, for a group a token.


@dataclass
class Unsummed:
    """The residual stream x + gate h as add_gated leaves it; a norm makes the sum, then in x."""

    x: Tensor                   # (B, L, D)
    gate: Tensor | None         # (B, 1, D)
    h: Tensor | None            # (B, L, D) or (B, L, slots, D), to be summed; None: x is the sum


@triton.jit
def _norm_kernel(
        x_ptr,              # (tokens, D)
        z_ptr,              # (tokens / groups, groups * D): norms x silu(z); or None
        h_ptr,              # (tokens, SLOTS, D) or None
        weight_ptr,         # (groups, D)
        gate_ptr, shift_ptr, scale_ptr,             # (B, D) or None
        sum_ptr, out_ptr,   # (tokens, D): x + gate h, if there are SLOTS, or None; what is normed
        z_row, groups, D, eps, L,       # L tokens of a row share gate, shift and scale
        SLOTS: tl.constexpr, BLOCK_D: tl.constexpr,
        MODULATE: tl.constexpr):        # 0 not, 1 before the norm (Mamba-2, attention), 2 after it
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside, at = d < D, token // L * D + d
    x = tl.load(x_ptr + token * D + d, inside, other=0.0).to(tl.float32)
    if SLOTS:
        h = tl.zeros((BLOCK_D,), tl.float32)
        for slot in tl.static_range(SLOTS):
            h += tl.load(h_ptr + (token * SLOTS + slot) * D + d, inside, other=0.0).to(tl.float32)
        if gate_ptr is not None:
            h *= tl.load(gate_ptr + at, inside, other=0.0).to(tl.float32)
        total = (x + h).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + token * D + d, total, inside)
        x = total.to(tl.float32)
    if z_ptr is not None:
        z = tl.load(z_ptr + token // groups * z_row + token % groups * D + d, inside, other=0.0)
        x *= z.to(tl.float32) / (1 + tl.exp(-z.to(tl.float32)))
    weight = tl.load(weight_ptr + token % groups * D + d, inside, other=0.0).to(tl.float32)
    if MODULATE:
        shift = tl.load(shift_ptr + at, inside, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + at, inside, other=0.0).to(tl.float32)
        if MODULATE == 1:
            x = x * (1 + scale) + shift
    x = x * tl.rsqrt(tl.sum(x * x, 0) / D + eps) * weight
    if MODULATE == 2:
        x = x * (1 + scale) + shift
    tl.store(out_ptr + token * D + d, x.to(out_ptr.dtype.element_ty), inside)


@launcher
def norm(x: Tensor | Unsummed, weight: Tensor, eps: float, shift: Tensor | None = None,
         scale: Tensor | None = None, first: bool = True) -> Tensor:
    """As twotower.norm: x (..., D) -> (..., D), shift and scale (B, 1, D)."""
    stream = x if isinstance(x, Unsummed) else Unsummed(x, None, None)
    x, h, gate = stream.x, stream.h, stream.gate
    (*rows, D), slots = x.shape, () if h is None else h.shape[2:-1]
    vector = len(x), 1, D
    check(weight.device, x=(x, x.shape, FLOATS), h=(h, (*rows, *slots, D), FLOATS),
          weight=(weight, (D,), FLOATS), gate=(gate, vector, FLOATS),
          shift=(shift, vector, FLOATS), scale=(scale, vector, FLOATS))
    total = x if h is None else x.new_empty(x.shape)
    out = x.new_empty(x.shape, dtype=weight.dtype)
    _norm_kernel[x.numel() // D,](
        *(v if v is None else v.contiguous() for v in (x, None, h, weight, gate, shift, scale)),
        total, out, 0, 1, D, eps, x.numel() // (len(x) * D),
        SLOTS=0 if h is None else math.prod(slots),
        MODULATE=0 if shift is None else 1 if first else 2,
        BLOCK_D=triton.next_power_of_2(D), num_warps=8)
    stream.x, stream.h, stream.gate = total, None, None
    return out


@launcher
def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """As twotower.gated_rms_norm: the RMS norm of y silu(z) over each group; (..., d_inner)."""
    D = y.shape[-1] // groups
    check(y.device, y=(y, (*y.shape[:-1], groups * D), FLOATS), z=(z, y.shape, FLOATS),
          weight=(weight, (groups * D,), FLOATS))
    y, weight, out = y.contiguous(), weight.contiguous(), y.new_empty(y.shape)
    z = dense(z.flatten(0, -2))                         # a slice: its rows are strided
    _norm_kernel[y.numel() // D,](
        y, z, None, weight, None, None, None, None, out, z.stride(0), groups, D, eps, 1, SLOTS=0,
        MODULATE=0, BLOCK_D=triton.next_power_of_2(D))
    return out


def add_gated(x: Tensor | Unsummed, gate: Tensor | None, h: Tensor) -> Unsummed:
    """As twotower.add_gated, but the sum, also over h's slots, is left to the next norm."""
    return Unsummed(x.x if isinstance(x, Unsummed) else x, gate, h)


# ---- 5. Causal convolution and SiLU -------------------------------------------------------------
# Why: between the first product and the scan of 23 layers. As shifted products in torch, inputs and
# sums pass through memory W = 4 times; here once (neighbours' loads hit the cache), and the new
# history replaces the old in place.


@triton.jit
def load_inputs(x_ptr, history_ptr, at, W: tl.constexpr, x_token, channels, c, wanted):
    """Inputs at places (n, 1) of the new tokens, and before these of the W-1 in the history."""
    new = tl.load(x_ptr + at * x_token + c[None, :], wanted & (at >= 0), other=0.0)
    old = tl.load(history_ptr + (at + W - 1) * channels + c[None, :], wanted & (at < 0), other=0.0)
    return tl.where(at >= 0, new, old)


@triton.jit
def _conv_kernel(
        history_ptr,        # (B, W-1, channels)
        x_ptr, out_ptr,     # (B, L, channels)
        weight_ptr, bias_ptr,           # (channels, W) and (channels,) or None
        counts_ptr,         # (B,) int64: tokens of each row before its padding; None: no padding
        x_row, x_token, L, channels, W: tl.constexpr, UPDATE: tl.constexpr,
        BLOCK_L: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    c = tl.program_id(2).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = (t < L)[:, None] & (c < channels)[None, :]
    x_ptr += row * x_row
    history_ptr += row * (W - 1) * channels
    acc = tl.zeros((BLOCK_L, BLOCK_C), tl.float32)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + c, c < channels, other=0.0).to(tl.float32)[None, :]
    for w in tl.static_range(W):                                                 # W-1-w before t
        tap = tl.load(weight_ptr + c * W + w, c < channels, other=0.0).to(tl.float32)
        x = load_inputs(x_ptr, history_ptr, t[:, None] + w - (W - 1), W, x_token, channels, c, real)
        acc += x.to(tl.float32) * tap[None, :]
    out = acc / (1 + tl.exp(-acc))                                               # SiLU
    tl.store(out_ptr + (row * L + t[:, None]) * channels + c[None, :],
             out.to(out_ptr.dtype.element_ty), real)
    if UPDATE and tl.program_id(1) == 0:        # the only program that has read this history
        place = tl.arange(0, BLOCK_W)[:, None]
        kept = (place < W - 1) & (c < channels)[None, :]
        at = (L if counts_ptr is None else tl.load(counts_ptr + row)) - (W - 1) + place
        newest = load_inputs(x_ptr, history_ptr, at, W, x_token, channels, c, kept)
        tl.debug_barrier()                      # all of its threads have
        tl.store(history_ptr + place * channels + c[None, :], newest, kept)


@launcher
def causal_conv1d(history: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None,
                  update: bool = False, counts: Tensor | None = None) -> Tensor:
    """As twotower.causal_conv1d: history (B, W-1, channels), x (B, L, channels) -> x's shape."""
    (B, L, channels), W = x.shape, weight.shape[-1]
    check(x.device, history=(history, (B, W - 1, channels), [x.dtype]), x=(x, x.shape, FLOATS),
          weight=(weight, (channels, 1, W), FLOATS), bias=(bias, (channels,), FLOATS),
          counts=(counts, (B,), LONG))
    if not history.is_contiguous():
        raise ValueError("history must be contiguous, as it is updated in place")
    x, weight, out = dense(x), weight.contiguous(), x.new_empty(B, L, channels)
    BLOCK_W, BLOCK_C = triton.next_power_of_2(max(1, W - 1)), 128
    BLOCK_L = min(max(16, BLOCK_W), triton.next_power_of_2(L))      # the first alone reads history
    _conv_kernel[B, triton.cdiv(L, BLOCK_L), triton.cdiv(channels, BLOCK_C)](
        history, x, out, weight, bias if bias is None else bias.contiguous(), counts,
        *x.stride()[:2], L, channels, W=W, UPDATE=update and W > 1, BLOCK_L=BLOCK_L,
        BLOCK_W=BLOCK_W, BLOCK_C=BLOCK_C)
    return out


# ---- 6. Router ----------------------------------------------------------------------------------
# Why: 23 of 52 layers. The release computes the scores in float64, as float32 cannot tell experts
# apart that are close, from a float64 copy of the weights (8 E D bytes) for every layer and step.
# Here up to 64 tokens read the float32 weights as they are; one more kernel chooses A experts.


@triton.jit
def _scores_kernel(
        x_ptr, weight_ptr,  # (T, D) and (E, D) f32
        scores_ptr,         # (T, E) f64
        D, E, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    acc = tl.zeros((BLOCK_E, BLOCK_D), tl.float64)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = tl.load(x_ptr + token * D + d, d < D, other=0.0).to(tl.float64)
        w = tl.load(weight_ptr + e[:, None] * D + d[None, :],
                    (e < E)[:, None] & (d < D)[None, :], other=0.0).to(tl.float64)
        acc += w * x[None, :]
    tl.store(scores_ptr + token * E + e, 1 / (1 + tl.exp(-tl.sum(acc, 1))), e < E)


@triton.jit
def _top_experts_kernel(
        scores_ptr, bias_ptr,           # (T, E) f64 and (E,) f32
        ids_ptr, weights_ptr,           # (T, A) int64 and f64
        E, A, topk_group, NORMALISE: tl.constexpr, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr,
        BLOCK_E: tl.constexpr, BLOCK_A: tl.constexpr,
        FACTOR: tl.constexpr):          # as an argument it would be rounded to float32
    token = tl.program_id(0).to(tl.int64)
    a, e, g = tl.arange(0, BLOCK_A), tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_G)
    scores = tl.load(scores_ptr + token * E + e, e < E, other=0.0)
    choice = scores + tl.load(bias_ptr + e, e < E, other=0.0).to(tl.float64)
    choice = tl.where(choice == choice, choice, float("inf"))   # NaN first, as torch's topk has it
    choice = tl.where(e < E, choice, float("-inf"))
    if GROUPS > 1:          # groups by the sum of their two best; the others' choices become 0
        member = g[:, None] == (e // (E // GROUPS))[None, :]                # (BLOCK_G, BLOCK_E)
        own = tl.where(member, choice[None, :], float("-inf"))
        others = tl.where(e[None, :] == tl.argmax(own, 1)[:, None], float("-inf"), own)
        best = tl.max(own, 1) + tl.max(others, 1)
        for _ in range(topk_group):
            chosen = g == tl.argmax(best, 0)
            best = tl.where(chosen, float("-inf"), best)
            member &= ~chosen[:, None]                                      # of what is dropped
        choice = tl.where((tl.max(member.to(tl.int32), 0) > 0) & (e < E), 0.0, choice)
    ids, weights = tl.zeros((BLOCK_A,), tl.int32), tl.zeros((BLOCK_A,), tl.float64)
    for k in range(A):
        chosen = tl.argmax(choice, 0)
        ids = tl.where(a == k, chosen, ids)
        weights = tl.where(a == k, tl.sum(tl.where(e == chosen, scores, 0.0), 0), weights)
        choice = tl.where(e == chosen, float("-inf"), choice)
    if NORMALISE:
        weights /= tl.sum(weights, 0) + 1e-20
    tl.store(ids_ptr + token * A + a, ids, a < A)
    tl.store(weights_ptr + token * A + a, weights * FACTOR, a < A)


@launcher
def route(x: Tensor, weight: Tensor, bias: Tensor, config) -> tuple[Tensor, Tensor]:
    """As twotower.route: x (T, D) -> topk_ids (T, A) int64 and topk_weights (T, A) float64."""
    (T, D), E, A = x.shape, len(weight), config.num_experts_per_tok
    check(x.device, x=(x, (T, D), FLOATS), weight=(weight, (E, D), F32), bias=(bias, (E,), F32))
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    ids = x.new_empty(T, A, dtype=torch.long)
    scores, weights = (x.new_empty(T, n, dtype=torch.float64) for n in (E, A))
    if T > 64:                  # a product large enough for the library's, on float64 tensor cores
        scores = torch.sigmoid(x.double() @ weight.double().T)
    else:
        _scores_kernel[T, triton.cdiv(E, 4)](x, weight, scores, D, E, BLOCK_E=4, BLOCK_D=512)
    _top_experts_kernel[T,](
        scores, bias, ids, weights, E, A, config.topk_group, FACTOR=config.routed_scaling_factor,
        NORMALISE=config.norm_topk_prob, GROUPS=config.n_group,
        BLOCK_G=triton.next_power_of_2(config.n_group), BLOCK_E=triton.next_power_of_2(E),
        BLOCK_A=triton.next_power_of_2(A), num_warps=1)
    return ids, weights


# ---- 7. Passes recorded as CUDA graphs ----------------------------------------------------------
# Why: at batch 1 the host cannot make a pass's three hundred launches as fast as the GPU runs them.
# By `python bench.py gpu` on an H200 an AR token of the full-size model took 21.5 ms so, recorded
# once and replayed by one call 2.88 ms (2026-11-26). What a pass reads and writes must then stay
# where it is: inputs, also the rows' lengths, are copied to buffers, states updated in place.

capture_stream = functools.cache(torch.cuda.Stream)     # torch's own stays on the first GPU used


class Passes:
    """The passes that repeat while decoding: an AR token, a denoiser step, a block extension, a
    draft read and settled. On a GPU each is recorded when it first comes, for every number of
    tokens anew; elsewhere it just runs. Rows that end stay, as padding of length 0, until half are
    left: recording costs dozens of passes. What is returned is valid until the same pass comes."""

    def __init__(self, model, context):
        self.model, self.recorded, self.drafts = model, {}, []
        self.recording = context.device.type == "cuda"      # False: run them as they are
        self.rows = len(context.lengths)
        self.live = torch.arange(self.rows)                 # (R,) of these rows the context's

    def select(self, rows: list[int]) -> list[int] | slice:
        """Only these rows of the context go on; returns which rows of its states stay."""
        self.live = self.live[rows]
        if 2 * len(rows) > self.rows:
            return slice(None)
        kept, self.rows, self.live = self.live.tolist(), len(rows), torch.arange(len(rows))
        self.recorded.clear()
        return kept

    def extend(self, context, tokens: Tensor, logits: str | None, keep: str) -> Tensor:
        """As TwoTower._extend."""
        read = functools.partial(self.model._extend, logits=logits, keep=keep)
        out = self._run(context, (tokens.shape[1], logits, keep), read, tokens)
        context.lengths = context.lengths + tokens.shape[1] * (keep == "end")
        context.logits = out[:, -1] if logits else None
        return out

    def denoise(self, context, block: Tensor, t: Tensor) -> Tensor:
        """As TwoTower._denoise."""
        t = t.to(self.model.lm_head.weight.dtype)           # as t_embedder would, here on the host
        return self._run(context, block.shape[1:], lambda fixed, block, t: (
            self.model._denoise(block, fixed, t)), block, t)

    def settle(self, context, counts: Tensor):
        """As Context.settle, but lengths and logits stay."""
        def settle(fixed, counts):
            for state, inputs in zip(mamba_states(fixed), self.drafts):
                state.inputs = inputs
                state.settle(counts)
        self._run(context, (0, *(self.drafts and self.drafts[0][0].shape)), settle, counts)

    def _run(self, context, key: tuple, function, *inputs: Tensor) -> Tensor | None:
        """function(context, *inputs) of the live rows; key: how many tokens are new, what else."""
        def run(lengths, *inputs):
            fixed = copy.copy(context)
            fixed.lengths, fixed.passes, fixed.all_slots = lengths, None, True
            return function(fixed, *inputs), [state.inputs for state in mamba_states(context)]

        assert int(context.lengths.max()) + key[0] <= context.capacity, "prefill must reserve more"
        inputs, padded = (context.lengths, *inputs), len(self.live) < self.rows
        if padded:
            inputs = [x.new_zeros(self.rows, *x.shape[1:]).index_copy_(0, self.live.to(x.device), x)
                      for x in inputs]
        if key not in self.recorded:
            self.recorded[key] = run if not self.recording else record(
                run, [x.to(context.device, copy=True) for x in inputs],
                [x for state in mamba_states(context) for x in (state.conv_state, state.ssm_state)])
        out, self.drafts = self.recorded[key](*inputs)
        return out[self.live.to(out.device)] if padded and out is not None else out


def mamba_states(context) -> list:
    return [state for state in context.states if hasattr(state, "ssm_state")]


def record(function, buffers: list[Tensor], changed=()):
    """function(*buffers) as a CUDA graph, which keeps its own memory. What is returned copies its
    arguments, if any, to the buffers, replays the graph, and returns the same output again. A trial
    run leaves `changed` as it was; what it writes to caches a replay writes again."""
    kept, graph, device = [x.clone() for x in changed], torch.cuda.CUDAGraph(), buffers[0].device
    with torch.cuda.device(device):
        function(*buffers)                          # Triton compiles, libraries take their memory
        for tensor, old in zip(changed, kept):
            tensor.copy_(old)
        with torch.cuda.graph(graph, stream=capture_stream(device)):
            out = function(*buffers)

    def replay(*inputs):
        for buffer, x in zip(buffers, inputs):
            buffer.copy_(x, non_blocking=True)
        graph.replay()
        return out
    return replay
