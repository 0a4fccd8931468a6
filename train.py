"""Train a denoiser for a Nemotron-H backbone on text of your own; or the miniature from nothing.

    python train.py --backbone DIR --data FILE ... --out NEW
                                        a frozen copy of the backbone becomes the context tower, the
                                        denoiser starts as another and learns to fill masked blocks
                                        of your text; run it again to go on where it was
    python train.py --backbone DIR --plan
                                        what that takes on 8 to 512 GPUs, from config.json alone
    torchrun --nproc-per-node 8 train.py ...
                                        processes share every tensor and the sequences of a step
    python train.py                     the miniature, everything, into runs/miniature
    python train.py --smoke             the same in under a minute, with a model too small for use
    python train.py --recipes           its denoiser trained for 400 steps each by several recipes,
                                        from the phase 1 that is in --out, compared

The miniature's phase 1 trains an autoregressive model of corpus.py's text with a next-token loss;
phase 2 does with that what --backbone does with yours (arXiv 2606.26493, training).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_state_dict,
                                                     set_state_dict)

import plan
from bench import count, fail
from corpus import Data, Reading, Text, also_ar, prepare, readings, task_prompts, write_tasks
from rows import load_tokenizer, write_rows
from sharding import (LOCAL_RANK, RANK, WORLD, How, all_reduce, both_towers, export, in_first,
                      read_backbone, save_text)
from twotower import (CHECKPOINT_FILE, Router, SafetensorError, TwoTower, TwoTowerConfig,
                      masked_cross_entropy, require, write)

# ---------------------------------------------------------------------------------------------
# How a phase is trained


@dataclass(frozen=True)
class Recipe:
    """One phase: what is read and for how long; PUBLISHED changes phase 2 to what was published.

    The last fields are choices of phase 2; `python train.py --recipes` compares them (once measured:
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
    mock_ar: float = 0.0            # share of the sequences also learned as by AR
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
    joint: bool = False             # the context tower is trained too, by both losses
    tied: bool = False              # one tower in both roles, also trained with AR loss
    timeless: bool = False          # t is 0 whatever it is

    def at(self, step: int) -> Recipe:
        """The recipe with what its stages have changed by this step."""
        changes = [changes for first, changes in self.stages if first <= step]
        return replace(self, **{name: value for one in changes for name, value in one.items()})

    def joins(self) -> bool:
        """Whether it trains the context tower at some time."""
        return self.joint or any(changes.get("joint") for _, changes in self.stages)

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
        decay = max(now.floor, 1 - math.sqrt(max(0.0, 1 - left)))
        return now.peak * min(1.0, (step - first + 1) / self.warm_up, decay)


# what is hard comes more often; so many steps as an H200 did in seven minutes, and a thread of a
# CPU, from step 14650 on, in fifty: miniature/README.md
WORDS, SOURCE = ("letter", "json", "sort"), ("rename", "edit")
PHASES = (
    Recipe(1, steps=8650, decay=0.01, library_every=4, unaligned=0.5, rows=32, turns=WORDS, stages=(
        (800, dict(peak=2e-3, decay=0.9, floor=0.5, row=320, unaligned=0.9, library_every=9,
                   library_weight=0.2, turns=(*SOURCE * 2, "letter", *SOURCE * 2, "json",
                                              *SOURCE * 2, "sort"))),)),
    Recipe(2, steps=18500, peak=1.5e-3, decay=1.0, library_every=9, library_weight=0.2,
           unaligned=0.5, unprompted=0.05, mock_ar=1 / 64, denoised=0.5, rows=32, row=320,
           full_masks=0.5, slope=0.8, turns=(*SOURCE * 2, "json", *SOURCE * 2, "letter", "json",
                                             *SOURCE, "sort"),
           stages=((0, dict(block_size=32, joint=True)), (800, dict(block_size=16)),
                   (14650, dict(peak=4e-4, rows=6, joint=False, mock_ar=1 / 6, library_every=4,
                                library_weight=0.3)))))
# conv_kernel: three layers reach 69 tokens back with it, as the release's 23 of width 4 do
MODEL = dict(
    hidden_size=192, hybrid_override_pattern="M*EM*EM*E", num_hidden_layers=9, vocab_size=1280,
    layer_norm_epsilon=1e-5, mamba_num_heads=6, mamba_head_dim=64, n_groups=1, ssm_state_size=64,
    conv_kernel=24, chunk_size=64, num_attention_heads=6, num_key_value_heads=6, head_dim=48,
    intermediate_size=256, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=128,
    moe_shared_expert_intermediate_size=256, norm_topk_prob=True, routed_scaling_factor=1.0,
    initializer_range=0.05, max_position_embeddings=4096)
SMOKE = tuple(replace(recipe, steps=steps, stages=(), rows=4, row=128, warm_up=10, every_file=16)
              for recipe, steps in zip(PHASES, (200, 100)))
SMOKE_MODEL = MODEL | dict(hidden_size=32, hybrid_override_pattern="M*E", num_hidden_layers=3,
                           mamba_num_heads=2, mamba_head_dim=32, ssm_state_size=16, head_dim=16)

PUBLISHED = dict(gate="published", t_per="sequence", full_masks=0.0, slope=0.0, weight="mean",
                 library_weight=1.0, mock_ar=0.0, denoised=1.0, joint=False, tied=False,
                 timeless=False)


def as_published(recipe: Recipe) -> Recipe:
    """With what was published, in all of its stages."""
    stages = tuple((first, {name: value for name, value in changes.items()
                            if name not in PUBLISHED}) for first, changes in recipe.stages)
    return replace(recipe, **PUBLISHED, stages=stages)


RECIPES = {
    "default": dict(),                      # gate 1, t per block, 1 in half of them
    "published": PUBLISHED,
    "gate 1": PUBLISHED | dict(gate="copy"),
    "t per block": dict(full_masks=0.0),
    "slope 0.8": dict(full_masks=0.0, slope=0.8),
    "1/t": dict(full_masks=0.0, weight="1/t"),
    "tied towers": dict(tied=True),
    "no time": dict(timeless=True)}
# of a backbone, on text of one's own: what is known of the published recipe; flags change it
BACKBONE = Recipe(2, steps=1000, decay=0.2, turns=(), library_every=0, unaligned=0.0, row=2048,
                  peak=1e-4, **PUBLISHED)


# ---------------------------------------------------------------------------------------------
# The two phases


def new_context(fields: dict) -> TwoTower:
    """A context tower to train from nothing."""
    model = TwoTower(TwoTowerConfig(**fields), towers="context")
    with torch.no_grad():               # so small a network learns to copy much sooner from these
        model.context_tower.embeddings.weight.normal_()
        for layer in model.context_tower.layers:
            if layer.kind == "*":
                layer.mixer.q_proj.weight *= 2
                layer.mixer.k_proj.weight *= 2
    return model


class Balance:
    """Keeps experts evenly used: after every step the correction bias of an expert that was chosen
    too often falls by `rate`, of the others rises (arXiv 2412.19437, 2.1.2)."""

    def __init__(self, tower, rate: float):
        self.rate, self.counting = rate, True
        self.loads = {router: torch.zeros_like(router.e_score_correction_bias)
                      for router in tower.modules() if isinstance(router, Router)}
        for router in self.loads:
            router.register_forward_hook(self.count)

    def count(self, router: Router, _, routed: tuple[Tensor, Tensor]):
        load = self.loads[router]
        load += self.counting * torch.bincount(routed[0].flatten(), minlength=len(load))

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
    """One phase: optimiser, schedule, validation, and a folder of checkpoints to go on from
    exactly, with as many processes as there then are."""

    def __init__(self, model: TwoTower, recipe: Recipe, data: Data | Text, path: Path | None = None,
                 how: How = How(), origin: float = 0.0):
        self.model, self.recipe, self.data, self.path, self.how = model, recipe, data, path, how
        self.balance = Balance(model.context_tower if recipe.phase == 1 else model.denoiser_tower,
                               recipe.balance)
        groups = {0.1: [], 0.0: []}
        for name, p in model.named_parameters():
            if p.requires_grad:
                groups[0.1 if p.dim() > 1 and "scale_shift" not in name else 0.0].append(p)
        self.parameters = [p for group in groups.values() for p in group]
        self.optimizer = torch.optim.AdamW(
            [{"params": group, "weight_decay": decay} for decay, group in groups.items()],
            lr=0.0, betas=(0.9, 0.95), fused=how.device.type == "cuda")
        # what a checkpoint must agree in; origin: of the backbone
        self.made_with = json.dumps([asdict(recipe), asdict(model.config), data.seed, data.digest,
                                     how.bf16, how.autocast, origin])
        self.step, self.log = 0, []
        self.saved = StateDictOptions(ignore_frozen_params=not recipe.joins(), strict=False)
        self.flops = plan.flops_per_token(model.config, recipe.row, recipe.block_size,
                                          how.checkpoint)
        if path is not None:
            self.load()

    def state(self) -> dict:
        model, optimizer = get_state_dict(self.model, self.optimizer, options=self.saved)
        cursor = torch.zeros(self.recipe.rows, 3, dtype=torch.long)
        if getattr(self.data, "cursor", None) is not None:
            cursor[RANK::WORLD] = self.data.cursor[RANK::WORLD]
        cursor = all_reduce(cursor.to(self.how.device))
        return {"model": model, "optimizer": optimizer, "cursor": cursor}

    def load(self):
        """Go on from the last checkpoint. Raises: ValueError if the folder is of something else."""
        saved = sorted(self.path.glob("step-*[0-9]"))
        if not saved:
            return
        made_with, log = (self.path / name for name in ("made_with.json", "log.jsonl"))
        require(made_with.is_file() and made_with.read_text(encoding="utf-8") == self.made_with,
                f"{self.path} was made with another recipe, model, seed, text or precision; use "
                "another --out, or --overwrite")
        state = self.state()
        try:
            dcp.load(state, checkpoint_id=saved[-1])
            self.log = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        except (CheckpointException, OSError, ValueError, RuntimeError, KeyError) as error:
            raise ValueError(f"{saved[-1]} is not a checkpoint of train.py, delete it: "
                             f"{first_line(error)}") from None
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"],
                       optim_state_dict=state["optimizer"], options=self.saved)
        self.step = int(saved[-1].name.removeprefix("step-"))
        self.log = [entry for entry in self.log if entry["step"] <= self.step]
        if hasattr(self.data, "cursor"):
            self.data.step, self.data.cursor = self.step, state["cursor"].cpu()

    def save(self):
        """Another checkpoint; the one before it is removed once this is whole."""
        if self.path is None:
            return
        partial = self.path / "partial"

        def begin():
            self.path.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            log = "".join(json.dumps(entry) + "\n" for entry in self.log)
            for name, text in (("made_with.json", self.made_with), ("log.jsonl", log)):
                write({self.path / name: save_text(text)})
            plot(self.log, self.path / "loss.png")

        def commit():
            old = [*self.path.glob("step-*[0-9]")]
            os.replace(partial, self.path / f"step-{self.step:08}")
            for path in old:
                shutil.rmtree(path)

        in_first(begin)
        try:
            dcp.save(self.state(), checkpoint_id=partial)
        except CheckpointException as error:
            raise OSError(f"saving {partial} failed, the checkpoint before it is whole: "
                          f"{first_line(error)}") from None
        in_first(commit)

    def passes(self, step: int, held_out: bool = False, only: str | None = None) -> Iterator:
        """The loss of a step in scalars to add, over the passes and over the processes. Each
        process makes as many passes of a kind, as sharding needs them together."""
        recipe = self.recipe.at(self.recipe.steps if held_out else step)
        recipe = replace(recipe, **PUBLISHED) if held_out else recipe
        mine = slice(RANK, None, WORLD)
        tokens, targets = self.data.batch(recipe, step, held_out, only, mine)
        mask, some = self.model.config.mask_token_id, also_ar(recipe, step)
        found = readings(recipe, tokens, targets, step, self.data.seed, mask, mine)
        counts = {kind: all_reduce(reading.wanted.sum().to(self.how.device)).clamp(min=1)
                  for kind, reading in found.items()}
        ar = found.pop("ar") if recipe.joint else None
        for kind, reading in found.items():
            for rows in torch.arange(len(tokens)).chunk(self.how.accumulate):
                if kind == "mock":
                    if not some[WORLD * int(rows[0]):WORLD * (int(rows[-1]) + 1)].any():
                        continue
                    own = rows[some[mine][rows]]                # of another row nothing is wanted
                    rows, self.balance.counting = (own, True) if len(own) else (rows[:1], False)
                if ar is None or kind == "mock":
                    yield self.losses(reading.rows(rows)).sum() / counts[kind]
                else:
                    ours, theirs = self.losses(reading.rows(rows), ar.rows(rows))
                    yield ours.sum() / counts[kind] + theirs.sum() / counts["ar"]
                self.balance.counting = True

    def losses(self, reading: Reading, ar: Reading | None = None) -> Tensor | list[Tensor]:
        """At every place that is wanted; with ar, of both readings, from one pass."""
        tokens, _, _, noisy, *rest, _ = reading
        # no cache of cast weights: one cast in the frozen context's pass would have no gradient
        with torch.autocast(self.how.device.type, torch.bfloat16, self.how.autocast,
                            cache_enabled=False):
            if ar is not None:
                logits, beside = self.model.diffusion_logits(tokens, noisy, *rest, joint=True)
                return [weighted_losses(logits, reading), weighted_losses(beside[:, :-1], ar)]
            return weighted_losses(self.model.context_logits(tokens[:, :-1]) if noisy is None else
                                   self.model.diffusion_logits(tokens, noisy, *rest), reading)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Held-out losses by source; of phase 2 with the published noise, to compare recipes."""
        valid = {kind: statistics.mean(
            float(all_reduce(sum(self.passes(step, True, kind)))) for step in range(2))
            for kind in self.data.kinds(self.recipe)}
        self.balance.reset()
        return valid

    def train_step(self) -> tuple[float, float]:
        """Returns the loss, and the imbalance of the experts."""
        total = torch.zeros((), device=self.how.device)
        if self.recipe.joins():
            for module in (self.model.context_tower, self.model.context_lm_head):
                module.requires_grad_(self.recipe.at(self.step).joint)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate(self.step)
        for loss in self.passes(self.step):
            (loss * WORLD).backward()                   # FSDP takes the mean over the processes
            total += loss.detach()
        loss = float(all_reduce(total))
        require(math.isfinite(loss), f"the loss of step {self.step} is {loss}; the last checkpoint "
                "is as it was")
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return loss, self.balance.update()

    def run(self, every: int = 0):
        """Train to the end of the phase, validating and saving every so many steps."""
        total, name = self.recipe.steps, f"phase {self.recipe.phase}"
        every = every or min(250, total // 2)
        losses, tokens, start = [], 0, time.perf_counter()
        columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
        with Progress(*columns, disable=not sys.stdout.isatty() or RANK > 0) as bar:
            def say(text: str):
                if RANK == 0:
                    bar.console.print(text, soft_wrap=True)
                    sys.stdout.flush()

            task = bar.add_task(name, total=total, completed=self.step)
            if self.step == 0 and isinstance(self.data, Text):      # what the copy does
                say(self.report(None, 0.0, 0, 1.0))
            while self.step < total:
                recipe = self.recipe.at(self.step)
                loss, imbalance = self.train_step()
                losses.append(loss)
                tokens += recipe.rows * recipe.row
                seconds = time.perf_counter() - start
                bar.update(task, completed=self.step, description=(
                    f"{name} loss {loss:.3f} {self.speed(tokens / seconds)}"))
                if self.step % every and self.step < total:
                    continue
                say(self.report(statistics.mean(losses), imbalance, tokens, seconds))
                self.save()
                losses, tokens, start = [], 0, time.perf_counter()

    def speed(self, tokens_per_second: float) -> str:
        """Tokens a second, and what share of the cards' matrix rate that is, where it is known."""
        text, device = f"{tokens_per_second:.0f} tokens/s", self.how.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        card = next((card for key, card in plan.CARDS.items() if key in name), None)
        if card and self.how.bf16 and self.recipe.phase == 2:
            used = tokens_per_second * self.flops / card.rate / WORLD
            text += f" ({used:.0%} of the matrix rate)"
        return text

    def report(self, loss: float | None, imbalance: float, tokens: int, seconds: float) -> str:
        """Validate, and add a line to the log."""
        recipe, total = self.recipe.at(self.recipe.steps), self.recipe.steps
        speed, before = tokens / seconds, self.log[-1]["seconds"] if self.log else 0
        device = self.how.device
        entry = {"step": self.step, "loss": loss, "learning_rate":
                 self.recipe.learning_rate(max(0, self.step - 1)),
                 "tokens_per_second": round(speed), "imbalance": imbalance,
                 "seconds": round(before + seconds, 1), "memory":
                 torch.cuda.max_memory_allocated(device) if device.type == "cuda" else
                 psutil.Process().memory_info().rss,
                 "valid": self.validate()}
        self.log.append(entry)
        valid = " ".join(f"{kind} {value:.3f}" for kind, value in entry["valid"].items())
        text = f"phase {recipe.phase} step {self.step}/{total} valid {valid}"
        if loss is not None:
            left = (total - self.step) * recipe.rows * recipe.row / speed / 60
            text += (f" loss {loss:.3f} {self.speed(speed)} {entry['seconds'] / 60:.0f} min, "
                     f"{left:.0f} min left")
        return text


