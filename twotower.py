"""Nemotron-Labs-TwoTower in one file: a block-wise autoregressive diffusion language model.

Two copies of one hybrid network (Mamba-2, attention and mixture-of-experts layers) write text
together. The frozen causal **context tower** reads clean tokens and keeps, layer by layer, a
key/value cache or a Mamba-2 state. The **denoiser tower** fills a block of masked tokens in
parallel over a few steps: its layer i reads the context tower's cache or state of layer i, and
adaLN tells it how much of the block is still masked.

Map, top down (the file runs bottom up; numbers are its sections):

    8  TwoTower.generate_mask_diffusion   blocks -> steps -> commits, perhaps in a template
         .generate_speculative            drafts by the denoiser, verified by the context tower
         .score                           log-probabilities of given text
         .prefill / .extend               context tower over clean tokens -> Context
         .denoise                         denoiser tower over one noisy block, given a Context
         .diffusion_loss                  training: all blocks of a sequence in one pass
         .from_pretrained                 checkpoint -> model
    7  reading checkpoints
    6  choosing tokens: Sampler, predict, select_commits
    5  time conditioning (adaLN)
    4  modules: Tower -> Layer -> Mamba2 | Attention | MoE | MLP
    3  functions: causal_conv1d, ssd_scan, ssd_step, attention, route, moe_experts, norms
    2  state: Context of KVCache and MambaState; Span, where a pass reads and writes
    1  TwoTowerConfig

Needs torch, einops and safetensors; works when copied alone. Parameter names are those of the
checkpoint; the one exception is that the experts of a layer are stacked, so that
`experts.{e}.up_proj.weight` is `experts.up_proj.weight[e]` here.

Sources: arXiv 2606.26493v2 (TwoTower); arXiv 2405.21060 (Mamba-2, "SSD"); arXiv 2412.19437 2.1.2
(sigmoid routing with a correction bias); arXiv 2310.00426 2.3 (adaLN-single); the checkpoint
nvidia/Nemotron-Labs-TwoTower-30B-A3B-Base-BF16 (config.json, tensor names and shapes).

Dimension key, used in every shape comment ("f32": float32, or float64 in a float64 model):

    B batch    L tokens of this call   S cached tokens           Q tokens of a diffusion block
    D hidden   H heads                 G KV heads or B/C groups  K attention head size
    P Mamba head size                  N SSM state size          W convolution width
    E experts  A active experts        F expert width            V vocabulary    T = B*L tokens
    R rows of a batch that are still being written

A, B, C, D and dt of a Mamba-2 layer are tensors, named as in its paper; batch is b beside them.

Deviations from the released code (for one row they change nothing but the outputs named):
  - t is each row's own masked fraction, as in training; the release averages it over the batch.
  - prompts of different lengths batch together; a row that meets EOS ends alone; tokens after EOS
    are cut; one-token prompts and any max_new_tokens work.
  - top_k and top_p act in every mode; confidence_threshold is 0.8 unless given, the published
    operating point (0.9 in the released code).
  - a finite time_step_limit holds in every path; biased experts add nothing where not routed.
  - mock-AR keeps its context one token behind instead of storing the state before the last token
    (which the release leaves stale after a block).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import platform
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count, groupby
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


# ---------------------------------------------------------------------------------------------
# 1. Configuration


@dataclass(init=False)
class TwoTowerConfig:
    """The fields of config.json that the model uses, spelled as there; others are ignored.

    Fields without a default must be given.
    Raises: ValueError naming the field that is missing or impossible.
    """

    hidden_size: int                            # D
    num_hidden_layers: int
    hybrid_override_pattern: str                # M Mamba-2, * attention, E MoE, - MLP
    vocab_size: int                             # V
    layer_norm_epsilon: float
    mamba_num_heads: int                        # H of a Mamba layer
    mamba_head_dim: int                         # P
    n_groups: int                               # G of a Mamba layer; not n_group below
    ssm_state_size: int                         # N
    conv_kernel: int                            # W
    chunk_size: int                             # tokens per chunk of the scan
    num_attention_heads: int                    # H of an attention layer
    num_key_value_heads: int                    # G of an attention layer
    head_dim: int                               # K
    intermediate_size: int                      # width of a dense MLP
    n_routed_experts: int                       # E
    num_experts_per_tok: int                    # A
    moe_intermediate_size: int                  # F
    moe_shared_expert_intermediate_size: int    # width of the one shared expert
    norm_topk_prob: bool
    routed_scaling_factor: float
    n_group: int = 1                            # router groups
    topk_group: int = 1
    use_bias: bool = False                      # Mamba in_proj and out_proj
    use_conv_bias: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False
    mlp_hidden_act: str = "relu2"
    mamba_hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    residual_in_fp32: bool = False
    time_step_limit: tuple[float, float] = (0.0, math.inf)
    time_step_min: float = 0.001                # this and the next three: initialisation only
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    initializer_range: float = 0.02
    max_position_embeddings: int = 262144       # longest sequence; there are no positions
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    pad_token_id: int | None = 0
    mask_token_id: int | None = 3               # a convention of the release, not in its file

    def __init__(self, **fields):
        for field in dataclasses.fields(self):
            value = fields.get(field.name, field.default)
            if value is dataclasses.MISSING:
                raise ValueError(f"config: field {field.name!r} is missing")
            if field.name == "time_step_limit":
                value = field.default if value is None else value
                value = tuple(value) if isinstance(value, list | tuple) else (value,)
            setattr(self, field.name, value)
        self._validate()

    @classmethod
    def from_json(cls, path: str | os.PathLike) -> TwoTowerConfig:
        """Read config.json. Raises: ValueError naming the file and what is wrong with it."""
        fields = _read_json(Path(path))
        try:
            return cls(**fields)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @property
    def d_inner(self) -> int:
        """Channels of a Mamba layer: heads x head size (`expand` in the file is not used)."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels under the convolution: x, B and C."""
        return self.d_inner + 2 * self.n_groups * self.ssm_state_size

    def _validate(self):
        def require(ok: bool, name: str, rule: str):
            if not ok:
                raise ValueError(f"config: {name} is {getattr(self, name)!r}, but {rule}")

        kinds = {
            "int": (lambda v: type(v) is int and v > 0, "it must be a positive integer"),
            "float": (lambda v: type(v) in (int, float) and 0 < v < math.inf,
                      "it must be a positive number"),
            "bool": (lambda v: type(v) is bool, "it must be true or false"),
            "int | None": (lambda v: v is None or type(v) is int and 0 <= v < self.vocab_size,
                           f"it must be an id below vocab_size {self.vocab_size}")}
        for field in dataclasses.fields(self):
            if field.type in kinds:
                holds, rule = kinds[field.type]
                require(holds(getattr(self, field.name)), field.name, rule)
        pattern, limit = self.hybrid_override_pattern, self.time_step_limit
        require(isinstance(pattern, str), "hybrid_override_pattern", "it must be text")
        for letter in pattern:
            require(letter in "M*E-", "hybrid_override_pattern",
                    f"{letter!r} is no layer kind (M Mamba-2, * attention, E MoE, - MLP)")
        require(len(pattern) == self.num_hidden_layers, "num_hidden_layers",
                f"hybrid_override_pattern {pattern!r} has {len(pattern)} letters")
        for name, parts in (("num_attention_heads", "num_key_value_heads"),
                            ("mamba_num_heads", "n_groups"), ("n_routed_experts", "n_group")):
            require(getattr(self, name) % getattr(self, parts) == 0, name,
                    f"it must be a multiple of {parts} {getattr(self, parts)}")
        require(self.n_group == 1 or self.n_routed_experts >= 2 * self.n_group, "n_group",
                "a router group needs two experts or more")
        require(self.topk_group <= self.n_group, "topk_group", f"n_group is {self.n_group}")
        require(self.num_experts_per_tok <= self.n_routed_experts, "num_experts_per_tok",
                f"there are {self.n_routed_experts} experts")
        numbers = all(type(v) in (int, float) for v in limit)
        require(numbers and len(limit) == 2 and 0 <= limit[0] <= limit[1], "time_step_limit",
                "it must be [low, high] with 0 <= low <= high")
        require(self.time_step_min <= self.time_step_max, "time_step_min",
                f"time_step_max is {self.time_step_max}")
        require(self.mask_token_id is not None, "mask_token_id", "decoding needs one")
        require(self.mlp_hidden_act == "relu2", "mlp_hidden_act", "only relu2 is supported")
        require(self.mamba_hidden_act == "silu", "mamba_hidden_act", "only silu is supported")
        require(not self.tie_word_embeddings, "tie_word_embeddings", "each tower has its own head")


# ---------------------------------------------------------------------------------------------
# 2. State: what the context tower remembers, and where a pass reads and writes it


class Span(NamedTuple):
    """One pass of L new tokens per row over cached ones: where they go and what they may see.

    pass               new tokens see                       Mamba states returned
    prefill            the new ones before them (causal)    after the last token
    extend             all cached, the new ones before      after the last token, or (tentative)
                                                            a MambaScan: after any token
    denoise            all cached and all new ones          none
    train, clean       the new ones before them (causal)    before every block
    train, noisy       earlier clean blocks, own block      none
    """

    start: int | Tensor             # first cache slot of the new tokens; (B,) when rows differ
    end: int                        # cache slots in use with the new tokens, longest row
    # new tokens see every slot in use, unless it is said which:
    last_seen: Tensor | None = None # (B or 1, L) int64: those up to this one
    is_causal: bool = False         # those up to each token's own (the cache was empty)
    mask: Tensor | None = None      # (B or 1, 1, L, end) bool, True = visible: any others
    counts: Tensor | None = None    # (B,) real tokens of each row, the rest is padding; None = L
    keep_state: bool = True         # return the Mamba state after the pass; or instead,
    tentative: bool = False         # a MambaScan, or
    block_size: int | None = None   # the states before every block of this size

    @classmethod
    def make(cls, lengths: Tensor, L: int, device, *, for_context: bool, counts=None) -> Span:
        """L tokens appended to rows of `lengths` (B,) tokens (on the host, like counts)."""
        longest = int(lengths.max())
        uniform = bool((lengths == longest).all())
        counts = None if counts is None or bool((counts == L).all()) else counts.to(device)
        span = cls(longest, longest + L, counts=counts, keep_state=for_context)
        if uniform and (L == 1 or not for_context):
            return span                                     # every token sees every slot
        if longest == 0:
            return span._replace(is_causal=True)
        fixed = cls.fixed(lengths[:1] if uniform else lengths, L, span.end, for_context=for_context)
        start = longest if uniform else lengths.to(device)
        return span._replace(start=start, last_seen=fixed.last_seen.to(device))

    @classmethod
    def fixed(cls, lengths: Tensor, L: int, capacity: int, *, for_context: bool) -> Span:
        """The same with all `capacity` slots in use: nothing but the contents of tensors depends on
        lengths (B,), which may be on any device."""
        i = torch.arange(L, device=lengths.device)
        last_seen = lengths[:, None] + (i if for_context else i.new_full((L,), L - 1))
        return cls(lengths, capacity, last_seen, keep_state=for_context)


class MambaState(NamedTuple):
    """What a Mamba-2 layer carries from call to call.

    Extending a context by one token updates it in place, and recorded passes do so always; no other
    pass changes a state.
    """

    conv_state: Tensor              # (B, conv_dim, W) model dtype: raw inputs, newest last
    ssm_state: Tensor               # (B, H, P, N) float32 (float64 in a float64 model)

    def map(self, f) -> MambaState:
        return MambaState(f(self.conv_state), f(self.ssm_state))


