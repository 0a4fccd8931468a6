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
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
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
from tokenizers.decoders import DecodeStream

from twotower import (DENOISER_KEYS, INDEX, Context, Decoding, Step, TwoTower, TwoTowerConfig,
                      Written, require)

MINIATURE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "miniature")
DEFAULT_PROMPT = "json city=Delhi day=Sunday name=Zoe age=63 job=teacher item=maps\n"
NEW_TOKENS = 128
MASKED = "\u2591"                                   # a shaded box
SCORED_AT_ONCE = inspect.signature(TwoTower.score).parameters["tokens_per_pass"].default
HOLE = re.compile(r"(_{3,}|\{\{[0-9]+\}\})")        # in a template

# ---------------------------------------------------------------------------------------- arguments


class Kind(NamedTuple):
    """What a value must be, on the command line or in a prompt file."""

    type: type
    rule: str
    holds: Callable[..., bool] = lambda value: True
    metavar: str | None = None

    def check(self, what: str, value):
        require(type(value) is self.type and self.holds(value),
                f"{what} is {value!r:.40}, but it must be {self.rule}")


COUNT = Kind(int, "an integer of 1 or more", lambda n: 1 <= n < 2**31, "N")
NATURAL = Kind(int, "an integer in [0, 2**63)", lambda n: 0 <= n < 2**63, "N")
FINITE = Kind(float, "a number of 0 or more", lambda x: 0 <= x < math.inf, "X")
FRACTION = Kind(float, "a number in (0, 1]", lambda x: 0 < x <= 1, "X")
TEXT, FILE = Kind(str, "text", metavar="TEXT"), Kind(type(Path()), "a path", metavar="FILE")
TEXTS = Kind(list, "a list of texts", lambda v: v and all(isinstance(x, str) for x in v))
SEVERAL = Kind(list, "some text", all)              # of a flag that may be given again
SWITCH = Kind(bool, "given or not")

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
    kind: Kind | tuple[str, ...]        # of texts: one of them
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
    Flag("prompt", TEXT, MODES, "text to continue, - for standard input; else a demonstration",
         bars="--prompt-file"),
    Flag("--prompt-file", FILE, MODES, "the prompt, or with the suffix .jsonl many: objects with "
         "text and, if wanted, max_new_tokens, seed, template; to score, continuation or choices"),
    Flag("--template", TEXT, MASKS, "what the new text must look like: ___ (three or more) is a "
         "hole of as many tokens, {{2}} one of two; the tokens of words bring their own space",
         needs=("a prompt beside --plan", lambda a: a.prompt or a.prompt_file or not a.plan)),
    Flag("--max-new-tokens", COUNT, WRITING, f"default {NEW_TOKENS}, or the template's length"),
    Flag("--stop", SEVERAL, WRITING, "end before this text; may be given again", bars="--plan"),
    Flag("--mode", MODES, MODES, "speculative writes what ar does, sooner; score writes nothing "
         "but the log-likelihoods of given continuations; default mask_diffusion", MASKS[0]),
    Flag("--seed", NATURAL, WRITING, "of the first prompt, the next has the next; else random",
         needs=DRAWN),
    Flag("--batch-size", COUNT, MODES, "prompts decoded together; default 16", 16),
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
    Flag("--dtype", ("bfloat16", "float16", "float32"), MODES, "of all weights but the router's"),
    Flag("--backend", ("auto", "torch", "triton"), MODES, "triton: kernels.py, which no GPU has "
         "run yet; auto: that on GPUs, where triton is there; default torch", "torch"),
    Flag("--graphs", SWITCH, (*MASKS, "ar"), "record the passes that repeat as CUDA graphs",
         needs=("--backend triton", lambda args: args.backend == "triton"), bars="--plan"),
    Flag("--plan", SWITCH, MODES, "print what would go where, in how much memory, and exit"),
], "what comes out": [
    Flag("--watch", SWITCH, MASKS, "on a terminal, the block being denoised: fresh tokens bold and "
         "underlined", bars="--plan --json --output"),
    Flag("--json", SWITCH, WRITING, "objects on standard output, not text", bars="--plan --output"),
    Flag("--output", FILE, MODES, "for results as of --json, each when it is done", bars="--plan"),
    Flag("--resume", SWITCH, MODES, "go on after the results that --output holds already",
         needs=("--output, and with --temperature the --seed that the results hold", lambda args:
                args.output and (not args.temperature or args.seed is not None)), bars="--plan"),
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
            how = ({"choices": flag.kind} if not isinstance(flag.kind, Kind) else
                   {"action": "store_true"} if flag.kind is SWITCH else
                   {"action": "append", "metavar": "TEXT"} if flag.kind is SEVERAL else
                   {"type": flag.kind.type, "metavar": flag.kind.metavar})
            how |= {} if flag.name[0] == "-" else {"nargs": "?", "metavar": flag.name}
            group.add_argument(flag.name, default=flag.default, help=flag.help, **how)
    args = parser.parse_args(argv)
    given = {flag.name: flag for flags in FLAGS.values() for flag in flags
             if getattr(args, flag.dest) != flag.default}
    for name, (_, kind, modes, _, _, (needed, there), bars) in given.items():
        require(args.mode in modes, f"{name} does nothing with --mode {args.mode}")
        require(there(args), f"{name} needs {needed}")
        for other in bars.split():
            require(other not in given, f"{name} does nothing with {other}")
        if isinstance(kind, Kind):
            kind.check(name, getattr(args, given[name].dest))
    args.stop = args.stop or []
    args.demonstrate = not given.keys() & {"prompt", "--prompt-file", "--plan"}
    require(args.mode not in SCORE or args.plan or str(args.prompt_file).endswith(".jsonl"),
            "--mode score needs --prompt-file with the suffix .jsonl")
    require(args.mode in MASKS or not args.demonstrate,
            f"--mode {args.mode} needs a prompt; the demonstration is of mask_diffusion")
    outputs = [path for path in (args.output, args.trace) if path]
    files = [path.resolve() for path in (*outputs, args.prompt_file) if path]
    require(len(set(files)) == len(files),
            "--prompt-file, --output and --trace must be different files")
    for path in outputs:
        require(path.parent.is_dir(), f"{path}: its directory does not exist")
        require(args.resume or not path.exists() or path.stat().st_size == 0,
                f"{path} exists; give another name" + ", or --resume" * (path == args.output))
    return args


# ------------------------------------------------------------------------------------------ prompts


@dataclass
class Row:
    """A prompt, and what has been written after it."""

    index: int
    prompt: str
    max_new_tokens: int | None          # None, until its length is known: that of the template
    seed: int | None
    template: str | None
    choices: list[str]                  # to be scored
    settings: dict = field(default_factory=dict)            # all that the result depends on
    ids: list[int] = field(default_factory=list)
    template_ids: list[int] = field(default_factory=list)
    choice_ids: list[list[int]] = field(default_factory=list)
    log_likelihoods: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    ended: str = ""                     # why: eos, length, stop, interrupted or scored
    nfe: int = 0
    context_passes: int = 0
    stream: DecodeStream = field(default_factory=lambda: DecodeStream(skip_special_tokens=True))

    def take(self, written: Written, tokenizer: Tokenizer, eos: int | None, stops: list[str]):
        """Add new tokens, up to a stop string."""
        self.nfe, self.context_passes = written.nfe, written.context_passes
        for token in written.new:
            self.tokens.append(token)
            if token == eos:                        # the last one, or inside a template
                continue
            before = len(self.text)
            self.text += self.stream.step(tokenizer, token) or ""
            found = [self.text.find(stop, max(0, before - len(stop))) for stop in stops]
            if max(found, default=-1) >= 0:
                self.text, self.ended = self.text[:min(at for at in found if at >= 0)], "stop"
                return
        if written.ended:
            self.ended = "eos" if self.tokens[-1] == eos else "length"
            shown = self.tokens[:-1] if self.ended == "eos" else self.tokens
            whole = tokenizer.decode(shown)         # with what the last bytes left unfinished
            self.text = whole if whole.startswith(self.text) else self.text

    def result(self) -> dict:
        """What a line of results holds; "best" by likelihood, and by that per byte."""
        made = {"text": self.text, "tokens": self.tokens, "ended": self.ended, "nfe": self.nfe,
                "context_passes": self.context_passes}
        if self.choices:
            scores, counts = self.log_likelihoods, [len(ids) for ids in self.choice_ids]
            per_token = [score / count for score, count in zip(scores, counts)]
            per_byte = [score / len(text.encode()) for score, text in zip(scores, self.choices)]
            made = {"log_likelihoods": scores, "token_counts": counts,
                    "perplexity_per_token": [math.exp(min(-score, 700.0)) for score in per_token],
                    "perplexity_per_byte": [math.exp(min(-score, 700.0)) for score in per_byte],
                    "best": scores.index(max(scores)),
                    "best_per_byte": per_byte.index(max(per_byte))}
        return {"index": self.index, "prompt": self.prompt, **made, "settings": self.settings}


def read_rows(args: Namespace) -> list[Row]:
    """The prompts, none of them checked against a tokenizer yet; a plan can do without."""
    if args.plan and args.prompt is None and args.prompt_file is None:
        return []
    data = (DEFAULT_PROMPT.encode() if args.demonstrate else
            args.prompt_file.read_bytes() if args.prompt_file else
            sys.stdin.buffer.read() if args.prompt == "-" else os.fsencode(args.prompt))
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise ValueError(f"{args.prompt_file or 'the prompt'} is not valid UTF-8") from None
    if not args.prompt_file or args.prompt_file.suffix != ".jsonl":
        return [Row(0, text, args.max_new_tokens, args.seed, args.template, [])]
    rows = []
    for n, line in enumerate(text.split("\n"), 1):
        if line.strip():
            given = read_line(line, f"{args.prompt_file} line {n}", args.mode)
            seed = None if args.seed is None else given.get("seed", args.seed + len(rows))
            choices = [given["continuation"]] if "continuation" in given else given.get("choices")
            rows.append(Row(len(rows), given["text"],
                            given.get("max_new_tokens", args.max_new_tokens), seed,
                            given.get("template", args.template), choices or []))
    require(rows, f"{args.prompt_file} holds no prompt")
    return rows


def read_line(line: str, where: str, mode: str) -> dict:
    """An object of a prompt file."""
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
    return given


def encode(rows: list[Row], tokenizer: Tokenizer, config: TwoTowerConfig, common: dict):
    """Fill in ids, lengths and settings. Raises: ValueError for no token, or too many."""
    longest = config.max_position_embeddings

    def ids_of(text: str, what: str, whole: bool = False, holes: bool = False) -> list[int]:
        """whole: a text of its own, before which the tokenizer may put a token."""
        require(not re.search("[\ud800-\udfff]", text), f"{what} is not valid UTF-8")
        ids = []
        for part in HOLE.split(text) if holes else [text]:
            if holes and HOLE.fullmatch(part):
                count = len(part) if part[0] == "_" else int(part[2:-2])
                ids += [common["mask_token_id"]] * min(count, longest)
            else:
                ids += tokenizer.encode(part, add_special_tokens=whole).ids
        require(ids, f"{what} holds no token" + " and no hole" * holes)
        require(max(ids) < config.vocab_size,
                f"{what} has id {max(ids)}, but the model's vocab_size is {config.vocab_size}; "
                "tokenizer.json is not this model's")
        return ids

    for row in rows:
        which = f"prompt {row.index}" if len(rows) > 1 else "the prompt"
        row.ids = ids_of(row.prompt, which, whole=True)
        row.choice_ids = [ids_of(text, f"a choice of {which}") for text in row.choices]
        if row.template is not None:
            row.template_ids = ids_of(row.template, f"the template of {which}", holes=True)
        given = max(map(len, [row.template_ids, *row.choice_ids]))
        row.max_new_tokens = new = row.max_new_tokens or given or NEW_TOKENS
        require(given <= new, f"the template of {which} has {given} tokens, more than the {new} of "
                "--max-new-tokens")
        require(len(row.ids) + new <= longest, f"{which} has {len(row.ids)} tokens, which with "
                f"{new} more is above max_position_embeddings {longest}; shorten it"
                + " or lower --max-new-tokens" * (not row.choices))
        row.settings = common | ({"choices": row.choices} if row.choices else {
            "max_new_tokens": new, "seed": row.seed, "template": row.template})


# ---------------------------------------------------------------- the checkpoint, and where it goes


def fetch(name: str, towers: str, plan: bool) -> Path:
    """The directory of a checkpoint: `name` itself, or what the Hub has under that name."""
    if os.path.isdir(name):
        return Path(name)
    require(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name), f"--checkpoint {name} is not a directory"
            + "; give --checkpoint (train.py makes one)" * (name == MINIATURE))
    from huggingface_hub import snapshot_download
    wanted, shards = ["config.json", "tokenizer.json", INDEX], {"": "model.safetensors"}
    try:
        path = Path(snapshot_download(name, allow_patterns=wanted, local_files_only=plan))
        if (path / INDEX).exists():
            shards = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"]
        wanted += sorted({file for key, file in shards.items()      # only those that are needed
                          if towers == "both" or not key.startswith(DENOISER_KEYS)})
        return Path(snapshot_download(name, allow_patterns=wanted, local_files_only=plan))
    except Exception as error:              # of any of the libraries that reach for the network
        failed = ("--plan, which downloads nothing, does not find it among what was fetched before"
                  if plan else "fetching it from the Hugging Face Hub failed")
        raise ValueError(
            f"--checkpoint {name} is not a directory, and {failed} ({type(error).__name__}); "
            "download config.json, tokenizer.json and the safetensors files of "
            f"https://huggingface.co/{name} where there is a connection, and give the directory "
            "that holds them") from None


