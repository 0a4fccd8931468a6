"""What twotower.py, sample.py and README.md promise, checked.

    python -m pytest -q -rs -n 2 test_twotower.py

Errors are relative: rms(out - reference) / rms(reference), so that an answer of zeros scores 1.
Limits: float64 1e-12 for one operation, 1e-10 through a model; float32 1e-5 (floors on this data:
6e-7 and 2e-6), but 3e-5 behind the time features, whose frequencies differ in the last bit between
processors (floors: 1e-6 on one, 1.2e-5 on another); bfloat16 against NVIDIA's own bfloat16 error,
as rounding alone costs 2e-3.
"""

import argparse
import ast
import contextlib
import copy
import dataclasses
import difflib
import functools
import http.server
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import types
import venv
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import psutil
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch.utils._pytree import tree_leaves

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"        # before kernels.py is imported

import bench
import corpus
import official
import placement
import plan
import rows as sample_rows
import sample as cli
import sharding
import train
import twotower
from twotower import (Context, Decoding, KVCache, MambaState, Pass, Router, TimestepEmbedder,
                      Tower, TwoTower, TwoTowerConfig)

HERE = Path(__file__).resolve().parent
GOLDEN = HERE / "golden"
torch.set_num_threads(1)            # tiny tensors: a second thread costs more than it brings,
os.environ["OMP_NUM_THREADS"] = "1"     # in what the tests start too
MASK = 3


def error(out: torch.Tensor, ref: torch.Tensor) -> float:
    assert out.shape == ref.shape, f"shape {tuple(out.shape)}, expected {tuple(ref.shape)}"
    out, ref = out.detach().double(), ref.detach().double()
    assert out.isfinite().all(), "not finite"
    return float((out - ref).square().mean().sqrt() / ref.square().mean().sqrt())


def check(out: torch.Tensor, ref: torch.Tensor, limit: float, name: str = "output"):
    """out is within limit of ref, and the limit would catch a shifted answer."""
    assert error(ref.roll(1, -1), ref) > 10 * limit, f"{name}: the reference cannot tell a shift"
    assert error(out, ref) <= limit, f"{name}: {error(out, ref):.1e} > {limit:.0e}"


def refuses(message: str, function, *args, **knobs):
    """function(*args, **knobs) raises a ValueError of one line that holds the message."""
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        function(*args, **knobs)
    assert "\n" not in str(raised.value)


# ------------------------------------------------------------------------------- models to test

TINY = dict(
    hidden_size=32, num_hidden_layers=6, hybrid_override_pattern="ME*-ME", vocab_size=64,
    layer_norm_epsilon=1e-5, mamba_num_heads=4, mamba_head_dim=8, n_groups=2, ssm_state_size=8,
    conv_kernel=4, chunk_size=16, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    intermediate_size=24, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=16,
    moe_shared_expert_intermediate_size=24, norm_topk_prob=True, routed_scaling_factor=2.5,
    max_position_embeddings=4096)
# every option the release leaves at its default, turned
ODD = TINY | dict(use_bias=True, use_conv_bias=False, attention_bias=True, mlp_bias=True, n_group=4,
                  topk_group=2, norm_topk_prob=False, time_step_limit=(0.05, 0.3),
                  residual_in_fp32=True, conv_kernel=3)


@functools.cache
def random_model(odd: bool = False, dtype=torch.float64, seed: int = 0) -> TwoTower:
    """A model whose layers all matter: weights of unit gain instead of the initial 0.02."""
    torch.manual_seed(seed)
    model = TwoTower(TwoTowerConfig(**(ODD if odd else TINY)))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("A_log", "bias", "embeddings.weight")):
                tensor.normal_(std=0.1 if name.endswith("correction_bias") else 1.0)
            elif "scale_shift" in name:
                tensor.normal_(std=0.3)
                tensor[2] += 1
            elif tensor.dim() > 1:
                tensor.normal_(std=tensor[0].numel() ** -0.5 * (3 if "lm_head" in name else 1))
    return model.to(dtype).eval()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def ids(*shape, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, TINY["vocab_size"], shape, generator=seeded(seed))


RAGGED = [1, 2, 16, 17, 40]
PROMPTS = [ids(n, seed=n) for n in RAGGED]


def run_python(*args, cwd: Path = HERE, status: int = 0, **options) -> subprocess.CompletedProcess:
    """It ends with that exit status."""
    args = [arg if isinstance(arg, bytes) else str(arg) for arg in args]
    run = subprocess.run([sys.executable, *args], capture_output=True, text=True,
                         encoding="utf-8", cwd=cwd, **options)
    assert run.returncode == status, run.stdout + run.stderr
    return run


@functools.cache
def golden(variant: str):
    """(tensors, manifest, our model); convolution states without the column that nobody reads."""
    dtype = torch.bfloat16 if variant.endswith("bf16") else None
    model = TwoTower.from_pretrained(GOLDEN / "cfg1", dtype=dtype)
    if variant == "cfg1_chunk8":
        config = TwoTowerConfig.from_json(GOLDEN / "cfg1_chunk8" / "config.json")
        model.config.chunk_size = config.chunk_size
        assert model.config == config
    manifest = GOLDEN / f"{variant}.json"
    manifest = json.loads(manifest.read_text()) if manifest.exists() else None
    tensors = load_file(GOLDEN / f"{variant}.safetensors").items()
    tensors = {name: tensor[..., 1:] if "conv" in name else tensor for name, tensor in tensors}
    return tensors, manifest, model


MINIATURE = HERE / "miniature"
TOKENIZER = {"tokenizer.json": (MINIATURE / "tokenizer.json").read_bytes()}
LETTER = "letter code=2203 count=16 item=maps name=Dora city=Sydney day=Friday\n"


@functools.cache
def miniature() -> tuple[TwoTower, Tokenizer]:
    return (TwoTower.from_pretrained(MINIATURE).eval(),
            Tokenizer.from_file(str(MINIATURE / "tokenizer.json")))


# -------------------------------------------------------------------------------- configuration

def test_the_defaults_are_the_released_model():
    """Field by field, and those of decoding; then parameters, names and bytes of the states."""
    defaults = inspect.signature(TwoTower.generate_mask_diffusion).parameters
    for name, value in dict(block_size=16, steps_per_block=16, confidence_threshold=0.8,
                            temperature=0.0, template=None).items():
        assert defaults[name].default == value
    config = TwoTowerConfig()
    assert dataclasses.asdict(config) == dict(
        hidden_size=2688, num_hidden_layers=52, vocab_size=131072, layer_norm_epsilon=1e-5,
        hybrid_override_pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
        mamba_num_heads=64, mamba_head_dim=64, n_groups=8, ssm_state_size=128, conv_kernel=4,
        chunk_size=128, num_attention_heads=32, num_key_value_heads=2, head_dim=128,
        intermediate_size=1856, n_routed_experts=128, num_experts_per_tok=6, n_group=1,
        moe_intermediate_size=1856, moe_shared_expert_intermediate_size=3712, topk_group=1,
        norm_topk_prob=True, routed_scaling_factor=2.5, use_bias=False, use_conv_bias=True,
        attention_bias=False, mlp_bias=False, mlp_hidden_act="relu2", mamba_hidden_act="silu",
        tie_word_embeddings=False, residual_in_fp32=False, time_step_limit=(0.0, math.inf),
        time_step_min=0.001, time_step_max=0.1, time_step_floor=1e-4, initializer_range=0.02,
        max_position_embeddings=262144, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        mask_token_id=3, experts=None)
    assert (config.d_inner, config.conv_dim) == (4096, 6144)
    with torch.device("meta"):
        model = TwoTower(config).to(torch.bfloat16)
    tower = model.context_tower
    count = lambda *parts: sum(p.numel() for part in parts for p in part.parameters())
    assert round(count(tower, model.context_lm_head) / 1e9, 3) == 31.578
    moe = [layer.mixer for layer in tower.layers if layer.kind == "E"]
    assert round(count(*moe) / 1e9, 3) == 29.842
    assert len(twotower.checkpoint_tensors(model)) == 12544
    caches, states = ([state for state in Context(tower, 1, 1).states if isinstance(state, kind)]
                      for kind in (KVCache, MambaState))
    assert sum(cache.key_cache.nbytes + cache.value_cache.nbytes for cache in caches) == 6144
    assert round(sum(state.ssm_state.nbytes for state in states) / 1e6, 1) == 48.2


def test_config_files(tmp_path):
    """They must hold what they always hold, and may hold more; our own constructor may not."""
    always = {name: value for name, value in TINY.items() if name != "max_position_embeddings"}
    written = json.dumps(always | {"rope_theta": 1, "time_step_limit": [0.0, math.inf]})
    (tmp_path / "config.json").write_text(written)
    assert TwoTowerConfig.from_json(tmp_path / "config.json") == TwoTowerConfig(**always)
    for name in always:
        refuses(f"config: field '{name}' is missing", TwoTowerConfig.from_dict,
                {key: always[key] for key in always if key != name})
    with pytest.raises(TypeError, match="rope_theta"):
        TwoTowerConfig(rope_theta=1)
    assert TwoTowerConfig(time_step_limit=None) == TwoTowerConfig(time_step_limit=[0.0, math.inf])


def test_config_files_in_other_words(tmp_path):
    """What transformers 5 writes and older members of the family lack; what we write is JSON."""
    other = dict(TINY, time_step_limit=[0.05, {"__float__": "Infinity"}], eos_token_id=[2, 11],
                 layers_block_type="linear_attention moe full_attention mlp mamba moe".split(),
                 attention_head_dim=TINY["head_dim"], moe_latent_size=None, n_group=None)
    for name in ("hybrid_override_pattern", "num_hidden_layers", "head_dim"):
        del other[name]
    read = TwoTowerConfig.from_dict(other)
    assert read == TwoTowerConfig(**TINY, time_step_limit=(0.05, math.inf), eos_token_id=[2, 11])
    refuses("hybrid_override_pattern is 'Mconv', but it must be M (Mamba-2)",
            TwoTowerConfig.from_dict, other | dict(layers_block_type=["mamba", "conv"]))
    moe = [name for name in TINY if "expert" in name or name.startswith(("moe", "norm", "routed"))]
    dense = {name: value for name, value in TINY.items() if name not in moe}
    assert len(moe) == 6
    dense |= dict(hybrid_override_pattern="M-*-M-", mamba_head_dim=np.int64(80))

    def strict(word):
        raise AssertionError(f"{word} is not JSON")
    for config in (read, TwoTowerConfig(), TwoTowerConfig.from_dict(dense)):
        written = json.loads(json.dumps(config.to_dict()), parse_constant=strict)
        assert TwoTowerConfig.from_dict(written) == config
        assert ("time_step_limit" in written) == (config is read)
    numbers = dict(hidden_size=np.int64(32), routed_scaling_factor=np.float32(2.5),
                   time_step_limit=np.array([0.0, math.inf]), eos_token_id=np.array([2, 5]))
    assert TwoTowerConfig(**TINY | numbers) == TwoTowerConfig(**TINY, eos_token_id=[2, 5])


def test_config_rules_at_their_edges():
    """What is still possible, and what no longer is."""
    for fields in (dict(n_group=4, topk_group=4), dict(num_experts_per_tok=8), dict(chunk_size=1),
                   dict(eos_token_id=None, bos_token_id=0, pad_token_id=63),
                   dict(eos_token_id=[0, 63], bos_token_id=64, pad_token_id=-1),
                   dict(time_step_min=0.1), dict(time_step_limit=(0.3, 0.3))):
        TwoTowerConfig(**TINY | fields)
    for name, rule, *values in (
            ("hidden_size", "it must be a positive integer", 0, -64, True, 32.0, "16"),
            ("layer_norm_epsilon", "it must be a positive number", 0.0, "1e-5", math.inf, True),
            ("use_bias", "it must be true or false", None, 1), ("mlp_hidden_act", "it must be", 5),
            ("hybrid_override_pattern", "it must be text", 5),
            ("hybrid_override_pattern", "it must be M (Mamba-2), *", "MEM*EX", "MEM*"),
            ("mamba_num_heads", "it must be a multiple of n_groups 2", 5),
            ("num_attention_heads", "it must be a multiple of num_key_value_heads 2", 5),
            ("num_experts_per_tok", "n_routed_experts is 8", 9), ("topk_group", "n_group is 1", 2),
            ("time_step_min", "time_step_max is 0.1", 0.2), ("n_group", "each needs 2 experts", 8),
            ("mlp_hidden_act", "only relu2 is supported", "gelu"),
            ("mamba_hidden_act", "only silu is supported", "gelu"),
            ("tie_word_embeddings", "only False is supported", True),
            ("eos_token_id", "it must be ids in [0, 64)", 64, -1, 2.0, [2, 64], "2", True),
            ("mask_token_id", "it must be an id in [0, 64)", 64, -1, None, 2.0, [3]),
            ("time_step_limit", "it must be [low, high]", (0.1,), (0, 1, 2), (-1, 1), (0, math.nan),
             (0, True), (0.3, 0.1), "none")):
        for bad in values:
            refuses(f"config: {name} is {bad!r}, but {rule}", TwoTowerConfig, **TINY | {name: bad})
    refuses("n_routed_experts is 8, but it must be a multiple of n_group 3", TwoTowerConfig,
            **TINY | dict(n_group=3))


# -------------------------------------------- the formulas, against plain loops in float64

def scan_inputs(L: int) -> dict[str, torch.Tensor]:
    b, H, P, G, N = 2, 4, 3, 2, 5
    return dict(x=randn(b, L, H, P), dt=F.softplus(randn(b, L, H, seed=1)),
                A=-randn(H, seed=2).exp(), B=randn(b, L, G, N, seed=3),
                C=randn(b, L, G, N, seed=4), D=randn(H, seed=5), state=randn(b, H, P, N, seed=6))


def scan_by_definition(x, dt, A, B, C, D, state):
    """y, and the states (b, L+1, H, P, N) before each token and after the last."""
    h, ys, states = state.clone(), torch.empty_like(x), [state]
    for l in range(x.shape[1]):
        for b, k in itertools.product(range(x.shape[0]), range(x.shape[2])):
            g = k // (x.shape[2] // B.shape[2])
            drive = dt[b, l, k] * torch.outer(x[b, l, k], B[b, l, g])
            h[b, k] = math.exp(dt[b, l, k] * A[k]) * h[b, k] + drive
            ys[b, l, k] = h[b, k] @ C[b, l, g] + D[k] * x[b, l, k]
        states.append(h.clone())
    return ys, torch.stack(states, dim=1)


def at_token(inputs: dict, l: int) -> dict:
    return {name: v[:, l] if name in ("x", "dt", "B", "C") else v for name, v in inputs.items()}


@pytest.mark.parametrize("L", [1, 3, 15, 16, 17, 48, 129])
def test_scan(L):
    inputs = scan_inputs(L)
    y, h = scan_by_definition(**inputs)
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        given = {name: tensor.to(dtype) for name, tensor in inputs.items()}
        for chunk_size, keep in itertools.product((1, 3, 8, 16, 128), ("end", "blocks", "inputs")):
            if keep == "blocks" and L % chunk_size:
                continue
            out, state = twotower.ssd_scan(**given, chunk_size=chunk_size, keep=keep)
            check(out, y, limit)
            if keep == "inputs":
                assert state is None
            else:
                check(state, h[:, -1] if keep == "end" else h[:, :L:chunk_size], limit)
        assert torch.equal(given["state"], inputs["state"].to(dtype))       # stays as it was
        state = given["state"].clone()
        for l in range(L):
            before, old = state, state.clone()
            out, state = twotower.ssd_step(**at_token(given, l) | dict(state=before),
                                           in_place=l % 2 == 1)
            check(out, y[:, l], limit)
            assert state is before if l % 2 else torch.equal(before, old)
        check(state, h[:, -1], limit)


def test_scan_survives_strong_decay_and_large_states():
    inputs = scan_inputs(256) | dict(A=-torch.tensor([1e-4, 1, 30, 300]).double())
    inputs["state"] = inputs["state"] * 1e4
    y, h = scan_by_definition(**inputs)
    out, state = twotower.ssd_scan(**{k: v.float() for k, v in inputs.items()}, chunk_size=128)
    for head in range(4):
        assert error(out[:, :, head], y[:, :, head]) < 1e-4   # sums of dt A reach 2e4 in float32
        assert error(state[:, head], h[:, -1, head]) < 1e-4


@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_convolution_and_norms(dtype, limit):
    for L, bias in itertools.product((1, 3, 16, 17), (True, False)):
        inputs, weight = randn(2, L + 3, 6), randn(6, 1, 4, seed=1)
        biases = [randn(6, seed=2)] if bias else []
        ref = sum([inputs[:, w:w + L] * weight[:, 0, w] for w in range(4)] + biases)
        given = [v.to(dtype, copy=True) for v in (inputs[:, :3], inputs[:, 3:], weight, *biases)]
        out = twotower.causal_conv1d(*given, *[None] * (not biases), update=bias)
        check(out, ref / (1 + torch.exp(-ref)), limit)
        assert torch.equal(given[0], inputs[:, L:].to(dtype) if bias else inputs[:, :3].to(dtype))
    (x, z), w = randn(2, 2, 3, 5, 12), randn(12).abs() + 0.5
    v, gated = x * z / (1 + torch.exp(-z)), torch.empty_like(x)
    for g in (slice(0, 4), slice(4, 8), slice(8, 12)):
        gated[..., g] = w[g] * v[..., g] / (v[..., g].square().mean(-1, keepdim=True) + 0.1).sqrt()
    ref = w * x / (x.square().sum(-1, keepdim=True) / 12 + 0.1).sqrt()
    x, z, w = x.to(dtype), z.to(dtype), w.to(dtype)
    check(twotower.rms_norm(x, w, 0.1), ref, limit)
    check(twotower.gated_rms_norm(x, z, w, 3, 0.1), gated, limit)


def test_bfloat16_is_rounded_once():
    """Norms, convolution and scan are float32 inside: the output is rounded once, no state is."""
    half = lambda *shape: randn(*shape).bfloat16()
    (x, z), w, inputs, taps = half(2, 50, 24), half(24).abs() + 0.5, half(2, 40, 24), half(24, 1, 4)
    scan = {name: tensor.bfloat16() if name in "xBCD" else tensor.float()
            for name, tensor in scan_inputs(40).items()}
    for function, *args in (
            (twotower.rms_norm, x, w, 1e-5), (twotower.gated_rms_norm, x, z, w, 3, 1e-5),
            (twotower.causal_conv1d, inputs[:, :3], inputs, taps, z[0]),
            (twotower.ssd_scan, *scan.values(), 16),
            (twotower.ssd_step, *at_token(scan, 0).values())):
        out, exact = function(*args), function(*(
            arg.double() if isinstance(arg, torch.Tensor) else arg for arg in args))
        if isinstance(out, tuple):
            (out, state), (exact, exact_state) = out, exact
            assert state.dtype == torch.float32
            check(state, exact_state, 1e-6)
        assert out.dtype == torch.bfloat16
        assert error(out, exact) <= 1.02 * error(exact.bfloat16(), exact)


def test_autocast_leaves_the_scan_alone():
    """Under autocast products are bfloat16; the scan and the states made from it are not."""
    inputs = {name: tensor.float() for name, tensor in scan_inputs(20).items()}
    x, dt, A, B, _, _, state = inputs.values()

    def run():
        kept = MambaState(torch.zeros(2, 3, 1), state.clone(), (torch.zeros(2, 23, 1), x, dt, A, B))
        kept.settle(torch.tensor([7, 20]))
        return *twotower.ssd_scan(**inputs, chunk_size=8), kept.ssm_state
    plain = run()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert (x[0, 0] @ x[0, 0].T).dtype == torch.bfloat16
        assert all(map(torch.equal, plain, run()))


def test_ssd_rates():
    dt, dt_bias, A_log = (9 * randn(2, 5, 3)).bfloat16(), randn(3).float(), randn(3, seed=1).float()
    exact = (1 + (dt.double() + dt_bias.double()).exp()).log()
    out, A = twotower.ssd_rates(dt, dt_bias, A_log, (0.0, math.inf))
    assert out.dtype == A.dtype == torch.float32
    check(out, exact, 1e-6)
    check(A, -A_log.double().exp(), 1e-6)
    out, _ = twotower.ssd_rates(dt, dt_bias, A_log, (0.5, 2.0), torch.tensor([5, 2]))
    exact = exact.clamp(0.5, 2.0)
    exact[1, 2:] = 0
    check(out, exact, 1e-6)


