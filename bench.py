"""Measurements, each against a yardstick in the same run; the last line printed is JSON.

    python bench.py cpu         prefill, AR decoding and one denoiser step of a small random model,
                                beside transformers' NemotronH with the same weights
    python bench.py miniature   quality and speed of the trained miniature in all modes: exact match
                                on held-out items, passes, tokens/s, likelihood; --plot draws them
    python bench.py samples     what the miniature writes after held-out source
    python bench.py templates   the miniature filling gaps, with and without what follows them
    python bench.py batch       the miniature's tokens/s by number of prompts decoded together
    python bench.py recipes     a denoiser trained briefly by each of several recipes, from a
                                phase 1 of train.py
    python bench.py gpu         the full-size model with random weights, made on the GPU: time,
                                bytes and share of the roof of every pass; speed-up over AR

Whatever is timed takes turns within a run, so that a machine that slows down slows all of it;
compare ratios, not milliseconds.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import itertools
import json
import multiprocessing
import os
import platform
import random
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from train import MODEL, PUBLISHED, TASKS, Data, Recipe, Trainer, build, library, task_items
from twotower import (Context, KVCache, MambaState, Router, Span, TwoTower, TwoTowerConfig,
                      kernels)

HERE = os.path.dirname(os.path.abspath(__file__))

# golden/cfg1 four times as wide, with 16 experts and a vocabulary of 1024
SMALL = dict(
    hidden_size=256, hybrid_override_pattern="MEM*EMEM*E", num_hidden_layers=10, vocab_size=1024,
    layer_norm_epsilon=1e-5, mamba_num_heads=8, mamba_head_dim=64, n_groups=2, ssm_state_size=64,
    conv_kernel=4, chunk_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
    intermediate_size=192, n_routed_experts=16, num_experts_per_tok=2, moe_intermediate_size=96,
    moe_shared_expert_intermediate_size=160, norm_topk_prob=True, routed_scaling_factor=2.5,
    max_position_embeddings=16384)


# the released checkpoint's
RELEASED = dict(
    hidden_size=2688, num_hidden_layers=52, vocab_size=131072,
    hybrid_override_pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    layer_norm_epsilon=1e-5, mamba_num_heads=64, mamba_head_dim=64, n_groups=8, ssm_state_size=128,
    conv_kernel=4, chunk_size=128, num_attention_heads=32, num_key_value_heads=2, head_dim=128,
    intermediate_size=1856, n_routed_experts=128, num_experts_per_tok=6,
    moe_intermediate_size=1856, moe_shared_expert_intermediate_size=3712, norm_topk_prob=True,
    routed_scaling_factor=2.5)


def bytes_of_pass(config: TwoTowerConfig, experts: float, cached: int = 0, rows: int = 1) -> float:
    """What one pass of one tower in bfloat16 must read: the weights outside the routed experts (but
    for the embedding, of which it takes rows), `experts` distinct ones in each MoE layer, the head,
    and for each of `rows` rows keys and values of `cached` tokens and the Mamba-2 states."""
    with torch.device("meta"):
        model = TwoTower(config, towers="context").to(torch.bfloat16)
    share = experts / config.n_routed_experts
    weights = sum(p.nbytes * (share if ".experts." in name else 1)
                  for name, p in model.named_parameters() if "embeddings" not in name)
    states = model.context_tower.empty_states(1, 1)
    mamba = sum(x.nbytes for state in states if isinstance(state, MambaState) for x in state)
    return weights + rows * (cached * bytes_per_cached_token(states) + mamba)


@contextlib.contextmanager
def without_this_folder():
    """transformers imports the package `kernels` where it is installed, and would find the file of
    that name beside this one."""
    path, here = sys.path[:], Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in path if Path(entry).resolve() != here]
    try:
        yield
    finally:
        sys.path[:] = path


def as_transformers(model: TwoTower):
    """transformers' NemotronHForCausalLM holding our context tower's weights."""
    with without_this_folder():
        from transformers import NemotronHConfig, NemotronHForCausalLM

    c = model.config
    same = ("hidden_size vocab_size layer_norm_epsilon mamba_num_heads mamba_head_dim n_groups "
            "ssm_state_size conv_kernel chunk_size num_attention_heads num_key_value_heads "
            "head_dim intermediate_size n_routed_experts num_experts_per_tok moe_intermediate_size "
            "moe_shared_expert_intermediate_size norm_topk_prob routed_scaling_factor n_group "
            "topk_group use_bias use_conv_bias attention_bias mlp_bias residual_in_fp32 "
            "max_position_embeddings").split()
    kinds = {"M": "linear_attention", "*": "full_attention", "E": "moe", "-": "mlp"}
    config = NemotronHConfig(**{name: getattr(c, name) for name in same},
                             layers_block_type=[kinds[k] for k in c.hybrid_override_pattern],
                             time_step_min=c.time_step_limit[0] or 1e-30,   # clamps dt
                             attn_implementation="sdpa")
    theirs = NemotronHForCausalLM(config).eval()
    ours = {"model." + name: tensor for name, tensor in model.context_tower.state_dict().items()}
    ours |= {"lm_head.weight": model.context_lm_head.weight}
    ours = {name.replace("experts.up_proj.weight", "experts.up_proj").replace(
        "experts.down_proj.weight", "experts.down_proj") if "shared" not in name else name: tensor
        for name, tensor in ours.items()}
    theirs.load_state_dict(ours)
    return theirs.to(model.context_lm_head.weight.dtype)


def take_turns(contestants: dict, rounds: int) -> dict[str, float]:
    """Median seconds of each callable over `rounds`, after one uncounted round."""
    seconds = {name: [] for name in contestants}
    for _ in range(rounds + 1):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def bytes_per_cached_token(states: list) -> int:
    return sum(2 * s.key_cache[0, :, 0].nbytes for s in states if isinstance(s, KVCache))


@torch.inference_mode()
def bench_cpu(rounds: int) -> dict:
    """Prefill of 512, AR decoding, a denoiser step of 16; then an AR token over longer contexts."""
    torch.manual_seed(0)
    model = TwoTower(TwoTowerConfig(**SMALL)).eval()
    theirs = as_transformers(model)
    prompt = torch.randint(4, 1024, (1, 512))
    new, block = 64, torch.full((1, 16), 3)

    ours_512, theirs_512 = model.prefill(prompt), theirs(prompt, use_cache=True, logits_to_keep=1)
    gap = (ours_512.logits - theirs_512.logits[:, -1]).abs().max() / theirs_512.logits.std()
    if not gap <= 1e-3:
        sys.exit(f"bench: the two context towers differ by {gap:.1e}; no speed is reported")

    def ar_ours():
        model.generate_ar(prompt, new)

    def ar_theirs():
        theirs.generate(prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False,
                        attention_mask=torch.ones_like(prompt), pad_token_id=0)

    def loop_theirs():          # their model without their generate()
        out = theirs(prompt, use_cache=True, logits_to_keep=1)
        for _ in range(new - 1):
            token = out.logits[:, -1:].argmax(-1)
            out = theirs(token, past_key_values=out.past_key_values, use_cache=True)

    t = take_turns({
        "prefill": lambda: model.prefill(prompt),
        "prefill_transformers": lambda: theirs(prompt, use_cache=True, logits_to_keep=1),
        "ar": ar_ours, "ar_transformers": ar_theirs, "ar_transformers_loop": loop_theirs,
        "denoise": lambda: model.denoise(block, ours_512, 1.0)}, rounds)
    decode = {name: (t[name] - t["prefill" + ("_transformers" if "tr" in name else "")]) / (new - 1)
              for name in ("ar", "ar_transformers", "ar_transformers_loop")}
    result = {
        "prefill_512_speedup": t["prefill_transformers"] / t["prefill"],
        "ar_token_speedup": decode["ar_transformers"] / decode["ar"],
        "ar_token_speedup_over_bare_loop": decode["ar_transformers_loop"] / decode["ar"],
        "denoise_16_in_ar_tokens": t["denoise"] / decode["ar"],
        "prefill_512_in_ar_tokens": t["prefill"] / decode["ar"]}
    rows = (("prefill of 512 tokens", "prefill_512_speedup", "x transformers' speed"),
            ("AR token", "ar_token_speedup", "x transformers' generate()"),
            ("AR token", "ar_token_speedup_over_bare_loop", "x a bare loop over its model"),
            ("denoiser step of 16 tokens", "denoise_16_in_ar_tokens", "AR tokens of time"),
            ("prefill of 512 tokens", "prefill_512_in_ar_tokens", "AR tokens of time"))
    for what, name, unit in rows:
        print(f"{what:28} {result[name]:6.2f} {unit}")

    pattern = SMALL["hybrid_override_pattern"].replace("*", "")
    bare = TwoTower(TwoTowerConfig(**SMALL | dict(
        hybrid_override_pattern=pattern, num_hidden_layers=len(pattern))), towers="context").eval()
    token = torch.tensor([[5]])

    def sixteen_tokens_after(model, context):
        def run():
            for _ in range(16):
                model.extend(context, token)
        return run

    lengths = (256, 512, 1024, 2048, 4096, 8192)
    contexts = {(m, n): m.prefill(torch.randint(4, 1024, (1, n)), reserve=16 * (rounds + 1))
                for m in (model, bare) for n in lengths}
    t = take_turns({key: sixteen_tokens_after(key[0], c) for key, c in contexts.items()}, rounds)
    print("\ncontext   AR token / at 256   without attention layers   KV bytes/token   Mamba bytes")
    result["growth"] = []
    for n in lengths:
        states = contexts[model, n].states
        mamba = sum(s.ssm_state.nbytes for s in states if isinstance(s, MambaState))
        row = {"context": n, "token": t[model, n] / t[model, 256],
               "token_without_attention": t[bare, n] / t[bare, 256],
               "kv_bytes_per_token": bytes_per_cached_token(states), "mamba_bytes": mamba}
        result["growth"].append(row)
        print(f"{n:7}   {row['token']:17.2f}   {row['token_without_attention']:24.2f}   "
              f"{row['kv_bytes_per_token']:14}   {mamba:11}")
    return result


# ---------------------------------------------------------------------------------------------
# bench.py gpu

POOL = 36       # experts that 16 tokens, 6 each, are made to choose from: they hit 34 on average


def random_context(model: TwoTower, rows: int, length: int, room: int) -> Context:
    """As after a prefill of `length` tokens, with random contents; a prefill of many rows would
    need more memory than the weights leave."""
    context = Context(model.context_tower, rows, length + room)
    for state in context.states:
        if state is not None:
            state.map(lambda x: x.normal_())
    context.lengths = context.lengths + length
    return context


@contextlib.contextmanager
def experts_hit(model: TwoTower):
    """A list that gets the number of distinct experts of every MoE layer that runs meanwhile."""
    found = []
    hooks = [module.register_forward_hook(lambda _, __, out: found.append(len(out[0].unique())))
             for module in model.modules() if isinstance(module, Router)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def concentrate_routing(model: TwoTower, experts: int):
    """Let the routers choose among their first `experts` experts only."""
    for module in model.modules():
        if isinstance(module, Router):
            module.e_score_correction_bias[experts:] = -10.0


def passes_over(model: TwoTower, context: Context, graphs: bool) -> dict:
    """By name: how many tokens a row has in the pass, and a function that runs it, always at the
    context's present length: an AR token, a denoiser step, a block extension."""
    Q, device, lengths = 16, context.device, context.lengths.clone()
    if graphs:
        context.passes = kernels().Passes(model, context, Span.fixed)
    token, block = (torch.randint(4, model.config.vocab_size, (len(lengths), n), device=device)
                    for n in (1, Q))
    t = torch.full((len(lengths),), 0.5, device=device)
    span = Span.make(lengths, Q, device, for_context=False)

    def at_length(run):
        def again():
            context.lengths = lengths
            if context.passes is not None:
                context.passes.lengths.copy_(lengths, non_blocking=True)
            return run()
        return again

    runs = {"AR token": (1, lambda: model._extend(context, token, logits="last")),
            "denoiser step": (Q, lambda: model._denoiser_logits(block, context, span, t)),
            "block extension": (Q, lambda: model._extend(context, block))}
    return {name: (L, at_length(run)) for name, (L, run) in runs.items()}