class MambaScan(NamedTuple):
    """What went into a pass of a Mamba-2 layer: the state after any of its tokens follows."""

    history: Tensor                 # (B, W+L, conv_dim): the W old inputs of the convolution, L new
    x: Tensor                       # (B, L, H, P) model dtype: the inputs of the scan
    dt: Tensor                      # (B, L, H) f32
    A: Tensor                       # (H) f32
    B: Tensor                       # (B, L, G, N) model dtype
    ssm_state: Tensor               # (B, H, P, N) before the pass

    def after(self, counts: Tensor) -> MambaState:
        """The state after the first counts (B,) tokens of each row."""
        counts = counts.to(self.dt.device)
        kept = torch.arange(self.dt.shape[1], device=counts.device) < counts[:, None]
        with torch.autocast(self.x.device.type, enabled=False):     # as in ssd_scan
            ssm = ssd_state(wide(self.x), self.dt * kept[..., None], self.A, wide(self.B),
                            self.ssm_state)
        W = self.history.shape[1] - self.dt.shape[1]
        return MambaState(conv_state_after(self.history, counts, W), ssm)


class KVCache:
    """Keys and values of an attention layer in buffers with room to grow.

    Slots past a row's length are scratch: a denoiser writes its block there, reads context and
    block as one piece without copying the cache, and leaves the context as it was.
    """

    def __init__(self, key_cache: Tensor, value_cache: Tensor):
        self.key_cache = key_cache          # (B, G, capacity, K)
        self.value_cache = value_cache      # (B, G, capacity, K)

    def map(self, f) -> KVCache:
        return KVCache(f(self.key_cache), f(self.value_cache))

    def reserve(self, capacity: int):
        """Make room for `capacity` tokens a row, at least doubling, so that growth is amortised."""
        B, G, have, K = self.key_cache.shape
        if capacity > have:
            # zeros, not empty: a stray NaN in a masked slot would reach the output
            room = self.key_cache.new_zeros(B, G, max(capacity, 2 * have) - have, K)
            self.key_cache = torch.cat([self.key_cache, room], dim=2)
            self.value_cache = torch.cat([self.value_cache, room], dim=2)

    def write(self, k: Tensor, v: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        """Put k, v (B, G, L, K) where span says; return all slots in use, (B, G, end, K) views."""
        self.reserve(span.end)
        if isinstance(span.start, int):
            slots = (slice(None), slice(None), slice(span.start, span.start + k.shape[2]))
        else:
            rows = torch.arange(k.shape[0], device=k.device)[:, None]
            new = span.start[:, None] + torch.arange(k.shape[2], device=k.device)
            slots = (rows, slice(None), new)
            k, v = k.transpose(1, 2), v.transpose(1, 2)             # indexing gives (B, L, G, K)
        self.key_cache[slots], self.value_cache[slots] = k, v
        return self.key_cache[:, :, :span.end], self.value_cache[:, :, :span.end]


class Context:
    """What the context tower knows of a batch of rows: `prefill` makes it, `extend` grows it.

    lengths (B,) int64 on the host: tokens read so far, per row.
    logits (B, V) float32: the context head after each row's last token; None where not computed.
    states: per layer a KVCache (attention), a MambaState (Mamba-2) or None (MoE, MLP).
    """

    def __init__(self, tower: Tower, rows: int, capacity: int):
        self.device = tower.device
        self.states = tower.empty_states(rows, capacity)
        self.lengths = torch.zeros(rows, dtype=torch.long)
        self.logits: Tensor | None = None
        self.passes = None                              # kernels.Passes over this context, if any
        self._replica: list | None = None               # the states on another device
        self._sent = self.lengths                       # tokens of each row that the replica holds

    def select(self, rows: list[int]):
        """Keep only these rows, in this order."""
        if rows == list(range(len(self.lengths))):
            return
        self.states = [state and state.map(lambda x: x[rows]) for state in self.states]
        self._replica = self._replica and [state and state.map(lambda x: x[rows])
                                           for state in self._replica]
        self.lengths, self._sent = self.lengths[rows], self._sent[rows]
        self.logits = None if self.logits is None else self.logits[rows]
        self.passes = self.passes and self.passes.anew(self)

    def settle(self, counts: Tensor):
        """Keep only the first counts (B,) tokens of each row of the last, tentative pass.

        Keys and values past a row's length are scratch anyway; Mamba states are computed from the
        scan's inputs. No layer runs again.
        """
        self.states = [state.after(counts) if isinstance(state, MambaScan) else state
                       for state in self.states]
        self.lengths = self.lengths + counts
        self.logits = None

    def states_for(self, tower: Tower) -> list:
        """The states on the device of a denoiser tower.

        On the context's own device these are the states themselves. Elsewhere they are a replica,
        to which only what is new since the last call crosses: new KV rows and the Mamba states.
        """
        if tower.device == self.device:
            return self.states
        if self._replica is None:
            self._replica = tower.empty_states(len(self.lengths), 0)
        if not torch.equal(self._sent, self.lengths):
            slots = torch.arange(int(self.lengths.max()))
            new = (slots >= self._sent[:, None]) & (slots < self.lengths[:, None])
            row, slot = new.nonzero(as_tuple=True)
            for i, state in enumerate(self.states):
                if isinstance(state, MambaState):
                    self._replica[i] = state.map(lambda x: x.to(tower.device))
                elif isinstance(state, KVCache):
                    k, v = state.key_cache[row, :, slot], state.value_cache[row, :, slot]
                    copy = self._replica[i]
                    copy.reserve(state.key_cache.shape[2])
                    copy.key_cache[row, :, slot] = k.to(tower.device)
                    copy.value_cache[row, :, slot] = v.to(tower.device)
            self._sent = self.lengths
        return self._replica


# ---------------------------------------------------------------------------------------------
# 3. Pure functions


def wide(x: Tensor) -> Tensor:
    """x in float32 at least, where norms, scans, softmaxes and sums are computed."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


# On x86 torch's float32 product goes to MKL, which leaves AVX-512 unused on AMD; oneDNN, in the
# same build, uses it. Its float32 entry is an operator meant for torch.compile: hence the checks.
ONEDNN = (platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()
          and hasattr(torch.ops.mkldnn, "_linear_pointwise"))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., inputs) weight^T (outputs, inputs) + bias (outputs)."""
    if ONEDNN and x.is_cpu and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu"):
        large = x.numel() * weight.shape[0] >= 2**20    # smaller products do not repay its overhead
        if large and x.dtype == weight.dtype == torch.float32:
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last axis, in float32.

    Returned in the weight's dtype, the model's: x may be a float32 residual stream.
    """
    return F.rms_norm(wide(x), weight.shape, wide(weight), eps).to(weight.dtype)


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """RMS norm of y * silu(z) over each of `groups` groups of channels; the gate comes first.

    Args: y, z (..., d_inner); weight (d_inner). Returns: (..., d_inner) in y's dtype.
    """
    v = (wide(y) * F.silu(wide(z))).unflatten(-1, (groups, -1))
    v = F.rms_norm(v, v.shape[-1:], eps=eps).flatten(-2)
    return (v * weight).to(y.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: x * (1 + scale) + shift, for x (B, L, D) in n equal blocks with a (B, n, D) each."""
    blocks = x.unflatten(1, (shift.shape[1], -1))                                # (B, n, L/n, D)
    return torch.addcmul(shift[:, :, None], blocks, 1 + scale[:, :, None]).flatten(1, 2)


def modulated_rms_norm(x: Tensor, weight: Tensor, eps: float, shift: Tensor, scale: Tensor,
                       norm_first: bool) -> Tensor:
    """`modulate` after `rms_norm`, or before it."""
    if norm_first:
        return modulate(rms_norm(x, weight, eps), shift, scale)
    return rms_norm(modulate(x, shift, scale), weight, eps)


def add_gated(x: Tensor, gate: Tensor, h: Tensor) -> Tensor:
    """x + gate * h, for x and h (B, L, D) in n equal blocks with a gate (B, n, D) each."""
    x, h = (v.unflatten(1, (gate.shape[1], -1)) for v in (x, h))
    return torch.addcmul(x, gate[:, :, None], h).flatten(1, 2)


def causal_conv1d(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Depthwise causal convolution, then SiLU, in float32.

    Args:
        inputs (B, W-1+L, channels): the L new inputs behind the W-1 before them.
        weight (channels, 1, W), bias (channels) or None.
    Returns: (B, L, channels) in the inputs' dtype; output l reads inputs l .. l+W-1.
    """
    W = weight.shape[-1]
    L = inputs.shape[1] - W + 1
    x, taps = wide(inputs), wide(weight[:, 0]).mT.contiguous()                  # (W, channels)
    if L == 1:
        out = (x * taps).sum(1, keepdim=True)
    else:
        out = x[:, :L] * taps[0]
        for w in range(1, W):                   # W shifted products beat a depthwise conv1d on CPU
            out.addcmul_(x[:, w:w + L], taps[w])
    return F.silu(out if bias is None else out + wide(bias)).to(inputs.dtype)


def conv_state_after(history: Tensor, counts: Tensor, W: int) -> Tensor:
    """history (B, W+L, channels): W old inputs, then L new ones -> the convolution's state
    (B, channels, W) after the first counts (B,) of the new."""
    newest = counts[:, None] + torch.arange(W, device=history.device)
    return history[torch.arange(len(newest), device=history.device)[:, None], newest].mT


def ssd_rates(dt: Tensor, dt_bias: Tensor, A_log: Tensor, limit: tuple[float, float],
              counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The step sizes dt = softplus(dt + dt_bias), kept within `limit`, and A = -exp(A_log).

    Args: dt (b,L,H), dt_bias (H), A_log (H), counts (b) int64: the real tokens of each row.
    Returns: dt (b,L,H) f32, 0 from counts on, and A (H) f32.
    """
    dt = F.softplus(wide(dt) + dt_bias).clamp(*limit)
    if counts is not None:                                  # padding must not move the state
        dt = dt * (torch.arange(dt.shape[1], device=dt.device) < counts[:, None])[..., None]
    return dt, -wide(A_log).exp()


def ssd_step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor,
             state: Tensor, in_place: bool = False) -> tuple[Tensor, Tensor]:
    """One token of the Mamba-2 recurrence: h = exp(dt A) h + dt x (x) B; y = h C + D x.

    Args: x (b,H,P), B and C (b,G,N), D (H); f32: dt (b,H), A (H), state (b,H,P,N).
    Returns: y (b,H,P) in x's dtype and the new state, which is `state` itself if in_place.
    """
    b, H, P, N = state.shape
    dtype, x, B, C = x.dtype, wide(x), wide(B), wide(C)
    grouped = (b, B.shape[1], -1, P, N)
    decay = torch.exp(dt * A)[..., None, None]                                   # (b, H, 1, 1)
    h = (state.mul_(decay) if in_place else state * decay).view(grouped)         # (b, G, H/G, P, N)
    drive = (dt[..., None] * x).view(grouped[:4])
    h = h.addcmul_(drive[..., None], B[:, :, None, None])
    y = torch.einsum("bgrpn,bgn->bgrp", h, C).view(b, H, P)
    return torch.addcmul(y, wide(D)[:, None], x).to(dtype), h.view(b, H, P, N)


def ssd_chunk(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor,
              keep_state: bool = True) -> tuple[Tensor, Tensor | None]:
    """c tokens of the recurrence of `ssd_step` (without D) at once, as matrix products.

    Token l reads token s <= l with weight exp(sum of dt A over s+1..l) dt_s (C_l . B_s), and
    everything older through the state.

    Args: x (b,c,H,P), dt (b,c,H), A (H), B and C (b,c,G,N), state (b,H,P,N); all f32.
    Returns: y (b,c,H,P); the state after the chunk, or None if not keep_state.
    Source: arXiv 2405.21060, section 6.
    """
    b, c, H, P = x.shape
    G, N = B.shape[2:]
    u = x * dt[..., None]
    B, C = B.transpose(1, 2), C.transpose(1, 2)                                  # (b, G, c, N)
    log_decay = (dt * A).mT.contiguous().cumsum(-1)     # (b, H, c): sums of dt A up to each token
    # from token s to token l >= s: exp(sum over s+1..l); the rest is clamped, then cut by tril
    weight = (log_decay[..., :, None] - log_decay[..., None, :]).clamp_(max=0).exp_()
    weight = weight.unflatten(1, (G, -1)) * (C @ B.mT).tril()[:, :, None]        # (b, G, H/G, c, c)
    within = weight.flatten(1, 2) @ u.transpose(1, 2)                            # (b, H, c, P)
    # from the state to token l: exp(sum over 1..l)
    before = C @ state.view(b, G, -1, N).mT                                      # (b, G, c, H/G*P)
    before = rearrange(before, "b g c (r p) -> b (g r) c p", p=P)
    y = torch.addcmul(within, log_decay.exp()[..., None], before).transpose(1, 2)
    if not keep_state:
        return y, None
    return y, ssd_state(x, dt, A, B.transpose(1, 2), state)


def ssd_state(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, state: Tensor) -> Tensor:
    """The state (b,H,P,N) after the c tokens of a chunk; arguments as for `ssd_chunk`.

    Token s decays by exp(sum of dt A over s+1..c), the old state by exp(sum over all).
    """
    log_decay = (dt * A).cumsum(1)                                               # (b, c, H)
    u = x * (dt * (log_decay[:, -1:] - log_decay).exp())[..., None]
    added = u.unflatten(2, (B.shape[2], -1)).flatten(3).permute(0, 2, 3, 1) @ B.transpose(1, 2)
    total = log_decay[:, -1].exp()[..., None, None]                              # (b, H, 1, 1)
    return torch.addcmul(added.view(state.shape), state, total)


def ssd_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor,
             chunk_size: int, keep_state: bool = True, keep_chunks: bool = False):
    """The recurrence of `ssd_step` over L tokens, chunk by chunk; chunk_size changes only the cost.

    Args:
        x (b,L,H,P), B and C (b,L,G,N), D (H); f32: dt (b,L,H), A (H), state (b,H,P,N).
        A dt of 0 makes a token invisible: the state passes it unchanged.
        keep_state: return the state after the last token; keep_chunks: return instead the states
        before each chunk, (b, chunks, H, P, N).
    Returns: y (b,L,H,P) in x's dtype; the state(s), or None.
    """
    L, y, before = x.shape[1], [], []
    dtype, x, B, C = x.dtype, wide(x), wide(B), wide(C)
    with torch.autocast(x.device.type, enabled=False):          # the scan is never in bfloat16
        for start in range(0, L, chunk_size):
            if keep_chunks:
                before.append(state)
            xc, dtc, Bc, Cc = (v[:, start:start + chunk_size] for v in (x, dt, B, C))
            needed = keep_state or start + chunk_size < L
            yc, state = ssd_chunk(xc, dtc, A, Bc, Cc, state, needed)
            y.append(yc)
    y = torch.addcmul(torch.cat(y, dim=1), wide(D)[:, None], x).to(dtype)
    return y, torch.stack(before, dim=1) if keep_chunks else state