@pytest.mark.parametrize("L", [1, 5, 260])          # 260: more queries than share a mask
def test_attention(L, monkeypatch):
    library = F.scaled_dot_product_attention
    B, H, G, S, K = 2, 6, 2, L + 4, 8
    q, (k, v) = randn(B, H, L, K), randn(2, B, G, S, K, seed=1)
    mask = torch.rand(1, 1, L, S, generator=seeded(0)) < 0.6
    mask[..., 0] = True
    last = torch.randint(S, (B, L), generator=seeded(1))
    for arguments, visible in (
            ({}, lambda b, l: slice(None)),
            (dict(mask=mask), lambda b, l: mask[0, 0, l]),
            (dict(is_causal=True), lambda b, l: slice(0, l + 1)),
            (dict(last_seen=last), lambda b, l: slice(0, last[b, l] + 1)),
            (dict(last_seen=last[:1]), lambda b, l: slice(0, last[0, l] + 1))):
        ref = torch.empty_like(q)
        for b, h, l in itertools.product(range(B), range(H), range(L)):
            seen = visible(b, l)
            p = torch.softmax(k[b, h // 3, seen] @ q[b, h, l] / math.sqrt(K), 0)
            ref[b, h, l] = p @ v[b, h // 3, seen]
        keys = slice(0, L if "is_causal" in arguments else S)
        out = twotower.attention(q, k[:, :, keys], v[:, :, keys], **arguments)
        check(out, ref, 1e-12)
        with monkeypatch.context() as patch:                # as some kernels of CUDA return it
            patch.setattr(F, "scaled_dot_product_attention", lambda *args, **knobs: library(
                *args, **knobs).transpose(1, 2).contiguous().transpose(1, 2))
            assert torch.equal(
                twotower.attention(q, k[:, :, keys], v[:, :, keys], **arguments), out)


@pytest.mark.parametrize("groups, kept, normed", [(1, 1, True), (4, 2, True), (4, 1, False)])
def test_route(groups, kept, normed):
    config = TwoTowerConfig(**TINY | dict(n_group=groups, topk_group=kept, norm_topk_prob=normed))
    # biased downwards: where choices are negative, the 0 of a dropped group wins over them
    x, weight, bias = randn(50, 32), randn(8, 32) / 6, randn(8, seed=1) / 4 - 0.5
    x, weight, bias = x.float(), weight.float(), bias.float()
    topk_ids, topk_weights = twotower.route(x, weight, bias, config)
    assert topk_weights.dtype == torch.float64
    size = 8 // groups
    for token, s in enumerate((1 / (1 + (-x.double() @ weight.double().T).exp())).tolist()):
        choice = [score + b for score, b in zip(s, bias.tolist())]
        if groups > 1:
            score = lambda g: sum(sorted(choice[g * size:(g + 1) * size])[-2:])
            best = sorted(range(groups), key=score)[-kept:]
            choice = [choice[e] if e // size in best else 0.0 for e in range(8)]
        chosen = topk_ids[token].tolist()                       # dropped ones tie at 0
        assert len(set(chosen)) == 2
        assert sorted(choice[e] for e in chosen) == pytest.approx(sorted(choice)[-2:], abs=1e-12)
        total = sum(s[e] for e in chosen) if normed else 1
        right = [2.5 * s[e] / total for e in chosen]
        assert topk_weights[token].tolist() == pytest.approx(right, rel=1e-12)


@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-12), (torch.float32, 1e-5),
                                          (torch.bfloat16, 7e-3)])
@pytest.mark.parametrize("T, D, width", [(2, 16, 8), (40, 16, 8), (40, 12, 16), (40, 16, 12),
                                         (40, 5, 6)])
def test_moe_experts(T, D, width, dtype, limit):
    """Few slots and many, widths grouped_mm takes and others, idle experts, one chosen twice."""
    topk_ids = 1 + 2 * torch.rand(T, 4, generator=seeded(0)).argsort(-1)[:, :2]
    topk_ids[0] = 3
    inputs = [v.to(dtype).requires_grad_() for v in (
        randn(T, D), randn(10, width, D, seed=1) / D**0.5, randn(10, D, width, seed=2),
        randn(10, width, seed=3), randn(10, D, seed=4))]
    weights = randn(T, 2, seed=5).abs().requires_grad_()
    for biases in (0, 1):
        used = slice(0, 3 + 2 * biases)
        x, up, down, up_bias, down_bias = exact = [v.detach().double().requires_grad_()
                                                   for v in inputs]
        out = twotower.moe_experts(inputs[0], topk_ids, weights, *inputs[used][1:])
        ref = torch.stack([sum(w * (down[e] @ (up[e] @ x[t] + biases * up_bias[e]).relu().square()
                                    + biases * down_bias[e])
                               for e, w in zip(topk_ids[t], weights[t])) for t in range(T)])
        assert out.dtype == dtype
        check(out, ref, limit)
        if dtype != torch.bfloat16:                     # whose sums over rows torch rounds
            towards = randn(T, D, seed=6)
            for ours, right in zip(
                    torch.autograd.grad(out, [weights, *inputs[used]], towards.to(dtype)),
                    torch.autograd.grad(ref, [weights, *exact[used]], towards), strict=True):
                check(ours, right, limit)


def by_hand(integers: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of an expert: its integers (out, in), number by number, and the scale of each, in float64."""
    q = integers.tolist()
    if len(scales) > 1:                                 # two to a byte: the low halves come first
        q = [[b % 16 - 8 for b in row] + [b // 16 for b in row] for row in q]
    q, s = torch.tensor(q, dtype=torch.float64), scales.double().T
    return q, s.repeat_interleave(q.shape[1] // s.shape[1], dim=1)


def quantized(weights: torch.Tensor, kind: str) -> tuple[twotower.Quantized, torch.Tensor]:
    """Weights (E, out, in) as experts are held, and what they then are, in float64."""
    held = twotower.Quantized(weights.shape, kind).to(weights.device)
    for e, weight in enumerate(weights):
        held.integers[e], held.scales[e] = twotower.quantize(weight, kind)
    pairs = [by_hand(*parts) for parts in zip(held.integers.cpu(), held.scales.cpu())]
    return held, torch.stack([q * s for q, s in pairs]).to(weights.device)


@pytest.mark.parametrize("kind, most, size", [("int8", 128, 192), ("int4", 8, 32)])
def test_experts_become_integers(kind, most, size):
    """Multiples of scales bit for bit, others the nearest there is; zeros, which have no scale."""
    q = torch.randint(-most, most, (3, 24, 192), generator=seeded(0))
    q.view(3, 24, -1, size)[..., 1] = -most                         # the largest of a group
    exact = q * randn(3, 24, 192 // size, seed=1).bfloat16().double().repeat_interleave(size, 2)
    exact[1, 5] = 0
    held, found = quantized(exact, kind)
    assert torch.equal(found, exact)
    assert held.integers.nbytes == exact.numel() * (1 if kind == "int8" else 0.5)
    assert all(torch.equal(held[e], exact[e].float()) for e in range(3))
    weights = randn(3, 24, 192, seed=2)
    held, found = quantized(weights.bfloat16(), kind)
    for e, (weight, near) in enumerate(zip(weights.bfloat16().double(), found)):
        assert torch.equal(held[e].double(), near)
        q, scale = by_hand(held.integers[e], held.scales[e])
        off = (near - weight).abs() / scale.abs()
        assert (off[(q > -most) & (q < most - 1)] <= 0.5).all() and off.max() < 1.3
        assert (q.view(24, -1, size) == -most).any(-1).all()


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantized_experts_multiply(kind, dtype, limit, monkeypatch):
    """As float64 products by hand; an expert that no token chose stays as it is."""
    ids = 1 + 2 * torch.rand(40, 4, generator=seeded(0)).argsort(-1)[:, :2]     # of 10: 1, 3, 5, 7
    x, weights = randn(40, 64).to(dtype), randn(40, 2, seed=5).abs()
    (up, up64), (down, down64) = (quantized(w, kind) for w in (
        randn(10, 128, 64, seed=1) / 8, randn(10, 64, 128, seed=2) / 11))
    used, get = set(), twotower.Quantized.__getitem__
    monkeypatch.setattr(twotower.Quantized, "__getitem__",
                        lambda self, e: used.add(e) or get(self, e))
    ref = torch.stack([sum(w * (down64[e] @ (up64[e] @ x[t].double()).relu().square())
                           for e, w in zip(ids[t], weights[t])) for t in range(40)])
    check(twotower.moe_experts(x, ids, weights, up, down), ref, limit)
    assert used == {1, 3, 5, 7}


def test_confidence_is_a_probability_without_the_mask_token():
    """NaN where a logit, be it the mask token's, is not finite; the first of equals is best."""
    logits, drawn = randn(4, 5, 64).float(), ids(4, 5)
    logits[..., MASK], logits[3, 0, [7, 60]] = 50.0, 40.0
    p = logits.index_fill(-1, torch.tensor(MASK), -math.inf).double().softmax(-1)
    chosen, confidence = twotower.most_likely(logits, MASK)
    assert chosen.equal(p.argmax(-1)) and chosen[3, 0] == 7
    check(confidence, p.max(-1).values, 1e-5)
    of = lambda p: p.gather(-1, drawn[..., None])[..., 0]
    check(twotower.probability(logits, drawn, MASK), of(p), 1e-5)
    check(twotower.probability(logits, drawn, None), of(logits.double().softmax(-1)), 1e-5)
    assert (twotower.most_likely(logits)[0] == MASK).all()
    logits[0, 1, 9], logits[1, 2, MASK], logits[2, 3, 63] = math.nan, math.inf, -math.inf
    finite = twotower.most_likely(logits, MASK)[1].isfinite()
    assert (~finite).nonzero().tolist() == [[0, 1], [1, 2], [2, 3]]


# ------------------------------------------------------------------------- passes and states

def tensors_of(state: KVCache | MambaState | None) -> list[torch.Tensor]:
    """Keys and values, or convolution and SSM state; nothing of a layer without a state."""
    return [] if state is None else list(vars(state).values())[:2]


def check_states(context: Context, row: int, alone: Context):
    """A row's states, cut to its length, are those of a context of this row alone."""
    for ours, theirs in zip(context.states, alone.states, strict=True):
        used = slice(0, int(context.lengths[row]) if isinstance(ours, KVCache) else None)
        for a, b in zip(tensors_of(ours), tensors_of(theirs), strict=True):
            assert error(a[row, :, used], b[0, :, used]) <= 1e-10


def test_a_pass_has_no_mask_where_it_needs_none():
    """A fresh prefill is causal; behind rows of one length a token or a block may see all."""
    context = Context(random_model().context_tower, 2, 0)
    for lengths, L, causal, kind in (
            ((0, 0), 5, True, "is_causal"), ((7, 7), 1, True, "all seen"),
            ((7, 7), 5, False, "all seen"), ((7, 7), 5, True, "last_seen"),
            ((2, 9), 1, True, "last_seen"), ((2, 9), 5, False, "last_seen")):
        context.lengths = torch.tensor(lengths)
        at = context.next_pass(L, "cpu", causal=causal)
        assert at.is_causal == (kind == "is_causal") and at.mask is None
        assert (at.last_seen is not None) == (kind == "last_seen")


def test_states_stay_where_they_are_when_room_was_reserved():
    """And new slots are zero: a stray NaN would reach the output through a mask."""
    model = random_model()
    context = model.prefill(ids(1, 30), reserve=40)
    places = lambda: [tensor.data_ptr() for state in context.states for tensor in tensors_of(state)]
    cache, before = next(s for s in context.states if isinstance(s, KVCache)), places()
    for _ in range(20):
        model.extend(context, ids(1, 1))
        model.denoise(ids(1, 16), context, 0.5)
    model.extend(context, ids(1, 20))
    assert places() == before
    old = cache.key_cache
    torch.use_deterministic_algorithms(True)            # NaN in memory that is not initialised
    model.extend(context, ids(1, 1))                    # 71 tokens in 70 slots: it doubles
    torch.use_deterministic_algorithms(False)
    grown = cache.key_cache
    assert grown.shape[2] == 140 and (grown[:, :, 71:] == 0).all()
    assert grown[:, :, :70].equal(old)
    # nor does a state keep the whole prompt's activations alive
    conv_state = context.states[0].conv_state
    assert conv_state.untyped_storage().nbytes() == conv_state.nbytes


def test_a_denoiser_elsewhere_is_sent_only_what_is_new():
    """States on another device ("cpu:0" here): new keys and values alone; Mamba states anew."""
    model, elsewhere = random_model(), torch.device("cpu", 0)
    context, old = model.prefill([ids(n, seed=n) for n in (3, 21, 8)]), torch.zeros(3).long()
    assert context.states_on(context.device) is context.states
    for block in range(3):
        marked = []
        for ours, theirs in zip(context.states, context.states_on(elsewhere), strict=True):
            for a, b in zip(tensors_of(ours), tensors_of(theirs), strict=True):
                assert a.data_ptr() != b.data_ptr()
                for row, (first, end) in enumerate(zip(old, context.lengths)):
                    if isinstance(ours, MambaState):
                        first, end = 0, None
                    assert torch.equal(a[row, :, first:end], b[row, :, first:end])
                    assert (b[row, :, :first] == 7).all()
                marked.append(b.fill_(7))               # what was sent once is not sent again
        context.states_on(elsewhere)
        assert len(marked) == 6 and all((b == 7).all() for b in marked)
        old = context.lengths
        model.extend(context, ids(3, 8, seed=block))


# ------------------------------------------------------------------------- layers and towers

def module_outputs(model: TwoTower, data: dict, dtype) -> dict[str, torch.Tensor]:
    """Our modules on the inputs of the golden data, under its names."""
    layers, config, start = model.context_tower.layers, model.config, torch.zeros(2).long()
    get = lambda name: data[f"mod/{name}"].to(dtype)
    at = lambda L, start=start, **kind: Pass.behind(start, L, int(start[0]) + L, **kind)
    mamba, moe, attention = (layers[i].mixer for i in (0, 1, 3))
    out = {}
    for prefix, limit, texts in (("tsl_", (0.05, 0.3), {"out": "x", "step": "x3"}),
                                 ("", (0.0, math.inf), {"out": "x", "out2": "x2", "out3": "x3"})):
        config.time_step_limit, state = limit, mamba.empty_state(2, 0)
        for name, text in texts.items():
            x = get(f"mamba/{text}")
            out[f"mamba/{prefix}{name}"] = mamba(x, state, at(x.shape[1], causal=True, keep="end"))
    out["mamba/conv3"], out["mamba/ssm3"] = state.conv_state.mT, state.ssm_state
    x = get("router/x")
    out |= {"moe/out": moe(x), "moe/shared": moe.shared_experts(x)}
    topk_ids, topk_weights = moe.gate(x.flatten(0, 1))
    out["router/topk_sorted"] = topk_ids.sort(-1).values
    out["router/dense_weights"] = torch.zeros(24, 8).double().scatter(1, topk_ids, topk_weights)
    cache = attention.empty_state(2, 0)
    out["attn/out"] = attention(get("attn/x"), cache, at(7, causal=True))
    out["attn/den_out"] = model.denoiser_tower.layers[3].mixer(get("attn/xd"), cache,
                                                               at(6, start + 7, causal=False))
    return out


@torch.no_grad()
def test_golden_modules():
    """In bfloat16 none is further from the float64 truth of the same rounded weights than NVIDIA's:
    1.5 allows for rounding in another order, 2e-3 is what the last rounding alone may cost."""
    rounded = TwoTower.from_pretrained(GOLDEN / "cfg1", dtype=torch.bfloat16)
    for variant, dtype in (("cfg1", torch.float32), ("cfg1_bf16", torch.bfloat16)):
        data, _, model = golden(variant)
        gate, out = model.context_tower.layers[1].mixer.gate, module_outputs(model, data, dtype)
        assert gate.weight.dtype == gate.e_score_correction_bias.dtype == torch.float32
        assert out["mamba/ssm3"].dtype == torch.float32 and out["mamba/conv3"].dtype == dtype
        assert torch.equal(out.pop("router/topk_sorted"), data["mod/router/topk_sorted"])
        for name, tensor in out.items() if dtype == torch.float32 else ():
            check(tensor, data[f"mod/{name}"], 1e-5, name)
    truth = module_outputs(rounded.double(), data, torch.float64)
    for name, tensor in out.items():
        ours, theirs = error(tensor, truth[name]), error(data[f"mod/{name}"], truth[name])
        assert ours <= max(1.5 * theirs, 2e-3), f"{name}: {ours:.1e}, NVIDIA's {theirs:.1e}"


@pytest.mark.parametrize("kind", "M*E-")
def test_layer_modulates_before_or_after_the_norm(kind):
    """Before it in Mamba and attention layers, after it in MoE and MLP layers; then the gate."""
    layer = next(layer for layer in random_model().denoiser_tower.layers if layer.kind == kind)
    x, (shift, scale, gate) = randn(2, 5, 32), randn(3, 2, 1, 32, seed=1)
    state = lambda: layer.mixer.empty_state(2, 5) if kind in "M*" else None
    at = Pass.behind(torch.zeros(2, dtype=torch.long), 5, 5, causal=False)
    norm = lambda v: twotower.rms_norm(v, layer.norm.weight, 1e-5)
    h = norm(x * (1 + scale) + shift) if kind in "M*" else norm(x) * (1 + scale) + shift
    mixed = layer.mixer(h, state(), at)
    check(layer(x, state(), at, (shift, scale, gate)), x + gate * mixed, 1e-12)
    check(layer(x, state(), at, None), x + layer.mixer(norm(x), state(), at), 1e-12)


def test_golden_layers():
    """The residual stream after every layer of both towers; the first that differs is named."""
    (data, _, model), seen = golden("cfg1"), []
    hooks = [module.register_forward_hook(lambda module, args, out: seen.append(out))
             for tower in (model.context_tower, model.denoiser_tower)
             for module in (tower.embeddings, *tower.layers)]
    model.denoise(data["ids/half16"], model.prefill(data["ids/prompt37"]), 0.5)
    for hook in hooks:
        hook.remove()
    places = ["embedding"] + [f"layer {i} ({kind}), the first that differs"
                              for i, kind in enumerate(model.config.hybrid_override_pattern)]
    for prefix, limit, out in (("ctx/hidden", 1e-5, seen[:11]), ("den_hidden/h", 3e-5, seen[11:])):
        for i, (x, place) in enumerate(zip(out, places, strict=True)):
            check(x, data[f"{prefix}.{i}"], limit, f"{prefix}: {place}")


def test_residual_in_fp32():
    """The residual stream of a bfloat16 model is float32, the mixers' inputs are not."""
    model, dtypes = random_model.__wrapped__(True).to(torch.bfloat16), []
    layer = model.context_tower.layers[3]
    for module in (layer, layer.mixer):
        module.register_forward_pre_hook(lambda module, args: dtypes.append(args[0].dtype))
    for model.config.residual_in_fp32 in (True, False):
        model.prefill(ids(1, 40))
    assert dtypes == [torch.float32] + 3 * [torch.bfloat16]


def test_golden_time():
    data, _, model = golden("cfg1")
    t, features = data["time/t"], TimestepEmbedder.features
    check(features(t), data["time/sin_fp32"], 1e-5)
    eighths = torch.arange(9) / 8                       # exact in both: float64 changes nothing
    assert features(eighths).equal(features(eighths.double()))
    embedding = model.t_embedder(t)
    check(embedding, data["time/repr"], 3e-5)
    check(model.t_block(embedding), data["time/emb"], 3e-5)
    # in bfloat16 t is rounded before it is scaled: the features are those of the rounded product
    data, _, model = golden("cfg1_bf16")
    assert torch.equal((t.bfloat16() * 1000).float(), data["time/tscaled_bf16"])
    assert error(features(t.bfloat16()).bfloat16().float(), data["time/sin_bf16"]) == 0
    check(model.t_block(model.t_embedder(t)).float(), data["time/emb"], 5e-3)


# ------------------------------------------------------------------------------------ the model

FLOAT32 = ["cfg1", "cfg1_chunk8"]


def check_golden_states(context: Context, data: dict, prefix: str):
    used = slice(0, int(context.lengths.max()))
    for i, state in enumerate(context.states):
        if isinstance(state, MambaState):
            check(state.conv_state.mT, data[f"{prefix}conv.{i}"], 1e-5, f"{prefix}conv.{i}")
            check(state.ssm_state, data[f"{prefix}ssm.{i}"], 1e-5, f"{prefix}ssm.{i}")
        elif isinstance(state, KVCache) and f"{prefix}k.{i}" in data:
            check(state.key_cache[:, :, used], data[f"{prefix}k.{i}"], 1e-5, f"{prefix}k.{i}")
            check(state.value_cache[:, :, used], data[f"{prefix}v.{i}"], 1e-5, f"{prefix}v.{i}")


@pytest.mark.parametrize("variant", FLOAT32)
def test_golden_passes(variant):
    """Prompts; a block at once and token by token; then one more token and a denoiser pass on top;
    denoiser passes with every noise level, none, one per row, odd block lengths; of mock-AR also
    the states one token back: those the release keeps, and its stale ones after a block."""
    data, _, model = golden(variant)
    prompt = data["ids/prompt37"]
    context = model.prefill(prompt)
    check(model.context_logits(prompt), data["ctx/logits"], 1e-5)
    blocks = {"full": data["ids/full16"], "half": data["ids/half16"], "odd5": data["ids/odd5"],
              "block1": torch.full((2, 1), MASK), "full8": torch.full((2, 8), MASK)}
    passes = [name for name in data if name.startswith("den/")]
    assert len(passes) >= 4
    for name in passes:
        block, t = name.removeprefix("den/").rsplit("_t", 1)
        t = None if t == "none" else torch.tensor([0.25, 0.75]) if t == "vec" else float(t)
        out = model.denoise(blocks[block], context, t)
        check(out, data[name], 1e-5 if t is None else 3e-5, name)
    for prefix in sorted({name.split("/")[0] + "/" for name in data if "/k." in name} - {"mod/"}):
        kind, length, how = re.fullmatch(r"(prefill|ext)(\d*)_?(step|block|)/", prefix).groups()
        later = model.prefill(data[f"ids/prompt{37 if kind == 'ext' else length or 37}"])
        logits = later.logits[:, None]
        if kind == "ext":
            for piece in data[f"ids/block{length}"].split(1 if how == "step" else 16, dim=1):
                logits = model.extend(later, piece)[:, -1:]
        check_golden_states(later, data, prefix)
        for name, run, limit in (
                ("logits", lambda: logits, 1e-5),
                ("next_logits", lambda: model.extend(later, data["ids/tok1"]), 1e-5),
                ("den_full_t1", lambda: model.denoise(data["ids/full16"], later, 1.0), 3e-5)):
            if prefix + name in data:
                check(run(), data[prefix + name], limit, prefix + name)
    if variant == "cfg1":
        before = model.prefill(prompt[:, :-1])
        check(model.denoise(prompt[:, -1:], before), data["mock/logits0"], 1e-5)
        check(model.denoise(data["ids/tok1"], context), data["mock/logits1"], 1e-5)
        for run, stale in (("prefill", before), ("ext16_block", context), ("ext3_block", context)):
            check_golden_states(stale, data, f"{run}/s2_")


def test_golden_bfloat16_statistics():
    """Through ten random layers bfloat16 is chaotic: compare how far we and NVIDIA stray."""
    (data, _, model), exact = golden("cfg1_bf16"), golden("cfg1")[0]
    context = model.prefill(data["ids/prompt37"])
    for name, out in (("ctx/logits", model.context_logits(data["ids/prompt37"])),
                      ("den/half_t0.5", model.denoise(data["ids/half16"], context, 0.5)),
                      ("den/full_t1", model.denoise(data["ids/full16"], context, 1.0))):
        assert out.dtype == torch.float32 and out.requires_grad == (name == "ctx/logits")
        ours, theirs = error(out, exact[name]), error(data[name], exact[name])
        assert ours <= 1.5 * theirs, f"{name}: {ours:.2f}, NVIDIA's {theirs:.2f}"


@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("lengths, split", [
    (RAGGED, [16, 1]), (RAGGED, [1, 1, 15]), ([3, 3], [174]), ([15, 15], [1, 161]),
    ([17, 17], [129, 31]), ([48, 48], [128, 1]), ([1, 1], [1] * 20 + [16])])
def test_neither_batch_nor_split_matters(lengths, split, odd):
    """Rows read in pieces, in a batch, denoised in between: each as if at once, alone, by none."""
    model, rows, read = random_model(odd), len(lengths), torch.tensor(lengths)
    tokens = [ids(n + sum(split), seed=n + r) for r, n in enumerate(lengths)]
    context = model.prefill([text[:n] for text, n in zip(tokens, lengths)])
    logits = [[one] for one in context.logits[:, None]]
    for n in split:
        block, t = ids(rows, min(n, 16), seed=n), torch.tensor([1.0, 0.5, 0.0625, 0.0, 0.9])[:rows]
        block[:, 3:9] = MASK
        noisy, plain = model.denoise(block, context, t), model.denoise(block, context)
        piece = model.extend(context, torch.stack([text[m:m + n] for text, m in zip(tokens, read)]))
        assert torch.equal(context.logits, piece[:, -1])
        for row, text in enumerate(tokens if n > 1 else tokens[:1]):
            alone = model.prefill([text[:read[row]]])
            check(noisy[row], model.denoise(block[row:row + 1], alone, float(t[row]))[0], 1e-10)
            check(plain[row], model.denoise(block[row:row + 1], alone)[0], 1e-10)
        read = read + n
        logits = [[*some, more] for some, more in zip(logits, piece)]
    assert context.lengths.equal(read)
    for row, text in enumerate(tokens):
        whole = model.context_logits(text[None])[0, lengths[row] - 1:]
        check(torch.cat(logits[row]), whole, 1e-10)
        check_states(context, row, model.prefill([text]))


@pytest.mark.parametrize("tokens_per_pass", [1, 15, 16, 17, 512])
def test_score(tokens_per_pass):
    """Log-probabilities one by one, of ragged rows around block, chunk and pass edges."""
    model = random_model()
    texts = [(ids(total - new, seed=total), ids(new, seed=new)) for total, new in (
        (2, 1), (16, 1), (16, 15), (17, 16), (18, 1), (33, 16), (34, 33), (49, 20))]
    for some in (texts, texts[-1:]):
        scores = model.score(*zip(*some), tokens_per_pass)
        for row, (prompt, continuation) in enumerate(some):
            p = model.context_logits(torch.cat([prompt, continuation])[None])[0].log_softmax(-1)
            expected = p[len(prompt) - 1:-1].gather(1, continuation[:, None])[:, 0]
            assert error(scores.tokens[row], expected) < 1e-10
            assert error(scores.total[row], expected.sum()) < 1e-10
            likeliest = p[len(prompt) - 1:-1].argmax(-1)
            assert scores.greedy[row] == torch.equal(likeliest, continuation)
    # one wrong token, the first, and then what AR writes after it
    wrong = torch.cat([prompt, (p[len(prompt) - 1].argmax() + 1)[None] % TINY["vocab_size"]])
    written, = model.generate_ar([wrong], 18).tokens
    assert model.score([wrong, prompt], [written, torch.cat([wrong[-1:], written])],
                       tokens_per_pass).greedy.tolist() == [True, False]
    small = TwoTower(TwoTowerConfig(**TINY | dict(max_position_embeddings=49)))
    assert small.score(*zip(*some), tokens_per_pass).total.dtype == torch.float64


# ------------------------------------------------------------------------------------- training

@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("Q, t", [(8, [0.3, 0.9]), (8, [[0.1, 0.9, 0.4], [0.7, 0.2, 1.0]]),
                                  (24, 0.5), (8, None), (1, None)])
def test_one_pass_training_logits_equal_decoding_logits(Q, t, odd):
    """With a noise level for a row, a block, or all; with none: in blocks of 1, that is mock-AR."""
    model, n = random_model(odd), 24 // Q
    clean, noisy = ids(2, 24), ids(2, 24, seed=1)
    noisy[torch.rand(noisy.shape, generator=seeded(2)) < 0.5] = MASK
    noisy = clean if Q == 1 else noisy
    t = t if t is None else torch.tensor(t)
    logits = model.diffusion_logits(clean, noisy, t, Q)
    for b in range(n):
        block = slice(b * Q, (b + 1) * Q)
        context = (model.prefill(clean[:, :b * Q]) if b else Context(model.context_tower, 2, 0))
        own = t if t is None or t.dim() < 2 else t[:, b]
        check(logits[:, block], model.denoise(noisy[:, block], context, own), 1e-10, f"block {b}")
    if t is None:                                               # one block is a text too
        check(model.diffusion_logits(clean[:, :Q], noisy[:, :Q], t, Q), logits[:, :Q], 1e-10)


def test_losses_are_means_over_their_positions():
    """Of the published noise, of noise that is given, of the targets alone; or one by one."""
    model, tokens, g = random_model(), ids(3, 32), seeded(5)
    t = 0.001 + 0.999 * torch.rand(3, generator=g)
    masked = torch.rand(3, 32, generator=g) < t[:, None]
    losses = lambda logits, labels: -logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    logits = model.diffusion_logits(tokens, tokens.masked_fill(masked, MASK), t, 8)
    filled = losses(logits, tokens)[masked]
    after = losses(model.context_logits(tokens)[:, :-1], tokens[:, 1:])
    given = functools.partial(model.diffusion_loss, tokens, 8, t=t)
    for ours, right in ((model.diffusion_loss(tokens, 8, seeded(5)), filled.mean()),
                        (given(masked=masked), filled.mean()),
                        (given(masked=masked, reduction="none"), filled),
                        (model.ar_loss(tokens), after.mean()),
                        (model.ar_loss(tokens, masked), after[masked[:, 1:]].mean()),
                        (model.ar_loss(tokens, reduction="none"), after.flatten())):
        torch.testing.assert_close(ours, right)
    assert given(masked=masked & False) == 0            # and no NaN


def test_initialisation():
    """As for training from scratch: dt log-uniform, A from 1 to H, tables randn / sqrt(D)."""
    torch.manual_seed(0)
    fields = ODD | dict(mamba_num_heads=256, mamba_head_dim=2, time_step_floor=0.002)
    for name, tensor in TwoTower(TwoTowerConfig(**fields)).state_dict().items():
        if name.endswith(("norm.weight", "norm_f.weight", "mixer.D")):
            assert (tensor == 1).all(), name
        elif name.endswith("A_log"):
            torch.testing.assert_close(tensor.exp(), torch.arange(1.0, 257.0))
        elif name.endswith("dt_bias"):
            dt = F.softplus(tensor)
            assert dt.min() == pytest.approx(0.002) and 0.08 < dt.max() <= 0.1001
            assert 0.006 < dt.median() < 0.016          # log-uniform from 0.001: 0.01
        elif name.startswith("scale_shift"):
            assert tensor.std() == pytest.approx(32 ** -0.5, rel=0.3), name
        elif name.endswith("bias"):
            assert (tensor == 0).all(), name
        elif "conv1d" not in name:
            assert tensor.std() == pytest.approx(0.02, rel=0.3), name


@pytest.mark.parametrize("of_context", [False, True])
def test_gradients(of_context):
    """Of all that is trained, nothing else; as central differences, of all and of each kind."""
    model, tokens = random_model.__wrapped__(seed=3), ids(1, 16)
    loss = lambda: (model.ar_loss(tokens) + model.ar_loss(tokens[:, :2]) if of_context else
                    model.diffusion_loss(tokens, 8, seeded(0)))         # [:, :2]: a scan of one
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss(), parameters.values(), allow_unused=True)
    gradients = {name: g for name, g in zip(parameters, gradients) if g is not None and g.any()}
    assert gradients.keys() == {n for n in parameters if n.startswith("context_") == of_context}
    for part in ("", "A_log", "conv1d.weight", "experts.up_proj", "gate.weight", "k_proj", "norm"):
        direction = {name: randn(*g.shape) for name, g in gradients.items() if part in name}
        sides = []
        for step in (1e-6, -2e-6, 1e-6):                # the last one: back to the start
            with torch.no_grad():
                for name, towards in direction.items():
                    parameters[name] += step * towards
                sides.append(float(loss()))
        got = sum(float((gradients[name] * towards).sum()) for name, towards in direction.items())
        assert got == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-4, abs=1e-7), part


def test_what_is_written_can_be_trained_on():
    model = random_model.__wrapped__()
    result = model.generate_ar(ids(1, 5), 8)
    model.ar_loss(result.tokens[0][None]).backward()
    result.nfe.add_(1)


# ------------------------------------------------------------------- decoding: choosing tokens

def test_golden_sampling():
    """Also: a tiny temperature is greedy."""
    data, _, _ = golden("cfg1")
    logits = data["sample/logits"]
    assert torch.equal(logits.argmax(-1), data["sample/greedy"][:, 0])
    knobs = [(1.0, None, None), (0.7, 5, None), (1.3, None, 0.9), (0.8, 10, 0.5), (1.0, 1, None),
             (1.0, None, 0.01), (1.0, 2, None), (0.5, 1000, 0.95)]
    for i, knob in enumerate(knobs):
        ours, theirs = twotower.shape_logits(logits, *knob).softmax(-1), data[f"sample/probs.{i}"]
        # row 1 has four tokens tied at the top; which of them survive top_p is not specified
        for sampled in (lambda p: p[[0, 2, 3]], lambda p: p[1].sort().values):
            assert error(sampled(ours), sampled(theirs)) < 1e-6, knob
    noisy = data["den/half_t0.5"].clone()
    noisy[..., MASK] = -math.inf
    assert torch.equal(twotower.gumbel_argmax(noisy / 0.7, data["gumbel/u"]), data["gumbel/argmax"])
    logits, u = randn(5, 40).float(), torch.rand(5, 40, generator=seeded(0))
    for knob in ((1e-300,), (1e-309,), (5e-324, 7), (5e-324, 7, 0.9)):      # the least one there is
        shaped = twotower.shape_logits(logits, *knob)
        assert twotower.gumbel_argmax(shaped, u).equal(logits.argmax(-1)), knob


