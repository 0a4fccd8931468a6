"""Nemotron-Labs-TwoTower in one file: a block-wise autoregressive diffusion language model.

Two copies of one hybrid network (Mamba-2, attention and mixture-of-experts layers) write text
together. The frozen causal **context tower** reads clean tokens and keeps, layer by layer, a
key/value cache or a Mamba-2 state. The **denoiser tower** fills a block of masked tokens in
parallel over a few steps: its layer i reads the context tower's cache or state of layer i, and
adaLN tells it how much of the block is still masked.

Order: configuration, formulas, what passes carry, layers and towers, the model with training and
four ways of decoding; then what these lean on. A denoiser step from the top:
`generate_mask_diffusion`, `Decoding.denoise_block`, `TwoTower._denoise`, `Tower`, `Layer`,
`Attention`, `attention`. Needs torch, einops and safetensors; works when copied alone. Parameter
names are the checkpoint's, but that `experts.{e}.up_proj.weight` is `experts.up_proj.weight[e]`
here. README.md lists where this deviates from the released code.

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
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
# Configuration

LAYER_KINDS = {"linear_attention": "M", "mamba": "M", "full_attention": "*", "attention": "*",
               "moe": "E", "mlp": "-"}                  # transformers 5's layers_block_type
INFINITY = {"__float__": "Infinity"}                    # and what its JSON has for that


@dataclass
class TwoTowerConfig:
    """The fields of config.json that the model uses, spelled as there; the defaults are the
    released model's. Raises: ValueError naming a field that is impossible (see `check_config`)."""

    hidden_size: int = 2688                             # D
    num_hidden_layers: int = 52
    hybrid_override_pattern: str = (                    # M Mamba-2, * attention, E MoE, - MLP
        "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME")
    vocab_size: int = 131072                            # V
    layer_norm_epsilon: float = 1e-5
    mamba_num_heads: int = 64                           # H of a Mamba layer
    mamba_head_dim: int = 64                            # P
    n_groups: int = 8                                   # G of a Mamba layer; not n_group below
    ssm_state_size: int = 128                           # N
    conv_kernel: int = 4                                # W
    chunk_size: int = 128                               # tokens per chunk of the scan
    num_attention_heads: int = 32                       # H of an attention layer
    num_key_value_heads: int = 2                        # G of an attention layer
    head_dim: int = 128                                 # K
    intermediate_size: int = 1856                       # width of a dense MLP
    n_routed_experts: int = 128                         # E
    num_experts_per_tok: int = 6                        # A
    moe_intermediate_size: int = 1856                   # F
    moe_shared_expert_intermediate_size: int = 3712     # width of the one shared expert
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    n_group: int = 1                                    # router groups; files may lack this and
    topk_group: int = 1                                 # all that follow
    use_bias: bool = False                              # Mamba in_proj and out_proj
    use_conv_bias: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False
    mlp_hidden_act: str = "relu2"
    mamba_hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    residual_in_fp32: bool = False
    time_step_limit: tuple[float, float] = (0.0, math.inf)
    time_step_min: float = 0.001                        # this and the next three: initialisation
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    initializer_range: float = 0.02
    max_position_embeddings: int = 262144               # longest sequence; there are no positions
    bos_token_id: int | None = 1                        # read by nothing, nor is pad_token_id
    eos_token_id: int | list[int] | None = 2            # any of several ends a text
    pad_token_id: int | None = 0
    mask_token_id: int | None = 3                       # a convention, not in the released file
    experts: str | None = None                          # "int8", "int4": `Quantized`

    def __post_init__(self):
        for name, value in vars(self).items():
            setattr(self, name, plain(value))
        limit = (0.0, math.inf) if self.time_step_limit is None else self.time_step_limit
        self.time_step_limit = tuple(limit) if isinstance(limit, list) else limit
        check_config(self)

    @classmethod
    def from_dict(cls, given: dict) -> TwoTowerConfig:
        """What config.json holds, in either spelling; fields that the model does not use are
        ignored. Raises: ValueError naming the field that is missing or impossible."""
        names = [field.name for field in dataclasses.fields(cls)]
        given = {"head_dim": given.get("attention_head_dim")} | given
        if isinstance(kinds := given.get("layers_block_type"), list):
            pattern = "".join(LAYER_KINDS.get(str(kind), str(kind)) for kind in kinds)
            given |= {"hybrid_override_pattern": pattern, "num_hidden_layers": len(kinds)}
        require(given.get("moe_latent_size") is None, "config: moe_latent_size is "
                f"{given.get('moe_latent_size')!r}, but experts of a latent size are not supported")
        moe = "E" in str(given.get("hybrid_override_pattern"))
        for name in names[:names.index("n_group" if moe else "n_routed_experts")]:
            require(given.get(name) is not None, f"config: field {name!r} is missing")
        return cls(**{name: given[name] for name in names if name in given
                      and (given[name] is not None or name == "eos_token_id")})

    @classmethod
    def from_json(cls, path: str | os.PathLike) -> TwoTowerConfig:
        """`from_dict` of a file. Raises: ValueError naming the file and what is wrong with it."""
        given = read_json(Path(path))
        try:
            return cls.from_dict(given)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def to_dict(self) -> dict:
        """What config.json is to hold; strict JSON has no infinity, so that is left out or spelled
        as by transformers 5."""
        limit = [INFINITY if value == math.inf else value for value in self.time_step_limit]
        fields = dataclasses.asdict(self) | {"time_step_limit": limit}
        return {name: value for name, value in fields.items()
                if value != [0.0, INFINITY] and (name != "experts" or value is not None)}

    @property
    def d_inner(self) -> int:
        """Channels of a Mamba layer: heads x head size (`expand` in the file is not used)."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels under the convolution: x, B and C."""
        return self.d_inner + 2 * self.n_groups * self.ssm_state_size


# ---------------------------------------------------------------------------------------------
# The formulas


def wide(x: Tensor) -> Tensor:
    """x in float32 at least, where norms, scans, softmaxes and sums are computed."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last axis, in float32; returned in the weight's
    dtype, the model's, as x may be a float32 residual stream."""
    return F.rms_norm(wide(x), weight.shape, wide(weight), eps).to(weight.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: x * (1 + scale) + shift, for x (B, L, D), shift and scale (B, 1, D)."""
    return torch.addcmul(shift, x, 1 + scale)


def norm(x: Tensor, weight: Tensor, eps: float, shift: Tensor | None = None,
         scale: Tensor | None = None, first: bool = True) -> Tensor:
    """`rms_norm`; in the denoiser modulated before it (`first`: Mamba and attention layers), or
    after it (MoE and MLP layers)."""
    if shift is None:
        return rms_norm(x, weight, eps)
    if first:
        return rms_norm(modulate(x, shift, scale), weight, eps)
    return modulate(rms_norm(x, weight, eps), shift, scale)


def add_gated(x: Tensor, gate: Tensor | None, h: Tensor) -> Tensor:
    """x + gate * h, for x and h (B, L, D), gate (B, 1, D) or None, which is 1."""
    return x + h if gate is None else torch.addcmul(x, gate, h)


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """RMS norm of y * silu(z) over each of `groups` groups of channels; the gate comes first.

    Args: y, z (..., d_inner); weight (d_inner). Returns: (..., d_inner) in y's dtype.
    """
    v = F.silu(wide(z)).mul_(wide(y)).unflatten(-1, (groups, -1))
    v = F.rms_norm(v, v.shape[-1:], eps=eps).flatten(-2)
    return (v * weight).to(y.dtype)


def causal_conv1d(history: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None,
                  update: bool = False, counts: Tensor | None = None) -> Tensor:
    """Depthwise causal convolution, then SiLU, in float32.

    Args: history (b, W-1, channels), the inputs before x (b, L, channels), replaced by the newest
        if update, of each row's first counts (b) tokens; weight (channels, 1, W), bias (channels).
    Returns: (b, L, channels) in x's dtype; token l reads itself and the W-1 before it.
    """
    inputs, L = torch.cat([history, x], dim=1), x.shape[1]                # (b, W-1+L, channels)
    if update:
        kept = window(inputs, counts, history.shape[1]) if counts is not None else inputs[:, L:]
        history.copy_(kept)
    x, taps = wide(inputs), wide(weight[:, 0])                                  # (channels, W)
    W = taps.shape[1]
    if L == 1:
        out = (x.mT * taps).sum(-1)[:, None]
    else:
        taps = taps.mT.contiguous()
        out = x[:, :L] * taps[0]
        for w in range(1, W):               # W shifted products beat a depthwise conv1d on CPU
            out.addcmul_(x[:, w:w + L], taps[w])
    out = out if bias is None else out.add_(wide(bias))
    return F.silu(out, inplace=True).to(inputs.dtype)


def ssd_rates(dt: Tensor, dt_bias: Tensor, A_log: Tensor, limit: tuple[float, float],
              counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The step sizes dt = softplus(dt + dt_bias), kept within `limit`, and A = -exp(A_log).

    Args: dt (b,L,H), dt_bias (H), A_log (H), counts (b) int64: the real tokens of each row.
    Returns: dt (b,L,H) f32, 0 from counts on (padding must not move the state), and A (H) f32.
    """
    dt = F.softplus(wide(dt) + dt_bias)
    if limit != (0.0, math.inf):                                # where softplus is anyway
        dt = dt.clamp(*limit)
    if counts is not None:
        dt = dt * (torch.arange(dt.shape[1], device=dt.device) < counts[:, None])[..., None]
    return dt, -wide(A_log).exp()


def ssd_step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor,
             state: Tensor, in_place: bool = False) -> tuple[Tensor, Tensor]:
    """One token of the Mamba-2 recurrence: h = exp(dt A) h + dt x (x) B; y = h C + D x.

    Args: x (b,H,P), B and C (b,G,N), D (H); f32: dt (b,H), A (H), state (b,H,P,N).
    Returns: y (b,H,P) in x's dtype and the new state, which is `state` itself if in_place.
    """
    dtype, x, B, C, (b, G, N) = x.dtype, wide(x), wide(B), wide(C), B.shape
    decay = torch.exp(dt * A)[..., None, None]                                   # (b, H, 1, 1)
    h = state.mul_(decay) if in_place else state * decay
    drive = (dt[..., None] * x).view(b, G, -1, 1)                                # (b, G, H/G*P, 1)
    by_group = h.view(b, G, -1, N).addcmul_(drive, B[:, :, None])                # writes h
    y = torch.bmm(by_group.view(b * G, -1, N), C.reshape(b * G, N, 1)).view(x.shape)
    return torch.addcmul(y, wide(D)[:, None], x).to(dtype), h


