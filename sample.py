"""Write text with a TwoTower checkpoint; without one, with the miniature beside this file.

    python sample.py                            a short demonstration, every denoiser pass shown
    python sample.py "def main(args):"          continue a prompt; - reads it from standard input
    python sample.py --checkpoint DIR --plan    what would go where, and how much memory it takes
    python sample.py --prompt-file prompts.jsonl --output results.jsonl --batch-size 32
    python sample.py --template "name:____ city:____" "..."      fill in what is left open
    python sample.py --mode score --prompt-file choices.jsonl   log-likelihoods of given texts

Text goes to standard output; where things are placed and one line of facts go to standard error. A
flag that is not given takes the default of twotower.py's function of that name; a flag that would
do nothing is an error. Errors are one line and exit status 2, Ctrl-C is 130.
"""

import contextlib
import inspect
import json
import math
import os
import re
import signal
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby, product
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import psutil
import torch
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn
from rich.text import Text
from tokenizers import Tokenizer

from twotower import (INDEX, LOGITS_PER_DRAW, TOKENS_PER_PASS, Context, Decoding, SafetensorError,
                      Step, TwoTower, TwoTowerConfig, Written, backbone_of, check_file, eos_ids,
                      require, unread)

MINIATURE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "miniature")
DEFAULT_PROMPT = "json city=Delhi day=Sunday name=Zoe age=63 job=teacher item=maps\n"
NEW_TOKENS = 128
MASKED = "\u2591"                                   # a shaded box
SCORED_AT_ONCE = inspect.signature(TwoTower.score).parameters["tokens_per_pass"].default
HOLE = re.compile(r"(_{3,}|\{\{[0-9]+\}\})")        # in a template

# ---------------------------------------------------------------------------------------- arguments


class Kind(NamedTuple):
    """What a value must be, in a prompt file or on the command line, as argparse is told."""

    argparse: dict
    rule: str = ""
    holds: Callable[..., bool] = lambda value: True

    def check(self, what: str, value):
        require(self.holds(value), f"{what} is {value!r:.40}, but it must be {self.rule}")


N, X = {"type": int, "metavar": "N"}, {"type": float, "metavar": "X"}
COUNT = Kind(N, "an integer of 1 or more", lambda n: type(n) is int and 1 <= n < 2**31)
NATURAL = Kind(N, "an integer in [0, 2**63)", lambda n: type(n) is int and 0 <= n < 2**63)
FINITE = Kind(X, "a number of 0 or more", lambda x: 0 <= x < math.inf)
FRACTION = Kind(X, "a number in (0, 1]", lambda x: 0 < x <= 1)
TEXT = Kind({"metavar": "TEXT"}, "text", lambda text: isinstance(text, str))
TEXTS = Kind({}, "a list of texts", lambda texts: isinstance(texts, list) and texts
             and all(isinstance(text, str) for text in texts))
STOPS = Kind({"action": "append", "metavar": "TEXT"}, "some text", all)
FILE, SWITCH = Kind({"type": Path, "metavar": "FILE"}), Kind({"action": "store_true"})

MASKS, DRAFTS, SCORE = ("mask_diffusion",), ("speculative",), ("score",)        # modes
DENOISING = (*MASKS, *DRAFTS, "mock_ar")
WRITING = (*DENOISING, "ar")
MODES = (*WRITING, *SCORE)

# what a line of a prompt file may hold
LINE = {"text": (TEXT, MODES), "max_new_tokens": (COUNT, WRITING), "seed": (NATURAL, WRITING),
        "template": (TEXT, MASKS), "continuation": (TEXT, SCORE), "choices": (TEXTS, SCORE)}


class Flag(NamedTuple):
    """A row of the table of flags. One that would do nothing is refused."""

    name: str
    kind: Kind
    modes: tuple[str, ...]              # in which it means something
    help: str
    default: object = None
    needs: tuple = ("", lambda args: True)      # what it needs, and whether that is there
    bars: str = ""                      # flags beside which it does nothing

    @property
    def dest(self) -> str:
        return self.name.lstrip("-").replace("-", "_")