def check_replays(model: TwoTower, rows: int, length: int):
    """Replays of recorded passes must give what the passes give; no speed is reported else."""
    results = []
    for recording in (False, True):
        torch.manual_seed(0)
        context = random_context(model, rows, length, room=64)
        runs = passes_over(model, context, graphs=True)
        context.passes.recording = recording
        # the denoiser after each change of the context sees whether its states are right
        found = (runs[name][1]() for name in (
            "denoiser step", "AR token", "denoiser step", "block extension", "denoiser step",
            "AR token", "denoiser step", "block extension", "denoiser step"))
        results.append([logits.clone() for logits in found if logits is not None])
    for plain, recorded in zip(*results):
        gap = float((plain - recorded).square().mean().sqrt() / plain.square().mean().sqrt())
        # the same kernels, unless a library chooses otherwise while it is recorded; a rounding that
        # changes the choice of an expert makes some 0.02, a state not written back 0.5 (both seen
        # on a narrow bfloat16 model of the release's 52 layers)
        if not gap < 0.1:
            raise ValueError(f"recorded passes differ from plain ones by {gap:.1e}")


def time_passes(model: TwoTower, rows: int, length: int, graphs: bool, seconds_of) -> dict:
    """Seconds, bytes and FLOPs of each pass, and the experts that a layer's tokens hit."""
    config = model.config
    active = config.num_experts_per_tok / config.n_routed_experts
    numbers = sum(p.numel() * (active if ".experts." in name else 1)
                  for name, p in model.context_tower.named_parameters() if "embed" not in name)
    head = config.vocab_size * config.hidden_size
    context, found = random_context(model, rows, length, room=64), {}
    mamba = sum(x.nbytes for s in context.states if isinstance(s, MambaState) for x in s)
    for name, (L, run) in passes_over(model, context, graphs).items():
        row = found[name] = {"seconds": seconds_of(run)}
        if graphs:
            continue
        with experts_hit(model) as hit:
            run()
        row["experts"] = statistics.mean(hit)
        row["bytes"] = bytes_of_pass(config, row["experts"], length, rows)
        logits = {"AR token": 1, "denoiser step": L, "block extension": 0}[name]
        row["flops"] = 2 * rows * (L * numbers + logits * head)
        if name != "denoiser step":                 # the context's states are written as well
            row["bytes"] += mamba
        if not logits:                              # the head is not read
            row["bytes"] -= model.context_lm_head.weight.nbytes
    return found


