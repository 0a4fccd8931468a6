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
import dataclasses
import difflib
import functools
import importlib.util
import inspect
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
import venv
import weakref
import zlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"        # before kernels.py is imported

import bench
import corpus
import official
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


def run_python(*args, cwd: Path = HERE, **options) -> subprocess.CompletedProcess:
    args = [arg if isinstance(arg, bytes) else str(arg) for arg in args]
    return subprocess.run([sys.executable, *args], capture_output=True, text=True,
                          encoding="utf-8", cwd=cwd, **options)


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
        mask_token_id=3)
    assert (config.d_inner, config.conv_dim) == (4096, 6144)
    with torch.device("meta"):
        model = TwoTower(config).to(torch.bfloat16)
    tower = model.context_tower
    count = lambda *parts: sum(p.numel() for part in parts for p in part.parameters())
    assert round(count(tower, model.context_lm_head) / 1e9, 3) == 31.578
    moe = [layer.mixer for layer in tower.layers if layer.kind == "E"]
    assert round(count(*moe) / 1e9, 3) == 29.842
    keys = [key for parts in twotower.checkpoint_tensors(model).values() for key, _ in parts]
    assert len(keys) == len(set(keys)) == 12544
    caches, states = ([state for state in Context(tower, 1, 1).states if isinstance(state, kind)]
                      for kind in (KVCache, MambaState))
    assert sum(cache.key_cache.nbytes + cache.value_cache.nbytes for cache in caches) == 6144
    assert round(sum(state.ssm_state.nbytes for state in states) / 1e6, 1) == 48.2


def test_config_files(tmp_path):
    """They must hold what they always hold, and may hold more; our own constructor may not."""
    always = {name: value for name, value in TINY.items() if name != "max_position_embeddings"}
    written = json.dumps(always | {"rope_theta": 1, "time_step_limit": [0.0, math.inf]})
    assert "Infinity" in written
    (tmp_path / "config.json").write_text(written)
    assert TwoTowerConfig.from_json(tmp_path / "config.json") == TwoTowerConfig(**always)
    for name in always:
        refuses(f"config: field '{name}' is missing", TwoTowerConfig.from_dict,
                {key: always[key] for key in always if key != name})
    with pytest.raises(TypeError, match="rope_theta"):
        TwoTowerConfig(rope_theta=1)
    assert TwoTowerConfig(time_step_limit=None) == TwoTowerConfig(time_step_limit=[0.0, math.inf])


def test_config_rules_at_their_edges():
    """What is still possible, and what no longer is."""
    for fields in (dict(n_group=4, topk_group=4), dict(num_experts_per_tok=8), dict(chunk_size=1),
                   dict(eos_token_id=None, bos_token_id=0, pad_token_id=63),
                   dict(time_step_min=0.1), dict(time_step_limit=(0.3, 0.3)),
                   dict(layer_norm_epsilon=1)):
        assert dataclasses.asdict(TwoTowerConfig(**TINY | fields)).items() >= fields.items()
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
            ("bos_token_id", "it must be an id below vocab_size 64", 64, -1, 2.0),
            ("mask_token_id", "it must be an id", 64), ("mask_token_id", "decoding needs", None),
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


@pytest.mark.parametrize("L", [1, 3, 15, 16, 17, 129])
def test_scan(L):
    inputs = scan_inputs(L)
    y, h = scan_by_definition(**inputs)
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        given = {name: tensor.to(dtype) for name, tensor in inputs.items()}
        for chunk_size, keep in itertools.product((1, 8, 16, 128), ("end", "blocks", "inputs")):
            out, state = twotower.ssd_scan(**given, chunk_size=chunk_size, keep=keep)
            check(out, y, limit)
            if keep == "inputs":
                assert state is None
            else:
                check(state, h[:, -1] if keep == "end" else h[:, :L:chunk_size], limit)
        assert torch.equal(given["state"], inputs["state"].to(dtype))
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
        given = [v.to(dtype) for v in (inputs, weight, *biases)] + [None] * (not biases)
        check(twotower.causal_conv1d(*given), ref / (1 + torch.exp(-ref)), limit)
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
            (twotower.causal_conv1d, inputs, taps, z[0]),
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
        kept = MambaState(torch.zeros(2, 3, 1), state, (torch.zeros(2, 23, 1), x, dt, A, B))
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


def test_attention():
    B, H, G, L, S, K = 2, 6, 2, 5, 9, 8
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
        check(twotower.attention(q, k[:, :, keys], v[:, :, keys], **arguments), ref, 1e-12)


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


@pytest.mark.parametrize("lengths", [(0, 0), (7, 7), (3, 0), (2, 9)])
def test_a_pass_says_less_where_it_can_and_means_the_same(lengths):
    """By the rule of `attention` a query sees the slots up to its own, or up to its row's last."""
    context = Context(random_model().context_tower, 2, 0)
    context.lengths = torch.tensor(lengths)
    for L, causal in itertools.product((1, 5), (True, False)):
        own, end = context.lengths[:, None] + torch.arange(L), max(lengths) + L
        for at in (context.next_pass(L, "cpu", causal=causal, counts=torch.tensor([L, L])),
                   Pass.behind(context.lengths, L, end, causal=causal)):
            assert at.slots.equal(own) and (at.end, at.keep) == (end, "none")
            assert at.counts is at.mask is None and not (at.is_causal and (at.last_seen or end > L))
            last = (torch.arange(L) if at.is_causal else
                    torch.tensor(end - 1) if at.last_seen is None else at.last_seen)
            assert last.expand(2, L).equal(own if causal else own[:, -1:].expand(2, L))
        at = context.next_pass(L, "cpu", causal=causal, counts=torch.tensor([L, 1]), keep="inputs")
        assert (at.counts is None) == (L == 1) and at.keep == "inputs"


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
    old = cache.key_cache, cache.value_cache
    torch.use_deterministic_algorithms(True)            # NaN in memory that is not initialised
    model.extend(context, ids(1, 1))                    # 71 tokens in 70 slots: it doubles
    torch.use_deterministic_algorithms(False)
    for small, grown in zip(old, (cache.key_cache, cache.value_cache)):
        assert grown.shape[2] == 140 and (grown[:, :, 71:] == 0).all()
        assert grown[:, :, :70].equal(small)
    # nor does a state keep the whole prompt's activations alive
    conv_state = context.states[0].conv_state
    assert conv_state.untyped_storage().nbytes() == conv_state.nbytes


@pytest.mark.parametrize("odd", [False, True])
def test_only_the_first_tokens_of_a_pass_may_be_kept(odd):
    """Any number of them in any row, as if only these had been read."""
    model = random_model(odd)
    block, after = ids(5, 16, seed=3), ids(5, 3, seed=4)
    for n in range(1, 17):
        counts = torch.tensor([n, 17 - n, 1, 16, n])
        context = model.prefill(PROMPTS, reserve=20)
        logits = model._extend(context, block, "all", keep="inputs")
        context.settle(counts)
        assert context.logits is None
        for row in range(5) if n in (1, 16) else range(2):
            read = model.prefill([torch.cat([PROMPTS[row], block[row, :counts[row]]])])
            assert context.lengths[row] == read.lengths[0]
            check(logits[row, counts[row] - 1], read.logits[0], 1e-10)
            check_states(context, row, read)
        if n == 5:
            whole = torch.cat([PROMPTS[0], block[0, :5], after[0]])
            check(model.extend(context, after)[0], model.context_logits(whole[None])[0, -3:], 1e-10)


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
    out, read = {}, dict(causal=True, keep="end")
    for prefix, limit, texts in (("tsl_", (0.05, 0.3), {"out": "x", "step": "x3"}),
                                 ("", (0.0, math.inf), {"out": "x", "out2": "x2", "out3": "x3"})):
        config.time_step_limit, state = limit, mamba.empty_state(2, 0)
        for name, text in texts.items():
            x = get(f"mamba/{text}")
            out[f"mamba/{prefix}{name}"] = mamba(x, state, at(x.shape[1], **read))
            if not prefix:                              # copies: later calls change it in place
                out[f"mamba/conv{text[1:]}"] = state.conv_state.mT.clone()
                out[f"mamba/ssm{text[1:]}"] = state.ssm_state.clone()
    out["gnorm/out"] = twotower.gated_rms_norm(get("gnorm/x"), get("gnorm/z"), mamba.norm.weight,
                                               config.n_groups, config.layer_norm_epsilon)
    out["rms/out"] = twotower.rms_norm(get("rms/x"), layers[0].norm.weight, layers[0].eps)
    x = get("router/x")
    out |= {"moe/out": moe(x), "moe/shared": moe.shared_experts(x)}
    topk_ids, topk_weights = moe.gate(x.flatten(0, 1))
    out["router/topk_sorted"] = topk_ids.sort(-1).values
    out["router/dense_weights"] = torch.zeros(24, 8).double().scatter(1, topk_ids, topk_weights)
    everyone = torch.zeros(24, 1, dtype=torch.long)
    up, down = moe.experts["up_proj"].weight, moe.experts["down_proj"].weight
    expert0 = twotower.moe_experts(x.flatten(0, 1), everyone, everyone + 1.0, up, down)
    out["moe/expert0"] = expert0.view(x.shape)
    cache = attention.empty_state(2, 0)
    out["attn/out"] = attention(get("attn/x"), cache, at(7, causal=True))
    out["attn/k"] = cache.key_cache[:, :, :7].clone()
    out["attn/v"] = cache.value_cache[:, :, :7].clone()
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
        assert out["mamba/ssm"].dtype == torch.float32 and out["mamba/conv"].dtype == dtype
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
    for name, part in zip(("shift", "scale", "gate"), model._modulations(torch.full((2,), 0.5))[1]):
        check(part[:, 0], data[f"den_hidden/{name}.1"], 3e-5, name)
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