KNOBS = "decoding, as in twotower.py"
DRAWN = ("--temperature above 0", lambda args: args.temperature)
FLAGS = {"what to write": [
    Flag("prompt", Kind({"nargs": "?"}), MODES, "text to continue, - for standard input; without "
         "one a demonstration", bars="--prompt-file"),
    Flag("--prompt-file", FILE, MODES, "the prompt, or with the suffix .jsonl many: objects with "
         "text and, if wanted, max_new_tokens, seed, template; to score, continuation or choices"),
    Flag("--template", TEXT, MASKS, "the new text, in which ___ is a hole of 3 tokens, {{2}} of "
         "2; the tokens of words bring their own space",
         needs=("a prompt beside --plan", lambda a: a.prompt or a.prompt_file or not a.plan)),
    Flag("--max-new-tokens", COUNT, WRITING, f"default {NEW_TOKENS}, or the template's length"),
    Flag("--stop", STOPS, WRITING, "end before any such text or special token", [], bars="--plan"),
    Flag("--mode", Kind({"choices": MODES}), MODES, "default mask_diffusion; speculative writes "
         "what ar does, sooner; score: log-likelihoods of continuations", MASKS[0]),
    Flag("--seed", NATURAL, WRITING, "of the first prompt, the next has the next; else random",
         needs=DRAWN),
    Flag("--batch-size", COUNT, MODES, "prompts decoded at once, default 16; alters rounding", 16),
], KNOBS: [
    Flag("--block-size", COUNT, MASKS, "tokens denoised together"),
    Flag("--draft-length", COUNT, DRAFTS, "speculative: tokens verified together"),
    Flag("--steps-per-block", COUNT, MASKS + DRAFTS, "denoiser passes a block may take"),
    Flag("--confidence-threshold", FINITE, MASKS + DRAFTS, "gamma: commit above it"),
    Flag("--mask-token-id", NATURAL, MASKS + DRAFTS, "default: the config's"),
    Flag("--temperature", FINITE, WRITING, "0 is greedy"),
    Flag("--top-k", COUNT, WRITING, "draw among the k most likely tokens", needs=DRAWN),
    Flag("--top-p", FRACTION, WRITING, "draw among the most likely tokens holding p", needs=DRAWN),
], "the model": [
    Flag("--checkpoint", TEXT, MODES, "a directory of config.json, tokenizer.json and safetensors, "
         "or a name on the Hugging Face Hub; default miniature/", MINIATURE),
    Flag("--context-device", TEXT, MODES, "default cuda:0, or cpu without a GPU"),
    Flag("--denoiser-device", TEXT, DENOISING, "default: beside cuda:0 cuda:1, else the same"),
    Flag("--dtype", Kind({"choices": ("bfloat16", "float16", "float32")}), MODES,
         "of all weights but the router's"),
    Flag("--backend", Kind({"choices": ("auto", "torch", "triton")}), MODES, "triton: kernels.py; "
         "auto: that on GPUs, where triton is there; default torch", "torch"),
    Flag("--graphs", SWITCH, (*MASKS, *DRAFTS, "ar"), "record the passes that repeat as CUDA "
         "graphs", False, ("--backend triton", lambda args: args.backend == "triton"), "--plan"),
    Flag("--plan", SWITCH, MODES, "print what would go where, in how much memory, and exit", False),
], "what comes out": [
    Flag("--watch", SWITCH, MASKS, "show the block being denoised on a terminal, fresh tokens bold",
         False, bars="--plan --json --output"),
    Flag("--json", SWITCH, WRITING, "objects, not text", False, bars="--plan --output"),
    Flag("--output", FILE, MODES, "for results as of --json, each when it is done", bars="--plan"),
    Flag("--resume", SWITCH, MODES, "go on after the results of --output, in other batches", False,
         ("--output, and with --temperature the --seed that the results hold",
          lambda a: a.output and (not a.temperature or a.seed is not None)), "--plan"),
    Flag("--trace", FILE, WRITING, "for every step: tokens, confidences, t, commits; an object a "
         "line", bars="--plan --resume"),
]}