def table_of_passes(model: TwoTower, batches, length: int, seconds_of, bandwidth: float,
                    rate: float) -> list[dict]:
    """Print a row for every pass and batch, without and with CUDA graphs, against the roof: what
    bytes and FLOPs take at `bandwidth` bytes, as measured of a copy, and `rate` FLOPs a second."""
    print(f"\n{'batch':>5}  {'pass':16} {'experts':>7} {'GB':>7} {'ms':>9} {'% of roof':>9}"
          f" {'graphs ms':>9} {'% of roof':>9}")
    rows = []
    check_replays(model, batches[0], length)
    for batch in batches:
        measured = [time_passes(model, batch, length, on, seconds_of) for on in (False, True)]
        for name, row in measured[0].items():
            roof = max(row["bytes"] / bandwidth, row["flops"] / rate)
            times = [found[name]["seconds"] for found in measured]
            print(f"{batch:5}  {name:16} {row['experts']:7.1f} {row['bytes'] / 1e9:7.2f}"
                  + "".join(f" {1e3 * s:9.3f} {100 * roof / s:9.0f}" for s in times), flush=True)
            rows.append({"batch": batch, "pass": name, "experts": row["experts"], "roof": roof,
                         "bytes": row["bytes"], "flops": row["flops"], "seconds": times})
    return rows


