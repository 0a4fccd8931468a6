"""Measurements, each against a yardstick in the same run; the last line printed is JSON.

    python bench.py cpu         prefill, AR decoding and one denoiser step of a small random model,
                                beside transformers' NemotronH with the same weights, and what this
                                processor's matrix products and copies would allow
    python bench.py samples     what the miniature writes after held-out source
    python bench.py templates   the miniature filling gaps, with and without what follows them
    python bench.py batch       the miniature's tokens/s by number of prompts decoded together, and
                                how far a row of a batch is from the same row alone, by rounding
    python bench.py kernels     what the compiler makes of every launch of kernels.py in the
                                full-size model, and launches, bytes and FLOPs by pass and kind of
                                layer; needs no GPU
    python bench.py gpu         the full-size model with random weights, made on the GPU: time,
                                bytes and share of the roof of every pass; speed-up over AR;
                                then with experts in int8, and an AR token by transformers

On one idle thread of an AMD EPYC samples takes a quarter of a minute, cpu about one minute,
templates, batch and kernels some minutes; gpu two minutes on one H200.

Whatever is timed takes turns within a run, so that a machine that slows down slows all of it;
compare ratios, not milliseconds. `python figures/make.py FILE` draws what gpu printed into FILE.
evaluate.py measures quality.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import inspect
import itertools
import json
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from tokenizers import Tokenizer
from torch.nn.modules.module import (register_module_forward_hook,
                                     register_module_forward_pre_hook)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from corpus import TASKS, library, library_prompts, task_prompts, texts_with_holes
from rows import load_tokenizer
from twotower import (Context, KVCache, Layer, MambaState, Quantized, Router, StackedLinear,
                      TwoTower, TwoTowerConfig, kernels, quantize)

HERE = Path(__file__).resolve().parent
MINIATURE = str(HERE / "miniature")

# golden/cfg1 four times as wide, with 16 experts and a vocabulary of 1024
SMALL = TwoTowerConfig(
    hidden_size=256, hybrid_override_pattern="MEM*EMEM*E", num_hidden_layers=10, vocab_size=1024,
    mamba_num_heads=8, n_groups=2, ssm_state_size=64, num_attention_heads=4, head_dim=64,
    intermediate_size=192, n_routed_experts=16, num_experts_per_tok=2, moe_intermediate_size=96,
    moe_shared_expert_intermediate_size=160, max_position_embeddings=16384)


# ---- What a pass costs, and what is shared --------------------------------------------------


class Cost(NamedTuple):
    bytes: float
    flops: float

    def seconds(self, bandwidth: float, rate: float) -> float:
        """The roof: what it takes at so many bytes and FLOPs a second, whichever is more."""
        return max(self.bytes / bandwidth, self.flops / rate)


def cost_of_pass(config: TwoTowerConfig, experts: float, tokens: int = 1, cached: int = 0,
                 rows: int = 1, *, logits: int = 1, extends: bool = False,
                 dtype: torch.dtype = torch.bfloat16, bits: float = 0) -> Cost:
    """What one pass of one tower over `tokens` new tokens of each row cannot do without.

    Bytes: the weights outside the routed experts (but for the embedding, of which it takes rows),
    `experts` distinct ones in each MoE layer, of `bits` a weight (0: those of dtype), the head
    unless there are no logits; for each row keys and values of `cached` tokens and the Mamba-2
    states, which a pass that extends the context also writes. Activations are not counted.
    FLOPs: 2 for each weight that a token uses, the head for `logits` tokens a row; attention over
    what is cached and half of the new tokens; 5 for each number of a state and token.
    """
    c = config
    with torch.device("meta"):
        model = TwoTower(c, towers="context").to(dtype)
        kv, mamba = state_bytes(model, rows)
    kinds = c.hybrid_override_pattern
    moved = kv * (cached + tokens * extends) + mamba * (1 + extends)
    flops = rows * tokens * (
        4 * kinds.count("*") * c.num_attention_heads * c.head_dim * (cached + tokens / 2)
        + 5 * kinds.count("M") * c.mamba_num_heads * c.mamba_head_dim * c.ssm_state_size)
    for name, p in model.named_parameters():
        head, routed = "lm_head" in name, ".experts." in name
        if "embeddings" in name or head and not logits:
            continue
        moved += p.nbytes * (experts / c.n_routed_experts * (
            bits / (8 * p.itemsize) if bits else 1) if routed else 1)
        flops += 2 * p.numel() * rows * (logits if head else tokens) * (
            c.num_experts_per_tok / c.n_routed_experts if routed else 1)
    return Cost(moved, flops)


def state_bytes(model: TwoTower, rows: int) -> tuple[int, int]:
    """Of keys and values, a token; of Mamba-2 states."""
    states = Context(model.context_tower, rows, 1).states
    return (sum(2 * s.key_cache.nbytes for s in states if isinstance(s, KVCache)),
            sum(s.conv_state.nbytes + s.ssm_state.nbytes for s in states
                if isinstance(s, MambaState)))


def experts_hit(run) -> float:
    """The number of distinct experts that a layer's tokens choose in run(), on average."""
    hit = []
    with register_module_forward_hook(lambda module, _, out: hit.append(len(out[0].unique()))
                                      if isinstance(module, Router) else None):
        run()
    return statistics.mean(hit)