def test_noise_is_a_function_of_seed_position_step_and_token():
    """That of splitmix64 in whole numbers: a row's is its own, whatever stands beside it."""
    def mix(x):
        x = (x % 2**64 ^ x % 2**64 >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    golden, seeds = 0x9E3779B97F4A7C15, [0, 5, 2**63 - 1]
    positions = [[0, 7], [4096, 1], [9, 262143]]
    for step in (0, 3):
        key = lambda seed, position: mix(mix(mix(seed + golden) + position * golden) + step)
        u = twotower.noise(torch.tensor(seeds), torch.tensor(positions), step, 11)
        assert u.tolist() == [[[((mix(key(seed, position) + token * golden) >> 12) + 0.5) / 2**52
                                for token in range(1, 12)] for position in row]
                              for seed, row in zip(seeds, positions)]


def test_noise_is_uniform_and_independent():
    """To five standard deviations: moments, bins, products of neighbours, and what is drawn."""
    place = torch.arange(16)
    u = torch.stack([twotower.noise(place, place.expand(16, -1), step, 256) for step in range(16)])
    assert 0 < u.min() and u.max() < 1
    v, n = (u - 0.5) * 12 ** 0.5, u.numel()             # (step, seed, position, token)
    assert abs(v.mean()) < 5 / n ** 0.5 and abs(v.square().mean() - 1) < 5 * (0.8 / n) ** 0.5
    chi_square = (((u * 64).long().flatten().bincount() - n / 64).square() / (n / 64)).sum()
    assert abs(chi_square - 63) < 5 * (2 * 63) ** 0.5
    pairs = [(v.narrow(dim, 1, v.shape[dim] - 1), v.narrow(dim, 0, v.shape[dim] - 1))
             for dim in range(4)] + [(v[:, 1:, :-1], v[:, :-1, 1:]), (v[1:, 1:], v[:-1, :-1])]
    assert all(abs((a * b).mean()) < 5 / a.numel() ** 0.5 for a, b in pairs)
    shaped, n = twotower.shape_logits(randn(6), 0.7, top_k=4), 20000
    u, p = twotower.noise(torch.arange(n), torch.zeros(n, 1).long(), 0, 6), shaped.softmax(-1)
    drawn = twotower.gumbel_argmax(shaped, u[:, 0]).bincount(minlength=6) / n
    assert (p == 0).sum() == 2 and ((drawn - p).abs() <= 5 * (p * (1 - p) / n).sqrt()).all()


def test_seeds():
    """One number means seed + row, also beyond 63 bits; without one torch's generator decides."""
    model, prompts = random_model(), list(ids(2, 5))
    run = lambda seed: texts(model.generate_ar(prompts, 12, temperature=1.0, seed=seed))
    assert run(5) == run([5, 6]) != run(8)
    assert run(2**63 - 1) == run([2**63 - 1, 0]) == run([2**65 - 1, 2**64])
    torch.manual_seed(1)
    first, second = run(None), run(None)
    torch.manual_seed(1)
    assert first == run(None) != second


def test_a_prediction_is_drawn_as_shaped_and_as_confident_as_unshaped():
    """Neither temperature nor top_k moves the confidence; position and step are the draw's own."""
    logits = randn(2, 4, 64).float()
    logits[..., MASK] = 50.0
    run = Decoding(random_model(), [ids(3), ids(8)], 9, temperature=3.0, top_k=30, seed=[4, 9])
    run.texts = [text + [5, 6] for text in run.texts]           # as if written
    chosen, confidence = run.predict(logits, 2, MASK)
    torch.testing.assert_close(confidence, twotower.probability(logits, chosen, MASK))
    u = twotower.noise(torch.tensor([4, 9]), torch.tensor([[5], [10]]) + torch.arange(4), 2, 64)
    logits[..., MASK] = -math.inf
    assert chosen.equal(twotower.gumbel_argmax(twotower.shape_logits(logits, 3.0, 30), u))
    assert not chosen.equal(logits.argmax(-1))
    assert run.predict(logits, 2, MASK, greedy=True)[0].equal(logits.argmax(-1))


def test_select_commits():
    """The published rule, written out, on every small case of confidences and steps left."""
    g = seeded(0)
    for _ in range(300):
        Q, steps_left = torch.randint(1, 9, (2,), generator=g).tolist()
        confidence, masked = torch.rand(3, Q, generator=g), torch.rand(3, Q, generator=g) < 0.6
        commits = twotower.select_commits(confidence, masked, 0.8, steps_left)
        for row in range(3):
            places = [i for i in range(Q) if masked[row, i]]
            sure = sum(confidence[row, i] > 0.8 for i in places)
            n = len(places) if steps_left == 1 else min(
                max(sure, 1, math.ceil(len(places) / steps_left)), len(places))
            best = sorted(places, key=lambda i: -confidence[row, i])[:n]
            assert commits[row].nonzero().flatten().tolist() == sorted(best)
    tie = torch.tensor([[0.8, 0.8]])
    at_threshold = twotower.select_commits(tie, tie > 0, 0.8, 9)
    assert at_threshold.tolist() == [[True, False]]             # strict, and the first wins a tie


# ------------------------------------------------------------------------------------- decoding

RUNS = [(variant, i) for variant in FLOAT32
        for i, run in enumerate(json.loads((GOLDEN / f"{variant}.json").read_text())["generations"])
        if run["kind"] != "generate_mask_diffusion" or run["batch"] == 1]
assert len(RUNS) == 7 + 7 + 36                          # AR, mock-AR, diffusion


@pytest.mark.parametrize("variant, i", RUNS)
def test_golden_generation(variant, i):
    """Every greedy run: tokens, passes; where recorded, each step's t, block and confidences."""
    data, manifest, model = golden(variant)
    run = manifest["generations"][i]
    knobs = ("block_size", "steps_per_block", "confidence_threshold")
    knobs = {name: run[name] for name in knobs if name in run}
    steps, eos = [], run["eos_token_id"]
    prompt = data[f"ids/{run['prompt']}"][:run["batch"]]
    result = getattr(model, run["kind"])(prompt, run["max_new_tokens"], eos_token_id=eos,
                                         on_step=steps.append, **knobs)
    for ours, theirs in zip(texts(result), run["new_tokens"], strict=True):
        if eos in theirs:
            theirs = theirs[:theirs.index(eos) + 1]
        # at the first EOS of any row the release stops the batch: the other row is shorter there
        cut_short = eos is not None and eos not in theirs
        assert ours == theirs or cut_short and ours[:len(theirs)] == theirs
    if run["kind"] == "generate_mask_diffusion":
        assert result.nfe.tolist() == [run["nfe"]]
        assert result.context_passes.tolist() == [run["max_new_tokens"] // run["block_size"]]
    for ours, theirs in zip(steps, run.get("trace", []), strict="trace" in run):
        assert (ours.block_index, ours.step) == (theirs["block"], theirs["step"])
        assert ours.t.tolist() == pytest.approx([theirs["t"]], abs=1e-6)
        assert ours.before.tolist() == theirs["xt"]
        for a, b in zip(ours.confidence[0].tolist(), theirs["conf"][0], strict=True):
            assert b is None or a == pytest.approx(b, abs=1e-4)


MODES = {"generate_ar": {}, "generate_mock_ar": {},
         "generate_mask_diffusion": dict(block_size=8, steps_per_block=6, confidence_threshold=0.3),
         "generate_speculative": dict(draft_length=8, steps_per_block=6, confidence_threshold=0.3)}


def texts(generation) -> list[list[int]]:
    return [tokens.tolist() for tokens in generation.tokens]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("mode", MODES)
def test_ragged_generation_equals_single_rows(mode, temperature, monkeypatch):
    """In tokens, passes and steps, at any place in a batch; also with a denoiser elsewhere."""
    model, knobs = random_model(), MODES[mode] | dict(temperature=temperature)
    generate = functools.partial(getattr(model, mode), top_k=20 if temperature else None)
    free, steps = texts(generate(PROMPTS, 29, seed=7, **knobs)), []
    ends = lambda eos: {(text.index(eos) if eos in text else 29) // 8 for text in free}
    knobs["eos_token_id"] = max(range(64), key=lambda eos: len(ends(eos)))
    batch = generate(PROMPTS, 29, seed=7, on_step=steps.append, **knobs)
    lengths = [len(tokens) for tokens in batch.tokens]
    assert max(lengths) - min(lengths) >= 8, "no row ended a block before another"
    assert texts(generate(PROMPTS[::-1], 29, seed=range(11, 6, -1), **knobs)) == texts(batch)[::-1]
    for row, prompt in enumerate(PROMPTS):
        own = []
        alone = generate([prompt], 29, seed=7 + row, on_step=own.append, **knobs)
        assert batch.tokens[row].equal(alone.tokens[0]) and batch.nfe[row] == alone.nfe[0]
        assert batch.context_passes[row] == alone.context_passes[0]
        mine = [(s, s.rows.index(row)) for s in steps if row in s.rows]
        mine = [(s, r) for s, r in mine if s.committed[r].any()]
        for (a, r), b in zip(mine, own, strict=True):
            assert (a.block_index, a.step, a.t[r]) == (b.block_index, b.step, b.t[0])
            assert a.after[r].equal(b.after[0]) and a.committed[r].equal(b.committed[0])
    monkeypatch.setattr(Tower, "device", property(
        lambda self: torch.device("cpu", 0 if self is model.denoiser_tower else None)))
    assert texts(generate(PROMPTS, 29, seed=7, **knobs)) == texts(batch)


@pytest.mark.parametrize("mode", MODES)
def test_length_eos_and_top(mode, monkeypatch):
    """A shorter text is a prefix, it ends with the first EOS, top 1 is greedy; no cache grows."""
    model, room, reserve = random_model(), [], KVCache.reserve
    monkeypatch.setattr(KVCache, "reserve", lambda cache, capacity: room.append(
        cache.key_cache.shape[2] - capacity) or reserve(cache, capacity))
    generate = lambda n, **more: texts(getattr(model, mode)(ids(1, 7), n, **MODES[mode], **more))[0]
    long = generate(40)
    for n in (1, 7, 8, 9, 25):
        assert generate(n) == long[:n]
    assert generate(40, eos_token_id=long[11]) == long[:long.index(long[11]) + 1]
    for eos in ([long[30], long[11]], np.array([long[30], 5, long[11]])):
        end = 1 + min(i for i, token in enumerate(long) if token in list(eos))
        assert generate(np.int64(40), eos_token_id=eos) == long[:end]
    assert MASK not in long or mode != "generate_mask_diffusion"
    hot = functools.partial(generate, 16, temperature=5.0, seed=0)
    assert hot(top_k=1) == hot(top_p=1e-6) == long[:16] != hot()
    assert len(room) > 4 and min(room) >= 0


def test_prompt_is_read_once_and_cache_is_used():
    """By tokens and passes of each tower; mock-AR reads prompt[:-1], of one token in no pass."""
    model, seen = random_model.__wrapped__(), []
    for tower in model.context_tower, model.denoiser_tower:
        tower.register_forward_pre_hook(lambda module, args: seen.append((module, args[0].numel())))
    through = lambda tower: sum(tokens for module, tokens in seen if module is tower)
    for n, mode, context, denoiser, passes in (
            (50, "ar", 50 + 31, 0, 32), (50, "mock_ar", 49 + 31, 32, 32), (1, "ar", 32, 0, 32),
            (1, "mock_ar", 31, 32, 31), (50, "mask_diffusion", 50 + 24, None, 4)):
        seen.clear()
        result = getattr(model, f"generate_{mode}")(ids(1, n), 32, **MODES[f"generate_{mode}"])
        denoiser = 8 * int(result.nfe) if denoiser is None else denoiser
        assert (through(model.context_tower), through(model.denoiser_tower)) == (context, denoiser)
        assert result.context_passes.tolist() == [passes]
        assert mode == "mask_diffusion" or result.nfe.tolist() == [denoiser]


def test_new_tokens_are_told_and_rows_may_be_ended():
    told = [[], [], []]
    result = random_model().generate_mask_diffusion(
        [ids(5), ids(9), ids(2)], [16, 24, 20], block_size=8,
        on_tokens=lambda written: told[written.row].append(written) or written.row == 1)
    assert [[written.ended for written in row] for row in told] == [
        [False, True], [False], [False, False, True]]
    assert [sum((written.new for written in row), []) for row in told] == texts(result)
    assert [len(row) for row in texts(result)] == [16, 8, 20]


@pytest.mark.parametrize("block_size, steps", [(1, 1), (5, 2), (16, 1), (16, 16), (24, 40)])
def test_every_step_commits_and_blocks_end(block_size, steps):
    seen = []
    result = random_model().generate_mask_diffusion(
        [ids(3), ids(30)], 24, block_size=block_size, steps_per_block=steps,
        confidence_threshold=0.9, mask_token_id=7, on_step=seen.append)
    assert [len(tokens) for tokens in result.tokens] == [24, 24] and (seen[0].before == 7).all()
    assert not any(7 in tokens for tokens in result.tokens)
    for step in seen:
        masked = step.before == 7
        assert (step.committed.sum(-1) >= masked.any(-1).long()).all()
        assert step.step < steps
    assert (result.nfe <= steps * math.ceil(24 / block_size)).all()


def templates_of(kind: str, n: int, seed: int = 0) -> torch.Tensor:
    holes = {"fixed": torch.zeros(n), "holes": torch.ones(n), "start": torch.arange(n) < n // 3,
             "end": torch.arange(n) >= n // 3, "alternating": torch.arange(n) % 2,
             "random": torch.rand(n, generator=seeded(seed)) < 0.5}[kind].bool()
    return ids(n, seed=seed).masked_fill(holes, MASK)


def as_template(ids: torch.Tensor) -> list[int | None]:
    return [None if token == MASK else token for token in ids.tolist()]


def test_templates_are_kept():
    """Fixed tokens from the first step on; blocks without holes cost nothing; each row as alone."""
    model, steps = random_model(), []
    prompts, templates = PROMPTS + [ids(5)], [templates_of(kind, n, n) for kind, n in (
        ("random", 21), ("fixed", 8), ("alternating", 30), ("start", 3), ("end", 17),
        ("holes", 21))]
    generate = functools.partial(model.generate_mask_diffusion, block_size=8)
    result = generate(prompts, template=[*map(as_template, templates)], on_step=steps.append)
    for row, (text, template) in enumerate(zip(result.tokens, templates, strict=True)):
        assert MASK not in text
        assert torch.equal(text.masked_fill(template == MASK, MASK), template)
        seen = [(s, s.rows.index(row)) for s in steps if row in s.rows]
        for step, r in seen:
            own = template[step.block_index * 8:][:8]
            shown = step.before[r, :len(own)]
            assert torch.equal(shown[own != MASK], own[own != MASK])
            assert step.masked[r].equal(step.before[r] == MASK)
            assert step.t[r] == step.masked[r].float().mean()
        blocks = {step.block_index for step, r in seen if step.committed[r].any()}
        assert blocks == {b for b in range(4) if (template[b * 8:b * 8 + 8] == MASK).any()}
        alone = generate([prompts[row]], template=[as_template(template)])
        assert alone.tokens[0].equal(text) and (alone.nfe[0], alone.context_passes[0]) == (
            result.nfe[row], result.context_passes[row])
    plain = generate([prompts[5]], 21).tokens[0]
    assert result.nfe[1] == 0 and torch.equal(text[:16], plain[:16])


def test_a_hole_is_a_position_not_an_id():
    """The mask token's id in a template is text; ids alone have no holes and cost no pass."""
    model, steps = random_model(), []
    generate = functools.partial(model.generate_mask_diffusion, ids(2, 9), block_size=8)
    given = [[MASK, None, 5, MASK, None, None, 6, 7, 8, MASK, None], [None] * 2 + [MASK] * 9]
    result = generate(template=given, on_step=steps.append)
    for text, template in zip(texts(result), given, strict=True):
        assert len(text) == 11
        for one, wanted in zip(text, template):
            assert one == wanted or wanted is None and one != MASK
    first = steps[0]
    assert first.masked.tolist() == [[one is None for one in row[:8]] for row in given]
    assert first.t.tolist() == [3 / 8, 2 / 8] and not (first.committed & ~first.masked).any()
    for fixed in ([MASK, 5, MASK], torch.tensor([MASK, 5, MASK])):
        for template in (fixed, [fixed] * 2):
            result = generate(template=template)
            assert texts(result) == [[MASK, 5, MASK]] * 2 and result.nfe.tolist() == [0, 0]
    free = texts(generate(5))                               # rows without one, or with holes alone
    assert texts(generate(5, template=[None, None])) == free
    assert texts(generate(template=[[None] * 5, [None] * 5])) == free


def test_many_templates_survive():
    """Rows with templates of their own, some followed by free text, EOS anywhere in the holes."""
    templates = [templates_of("random", 1 + seed * 7 % 13, seed) for seed in range(200)]
    lengths = [len(template) + 3 * (seed % 2) for seed, template in enumerate(templates)]
    result = random_model().generate_mask_diffusion(
        list(ids(200, 2)), lengths, block_size=4, steps_per_block=2, eos_token_id=9,
        template=[*map(as_template, templates)], temperature=2.0, seed=0)
    for text, template, length in zip(result.tokens, templates, lengths, strict=True):
        kept = text[:len(template)]
        assert torch.equal(kept.masked_fill(template == MASK, MASK), template)
        assert len(text) == length or text[-1] == 9 and len(text) > len(template)
        assert 9 not in text[len(template):-1]
    assert any(9 in text[:-1] for text in result.tokens)


def check_that_both_write_the_same(model, prompts, new: int, draft_length: int, **knobs):
    """Speculative decoding and AR, in no more passes; returns the share of AR's that it took."""
    ar = model.generate_ar(prompts, new, **knobs)
    ours = model.generate_speculative(prompts, new, draft_length, **knobs)
    assert texts(ours) == texts(ar) and (ours.context_passes <= ar.context_passes).all()
    return int(ours.context_passes.sum()) / int(ar.context_passes.sum())


SAMPLED = dict(temperature=0.9, top_k=30, top_p=0.95, seed=0)


@pytest.mark.parametrize("knobs", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_speculative_decoding_writes_what_ar_writes(knobs):
    """200 held-out prompts of the miniature, and one; random towers, whose drafts are wrong."""
    model, tokenizer = miniature()
    prompts = [torch.tensor(tokenizer.encode(prompt).ids)
               for task in corpus.TASKS
               for prompt, _ in items(task, 40, held_out=True)]
    for rows in prompts, prompts[90:91]:
        share = check_that_both_write_the_same(model, rows, 70, 16, eos_token_id=2, **knobs)
        assert knobs or share < 0.3
    knobs = knobs | dict(eos_token_id=11)
    for model in golden("cfg1")[2], random_model(), random_model(odd=True):
        for draft_length in (1, 7, 16):
            check_that_both_write_the_same(model, PROMPTS, 30, draft_length, **knobs)


def test_ar_may_choose_the_mask_token():
    """Where it does, the known first token of a draft is the mask's id and no hole."""
    model, prompt = random_model.__wrapped__(), ids(1, 9)
    with torch.no_grad():
        model.context_lm_head.weight[MASK] = 0.5 * model.context_lm_head.weight.norm(dim=1).max()
    assert MASK in model.generate_ar(prompt, 40).tokens[0]
    check_that_both_write_the_same(model, prompt, 40, 16)


def test_steps_are_reported_in_order():
    """One for each token of AR. Drafts are numbered from 0; the last token is not drafted."""
    model, prompt, steps = random_model(), ids(1, 9), []
    result = model.generate_ar(prompt, 5, on_step=steps.append)
    text = torch.cat([prompt[0], result.tokens[0]])
    p = model.context_logits(text[None])[0].softmax(-1).detach()
    for i, step in enumerate(steps):
        assert (step.rows, step.block_index, step.step, step.t.tolist()) == ([0], i, 0, [1.0])
        assert step.before.tolist() == [[MASK]] and step.after.tolist() == [[text[9 + i]]]
        assert step.committed.dtype == torch.bool and step.committed.tolist() == [[True]]
        assert float(step.confidence) == pytest.approx(float(p[8 + i, text[9 + i]]))
    assert len(steps) == 5
    steps.clear()
    result = model.generate_speculative(prompt, 30, steps_per_block=3, on_step=steps.append)
    drafts = [step.block_index for step in steps]
    assert len(steps) == int(result.nfe) and [step.step for step in steps[:3]] == [0, 1, 2]
    assert drafts == sorted(drafts) and set(drafts) == set(range(drafts[-1] + 1))
    assert model.generate_speculative(prompt, 1).nfe.tolist() == [0]


def test_a_draft_counts_as_far_as_it_is_right(monkeypatch):
    """A perfect one costs one pass; behind a wrong token or an EOS logits need not be finite."""
    model, prompt, read = random_model.__wrapped__(), ids(1, 9), []
    text = model.generate_ar(prompt, 65).tokens[0]

    def perfect(run, block, masked, *args, **kwargs):
        draft = text[len(run.texts[0]) - len(prompt[0]) - 1:][:16]
        return F.pad(draft, (0, 16 - len(draft)), value=7)[None]

    def not_finite_after(module, args, out):
        after = (read[-1] == forbidden).cumsum(1)[:, -out.shape[1]:, None] > 0
        return out.masked_fill(after, math.nan)
    monkeypatch.setattr(Decoding, "denoise_block", perfect)
    result = model.generate_speculative(prompt, 65)
    assert torch.equal(result.tokens[0], text)
    assert result.context_passes.tolist() == [1 + 4]            # the prompt, then 64 / 16
    model.context_tower.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    model.context_lm_head.register_forward_hook(not_finite_after)
    forbidden = eos = next(token for token in text[4:].tolist() if token not in prompt)
    result = model.generate_speculative(prompt, 65, eos_token_id=eos)
    assert result.tokens[0].tolist() == text[:text.tolist().index(eos) + 1].tolist()
    forbidden = next(token for token in range(4, 64) if token not in text and token not in prompt)
    monkeypatch.setattr(Decoding, "denoise_block", lambda run, block, masked, *args, **kwargs:
                        block.masked_fill(masked, forbidden))
    assert torch.equal(model.generate_speculative(prompt, 65).tokens[0], text)


def test_logits_of_tokens_that_stand_may_be_anything():
    model, prompt, blocks = random_model.__wrapped__(), ids(1, 9), []
    text = model.generate_mask_diffusion(prompt, 30).tokens[0]
    model.denoiser_tower.register_forward_pre_hook(lambda module, args: blocks.append(args[0]))
    model.lm_head.register_forward_hook(lambda module, args, out: out.masked_fill(
        (blocks[-1] != MASK)[..., None], math.nan))
    assert torch.equal(model.generate_mask_diffusion(prompt, 30).tokens[0], text)


# --------------------------------------------------------------------------------------- checks

def test_bad_arguments():
    model, one, mask = golden("cfg1")[2], torch.tensor([[5, 6]]), torch.full((1, 4), MASK)
    context, many = model.prefill(one), torch.full((1, 4090), 5)
    diffusion = functools.partial(model.generate_mask_diffusion, one)
    int64, too_many = "must be int64 ids of shape", "tokens are more than the model's"
    for function, *cases in (
            (model.prefill, ("prompt 0 holds id 128", [[128]]), ("there is no prompt", []),
             (f"prompt 1 {int64} (1 or more), got torch.int64 (0,)", [one[0], one[0, :0]]),
             ("prompt 1 holds id -1", [[5], [-1]]), (f"4097 {too_many}", torch.full((1, 4097), 5)),
             ("prompt 0 must be token ids, got 'h'", "hello")),
            (model.context_logits,
             (f"tokens {int64} (1 or more, 1 or more), got torch.float32 (1, 2)", one.float())),
            (model.extend, ("tokens holds id 999", context, torch.tensor([[999]])),
             (f"tokens {int64} (1, 1 or more), got torch.int64 (2, 1)", context, one.T),
             (f"4100 {too_many}", model.prefill(many), many[:, :10])),
            (model.denoise, ("t is nan", mask, context, math.nan), ("t is -1.0", mask, context, -1),
             (f"block {int64} (1, 1 or more), got torch.int64 (1, 0)", mask[:, :0], context),
             ("t is [1.5", mask, context, torch.tensor([1.5])),
             ("t is [0.5, 0.5]", mask, context, torch.tensor([0.5, 0.5]))),
            (model.diffusion_logits, (f"noisy {int64} (1, 4), got", mask, one, 1, 1),
             ("t is 7.0", mask, mask, 7, 4)),
            (model.diffusion_loss, ("no multiple of block_size 16", many[:, :24], 16)),
            (model.ar_loss, ("two tokens or more", one[:, :1])),
            (model.score, (f"4097 {too_many}", one, torch.full((1, 4095), 5)),
             ("2 continuations for 1 prompts", one, [one[0], one[0]]),
             ("continuation 0 holds id 128", one, [[128]]), ("tokens_per_pass is 0", one, one, 0)),
            (model.generate_ar, (f"4098 {too_many}", one, 4096), ("max_new_tokens is 0", one, 0),
             ("max_new_tokens is [4, 4]", one, [4, 4])),
            (diffusion, ("max_new_tokens is None",)),
            (TwoTower.from_pretrained, ("nowhere is not a directory", "nowhere"))):
        for message, *args in cases:
            refuses(message, function, *args)
    for message, template, *more in (
            ("template 0 holds id 128", [5, 128]), ("template must be ids", 5),
            ("(None is a hole), or such a sequence for each of 1 ", [[5, 7], [6]]),
            ("template 0 must be token ids", [5, None, "x"]), ("must be ids", [None] * 2),
            ("template 0 has 3 tokens, more than the 2", [5, 3, 7], 2)):
        refuses(message, diffusion, *more, template=template)
    for message, template in ((f"template 1 {int64} (1 or more)", [[5], []]),
                              ("max_new_tokens is None, but it must be", [[5], None])):
        refuses(message, model.generate_mask_diffusion, [one[0]] * 2, template=template)
    refuses(f"5000 {too_many}", diffusion, 8, block_size=5000)
    for name, *values in (("temperature", -1, math.nan, math.inf), ("eos_token_id", 128, [2, -1]),
                          ("top_k", 0), ("top_p", 1.5, 0), ("seed", -1, [1.5], [1, 2]),
                          ("block_size", 0, 8.0), ("steps_per_block", 0), ("mask_token_id", 128),
                          ("confidence_threshold", math.nan)):
        for value in values:
            refuses(f"{name} is {value!r}, but it must be", diffusion, 8, **{name: value})
    refuses("draft_length is 0", model.generate_speculative, one, 8, draft_length=0)
    refuses("towers is 'one'", TwoTower.from_pretrained, GOLDEN / "cfg1", towers="one")
    refuses("backend is 'cuda'", TwoTower.from_pretrained, GOLDEN / "cfg1", backend="cuda")
    refuses("graphs need backend 'triton'", model.use, "torch", graphs=True)


@pytest.mark.parametrize("mode", MODES)
def test_logits_that_are_not_finite_name_the_place(mode):
    model = TwoTower.from_pretrained(GOLDEN / "cfg1")
    with torch.no_grad():
        (model.lm_head if "m" in mode else model.context_lm_head).weight[7] = math.nan
    for knobs in ({}, SAMPLED):
        refuses("row 0, block 0, step 0, position 0", getattr(model, mode), [[5, 6, 7]], 8, **knobs)
    if mode == "generate_ar":
        refuses("of continuation 0 are not finite", model.score, [[5]], [[6]])


# ----------------------------------------------------------------------------- checkpoint files

def same_tensors(a: TwoTower, b: TwoTower) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("odd", [False, True])
def test_save_and_load(tmp_path, odd):
    """As shards, then over them as one file: nothing stale remains, nor is somebody else's lost."""
    model = random_model(odd, torch.float32)
    (tmp_path / "model-ema.safetensors").write_bytes(b"somebody's own")
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    for max_shard_bytes in (20_000, size):
        model.save_pretrained(tmp_path, max_shard_bytes)
        loaded = TwoTower.from_pretrained(tmp_path)
        assert loaded.config == model.config and same_tensors(model, loaded)
        names = sorted(path.name for path in tmp_path.iterdir())
        if max_shard_bytes == 20_000:
            index = json.loads((tmp_path / twotower.INDEX).read_text())
            shards = sorted(set(index["weight_map"].values()))
            assert index["metadata"]["total_size"] == size and len(shards) > 5
            assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
            assert names == ["config.json", *shards, "model-ema.safetensors", twotower.INDEX]
            for name in shards:                         # one larger tensor may be its own file
                tensors = load_file(tmp_path / name).values()
                assert len(tensors) == 1 or sum(v.nbytes for v in tensors) <= 20_000
    assert names == ["config.json", "model-ema.safetensors", "model.safetensors"]
    biases = ("0.mixer.in_proj 0.mixer.out_proj 2.mixer.o_proj 3.mixer.down_proj 1.mixer.experts.7."
              "up_proj 1.mixer.experts.7.down_proj 1.mixer.shared_experts.up_proj").split()
    assert all((f"denoiser_tower.layers.{at}.bias" in index["weight_map"]) == odd for at in biases)


SIXTY_FOUR = TINY | dict(hidden_size=64, moe_intermediate_size=128, initializer_range=0.1)


@pytest.mark.parametrize("kind, other", [("int8", "int4"), ("int4", "int8")])
def test_quantized_models_save_and_load(kind, other, tmp_path, capsys):
    """Each expert as `quantize` makes it, all else untouched, from either layout, and back."""
    torch.manual_seed(0)
    model = TwoTower(TwoTowerConfig(**SIXTY_FOUR))
    model.save_pretrained(tmp_path / "wide", 20_000)
    held = TwoTower.from_pretrained(tmp_path / "wide", experts=kind, dtype=torch.bfloat16)
    plain, state, seen = model.state_dict(), held.state_dict(), 0
    for name, tensor in state.items():
        if name.endswith(".integers"):
            scales = state[name.replace(".integers", ".scales")]
            for e, weight in enumerate(plain[name.removesuffix(".integers")]):
                right = twotower.quantize(weight, kind)
                assert torch.equal(tensor[e], right[0]) and torch.equal(scales[e], right[1])
                seen += 1
        elif not name.endswith(".scales"):
            assert torch.equal(tensor, plain[name].to(tensor.dtype)), name
    assert seen == 2 * 2 * 2 * 8 and held.config.experts == kind
    directory = tmp_path / kind
    for most in (10_000, 10**9):
        held.save_pretrained(directory, most)
        again, asked = (TwoTower.from_pretrained(directory, **options)
                        for options in ({}, {"experts": kind}))
        assert same_tensors(held, again) and same_tensors(held, asked)
    key = "denoiser_tower.layers.1.mixer.experts.7.up_proj.weight"
    found = load_file(directory / "model.safetensors")
    assert found[key].dtype == torch.int8 and found[key + "_scale"].dtype == torch.bfloat16
    alone = TwoTower.from_pretrained(directory, towers="context")
    assert all(tensor.equal(state[name]) for name, tensor in alone.state_dict().items())
    refuses(f"holds experts in {kind}, not {other}", TwoTower.from_pretrained, directory,
            experts=other)
    for layout, towers in (("released", "both"), ("backbone", "context")):
        refuses(f"layout '{layout}' cannot hold experts in {kind}", held.save_pretrained,
                tmp_path / "new", layout=layout, towers=towers)
    refuses(f"experts in {kind} cannot be trained", TwoTower, held.config)
    assert f"experts in {kind} cannot be trained" in refused(
        train, capsys, "--backbone", directory, "--out", tmp_path / "no", "--data", "README.md")
    put(key + "_scale", torch.ones(1, 127))(directory)
    refuses(f"tensor {key}_scale is F32 [1, 127], expected", TwoTower.from_pretrained, directory)
    put(key, plain[key.replace("7.", "")][7])(directory)
    refuses(f"tensor {key} is F32 [128, 64], expected I8", TwoTower.from_pretrained, directory)
    model.save_pretrained(tmp_path / "backbone", towers="context", layout="backbone")
    for change in (lambda tensors: None, stack_experts):
        edit_tensors(tmp_path / "backbone" / "model.safetensors", change)
        both = TwoTower.from_backbone(tmp_path / "backbone", experts=kind).state_dict()
        for name, tensor in state.items():
            if ".experts." in name and name.startswith("context_"):
                assert torch.equal(both[name], tensor)
                assert torch.equal(both[name.replace("context_", "denoiser_")], tensor)
    bench.quantize_experts(model, kind)                             # the same in place
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items()
               if ".experts." in name)


def stack_experts(tensors: dict):
    """As transformers names experts in memory: one tensor for all of a layer."""
    for key in [key for key in tensors if ".experts.0." in key]:
        name = key.removesuffix(".weight")
        tensors[name.replace(".0.", ".")] = torch.stack(
            [tensors.pop(key.replace(".0.", f".{e}.")) for e in range(8)])


class Killed(BaseException):
    pass


def fail_at(monkeypatch, n: int, error: type[BaseException]) -> list[str]:
    """The n-th operation on files raises the error, a write when half done; if that is Killed all
    later ones do, as nothing tidies up after a kill. Returns the names of those begun."""
    begun = []

    def patched(function, written: int | None = None):
        def run(*args, **knobs):
            begun.append(function.__name__)
            if len(begun) < n or len(begun) > n and error is not Killed:
                return function(*args, **knobs)
            if len(begun) == n and written is not None:
                function(*args, **knobs)
                os.truncate(args[written], os.path.getsize(args[written]) // 2)
            raise error("interrupted")
        return run
    for owner, name, *written in ((os, "replace"), (Path, "unlink"), (Path, "chmod"),
                                  (Path, "mkdir"), (Path, "write_bytes", 0),
                                  (twotower, "save_file", 1)):
        monkeypatch.setattr(owner, name, patched(getattr(owner, name), *written))
    return begun


@pytest.mark.parametrize("error, size", [(OSError, 60_000), (Killed, 40_000)])
def test_an_interrupted_save_leaves_the_old_checkpoint_the_new_or_none(tmp_path, error, size):
    """At every single operation; with the tokenizer it was made with. Saving again mends it."""
    fields, found = TINY | dict(hybrid_override_pattern="M-", num_hidden_layers=2), []
    old, new = (TwoTower(TwoTowerConfig(**fields)) for _ in range(2))
    for n in itertools.count(1):
        directory = tmp_path / str(n)
        old.save_pretrained(directory, 40_000, {"tokenizer.json": b"old"})
        with pytest.MonkeyPatch.context() as patch:
            begun = fail_at(patch, n, error)
            with contextlib.suppress(OSError, Killed):
                new.save_pretrained(directory, size, {"tokenizer.json": b"new"})
        try:
            loaded, tokenizer = TwoTower.from_pretrained(directory), directory / "tokenizer.json"
            found.append(tokenizer.read_text())
            assert same_tensors(loaded, {"old": old, "new": new}[found[-1]])
            left = [path.name for path in directory.iterdir() if path.suffix == ".partial"]
            assert not left or error is Killed
        except ValueError as refusal:
            assert "config.json is missing: saving was interrupted; save again" in str(refusal)
            found.append("none")
        new.save_pretrained(directory, 90_000, {"tokenizer.json": b"new"})
        assert same_tensors(TwoTower.from_pretrained(directory), new)
        names = set(json.loads((directory / twotower.INDEX).read_text())["weight_map"].values())
        assert {path.name for path in directory.iterdir()} == {
            *names, twotower.INDEX, "config.json", "tokenizer.json"}
        if len(begun) < n:
            break
    assert [state for state, _ in itertools.groupby(found)] == ["old", "none", "new"]
    assert found.count("old") > 5 and found.count("none") > 5 and len(names) > 1


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")    # of torch.compile itself
def test_what_is_saved_loads_again(tmp_path):
    """Under wrappers, shared or transposed; what cannot be loaded is refused, nothing touched."""
    model, state = random_model.__wrapped__(False, torch.float32), torch.get_rng_state()
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    again = lambda: TwoTower.from_pretrained(tmp_path).state_dict()
    equal = lambda a, b: a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)
    layers = model.denoiser_tower.layers
    layers[1].mixer.experts = torch.compile(layers[1].mixer.experts)        # each wraps, runs none
    layers[3] = torch.nn.DataParallel(layers[3])
    model.context_tower = torch.compile(model.context_tower)
    head = model.lm_head.weight
    head.data = head.T.contiguous().T
    model.save_pretrained(tmp_path, 20_000)
    assert equal(again(), plain) and torch.get_rng_state().equal(state)
    model.denoiser_tower, model.lm_head = model.context_tower, model.context_lm_head
    model.save_pretrained(tmp_path)
    tied = {name: plain[name if name.startswith(("t_", "scale")) else "context_" + name.replace(
        "denoiser_", "").removeprefix("context_")] for name in plain}
    assert equal(again(), tied)
    if hasattr(os, "getuid"):                               # not on Windows
        assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for name, change, message in (
            ("lm_head", torch.nn.utils.parametrizations.weight_norm,
             "parametrizations.weight.original0 is torch.float32 [64, 1], expected noth"),
            ("lm_head", lambda head: head.to(torch.float8_e5m2),
             "lm_head.weight is torch.float8_e5m2 [64, 32], expected F64"),
            ("lm_head", lambda head: torch.nn.Linear(32, 65, bias=False),
             "lm_head.weight is torch.float32 [65, 32], expected F64 or F32 or F16 or BF16 [64,"),
            ("t_embedder", lambda _: torch.nn.Identity(), "mlp.0.bias is missing")):
        whole = getattr(model, name)
        setattr(model, name, change(copy.deepcopy(whole)))
        refuses(message, model.save_pretrained, tmp_path)
        setattr(model, name, whole)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_context_alone_needs_no_denoiser_tensor(tmp_path):
    """Shards that hold only denoiser tensors may even be absent."""
    model = random_model(False, torch.float32)
    model.save_pretrained(tmp_path, 20_000)
    weight_map = json.loads((tmp_path / twotower.INDEX).read_text())["weight_map"]
    needed = {name for key, name in weight_map.items() if key.startswith("context_")}
    for name in set(weight_map.values()) - needed:
        (tmp_path / name).unlink()
    loaded = TwoTower.from_pretrained(tmp_path, towers="context")
    assert all(name.startswith("context_") for name in loaded.state_dict())
    assert texts(loaded.generate_ar(ids(1, 9), 8)) == texts(model.generate_ar(ids(1, 9), 8))
    TwoTower.from_pretrained(GOLDEN / "cfg1", towers="context")     # all in one file
    model.save_pretrained(tmp_path / "alone", towers="context")
    assert same_tensors(TwoTower.from_pretrained(tmp_path / "alone", towers="context"), loaded)
    refuses("a context tower alone must not replace", loaded.save_pretrained, tmp_path)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "model-00001-of-00009.safetensors.partial").write_text("of a killed save")
    loaded.save_pretrained(tmp_path / "new")
    assert len([*(tmp_path / "new").iterdir()]) == 2
    refuses("only the context tower is loaded", loaded.generate_mask_diffusion, ids(1, 9), 8)
    refuses("is missing", TwoTower.from_pretrained, tmp_path)


def test_each_tensor_goes_straight_to_its_device(monkeypatch):
    """Another device is played by "meta": no tensor is made or read but where it belongs."""
    read, safe_open = {}, twotower.safe_open

    @contextlib.contextmanager
    def opened(path, framework, device="cpu"):
        with safe_open(path, framework) as file:
            get = lambda key: read.setdefault(key, device) and file.get_tensor(key)
            yield types.SimpleNamespace(keys=file.keys, get_slice=file.get_slice, get_tensor=get)
    monkeypatch.setattr(twotower, "safe_open", opened)
    for context, denoiser in (("cpu", "meta"), ("meta", "cpu"), ("meta", None)):
        read.clear()
        model = TwoTower.from_pretrained(GOLDEN / "cfg1", context_device=context,
                                         denoiser_device=denoiser)
        assert len(read) == 282
        placed = {name: str(tensor.device) for name, tensor in model.state_dict().items()}
        for name, device in [*read.items(), *placed.items()]:
            assert device == (context if name.startswith("context_") else denoiser or context), name
    read.clear()
    (model, files), loaded = TwoTower.skeleton(GOLDEN / "cfg1"), []
    assert not read and len(files) == 282
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    model.fill(files, "cpu", "cpu", loaded.append)
    assert sum(loaded) == sum(tensor.nbytes for tensor in model.state_dict().values())


def test_dtypes(tmp_path):
    """Casting a float32 model rounds all but the router, like loading it in bfloat16."""
    model = golden("cfg1_bf16")[2]
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    loaded, cast = TwoTower.from_pretrained(tmp_path), TwoTower.from_pretrained(GOLDEN / "cfg1")
    for other in (loaded, cast.to(torch.bfloat16)):
        assert same_tensors(model, other)
        for name, tensor in other.state_dict().items():
            assert tensor.dtype == (torch.float32 if ".gate." in name else torch.bfloat16), name


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
@pytest.mark.parametrize("kind", [None, "int8", "int4"])
def test_memory_while_loading(kind, tmp_path):
    """Peak host memory of a 2 GB checkpoint: the weights, as they are held, and at most 5 % more
    and, where they are quantized, an expert in 16 bits."""
    write_headers(tmp_path, TINY | dict(hidden_size=1024, vocab_size=8192, n_routed_experts=64,
                                        moe_intermediate_size=1920), 4)
    size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    script = """
import re, sys
from twotower import TwoTower
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
TwoTower.from_pretrained("miniature", experts=sys.argv[2] or None)      # what torch takes itself
before = peak()
model = TwoTower.from_pretrained(sys.argv[1], experts=sys.argv[2] or None)
print(peak() - before, sum(tensor.nbytes for tensor in model.state_dict().values()))
"""
    run = run_python("-c", script, tmp_path, kind or "")
    assert size > 2e9
    peak, held = map(int, run.stdout.split())
    assert held / size < {None: 1.01, "int8": 0.6, "int4": 0.4}[kind]
    assert 0.9 * held < peak < 1.05 * held + 2 * 1920 * 1024 * (kind is not None)


def write_headers(directory: Path, fields: dict, shards: int) -> int:
    """A checkpoint of bfloat16 tensors (float32 routers) without data: the files are holes."""
    with torch.device("meta"):
        model = TwoTower(TwoTowerConfig(**fields))
    parts = [(key, part) for key, _, part in twotower.checkpoint_tensors(model)]
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    weight_map = {key: names[i * shards // len(parts)] for i, (key, _) in enumerate(parts)}
    for name in names:
        header, end = {}, 0
        for key, part in parts:
            if weight_map[key] == name:
                wide = key.endswith((".gate.weight", ".e_score_correction_bias"))
                start, end = end, end + part.numel() * (4 if wide else 2)
                header[key] = {"dtype": "F32" if wide else "BF16", "shape": list(part.shape),
                               "data_offsets": [start, end]}
        header = json.dumps(header).encode()
        (directory / name).write_bytes(len(header).to_bytes(8, "little") + header)
        os.truncate(directory / name, 8 + len(header) + end)
    (directory / twotower.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(fields))
    return len(names)


def test_works_when_copied_alone(tmp_path):
    """twotower.py by itself trains, generates, saves and loads, and imports only what it may."""
    source = (HERE / "twotower.py").read_text()
    imports = re.findall(r"^(?:from|import) (\w+)", source, re.MULTILINE)
    assert set(imports) - sys.stdlib_module_names == {"torch", "einops", "safetensors"}
    (tmp_path / "twotower.py").write_text(source)
    script = f"""
import torch
from twotower import TwoTower, TwoTowerConfig
torch.manual_seed(0)
model = TwoTower(TwoTowerConfig(**{TINY!r}))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
tokens = torch.randint(4, 64, (2, 32))
loss = model.ar_loss(tokens) + model.diffusion_loss(tokens, 16)
loss.backward(); optimizer.step()
print(len(model.generate_mask_diffusion(tokens[:, :5], 20).tokens[0]))
model.save_pretrained("saved"); TwoTower.from_pretrained("saved")
"""
    run = run_python("-c", script, cwd=tmp_path)
    assert run.stdout == "20\n"


def copy_checkpoint(tmp_path: Path, source: Path = GOLDEN / "cfg1", sharded=False) -> Path:
    directory = tmp_path / "checkpoint"
    if sharded:
        golden("cfg1")[2].save_pretrained(directory, 600_000)
        shutil.copy(GOLDEN / "cfg1" / "tokenizer.json", directory)
    else:
        shutil.copytree(source, directory)
    return directory


def edit_json(path: Path, change):
    change(value := json.loads(path.read_text()))
    path.write_text(json.dumps(value))


def edit_tensors(path: Path, change):
    change(tensors := load_file(path))
    save_file(tensors, path)


cut = lambda name, keep: lambda d: (d / name).write_bytes((d / name).read_bytes()[:keep])
gone = lambda name: lambda d: (d / name).unlink()
text = lambda name, content: lambda d: (d / name).write_text(content)
link = lambda name: lambda d: (gone(name)(d), (d / name).symlink_to(d / "blobs" / "0123abcd"))
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 20231824\n"
config = lambda **changes: lambda d: edit_json(d / "config.json", lambda c: c.update(changes))
index = lambda change: lambda d: edit_json(d / twotower.INDEX, lambda i: change(i["weight_map"]))
weights = lambda change, name="model.safetensors": lambda d: edit_tensors(d / name, change)
put = lambda key, tensor, *name: weights(lambda tensors: tensors.update({key: tensor}), *name)

UP = "denoiser_tower.layers.1.mixer.experts.3.up_proj.weight"
FIRST, SHARD = "context_tower.embeddings.weight", "model-00002-of-00005.safetensors"
# what is wrong -> (how to break a checkpoint, what the one line must say)
BROKEN = {
    "config missing": (gone("config.json"), "config.json is missing"),
    "config is a link": (link("config.json"), "config.json is a link to nothing: its download did"),
    "weights are a link": (link("model.safetensors"), "model.safetensors is a link to nothing:"),
    "weights are of Git LFS": (text("model.safetensors", LFS), "is a Git LFS pointer: the file it"),
    "index is a link": (link(twotower.INDEX), "index.json is a link to nothing: its download did"),
    "shard is of Git LFS": (text(SHARD, LFS), f"{SHARD} is a Git LFS pointer: the file itself was"),
    "config is broken JSON": (cut("config.json", 100), "config.json is not valid JSON"),
    "config is a list": (text("config.json", "[]"), "must hold a JSON object"),
    "config is impossible": (config(n_groups=0), "config.json: config: n_groups is 0, but it"),
    "no weights": (gone("model.safetensors"), "model.safetensors is missing, and so"),
    "weights truncated": (cut("model.safetensors", 10**6), "model.safetensors is truncated"),
    "weights are text": (text("model.safetensors", "<html></html>"), "not a safetensors file"),
    "tensor missing": (weights(lambda t: t.pop(UP)), f"tensor {UP} is missing"),
    "no time conditioning": (weights(lambda t: t.pop("t_block.1.bias")), "tensor t_block.1.bias"),
    "tensor too many": (put("extra", torch.zeros(1)), "expected nothing"),
    "wrong shape": (put(UP, torch.zeros(24, 63)), f"tensor {UP} is F32 [24, 63], expected"),
    "wrong dtype": (put(UP, torch.zeros(24, 64).char()), f"tensor {UP} is I8 [24, 64], expected"),
    "mixed dtypes": (put(FIRST, torch.zeros(128, 64).bfloat16()), "mixes dtypes, such"),
    "one expert in another dtype": (put(UP, torch.zeros(24, 64).bfloat16()),
                                    f"torch.bfloat16 of {UP}; give a dtype for all"),
    "shard missing": (gone(SHARD), f"{SHARD} is missing"),
    "shard truncated": (cut(SHARD, 10**5), f"{SHARD} is truncated"),
    "index is broken JSON": (cut(twotower.INDEX, 500), "index.json is not valid JSON"),
    "index without a map": (text(twotower.INDEX, "{}"), "has no weight_map"),
    "index points elsewhere": (index(lambda m: m.update({UP: "../other.safetensors"})),
                               "which is no safetensors file name"),
    "index lies": (index(lambda m: m.update({FIRST: SHARD})), f"{SHARD} is its place too"),
    "a tensor twice": (put(FIRST, torch.zeros(128, 64), SHARD), f"tensor {FIRST} is in {SHARD}, "),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_checkpoint(what, tmp_path):
    damage, message = BROKEN[what]
    sharded = what.startswith(("shard", "index", "a tensor twice"))
    damage(directory := copy_checkpoint(tmp_path, sharded=sharded))
    refuses(message, TwoTower.from_pretrained, directory)


# ------------------------------------------------------- backbones: single towers of the family

# as the 8B, the 9B (heads of 80 channels, 5 query heads to a KV head) and the 30B, but small
FAMILY = {kind: TINY | fields | dict(num_hidden_layers=len(fields["hybrid_override_pattern"]))
          for kind, fields in {
              "8B": dict(hybrid_override_pattern="M-M-M-M*-M-", n_groups=1),
              "9B": dict(hybrid_override_pattern="M-MM-M*-M-", mamba_head_dim=80, hidden_size=40,
                         num_attention_heads=10),
              "30B": dict(hybrid_override_pattern="MEM*EME")}.items()}


@pytest.mark.parametrize("kind", FAMILY)
def test_backbones_come_from_transformers_and_go_back(kind, tmp_path):
    """The same logits and tensors both ways. (Theirs clamps dt to time_step_min, ours does not.)"""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    with bench.without_this_folder():
        from transformers import AutoModelForCausalLM, NemotronHConfig, NemotronHForCausalLM
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    fields = {name: value for name, value in FAMILY[kind].items()
              if name != "num_hidden_layers" and (kind == "30B" or "expert" not in name)}
    theirs = NemotronHForCausalLM(NemotronHConfig(**fields, time_step_min=1e-30)).eval()
    for i, (name, tensor) in enumerate(theirs.state_dict().items()):
        gain = tensor[0].numel() ** -0.5 if tensor.dim() > 1 else 0.3
        tensor.copy_(randn(*tensor.shape, seed=i) * gain + ("norm" in name))
    theirs.save_pretrained(tmp_path / "theirs")
    model, tokens = TwoTower.from_backbone(tmp_path / "theirs"), ids(2, 37)
    with torch.no_grad():
        logits = theirs(tokens).logits
        check(model.context_logits(tokens), logits, 3e-5)
        model.save_pretrained(tmp_path / "ours", 30_000, towers="context", layout="backbone")
        again, report = AutoModelForCausalLM.from_pretrained(tmp_path / "ours",
                                                             output_loading_info=True)
        assert len(report) > 2 and not any(report.values()), report
        assert torch.equal(again.eval()(tokens).logits, logits)
    before, after = ({key: tensor for path in (tmp_path / whose).glob("*.safetensors")
                      for key, tensor in load_file(path).items()} for whose in ("theirs", "ours"))
    assert before.keys() == after.keys() and all(before[key].equal(after[key]) for key in before)
    assert TwoTowerConfig.from_json(tmp_path / "ours" / "config.json") == model.config
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["n_shared_experts"] == 1


def backbones(directory: Path) -> TwoTower:
    """One with every option turned, in shards, stacked, as in memory; returns whose tower it is."""
    model = random_model(True, torch.float32)
    model.save_pretrained(directory / "shards", 20_000, towers="context", layout="backbone")
    bare = functools.partial(re.sub, r"(experts\.\w+)\.weight", r"\1")
    for name, tower, spell in (("stacked", "backbone.", str), ("model", "model.", bare)):
        (directory / name).mkdir()
        shutil.copy(directory / "shards" / "config.json", directory / name)
        save_file({tower + spell(key): tensor
                   for key, tensor in model.context_tower.state_dict().items()}
                  | {"lm_head.weight": model.context_lm_head.weight.data,
                     "mtp.layers.0.norm.weight": torch.zeros(3)},
                  directory / name / "model.safetensors")
    return model


def test_a_backbone_becomes_both_towers(tmp_path, monkeypatch):
    """However it is spelled; the time conditioning is as from scratch, or at first does nothing."""
    model, block, std = backbones(tmp_path), torch.full((1, 4), MASK), TINY["hidden_size"] ** -0.5
    torch.manual_seed(0)
    for spelling in ("shards", "stacked", "model"):
        context = TwoTower.from_backbone(tmp_path / spelling, towers="context").state_dict()
        loaded = TwoTower.from_backbone(tmp_path / spelling, dtype=torch.float64)
        assert all(p.requires_grad for p in loaded.parameters())
        for name, tensor in context.items():
            assert tensor.equal(model.state_dict()[name])
            other = name.replace("context_tower", "denoiser_tower").removeprefix("context_")
            for whose in (name, other):
                assert loaded.state_dict()[whose].equal(tensor.double())
        assert all(name.startswith("context_") for name in context)
        tables = torch.stack(list(loaded.scale_shift_tables))
        for found, wanted in ((loaded.t_block[1].weight.std(), 0.02), (tables.std(), std),
                              (loaded.t_embedder.mlp[0].weight.std(), 0.02)):
            assert abs(found / wanted - 1) < 0.1            # of 576 or more: 3 standard errors
        assert not loaded.t_block[1].bias.any() and tables.dtype == torch.float64
    denoise = lambda model, t: model.denoise(block, model.prefill(ids(1, 5)), t)
    copy = TwoTower.from_backbone(tmp_path / "shards", gate="copy")
    assert denoise(copy, 0.3).equal(denoise(copy, None))
    assert not denoise(loaded, 0.3).equal(denoise(loaded, None))
    safe_open = twotower.safe_open                          # which knows no device "meta"
    monkeypatch.setattr(twotower, "safe_open", lambda path, kind, **_: safe_open(path, kind))
    placed = TwoTower.from_backbone(tmp_path / "model", denoiser_device="meta", gate="copy")
    for name, tensor in placed.state_dict().items():
        assert tensor.is_meta != name.startswith("context_")


def test_what_is_no_backbone_or_no_more_than_one(tmp_path):
    """The line says what it is and what to call; a mode that needs a denoiser how to train one."""
    backbones(tmp_path)
    shards, stacked = tmp_path / "shards", tmp_path / "stacked"
    how = f"{shards} is a backbone, one tower (backbone.*): TwoTower.from_backbone loads it, a " \
          f"denoiser is trained for it by python train.py --backbone {shards} --data FILE"
    load = TwoTower.from_backbone
    for towers in ("both", "context"):
        refuses(how, TwoTower.from_pretrained, shards, towers=towers)
        refuses("is no backbone (backbone.*, model.*): load it with TwoTower.from_pretrained", load,
                GOLDEN / "cfg1", towers=towers)
    refuses("gate is 'open', but it must be 'published' or 'copy'", load, shards, gate="open")
    model = load(shards)
    refuses("layout 'backbone' cannot hold towers 'both'", model.save_pretrained,
            tmp_path / "new", layout="backbone")
    refuses("a context tower alone must not replace", model.save_pretrained, shards,
            towers="context", layout="backbone")
    assert not (tmp_path / "new").exists()
    for damage, message in (
            (config(moe_latent_size=8), "moe_latent_size is 8, but experts of a latent size are"),
            (config(tie_word_embeddings=True), "write lm_head.weight apart from the embeddings"),
            (config(n_routed_experts=4, n_group=1, topk_group=1), "experts.down_proj.bias is F32"),
            (weights(lambda t: t.pop("lm_head.weight")), "tensor lm_head.weight is missing"),
            (put("lm_head.bias", torch.zeros(64)), "lm_head.bias is F32 [64], expected nothing")):
        damaged = shutil.copytree(stacked, tmp_path / "damaged", dirs_exist_ok=True)
        damage(damaged)
        refuses(message, load, damaged)


def test_sample_writes_and_scores_with_a_backbone(tmp_path):
    directory = tmp_path / "backbone"
    miniature()[0].save_pretrained(directory, 10**6, towers="context", layout="backbone",
                                   files=TOKENIZER)
    lines = prompts_file(tmp_path / "lines.jsonl", [{"text": "Hi", "continuation": " you"}])
    for flags in (["--mode", "ar", "Hi", "--max-new-tokens", 8],
                  ["--mode", "score", "--prompt-file", lines]):
        run = sample(*flags, directory=directory)
        assert run.returncode == 0 and run.stdout.replace(str(directory), str(MINIATURE)) == sample(
            *flags).stdout
    one_line(sample("Hi", directory=directory),
             f"python train.py --backbone {directory} --data FILE")


# ---------------------------------------------------------------------------------- the kernels

try:
    kernels = twotower.kernels()
except ValueError:
    kernels = None


def needs_kernels(test):
    """Without gradient; skipped without triton, whose interpreter warns of masked tails."""
    quiet = pytest.mark.filterwarnings("ignore::RuntimeWarning")
    skip = pytest.mark.skipif(kernels is None, reason="triton is not installed")
    return quiet(skip(torch.no_grad()(test)))


DEVICE = "cuda" if kernels and not kernels.INTERPRETED else "cpu"
# Triton's interpreter multiplies bfloat16 wrongly: that is for GPUs
KERNEL_DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")


class Case(NamedTuple):
    """An operation as kernels.py has it, or twotower.py: run(either, *copies of the tensors)."""

    what: str
    run: Callable
    tensors: tuple
    limit: float                # of the relative rms error of every output

    def __call__(self, ops) -> list[torch.Tensor]:
        """kernels.py on the tensors, or twotower.py on them in float64."""
        wider = ops is twotower
        out = self.run(ops, *(x.double() if wider and x.is_floating_point() else x.clone()
                              for x in self.tensors))
        return [x for x in out if x is not None]


def shared_expert(up: torch.Tensor, down: torch.Tensor) -> torch.nn.Module:
    mlp = twotower.MLP(SimpleNamespace(hidden_size=up.shape[1], mlp_bias=False), len(up))
    mlp.up_proj.weight, mlp.down_proj.weight = torch.nn.Parameter(up), torch.nn.Parameter(down)
    return mlp.requires_grad_(False)


def moe(ops, x, ids, weights, up, down, shared_up, shared_down, *biases):
    shared = shared_expert(shared_up, shared_down) if len(shared_up) else None
    out = ops.moe_experts(x, ids, weights, up, down, *biases or (None, None), shared)
    return [out.sum(1) if out.dim() == 3 else out]      # slots, which kernels.py leaves unsummed


def moe_quantized(kind: str, ops, x, ids, weights, up, up_scales, down, down_scales, *others):
    E, (outputs, inputs) = len(up), (up.shape[1], x.shape[1])
    held = [twotower.Quantized(shape, kind) for shape in ((E, outputs, inputs),
                                                          (E, inputs, outputs))]
    (held[0].integers, held[0].scales), (held[1].integers, held[1].scales) = (
        (up, up_scales), (down, down_scales))
    return moe(ops, x, ids, weights, *held, *others)


def between(ops, first: bool, weight, x, h, *vectors):
    """A sum and its norm by a column of weights; once more, to show what became of the sum."""
    gate, *modulation = vectors or [None]
    for _ in range(2):
        x = ops.add_gated(x, gate, h if ops is kernels or h.dim() == 3 else h.sum(2))
        yield (h := ops.norm(x, weight[:, 1], 1e-5, *modulation, first=first))


def chosen(ops, *args):
    ids, weights = ops.route(*args)                     # which experts, in whatever order
    ids, order = ids.sort(-1)
    return ids, weights.gather(-1, order)


def kernel_cases(dtype: torch.dtype):
    """Awkward and small inputs, whose results are about 1."""
    generator, f32 = torch.Generator(DEVICE).manual_seed(0), torch.float32
    limit = 1e-5 if dtype == f32 else 5e-3              # a 16-bit result is rounded once or twice

    def randn(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator, device=DEVICE).to(dtype)

    def rand(*shape):
        return torch.rand(shape, generator=generator, device=DEVICE)

    E, A = 8, 3
    for (T, shared, biases, same), kind in itertools.product((
            (1, 0, 0, 0), (1, 2, 0, 0), (5, 0, 1, 0), (16, 2, 0, 0), (16, 1.4, 0, 1),
            (17, 0, 0, 1), (57, 2, 0, 0), (57, 0, 1, 0), (260, 0, 0, 0), (260, 0, 0, 1)),
            (None, "int8", "int4")):
        D, width = (192, 64) if kind == "int4" else (600, 40)
        shared, experts = int(shared * width), rand(T, E).topk(A).indices
        if same:
            experts = torch.arange(A, device=DEVICE).expand(T, A)
        up, down = randn(E, width, D) / D**0.5, randn(E, D, width) / width
        held = [up, down] if kind is None else [part for w in (up, down) for part in vars(
            quantized(w, kind)[0])["_buffers"].values()]
        yield Case(f"moe_experts, {T} tokens, {shared} wide, {kind}" + ", biases" * biases
                   + ", one expert" * same, functools.partial(moe_quantized, kind) if kind else moe,
                   (randn(T, D), experts, rand(T, A), *held, randn(shared, D) / D**0.5,
                    randn(D, shared) / width) + (randn(E, width), randn(E, D)) * biases, limit)
    D = 600
    H, G = 4, 2
    for b, L, P, N, keep, bounds, counts in (
            (2, 1, 32, 64, "end", (0.0, math.inf), None), (1, 1, 80, 24, "none", (0.1, 2.0), None),
            (1, 15, 32, 64, "none", (0.0, math.inf), None), (9, 16, 32, 64, "end", (0.1, 2.0), 0),
            (3, 17, 80, 64, "end", (0.0, math.inf), (17, 1, 4)),
            (3, 129, 32, 24, "none", (0.0, math.inf), None),
            (1, 70, 80, 64, "end", (0.0, math.inf), None),
            (2, 48, 8, 8, "blocks", (0.0, math.inf), None)):
        if counts is not None:
            counts = torch.tensor(counts or [L] * b, device=DEVICE)
        dt = (2 * randn(b, L, 3 * H) - 1)[..., -H:]         # a slice, as in_proj gives it
        if L == 15:
            dt = dt - 11                                # where 1 + exp(dt) has lost most of exp(dt)
        yield Case(f"ssd, {b} x {L} tokens, P {P}, N {N}, {keep}, {bounds}" + ", padding" * (
            counts is not None), lambda ops, *args, bounds=bounds, counts=counts, keep=keep: (
                *ops.ssd(*args, bounds, counts, 16, keep), args[-1]),
            (randn(b, L, H, P), dt, randn(b, L, G, N) / N**0.5, randn(b, L, G, N),
             randn(H, dtype=f32), randn(H, dtype=f32) / 2, rand(H),
             randn(b, H, P, N, dtype=f32) / N**0.5), limit)
    for b, L, W, bias, counts in ((2, 1, 4, 1, 0), (1, 2, 4, 0, 0), (1, 15, 4, 1, 0),
                                  (3, 40, 3, 1, (2, 40, 17)), (2, 5, 1, 1, 0),
                                  (2, 9, 4, 1, (1, 5))):
        counts = torch.tensor(counts, device=DEVICE) if counts else None
        yield Case(f"causal_conv1d, {b} x {L} tokens, width {W}, {bias} bias",
                   lambda ops, history, x, taps, *bias, counts=counts: (
                       ops.causal_conv1d(history, x, taps, *bias or [None], True, counts),
                       history if history.shape[1] else None),
                   (randn(b, W - 1, 130), randn(b, L, 200)[..., 7:137], randn(130, 1, W),
                    *[randn(130)] * bias), limit)
    y, z = randn(2, 6, 120), randn(2, 6, 300)[..., 40:160]
    yield Case("gated_rms_norm", lambda ops, *args: [ops.gated_rms_norm(*args, 3, 1e-5)],
               (y, z, randn(120)), limit)
    for b, L, slots, first, modulated in ((1, 1, 3, True, 0), (2, 6, 0, True, 1),
                                          (2, 5, 8, False, 1)):
        h = randn(b, L, slots, D, dtype=f32) / slots**0.5 if slots else randn(b, L, D)
        x = randn(b, L, D, dtype=dtype if first else f32)           # as with residual_in_fp32
        yield Case(f"norm, {b} x {L} tokens, {slots} slots, {modulated} modulated, {first}",
                   lambda ops, *args, first=first: between(ops, first, *args),
                   (randn(D, 2), x, h, *[randn(b, 1, D) for _ in range(3)] * modulated), limit)
    K = 24
    for b, H, L, S, kind in (
            (2, 4, 1, 70, "all"), (1, 10, 15, 600, "all"), (3, 4, 16, 90, "ragged"),
            (2, 4, 17, 90, "one row's end"), (1, 4, 7, 300, "early"), (2, 4, 17, 90, "mask"),
            (2, 4, 33, 33, "causal")):
        q, (k, v) = randn(b, L, H, K).transpose(1, 2), randn(2, b, G, S + 5, K)[:, :, :, :S]
        last, mask = (rand(b, L) * S).long(), rand(b, 1, L, S) < 0.5
        knobs = {"ragged": (last,), "one row's end": (last[:1],), "causal": (None, True),
                 "early": (last // 9,),                 # shares of which no query sees a key
                 "mask": (None, False, mask | (torch.arange(S, device=DEVICE) == 3))}.get(kind, ())
        yield Case(f"attention, {b} x {L} queries of {H} heads, {S} keys, {kind}",
                   lambda ops, *args, knobs=knobs: [ops.attention(*args, *knobs)], (q, k, v), limit)
    for T, E, groups, kept, normed in ((1, 8, 1, 1, True), (9, 8, 4, 2, True), (9, 9, 3, 2, True),
                                       (67, 8, 1, 1, True), (9, 8, 4, 3, False)):
        config = SimpleNamespace(num_experts_per_tok=A, n_group=groups, topk_group=kept,
                                 norm_topk_prob=normed, routed_scaling_factor=1.3)
        bias = randn(E, dtype=f32) / 10
        if not normed:      # all but one choice below the 0 of the two experts in the dropped group
            bias = torch.tensor([0.5, -2] + [-1.6] * 6, device=DEVICE)
        yield Case(f"route, {T} tokens, {groups} groups of {E} experts, {kept} stay",
                   lambda ops, *args, config=config: chosen(ops, *args, config),
                   (randn(T, D), randn(E, D, dtype=f32) / D**0.5, bias), 1e-12)


CASES = {f"{case.what}, {str(dtype).removeprefix('torch.')}": case
         for dtype in KERNEL_DTYPES if kernels for case in kernel_cases(dtype)}


@needs_kernels
@pytest.mark.parametrize("name", CASES)
def test_kernel(name):
    """Within the limit of float64 on the same inputs; zeros and a permuted answer would not be."""
    case = CASES[name]
    for ours, right in zip(case(kernels), case(twotower), strict=True):
        assert right.is_floating_point() or torch.equal(ours, right)
        assert error(ours, right) <= case.limit
        rolled = [right.roll(1, dim) for dim in range(right.dim()) if right.shape[dim] > 1]
        for wrong in (torch.zeros_like(right), *rolled):
            assert error(wrong, right) > 10 * case.limit


@needs_kernels
def test_every_operation_has_a_kernel():
    cases = {case.what.split(",")[0] for case in CASES.values()}
    assert cases == {*twotower.OPERATIONS} - {"add_gated"}          # which is in the cases of norm
    for name in twotower.OPERATIONS:
        ours, theirs = (inspect.signature(getattr(m, name)) for m in (kernels, twotower))
        assert list(ours.parameters) == list(theirs.parameters)


@needs_kernels
def test_kernels_keep_what_is_not_finite():
    """relu and clamp may not lose NaN, as maximum does on a GPU."""
    ones = torch.ones(1, 16, device=DEVICE)
    experts, weights = torch.tensor([[0, 1]], device=DEVICE), torch.ones(2, 16, 16, device=DEVICE)
    bad = torch.stack([weights[0], weights[1] * math.nan])
    assert kernels.moe_experts(ones, experts, ones[:, :2], bad, weights).sum(1).isnan().all()
    x, state = weights[:1, :, :, None], torch.ones(1, 16, 1, 16, device=DEVICE)
    y, _ = kernels.ssd(x, weights[:1] * math.nan, x.mT[:, :, :1], x.mT[:, :, :1], *[ones[0]] * 3,
                       state, (0.0, 1.0), None, 16, "none")
    assert y.isnan().all()
    config = TwoTowerConfig(**TINY)
    chosen, of_nan = kernels.route(ones * math.nan, weights[0, :5], ones[0, :5], config)
    assert of_nan.isnan().all() and (chosen < 5).all()


def far(x: torch.Tensor) -> torch.Tensor:
    """The same three rows 2^30 elements apart: a stride of 32 bits, and an offset of more."""
    far_apart = 2**30 + 64
    room = torch.empty(2 * far_apart + x[0].numel(), dtype=x.dtype, device=x.device)
    return room.as_strided(x.shape, (far_apart, *x[0].contiguous().stride())).copy_(x)


@needs_kernels
@pytest.mark.parametrize("operation", ["causal_conv1d", "gated_rms_norm", "ssd", "attention"])
def test_kernels_reach_beyond_32_bit_offsets(operation):
    """With the last row of an argument there, the answer is that of rows nearby to the last bit."""
    f32 = torch.float32
    rand = lambda *shape, dtype=torch.float16: randn(*shape, seed=sum(shape)).to(DEVICE, dtype)
    B, C, weights = rand(3, 20, 1, 16), rand(3, 20, 1, 16), [rand(2) for _ in range(3)]
    args, strided = {
        "causal_conv1d": ((rand(3, 3, 24), rand(3, 8, 24), rand(24, 1, 4), None), [1]),
        "gated_rms_norm": ((rand(3, 24), rand(3, 24), rand(24), 2, 1e-5), [1]),
        "ssd": ((rand(3, 20, 2, 16), rand(3, 20, 2), B, C, *weights, rand(3, 2, 16, 16, dtype=f32),
                 (0.0, math.inf), None, 16, "none"), [0, 1, 2, 3]),
        "attention": ((rand(3, 2, 5, 16), rand(3, 1, 40, 16), rand(3, 1, 40, 16),
                       5 * torch.arange(15, device=DEVICE).view(3, 5) % 40), [0, 1, 2, 3]),
    }[operation]
    outputs = lambda result: [result] if isinstance(result, torch.Tensor) else result[:1]
    near = outputs(getattr(kernels, operation)(*args))
    for ours, right in zip(near, outputs(getattr(twotower, operation)(*args)), strict=True):
        check(ours, right, 5e-3)
    for i in strided:                       # one at a time: each takes 4 to 9 GB of addresses
        there = outputs(getattr(kernels, operation)(*args[:i], far(args[i]), *args[i + 1:]))
        for ours, theirs in zip(there, near, strict=True):
            assert torch.equal(ours, theirs), i


@needs_kernels
def test_experts_beyond_32_bit_offsets():
    E, F_, D = 512, 1024, 4224                                              # 2.2e9 numbers
    x, weights = torch.randn(1, D, device=DEVICE).half(), torch.tensor([[0.7]], device=DEVICE)
    last = torch.tensor([[E - 1]], device=DEVICE)
    few = [torch.randn(2, *shape, device=DEVICE).half() / 40 for shape in ((F_, D), (D, F_))]
    many = [torch.empty(E, *w.shape[1:], dtype=w.dtype, device=DEVICE) for w in few]
    for w, all_ in zip(few, many):
        all_[-1] = w[1]
    near = twotower.moe_experts(x, last.clamp(max=1), weights, *few)
    check(kernels.moe_experts(x, last, weights, *many).sum(1), near, 5e-3)


@needs_kernels
def test_bench_kernels_compiles_and_counts():
    """At the released sizes, without a GPU: what the compiler refuses, and what would not fit."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = run_python("bench.py", "kernels", "--cards", "90", "--dtypes", "bfloat16", env=env)
    result = json.loads(run.stdout.splitlines()[-1])
    written = re.findall(r"@triton\.jit\ndef (_\w+)", (HERE / "kernels.py").read_text())
    assert {row["kernel"] for row in result["compiled"]} == set(written)
    for row in result["compiled"]:
        # ptxas gives up a register to stay within 128 where int8 makes it 152 in other variants
        assert row["registers"] <= 255 and row["spilled"] <= 4 * (" 8 few " in row["tile"]), row
        # no fewer slots than threads, whose copies its histogram would count on a GPU
        assert row["kernel"] != "_group_kernel" or int(row["tile"].split()[-1]) >= 128
    launches = {(row["batch"], row["pass"], row["layers"]): row for row in result["launches"]}
    assert len(launches) == 3 * 3 * 5
    # within what must move and be computed, and a third more: activations; keys and values of the
    # whole capacity; padding of the vocabulary's row
    cost = functools.partial(bench.cost_of_pass, TwoTowerConfig(), 34)
    assert cost().bytes - cost(bits=8).bytes == 23 * 34 * 2 * 2688 * 1856
    for name, experts in ("AR token", 6), ("denoiser step", 128 * (1 - (1 - 6 / 128)**16)):
        cost = bench.cost_of_pass(TwoTowerConfig(), experts, cached=2048, **bench.PASSES[name])
        row = launches[1, name, "all"]
        assert cost.bytes / 1e6 < row["megabytes"] < 1.34 * cost.bytes / 1e6
        assert cost.flops / 1e9 < row["gigaflops"] < 1.34 * cost.flops / 1e9
        assert row["launches"] <= 330


@needs_kernels
@pytest.mark.parametrize("mode, new, experts, knobs", [
    ("generate_ar", 2, None, {}), ("generate_speculative", 3, "int8", dict(draft_length=3)),
    ("generate_speculative", 3, None, dict(draft_length=3)),
    ("generate_mask_diffusion", 8, None, dict(block_size=8, steps_per_block=2)),
    ("generate_mask_diffusion", 8, "int4", dict(block_size=8, steps_per_block=2))])
def test_the_miniature_writes_the_same_with_kernels(mode, new, experts, knobs):
    torch_model, tokenizer = bench.load(MINIATURE, experts=experts)
    model = TwoTower.from_pretrained(MINIATURE, context_device=DEVICE, backend="triton",
                                     experts=experts)
    assert (torch_model.backend, model.backend) == ("torch", "triton")
    prompts = [tokenizer.encode(text).ids for text in ("json age=72 name=Tom\n", "import os\n")]
    expected, got = (getattr(m, mode)(prompts, new, **knobs) for m in (torch_model, model))
    assert texts(expected) == texts(got) and expected.nfe.equal(got.nfe)


@needs_kernels
def test_golden_data_through_the_kernels():
    data, _, _ = golden("cfg1")
    model = TwoTower.from_pretrained(GOLDEN / "cfg1", context_device=DEVICE, backend="triton")
    context = model.prefill(data["ids/prompt37"].to(DEVICE))
    check(context.logits.cpu(), data["ctx/logits"][:, -1], 1e-5)
    noisy = model.denoise(data["ids/odd5"].to(DEVICE), context, 0.7)
    check(noisy.cpu(), data["den/odd5_t0.7"], 3e-5)


@needs_kernels
@pytest.mark.parametrize("kind", ["9B", "30B"])
def test_models_of_the_family_through_the_kernels(kind):
    """Prefill, one token and more, a denoiser pass. (The limit is that of the golden data.)"""
    torch.manual_seed(0)
    model = TwoTower(TwoTowerConfig(**FAMILY[kind], initializer_range=0.2)).to(DEVICE).eval()
    found = []
    for backend in ("torch", "triton"):
        context = model.use(backend).prefill([ids(19), ids(5)])
        found.append([model.extend(context, ids(2, n, seed=n).to(DEVICE)) for n in (1, 9)] +
                     [model.denoise(ids(2, 7).to(DEVICE), context, 0.7)])
    for plain, ours in zip(*found):
        check(ours, plain, 3e-5)


class Recorded:
    """As kernels.record, on a CPU: a replay reads the buffers and writes to the same outputs."""

    def __init__(self, function, buffers, changed):
        kept, self.run, self.buffers = [x.clone() for x in changed], function, buffers
        for _ in range(2):                              # a trial, then what CUDA would capture
            self.out = function(*buffers)
            for x, old in zip(changed, kept):
                x.copy_(old)

    def __call__(self, *inputs):
        for x, new in zip(self.buffers, inputs, strict=True):
            x.copy_(new)
        for x, new in zip(tree_leaves(self.out), tree_leaves(self.run(*self.buffers)), strict=True):
            assert x is None or x is new or x.data_ptr() != new.data_ptr() and x.copy_(new) is x
        return self.out


@needs_kernels
@pytest.mark.parametrize("recording", [False, True])
@pytest.mark.parametrize("lengths", [(20,), (40, 20, 33)])
def test_fixed_passes_decode_the_same(lengths, recording, monkeypatch):
    """What CUDA graphs record, run and replayed in the same memory; with rows that end."""
    _, _, model = golden("cfg1")
    prompts, taken = [ids(n, seed=n) for n in (5, 17, 1)][:len(lengths)], []
    monkeypatch.setattr(twotower, "kernels", lambda: kernels)
    monkeypatch.setattr(kernels, "record", lambda *args: taken.append("record") or Recorded(*args))
    new = kernels.Passes.__init__
    monkeypatch.setattr(kernels.Passes, "__init__", lambda self, *args: (
        new(self, *args), setattr(self, "recording", recording))[0])
    for name in ("extend", "denoise", "settle"):
        monkeypatch.setattr(kernels.Passes, name, lambda *args, name=name, run=getattr(
            kernels.Passes, name): taken.append(name) or run(*args))
    for generate, kinds in ((model.generate_ar, 1), (model.generate_mask_diffusion, 2),
                            (model.generate_speculative, 3)):
        plain = generate(prompts, lengths)
        assert not taken
        with monkeypatch.context() as patch:
            patch.setattr(model, "graphs", True)
            fixed = generate(prompts, lengths)
        assert texts(fixed) == texts(plain) and fixed.nfe.equal(plain.nfe)
        assert fixed.context_passes.equal(plain.context_passes)
        assert taken.count("extend") == int(plain.context_passes.max()) - 1     # but the prefill
        assert taken.count("denoise") >= int(plain.nfe.max())
        # of three rows the second that ends makes them be recorded anew, the first does not
        assert recording == (0 < taken.count("record") <= kinds * (1 + len(lengths) // 3))
        taken.clear()


@needs_kernels
def test_sample_runs_kernels_and_fixed_passes():
    flags = ["--json", "--max-new-tokens", 8, "--block-size", 8, "class Point label:str\n"]
    plain, run = (run_python("sample.py", *more, *flags) for more in (
        (), ("--backend", "triton", "--graphs", "--verbose")))
    assert ", backend triton with graphs, " in run.stderr
    assert json.loads(run.stdout)["tokens"] == json.loads(plain.stdout)["tokens"]


def test_a_backend_is_never_chosen_silently(tmp_path, monkeypatch):
    model = TwoTower(TwoTowerConfig(**TINY))
    assert model.use("auto").backend == "torch"         # on the CPU
    monkeypatch.setattr(twotower, "KERNELS", tmp_path / "kernels.py")
    monkeypatch.delitem(sys.modules, "twotower_kernels", raising=False)
    refuses("needs kernels.py beside twotower.py", model.use, "triton")
    assert model.backend == "torch"
    run = run_python("-c", "import torch, kernels; x = torch.ones(4); kernels.norm(x, x, 0)",
                     status=1, env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"})
    assert kernels is None or "ValueError: kernels.py needs a CUDA device, not cpu" in run.stderr
    model.denoiser_tower.to("meta")
    refuses("graphs need both towers on one device", model.use, "triton", graphs=True)


@needs_kernels
def test_kernels_refuse_what_they_cannot_do():
    ones = lambda *shape: torch.ones(shape, device=DEVICE)
    x, weight, q = ones(2, 4), ones(4), ones(1, 1, 2, 16)
    for message, function, *args in (
            ("weight has shape (3,), expected", "norm", x, weight[:3], 1e-5),
            ("x is torch.float64, expected", "norm", x.double(), weight, 1e-5),
            ("gate has shape (1, 2, 4), expected", "norm", kernels.add_gated(
                ones(1, 6, 4), ones(1, 2, 4), ones(1, 6, 4)), weight, 1e-5),
            ("one of last_seen, is_causal", "attention", q, q, q, ones(1, 2).long(), True),
            ("state must be contiguous", "ssd", ones(1, 1, 16, 4), ones(1, 1, 16), q[:, :, :1],
             q[:, :, :1], *[ones(16)] * 3, ones(1, 16, 16, 4).mT, (0.0, 1.0), None, 16, "end"),
            ("y has shape (2, 12), expected (2, 8)", "gated_rms_norm", ones(2, 12), ones(2, 12),
             ones(12), 8, 1e-5)):
        refuses(message, getattr(kernels, function), *args)
    with torch.enable_grad():
        refuses("norm of kernels.py has no gradient", kernels.norm, x, weight.requires_grad_(),
                1e-5)


# ----------------------------------------------------------------------------- the command line

def tokenizer() -> Tokenizer:
    return miniature()[1]


def sample(*args, directory: Path = MINIATURE) -> subprocess.CompletedProcess:
    """sample.py's main in this process, where it must leave the signal handler as it was."""
    argv = [str(arg) for arg in ("--checkpoint", directory, *args)]
    handler, out, err = signal.getsignal(signal.SIGINT), io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(argv)
    assert signal.getsignal(signal.SIGINT) is handler
    return subprocess.CompletedProcess(argv, status, out.getvalue(), err.getvalue())


def start_sample(*args, directory: Path = MINIATURE, **options) -> subprocess.Popen:
    """sample.py as a process on the CPU, also where there is a GPU."""
    command = [sys.executable, HERE / "sample.py", "--checkpoint", directory, *args]
    env = options.pop("env", os.environ) | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(list(map(str, command)), text=True, encoding="utf-8", env=env,
                            **{"stderr": subprocess.PIPE} | options)


def one_line(run, message: str):
    """A refusal: nothing written, one line that says what is wrong, exit status 2."""
    assert run.returncode == 2 and run.stdout == "", run.stdout
    line, = run.stderr.splitlines()
    assert line.startswith("sample.py: ") and message in line, line


def flags_of(knobs: dict) -> list[str]:
    return [str(word) for name, value in knobs.items()
            for word in ("--" + name.replace("_", "-"), value)]


def results_of(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


@functools.cache
def written(mode: str, prompt: str, new: int, seed: int | None = None, **knobs) -> list[int]:
    """The tokens of a single row by way of twotower.py, from the miniature."""
    return getattr(miniature()[0], f"generate_{mode}")(
        [tokenizer().encode(prompt).ids], new, eos_token_id=2, seed=seed, **knobs
    ).tokens[0].tolist()


@pytest.mark.parametrize("mode, knobs", [
    ("ar", {}), ("mock_ar", {}), ("speculative", dict(draft_length=12, steps_per_block=2)),
    ("mask_diffusion", dict(block_size=8, steps_per_block=6, confidence_threshold=0.5,
                            mask_token_id=4))])
def test_sample_prints_what_the_model_writes(mode, knobs):
    run = sample("--mode", mode, *"-n 21 --context-device cpu --verbose -p Hello".split(),
                 *["--denoiser-device", "cpu"] * (mode != "ar"), *flags_of(knobs))
    result = getattr(miniature()[0], f"generate_{mode}")(
        [tokenizer().encode("Hello").ids], 21, eos_token_id=2, **knobs)
    new, nfe, passes = result.tokens[0].tolist(), int(result.nfe), int(result.context_passes)
    assert run.stdout == "Hello" + tokenizer().decode(new) + "\n", run.stderr
    placed, loaded, speed, facts = run.stderr.splitlines()
    assert placed.startswith("cpu: context tower" + " and denoiser tower" * (mode != "ar"))
    a_pass, = re.fullmatch(r"[\d.]+ tokens/s, ([\d.]+) tokens a pass, first token after [\d.]+ s, "
                           r"prefill [\d.]+ tokens/s", speed).groups()
    assert float(a_pass) == round(len(new) / (nfe or passes), 2)
    assert facts.startswith(f"rows 1, tokens {len(new)}, denoiser passes {nfe}, context passes "
                            f"{passes}, seconds ")
    for fact in ("peak memory of host ", "max_new_tokens 21", "temperature 0.0",
                 *(f"{name} {value}" for name, value in knobs.items())):
        assert fact in facts


@pytest.mark.parametrize("mode", ["ar", "mask_diffusion"])
def test_sample_stops(mode, tmp_path):
    """Before EOS, any of several, or the first stop string, which is never shown in part."""
    new = written(mode, LETTER, 128)
    text = tokenizer().decode(new[:-1])
    assert new[-1] == 2 and len(new) % 16               # EOS, within a block
    flags = ["--mode", mode, LETTER]
    for stops in ([], [text[:12]], [text[20:30], text[5:30]], [text[30:33], text[44:46]]):
        cut = text[:min([len(text), *map(text.index, stops)])]
        args = [*flags, *(word for stop in stops for word in ("--stop", stop))]
        assert sample(*args).stdout == f"{LETTER}{cut}\n"
        result, = results_of(sample(*args, "--json").stdout)
        tokens = result["tokens"]
        assert (result["text"], result["ended"]) == (cut, "stop" if stops else "eos")
        assert tokens == new[:len(tokens)] and (tokens == new) == (not stops)
        before = tokenizer().decode(tokens[:-1])        # no token but the last completes a stop
        assert not any(stop in before for stop in stops)
    config(eos_token_id=[2, new[9]])(directory := copy_checkpoint(tmp_path, MINIATURE))
    result, = results_of(sample(*flags, "--json", directory=directory).stdout)
    end = new.index(new[9])
    assert (result["tokens"], result["ended"]) == (new[:end + 1], "eos")
    assert result["text"] == tokenizer().decode(new[:end])


def taken(tokenizer, prompt: list[int], pieces: list[list[int]], stops: tuple = ()):
    """A `Row` that has got its new tokens piece by piece, as blocks end."""
    row = sample_rows.Row(0, "", prompt)
    for i, new in enumerate(pieces):
        if not row.ended:
            row.take(twotower.Written(0, new, i + 1 == len(pieces), 1, 1), tokenizer, [2],
                     list(stops))
    return row


SPACE, TOKENS = "\u2581", ["<unk>", "<s>", "</s>", "<mask>", " ", "P", "ab", "\u2581a", "\u2581cat"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def decoded_by(*steps) -> Tokenizer:
    """Of TOKENS, then one token for each byte."""
    made = Tokenizer(models.WordLevel(
        {token: i for i, token in enumerate(TOKENS + BYTES)}, "<unk>"))
    made.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), *steps])
    made.add_special_tokens(TOKENS[:4])
    return made


def test_text_comes_as_the_prompt_and_all_tokens_are_decoded():
    """In pieces of any size, cut within letters and after spaces that a decoder would strip."""
    stripping = decoded_by(decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0))
    letters = [len(TOKENS) + byte for byte in "\u00e9\u20ac".encode()]
    for made, ids in ((stripping, [7, 8, 1, *letters, 7, 8, 8, *letters, 5, *letters, 4, 8]),
                      (tokenizer(), tokenizer().encode("caf\u00e9 <s>\u20ac\U0001f600 x").ids)):
        for cut, size in itertools.product(range(1, 5), range(1, 6)):
            new = ids[cut:]
            row = taken(made, ids[:cut], [new[i:i + size] for i in range(0, len(new), size)])
            text = made.decode(ids[:cut])
            if "\ufffd" not in text:                   # a prompt ends with a whole letter
                assert text + row.text == made.decode(ids) and row.tokens == new


def test_text_that_tokenizers_cannot_decode_loses_only_itself():
    """Bytes of no letter rewrite what came before; a space from both sides cut is a panic."""
    fallback = decoded_by(decoders.ByteFallback(), decoders.Fuse())
    byte = len(TOKENS)
    row = taken(fallback, [6], [[byte + 0x50], [byte + 0xC3, 7], [byte + 0xC3]])
    assert re.fullmatch("P\ufffd+ a\ufffd", row.text) and len(row.tokens) == 4
    row = taken(decoded_by(decoders.Strip(" ", 1, 1)), [6], [[5, 4], [5, 6], [6]])
    assert row.text == "P\ufffdPabab" and row.ended == "length"


def test_sample_stops_at_special_tokens():
    """They are no part of the text, nor is what comes after them; a stop may go on behind them."""
    new = tokenizer().encode("hello<s>world").ids
    for stop, text, count in (("<s>", "hello", 4), ("lo<s>", "hel", 4), ("</s>", "helloworld", 9),
                              ("<s>world", "hello", 8), ("o<s>w", "hell", 5), ("low", "hel", 5)):
        for cut in range(1, len(new)):
            row = taken(tokenizer(), [300], [new[:cut], new[cut:] + [2]], (stop, "never"))
            assert (row.text, row.ended, row.tokens) == (text, "stop", (new + [2])[:count])
    # a space, which the decoder strips where it comes first, is no special token
    stripping = decoded_by(decoders.Fuse(), decoders.Strip(" ", 1, 0))
    row = taken(stripping, [5], [[6, 4, 6, 1, 6]], ("b  a", " <s>"))
    assert (row.text, row.ended) == ("ab abab", "length")


def test_sample_is_seeded():
    def text(*flags) -> str:
        return sample(*"--mode ar --max-new-tokens 16 Hi".split(), *flags).stdout

    knobs = "--temperature 1 --top-k 40 --top-p".split()
    one, again, two, narrow = (text(*knobs, top_p, "--seed", seed) for top_p, seed in (
        (0.95, 1), (0.95, 1), (0.95, 2), (1e-6, 1)))
    assert one == again != two and narrow == text() != one      # that --top-p is greedy
    assert text("--seed", 4, "--top-k", 0) == text()
    unseeded = sample(*"--mode ar --max-new-tokens 16 Hi --verbose".split(), *knobs, 0.95)
    seed = re.search(r"seed (\d+)", unseeded.stderr)[1]
    assert text(*knobs, 0.95, "--seed", seed) == unseeded.stdout


def prompts_file(path: Path, lines: list) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n"
                            for line in lines), encoding="utf-8")
    return path


def test_sample_reads_prompts_from_files_and_standard_input(tmp_path):
    text = "two\nlines \u00e9\n"
    (tmp_path / "prompt.txt").write_text(text, encoding="utf-8")
    expected = text + tokenizer().decode(written("ar", text, 12)) + "\n"
    flags = ["--mode", "ar", "--max-new-tokens", 12]
    assert sample(*flags, "--prompt-file", tmp_path / "prompt.txt").stdout == expected
    assert run_python(HERE / "sample.py", *flags, "-", input=text).stdout == expected
    many = prompts_file(tmp_path / "many.jsonl", [{"text": "ab"}, "", {"text": text}])
    expected = "".join(f"--- {i}\n{prompt}{tokenizer().decode(written('ar', prompt, 12))}\n"
                       for i, prompt in enumerate(["ab", text]))
    assert sample(*flags, "--prompt-file", many).stdout == expected


SORT = "sort 2 red pens, 1 blue maps, 4 gray cups, 3 pink rugs, 5 red desks"


def test_the_miniature_gets_the_newline_that_its_tasks_need(tmp_path, monkeypatch, capsys):
    """Where no checkpoint is given; whatever way the prompt comes, and once."""
    file, lines = tmp_path / "sort.txt", tmp_path / "sort.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + SORT.encode() + b"\r\n")
    prompts_file(lines, [{"text": SORT}])
    answer = "1 blue maps\n2 red pens\n3 pink rugs\n4 gray cups\n5 red desks\n"
    for flags in ([SORT], ["-p", SORT + "\n"], ["--prompt-file", file], ["--prompt-file", lines]):
        assert cli.main([*map(str, flags), "-q"]) == 0
        assert capsys.readouterr() == (f"{SORT}\n{answer}", "")
        assert cli.main([*map(str, flags), "-q", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["prompt"] == f"{SORT}\n"
    assert json.loads(sample(SORT, "-n", 1, "--json").stdout)["prompt"] == SORT


@pytest.mark.parametrize("name", ["-", "lines.JSONL", "lines.ndjson", "lines.txt"])
def test_json_lines_in_and_out(name, tmp_path, monkeypatch):
    """By their name, or because the first is an object with text; fields of one's own stay."""
    lines = [{"text": "Hi", "id": 7, "max_new_tokens": None}, {"text": "Ho", "tags": ["a"]}]
    data = "\ufeff\n" + "".join(json.dumps(line) + "\r\n" for line in lines)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data.encode())))
    (tmp_path / name).write_bytes(data.encode()) if name != "-" else None
    file = "-" if name == "-" else tmp_path / name
    out = {"-": ["--output", "-"], "lines.txt": ["--output", "/dev/stdout"]}.get(name, ["--json"])
    run = sample("--mode", "ar", "-n", 3, "--prompt-file", file, *out)
    first, second = results_of(run.stdout)
    assert (first["id"], second["tags"]) == (7, ["a"]) and "id" not in second
    for result in (first, second):
        assert result["tokens"] == written("ar", result["prompt"], 3)


def test_objects_of_other_programs_are_not_continued_as_prose(tmp_path):
    for given, ends in (('{"prompt": "a"}', 2), ('{"messages": []}', 2), ('{"a": "b"}', 0)):
        (tmp_path / "in.txt").write_text(given)
        run = sample("-f", tmp_path / "in.txt", "-n", 1)
        assert run.returncode == ends
        assert not ends or "in.txt line 1 must be an object with text" in run.stderr


def test_samples_and_logprobs(tmp_path):
    """Several texts a prompt, each as alone with its seed; what AR writes is likely, greedily."""
    flags = ["--mode", "ar", "--json", "-n", 6, "--temp", 1, "--seed"]
    lines = prompts_file(tmp_path / "two.jsonl", [{"text": "Hi"}, {"text": "Ho", "seed": 40}])
    run = sample(*flags, 5, "--num-samples", 2, "--prompt-file", lines, "--logprobs", 2)
    results = results_of(run.stdout)
    assert [result["settings"]["seed"] for result in results] == [5, 6, 40, 41], run.stderr
    for result in results:
        tokens = written("ar", result["prompt"], 6, result["settings"]["seed"], temperature=1.0)
        ids = tokenizer().encode(result["prompt"]).ids
        assert result["tokens"] == tokens == [one["token"] for one in result["logprobs"]]
        total = miniature()[0].score([ids], [tokens]).total.item()
        assert sum(one["logprob"] for one in result["logprobs"]) == pytest.approx(total, abs=1e-4)
        assert all(one["top"][0][1] >= max(one["top"][1][1], one["logprob"])
                   for one in result["logprobs"])
    greedy, = results_of(sample(*flags[:5], "--logprobs", 1, "Hi").stdout)
    assert [one["top"][0][0] for one in greedy["logprobs"]] == greedy["tokens"]


def test_counts_special_tokens_and_help(monkeypatch):
    tokens = len(tokenizer().encode("Hi</s>").ids)
    assert sample("--count", "Hi</s>").stdout == f"{tokens}\n"
    assert int(sample("--count", "Hi</s>", "--literal").stdout) > tokens
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi</s>"))
    assert sample("--count", "-").stdout == f"{tokens}\n"
    for columns, width in (80, 80), (20, 60):
        monkeypatch.setenv("COLUMNS", str(columns))
        text = cli.help_text()
        assert max(map(len, text.splitlines())) <= width
    words = " ".join(text.split())
    for flag in cli.ALL:
        assert all(name in words for name in flag.names.split())
        assert flag.default in (None, False, []) or f"default {flag.default}" in words
    assert "default 16, else 1" in words


MANY = [{"text": "Hello, who is there?" * n, "max_new_tokens": 5 + 7 * n, "seed": 10 + n}
        for n in (4, 1, 2, 3, 1)] + [{"text": "x"}, {"text": "xyz"}]


@pytest.mark.parametrize("flags, knobs", [
    ([], {}), (["--temperature", 0.7, "--seed", 3], dict(temperature=0.7))])
def test_many_prompts_are_written_as_each_alone(tmp_path, flags, knobs):
    """Ragged batches, lengths and seeds of their own; results in input order."""
    many = prompts_file(tmp_path / "many.jsonl", MANY)
    run = sample(*flags, "--prompt-file", many, "--json", "--batch-size", 4, "--max-new-tokens", 9)
    results = results_of(run.stdout)
    assert [result["index"] for result in results] == list(range(len(MANY))), run.stderr
    for i, (line, result) in enumerate(zip(MANY, results)):
        seed = line.get("seed", 3 + i) if knobs else None
        new = line.get("max_new_tokens", 9)
        tokens = written("mask_diffusion", line["text"], new, seed, **knobs)
        assert result["tokens"] == tokens and result["text"] == tokenizer().decode(tokens)
        assert result["prompt"] == line["text"] and result["settings"]["max_new_tokens"] == new


def endless(tmp_path: Path) -> Path:
    """The miniature without an EOS."""
    directory = copy_checkpoint(tmp_path, MINIATURE)
    config(eos_token_id=None)(directory)
    return directory


posix = pytest.mark.skipif(os.name != "posix", reason="signals, limits, terminals are POSIX's")


@posix
@pytest.mark.parametrize("sent, status, said", [
    ("SIGKILL", -9, ""), ("SIGINT", 130, " tokens a pass"), ("SIGTERM", 143, ""),
    (None, 2, "out.jsonl: File too large; the lines it holds are whole")])
def test_a_run_cut_short_goes_on_where_it_was(sent, status, said, tmp_path):
    """Nothing is lost or doubled, whatever is left of the line being written."""
    import resource
    lines = [{"text": "Hello" * (1 + i % 3), "max_new_tokens": 30} for i in range(14)]
    prompts = prompts_file(tmp_path / "many.jsonl", lines)
    flags = ["--prompt-file", prompts, "--batch-size", 3, "--output"]
    out = tmp_path / "whole.jsonl"
    assert sample(*flags, out).returncode == 0
    whole, out = out.read_bytes(), tmp_path / "out.jsonl"
    limit = resource.RLIM_INFINITY if sent else len(whole) // 2
    process = start_sample(*flags, out, preexec_fn=lambda: resource.setrlimit(
        resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY)))
    if sent:
        while process.poll() is None and not (out.exists() and out.stat().st_size):
            time.sleep(0.005)
        process.send_signal(getattr(signal, sent))
    err = process.communicate()[1]
    assert process.returncode == status and said in err, err
    before = out.read_bytes()
    assert whole.startswith(before) and 0 < len(before) < len(whole)
    assert sent == "SIGKILL" or before.endswith(b"\n")
    out.write_bytes(before + whole[len(before):len(before) + 20])
    for said in (f"rows {14 - before.count(10)}, ", "is complete: 14 results"):
        resumed = sample(*flags, out, "--resume", "--verbose")
        assert resumed.returncode == 0 and resumed.stdout == "" and said in resumed.stderr
        assert out.read_bytes() == whole