def parse(argv: list[str] | None) -> Namespace:
    """Raises: ValueError for what means nothing together, and for files that are in the way."""
    parser = ArgumentParser("sample.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = lambda message: require(False, message)
    for title, flags in FLAGS.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            group.add_argument(flag.name, default=flag.default, help=flag.help,
                               **flag.kind.argparse)
    args = parser.parse_args(argv)
    given = {flag.name: flag for flags in FLAGS.values() for flag in flags
             if getattr(args, flag.dest) != flag.default}
    for name, flag in given.items():
        (needed, there), value = flag.needs, getattr(args, flag.dest)
        require(args.mode in flag.modes, f"{name} does nothing with --mode {args.mode}")
        require(there(args), f"{name} needs {needed}")
        for other in flag.bars.split():
            require(other not in given, f"{name} does nothing with {other}")
        flag.kind.check(name, value)
    args.demonstrate = not given.keys() & {"prompt", "--prompt-file", "--plan"}
    require(args.mode not in SCORE or args.plan or str(args.prompt_file).endswith(".jsonl"),
            "--mode score needs --prompt-file with the suffix .jsonl")
    require(args.mode in MASKS or not args.demonstrate,
            f"--mode {args.mode} needs a prompt; the demonstration is of mask_diffusion")
    files = [path.resolve() for path in (args.output, args.trace, args.prompt_file) if path]
    require(len(set(files)) == len(files),
            "--prompt-file, --output and --trace must be different files")
    for path in filter(None, (args.output, args.trace)):
        require(path.parent.is_dir(), f"{path}: its directory does not exist")
        require(args.resume or not path.exists() or path.stat().st_size == 0,
                f"{path} exists; give another name" + ", or --resume" * (path == args.output))
    return args


# ------------------------------------------------------------------------------------------ prompts


def read_prompts(args: Namespace) -> list[dict]:
    """Objects with the names of LINE, none of them checked against a tokenizer yet."""
    if args.plan and args.prompt is None and args.prompt_file is None:
        return []
    text = DEFAULT_PROMPT if args.demonstrate else args.prompt
    if args.prompt_file or text == "-":             # what is not UTF-8 is refused with its prompt
        data = args.prompt_file.read_bytes() if args.prompt_file else sys.stdin.buffer.read()
        text = data.decode(errors="surrogateescape")
    if not args.prompt_file or args.prompt_file.suffix != ".jsonl":
        return [{"text": text}]
    prompts = [read_line(line, f"{args.prompt_file} line {n}", args.mode)
               for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    require(prompts, f"{args.prompt_file} holds no prompt")
    return prompts


def read_line(line: str, where: str, mode: str) -> dict:
    """An object of a prompt file; a continuation becomes the only one of its choices."""
    try:
        given = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    require(isinstance(given, dict) and "text" in given, f"{where} must be an object with text")
    require(mode not in SCORE or ("continuation" in given) != ("choices" in given),
            f"{where} must have either continuation or choices")
    known = {name: kind for name, (kind, modes) in LINE.items() if mode in modes}
    for name, value in given.items():
        require(name in known, f"{where} has {name!r}; known with --mode {mode} are "
                + ", ".join(known))
        known[name].check(f"{where}: {name}", value)
    return given | ({"choices": [given["continuation"]]} if "continuation" in given else {})


def tokenized(what: str, call: Callable, *args, **options):
    """A call of tokenizers, which raises bare Exceptions, and in panic BaseExceptions."""
    try:
        return call(*args, **options)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise ValueError(f"{what}: {error}") from None


def text_of(tokenizer: Tokenizer, ids: list[int], before: Sequence[int] = ()) -> str:
    """What ids add to the text of those before; one on which tokenizers fails is U+FFFD."""
    if before:                                      # decoders may strip a text's first space
        return text_of(tokenizer, [*before, *ids])[len(text_of(tokenizer, before)):]
    with contextlib.suppress(ValueError):
        return tokenized("", tokenizer.decode, ids)
    return "".join(text_of(tokenizer, [one]) for one in ids) if len(ids) > 1 else "\ufffd"


@dataclass
class Row:
    """A prompt, and what has been written after it."""

    index: int
    prompt: str
    ids: list[int] = field(default_factory=list)
    given: list[list[int | None]] = field(default_factory=list)     # template; or what to score
    max_new_tokens: int = NEW_TOKENS
    settings: dict = field(default_factory=dict)        # all that the result depends on
    log_likelihoods: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    ended: str = ""                     # why: eos, length, stop, interrupted or scored
    nfe: int = 0
    context_passes: int = 0
    before: list[int] = field(default_factory=list)     # ids whose text is whole, and what follows,
    pending: list[int] = field(default_factory=list)    # whose text may end in half a letter

    def take(self, written: Written, tokenizer: Tokenizer, eos: list[int], stops: list[str]):
        """Add new tokens, up to a stop string, or a special token of that name."""
        self.nfe, self.context_passes = written.nfe, written.context_passes
        self.before = self.before or self.ids or tokenizer.encode(self.prompt).ids
        for n, token in enumerate(written.new, 1):
            self.tokens.append(token)
            self.pending += [token] * (token not in eos)    # the last one, or inside a template
            text = text_of(tokenizer, self.pending, self.before)
            if text and text[-1] != "\ufffd" or written.ended and n == len(written.new):
                self.text, self.before, self.pending = self.text + text, self.pending, []
            special = "" if text_of(tokenizer, [token]) else tokenizer.id_to_token(token) or ""
            found = [(self.text + special).index(s) for s in stops if s in self.text + special]
            if found:
                self.text, self.ended = self.text[:min(found)], "stop"
                return
        if written.ended:
            self.ended = "eos" if self.tokens[-1] in eos else "length"

    def result(self) -> dict:
        """What a line of results holds; "best" by likelihood, and by that per byte."""
        made = {"text": self.text, "tokens": self.tokens, "ended": self.ended, "nfe": self.nfe,
                "context_passes": self.context_passes}
        if self.ended == "scored":
            scores, counts = self.log_likelihoods, list(map(len, self.given))
            per_token = [score / count for score, count in zip(scores, counts)]
            per_byte = [score / len(text.encode())
                        for score, text in zip(scores, self.settings["choices"])]
            made = {"log_likelihoods": scores, "token_counts": counts,
                    "perplexity_per_token": [math.exp(min(-mean, 700.0)) for mean in per_token],
                    "perplexity_per_byte": [math.exp(min(-mean, 700.0)) for mean in per_byte],
                    "best": scores.index(max(scores)),
                    "best_per_byte": per_byte.index(max(per_byte))}
        return {"index": self.index, "prompt": self.prompt, **made, "settings": self.settings}


def make_rows(prompts: list[dict], args: Namespace, tokenizer: Tokenizer | None,
              config: TwoTowerConfig, settings: dict) -> list[Row]:
    """settings: those that all rows share. Raises: ValueError for no token, or too many."""
    longest = config.max_position_embeddings

    def ids_of(text: str, what: str, whole: bool = False, holes: bool = False) -> list[int | None]:
        """whole: a text of its own, before which the tokenizer may put a token. None is a hole."""
        require(not re.search("[\ud800-\udfff]", text), f"{what} is not valid UTF-8")
        ids = []
        for i, part in enumerate(HOLE.split(text) if holes else [text]):
            if i % 2:                               # texts and holes take turns
                count = len(part) if part[0] == "_" else int(part[2:-2])
                ids += [None] * min(count, longest)
            else:
                ids += tokenized(f"{what} cannot be encoded by tokenizer.json",
                                 tokenizer.encode, part, add_special_tokens=whole).ids
        require(ids, f"{what} holds no token" + " and no hole" * holes)
        most = max(token or 0 for token in ids)
        require(most < config.vocab_size,
                f"{what} has id {most}, but the model's vocab_size is {config.vocab_size}; "
                "tokenizer.json is not this model's")
        return ids

    rows = []
    for index, prompt in enumerate(prompts):
        which = f"prompt {index}" if len(prompts) > 1 else "the prompt"
        template, choices = prompt.get("template", args.template), prompt.get("choices", [])
        ids = ids_of(prompt["text"], which, whole=True)
        given = ([ids_of(text, f"a choice of {which}") for text in choices] or
                 [ids_of(text, f"the template of {which}", holes=True)
                  for text in [template] if text is not None])
        most = max(map(len, given), default=0)
        new = prompt.get("max_new_tokens", args.max_new_tokens) or most or NEW_TOKENS
        require(most <= new, f"the template of {which} has {most} tokens, more than the {new} of "
                "--max-new-tokens")
        require(len(ids) + new <= longest, f"{which} has {len(ids)} tokens, which with {new} more "
                f"is above max_position_embeddings {longest}; shorten it"
                + " or lower --max-new-tokens" * (not choices))
        seed = None if args.seed is None else prompt.get("seed", args.seed + index)
        rows.append(Row(index, prompt["text"], ids, given, new, settings | (
            {"choices": choices} if choices else
            {"max_new_tokens": new, "seed": seed, "template": template})))
    return rows


# ---------------------------------------------------------------- the checkpoint, and where it goes


def fetch(name: str, towers: str, plan: bool) -> Path:
    """The directory of a checkpoint: `name` itself, or what the Hub has under that name."""
    if os.path.isdir(name):
        return Path(name)
    require(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name), f"--checkpoint {name} is not a directory"
            + "; give --checkpoint (train.py makes one)" * (name == MINIATURE))
    wanted, shards = ["config.json", "tokenizer.json", INDEX], {"": "model.safetensors"}
    try:
        from huggingface_hub import snapshot_download
        path = Path(snapshot_download(name, allow_patterns=wanted, local_files_only=plan))
        if (path / INDEX).exists():
            shards = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"]
        if towers == "both" and backbone_of(shards):        # which `skeleton` will refuse
            return path
        skip = unread(shards, towers)               # only those that are needed
        wanted += sorted({file for key, file in shards.items() if not key.startswith(skip)})
        return Path(snapshot_download(name, allow_patterns=wanted, local_files_only=plan))
    except Exception as error:              # of any of the libraries that reach for the network
        raise ValueError(f"--checkpoint {name} is not a directory, and fetching it from the Hub "
                         f"{'is not done by --plan' if plan else 'failed'} "
                         f"({type(error).__name__}); give one with the files of https://"
                         f"huggingface.co/{name}, downloaded where there is a connection") from None


def load_tokenizer(directory: Path) -> Tokenizer:
    check_file(path := directory / "tokenizer.json")
    tokenizer = tokenized(f"{path} cannot be read as a tokenizer", Tokenizer.from_file, str(path))
    tokenizer.no_truncation()               # nothing of a prompt is left out, nothing added
    tokenizer.no_padding()
    return tokenizer


def devices(args: Namespace) -> list[str]:
    """The context tower's device, and the denoiser's in modes that have one."""
    first = args.context_device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    beside = torch.cuda.device_count() > 1 and first in ("cuda", "cuda:0")
    second = args.denoiser_device or ("cuda:1" if beside else first)
    places = [first, second] if args.mode in DENOISING else [first]
    for i, place in enumerate(places):
        try:
            (there := torch.zeros(1, device=place)).item()          # which fails on "meta" too
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device {place} cannot be used: {error}".splitlines()[0]) from None
        places[i] = str(there.device)
    require(not args.graphs or len(set(places)) == 1, "--graphs needs both towers on one device; "
            "give --context-device and --denoiser-device")
    return places


def memory(model: TwoTower, rows: int, length: int, width: int, places: list[str],
           read: int | None = None, mode: str = MASKS[0], drawn: bool = False) -> dict:
    """Bytes by device and purpose, for rows of `length` tokens, up to `read` of them a prompt, and
    passes of `width` tokens; their sum and what is free. model is a skeleton."""
    what = {"key_cache": "KV cache", "value_cache": "KV cache", "ssm_state": "SSM states",
            "conv_state": "conv states"}
    held = dict.fromkeys(("weights", *what.values()), 0)
    for state in Context(model.context_tower, rows, length).states:     # without data
        for name in what:
            held[what[name]] += getattr(getattr(state, name, None), "nbytes", 0)
    c, size, read = model.config, model.context_lm_head.weight.itemsize, read or length
    logits = rows * width * c.vocab_size
    if mode in SCORE:       # a row's alone, and their log-softmax
        work, L = 8 * min(length - read or width, width) * c.vocab_size, width
    else:                   # in the model's dtype and float32; copies of some, to choose tokens
        work = 4 * logits + max(logits * size * (size < 4), min(
            logits, max(LOGITS_PER_DRAW, c.vocab_size)) * (48 if drawn else 9))
        L = max(width, min(read, TOKENS_PER_PASS // rows))
    held["activations"] = max(work, activations(c, size, rows, L))
    table = {place: dict(held) for place in places}                 # all but weights: once on each
    for name, tensor in model.state_dict().items():
        for place in places[:1] if name.startswith("context_") else places[1:]:
            table[place]["weights"] += tensor.nbytes
    return {place: parts | {"together": sum(parts.values()), "free": free_memory(place)}
            for place, parts in table.items()}


def activations(c: TwoTowerConfig, size: int, rows: int, L: int) -> int:
    """Bytes alive at the peak of a pass of rows x L tokens: x, its norm, and what a layer of those
    that take most computes. size: bytes of a number."""
    T, chunk, conv, d = rows * L, min(L, c.chunk_size), c.conv_dim, c.d_inner
    # Mamba-2: out of in_proj and of the convolution, y; and in float32 in and out of the
    # convolution, or a chunk's inputs and weights twice, or two states
    mamba = size * T * (2 * d + 2 * conv) + 4 * rows * max(
        2 * L * conv, chunk * (conv + 2 * c.mamba_num_heads * chunk),
        2 * d * (c.ssm_state_size + chunk))
    # MoE: the outputs of all experts in float32, before and after their weights; MLP: twice h
    moe = 8 * T * c.num_experts_per_tok * c.hidden_size * ("E" in c.hybrid_override_pattern)
    mlp = 2 * size * T * c.intermediate_size * ("-" in c.hybrid_override_pattern)
    return 2 * size * T * c.hidden_size + max(mamba, moe, mlp)


def free_memory(place: str, groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes; of the host no more than its container (cgroups v2 or v1) may still have."""
    if place.startswith("cuda"):
        return torch.cuda.mem_get_info(place)[0]
    free = psutil.virtual_memory().available
    for top, most, used in ((groups, "max", "current"),
                            (groups / "memory", "limit_in_bytes", "usage_in_bytes")):
        with contextlib.suppress(OSError, ValueError, KeyError):    # no such file, or no limit
            most, used, stat = ((top / f"memory.{x}").read_text() for x in (most, used, "stat"))
            stat = dict(map(str.split, stat.splitlines()))
            files = int(stat["active_file"]) + int(stat["inactive_file"])       # which give way
            free = min(free, max(0, int(most) - int(used) + files))
    return free


def readable(nbytes: int) -> str:
    power = min(max(nbytes.bit_length() - 1, 10) // 10, 3)
    return f"{nbytes / 2**(10 * power):.1f} {' KMG'[power]}iB"


def plan(model: TwoTower, rows: list[Row], args: Namespace, knobs: dict, places: list[str]):
    """Print what goes where, for a batch of the longest rows. Raises: ValueError if it does not
    fit, naming what would."""
    scoring, longest = args.mode in SCORE, model.config.max_position_embeddings
    prompt = max((len(row.ids) for row in rows), default=0)
    new = max((row.max_new_tokens for row in rows),
              default=SCORED_AT_ONCE if scoring else args.max_new_tokens or NEW_TOKENS)
    width = (min(prompt + new, SCORED_AT_ONCE) if scoring else
             knobs.get("block_size", knobs.get("draft_length", 1)))
    length = prompt + (new if scoring else -(-new // width) * width)
    require(max(prompt + new, width) <= longest, f"{prompt} + {new} tokens and blocks of {width} "
            f"are too many for max_position_embeddings {longest}; lower --max-new-tokens, "
            "--block-size or --draft-length")
    asked = sum(len(row.given) if scoring else 1 for row in rows)
    batch = min(args.batch_size, asked or args.batch_size)

    def needed(rows: int, places: list[str]) -> dict:
        return memory(model, rows, length, width, places, prompt, args.mode,
                      bool(knobs.get("temperature")))

    def full(rows: int, places: list[str]) -> list[str]:
        return [place for place, parts in needed(rows, places).items()
                if parts["together"] > parts["free"]]

    towers = {place: " and ".join(f"{tower} tower" for tower, at in zip(
        ("context", "denoiser"), places) if at == place) for place in places}
    for place, parts in needed(batch, places).items():
        print(f"{place}: {towers[place]}:", ", ".join(
            f"{what} {readable(nbytes)}" for what, nbytes in parts.items()),
            f"for {batch} rows of {length} tokens", file=sys.stderr)
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    flags = "--context-device", "--denoiser-device"
    ways = [(" ".join(map(" ".join, zip(flags, at))), batch, at)
            for at in product(gpus, repeat=len(places))]
    ways += [(f"--batch-size {n}", n, places) for n in (batch // 2, batch // 4, 1) if n]
    ways += [(f"--mode ar, the context tower alone on {place}", batch, [place])
             for place in (places[0], *gpus, "cpu") if len(places) > 1]
    ways += [("a device with more memory, or shorter texts", 1, [])]
    for place in full(batch, places):
        way = next(way for way, *what in ways if not full(*what))
        raise ValueError(f"{towers[place]} on {place} would not fit; what would: {way}")


# ----------------------------------------------------------------------------------- what comes out


class Output:
    """Takes what a model reports, and writes the trace and, in the order of the input, results."""

    def __init__(self, args: Namespace, tokenizer: Tokenizer, eos: list[int], mask_id: int | None,
                 many: bool, keep: int):
        """keep: bytes of --output that an earlier run has written."""
        self.tokenizer, self.eos, self.mask_id, self.stops = tokenizer, eos, mask_id, args.stop
        self.form = ("json" if args.output or args.json or args.mode in SCORE else
                     "in place" if args.watch and sys.stdout.isatty() else
                     "steps" if args.demonstrate else "many" if many else "stream")
        self.results, self.trace = (path and open(path, "ab", buffering=0)
                                    for path in (args.output, args.trace))
        if args.resume:
            self.results.truncate(keep)             # half a line goes
        self.live = Live(transient=True, auto_refresh=False)
        self.held_back = max(map(len, args.stop), default=1) - 1    # may turn out to be a stop
        self.batch, self.waiting, self.printed, self.interrupted = [], [], 0, False

    def on_interrupt(self, *_):
        """Ctrl-C is noticed between passes, so that no output is half done; again, at once."""
        self.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def check(self):
        if self.interrupted:
            raise KeyboardInterrupt

    def on_step(self, step: Step):
        self.check()
        for r, row in enumerate(step.rows if self.trace else []):
            if step.committed[r].any():             # else this row's block was finished
                columns = step._asdict() | {"committed": step.committed.int()}
                write_line(self.trace, {
                    "index": self.batch[row].index, "block": step.block_index, "step": step.step,
                    **{name: columns[name][r].tolist()
                       for name in ("t", "before", "after", "committed", "confidence")}})
        if self.form == "steps":
            if not self.printed:
                print(f"{self.batch[0].prompt}\n{MASKED} is a masked token; a line shows a block "
                      "after one denoiser pass")
                self.printed = len(self.batch[0].prompt)
            first = [(f"\nblock {step.block_index}  ", step.before)] if step.step == 0 else []
            for what, ids in [*first, (" " * 9, step.after)]:
                print(what + self.block(step, ids).plain.replace("\n", "\u21b5"), flush=True)
        elif self.form == "in place":               # the end of the text, as far as there is room
            self.live.start()                       # does nothing where it has been
            row, (width, height) = self.batch[step.rows[0]], self.live.console.size
            text = Text((row.prompt + row.text)[-width * height:])
            lines = text.append(self.block(step, step.after)).wrap(self.live.console, width)
            self.live.update(Text("\n").join(lines[2 - height:]), refresh=True)

    def block(self, step: Step, ids: torch.Tensor) -> Text:
        """The first row's block (B, Q) before or after a step; tokens fresh in it stand out."""
        masked = step.masked[0] & (ids[0] == self.mask_id)
        text, pairs = Text(), zip(ids[0].tolist(), step.committed[0].tolist(), masked.tolist())
        before = self.batch[step.rows[0]].ids[-1:]
        for (fresh, masked), group in groupby(pairs, lambda p: p[1:]):
            run = [token for token, *_ in group]
            text.append(MASKED * len(run) if masked else text_of(self.tokenizer, run, before),
                        "dim" if masked else "bold underline" if fresh else "")
        return text

    def on_tokens(self, written: Written) -> bool:
        self.check()
        row = self.batch[written.row]
        row.take(written, self.tokenizer, self.eos, self.stops)
        if self.form == "stream" and not row.ended:
            ready = row.prompt + row.text[:max(0, len(row.text) - self.held_back)]
            print(ready[self.printed:], end="", flush=True)
            self.printed = len(ready)
        while self.waiting and self.waiting[0].ended:
            self.end(self.waiting.pop(0))
        return row.ended == "stop"

    def end(self, row: Row):
        self.live.stop()                            # which wipes what it shows
        if self.results:
            write_line(self.results, row.result())
        elif self.form == "json":
            print(json.dumps(row.result()), flush=True)
        else:
            head = {"many": f"--- {row.index}\n", "steps": "\n"}.get(self.form, "")
            print(head + (row.prompt + row.text)[self.printed:], flush=True)

    def close(self):
        self.live.stop()
        for file in filter(None, (self.results, self.trace)):
            file.close()


def write_line(file, value: dict):
    """Append JSON to an unbuffered file; a line that does not get there whole is taken back."""
    line, start = json.dumps(value).encode() + b"\n", file.tell()
    try:
        while line:
            line = line[file.write(line):]
    except OSError as error:
        file.truncate(start)
        raise OSError(f"{file.name}: {error.strerror}; the lines it holds are whole, and after "
                      "those of --output --resume goes on") from None


def finished(path: Path, rows: list[Row]) -> tuple[int, int]:
    """How many results an interrupted run left in the file, and their bytes.

    Raises: ValueError if they are not results of these prompts and settings.
    """
    data = path.read_bytes() if path.exists() else b""
    *lines, rest = data.split(b"\n")
    start, foreign = b'{"index": %d,' % len(lines), "{} line {} is not a result of sample.py"
    require(rest[:len(start)] == start[:len(rest)], foreign.format(path, len(lines) + 1))
    require(len(lines) <= len(rows),
            f"{path} line {len(rows) + 1}: there are only {len(rows)} prompts")
    for n, (line, row) in enumerate(zip(lines, rows), 1):
        try:
            result = json.loads(line)
            made = {"prompt": result["prompt"]} | result["settings"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(foreign.format(path, n)) from None
        for name, wanted in ({"prompt": row.prompt} | row.settings).items():
            require(made.get(name) == wanted, f"{path} line {n} was made with {name} "
                    f"{made.get(name)!r:.60}, not {wanted!r:.60}; --resume needs the same")
    return len(lines), len(data) - len(rest)


# ----------------------------------------------------------------------------------------- decoding


def choose_knobs(args: Namespace, config: TwoTowerConfig) -> dict:
    """Every option of the mode: as given, or twotower.py's default."""
    default = {name: one.default for function in (
        Decoding, getattr(TwoTower, f"generate_{args.mode}", TwoTower.score))
        for name, one in inspect.signature(function).parameters.items()}
    default["mask_token_id"] = config.mask_token_id
    given = {name: value for name, value in vars(args).items() if value is not None}
    knobs = {flag.dest: (default | given)[flag.dest]
             for flag in FLAGS[KNOBS] if args.mode in flag.modes}
    require(knobs.get("mask_token_id", 0) < config.vocab_size, f"--mask-token-id is "
            f"{args.mask_token_id}, but it must be below vocab_size {config.vocab_size}")
    return knobs


def decode(model: TwoTower, batch: list[Row], args: Namespace, knobs: dict, output: Output,
           seconds: dict[str, float]):
    """Write after every row."""
    start, longest = perf_counter(), max(len(row.ids) for row in batch) - (args.mode == "mock_ar")

    def on_prefill(_, inputs, hidden):
        if inputs[2].end >= longest:                        # of a `Pass`: its last piece
            hook.remove()
            hidden[0, 0, 0].item()                          # waits for a GPU
            seconds["prefill"] += perf_counter() - start

    hook = model.context_tower.register_forward_hook(on_prefill)
    templates = [row.given[0] if row.given else None for row in batch]
    more = {"template": templates} if any(templates) else {}
    output.batch, output.waiting = batch, list(batch)
    try:
        getattr(model, f"generate_{args.mode}")(
            [torch.tensor(row.ids) for row in batch], [row.max_new_tokens for row in batch],
            eos_token_id=model.config.eos_token_id, on_step=output.on_step,
            seed=None if args.seed is None else [row.settings["seed"] for row in batch],
            on_tokens=output.on_tokens, **knobs, **more)
    except ValueError as error:                     # its rows count from the batch's first
        raise ValueError(f"prompts from {batch[0].index}: {error}") from None


def score(model: TwoTower, batch: list[tuple[Row, list[int]]], output: Output):
    """Log-likelihoods of rows' choices."""
    scores = model.score([torch.tensor(row.ids) for row, _ in batch],
                         [torch.tensor(ids) for _, ids in batch])
    for (row, ids), total in zip(batch, scores.total.tolist()):
        row.log_likelihoods.append(total)
        row.tokens += ids
        row.context_passes += -(-(len(row.ids) + len(ids) - 1) // SCORED_AT_ONCE)
        if len(row.log_likelihoods) == len(row.given):
            row.ended = "scored"
            output.end(row)


def write(model: TwoTower, rows: list[Row], args: Namespace, knobs: dict, output: Output,
          seconds: dict[str, float]) -> int:
    """Decode or score, `batch_size` at a time, up to the end or to Ctrl-C; the exit status."""
    start, seconds["prefill"] = perf_counter(), 0.0
    asked = [(row, ids) for row in rows for ids in row.given] if args.mode in SCORE else rows
    before = signal.signal(signal.SIGINT, output.on_interrupt)
    try:
        for i in range(0, len(asked), args.batch_size):
            output.check()
            batch = asked[i:i + args.batch_size]
            if args.mode in SCORE:
                score(model, batch, output)
            else:
                decode(model, batch, args, knobs, output, seconds)
        return 0
    except KeyboardInterrupt:
        for row in [] if output.results else output.waiting:        # there --resume writes them
            row.ended = row.ended or "interrupted"
            output.end(row)
        return 130
    finally:
        output.close()
        signal.signal(signal.SIGINT, before)
        seconds["decode"] = perf_counter() - start - seconds["prefill"]


def run(args: Namespace) -> int:
    """Everything in its order; returns the exit status."""
    if args.temperature and args.seed is None:
        args.seed = torch.Generator().seed() >> 1
    places, prompts = devices(args), read_prompts(args)
    towers = "both" if args.mode in DENOISING else "context"
    directory = fetch(args.checkpoint, towers, args.plan)
    tokenizer = load_tokenizer(directory) if prompts else None
    model, files = TwoTower.skeleton(
        directory, dtype=args.dtype and getattr(torch, args.dtype), towers=towers,
        layout="any" if towers == "context" else "released")
    knobs = choose_knobs(args, model.config)
    settings = {"checkpoint": args.checkpoint, "mode": args.mode, "stop": args.stop,
                "dtype": str(model.context_lm_head.weight.dtype).removeprefix("torch."),
                "backend": args.backend} | knobs
    rows = make_rows(prompts, args, tokenizer, model.config, settings)
    require(not args.watch or min(len(rows), args.batch_size) < 2,
            "--watch shows one row at a time; give --batch-size 1")
    done, keep = finished(args.output, rows) if args.resume else (0, 0)
    if args.resume and done == len(rows):
        print(f"{args.output} is complete: {done} results", file=sys.stderr)
        return 0
    rows = rows[done:]
    plan(model, rows, args, knobs, places)
    if args.plan:
        return 0
    model.use(args.backend, args.graphs)    # what cannot be had is said before a tensor is read
    eos = eos_ids(model.config.eos_token_id, model.config.vocab_size)
    output = Output(args, tokenizer, eos, knobs.get("mask_token_id"), len(prompts) > 1, keep)
    start, columns = perf_counter(), (BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress("loading", *columns, console=Console(stderr=True), transient=True,
                  disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=sum(x.nbytes for x in model.state_dict().values()))
        model.fill(files, places[0], places[-1], lambda nbytes: bar.advance(task, nbytes))
    model.use(args.backend, args.graphs)
    seconds = {"load": perf_counter() - start}
    status = write(model, rows, args, knobs, output, seconds)
    settings |= {"backend": model.backend + " with graphs" * args.graphs, "seed": args.seed,
                 "batch_size": args.batch_size,
                 "max_new_tokens": None if args.mode in SCORE else max(
                     row.max_new_tokens for row in rows)}
    print(facts(rows, settings, places, seconds), file=sys.stderr)
    return status


def facts(rows: list[Row], settings: dict, places: list[str], seconds: dict[str, float]) -> str:
    """What was done, how fast and with which settings, in a line."""
    rows = [row for row in rows if row.ended]               # all, unless interrupted
    tokens = sum(len(row.tokens) for row in rows)
    nfe, passes = (sum(getattr(row, name) for row in rows) for name in ("nfe", "context_passes"))
    places = dict.fromkeys(places)
    peaks = [f"{place} {readable(torch.cuda.max_memory_allocated(place))}"
             for place in places if place.startswith("cuda")]
    with contextlib.suppress(ImportError):                  # on Windows
        import resource
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss       # in bytes on macOS
        peaks.append(f"host {readable(peak * (1 if sys.platform == 'darwin' else 1024))}")
    return ", ".join([
        f"{settings['mode']} on {' and '.join(places)}",
        f"{len(rows)} prompt{'s' * (len(rows) != 1)}", f"{tokens} tokens",
        f"{nfe} denoiser passes", f"{passes} context passes",
        f"{tokens / max(nfe or passes, 1):.2f} tokens per pass",
        *(f"{name} {value:.2f} s" for name, value in seconds.items()),
        f"{tokens / max(seconds['decode'], 1e-9):.1f} tokens/s",
        f"peak memory {', '.join(peaks) or 'unknown'}",
        *(f"{name} {value}" for name, value in settings.items()
          if name not in ("mode", "checkpoint") and value not in (None, []))])


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status; what is wrong is said in a line."""
    try:
        status = run(parse(argv))
        sys.stdout.flush()
        return status
    except BrokenPipeError:                                 # the reader of our output has gone
        return 0
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:   # or out of memory
        print("sample.py:", *str(error).split(), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")                # "?" where a terminal lacks a letter
    status = main()
    try:
        sys.stdout.flush()
    except OSError:                     # what cannot be written must not fail again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)