def speed_ups(rows: list[dict], block_size: int = 16) -> list[dict]:
    """From the times of the passes, by batch: diffusion's speed over AR's at 1 to 16 denoiser
    passes a block, which are assumed, and the passes at which it would be 1 and 2.42."""
    table = []
    print("\nspeed of diffusion over AR if a block takes so many denoiser passes (assumed)")
    print("batch  AR tokens/s " + "".join(f"{n:7}" for n in (1, 2, 4, 6, 8, 12, 16))
          + "   1x at  2.42x at")
    for batch in sorted({row["batch"] for row in rows}):
        ar, step, extend = (next(row["seconds"][-1] for row in rows
                                 if row["batch"] == batch and row["pass"] == name)
                            for name in ("AR token", "denoiser step", "block extension"))
        by_passes = [block_size * ar / (n * step + extend) for n in range(1, block_size + 1)]
        crossings = [(block_size * ar / speed - extend) / step for speed in (1, 2.42)]
        print(f"{batch:5} {batch / ar:12.1f} "
              + "".join(f"{by_passes[n - 1]:7.2f}" for n in (1, 2, 4, 6, 8, 12, 16))
              + "".join(f"{n:9.1f}" for n in crossings))
        table.append({"batch": batch, "ar_tokens_per_second": batch / ar, "speed_up": by_passes,
                      "passes_at_1": crossings[0], "passes_at_2.42": crossings[1]})
    return table


@torch.no_grad()
def bench_gpu(plot: str) -> dict:
    from triton.testing import do_bench

    if not torch.cuda.is_available():
        raise ValueError("gpu needs a CUDA device with 130 GB of memory, such as an H200")
    print(torch.cuda.get_device_name())

    def seconds_of(run) -> float:
        return do_bench(run, warmup=50, rep=300, return_mode="median") / 1e3

    bandwidth, rate, _ = kernels().ceilings(seconds_of)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = TwoTower(TwoTowerConfig(**RELEASED)).eval().use("triton")
    torch.set_default_dtype(torch.float32)
    result = {"gpu": torch.cuda.get_device_name(), "bandwidth": bandwidth, "rate": rate}

    print("\nprefill   ms   tokens/s")
    result["prefill"] = {}
    for length in (512, 2048, 8192, 32768):
        prompt = torch.randint(4, RELEASED["vocab_size"], (1, length))
        seconds = seconds_of(lambda: model.prefill(prompt))
        result["prefill"][length] = seconds
        print(f"{length:6} {1e3 * seconds:8.1f} {length / seconds:10.0f}", flush=True)

    measure = functools.partial(table_of_passes, model, length=2048, seconds_of=seconds_of,
                                bandwidth=bandwidth, rate=rate)
    print("\nrandom routing, context 2,048")
    result["random"] = measure(batches=(1, 4, 16, 64))
    result["random_speed_up"] = speed_ups(result["random"])
    concentrate_routing(model, POOL)
    print(f"\nrouting held to {POOL} experts a layer, so that 16 tokens hit 34, as is reported of "
          "the release (imposed)")
    result["concentrated"] = measure(batches=(1, 4))
    result["concentrated_speed_up"] = speed_ups(result["concentrated"])
    result["decoding"] = time_decoding(model)
    try:
        result["transformers_ar_token"] = time_transformers(model, seconds_of)
    except Exception as error:          # whatever another library does, the rest is worth keeping
        result["transformers_ar_token"] = str(error)
    print("\nseconds of an AR token after 2,048 by transformers' NemotronH: "
          f"{result['transformers_ar_token']}; ours, without and with graphs: "
          f"{result['concentrated'][0]['seconds']}")
    if plot:
        plot_speed_ups(result, plot)
    return result


def time_decoding(model: TwoTower, new: int = 512) -> dict[str, float]:
    """Tokens a second of whole generations at batch 1 after 2,048, prefill taken off: AR, and
    diffusion made to take so many passes a block by a threshold that nothing reaches."""
    model.use("triton", graphs=True)
    prompt, found = torch.randint(4, model.config.vocab_size, (1, 2048)), {}

    def seconds(generate, tokens: int, **knobs) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        generate(prompt, tokens, **knobs)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    ways = {"AR": (model.generate_ar, {})} | {
        f"{n} passes a block": (model.generate_mask_diffusion,
                                {"steps_per_block": n, "confidence_threshold": 2.0})
        for n in (1, 2, 4, 8, 16)}
    print("\nwhole generations of batch 1, graphs, tokens a second")
    for name, (generate, knobs) in ways.items():
        seconds(generate, 32, **knobs)
        # both record their graphs: the difference is decoding
        found[name] = new / (seconds(generate, new + 32, **knobs) - seconds(generate, 32, **knobs))
        print(f"{name:18}{found[name]:9.1f}{found[name] / found['AR']:7.2f}x", flush=True)
    return found


def time_transformers(model: TwoTower, seconds_of) -> float:
    """Seconds of an AR token after 2,048 by transformers' NemotronH, which takes the denoiser's
    place in memory."""
    model.denoiser_tower = model.lm_head = None
    gc.collect()
    torch.cuda.empty_cache()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            theirs = as_transformers(model)
    finally:
        torch.set_default_dtype(torch.float32)
    prompt = torch.randint(4, model.config.vocab_size, (1, 2048), device="cuda")
    out = theirs(prompt, use_cache=True, logits_to_keep=1)
    return seconds_of(lambda: theirs(prompt[:, :1], past_key_values=out.past_key_values,
                                     use_cache=True))