def test_context_tower_equals_transformers():
    """Code that nobody here wrote, on the golden weights: prefill, then tokens one by one."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    data, _, model = golden("cfg1")
    transformers.logging.set_verbosity_error()
    theirs, prompt, block = bench.as_transformers(model), data["ids/prompt37"], data["ids/block16"]
    with torch.no_grad():
        out = theirs(prompt, use_cache=True)
        check(model.context_logits(prompt), out.logits, 3e-5)
        context = model.prefill(prompt)
        for token in block.split(1, dim=1):
            out = theirs(token, past_key_values=out.past_key_values, use_cache=True)
            check(model.extend(context, token), out.logits, 3e-5)



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
    """Log-probabilities one by one, of ragged rows around block, chunk and pass edges. A pass's
    logits are made only if they are used, and are gone before the next pass makes its own."""
    model, made = random_model.__wrapped__(), []

    def making(module, args, out):
        assert not made or made[-1][0]() is None
        made.append((weakref.ref(out), out.shape[1]))
    texts = [(ids(total - new, seed=total), ids(new, seed=new)) for total, new in (
        (2, 1), (16, 1), (16, 15), (17, 16), (18, 1), (33, 16), (34, 33), (49, 20))]
    for some in (texts, texts[-1:]):
        hook = model.context_lm_head.register_forward_hook(making)
        scores = model.score(*zip(*some), tokens_per_pass)
        hook.remove()
        for row, (prompt, continuation) in enumerate(some):
            p = model.context_logits(torch.cat([prompt, continuation])[None])[0].log_softmax(-1)
            expected = p[len(prompt) - 1:-1].gather(1, continuation[:, None])[:, 0]
            assert error(scores.tokens[row], expected) < 1e-10
            assert error(scores.total[row], expected.sum()) < 1e-10
    first = 28 // tokens_per_pass                       # of the second run: 29 + 20 tokens
    assert len(made) == math.ceil(48 / tokens_per_pass) * 2 - first
    assert max(width for _, width in made) == min(tokens_per_pass, 48)
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
    assert 0 < masked.sum() < 96
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
    """They reach all that is trained, nothing frozen, and equal central differences along a random
    direction of all parameters, then of the tensors of each kind."""
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


def test_the_denoiser_starts_as_a_copy_and_what_is_written_can_be_trained_on():
    model = random_model.__wrapped__()
    model.copy_context_to_denoiser()
    for name, tensor in model.state_dict().items():
        if name.startswith("context_"):
            name = name.replace("context_tower", "denoiser_tower").replace("context_lm", "lm")
            assert torch.equal(model.state_dict()[name], tensor)
    result = model.generate_ar(ids(1, 5), 8)
    model.ar_loss(result.tokens[0][None]).backward()
    result.nfe.add_(1)


# ------------------------------------------------------------------- decoding: choosing tokens

def test_golden_sampling():
    """Also: top_p keeps the token that takes the total past it; a tiny temperature is greedy."""
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
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    for top_p, kept in ((0.4, 1), (0.6, 2), (0.8, 3), (0.9, 4), (1.0, 4)):
        assert int(twotower.shape_logits(logits, 1.0, top_p=top_p).isfinite().sum()) == kept
    shaped = twotower.shape_logits(randn(5, 40).float(), 1e-300)
    assert shaped.isfinite().all() and shaped.argmax(-1).equal(randn(5, 40).argmax(-1))


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
    """Tokens, passes of both towers and steps, also when rows end at different times; draws too, at
    any place in the batch; and a denoiser elsewhere ("cpu:0" here) changes nothing."""
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
    assert [(row[-1].nfe, row[-1].context_passes) for row in told] == list(
        zip(result.nfe.tolist(), result.context_passes.tolist()))
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
        assert not (step.committed & ~masked).any()
        assert torch.equal(step.after[~step.committed], step.before[~step.committed])
        assert (step.committed.sum(-1) >= masked.any(-1).long()).all()
        assert torch.equal(step.t, masked.float().mean(-1))
        assert step.step < steps
    assert (result.nfe <= steps * math.ceil(24 / block_size)).all()



def templates_of(kind: str, n: int, seed: int = 0) -> torch.Tensor:
    holes = {"fixed": torch.zeros(n), "holes": torch.ones(n), "start": torch.arange(n) < n // 3,
             "end": torch.arange(n) >= n // 3, "alternating": torch.arange(n) % 2,
             "random": torch.rand(n, generator=seeded(seed)) < 0.5}[kind].bool()
    return ids(n, seed=seed).masked_fill(holes, MASK)


def test_templates_are_kept():
    """Fixed tokens from the first step on; blocks without holes cost nothing; each row as alone."""
    model, steps = random_model(), []
    prompts, templates = PROMPTS + [ids(5)], [templates_of(kind, n, n) for kind, n in (
        ("random", 21), ("fixed", 8), ("alternating", 30), ("start", 3), ("end", 17),
        ("holes", 21))]
    generate = functools.partial(model.generate_mask_diffusion, block_size=8)
    result = generate(prompts, template=templates, on_step=steps.append)
    for row, (text, template) in enumerate(zip(result.tokens, templates, strict=True)):
        assert MASK not in text
        assert torch.equal(text.masked_fill(template == MASK, MASK), template)
        seen = [(s, s.rows.index(row)) for s in steps if row in s.rows]
        for step, r in seen:
            own = template[step.block_index * 8:][:8]
            shown = step.before[r, :len(own)]
            assert torch.equal(shown[own != MASK], own[own != MASK])
            assert step.t[r] == (step.before[r] == MASK).float().mean()
        blocks = {step.block_index for step, r in seen if step.committed[r].any()}
        assert blocks == {b for b in range(4) if (template[b * 8:b * 8 + 8] == MASK).any()}
        alone = generate([prompts[row]], template=template.tolist())
        assert alone.tokens[0].equal(text) and (alone.nfe[0], alone.context_passes[0]) == (
            result.nfe[row], result.context_passes[row])
    plain = generate([prompts[5]], 21).tokens[0]
    assert result.nfe[1] == 0 and torch.equal(text[:16], plain[:16])


def test_two_thousand_templates_survive():
    """Rows with templates of their own, some followed by free text, EOS anywhere in the holes."""
    torch.manual_seed(0)
    model = TwoTower(TwoTowerConfig(**TINY | dict(hybrid_override_pattern="M*",
                                                  num_hidden_layers=2))).eval()
    templates = [templates_of("random", 1 + seed * 7 % 13, seed) for seed in range(2000)]
    lengths = [len(template) + 3 * (seed % 2) for seed, template in enumerate(templates)]
    result = model.generate_mask_diffusion(
        list(ids(2000, 2)), lengths, block_size=4, steps_per_block=2, eos_token_id=9,
        template=templates, temperature=2.0, seed=0)
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
               for task in corpus.KNOWN
               for prompt, _ in items(task, 40, held_out=True)]
    for rows in prompts, prompts[90:91]:
        share = check_that_both_write_the_same(model, rows, 70, 16, eos_token_id=2, **knobs)
        assert knobs or share < 0.3
    knobs, model = knobs | dict(eos_token_id=11), golden("cfg1")[2]
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
    for n in (1, 2):
        result = model.generate_speculative(prompt, n)
        assert (result.nfe.tolist(), result.context_passes.tolist()) == ([0], [n])


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
            ("or one sequence of them (or None) for each of 1 ", [[5, 7], [6]]),
            ("template 0 has 3 tokens, more than the 2", [5, 3, 7], 2)):
        refuses(message, diffusion, *more, template=template)
    for message, template in ((f"template 1 {int64} (1 or more)", [[5], []]),
                              ("max_new_tokens is None, but it must be", [[5], None])):
        refuses(message, model.generate_mask_diffusion, [one[0]] * 2, template=template)
    refuses(f"5000 {too_many}", diffusion, 8, block_size=5000)
    for name, *values in (("temperature", -1, math.nan, math.inf), ("eos_token_id", 128, [2, 4]),
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
    run = Decoding(model, [[5]] * 5, 9)
    run.live, run.block_index, bad = [1, 4], 2, torch.tensor([[0.5, math.nan], [0.5, math.inf]])
    used = torch.tensor([[True, False], [True, False]])
    run.check_finite(bad, used, 3)
    used[1, 1] = True
    refuses("row 4, block 2, step 3, position 1", run.check_finite, bad, used, 3)


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
    refuses("a context tower alone must not replace", loaded.save_pretrained, tmp_path)
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
    context = loaded.prefill(ids(1, 20))
    assert context.states[0].ssm_state.dtype == context.logits.dtype == torch.float32
    assert context.states[0].conv_state.dtype == context.states[3].key_cache.dtype == torch.bfloat16


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
def test_memory_while_loading(tmp_path):
    """Peak host memory of a 2 GB checkpoint: the weights and at most a tenth more."""
    write_headers(tmp_path, TINY | dict(hidden_size=1024, vocab_size=16384, n_routed_experts=64,
                                        moe_intermediate_size=1920), 4)
    size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    script = """
