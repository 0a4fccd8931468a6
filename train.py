"""Train a small TwoTower from nothing in the two phases of the published recipe, on a laptop.

    python train.py                     everything, into runs/miniature; run it again to go on
    python train.py --smoke             the same in under a minute, with a model too small for use
    torchrun --nproc-per-node 2 train.py --threads 1
                                        two processes share the sequences of a step, which is
                                        faster than two threads at this size

1. corpus      the standard library of the running Python, and five tasks whose answers can be
               checked exactly (bills, sorting, records to JSON, letters, classes)
2. tokenizer   byte-level BPE with 1,280 ids: any text round-trips
3. phase 1     an autoregressive model, next-token loss
4. phase 2     the model is copied into both towers, the context tower is frozen, and the denoiser
               learns to fill masked blocks of 16 (arXiv 2606.26493, training)
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import pickle
import platform
import random
import statistics
import sys
import sysconfig
import time
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from twotower import Router, TwoTower, TwoTowerConfig

# under torchrun: this process, its place on this machine, and how many there are
RANK, LOCAL_RANK, WORLD = (int(os.environ.get(name, default)) for name, default in
                           (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))

# ---------------------------------------------------------------------------------------------
# 1. Corpus: five tasks and the standard library

NAMES = ("Ada Alan Barbara Boris Carla David Dora Edgar Emma Felix Grace Hugo Ida Ivan Jane "
         "Karl Laura Lena Linus Maria Nora Oscar Paul Rosa Ruth Sam Tara Theo Tom Vera Walter "
         "Zoe").split()
CITIES = ("Athens Berlin Boston Cairo Delhi Dublin Geneva Hanoi Kyoto Lagos Lima Lisbon London "
          "Madrid Milan Moscow Oslo Paris Prague Rome Seoul Sydney Tokyo Vienna").split()
ITEMS = ("books boxes chairs clocks cups desks doors fans keys lamps maps pens pots rugs tables "
         "toys").split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
COLORS = "black blue brown gray green orange pink purple red silver white yellow".split()
JOBS = "baker cook doctor driver farmer judge nurse painter pilot singer teacher writer".split()
TYPES = "bool bytes dict float int list set str".split()
FIELDS = ("address age city code color count date depth height index key kind label length "
          "level limit name number offset owner path port price rate size source speed start "
          "state status target text time title total unit user value weight width").split()
CLASSES = ("Account Block Book Box Client Color Event Field File Frame Group Image Item Job "
           "Line Message Node Order Page Point Query Record Route Server Shape Table Task Ticket "
           "Token Tree User Window").split()


def bill(rng: random.Random) -> tuple[str, str]:
    lines = [(number, rng.randint(2, 9), item, rng.randint(2, 9))
             for number, item in enumerate(rng.sample(ITEMS, rng.randint(4, 6)), 1)]
    return (", ".join(f"{number}: {count} {item} at {price}"
                      for number, count, item, price in lines),
            "\n".join(f"{number}: {count} {item} x {price} = {count * price:02}"
                      for number, count, item, price in lines))


def sort(rng: random.Random) -> tuple[str, str]:
    lines = [f"{number} {rng.choice(COLORS)} {item}"
             for number, item in enumerate(rng.sample(ITEMS, rng.randint(5, 8)), 1)]
    return ", ".join(rng.sample(lines, len(lines))), "\n".join(lines)


def to_json(rng: random.Random) -> tuple[str, str]:
    record = {"name": rng.choice(NAMES), "age": rng.randrange(10, 100), "city": rng.choice(CITIES),
              "color": rng.choice(COLORS), "job": rng.choice(JOBS), "day": rng.choice(DAYS),
              "count": rng.randrange(10, 100), "item": rng.choice(ITEMS)}
    fields = rng.sample(sorted(record), rng.randint(4, 6))
    record = {field: record[field] for field in fields}
    return " ".join(f"{field}={value}" for field, value in record.items()), json.dumps(record)


def letter(rng: random.Random) -> tuple[str, str]:
    name, city, day, item = (rng.choice(words) for words in (NAMES, CITIES, DAYS, ITEMS))
    count, code = rng.randrange(10, 100), rng.randrange(1000, 10000)
    return (f"code={code} count={count} item={item} name={name} city={city} day={day}",
            f"Dear {name},\nyour order {code} of {count} {item} will leave on {day}.\n"
            f"We send all {count} {item} to you in {city}.\n"
            f"If they are not there a week after {day}, call us and give the number {code}.")


def to_class(rng: random.Random) -> tuple[str, str]:
    name = rng.choice(CLASSES)
    fields = [(field, rng.choice(TYPES)) for field in rng.sample(FIELDS, rng.randint(3, 5))]
    return (" ".join([name] + [f"{field}:{kind}" for field, kind in fields]),
            f"class {name}:\n    def __init__(self, "
            + ", ".join(f"{field}: {kind}" for field, kind in fields) + "):"
            + "".join(f"\n        self.{field} = {field}" for field, _ in fields))


TASKS = {"bill": bill, "sort": sort, "json": to_json, "letter": letter, "class": to_class}


def task_items(task: str, seed: str, held_out: bool = False):
    """Endless (prompt, answer) pairs; one prompt in 16, by its CRC, is held out from training."""
    rng = random.Random(f"{task} {seed}")
    while True:
        prompt, answer = TASKS[task](rng)
        prompt = f"{task} {prompt}\n"
        if (zlib.crc32(prompt.encode()) % 16 == 0) == held_out:
            yield prompt, answer


def library(held_out: bool = False, every: int = 1) -> list[str]:
    """The standard library's source files; one in 16, by the CRC of its name, is held out.

    Without tests, and without `encodings`, whose files are copies of each other.
    every: return only every so many-th file.
    """
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings"}
    paths = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not skip & set(name.split("/")) and (zlib.crc32(name.encode()) % 16 == 0) == held_out:
            paths.append(path)
    return [path.read_text(encoding="utf-8", errors="replace") for path in paths[::every]]


# ---------------------------------------------------------------------------------------------
# 2. Tokenizer

UNK, BOS, EOS, MASK = "<unk>", "<s>", "</s>", "<mask>"                          # ids 0, 1, 2, 3
# words, single digits, punctuation, each with a space before it, or white space: every number is
# spelled digit by digit, so that the model can compute with it
PIECES = Regex(r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(PIECES, "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[UNK, BOS, EOS, MASK], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    return tokenizer


def prepare(path: Path, recipe: Recipe):
    """Say what the corpus is; train and save the tokenizer if it is not there."""
    texts = library(every=recipe.every_file)
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    print(f"Python {platform.python_version()}: {len(texts)} library files, "
          f"{sum(map(len, texts))} characters, sha256 {digest[:16]}", flush=True)
    if not path.exists():
        items = [prompt + answer for task in TASKS
                 for prompt, answer in itertools.islice(task_items(task, "tokenizer"), 20000)]
        train_tokenizer(texts[::4] + items, recipe.vocab_size).save(f"{path}.partial")
        os.replace(f"{path}.partial", path)


# ---------------------------------------------------------------------------------------------
# 3. Batches


class Data:
    """Rows of M tokens and which of them are targets: learned, and masked in phase 2.

    A library row is a window of source text, all of it targets. A task row holds items, each as
    prompt, answer and </s>. Every answer begins a block, as it does when decoding: as much library
    text as that takes is put before the prompt, random so that nothing can depend on it (but some
    rows begin with a prompt, as generation does, wherever that puts the answer), and </s> fills
    its last block. Targets are answers and the </s> after them. In phase 2 some rows leave out the
    prompts, so that what stands to the right of a mask is worth reading.
    By phase: which of the rows are library text; whose turn it is in the others (what is still hard
    comes more often); how many of those begin with a prompt, and how many have none.
    """

    LIBRARY_EVERY = {1: 3, 2: 8}
    TURNS = (                           # phase, from which step on, whose turns
        (1, 0, tuple(TASKS)),
        (1, 4000, ("letter", "json", "class", "letter", "sort", "json", "letter", "class", "bill")),
        (2, 0, ("json", "sort", "bill", "class", "json", "sort", "bill", "class", "letter")),
        (2, 7000, ("json", "bill", "json", "class", "bill", "json", "sort", "json", "letter")))
    UNALIGNED = {1: 0.5, 2: 0.2}
    UNPROMPTED = {1: 0.0, 2: 0.08}

    def __init__(self, tokenizer: Tokenizer, recipe: Recipe, seed: int):
        self.tokenizer, self.seed = tokenizer, seed
        self.row, self.block_size = recipe.row, recipe.block_size
        self.eos = tokenizer.token_to_id(EOS)
        self.streams, digest = {}, hashlib.sha256(tokenizer.to_str().encode())
        for held_out in (False, True):
            texts = library(held_out, recipe.every_file)
            digest.update("\0".join(texts).encode())
            files = tokenizer.encode_batch(texts)
            self.streams[held_out] = torch.tensor(
                [token for file in files for token in [*file.ids, self.eos]])
        self.digest = digest.hexdigest()

    def library_row(self, rng: random.Random, held_out: bool = False):
        stream = self.streams[held_out]
        start = rng.randrange(len(stream) - self.row)
        return stream[start:start + self.row], torch.ones(self.row, dtype=torch.bool)

    def task_row(self, rng: random.Random, items, phase: int, held_out: bool):
        tokens, targets = [], []
        draw = rng.random()
        aligned = draw >= self.UNALIGNED[phase]
        prompted = held_out or draw < 1 - self.UNPROMPTED[phase]
        while True:
            prompt, answer = (self.tokenizer.encode(text).ids for text in next(items))
            prompt = prompt if prompted else []
            fill = -(len(tokens) + len(prompt)) % self.block_size if tokens or aligned else 0
            end = len(tokens) + fill + len(prompt) + len(answer)
            rest = self.block_size - end % self.block_size
            before = self.library_row(rng, held_out)[0][:fill].tolist()
            tokens += before + prompt + answer + [self.eos] * rest
            targets += [False] * (fill + len(prompt)) + [True] * (len(answer) + rest)
            if len(tokens) > self.row:
                break
        # the item that did not fit is cut: what there is of it is learned all the same
        return torch.tensor(tokens[:self.row]), torch.tensor(targets[:self.row])

    def batch(self, phase: int, rows: int, step: int, held_out: bool = False,
              only: str | None = None) -> tuple[Tensor, Tensor]:
        """tokens (rows, M) int64 and targets (rows, M) bool; the same for the same step.

        only: a task, or "library", for all rows.
        """
        rng = random.Random(f"{self.seed} {phase} {step} {held_out}")
        turns = [turns for of, first, turns in self.TURNS if of == phase and first <= step][-1]
        drawn = []
        for r in range(rows):
            is_library = r % self.LIBRARY_EVERY[phase] == 0
            kind = only or ("library" if is_library else turns[(step * rows + r) % len(turns)])
            if kind == "library":
                drawn.append(self.library_row(rng, held_out))
            else:
                items = task_items(kind, str(rng.random()), held_out)
                drawn.append(self.task_row(rng, items, phase, held_out))
        tokens, targets = zip(*drawn)
        return torch.stack(tokens), torch.stack(targets)


# ---------------------------------------------------------------------------------------------
# 4. The two phases


@dataclass
class Recipe:
    """What is trained and for how long; PUBLISHED changes phase 2 to what was published.

    The defaults of phase 2 where they differ, by `python bench.py recipes --bf16` (400 steps, one
    seed; the table with hardware and date is in miniature/README.md): validation loss 1.118 as
    published, 1.066 with gate 1; 1.043 with a t per block, 1.035 with t = 1 in half of these, 1.033
    with a slope of 0.8 instead, 1.101 with the loss weighted by 1/t.
    """

    steps: tuple[int, int] = (4800, 13000)      # of phase 1 and 2
    restart: int = 4000                         # phase 1 starts its rates again, at half; or 0
    rows: int = 8                               # sequences a step
    row: int = 192                              # M, tokens a sequence
    block_size: int = 16
    peak: tuple[float, float] = (3e-3, 3e-3)    # learning rates of AdamW
    floor: float = 0.01                         # of the peak, at the end
    warm_up: int = 100                          # steps
    decay: tuple[float, float] = (0.3, 0.69)    # shares of the steps
    balance: float = 1e-3                       # step of e_score_correction_bias
    vocab_size: int = 1280
    every_file: int = 1                         # every so many-th library file is read
    gate: str = "copy"                          # or "published": tables of randn / sqrt(D)
    t_per: str = "block"                        # or "sequence"
    full_masks: float = 0.5                     # share of the blocks or sequences with t = 1
    slope: float = 0.0                          # of the mask probability along a block
    weight: str = "mean"                        # or "1/t"
    tied: bool = False                          # one tower in both roles, also trained with AR loss
    timeless: bool = False                      # t is 0 whatever it is

    def learning_rate(self, phase: int, step: int) -> float:
        """Warm-up, stable, decay (square root), as a function of the step; phase 1 does it twice,
        the second time at half the rate, if there is a restart."""
        steps, share, peak = (value[phase - 1] for value in (self.steps, self.decay, self.peak))
        if phase == 1 and self.restart:
            if step < self.restart:
                steps = self.restart
            else:
                steps, step, peak = steps - self.restart, step - self.restart, peak / 2
        left = (steps - step) / (share * steps)
        decay = max(self.floor, 1 - math.sqrt(max(0.0, 1 - left)))
        return peak * min(1.0, (step + 1) / self.warm_up, decay)


PUBLISHED = dict(gate="published", t_per="sequence", full_masks=0.0, slope=0.0, weight="mean",
                 tied=False, timeless=False)

MODEL = dict(
    hidden_size=192, hybrid_override_pattern="M*EM*EM*E", num_hidden_layers=9, vocab_size=1280,
    layer_norm_epsilon=1e-5, mamba_num_heads=6, mamba_head_dim=64, n_groups=1, ssm_state_size=64,
    conv_kernel=4, chunk_size=64, num_attention_heads=6, num_key_value_heads=2, head_dim=32,
    intermediate_size=256, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=128,
    moe_shared_expert_intermediate_size=256, norm_topk_prob=True, routed_scaling_factor=1.0,
    initializer_range=0.05, max_position_embeddings=4096)
SMOKE_MODEL = MODEL | dict(hidden_size=32, hybrid_override_pattern="M*E", num_hidden_layers=3,
                           mamba_num_heads=2, mamba_head_dim=32, ssm_state_size=16, head_dim=16)
SMOKE = Recipe(steps=(200, 100), restart=0, rows=4, row=128, warm_up=10, every_file=16)


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


def per_token(t: Tensor, M: int) -> Tensor:
    """t (B,) or (B, n) -> (B, M)."""
    t = t.view(len(t), -1)
    return t.repeat_interleave(M // t.shape[1], dim=1)


def denoiser_losses(model: TwoTower, recipe: Recipe, tokens: Tensor, masked: Tensor,
                    t: Tensor) -> Tensor:
    """Cross-entropy at every masked position, (masked.sum(),); their mean is what
    `TwoTower.diffusion_loss` gives. tokens and masked (B, M) and t are on the host."""
    noisy = tokens.masked_fill(masked, model.config.mask_token_id)
    logits = model.diffusion_logits(tokens, noisy, t, recipe.block_size)
    labels = tokens[masked].to(logits.device)
    losses = F.cross_entropy(logits[masked.to(logits.device)], labels, reduction="none")
    if recipe.weight == "1/t":
        losses = losses / per_token(t, tokens.shape[1])[masked].to(losses.device)
    return losses


def context_losses(model: TwoTower, tokens: Tensor, targets: Tensor) -> Tensor:
    """Next-token cross-entropy at every target but the first token, (n,)."""
    logits = model.context_logits(tokens[:, :-1])
    labels = tokens[:, 1:][targets[:, 1:]].to(logits.device)
    return F.cross_entropy(logits[targets[:, 1:].to(logits.device)], labels, reduction="none")


def all_reduce(x: Tensor) -> Tensor:
    """The sum of x over the processes of a torchrun, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