def plot_speed_ups(result: dict, path: str):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharey=True)
    for ax, kind in zip(axes, ("random", "concentrated")):
        for row in result[f"{kind}_speed_up"]:
            ax.plot(range(1, 17), row["speed_up"], "o-", markersize=3,
                    label=f"batch {row['batch']}")
        ax.axhline(2.42, color="#c1121f", linewidth=0.8)
        ax.axhline(1, color="black", linewidth=0.8)
        ax.set(title=f"{kind} routing, {result['gpu']}", yscale="log",
               xlabel="denoiser passes a block (assumed)")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    axes[0].set_ylabel("speed over AR, from measured passes")
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------
# bench.py miniature

MODES = {"ar": ("ar", {}), "mock-AR": ("mock_ar", {})}
MODES |= {f"gamma {gamma}": ("mask_diffusion", {"confidence_threshold": gamma})
          for gamma in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)}
MODES |= {f"block {size}": ("mask_diffusion", {"block_size": size, "steps_per_block": size})
          for size in (8, 32, 64)}             # at gamma 0.8; "gamma 0.8" itself has block 16
MODES |= {"speculative": ("speculative", {})}
MODES |= {"t frozen": ("mask_diffusion", {}), "no Mamba seeding": ("mask_diffusion", {})}


@contextlib.contextmanager
def altered(model: TwoTower, name: str):
    """The model with t held at 0.5, or with Mamba layers of the denoiser starting from zeros."""
    hooks = []
    if name == "t frozen":
        hooks.append(model.t_embedder.register_forward_pre_hook(
            lambda _, args: (torch.full_like(args[0], 0.5),)))
    if name == "no Mamba seeding":
        def unseeded(mixer, args):
            x, state, span = args
            return x, mixer.empty_state(len(x), 0), span

        hooks += [layer.mixer.register_forward_pre_hook(unseeded)
                  for layer in model.denoiser_tower.layers if layer.kind == "M"]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class Score:
    """What one mode did with a list of items; tokens count up to and with </s>."""

    items: int = 0
    right: int = 0
    tokens: int = 0
    blocks: int = 0                 # of 16 tokens, whatever the mode's own
    nfe: int = 0
    context_passes: int = 0
    log_likelihood: float = 0.0     # of the tokens written, under the context tower; nats
    seconds: float = 0.0

    def add(self, other: Score):
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


