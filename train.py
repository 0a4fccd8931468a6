"""Train a small TwoTower from nothing in the two phases of the published recipe, on a laptop.

    python train.py                     everything, into runs/miniature; run it again to go on
    python train.py --smoke             the same in under a minute, with a model too small for use
    python train.py --recipes           denoisers trained for 400 steps each by several recipes,
                                        from the phase 1 that is in --out, compared
    torchrun --nproc-per-node 2 train.py --threads 1
                                        two processes share the sequences of a step, which is
                                        faster than two threads at this size

Phase 1 trains an autoregressive model of corpus.py's text with a next-token loss. For phase 2 it is
copied into both towers, the context tower is frozen, and the denoiser learns to fill masked blocks
of 16 (arXiv 2606.26493, training).
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import pickle
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer
from torch import Tensor

from bench import answer
from corpus import Data, prepare, task_prompts
from twotower import Router, TwoTower, TwoTowerConfig, masked_cross_entropy, of_blocks, write

# under torchrun: this process, its place on this machine, and how many there are
RANK, LOCAL_RANK, WORLD = (int(os.environ.get(name, default)) for name, default in
                           (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))


# ---------------------------------------------------------------------------------------------
# How a phase is trained


@dataclass(frozen=True)
class Recipe:
    """One phase: what is read and for how long; PUBLISHED changes phase 2 to what was published.

    The last fields are choices of phase 2; `python train.py --recipes` compares them (results in
    miniature/README.md).
    """

    phase: int                      # 1: the context tower, next token; 2: the denoiser tower
    steps: int
    decay: float                    # share of the steps over which the learning rate falls
    turns: tuple                    # whose turn it is in task rows
    library_every: int              # one row in so many is library text
    unaligned: float                # share of the task rows whose answers begin anywhere in a block
    library_weight: float = 1.0     # of the loss of a library row: its gradient is the largest
    unprompted: float = 0.0         # share that have no prompts
    mock_ar: int = 0                # every so many steps a third of the rows is also mock-AR's
    denoised: float = 1.0           # share of a row's blocks to denoise, those with masks first
    stages: tuple = ()              # (step, other values from there on); one that gives a peak
                                    # starts the learning rate again
    rows: int = 8                   # sequences a step
    row: int = 192                  # M, tokens a sequence
    block_size: int = 16
    peak: float = 3e-3              # learning rate of AdamW
    floor: float = 0.01             # of the peak, at the end
    warm_up: int = 100              # steps
    balance: float = 1e-3           # step of e_score_correction_bias
    vocab_size: int = 1280
    every_file: int = 1             # every so many-th library file is read
    gate: str = "copy"              # or "published": tables of randn / sqrt(D)
    t_per: str = "block"            # or "sequence"
    full_masks: float = 0.5         # share of the blocks or sequences with t = 1
    slope: float = 0.0              # of the mask probability along a block
    weight: str = "mean"            # or "1/t"
    joint: bool = False             # phase 2 also trains the context tower, by both losses
    tied: bool = False              # one tower in both roles, also trained with AR loss
    timeless: bool = False          # t is 0 whatever it is

    def at(self, step: int) -> Recipe:
        """The recipe with what its stages have changed by this step."""
        changes = [changes for first, changes in self.stages if first <= step]
        return replace(self, **{name: value for one in changes for name, value in one.items()})

    def tasks(self) -> list[str]:
        """Those it ends with."""
        return sorted(set(self.at(self.steps).turns))

    def learning_rate(self, step: int) -> float:
        """Warm-up, stable, decay (square root), as a function of the step, from one restart to the
        next."""
        starts = [0, *(first for first, changes in self.stages if "peak" in changes)]
        first = max(start for start in starts if start <= step)
        end, now = min([start for start in starts if start > step] + [self.steps]), self.at(step)
        left = (end - step) / (now.decay * (end - first))
        decay = max(self.floor, 1 - math.sqrt(max(0.0, 1 - left)))
        return now.peak * min(1.0, (step - first + 1) / self.warm_up, decay)


# what is hard comes more often; numbers of rows that two or three processes can share
WORDS, SOURCE = ("letter", "json", "sort"), ("rename", "edit")
PHASES = (
    Recipe(1, steps=19000, decay=0.3, library_every=4, unaligned=0.5, rows=6, turns=WORDS, stages=(
        (5000, dict(peak=1.5e-3, decay=0.95, row=320, unaligned=0.9, library_every=16,
                    library_weight=0.1, turns=(*SOURCE * 2, "letter", *SOURCE * 2, "json",
                                               *SOURCE * 2, "sort"))),)),
    Recipe(2, steps=18000, peak=2e-3, decay=0.85, library_every=9, library_weight=0.1,
           unaligned=0.5, unprompted=0.05, mock_ar=8, denoised=0.5, rows=6, row=320,
           full_masks=0.4, slope=0.8, turns=(*SOURCE * 2, "json", *SOURCE * 2, "letter", "json",
                                             *SOURCE, "sort"),
           stages=((0, dict(block_size=32, joint=True)), (3000, dict(block_size=16)),
                   (10000, dict(peak=1e-3, joint=False)))))
MODEL = dict(
    hidden_size=192, hybrid_override_pattern="M*EM*EM*E", num_hidden_layers=9, vocab_size=1280,
    layer_norm_epsilon=1e-5, mamba_num_heads=6, mamba_head_dim=64, n_groups=1, ssm_state_size=64,
    conv_kernel=4, chunk_size=64, num_attention_heads=6, num_key_value_heads=2, head_dim=32,
    intermediate_size=256, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=128,
    moe_shared_expert_intermediate_size=256, norm_topk_prob=True, routed_scaling_factor=1.0,
    initializer_range=0.05, max_position_embeddings=4096)
SMOKE = tuple(replace(recipe, steps=steps, stages=(), rows=4, row=128, warm_up=10, every_file=16)
              for recipe, steps in zip(PHASES, (200, 100)))
SMOKE_MODEL = MODEL | dict(hidden_size=32, hybrid_override_pattern="M*E", num_hidden_layers=3,
                           mamba_num_heads=2, mamba_head_dim=32, ssm_state_size=16, head_dim=16)

PUBLISHED = dict(gate="published", t_per="sequence", full_masks=0.0, slope=0.0, weight="mean",
                 library_weight=1.0, mock_ar=0, denoised=1.0, joint=False, tied=False,
                 timeless=False)
RECIPES = {
    "default": dict(),                      # gate 1, t per block, 1 in half of them
    "published": PUBLISHED,
    "gate 1": PUBLISHED | dict(gate="copy"),
    "t per block": dict(full_masks=0.0),
    "slope 0.8": dict(full_masks=0.0, slope=0.8),
    "1/t": dict(full_masks=0.0, weight="1/t"),
    "tied towers": dict(tied=True),
    "no time": dict(timeless=True)}


# ---------------------------------------------------------------------------------------------
# The two phases


def add_noise(recipe: Recipe, targets: Tensor, generator: torch.Generator):
    """Which of the targets (B, M) to mask: a mask (B, M) and t (B,) or, per block, (B, n)."""
    (B, M), Q = targets.shape, recipe.block_size
    t = 0.001 + 0.999 * torch.rand((B, M // Q) if recipe.t_per == "block" else B,
                                   generator=generator)
    if recipe.full_masks:
        t[torch.rand(t.shape, generator=generator) < recipe.full_masks] = 1.0
    p = per_token(t, M)
    if recipe.slope:        # later positions of a block are masked more often, for the same mean
        p = p + recipe.slope * p * (1 - p) * torch.linspace(-1, 1, Q).repeat(M // Q)
    return targets & (torch.rand(B, M, generator=generator) < p), t


def choose_blocks(masked: Tensor, Q: int, share: float, generator: torch.Generator) -> Tensor:
    """masked (B, M) -> (B, k) int64: a share of each row's blocks, preferably those with masks."""
    marked = masked.view(len(masked), -1, Q).any(2)
    order = marked + torch.rand(marked.shape, generator=generator)
    return order.topk(math.ceil(share * marked.shape[1])).indices.sort().values