def attention(q: Tensor, k: Tensor, v: Tensor, last_seen: Tensor | None = None,
              is_causal: bool = False, mask: Tensor | None = None) -> Tensor:
    """Grouped-query attention, softmax(q k / sqrt(K)) v; query head h reads KV head h // (H/G).

    Args:
        q (B,H,L,K); k, v (B,G,keys,K).
        last_seen (B or 1, L) int64: the last key a query sees; is_causal: query l sees keys 0..l;
            mask (B or 1, 1, L, keys) bool, True = visible. With none of these: all keys.
    Returns: (B,H,L,K).
    """
    if last_seen is not None:
        mask = torch.arange(k.shape[2], device=k.device) <= last_seen[:, None, :, None]
    if is_causal or mask is not None and q.shape[2] > 64:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, enable_gqa=True)
    # without positions the H/G query heads of a KV head are just more queries to the same keys,
    # which is faster for few queries; the mask must be repeated for them
    mask = None if mask is None else mask.repeat(1, 1, q.shape[1] // k.shape[1], 1)
    grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])                  # (B, G, H/G*L, K)
    return F.scaled_dot_product_attention(grouped, k, v, mask).reshape(q.shape)


def route(x: Tensor, weight: Tensor, bias: Tensor, config: TwoTowerConfig) -> tuple[Tensor, Tensor]:
    """Choose A experts per token and their weights, in float64 as the release does.

    The correction bias decides who is chosen; the weights are the uncorrected sigmoid scores.

    Args: x (T, D); weight (E, D) and bias (E) float32.
    Returns: topk_ids (T, A) int64, topk_weights (T, A) float64.
    """
    scores = torch.sigmoid(F.linear(x.double(), weight.double()))               # (T, E)
    choice = scores + bias.double()
    if config.n_group > 1:
        groups = rearrange(choice, "t (g e) -> t g e", g=config.n_group)
        best = groups.topk(2, dim=-1).values.sum(-1).topk(config.topk_group, dim=-1).indices
        stays = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter_(1, best, True)
        # 0, not -inf, as published: a negative choice elsewhere can lose to a dropped expert
        choice = groups.masked_fill(~stays[..., None], 0.0).flatten(1)
    topk_ids = choice.topk(config.num_experts_per_tok, dim=-1).indices
    topk_weights = scores.gather(1, topk_ids)
    if config.norm_topk_prob:
        topk_weights = topk_weights / (topk_weights.sum(-1, keepdim=True) + 1e-20)
    return topk_ids, topk_weights * config.routed_scaling_factor


def moe_experts(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, up: Tensor, down: Tensor,
                up_bias: Tensor | None = None, down_bias: Tensor | None = None) -> Tensor:
    """Sum over each token's experts of weight * down(relu(up(x))^2); only experts hit are read.

    Args:
        x (T, D), topk_ids and topk_weights (T, A), up (E, F, D), down (E, D, F),
        up_bias (E, F) and down_bias (E, D) or None.
    Returns: (T, D) in x's dtype, summed in f32 in the order of the experts.
    """
    experts, order = topk_ids.flatten().sort(stable=True)       # (T*A,) pairs grouped by expert
    hit = [(expert, len(list(pairs))) for expert, pairs in groupby(experts.tolist())]
    counts = [count for _, count in hit]
    tokens = (order // topk_ids.shape[1]).split(counts)
    out = wide(torch.zeros_like(x))                                             # (T, D) f32
    weights = topk_weights.flatten()[order].to(out.dtype)[:, None].split(counts)
    if torch.is_grad_enabled():         # indexing would give each expert a gradient of full size
        up, down = up.unbind(), down.unbind()
    # plain F.linear: expert batches come in every size, and oneDNN compiles a kernel for each
    for (e, _), token, weight in zip(hit, tokens, weights):
        h = F.linear(x[token], up[e], None if up_bias is None else up_bias[e]).relu_().square()
        h = F.linear(h, down[e], None if down_bias is None else down_bias[e])
        out.index_add_(0, token, wide(h) * weight)
    return out.to(x.dtype)


def most_likely(logits: Tensor, mask_token_id: int | None = None) -> tuple[Tensor, Tensor]:
    """The best token but the mask token, and its probability under the softmax without it.

    Args: logits (..., V) f32.
    Returns: ids (...) int64; probabilities (...) f32, NaN where a logit is not finite.
    """
    finite = logits.isfinite().all(-1)
    logits = without(logits, mask_token_id)
    best, ids = logits.max(-1)
    return ids, (best - logits.logsumexp(-1)).exp().where(finite, math.nan)


def without(logits: Tensor, mask_token_id: int | None) -> Tensor:
    if mask_token_id is None:
        return logits
    return logits.index_fill(-1, torch.tensor(mask_token_id, device=logits.device), -math.inf)


# what modules call by name, so that a model can be given those of kernels.py instead
OPERATIONS = ("rms_norm", "modulated_rms_norm", "gated_rms_norm", "add_gated", "causal_conv1d",
              "ssd_rates", "ssd_scan", "ssd_step", "attention", "route", "moe_experts",
              "most_likely")
KERNELS = Path(__file__).with_name("kernels.py")


def operations(backend: str) -> SimpleNamespace:
    """The functions of this file ("torch") or of kernels.py beside it ("triton")."""
    functions = globals() if backend == "torch" else vars(kernels())
    return SimpleNamespace(**{name: functions[name] for name in OPERATIONS})


def kernels():
    """The module kernels.py. Raises: ValueError where it, or triton, cannot be had."""
    try:
        spec = importlib.util.spec_from_file_location("twotower_kernels", KERNELS)
        module = sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec))
        if not hasattr(module, OPERATIONS[0]):
            spec.loader.exec_module(module)
        return module
    except (ImportError, OSError) as error:
        sys.modules.pop("twotower_kernels", None)
        raise ValueError(f"backend 'triton' needs kernels.py beside twotower.py, and the package "
                         f"triton: {error}") from None


# ---------------------------------------------------------------------------------------------
# 4. Modules; attribute names are the checkpoint's


class Module(nn.Module):
    """A module that calls OPERATIONS as self.ops; `TwoTower.use` chooses whose they are."""

    ops = operations("torch")


class Linear(nn.Linear):
    """nn.Linear by way of `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class RMSNorm(Module):
    """RMS norm with a weight (D)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x, self.weight, self.eps)


class GatedRMSNorm(RMSNorm):
    """`gated_rms_norm` with a weight (d_inner)."""

    def __init__(self, size: int, groups: int, eps: float):
        super().__init__(size, eps)
        self.groups = groups

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        return self.ops.gated_rms_norm(y, z, self.weight, self.groups, self.eps)