@torch.inference_mode()
def answer(model: TwoTower, tokenizer, items: list, name: str, batch: int = 16) -> Score:
    """Let one mode answer (prompt ids, right answer, new tokens) items, `batch` rows at a time."""
    mode, knobs = MODES[name]
    total = Score()
    for i in range(0, len(items), batch):
        prompts, answers, lengths = zip(*items[i:i + batch])
        with altered(model, name):
            start = time.perf_counter()
            result = getattr(model, f"generate_{mode}")(
                prompts, max(lengths), eos_token_id=model.config.eos_token_id, **knobs)
            seconds = time.perf_counter() - start
        total.add(Score(
            items=len(prompts), seconds=seconds, nfe=int(result.nfe.sum()),
            tokens=sum(map(len, result.tokens)),
            blocks=sum(-(-len(new) // 16) for new in result.tokens),
            context_passes=int(result.context_passes.sum()),
            log_likelihood=float(model.score(prompts, result.tokens).total.sum()),
            right=sum(is_right(tokenizer.decode(new.tolist()), right)
                      for new, right in zip(result.tokens, answers))))
    return total


def is_right(written: str, right: str) -> bool:
    """A task's answer must be right to the last character, a source line up to its end."""
    return written == right or right.endswith("\n") and written.startswith(right)


def task_prompts(tokenizer, task: str, count: int, seed: str = "bench") -> list:
    return [(torch.tensor(tokenizer.encode(prompt).ids), text, 96)
            for prompt, text in itertools.islice(task_items(task, seed, held_out=True), count)]


def library_prompts(tokenizer, count: int) -> list:
    """Held-out source, cut within a line; right if the line's last quarter is written as it was."""
    rng, items = random.Random("library"), []
    files = library(held_out=True)
    while len(items) < count:
        text = rng.choice(files)
        start = rng.randrange(max(1, len(text) - 400))
        end = text.find("\n", start + 300)
        line = text[:end].rpartition("\n")[2]
        if end < 0 or len(line.strip()) < 20:
            continue
        cut = end - len(line.lstrip()) // 4
        prompt = tokenizer.encode(text[start:cut]).ids
        items.append((torch.tensor(prompt), text[cut:end + 1], 32))
    return items


def load(checkpoint: str) -> tuple[TwoTower, Tokenizer]:
    return (TwoTower.from_pretrained(checkpoint, dtype=torch.float32).eval(),
            Tokenizer.from_file(os.path.join(checkpoint, "tokenizer.json")))


def prompts_of(tokenizer, kind: str, count: int) -> list:
    if kind == "library":
        return library_prompts(tokenizer, count)
    return task_prompts(tokenizer, kind, count)


def quality_of(checkpoint: str, count: int, mode_and_kind: tuple[str, str]) -> Score:
    name, kind = mode_and_kind
    torch.set_num_threads(1)
    model, tokenizer = load(checkpoint)
    return answer(model, tokenizer, prompts_of(tokenizer, kind, count), name, batch=50)


def bench_miniature(checkpoint: str, count: int, timed: int, plot: str) -> dict:
    """Accuracy of every mode in batches, in a process per thread; then, alone, speed at batch 1,
    all modes taking turns item by item."""
    model, tokenizer = load(checkpoint)
    kinds = {kind: prompts_of(tokenizer, kind, timed) for kind in (*TASKS, "library")}
    keys = list(itertools.product(MODES, kinds))
    with multiprocessing.get_context("spawn").Pool(torch.get_num_threads()) as pool:
        scores = pool.map(functools.partial(quality_of, checkpoint, count), keys, chunksize=1)
    quality, speed = dict(zip(keys, scores)), {key: Score() for key in keys}
    for i in range(-1, timed):
        for kind, items in kinds.items():
            for name in itertools.islice(itertools.cycle(MODES), max(i, 0), max(i, 0) + len(MODES)):
                score = answer(model, tokenizer, [items[max(i, 0)]], name)
                if i >= 0:                          # the first round only warms up
                    speed[name, kind].add(score)
    rows = [summary(name, kinds, quality, speed) for name in MODES]
    for row in rows:
        row["speedup"] = row["tokens_per_second"] / rows[0]["tokens_per_second"]
        row["share_of_ar_accuracy"] = row["accuracy"] / max(rows[0]["accuracy"], 1e-9)
    print_table(rows, list(kinds))
    if plot:
        plot_frontier(rows, plot)
    return {"checkpoint": checkpoint, "items": count, "timed": timed, "rows": rows}


def summary(name: str, kinds: dict, quality: dict, speed: dict) -> dict:
    """One row of the table: tasks together, library source beside them; the prompts' own context
    passes are not counted."""
    tasks, timed, row = Score(), Score(), {"mode": name}
    for kind in kinds:
        score = quality[name, kind]
        row[kind] = score.right / score.items
        if kind != "library":
            tasks.add(score)
            timed.add(speed[name, kind])
    source, source_timed = quality[name, "library"], speed[name, "library"]
    return row | {
        "denoiser_passes_per_block": tasks.nfe / tasks.blocks,
        "context_passes_per_block": (tasks.context_passes - tasks.items) / tasks.blocks,
        "accuracy": statistics.mean(row[kind] for kind in kinds if kind != "library"),
        "tokens_per_denoiser_pass": tasks.tokens / tasks.nfe if tasks.nfe else 0.0,
        "tokens_per_context_pass": tasks.tokens / max(tasks.context_passes - tasks.items, 1),
        "tokens_per_second": timed.tokens / timed.seconds,
        "ms_per_pass": 1000 * timed.seconds / (timed.nfe + timed.context_passes),
        "log_likelihood": tasks.log_likelihood / tasks.tokens,
        "library_tokens_per_pass": source.tokens / (source.nfe or source.context_passes),
        "library_tokens_per_second": source_timed.tokens / source_timed.seconds,
        "library_log_likelihood": source.log_likelihood / source.tokens}


def print_table(rows: list[dict], kinds: list[str]):
    print("exact match by task; tokens for a pass of either tower, and passes for a block of 16; "
          "on the right, library source")
    print(f"{'':17}" + "".join(f"{kind:>8}" for kind in kinds[:-1]) + "    mean   of AR"
          "  tokens/denoiser,context  passes/block  speed  log p   library  tok/pass  speed  log p")
    base = rows[0]
    for row in rows:
        print(f"{row['mode']:17}" + "".join(f"{row[kind]:8.3f}" for kind in kinds[:-1])
              + f"{row['accuracy']:8.3f}{row['share_of_ar_accuracy']:8.3f}"
              f"{row['tokens_per_denoiser_pass']:17.2f}{row['tokens_per_context_pass']:8.2f}"
              f"{row['denoiser_passes_per_block']:8.2f}{row['context_passes_per_block']:6.2f}"
              f"{row['speedup']:6.2f}x{row['log_likelihood']:7.3f}"
              f"{row['library']:10.3f}{row['library_tokens_per_pass']:10.2f}"
              f"{row['library_tokens_per_second'] / base['library_tokens_per_second']:6.2f}x"
              f"{row['library_log_likelihood']:7.3f}")


def plot_frontier(rows: list[dict], path: str):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.6, 4.2), layout="constrained")
    gammas = [row for row in rows if row["mode"].startswith("gamma")]
    axes.plot([row["speedup"] for row in gammas], [row["accuracy"] for row in gammas], "o",
              label="diffusion, block 16, by gamma")
    axes.plot(1, rows[0]["accuracy"], "s", color="tab:gray", label="AR")
    lossless, = (row for row in rows if row["mode"] == "speculative")
    axes.plot(lossless["speedup"], lossless["accuracy"], "D", color="tab:purple",
              label="speculative: AR's own text")
    for i, row in enumerate(gammas):
        axes.annotate(row["mode"].split()[1], (row["speedup"], row["accuracy"]),
                      xytext=(3, 3) if i % 2 else (-3, -3), textcoords="offset points", fontsize=8,
                      rotation=45, ha="left" if i % 2 else "right", va="bottom" if i % 2 else "top")
    axes.axhline(0.987 * rows[0]["accuracy"], color="tab:green", lw=0.8, ls="--",
                 label="98.7 % of AR's accuracy")
    axes.axvline(2.42, color="tab:red", lw=0.8, ls="--", label="2.42 x AR's tokens per second")
    axes.set_xlabel("speed, x AR in the same run (batch 1)")
    axes.set_ylabel("exact match, mean of five tasks")
    axes.legend(loc="lower left", fontsize=8)
    axes.grid(alpha=0.3)
    axes.margins(y=0.1)
    figure.savefig(path, dpi=150)