def without_this_folder():
    """transformers imports the package `kernels` where it is installed, and would find the file of
    that name beside this one."""
    return mock.patch.object(sys, "path", [p for p in sys.path if Path(p).resolve() != HERE])


def as_transformers(model: TwoTower, strict: bool = True):
    """transformers' NemotronHForCausalLM holding our context tower's weights; unless strict, what
    is not as there, experts in integers, stays random."""
    with without_this_folder():
        from transformers import NemotronHConfig, NemotronHForCausalLM

    fields, kinds = dataclasses.asdict(model.config), {
        "M": "linear_attention", "*": "full_attention", "E": "moe", "-": "mlp"}
    del fields["num_hidden_layers"], fields["mask_token_id"]
    fields |= {"layers_block_type": [kinds[kind] for kind in fields.pop("hybrid_override_pattern")],
               "time_step_min": fields["time_step_limit"][0] or 1e-30}         # it clamps dt there
    config = NemotronHConfig(**fields, attn_implementation="sdpa")
    theirs = NemotronHForCausalLM(config).eval()
    ours = {"model." + re.sub(r"(mixer\.experts\..*)\.weight", r"\1", name): tensor
            for name, tensor in model.context_tower.state_dict().items()}
    theirs.load_state_dict(ours | {"lm_head.weight": model.context_lm_head.weight}, strict)
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