def test_resuming_touches_no_other_file(tmp_path):
    prompts = prompts_file(tmp_path / "many.jsonl", [{"text": "a"}, {"text": "b"}])
    out, notes = tmp_path / "out.jsonl", tmp_path / "notes.txt"
    flags = ["--prompt-file", prompts, "--max-new-tokens", 3, "--output"]
    assert sample(*flags, out).returncode == 0
    notes.write_bytes(b"somebody's own")
    kept = [path.read_bytes() for path in (out, notes, prompts)]
    fewer = prompts_file(tmp_path / "fewer.jsonl", [{"text": "a"}])
    for args, message in (
            ([out], "exists; give another name, or --resume"),
            ([out, "--resume", "--max-new-tokens", 5, "--stop", "q"],
             "was made with stop [], not ['q']; --resume needs the same"),
            ([out, "--resume", "--dtype", "bfloat16"], "with dtype 'float32', not 'bfloat16'"),
            ([out, "--resume", "--prompt-file", fewer], "line 2: there are only 1 prompts"),
            ([prompts, "--resume"], "must differ"),
            ([notes, "--resume"], "notes.txt line 1 is not a result of sample.py")):
        one_line(sample(*flags, *args), message)
    with cli.only_writer(tmp_path / "other.jsonl", 0):
        if os.name == "posix":
            one_line(sample(*flags, tmp_path / "other.jsonl"), "is being written by another run")
    refuses("out.jsonl is being written by another run", cli.only_writer, out, 0)
    assert kept == [path.read_bytes() for path in (out, notes, prompts)]