# ---------------------------------------------------------------------------------------------
# bench.py samples


def bench_samples(checkpoint: str, mode: str, temperature: float) -> dict:
    """Ten continuations of held-out source, the first ten that the seed gives."""
    model, tokenizer = load(checkpoint)
    generate = getattr(model, f"generate_{mode}")
    rng, files, samples = random.Random("samples"), library(held_out=True), []
    for i in range(10):
        lines = rng.choice(files).splitlines(keepends=True)
        start = rng.randrange(max(1, len(lines) - 5))
        prompt = "".join(lines[start:start + 5])
        result = generate([torch.tensor(tokenizer.encode(prompt).ids)], 96,
                          temperature=temperature, eos_token_id=model.config.eos_token_id,
                          generator=torch.Generator().manual_seed(i))
        samples.append({"prompt": prompt, "text": tokenizer.decode(result.tokens[0].tolist())})
        print(f"--- {i}: five lines of held-out source, then what the model writes\n{prompt}"
              f"\u25b8{samples[-1]['text']}", flush=True)
    return {"mode": mode, "temperature": temperature, "samples": samples}


# ---------------------------------------------------------------------------------------------
# bench.py templates


@torch.inference_mode()
def bench_templates(checkpoint: str, count: int) -> dict:
    """A hole in a block of held-out text, filled in with the rest of the block given as a template,
    against the same with what follows the hole masked as well.

    Four tokens of answers to their prompts and of library source; and of a record without its
    prompt, after another record, the first field's name, which only the value after it tells.
    """
    model, tokenizer = load(checkpoint)
    rng, rows = random.Random("templates"), []
    mask, source = model.config.mask_token_id, library(held_out=True)

    def ids(text: str) -> Tensor:
        return torch.tensor(tokenizer.encode(text).ids)

    texts = {task: [(prompt, ids(text))
                    for prompt, text, _ in task_prompts(tokenizer, task, count, "templates")]
             for task in TASKS}
    records = [record for _, record in texts["json"]]
    texts["json, no prompt"] = [
        (F.pad(other, (0, 16 - len(other) % 16), value=model.config.eos_token_id), record)
        for other, record in zip(records[-1:] + records, records)]
    texts["library"] = []
    while len(texts["library"]) < count:
        text = rng.choice(source)
        start = rng.randrange(max(1, len(text) - 600))
        piece = ids(text[start:start + 600])
        if len(piece) >= 144:
            texts["library"].append(piece[:144].split([128, 16]))
    for kind, pairs in texts.items():
        row, hole = {"text": kind}, slice(1, 2) if kind == "json, no prompt" else slice(6, 10)
        prompts, blocks = zip(*((prompt, text[:16]) for prompt, text in pairs))
        for name, end in (("after_masked", 16), ("after_given", hole.stop)):
            templates = [block.clone() for block in blocks]
            for template in templates:
                template[hole.start:end] = mask
            result = model.generate_mask_diffusion(prompts, template=templates)
            right = torch.stack([new[hole] == block[hole]
                                 for new, block in zip(result.tokens, blocks)]).float()
            row |= {name: float(right.prod(-1).mean()), f"{name}_tokens": float(right.mean())}
        rows.append(row)
    print("the hole right, text after it        masked    given"
          "       tokens right   masked    given")
    for row in rows:
        print(f"{row['text']:33}{row['after_masked']:10.3f}{row['after_given']:9.3f}"
              f"{row['after_masked_tokens']:30.3f}{row['after_given_tokens']:9.3f}")
    return {"checkpoint": checkpoint, "items": count, "rows": rows}


# ---------------------------------------------------------------------------------------------
# bench.py batch


def bench_batch(checkpoint: str, rounds: int) -> dict:
    """32 held-out prompts of all tasks, decoded in batches of 1 to 32 in turns.

    Every row must be what it is alone; no speed is reported otherwise.
    """
    model, tokenizer = load(checkpoint)
    by_task = [task_prompts(tokenizer, task, 7) for task in TASKS]
    prompts = [prompt for items in zip(*by_task) for prompt, _, _ in items][:32]
    sizes, written, rows = (1, 2, 4, 8, 16, 32), {}, []

    def decode(mode: str, size: int):
        generate, tokens = getattr(model, f"generate_{mode}"), []
        for i in range(0, len(prompts), size):
            tokens += generate(prompts[i:i + size], 96,
                               eos_token_id=model.config.eos_token_id).tokens
        written[mode, size] = [row.tolist() for row in tokens]

    modes = ("ar", "mask_diffusion")
    seconds = take_turns({(mode, size): functools.partial(decode, mode, size)
                          for size in sizes for mode in modes}, rounds)
    for size in sizes:
        row = {"batch": size}
        for mode in modes:
            if written[mode, size] != written[mode, 1]:
                sys.exit(f"bench: {mode} writes something else in batches of {size}")
            row[mode] = sum(map(len, written[mode, size])) / seconds[mode, size]
        rows.append(row)
    print("batch   AR   diffusion   diffusion / AR     (tokens/s over those at batch 1)")
    for row in rows:
        speedups = {mode: row[mode] / rows[0][mode] for mode in modes}
        print(f"{row['batch']:5}{speedups['ar']:6.2f}x{speedups['mask_diffusion']:10.2f}x"
              f"{row['mask_diffusion'] / row['ar']:15.2f}x")
    return {"checkpoint": checkpoint, "prompts": len(prompts), "rows": rows}