def ssd_chunk(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> Tensor:
    """The y of c tokens of the recurrence (without D) at once, as matrix products.

    Token l reads token s <= l with weight exp(sum of dt A over s+1..l) dt_s (C_l . B_s), and
    everything older through the state.

    Args: x (b,c,H,P), dt (b,c,H), A (H), B and C (b,c,G,N), state (b,H,P,N); all f32.
    Returns: (b,c,H,P). Source: arXiv 2405.21060, section 6.
    """
    G = B.shape[2]
    B, C = B.transpose(1, 2), C.transpose(1, 2)                                  # (b, G, c, N)
    # sums of dt A up to each token: (b, G, H/G, c)
    log_decay = (dt * A).mT.contiguous().cumsum(-1).unflatten(1, (G, -1))
    # from token s to token l >= s: exp(sum over s+1..l); the rest is clamped, then cut by tril
    weight = (log_decay[..., :, None] - log_decay[..., None, :]).clamp_(max=0).exp_()
    weight = weight * (C @ B.mT).tril()[:, :, None]                              # (b, G, H/G, c, c)
    within = weight @ rearrange(x * dt[..., None], "b c (g r) p -> b g r c p", g=G)
    # from the state to token l: exp(sum over 1..l)
    before = C @ state.unflatten(1, (G, -1)).flatten(2, 3).mT                    # (b, G, c, H/G*P)
    before = rearrange(before, "b g c (r p) -> b g r c p", p=x.shape[-1])
    y = torch.addcmul(within, log_decay.exp()[..., None], before)
    return rearrange(y, "b g r c p -> b c (g r) p")


def ssd_state(x: Tensor, dt: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """What c tokens of the recurrence make of a state: decay * state + added.

    Token s decays by exp(sum of dt A over s+1..c), the old state by exp(sum over all).

    Args: as for `ssd_chunk`. Returns: added (b,H,P,N) and decay (b,H,1,1), f32.
    """
    log_decay = (dt * A).cumsum(1)                                               # (b, c, H)
    u = x * (dt * (log_decay[:, -1:] - log_decay).exp())[..., None]
    added = rearrange(u, "b c (g r) p -> b g (r p) c", g=B.shape[2]) @ B.transpose(1, 2)
    return added.view(*x[:, 0].shape, -1), log_decay[:, -1].exp()[..., None, None]


def ssd_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor,
             chunk_size: int, keep: str = "end") -> tuple[Tensor, Tensor | None]:
    """The recurrence of `ssd_step` over L tokens, chunk by chunk; chunk_size changes only the cost.

    Args:
        x (b,L,H,P), B and C (b,L,G,N), D (H); f32: dt (b,L,H), A (H), state (b,H,P,N).
        A dt of 0 makes a token invisible: the state passes it unchanged.
    Returns: y (b,L,H,P) in x's dtype; and if keep is "end" the state after the last token, if it
        is "blocks" the states before each chunk (b,chunks,H,P,N), of which L is a multiple then,
        else None.
    """
    with torch.autocast(x.device.type, enabled=False):          # the scan is never in bfloat16
        if keep == "blocks":            # each chunk becomes a row, once it has a state of its own
            x, dt, B, C = (rearrange(v, "b (chunks c) ... -> (b chunks) c ...", c=chunk_size)
                           for v in (x, dt, B, C))
            before = [state]
            for added, decay in zip(*(v.unflatten(0, (len(state), -1)).unbind(1)
                                      for v in ssd_state(wide(x), dt, A, wide(B)))):
                before.append(torch.addcmul(added, before[-1], decay))
            before = torch.stack(before[:-1], dim=1)
            y, _ = ssd_scan(x, dt, A, B, C, D, before.flatten(0, 1), chunk_size, "none")
            return rearrange(y, "(b chunks) c ... -> b (chunks c) ...", b=len(state)), before
        y, chunks = [], list(zip(*(v.split(chunk_size, dim=1) for v in (x, dt, B, C))))
        for i, chunk in enumerate(chunks):
            x_c, dt_c, B_c, C_c = map(wide, chunk)
            y_c = ssd_chunk(x_c, dt_c, A, B_c, C_c, state)
            y.append(torch.addcmul(y_c, wide(D)[:, None], x_c).to(x.dtype))
            if keep == "end" or i + 1 < len(chunks):
                added, decay = ssd_state(x_c, dt_c, A, B_c)
                state = torch.addcmul(added, state, decay)
    return torch.cat(y, dim=1) if len(y) > 1 else y[0], state if keep == "end" else None


def ssd(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor,
        state: Tensor, limit: tuple[float, float], counts: Tensor | None, chunk_size: int,
        keep: str) -> tuple[Tensor, Tensor | None]:
    """All of it: `ssd_rates`, then `ssd_step` for one token, `ssd_scan` for more; keep "end"
    updates the state in place. Returns y, and the states before each chunk if keep is "blocks"."""
    dt, A = ssd_rates(dt, dt_bias, A_log, limit, counts)
    if x.shape[1] == 1 and keep in ("end", "none"):
        y, _ = ssd_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, state, in_place=keep == "end")
        return y[:, None], None
    y, after = ssd_scan(x, dt, A, B, C, D, state, chunk_size, keep)
    if keep == "end":
        state.copy_(after)
    return y, after if keep == "blocks" else None