class Mamba2(Module):
    """Mamba-2: in_proj -> convolution -> selective state-space scan -> gated norm -> out_proj."""

    def __init__(self, config: TwoTowerConfig):
        super().__init__()
        self.config = c = config
        width = c.d_inner + c.conv_dim + c.mamba_num_heads
        self.in_proj = Linear(c.hidden_size, width, bias=c.use_bias)
        self.conv1d = nn.Conv1d(c.conv_dim, c.conv_dim, c.conv_kernel, groups=c.conv_dim,
                                bias=c.use_conv_bias)               # holds the weights only
        self.A_log = nn.Parameter(torch.empty(c.mamba_num_heads))
        self.D = nn.Parameter(torch.empty(c.mamba_num_heads))
        self.dt_bias = nn.Parameter(torch.empty(c.mamba_num_heads))
        self.norm = GatedRMSNorm(c.d_inner, c.n_groups, c.layer_norm_epsilon)
        self.out_proj = Linear(c.d_inner, c.hidden_size, bias=c.use_bias)

    def empty_state(self, rows: int, capacity: int) -> MambaState:
        """The state before the first token: zeros."""
        c, weight = self.config, self.in_proj.weight
        ssm = (rows, c.mamba_num_heads, c.mamba_head_dim, c.ssm_state_size)
        return MambaState(weight.new_zeros(rows, c.conv_dim, c.conv_kernel),
                          wide(weight.new_zeros(ssm)))

    def forward(self, u: Tensor, state: MambaState, span: Span) -> tuple[Tensor, MambaState | None]:
        """u (B, L, D) -> (B, L, D) and the new state(s) as span asks."""
        c = self.config
        # training gives B*n states, one per block: a sequence then stands as n rows of L/n tokens
        rows = state.ssm_state.shape[0]
        z, xBC, dt = self.in_proj(u).reshape(rows, -1, self.in_proj.out_features).split(
            [c.d_inner, c.conv_dim, c.mamba_num_heads], dim=-1)
        L = xBC.shape[1]
        history = torch.cat([state.conv_state.mT, xBC], dim=1)                  # (b, W+L, conv_dim)
        xBC = self.ops.causal_conv1d(history[:, 1:], self.conv1d.weight, self.conv1d.bias)
        groups = c.n_groups * c.ssm_state_size
        xBC = xBC.to(u.dtype)           # other only under autocast, which must not round the scan
        x, B, C = xBC.split([c.d_inner, groups, groups], dim=-1)
        x = x.unflatten(-1, (c.mamba_num_heads, c.mamba_head_dim))              # (b, L, H, P)
        B = B.unflatten(-1, (c.n_groups, c.ssm_state_size))                     # (b, L, G, N)
        C = C.unflatten(-1, (c.n_groups, c.ssm_state_size))
        dt, A = self.ops.ssd_rates(dt, self.dt_bias, self.A_log, c.time_step_limit, span.counts)
        if L == 1 and span.block_size is None:
            y, ssm = self.ops.ssd_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], self.D,
                                       state.ssm_state, in_place=span.keep_state)
        else:
            y, ssm = self.ops.ssd_scan(x, dt, A, B, C, self.D, state.ssm_state,
                                       span.block_size or c.chunk_size, span.keep_state,
                                       keep_chunks=span.block_size is not None)
        new_state = (MambaScan(history, x, dt, A, B, state.ssm_state) if span.tentative else
                     self._state_after(state, history, ssm, span))
        y = self.norm(y.reshape(z.shape), z)
        return self.out_proj(y).reshape(u.shape), new_state

    def _state_after(self, state: MambaState, history: Tensor, ssm: Tensor,
                     span: Span) -> MambaState | None:
        """The state after the pass. history (b, W+L, conv_dim) is the W old inputs, then the L new
        ones, so that the convolution's state after n tokens is history[n : n+W]."""
        W = self.config.conv_kernel
        if span.block_size is not None:
            conv = history.unfold(1, W, span.block_size)[:, :ssm.shape[1]]  # (b, n, conv_dim, W)
            return MambaState(conv.flatten(0, 1), ssm.flatten(0, 1))
        if not span.keep_state:
            return None
        if span.counts is None:
            newest = history[:, -W:]
            if history.shape[1] == W + 1:                   # one token: in place, as ssd_step does
                return MambaState(state.conv_state.copy_(newest.mT), ssm)
            return MambaState(newest.clone().mT, ssm)       # a view would keep all of history alive
        return MambaState(conv_state_after(history, span.counts, W), ssm)


class Attention(Module):
    """Grouped-query attention without positional encoding."""

    def __init__(self, config: TwoTowerConfig):
        super().__init__()
        self.config = c = config
        query, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = Linear(c.hidden_size, query, bias=c.attention_bias)
        self.k_proj = Linear(c.hidden_size, kv, bias=c.attention_bias)
        self.v_proj = Linear(c.hidden_size, kv, bias=c.attention_bias)
        self.o_proj = Linear(query, c.hidden_size, bias=c.attention_bias)

    def empty_state(self, rows: int, capacity: int) -> KVCache:
        """A cache with room for `capacity` tokens a row."""
        shape = (rows, self.config.num_key_value_heads, capacity, self.config.head_dim)
        return KVCache(self.k_proj.weight.new_zeros(shape), self.v_proj.weight.new_zeros(shape))

    def forward(self, x: Tensor, cache: KVCache, span: Span) -> Tensor:
        """x (B, L, D) -> (B, L, D): queries of these L tokens over [cached tokens ; these L], as
        span allows: causal in the context tower, everything in the denoiser."""
        K = self.config.head_dim
        q, k, v = (proj(x).unflatten(-1, (-1, K)).transpose(1, 2)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))     # (B, H or G, L, K)
        k, v = cache.write(k, v, span)
        out = self.ops.attention(q, k, v, span.last_seen, span.is_causal, span.mask)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """down(relu(up(x))^2): a dense layer, or the shared expert of an MoE layer."""

    def __init__(self, config: TwoTowerConfig, width: int):
        super().__init__()
        self.up_proj = Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.down_proj = Linear(width, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.up_proj(x).relu_().square())


class Router(Module):
    """The gate of an MoE layer; its tensors stay float32 in a bfloat16 model."""

    def __init__(self, config: TwoTowerConfig):
        super().__init__()
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        E = config.n_routed_experts
        self.config = config
        self.weight = nn.Parameter(torch.empty(E, config.hidden_size, dtype=dtype))
        self.register_buffer("e_score_correction_bias", torch.zeros(E, dtype=dtype))

    def _apply(self, fn, recurse: bool = True):
        def without_rounding(tensor):                   # model.to(torch.bfloat16) moves, no more
            moved = fn(tensor)
            return moved if wide(moved) is moved else tensor.to(moved.device)

        return super()._apply(without_rounding, recurse)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.ops.route(x, self.weight, self.e_score_correction_bias, self.config)


class StackedLinear(nn.Module):
    """The same projection of every expert: weight (E, out, in), bias (E, out) or None."""

    def __init__(self, experts: int, inputs: int, outputs: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, outputs, inputs))
        self.bias = nn.Parameter(torch.empty(experts, outputs)) if bias else None


class MoE(Module):
    """Mixture of experts: the routed experts of each token plus the one shared expert."""

    def __init__(self, config: TwoTowerConfig):
        super().__init__()
        E, D, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate = Router(config)
        self.experts = nn.ModuleDict({"up_proj": StackedLinear(E, D, width, config.mlp_bias),
                                      "down_proj": StackedLinear(E, width, D, config.mlp_bias)})
        self.shared_experts = MLP(config, config.moe_shared_expert_intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)                                                # (T, D)
        topk_ids, topk_weights = self.gate(tokens)
        up, down = self.experts["up_proj"], self.experts["down_proj"]
        routed = self.ops.moe_experts(tokens, topk_ids, topk_weights, up.weight, down.weight,
                                      up.bias, down.bias)
        return routed.view(x.shape) + self.shared_experts(x)


class Layer(Module):
    """x + mixer(norm(x)); in the denoiser also shifted, scaled and gated by the noise level."""

    def __init__(self, config: TwoTowerConfig, kind: str):
        super().__init__()
        self.kind = kind
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = {"M": lambda: Mamba2(config), "*": lambda: Attention(config),
                      "E": lambda: MoE(config),
                      "-": lambda: MLP(config, config.intermediate_size)}[kind]()

    def forward(self, x: Tensor, state, span: Span, modulation=None):
        """x (B, L, D) -> (B, L, D) and the layer's new state.

        modulation: shift, scale and gate, (B, n, D) for n equal blocks of tokens, or None for
        neither modulation nor gate.
        Mamba and attention modulate before the norm, MoE and MLP after it.
        """
        shift, scale, gate = modulation or (None, None, None)
        if gate is None:
            h = self.norm(x)
        else:
            h = self.ops.modulated_rms_norm(x, self.norm.weight, self.norm.eps, shift, scale,
                                            norm_first=self.kind not in "M*")
        if self.kind == "M":
            h, state = self.mixer(h, state, span)
        elif self.kind == "*":
            h = self.mixer(h, state, span)
        else:
            h = self.mixer(h)
        return x + h if gate is None else self.ops.add_gated(x, gate, h), state


class Tower(nn.Module):
    """Embedding, layers, final norm; the head is beside it, as in the checkpoint."""

    def __init__(self, config: TwoTowerConfig):
        super().__init__()
        self.config = config
        embeddings = torch.empty(config.vocab_size, config.hidden_size)      # filled by TwoTower
        self.embeddings = nn.Embedding.from_pretrained(embeddings, freeze=False)
        self.layers = nn.ModuleList(Layer(config, kind) for kind in config.hybrid_override_pattern)
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)

    @property
    def device(self) -> torch.device:
        return self.embeddings.weight.device

    def empty_states(self, rows: int, capacity: int) -> list:
        """States before the first token, with room for `capacity` tokens a row in the caches."""
        return [layer.mixer.empty_state(rows, capacity) if layer.kind in "M*" else None
                for layer in self.layers]

    def forward(self, tokens: Tensor, states: list, span: Span, modulations=None):
        """tokens (B, L) -> normed hidden states (B, L, D) and the new states, one per layer."""
        x = self.embeddings(tokens)
        if self.config.residual_in_fp32:
            x = wide(x)
        new_states = []
        for i, layer in enumerate(self.layers):
            x, state = layer(x, states[i], span, None if modulations is None else modulations[i])
            new_states.append(state)
        return self.norm_f(x), new_states


# ---------------------------------------------------------------------------------------------
# 5. Time conditioning (adaLN-single): one embedding of t, one small table per layer


class TimestepEmbedder(nn.Module):
    """t in [0, 1] -> (B, D): 256 sinusoidal features of 1000 t (cosines first), then an MLP."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, hidden_size), nn.SiLU(),
                                 nn.Linear(hidden_size, hidden_size))

    @staticmethod
    def features(t: Tensor) -> Tensor:
        """(B,) -> (B, 256) float32. Frequencies and angles must be float32: at 1000 t more digits
        give another phase."""
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, device=t.device).float() / 128)
        angles = (t * 1000)[:, None].float() * frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=-1)

    def forward(self, t: Tensor) -> Tensor:
        dtype = self.mlp[0].weight.dtype            # t itself is rounded to it before the scaling
        return self.mlp(self.features(t.to(dtype)).to(dtype))


# ---------------------------------------------------------------------------------------------
# 6. Choosing tokens


class Step(NamedTuple):
    """What `on_step` is told: one denoiser step, or one token of an AR mode (a block of one)."""

    rows: list[int]             # R: the rows of the batch still being written
    block_index: int
    step: int                   # within the block
    t: Tensor                   # (R,) masked fraction before the step
    before: Tensor              # (R, Q) ids
    after: Tensor               # (R, Q) ids
    committed: Tensor           # (R, Q) bool: written in this step
    confidence: Tensor          # (R, Q) probability of the predicted token


class Written(NamedTuple):
    """What `on_tokens` is told of a row's new tokens, once they are final; True ends the row."""

    row: int
    new: list[int]              # ids, cut after EOS and at max_new_tokens
    ended: bool                 # nothing follows in any case
    nfe: int                    # what the row has cost so far
    context_passes: int


class Scores(NamedTuple):
    """Natural logarithms of the probabilities of each row's continuation."""

    tokens: list[Tensor]        # B tensors (n,) f32 on the host: each given all tokens before it
    total: Tensor               # (B,) float64: their sums


@dataclass
class Generation:
    """New tokens of each row, cut after EOS and at max_new_tokens, and what they cost."""

    tokens: list[Tensor]        # B tensors (n,) int64 on the host
    nfe: Tensor                 # (B,) int64: denoiser passes
    context_passes: Tensor      # (B,) int64: context tower passes, the prompt's included