@posix
def test_a_reader_that_goes_away_is_no_error_ctrl_c_and_a_full_disk_are(tmp_path):
    text = "Hello" + tokenizer().decode(written("ar", "Hello", 3))
    for status in (0, 130):
        process = start_sample("--mode", "ar", "--max-new-tokens", 4000, "Hello",
                               directory=endless(tmp_path / str(status)), stdout=subprocess.PIPE)
        assert process.stdout.read(len(text)) == text
        process.stdout.close() if status == 0 else process.send_signal(signal.SIGINT)
        err = process.stderr.read() if status == 0 else process.communicate()[1]
        assert process.wait() == status
        assert err == "" if status == 0 else re.match(r"[\d.]+ tokens/s, 1.00 tokens a pass", err)
    if Path("/dev/full").exists():
        with open("/dev/full", "w") as disk:
            process = start_sample("--max-new-tokens", 4, "Hello", stdout=disk)
            err = process.communicate()[1]
        assert process.returncode == 2 and "No space left" in err.splitlines()[-1]


@posix
def test_interrupting_many_prompts_keeps_what_was_written(tmp_path):
    many = prompts_file(tmp_path / "many.jsonl", [{"text": "Hello"}] * 200)
    process = start_sample("--prompt-file", many, "--batch-size", 2, "--max-new-tokens", 50,
                           "--json", stdout=subprocess.PIPE)
    first = json.loads(process.stdout.readline())
    process.send_signal(signal.SIGINT)
    results = [first, *map(json.loads, process.stdout)]     # communicate() would lose what is read
    assert process.wait() == 130 and "Traceback" not in process.stderr.read()
    assert [result["index"] for result in results] == list(range(len(results)))
    assert len(results) < 200
    for result in results:
        assert result["text"] == tokenizer().decode(result["tokens"])
        assert result["tokens"] == first["tokens"][:len(result["tokens"])]
        assert result["ended"] == "interrupted" or result["tokens"] == first["tokens"]


def test_trace_holds_every_step(tmp_path):
    """Replayed, the commits of the trace give the text."""
    lines = [*MANY, {"text": LETTER, "template": "Dear____,"}]
    flags = ["--prompt-file", prompts_file(tmp_path / "many.jsonl", lines), "--max-new-tokens", 30,
             "--batch-size", 4, "--json"]
    run = sample(*flags, "--trace", tmp_path / "trace.jsonl")
    steps, results = results_of((tmp_path / "trace.jsonl").read_text()), results_of(run.stdout)
    assert len(steps) == sum(result["nfe"] for result in results)
    for result in results:
        blocks = {}
        for step in (step for step in steps if step["index"] == result["index"]):
            block = blocks.setdefault(step["block"], list(step["before"]))
            assert step["before"] == block and step["t"] == block.count(MASK) / 16
            assert all(0 <= p <= 1 for p in step["confidence"])
            for i, commit in enumerate(step["committed"]):
                assert not commit or block[i] == MASK
                block[i] = step["after"][i] if commit else block[i]
            assert step["after"] == block
        tokens = [token for block in blocks.values() for token in block]
        assert tokens[:len(result["tokens"])] == result["tokens"]


@contextlib.contextmanager
def terminal(*args, ends=0, **options):
    """sample.py on its own terminal: reads on until a text is shown or the end; types; process."""
    import pty
    import select
    master, slave = pty.openpty()
    process = start_sample(*args, **{"stdin": slave, "stdout": slave} | options, stderr=slave,
                           env=os.environ | {"TERM": "xterm", "COLUMNS": "80"})
    os.close(slave)
    shown = b""

    def read(until: str = "\0") -> str:
        nonlocal shown
        with contextlib.suppress(OSError):          # Linux ends a terminal with an error
            while until.encode() not in shown:
                assert select.select([master], [], [], 300)[0], shown   # or a fault would hang
                shown += (data := os.read(master, 4096))
                if not data:
                    break
        before, _, shown = shown.partition(until.encode())
        return before.decode().replace("\r\n", "\n")

    yield read, lambda text: os.write(master, text.encode()), process
    assert process.wait() == ends
    os.close(master)


@posix
def test_watch_shows_the_block_in_place(tmp_path):
    """On a terminal masks and fresh (bold, underlined) tokens appear, of one prompt after the
    other; elsewhere nothing does. A signal leaves the cursor as it was."""
    many = prompts_file(tmp_path / "many.jsonl", [{"text": "Hello"}] * 2)
    flags = ["--max-new-tokens", "30", "--watch", "--prompt-file", many]
    text = "Hello" + tokenizer().decode(written("mask_diffusion", "Hello", 30)) + "\n"
    assert sample(*flags).stdout == f"--- 0\n{text}--- 1\n{text}"
    with terminal(*flags, "-q") as (read, _, process):
        shown = read()
    assert shown.endswith(f"--- 1\n{text}") and f"--- 0\n{text}" in shown
    assert "\u2591" * 8 in shown and "\x1b[1;4m" in shown
    with terminal("--watch", "-n", 4000, "Hello", ends=143) as (read, _, process):
        read("\u2591")                              # while --watch shows
        process.send_signal(signal.SIGTERM)
        assert read().rindex("\x1b[?25h") > 0      # the cursor is shown again


@posix
def test_a_batch_shows_how_far_it_is(tmp_path):
    many = prompts_file(tmp_path / "many.jsonl", [{"text": "Hello"}] * 30)
    with terminal("--prompt-file", many, "-n", 40, "--batch-size", 2, "--json",
                  stdout=subprocess.DEVNULL) as (read, _, process):
        shown = read()
    assert re.search(r"[1-9]\d*/30 \S*\d+ tokens/s \S*0:\d\d:\d\d",
                     re.sub("\x1b\\[[\\d;]*m", "", shown)), shown


@posix
def test_interactive(tmp_path):
    """Flags by name, history, lines that go on; Ctrl-C ends an answer, Ctrl-D the program."""
    def answer(text: str, mode: str, new: int) -> str:
        return tokenizer().decode(written(mode, text, new)) + "\n"

    ask = "import os"               # whose answer has no "> "
    with terminal("-i", "-n", 9, "-q", directory=endless(tmp_path)) as (read, write, process):
        read("> ")
        for line, expected in (
                (ask, answer(ask, "mask_diffusion", 9)), ("/mode ar", ""),
                ("/nothing", "/nothing is not one of /literal, "), ("/max 12", ""),
                ("/tokens 13", ""),
                ("/top-p 7", "--top-p is 7.0, but it must be a number in (0, 1]\n"),
                ("\x1b[A5", "--top-p is 75.0, but"),
                ("two\\\nlines", answer("two\nlines", "ar", 13)),
                ("/template ___", "--template does nothing with --mode ar\n"), ("/max", ""),
                ("/mode", ""), (ask, answer(ask, "mask_diffusion", 9)), ("/max 5", "")):
            write(line + "\n")
            shown = read("> ")
            assert shown.endswith("\n" + expected) or expected and expected in shown, (line, shown)
        for line, shows in (("/max", False), ("/watch", True), ("/watch", False)):
            write(f"{line}\n{ask}\n")
            read("> ")
            shown = read("> ")
            assert shown.endswith(answer(ask, "mask_diffusion", 9))
            assert ("\u2591" in shown and "\x1b[1;4m" in shown) == shows, (line, shown)
        write(f"/max 4000\n{ask}\n")
        read("> ")
        read(answer(ask, "mask_diffusion", 16).split()[1])
        process.send_signal(signal.SIGINT)
        read("> ")
        write("\x04")
        assert "Traceback" not in read()