class Balance:
    """Keeps experts evenly used: after every step the correction bias of an expert that was chosen
    too often falls by `rate`, of the others rises (arXiv 2412.19437, 2.1.2)."""

    def __init__(self, tower, rate: float):
        self.routers = [module for module in tower.modules() if isinstance(module, Router)]
        self.rate = rate
        self.loads = [torch.zeros_like(router.e_score_correction_bias) for router in self.routers]
        for router, load in zip(self.routers, self.loads):
            router.register_forward_hook(lambda _, __, routed, load=load: self.count(load, routed))

    @staticmethod
    def count(load: Tensor, routed: tuple[Tensor, Tensor]):
        load += torch.bincount(routed[0].flatten(), minlength=len(load))

    def reset(self):
        for load in self.loads:
            load.zero_()

    def update(self) -> float:
        """Returns the largest share of tokens that one expert of a layer took, over the mean."""
        worst = 0.0
        for router, load in zip(self.routers, self.loads):
            all_reduce(load)
            router.e_score_correction_bias += self.rate * (load.mean() - load).sign()
            worst = max(worst, float(load.max() / load.mean()))
        self.reset()
        return worst


class Trainer:
    """One phase: optimiser, schedule, validation, and a checkpoint to go on from exactly."""

    def __init__(self, phase: int, model: TwoTower, recipe: Recipe, data: Data, path: Path | None,
                 autocast: bool = False):
        self.phase, self.model, self.recipe, self.data, self.path = phase, model, recipe, data, path
        self.device = model.context_tower.device
        self.autocast = autocast
        self.balance = Balance(model.context_tower if phase == 1 else model.denoiser_tower,
                               recipe.balance)
        if phase == 2 and not recipe.tied:
            model.context_tower.requires_grad_(False)
            model.context_lm_head.requires_grad_(False)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.parameters = list(trained.values())
        decays = {name: p.dim() > 1 and "scale_shift" not in name for name, p in trained.items()}
        self.optimizer = torch.optim.AdamW(
            [{"params": [p for name, p in trained.items() if decays[name]], "weight_decay": 0.1},
             {"params": [p for name, p in trained.items() if not decays[name]],
              "weight_decay": 0.0}], lr=0.0, betas=(0.9, 0.95))
        # what a checkpoint must have been made with
        if phase == 1:                          # which the choices of phase 2 do not change
            recipe = replace(recipe, **PUBLISHED, steps=recipe.steps[:1], peak=recipe.peak[:1],
                             decay=recipe.decay[:1])
        schedule = data.LIBRARY_EVERY, data.TURNS, data.UNALIGNED, data.UNPROMPTED
        self.made_with = json.dumps([asdict(recipe), asdict(model.config), data.seed, data.digest,
                                     schedule, autocast])
        self.step, self.seconds, self.log = 0, 0.0, []
        if path is not None and path.exists():
            self.load()

    def load(self):
        try:
            saved = torch.load(self.path, map_location=self.device, weights_only=True)
            made_with = saved["made_with"]
        except (RuntimeError, OSError, EOFError, pickle.UnpicklingError, KeyError, TypeError):
            raise ValueError(f"{self.path} is not a checkpoint of train.py; delete it") from None
        if made_with != self.made_with:
            raise ValueError(f"{self.path} was made with another recipe, model, seed, corpus or "
                             "precision; use another --out")
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.seconds, self.log = saved["step"], saved["seconds"], saved["log"]

    def save(self):
        if self.path is None:
            return
        partial = self.path.with_suffix(".partial")
        torch.save({"made_with": self.made_with, "model": self.model.state_dict(),
                    "optimizer": self.optimizer.state_dict(), "step": self.step,
                    "seconds": self.seconds, "log": self.log}, partial)
        os.replace(partial, self.path)

    def losses(self, tokens: Tensor, targets: Tensor, recipe: Recipe, seed: int) -> list[Tensor]:
        """The losses to average, at every position of this process's share of the sequences."""
        share = slice(RANK * len(tokens) // WORLD, (RANK + 1) * len(tokens) // WORLD)
        if self.phase == 1:
            return [context_losses(self.model, tokens[share], targets[share])]
        masked, t = add_noise(recipe, targets, torch.Generator().manual_seed(seed))
        losses = [denoiser_losses(self.model, recipe, tokens[share], masked[share], t[share])]
        if recipe.tied:
            losses.append(context_losses(self.model, tokens[share], targets[share]))
        return losses

    def loss(self, step: int, held_out: bool = False, only: str | None = None) -> Tensor:
        """The loss of a step, a scalar of which every process has its summand."""
        recipe = replace(self.recipe, **PUBLISHED) if held_out else self.recipe
        tokens, targets = self.data.batch(self.phase, recipe.rows, step, held_out, only)
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
                                       for step in range(2)) for kind in ("library", *TASKS)}
        self.balance.reset()
        return valid

    def train_step(self) -> tuple[float, float]:
        """Returns the loss, and the imbalance of the experts."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate(self.phase, self.step)
        loss = self.loss(self.step)
        loss.backward()
        if WORLD > 1:
            grads = [p.grad for p in self.parameters]
            total = all_reduce(torch.nn.utils.parameters_to_vector(grads))
            torch.nn.utils.vector_to_parameters(total, grads)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return float(all_reduce(loss.detach())), self.balance.update()

    def run(self, every: int = 0):
        """Train to the end of the phase, validating and saving every so many steps."""
        total, name = self.recipe.steps[self.phase - 1], f"phase {self.phase}"
        tokens = self.recipe.rows * self.recipe.row
        every = every or min(250, total // 2)
        columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
        with Progress(*columns, disable=not sys.stdout.isatty() or RANK > 0) as bar:
            task = bar.add_task(name, total=total, completed=self.step)
            losses, start = [], time.perf_counter()
            while self.step < total:
                loss, imbalance = self.train_step()
                losses.append(loss)
                speed = tokens * len(losses) / (time.perf_counter() - start)
                bar.update(task, completed=self.step,
                           description=f"{name} loss {loss:.3f} {speed:.0f} tokens/s")
                if self.step % every and self.step < total:
                    continue
                self.seconds += time.perf_counter() - start
                valid = self.validate()
                self.log.append({"step": self.step, "loss": statistics.mean(losses),
                                 "tokens_per_second": round(speed), "imbalance": imbalance,
                                 "seconds": round(self.seconds), "valid": valid})
                if RANK == 0:
                    left = (total - self.step) * tokens / speed / 60
                    bar.console.print(
                        f"{name} step {self.step}/{total} loss {self.log[-1]['loss']:.3f} valid "
                        + " ".join(f"{kind} {value:.3f}" for kind, value in valid.items())
                        + f" {speed:.0f} tokens/s {self.seconds / 60:.0f} min, {left:.0f} min left",
                        soft_wrap=True)
                    sys.stdout.flush()
                    self.save()
                losses, start = [], time.perf_counter()


# ---------------------------------------------------------------------------------------------
# 5. Command line


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
    model.context_tower.load_state_dict(context.context_tower.state_dict())
    model.context_lm_head.load_state_dict(context.context_lm_head.state_dict())
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


def parse_args() -> argparse.Namespace:
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
    parser.add_argument("--published", action="store_true", help="phase 2 as it was published")
    parser.add_argument("--smoke", action="store_true", help="a run of under a minute")
    args = parser.parse_args()
    if args.out is None:
        kind = "smoke" if args.smoke else "published" if args.published else "miniature"
        args.out = Path("runs") / kind
    if args.threads < 1:
        fail(f"--threads is {args.threads}, but it must be 1 or more")
    if not 0 <= args.seed < 2**32:
        fail(f"--seed is {args.seed}, but it must be in [0, 2**32)")
    rows = (SMOKE if args.smoke else Recipe).rows
    if rows % WORLD:
        fail(f"{WORLD} processes cannot share {rows} sequences evenly")
    if args.device == "cuda":
        args.device = f"cuda:{LOCAL_RANK}"
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {args.device} cannot be used: {str(error).splitlines()[0]}")
    return args


def fail(message):
    print("train.py: " + " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)


def run(args: argparse.Namespace):
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    recipe, fields = (SMOKE, SMOKE_MODEL) if args.smoke else (Recipe(), MODEL)
    if args.published:
        recipe = replace(recipe, **PUBLISHED)
    if WORLD > 1:
        dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
    if RANK == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        prepare(args.out / "tokenizer.json", recipe)
    if WORLD > 1:
        dist.barrier()
    tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))
    data = Data(tokenizer, recipe, args.seed)
    context = build(recipe, fields).to(args.device)
    first = Trainer(1, context, recipe, data, args.out / "phase1.pt", args.bf16)
    first.run()
    model = build(recipe, fields, context).to(args.device)
    second = Trainer(2, model, recipe, data, args.out / "phase2.pt", args.bf16)
    second.run()
    if RANK > 0:
        return
    model.save_pretrained(args.out)
    plot_curves([first.log, second.log], args.out / "curves.png")
    print(f"the model is in {args.out}: python sample.py --checkpoint {args.out} PROMPT")


def main():
    args = parse_args()
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


def plot_curves(logs: list[list[dict]], path: Path):
    """Validation losses of both phases, by source."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", sharey=True)
    titles = "phase 1: next token, context tower", "phase 2: masked tokens, denoiser tower"
    for ax, title, log in zip(axes, titles, logs):
        for kind in log[0]["valid"]:
            ax.plot([line["step"] for line in log], [line["valid"][kind] for line in log],
                    label=kind)
        ax.set(title=title, xlabel="step", yscale="log")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("validation loss, nats a token")
    axes[1].legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