import re, sys
from twotower import TwoTower
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = peak()
model = TwoTower.from_pretrained(sys.argv[1])
print(peak() - before)
"""
    run = run_python("-c", script, tmp_path)
    assert size > 2e9 and run.returncode == 0, run.stderr
    assert 0.9 * size < int(run.stdout) < 1.1 * size


def write_headers(directory: Path, fields: dict, shards: int) -> int:
    """A checkpoint of bfloat16 tensors (float32 routers) without data: the files are holes."""
    with torch.device("meta"):
        model = TwoTower(TwoTowerConfig(**fields))
    parts = [pair for pairs in twotower.checkpoint_tensors(model).values() for pair in pairs]
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
    assert run.returncode == 0 and run.stdout == "20\n", run.stderr


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
config = lambda **changes: lambda d: edit_json(d / "config.json", lambda c: c.update(changes))
index = lambda change: lambda d: edit_json(d / twotower.INDEX, lambda i: change(i["weight_map"]))
weights = lambda change, name="model.safetensors": lambda d: edit_tensors(d / name, change)
put = lambda key, tensor, *name: weights(lambda tensors: tensors.update({key: tensor}), *name)

UP = "denoiser_tower.layers.1.mixer.experts.3.up_proj.weight"
FIRST, SHARD = "context_tower.embeddings.weight", "model-00002-of-00005.safetensors"
# what is wrong -> (how to break a checkpoint, what the one line must say)
BROKEN = {
    "config missing": (gone("config.json"), "config.json is missing"),
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


# ---------------------------------------------------------------------------------- the kernels

try:
    kernels = twotower.kernels()
except ValueError:
    kernels = None


def needs_kernels(test):
    """Skipped without triton; its interpreter's warnings, about masked tails, are not shown."""
    quiet = pytest.mark.filterwarnings("ignore::RuntimeWarning")
    return quiet(pytest.mark.skipif(kernels is None, reason="triton is not installed")(test))


DEVICE = "cuda" if kernels and not kernels.INTERPRETED else "cpu"
# Triton's interpreter multiplies bfloat16 wrongly: that is for GPUs
KERNEL_DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
CASES = {f"{case.operation}, {case.what}, {str(dtype).removeprefix('torch.')}": case
         for dtype in KERNEL_DTYPES
         for case in (kernels.cases(dtype, DEVICE, full_size=False) if kernels else ())}


@needs_kernels
@pytest.mark.parametrize("name", CASES)
def test_kernel(name):
    """Within the limit of float64 on the same inputs; zeros and a permuted answer would not be."""
    case = CASES[name]
    assert case.error() <= case.limit
    for right in case.reference():
        rolled = [right.roll(1, dim) for dim in range(right.dim()) if right.shape[dim] > 1]
        for wrong in (torch.zeros_like(right), *rolled):
            assert kernels.relative_rms(wrong, right) > 10 * case.limit


@needs_kernels
def test_every_operation_has_a_kernel():
    assert {case.operation for case in CASES.values()} == set(twotower.OPERATIONS)
    for name in twotower.OPERATIONS:
        ours, theirs = (inspect.signature(getattr(m, name)) for m in (kernels, twotower))
        assert list(ours.parameters) == list(theirs.parameters)


@needs_kernels
@torch.no_grad()
def test_kernels_keep_what_is_not_finite():
    """relu, clamp and argmax may not lose NaN, as maximum does on a GPU; ties go to the first."""
    logits, ones = torch.zeros(4, 3000, device=DEVICE), torch.ones(1, 16, device=DEVICE)
    logits[1, 2999], logits[2, 5], logits[3, [7, 2000]] = math.nan, math.inf, 1.0
    chosen, confidence = kernels.most_likely(logits, 0)
    assert chosen[[0, 3]].tolist() == [1, 7]
    assert confidence.isfinite().tolist() == [True, False, False, True]
    experts, weights = torch.tensor([[0, 1]], device=DEVICE), torch.ones(2, 16, 16, device=DEVICE)
    bad = torch.stack([weights[0], weights[1] * math.nan])
    assert kernels.moe_experts(ones, experts, ones[:, :2], bad, weights).isnan().all()
    assert kernels.ssd_rates(bad[1:], ones[0], ones[0], (0.0, 1.0))[0].isnan().all()
    config = TwoTowerConfig(**TINY)
    chosen, of_nan = kernels.route(ones * math.nan, weights[0, :5], ones[0, :5], config)
    assert of_nan.isnan().all() and (chosen < 5).all()


def far(x: torch.Tensor) -> torch.Tensor:
    """The same three rows 2^30 elements apart: a stride of 32 bits, and an offset of more."""
    far_apart = 2**30 + 64
    room = torch.empty(2 * far_apart + x[0].numel(), dtype=x.dtype, device=x.device)
    return room.as_strided(x.shape, (far_apart, *x[0].contiguous().stride())).copy_(x)


@needs_kernels
@pytest.mark.parametrize("operation", ["causal_conv1d", "gated_rms_norm", "ssd_rates", "ssd_scan",
                                       "ssd_step", "attention", "most_likely"])
@torch.no_grad()
def test_kernels_reach_beyond_32_bit_offsets(operation):
    """With the last row of an argument there, the answer is that of rows nearby to the last bit."""
    f32 = torch.float32
    rand = lambda *shape, dtype=torch.float16: randn(*shape, seed=sum(shape)).to(DEVICE, dtype)
    x, B, C = rand(3, 20, 2, 16), rand(3, 20, 1, 16), rand(3, 20, 1, 16)
    state, dt = rand(3, 2, 16, 16, dtype=f32), rand(3, 20, 2, dtype=f32).abs()
    A, D = -rand(2, dtype=f32).abs(), rand(2)
    args, strided = {
        "causal_conv1d": ((rand(3, 8, 24), rand(24, 1, 4), None), [0]),
        "gated_rms_norm": ((rand(3, 24), rand(3, 24), rand(24), 2, 1e-5), [1]),
        "ssd_rates": ((dt.half(), D, D, (0.0, math.inf)), [0]),
        "ssd_scan": ((x, dt, A, B, C, D, state, 16), [0, 1, 3, 4]),
        "ssd_step": ((x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, state), [0, 3, 4]),
        "attention": ((rand(3, 2, 5, 16), rand(3, 1, 40, 16), rand(3, 1, 40, 16), None, False,
                       rand(3, 1, 5, 40) > -1), [0, 1, 2, 5]),
        "most_likely": ((rand(3, 300, dtype=f32), 3), [0])}[operation]
    run = getattr(kernels, operation)
    outputs = lambda result: [result] if isinstance(result, torch.Tensor) else result
    near = outputs(run(*args))
    for ours, right in zip(near, outputs(getattr(twotower, operation)(*args)), strict=True):
        check(ours, right, 5e-3)
    for i in strided:                       # one at a time: each takes 4 to 9 GB of addresses
        there = outputs(run(*args[:i], far(args[i]), *args[i + 1:]))
        for ours, theirs in zip(there, near, strict=True):
            assert torch.equal(ours, theirs), i


@needs_kernels
@torch.no_grad()
def test_experts_beyond_32_bit_offsets():
    E, F_, D = 512, 1024, 4224                                              # 2.2e9 numbers
    x, weights = torch.randn(1, D, device=DEVICE).half(), torch.tensor([[0.7]], device=DEVICE)
    last = torch.tensor([[E - 1]], device=DEVICE)
    few = [torch.randn(2, *shape, device=DEVICE).half() / 40 for shape in ((F_, D), (D, F_))]
    many = [torch.empty(E, *w.shape[1:], dtype=w.dtype, device=DEVICE) for w in few]
    for w, all_ in zip(few, many):
        all_[-1] = w[1]
    near = twotower.moe_experts(x, last.clamp(max=1), weights, *few)
    check(kernels.moe_experts(x, last, weights, *many), near, 5e-3)