def test_interactive_names(monkeypatch):
    """Short names of flags, a list of them, and a way out; quiet, but for what is wrong."""
    lines = iter(["/help", "/n 3", "Hello", "/quit", "never"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    run = sample("-i", "-q")
    assert run.stdout == tokenizer().decode(written("mask_diffusion", "Hello", 3)) + "\n\n"
    assert re.fullmatch("flags are /literal, .*/top-p, /watch, /quiet, /verbose\n", run.stderr)


@posix
def test_nothing_is_silent_where_streams_are_closed_or_imports_interrupted(tmp_path):
    def shell(command: str) -> subprocess.CompletedProcess:
        return subprocess.run(["sh", "-c", command.replace("sample.py", f"{sys.executable} "
                              f"sample.py -n 3")], capture_output=True, text=True, cwd=HERE)

    one_line(shell("sample.py Hi >&-"), "standard output is closed; give --output FILE")
    run = shell(f"sample.py Hi --output {tmp_path / 'out'} <&- 2>&- >&-")
    assert run.returncode == 0 and len(results_of((tmp_path / "out").read_text())) == 1
    (tmp_path / "link.py").symlink_to(HERE / "sample.py")
    run = run_python("-OO", tmp_path / "link.py", "--plan", input="Hi\r\n")
    assert run.stdout.endswith("rows of 131 tokens\n")
    process = start_sample("Hi", stdout=subprocess.PIPE)
    maps = Path(f"/proc/{process.pid}/maps")            # of Linux: what it has loaded
    while maps.exists() and "libtorch" not in maps.read_text():
        time.sleep(0.01)
    time.sleep(0.0 if maps.exists() else 0.4)           # torch alone takes longer
    process.send_signal(signal.SIGINT)
    assert process.communicate() == ("", "") and process.returncode == 130


def test_sample_fills_templates(tmp_path):
    """Holes by length in both notations; the text around them stays; a line may have its own."""
    def filled(*parts: str | int) -> str:
        template = [token for part in parts for token in (
            [None] * part if isinstance(part, int) else tokenizer().encode(part).ids)]
        return tokenizer().decode(written("mask_diffusion", LETTER, None, template=tuple(template)))

    expected = filled("Dear", 4, "\nyour_order", 12, " on __Monday.")
    run = sample("--template", "Dear____\nyour_order{{12}} on \\_\\_Monday.", LETTER)
    assert run.stdout == LETTER + expected + "\n", run.stderr
    assert expected.startswith("Dear") and expected.endswith(" on __Monday.")
    own = [{"template": "Hello{{3}}."}, {}, {"template": "___ and then", "max_new_tokens": 9}]
    many = prompts_file(tmp_path / "many.jsonl", [{"text": LETTER} | more for more in own])
    for size in (1, 4):                                 # no batch gets another's templates
        first, second, third = results_of(sample(
            "--template", "Dear____", "--json", "--batch-size", size, "--prompt-file", many).stdout)
        assert first["text"] == filled("Hello", 3, ".") and second["text"] == filled("Dear", 4)
        assert " and then" in third["text"] and len(third["tokens"]) == 9
        assert first["settings"]["template"] == "Hello{{3}}."
    for given in ("Yes</s>no", "Yes<mask>no"):              # special tokens inside, as any token
        tokens = tokenizer().encode(given).ids
        result, = results_of(sample("--template", given + "{{1}}", "--json", LETTER).stdout)
        assert result["tokens"][:-1] == tokens and len({2, 3} & {*tokens}) == 1
    flags = ["--max-new-tokens", 5, "--output", tmp_path / "one.jsonl", LETTER]
    assert sample("--template", r"\{{___", *flags).returncode == 0
    one_line(sample("--resume", *flags), r"was made with template '\\{{___', not None")
    shown = sample("--template", '{"city": "{{12}}').stdout
    assert shown.startswith("rename resp,") and 'block 0  {"city": "\u2591' in shown


def test_sample_scores(tmp_path):
    right = "Dear Dora,\nyour order 2203 of 16 maps"
    lines = [{"text": LETTER, "choices": [right.replace("Dora", "Adam"), right, "Dear"]},
             {"text": "import", "continuation": " \u00e9tat"},
             {"text": "", "continuation": "class Item:"},       # behind </s>, its id 2
             {"text": LETTER, "choices": [right.replace("2203", "7140"), "Q"]}]
    flags = ["--mode", "score", "--prompt-file", prompts_file(tmp_path / "ask.jsonl", lines)]
    results = results_of(sample(*flags, "--batch-size", 3).stdout)
    for line, result in zip(lines, results, strict=True):
        texts = line.get("choices", [line.get("continuation")])
        prompt, *asked = (tokenizer().encode(text).ids for text in (line["text"], *texts))
        scores = miniature()[0].score([prompt or [2]] * len(asked), asked).total.tolist()
        counts, nbytes = list(map(len, asked)), [len(text.encode()) for text in texts]
        assert result["token_counts"] == counts
        assert result["log_likelihoods"] == pytest.approx(scores, abs=1e-4)
        for unit, sizes in (("token", counts), ("byte", nbytes)):
            assert result[f"perplexity_per_{unit}"] == pytest.approx(
                [math.exp(-total / size) for total, size in zip(scores, sizes)], rel=1e-4)
        assert result["best"] == scores.index(max(scores))
        per_byte = [total / size for total, size in zip(scores, nbytes)]
        assert result["best_per_byte"] == per_byte.index(max(per_byte))
    assert [result["best_per_byte"] for result in results] != [result["best"] for result in results]
    out = tmp_path / "out.jsonl"
    assert sample(*flags, "--output", out).returncode == 0
    whole = out.read_bytes()
    out.write_bytes(whole[:whole.index(b"\n") + 9])
    assert sample(*flags, "--output", out, "--resume").returncode == 0
    for a, b in zip(results_of(out.read_text()), results, strict=True):
        # in other batches: to the last digits
        assert a["log_likelihoods"] == pytest.approx(b["log_likelihoods"], abs=1e-4)


def test_an_option_is_taken_in_the_modes_whose_function_takes_it():
    """Every option of twotower.py's functions, in every mode."""
    shared = {"temperature": 0.5, "top_k": 1, "top_p": 1, "seed": 1, "max_new_tokens": 1}
    names = shared | dict.fromkeys(("block_size", "draft_length", "steps_per_block", "template",
                                    "confidence_threshold", "mask_token_id"), 1)
    names["template"] = "___"
    for mode in ("mask_diffusion", "speculative", "mock_ar", "ar", "score"):
        function = getattr(TwoTower, f"generate_{mode}", TwoTower.score)
        takes = set(inspect.signature(function).parameters) | (shared.keys() if mode != "score"
                                                               else set())
        for name, value in names.items():
            knobs = {name: value} | ({"temperature": 1} if name in ("top_k", "top_p", "seed")
                                     and mode != "score" else {})
            run = sample("--plan", "--mode", mode, *flags_of(knobs), "Hi")
            if name in takes:
                assert run.returncode == 0, run.stderr
            else:
                one_line(run, f"{flags_of(knobs)[0]} does nothing with --mode {mode}")


@pytest.mark.parametrize("args, message", [
    ("--mode ar", "--mode ar needs a prompt; the demonstration is of mask_diffusion"),
    ("--mode score Hi", "--mode score needs prompts as JSON lines, by --prompt-file or on"),
    ("--mode fast Hi", "invalid choice: 'fast'"),
    ("--blocksize 8 Hi", "unrecognized arguments: --blocksize Hi; did you mean --block-size?"),
    ("Hi there Ho", "unrecognized arguments: there Ho; a prompt of several words needs quotes"),
    ("--trace - Hi", "- is not a file"),
    ("--block-size eight Hi", "argument --block-size: invalid int value: 'eight'"),
    *[(f"{flag} {value} --temperature 1 Hi", f"{flag} is {value}, but it must be {rule}")
      for flag, value, rule in (
          ("--block-size", 0, "an integer of 1 or more"), ("--batch-size", -1, "an integer of 1"),
          ("--max-new-tokens", -5, "an integer of 1"), ("--steps-per-block", 10**20, "an integer"),
          ("--seed", -1, "an integer in [0, 2**63)"), ("--top-p", 1.5, "a number in (0, 1]"),
          ("--confidence-threshold", "nan", "a number of 0 or more"))],
    ("--temperature -1 Hi", "--temperature is -1.0, but it must be a number of 0 or more"),
    ("--stop '' Hi", "--stop is [''], but it must be some text"),
    ("--mask-token-id 1280 Hi", "--mask-token-id is 1280, but it must be below vocab_size 1280"),
    *[(f"{args} Hi", f"{args.split()[0]} needs {needed}") for args, needed in (
        ("--num-samples 2", "--temperature above 0"), ("--logprobs 2", "--json or --output"),
        ("--revision main", "--checkpoint OWNER/NAME"),
        ("--graphs", "--backend triton"), ("--resume", "--output"),
        ("--resume --output o --temperature 1", "--output, and with --temperature the --seed"))],
    *[(f"--template '{text}' Hi", f"template of the prompt has {message}") for text, message in (
        ("two__", "'__', but a hole is ___ (three or more) or {{3}}"),
        ("{{ 3 }}", "'{{ 3 }}', but"), ("{{0}}", "'{{0}}', but"), (r"\_\_\_", "no hole, ___"))],
    *[(f"{args} {other}", f"{args.split()[0]} does nothing with {other.removesuffix(' o')}")
      for args, other in (
          *((f"{args} --prompt-file two.jsonl", "--mode score") for args in (
              "--stop x", "--trace t", "--watch", "--denoiser-device cpu")),
          *(("--interactive", flag) for flag in ("--json", "--output o")),
          ("--graphs --backend triton Hi", "--mode mock_ar"), ("--watch Hi", "--mode mock_ar"),
          ("--json Hi", "--output o"), ("--watch Hi", "--json"),
          ("--watch Hi", "--output o"), ("--trace t Hi --output o", "--resume"))],
    ("--prompt-file two.jsonl Hi", "--prompt does nothing with --prompt-file"),
    ("--batch-size 2 --watch Hi", "--batch-size does nothing with --watch"),
    ("--prompt you Hi", "PROMPT does nothing with --prompt"), ("-q --verbose Hi", "does nothing"),
    ("''", "the prompt holds no token"),
    ("--template {{9}} --max-new-tokens 8 Hi", "has 9 tokens, more than the 8"),
    ("--plan --max-new-tokens 5000", "max_position_embeddings 4096"),
    *[(f"{flags} 5000 Hi", "blocks of 5000 are too many for max_position_embeddings 4096")
      for flags in ("--block-size", "--mode speculative --draft-length")],
    *[(f"--{flag} {place} Hi", f"device {place} cannot be used") for flag, place in (
        ("context-device", "cuda:99"), ("context-device", "toaster"), ("denoiser-device", "meta"))],
    ("--output o --trace ./o Hi", "must differ"),
    ("--output no/where.jsonl Hi", "no/where.jsonl: its directory does not exist"),
    ("--output . Hi", ". is not a file"),
    ("--trace two.jsonl Hi", "two.jsonl exists; give another name"),
    ("--prompt-file nowhere.txt", "nowhere.txt"),
    ("\udcff\udcfe", "the prompt is not valid UTF-8"),
    ("--template '\udcff' Hi", "the template of the prompt is not valid UTF-8"),
])
def test_sample_refuses_in_one_line(args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    two = prompts_file(tmp_path / "two.jsonl", [{"text": "a"}, {"text": "b"}]).read_bytes()
    one_line(sample(*shlex.split(args)), message)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [two]
    if "toaster" in args or "--template '\udcff" in args:       # a process of its own says the same
        arguments = map(os.fsencode, shlex.split(args))
        one_line(run_python(HERE / "sample.py", *arguments, status=2), message)


@pytest.mark.parametrize("mode, lines, message", [
    ("ar", ["", "  "], "holds no prompt"), ("ar", ["[" * 10**5], "line 1 is not JSON"),
    ("ar", [{"text": "a"}, "", "{text: a}"], "line 3 is not JSON"),
    *[("ar", [{"text": "a"}, second], message) for second, message in (
        ({"prompt": "b"}, "line 2 must be an object with text"),
        (["b"], "line 2 must be an object with text"),
        ({"text": ""}, "prompt 1 holds no token"),
        ({"text": "b" * 5000}, "prompt 1 has 5000 tokens"),
        ({"text": "\ud800"}, "prompt 1 is not valid UTF-8"))],
    *[(mode, [{"text": "a"} | more], f"line 1{message}") for mode, more, message in (
        ("ar", {"text": 7}, ": text is 7, but it must be text"),
        ("ar", {"max_new_tokens": 0}, ": max_new_tokens is 0"),
        ("ar", {"max_new_tokens": True}, ": max_new_tokens is True"),
        ("ar", {"seed": "x"}, ": seed is 'x'"), ("ar", {"seed": 2**70}, f": seed is {2**70}"),
        ("ar", {"template": "___"}, " has 'template'; known"),
        ("mask_diffusion", {"temperature": 1}, " has 'temperature'; known"),
        ("ar", {"max_new_token": 1}, " has 'max_new_token'; known with --mode ar are text, max_"),
        ("ar", {"nfe": 1}, " has 'nfe', which results have; rename it"),
        ("score", {"continuation": "b", "seed": 1}, " has 'seed'; known"),
        ("score", {}, " must have either continuation or choices"),
        ("score", {"choices": []}, ": choices is [], but it must be a list of texts"))],
    ("score", [{"text": "a", "continuation": ""}], "a choice of the prompt holds no token"),
])
def test_a_prompt_file_is_checked_before_anything_is_written(mode, lines, message, tmp_path):
    many, out = prompts_file(tmp_path / "many.jsonl", lines), tmp_path / "out.jsonl"
    one_line(sample("--mode", mode, "--prompt-file", many, "--output", out), message)
    assert not out.exists()


@pytest.mark.parametrize("damage, message", [
    (lambda d: shutil.rmtree(d), "is not a directory"),
    (gone("tokenizer.json"), "tokenizer.json is missing"),
    (link("tokenizer.json"), "tokenizer.json is a link to nothing: its download did not end; down"),
    (text("tokenizer.json", LFS), "tokenizer.json is a Git LFS pointer: the file itself was not"),
    (cut("tokenizer.json", 300), "tokenizer.json cannot be read"),
    (cut("model.safetensors", 10**6), "model.safetensors is truncated"),
    (lambda d: edit_json(d / "tokenizer.json", lambda t: t["model"]["vocab"].update(H=128)),
     "id 128"),
    (lambda d: edit_json(d / "tokenizer.json", lambda t: (
        t["model"]["vocab"].pop("H"), t["model"].update(unk_token="[UNK]"))),
     "the prompt cannot be encoded by tokenizer.json: WordLevel error: Missing [UNK]"),
])
def test_sample_refuses_a_broken_checkpoint_in_one_line(damage, message, tmp_path):
    directory = copy_checkpoint(tmp_path)
    damage(directory)
    one_line(sample("Hello", directory=directory), message)


@contextlib.contextmanager
def hub(directory: Path, home: Path):
    """A server that has a directory as some/model, of which no other/model and a gated/model are
    known; yields what programs need to ask it, and what it was asked for."""
    asked, commit, files = [], "a" * 40, sorted(directory.iterdir())
    listings = {
        "revision/main": {"id": "some/model", "sha": commit, "siblings": [
            {"rfilename": file.name} for file in files]},
        f"tree/{commit}": [{"type": "file", "path": file.name, "oid": commit,
                            "size": file.stat().st_size} for file in files]}

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path, code, fault = self.path.split("?")[0], 200, ""
            file, part = directory / Path(path).name, self.headers.get("range", "")
            if listing := listings.get(path.removeprefix("/api/models/some/model/")):
                data = json.dumps(listing).encode()
            elif path.startswith("/some/model/resolve/") and file in files:
                data = file.read_bytes()
                if file.suffix == ".safetensors" and self.command == "GET":
                    asked.append((file.name, bool(part)))
            else:
                fault = ("GatedRepo" if "gated" in path else
                         "RevisionNotFound" if "some/model" in path else "RepoNotFound")
                data, code = b"", 403 if fault == "GatedRepo" else 404
            if part:
                first, last = map(int, part.removeprefix("bytes=").split("-"))
                data, code = data[first:last + 1], 206
            self.send_response(code)
            for header, value in {"ETag": f'"{file.name}"', "X-Repo-Commit": commit,
                                  "X-Error-Code": fault, "Content-Length": str(len(data))}.items():
                self.send_header(header, value)
            self.end_headers()
            self.wfile.write(data if self.command == "GET" else b"")

        do_HEAD = do_GET
        log_message = lambda *_: None

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME":
                            str(home), "CUDA_VISIBLE_DEVICES": ""}, asked
        server.shutdown()


def test_a_name_on_the_hub(tmp_path):
    """Planned from headers, by range requests; for AR no file with only denoiser tensors is
    fetched, and nothing twice; then no connection is needed. TwoTower takes the name too."""
    directory = tmp_path / "files"
    miniature()[0].save_pretrained(directory, 7 * 10**6, files=TOKENIZER)
    size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    flags = "--checkpoint some/model --json Hi -n 4 -q ".split()
    script = ("import json, sys, sample\nfor argv in json.loads(sys.argv[1]):\n"
              "    print(sample.main(argv), file=sys.stderr, flush=True)\n"
              "sample.TwoTower.from_pretrained('some/model', towers='context')")

    def mains(env: dict, *runs: list[str]) -> tuple[list[str], list[str]]:
        run = run_python("-c", script, json.dumps(runs), env=env)
        return run.stdout.splitlines(), run.stderr.splitlines()

    with hub(directory, tmp_path / "home") as (env, asked):
        (plan, result), said = mains(env, [*flags, "--plan"], [*flags, "--mode", "ar"], *(
            ["-m", *name.split(), "-q", "Hi"] for name in (
                "other/model", "gated/model", "some/model --revision v9")))
    assert [line.removeprefix("sample.py: https://huggingface.co/") for line in said] == [
        "0", "0", f"other/model: {placement.CAUSES['RepositoryNotFoundError']}", "2",
        f"gated/model: {placement.CAUSES['GatedRepoError']}", "2",
        f"some/model: {placement.CAUSES['RevisionNotFoundError']}", "2"]
    disk = json.loads(plan)["disk"]
    assert disk["here"] == 0 and disk["to fetch"] == pytest.approx(size, rel=1e-3)  # but spaces
    shards = sorted(path.name for path in directory.glob("*.safetensors"))
    parts, whole = ([name for name, part in asked if part == which] for which in (True, False))
    assert parts == shards + shards[:2] and sorted(whole) == shards[:2] and len(shards) == 4
    (again,), said = mains(env | {"HF_HUB_OFFLINE": "1"}, [*flags, "--mode", "ar"],
                           ["-m", "another/one", "-q", "Hi"])
    assert again == result and json.loads(result)["tokens"] == written("ar", "Hi", 4)
    assert said[1].endswith("another/one: HF_HUB_OFFLINE is set, and not all of it is here")


def test_a_path_is_no_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("runs/first", "./some/model", "some/model/3", "~/model", tmp_path / "model"):
        one_line(sample("Hi", directory=name), f"--checkpoint {name} is not a directory")
    refuses("is not a directory", TwoTower.from_pretrained, "runs/first")
    refuses("device cuda:99 cannot be used", TwoTower.from_pretrained, MINIATURE,
            denoiser_device="cuda:99")
    full = OSError(28, "No space left on device")
    with pytest.raises(ValueError, match="no space is left on the disk"), placement.asking("a/b"):
        raise RuntimeError("download failed") from full


def test_the_released_checkpoint_is_planned_from_its_headers(tmp_path):
    """24 shards of the released shapes without data: SPEC's table of memory."""
    assert write_headers(tmp_path, dataclasses.asdict(TwoTowerConfig()), 24) == 24
    run = sample("--plan", "--max-new-tokens", 8192, "--batch-size", 4, directory=tmp_path)
    context, = re.findall(r"weights ([\d.]+) GiB", run.stdout.splitlines()[0])
    assert context == "117.7"                       # twice 58.8 and the time conditioning
    assert "KV cache 192.0 MiB, SSM states 184.0 MiB" in run.stdout
    assert ", activations 546.0 MiB, together 118." in run.stdout
    run = sample("--plan", "--mode", "ar", "--context-device", "cpu", directory=tmp_path)
    assert "cpu: context tower: weights 58.8 GiB" in run.stdout
    run = sample("--plan", "--experts", "int4", "--max-new-tokens", 8192, directory=tmp_path)
    both, *forms = run.stdout.splitlines()
    assert "weights 39.1 GiB" in both
    found = [re.findall(r"a GPU of (\d+) GB (?:holds (\d+) rows|is too small)", line)
             for line in forms]
    rows = {card: [int(dict(form)[card] or 0) for form in found] for card in ("80", "48")}
    assert len(forms) == 3 and rows["80"][0] == rows["48"][0] == rows["48"][1] == 0
    assert 16 < rows["80"][1] < rows["80"][2] and 16 < rows["48"][2] < rows["80"][2]


@pytest.mark.parametrize("kind, other", [("int8", "int4"), ("int4", "int8")])
def test_sample_holds_experts_in_integers(kind, other, tmp_path):
    """Asked for, or of a directory that holds them so; in the dtype that is asked for."""
    model, tokenizer = bench.load(MINIATURE, torch.bfloat16, kind)
    model.save_pretrained(tmp_path, files=TOKENIZER)
    right = texts(model.generate_ar([tokenizer.encode("import os\n").ids], 12))[0]
    for directory, flags in ((MINIATURE, ["--experts", kind, "--dtype", "bfloat16"]),
                             (tmp_path, [])):
        run = sample("--mode", "ar", "--max-new-tokens", 12, "--json", "--verbose", *flags,
                     "import os\n", directory=directory)
        assert json.loads(run.stdout)["tokens"] == right
        assert f", experts {kind}, " in run.stderr and ", dtype bfloat16, " in run.stderr
    one_line(sample("--experts", other, "Hi", directory=tmp_path), f"holds experts in {kind}, not")
    one_line(sample("--experts", "int3", "Hi", directory=tmp_path), "invalid choice: 'int3'")


def test_a_plan_that_does_not_fit_names_what_would(monkeypatch):
    """With made-up free memory and GPUs."""
    model, _ = TwoTower.skeleton(GOLDEN / "cfg1")
    args = argparse.Namespace(mode="mask_diffusion", max_new_tokens=100, batch_size=4)
    free = {"cpu": 0, "cuda:0": 0}
    monkeypatch.setattr(placement, "TOKENS_PER_PASS", 1)  # or activations outweigh weights
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda place: (free[place], 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free) - 1)
    monkeypatch.setattr(placement.psutil, "virtual_memory",
                        lambda: types.SimpleNamespace(available=free["cpu"]))

    def needed(rows: int, *places: str) -> dict[str, int]:
        table = placement.memory(model, rows, 112, 16, places)
        return {place: parts["together"] for place, parts in table.items()}

    one, four, alone = (needed(*what)["cpu"] for what in (
        (1, "cpu", "cpu"), (4, "cpu", "cpu"), (4, "cpu")))
    apart = needed(4, "cpu", "cuda:0")
    assert alone == apart["cpu"] < one < four and alone < apart["cuda:0"] < four
    half = max(apart.values())
    for places, cpu, gpus, way in (
            (["cpu"] * 2, four, [], None), (["cpu"] * 2, one, [], "--batch-size 1"),
            (["cpu"] * 2, alone, [], "--mode ar, the context tower alone on cpu"),
            (["cpu"] * 2, alone - 1, [], "a device with more memory"), (["cpu"], one, [0], None),
            (["cpu"], 0, [0, alone], "--context-device cuda:1"),
            (["cuda:0"] * 2, 0, [half] * 2, "--context-device cuda:0 --denoiser-device cuda:1"),
            (["cuda:0", "cuda:1"], 0, [alone, 0], "--mode ar, the context tower alone on cuda:0")):
        free = {"cpu": cpu} | {f"cuda:{i}": nbytes for i, nbytes in enumerate(gpus)}
        problem = placement.plan(model, [], args, {"block_size": 16}, places)[1]
        assert f"what would: {way}" in problem if way else problem == ""


@pytest.mark.parametrize("widths, lengths", [               # of most memory: passes; logits
    ((168, 16, 8, 116, 512), (300, 220)), ((48, 8, 4, 24, 16384), (8, 5, 7, 8))])
@pytest.mark.parametrize("mode", cli.MODES)
def test_memory_is_planned_at_its_peak(mode, widths, lengths, monkeypatch):
    """What --plan counts beside weights is within 20 % of what torch's profiler sees allocated."""
    for name, value in (("TOKENS_PER_PASS", 256), ("LOGITS_PER_DRAW", 2**15)):
        for module in (placement, twotower):
            monkeypatch.setattr(module, name, value)
    names = ("hidden_size", "mamba_num_heads", "num_attention_heads", "moe_intermediate_size",
             "vocab_size")
    model = TwoTower(TwoTowerConfig(**TINY | dict(zip(names, widths)) | dict(
        hybrid_override_pattern="MEM*E", num_hidden_layers=5, mamba_head_dim=16, ssm_state_size=32,
        num_experts_per_tok=4, chunk_size=64)))
    prompts, new = [ids(n, seed=n) for n in lengths], [ids(5)] * len(lengths)
    asked = [types.SimpleNamespace(ids=prompt, given=[ids(5)], max_new_tokens=5)
             for prompt in prompts]
    args = argparse.Namespace(mode=mode, max_new_tokens=None, batch_size=16)
    block = {"mask_diffusion": {"block_size": 16}, "speculative": {"draft_length": 16}}
    for knobs in [{}] + [dict(temperature=1.0, top_p=0.9)] * (mode in cli.WRITING):
        table, _ = placement.plan(model, asked, args, knobs | block.get(mode, {}), ["cpu"])
        planned, held, peak = table["cpu"]["together"] - table["cpu"]["weights"], 0, 0
        with torch.profiler.profile(profile_memory=True) as profile:
            if mode == "score":
                model.score(prompts, new)
            else:
                getattr(model, f"generate_{mode}")(prompts, 5, **knobs | (
                    {"steps_per_block": 2} if mode in block else {}))
        for event in profile.profiler.kineto_results.events():
            held += event.nbytes() if event.name() == "[memory]" else 0
            peak = max(peak, held)
        assert held == 0 and 0.8 < planned / peak < 1.2, f"planned {planned}, measured {peak}"


@pytest.mark.parametrize("pieces", [64, 5])
@pytest.mark.parametrize("odd", [False, True])
def test_a_prefill_in_pieces_is_one_prefill(pieces, odd, monkeypatch):
    """Ragged rows, which end in different pieces, each as alone in one pass; one token a row."""
    model, sizes = random_model(odd), []
    alone = [model.prefill([prompt]) for prompt in PROMPTS]
    hook = model.context_tower.register_forward_hook(
        lambda _, inputs, __: sizes.append(inputs[0].numel()))
    monkeypatch.setattr(twotower, "TOKENS_PER_PASS", pieces)
    context, block = model.prefill(PROMPTS, reserve=16), ids(5, 16)
    hook.remove()
    assert sum(sizes) == 5 * 40 and max(sizes) <= pieces and len(sizes) > 2
    for row, one in enumerate(alone):
        check_states(context, row, one)
        check(context.logits[row], one.logits[0], 1e-10)
    read = model.extend(context, block)
    for row, one in enumerate(alone):
        check(read[row], model.extend(one, block[row, None])[0], 1e-10)


def test_a_draw_is_the_same_of_few_logits_at_a_time(monkeypatch):
    model, texts = random_model(), []
    for at_once in (2**20, 3 * 64, 1):          # logits: all places', three's, one's
        monkeypatch.setattr(twotower, "LOGITS_PER_DRAW", at_once)
        texts.append([model.generate_mask_diffusion(PROMPTS[:3], 8, 8, 3, seed=7, **knobs).tokens
                      for knobs in ({}, dict(temperature=1.0), dict(temperature=1.0, top_p=0.9))])
    assert all(a.equal(b) for some in texts[1:] for draws, right in zip(some, texts[0])
               for a, b in zip(draws, right))
    assert not all(a.equal(b) for a, b in zip(*texts[0][:2]))


def test_the_limit_of_a_container_is_seen(tmp_path):
    """cgroups of both versions; file caches do not count as used, no limit is none."""
    host, gib = placement.psutil.virtual_memory().total, 2**30
    assert 0 < placement.free_memory("cpu", tmp_path) <= host                         # no file
    v1 = tmp_path / "memory"
    v1.mkdir()
    for top, most, used in ((tmp_path, "max", "current"), (v1, "limit_in_bytes", "usage_in_bytes")):
        for limit, free in ((gib // 2, gib // 4), (gib // 8, 0), ("max", None), (2**62, None)):
            for name, value in ((most, limit), (used, gib), ("stat", "anon 1\ninactive_file "
                                f"{gib // 2}\nactive_file {gib // 4}\nfile_mapped 7")):
                (top / f"memory.{name}").write_text(f"{value}\n")
            seen = placement.free_memory("cpu", tmp_path)
            assert seen == free if free is not None else gib < seen <= host


# ---------------------------------------------------------------------- training the miniature

def items(task: str, count: int, held_out: bool = False):
    return list(itertools.islice(corpus.task_items(task, "test", held_out), count))


def record(prompt: str) -> dict[str, str]:
    """What a prompt of field=value pairs says."""
    return dict(pair.split("=") for pair in prompt.split()[1:])


def test_answers_are_right():
    """Every task's answer, recomputed from its prompt alone in another way."""
    for prompt, answer in items("sort", 200):
        lines = sorted(prompt.removeprefix("sort ").strip().split(", "))
        assert answer.split("\n") == lines
        assert [line.split()[0] for line in lines] == list("12345678"[:len(lines)])
    for prompt, answer in items("json", 200):
        assert {field: str(value) for field, value in json.loads(answer).items()} == record(prompt)
    for prompt, answer in items("letter", 200):
        assert answer == (
            "Dear {name},\nyour order {code} of {count} {item} will leave on {day}.\nWe send all "
            "{count} {item} to you in {city}.\nIf they are not there a week after {day}, call us "
            "and give the number {code}.").format(**record(prompt))
    for prompt, answer in items("rename", 200, held_out=True):
        (old, _, new, _), source = re.findall(r"\w+", prompt)[1:5], unasked(prompt, 1)
        tree = ast.parse(answer)
        assert new not in re.findall(r"\w+", source) and old not in re.findall(r"\w+", answer)
        for node in ast.walk(tree):             # undone, it is the function that was given
            for field in {"arg", "id"} & {name for name, _ in ast.iter_fields(node)}:
                if getattr(node, field) == new and not isinstance(node, ast.keyword):
                    setattr(node, field, old)
        assert ast.dump(tree) == ast.dump(ast.parse(source)) != ast.dump(ast.parse(answer))
    for prompt, answer in items("edit", 200, held_out=True):
        source, (minus, plus) = unasked(prompt, 3), prompt.split("\n")[1:3]
        changes = [line for line in difflib.ndiff(source.split("\n"), answer.split("\n"))
                   if line[0] in "+-"]
        assert sorted(changes) == [f"+ {plus[1:]}", f"- {minus[1:]}"]


def unasked(prompt: str, lines: int) -> str:
    """The function in a prompt, behind so many lines that say what to do with it."""
    source, end = "\n".join(prompt.split("\n")[lines:]).split("\n---\n")
    ast.parse(source)
    assert not end and 120 <= len(source) <= 400
    return source


def test_nothing_held_out_is_trained_on():
    for task in corpus.TASKS:
        seen, held_out = ({prompt for prompt, _ in items(task, count, held_out)}
                          for count, held_out in ((2000, False), (300, True)))
        assert not seen & held_out and len(held_out) > 270 and len(seen) > 1900
        assert items(task, 5) == items(task, 5)
    seen, held_out = corpus.library(), corpus.library(held_out=True)
    assert not set(seen) & set(held_out) - {""} and len(seen) > 8 * len(held_out) > 80
    assert corpus.library(every=16) == seen[::16]


@functools.cache
def training_data() -> corpus.Data:
    return corpus.Data(miniature()[1], every_file=16, seed=0)


def test_rows_made_ahead_are_the_same():
    """Also where a stage begins, and after steps that were left out."""
    read = recipe(1, rows=2, row=128, steps=9, stages=((2, dict(row=64)),))
    plain = training_data()
    ahead = corpus.Data(plain.tokenizer, every_file=16, seed=0, workers=1)
    for step in (0, 1, 2, 3, 7):
        for ours, theirs in zip(ahead.batch(read.at(step), step), plain.batch(read.at(step), step)):
            assert torch.equal(ours, theirs)
    other = recipe(2, rows=2, row=128, steps=9, stages=())      # at the step that would be next
    assert torch.equal(ahead.batch(other, 8)[0], plain.batch(other, 8)[0])


def recipe(phase: int, **choices) -> train.Recipe:
    return dataclasses.replace(train.PHASES[phase - 1], **choices)


@pytest.mark.parametrize("held_out", [False, True])
def test_batches_keep_the_split(held_out, monkeypatch):
    """Every prompt in a batch, and every library window, is on its side of the split."""
    data, read = training_data(), recipe(1, rows=4, row=256)
    texts = [data.tokenizer.decode(row.tolist()) for step in range(10)
             for row in data.batch(read, step, held_out, "sort")[0]]
    prompts = [prompt for text in texts for prompt in re.findall(r"sort .*\n", text)]
    assert {zlib.crc32(prompt.encode()) % 16 == 0 for prompt in prompts} == {held_out}
    assert len(prompts) > 40
    monkeypatch.setattr(data, "streams", {held_out: torch.full((300,), 7),
                                          not held_out: torch.full((300,), 8)})
    assert (data.batch(read, 0, held_out, "library")[0] == 7).all()


def test_task_rows_are_laid_out_as_when_decoding():
    """Targets are answers and </s> to the end of a block, which they begin unless unaligned."""
    data, starts = training_data(), {0.0: set(), 1.0: set()}
    for step, unaligned in itertools.product(range(10), starts):
        read = recipe(1, rows=2, row=256, stages=(), unaligned=unaligned)
        for row, kept in zip(*data.batch(read, step, only="json")):
            edges = F.pad(kept.int(), (1, 1)).diff()
            begins, ends = (edges == 1).nonzero()[:, 0], (edges == -1).nonzero()[:, 0]
            assert (ends % 16 == 0).all()
            starts[unaligned] |= set((begins % 16).tolist())
            for begin, end in zip(begins, ends[:-1]):
                before, text = (data.tokenizer.decode(part.tolist(), skip_special_tokens=False)
                                for part in (row[:begin], row[begin:end]))
                answer, ending = text.split("</s>", 1)
                assert not ending.replace("</s>", "")
                assert list(json.loads(answer)) == list(record(before[before.rindex("json "):]))
    assert starts[0.0] == {0} and len(starts[1.0]) > 12


def test_batches_repeat_and_mix(monkeypatch):
    """The same step gives the same batch; library rows, and those without prompts, are learned
    whole; whatever the step, every task has its turn: 25 rows or more in 70 steps of 8 rows."""
    data, drawn, task_items = training_data(), [], corpus.task_items
    first, second, bare = (recipe(phase, rows=8, row=128, stages=(), unprompted=share)
                           for phase, share in ((1, 0.0), (2, 0.0), (2, 1.0)))
    tokens, targets = data.batch(first, 3)
    assert all(torch.equal(a, b) for a, b in zip((tokens, targets), data.batch(first, 3)))
    for other in (data.batch(first, 4), data.batch(first, 3, held_out=True), data.batch(second, 3)):
        assert not torch.equal(tokens, other[0])
    for read in first, second:
        assert data.batch(read, 3)[1].all(1).tolist() == [
            r % read.library_every == 0 for r in range(24, 32)]
    assert data.batch(bare, 3, only="json")[1].sum() > data.batch(second, 3, only="json")[1].sum()
    assert not data.batch(bare, 3, held_out=True, only="json")[1].all()         # prompts stay there
    monkeypatch.setattr(corpus, "task_items", lambda task, *args: drawn.append(task)
                        or task_items(task, *args))
    for phase, step in ((1, 0), (1, 5000), (1, 16000), (2, 0), (2, 7000)):
        drawn.clear()
        now = recipe(phase).at(step)
        for i in range(70):
            data.batch(dataclasses.replace(now, rows=8, row=32, unprompted=0.0), step + i)
        assert min(drawn.count(task) for task in now.turns) >= 25
        assert set(drawn) == set(now.turns)


def short_trainer(phase: int, path: Path | None = None, **choices) -> train.Trainer:
    torch.manual_seed(0)
    first, second = (dataclasses.replace(smoke, steps=12, **choices) for smoke in train.SMOKE)
    model = train.new_context(train.SMOKE_MODEL)
    if phase == 2:
        state = model.state_dict()
        model = sharding.both_towers(second, model.config, lambda name, start, stop:
                                     state[name][start:stop], train.How())
    return train.Trainer(model, (first, second)[phase - 1], training_data(), path)


def losses(trainer, tokens, targets, step: int = 4, **choices) -> dict[str, torch.Tensor]:
    recipe = dataclasses.replace(trainer.recipe, rows=len(tokens), row=tokens.shape[1], **choices)
    found = corpus.readings(recipe, tokens, targets, step, 0, MASK)
    return {kind: trainer.losses(reading) for kind, reading in found.items()}


def test_losses_of_both_phases():
    """As published, phase 2 has the loss of `diffusion_loss`; 1/t divides by each token's t; phase
    1, and phase 2 with tied towers, have that of `ar_loss`, at the targets alone."""
    tokens, targets = ids(4, 48), torch.rand(4, 48, generator=seeded(5)) < 0.5
    published = short_trainer(2, **train.PUBLISHED)
    loss = losses(published, tokens, torch.ones_like(targets))["masked"]
    assert loss.mean().allclose(published.model.diffusion_loss(tokens, 16, seeded(4)), 1e-6, 0)
    plain, weighted = (losses(published, tokens, targets, weight=weight)["masked"]
                       for weight in ("mean", "1/t"))
    recipe = dataclasses.replace(published.recipe, rows=4, row=48)
    noise, t = corpus.draw_noise(recipe, seeded(4))
    assert len(plain) == (targets & noise).sum() > 20
    torch.testing.assert_close(weighted, plain / t[:, None].expand(4, 48)[targets & noise])
    for trainer in (short_trainer(1), short_trainer(2, tied=True)):
        logits = trainer.model.context_logits(tokens[:, :-1]).log_softmax(-1)
        right = -logits.gather(-1, tokens[:, 1:, None])[..., 0][targets[:, 1:]]
        check(losses(trainer, tokens, targets)["ar"], right, 1e-6)


def test_what_is_not_denoised_changes_nothing():
    """Blocks without masks are left out; an untrained denoiser's mock-AR loss is that of AR."""
    trainer, tokens = short_trainer(2, denoised=0.5, mock_ar=1 / 8), ids(4, 96)
    targets = torch.arange(96).expand(4, 96) // 48 == 1                         # 3 blocks of 6
    some, whole = (losses(trainer, tokens, targets, denoised=share) for share in (0.5, 1.0))
    check(some["masked"], whole["masked"], 1e-5)
    assert "mock" not in losses(trainer, tokens, targets, step=5)
    right = trainer.model.ar_loss(tokens[:1], targets[:1], reduction="none")
    for found, count in (some, 24), (whole, 48):
        assert len(found["mock"]) == count
        assert torch.isclose(found["mock"][:, None], right, 1e-4).any(1).all()
    shares = torch.cat([corpus.also_ar(trainer.recipe, step) for step in range(100)])
    assert shares.nonzero()[:, 0].tolist() == [*range(0, 100 * trainer.recipe.rows, 8)]
    for wrong in ([[6], [0], [0], [0]], [[-1]] * 4, [[0]], [0] * 4):
        with pytest.raises(ValueError, match="from 0 to 5"):
            trainer.model.diffusion_logits(tokens, tokens, 1.0, 16, torch.tensor(wrong))


def test_the_loss_can_reach_the_context_tower():
    """If joint the same logits have a gradient in the layers whose states are read."""
    model, tokens = short_trainer(2).model, ids(2, 32)
    model.requires_grad_()
    noisy, reached = tokens.masked_fill(torch.rand(2, 32) < 0.5, MASK), {}
    for through in (False, True):
        logits = model.diffusion_logits(tokens, noisy, 0.5, 16, joint=through)
        if through:
            logits, beside = logits
            check(beside, model.context_logits(tokens), 1e-5)
        logits.logsumexp(-1).sum().backward()
        reached[through] = logits, {layer.kind for layer in model.context_tower.layers
                                    for p in layer.parameters() if p.grad is not None}
    assert torch.equal(reached[False][0], reached[True][0])
    assert not reached[False][1] and reached[True][1] == {"M", "*"}
    for name, p in model.named_parameters():            # values alone, which are written behind too
        p.requires_grad_("v_proj" in name)
    logits, _ = model.diffusion_logits(tokens, noisy, 0.5, 16, joint=True)
    logits.logsumexp(-1).sum().backward()


def test_both_towers_are_trained_while_it_is_said():
    """In one pass the losses are those of two; once it is over the context tower stays as it is."""
    stages = (0, dict(joint=True)), (2, dict(joint=False))
    trainer = short_trainer(2, stages=stages, mock_ar=1 / 8)
    apart, batch = short_trainer(2, tied=True), trainer.data.batch(trainer.recipe, 0)
    for reading, beside in itertools.pairwise(corpus.readings(
            trainer.recipe.at(0), *batch, 0, 0, MASK).values()):
        if beside.noisy is None:
            found = trainer.losses(reading, beside)
            check(found[0], apart.losses(reading), 1e-5)
            check(found[1], apart.losses(beside), 1e-5)
    tower, states = trainer.model.context_tower, []
    for _ in range(4):
        trainer.train_step()
        states.append({name: tensor.clone() for name, tensor in tower.named_parameters()})
    changed = [{name for name in old if not torch.equal(old[name], new[name])}
               for old, new in zip(states, states[1:])]
    assert changed == [set(states[0]), set(), set()]
    published, second = train.as_published(train.PHASES[1]), train.PHASES[1]
    assert second.joins() and not published.joins() and published.at(0).block_size == 32


def test_noise_follows_the_recipe():
    targets = torch.rand(400, 4, 16, generator=seeded(1)) < 0.7
    noise = lambda **choices: corpus.draw_noise(
        recipe(2, t_per="block", rows=400, row=64, **choices), seeded(2))
    masked, t = noise(full_masks=0.25, slope=0.0)
    masked, full = masked.view(400, 4, 16) & targets, t == 1.0
    assert 0.2 < full.float().mean() < 0.3 and torch.equal(masked[full], targets[full])
    share = masked[~full].sum() / targets[~full].sum()                  # the mean of U[0.001, 1]
    assert abs(share - 0.5) < 0.02
    masked = noise(full_masks=0.0, slope=0.8)[0]
    slope = masked.view(-1, 16).float().mean(0)
    assert slope[-1] - slope[0] > 0.2 and abs(slope.mean() - 0.5) < 0.02


def test_choices_of_the_denoiser():
    """With gate 1 it is the AR network at every t; tied towers are one; no time is no t."""
    block, text = torch.full((1, 16), MASK), ids(1, 20)
    model, published = (short_trainer(2, gate=gate).model for gate in ("copy", "published"))
    context = model.prefill(text)
    plain = model.denoise(block, context, None)
    for t in (0.1, 1.0):
        check(model.denoise(block, context, t), plain, 1e-6)
    assert error(published.denoise(block, published.prefill(text), 1.0), plain) > 0.1
    tied = short_trainer(2, tied=True)
    tied.how = train.How(autocast=True)     # the frozen pass must not cache its casts of weights
    sum(tied.passes(0)).backward()
    assert tied.model.denoiser_tower is tied.model.context_tower
    assert all(layer.mixer.in_proj.weight.grad.any()
               for layer in tied.model.context_tower.layers if layer.kind == "M")
    for timeless in (False, True):
        model = short_trainer(2, timeless=timeless).model
        with torch.no_grad():
            model.t_block[1].weight.normal_()
        early, late = (model.denoise(block, context, t) for t in (0.1, 1.0))
        assert torch.equal(early, late) if timeless else error(early, late) > 1e-3


def test_learning_rate_schedule():
    once = recipe(1, steps=1000, stages=(), decay=0.3, peak=2.0, warm_up=10)
    rates = [once.learning_rate(step) for step in range(1000)]
    assert rates[0] == 0.2 and rates[9:700] == [2.0] * 691
    assert rates[700:] == sorted(rates[700:], reverse=True) and rates[-1] == 0.02
    assert rates[775] == 2 * (1 - math.sqrt(0.25))              # a quarter into the decay
    twice = dataclasses.replace(once, steps=1500, stages=((500, dict(rows=3)),
                                                          (1000, dict(peak=1.0))))
    assert [twice.learning_rate(step) for step in range(1000)] == rates
    assert twice.learning_rate(1000) == 0.1 and twice.learning_rate(1499) == 0.01
    assert [twice.at(step).rows for step in (499, 500, 1000)] == [once.rows, 3, 3]
    stays = dataclasses.replace(once, steps=1500, stages=((1000, dict(peak=1.0, floor=0.5)),))
    assert stays.learning_rate(999) == 0.02 and stays.learning_rate(1499) == 0.5


def test_balance_evens_out_the_experts():
    torch.manual_seed(0)
    router = Router(TwoTowerConfig(**TINY)).requires_grad_(False)
    torch.nn.init.normal_(router.weight, std=0.2)
    router.weight[0] += 0.1                                     # most inputs would choose expert 0
    balance, x, worst = train.Balance(router, rate=0.02), torch.randn(512, 32) + 1, []
    for _ in range(100):
        router(x)
        worst.append(balance.update())
    assert worst[0] > 3 and worst[-1] < 1.3
    assert router.e_score_correction_bias[0] == router.e_score_correction_bias.min()


@pytest.mark.parametrize("phase", [1, 2])
def test_training_resumes_exactly(phase, tmp_path):
    """Interrupted and resumed at a checkpoint, a phase ends in the same weights as in one go."""
    whole = short_trainer(phase)
    before = {name: tensor.clone() for name, tensor in whole.model.state_dict().items()}
    whole.run(every=5)
    first = short_trainer(phase, tmp_path)
    steps = iter([first.train_step] * 8)
    first.train_step = lambda: next(steps)()
    with pytest.raises(StopIteration):
        first.run(every=5)
    (tmp_path / "partial").mkdir()                              # left by one killed while saving
    second = short_trainer(phase, tmp_path)
    assert second.step == 5
    second.run(every=5)
    after = whole.model.state_dict()
    for name, tensor in second.model.state_dict().items():
        assert torch.equal(tensor, after[name]), name
        frozen = phase == 2 and name.startswith("context_")
        assert torch.equal(tensor, before[name]) == frozen, name
    log = results_of((tmp_path / "log.jsonl").read_text())
    for entry, other in zip(log, whole.log, strict=True):
        assert all(entry[name] == other[name] for name in ("step", "loss", "valid"))
    assert {path.name for path in tmp_path.iterdir()} == {
        "made_with.json", "log.jsonl", "loss.png", "step-00000012"}


def refused(program, capsys, *args) -> str:
    """The one line that program.main(args) ends with, at exit status 2."""
    with pytest.raises(SystemExit) as end:
        program.main([str(arg) for arg in args])
    line, = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and line.startswith(f"{program.__name__}.py: ")
    return line


def test_train_runs_end_to_end(tmp_path, capsys):
    """Both phases learn, text round-trips; again there is nothing to do; others are refused."""
    out = tmp_path / "out"
    smoke = ["--smoke", "--threads", "1", "--out", str(out)]
    train.main(smoke)
    printed = capsys.readouterr().out
    for phase in (1, 2):
        log = results_of((out / f"phase{phase}" / "log.jsonl").read_text())
        assert log[-1]["loss"] < min(log[0]["loss"], 0.85 * math.log(1280))
        assert f"phase {phase} step" in printed
    tasks = {"library", *train.SMOKE[1].tasks()}
    assert {path.name for path in (out / "tasks").iterdir()} == {
        f"{task}.{kind}" for task in tasks for kind in ("yaml", "jsonl")}
    model, tokenizer = bench.load(out)
    assert len(model.generate_mask_diffusion([tokenizer.encode("sort 1 ").ids], 20).tokens[0]) == 20
    assert [tokenizer.id_to_token(i) for i in range(4)] == ["<unk>", "<s>", "</s>", "<mask>"]
    everything = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x30000, 7), 0x10FFFF]))
    for text in (everything, "", " a  b\t\n\n  c 12 345", *corpus.library(held_out=True)[:20]):
        read = tokenizer.encode(text).ids
        assert tokenizer.decode(read, skip_special_tokens=False) == text and 0 not in read
    # every byte has a token, so that byte strings round-trip through latin-1 or surrogates alike
    vocabulary = tokenizer.get_vocab()
    assert len(vocabulary) == 1280 and set(pre_tokenizers.ByteLevel.alphabet()) <= set(vocabulary)
    assert tokenizer.encode("2024").tokens == ["2", "0", "2", "4"]          # digit by digit
    (out / "tasks" / "sort.yaml").write_text("changed")
    train.main(smoke)
    assert "step" not in capsys.readouterr().out
    assert (out / "tasks" / "sort.yaml").read_text() == "changed"
    train.main([*smoke, "--recipes", "default", "tied towers"])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(row["recipe"], row["mode"]) for row in rows] == [
        (name, mode) for name in ("default", "tied towers") for mode in ("ar", "mask_diffusion")]
    assert rows[0]["valid"] < math.log(1280) and rows[1]["passes_per_block"] <= 16
    step, = (out / "phase1").glob("step-*")
    (step / ".metadata").write_bytes((step / ".metadata").read_bytes()[:100])
    assert "delete it" in refused(train, capsys, *smoke)
    assert "made with another" in refused(train, capsys, *smoke, "--seed", 1)