def show(title: str, rows: list[dict]):
    """Print rows of the same keys as a table."""
    cells = [[key.replace("_", " ") for key in rows[0]]]
    cells += [[f"{value:.4g}" if isinstance(value, float) else str(value)
               for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    print(f"\n{title}")
    for line in cells:
        print("  ".join(map(str.rjust, line, widths)), flush=True)


# ---- bench.py cpu ---------------------------------------------------------------------------

LENGTHS = (256, 512, 1024, 2048, 4096, 8192)


@torch.inference_mode()
def bench_cpu(rounds: int = 15) -> dict:
    """A small random model beside transformers' and the processor's own roof; then an AR token over
    contexts of LENGTHS, with the attention layers and without."""
    torch.manual_seed(0)
    model, pattern = TwoTower(SMALL).eval(), SMALL.hybrid_override_pattern.replace("*", "")
    result = against_transformers(model, rounds)
    for what, value in result.items():
        print(f"{what:42} {value:10.4g}")
    bare = TwoTower(dataclasses.replace(SMALL, hybrid_override_pattern=pattern,
                                        num_hidden_layers=len(pattern)), towers="context").eval()
    token, runs = torch.tensor([[5]]), {}

    def sixteen_tokens(model, context):
        for _ in range(16):
            model.extend(context, token)

    for m, n in itertools.product((model, bare), LENGTHS):
        prompt = torch.randint(4, SMALL.vocab_size, (1, n))
        context = m.prefill(prompt, reserve=16 * (rounds + 1))
        runs[m, n] = functools.partial(sixteen_tokens, m, context)
    t = take_turns(runs, rounds)
    result["growth"] = [
        {"context": n, "token": t[model, n] / t[model, 256],
         "without_attention_layers": t[bare, n] / t[bare, 256]} for n in LENGTHS]
    show("an AR token after longer contexts, over the same after 256", result["growth"])
    return result


def against_transformers(model: TwoTower, rounds: int) -> dict[str, float]:
    """Prefill of 512, AR decoding of 64, by their generate() and by a bare loop over their model,
    and a denoiser step of 16; the roof is the time that a product of 1536 x 1536 and a copy of
    256 MB, both float32, would allow."""
    theirs, new, prompt = as_transformers(model), 64, torch.randint(4, SMALL.vocab_size, (1, 512))
    read = functools.partial(theirs, use_cache=True, logits_to_keep=1)
    context, out = model.prefill(prompt), read(prompt)
    block = torch.full((1, 16), SMALL.mask_token_id)
    gap = (context.logits - out.logits[:, -1]).abs().max() / out.logits.std()
    if not gap <= 1e-3:
        raise ValueError(f"the two context towers differ by {gap:.1e}; no speed is reported")

    def bare_loop():
        out = read(prompt)
        for _ in range(new - 1):
            out = read(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values)

    square, large = torch.randn(1536, 1536), torch.zeros(2**26)
    product, copied = torch.empty_like(square), torch.empty_like(large)
    t = take_turns({
        "prefill": lambda: model.prefill(prompt), "their prefill": lambda: read(prompt),
        "ar": lambda: model.generate_ar(prompt, new), "their loop": bare_loop,
        "their ar": lambda: theirs.generate(
            prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0,
            attention_mask=torch.ones_like(prompt)),
        "denoise": lambda: model.denoise(block, context, 1.0),
        "product": lambda: torch.mm(square, square, out=product),
        "copy": lambda: copied.copy_(large)}, rounds)
    token, their_token, their_loop = (
        (t[name] - t["their prefill" if "their" in name else "prefill"]) / (new - 1)
        for name in ("ar", "their ar", "their loop"))
    rate, bandwidth = 2 * len(square)**3 / t["product"], 2 * large.nbytes / t["copy"]
    cost = functools.partial(cost_of_pass, SMALL, extends=True, dtype=torch.float32)
    experts = experts_hit(lambda: model.prefill(prompt))
    prefill_roof = cost(experts, tokens=512).seconds(bandwidth, rate)
    token_roof = cost(SMALL.num_experts_per_tok, cached=512 + new // 2).seconds(bandwidth, rate)
    kv, mamba = state_bytes(model, 1)
    return {
        "prefill_512_speedup": t["their prefill"] / t["prefill"],
        "ar_token_speedup": their_token / token,
        "ar_token_speedup_over_bare_loop": their_loop / token,
        "denoise_16_in_ar_tokens": t["denoise"] / token,
        "prefill_512_in_ar_tokens": t["prefill"] / token,
        "gflops_per_second": rate / 1e9,
        "copied_gb_per_second": bandwidth / 1e9,            # read and written
        "prefill_512_share_of_roof": prefill_roof / t["prefill"],
        "ar_token_share_of_roof": token_roof / token,
        "kv_bytes_per_token": kv, "mamba_bytes": mamba}


# ---- bench.py gpu ---------------------------------------------------------------------------

POOL = 36       # experts that 16 tokens, 6 each, are made to choose from: they hit 34 on average
BLOCK = 16
# of each row: new tokens, logits, and whether the context grows
PASSES = {"AR token": dict(tokens=1, logits=1, extends=True),
          "denoiser step": dict(tokens=BLOCK, logits=BLOCK),
          "block extension": dict(tokens=BLOCK, logits=0, extends=True)}


@torch.no_grad()
def bench_gpu() -> dict:
    """The full-size model with random weights, pass by pass."""
    if not torch.cuda.is_available():
        raise ValueError("gpu needs a CUDA device with 130 GB of memory, such as an H200")
    from triton.testing import do_bench

    def seconds_of(run) -> float:
        return do_bench(run, warmup=50, rep=300, return_mode="median") / 1e3

    result = {"gpu": torch.cuda.get_device_name()}
    bandwidth, rate = result["bandwidth"], result["rate"] = roof(seconds_of)
    print(f"{result['gpu']}: copies {bandwidth / 1e9:.0f} GB/s, products {rate / 1e12:.0f} TFLOP/s")
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = TwoTower(TwoTowerConfig()).eval().use("triton")
    torch.set_default_dtype(torch.float32)
    result["prefill"] = rows = []
    for n in (512, 2048, 8192, 32768):
        prompt = torch.randint(4, model.config.vocab_size, (1, n))
        seconds = seconds_of(lambda: model.prefill(prompt))
        rows.append({"tokens": n, "ms": 1e3 * seconds, "per_second": n / seconds})
    show("prefill", rows)
    result["launches"] = time_launches(model, seconds_of, (bandwidth, rate))
    measure = functools.partial(table_of_passes, model, length=2048, seconds_of=seconds_of,
                                roof=(bandwidth, rate))
    result["random"], result["random_speed_up"] = measure(batches=(1, 4, 16, 64))
    concentrate_routing(model, POOL)
    print(f"\nrouting is now held to {POOL} experts a layer, of which {BLOCK} independent tokens "
          "would hit 34, as is reported of the release")
    result["concentrated"], result["concentrated_speed_up"] = measure(batches=(1, 4))
    result["decoding"] = time_decoding(model)
    quantize_experts(model, "int8")
    print("\nrouted experts are now int8")
    result["int8"], result["int8_speed_up"] = measure(batches=(1, 4), bits=8)
    result["transformers_ms"] = 1e3 * time_transformers(model, seconds_of)
    print(f"\nAR token after 2,048 by transformers' NemotronH: {result['transformers_ms']:.1f} ms")
    return result


def roof(seconds_of) -> tuple[float, float]:
    """What this GPU reaches: bytes a second in a copy, FLOPs a second in bfloat16 products."""
    large = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    square = torch.randn(8192, 8192, device="cuda").bfloat16()
    return (2 * large.numel() / seconds_of(large.clone),
            2 * len(square)**3 / seconds_of(lambda: square @ square))


def concentrate_routing(model: TwoTower, experts: int):
    """Let the routers choose among their first `experts` experts only."""
    for module in model.modules():
        if isinstance(module, Router):
            module.e_score_correction_bias[experts:] = -10.0


def quantize_experts(model: TwoTower, kind: str):
    """Make integers of the routed experts, in place, for timing."""
    for module in model.modules():
        if isinstance(module, StackedLinear):
            weight = module.weight.data
            del module.weight
            with weight.device:
                module.weight = Quantized(weight.shape, kind)
            for e, expert in enumerate(weight):
                module.weight.integers[e], module.weight.scales[e] = quantize(expert, kind)


def passes_over(model: TwoTower, rows: int, length: int, graphs: bool,
                recording: bool = True) -> dict:
    """By name a function that runs one of PASSES behind `length` tokens, the same again and again.

    Caches and states have random contents; a prefill of many rows would need more memory than the
    weights leave."""
    context = Context(model.context_tower, rows, length + 4 * BLOCK)
    for state in context.states:
        if state is not None:
            state.map(lambda x: x.normal_())
    context.lengths = lengths = context.lengths + length
    if graphs:
        context.passes = kernels().Passes(model, context)
        context.passes.recording &= recording
    token, block = (torch.randint(4, model.config.vocab_size, (rows, n), device=context.device)
                    for n in (1, BLOCK))
    runs = (lambda: model._extend(context, token, "last"),
            lambda: model._denoise(block, context, torch.full((rows,), 0.5)),
            lambda: model._extend(context, block, None))

    def again(run):
        context.lengths = lengths
        return run()

    return {name: functools.partial(again, run) for name, run in zip(PASSES, runs)}


def check_replays(model: TwoTower, rows: int, length: int):
    """Replays of recorded passes must give what the passes give; no speed is reported else."""
    results = []
    for recording in (False, True):
        torch.manual_seed(0)
        runs = passes_over(model, rows, length, True, recording)
        # the denoiser after each change of the context sees whether its states are right
        found = (runs[name]() for name in (
            "denoiser step", "AR token", "denoiser step", "block extension", "denoiser step",
            "AR token", "denoiser step", "block extension", "denoiser step"))
        results.append([out.clone() for out in found])
    for plain, recorded in zip(*results):
        gap = float((plain - recorded).square().mean().sqrt() / plain.square().mean().sqrt())
        # the same kernels, unless a library chooses otherwise while it is recorded; a rounding that
        # changes the choice of an expert makes some 0.02, a state not written back 0.5 (both seen
        # on a narrow bfloat16 model of the release's 52 layers)
        if not gap < 0.1:
            raise ValueError(f"recorded passes differ from plain ones by {gap:.1e}")


def table_of_passes(model: TwoTower, batches, length: int, seconds_of, roof: tuple[float, float],
                    bits: float = 0) -> tuple[list[dict], list[dict]]:
    """A row for every batch and pass, without and with CUDA graphs, against the `roof` of bytes and
    FLOPs a second; and of every batch diffusion's speed over AR's by passes a block, as follows
    from these times, and the passes at which it would be 1 and 2.42."""
    check_replays(model, batches[0], length)
    rows, table = [], []
    for batch in batches:
        by_pass = {name: {"batch": batch, "pass": name} for name in PASSES}
        for kind in ("", "graphs_"):
            runs = passes_over(model, batch, length, graphs=bool(kind))
            for name, row in by_pass.items():
                if not kind:
                    experts = experts_hit(runs[name])
                    cost = cost_of_pass(model.config, experts, cached=length, rows=batch,
                                        bits=bits, **PASSES[name])
                    row |= {"experts": experts, "gigabytes": cost.bytes / 1e9,
                            "roof_ms": 1e3 * cost.seconds(*roof)}
                ms = 1e3 * seconds_of(runs[name])
                row |= {f"{kind}ms": ms, f"{kind}share_of_roof": row["roof_ms"] / ms}
            del runs                            # and their memory, before the next take theirs
        rows += by_pass.values()
        ar, step, extend = (row["graphs_ms"] for row in by_pass.values())
        table.append(
            {"batch": batch, "ar_tokens_per_second": 1e3 * batch / ar}
            | {f"{n} passes": BLOCK * ar / (n * step + extend) for n in (1, 2, 4, 6, 8, 12, 16)}
            | {f"{speed}x at": (BLOCK * ar / speed - extend) / step for speed in (1, 2.42)})
    show(f"passes after {length} tokens", rows)
    show("speed of diffusion over AR if a block takes so many denoiser passes (assumed)", table)
    return rows, table


def time_decoding(model: TwoTower, new: int = 512) -> list[dict]:
    """Tokens a second of whole generations at batch 1 after 2,048, prefill taken off: AR, and
    diffusion made to take so many passes a block by a threshold that nothing reaches."""
    model.use("triton", graphs=True)
    prompt, rows = torch.randint(4, model.config.vocab_size, (1, 2048)), []

    def seconds(write, tokens: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        write(prompt, tokens)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    diffuse = functools.partial(model.generate_mask_diffusion, confidence_threshold=2.0)
    for n in (0, 1, 2, 4, 8, 16):
        write = functools.partial(diffuse, steps_per_block=n) if n else model.generate_ar
        seconds(write, 32)
        # both record their graphs: the difference is decoding
        speed = new / (seconds(write, new + 32) - seconds(write, 32))
        rows.append({"passes_a_block": n or "AR", "tokens_per_second": speed})
        rows[-1]["over_ar"] = speed / rows[0]["tokens_per_second"]
    show("whole generations of batch 1, graphs", rows)
    return rows


def time_transformers(model: TwoTower, seconds_of) -> float:
    """Seconds of an AR token at batch 1 by transformers' NemotronH, which takes the denoiser's
    place in memory."""
    model.denoiser_tower = model.lm_head = None
    gc.collect()
    torch.cuda.empty_cache()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        theirs = as_transformers(model, strict=False)
    torch.set_default_dtype(torch.float32)
    prompt = torch.randint(4, model.config.vocab_size, (1, 2048), device="cuda")
    cache = theirs(prompt, use_cache=True, logits_to_keep=1).past_key_values
    return seconds_of(lambda: theirs(prompt[:, :1], past_key_values=cache, use_cache=True))


# ---- bench.py kernels -----------------------------------------------------------------------

# bytes of shared memory a program may take on an A100, an H100 or H200, an RTX 50
CARDS = {80: 166912, 90: 232448, 120: 101376}
# FLOPs of a launch by its arguments; what is not here has none worth counting
FLOPS = {"_grouped_product_kernel": lambda v: (
             2 * v["T"] * (v["A"] + v["SHARED"]) * v["outputs"] * v["inputs"]),
         "_scan_kernel": lambda v: 5 * v["y_ptr"].numel() * v["N"],
         "_attention_kernel": lambda v: 4 * v["q_ptr"].numel() * v["S"],
         "_scores_kernel": lambda v: 2 * v["scores_ptr"].numel() * v["D"]}


class Launch(NamedTuple):
    kind: str                   # of the layer, "" outside of layers
    name: str
    bytes: float                # of the tensors it is given and makes, each once
    flops: float
    kernel: object = None       # of kernels.py: the JITFunction,
    values: dict | None = None  # its arguments and options by name,
    again: Callable | None = None       # and the same launch


class Launches(TorchDispatchMode):
    """While it lasts it collects what is launched, or on meta tensors would be.

    experts: of each MoE layer how many are hit, whose weights are read."""

    def __init__(self, config: TwoTowerConfig, experts: float):
        super().__init__()
        self.share, self.kind, self.found = experts / config.n_routed_experts, "", []

    def __enter__(self):
        from triton import JITFunction
        run = JITFunction.run

        def enter(module, *args):
            if isinstance(module, Layer):               # after it there is an output, too
                self.kind = module.kind if len(args) == 1 else ""

        self.hooks = contextlib.ExitStack()
        for hook in (register_module_forward_pre_hook(enter), register_module_forward_hook(enter),
                     mock.patch.object(JITFunction, "run", lambda *args, **options: self.launch(
                         functools.partial(run, *args, **options)))):
            self.hooks.enter_context(hook)
        return super().__enter__()

    def __exit__(self, *error):
        self.hooks.close()
        return super().__exit__(*error)

    def launch(self, again: functools.partial):
        kernel, *args = again.args
        name, values = kernel.fn.__name__, dict(zip(kernel.arg_names, args)) | again.keywords
        tensors = {id(v): v for v in values.values() if isinstance(v, torch.Tensor)}
        moved = sum(v.nbytes for v in tensors.values())
        if name == "_grouped_product_kernel":
            moved -= sum({id(values[name]): values[name].nbytes for name in (
                "w_ptr", "w_scale_ptr")}.values()) * (1 - self.share)
        if name == "_scan_kernel" and values["UPDATE"]:         # read and written
            moved += values["state_ptr"].nbytes
        self.found.append(Launch(self.kind, name, moved, FLOPS.get(name, lambda v: 0)(values),
                                 kernel, values, again))
        if not any(v.is_meta for v in tensors.values()):
            again()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if op.is_view or "empty" in str(op) or "_unsafe_view" in str(op):
            return out
        given = [x for x in tree_leaves((args, out)) if isinstance(x, torch.Tensor)]
        if not all(x.is_meta for x in given):                       # of the host, or copied from it
            return out
        if "embedding" in str(op) or "index" in str(op):            # rows of a table or cache
            given = sorted(given, key=torch.Tensor.numel)[:2]
        count = flop_registry.get(op.overloadpacket, lambda *_, **__: 0)
        self.found.append(Launch(
            self.kind, str(op), sum({id(x): x.nbytes for x in given}.values()),
            count(*args, **(kwargs or {}), out_val=out)))
        return out


def variant(launch: Launch) -> tuple:
    """What Triton compiles for a launch: types, constants, alignment, options."""
    from triton.runtime.jit import mangle_type

    signature, constants, aligned = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.values[parameter.name]
        if parameter.is_constexpr or value is None or type(value) is int and value == 1:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = mangle_type(value)
        # as at a launch: tensors begin at multiples of 16 bytes, and some numbers are multiples
        if isinstance(value, torch.Tensor) or type(value) is int and value % 16 == 0:
            aligned[i,] = [["tt.divisibility", 16]]
    return signature, constants, aligned, {
        name: launch.values[name] for name in ("num_warps", "num_stages") if name in launch.values}


def compiled(launch: Launch, card: int) -> dict:
    """What the compiler makes of it for a card of compute capability card / 10."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, aligned, options = variant(launch)
    code = triton.compile(ASTSource(launch.kernel, signature, constants, aligned),
                          target=GPUTarget("cuda", card, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:       # not /dev/null, which it may replace
        arch = re.search(r"\.target (\w+)", code.asm["ptx"])[1]
        tool = triton.knobs.nvidia.ptxas_blackwell if card >= 100 else triton.knobs.nvidia.ptxas
        said = subprocess.run(
            [tool.path, "-v", f"-arch={arch}", "/dev/stdin", "-o", f"{folder}/cubin"],
            input=code.asm["ptx"], capture_output=True, text=True).stderr
    return {"kernel": launch.name, "card": card,
            "registers": int(re.search(r"Used (\d+) registers", said)[1]),
            "spilled": int(re.search(r"(\d+) bytes spill stores", said)[1]),
            "shared": code.metadata.shared,
            "tile": " ".join(f"{name.lower()} {value}" for name, value in constants.items()
                             if name.startswith(("BITS", "BLOCK", "CHUNK", "SLOTS", "FEW")))}


@torch.no_grad()
def bench_kernels(cards: str = "80 90 120", dtypes: str = "bfloat16 float16 float32") -> dict:
    """Counts and compiles the launches of passes and a prefill of the full-size model, with its
    experts in 16 bits (of which alone it counts), in 8 and in 4."""
    counts, table = [], []
    for dtype, form in itertools.product(dtypes.split(), (None, "int8", "int4")):
        config = TwoTowerConfig(experts=form)
        torch.set_default_dtype(getattr(torch, dtype))
        with torch.device("meta"):
            model = TwoTower(config).eval().use("triton")
        torch.set_default_dtype(torch.float32)
        with Launches(config, 0) as prefill:
            model.prefill(torch.randint(4, config.vocab_size, (1, 4096)))
        found = prefill.found
        for batch in (1, 4, 64):
            for name, run in passes_over(model, batch, 2048, graphs=True).items():
                tokens = batch * PASSES[name]["tokens"]
                idle = (1 - config.num_experts_per_tok / config.n_routed_experts) ** tokens
                with Launches(config, config.n_routed_experts * (1 - idle)) as launches:
                    run()
                found += launches.found
                if dtype == dtypes.split()[0] and form is None:
                    counts += table_of_launches(batch, name, launches.found)
        variants = {str((one.name, variant(one))): one for one in found
                    if one.kernel and (form is None or "BITS" in one.values)}
        table += [{"dtype": dtype} | compiled(one, card)
                  for card in map(int, cards.split()) for one in variants.values()]
    show("launches by pass and kind of layer", counts)
    show("by the compiler", table)
    for row in table:
        if row["shared"] > CARDS[row["card"]]:
            raise ValueError(f"{row['kernel']} needs {row['shared']} bytes of shared memory, more "
                             f"than a card {row['card']} has")
    return {"launches": counts, "compiled": table}


def time_launches(model: TwoTower, seconds_of, roof: tuple[float, float]) -> list[dict]:
    """The kernels of passes at batch 1 after 2,048 tokens, each many times within a CUDA graph, as
    the launch of a graph takes longer than many of them. What fits the cache is then read from it,
    which in a pass it may not be."""
    rows, many = [], 50
    for name, run in passes_over(model, 1, 2048, graphs=True, recording=False).items():
        with Launches(model.config, experts_hit(run)) as launches:
            run()
        kinds = {(one.name, str(variant(one)[1])): one for one in launches.found if one.kernel}
        for (kernel, _), one in kinds.items():
            replay = kernels().record(lambda _: [one.again() for _ in range(many)],
                                      [torch.zeros(1, device=model.context_tower.device)])
            seconds = seconds_of(replay) / many
            rows.append({"pass": name, "kernel": kernel, "microseconds": 1e6 * seconds,
                         "gigabytes_a_second": one.bytes / seconds / 1e9,
                         "share_of_roof": Cost(one.bytes, one.flops).seconds(*roof) / seconds})
    show("kernels of passes at batch 1", rows)
    return rows


def table_of_launches(batch: int, name: str, found: list[Launch]) -> list[dict]:
    of = {kind or "other": [one for one in found if kind in (one.kind, "all")]
          for kind in ("M", "*", "E", "", "all")}
    return [{"batch": batch, "pass": name, "layers": layers, "launches": len(own),
             "megabytes": sum(one.bytes for one in own) / 1e6,
             "gigaflops": sum(one.flops for one in own) / 1e9} for layers, own in of.items()]


# ---- bench.py samples, templates, batch: of a checkpoint ------------------------------------

ALTERED = "t_frozen", "unseeded"


def altered(model: TwoTower, name: str) -> contextlib.ExitStack:
    """The model with t held at 0.5, or with Mamba layers of the denoiser starting from zeros."""
    hooks = contextlib.ExitStack()
    if name == "t_frozen":
        hooks.enter_context(model.t_embedder.register_forward_pre_hook(
            lambda _, args: torch.full_like(args[0], 0.5)))
    for layer in model.denoiser_tower.layers if name == "unseeded" else ():
        if layer.kind == "M":
            hooks.enter_context(layer.mixer.register_forward_pre_hook(
                lambda mixer, args: (args[0], mixer.empty_state(len(args[0]), 0), args[2])))
    return hooks


def load(checkpoint: str, dtype: torch.dtype = torch.float32,
         experts: str | None = None) -> tuple[TwoTower, Tokenizer]:
    return (TwoTower.from_pretrained(checkpoint, dtype=dtype, experts=experts).eval(),
            load_tokenizer(Path(checkpoint)))


def bench_samples(checkpoint: str = MINIATURE, mode: str = "mask_diffusion",
                  temperature: float = 0.7) -> dict:
    """Ten continuations of held-out source, the first ten that the seed gives."""
    model, tokenizer = load(checkpoint)
    if not hasattr(model, f"generate_{mode}"):
        raise ValueError(f"--mode {mode} is no way of decoding: ar, mask_diffusion")
    rng, files, samples = random.Random("samples"), library(held_out=True), []
    for i in range(10):
        lines = rng.choice(files).splitlines(keepends=True)
        start = rng.randrange(max(1, len(lines) - 5))
        prompt = "".join(lines[start:start + 5])
        result = getattr(model, f"generate_{mode}")(
            [tokenizer.encode(prompt).ids], 96, seed=i, temperature=temperature,
            eos_token_id=model.config.eos_token_id)
        samples.append({"prompt": prompt, "text": tokenizer.decode(result.tokens[0].tolist())})
        print(f"--- {i}: five lines of held-out source, then what the model writes\n{prompt}"
              f"\u25b8{samples[-1]['text']}", flush=True)
    return {"samples": samples}


@torch.inference_mode()
def bench_templates(checkpoint: str = MINIATURE, items: int = 500) -> dict:
    """A hole in a block of held-out text, filled in with the rest of the block given as a template,
    against the same with what follows the hole masked as well."""
    model, tokenizer = load(checkpoint)
    rows = []
    for kind, pairs in texts_with_holes(tokenizer, items).items():
        prompts, blocks = zip(*((prompt, text[:16]) for prompt, text in pairs))
        row, hole = {"text": kind}, slice(1, 2) if kind == "json, no prompt" else slice(6, 10)
        for name, end in (("after_masked", 16), ("after_given", hole.stop)):
            templates = [[None if hole.start <= i < end else token
                          for i, token in enumerate(block.tolist())] for block in blocks]
            result = model.generate_mask_diffusion(prompts, template=templates)
            right = torch.stack([new[hole] == block[hole]
                                 for new, block in zip(result.tokens, blocks)]).float()
            row |= {name: float(right.prod(-1).mean()), f"{name}_tokens": float(right.mean())}
        rows.append(row)
    show("the hole right, and its tokens, with the text after it masked and given", rows)
    return {"rows": rows}


def bench_batch(checkpoint: str = MINIATURE, rounds: int = 15) -> dict:
    """32 held-out prompts of all tasks, decoded in batches of 1 to 32 in turns.

    Every row must be what it is alone; no speed is reported otherwise. Then the same of 96 pieces
    of held-out source, where the model is less sure, counted in float32 and in bfloat16.
    """
    model, tokenizer = load(checkpoint)
    by_task = [task_prompts(tokenizer, task, 7) for task in TASKS]
    prompts = [prompt for items in zip(*by_task) for prompt, _, _ in items][:32]
    modes, sizes, written, rows = ("ar", "mask_diffusion"), (1, 2, 4, 8, 16, 32), {}, []

    def decode(mode: str, size: int):
        results = [getattr(model, f"generate_{mode}")(
            prompts[i:i + size], 96, eos_token_id=model.config.eos_token_id)
            for i in range(0, len(prompts), size)]
        written[mode, size] = [row.tolist() for result in results for row in result.tokens]

    seconds = take_turns({(mode, size): functools.partial(decode, mode, size)
                          for size in sizes for mode in modes}, rounds)
    for size in sizes:
        row = {"batch": size}
        for mode in modes:
            if written[mode, size] != written[mode, 1]:
                raise ValueError(f"{mode} writes something else in batches of {size}")
            row[mode] = sum(map(len, written[mode, size])) / seconds[mode, size]
            row[f"{mode}_over_batch_1"] = row[mode] / (rows or [row])[0][mode]
        rows.append(row | {"diffusion_over_ar": row["mask_diffusion"] / row["ar"]})
    show("tokens a second", rows)
    unsure = [prompt for prompt, _, _ in library_prompts(tokenizer, 96)]
    apart = [rows_apart(load(checkpoint, dtype)[0], mode, unsure)
             for dtype in (torch.float32, torch.bfloat16) for mode in modes]
    show("rows of batches of 16 unlike the same rows alone", apart)
    return {"prompts": len(prompts), "rows": rows, "apart": apart}


@torch.inference_mode()
def rows_apart(model: TwoTower, mode: str, prompts: list, batch: int = 16) -> dict:
    """How many rows of batches have other texts of 32 tokens than alone, and other logits after the
    prompt, of one context pass or of one denoiser pass over a block of masks."""
    def decode(size: int) -> tuple[torch.Tensor, list]:
        logits, texts = [], []
        for i in range(0, len(prompts), size):
            context = model.prefill(prompts[i:i + size])
            block = torch.full((len(context.lengths), 16), model.config.mask_token_id)
            logits.append(context.logits[:, None] if mode == "ar" else
                          model.denoise(block, context, 1.0))
            result = getattr(model, f"generate_{mode}")(prompts[i:i + size], 32)
            texts += [new.tolist() for new in result.tokens]
        return torch.cat(logits), texts

    (alone, texts), (beside, others) = decode(1), decode(batch)
    apart = (alone - beside).abs().flatten(1).amax(-1)
    return {"dtype": str(model.lm_head.weight.dtype).removeprefix("torch."), "mode": mode,
            "rows": len(prompts), "texts": sum(a != b for a, b in zip(texts, others)),
            "logits": int((apart > 0).sum()), "by_at_most": float(apart.max()),
            "largest_logit": float(alone.abs().max())}


# ---- The command line: every parameter of a function is a flag of its command ---------------


def fail(message, program: str = "bench.py"):
    print(f"{program}: " + " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be an integer of 1 or more")
    return int(text)


class Parser(argparse.ArgumentParser):
    error = staticmethod(fail)


def main(argv: list[str] | None = None):
    parser, measures = Parser(description=__doc__, allow_abbrev=False, formatter_class=(
        argparse.RawDescriptionHelpFormatter), usage="python bench.py MEASUREMENT [flags]"), {
        measure.__name__.removeprefix("bench_"): measure for measure in (
            bench_cpu, bench_samples, bench_templates, bench_batch, bench_kernels,
            bench_gpu)}
    commands = parser.add_subparsers(dest="what", required=True, prog="python bench.py",
                                     metavar="|".join(measures))
    for name, measure in measures.items():
        command = commands.add_parser(name, description=measure.__doc__, allow_abbrev=False)
        command.add_argument("--threads", type=count, default=torch.get_num_threads(),
                             metavar="int", help="default %(default)s")
        for flag, parameter in inspect.signature(measure).parameters.items():
            kind = type(parameter.default)
            command.add_argument(f"--{flag}", default=parameter.default, metavar=kind.__name__,
                                 type=count if kind is int else kind, help="default %(default)s")
    knobs = vars(parser.parse_args(argv))
    setting = {"torch": torch.__version__, "python": platform.python_version(),
               "machine": platform.machine()} | knobs
    print("  ".join(f"{name} {value}" for name, value in setting.items()), flush=True)
    measure = measures[knobs.pop("what")]
    torch.set_num_threads(knobs.pop("threads"))
    try:
        result = measure(**knobs)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        fail(error)
    print(json.dumps({"setting": setting} | result))


if __name__ == "__main__":
    main()