@needs_kernels
def test_kernels_compile_for_an_h100():
    """At the released sizes, without a GPU: what the compiler refuses, and what would not fit."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = run_python("kernels.py", "--compile", env=env)
    assert run.returncode == 0, run.stderr
    lines = [line.split() for line in run.stdout.splitlines()]
    written = re.findall(r"@triton\.jit\ndef (\w+)", (HERE / "kernels.py").read_text())
    assert {line[0] for line in lines} == set(written)
    for name, registers, _, spilled, _, _, shared, *rest in lines:
        assert int(registers) <= 255 and spilled == "0" and int(shared) <= 227 * 1024, name
        # no fewer slots than threads, whose copies its histogram would count on a GPU
        assert name != "_group_kernel" or int(rest[-1]) >= 128


@needs_kernels
@pytest.mark.parametrize("mode, new, knobs", [
    ("generate_ar", 3, {}), ("generate_speculative", 4, dict(draft_length=4)),
    ("generate_mask_diffusion", 8, dict(block_size=8, steps_per_block=3))])
def test_the_miniature_writes_the_same_with_kernels(mode, new, knobs):
    torch_model, tokenizer = miniature()
    model = TwoTower.from_pretrained(MINIATURE, context_device=DEVICE, backend="triton")
    assert (torch_model.backend, model.backend) == ("torch", "triton")
    prompts = [tokenizer.encode(text).ids for text in ("class Point label:str\n", "import os\n")]
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
@pytest.mark.parametrize("lengths", [(20,), (40, 20, 33)])
def test_fixed_passes_decode_the_same(lengths, monkeypatch):
    """What CUDA graphs record, run without recording; with rows that end, and caches that grow."""
    _, _, model = golden("cfg1")
    prompts, taken = [ids(n, seed=n) for n in (5, 17, 1)][:len(lengths)], []
    monkeypatch.setattr(twotower, "kernels", lambda: kernels)
    for name in ("extend", "denoise"):
        monkeypatch.setattr(kernels.Passes, name, lambda *args, name=name, run=getattr(
            kernels.Passes, name): taken.append(name) or run(*args))
    for generate in (model.generate_ar, model.generate_mask_diffusion):
        plain = generate(prompts, lengths)
        assert not taken
        with monkeypatch.context() as patch:
            patch.setattr(model, "graphs", True)
            fixed = generate(prompts, lengths)
        assert texts(fixed) == texts(plain) and fixed.nfe.equal(plain.nfe)
        assert fixed.context_passes.equal(plain.context_passes)
        assert taken.count("extend") == int(plain.context_passes.max()) - 1     # but the prefill
        assert taken.count("denoise") >= int(plain.nfe.max())
        taken.clear()
    context = model.prefill([ids(3)])
    context.passes = kernels.Passes(model, context, Pass.behind)
    for token in ids(30):
        model._extend(context, token.view(1, 1), logits="last")
    whole = model.context_logits(torch.cat([ids(3), ids(30)])[None])
    check(context.logits, whole[:, -1], 1e-5)


@needs_kernels
def test_sample_runs_kernels_and_fixed_passes():
    flags = ["--json", "--max-new-tokens", 8, "--block-size", 8, "class Point label:str\n"]
    plain, run = (run_python("sample.py", *more, *flags) for more in (
        (), ("--backend", "triton", "--graphs")))
    assert run.returncode == 0 and ", backend triton with graphs, " in run.stderr, run.stderr
    assert json.loads(run.stdout)["tokens"] == json.loads(plain.stdout)["tokens"]


def test_a_backend_is_never_chosen_silently(tmp_path, monkeypatch):
    model = TwoTower(TwoTowerConfig(**TINY))
    assert model.use("auto").backend == "torch"         # on the CPU
    monkeypatch.setattr(twotower, "KERNELS", tmp_path / "kernels.py")
    monkeypatch.delitem(sys.modules, "twotower_kernels", raising=False)
    refuses("needs kernels.py beside twotower.py", model.use, "triton")
    assert model.backend == "torch"
    run = run_python("-c", "import torch, kernels; x = torch.ones(4); kernels.rms_norm(x, x, 0)",
                     env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"})
    assert kernels is None or "ValueError: kernels.py needs a CUDA device, not cpu" in run.stderr


@needs_kernels
def test_kernels_refuse_what_they_cannot_do():
    ones = lambda *shape: torch.ones(shape, device=DEVICE)
    x, weight, q = ones(2, 4), ones(4), ones(1, 1, 2, 16)
    B, step = ones(1, 1, 16), [ones(1, 2, 24), ones(1, 2), ones(2)]
    with torch.no_grad():
        for message, function, *args in (
                ("weight has shape (3,), expected", "rms_norm", x, weight[:3], 1e-5),
                ("x is torch.float64, expected", "rms_norm", x.double(), weight, 1e-5),
                ("gate has shape (1, 2, 4), expected", "add_gated", ones(1, 6, 4), ones(1, 2, 4),
                 ones(1, 6, 4)),
                ("one of last_seen, is_causal", "attention", q, q, q, ones(1, 2).long(), True),
                ("P is 24, but the kernel needs a power of two from 16 up", "ssd_step",
                 *step, B, B, ones(2), ones(1, 2, 24, 16))):
            refuses(message, getattr(kernels, function), *args)
    weight.requires_grad_()
    refuses("rms_norm of kernels.py has no gradient", kernels.rms_norm, x, weight, 1e-5)


@needs_kernels
@torch.no_grad()
def test_kernels_read_strided_weights_and_scale_in_float64():
    rand = lambda *shape: randn(*shape).float().to(DEVICE)
    x, weights = rand(2, 8), rand(8, 2)
    check(kernels.rms_norm(x, weights[:, 1], 1e-5), twotower.rms_norm(x, weights[:, 1], 1e-5), 1e-6)
    config = TwoTowerConfig(**TINY | dict(routed_scaling_factor=1.3))
    args = rand(3, 8), rand(4, 8), rand(4), config
    for ours, theirs in zip(kernels.route(*args), twotower.route(*args)):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0)


# ----------------------------------------------------------------------------- the command line

import io  # noqa: E402

import sample as cli  # noqa: E402


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
                            stderr=subprocess.PIPE, **options)


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
    run = sample("--mode", mode, *"--max-new-tokens 21 --context-device cpu Hello".split(),
                 *["--denoiser-device", "cpu"] * (mode != "ar"), *flags_of(knobs))
    result = getattr(miniature()[0], f"generate_{mode}")(
        [tokenizer().encode("Hello").ids], 21, eos_token_id=2, **knobs)
    new, nfe, passes = result.tokens[0].tolist(), int(result.nfe), int(result.context_passes)
    assert run.stdout == "Hello" + tokenizer().decode(new) + "\n", run.stderr
    placement, facts = run.stderr.splitlines()
    assert placement.startswith("cpu: context tower" + " and denoiser tower" * (mode != "ar"))
    assert facts.startswith(
        f"{mode} on cpu, 1 prompt, {len(new)} tokens, {nfe} denoiser passes, {passes} context "
        f"passes, {len(new) / (nfe or passes):.2f} tokens per pass, load ")
    for fact in ("prefill ", "peak memory host ", "max_new_tokens 21", "temperature 0.0",
                 *(f"{name} {value}" for name, value in knobs.items())):
        assert fact in facts
    decode, speed = map(float, re.search(r"decode ([\d.]+) s, ([\d.]+) tokens/s", facts).groups())
    assert (decode - 0.01) * (speed - 0.1) < len(new) < (decode + 0.01) * (speed + 0.1)  # rounded


@pytest.mark.parametrize("mode", ["ar", "mask_diffusion"])
def test_sample_stops(mode):
    """Before EOS, or the first stop string, of which nothing is shown while it comes."""
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


def test_sample_is_seeded():
    def text(*flags) -> str:
        return sample(*"--mode ar --max-new-tokens 16 Hi".split(), *flags).stdout

    knobs = "--temperature 1 --top-k 40 --top-p".split()
    one, again, two, narrow = (text(*knobs, top_p, "--seed", seed) for top_p, seed in (
        (0.95, 1), (0.95, 1), (0.95, 2), (1e-6, 1)))
    assert one == again != two and narrow == text() != one      # that --top-p is greedy
    unseeded = sample(*"--mode ar --max-new-tokens 16 Hi".split(), *knobs, 0.95)
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
        assert result["settings"]["seed"] == seed
    assert f"{len(MANY)} prompts, {sum(len(r['tokens']) for r in results)} tokens" in run.stderr


def endless(tmp_path: Path) -> Path:
    """The miniature without an EOS."""
    directory = copy_checkpoint(tmp_path, MINIATURE)
    config(eos_token_id=None)(directory)
    return directory


posix = pytest.mark.skipif(os.name != "posix", reason="signals, limits, terminals are POSIX's")


@posix
@pytest.mark.parametrize("sent, status, said", [
    ("SIGKILL", -9, ""), ("SIGINT", 130, "prompts, "),
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
    for said in (f"{14 - before.count(10)} prompts", "is complete: 14 results"):
        resumed = sample(*flags, out, "--resume")
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
            ([prompts, "--resume"], "must be different files"),
            ([notes, "--resume"], "notes.txt line 1 is not a result of sample.py")):
        one_line(sample(*flags, *args), message)
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
        placed, *facts = err.splitlines()
        assert process.wait() == status and placed.startswith("cpu: context tower")
        assert (facts == []) if status == 0 else facts[-1].startswith("ar on cpu, 1 prompt, ")
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
    err = process.stderr.read()
    assert process.wait() == 130 and "Traceback" not in err
    assert [result["index"] for result in results] == list(range(len(results)))
    assert len(results) < 200 and {result["ended"] for result in results[:-2]} <= {"length", "eos"}
    for result in results:
        assert result["tokens"] == first["tokens"][:len(result["tokens"])]
        assert result["text"] == tokenizer().decode(result["tokens"])
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
    first = [step["before"] for step in steps if step["step"] == 0 and step["index"] < len(MANY)]
    assert first and all(before == [MASK] * 16 for before in first)
    assert sample(*flags).stdout == run.stdout


@posix
def test_watch_shows_the_block_in_place():
    """On a terminal masks and fresh (bold, underlined) tokens appear; elsewhere nothing does."""
    import pty
    flags = ["--max-new-tokens", "30", "--watch", "Hello"]
    text = "Hello" + tokenizer().decode(written("mask_diffusion", "Hello", 30)) + "\n"
    assert sample(*flags).stdout == text
    master, slave = pty.openpty()
    terminal = os.environ | {"TERM": "xterm", "COLUMNS": "80"}
    process = start_sample(*flags, stdout=slave, env=terminal)
    os.close(slave)
    shown = b""
    with contextlib.suppress(OSError):              # Linux ends a terminal with an error
        while data := os.read(master, 4096):
            shown += data
    assert process.wait() == 0
    shown = shown.decode().replace("\r\n", "\n")
    assert shown.endswith(text) and "\u2591" * 8 in shown and "\x1b[1;4m" in shown


def test_sample_fills_templates(tmp_path):
    """Holes by length in both notations; the text around them stays; a line may have its own."""
    def filled(*parts: str | int) -> str:
        template = [token for part in parts for token in (
            [MASK] * part if isinstance(part, int) else tokenizer().encode(part).ids)]
        return tokenizer().decode(written("mask_diffusion", LETTER, None, template=tuple(template)))

    expected = filled("Dear", 4, "\nyour_order", 12, " on __Monday.")
    run = sample("--template", "Dear____\nyour_order{{12}} on __Monday.", LETTER)
    assert run.stdout == LETTER + expected + "\n", run.stderr
    assert expected.startswith("Dear") and expected.endswith(" on __Monday.")
    own = [{"template": "Hello{{3}}."}, {}, {"template": "___ and then", "max_new_tokens": 9}] * 2
    many = prompts_file(tmp_path / "many.jsonl", [{"text": LETTER} | more for more in own])
    for size in (1, 4):                                 # no batch gets another's templates
        results = results_of(sample("--template", "Dear____", "--json", "--batch-size", size,
                                    "--prompt-file", many).stdout)
        for first, second, third in (results[:3], results[3:]):
            assert first["text"] == filled("Hello", 3, ".") and second["text"] == filled("Dear", 4)
            assert " and then" in third["text"] and len(third["tokens"]) == 9
            assert first["settings"]["template"] == "Hello{{3}}."
    fixed = tokenizer().decode(tokenizer().encode("Yes</s>no").ids)     # EOS inside, as any token
    assert sample("--template", "Yes</s>no", LETTER).stdout == f"{LETTER}{fixed}\n"
    flags = ["--max-new-tokens", 5, "--output", tmp_path / "one.jsonl", LETTER]
    assert sample("--template", "x____", *flags).returncode == 0
    one_line(sample("--resume", *flags), "was made with template 'x____', not None")
    shown = sample("--template", '{"city": "{{12}}').stdout
    assert shown.startswith("json city=") and 'block 0  {"city": "\u2591' in shown


def test_sample_scores(tmp_path):
    right = "Dear Dora,\nyour order 2203 of 16 maps"
    lines = [{"text": LETTER, "choices": [right.replace("Dora", "Adam"), right, "Dear"]},
             {"text": "import", "continuation": " \u00e9tat"},
             {"text": LETTER, "choices": [right.replace("2203", "7140"), "Q"]}]
    flags = ["--mode", "score", "--prompt-file", prompts_file(tmp_path / "ask.jsonl", lines)]
    results = results_of(sample(*flags, "--batch-size", 3).stdout)
    for line, result in zip(lines, results, strict=True):
        texts = line.get("choices", [line.get("continuation")])
        prompt, *asked = (tokenizer().encode(text).ids for text in (line["text"], *texts))
        scores = miniature()[0].score([prompt] * len(asked), asked).total.tolist()
        counts, nbytes = list(map(len, asked)), [len(text.encode()) for text in texts]
        assert result["token_counts"] == counts
        assert result["log_likelihoods"] == pytest.approx(scores, abs=1e-4)
        for unit, sizes in (("token", counts), ("byte", nbytes)):
            assert result[f"perplexity_per_{unit}"] == pytest.approx(
                [math.exp(-total / size) for total, size in zip(scores, sizes)], rel=1e-4)
        assert result["best"] == scores.index(max(scores))
        per_byte = [total / size for total, size in zip(scores, nbytes)]
        assert result["best_per_byte"] == per_byte.index(max(per_byte))
    wrong, likely, _ = results[0]["perplexity_per_byte"]
    assert likely < wrong and results[0]["best_per_byte"] != 0
    assert (results[2]["best"], results[2]["best_per_byte"]) == (1, 0)
    out = tmp_path / "out.jsonl"
    assert sample(*flags, "--output", out).returncode == 0
    whole = out.read_bytes()
    out.write_bytes(whole[:whole.index(b"\n") + 9])
    assert sample(*flags, "--output", out, "--resume").returncode == 0
    for a, b in zip(results_of(out.read_text()), results, strict=True):
        # in other batches: to the last digits
        assert a["log_likelihoods"] == pytest.approx(b["log_likelihoods"], abs=1e-4)
        assert (a["token_counts"], a["settings"]) == (b["token_counts"], b["settings"])


def test_an_option_is_taken_in_the_modes_whose_function_takes_it():
    """Every option of twotower.py's functions, in every mode."""
    shared = {"temperature": 0.5, "top_k": 1, "top_p": 1, "seed": 1, "max_new_tokens": 1}
    names = shared | dict.fromkeys(("block_size", "draft_length", "steps_per_block", "template",
                                    "confidence_threshold", "mask_token_id"), 1)
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
    ("--mode score Hi", "--mode score needs --prompt-file with the suffix .jsonl"),
    ("--mode fast Hi", "invalid choice: 'fast'"),
    ("--blocksize 8 Hi", "unrecognized arguments"),
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
        ("--top-k 5", "--temperature above 0"), ("--seed 0 --temperature 0", "--temperature above"),
        ("--graphs", "--backend triton"), ("--resume", "--output"),
        ("--resume --output o --temperature 1", "--output, and with --temperature the --seed"))],
    ("--plan --template ___", "--template needs a prompt beside --plan"),
    *[(f"{args} {other}", f"{args.split()[0]} does nothing with {other.removesuffix(' o')}")
      for args, other in (
          *((args, "--plan") for args in ("--stop x", "--json", "--output o", "--trace t")),
          ("--watch", "--plan"), ("--graphs --backend triton", "--plan"),
          *((f"{args} --prompt-file two.jsonl", "--mode score") for args in (
              "--stop x", "--json", "--trace t", "--watch", "--denoiser-device cpu")),
          ("--graphs --backend triton Hi", "--mode speculative"), ("--watch Hi", "--mode mock_ar"),
          ("--json Hi", "--output o"), ("--watch Hi", "--json"),
          ("--watch Hi", "--output o"), ("--trace t Hi --output o", "--resume"))],
    ("--prompt-file two.jsonl Hi", "prompt does nothing with --prompt-file"),
    ("--watch --prompt-file two.jsonl", "--watch shows one row at a time; give --batch-size 1"),
    ("''", "the prompt holds no token"),
    ("--template '' Hi", "the template of the prompt holds no token and no hole"),
    ("--template {{9}} --max-new-tokens 8 Hi", "has 9 tokens, more than the 8"),
    ("--max-new-tokens 999999 Hi", "max_position_embeddings 4096"),
    ("--plan --max-new-tokens 5000", "max_position_embeddings 4096"),
    *[(f"{flags} 5000 Hi", "blocks of 5000 are too many for max_position_embeddings 4096")
      for flags in ("--block-size", "--mode speculative --draft-length")],
    *[(f"--{flag} {place} Hi", f"device {place} cannot be used") for flag, place in (
        ("context-device", "cuda:99"), ("context-device", "toaster"), ("denoiser-device", "meta"))],
    ("--output o --trace ./o Hi", "must be different files"),
    ("--output no/where.jsonl Hi", "no/where.jsonl: its directory does not exist"),
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
    if "toaster" in args or "\udcff" in args:       # a process of its own says the same
        one_line(run_python(HERE / "sample.py", *map(os.fsencode, shlex.split(args))), message)


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
    (gone("tokenizer.json"), "tokenizer.json cannot be read as a tokenizer: No such file"),
    (cut("tokenizer.json", 300), "tokenizer.json cannot be read"),
    (cut("config.json", 300), "is not valid JSON"),
    (cut("model.safetensors", 10**6), "model.safetensors is truncated"),
    (lambda d: edit_json(d / "tokenizer.json", lambda t: t["model"]["vocab"].update(H=128)),
     "id 128"),
])
def test_sample_refuses_a_broken_checkpoint_in_one_line(damage, message, tmp_path):
    directory = copy_checkpoint(tmp_path)
    damage(directory)
    one_line(sample("Hello", directory=directory), message)