def weighted_losses(logits: Tensor, reading: Reading) -> Tensor:
    """At every place that is wanted."""
    losses = masked_cross_entropy(logits, reading.labels, reading.wanted, "none")
    weight = reading.weight
    return losses if weight is None else losses * weight[reading.wanted].to(losses.device)


def first_line(error: Exception) -> str:
    """Of what went wrong in some process, without a traceback."""
    failures = getattr(error, "failures", None) or {0: (error, None)}
    error = next(iter(failures.values()))[0]
    return (str(error).splitlines() or [type(error).__name__])[0]


def plot(log: list[dict], path: Path):
    """Losses over steps."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        if len(log) <= 2:
            print("no matplotlib, so no loss.png; log.jsonl has the losses", flush=True)
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    trained = [entry for entry in log if entry["loss"] is not None]
    axes.plot([entry["step"] for entry in trained], [entry["loss"] for entry in trained],
              label="training")
    for kind in log[0]["valid"]:
        axes.plot([entry["step"] for entry in log], [entry["valid"][kind] for entry in log],
                  label=f"held out: {kind}")
    axes.set(xlabel="step", ylabel="loss, nats a token")
    axes.legend()
    write({path: lambda partial: figure.savefig(partial, format="png", dpi=120)})


def compare_recipes(args: argparse.Namespace, how: How) -> list[dict]:
    """Train a denoiser by each of RECIPES from the phase 1 in --out, for the same steps on the same
    batches, and how many held-out items it then has right, and in how many passes."""
    base = (SMOKE if args.smoke else PHASES)[1]
    steps, items = (8, 2) if args.smoke else (400, 500)
    base = replace(base, steps=steps, stages=(), warm_up=30, slope=0.0)
    skeleton, read = read_backbone(args.out / "phase1")
    tokenizer = load_tokenizer(args.out)
    data, rows = Data(tokenizer, base.every_file, args.seed), []
    kinds = {task: task_prompts(tokenizer, task, items, "recipes") for task in base.tasks()}
    for name in args.recipes or RECIPES:
        recipe = replace(base, **RECIPES[name])
        model = both_towers(recipe, skeleton.config, read, how)
        trainer = Trainer(model, recipe, data, None, how)
        trainer.run(every=recipe.steps)
        for mode in ("ar", "mask_diffusion") if recipe.tied or not rows else ("mask_diffusion",):
            written, right = [], {}
            for kind, asked in kinds.items():
                prompts, answers, lengths = zip(*asked)
                new = write_rows(model, tokenizer, mode, [ids.tolist() for ids in prompts],
                                 lengths[0])
                right[kind] = statistics.mean(row.text == text for row, text in zip(new, answers))
                written += new
            row = {"accuracy": statistics.mean(right.values()),
                   "valid": statistics.mean(trainer.log[-1]["valid"].values()),
                   "passes_per_block": sum(row.nfe or row.context_passes for row in written)
                   / sum(-(-len(row.tokens) // 16) for row in written)} | right
            print(name, mode, *(f"{key} {value:.3f}" for key, value in row.items()), flush=True)
            rows.append({"recipe": name, "mode": mode} | row)
    return rows


# ---------------------------------------------------------------------------------------------
# Command line

TOKENIZER = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
fail = partial(fail, program="train.py")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("train.py", description=__doc__.splitlines()[0],
                                     allow_abbrev=False)
    parser.error = fail
    own = parser.add_argument_group("a denoiser for a backbone")
    file, n = {"type": Path, "metavar": "FILE"}, {"type": count, "metavar": "N"}
    for name, what, options in (
            ("--backbone", "of config.json, tokenizer.json and safetensors, as Hugging Face holds "
             "a Nemotron-H model", file | {"metavar": "DIR"}),
            ("--data", "text, or .jsonl of objects with text, or with prompt and answer, of which "
             "the answer is learned", file | {"nargs": "+"}),
            ("--valid", "held-out text; default a document of --data in 32", file | {"nargs": "+"}),
            ("--steps", f"default {BACKBONE.steps}", n),
            ("--rows", f"sequences a step; default {BACKBONE.rows}", n),
            ("--length", f"tokens a sequence; default {BACKBONE.row}", n),
            ("--block-size", "each for as many steps; default 32 16", n | {"nargs": "+"}),
            ("--learning-rate", f"falls to 1/100; default {BACKBONE.peak}", {"type": float}),
            ("--warm-up", f"steps; default {BACKBONE.warm_up}", n),
            ("--gate", "what the time conditioning does at first: with copy nothing; default "
             "published", {"choices": ("published", "copy")}),
            ("--mock-ar", "share of the sequences learned without t too, as by AR; default 0",
             {"type": float}),
            ("--plan", "memory and time on 8 to 512 GPUs, from config.json alone",
             {"action": "store_const", "const": True}),
            ("--card", "of --plan; default H100", {"choices": list(plan.CARDS)})):
        own.add_argument(name, help=what, **options)
    mini = parser.add_argument_group("the miniature")
    mini.add_argument("--smoke", action="store_true", help="a run of under a minute")
    kind = mini.add_mutually_exclusive_group()
    kind.add_argument("--published", action="store_true", help="phase 2 as it was published")
    kind.add_argument("--recipes", nargs="*", choices=list(RECIPES), metavar="NAME",
                      help=f"compare these, or all: {', '.join(RECIPES)}")
    parser.add_argument("--out", help="checkpoints and the result; an interrupted run goes on from "
                        "there; of the miniature runs/miniature, runs/published or runs/smoke",
                        **file | {"metavar": "DIR"})
    parser.add_argument("--overwrite", action="store_true", help="give up what --out holds")
    parser.add_argument("--save-every", help="steps; default 250", **n)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", default=torch.get_num_threads(), **n)
    mini.add_argument("--workers", help="processes that make rows ahead, for a GPU; default 0",
                      default=0, **n)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="compute in "
                        "bfloat16, learn in float32; default with --backbone on a GPU; for the "
                        "miniature only matrix products")
    parser.add_argument("--accumulate", help="passes that make a step", default=1, **n)
    parser.add_argument("--checkpoint-activations", action="store_true",
                        help="less memory for a third more time")
    parser.add_argument("--shard", help="processes that share one copy of the model, others hold "
                        "more copies; default all", **n)
    args = parser.parse_args(argv)
    check_args(args, [action.dest for action in own._group_actions])
    return args


def check_args(args: argparse.Namespace, own: list[str]):
    """Raises: ValueError for what cannot be, or would do nothing."""
    if args.backbone:
        for flag in ("smoke", "published", "recipes"):
            require(not getattr(args, flag), f"--{flag} is of the miniature, not of --backbone")
        for flag in ("data", "out"):
            require(args.plan or getattr(args, flag), f"--backbone needs --{flag}")
    for name in own:
        require(args.backbone or getattr(args, name) is None,
                f"--{name.replace('_', '-')} needs --backbone")
    require(0 < (args.learning_rate or 1) < math.inf, "--learning-rate must be above 0")
    require(0 <= (args.mock_ar or 0) <= 1, "--mock-ar must be in [0, 1]")
    require(0 <= args.seed < 2**32, f"--seed is {args.seed}, but it must be in [0, 2**32)")
    require(args.recipes is None or WORLD == 1, "--recipes runs in one process")
    require(WORLD % (args.shard or WORLD) == 0,
            f"--shard {args.shard} does not divide {WORLD} processes")
    args.out = args.out or Path("runs") / (
        "smoke" if args.smoke else "published" if args.published else "miniature")
    args.device = f"cuda:{LOCAL_RANK}" if args.device == "cuda" else args.device
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device} cannot be used: {first_line(error)}") from None
    args.device = torch.device(args.device)


def own_recipe(args: argparse.Namespace) -> Recipe:
    """BACKBONE as the flags change it."""
    names = {"steps": "steps", "rows": "rows", "length": "row", "learning_rate": "peak",
             "warm_up": "warm_up", "gate": "gate", "mock_ar": "mock_ar"}
    given = {field: getattr(args, flag) for flag, field in names.items()
             if getattr(args, flag) is not None}
    recipe, sizes = replace(BACKBONE, **given), args.block_size or [32, 16]
    for size in sizes:
        require(recipe.row % size == 0, f"--length {recipe.row} is no multiple of --block-size "
                f"{size}" + ", and shorter" * (recipe.row < size))
    return replace(recipe, block_size=sizes[-1], stages=tuple(
        (i * recipe.steps // len(sizes), {"block_size": size}) for i, size in enumerate(sizes)))


def claim(out: Path, phase: str, overwrite: bool):
    """Make the folder of a run, unless what it holds is not of one, and is not given up."""
    out.mkdir(parents=True, exist_ok=True)
    runs = [out / name for name in ("phase1", "phase2") if (out / name).is_dir()]
    theirs = [path.name for path in out.iterdir() if CHECKPOINT_FILE.fullmatch(path.name)
              or path.name in ("config.json", *TOKENIZER)]
    require(overwrite or runs or not theirs, f"{out} holds {theirs[:1]}, which no run here made; "
            "give another --out, or --overwrite to replace it")
    for path in runs if overwrite else ():
        shutil.rmtree(path)
    (out / phase).mkdir(exist_ok=True)


def train_denoiser(args, how: How, backbone: Path, recipe: Recipe, data, files: dict[str, str]):
    """Phase 2 from a backbone, and the result in --out."""
    skeleton, read = read_backbone(backbone)
    model = both_towers(recipe, skeleton.config, read, how)
    origin = read("context_lm_head.weight", 0, 8).double().sum().item()
    Trainer(model, recipe, data, args.out / "phase2", how, origin).run(args.save_every or 0)
    done = args.out / "phase2" / "exported"
    if not done.exists():
        export(model, skeleton, None if recipe.joins() else read, args.out, files)
        in_first(done.touch)
    in_first(lambda: print(f"the model is in {args.out}: python sample.py --checkpoint {args.out} "
                           "PROMPT"))


def run_miniature(args: argparse.Namespace, how: How):
    (first, second), fields = (SMOKE, SMOKE_MODEL) if args.smoke else (PHASES, MODEL)
    second = as_published(second) if args.published else second
    check_rows(first, how)
    in_first(lambda: claim(args.out, "phase1", args.overwrite))
    in_first(lambda: prepare(args.out / "tokenizer.json", first.vocab_size, first.every_file))
    data = Data(load_tokenizer(args.out), first.every_file, args.seed, args.workers)
    phase1 = args.out / "phase1"
    torch.manual_seed(args.seed)
    model = skeleton = new_context(fields).to(how.device)
    how.share(model, model.context_tower)
    Trainer(model, first, data, phase1, how).run(args.save_every or 0)
    if not (phase1 / "config.json").exists():
        export(model, skeleton, None, phase1, {})
    del model, skeleton
    train_denoiser(args, how, phase1, second, data, {})
    tasks = args.out / "tasks"
    in_first(lambda: any(tasks.glob("*")) or            # those there may have been changed
             write_tasks(tasks, load_tokenizer(args.out), second.tasks()))


def own_config(path: Path) -> TwoTowerConfig:
    config = TwoTowerConfig.from_json(path)
    require(config.experts is None, f"{path}: experts in {config.experts} cannot be trained; give "
            "the weights that they were made of")
    return config


def run_backbone(args: argparse.Namespace, how: How):
    recipe, backbone = own_recipe(args), args.backbone
    check_rows(recipe, how)
    config = own_config(backbone / "config.json")
    require(backbone.resolve() != args.out.resolve(), "--out must not be --backbone")
    tokenizer = load_tokenizer(backbone)
    last = max(tokenizer.get_vocab(with_added_tokens=True).values())
    require(last < config.vocab_size, f"{backbone}/tokenizer.json has ids up to {last}, but "
            f"vocab_size of the model is {config.vocab_size}")
    eos = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    require(eos is not None, f"{backbone}/config.json has no eos_token_id to end documents with")
    data = Text(tokenizer, eos, args.data, args.valid or [], args.seed)
    in_first(lambda: claim(args.out, "phase2", args.overwrite))
    train_denoiser(args, how, backbone, recipe, data, {
        name: (backbone / name).read_text(encoding="utf-8") for name in TOKENIZER
        if (backbone / name).is_file()})


def check_rows(recipe: Recipe, how: How):
    """Every process makes --accumulate passes of as many sequences, whatever the stage."""
    for rows in {recipe.at(step).rows for step in range(recipe.steps)}:
        require(rows % (WORLD * how.accumulate) == 0, f"{WORLD} processes x {how.accumulate} "
                f"passes cannot share {rows} sequences evenly")


def run(args: argparse.Namespace):
    for noise in ("torch.distributed is disabled", "FSDP2-wrapped module"):     # both are meant
        warnings.filterwarnings("ignore", noise)
    torch.set_num_threads(args.threads)
    own, on_gpu = bool(args.backbone), args.plan or args.device.type == "cuda"
    bf16 = args.bf16 if args.bf16 is not None else own and on_gpu
    how = How(args.device, args.seed, bf16 and own, bf16 and not own, args.shard or WORLD,
              args.accumulate, args.checkpoint_activations)
    if args.plan:
        path = args.backbone / "config.json" if args.backbone.is_dir() else args.backbone
        return print(plan.table(own_config(path), own_recipe(args), how,
                                args.card or "H100", args.shard))
    if args.recipes is not None:
        return print(json.dumps(compare_recipes(args, how)))
    backend = "cpu:gloo,cuda:nccl" if args.device.type == "cuda" else "gloo"
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
    if WORLD > 1:
        dist.init_process_group(backend)
    elif how.bf16:                              # FSDP2 computes in it, in one process too
        dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())
    (run_backbone if args.backbone else run_miniature)(args, how)


def main(argv: list[str] | None = None):
    try:
        run(parse_args(argv))
    except (ValueError, OSError, SafetensorError) as error:
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