@pytest.mark.parametrize("program, args, message", [
    (train, "--threads 0", "0 must be an integer of 1 or more"),
    (train, "--seed -1", "--seed is -1"),
    (train, "--device toaster", "--device toaster cannot be used"),
    (train, "--speed", "unrecognized arguments"),
    (train, "--steps 5", "--steps needs --backbone"),
    (train, "--backbone miniature --data README.md", "--backbone needs --out"),
    (train, "--backbone miniature --smoke", "--smoke is of the miniature"),
    (train, "--backbone nowhere --plan", "nowhere"),
    (train, "--smoke --out README.md", "README.md"),
    (train, "--bf16 --seed one", "invalid int value"),
    (train, "--recipes --published", "not allowed with"),
    (train, "--recipes --out nowhere", "nowhere"),
    (bench, "batch --checkpoint nowhere", "nowhere"),
    (bench, "samples --mode prose", "--mode prose"),
    (bench, "cpu --items 5", "unrecognized arguments: --items"),
    (bench, "batch --rounds 0", "0 must be an integer of 1 or more"),
    ("evaluate", "--tasks nonsense", "the harness has no task nonsense"),
    ("evaluate", "--modes ar,prose", "--modes: there are only mask_diffusion"),
    ("evaluate", "--modes ar --confidence-threshold 0.9", "of mask_diffusion alone"),
    ("evaluate", "--suite card --tasks race", "--tasks does nothing with --suite"),
    ("evaluate", "--checkpoint golden/cfg1", "holds no tasks; give --tasks or --suite card"),
    ("evaluate", "--checkpoint nowhere", "nowhere"),
    ("evaluate", "--limit 0", "0 must be an integer of 1 or more")])
def test_train_bench_and_evaluate_refuse_in_one_line(program, args, message, capsys, monkeypatch):
    monkeypatch.chdir(HERE)
    program = evaluating() if program == "evaluate" else program
    if "nonsense" in args:              # the model card's tasks are in the same index
        index = program.TaskManager(include_path=MINIATURE / "tasks")
        monkeypatch.setattr(program, "TaskManager", lambda **_: index)
        for name, *_ in program.CARD.values():
            assert program.match(index.all_tasks, name)
    assert message in refused(program, capsys, *args.split())


@functools.cache
def backbone() -> Path:
    """A tiny backbone with the miniature's tokenizer, and beside it text to learn."""
    folder = Path(tempfile.mkdtemp(prefix="backbone"))
    torch.manual_seed(0)
    model = train.new_context(train.SMOKE_MODEL).bfloat16()
    model.save_pretrained(folder / "bb", towers="context", layout="backbone", files=TOKENIZER)
    (folder / "a.txt").write_text("".join(corpus.library(every=16)[:4]), encoding="utf-8")
    (folder / "b.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (
        *({"prompt": f"{n} + 1 =", "answer": f" {n + 1}"} for n in range(90)), {"text": "abc"})))
    return folder


TWO_PROCESSES = "-m torch.distributed.run --standalone --nproc-per-node 2".split()


def own(out: Path, *args) -> list[str]:
    folder = backbone()
    return [str(arg) for arg in (
        "--backbone", folder / "bb", "--data", folder / "a.txt", folder / "b.jsonl", "--rows", 4,
        "--length", 64, "--steps", 8, "--save-every", 4, "--learning-rate", "3e-3", "--warm-up", 2,
        "--mock-ar", 0.25, "--threads", 1, "--out", out, *args)]


def test_a_denoiser_for_a_backbone(tmp_path, capsys):
    """Alone, and with two processes that are killed and resumed by one, each with passes of its own
    size: what is learned agrees to 1e-5 in the losses and 4e-3 in the weights (sums in another
    order, 1e-7, are divided by their size where AdamW's first gradients are near zero, and weights
    are written in bfloat16); the context tower keeps its bytes, and the result decodes."""
    train.main(own(tmp_path / "one"))
    assert "phase 2 step 8/8" in capsys.readouterr().out
    shared = own(tmp_path / "two", "--accumulate", 2, "--checkpoint-activations")
    run = subprocess.Popen([sys.executable, *TWO_PROCESSES, str(HERE / "train.py"), *shared],
                           start_new_session=True, stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT, text=True)
    while not (tmp_path / "two" / "phase2" / "step-00000004").exists():
        assert run.poll() is None, run.stdout.read()
        time.sleep(0.05)
    started = psutil.Process(run.pid).children(recursive=True)      # each in a session of its own
    for process in (run, *started):
        process.kill()
    psutil.wait_procs(started)
    run.wait()
    train.main(own(tmp_path / "two"))
    assert "step 8/8" in (said := capsys.readouterr().out) and "step 4/8" not in said
    one, two, given = (load_file(folder / "model.safetensors") for folder in (
        tmp_path / "one", tmp_path / "two", backbone() / "bb"))
    logs = [results_of((tmp_path / name / "phase2" / "log.jsonl").read_text())
            for name in ("one", "two")]
    assert logs[0][-1]["valid"]["text"] < logs[0][0]["valid"]["text"] - 0.1     # the copy's
    for first, second in zip(*logs, strict=True):
        assert first["valid"]["text"] == pytest.approx(second["valid"]["text"], rel=1e-5)
    for key, tensor in given.items():
        key = re.sub("^backbone", "context_tower", key).replace("lm_head", "context_lm_head")
        assert torch.equal(one[key], tensor) and torch.equal(two[key], tensor)
    assert one.keys() == two.keys() and len(one) > 2 * len(given)
    for key, tensor in one.items():
        assert not tensor.any() or error(two[key].float(), tensor.float()) < 4e-3, key
    model, tokenizer = bench.load(tmp_path / "two")
    assert len(model.generate_mask_diffusion([tokenizer.encode("4 +").ids], 20).tokens[0]) == 20


def test_text_is_packed_in_an_order_of_its_own(tmp_path):
    """Rows read whole documents, closed by </s>, and together each once before one comes again; of
    a prompt nothing is learned. Another process, which makes other rows or begins at a cursor,
    makes the same; another seed another order."""
    names = [f"text {n}" if n % 3 else f"asked {n}" for n in range(90)]
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(
        {"text": name} if n % 3 else {"prompt": name, "answer": " right"})
        for n, name in enumerate(names)))
    read, given = recipe(2, rows=4, row=64), ([tmp_path / "a.jsonl"], [backbone() / "a.txt"])
    new = lambda seed=0: corpus.Text(miniature()[1], 2, *given, seed)
    text, cursors, batches = new(), [], []
    for step in range(8):
        batches.append(text.batch(read, step))
        cursors.append(text.cursor)
    rows = [torch.cat(parts).tolist() for parts in zip(*(batch[0] for batch in batches))]
    read_out = [miniature()[1].decode(row, skip_special_tokens=False).split("</s>") for row in rows]
    assert min(map(len, read_out)) > 40
    first = [one.removesuffix(" right") for row in read_out for one in row[:22]]    # 22.5 a row
    assert len(set(first)) == 88 and set(first) <= set(names)
    for tokens, targets in batches:
        kept = miniature()[1].decode(tokens[~targets].tolist())
        assert "asked" in kept and "text" not in kept and "right" not in kept
    other = new()
    for mine, step in (slice(1, None, 2), 0), (slice(1, None, 2), 1), (slice(0, 1), 7):
        if step == 7:
            other.step, other.cursor, other.coming = 7, cursors[6], {}
        for a, b in zip(other.batch(read, step, mine=mine), batches[step]):
            assert torch.equal(a, b[mine])
    assert not torch.equal(new(1).batch(read, 0)[0], batches[0][0])
    held = new().batch(read, 0, held_out=True)[0]
    assert torch.equal(held, text.batch(read, 0, held_out=True)[0]) and not torch.isin(
        held, torch.tensor(rows)).all()
    assert new().digest == text.digest
    given[1].clear()                                            # one document in 32 is held out
    left, held = (new().places[side] for side in (False, True))
    assert len(left) + len(held) == 90 and 0 < len(held) < 10


def test_plan_counts_what_is_kept():
    """Activations and states against a real pass's storages, within 20 %; sums of parameters."""
    config = TwoTowerConfig(**train.SMOKE_MODEL | dict(hybrid_override_pattern="M*EM-E*",
                                                       num_hidden_layers=7))
    model = plan.like(config, torch.bfloat16)
    model.context_tower.requires_grad_(False)
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found, tokens = {}, ids(2, 256)

    def pack(tensor):
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model.diffusion_logits(tokens, tokens, 0.5, 16)
    kept = sum(part.nbytes() for key, part in found.items() if key not in known)
    need = plan.memory(config, 4, 2, 256, 16)
    states = 2 * 2 * 2 * 512 * 32 * 2                       # of attention, among what is kept
    assert abs(need["activations"] + states - kept) < 0.2 * kept and logits.requires_grad
    assert plan.memory(config, 4, 2, 256, 16, recompute=True)["activations"] < kept / 2
    trained = sum(p.numel() for name, p in model.named_parameters() if "context" not in name)
    assert need["trained weights"] * 4 == 4 * trained == need["gradients"] * 4
    assert need["frozen tower"] * 4 == 2 * sum(
        p.numel() for name, p in model.named_parameters() if "context" in name)


MEASURE = """
import json, resource, sys, types
from dataclasses import replace
from pathlib import Path
import psutil, torch
sys.path.insert(0, {here!r})
import plan, sharding, train

def run(folder, rows=2, M=256):
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    before = psutil.Process().memory_info().rss
    recipe = replace(train.BACKBONE, rows=rows * train.WORLD, row=M, warm_up=1)
    tokens = torch.randint(4, 8192, (rows, M))
    data = types.SimpleNamespace(seed=0, digest="", batch=lambda *_: (tokens, tokens > 0))
    skeleton, read = sharding.read_backbone(Path(folder))
    model = sharding.both_towers(recipe, skeleton.config, read, train.How())
    loaded = peak()
    trainer = train.Trainer(model, recipe, data)
    for _ in range(3):
        trainer.train_step()
    need = plan.memory(skeleton.config, train.WORLD, rows, M, 16, bf16=False)
    return [peak(), sum(need.values()), loaded, need["frozen tower"] * train.WORLD]

torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
run("small")                                # what libraries take at first is not the model's
Path(str(train.RANK)).write_text(json.dumps(run("large")))
"""


@posix
def test_processes_need_what_the_plan_says(tmp_path):
    """Each of two peaks within 20 %; both towers are never loaded whole."""
    large = dict(hidden_size=512, hybrid_override_pattern="M*EM-E", num_hidden_layers=6,
                 mamba_num_heads=16, mamba_head_dim=64, head_dim=64, n_routed_experts=16,
                 moe_intermediate_size=512)
    for name, fields in ("small", {}), ("large", large):
        train.new_context(train.SMOKE_MODEL | fields | dict(vocab_size=8192)).save_pretrained(
            tmp_path / name, towers="context", layout="backbone")
    (tmp_path / "measure.py").write_text(MEASURE.format(here=str(HERE)))
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}              # returns what is freed
    run_python(*TWO_PROCESSES, "measure.py", env=env, cwd=tmp_path)
    for rank in "01":
        peak, need, loaded, tower = json.loads((tmp_path / rank).read_text())
        print(f"peak {peak / 1e6:.0f} MB, plan {need / 1e6:.0f} MB, loading {loaded / 1e6:.0f} MB")
        assert abs(peak - need) < 0.2 * need and loaded < 1.3 * tower


@pytest.mark.parametrize("name, fits", [("8B", True), ("30B", False)])
def test_plan_of_the_family(name, fits, tmp_path, capsys):
    fields = TwoTowerConfig().to_dict()
    if name == "8B":
        pattern = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
        fields |= dict(hidden_size=4096, hybrid_override_pattern=pattern, mamba_num_heads=128,
                       num_key_value_heads=8, intermediate_size=21504)
        fields = {name: value for name, value in fields.items()
                  if not re.search("expert|moe|topk|group$|scaling", name)}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    train.main(["--backbone", str(tmp_path), "--plan", "--checkpoint-activations"])
    printed = capsys.readouterr().out
    assert ("8 GPUs: does not fit; would: " in printed) != fits and "an estimate" in printed
    total = [float(n) for n in re.search("together(.*)", printed)[1].split()]
    assert total == sorted(total, reverse=True) and len(total) == 4


def test_training_on_bad_text_is_refused(tmp_path, capsys):
    """In one line; nothing is written, nothing that was there is touched."""
    folder, out = backbone(), tmp_path / "out"
    copies = {name: shutil.copytree(folder / "bb", tmp_path / name) for name in ("bare", "large")}
    (copies["bare"] / "tokenizer.json").unlink()
    tokenizer = Tokenizer.from_file(str(folder / "bb" / "tokenizer.json"))
    tokenizer.add_tokens(["beyond"])
    tokenizer.save(str(copies["large"] / "tokenizer.json"))
    for name, content, message in (
            ("empty.txt", b"", "holds no text"), ("latin.txt", b"ok\n\xe9\n", "line 2: not UTF-8"),
            ("wrong.jsonl", b'{"txt": 1}', "line 1: not an object with"),
            ("broken.jsonl", b"{", "line 1: not JSON"), ("one.txt", b"a", "single document")):
        (tmp_path / name).write_bytes(content)
        assert message in refused(train, capsys, *own(out), "--data", tmp_path / name)
    for args, message in (
            (("--backbone", copies["bare"]), "tokenizer.json is missing"),
            (("--backbone", copies["large"]), "ids up to 1280, but vocab_size of the model is"),
            (("--length", 24), "no multiple of --block-size 32, and shorter"),
            (("--rows", 3, "--accumulate", 2), "1 processes x 2 passes cannot share 3"),
            (("--out", folder / "bb"), "--out must not be --backbone"),
            (("--out", copies["bare"]), "which no run here made")):
        before = {path: path.read_bytes() for path in copies["bare"].iterdir()}
        assert message in refused(train, capsys, *own(out), *args)
        assert {path: path.read_bytes() for path in copies["bare"].iterdir()} == before
    assert not out.exists() or not [*out.rglob("*.*")]
    other = shutil.copytree(folder / "bb", tmp_path / "other")
    save_file({name: 2 * tensor for name, tensor in load_file(
        other / "model.safetensors").items()}, other / "model.safetensors")
    short = own(copies["bare"], "--steps", 1)
    train.main([*short, "--overwrite"])                                 # once it is told to
    assert TwoTower.from_pretrained(copies["bare"]).denoiser_tower is not None
    assert "made with another" in refused(train, capsys, *short, "--backbone", other)


@posix
def test_a_full_disk_loses_nothing(tmp_path, capsys):
    """One line tells of it, what was there is whole, and the next run goes on from it."""
    import resource
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    args = own(tmp_path / "out", "--steps", 4, "--save-every", 2)
    limit = (backbone() / "bb" / "model.safetensors").stat().st_size    # half the result's

    def when_full() -> str:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            return refused(train, capsys, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    files = lambda: {path.name for path in (tmp_path / "out").iterdir()}
    assert "failed, the checkpoint before it is whole" in when_full() and files() == {"phase2"}
    train.main(args)
    whole = (tmp_path / "out" / "model.safetensors").read_bytes()
    (tmp_path / "out" / "phase2" / "exported").unlink()                 # to write it again
    assert "writing" in when_full()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == whole
    assert files() == {"phase2", "config.json", "tokenizer.json", "model.safetensors"}


@functools.cache
def evaluating():
    """evaluate.py, under a name of its own: lm_eval's tasks import a package by that one."""
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm_eval is not installed; pip install lm_eval")
    spec = importlib.util.spec_from_file_location("evaluate", HERE / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def asked(kind: str, *arguments) -> list:
    from lm_eval.api.instance import Instance
    return [Instance(kind, {}, one, i) for i, one in enumerate(arguments)]


def with_tasks(folder: Path, **tasks: tuple[str, list[dict]]) -> Path:
    """The miniature with tasks of its own: YAML, to which what all have is added, and items."""
    (folder / "tasks").mkdir(parents=True)
    for path in MINIATURE.glob("*.[js]*"):
        (folder / path.name).symlink_to(path)
    for name, (text, items) in tasks.items():
        (folder / "tasks" / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: "
            f"{name}.jsonl\ntest_split: test\n{text}")
        (folder / "tasks" / f"{name}.jsonl").write_text(
            "".join(json.dumps(item) + "\n" for item in items))
    return folder


def table(program, capsys, *args) -> dict[tuple, dict]:
    """The rows that evaluate.py prints, by task, metric and mode."""
    program.main([str(arg) for arg in args])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    found = {(row["task"], row["metric"].split(",")[0], row["mode"]): row for row in rows}
    assert len(found) == len(rows)
    return found


def test_evaluate_agrees_with_a_plain_loop(tmp_path, capsys, monkeypatch):
    """In every mode, in batches of 1 and of 16, the harness finds as many answers right, tokens and
    passes as a loop over the same items, of which some have another answer than the model's; and it
    reaches for no network."""
    program, (model, tokenizer), tried = evaluating(), miniature(), []
    connect = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", lambda self, to: connect(self, to) if isinstance(
        to, (str, bytes)) else tried.append(to))
    folder = with_tasks(tmp_path / "it")
    corpus.write_tasks(folder / "tasks", tokenizer, ["json", "sort"], 3)
    tasks = "json", "sort", "library"
    for task in tasks:
        path = folder / "tasks" / f"{task}.jsonl"
        items = results_of(path.read_text())
        items[1]["answer"] = "?"
        path.write_text("".join(json.dumps(item) + "\n" for item in items))
    modes = {"ar": ("ar", {}), "speculative": ("speculative", {})} | {
        f"mask_diffusion {gamma}": ("mask_diffusion", {"confidence_threshold": gamma})
        for gamma in (0.5, 0.95)}
    expected = {}
    for (label, (mode, knobs)), task in itertools.product(modes.items(), tasks):
        right = tokens = passes = 0
        for line in (folder / "tasks" / f"{task}.jsonl").read_text().splitlines():
            item, most = json.loads(line), 32 if task == "library" else 96
            result = getattr(model, f"generate_{mode}")(
                [tokenizer.encode(item["prompt"]).ids], most, eos_token_id=2, **knobs)
            text = tokenizer.decode(result.tokens[0].tolist())
            right += (text.split("\n")[0].strip() if task == "library" else text) == item["answer"]
            tokens += len(result.tokens[0])
            passes += int(result.context_passes if mode == "ar" else result.nfe)
        expected[task, "exact_match", label] = right / 3, tokens, passes
    for size in (1, 16):
        found = table(program, capsys, "--checkpoint", folder, "--modes",
                      "speculative,mask_diffusion,ar", "--confidence-threshold", 0.5, 0.95,
                      "--batch-size", size)
        for key, (value, tokens, passes) in expected.items():
            row = found[key]
            assert (row["value"], row["tokens"], row["passes"]) == (value, tokens, passes), key
            assert row["tokens_per_pass"] == tokens / passes and row["tokens_per_second"] > 0
        of = [found[task, "exact_match", "mask_diffusion 0.95"] for task in ("json", "sort")]
        both = found["mean", "exact_match", "mask_diffusion 0.95"]
        ar = found["mean", "exact_match", "ar"]
        assert both["value"] == statistics.mean(row["value"] for row in of)
        assert both["share_of_ar"] == both["value"] / ar["value"]
        assert both["speedup"] == pytest.approx(
            sum(row["tokens"] for row in of) / sum(row["seconds"] for row in of)
            / ar["tokens_per_second"])
    assert not tried
    found = table(program, capsys, "--checkpoint", folder, "--modes", "speculative,ar", "--tasks",
                  "sort", "--experts", "int4")
    assert len({row["value"] for row in found.values()}) == 1


def test_evaluate_scores_as_the_harness_scores_transformers(tmp_path):
    """Log-likelihoods, also of texts above the longest, within 1e-4 of those that the harness's own
    `hf` finds for the exported backbone, and which are greedy: with spaces between context and
    continuation, without a context, by several windows."""
    program, (model, tokenizer) = evaluating(), miniature()
    pytest.importorskip("accelerate", reason="accelerate, which its hf needs, is not installed")
    with bench.without_this_folder():
        from lm_eval.models.huggingface import HFLM
        from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    with_beginning = Tokenizer.from_str(tokenizer.to_str())
    with_beginning.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)])
    short = TwoTower(dataclasses.replace(model.config, time_step_min=1e-30,
                                         max_position_embeddings=64), towers="context").eval()
    short.load_state_dict({name: tensor for name, tensor in model.state_dict().items()
                           if name.startswith("context_")})
    short.save_pretrained(tmp_path, towers="context", layout="backbone")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    items = list(itertools.islice(corpus.task_items("sort", "hf", True), 6))
    # no two are one text, divided elsewhere, for which theirs has only one division's logits
    pairs = [*items[:3], *((prompt + text[:1], text[1:]) for prompt, text in items[3:]),
             ("json age=", "4 2"), ("a list: ", "x, y"), ("", "import os"), ("", "<s> def"),
             ("<s>for i", " in range"), (items[0][0] * 3, "1 green rugs"), ("x", items[1][1])]
    texts = [(items[0][1],), (items[0][0] * 9,), ("<s>x = 1",), ("y",)]
    for own in (tokenizer, with_beginning):
        other = HFLM(theirs, tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=own, bos_token="<s>", eos_token="</s>", pad_token="<unk>"),
            batch_size=4, max_length=63, device="cpu")
        ours = program.Harness(short, own, batch_size=5)
        for kind, arguments in (("loglikelihood", pairs), ("loglikelihood_rolling", texts)):
            found, wanted = (torch.tensor(getattr(lm, kind)(
                asked(kind, *arguments), disable_tqdm=True), dtype=torch.float64)
                for lm in (ours, other))
            # theirs are sums in float32, ours in float64
            assert ((found - wanted).abs() < 1e-4 + 2**-22 * wanted.abs()).all()
            if kind == "loglikelihood":             # some are what AR writes, some are not
                assert 0 < found[:, 1].sum() < len(pairs)
                assert found[:, 0].min() < -10


METRIC = "metric_list:\n  - metric: {}\n    aggregation: mean\n    higher_is_better: true\n"
CHOOSE = """output_type: multiple_choice
doc_to_text: "{{ask}}"
doc_to_choice: choices
doc_to_target: right
target_delimiter: ""
num_fewshot: 1
fewshot_split: test
fewshot_config:
  sampler: first_n
""" + METRIC.format("acc")
WRITE = """output_type: generate_until
doc_to_text: "{{ask}}"
doc_to_target: "{{line}}"
generation_kwargs:
  until: [" zzz", "\\n", "</s>"]
  max_gen_toks: 30
  do_sample: false
""" + METRIC.format("exact_match")


def test_evaluate_runs_tasks_of_the_harness(tmp_path, capsys, monkeypatch):
    """Of a suite, multiple choice after an example is scored once, by the context tower, and is
    part of every mode's mean; texts end before any of their stops, special tokens too, or at
    max_gen_toks."""
    program, (model, tokenizer) = evaluating(), miniature()
    pairs = list(itertools.islice(corpus.task_items("sort", "harness", True), 6))
    choose = [{"ask": prompt, "choices": [text, text[::-1], text[:9]], "right": i % 2}
              for i, (prompt, text) in enumerate(pairs)]
    first = [{"ask": prompt, "line": text.split("\n")[i % 2]} for i, (prompt, text) in
             enumerate(pairs)]
    folder = with_tasks(tmp_path / "it", choose=(CHOOSE, choose), first=(WRITE, first))
    index = program.TaskManager(include_path=folder / "tasks", include_defaults=False)
    monkeypatch.setattr(program, "TaskManager", lambda **_: index)
    monkeypatch.setattr(program, "CARD", {
        "Choose": ("choo*", 1, "acc,none", "78.56", "78.24"),
        "First": ("first", None, "exact_match,none", "92.49", "90.14")})
    found = table(program, capsys, "--checkpoint", folder, "--suite", "card")
    scored, *written = {key: row["value"] for key, row in found.items() if key[0] != "mean"}.items()
    assert scored[0] == ("Choose", "acc", "context tower")
    assert [key for key, _ in written] == [("First", "exact_match", mode)
                                           for mode in ("ar", "mask_diffusion 0.8")]
    for (_, _, mode), value in written:
        assert found["mean", "all", mode]["value"] == (scored[1] + value) / 2
    assert found["First", "exact_match", "ar"]["published"] == "92.49/90.14"
    right = []
    for item in choose:
        before = choose[0]["ask"] + choose[0]["choices"][0] + "\n\n" + item["ask"]
        n = len(tokenizer.encode(before).ids)
        total = model.score([tokenizer.encode(before).ids] * 3, [
            tokenizer.encode(before + choice).ids[n:] for choice in item["choices"]]).total
        right.append(int(total.argmax()) == item["right"])
    assert scored[1] == statistics.mean(map(int, right)) < 1
    assert found["First", "exact_match", "ar"]["value"] == 0.5              # every other item's
    lm = program.Harness(model, tokenizer, "mask_diffusion")
    requests = [(prompt, {"until": ["gs", "ys,", "</s>", ""], "max_gen_toks": 40})
                for prompt, _ in pairs] + [(pairs[0][0], {"until": "<s>", "max_gen_toks": 9})]
    wholes = [tokenizer.decode(model.generate_mask_diffusion(
        [tokenizer.encode(prompt).ids], given["max_gen_toks"], eos_token_id=2).tokens[0].tolist())
        for prompt, given in requests]
    assert lm.generate_until(asked("generate_until", *requests), disable_tqdm=True) == [
        *(re.split("gs|ys,", text)[0] for text in wholes[:-1]), wholes[-1]]
    assert any("gs" in text for text in wholes) and len(tokenizer.encode(wholes[-1]).ids) == 9