def test_the_hub_is_asked_only_for_what_is_needed(monkeypatch, tmp_path):
    """A name that is no directory is fetched; for AR no file with only denoiser tensors."""
    import huggingface_hub
    write_headers(tmp_path, TINY, 4)
    asked = []

    def snapshot_download(name, *, allow_patterns, local_files_only):
        asked.append((list(allow_patterns), local_files_only))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    for name, towers, plan in (("some/model", "both", False), ("some/model", "context", True),
                               (str(tmp_path), "both", False)):
        assert cli.fetch(name, towers, plan) == tmp_path
    small = ["config.json", "tokenizer.json", twotower.INDEX]
    shards = [f"model-{i}-of-00004.safetensors" for i in ("00001", "00002", "00003", "00004")]
    assert asked == [                   # the towers are alike: two hold nothing but the denoiser
        (small, False), (small + shards, False), (small, True), (small + shards[:2], True)]
    run = run_python("sample.py", "--checkpoint", "some/model", "Hi",
                     env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")})
    one_line(run, "https://huggingface.co/some/model, downloaded where there is a connection")


def test_the_released_checkpoint_is_planned_from_its_headers(tmp_path):
    """24 shards of the released shapes without data: SPEC's table of memory."""
    assert write_headers(tmp_path, dataclasses.asdict(TwoTowerConfig()), 24) == 24
    run = sample("--plan", "--max-new-tokens", 8192, "--batch-size", 4, directory=tmp_path)
    context, = re.findall(r"weights ([\d.]+) GiB", run.stderr.splitlines()[0])
    assert context == "117.7"                       # twice 58.8 and the time conditioning
    assert "KV cache 192.0 MiB, SSM states 184.0 MiB" in run.stderr
    assert ("batch of 4, 8192 tokens a row; a cached token takes 6144 bytes, a row's SSM states "
            "48234496 and") in run.stderr
    run = sample("--plan", "--mode", "ar", "--context-device", "cpu", directory=tmp_path)
    assert "cpu: context tower: weights 58.8 GiB" in run.stderr


def test_dtype():
    """Half the bytes of float32, and text in bfloat16; an answer that is sure stays as it is."""
    plans = [sample("--plan", *flags).stderr for flags in ((), ("--dtype", "bfloat16"))]
    wide, narrow = (float(re.search(r"weights ([\d.]+) MiB", plan)[1]) for plan in plans)
    assert 0.49 < narrow / wide < 0.52
    run = sample("--dtype", "bfloat16", "--max-new-tokens", 16, LETTER)
    assert run.returncode == 0 and ", dtype bfloat16, " in run.stderr
    assert run.stdout.startswith(f"{LETTER}Dear Dora,\n")


def test_a_plan_that_does_not_fit_names_what_would(monkeypatch):
    """With made-up free memory and GPUs."""
    model, _ = TwoTower.skeleton(GOLDEN / "cfg1")
    args = argparse.Namespace(mode="mask_diffusion", max_new_tokens=100, plan=False, batch_size=4)
    free = {"cpu": 0, "cuda:0": 0}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda place: (free[place], 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free) - 1)
    monkeypatch.setattr(cli.psutil, "virtual_memory",
                        lambda: types.SimpleNamespace(available=free["cpu"]))

    def needed(rows: int, *places: str) -> dict[str, int]:
        table = cli.memory(model, rows, 112, 16, places)
        return {place: parts["together"] for place, parts in table.items()}

    one, four, alone = (needed(*what)["cpu"] for what in (
        (1, "cpu", "cpu"), (4, "cpu", "cpu"), (4, "cpu")))
    apart = needed(4, "cpu", "cuda:0")
    assert alone == apart["cpu"] < one < four and alone < apart["cuda:0"] < four
    assert sum(apart.values()) - four == four - sum(     # all but the weights is there twice
        tensor.nbytes for tensor in model.state_dict().values())
    half = max(apart.values())
    for places, cpu, gpus, way in (
            (["cpu"] * 2, four, [], None), (["cpu"] * 2, one, [], "--batch-size 1"),
            (["cpu"] * 2, alone, [], "--mode ar, the context tower alone on cpu"),
            (["cpu"] * 2, alone - 1, [], "a device with more memory"), (["cpu"], one, [0], None),
            (["cpu"], 0, [0, alone], "--context-device cuda:1"),
            (["cuda:0"] * 2, 0, [half] * 2, "--context-device cuda:0 --denoiser-device cuda:1"),
            (["cuda:0", "cuda:1"], 0, [alone, 0], "--mode ar, the context tower alone on cuda:0")):
        free = {"cpu": cpu} | {f"cuda:{i}": nbytes for i, nbytes in enumerate(gpus)}
        if way is None:
            cli.plan(model, [], args, {"block_size": 16}, places)
        else:
            refuses(f"what would: {way}", cli.plan, model, [], args, {"block_size": 16}, places)