def attention(q: Tensor, k: Tensor, v: Tensor, last_seen: Tensor | None = None,
              is_causal: bool = False, mask: Tensor | None = None) -> Tensor:
    """Grouped-query attention, softmax(q k / sqrt(K)) v; query head h reads KV head h // (H/G).

    Args:
        q (B,H,L,K); k, v (B,G,keys,K).
        last_seen (B or 1, L) int64: the last key a query sees; is_causal: query l sees keys 0..l;
            mask (1, 1, L, keys) bool, True = visible. With none of these: all keys.
    Returns: (B,H,L,K).
    """
    (B, H, L, K), G = q.shape, k.shape[1]
    if last_seen is not None and L > 256:               # one mask would hold L * keys
        parts = zip(q.split(256, dim=2), last_seen.split(256, dim=1))
        return torch.cat([attention(part, k, v, last) for part, last in parts], dim=2)
    if last_seen is not None:
        mask = torch.arange(k.shape[2], device=k.device) <= last_seen[:, None, :, None]
    # not enable_gqa: with a mask or in float32 no fused kernel of CUDA takes it
    if not is_causal and (mask is None or L == 1):      # H/G heads are more queries to a KV head
        mask = None if mask is None else mask.repeat(1, 1, H // G, 1)
        grouped = q.reshape(B, G, -1, K)                                         # (B, G, H/G*L, K)
        return F.scaled_dot_product_attention(grouped, k, v, mask).reshape(q.shape)
    # each head reads its KV head in place, and one mask serves all
    k, v = (x.flatten(0, 1)[:, None].expand(-1, H // G, -1, -1) for x in (k, v))
    mask = mask if mask is None or len(mask) == 1 else mask.repeat_interleave(G, dim=0)
    q = q.reshape(B * G, -1, L, K)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal).reshape(B, H, L, K)


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


def quantize(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """An expert's weight (out, in) as integers and scales, as `Quantized` holds them; the largest
    of the weights that share a scale, of either sign, becomes -128 or -8."""
    most, size = (128, weight.shape[1]) if kind == "int8" else (8, 32)
    groups = weight.to(torch.float32, copy=True).unflatten(1, (-1, size))   # (out, in/size, size)
    low, high = groups.aminmax(dim=-1, keepdim=True)
    scales = (high.where(high > -low, low) / -most).bfloat16()
    q = groups.div_(scales.where(scales != 0, 1)).round_().clamp_(-most, most - 1)
    q = q.flatten(1).to(torch.int8)
    if kind == "int4":
        low, high = q.chunk(2, dim=1)
        q = low + 8 | high << 4
    return q, scales[..., 0].T


def moe_experts(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, up: Tensor | Quantized,
                down: Tensor | Quantized, up_bias: Tensor | None = None,
                down_bias: Tensor | None = None, shared: MLP | None = None) -> Tensor:
    """Sum over each token's experts of weight * down(relu(up(x))^2), plus the shared expert's.

    Args:
        x (T, D), topk_ids and topk_weights (T, A), up (E, F, D), down (E, D, F) or `Quantized`,
        up_bias (E, F) and down_bias (E, D) or None.
    Returns: (T, D) in x's dtype, summed in f32 in the order of the experts.
    """
    experts, order = topk_ids.flatten().sort(stable=True)       # T*A slots grouped by expert
    fits = isinstance(up, Tensor) and all(n * x.element_size() % 16 == 0 for n in up.shape[1:])
    if x.dtype == torch.float64 or not fits or x.is_cpu and len(experts) < len(up):
        # a loop over the experts hit: grouped_mm takes no float64, integers or rows that begin
        # between 16 bytes, and on a CPU visits all experts, which a few slots do not repay
        hit, sizes = (v.tolist() for v in experts.unique_consecutive(return_counts=True))

        def product(rows: Tensor, weight: Tensor) -> Tensor:    # each row times its expert's weight
            return torch.cat([F.linear(part, weight[e].to(x.dtype))
                              for e, part in zip(hit, rows.split(sizes))])
    else:
        ends = torch.searchsorted(experts, torch.arange(len(up), device=x.device), right=True).int()

        def product(rows: Tensor, weight: Tensor) -> Tensor:    # the same; never asks the host
            return F.grouped_mm(rows, weight.mT, offs=ends)
    token = order // topk_ids.shape[1]
    h = product(x[token], up)
    h = (h if up_bias is None else h + up_bias[experts]).relu_().square()
    h = product(h, down)
    h = wide(h if down_bias is None else h + down_bias[experts])
    h = h * topk_weights.flatten()[order, None].to(h.dtype)
    out = torch.zeros_like(x, dtype=h.dtype).index_add_(0, token, h).to(x.dtype)
    return out if shared is None else out + shared(x)


def masked_cross_entropy(logits: Tensor, labels: Tensor, targets: Tensor,
                         reduction: str) -> Tensor:
    """Of logits (B, L, V) and labels (B, L) where targets (B, L) bool holds; "mean" or "none"."""
    logits, labels = logits[targets.to(logits.device)], labels[targets].to(logits.device)
    losses = F.cross_entropy(logits, labels, reduction="none")
    return losses if reduction == "none" else losses.sum() / max(1, len(losses))


def log_probabilities(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Of ids (n), by logits (n, V); and whether all are the likeliest."""
    return -F.cross_entropy(logits, ids, reduction="none"), (logits.argmax(-1) == ids).all()


def of_blocks(x: Tensor, blocks: Tensor, n: int) -> Tensor:
    """x (B, n * size) -> (B, k * size): of each row's n blocks those in blocks (B, k) int64."""
    rows = torch.arange(len(x), device=x.device)[:, None]
    return x.reshape(len(x), n, -1)[rows, blocks.to(x.device)].flatten(1)


def most_likely(logits: Tensor, mask_token_id: int | None = None) -> tuple[Tensor, Tensor]:
    """The best token but the mask token, and its `probability`: logits (..., V) f32 -> ids (...)
    int64, probabilities (...) f32."""
    ids = without(logits, mask_token_id).argmax(-1)
    return ids, probability(logits, ids, mask_token_id)


def probability(logits: Tensor, ids: Tensor, mask_token_id: int | None) -> Tensor:
    """Of ids (...) under the softmax of logits (..., V) without the mask token; NaN where a logit
    is not finite."""
    finite = logits.isfinite().all(-1)
    logits = without(logits, mask_token_id)
    chosen = logits.gather(-1, ids[..., None])[..., 0]
    return (chosen - logits.logsumexp(-1)).exp().where(finite, math.nan)


def without(logits: Tensor, mask_token_id: int | None) -> Tensor:
    """The logits (..., V) with -inf for the mask token, if one is given."""
    if mask_token_id is None:
        return logits
    return logits.index_fill(-1, torch.tensor(mask_token_id, device=logits.device), -math.inf)


# ---------------------------------------------------------------------------------------------
# What passes carry


class Pass(NamedTuple):
    """One pass of a tower over L new tokens a row: where they go, what they see, what is kept.

    pass               a new token sees                        keep: of Mamba layers
    prefill, extend    cached ones, new ones up to itself      "end": the state after the last
    verify a draft     the same                                "inputs": what `settle` needs later
    context_logits     the same                                "none"
    denoise            all cached and all new ones             "none"
    train, clean       new ones up to itself                   "blocks": before every block
    train, noisy       earlier clean blocks, its own block     "none"
    """

    slots: Tensor                       # (B, L) int64: where new keys and values are cached. In
                                        # training x is (B*n, Q) and L is n*Q: n blocks share a row
    rows: Tensor                        # (B, 1) int64: 0, 1, ..
    end: int                            # slots in use then, in the longest row
    # what a query sees, one of three as for `attention`; none of them: every slot in use
    last_seen: Tensor | None = None
    is_causal: bool = False
    mask: Tensor | None = None
    counts: Tensor | None = None        # (B,) int64: real tokens of each row, then padding
    keep: str = "none"
    block_size: int | None = None       # of keep "blocks"

    @classmethod
    def behind(cls, lengths: Tensor, L: int, end: int, *, causal: bool, **fields) -> Pass:
        """L tokens behind rows of `lengths` (B,) tokens, which only the contents of tensors depend
        on, so that a pass can be recorded."""
        B, count = len(lengths), torch.arange(max(len(lengths), L), device=lengths.device)
        slots = lengths[:, None] + count[:L]
        last_seen = slots if causal else slots[:, -1:].expand(B, L)
        return cls(slots, count[:B, None], end, last_seen, **fields)


@dataclass
class MambaState:
    """What a Mamba-2 layer carries from call to call; extending a context updates it in place."""

    conv_state: Tensor              # (b, W-1, conv_dim) model dtype: raw inputs, newest last
    ssm_state: Tensor               # (b, H, P, N) f32
    inputs: tuple | None = None     # of a pass that kept them: those of convolution and scan

    def map(self, f) -> MambaState:
        return MambaState(f(self.conv_state), f(self.ssm_state))

    def settle(self, counts: Tensor):
        """Become the state after only the first counts (b,) tokens of a pass that kept inputs."""
        xBC, x, dt, A, B = self.inputs
        counts, self.inputs = counts.to(dt.device), None
        kept = torch.arange(dt.shape[1], device=dt.device) < counts[:, None]
        with torch.autocast(x.device.type, enabled=False):          # as in ssd_scan
            added, decay = ssd_state(wide(x), dt * kept[..., None], A, wide(B))
            self.ssm_state.mul_(decay).add_(added)
        self.conv_state.copy_(window(xBC, counts, self.conv_state.shape[1]))


def window(x: Tensor, starts: Tensor, width: int) -> Tensor:
    """x (b, l, channels) -> (b, width, channels), row by row from starts (b,)."""
    rows = torch.arange(len(starts), device=x.device)[:, None]
    return x[rows, starts[:, None] + torch.arange(width, device=x.device)]


@dataclass
class KVCache:
    """Keys and values of an attention layer in buffers with room to grow. Slots past a row's length
    are scratch: a denoiser writes its block there and leaves the context as it was."""

    key_cache: Tensor               # (B, G, capacity, K)
    value_cache: Tensor             # (B, G, capacity, K)

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

    def write(self, rows: Tensor, slots: Tensor, k: Tensor, v: Tensor, end: int):
        """Put k, v (..., G, K) at rows and slots (...) int64; return the first `end` slots of all
        rows, two views (B, G, end, K)."""
        self.reserve(end)
        k, v = k.to(self.key_cache.dtype), v.to(self.value_cache.dtype)     # under autocast
        if self.key_cache.requires_grad or self.value_cache.requires_grad:      # kept for them
            self.key_cache, self.value_cache = (
                cache.transpose(1, 2).index_put((rows, slots), new).transpose(1, 2)
                for cache, new in ((self.key_cache, k), (self.value_cache, v)))
        else:
            self.key_cache[rows, :, slots], self.value_cache[rows, :, slots] = k, v
        return self.key_cache[:, :, :end], self.value_cache[:, :, :end]


class Context:
    """What the context tower knows of a batch of rows: `prefill` makes it, `extend` grows it.

    lengths (B,) int64 on the host: tokens read so far. logits (B, V) float32: after each row's last
    token; None where not computed. states: of each layer a KVCache, a MambaState or None.
    capacity: tokens a row as allocated. all_slots: set on the copies that kernels.Passes records
    with, whose passes then work on all of it, whatever the lengths.
    """

    def __init__(self, tower: Tower, rows: int, capacity: int):
        self.device, self.capacity, self.all_slots = tower.device, capacity, False
        self.states = [layer.mixer.empty_state(rows, capacity) if layer.kind in "M*" else None
                       for layer in tower.layers]
        self.lengths = torch.zeros(rows, dtype=torch.long)
        self.logits: Tensor | None = None
        self.passes = None                              # kernels.Passes over this context, if any
        self._replica: list | None = None               # the states on another device
        self._sent = self.lengths - 1                   # lengths when it was last sent; -1: never

    def select(self, rows: list[int]):
        """Keep only these rows, in this order."""
        if rows == list(range(len(self.lengths))):
            return
        kept = rows if self.passes is None else self.passes.select(rows)        # of the states
        self.states, self._replica = (states and [state and state.map(lambda x: x[kept])
                                                  for state in states]
                                      for states in (self.states, self._replica))
        self.lengths, self._sent = self.lengths[rows], self._sent[rows]
        self.logits = None if self.logits is None else self.logits[rows]

    def select_blocks(self, blocks: Tensor, n: int):
        """In training, each block in blocks (B, k), of a row's n, becomes a row of Mamba states."""
        for i, state in enumerate(self.states):
            if isinstance(state, MambaState):
                self.states[i] = state.map(lambda x: of_blocks(
                    x.reshape(len(blocks), -1), blocks, n).view(-1, *x.shape[1:]))

    def next_pass(self, L: int, device, *, causal: bool, counts: Tensor | None = None,
                  **fields) -> Pass:
        """Of L tokens behind the rows, the first counts (B,) of each real; fields: of a `Pass`."""
        if self.all_slots:
            return Pass.behind(self.lengths.to(device), L, self.capacity, causal=causal,
                               counts=counts, **fields)
        lengths = self.lengths.tolist()
        longest, uniform = max(lengths), min(lengths) == max(lengths)
        at = Pass.behind(self.lengths.to(device), L, longest + L, causal=causal)
        all_seen = uniform and (L == 1 or not causal)           # needs no mask
        is_causal = causal and longest == 0 and not all_seen    # needs none in memory
        last_seen = None if all_seen or is_causal else at.last_seen[:1] if uniform else at.last_seen
        padded = counts is not None and int(counts.min()) < L
        return at._replace(last_seen=last_seen, is_causal=is_causal,
                           counts=counts.to(device) if padded else None, **fields)

    def settle(self, counts: Tensor):
        """Keep only the first counts (B,) tokens of each row of a pass that kept its inputs. No
        layer runs again: keys and values past a row's length are scratch anyway."""
        if self.passes is not None:
            self.passes.settle(self, counts)
        for state in self.states if self.passes is None else ():
            if isinstance(state, MambaState):
                state.settle(counts)
        self.lengths, self.logits = self.lengths + counts, None

    def states_on(self, device: torch.device) -> list:
        """The states for a denoiser: themselves, or on another device a replica, to which only
        what is new since the last call crosses: KV rows and the Mamba states."""
        if device == self.device:
            return self.states
        if self._replica is None:
            self._replica = [state and state.map(lambda x: x[:, :, :0].to(device))   # still empty
                             for state in self.states]
        if not torch.equal(self._sent, self.lengths):
            slots = torch.arange(int(self.lengths.max()))
            new = (slots >= self._sent[:, None]) & (slots < self.lengths[:, None])
            row, slot = new.nonzero(as_tuple=True)
            for i, state in enumerate(self.states):
                if isinstance(state, MambaState):
                    self._replica[i] = state.map(lambda x: x.to(device))
                elif isinstance(state, KVCache):
                    k, v = state.key_cache[row, :, slot], state.value_cache[row, :, slot]
                    self._replica[i].write(row, slot, k.to(device), v.to(device), len(slots))
            self._sent = self.lengths
        return self._replica


# ---------------------------------------------------------------------------------------------
# Layers and towers; attribute names are the checkpoint's

# what layers call as self.ops: the functions above, or those of kernels.py (see `TwoTower.use`)
OPERATIONS = ("norm", "add_gated", "causal_conv1d", "ssd", "gated_rms_norm", "attention", "route",
              "moe_experts")


class Module(nn.Module):
    ops = SimpleNamespace(**{name: globals()[name] for name in OPERATIONS})


class Mamba2(Module):
    """Mamba-2: in_proj -> convolution -> selective state-space scan -> gated norm -> out_proj."""

    def __init__(self, config: TwoTowerConfig):
        super().__init__()
        self.config = c = config
        self.split = [c.d_inner, c.conv_dim, c.mamba_num_heads]     # of in_proj: z, xBC, dt
        self.in_proj = nn.Linear(c.hidden_size, sum(self.split), bias=c.use_bias)
        self.conv1d = nn.Conv1d(c.conv_dim, c.conv_dim, c.conv_kernel, groups=c.conv_dim,
                                bias=c.use_conv_bias)               # holds weights only
        self.A_log = nn.Parameter(torch.arange(1, c.mamba_num_heads + 1).log())
        self.D = nn.Parameter(torch.ones(c.mamba_num_heads))
        # dt starts log-uniform in [time_step_min, time_step_max], through an inverse softplus
        low, high = math.log(c.time_step_min), math.log(c.time_step_max)
        dt = torch.empty(c.mamba_num_heads).uniform_(low, high).exp().clamp(min=c.time_step_floor)
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        self.norm = nn.RMSNorm(c.d_inner)                           # the weight of gated_rms_norm
        self.out_proj = nn.Linear(c.d_inner, c.hidden_size, bias=c.use_bias)

    def empty_state(self, rows: int, capacity: int) -> MambaState:
        """The state before the first token: zeros."""
        c, weight = self.config, self.in_proj.weight        # whose new_zeros FSDP would shard
        conv, ssm = (torch.zeros(rows, *shape, dtype=weight.dtype, device=weight.device)
                     for shape in ((c.conv_kernel - 1, c.conv_dim),
                                   (c.mamba_num_heads, c.mamba_head_dim, c.ssm_state_size)))
        return MambaState(conv, wide(ssm))

    def forward(self, x: Tensor, state: MambaState, at: Pass) -> Tensor:
        """x (b, L, D) -> (b, L, D). at.keep: "end" updates the state in place, "blocks" replaces
        it, "inputs" adds to it what `MambaState.settle` needs, "none" leaves it."""
        c, (b, L, _) = self.config, x.shape
        groups = c.n_groups * c.ssm_state_size
        z, xBC, dt = self.in_proj(x).split(self.split, dim=-1)
        if at.keep in ("inputs", "blocks"):
            inputs = torch.cat([state.conv_state, xBC], dim=1)            # (b, W-1+L, conv_dim)
        xBC = self.ops.causal_conv1d(state.conv_state, xBC, self.conv1d.weight, self.conv1d.bias,
                                     at.keep == "end", at.counts)
        xBC = xBC.to(x.dtype)           # other only under autocast, which must not round the scan
        x, B, C = xBC.split([c.d_inner, groups, groups], dim=-1)
        x = x.view(b, L, c.mamba_num_heads, c.mamba_head_dim)             # (b, L, H, P)
        B, C = (v.view(b, L, c.n_groups, c.ssm_state_size) for v in (B, C))         # (b, L, G, N)
        y, before = self.ops.ssd(
            x, dt, B, C, self.dt_bias, self.A_log, self.D, state.ssm_state, c.time_step_limit,
            at.counts, at.block_size or c.chunk_size, at.keep)
        if at.keep == "inputs":
            rates = ssd_rates(dt, self.dt_bias, self.A_log, c.time_step_limit)
            state.inputs = inputs, x, *rates, B
        elif at.keep == "blocks":                                         # n blocks: b*n rows
            state.ssm_state, n = before.flatten(0, 1), before.shape[1]
            before = inputs.unfold(1, c.conv_kernel - 1, at.block_size)[:, :n]
            state.conv_state = rearrange(before, "b n channels w -> (b n) w channels")
        y = self.ops.gated_rms_norm(y.reshape(z.shape), z, self.norm.weight, c.n_groups,
                                    c.layer_norm_epsilon)
        return self.out_proj(y)


class Attention(Module):
    """Grouped-query attention without positional encoding."""

    def __init__(self, config: TwoTowerConfig):
        super().__init__()
        self.config = c = config
        query, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, query, bias=c.attention_bias)
        self.k_proj = nn.Linear(c.hidden_size, kv, bias=c.attention_bias)
        self.v_proj = nn.Linear(c.hidden_size, kv, bias=c.attention_bias)
        self.o_proj = nn.Linear(query, c.hidden_size, bias=c.attention_bias)

    def empty_state(self, rows: int, capacity: int) -> KVCache:
        """A cache with room for `capacity` tokens a row."""
        shape = (rows, self.config.num_key_value_heads, capacity, self.config.head_dim)
        return KVCache(*(torch.zeros(shape, dtype=weight.dtype, device=weight.device)
                         for weight in (self.k_proj.weight, self.v_proj.weight)))

    def forward(self, x: Tensor, cache: KVCache, at: Pass) -> Tensor:
        """x (B, L, D) -> (B, L, D): queries of the new tokens over the slots that `at` lets them
        see, their own among them. In training x is (B*n, Q, D): n blocks share a row's cache."""
        K = self.config.head_dim
        q, k, v = (projection(x).view(*at.slots.shape, -1, K)             # (B, L or n*Q, H or G, K)
                   for projection in (self.q_proj, self.k_proj, self.v_proj))
        k, v = cache.write(at.rows, at.slots, k, v, at.end)
        out = self.ops.attention(q.transpose(1, 2), k, v, at.last_seen, at.is_causal, at.mask)
        return self.o_proj(out.transpose(1, 2).reshape(*x.shape[:2], -1))


class MLP(nn.Module):
    """down(relu(up(x))^2): a dense layer, or the shared expert of an MoE layer."""

    def __init__(self, config: TwoTowerConfig, width: int | None = None):
        super().__init__()
        width = width or config.intermediate_size
        self.up_proj = nn.Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor, *_) -> Tensor:
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


class Quantized(nn.Module):
    """Expert weights (E, out, in) as int8 integers times bfloat16 scales; weight[e] is one again.

    "int8": integers (E, out, in), a scale for each output (E, 1, out). "int4": (E, out, in/2), in
    the low four bits input i plus 8, in the high ones input i + in/2; scales (E, in/32, out)."""

    def __init__(self, shape: tuple[int, int, int], kind: str):
        super().__init__()
        (E, out, inputs), self.shape, self.kind = shape, shape, kind
        inputs, groups = (inputs, 1) if kind == "int8" else (inputs // 2, inputs // 32)
        self.register_buffer("integers", torch.empty(E, out, inputs, dtype=torch.int8))
        self.register_buffer("scales", torch.empty(E, groups, out, dtype=torch.bfloat16))

    def __getitem__(self, e: int) -> Tensor:
        q, scales = self.integers[e], wide(self.scales[e])
        q = q if self.kind == "int8" else torch.cat([(q & 15) - 8, q >> 4], dim=1)
        return (q.unflatten(1, (len(scales), -1)) * scales.T[..., None]).flatten(1)


class StackedLinear(nn.Module):
    """The same projection of every expert: weight (E, out, in), bias (E, out) or None."""

    def __init__(self, config: TwoTowerConfig, inputs: int, outputs: int):
        super().__init__()
        shape, kind = (config.n_routed_experts, outputs, inputs), config.experts
        self.weight = Quantized(shape, kind) if kind else nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(shape[:2])) if config.mlp_bias else None


class MoE(Module):
    """Mixture of experts: the routed experts of each token plus the one shared expert."""

    def __init__(self, config: TwoTowerConfig):
        super().__init__()
        D, width = config.hidden_size, config.moe_intermediate_size
        self.gate = Router(config)
        self.experts = nn.ModuleDict({"up_proj": StackedLinear(config, D, width),
                                      "down_proj": StackedLinear(config, width, D)})
        self.shared_experts = MLP(config, config.moe_shared_expert_intermediate_size)

    def forward(self, x: Tensor, *_) -> Tensor:
        tokens, up, down = x.flatten(0, -2), self.experts["up_proj"], self.experts["down_proj"]
        topk_ids, topk_weights = self.gate(tokens)                               # (T, A) each
        out = self.ops.moe_experts(tokens, topk_ids, topk_weights, up.weight, down.weight, up.bias,
                                   down.bias, self.shared_experts)
        return out.unflatten(0, x.shape[:-1])


class Layer(Module):
    """x + mixer(norm(x)); in the denoiser also shifted, scaled and gated by the noise level."""

    def __init__(self, config: TwoTowerConfig, kind: str):
        super().__init__()
        self.kind, self.eps = kind, config.layer_norm_epsilon
        self.norm = nn.RMSNorm(config.hidden_size)                  # holds the weight only
        self.mixer = {"M": Mamba2, "*": Attention, "E": MoE, "-": MLP}[kind](config)

    def forward(self, x: Tensor, state: KVCache | MambaState | None, at: Pass,
                modulation: tuple[Tensor, Tensor, Tensor] | None) -> Tensor:
        """x (B, L, D) -> (B, L, D). modulation: shift, scale and gate (B, 1, D), or None."""
        shift, scale, gate = modulation or (None, None, None)
        h = self.ops.norm(x, self.norm.weight, self.eps, shift, scale, first=self.kind in "M*")
        return self.ops.add_gated(x, gate, self.mixer(h, state, at))


class Tower(Module):
    """Embedding, layers, final norm; the head is beside it, as in the checkpoint."""

    def __init__(self, config: TwoTowerConfig):
        super().__init__()
        self.config = config
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, kind) for kind in config.hybrid_override_pattern)
        self.norm_f = nn.RMSNorm(config.hidden_size)                # holds the weight only

    @property
    def device(self) -> torch.device:
        return self.embeddings.weight.device

    def forward(self, tokens: Tensor, states: list, at: Pass,
                modulations: list | None = None) -> Tensor:
        """tokens (B, L) -> normed hidden states (B, L, D); states, one per layer, are updated."""
        x = self.embeddings(tokens.to(self.device))
        if self.config.residual_in_fp32:
            x = wide(x)
        for i, layer in enumerate(self.layers):
            x = layer(x, states[i], at, modulations and modulations[i])
        return self.ops.norm(x, self.norm_f.weight, self.config.layer_norm_epsilon)


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
        places = torch.arange(128, dtype=torch.float32, device=t.device)
        frequencies = torch.exp(places * (-math.log(10000) / 128))
        angles = (t * 1000)[:, None].float() * frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=-1)

    def forward(self, t: Tensor) -> Tensor:
        dtype = self.mlp[0].weight.dtype            # t itself is rounded to it before the scaling
        return self.mlp(self.features(t.to(dtype)).to(dtype))