# ---------------------------------------------------------------------------------------------
# bench.py recipes

RECIPES = {
    "default": dict(),                      # gate 1, t per block, 1 in half of them
    "published": PUBLISHED,
    "gate 1": PUBLISHED | dict(gate="copy"),
    "t per block": dict(full_masks=0.0),
    "slope 0.8": dict(full_masks=0.0, slope=0.8),
    "1/t": dict(full_masks=0.0, weight="1/t"),
    "tied towers": dict(tied=True),
    "no time": dict(timeless=True)}


def bench_recipes(phase1: str, steps: int, count: int, arms: list[str], bf16: bool) -> dict:
    """Train a denoiser by every recipe for the same steps; what it writes, measured as above."""
    saved = torch.load(phase1, map_location="cpu", weights_only=True)
    tokenizer = Tokenizer.from_file(os.path.join(os.path.dirname(phase1), "tokenizer.json"))
    base = Recipe(steps=(0, steps), warm_up=30)
    data = Data(tokenizer, base, seed=0)
    context = build(base, MODEL)
    context.load_state_dict(saved["model"])
    kinds = {task: task_prompts(tokenizer, task, count, "recipes") for task in TASKS}
    rows = []
    for arm in arms:
        torch.manual_seed(0)
        recipe = replace(base, **RECIPES[arm])
        model = build(recipe, MODEL, context)
        trainer = Trainer(2, model, recipe, data, path=None, autocast=bf16)
        trainer.run(every=steps)
        model.eval()
        for name in ("ar", "gamma 0.8") if recipe.tied or not rows else ("gamma 0.8",):
            row, total = {"recipe": arm, "mode": name}, Score()
            for kind, items in kinds.items():
                score = answer(model, tokenizer, items, name)
                row[kind] = score.right / score.items
                total.add(score)
            row |= {"accuracy": total.right / total.items, "valid": trainer.log[-1]["valid"],
                    "passes_per_block": (total.nfe or total.context_passes) / total.blocks}
            rows.append(row)
            print(f"{arm:16}{name:10} accuracy {row['accuracy']:.3f} passes/block "
                  f"{row['passes_per_block']:.2f} valid "
                  f"{statistics.mean(row['valid'].values()):.3f} "
                  + " ".join(f"{kind} {row[kind]:.2f}" for kind in kinds), flush=True)
    return {"phase1_step": saved["step"], "steps": steps, "items": count, "rows": rows}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["cpu", "miniature", "samples", "templates", "batch",
                                         "recipes", "gpu"])
    parser.add_argument("--rounds", type=int, default=15, help="cpu, batch: rounds of turns")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--checkpoint", default=os.path.join(HERE, "miniature"), metavar="DIR")
    parser.add_argument("--items", type=int, default=500,
                        help="miniature, templates, recipes: items a task")
    parser.add_argument("--mode", choices=["mask_diffusion", "ar"], default="mask_diffusion",
                        help="samples: what writes them")
    parser.add_argument("--temperature", type=float, default=0.7, help="samples")
    parser.add_argument("--phase1", default="runs/miniature/phase1.pt", metavar="FILE",
                        help="recipes: train.py's checkpoint to start from")
    parser.add_argument("--steps", type=int, default=400, help="recipes: steps an arm")
    parser.add_argument("--arms", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--bf16", action="store_true", help="recipes: train as train.py --bf16")
    parser.add_argument("--timed", type=int, default=25, help="miniature: items timed at batch 1")
    parser.add_argument("--plot", default="", metavar="FILE", help="miniature, gpu: a plot")
    args = parser.parse_args()
    if min(args.rounds, args.threads, args.items, args.timed, args.steps) < 1:
        parser.error("--rounds, --threads, --items, --timed and --steps must be 1 or more")
    args.timed = min(args.timed, args.items)
    torch.set_num_threads(args.threads)
    setting = {"torch": torch.__version__, "python": platform.python_version(),
               "machine": platform.machine(), "threads": args.threads, "dtype": "float32"}
    if args.what == "cpu":
        import transformers
        setting |= {"transformers": transformers.__version__, "rounds": args.rounds, "batch": 1}
    if args.what == "gpu":
        setting |= {"dtype": "bfloat16"}
    print("  ".join(f"{name} {value}" for name, value in setting.items()) + "\n", flush=True)
    try:
        if args.what == "cpu":
            result = bench_cpu(args.rounds)
        elif args.what == "miniature":
            result = bench_miniature(args.checkpoint, args.items, args.timed, args.plot)
        elif args.what == "samples":
            result = bench_samples(args.checkpoint, args.mode, args.temperature)
        elif args.what == "templates":
            result = bench_templates(args.checkpoint, args.items)
        elif args.what == "batch":
            result = bench_batch(args.checkpoint, args.rounds)
        elif args.what == "gpu":
            result = bench_gpu(args.plot)
        else:
            result = bench_recipes(args.phase1, args.steps, args.items, args.arms, args.bf16)
    except (ValueError, OSError, RuntimeError) as error:
        print("bench.py: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    print(json.dumps({"setting": setting} | result))


if __name__ == "__main__":
    main()