# ---------------------------------------------------------------------- training the miniature

def items(task: str, count: int, held_out: bool = False):
    return list(itertools.islice(corpus.task_items(task, "test", held_out), count))


def record(prompt: str) -> dict[str, str]:
    """What a prompt of field=value pairs says."""
    return dict(pair.split("=") for pair in prompt.split()[1:])


def test_answers_are_right():
    """Every task's answer, recomputed from its prompt alone in another way."""
    for prompt, answer in items("bill", 200):
        asked = re.findall(r"\d: (\d) (\w+) at (\d)[,\n]", prompt)
        assert answer.split("\n") == [
            f"{i}: {count} {item} x {price} = {sum([int(price)] * int(count)):02}"
            for i, (count, item, price) in enumerate(asked, 1)]
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
    for prompt, answer in items("class", 200):
        (_, name, *fields), namespace = prompt.split(), {}
        exec(answer, namespace)
        parameters = inspect.signature(namespace[name]).parameters.values()
        assert fields == [f"{one.name}:{one.annotation.__name__}" for one in parameters]
        assert list(vars(namespace[name](*fields)).values()) == fields
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
    """Targets are the answers with </s> up to the end of a block; answers begin a block, but those
    of unaligned rows anywhere."""
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
    assert tokens.shape == targets.shape == (8, 128)
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
    model = train.build(first, train.SMOKE_MODEL)
    if phase == 2:
        model = train.build(second, train.SMOKE_MODEL, model)
    return train.Trainer(model, (first, second)[phase - 1], training_data(), path)


def test_losses_of_both_phases():
    """As published, phase 2 has the loss of `diffusion_loss`; 1/t divides by each token's t; phase
    1, and phase 2 with tied towers, have that of `ar_loss`, at the targets alone."""
    tokens, targets = ids(4, 48), torch.rand(4, 48, generator=seeded(5)) < 0.5
    published = short_trainer(2, **train.PUBLISHED)
    as_was, by_t = published.recipe, dataclasses.replace(published.recipe, weight="1/t")
    loss, = published.losses(tokens, torch.ones_like(targets), as_was, seed=4)
    assert loss.mean().allclose(published.model.diffusion_loss(tokens, 16, seeded(4)), 1e-6, 0)
    (plain,), (weighted,) = (published.losses(tokens, targets, recipe, seed=4)
                             for recipe in (as_was, by_t))
    masked, t = train.add_noise(as_was, targets, seeded(4))
    assert len(plain) == masked.sum() > 20 and not (masked & ~targets).any()
    torch.testing.assert_close(weighted, plain / t[:, None].expand(4, 48)[masked])
    for trainer in (short_trainer(1), short_trainer(2, tied=True)):
        *_, loss = trainer.losses(tokens, targets, trainer.recipe, seed=4)
        logits = trainer.model.context_logits(tokens[:, :-1]).log_softmax(-1)
        right = -logits.gather(-1, tokens[:, 1:, None])[..., 0][targets[:, 1:]]
        check(loss, right, 1e-6)


def test_what_is_not_denoised_changes_nothing():
    """Blocks without masks are left out, and the rest has the loss it had; an untrained denoiser's
    mock-AR loss is that of AR, at half as many targets."""
    trainer, tokens = short_trainer(2, denoised=0.5, mock_ar=2), ids(4, 96)
    targets = torch.arange(96).expand(4, 96) // 48 == 1                         # 3 blocks of 6
    some, mock = trainer.losses(tokens, targets, trainer.recipe, seed=4)
    everything = dataclasses.replace(trainer.recipe, denoised=1.0)
    assert len(trainer.losses(tokens, targets, everything, seed=5)) == 1
    whole, mock_of_all = trainer.losses(tokens, targets, everything, seed=4)
    check(some, whole, 1e-5)
    right = trainer.model.ar_loss(tokens[2:3], targets[2:3], reduction="none")
    check(mock_of_all, right, 1e-5)
    for wrong in ([[6], [0], [0], [0]], [[-1]] * 4, [[0]], [0] * 4):
        with pytest.raises(ValueError, match="from 0 to 5"):
            trainer.model.diffusion_logits(tokens, tokens, 1.0, 16, torch.tensor(wrong))
    assert len(mock) == 24 and torch.isclose(mock[:, None], right, 1e-4).any(1).all()


def test_joint_training_reaches_the_context_tower():
    """While it is on, both losses reach all of the context tower; then it stays as it is. The
    denoiser's loss is the same."""
    trainer = short_trainer(2, stages=((0, dict(joint=True)), (2, dict(joint=False))), mock_ar=0)
    apart, batch = short_trainer(2), trainer.data.batch(trainer.recipe, 0)
    (diffusion, ar), (same,) = (one.losses(*batch, one.recipe.at(0), seed=1)
                                for one in (trainer, apart))
    assert torch.equal(diffusion, same)
    for loss, layers in (diffusion, "M*"), (ar, "M*E"):
        loss.sum().backward()
        assert all(layer.mixer.k_proj.weight.grad.any() if layer.kind == "*" else
                   next(layer.mixer.parameters()).grad.any()
                   for layer in trainer.model.context_tower.layers if layer.kind in layers)
        trainer.optimizer.zero_grad()
    tower, states = trainer.model.context_tower, []
    for _ in range(4):
        trainer.train_step()
        states.append({name: tensor.clone() for name, tensor in tower.state_dict().items()})
    equal = [all(torch.equal(old[name], new[name]) for name in old)
             for old, new in zip(states, states[1:])]
    assert equal == [False, True, True]


def test_noise_follows_the_recipe():
    targets = torch.rand(400, 4, 16, generator=seeded(1)) < 0.7
    noise = lambda targets, **choices: train.add_noise(
        recipe(2, t_per="block", **choices), targets.flatten(1), seeded(2))
    masked, t = noise(targets, full_masks=0.25, slope=0.0)
    masked, full = masked.view(400, 4, 16), t == 1.0
    assert not (masked & ~targets).any() and 0.2 < full.float().mean() < 0.3
    assert torch.equal(masked[full], targets[full])
    share = masked[~full].sum() / targets[~full].sum()                  # the mean of U[0.001, 1]
    assert abs(share - 0.5) < 0.02
    masked = noise(torch.ones_like(targets), full_masks=0.0, slope=0.8)[0]
    slope = masked.view(-1, 16).float().mean(0)
    assert slope[-1] - slope[0] > 0.2 and abs(slope.mean() - 0.5) < 0.02


def test_choices_of_the_denoiser():
    """With gate 1 the first denoiser is the AR model's network at every t, with published gates it
    is not; tied towers are one, trained, also where weights are cast; no time is no t."""
    block, text = torch.full((1, 16), MASK), ids(1, 20)
    model, published = (short_trainer(2, gate=gate).model for gate in ("copy", "published"))
    context = model.prefill(text)
    plain = model.denoise(block, context, None)
    for t in (0.1, 1.0):
        check(model.denoise(block, context, t), plain, 1e-6)
    assert error(published.denoise(block, published.prefill(text), 1.0), plain) > 0.1
    tied = short_trainer(2, tied=True)
    tied.autocast = True        # the frozen pass over the same weights must not cache their casts
    tied.loss(0).backward()
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
    first = short_trainer(phase, tmp_path / "phase.pt")
    steps = iter([first.train_step] * 8)
    first.train_step = lambda: next(steps)()
    with pytest.raises(StopIteration):
        first.run(every=5)
    second = short_trainer(phase, tmp_path / "phase.pt")
    assert second.step == 5
    second.run(every=5)
    after = whole.model.state_dict()
    for name, tensor in second.model.state_dict().items():
        assert torch.equal(tensor, after[name]), name
        frozen = phase == 2 and name.startswith("context_")
        assert torch.equal(tensor, before[name]) == frozen, name
    assert second.log[-1]["loss"] == whole.log[-1]["loss"]