# ---------------------------------------------------------------------------------------------
# The model

TOKENS_PER_PASS = 4096          # of a prefill, all rows together
LOGITS_PER_DRAW = 2**20         # of places whose tokens are chosen together


class TwoTower(Module):
    """Context tower, denoiser tower, their heads and the time conditioning.

    TwoTower(config) initialises as for training from scratch, on torch's default device and in
    its default dtype. towers="context" leaves the denoiser out: AR and scores only.
    """

    backend, graphs = "torch", False    # see `use`

    def __init__(self, config: TwoTowerConfig, *, towers: str = "both"):
        super().__init__()
        require(towers in ("both", "context"),
                f"towers is {towers!r}, but it must be 'both' or 'context'")
        self.config = config
        D, V = config.hidden_size, config.vocab_size
        self.context_tower = Tower(config)
        self.context_lm_head = nn.Linear(D, V, bias=False)
        self.denoiser_tower = None
        if towers == "both":
            self.denoiser_tower = Tower(config)
            self.lm_head = nn.Linear(D, V, bias=False)
            self.t_embedder = TimestepEmbedder(D)
            self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(D, 3 * D))
            self.scale_shift_tables = nn.ParameterList(
                torch.randn(3, D) / D ** 0.5 for _ in range(config.num_hidden_layers))
        if not self.context_lm_head.weight.is_meta:
            require(config.experts is None, f"experts in {config.experts} cannot be trained; load "
                    "them with TwoTower.from_pretrained")
            self.apply(self._initialise)

    def _initialise(self, module: nn.Module):
        if isinstance(module, nn.Linear | nn.Embedding | Router | StackedLinear):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)

    # -- context tower ------------------------------------------------------------------------

    @torch.no_grad()
    def prefill(self, prompts: Tensor | Sequence[Tensor], *, reserve: int = 0) -> Context:
        """Read prompts with the context tower.

        Args: prompts (B, L) int64, or a list of ids for each row, of any lengths >= 1; reserve:
            room to allocate in the caches for this many more tokens a row.
        Returns: a Context; its logits are those after each row's last token.
        Raises: ValueError for an empty prompt, an id out of range, too long a prompt.
        """
        return self._prefill(check_texts(prompts, "prompt", self.config), reserve, "last")

    @torch.no_grad()
    def extend(self, context: Context, tokens: Tensor) -> Tensor:
        """Append tokens (B, L) int64 to the context; returns their logits (B, L, V) float32."""
        tokens = check_ids(tokens, "tokens", self.config, (len(context.lengths), None))
        check_length(int(context.lengths.max()) + tokens.shape[1], self.config)
        return self._extend(context, tokens, logits="all")

    def context_logits(self, tokens: Tensor) -> Tensor:
        """tokens (B, L) -> (B, L, V) float32 in one causal pass; differentiable."""
        tokens = check_ids(tokens, "tokens", self.config)
        return self._extend(Context(self.context_tower, *tokens.shape), tokens, "all", keep="none")

    def _prefill(self, prompts: list[Tensor], reserve: int, logits: str | None) -> Context:
        counts = torch.tensor([len(prompt) for prompt in prompts])
        context = Context(self.context_tower, len(prompts), int(counts.max()) + reserve)
        tokens = nn.utils.rnn.pad_sequence(prompts, batch_first=True)
        width, last = max(1, TOKENS_PER_PASS // len(prompts)), None
        for start in range(0, tokens.shape[1], width):
            # rows that have ended come along as padding: with all at one place one mask serves all
            context.lengths, here = torch.full_like(counts, start), (counts - start).clamp(0, width)
            hidden = self._extend(context, tokens[:, start:start + width], None, here)
            here = here.to(hidden.device)
            newest = window(hidden, here - 1, 1)        # (B, 1, D): of each row's last token here
            last = newest if last is None else newest.where(here[:, None, None] > 0, last)
        context.lengths = counts
        if logits is not None:
            context.logits = wide(self.context_lm_head(last))[:, 0]
        return context

    def _extend(self, context: Context, tokens: Tensor, logits: str | None,
                counts: Tensor | None = None, keep: str = "end",
                block_size: int | None = None) -> Tensor | None:
        """Read tokens (B, L), the first counts (B,) of each row; logits: "all", "last" or None, the
        hidden states; keep, block_size: of a `Pass`; `Context.settle` ends what "inputs" begins."""
        if context.passes is not None:
            return context.passes.extend(context, tokens, logits, keep)
        L = tokens.shape[1]
        at = context.next_pass(L, context.device, causal=True, counts=counts, keep=keep,
                               block_size=block_size)
        context.logits = None                           # the old ones make room
        hidden = self.context_tower(tokens, context.states, at)
        if keep != "inputs":
            context.lengths = context.lengths + (L if counts is None else counts)
        if logits is None:
            return hidden
        out = wide(self.context_lm_head(hidden[:, -1:] if logits == "last" else hidden))
        context.logits = out[:, -1]
        return out

    @torch.no_grad()
    def score(self, prompts, continuations, tokens_per_pass: int = 512) -> Scores:
        """Log-probabilities of continuations of prompts under the context tower.

        Args: prompts, continuations: as for `prefill`, one continuation for each prompt;
            tokens_per_pass: longer texts take several passes, whose memory grows with the text
            only by the KV cache and a mask of 256 queries over it.
        Raises: ValueError as `prefill` does, or for logits that are not finite.
        """
        prompts = check_texts(prompts, "prompt", self.config)
        continuations = check_texts(continuations, "continuation", self.config)
        require(len(prompts) == len(continuations),
                f"{len(continuations)} continuations for {len(prompts)} prompts")
        check_positive(tokens_per_pass, "tokens_per_pass")
        texts = [torch.cat(pair) for pair in zip(prompts, continuations)]
        check_length(max(map(len, texts)), self.config)
        # causality keeps the padding behind a text from changing anything in it
        inputs = nn.utils.rnn.pad_sequence(texts, batch_first=True)[:, :-1]
        context, parts = Context(self.context_tower, *inputs.shape), [[] for _ in texts]
        greedy = torch.ones(len(texts), dtype=torch.bool)
        for start in range(0, inputs.shape[1], tokens_per_pass):
            end = start + tokens_per_pass
            hidden = self._extend(context, inputs[:, start:end], None)
            for row, (prompt, text) in enumerate(zip(prompts, texts)):
                first, stop = max(start, len(prompt) - 1), min(end, len(text) - 1)
                if first < stop:                        # only logits that are used, row by row
                    wanted = text[first + 1:stop + 1].to(hidden.device)
                    scores, likeliest = log_probabilities(wide(self.context_lm_head(
                        hidden[row, first - start:stop - start])), wanted)
                    parts[row].append(scores.cpu())
                    greedy[row] &= bool(likeliest)
        scores = list(map(torch.cat, parts))
        for row, one in enumerate(scores):
            require(bool(one.isfinite().all()),
                    f"the log-probabilities of continuation {row} are not finite")
        return Scores(scores, torch.stack([one.double().sum() for one in scores]), greedy)

    # -- denoiser tower -----------------------------------------------------------------------

    @torch.no_grad()
    def denoise(self, block: Tensor, context: Context, t: Tensor | float | None = None) -> Tensor:
        """One denoiser pass over a noisy block that follows each row's context.

        Args: block (B, Q) int64, masked positions hold mask_token_id; t (B,) or a number in [0, 1],
            the masked fraction; None: no modulation and no gate.
        Returns: (B, Q, V) float32 logits; the context stays as it was (but for scratch slots).
        """
        self._need_denoiser()
        block = check_ids(block, "block", self.config, (len(context.lengths), None))
        return self._denoise(block, context, check_t(t, (len(block),)))

    def _need_denoiser(self):
        require(self.denoiser_tower is not None, "only the context tower is loaded; use "
                "towers='both', or generate_ar or score")

    def _denoise(self, block: Tensor, context: Context, t: Tensor | None,
                 at: Pass | None = None) -> Tensor:
        """at: where the block stands, if not behind the context."""
        if context.passes is not None:
            return context.passes.denoise(context, block, t)
        tower = self.denoiser_tower
        if at is None:
            at = context.next_pass(block.shape[1], tower.device, causal=False)
        modulations = None if t is None else self._modulations(t.to(tower.device))
        hidden = tower(block, context.states_on(tower.device), at, modulations)
        return wide(self.lm_head(hidden))

    def _modulations(self, t: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """t (B,) -> for each layer shift, scale and gate (B, 1, D): its table plus one vector."""
        vector = rearrange(self.t_block(self.t_embedder(t)), "b (three d) -> three b 1 d", three=3)
        tables = torch.stack(list(self.scale_shift_tables))[:, :, None, None]
        parts = (tables + vector).flatten(0, 1).unbind()
        return list(zip(parts[0::3], parts[1::3], parts[2::3]))

    # -- training -----------------------------------------------------------------------------

    def diffusion_logits(self, clean: Tensor, noisy: Tensor, t: Tensor | float | None,
                         block_size: int, blocks: Tensor | None = None, *,
                         joint: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Denoiser logits of every noisy block given the clean blocks before it, in one pass.

        Block b attends to clean tokens before it and to all of itself; its Mamba layers start from
        the context's states after block b-1. Equal to `denoise` block by block; differentiable in
        the denoiser's parameters, as published, and if joint in the context tower's too.

        Args: clean, noisy (B, M) int64 with M = n * block_size; t in [0, 1], (B,) as published or
            (B, n), one per block; None, as for `denoise`, with block_size 1 is mock-AR;
            blocks (B, k) int64, distinct: those of each row to denoise, None for all.
        Returns: (B, M or k * block_size, V) float32; if joint, also the context tower's (B, M, V).
        Source: arXiv 2606.26493, training.
        """
        self._need_denoiser()
        clean = check_ids(clean, "clean", self.config)
        noisy = check_ids(noisy, "noisy", self.config, clean.shape)
        (B, M), device = clean.shape, self.denoiser_tower.device
        require(block_size >= 1 and M % block_size == 0,
                f"clean has {M} tokens a row, no multiple of block_size {block_size}")
        n = M // block_size
        t = check_t(t, (B,), (B, n))
        blocks = (torch.arange(n).expand(B, n) if blocks is None else blocks).to(device)
        require(blocks.dim() == 2 and len(blocks) == B and 0 <= blocks.min() <= blocks.max() < n,
                f"blocks must be ({B}, k) numbers from 0 to {n - 1}")
        noisy, L = of_blocks(noisy.to(device), blocks, n), blocks.shape[1] * block_size
        if t is not None:
            t = of_blocks(t.to(device).reshape(B, -1).expand(B, n), blocks, n).flatten()
        context = Context(self.context_tower, B, M + L)     # noisy keys go behind the clean ones
        with torch.set_grad_enabled(joint and torch.is_grad_enabled()):
            beside = self._extend(context, clean, "all" if joint else None, keep="blocks",
                                  block_size=block_size)
            context.select_blocks(blocks, n)
        own = blocks.repeat_interleave(block_size, dim=1)[..., None]                 # (B, L, 1)
        seen = torch.arange(M, device=device) // block_size < own, own == own.mT
        at = context.next_pass(L, device, causal=False, mask=torch.cat(seen, dim=2)[:, None])
        logits = self._denoise(noisy.view(-1, block_size), context, t, at)
        logits = rearrange(logits, "(b k) q v -> b (k q) v", b=B)
        return (logits, beside) if joint else logits

    def diffusion_loss(self, tokens: Tensor, block_size: int,
                       generator: torch.Generator | None = None, *, masked: Tensor | None = None,
                       t: Tensor | None = None, reduction: str = "mean") -> Tensor:
        """The denoiser's training loss on clean tokens (B, M).

        One t ~ U[0.001, 1] per sequence; each token is masked with probability t; mean
        cross-entropy over all masked positions, labels not shifted, no 1/t weight.

        Args: masked (B, M) bool and t, as for `diffusion_logits`: other noise than that;
            reduction: "mean" gives a scalar, "none" the loss of each masked position.
        """
        if masked is None:
            device = (generator or tokens).device
            t = 0.001 + 0.999 * torch.rand(len(tokens), generator=generator, device=device)
            masked = torch.rand(tokens.shape, generator=generator, device=device) < t[:, None]
        masked = masked.to(tokens.device)
        noisy = tokens.masked_fill(masked, self.config.mask_token_id)
        logits = self.diffusion_logits(tokens, noisy, t, block_size)
        return masked_cross_entropy(logits, tokens, masked, reduction)

    def ar_loss(self, tokens: Tensor, targets: Tensor | None = None, *,
                reduction: str = "mean") -> Tensor:
        """Next-token cross-entropy of the context tower on tokens (B, L), L >= 2; of targets
        (B, L) bool alone, if given. reduction: as for `diffusion_loss`."""
        require(tokens.shape[-1] > 1, "an AR loss needs sequences of two tokens or more")
        targets = torch.ones_like(tokens, dtype=torch.bool) if targets is None else targets
        logits = self.context_logits(tokens[:, :-1])
        return masked_cross_entropy(logits, tokens[:, 1:], targets[:, 1:], reduction)

    # -- decoding: prompts as for `prefill`; for options see `Decoding` -----------------------

    @torch.inference_mode()
    def generate_ar(self, prompts, max_new_tokens: int | Sequence[int], temperature: float = 0.0,
                    **options) -> Generation:
        """Continue prompts with the context tower, one token at a time."""
        run = Decoding(self, prompts, max_new_tokens, temperature, **options)
        run.prefill(run.prompts, repeats=True)
        while run.append(run.next_token(run.context.logits[:, None])):
            run.extend(run.newest(1), "last")
        return run.result()

    @torch.inference_mode()
    def generate_mock_ar(self, prompts, max_new_tokens: int | Sequence[int],
                         temperature: float = 0.0, **options) -> Generation:
        """The denoiser as an AR model, a check of the plumbing: it reads the last token, without
        time conditioning, given the context before it, which stays one token behind the text."""
        self._need_denoiser()
        run = Decoding(self, prompts, max_new_tokens, temperature, **options)
        run.prefill([prompt[:-1] for prompt in run.prompts], None)
        while True:
            run.nfe[run.live] += 1
            if not run.append(run.next_token(self._denoise(run.newest(1), run.context, None))):
                return run.result()
            run.extend(run.newest(2)[:, :1])

    @torch.inference_mode()
    def generate_mask_diffusion(self, prompts, max_new_tokens: int | Sequence[int] | None = None,
                                block_size: int = 16, steps_per_block: int = 16,
                                mask_token_id: int | None = None, temperature: float = 0.0, *,
                                confidence_threshold: float = 0.8,
                                template: Sequence | None = None, **options) -> Generation:
        """Continue prompts block by block, committing confident tokens in parallel.

        Args:
            block_size: tokens denoised together; the last block is denoised whole, then cut.
            steps_per_block: denoiser passes a block may take at most.
            mask_token_id: None takes the config's.
            temperature: with top_k and top_p it shapes the draw, never the confidence.
            confidence_threshold: gamma; 0.8 is the published operating point.
            template: what the new text begins with: ids, as if committed (mask_token_id too), None
                for a hole, which a tensor cannot have; one sequence for all rows, or one (or None)
                for each. The text ends with it unless max_new_tokens is larger; EOS ends it only
                after the template.
        """
        self._need_denoiser()
        run = Decoding(self, prompts, max_new_tokens, temperature, block_size, steps_per_block,
                       mask_token_id, confidence_threshold, template, **options)
        run.prefill(run.prompts, None, repeats=True)
        while True:
            if not run.append(run.denoise_block(*run.next_block())):
                return run.result()
            run.extend(run.newest(block_size))

    @torch.inference_mode()
    def generate_speculative(self, prompts, max_new_tokens: int | Sequence[int],
                             draft_length: int = 16, steps_per_block: int = 1,
                             mask_token_id: int | None = None, temperature: float = 0.0, *,
                             confidence_threshold: float = 0.8, **options) -> Generation:
        """What `generate_ar` writes, in fewer passes of the context tower.

        The denoiser drafts the rest of a block whose first token is known; one context pass over
        the block gives AR's choice after each of its tokens. The draft is kept as far as it is what
        AR chose; AR's choice after that begins the next block. The same token for token, sampled
        too, but where a pass over a block rounds unlike single tokens: tested in float32; in
        bfloat16 a near tie may fall the other way.

        Args:
            draft_length: tokens of a block, the known one included.
            steps_per_block, mask_token_id, confidence_threshold: of the drafts, which are greedy,
                as for `generate_mask_diffusion`. By default one pass fills the whole draft: a
                wrong token costs only the rest of its block.
        Source: arXiv 2211.17192 (speculative decoding), with AR's draw in place of rejection.
        """
        self._need_denoiser()
        check_positive(draft_length, "draft_length")
        run = Decoding(self, prompts, max_new_tokens, temperature, draft_length, steps_per_block,
                       mask_token_id, confidence_threshold, **options)
        going = run.append(run.next_token(run.prefill(run.prompts, repeats=True), report=False))
        run.block_index, place = 0, torch.arange(draft_length)
        eos = torch.tensor(run.eos_token_ids, dtype=torch.long)
        while going:
            block = torch.full((len(run.live), draft_length), run.mask_token_id)
            block[:, :1] = run.newest(1)
            masked = (place > 0).expand_as(block)           # AR itself may have chosen the mask id
            left = torch.tensor([run.left[row] for row in run.live])                     # (R,)
            block = run.denoise_block(block, masked, place < left[:, None], greedy=True)
            ids, confidence = run.predict(run.extend(block, "all", keep="inputs"))
            right = (block[:, 1:] == ids[:, :-1]) & ~torch.isin(ids[:, :-1], eos)
            kept = (1 + right.long().cumprod(1).sum(1)).minimum(left)                    # (R,)
            run.check_finite(confidence, place < kept[:, None])
            run.context.settle(kept)
            going = run.append([row[:n] for row, n in zip(ids, kept)])
        return run.result()

    # -- loading ------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike, *, context_device=None,
                        denoiser_device=None, dtype: torch.dtype | None = None,
                        towers: str = "both", backend: str = "torch",
                        layout: str = "released", experts: str | None = None) -> TwoTower:
        """Load a checkpoint directory, config.json and safetensors, one file or indexed shards, or
        what `fetch` gets for the name of one on the Hugging Face Hub.

        Names and shapes are checked against the headers before any tensor is read; each tensor then
        goes straight to its tower's device, so that the host holds one at a time.

        Args: context_device, denoiser_device: None is torch's default device, and the context's;
            dtype: None keeps each tensor's own; the router is float32 at least in any case;
            towers: "both", or "context" to read nothing of the denoiser; backend: see `use`;
            layout: "backbone" does what `from_backbone` does; experts: "int8" or "int4" makes
            `Quantized` of the routed experts, one by one as they are read; None: as in the files.
        Raises: ValueError naming the file or tensor that is missing, unexpected or malformed.
        """
        first = torch.get_default_device() if context_device is None else context_device
        second = first if denoiser_device is None else denoiser_device
        first, second = check_device(first), check_device(second)
        model, files = cls.skeleton(fetch(directory, towers, layout), dtype=dtype,
                                    towers=towers, layout=layout, experts=experts)
        model.use(backend)              # refuses what cannot be had before a tensor is read
        return model.fill(files, first, second).use(backend)

    @classmethod
    @torch.no_grad()
    def from_backbone(cls, directory: str | os.PathLike, *, gate: str = "published",
                      **options) -> TwoTower:
        """Both towers from one of the Nemotron-H family, as Hugging Face holds it, and fresh time
        conditioning: as published, or with gate "copy" of shift 0, scale 0 and gate 1, so that at
        first t changes nothing. Multi-token prediction, `mtp.*`, is not read: the tower is the same
        without. Options and errors: of `from_pretrained`."""
        require(gate in ("published", "copy"),
                f"gate is {gate!r}, but it must be 'published' or 'copy'")
        model = cls.from_pretrained(directory, layout="backbone", **options)
        if gate == "copy" and model.denoiser_tower is not None:
            model.t_block[1].weight.zero_()
            for table in model.scale_shift_tables:
                table.copy_(torch.eye(3)[2, :, None].expand_as(table))
        return model

    @classmethod
    def skeleton(cls, directory: str | os.PathLike, *, dtype: torch.dtype | None = None,
                 towers: str = "both", layout: str = "released",
                 experts: str | None = None) -> tuple[TwoTower, dict[str, Path]]:
        """What `from_pretrained` would load, without data: a model on the meta device, with the
        shapes and dtypes it would have, and the file of every tensor of the checkpoint. layout: of
        the checkpoint, "released", "backbone" or "any"."""
        directory = Path(directory)
        require(directory.is_dir(), f"{directory} is not a directory")
        config = TwoTowerConfig.from_json(directory / "config.json")
        with torch.device("meta"):
            model = cls(config, towers=towers)
            found = read_headers(directory, towers, layout)
            check_tensors(model, found, directory)
            set_dtypes(model, {key: DTYPES.get(kind, torch.int8)
                               for key, (_, _, kind) in found.items()}, dtype)
            if experts not in (None, config.experts):
                require(config.experts is None, f"{directory} holds experts in {config.experts}, "
                        f"not {experts}: those are made from the released weights")
                plain, model = model, cls(replace(config, experts=experts), towers=towers)
                model.load_state_dict(plain.state_dict(), strict=False, assign=True)
        return model, {key: path for key, (path, _, _) in found.items()}

    def fill(self, files: dict[str, Path], context_device, denoiser_device,
             on_load: Callable[[int], None] | None = None) -> TwoTower:
        """Read the tensors of a `skeleton` from its files, each to its tower's device; on_load is
        called with the bytes of each. Time conditioning that they lack is initialised."""
        self.load_state_dict({name: torch.empty_like(
            tensor, device=context_device if name.startswith("context_") else denoiser_device)
            for name, tensor in self.state_dict().items()}, assign=True)
        parts = {(key, name): part for key, name, part in checkpoint_tensors(self, files)}
        for (key, name), part in parts.items():
            scales = parts.get((f"{key}_scale", name.replace(".integers", ".scales")))
            if key in files:            # if not, scales, which are found with the integers
                # opened anew for each tensor, so that pages already read do not stay mapped
                with safe_open(files[key], "pt", device=str(part.device)) as file:
                    if scales is None or f"{key}_scale" in files:
                        part.copy_(file.get_tensor(key))
                    else:
                        read = file.get_slice(key)
                        for e in range(len(part)) if part.dim() == 3 else [...]:
                            part[e], scales[e] = quantize(read[e], self.config.experts)
            if on_load is not None:
                on_load(part.nbytes)
        if self.denoiser_tower is not None and backbone_of(files):
            nn.ModuleList([self.t_embedder, self.t_block]).apply(self._initialise)
            for table in self.scale_shift_tables:
                nn.init.normal_(table, std=self.config.hidden_size ** -0.5)
        return self

    def save_pretrained(self, directory: str | os.PathLike, max_shard_bytes: int = 5 * 10**9,
                        files: dict[str, bytes] | None = None, *, towers: str = "both",
                        layout: str | None = None):
        """Write config.json, safetensors in the released layout, sharded above max_shard_bytes, and
        `files`, such as {"tokenizer.json": b"..."}, in place of an older checkpoint. Interrupted at
        any time, it leaves the older one, the new one, or one that does not load. What two modules
        share is written for each. towers: "context" leaves the denoiser out; then layout "backbone"
        is what `from_backbone`, transformers and vLLM read; `Quantized` experts make one of their
        own. Raises: ValueError for tensors that would not load again; OSError if writing fails."""
        require(None in (self.config.experts, layout), f"layout {layout!r} cannot hold experts in "
                f"{self.config.experts}, which have a layout of their own; leave it out")
        layout = layout or "released"
        require((towers, layout) in (("both", "released"), ("context", "released"),
                                     ("context", "backbone")), f"layout {layout!r} cannot hold "
                f"towers {towers!r}; released can hold both or context, backbone context")
        towers = "context" if self.denoiser_tower is None else towers
        directory = Path(directory)
        parts = {key: part for key, name, part in checkpoint_tensors(self, [layout + "."])
                 if towers == "both" or name.startswith("context_")}
        with torch.device("meta"):
            check_tensors(TwoTower(self.config, towers=towers), {
                key: ("this model", list(part.shape), part.dtype) for key, part in parts.items()},
                "this model")
        directory.mkdir(parents=True, exist_ok=True)
        old = [path for path in directory.iterdir() if CHECKPOINT_FILE.fullmatch(path.name)]
        require(towers == "both" or all(path.suffix == ".partial" for path in old), f"{directory} "
                "holds a checkpoint, which a context tower alone must not replace; save elsewhere")
        shards = shards_of(parts, max_shard_bytes)
        made = {"config.json": self.config.to_dict() | {"backbone": BACKBONE}.get(layout, {}) | {
            "torch_dtype": str(self.context_lm_head.weight.dtype).removeprefix("torch.")}}
        if len(shards) > 1:
            made[INDEX] = {
                "metadata": {"total_size": sum(part.nbytes for part in parts.values())},
                "weight_map": {key: name for name, shard in shards.items() for key in shard}}
        made = {name: (json.dumps(value, indent=2) + "\n").encode() for name, value in made.items()}
        saves = {name: lambda path, content=content: path.write_bytes(content)
                 for name, content in (made | (files or {})).items()}
        for name, shard in shards.items():
            saves[name] = lambda path, shard=shard: save_file(      # copies, which share no memory
                {key: part.to("cpu", copy=True).contiguous() for key, part in shard.items()},
                path, {"format": "pt"})
        write({directory / name: save for name, save in saves.items()}, old)

    def use(self, backend: str, graphs: bool = False) -> TwoTower:
        """Choose whose OPERATIONS run: "torch" this file's, "triton" those of kernels.py (without
        gradients), "auto" the latter on GPUs where they can be had; `backend` then says which.

        graphs: all ways of decoding but mock-AR record the passes that repeat as CUDA graphs, and
        anew when the rows have halved. Needs "triton".
        Raises: ValueError if they cannot be had.
        """
        require(backend in ("auto", "torch", "triton"),
                f"backend is {backend!r}, but it must be auto, torch or triton")
        if backend == "auto":
            there = KERNELS.is_file() and importlib.util.find_spec("triton") is not None
            backend = "triton" if there and all(p.is_cuda for p in self.parameters()) else "torch"
        require(backend == "triton" or not graphs, "graphs need backend 'triton'")
        require(not graphs or len({p.device for p in self.parameters()}) == 1,
                "graphs need both towers on one device")
        ops = Module.ops if backend == "torch" else SimpleNamespace(
            **{name: getattr(kernels(), name) for name in OPERATIONS})
        for module in self.modules():
            if isinstance(module, Module):
                module.ops = ops
        self.backend, self.graphs = backend, graphs
        return self


# ---------------------------------------------------------------------------------------------
# Decoding: choosing tokens, and what all modes share


def shape_logits(logits: Tensor, temperature: float, top_k: int | None = None,
                 top_p: float | None = None) -> Tensor:
    """logits (..., V) / temperature, with -inf outside the top_k and outside the top_p nucleus: the
    most likely tokens, up to and including the one that takes their total past top_p."""
    logits = (logits.double() - logits.amax(-1, keepdim=True)) / temperature     # cannot overflow
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


def noise(seeds: Tensor, positions: Tensor, step: int, V: int) -> Tensor:
    """U(0, 1) numbers that depend on (seed, position, step, token id) and on nothing else: a row
    draws the same whatever stands beside it, on every device, and speculative decoding draws what
    AR does. Counter-based: splitmix64's mixing function, whose products wrap in int64.

    Args: seeds (R), positions (R, Q) int64: of a token in its text. Returns: (R, Q, V) float64.
    """
    def mix(x: Tensor) -> Tensor:           # >> carries the sign, which & 2**n - 1 cuts off
        x = (x ^ (x >> 30 & 2**34 - 1)) * -4658895280553007687
        x = (x ^ (x >> 27 & 2**37 - 1)) * -7723592293110705685
        return x ^ (x >> 31 & 2**33 - 1)

    golden = -7046029254386353131
    key = mix(mix(mix(seeds + golden)[:, None] + positions * golden) + step)
    tokens = torch.arange(1, V + 1, device=key.device) * golden
    bits = mix(key[..., None] + tokens) >> 12 & 2**52 - 1       # half of one more keeps 0 and 1 out
    return (bits.double() + 0.5) * 2.0**-52


def select_commits(confidence: Tensor, masked: Tensor, confidence_threshold: float,
                   steps_left: int) -> Tensor:
    """Which masked positions take their prediction in this step, row by row: all on the last step;
    else as many as are more confident than the threshold, but at least one and at least an even
    share of what is left; the most confident ones go first.

    Args: confidence (R, Q); masked (R, Q) bool; steps_left counts this step (1 = the last).
    Returns: (R, Q) bool, a subset of masked.
    """
    left = masked.sum(-1)
    sure = (masked & (confidence > confidence_threshold)).sum(-1)
    share = (left + steps_left - 1) // steps_left       # 1 or more, on the last step all of them
    order = confidence.where(masked, -math.inf).argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(dim=-1)                        # 0 for the most confident masked position
    return masked & (rank < sure.maximum(share)[:, None])


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
    masked: Tensor              # (R, Q) bool: before the step


class Written(NamedTuple):
    """What `on_tokens` is told of a row's new tokens, once they are final; True ends the row."""

    row: int
    new: list[int]              # ids, cut after EOS and at max_new_tokens
    ended: bool                 # nothing follows in any case
    nfe: int                    # what the row has cost so far
    context_passes: int


@dataclass
class Generation:
    """New tokens of each row, cut after EOS and at max_new_tokens, and what they cost."""

    tokens: list[Tensor]        # B tensors (n,) int64 on the host
    nfe: Tensor                 # (B,) int64: denoiser passes
    context_passes: Tensor      # (B,) int64: context tower passes, the prompt's included


class Scores(NamedTuple):
    """Natural logarithms of the probabilities of each row's continuation."""

    tokens: list[Tensor]        # B tensors (n,) f32 on the host: each given all tokens before it
    total: Tensor               # (B,) float64: their sums
    greedy: Tensor              # (B,) bool: every token was the likeliest one


class Decoding:
    """What all four ways of decoding share: the rows, their texts and limits, the context.

    Args:
        prompts: as for `prefill`. max_new_tokens: for all rows, or one for each.
        block_size .. template: see `generate_mask_diffusion`.
        temperature: 0 is greedy; else Gumbel-max draws, shaped by top_k and top_p.
        eos_token_id: ends a row, as any of several does; None never stops early.
        seed: of the draws: one number, to which a row's number is added, or one for each row; a
            row's draws do not depend on what stands beside it, its text only by rounding, which in
            bfloat16 may turn a near tie. None takes torch's.
        on_step: called with a `Step` after every denoiser pass, or AR token.
        on_tokens: called with a `Written` for each row that got tokens; True ends the row.
    Raises: ValueError for impossible arguments, and later for logits that are not finite.
    """

    def __init__(self, model: TwoTower, prompts, max_new_tokens: int | Sequence[int] | None,
                 temperature: float = 0.0, block_size: int = 1, steps_per_block: int = 1,
                 mask_token_id: int | None = None, confidence_threshold: float = 0.8,
                 template: Sequence | None = None, *, top_k: int | None = None,
                 top_p: float | None = None, eos_token_id: int | Sequence[int] | None = None,
                 seed: int | Sequence[int] | None = None,
                 on_step: Callable[[Step], None] | None = None,
                 on_tokens: Callable[[Written], bool | None] | None = None):
        self.model, self.on_step = model, on_step or (lambda step: None)
        self.on_tokens = on_tokens or (lambda written: None)
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.block_size, self.steps_per_block = block_size, steps_per_block
        self.mask_token_id = model.config.mask_token_id if mask_token_id is None else mask_token_id
        self.confidence_threshold = confidence_threshold
        self.eos_token_ids = eos_ids(eos_token_id, model.config.vocab_size)
        check_decoding(self, model.config)
        self.prompts = check_texts(prompts, "prompt", model.config)
        rows = len(self.prompts)
        # of each row what is still to come: the tokens of its template, and how many at most in all
        self.templates = check_templates(template, rows, model.config)
        self.left = check_limits(max_new_tokens, self.prompts, self.templates, model.config)
        seed = int(torch.randint(2**62, ())) if seed is None else plain(seed)
        seeds = check_rows(seed, "seed", 0, rows)
        seeds = seeds if isinstance(seed, Sequence) else range(seed, seed + rows)
        self.seeds = torch.tensor([one % 2**63 for one in seeds])                    # (B,)
        self.live = list(range(rows))                   # R rows are still being written
        self.texts = [prompt.tolist() for prompt in self.prompts]       # with what is written
        self.nfe = torch.zeros(rows, dtype=torch.long)
        self.context_passes = torch.zeros(rows, dtype=torch.long)
        self.block_index = 0

    def newest(self, n: int) -> Tensor:
        """(R, n): the newest tokens of each live row."""
        return torch.tensor([self.texts[row][-n:] for row in self.live])

    def prefill(self, prompts: list[Tensor], logits: str | None = "last",
                repeats: bool = False) -> Tensor | None:
        """Begin the context; returns the logits (R, 1, V) after it. repeats: what follows are equal
        passes over the same rows, which can be recorded."""
        self.context = self.model._prefill(prompts, max(self.left) + self.block_size, logits)
        self.context_passes += self.context.lengths > 0
        if repeats and self.model.graphs:
            self.context.passes = kernels().Passes(self.model, self.context)
        return None if logits is None else self.context.logits[:, None]

    def extend(self, tokens: Tensor, logits: str | None = None, keep: str = "end") -> Tensor | None:
        """Read tokens (R, L) with the context tower; returns logits, "all" or the "last"."""
        self.context_passes[self.live] += 1
        return self.model._extend(self.context, tokens, logits, keep=keep)

    def predict(self, logits: Tensor, step: int = 0, mask_token_id: int | None = None,
                greedy: bool = False) -> tuple[Tensor, Tensor]:
        """What a pass with logits (R, Q, V) proposes for the next Q places of each row, never the
        mask token, if given: ids (R, Q), and as confidence (R, Q) their `probability` at
        temperature 1; both on the host."""
        R, Q, V = logits.shape
        # some of the R*Q places at a time, as a draw holds a dozen copies of their logits
        parts = logits.flatten(0, 1).split(LOGITS_PER_DRAW // V or 1)
        if greedy or self.temperature == 0:
            chosen = [most_likely(part, mask_token_id) for part in parts]
        else:
            seeds = self.seeds[self.live].repeat_interleave(Q)
            places = torch.tensor([[len(self.texts[row])] for row in self.live]) + torch.arange(Q)
            chosen = [self.draw(part, mask_token_id, *where, step) for part, *where in zip(
                parts, *(x.split(len(parts[0])) for x in (seeds, places.flatten())))]
        ids, confidence = map(torch.cat, zip(*chosen))
        both = torch.stack([ids.double(), confidence.double()]).view(2, R, Q).cpu()     # one wait
        return both[0].long(), both[1].to(confidence.dtype)

    def draw(self, logits: Tensor, mask_token_id: int | None, seeds: Tensor, places: Tensor,
             step: int) -> tuple[Tensor, Tensor]:
        """As `predict` for logits (n, V) of n places (n) of texts with seeds (n): a draw."""
        shaped = shape_logits(without(logits, mask_token_id), self.temperature, self.top_k,
                              self.top_p)
        (_, V), device = shaped.shape, shaped.device
        u = noise(seeds.to(device), places[:, None].to(device), step, V)[:, 0]
        ids = gumbel_argmax(shaped, u)
        return ids, probability(logits, ids, mask_token_id)

    def check_finite(self, confidence: Tensor, used: Tensor, step: int = 0):
        """Raise if a position that is used (R, Q) bool had logits that are not finite."""
        bad = (used & ~confidence.isfinite()).nonzero()
        if len(bad):
            row, position = bad[0].tolist()
            raise ValueError(f"the logits are not finite at row {self.live[row]}, block "
                             f"{self.block_index}, step {step}, position {position}; no token was "
                             "committed")

    def next_token(self, logits: Tensor, report: bool = True) -> Tensor:
        """One AR token (R, 1) for every live row, from logits (R, 1, V)."""
        ids, confidence = self.predict(logits)
        everywhere = torch.ones_like(ids, dtype=torch.bool)
        self.check_finite(confidence, everywhere)
        if report:
            before = torch.full_like(ids, self.mask_token_id)
            self.on_step(Step(self.live, self.block_index, 0, torch.ones(len(ids)), before, ids,
                              everywhere, confidence, everywhere))
        return ids

    def next_block(self) -> tuple[Tensor, Tensor, Tensor]:
        """For each live row its template's tokens, where it has some, and masks (R, Q); which
        positions are masked (R, Q), and which are wanted: all but those past a template's end."""
        block = torch.full((len(self.live), self.block_size), self.mask_token_id)
        masked, wanted = torch.ones(2, *block.shape, dtype=torch.bool)
        for r, row in enumerate(self.live):
            for i, token in enumerate(self.templates[row][:self.block_size]):
                if token is not None:
                    block[r, i], masked[r, i] = token, False
            if len(self.templates[row]) == self.left[row]:
                wanted[r, self.left[row]:] = False
        return block, masked, wanted

    def denoise_block(self, block: Tensor, masked: Tensor, wanted: Tensor,
                      greedy: bool = False) -> Tensor:
        """Denoise block (R, Q), step by step, until nothing wanted (R, Q) is masked (R, Q)."""
        for step in range(self.steps_per_block):
            unfinished = (masked & wanted).any(-1)          # (R,) rows that need this step
            if not unfinished.any():
                break
            t = masked.float().mean(-1)
            self.nfe[self.live] += unfinished
            ids, confidence = self.predict(self.model._denoise(block, self.context, t), step,
                                           self.mask_token_id, greedy)
            fillable = masked & unfinished[:, None]
            self.check_finite(confidence, fillable, step)
            commits = select_commits(confidence, fillable, self.confidence_threshold,
                                     self.steps_per_block - step)
            before, block = block, ids.where(commits, block)
            self.on_step(Step(self.live, self.block_index, step, t, before, block, commits,
                              confidence, masked))
            masked = masked & ~commits
        return block

    def append(self, new: Sequence[Tensor]) -> bool:
        """Add ids, R tensors (n,), up to the length asked for and an EOS after the template; rows
        that end leave the context. Returns whether any goes on."""
        going = []
        for r, row in enumerate(self.live):
            ids, template = new[r][:self.left[row]].tolist(), len(self.templates[row])
            ended = len(ids) == self.left[row]
            ends = [i for i in range(template, len(ids)) if ids[i] in self.eos_token_ids]
            if ends:
                ids, ended = ids[:ends[0] + 1], True
            self.templates[row] = self.templates[row][len(ids):]
            self.left[row] -= len(ids)
            self.texts[row] += ids
            passes = int(self.nfe[row]), int(self.context_passes[row])
            if not (self.on_tokens(Written(row, ids, ended, *passes)) or ended):
                going.append(r)
        self.live, self.block_index = [self.live[r] for r in going], self.block_index + 1
        self.context.select(going)
        return bool(going)

    @torch.inference_mode(False)                # tensors that can be trained on
    def result(self) -> Generation:
        tokens = [torch.tensor(text[len(prompt):], dtype=torch.long)
                  for text, prompt in zip(self.texts, self.prompts)]
        return Generation(tokens, self.nfe.clone(), self.context_passes.clone())


# ---------------------------------------------------------------------------------------------
# Checks: one line for everything that cannot be


def require(ok: bool, message: str):
    if not ok:
        raise ValueError(message)


def plain(value):
    """Numbers of NumPy and torch, and transformers 5's infinity, as Python's; in lists too."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, list | tuple):
        return type(value)(map(plain, value))
    return math.inf if value == INFINITY else value


def eos_ids(given: int | Sequence[int] | None, V: int, name: str = "eos_token_id") -> list[int]:
    """The ids that end a text: none, one or several."""
    ids = plain(given)
    ids = [] if ids is None else list(ids) if isinstance(ids, Sequence) else [ids]
    require(all(type(one) is int and 0 <= one < V for one in ids),
            f"{name} is {given!r}, but it must be ids in [0, {V}), one or several, or None")
    return ids


def check_config(c: TwoTowerConfig):
    """Raise for the first field that breaks its rule."""
    def check(name: str, holds: bool, rule: str):
        require(holds, f"config: {name} is {getattr(c, name)!r}, but {rule}")

    types = {
        "int": (lambda v: type(v) is int and v > 0, "a positive integer"),
        "float": (lambda v: type(v) in (int, float) and 0 < v < math.inf, "a positive number"),
        "bool": (lambda v: type(v) is bool, "true or false"),
        "str": (lambda v: type(v) is str, "text"),
        "tuple[float, float]": (lambda v: type(v) is tuple and {*map(type, v)} <= {int, float} and
                                len(v) == 2 and 0 <= v[0] <= v[1], "[low, high], 0 <= low <= high")}
    for field in dataclasses.fields(c)[:-5]:                # ids are four of the last five
        holds, what = types[field.type]
        check(field.name, holds(getattr(c, field.name)), f"it must be {what}")
    for name, other in (("num_attention_heads", "num_key_value_heads"),
                        ("mamba_num_heads", "n_groups"), ("n_routed_experts", "n_group")):
        whole = getattr(c, other)
        check(name, getattr(c, name) % whole == 0, f"it must be a multiple of {other} {whole}")
    for name, other in (("topk_group", "n_group"), ("num_experts_per_tok", "n_routed_experts"),
                        ("time_step_min", "time_step_max")):
        most = getattr(c, other)
        check(name, getattr(c, name) <= most, f"{other} is {most}")
    for name, only in (("mlp_hidden_act", "relu2"), ("mamba_hidden_act", "silu"),
                       ("tie_word_embeddings", False)):
        check(name, getattr(c, name) == only, f"only {only} is supported"
              + "; write lm_head.weight apart from the embeddings" * (name[:3] == "tie"))
    pattern, layers = c.hybrid_override_pattern, c.num_hidden_layers
    check("hybrid_override_pattern", set(pattern) <= set("M*E-") and len(pattern) == layers,
          f"it must be M (Mamba-2), * (attention), E (MoE) or - (MLP) for each of {layers} layers")
    check("n_group", c.n_group == 1 or c.n_routed_experts >= 2 * c.n_group, "each needs 2 experts")
    eos_ids(c.eos_token_id, V := c.vocab_size, "config: eos_token_id")
    check("mask_token_id", type(c.mask_token_id) is int and 0 <= c.mask_token_id < V,
          f"it must be an id in [0, {V})")
    check("experts", c.experts in (None, *["int8", "int4"] * ("E" in pattern)),
          "it must be int8 or int4, and that only of a model with routed experts")
    check("experts", c.experts != "int4" or c.hidden_size % 64 == c.moe_intermediate_size % 64 == 0,
          "hidden_size and moe_intermediate_size are not both multiples of 64")


def check_ids(ids, name: str, config: TwoTowerConfig, shape: tuple = (None, None)) -> Tensor:
    """ids as an int64 tensor, all of the vocabulary, of that shape; None is any size from 1."""
    try:
        ids = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name} must be token ids, got {ids!r:.40}") from None
    fits = ids.dim() == len(shape) and all(
        size > 0 and wanted in (None, size) for size, wanted in zip(ids.shape, shape))
    require(fits and ids.dtype == torch.long, f"{name} must be int64 ids of shape ("
            + ", ".join("1 or more" if wanted is None else str(wanted) for wanted in shape)
            + f"), got {ids.dtype} {tuple(ids.shape)}")
    V, (low, high) = config.vocab_size, map(int, ids.aminmax())
    require(low >= 0 and high < V,
            f"{name} holds id {low if low < 0 else high}, but ids must be in [0, {V})")
    check_length(ids.shape[-1], config)
    return ids


def check_texts(texts, name: str, config: TwoTowerConfig) -> list[Tensor]:
    """A tensor (L,) of ids for each of one or more texts."""
    require(len(texts) > 0, f"there is no {name}")
    return [check_ids(ids, f"{name} {i}", config, (None,)) for i, ids in enumerate(texts)]


def check_length(length: int, config: TwoTowerConfig):
    require(length <= config.max_position_embeddings, f"{length} tokens are more than the model's "
            f"max_position_embeddings {config.max_position_embeddings}")


def check_positive(value: int, name: str):
    require(type(plain(value)) is int and value > 0,
            f"{name} is {value!r}, but it must be a positive integer")


def check_device(place) -> str:
    try:
        return str(torch.zeros(1, device=place).device)
    except (RuntimeError, AssertionError) as error:     # of a build without CUDA
        raise ValueError(f"device {place} cannot be used: {error}".splitlines()[0]) from None


def check_t(t, *shapes: tuple[int, ...]) -> Tensor | None:
    """t as a floating tensor of one of the shapes; one number becomes the first."""
    if t is None:
        return None
    t = torch.as_tensor(t)
    t = t if t.is_floating_point() else t.float()
    require(t.shape in ((), *shapes) and bool(((t >= 0) & (t <= 1)).all()),
            f"t is {t.tolist()}, but it must be in [0, 1], one number or of shape "
            + " or ".join(map(str, shapes)))
    return t if t.dim() else t.expand(shapes[0])


def check_decoding(run: Decoding, config: TwoTowerConfig):
    """Raise for impossible options of `Decoding`."""
    V = config.vocab_size
    check_positive(run.block_size, "block_size")
    check_length(run.block_size, config)
    check_positive(run.steps_per_block, "steps_per_block")
    for name, holds, rule in (
            ("temperature", lambda v: 0 <= v < math.inf, "0 or more"),
            ("top_k", lambda v: v is None or v >= 1, "1 or more"),
            ("top_p", lambda v: v is None or 0 < v <= 1, "in (0, 1]"),
            ("confidence_threshold", lambda v: v >= 0, "0 or more"),
            ("mask_token_id", lambda v: type(v) is int and 0 <= v < V, f"an id in [0, {V})")):
        value = plain(getattr(run, name))
        require(holds(value), f"{name} is {value!r}, but it must be {rule}")


def check_templates(template, rows: int, config: TwoTowerConfig) -> list[list[int | None]]:
    """Each row's template, [] where there is none."""
    rule = f"template must be ids (None is a hole), or such a sequence for each of {rows} prompts"
    require((template := plain(template)) is None or isinstance(template, Sequence), rule)
    one = template is None or any(isinstance(token, int) for token in template)
    templates = [template] * rows if one else template
    require(len(templates) == rows, rule)

    def checked(ids, name: str) -> list[int | None]:
        filled = [0 if one is None else one for one in ids] if isinstance(ids, Sequence) else ids
        filled = check_ids(filled, name, config, (None,)).tolist()
        return [None if given is None else token for given, token in zip(ids, filled)]
    return [[] if ids is None else checked(ids, f"template {row}")
            for row, ids in enumerate(templates)]


def check_limits(max_new_tokens, prompts: list[Tensor], templates: list[list[int]],
                 config: TwoTowerConfig) -> list[int]:
    """How many tokens each row may get: as given, or as many as its template has."""
    if max_new_tokens is None and all(map(len, templates)):
        max_new_tokens = [len(template) for template in templates]
    limits = check_rows(max_new_tokens, "max_new_tokens", 1, len(prompts))
    check_length(max(len(prompt) + new for prompt, new in zip(prompts, limits)), config)
    for row, (template, new) in enumerate(zip(templates, limits)):
        require(len(template) <= new, f"template {row} has {len(template)} tokens, more than the "
                f"{new} of max_new_tokens")
    return limits


def check_rows(value, name: str, least: int, rows: int) -> list[int]:
    """One integer of `least` or more for each row: those given, or the one given."""
    values = list(value) if isinstance(value := plain(value), Sequence) else [value] * rows
    require(len(values) == rows and all(type(v) is int and v >= least for v in values), f"{name} "
            f"is {value!r}, but it must be an integer of {least} or more, for all or for each of "
            f"{rows} prompts")
    return values


# ---------------------------------------------------------------------------------------------
# Checkpoint files

INDEX = "model.safetensors.index.json"
CHECKPOINT_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?(\.partial)?")
BACKBONE = {"model_type": "nemotron_h", "architectures": ["NemotronHForCausalLM"],
            "n_shared_experts": 1}      # what transformers and vLLM want of a config.json
TIME_KEYS = ("t_embedder.", "t_block.", "scale_shift_tables.")
DENOISER_KEYS = ("denoiser_tower.", "lm_head.", *TIME_KEYS)
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_json(path: Path) -> dict:
    check_file(path, ": saving was interrupted; save again" * Path(f"{path}.partial").exists())
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:                     # of JSON or of UTF-8
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    require(isinstance(value, dict), f"{path} must hold a JSON object")
    return value


def shard_names(directory: Path, towers: str, layout: str = "any") -> list[str]:
    """The safetensors files that are needed of a checkpoint, by its index."""
    names = {"": "model.safetensors"} if not (directory / INDEX).exists() else read_json(
        directory / INDEX).get("weight_map") or {}
    skip = unread(names, towers, layout, directory)
    return sorted({file for key, file in names.items() if not key.startswith(skip)})


def fetch(name, towers: str = "both", layout: str = "any", revision: str | None = None,
          weights: bool = True) -> Path:
    """The directory of a checkpoint: `name`, or what the Hub has under OWNER/NAME, of which no more
    is downloaded than is needed. Raises: what the package huggingface_hub does."""
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name)) or Path(name).parent.is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    files = ["config.json", "tokenizer.json", INDEX]
    directory = Path(snapshot_download(str(name), revision=revision, allow_patterns=files))
    return directory if not weights else Path(snapshot_download(
        str(name), revision=revision, allow_patterns=shard_names(directory, towers, layout)))


def check_file(path: Path, cause: str = ""):
    """Raise where there is no file, or only what stands for one that was not downloaded."""
    require(path.is_file(), f"{path} is missing{cause}" if not path.is_symlink() else
            f"{path} is a link to nothing: its download did not end; download it again")
    with path.open("rb") as file:
        require(file.read(23) != b"version https://git-lfs", f"{path} is a Git LFS pointer: the "
                "file itself was not downloaded; run git lfs pull, or download it")


def write(files: dict[Path, Callable[[Path], None]], old: Sequence[Path] = ()):
    """Write files, and remove old ones, as one: each is first saved under another name; then the
    first, without which a reader takes none, is removed, and it comes back last."""
    partial = {path: Path(f"{path}.partial") for path in files}
    first, *others = files
    try:
        for path, save in files.items():
            save(partial[path])
            partial[path].chmod(partial[first].stat().st_mode)      # save_file's own is 0600
        if others:
            first.unlink(missing_ok=True)
    except BaseException as error:
        for unfinished in partial.values():
            unfinished.unlink(missing_ok=True)
        raise OSError(f"writing {path} failed: {error}") if isinstance(error, Exception) else error
    for path in {*old} - {*files, *partial.values()}:
        path.unlink()
    for path in (*others, first):
        os.replace(partial[path], path)


def checkpoint_tensors(model: nn.Module, files=()) -> list[tuple[str, str, Tensor]]:
    """What a checkpoint whose names are like `files` holds of the model: its names there and here,
    and itself; each expert's own, if not stacked there too; in a backbone the same for either tower
    and nothing for the time. What a wrapper, such as torch.compile's, adds to names is left out."""
    tower, found = backbone_of(files), []
    for name, tensor in model.state_dict().items():
        key = re.sub(r"\b(_orig_mod|module)\.", "", name)
        key = key.replace(".weight.integers", ".weight").replace(".weight.scales", ".weight_scale")
        if tower is not None:
            key = re.sub("^(context|denoiser)_tower.", tower, key).removeprefix("context_")
        stack = key.replace(".weight", "")               # so transformers names it in memory
        key = stack if stack.removesuffix("_scale") in files else key
        if ".mixer.experts." in key and key.removesuffix("_scale") not in files:
            found += [(key.replace(".mixer.experts.", f".mixer.experts.{e}."), name, part)
                      for e, part in enumerate(tensor)]
        elif tower is None or not key.startswith(TIME_KEYS):
            found.append((key, name, tensor))
    return found


def shards_of(parts: dict[str, Tensor], most: int) -> dict[str, dict[str, Tensor]]:
    """Tensors by the file they go to, of at most so many bytes or of one tensor."""
    shards, size = [{}], 0
    for key, part in parts.items():
        size += part.nbytes
        if shards[-1] and size > most:
            shards.append({})
            size = part.nbytes
        shards[-1][key] = part
    return {f"model-{i:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else
            "model.safetensors": shard for i, shard in enumerate(shards, 1)}


def check_tensors(model: nn.Module, found: dict[str, tuple], where):
    """Raise unless the tensors found, a place, shape and dtype each, are all of the model."""
    expected = {key: (DTYPES if part.is_floating_point() else {"I8": torch.int8}, list(part.shape))
                for key, _, part in checkpoint_tensors(model, found)}
    for key in sorted(expected.keys() | found):
        path, shape, kind = found.get(key, (where, None, None))
        kinds, wanted = expected.get(key, ({}, None))
        there = "missing" if shape is None else f"{kind} {shape}"
        require(kind in (*kinds, *kinds.values()) and shape == wanted, f"{path}: tensor {key} is "
                f"{there}, expected {' or '.join(kinds)} {wanted or 'nothing'}".replace("  ", " "))


def backbone_of(names) -> str | None:
    """How a single-tower checkpoint begins the names of its tower; None: it is none."""
    return next((name[:name.index(".") + 1] for name in names
                 if name.startswith(("backbone.", "model."))), None)


def unread(names, towers: str, layout: str = "any", directory: Path | None = None):
    """How the names begin of the tensors, a tuple, that are not needed of a checkpoint with such
    names. Raises: ValueError if that is not of the layout."""
    tower = backbone_of(names)
    require(layout in ("any", "backbone" if tower else "released"), f"{directory} " + (
        f"is a backbone, one tower ({tower}*): TwoTower.from_backbone loads it, a denoiser is "
        f"trained for it by python train.py --backbone {directory} --data FILE" if tower else
        "is no backbone (backbone.*, model.*): load it with TwoTower.from_pretrained"))
    return ("mtp.",) if tower else DENOISER_KEYS if towers == "context" else ()


def read_headers(directory: Path, towers: str, layout: str) -> dict[str, tuple[Path, list, str]]:
    """File, shape and dtype of the tensors that the files of a checkpoint hold or its index
    promises, but for those that are `unread`; of a broken promise without shape."""
    index, single = directory / INDEX, directory / "model.safetensors"
    places, found, skip = {}, {}, None
    if os.path.lexists(index):
        weight_map = read_json(index).get("weight_map")
        require(isinstance(weight_map, dict) and bool(weight_map), f"{index} has no weight_map")
        skip = unread(weight_map, towers, layout, directory)
        for key, name in weight_map.items():
            require(isinstance(name, str) and bool(re.fullmatch(r"[^/\\]+\.safetensors", name)),
                    f"{index} places {key} in {name!r}, which is no safetensors file name")
            if not key.startswith(skip):
                places[key] = directory / name
    for path in sorted(set(places.values()) or {single}):
        check_file(path, f", and so is {INDEX}" * (path == single))
        try:
            with safe_open(path, "pt") as file:
                if skip is None:
                    skip = unread(file.keys(), towers, layout, directory)
                for key in (key for key in file.keys() if not key.startswith(skip)):
                    place, part = places.setdefault(key, path), file.get_slice(key)
                    require(place == path, f"tensor {key} is in {path.name}, and {place.name} is "
                            "its place too")
                    found[key] = path, part.get_shape(), part.get_dtype()
        except SafetensorError as error:
            raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from None
    return {key: found.get(key, (path, None, None)) for key, path in places.items()}


def set_dtypes(model: TwoTower, found: dict[str, torch.dtype], dtype: torch.dtype | None):
    """Give the tensors of a skeleton `dtype`, or those found, which must then be one; the router is
    float32 at least, and A_log, D and dt_bias, which are used so, may be."""
    keys, tensors = {}, model.state_dict()              # keys: one of each dtype
    for key, name, _ in checkpoint_tensors(model, found):
        own = found[key] if ".experts." in name and ".weight." in name else dtype or found[key]
        if name.endswith((".gate.weight", ".e_score_correction_bias")):
            own = torch.promote_types(own, torch.float32)
        elif not name.endswith((".A_log", ".D", ".dt_bias", ".integers", ".scales")):
            keys.setdefault(own, key)
        tensors[name] = tensors[name].to(own)
    require(len(keys) < 2, "the checkpoint mixes dtypes, such as " + " and ".join(
        f"{own} of {key}" for own, key in keys.items()) + "; give a dtype for all")
    tensors |= {name: tensor.to(next(iter(keys))) for name, tensor in tensors.items()
                if name.startswith(TIME_KEYS)}          # of which a backbone says nothing
    model.load_state_dict(tensors, assign=True)


# ---------------------------------------------------------------------------------------------
# Kernels: the file works without them

KERNELS = Path(__file__).with_name("kernels.py")


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