def shape_logits(logits: Tensor, temperature: float, top_k: int | None = None,
                 top_p: float | None = None) -> Tensor:
    """logits (..., V) / temperature, with -inf outside the top_k and outside the top_p nucleus.

    top_p keeps the most likely tokens, up to and including the one that takes their total past it.
    """
    logits = logits.double() / temperature          # float32 overflows at tiny temperatures
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p is not None and top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True, stable=True)
        p = ordered.softmax(-1)
        beyond = p.cumsum(-1) - p > top_p           # what comes before already holds more
        logits = logits.masked_fill(beyond.scatter(-1, index, beyond), -math.inf)
    return logits


def gumbel_argmax(logits: Tensor, uniform: Tensor) -> Tensor:
    """A draw from softmax(logits): argmax(logits - log(-log(u))), u ~ U(0, 1) of logits' shape."""
    return (logits - (-uniform.log()).log()).argmax(-1)


@dataclass
class Sampler:
    """Greedy at temperature 0, else Gumbel-max draws from the shaped logits.

    generator: one torch.Generator for the batch, or a list with one per row, which makes a row's
    draws independent of the rows beside it; None is torch's default.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    generator: torch.Generator | Sequence[torch.Generator] | None = None

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}, but it must be 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}, but it must be 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, but it must be in (0, 1]")

    def draw(self, logits: Tensor, rows: list[int | None]) -> Tensor:
        """logits (R, ..., V) of these rows -> ids (R, ...); a row None draws nothing."""
        def uniform(shape, generator):
            device = logits.device if generator is None else generator.device
            return torch.rand(shape, generator=generator, device=device, dtype=torch.float64)

        if isinstance(self.generator, Sequence):
            idle = torch.full(logits.shape[1:], 0.5, dtype=torch.float64)
            u = torch.stack([idle if row is None else uniform(idle.shape, self.generator[row]).cpu()
                             for row in rows])
        else:
            u = uniform(logits.shape, self.generator)
        shaped = shape_logits(logits, self.temperature, self.top_k, self.top_p)
        return gumbel_argmax(shaped, u.to(logits.device))


def predict(logits: Tensor, sampler: Sampler, rows: list[int | None], mask_token_id: int | None,
            ops: SimpleNamespace = Module.ops):
    """What a pass proposes for every position; never the mask token, where one is given.

    Args: logits (R, Q, V) f32.
    Returns: ids (R, Q) and confidence (R, Q), the probability of each under the softmax at
    temperature 1, or NaN where a logit is not finite; both on the host.
    """
    if sampler.temperature == 0:
        ids, confidence = ops.most_likely(logits, mask_token_id)
    else:
        finite = logits.isfinite().all(-1)
        logits = without(logits, mask_token_id)
        ids = sampler.draw(logits, rows)
        confidence = (logits.gather(-1, ids[..., None])[..., 0] - logits.logsumexp(-1)).exp()
        confidence = confidence.where(finite, math.nan)
    both = torch.stack([ids.double(), confidence.double()]).cpu()       # one transfer, one wait
    return both[0].long(), both[1].to(confidence.dtype)


def select_commits(confidence: Tensor, masked: Tensor, confidence_threshold: float,
                   steps_left: int) -> Tensor:
    """Which masked positions take their prediction in this step, row by row.

    All of them on the last step; else as many as are more confident than the threshold, but at
    least one and at least an even share of what is left; the most confident ones go first.

    Args: confidence (R, Q); masked (R, Q) bool; steps_left counts this step (1 = the last).
    Returns: (R, Q) bool, a subset of masked.
    """
    left = masked.sum(-1)
    sure = (masked & (confidence > confidence_threshold)).sum(-1)
    share = (left + steps_left - 1) // steps_left               # on the last step: all of them
    n = sure.maximum(share).clamp(min=1).minimum(left)
    ranked = confidence.where(masked, -math.inf).argsort(dim=-1, descending=True, stable=True)
    return masked & (ranked.argsort(dim=-1) < n[:, None])


class Unmasking(NamedTuple):
    """How the denoiser fills the masked positions of a block."""

    mask_token_id: int
    steps_per_block: int
    confidence_threshold: float


class _Rows:
    """Bookkeeping of a generation: the text so far, which rows are still written, their passes."""

    def __init__(self, max_new_tokens: list[int], eos_token_id: int | None, on_tokens,
                 templates: list[Tensor]):
        rows = len(max_new_tokens)
        self.templates = templates
        self.live = list(range(rows))
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self.max_new_tokens, self.eos_token_id = max_new_tokens, eos_token_id
        self.on_tokens = on_tokens
        self.nfe = torch.zeros(rows, dtype=torch.long)
        self.context_passes = torch.zeros(rows, dtype=torch.long)

    def append(self, new: Sequence[Tensor]) -> list[int]:
        """Add ids, R tensors (n,), up to the length asked for and an EOS after the template; return
        who goes on (0..R-1)."""
        going = []
        for r, (row, left) in enumerate(zip(self.live, self.left().tolist())):
            ids = new[r][:left].tolist()
            eos_from = max(0, len(self.templates[row]) - len(self.tokens[row]))
            ended = len(ids) == left
            if self.eos_token_id in ids[eos_from:]:
                ids, ended = ids[:ids.index(self.eos_token_id, eos_from) + 1], True
            self.tokens[row] += ids
            if self.on_tokens is not None:
                passes = int(self.nfe[row]), int(self.context_passes[row])
                ended = self.on_tokens(Written(row, ids, ended, *passes)) or ended
            if not ended:
                going.append(r)
        self.live = [self.live[r] for r in going]
        return going

    def next_block(self, block_size: int, mask_token_id: int) -> tuple[Tensor, Tensor]:
        """For each live row its template's tokens, where it has some, and masks (R, Q); and which
        positions must be filled (R, Q): all but those past the end of a template."""
        block = torch.full((len(self.live), block_size), mask_token_id)
        wanted = torch.ones_like(block, dtype=torch.bool)
        for r, row in enumerate(self.live):
            template = self.templates[row]
            rest = template[len(self.tokens[row]):][:block_size]
            block[r, :len(rest)] = rest
            if len(template) == self.max_new_tokens[row]:
                wanted[r, len(rest):] = False
        return block, wanted

    def left(self) -> Tensor:
        """(R,): how many tokens each live row may still get."""
        return torch.tensor([self.max_new_tokens[row] - len(self.tokens[row])
                             for row in self.live])

    def last_tokens(self) -> Tensor:
        """(R, 1): the newest token of each live row."""
        return torch.tensor([self.tokens[row][-1:] for row in self.live])

    def result(self) -> Generation:
        tokens = [torch.tensor(row, dtype=torch.long) for row in self.tokens]
        return Generation(tokens, self.nfe, self.context_passes)


# ---------------------------------------------------------------------------------------------
# 7. Checkpoint files

INDEX = "model.safetensors.index.json"
CHECKPOINT_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
DENOISER_KEYS = ("denoiser_tower.", "lm_head.", "t_embedder.", "t_block.", "scale_shift_tables.")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return value


def _write_json(path: Path, value: dict):
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _checkpoint_tensors(model: nn.Module) -> dict[str, list[tuple[str, Tensor]]]:
    """For each of our tensors its names and parts in a checkpoint: stacked experts have many."""
    names = {}
    for name, tensor in model.state_dict().items():
        stacked = ".mixer.experts." in name
        names[name] = [(name.replace(".experts.", f".experts.{e}."), tensor[e])
                       for e in range(len(tensor))] if stacked else [(name, tensor)]
    return names


def _tensor(model: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(owner), leaf)


def _set_tensor(model: nn.Module, name: str, tensor: Tensor):
    """Replace a parameter or buffer, whatever the new dtype and device."""
    owner, _, leaf = name.rpartition(".")
    if isinstance(_tensor(model, name), nn.Parameter):
        tensor = nn.Parameter(tensor)
    setattr(model.get_submodule(owner), leaf, tensor)


def _checkpoint_files(directory: Path, wanted: Callable[[str], bool]) -> dict[Path, set[str]]:
    """The safetensors files that hold wanted keys, each with the keys that an index promises."""
    index = directory / INDEX
    if not index.exists():
        path = directory / "model.safetensors"
        if not path.exists():
            raise ValueError(f"{directory} holds neither model.safetensors nor {INDEX}")
        return {path: set()}
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map")
    files: dict[Path, set[str]] = {}
    for key, name in weight_map.items():
        if not isinstance(name, str) or not re.fullmatch(r"[^/\\]+\.safetensors", name):
            raise ValueError(f"{index} places {key} in {name!r}, which is no safetensors file name")
        if wanted(key):
            files.setdefault(directory / name, set()).add(key)
    for path, keys in files.items():
        if not path.is_file():
            raise ValueError(f"{path} is missing; {index.name} places {len(keys)} tensors in it")
    return files


def _check_headers(directory: Path, model: TwoTower) -> dict[str, tuple[Path, torch.dtype]]:
    """The file and dtype of every tensor of the model, after checking names and shapes of all."""
    shapes = {key: list(part.shape) for parts in _checkpoint_tensors(model).values()
              for key, part in parts}

    def wanted(key: str) -> bool:
        return model.denoiser_tower is not None or not key.startswith(DENOISER_KEYS)

    found: dict[str, tuple[Path, torch.dtype]] = {}
    for path, promised in _checkpoint_files(directory, wanted).items():
        try:
            with safe_open(path, "pt") as file:
                header = {key: file.get_slice(key) for key in file.keys() if wanted(key)}
                header = {key: (part.get_shape(), part.get_dtype()) for key, part in header.items()}
        except SafetensorError as error:
            raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from None
        for key in sorted(promised - header.keys()):
            raise ValueError(f"{path} lacks tensor {key}, which {INDEX} places in it")
        for key, (shape, kind) in header.items():
            if key not in shapes:
                raise ValueError(f"{path} holds tensor {key}, which the config has no place for")
            if key in found:
                raise ValueError(f"tensor {key} is in both {found[key][0].name} and {path.name}")
            if shape != shapes[key]:
                raise ValueError(f"{path}: tensor {key} has shape {shape}, expected {shapes[key]}")
            if kind not in DTYPES:
                raise ValueError(f"{path}: tensor {key} has dtype {kind}, expected {list(DTYPES)}")
            found[key] = (path, DTYPES[kind])
    missing = [key for key in shapes if key not in found]
    if missing:
        raise ValueError(f"{directory} lacks {len(missing)} of {len(shapes)} tensors, "
                         f"first {missing[0]}")
    return found


# ---------------------------------------------------------------------------------------------
# 8. The model


class TwoTower(Module):
    """Context tower, denoiser tower, their heads and the time conditioning.

    TwoTower(config) initialises as for training from scratch, on torch's default device and in
    its default dtype. towers="context" leaves the denoiser out: AR and scores only.
    """

    backend, graphs = "torch", False    # see `use`

    def __init__(self, config: TwoTowerConfig, *, towers: str = "both"):
        super().__init__()
        if towers not in ("both", "context"):
            raise ValueError(f"towers is {towers!r}, but it must be 'both' or 'context'")
        self.config = config
        D, V = config.hidden_size, config.vocab_size
        self.context_tower = Tower(config)
        self.context_lm_head = Linear(D, V, bias=False)
        self.denoiser_tower = None
        if towers == "both":
            self.denoiser_tower = Tower(config)
            self.lm_head = Linear(D, V, bias=False)
            self.t_embedder = TimestepEmbedder(D)
            self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(D, 3 * D))
            self.scale_shift_tables = nn.ParameterList(
                torch.empty(3, D) for _ in range(config.num_hidden_layers))
        if not self.context_lm_head.weight.is_meta:
            self.apply(self._initialise)

    def _initialise(self, module: nn.Module):
        c = self.config
        if isinstance(module, nn.ParameterList):
            for table in module:
                nn.init.normal_(table, std=c.hidden_size ** -0.5)
        elif isinstance(module, nn.Linear | nn.Embedding | Router | StackedLinear):
            nn.init.normal_(module.weight, std=c.initializer_range)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, Mamba2):
            # dt starts log-uniform in [time_step_min, time_step_max], through an inverse softplus
            low, high = math.log(c.time_step_min), math.log(c.time_step_max)
            with torch.no_grad():
                dt = torch.empty_like(module.dt_bias).uniform_(low, high).exp()
                dt = dt.clamp(min=c.time_step_floor)
                module.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
                module.A_log.copy_(torch.arange(1, c.mamba_num_heads + 1).log())
                module.D.fill_(1.0)

    # -- context tower ------------------------------------------------------------------------

    def prefill(self, prompts: Tensor | Sequence[Tensor], *, reserve: int = 0) -> Context:
        """Read prompts with the context tower.

        Args:
            prompts: (B, L) int64, or a list of ids for each row, of any lengths >= 1.
            reserve: room to allocate in the caches for this many more tokens a row.
        Returns: a Context; its logits are those after each row's last token.
        Raises: ValueError for an empty prompt, an id out of range, too long a prompt.
        """
        prompts = self._check_prompts(prompts)
        with torch.no_grad():
            return self._prefill(prompts, reserve)

    def extend(self, context: Context, tokens: Tensor) -> Tensor:
        """Append tokens (B, L) int64 to the context; returns their logits (B, L, V) float32."""
        tokens = self._check_ids(tokens, "tokens", rows=len(context.lengths))
        self._check_length(int(context.lengths.max()) + tokens.shape[1])
        with torch.no_grad():
            return self._extend(context, tokens, logits="all")

    def context_logits(self, tokens: Tensor) -> Tensor:
        """tokens (B, L) -> (B, L, V) float32 in one causal pass; differentiable."""
        tokens = self._check_ids(tokens, "tokens")
        context = Context(self.context_tower, *tokens.shape)
        return self._extend(context, tokens, logits="all")

    def _prefill(self, prompts: list[Tensor], reserve: int, logits: str | None = "last",
                 repeats: bool = False) -> Context:
        """repeats: what follows are equal passes over the same rows, which can be recorded."""
        counts = torch.tensor([len(prompt) for prompt in prompts])
        L = int(counts.max())
        context = Context(self.context_tower, len(prompts), L + reserve)
        if L > 0:
            tokens = nn.utils.rnn.pad_sequence(prompts, batch_first=True)
            self._extend(context, tokens, counts, logits)
        if repeats and self.graphs:
            context.passes = kernels().Passes(self, context, Span.fixed)
        return context

    def _extend(self, context: Context, tokens: Tensor, counts: Tensor | None = None,
                logits: str | None = None, tentative: bool = False) -> Tensor | None:
        """Read tokens (B, L), the first counts (B,) of each row; logits: "all", "last" or None.

        tentative: how many of them stay is said later, by `Context.settle`.
        """
        if context.passes is not None:
            assert counts is None and not tentative and logits != "all"
            return context.passes.extend(context, tokens, logits)
        L = tokens.shape[1]
        span = Span.make(context.lengths, L, context.device, for_context=True, counts=counts)
        span = span._replace(tentative=tentative, keep_state=not tentative)
        hidden, context.states = self.context_tower(tokens.to(context.device), context.states, span)
        if not tentative:
            context.lengths = context.lengths + (L if counts is None else counts)
        context.logits = None
        if logits is None:
            return None
        if logits == "last":
            hidden = (hidden[:, -1:] if counts is None else
                      hidden[torch.arange(len(hidden)), counts - 1][:, None])
        out = wide(self.context_lm_head(hidden))
        context.logits = out[:, -1]
        return out

    @torch.no_grad()
    def score(self, prompts, continuations, tokens_per_pass: int = 512) -> Scores:
        """Log-probabilities of continuations of prompts under the context tower.

        Args:
            prompts, continuations: as for `prefill`, one continuation for each prompt.
            tokens_per_pass: longer texts take several passes, whose memory grows with the text
                only by the KV cache and a mask of one pass's queries over it.
        Raises: ValueError as `prefill` does, or for logits that are not finite.
        """
        prompts = self._check_prompts(prompts)
        continuations = self._check_prompts(continuations, "continuation")
        if len(prompts) != len(continuations):
            raise ValueError(f"{len(continuations)} continuations for {len(prompts)} prompts")
        self._check_positive(tokens_per_pass, "tokens_per_pass")
        texts = [torch.cat(pair) for pair in zip(prompts, continuations)]
        self._check_length(max(map(len, texts)))
        read = torch.tensor([len(text) - 1 for text in texts])      # the last token is only scored
        live, scores = list(range(len(texts))), [[] for _ in texts]
        context = Context(self.context_tower, len(texts), int(read.max()))
        for start in range(0, int(read.max()), tokens_per_pass):
            going = [r for r, row in enumerate(live) if read[row] > start]
            context.select(going)
            live = [live[r] for r in going]
            ends = read[live].clamp(max=start + tokens_per_pass)
            tokens = nn.utils.rnn.pad_sequence(
                [texts[row][start:end] for row, end in zip(live, ends)], batch_first=True)
            # the logits after token i are those of token i + 1
            firsts = [max(start, len(prompts[row]) - 1) for row in live]
            scored = any(first < end for first, end in zip(firsts, ends))
            logits = self._extend(context, tokens, ends - start, "all" if scored else None)
            for r, (row, first, end) in enumerate(zip(live, firsts, ends)):
                if first < end:
                    labels = texts[row][first + 1:end + 1].to(logits.device)
                    scores[row].append(-F.cross_entropy(logits[r, first - start:end - start],
                                                        labels, reduction="none").cpu())
            logits = context.logits = None              # before the next pass makes its own
        scores = [torch.cat(pieces) for pieces in scores]
        for row, one in enumerate(scores):
            if not one.isfinite().all():
                raise ValueError(f"the log-probabilities of continuation {row} are not finite")
        return Scores(scores, torch.stack([one.double().sum() for one in scores]))

    # -- denoiser tower -----------------------------------------------------------------------

    def denoise(self, block: Tensor, context: Context, t: Tensor | float | None = None) -> Tensor:
        """One denoiser pass over a noisy block that follows each row's context.

        Args:
            block (B, Q) int64, masked positions hold mask_token_id.
            t (B,) or a number in [0, 1]: the masked fraction; None: no modulation and no gate.
        Returns: (B, Q, V) float32 logits; the context stays as it was (but for scratch slots).
        """
        self._need_denoiser()
        block = self._check_ids(block, "block", rows=len(context.lengths))
        t = None if t is None else self._check_t(t, len(block))
        with torch.no_grad():
            return self._denoise(block, context, t)

    def _denoise(self, block: Tensor, context: Context, t: Tensor | None) -> Tensor:
        device = self.denoiser_tower.device
        span = Span.make(context.lengths, block.shape[1], device, for_context=False)
        return self._denoiser_logits(block, context, span, t)

    def _denoiser_logits(self, tokens: Tensor, context: Context, span: Span,
                         t: Tensor | None) -> Tensor:
        if context.passes is not None:
            return context.passes.denoise(context, tokens, t)
        tower = self.denoiser_tower
        modulations = None if t is None else self._modulations(t.to(tower.device))
        hidden, _ = tower(tokens.to(tower.device), context.states_for(tower), span, modulations)
        return wide(self.lm_head(hidden))

    def _modulations(self, t: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Per layer (shift, scale, gate): (B, 1, D) for t (B,), (B, n, D) for t (B, n)."""
        D = self.config.hidden_size
        embedding = self.t_block(self.t_embedder(t.flatten())).view(len(t), -1, 3, D)
        tables = torch.stack(list(self.scale_shift_tables))[:, None, None] + embedding
        return [table.unbind(2) for table in tables.unbind(0)]

    # -- training -----------------------------------------------------------------------------

    def diffusion_logits(self, clean: Tensor, noisy: Tensor, t: Tensor, block_size: int) -> Tensor:
        """Denoiser logits of every noisy block given the clean blocks before it, in one pass.

        Block b attends to clean tokens before it and to all of itself; its Mamba layers start from
        the context's states after block b-1. Equal to `denoise` block by block; differentiable in
        the denoiser's parameters only.

        Args: clean, noisy (B, M) int64 with M a multiple of block_size; t in [0, 1], (B,) for one
            noise level per sequence as published, or (B, n) for one per block.
        Returns: (B, M, V) float32.
        Source: arXiv 2606.26493, training.
        """
        self._need_denoiser()
        clean, noisy = self._check_ids(clean, "clean"), self._check_ids(noisy, "noisy")
        B, M = clean.shape
        if block_size < 1 or M % block_size or noisy.shape != clean.shape:
            raise ValueError(f"clean is {tuple(clean.shape)} and noisy {tuple(noisy.shape)}, but "
                             f"both must be (B, M), M a multiple of block_size {block_size}")
        t = self._check_t(t, B, M // block_size)
        context = Context(self.context_tower, B, 2 * M)     # noisy keys go behind the clean ones
        with torch.no_grad():
            span = Span(0, M, is_causal=True, keep_state=False, block_size=block_size)
            _, context.states = self.context_tower(clean.to(context.device), context.states, span)
        context.lengths = context.lengths + M
        device = self.denoiser_tower.device
        block = torch.arange(M, device=device) // block_size
        clean_seen, noisy_seen = block < block[:, None], block == block[:, None]     # (M, M)
        mask = torch.cat([clean_seen, noisy_seen], dim=1)[None, None]
        span = Span(M, 2 * M, mask=mask, keep_state=False)
        return self._denoiser_logits(noisy, context, span, t)

    def diffusion_loss(self, tokens: Tensor, block_size: int,
                       generator: torch.Generator | None = None) -> Tensor:
        """The denoiser's training loss on clean tokens (B, M): a scalar.

        One t ~ U[0.001, 1] per sequence; each token is masked with probability t; mean
        cross-entropy over all masked positions, labels not shifted, no 1/t weight.
        """
        def uniform(*shape):
            device = tokens.device if generator is None else generator.device
            return torch.rand(shape, generator=generator, device=device).to(tokens.device)

        t = 0.001 + 0.999 * uniform(tokens.shape[0])
        masked = uniform(*tokens.shape) < t[:, None]
        noisy = tokens.masked_fill(masked, self.config.mask_token_id)
        logits = self.diffusion_logits(tokens, noisy, t, block_size)
        masked = masked.to(logits.device)
        loss = F.cross_entropy(logits[masked], tokens.to(logits.device)[masked], reduction="sum")
        return loss / masked.sum().clamp(min=1)

    def ar_loss(self, tokens: Tensor) -> Tensor:
        """Mean next-token cross-entropy of the context tower on tokens (B, L), L >= 2: a scalar."""
        if self._check_ids(tokens, "tokens").shape[1] < 2:
            raise ValueError("an AR loss needs sequences of two tokens or more")
        logits = self.context_logits(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten().to(logits.device))

    @torch.no_grad()
    def copy_context_to_denoiser(self):
        """Start the denoiser as a copy of the context tower, as the published recipe does."""
        self._need_denoiser()
        self.denoiser_tower.load_state_dict(self.context_tower.state_dict())
        self.lm_head.load_state_dict(self.context_lm_head.state_dict())

    # -- decoding -----------------------------------------------------------------------------

    @torch.no_grad()
    def generate_ar(self, prompts, max_new_tokens: int | Sequence[int],
                    temperature: float = 0.0, *, top_k: int | None = None,
                    top_p: float | None = None,
                    eos_token_id: int | None = None, generator=None,
                    on_step: Callable[[Step], None] | None = None,
                    on_tokens: Callable[[Written], bool | None] | None = None) -> Generation:
        """Continue prompts with the context tower, one token at a time.

        Args:
            prompts: as for `prefill`. max_new_tokens: for all rows, or one for each.
            eos_token_id: None never stops early.
            temperature, top_k, top_p, generator: see `Sampler`. on_step: called once a token.
            on_tokens: called with a `Written` for each row that got tokens; True ends the row.
        Raises: ValueError for impossible arguments, or for logits that are not finite.
        """
        sampler = Sampler(temperature, top_k, top_p, generator)
        prompts, rows = self._start(prompts, max_new_tokens, eos_token_id, sampler, on_tokens)
        context = self._prefill(prompts, reserve=max(rows.max_new_tokens), repeats=True)
        rows.context_passes += 1
        while True:
            going = self._emit(context.logits, sampler, rows, on_step)
            if not rows.live:
                return rows.result()
            context.select(going)
            self._extend(context, rows.last_tokens(), logits="last")
            rows.context_passes[rows.live] += 1

    @torch.no_grad()
    def generate_mock_ar(self, prompts, max_new_tokens: int | Sequence[int],
                         temperature: float = 0.0, *, top_k: int | None = None,
                         top_p: float | None = None,
                         eos_token_id: int | None = None, generator=None,
                         on_step: Callable[[Step], None] | None = None,
                         on_tokens: Callable[[Written], bool | None] | None = None) -> Generation:
        """The denoiser as an AR model, a check of the plumbing; arguments as for `generate_ar`.

        It reads the last token with no time conditioning, given the context before that token, so
        the context stays one token behind the text.
        """
        self._need_denoiser()
        sampler = Sampler(temperature, top_k, top_p, generator)
        prompts, rows = self._start(prompts, max_new_tokens, eos_token_id, sampler, on_tokens)
        context = self._prefill([prompt[:-1] for prompt in prompts], max(rows.max_new_tokens),
                                logits=None)
        rows.context_passes += context.lengths > 0
        last = torch.stack([prompt[-1:] for prompt in prompts])                  # (R, 1)
        while True:
            logits = self._denoise(last, context, None)[:, 0]
            rows.nfe[rows.live] += 1
            going = self._emit(logits, sampler, rows, on_step)
            if not rows.live:
                return rows.result()
            context.select(going)
            self._extend(context, last[going])
            rows.context_passes[rows.live] += 1
            last = rows.last_tokens()

    @torch.no_grad()
    def generate_mask_diffusion(self, prompts, max_new_tokens: int | Sequence[int] | None = None,
                                block_size: int = 16, steps_per_block: int = 16,
                                mask_token_id: int | None = None, temperature: float = 0.0, *,
                                confidence_threshold: float = 0.8,
                                top_k: int | None = None, top_p: float | None = None,
                                template: Sequence | None = None,
                                eos_token_id: int | None = None, generator=None,
                                on_step: Callable[[Step], None] | None = None,
                                on_tokens: Callable[[Written], bool | None] | None = None
                                ) -> Generation:
        """Continue prompts block by block, committing confident tokens in parallel.

        Args:
            prompts, max_new_tokens, eos_token_id, temperature, top_k, top_p, generator, on_tokens:
                as for `generate_ar`; the sampling knobs shape the draw, never the confidence.
            block_size: tokens denoised together; the last block is denoised whole, then cut.
            steps_per_block: denoiser passes a block may take at most.
            confidence_threshold: gamma; 0.8 is the published operating point.
            mask_token_id: None takes the config's.
            template: ids that the new text begins with, mask_token_id where it is to be filled in;
                one sequence for all rows, or one (or None) for each. Its tokens stand in their
                blocks from the first step as if committed. The text ends with the template unless
                max_new_tokens is larger; EOS ends it only after the template.
            on_step: called with a `Step` after every denoiser pass.
        Raises: ValueError for impossible arguments, or for logits that are not finite.
        """
        self._need_denoiser()
        sampler = Sampler(temperature, top_k, top_p, generator)
        unmasking = self._unmasking(mask_token_id, steps_per_block, confidence_threshold)
        self._check_positive(block_size, "block_size")
        self._check_length(block_size)
        prompts, rows = self._start(prompts, max_new_tokens, eos_token_id, sampler, on_tokens,
                                    template)
        blocks = -(-max(rows.max_new_tokens) // block_size)
        context = self._prefill(prompts, blocks * block_size, logits=None, repeats=True)
        rows.context_passes += 1
        for block_index in range(blocks):
            block, wanted = rows.next_block(block_size, unmasking.mask_token_id)
            block = self._fill(block, wanted, context, rows, block_index, unmasking, sampler,
                               on_step)
            going = rows.append(block)
            if not rows.live:
                break
            context.select(going)
            self._extend(context, block[going])
            rows.context_passes[rows.live] += 1
        return rows.result()

    @torch.no_grad()
    def generate_speculative(self, prompts, max_new_tokens: int | Sequence[int],
                             draft_length: int = 16, steps_per_block: int = 1,
                             mask_token_id: int | None = None, temperature: float = 0.0, *,
                             confidence_threshold: float = 0.8,
                             top_k: int | None = None, top_p: float | None = None,
                             eos_token_id: int | None = None, generator=None,
                             on_step: Callable[[Step], None] | None = None,
                             on_tokens: Callable[[Written], bool | None] | None = None
                             ) -> Generation:
        """What `generate_ar` writes, in fewer passes of the context tower.

        The denoiser drafts the rest of a block whose first token is known; one context pass over
        the block gives AR's choice after each of its tokens. The draft is kept as far as it is what
        AR chose; AR's choice after that begins the next block.

        The same token for token, as far as a pass over a block rounds as passes over single tokens
        do: tested in float32; in bfloat16 a near tie may fall the other way. Sampling takes AR's
        draws: with one generator per row, or one row, they are those of `generate_ar`; with one for
        many rows only the distribution is the same.

        Args:
            prompts, max_new_tokens, eos_token_id, temperature, top_k, top_p, generator, on_tokens:
                as for `generate_ar`.
            draft_length: tokens of a block, the known one included.
            steps_per_block, mask_token_id, confidence_threshold: of the drafts, which are greedy,
                as for `generate_mask_diffusion`. By default one pass fills the whole draft: wrong
                tokens cost nothing but the rest of their block, a second pass costs a pass.
            on_step: called after every denoiser pass; block_index counts the drafts.
        Raises: ValueError for impossible arguments, or for logits that are not finite.
        Source: arXiv 2211.17192 (speculative decoding), with AR's draw in place of rejection.
        """
        self._need_denoiser()
        sampler, greedy = Sampler(temperature, top_k, top_p, generator), Sampler()
        unmasking = self._unmasking(mask_token_id, steps_per_block, confidence_threshold)
        self._check_positive(draft_length, "draft_length")
        self._check_length(draft_length)
        prompts, rows = self._start(prompts, max_new_tokens, eos_token_id, sampler, on_tokens)
        context = self._prefill(prompts, max(rows.max_new_tokens) + draft_length)
        rows.context_passes += 1
        going = self._emit(context.logits, sampler, rows, None)
        for block_index in count():
            if not rows.live:
                return rows.result()
            context.select(going)
            block = torch.full((len(going), draft_length), unmasking.mask_token_id)
            block[:, :1] = rows.last_tokens()
            wanted = torch.arange(draft_length) < rows.left()[:, None]
            block = self._fill(block, wanted, context, rows, block_index, unmasking, greedy,
                               on_step, known=1)
            logits = self._extend(context, block, logits="all", tentative=True)
            rows.context_passes[rows.live] += 1
            new = self._verify(logits, block, sampler, rows, block_index)
            context.settle(torch.tensor(list(map(len, new))))
            going = rows.append(new)

    def _fill(self, block: Tensor, wanted: Tensor, context: Context, rows: _Rows, block_index: int,
              unmasking: Unmasking, sampler: Sampler, on_step, known: int = 0) -> Tensor:
        """Denoise block (R, Q) until nothing wanted (R, Q) is masked. The first `known` tokens are
        no holes, even if AR chose the mask token there."""
        mask_id, steps = unmasking.mask_token_id, unmasking.steps_per_block
        span = Span.make(context.lengths, block.shape[1], self.denoiser_tower.device,
                         for_context=False)
        masked = (block == mask_id) & (torch.arange(block.shape[1]) >= known)    # (R, Q)
        for step in range(steps):
            active = (masked & wanted).any(-1)
            if not active.any():
                break
            t = masked.float().mean(-1)
            logits = self._denoiser_logits(block, context, span, t)
            rows.nfe[rows.live] += active
            # a row whose block is done draws nothing: its draws must not hang on other rows
            drawing = [row if active[r] else None for r, row in enumerate(rows.live)]
            ids, confidence = predict(logits, sampler, drawing, mask_id, self.ops)
            fillable = masked & active[:, None]
            self._check_finite(confidence, fillable, rows.live, block_index, step)
            commits = select_commits(confidence, fillable, unmasking.confidence_threshold,
                                     steps - step)
            before, block, masked = block, ids.where(commits, block), masked & ~commits
            if on_step is not None:
                on_step(Step(list(rows.live), block_index, step, t, before, block.clone(), commits,
                             confidence))
        return block

    def _verify(self, logits: Tensor, block: Tensor, sampler: Sampler, rows: _Rows,
                block_index: int) -> list[Tensor]:
        """AR's choice after each token of the block (R, Q), up to the first that the draft does not
        have or that ends the row: R tensors of 1 to Q ids. logits (R, Q, V)."""
        Q, left = block.shape[1], rows.left().tolist()
        new, drawing = [[] for _ in rows.live], list(rows.live)
        width = Q if sampler.temperature == 0 else 1    # AR draws for a token only once it is there
        for start in range(0, Q, width):
            ids, confidence = predict(logits[:, start:start + width], sampler, drawing, None,
                                      self.ops)
            asked = torch.tensor([[row is not None] for row in drawing]).expand_as(ids)
            self._check_finite(confidence, asked, rows.live, block_index, start)
            for r in asked[:, 0].nonzero()[:, 0].tolist():
                for i, choice in enumerate(ids[r].tolist(), start):
                    new[r].append(choice)
                    if (i == Q - 1 or choice != block[r, i + 1] or choice == rows.eos_token_id
                            or len(new[r]) == left[r]):
                        drawing[r] = None
                        break
            if not any(row is not None for row in drawing):
                break
        return [torch.tensor(choices) for choices in new]

    def _emit(self, logits: Tensor, sampler: Sampler, rows: _Rows, on_step) -> list[int]:
        """One AR token for every live row, from logits (R, V); returns who goes on."""
        index = len(rows.tokens[rows.live[0]])
        ids, confidence = predict(logits[:, None], sampler, rows.live, None, self.ops)   # (R, 1)
        everywhere = torch.ones_like(ids, dtype=torch.bool)
        self._check_finite(confidence, everywhere, rows.live, index, 0)
        if on_step is not None:
            masks = torch.full_like(ids, self.config.mask_token_id)
            t = torch.ones(len(ids))
            on_step(Step(list(rows.live), index, 0, t, masks, ids, everywhere, confidence))
        return rows.append(ids)

    def _start(self, prompts, max_new_tokens, eos_token_id, sampler, on_tokens,
               template=None) -> tuple[list[Tensor], _Rows]:
        """Check what all generations take."""
        prompts = self._check_prompts(prompts)
        templates = self._check_templates(template, len(prompts))
        lengths = ([max_new_tokens] * len(prompts) if not isinstance(max_new_tokens, Sequence)
                   else list(max_new_tokens))
        if max_new_tokens is None:
            lengths = [len(template) for template in templates]
        if len(lengths) != len(prompts) or not all(type(n) is int and n > 0 for n in lengths):
            raise ValueError(f"max_new_tokens is {max_new_tokens!r}, but it must be 1 or more, for "
                             f"all or for each of {len(prompts)} prompts"
                             + ("; only a template can do without" if template is not None else ""))
        self._check_length(max(len(prompt) + new for prompt, new in zip(prompts, lengths)))
        ids = range(self.config.vocab_size)
        if eos_token_id is not None and (type(eos_token_id) is not int or eos_token_id not in ids):
            raise ValueError(f"eos_token_id is {eos_token_id!r}, but it must be one id in "
                             f"[0, {self.config.vocab_size}), or None")
        if isinstance(sampler.generator, Sequence) and len(sampler.generator) != len(prompts):
            raise ValueError(f"{len(sampler.generator)} generators for {len(prompts)} prompts")
        for row, (template, new) in enumerate(zip(templates, lengths)):
            if len(template) > new:
                raise ValueError(f"template {row} has {len(template)} tokens, more than the "
                                 f"{new} of max_new_tokens")
        return prompts, _Rows(lengths, eos_token_id, on_tokens, templates)

    def _unmasking(self, mask_token_id, steps_per_block, confidence_threshold) -> Unmasking:
        if mask_token_id is None:
            mask_token_id = self.config.mask_token_id
        self._check_ids(torch.tensor([[mask_token_id]]), "mask_token_id")
        self._check_positive(steps_per_block, "steps_per_block")
        if not confidence_threshold >= 0:
            raise ValueError(f"confidence_threshold is {confidence_threshold}, but it must be >= 0")
        return Unmasking(mask_token_id, steps_per_block, confidence_threshold)

    # -- checks -------------------------------------------------------------------------------

    def _need_denoiser(self):
        if self.denoiser_tower is None:
            raise ValueError("only the context tower is loaded; use towers='both', or generate_ar "
                             "or score")

    def _check_ids(self, ids: Tensor, name: str, rows: int | None = None) -> Tensor:
        if not isinstance(ids, Tensor) or ids.dtype != torch.long or ids.dim() != 2:
            got = (f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor)
                   else type(ids).__name__)
            raise ValueError(f"{name} must be a (B, L) int64 tensor, got {got}")
        if 0 in ids.shape or rows is not None and len(ids) != rows:
            raise ValueError(f"{name} has shape {tuple(ids.shape)}, but it needs "
                             f"{rows or 'one or more'} rows of one token or more")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(f"{name} holds id {low if low < 0 else high}, but ids must be in "
                             f"[0, {self.config.vocab_size})")
        self._check_length(ids.shape[1])
        return ids

    @staticmethod
    def _check_t(t: Tensor | float, rows: int, blocks: int | None = None) -> Tensor:
        t = torch.as_tensor(t)
        t = t if t.is_floating_point() else t.float()
        fits = t.dim() == 0 or tuple(t.shape) in ((rows,), (rows, blocks))
        if not fits or not bool(((t >= 0) & (t <= 1)).all()):
            each = "one or one per row" + (" or block" if blocks else "")
            raise ValueError(f"t is {t.tolist()}, but it must be in [0, 1], {each}")
        return t if t.dim() == 2 else t.expand(rows)

    def _check_prompts(self, prompts, name: str = "prompt") -> list[Tensor]:
        if len(prompts) == 0:
            raise ValueError(f"there is no {name}")
        return [self._check_sequence(ids, f"{name} {i}") for i, ids in enumerate(prompts)]

    def _check_sequence(self, ids, name: str) -> Tensor:
        try:
            ids = torch.as_tensor(ids)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"{name} must be token ids, got {ids!r:.40}") from None
        if ids.dim() != 1 or len(ids) == 0:
            raise ValueError(f"{name} has shape {tuple(ids.shape)}, but it must be "
                             "one-dimensional and hold one token or more")
        return self._check_ids(ids[None], name)[0]

    def _check_templates(self, template, rows: int) -> list[Tensor]:
        try:
            one = template is None or torch.as_tensor(template).dim() == 1
        except (TypeError, ValueError, RuntimeError):       # sequences of several lengths, or None
            one = False
        templates = [template] * rows if one else template
        if not isinstance(templates, (Sequence, Tensor)) or len(templates) != rows:
            raise ValueError(f"template must be ids, or one sequence of them (or None) for each of "
                             f"{rows} prompts")
        return [torch.empty(0, dtype=torch.long) if ids is None else
                self._check_sequence(ids, f"template {i}") for i, ids in enumerate(templates)]

    @staticmethod
    def _check_positive(value: int, name: str):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} is {value!r}, but it must be a positive integer")

    def _check_length(self, length: int):
        if length > self.config.max_position_embeddings:
            raise ValueError(f"{length} tokens are more than the model's max_position_embeddings "
                             f"{self.config.max_position_embeddings}")

    @staticmethod
    def _check_finite(confidence: Tensor, masked: Tensor, rows: list[int], block: int, step: int):
        bad = (masked & ~confidence.isfinite()).nonzero()
        if len(bad):
            row, position = bad[0].tolist()
            raise ValueError(f"the logits are not finite at row {rows[row]}, block {block}, "
                             f"step {step}, position {position}; no token was committed")

    # -- loading ------------------------------------------------------------------------------

    @classmethod
    def skeleton(cls, directory: str | os.PathLike, *, dtype: torch.dtype | None = None,
                 towers: str = "both") -> tuple[TwoTower, dict[str, Path]]:
        """What `from_pretrained` would load, without data: a model on the meta device, with the
        shapes and dtypes it would have, and the file of every tensor of the checkpoint.

        Reads config.json and the headers of the safetensors files, and checks every name and shape.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise ValueError(f"{directory} is not a directory")
        config = TwoTowerConfig.from_json(directory / "config.json")
        with torch.device("meta"):
            model = cls(config, towers=towers)
            found, kinds = _check_headers(directory, model), {}
            for name, parts in _checkpoint_tensors(model).items():
                kind = dtype or found[parts[0][0]][1]
                if name.endswith((".gate.weight", ".e_score_correction_bias")):
                    kind = torch.promote_types(kind, torch.float32)
                elif not name.endswith((".A_log", ".D", ".dt_bias")):       # used in float32
                    for key, _ in parts:
                        kinds.setdefault(dtype or found[key][1], key)
                _set_tensor(model, name, torch.empty_like(_tensor(model, name), dtype=kind))
        if len(kinds) > 1:
            raise ValueError(f"{directory} mixes dtypes, such as " + " and ".join(
                f"{kind} of {name}" for kind, name in kinds.items()) + "; give a dtype for all")
        return model, {key: path for key, (path, _) in found.items()}

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike, *, context_device=None,
                        denoiser_device=None, dtype: torch.dtype | None = None,
                        towers: str = "both", backend: str = "torch") -> TwoTower:
        """Load a checkpoint directory: config.json and safetensors, one file or indexed shards.

        Every name and shape is checked against the headers before any tensor is read; each tensor
        then goes straight to its tower's device, so that the host holds one at a time.

        Args:
            context_device, denoiser_device: None is torch's default device, and the context's.
            dtype: None keeps each tensor's own; the router is float32 at least in any case.
            towers: "both", or "context" to read and hold nothing of the denoiser.
            backend: see `use`.
        Raises: ValueError naming the file or tensor that is missing, unexpected or malformed.
        """
        model, files = cls.skeleton(directory, dtype=dtype, towers=towers)
        model.use(backend)              # what cannot be had is said before a tensor is read
        if context_device is None:
            context_device = torch.get_default_device()
        if denoiser_device is None:
            denoiser_device = context_device
        return model.fill(files, context_device, denoiser_device).use(backend)

    def use(self, backend: str, graphs: bool = False) -> TwoTower:
        """Choose whose OPERATIONS run: "torch" this file's, "triton" those of kernels.py (without
        gradients), "auto" those of kernels.py on GPUs where it and triton are there; `backend` then
        says which they are.

        graphs: `generate_ar` and `generate_mask_diffusion` record the passes that repeat as CUDA
        graphs, for the rows at hand: worth it where rows end together. Needs "triton", since
        torch's moe_experts asks the host which experts were hit.
        Raises: ValueError if they cannot be had.
        """
        if backend not in ("auto", "torch", "triton"):
            raise ValueError(f"backend is {backend!r}, but it must be auto, torch or triton")
        if backend == "auto":
            on_gpus = all(p.is_cuda for p in self.parameters())
            there = KERNELS.is_file() and importlib.util.find_spec("triton") is not None
            backend = "triton" if on_gpus and there else "torch"
        if graphs and backend == "torch":
            raise ValueError("graphs need backend 'triton'")
        ops = operations(backend)
        for module in self.modules():
            if isinstance(module, Module):
                module.ops = ops
        self.backend, self.graphs = backend, graphs
        return self

    def fill(self, files: dict[str, Path], context_device, denoiser_device,
             on_load: Callable[[int], None] | None = None) -> TwoTower:
        """Read the tensors of a `skeleton` from its files, each to its tower's device.

        on_load: called with the bytes of each tensor that was loaded.
        """
        for name, parts in _checkpoint_tensors(self).items():
            device = context_device if name.startswith("context_") else denoiser_device
            meta = _tensor(self, name)
            tensor = torch.empty(meta.shape, dtype=meta.dtype, device=device)
            for (key, _), part in zip(parts, tensor.view(len(parts), *parts[0][1].shape)):
                # opened anew for each tensor, so that pages already read do not stay mapped
                with safe_open(files[key], "pt", device=str(tensor.device)) as file:
                    part.copy_(file.get_tensor(key))
            _set_tensor(self, name, tensor)
            if on_load is not None:
                on_load(tensor.nbytes)
        return self

    def save_pretrained(self, directory: str | os.PathLike, max_shard_bytes: int = 5 * 10**9):
        """Write config.json and safetensors in the released layout, sharded above max_shard_bytes.

        Every file is written under another name first, so that none is ever half-written; files
        of a checkpoint that was there before are replaced or removed.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        old = [path for path in directory.iterdir() if CHECKPOINT_FILE.fullmatch(path.name)]
        if old and self.denoiser_tower is None:
            raise ValueError(f"{directory} holds a checkpoint, which a context tower alone must "
                             "not replace; save it elsewhere")
        shards, size = [{}], 0
        for key, part in (pair for parts in _checkpoint_tensors(self).values() for pair in parts):
            if shards[-1] and size + part.nbytes > max_shard_bytes:
                shards.append({})
                size = 0
            shards[-1][key] = part
            size += part.nbytes
        names = ["model.safetensors"] if len(shards) == 1 else [
            f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        for name, shard in zip(names, shards):
            shard = {key: part.contiguous() for key, part in shard.items()}
            save_file(shard, directory / f"{name}.partial", metadata={"format": "pt"})
            os.replace(directory / f"{name}.partial", directory / name)
        fields = dataclasses.asdict(self.config)
        fields["torch_dtype"] = str(self.context_lm_head.weight.dtype).removeprefix("torch.")
        _write_json(directory / "config.json", fields)
        if len(shards) > 1:
            weight_map = {key: name for name, shard in zip(names, shards) for key in shard}
            total = sum(part.nbytes for shard in shards for part in shard.values())
            _write_json(directory / INDEX, {"metadata": {"total_size": total},
                                            "weight_map": weight_map})
            names.append(INDEX)
        for path in old:
            if path.name not in names:
                path.unlink()