def load_tokenizer(directory: Path) -> Tokenizer:
    path = directory / "tokenizer.json"
    require(path.is_file(), f"{path} is missing")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:              # the package raises nothing more specific
        raise ValueError(f"{path} is no tokenizer: {error}") from None
    tokenizer.no_truncation()               # nothing of a prompt is left out, nothing added
    tokenizer.no_padding()
    return tokenizer


def devices(args: Namespace) -> list[str]:
    """The context tower's device, and the denoiser's in modes that have one."""
    gpus = torch.cuda.device_count()
    first = args.context_device or ("cuda:0" if gpus else "cpu")
    second = "cuda:1" if gpus > 1 and first in ("cuda", "cuda:0") else first
    places = [first, args.denoiser_device or second][:2 if args.mode in DENOISING else 1]
    for i, (tower, place) in enumerate(zip(("context", "denoiser"), places)):
        try:
            there = torch.zeros(1, device=place)
            there.item()                            # fails on "meta" too
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"--{tower}-device {place} cannot be used: "
                             + str(error).splitlines()[0]) from None
        places[i] = str(there.device)
    require(not args.graphs or len(set(places)) == 1, "--graphs needs both towers on one device; "
            "give --context-device and --denoiser-device")
    return places


def memory(model: TwoTower, rows: int, length: int, width: int, places: list[str]) -> dict:
    """Bytes by device and purpose, for rows of `length` tokens and passes of `width` tokens.

    model is a skeleton, on the meta device: its states have sizes and no data.
    """
    states, held = Context(model.context_tower, rows, length).states, {}
    for what, names in (("KV cache", ("key_cache", "value_cache")),
                        ("SSM states", ("ssm_state",)), ("conv states", ("conv_state",))):
        held[what] = sum(getattr(state, name).nbytes
                         for state in states for name in names if hasattr(state, name))
    held["logits"] = rows * width * model.config.vocab_size * 4
    table = {place: {"weights": 0} | held for place in places}      # states: once on each
    for name, tensor in model.state_dict().items():
        tower = 0 if name.startswith("context_") else 1
        if tower < len(places):
            table[places[tower]]["weights"] += tensor.nbytes
    return table