def test_two_processes_make_the_same_step(tmp_path):
    """Under torchrun two processes share the sequences of a step; the weights agree with those of
    one process to 1e-3: sums in another order change gradients near zero by much of themselves,
    which AdamW's first steps divide by their size."""
    script = tmp_path / "steps.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
        "import torch, test_twotower as T\n"
        "torch.distributed.init_process_group('gloo')\n"
        f"torch.save([*map(T.three_steps, (1, 2))], f'{tmp_path}/{{T.train.RANK}}')\n")
    run = run_python("-m", "torch.distributed.run", "--nproc-per-node", 2, script)
    assert run.returncode == 0, run.stderr
    for phase, (shared, one), (again, two) in zip(
            (1, 2), *(torch.load(tmp_path / rank) for rank in "01")):
        losses, weights = three_steps(phase)
        assert shared == again and shared == pytest.approx(losses, rel=1e-5)
        for name, tensor in weights.items():
            assert torch.equal(one[name], two[name])
            assert not tensor.any() or error(one[name], tensor) < 1e-3


def three_steps(phase: int) -> tuple[list[float], dict]:
    """Losses of three steps and of a source's validation, and the weights after them."""
    trainer = short_trainer(phase)
    losses = [trainer.train_step()[0] for _ in range(3)]
    return losses + [trainer.validate()["json"]], trainer.model.state_dict()


def refused(program, capsys, *args) -> str:
    """The one line that program.main(args) ends with, at exit status 2."""
    with pytest.raises(SystemExit) as end:
        program.main([str(arg) for arg in args])
    line, = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and line.startswith(f"{program.__name__}.py: ")
    return line


def test_train_runs_end_to_end(tmp_path, capsys):
    """Both phases learn, any text round-trips through the tokenizer, recipes are compared; a second
    run has nothing to do, and checkpoints of another kind are refused."""
    out = tmp_path / "out"
    smoke = ["--smoke", "--threads", "1", "--out", str(out)]
    train.main(smoke)
    printed = capsys.readouterr().out
    left = [int(minutes) for minutes in re.findall(r"(\d+) min left", printed)]
    assert len(left) == 4 and max(left) <= 5                    # not 60 times as much
    for phase in (1, 2):
        log = torch.load(out / f"phase{phase}.pt")["log"]
        assert log[-1]["loss"] < min(log[0]["loss"], 0.85 * math.log(1280))
        assert f"phase {phase} step" in printed
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
    train.main(smoke)
    assert "step" not in capsys.readouterr().out
    train.main([*smoke, "--recipes", "default", "tied towers"])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(row["recipe"], row["mode"]) for row in rows] == [
        (name, mode) for name in ("default", "tied towers") for mode in ("ar", "gamma 0.8")]
    assert rows[0]["valid"] < math.log(1280) and rows[1]["passes_per_block"] <= 16
    path = out / "phase1.pt"
    whole = torch.load(path)
    for saved, message in (({"step": 1}, "delete it"),
                           (whole | {"made_with": ""}, "another recipe")):
        torch.save(saved, path)
        assert message in refused(train, capsys, *smoke)
    path.write_bytes(path.read_bytes()[:5000])
    assert "delete it" in refused(train, capsys, *smoke)


@pytest.mark.parametrize("program, args, message", [
    (train, "--threads 0", "--threads is 0"),
    (train, "--seed -1", "--seed is -1"),
    (train, "--device toaster", "--device toaster cannot be used"),
    (train, "--steps", "unrecognized arguments"),
    (train, "--smoke --out README.md", "README.md"),
    (train, "--bf16 --seed one", "invalid int value"),
    (train, "--recipes --published", "not allowed with"),
    (train, "--recipes --out nowhere", "nowhere"),
    (bench, "miniature --checkpoint nowhere", "nowhere"),
    (bench, "samples --mode prose", "--mode prose"),
    (bench, "miniature --tasks sort,prose", "only bill,sort"),
    (bench, "cpu --items 5", "unrecognized arguments: --items"),
    (bench, "batch --rounds 0", "0 must be an integer of 1 or more")])
def test_train_and_bench_refuse_in_one_line(program, args, message, capsys):
    assert message in refused(program, capsys, *args.split())