def test_evaluate_goes_on_after_an_interruption(tmp_path, capsys, monkeypatch):
    """From --cache, with what it cost; nothing of other gammas, dtypes or batches."""
    program, asked_for = evaluating(), []
    folder = with_tasks(tmp_path / "it", first=(WRITE, [
        {"ask": prompt, "line": text.split("\n")[0]}
        for prompt, text in itertools.islice(corpus.task_items("sort", "cache", True), 6)]))
    write, left = TwoTower.generate_mask_diffusion, 0

    @functools.wraps(write)             # whose defaults are looked up
    def generate(model, prompts, most, **options):
        asked_for.extend([len(prompts)] * (most == 30))     # the first batch is written twice
        on_tokens = options["on_tokens"]

        def or_stop(written):
            if most == 30 and len(asked_for) == left and written.row == 1:
                raise KeyboardInterrupt         # when the row before has ended
            return on_tokens(written)
        return write(model, prompts, most, **options | {"on_tokens": or_stop})

    monkeypatch.setattr(TwoTower, "generate_mask_diffusion", generate)
    monkeypatch.setattr(program, "min", lambda new, most: 8 if most == 32 else min(new, most),
                        raising=False)                                  # tokens to warm up with
    command = ["--checkpoint", folder, "--modes", "mask_diffusion", "--batch-size", 2,
               "--confidence-threshold", 0.9, "--cache", tmp_path / "cache"]
    left = 2
    with pytest.raises(SystemExit) as end:
        program.main(list(map(str, command)))
    assert end.value.code == 130 and "goes on" in capsys.readouterr().err
    assert asked_for == [2, 2]
    asked_for.clear()
    left = 0
    key = "first", "exact_match", "mask_diffusion 0.9"
    found = table(program, capsys, *command)[key]
    assert asked_for == [2, 1] and found["value"] == 1          # three of six were there
    asked_for.clear()
    again = table(program, capsys, *command)[key]
    assert not asked_for and again == found
    for other in (["--confidence-threshold", 0.91], ["--dtype", "bfloat16"], ["--batch-size", 3]):
        table(program, capsys, *command, *other)
        assert sum(asked_for) == 6
        asked_for.clear()


def test_evaluate_names_what_it_lacks(tmp_path):
    (tmp_path / "lm_eval.py").write_text("raise ImportError('not here')")
    run = run_python("evaluate.py", env=os.environ | {"PYTHONPATH": str(tmp_path)}, status=2)
    assert run.stdout == ""
    assert run.stderr == ("evaluate.py: it measures with lm-evaluation-harness: pip install "
                          "lm_eval (not here)\n")


@pytest.mark.parametrize("mode", ["ar", "mask_diffusion"])
def test_bench_counts_the_rows_that_a_batch_changes(mode, monkeypatch):
    """None, or all where a row's logits depend on how many stand beside it."""
    model = random_model()
    same = bench.rows_apart(model, mode, PROMPTS, batch=len(PROMPTS))
    assert same["texts"] == 0 and same["by_at_most"] < 1e-9 and same["largest_logit"] > 0.1
    for head in (model.context_lm_head, model.lm_head):     # in batches the least likely token
        monkeypatch.setattr(head, "forward", lambda x, weight=head.weight: F.linear(
            x, weight if len(x) == 1 else -weight))
    other = bench.rows_apart(model, mode, PROMPTS, batch=len(PROMPTS))
    assert other["rows"] == len(PROMPTS) == other["logits"] and other["by_at_most"] > 0.1
    assert other["texts"] == len(PROMPTS)


def test_bench_alterations_do_what_they_say():
    model = short_trainer(2).model
    with torch.no_grad():
        model.t_block[1].weight.normal_()
    context, block = model.prefill(ids(1, 30)), torch.full((1, 16), MASK)
    plain, half = (model.denoise(block, context, t) for t in (1.0, 0.5))
    with bench.altered(model, "t_frozen"):
        assert torch.equal(model.denoise(block, context, 1.0), half) and error(plain, half) > 1e-3
    with bench.altered(model, "unseeded"):
        unseeded = model.denoise(block, context, 1.0)
    assert torch.equal(model.denoise(block, context, 1.0), plain) and error(unseeded, plain) > 1e-3
    for state in context.states:
        if isinstance(state, MambaState):
            state.map(torch.Tensor.zero_)
    assert torch.equal(model.denoise(block, context, 1.0), unseeded)


def test_the_miniature_is_small_and_of_the_released_layout():
    sizes = {path.name: path.stat().st_size for path in MINIATURE.iterdir()}
    assert set(sizes) == {"config.json", "model.safetensors", "tokenizer.json", "README.md",
                          "tasks"}
    config = json.loads((MINIATURE / "config.json").read_text())
    assert sum(sizes.values()) < 32e6 and config == config | train.MODEL
    assert set(config["hybrid_override_pattern"]) == set("M*E")
    ours, theirs = ({re.sub(r"\d+", "0", key) for key in load_file(directory / "model.safetensors")}
                    for directory in (MINIATURE, GOLDEN / "cfg1"))
    assert ours == theirs


@pytest.mark.parametrize("task", corpus.TASKS)
def test_the_miniature_answers(task):
    """40 held-out items a task: AR and diffusion at gamma 0.8 are right at least 9 times in 10, of
    rename 8, the latter in far fewer passes (measured rates: miniature/README.md)."""
    model, tokenizer = miniature()
    prompts = corpus.task_prompts(tokenizer, task, 40)
    ids, answers, lengths = zip(*prompts)
    write = functools.partial(sample_rows.write_rows, model, tokenizer, prompts=list(
        map(torch.Tensor.tolist, ids)), max_new_tokens=lengths[0])
    right = lambda rows: sum(row.text == answer for row, answer in zip(rows, answers))
    ar, fast = write(mode="ar"), write(mode="mask_diffusion")
    assert min(right(ar), right(fast)) >= (32 if task == "rename" else 36)
    assert sum(len(row.tokens) for row in ar) > 8 * sum(row.nfe for row in fast)
    if task == "json":
        with bench.altered(model, "unseeded"):
            assert right(write(mode="mask_diffusion")) <= 2


# ---------------------------------------------------------- the published code, where it is given

# Largest error of a layer of the context tower, and of a denoiser pass, where the errors of layers
# between two MoE layers add up. float32: the limits of the golden data (worst on three published
# references 7e-7 and 2e-6). bfloat16, where every operation rounds by 2e-3: worst 4e-3 and 2.4e-2.
# Not yet seen at full size, nor on a GPU
OFFICIAL_LIMITS = {torch.float32: (1e-5, 3e-5), torch.bfloat16: (2e-2, 5e-2)}


def compared(directory: Path, reference: dict):
    """Our model of a checkpoint, the published code's tensors, and how close they must be."""
    config = official.read_config(directory)
    if reference["ids/prompt"].tolist() != [official.prompt_ids(directory, config)]:
        pytest.fail("the reference is of another checkpoint: its prompt is not ours", pytrace=False)
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
    dtype = official.dtype_of(config)
    model = TwoTower.from_pretrained(directory, context_device=gpus[0], dtype=dtype,
                                     denoiser_device=gpus[min(1, len(gpus) - 1)]).eval()
    return model, reference, OFFICIAL_LIMITS[dtype]


@pytest.fixture(scope="session")
def both(published):
    return compared(*published)


def by_token(name: str, x: torch.Tensor) -> torch.Tensor:
    """(tokens, numbers) of a tensor of one row; an SSM state and the last logits are one token."""
    x = x.transpose(1, 2) if name.endswith("_cache") else x         # (1, S, G, K)
    x = x if name.endswith("ssm_state") or x.dim() == 2 else x[0]
    return x.flatten(1).double().cpu()


def first_difference(ours: dict, reference: dict, limit: float, ties: dict):
    """Fail with the first of our tensors, in their order, that is not the published code's.

    The error is the rms over tokens of each token's own relative error (a token smaller than the
    median one is measured by that), so that a token of huge norm hides no other. Tokens of `ties`
    do not count, but no more than half of all are left out, so that a fault which many of them show
    is seen; on the references they are none in float32, up to 8 of 72 and 2 of 16 in bfloat16.
    """
    for name, tensor in ours.items():
        out, ref = by_token(name, tensor), by_token(name, reference[name])
        assert out.shape == ref.shape, f"first difference at {name}: shape {tuple(out.shape)}"
        norm = ref.norm(dim=1)
        errors = (out - ref).norm(dim=1) / norm.clamp(min=float(norm.median()) or 1.0)
        tied = ties.get(name, torch.zeros(len(ref), dtype=torch.bool)).cpu()
        left_out = min(int(tied.sum()), len(tied) // 2)
        errors[errors.masked_fill(~tied, -1).topk(left_out).indices] = 0.0
        rms = float((errors.square().sum() / (len(ref) - left_out)).sqrt())
        print(f"{name}: {rms:.1e} of {limit:.0e}, {left_out} of {len(ref)} left out")
        assert rms <= limit, f"first difference at {name}: {rms:.1e} > {limit:.0e}"


def near_ties(gate, x: torch.Tensor, chosen: int) -> torch.Tensor:
    """Tokens (T) whose last chosen expert could be another one by rounding alone.

    Its score and that of the first left out are less than four times as far apart as one rounding
    of every number in x (B, L, D) moves their difference, to first order: the layers before have
    rounded too. Experts in one group, as in the release."""
    unit, x, weight = torch.finfo(x.dtype).eps, x.flatten(0, -2).float(), gate.weight.float()
    scores = (x @ weight.T).sigmoid()
    best, experts = (scores + gate.e_score_correction_bias).topk(chosen + 1)
    slope = (scores * (1 - scores)).gather(1, experts)[..., None] * weight[experts]  # (T, A+1, D)
    moved = ((slope[:, -2] - slope[:, -1]) * x).norm(dim=1) * unit
    return best[:, -2] - best[:, -1] < 4 * moved


@contextlib.contextmanager
def published_mixers(model, tower: str, prefix: str, reference: dict):
    """Each mixer's output is noted, then replaced by the published one: a layer is judged by what
    it makes of the published input, and no error or flipped expert reaches the next.

    Yields {name: output} and {name: near ties}. Where the published code calls no mixer as a
    module (in its denoiser all but MoE layers) there is nothing to replace or to compare.
    """
    outputs, ties = {}, {}

    def replaced(name, mixer, args, output):
        theirs = reference[name].to(output)
        assert output.shape == theirs.shape, f"{name}: {theirs.shape}, not {output.shape}"
        outputs[name] = output
        if hasattr(mixer, "gate"):
            ties[name] = near_ties(mixer.gate, args[0], model.config.num_experts_per_tok)
        return theirs

    with contextlib.ExitStack() as hooks:
        for i, layer in enumerate(getattr(model, tower).layers):
            if (name := f"{prefix}{i}") in reference:
                hooks.enter_context(layer.mixer.register_forward_hook(
                    functools.partial(replaced, name)))
        yield outputs, ties
    assert len(outputs) >= model.config.hybrid_override_pattern.count("E")


@pytest.mark.official
def test_official_context(both):
    """Caches, states and mixers layer by layer, then the logits after the prompt."""
    model, reference, (limit, _) = both
    with published_mixers(model, "context_tower", "context_mixer/", reference) as (mixers, ties):
        context, ours = model.prefill(reference["ids/prompt"]), {}
    for i, state in enumerate(context.states):
        for name in ("key_cache", "value_cache", "conv_state", "ssm_state"):
            if hasattr(state, name):
                x = getattr(state, name)
                ours[f"context_state/{i}/{name}"] = (
                    x[:, :, :int(context.lengths[0])] if name.endswith("_cache") else x)
        ours[f"context_mixer/{i}"] = mixers[f"context_mixer/{i}"]
    # (B, conv_dim, W), of which the oldest column reaches nothing that follows
    theirs = {name: x[..., 1:].mT if name.endswith("conv_state") else x
              for name, x in reference.items()}
    first_difference(ours | {"context/logits": context.logits}, theirs, limit, ties)


@pytest.mark.official
def test_official_denoiser(both):
    """Three noise levels: mixers where the published code calls them, then the logits."""
    model, reference, (_, limit) = both
    prompt = reference["ids/prompt"]
    with published_mixers(model, "context_tower", "context_mixer/", reference):
        context = model.prefill(prompt)
    for t in official.NOISE_LEVELS:
        block = official.noisy_block(prompt, t, model.config.mask_token_id)
        with published_mixers(model, "denoiser_tower", f"denoiser_mixer/{t}/",
                              reference) as (mixers, ties):
            logits = model.denoise(block, context, t)
        first_difference(mixers | {f"denoiser/{t}": logits}, reference, limit, ties)


@pytest.mark.official
@pytest.mark.parametrize("mode", official.MODES)
def test_official_generation(both, mode):
    """Greedy tokens, and the passes of mask diffusion (the published code counts no others).

    float32: all equal. bfloat16: a near tie may fall either way, and then what follows differs. So
    after a token that differs (mask diffusion: after its block) we go on from the published text,
    half of every 16 tokens must be equal, and half or twice the passes are allowed.
    """
    model, reference, (limit, _) = both
    prompt, theirs, same = reference["ids/prompt"], reference[f"{mode}/tokens"], []
    new, Q, exact, nfe = official.NEW_TOKENS, official.BLOCK_SIZE, limit < 1e-4, 0
    assert theirs.shape == (1, new)
    tolerable = lambda: all(same[i:i + Q].count(False) <= (0 if exact else Q // 2)
                            for i in range(0, new, Q))
    while len(same) < new and tolerable():
        result = getattr(model, f"generate_{mode}")(
            torch.cat([prompt, theirs[:, :len(same)]], dim=1), new - len(same),
            **official.MODES[mode])
        nfe = nfe or int(result.nfe)                # of the whole text, from the first round
        equal = (result.tokens[0].cpu() == theirs[0, len(same):]).tolist()
        end = equal.index(False) + 1 if False in equal else len(equal)
        same += equal[:end if mode != "mask_diffusion" else -(-end // Q) * Q]
    print(f"{mode}: {same.count(False)} of {len(same)} tokens differ, {nfe} passes")
    assert tolerable(), f"token {same.index(False)} differs"
    if mode == "mask_diffusion":
        passes = int(reference[f"{mode}/nfe"])
        assert nfe == passes if exact else passes <= 2 * nfe <= 4 * passes, f"{nfe}, not {passes}"


# The published code as it is called, around our layers, which it runs in float32 whatever it is
# asked for: so in bfloat16 it differs from ours by rounding, as another implementation does. What
# the published code itself writes is in the golden data.
STAND_IN = '''
import causal_conv1d, mamba_ssm, torch              # always, also where no fast path is taken
from transformers.modeling_attn_mask_utils import AttentionMaskConverter
from twotower import TwoTower as Ours

KINDS = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}

class Cache:
    def __init__(self, states, S):
        self.conv_states, self.ssm_states, self.key_cache, self.value_cache = (
            [torch.zeros(0) for _ in states] for _ in range(4))
        for i, state in enumerate(states):
            if hasattr(state, "ssm_state"):     # the oldest column of (B, conv_dim, W) is not used
                conv_state = torch.nn.functional.pad(state.conv_state.mT, (1, 0))
                self.conv_states[i] = conv_state.to(self.conv_states.device)
                self.ssm_states[i] = state.ssm_state
            elif state is not None:
                self.key_cache[i] = state.key_cache[:, :, :S]
                self.value_cache[i] = state.value_cache[:, :, :S]

class NemotronHTwoTowerForCausalLM(Ours):
    @classmethod
    def from_pretrained(cls, directory, torch_dtype, trust_remote_code):
        self = super().from_pretrained(directory, dtype=torch.float32)
        self.asked_dtype = torch_dtype
        for layer, denoising in zip(self.context_tower.layers, self.denoiser_tower.layers):
            layer.block_type = KINDS[layer.kind]
            if layer.kind in "M*":      # the denoiser calls the parts of these: no hook sees them
                denoising.mixer.register_forward_hook = torch.nn.Module().register_forward_hook
        return self

    def place_towers_on_devices(self, context_device, denoiser_device):
        self.to(context_device)

    def _build_context_cache(self, ids):                            # two passes
        context = self.prefill(ids[:, :-1])
        logits = self.extend(context, ids[:, -1:])
        return {"context": context, "logits": logits,
                "ctx_cache": Cache(context.states, ids.shape[1])}

    def _run_denoiser_step_diffusion(self, block, cache, t):
        t = (t.to(self.asked_dtype) * 1000).float() / 1000          # t is rounded, then 1000 t
        return self.denoise(block, cache["context"], t)

    def written(self, generate, ids, *args, **knobs):
        result = generate(self, ids, *args, **knobs)
        self._last_nfe = int(result.nfe)
        return torch.cat([ids, torch.stack(result.tokens)], dim=1)

    def generate_ar(self, *args, **knobs):
        return self.written(Ours.generate_ar, *args, **knobs)

    def generate_mock_ar(self, *args, **knobs):
        return self.written(Ours.generate_mock_ar, *args, **knobs)

    def generate_mask_diffusion(self, *args, **knobs):
        return self.written(Ours.generate_mask_diffusion, *args, **knobs)
'''
REPAIRED = STAND_IN.replace("states.device", "states[i].device")
# (parameter of ours, change, comparison that must fail, what it must say), E and M being layers of
# that kind: a router forgets its correction bias, which only sends some tokens to other experts; a
# decay is wrong by 5 %; one layer takes shift for scale; the head takes each row for the next
PLANTED = [
    ("denoiser_tower.layers.{E}.mixer.gate.e_score_correction_bias", torch.zero_,
     test_official_denoiser, r"first difference at denoiser_mixer/\S+/{E}:"),
    ("context_tower.layers.{M}.mixer.A_log", lambda x: x.add_(0.05),
     test_official_context, "first difference at context_state/{M}/ssm_state:"),
    ("scale_shift_tables.{E}", lambda x: x.copy_(x[[1, 0, 2]]),
     test_official_denoiser, "first difference at denoiser_mixer/1.0/{E}:"),
    ("context_lm_head.weight", lambda x: x.copy_(x.roll(1, 0)),
     functools.partial(test_official_generation, mode="ar"), "token 0 differs")]
PACKAGES = ("mamba_ssm", "causal_conv1d", "transformers.modeling_attn_mask_utils")


def published_code(tmp_path: Path, code=REPAIRED, source=GOLDEN / "cfg1", packages=PACKAGES):
    """A checkpoint with the stand-in beside it, and a folder of the packages that it imports."""
    directory, site = copy_checkpoint(tmp_path, source), tmp_path / "site"
    (directory / official.CODE).write_text(code)
    for package in ("transformers.__init__", *packages):
        path = (site / package.replace(".", "/")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("AttentionMaskConverter = None")
    shutil.copy(HERE / "twotower.py", site)
    return directory, site


@pytest.mark.parametrize("source, dtype", [(GOLDEN / "cfg1", torch.float32),
                                           (MINIATURE, torch.bfloat16)], ids=["f32", "bf16"])
def test_the_comparison_passes_and_sees_planted_faults(source, dtype, tmp_path, monkeypatch):
    """bfloat16 on trained weights: a random network writes another text after every rounding."""
    directory, site = published_code(tmp_path, source=source)
    if dtype == torch.bfloat16:
        TwoTower.from_pretrained(directory, dtype=dtype).save_pretrained(directory)
    monkeypatch.setenv("PYTHONPATH", str(site))
    reference = official.reference(directory, tmp_path / "reference.safetensors")
    model, *_ = given = compared(directory, reference)
    assert model.lm_head.weight.dtype == dtype
    test_official_context(given)
    test_official_denoiser(given)
    for mode in official.MODES:
        test_official_generation(given, mode)
    pattern = model.config.hybrid_override_pattern
    layers = {"E": pattern.index("E"), "M": pattern.rindex("M")}
    for name, change, comparison, message in PLANTED:
        parameter = model.state_dict()[name.format(**layers)]
        right = parameter.clone()
        change(parameter)
        with pytest.raises(AssertionError, match=message.format(**layers)):
            comparison(given)
        parameter.copy_(right)


@pytest.mark.parametrize("arranged, message", [
    (dict(packages=()), "No module named 'causal_conv1d'"),
    (dict(packages=PACKAGES[:2]), "No module named 'transformers.modeling_attn_mask_utils'"),
    (dict(code=STAND_IN), "'list' object has no attribute 'device'")])
def test_published_code_that_cannot_run(arranged, message, tmp_path, monkeypatch):
    if message.startswith("'list'") and torch.cuda.is_available():
        pytest.skip("a fault of the published code on CPUs, and here it runs on a GPU")
    directory, site = published_code(tmp_path, **arranged)
    monkeypatch.setenv("PYTHONPATH", str(site))
    with pytest.raises(ValueError, match=f"could not be run: .*{re.escape(message)}\n"):
        official.reference(directory, tmp_path / "reference.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "site"]
    assert message in (HERE / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("args, message", [
    ("--checkpoint=nvidia/NAME", "nvidia/NAME is not a directory here; if it is a name on the "
     "Hugging Face Hub, first: hf download NAME --local-dir DIR"),
    ("--checkpoint=golden", "golden holds no config.json"),
    ("--checkpoint=golden/cfg1", "golden/cfg1 holds no " + official.CODE),
    ("--checkpoint=golden/cfg1 --reference=nowhere/file", "no folder to write nowhere/file to"),
    ("--checkpoint=golden/cfg1 --official-python=no/python", "no/python is not a program"),
    ("--reference=FILE", "--reference and --official-python need --checkpoint=DIR")])
def test_wrong_options_of_the_comparison(args, message):
    run = run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", "test_twotower.py",
                     *args.split(), status=pytest.ExitCode.USAGE_ERROR)
    assert not run.stdout
    assert run.stderr.startswith("ERROR: ") and message in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1


def test_the_published_code_in_an_environment_of_its_own(tmp_path):
    """Another interpreter, with another transformers and no pytest to import; it runs once, also
    with -n 2, also where the project's folder is called official; then it is not needed."""
    counting = "open(__file__ + '.runs', 'a').write('*')\n" + REPAIRED
    directory, site = published_code(tmp_path, counting)
    second, reference = tmp_path / "second", tmp_path / "reference.safetensors"
    venv.create(second, symlinks=True)
    packages, = second.glob("lib/python*/site-packages")
    # torch is the one of this environment
    (packages / "first.pth").write_text("\n".join([
        str(site), *(path for path in sys.path if path.endswith("-packages")),
        "import sys; sys.modules['pytest'] = None"]))
    (tmp_path / "official").symlink_to(HERE)
    run = run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", 2, "test_twotower.py",
                     "--checkpoint", directory, "--reference", reference,
                     "--official-python", second / "bin" / "python", cwd=tmp_path / "official")
    assert "5 passed" in run.stdout
    runs = directory / f"{official.CODE}.runs"
    assert runs.read_text() == "*"
    assert official.reference(directory, reference) and runs.read_text() == "*"
    reference.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="is not a reference file"):
        official.reference(directory, reference)


# ------------------------------------------------------------------------------------- the rest

def test_readme():
    """The set-up lines install what CI does, and the second shows blocks being denoised; the test
    line is CI's; the Python lines run as they stand; what is linked is there, and so is every
    flag."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    commands, = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    setup, show = commands.splitlines()
    *_, install, test = (HERE / ".ci" / "run").read_text().splitlines()
    assert setup.endswith("cd twotower && pip install -r requirements.txt")
    assert " -r requirements.txt" in install and f"`{test}`" in text
    assert show == "python sample.py"
    run = run_python("sample.py", stdin=subprocess.DEVNULL)
    asked, source = cli.DEFAULT_PROMPT.split("\n", 1)
    (old, _, new, _), source = re.findall(r"\w+", asked)[1:], source.removesuffix("---\n")
    answer = re.sub(rf"\b{old}\b", new, source)
    assert run.stdout.startswith(cli.DEFAULT_PROMPT) and run.stdout.endswith(f"\n\n{answer}")
    lines = run.stdout.removeprefix(cli.DEFAULT_PROMPT).removesuffix(answer).splitlines()
    lines = [line for line in lines if line.startswith(("block ", "       "))]
    masks = [line.count("\u2591") for line in lines]
    assert masks[0] == 16 and 0 in masks and any(0 < count < 16 for count in masks)
    assert sum(line.startswith("block ") for line in lines) == masks.count(16) == 6
    assert f"{source}---\n" in (HERE / "tutorial.md").read_text(encoding="utf-8")
    assert re.match(r"[\d.]+ tokens/s, ", run.stderr)
    code, = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    run = run_python("-c", code)
    answer, passes = re.fullmatch(r"(.*}) (\d+) denoiser passes\n", run.stdout).groups()
    asked = record(re.search(r'"(json .*?)\\n', code)[1])
    assert json.loads(answer) == asked | {"count": 39, "age": 72} and 0 < int(passes) < 48
    assert len(code.splitlines()) == 5 and len(text.splitlines()) <= 140
    for link in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (HERE / link).exists(), link
    for program, flags in re.findall(r"python (\w+\.py)(.*)", text):
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", flags):
            # as a flag, which may have other names beside, or a parameter that makes one
            names = f'"{flag}"', f'"{flag} ', f"{flag[2:]}: ", f'"{flag[2:]} '
            source = (HERE / program).read_text(encoding="utf-8")
            assert any(name in source for name in names), (program, flag)


def test_figures(tmp_path, monkeypatch):
    """All are drawn, computed or of what was measured; figures/ holds no others."""
    make = importlib.import_module("figures.make")
    monkeypatch.setattr(make, "OUT", tmp_path)
    make.main()
    assert {path.name for path in tmp_path.iterdir()} == set(
        re.findall(r"\w+\.(?:png|gif)", make.__doc__.split("These are computed")[0]))
    rows = [{"task": "mean", "mode": mode, "value": 0.5, "speedup": 2.0}
            for mode in ("ar", "mask_diffusion 0.8", "speculative")]
    table = [{"batch": 1, "1 passes": 5.0, "2 passes": 3.0}]
    for what, result in (("evaluate", {"rows": rows}), ("gpu", {
            "gpu": "X", "random_speed_up": table, "concentrated_speed_up": table})):
        result["setting"] = {"what": what, "batch_size": "16"}
        (tmp_path / "printed").write_text(f"a table\n{json.dumps(result)}\n")
        make.measured(tmp_path / "printed")
    drawn, kept = ({path.name for path in folder.iterdir() if path.suffix in (".png", ".gif")}
                   for folder in (tmp_path, HERE / "figures"))
    assert drawn == kept


def test_tutorial():
    """Quotes stand in the code, checks print what it says, links lead somewhere."""
    text = (HERE / "tutorial.md").read_text(encoding="utf-8")
    assert len(text.split()) < 8000
    make = importlib.import_module("figures.make")
    assert make.with_line_numbers(text) == text, "run python figures/make.py"
    for link in re.findall(r"\]\(([^)#]+)(?:#L\d+)?\)", text):
        assert (HERE / link).is_file(), link
    quotes, checks = 0, []
    blocks = re.findall(r"```(py|python)\n(.*?)```\n(```text\n(.*?)```)?", text, re.DOTALL)
    for fence, code, _, printed in blocks:
        quoted = re.match(r"# (\w+)\.py: ([\w.]+)\n", code)
        assert (fence == "py") == bool(quoted), code        # as a notebook runs python, not py
        if quoted is None:
            assert len(code.splitlines()) <= 10 and max(map(len, code.splitlines())) <= 130, code
            checks.append((code, printed))
            continue
        path, at = HERE / f"{quoted[1]}.py", 0
        source = path.read_text(encoding="utf-8").split("\n", make.lines_of(path)[quoted[2]])[-1]
        source = re.split(r"\n(?=class|def|@)", source)[0]
        for piece in re.split(r"\n *\.\.\.\n", code[quoted.end():].rstrip()):
            at = source.find(piece, at)
            assert at >= 0, f"not in {quoted[2]}:\n{piece}"
        quotes += 1
    assert quotes >= 6 and len(checks) >= 15
    run = run_python("-c", "".join(f"{code}print(end='\f')\n" for code, _ in checks))
    for (code, expected), printed in zip(checks, run.stdout.split("\f")):
        assert printed == expected, f"{code}prints\n{printed}"
    measured = (HERE / "miniature" / "README.md").read_text(encoding="utf-8")
    table = text[text.index("| claim | published | here |"):].split("\n\n")[0]
    here = re.findall(r"\d+(?:\.\d+)?(?: %|x)", "".join(row.split("|")[3] for row in
                                                       table.splitlines()[2:] if row))
    assert here and all(number in measured for number in here), here


def test_tutorial_as_notebook(tmp_path):
    """The line of README.md makes a notebook that runs from top to bottom and prints the same."""
    for package in ("jupytext", "nbconvert", "ipykernel"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    from nbconvert.preprocessors import ExecutePreprocessor
    from nbformat import read

    line, = re.findall(r"`(jupytext .*?)`", (HERE / "README.md").read_text(encoding="utf-8"))
    assert line == "jupytext --to notebook tutorial.md"
    run = run_python("-m", *line.split(), "--output", tmp_path / "tutorial.ipynb")
    notebook = read(tmp_path / "tutorial.ipynb", as_version=4)
    run = ExecutePreprocessor(kernel_name="python3", timeout=300)
    run.preprocess(notebook, {"metadata": {"path": str(HERE)}})
    printed = ["".join(output.text for output in cell.outputs if output.get("name") == "stdout")
               for cell in notebook.cells if cell.cell_type == "code"]
    text = (HERE / "tutorial.md").read_text(encoding="utf-8")
    assert printed == re.findall(r"```python\n.*?```\n(?:```text\n(.*?)```)?", text, re.DOTALL)


@needs_kernels
def test_bench_gpu_counts_what_must_move(capsys, monkeypatch):
    """On a small model and the CPU; no speed where a replay goes wrong."""
    # 3.70 GB outside the experts, 0.459 GB an expert in 23 layers, 0.05 GB of states
    for gigabytes, *of in (6.50, 6, 1, 0, 1), (19.36, 34, 1, 0, 1), (66.4, 128, 1, 2048, 64):
        assert abs(bench.cost_of_pass(TwoTowerConfig(), *of).bytes / 1e9 - gigabytes) < 0.06
    step, token, two = (bench.cost_of_pass(bench.SMALL, 3, n, 40, rows, logits=n)
                        for n, rows in ((16, 1), (1, 1), (16, 2)))
    assert two.flops == 2 * step.flops > 20 * token.flops
    model = TwoTower(bench.SMALL).eval()
    times, extend = iter(range(1, 100)), kernels.Passes.extend
    monkeypatch.setattr(bench, "kernels", lambda: kernels)
    bench.concentrate_routing(model, 3)
    with torch.no_grad():
        rows, table = bench.table_of_passes(
            model, (1, 2), 40, lambda run: (run(), float(next(times)))[1], (1e9, 1e9))
    assert [row["pass"] for row in rows[:3]] == ["AR token", "denoiser step", "block extension"]
    assert rows[0]["experts"] == 2 and rows[2]["experts"] == 3
    ar, denoise, extension = (row["graphs_ms"] for row in rows[3:])
    assert table[1]["2 passes"] == 16 * ar / (2 * denoise + extension)
    assert table[1]["ar_tokens_per_second"] == 2e3 / ar

    ours = []

    def forgetful(self, context, *args):        # a state is not written back, by the second Passes
        ours.append(self)
        mamba = kernels.mamba_states(context)
        states = [state.map(torch.clone) for state in mamba]
        out = extend(self, context, *args)
        for state, old in zip(mamba, states if self is not ours[0] else []):
            state.ssm_state.copy_(old.ssm_state)
        return out

    monkeypatch.setattr(kernels.Passes, "extend", forgetful)
    with torch.no_grad(), pytest.raises(ValueError, match="recorded passes differ"):
        bench.check_replays(model, 2, 40)
    if not torch.cuda.is_available():
        capsys.readouterr()
        assert "needs a CUDA device" in refused(bench, capsys, "gpu")


def test_transformers_does_not_find_our_kernels(tmp_path, monkeypatch):
    """Where the package `kernels` is installed, transformers imports it by a name that is ours."""
    (tmp_path / "kernels.py").touch()
    monkeypatch.chdir(HERE)
    monkeypatch.setattr(sys, "path", ["", str(HERE), str(tmp_path), *sys.path])
    found = lambda: Path(importlib.machinery.PathFinder.find_spec("kernels").origin)
    before = found()
    with bench.without_this_folder():
        assert found() == tmp_path / "kernels.py"
    assert found() == before == HERE / "kernels.py"


def test_bench_cpu_runs(capsys, monkeypatch):
    """One round: both context towers agree, the last line is JSON."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    monkeypatch.setattr(bench, "LENGTHS", (256, 512))
    bench.main(["cpu", "--rounds", "1", "--threads", "1"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert all(value > 0 for name, value in result.items() if name not in ("setting", "growth"))
    assert [row["context"] for row in result["growth"]] == [256, 512]
    # 2 attention layers, keys and values, 2 heads of 64 float32
    assert result["kv_bytes_per_token"] == 2 * 2 * 2 * 64 * 4