def free_memory(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def readable(nbytes: int) -> str:
    power = min(max(nbytes.bit_length() - 1, 10) // 10, 3)
    return f"{nbytes / 2**(10 * power):.1f} {' KMG'[power]}iB"


def plan(model: TwoTower, rows: list[Row], args: Namespace, width: int, places: list[str]):
    """Print what goes where, for a batch of the longest rows in passes of `width` tokens.

    Raises: ValueError if it does not fit, naming what would.
    """
    batch = min(args.batch_size, sum(len(row.choices) or 1 for row in rows) or args.batch_size)
    prompt = max((len(row.ids) for row in rows), default=0)
    new = max((row.max_new_tokens for row in rows), default=args.max_new_tokens or NEW_TOKENS)
    length, longest = prompt + -(-new // width) * width, model.config.max_position_embeddings
    require(max(prompt + new, width) <= longest, f"{prompt} + {new} tokens and blocks of {width} "
            f"are too many for max_position_embeddings {longest}; lower --max-new-tokens or "
            + ("--draft-length" if args.mode in DRAFTS else "--block-size"))

    def towers(place: str) -> str:
        return " and ".join(f"{tower} tower" for tower, at in zip(("context", "denoiser"), places)
                            if at == place)

    def full(rows: int, places: list[str]) -> list[str]:
        return [place for place, parts in memory(model, rows, length, width, places).items()
                if sum(parts.values()) > free_memory(place)]

    for place, parts in memory(model, batch, length, width, places).items():
        each = ", ".join(f"{what} {readable(nbytes)}" for what, nbytes in parts.items())
        print(f"{place}: {towers(place)}: {each}; together {readable(sum(parts.values()))} of "
              f"{readable(free_memory(place))} free", file=sys.stderr)
    if args.plan:
        one = memory(model, 1, 1, width, places)[places[0]]
        print(f"batch of {batch}, {length} tokens a row; a cached token takes {one['KV cache']} "
              f"bytes, a row's SSM states {one['SSM states']} and conv states "
              f"{one['conv states']}", file=sys.stderr)
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    ways = [(f"--batch-size {n}", n, places) for n in (batch // 2, batch // 4, 1) if n]
    if len(places) > 1:
        ways = [(f"--context-device {first} --denoiser-device {second}", batch, [first, second])
                for first in gpus for second in gpus] + ways
        ways += [(f"--mode ar, the context tower alone on {place}", batch, [place])
                 for place in [places[0], *gpus, "cpu"]]
    less = "shorter texts" if args.mode in SCORE else "fewer --max-new-tokens"
    ways += [(f"a device with more memory, or {less}", 0, [])]
    for place in full(batch, places):
        way = next(way for way, *what in ways if not full(*what))
        raise ValueError(f"{towers(place)} on {place} would not fit; what would: {way}")


# ----------------------------------------------------------------------------------- what comes out


class Output:
    """Results in a file or as JSON, or text; and the trace. Rows end in the order of the input."""

    def __init__(self, args: Namespace, tokenizer: Tokenizer, mask_id: int, many: bool, keep: int):
        """keep: bytes of --output that an earlier run has written."""
        self.tokenizer, self.mask_id = tokenizer, mask_id
        self.form = ("file" if args.output else "json" if args.json or args.mode in SCORE else
                     "in place" if args.watch and sys.stdout.isatty() else
                     "steps" if args.demonstrate else "many" if many else "stream")
        self.results, self.trace = (path and open(path, "ab", buffering=0)
                                    for path in (args.output, args.trace))
        if args.resume:
            self.results.truncate(keep)             # half a line goes
        self.live = Live(transient=True, auto_refresh=False)
        self.held_back = max(map(len, args.stop), default=1) - 1    # may turn out to be a stop
        self.printed, self.block_index = 0, None

    def step(self, step: Step, rows: list[Row]):
        for r, row in enumerate(step.rows if self.trace else []):
            if step.committed[r].any():             # else this row's block was finished
                write_line(self.trace, {
                    "index": rows[row].index, "block": step.block_index, "step": step.step,
                    "t": float(step.t[r]), "before": step.before[r].tolist(),
                    "after": step.after[r].tolist(), "committed": step.committed[r].int().tolist(),
                    "confidence": step.confidence[r].tolist()})
        if self.form == "in place":
            self.show(step, rows[step.rows[0]])
        elif self.form == "steps":
            if self.block_index is None:
                print(f"{rows[0].prompt}\n{MASKED} is a masked token; a line shows a block after "
                      "one denoiser pass")
            if step.block_index != self.block_index:
                self.block_index = step.block_index
                print(f"\nblock {step.block_index}  {self.line(step, step.before)}")
            print(f"         {self.line(step, step.after)}", flush=True)

    def block(self, step: Step, ids: torch.Tensor) -> Text:
        """The first row's block (B, Q) before or after a step; tokens fresh in it stand out."""
        def style(pair) -> str:
            return "dim" if pair[0] == self.mask_id else "bold underline" if pair[1] else ""

        text = Text()
        for name, group in groupby(zip(ids[0].tolist(), step.committed[0].tolist()), style):
            run = [token for token, _ in group]
            text.append(MASKED * len(run) if name == "dim" else self.tokenizer.decode(run), name)
        return text

    def line(self, step: Step, ids: torch.Tensor) -> str:
        return self.block(step, ids).plain.replace("\n", "\u21b5")

    def show(self, step: Step, row: Row):
        """The text with the block being denoised, in place of what was shown before."""
        self.live.start()                           # does nothing where it has been
        console = self.live.console
        text = Text((row.prompt + row.text)[-console.width * console.height:])
        lines = text.append(self.block(step, step.after)).wrap(console, console.width)
        self.live.update(Text("\n").join(lines[2 - console.height:]), refresh=True)

    def grow(self, row: Row):
        if self.form == "stream":
            ready = len(row.text) - (0 if row.ended else self.held_back)
            text = row.prompt + row.text[:max(0, ready)]
            print(text[self.printed:], end="", flush=True)
            self.printed = max(self.printed, len(text))

    def end(self, row: Row):
        self.grow(row)
        self.live.stop()                            # which wipes what it shows
        if self.form == "file":
            return write_line(self.results, row.result(), "; it holds the results of prompts "
                              f"before {row.index}, and --resume goes on after them")
        print(json.dumps(row.result()) if self.form == "json" else
              f"--- {row.index}\n{row.prompt}{row.text}" if self.form == "many" else
              f"\n{row.text}" if self.form == "steps" else
              row.prompt + row.text if self.form == "in place" else "", flush=True)

    def close(self):
        self.live.stop()
        for file in filter(None, (self.results, self.trace)):
            file.close()


def write_line(file, value: dict, hint: str = ""):
    """Append JSON to an unbuffered file; a line that does not get there whole is taken back."""
    line, start = json.dumps(value).encode() + b"\n", file.tell()
    try:
        while line:
            line = line[file.write(line):]
    except OSError as error:
        file.truncate(start)
        raise OSError(f"{file.name}: {error.strerror}{hint}") from None


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
    functions = Decoding, getattr(TwoTower, f"generate_{args.mode}", TwoTower.score)
    default = {name: one.default for function in functions
               for name, one in inspect.signature(function).parameters.items()}
    default["mask_token_id"] = config.mask_token_id
    given = {name: value for name, value in vars(args).items() if value is not None}
    knobs = {flag.dest: (default | given)[flag.dest]
             for flag in FLAGS[KNOBS] if args.mode in flag.modes}
    require(knobs.get("mask_token_id", 0) < config.vocab_size, f"--mask-token-id is "
            f"{args.mask_token_id}, but it must be below vocab_size {config.vocab_size}")
    return knobs


def decode(model: TwoTower, tokenizer: Tokenizer, batch: list[Row], args: Namespace, knobs: dict,
           output: Output, check: Callable[[], None]):
    """Write after every row. check: is called between passes."""
    waiting, eos = list(batch), model.config.eos_token_id
    templates = [row.template_ids or None for row in batch]
    more = {"template": templates} if any(templates) else {}

    def on_tokens(written: Written) -> bool:
        check()
        row = batch[written.row]
        row.take(written, tokenizer, eos, args.stop)
        output.grow(row)
        while waiting and waiting[0].ended:
            output.end(waiting.pop(0))
        return row.ended == "stop"

    def on_step(step: Step):
        check()
        output.step(step, batch)

    try:
        getattr(model, f"generate_{args.mode}")(
            [torch.tensor(row.ids) for row in batch], [row.max_new_tokens for row in batch],
            eos_token_id=eos, seed=None if args.seed is None else [row.seed for row in batch],
            on_step=on_step, on_tokens=on_tokens, **knobs, **more)
    except KeyboardInterrupt:
        for row in waiting if output.form != "file" else []:        # there --resume writes them
            row.ended = row.ended or "interrupted"
            output.end(row)
        raise
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
        if len(row.log_likelihoods) == len(row.choices):
            row.ended = "scored"
            output.end(row)


def write(model: TwoTower, tokenizer: Tokenizer, rows: list[Row], args: Namespace, knobs: dict,
          output: Output, seconds: dict[str, float]) -> int:
    """Decode or score, `batch_size` at a time, up to the end or to Ctrl-C, which is noticed between
    passes, so that no output is half done; pressed again it acts at once. Returns the exit status.
    """
    pressed, began, seconds["prefill"], tower = [], None, 0.0, model.context_tower

    def press(*_):
        pressed.append(True)
        signal.signal(signal.SIGINT, before)

    def check():
        if pressed:
            raise KeyboardInterrupt

    def on_pass(*_):                        # of the context tower: a batch's first is its prefill
        nonlocal began
        if began is not None:
            if tower.device.type == "cuda":
                torch.cuda.synchronize(tower.device)
            seconds["prefill"], began = seconds["prefill"] + perf_counter() - began, None

    scoring, start = args.mode in SCORE, perf_counter()
    asked = [(row, ids) for row in rows for ids in row.choice_ids] if scoring else rows
    tower.register_forward_hook(on_pass)
    before = signal.signal(signal.SIGINT, press)
    try:
        for i in range(0, len(asked), args.batch_size):
            check()
            batch, began = asked[i:i + args.batch_size], None if scoring else perf_counter()
            if scoring:
                score(model, batch, output)
            else:
                decode(model, tokenizer, batch, args, knobs, output, check)
    except KeyboardInterrupt:
        return 130
    finally:
        output.close()
        signal.signal(signal.SIGINT, before)
        seconds["decode"] = perf_counter() - start - seconds["prefill"]
    return 0


def run(args: Namespace) -> int:
    """Everything in its order; returns the exit status."""
    if args.temperature and args.seed is None:
        args.seed = torch.Generator().seed() >> 1
    places, rows = devices(args), read_rows(args)
    towers, many = "both" if args.mode in DENOISING else "context", len(rows) > 1
    directory = fetch(args.checkpoint, towers, args.plan)
    tokenizer = load_tokenizer(directory) if rows else None
    model, files = TwoTower.skeleton(directory, towers=towers,
                                     dtype=args.dtype and getattr(torch, args.dtype))
    knobs = choose_knobs(args, model.config)
    dtype = str(model.context_lm_head.weight.dtype).removeprefix("torch.")
    encode(rows, tokenizer, model.config, {"checkpoint": args.checkpoint, "mode": args.mode,
           "stop": args.stop, "dtype": dtype, "backend": args.backend} | knobs)
    require(not args.watch or min(len(rows), args.batch_size) < 2,
            "--watch shows one row at a time; give --batch-size 1")
    done, keep = finished(args.output, rows) if args.resume else (0, 0)
    if args.resume and done == len(rows):
        print(f"{args.output} is complete: {done} results", file=sys.stderr)
        return 0
    rows = rows[done:]
    width = knobs.get("block_size", knobs.get("draft_length", 1))
    if args.mode in SCORE:
        lengths = [len(row.ids) + row.max_new_tokens for row in rows]
        width = min(max(lengths, default=SCORED_AT_ONCE), SCORED_AT_ONCE)
    plan(model, rows, args, width, places)
    if args.plan:
        return 0
    model.use(args.backend, args.graphs)    # what cannot be had is said before a tensor is read
    output = Output(args, tokenizer, knobs.get("mask_token_id"), many, keep)
    start, columns = perf_counter(), (BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress("loading", *columns, console=Console(stderr=True), transient=True,
                  disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=sum(x.nbytes for x in model.state_dict().values()))
        model.fill(files, places[0], places[-1], lambda nbytes: bar.advance(task, nbytes))
    model.use(args.backend, args.graphs)
    seconds = {"load": perf_counter() - start}
    status = write(model, tokenizer, rows, args, knobs, output, seconds)
    print(facts(rows, args, knobs, places, seconds, dtype, model.backend), file=sys.stderr)
    return status


def facts(rows: list[Row], args: Namespace, knobs: dict, places: list[str],
          seconds: dict[str, float], dtype: str, backend: str) -> str:
    """What was done, how fast and with which settings, in a line."""
    rows = [row for row in rows if row.ended]               # all, unless interrupted
    tokens, nfe = sum(len(row.tokens) for row in rows), sum(row.nfe for row in rows)
    passes = sum(row.context_passes for row in rows)
    peaks = [f"{place} {readable(torch.cuda.max_memory_allocated(place))}"
             for place in dict.fromkeys(places) if place.startswith("cuda")]
    with contextlib.suppress(ImportError):                  # on Windows
        import resource
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        peaks.append(f"host {readable(peak)}")
    return ", ".join([
        f"{args.mode} on {' and '.join(dict.fromkeys(places))}",
        f"{len(rows)} prompt{'s' * (len(rows) != 1)}", f"{tokens} tokens",
        f"{nfe} denoiser passes", f"{passes} context passes",
        f"{tokens / max(nfe or passes, 1):.2f} tokens per pass",
        *(f"{name} {value:.2f} s" for name, value in seconds.items()),
        f"{tokens / max(seconds['decode'], 1e-9):.1f} tokens/s",
        f"peak memory {', '.join(peaks) or 'unknown'}", f"dtype {dtype}",
        f"backend {backend}{' with graphs' if args.graphs else ''}",
        f"batch_size {args.batch_size}", *(f"stop {stop!r}" for stop in args.stop),
        *([] if args.mode in SCORE else
          [f"max_new_tokens {max((row.max_new_tokens for row in rows), default=0)}"]),
        *(f"{name} {value}" for name, value in knobs.items() if value is not None),
        *([] if args.seed is None else [f"seed {args.seed}"])])


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status; what is wrong is said in a line."""
    try:
        status = run(parse(argv))
        sys.stdout.flush()
        return status
    except BrokenPipeError:                                 # the reader of our output has gone
        return 0
    except (ValueError, OSError, RuntimeError) as error:    # a RuntimeError is out of memory
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