def test_bench_miniature_runs(capsys, monkeypatch):
    """Few tasks and modes: the counts add up, speculative decoding is right where AR is."""
    monkeypatch.setattr(bench, "MODES", {name: bench.MODES[name] for name in (
        "ar", "mock-AR", "gamma 0.8", "speculative")})
    bench.main(["miniature", "--items", "2", "--timed", "1", "--threads", "1", "--tasks",
                "sort,rename"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    for rows in (result["rows"], result["source"], result["library"]):
        ar, mock, fast, speculative = rows
        assert [row["mode"] for row in rows] == list(bench.MODES)
        assert all(row["log_likelihood"] < 0 < row["tokens_per_second"] for row in rows)
        assert mock["tokens_per_pass"] == 1 and ar["denoiser_passes_per_block"] == 0
        assert ar["accuracy"] == speculative["accuracy"] and ar["speedup"] == 1
        assert 0 < fast["denoiser_passes_per_block"] <= 16
    assert result["rows"][0]["sort"] == 1


def test_bench_alterations_do_what_they_say():
    model = short_trainer(2).model
    with torch.no_grad():
        model.t_block[1].weight.normal_()
    context, block = model.prefill(ids(1, 30)), torch.full((1, 16), MASK)
    plain, half = (model.denoise(block, context, t) for t in (1.0, 0.5))
    with bench.altered(model, "t frozen"):
        assert torch.equal(model.denoise(block, context, 1.0), half) and error(plain, half) > 1e-3
    with bench.altered(model, "no Mamba seeding"):
        unseeded = model.denoise(block, context, 1.0)
    assert torch.equal(model.denoise(block, context, 1.0), plain) and error(unseeded, plain) > 1e-3
    for state in context.states:
        if isinstance(state, MambaState):
            state.map(torch.Tensor.zero_)
    assert torch.equal(model.denoise(block, context, 1.0), unseeded)


def test_the_miniature_is_small_and_of_the_released_layout():
    sizes = {path.name: path.stat().st_size for path in MINIATURE.iterdir()}
    assert set(sizes) == {"config.json", "model.safetensors", "tokenizer.json", "README.md"}
    config = json.loads((MINIATURE / "config.json").read_text())
    assert sum(sizes.values()) < 32e6 and config == config | train.MODEL
    assert set(config["hybrid_override_pattern"]) == set("M*E")
    ours, theirs = ({re.sub(r"\d+", "0", key) for key in load_file(directory / "model.safetensors")}
                    for directory in (MINIATURE, GOLDEN / "cfg1"))
    assert ours == theirs


@pytest.mark.parametrize("task", corpus.KNOWN)
def test_the_miniature_answers(task):
    """40 held-out items a task: AR and diffusion at gamma 0.8 are right at least 9 times in 10, the
    latter in far fewer passes (measured rates: miniature/README.md)."""
    model, tokenizer = miniature()
    prompts = corpus.task_prompts(tokenizer, task, 40)
    ar, fast = (bench.answer(model, tokenizer, prompts, name) for name in ("ar", "gamma 0.8"))
    assert ar["right"] >= 36 and fast["right"] >= 36
    assert ar["tokens"] > 8 * fast["nfe"]
    if task == "json":
        unseeded = bench.answer(model, tokenizer, prompts[:20], "no Mamba seeding")
        assert unseeded["right"] <= 1


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
    new, Q, exact = official.NEW_TOKENS, official.BLOCK_SIZE, limit < 1e-4
    assert theirs.shape == (1, new)
    tolerable = lambda: all(same[i:i + Q].count(False) <= (0 if exact else Q // 2)
                            for i in range(0, new, Q))
    while len(same) < new and tolerable():
        result = getattr(model, f"generate_{mode}")(
            torch.cat([prompt, theirs[:, :len(same)]], dim=1), new - len(same),
            **official.MODES[mode])
        nfe = nfe if same else int(result.nfe)
        equal = (result.tokens[0].cpu() == theirs[0, len(same):]).tolist()
        end = equal.index(False) + 1 if False in equal else len(equal)
        same += equal[:end if mode != "mask_diffusion" else -(-end // Q) * Q]
    print(f"{mode}: {same.count(False)} of {len(same)} tokens differ, {nfe} passes")
    assert tolerable(), f"token {same.index(False)} differs"
    if mode == "mask_diffusion":
        passes = int(reference[f"{mode}/nfe"])
        assert nfe == passes if exact else passes <= 2 * nfe <= 4 * passes, f"{nfe}, not {passes}"


# The published code as it behaves, around our layers, which it runs in float32 whatever it is
# asked for: so in bfloat16 it differs from ours by rounding, as another implementation does.
STAND_IN = '''
import causal_conv1d, mamba_ssm, torch              # always, also where no fast path is taken
from transformers.modeling_attn_mask_utils import AttentionMaskConverter
from twotower import TwoTower

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

class NemotronHTwoTowerForCausalLM(TwoTower):
    _last_nfe = 0

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
        cache = {"ids": ids[:, :-1], "context": self.prefill(ids[:, :-1])}
        self._extend_context_cache(ids[:, -1:], cache)
        cache["ctx_cache"] = Cache(cache["context"].states, ids.shape[1])
        return cache

    def _extend_context_cache(self, new, cache):
        cache["logits"] = self.extend(cache["context"], new)[:, -1:]
        cache["ids"] = torch.cat([cache["ids"], new], dim=1)

    def _run_denoiser_step_diffusion(self, block, cache, t):
        t = (t.to(self.asked_dtype) * 1000).float() / 1000          # t is rounded, then 1000 t
        return self.denoise(block, cache["context"], t)

    def _run_denoiser_step_mock_ar(self, last, cache):
        return self.denoise(last, self.prefill(cache["ids"][:, :-1]))

    def generate_ar(self, ids, max_new_tokens, temperature=0.0, eos_token_id=None, logits=None):
        cache = self._build_context_cache(ids)
        for _ in range(max_new_tokens):
            step = cache["logits"] if logits is None else logits(cache["ids"][:, -1:], cache)
            token = step[:, -1].argmax(-1, keepdim=True)
            self._extend_context_cache(token, cache)
            if eos_token_id in token.flatten().tolist():
                break
        return cache["ids"]

    def generate_mock_ar(self, *args, **knobs):
        return self.generate_ar(*args, logits=self._run_denoiser_step_mock_ar, **knobs)

    def generate_mask_diffusion(self, ids, max_new_tokens, block_size, steps_per_block,
                                mask_token_id, temperature, confidence_threshold=0.9,
                                eos_token_id=None):
        assert max_new_tokens % block_size == 0
        self._last_nfe, cache = 0, self._build_context_cache(ids)
        for _ in range(max_new_tokens // block_size):
            block = ids.new_full((len(ids), block_size), mask_token_id)
            for step in range(steps_per_block):
                masked = block == mask_token_id
                left = int(masked.sum())
                if left == 0:
                    break
                logits = self._run_denoiser_step_diffusion(
                    block, cache, masked.float().mean().repeat(len(ids)))
                self._last_nfe += 1
                logits[..., mask_token_id] = -torch.inf
                confidence, token = logits.softmax(-1).max(-1)
                confidence = confidence.masked_fill(~masked, -1.0)
                n = max(int((confidence > confidence_threshold).sum()),
                        -(-left // (steps_per_block - step)))
                # among equal confidences the rightmost first
                chosen = confidence.argsort(dim=1, stable=True)[:, -n:]
                block.scatter_(1, chosen, token.gather(1, chosen))
            self._extend_context_cache(block, cache)
            if eos_token_id in block.flatten().tolist():            # what stands after it stays
                break
        return cache["ids"]
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
    ("--reference=FILE", "--reference and --official-python need --checkpoint=DIR"),
    ("--official-python=python", "--reference and --official-python need --checkpoint=DIR")])
def test_wrong_options_of_the_comparison(args, message):
    run = run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", "test_twotower.py",
                     *args.split())
    assert run.returncode == pytest.ExitCode.USAGE_ERROR and not run.stdout
    assert run.stderr.startswith("ERROR: ") and message in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1


def test_the_published_code_in_an_environment_of_its_own(tmp_path):
    """Another interpreter, with an older transformers and no pytest to import; it runs once, also
    with -n 2, also where the project's folder is called official; then it is not needed."""
    counting = "open(__file__ + '.runs', 'a').write('*')\n" + REPAIRED
    directory, site = published_code(tmp_path, counting)
    shutil.rmtree(site / "transformers")
    second, reference = tmp_path / "second", tmp_path / "reference.safetensors"
    venv.create(second, symlinks=True)
    packages, = second.glob("lib/python*/site-packages")
    # torch is the one of this environment
    (packages / "first.pth").write_text("\n".join([
        str(site), *(path for path in sys.path if path.endswith("-packages")),
        "import sys; sys.modules['pytest'] = None"]))
    pip = run_python("-m", "pip", "--python", second / "bin" / "python", "install", "-q",
                     "--no-compile", "transformers==5.23.0")
    if pip.returncode:
        pytest.skip(f"pip cannot install transformers 5.23.0: {pip.stderr.splitlines()[-1]}")
    (tmp_path / "official").symlink_to(HERE)
    run = run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", 2, "test_twotower.py",
                     "--checkpoint", directory, "--reference", reference,
                     "--official-python", second / "bin" / "python", cwd=tmp_path / "official")
    assert run.returncode == 0 and "5 passed" in run.stdout, run.stdout
    runs = directory / f"{official.CODE}.runs"
    assert runs.read_text() == "*"
    assert official.reference(directory, reference) and runs.read_text() == "*"
    reference.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="is not a reference file"):
        official.reference(directory, reference)


# ------------------------------------------------------------------------------------- the rest

def test_readme():
    """Of the two set-up lines one runs as it stands and shows blocks being denoised, the other is
    what CI runs; the Python lines run on another checkpoint and device; what is linked is there,
    and so is every flag."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    commands, = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    show, test = (line.removeprefix("pip install -r requirements.txt && ")
                  for line in commands.splitlines())
    assert test == (HERE / ".ci" / "run").read_text().splitlines()[-1]
    assert show == "python sample.py"
    run = run_python("sample.py")
    assert run.returncode == 0, run.stderr
    prompt, *lines, answer = run.stdout.splitlines()
    lines = [line for line in lines if line.startswith(("block ", "       "))]
    masks = [line.count("\u2591") for line in lines]
    assert masks[0] == 16 and 0 in masks and any(0 < count < 16 for count in masks)
    assert sum(line.startswith("block ") for line in lines) == masks.count(16) == 3
    assert json.loads(answer) == record(prompt) | {"age": 63} and len(record(prompt)) == 6
    assert run.stderr.splitlines()[-1].startswith("mask_diffusion on ")
    code, = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    code = f"directory = {str(GOLDEN / 'cfg1')!r}\n" + re.sub(r"cuda:\d", "cpu", code)
    run = run_python("-c", code)
    assert run.returncode == 0 and "tensor([" in run.stdout, run.stderr
    for link in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (HERE / link).exists(), link
    for program, flags in re.findall(r"python (\w+\.py)(.*)", text):
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", flags):
            names = f'"{flag}"', f"{flag[2:]}: "        # as a flag, or a parameter that makes one
            source = (HERE / program).read_text(encoding="utf-8")
            assert any(name in source for name in names), (program, flag)


def test_figures(tmp_path, monkeypatch):
    """All that need no measurement are drawn, and those of what was measured; figures/ holds no
    others."""
    make = importlib.import_module("figures.make")
    monkeypatch.setattr(make, "OUT", tmp_path)
    make.main()
    assert {path.name for path in tmp_path.iterdir()} == set(
        re.findall(r"\w+\.(?:png|gif)", make.__doc__.split("These are computed")[0]))
    rows = [{"mode": mode, "accuracy": 0.5, "speedup": 2.0}
            for mode in ("ar", "gamma 0.8", "speculative")]
    table = [{"batch": 1, "1 passes": 5.0, "2 passes": 3.0}]
    for what, result in (("miniature", {"rows": rows}), ("gpu", {
            "gpu": "X", "random_speed_up": table, "concentrated_speed_up": table})):
        result["setting"] = {"what": what}
        (tmp_path / "printed").write_text(f"a table\n{json.dumps(result)}\n")
        make.measured(tmp_path / "printed")
    for phase in (1, 2):
        torch.save({"log": [{"step": 1, "valid": {"json": 1.0}}]}, tmp_path / f"phase{phase}.pt")
    make.measured(tmp_path)
    drawn, kept = ({path.name for path in folder.iterdir() if path.suffix in (".png", ".gif")}
                   for folder in (tmp_path, HERE / "figures"))
    assert drawn - {"gpu.png"} == kept


def test_tutorial():
    """Its quotes stand in the code, its checks print what it says, its links lead somewhere, its
    results are those of miniature/README.md."""
    text = (HERE / "tutorial.md").read_text(encoding="utf-8")
    assert len(text.split()) < 6000
    make = importlib.import_module("figures.make")
    assert make.with_line_numbers(text) == text, "run python figures/make.py"
    for link in re.findall(r"\]\(([^)#]+)(?:#L\d+)?\)", text):
        assert (HERE / link).is_file(), link
    quotes, checks = 0, []
    blocks = re.findall(r"```python\n(.*?)```\n(```text\n(.*?)```)?", text, re.DOTALL)
    for code, _, printed in blocks:
        quoted = re.match(r"# (\w+)\.py: ([\w.]+)\n", code)
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
    assert run.returncode == 0, run.stderr
    for (code, expected), printed in zip(checks, run.stdout.split("\f")):
        assert printed == expected, f"{code}prints\n{printed}"
    measured = (HERE / "miniature" / "README.md").read_text(encoding="utf-8")
    table = text[text.index("| claim | published | here |"):]
    here = re.findall(r"\d+(?:\.\d+)?(?: %|x)", "".join(row.split("|")[3] for row in
                                                       table.splitlines()[2:] if row))
    assert here and all(number in measured for number in here), here


@needs_kernels
def test_bench_gpu_counts_what_must_move(capsys, monkeypatch):
    """Its tables on a small model and the CPU: experts that were hit, costs, ratios of times; no
    speed where a replay goes wrong."""
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
            model, (1, 2), 40, lambda run: (run(), float(next(times)))[1], 1e9, 1e9)
    assert [row["pass"] for row in rows[:3]] == ["AR token", "denoiser step", "block extension"]
    assert rows[0]["experts"] == 2 and rows[2]["experts"] == 3
    ar, denoise, extension = (row["graphs_ms"] for row in rows[3:])
    assert table[1]["2 passes"] == 16 * ar / (2 * denoise + extension)
    assert table[1]["ar_tokens_per_second"] == 2e3 / ar

    def forgetful(self, context, *args):        # a state is not written back
        states = [state.map(torch.clone) for state in self.mamba]
        out = extend(self, context, *args)
        for state, old in zip(self.mamba, states if self.recording else []):
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