def per_token(t: Tensor, M: int) -> Tensor:
    """t (B,) or (B, n) -> (B, M)."""
    t = t.view(len(t), -1)
    return t.repeat_interleave(M // t.shape[1], dim=1)


def build(recipe: Recipe, fields: dict, context: TwoTower | None = None) -> TwoTower:
    """A context tower to train; or, given one that is trained, both towers starting as that."""
    model = TwoTower(TwoTowerConfig(**fields), towers="context" if context is None else "both")
    if context is None:
        with torch.no_grad():           # so small a network learns to copy much sooner from these
            model.context_tower.embeddings.weight.normal_()
            for layer in model.context_tower.layers:
                if layer.kind == "*":
                    layer.mixer.q_proj.weight *= 2
                    layer.mixer.k_proj.weight *= 2
        return model
    model.load_state_dict(context.state_dict(), strict=False)
    model.copy_context_to_denoiser()
    if recipe.gate == "copy":           # shift 0, scale 0, gate 1: at first t changes nothing
        with torch.no_grad():
            model.t_block[1].weight.zero_()
            for table in model.scale_shift_tables:
                table.copy_(torch.tensor([0.0, 0.0, 1.0])[:, None].expand_as(table))
    if recipe.tied:
        model.denoiser_tower, model.lm_head = model.context_tower, model.context_lm_head
    if recipe.timeless:
        model.t_embedder.register_forward_pre_hook(lambda _, args: (torch.zeros_like(args[0]),))
    return model


def all_reduce(x: Tensor) -> Tensor:
    """The sum of x over the processes of a torchrun, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


class Balance:
    """Keeps experts evenly used: after every step the correction bias of an expert that was chosen
    too often falls by `rate`, of the others rises (arXiv 2412.19437, 2.1.2)."""

    def __init__(self, tower, rate: float):
        self.rate = rate
        self.loads = {router: torch.zeros_like(router.e_score_correction_bias)
                      for router in tower.modules() if isinstance(router, Router)}
        for router in self.loads:
            router.register_forward_hook(self.count)

    def count(self, router: Router, _, routed: tuple[Tensor, Tensor]):
        load = self.loads[router]
        load += torch.bincount(routed[0].flatten(), minlength=len(load))

    def reset(self):
        for load in self.loads.values():
            load.zero_()

    def update(self) -> float:
        """Returns the largest share of tokens that one expert of a layer took, over the mean."""
        worst = 0.0
        for router, load in self.loads.items():
            all_reduce(load)
            router.e_score_correction_bias += self.rate * (load.mean() - load).sign()
            worst = max(worst, float(load.max() / load.mean()))
        self.reset()
        return worst


class Trainer:
    """One phase: optimiser, schedule, validation, and a checkpoint to go on from exactly."""

    def __init__(self, model: TwoTower, recipe: Recipe, data: Data, path: Path | None,
                 autocast: bool = False):
        self.model, self.recipe, self.data, self.path = model, recipe, data, path
        self.device, self.autocast = model.context_tower.device, autocast
        self.balance = Balance(model.context_tower if recipe.phase == 1 else model.denoiser_tower,
                               recipe.balance)
        self.frozen = [model.context_tower, model.context_lm_head] * (
            recipe.phase == 2 and not recipe.tied)
        self.freeze(not any(changes.get("joint") for _, changes in recipe.stages))
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.parameters, groups = [p for _, p in trained], {0.1: [], 0.0: []}
        for name, p in trained:
            groups[0.1 if p.dim() > 1 and "scale_shift" not in name else 0.0].append(p)
        self.optimizer = torch.optim.AdamW(
            [{"params": group, "weight_decay": decay} for decay, group in groups.items()],
            lr=0.0, betas=(0.9, 0.95))
        self.made_with = json.dumps([asdict(recipe), asdict(model.config), data.seed, data.digest,
                                     autocast])             # what a checkpoint must agree in
        self.step, self.seconds, self.log = 0, 0.0, []
        if path is not None and path.exists():
            self.load()

    def freeze(self, frozen: bool):
        for module in self.frozen:
            module.requires_grad_(not frozen)

    def load(self):
        saved = read_checkpoint(self.path, self.device)
        if saved["made_with"] != self.made_with:
            raise ValueError(f"{self.path} was made with another recipe, model, seed, corpus or "
                             "precision; use another --out")
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.seconds, self.log = saved["step"], saved["seconds"], saved["log"]

    def save(self):
        if self.path is not None:
            saved = {"made_with": self.made_with, "model": self.model.state_dict(),
                     "optimizer": self.optimizer.state_dict(), "step": self.step,
                     "seconds": self.seconds, "log": self.log}
            write(self.path, lambda partial: torch.save(saved, partial))

    def losses(self, tokens: Tensor, targets: Tensor, recipe: Recipe, seed: int) -> list[Tensor]:
        """The losses to average, at every position of this process's share of the sequences."""
        share = slice(RANK * len(tokens) // WORLD, (RANK + 1) * len(tokens) // WORLD)
        found, weights = [], torch.ones(tokens.shape)
        weights[targets.all(1)] = recipe.library_weight         # no other row with prompts is
        if recipe.phase == 2:
            generator = torch.Generator().manual_seed(seed)
            masked, t = add_noise(recipe, targets, generator)
            noisy = tokens.masked_fill(masked, self.model.config.mask_token_id)
            Q = recipe.block_size
            blocks = choose_blocks(masked, Q, recipe.denoised, generator)[share]
            read = functools.partial(of_blocks, blocks=blocks, n=tokens.shape[1] // Q)
            logits = self.model.diffusion_logits(tokens[share], noisy[share], t[share], Q, blocks,
                                                 through_context=recipe.joint)
            loss = masked_cross_entropy(logits, read(tokens[share]), read(masked[share]), "none")
            if recipe.weight == "1/t":
                weights = weights / per_token(t, tokens.shape[1])
            found.append(loss * read(weights[share])[read(masked[share])].to(loss.device))
        if recipe.phase == 2 and recipe.mock_ar and seed % recipe.mock_ar == 0:
            wanted = F.pad(targets[:, 1:], (0, 1))                  # position l predicts l + 1
            blocks = choose_blocks(wanted, 1, recipe.denoised / 2, generator)
            turn = seed // recipe.mock_ar % 3
            rows = [r for r in range(share.start, share.stop) if r % 3 == turn]
            found.append(self.mock_ar_loss(*(x[rows] for x in (tokens, wanted, weights, blocks))))
        if recipe.phase == 1 or recipe.tied or recipe.joint:
            loss = self.model.ar_loss(tokens[share], targets[share], reduction="none")
            found.append(loss * weights[share, 1:][targets[share, 1:]].to(loss.device))
        return found

    def mock_ar_loss(self, tokens: Tensor, wanted: Tensor, weights: Tensor,
                     blocks: Tensor) -> Tensor:
        """Next-token losses of the denoiser where wanted (B, M) bool, at the positions `blocks`
        (B, k) alone; of no rows none."""
        if not len(tokens):
            return torch.zeros(0, device=self.device)
        read = functools.partial(of_blocks, blocks=blocks, n=tokens.shape[1])
        logits, wanted = self.model.diffusion_logits(tokens, tokens, None, 1, blocks), read(wanted)
        loss = masked_cross_entropy(logits, read(tokens.roll(-1, 1)), wanted, "none")
        return loss * read(weights)[wanted].to(loss.device)

    def loss(self, step: int, held_out: bool = False, only: str | None = None) -> Tensor:
        """The loss of a step, a scalar of which every process has its summand."""
        recipe = self.recipe.at(self.recipe.steps if held_out else step)
        recipe = replace(recipe, **PUBLISHED) if held_out else recipe
        tokens, targets = self.data.batch(recipe, step, held_out, only)
        # no cache of cast weights: one cast in the frozen context's pass would have no gradient
        with torch.autocast(self.device.type, torch.bfloat16, self.autocast, cache_enabled=False):
            losses = self.losses(tokens, targets, recipe, self.data.seed * 10**6 + step)
        counts = [all_reduce(torch.tensor(len(loss), device=loss.device)).clamp(min=1)
                  for loss in losses]
        return sum(loss.sum() / count for loss, count in zip(losses, counts))

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Held-out losses by source; of phase 2 with the published noise, to compare recipes."""
        valid = {kind: statistics.mean(float(all_reduce(self.loss(step, True, kind)))
                                       for step in range(2))
                 for kind in ("library", *self.recipe.tasks())}
        self.balance.reset()
        return valid

    def train_step(self) -> tuple[float, float]:
        """Returns the loss, and the imbalance of the experts."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate(self.step)
        self.freeze(not self.recipe.at(self.step).joint)
        loss = self.loss(self.step)
        loss.backward()
        if WORLD > 1:
            grads = [p.grad for p in self.parameters if p.grad is not None]
            total = all_reduce(torch.nn.utils.parameters_to_vector(grads))
            torch.nn.utils.vector_to_parameters(total, grads)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return float(all_reduce(loss.detach())), self.balance.update()

    def run(self, every: int = 0):
        """Train to the end of the phase, validating and saving every so many steps."""
        total, name = self.recipe.steps, f"phase {self.recipe.phase}"
        last, every = self.recipe.at(total), every or min(250, total // 2)
        tokens = last.rows * last.row
        losses, start = [], time.perf_counter()
        columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
        with Progress(*columns, disable=not sys.stdout.isatty() or RANK > 0) as bar:
            task = bar.add_task(name, total=total, completed=self.step)
            while self.step < total:
                loss, imbalance = self.train_step()
                losses.append(loss)
                speed = tokens * len(losses) / (time.perf_counter() - start)
                bar.update(task, completed=self.step,
                           description=f"{name} loss {loss:.3f} {speed:.0f} tokens/s")
                if self.step % every and self.step < total:
                    continue
                self.seconds += time.perf_counter() - start
                self.log.append({"step": self.step, "loss": statistics.mean(losses),
                                 "tokens_per_second": round(speed), "imbalance": imbalance,
                                 "seconds": round(self.seconds), "valid": self.validate()})
                if RANK == 0:
                    valid = " ".join(f"{kind} {value:.3f}"
                                     for kind, value in self.log[-1]["valid"].items())
                    left = (total - self.step) * tokens / speed / 60
                    bar.console.print(
                        f"{name} step {self.step}/{total} loss {self.log[-1]['loss']:.3f} valid "
                        f"{valid} {speed:.0f} tokens/s {self.seconds / 60:.0f} min, {left:.0f} min "
                        "left", soft_wrap=True)
                    sys.stdout.flush()
                    self.save()
                losses, start = [], time.perf_counter()


def read_checkpoint(path: Path, device) -> dict:
    """What a Trainer has saved."""
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        return saved | {"made_with": str(saved["made_with"])}
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError, KeyError, TypeError):
        raise ValueError(f"{path} is not a checkpoint of train.py; delete it") from None


def compare_recipes(args: argparse.Namespace) -> list[dict]:
    """Train a denoiser by each of RECIPES from the phase 1 in --out, for the same steps on the same
    batches; what it then writes is measured as `bench.py miniature` does."""
    (_, base), fields = (SMOKE, SMOKE_MODEL) if args.smoke else (PHASES, MODEL)
    steps, items = (8, 2) if args.smoke else (400, 500)
    base = replace(base, steps=steps, stages=(), warm_up=30)
    saved, context = read_checkpoint(args.out / "phase1.pt", "cpu"), build(base, fields)
    if json.dumps(asdict(context.config)) not in saved["made_with"]:
        raise ValueError(f"{args.out / 'phase1.pt'} is of another model")
    context.load_state_dict(saved["model"])
    tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))
    data, rows = Data(tokenizer, base.every_file, args.seed), []
    kinds = {task: task_prompts(tokenizer, task, items, "recipes") for task in base.tasks()}
    for name in args.recipes or RECIPES:
        torch.manual_seed(args.seed)
        recipe = replace(base, **RECIPES[name])
        model = build(recipe, fields, context).to(args.device)
        trainer = Trainer(model, recipe, data, None, args.bf16)
        trainer.run(every=recipe.steps)
        for mode in ("ar", "gamma 0.8") if recipe.tied or not rows else ("gamma 0.8",):
            scores = {kind: answer(model, tokenizer, items, mode)
                      for kind, items in kinds.items()}
            right = {kind: score["right"] / score["items"] for kind, score in scores.items()}
            passes = sum(score["nfe"] or score["context_passes"] for score in scores.values())
            row = {"accuracy": statistics.mean(right.values()),
                   "valid": statistics.mean(trainer.log[-1]["valid"].values()),
                   "passes_per_block": passes / sum(score["blocks"] for score in scores.values())}
            row |= right
            print(name, mode, *(f"{key} {value:.3f}" for key, value in row.items()), flush=True)
            rows.append({"recipe": name, "mode": mode} | row)
    return rows


# ---------------------------------------------------------------------------------------------
# Command line


def fail(message):
    print("train.py: " + " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = fail
    parser.add_argument("--out", type=Path, metavar="DIR",
                        help="checkpoints and the result; an interrupted run goes on from there; "
                             "default runs/miniature, runs/published or runs/smoke")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--bf16", action="store_true",
                        help="matrix products in bfloat16, where the processor is fast at it")
    parser.add_argument("--smoke", action="store_true", help="a run of under a minute")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--published", action="store_true", help="phase 2 as it was published")
    kind.add_argument("--recipes", nargs="*", choices=list(RECIPES), metavar="NAME",
                      help=f"compare these, or all: {', '.join(RECIPES)}")
    args = parser.parse_args(argv)
    if args.out is None:
        kind = "smoke" if args.smoke else "published" if args.published else "miniature"
        args.out = Path("runs") / kind
    if args.threads < 1:
        fail(f"--threads is {args.threads}, but it must be 1 or more")
    if not 0 <= args.seed < 2**32:
        fail(f"--seed is {args.seed}, but it must be in [0, 2**32)")
    rows = (SMOKE if args.smoke else PHASES)[0].rows
    if rows % WORLD:
        fail(f"{WORLD} processes cannot share {rows} sequences evenly")
    if args.recipes is not None and WORLD > 1:
        fail("--recipes runs in one process")
    if args.device == "cuda":
        args.device = f"cuda:{LOCAL_RANK}"
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {args.device} cannot be used: {str(error).splitlines()[0]}")
    return args


def run(args: argparse.Namespace):
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    if args.recipes is not None:
        print(json.dumps(compare_recipes(args)))
        return
    (first, second), fields = (SMOKE, SMOKE_MODEL) if args.smoke else (PHASES, MODEL)
    if args.published:
        second = replace(second, **PUBLISHED)
    if WORLD > 1:
        dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
    if RANK == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        prepare(args.out / "tokenizer.json", first.vocab_size, first.every_file)
    if WORLD > 1:
        dist.barrier()
    tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))
    data, model = Data(tokenizer, first.every_file, args.seed), None
    for recipe in (first, second):
        model = build(recipe, fields, model).to(args.device)
        Trainer(model, recipe, data, args.out / f"phase{recipe.phase}.pt", args.bf16).run()
    if RANK == 0:
        model.save_pretrained(args.out)
        print(f"the model is in {args.out}: python sample.py --checkpoint {args.out} PROMPT")


def main(argv: list[str] | None = None):
    args = parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        print("\ntrain.py: stopped; the same command goes on from the last checkpoint",
              file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
