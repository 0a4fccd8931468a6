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

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
import re
import signal
import sys
import time
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn
from rich.text import Text
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from twotower import DENOISER_KEYS, INDEX, KVCache, Step, TwoTower, TwoTowerConfig, Written

MINIATURE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "miniature")
DEFAULT_PROMPT = "json city=Delhi day=Sunday name=Zoe age=63 job=teacher item=maps\n"
NEW_TOKENS = 128
MASKED = "\u2591"                                   # a shaded box
SAMPLING = ("top_k", "top_p", "seed")               # mean something above temperature 0
KNOBS = ("block_size", "draft_length", "steps_per_block", "confidence_threshold", "mask_token_id",
         "temperature", "top_k", "top_p")
CONTEXT_ONLY = ("ar", "score")                      # modes without a denoiser
SCORED_AT_ONCE = inspect.signature(TwoTower.score).parameters["tokens_per_pass"].default
HOLE = re.compile(r"(_{3,}|\{\{[0-9]+\}\})")        # in a template


# ---------------------------------------------------------------------------------------------
# 1. Arguments


def fail(message):
    print("sample.py: " + " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)


COUNT = ("an integer of 1 or more", lambda n: 1 <= n < 2**31)
NATURAL = ("an integer in [0, 2**63)", lambda n: 0 <= n < 2**63)


# what a line of a prompt file may hold
LINE = {"text": (str, "text", lambda text: True), "max_new_tokens": (int, *COUNT),
        "seed": (int, *NATURAL), "template": (str, "text", lambda text: True)}
LINE_TO_SCORE = {
    "text": LINE["text"], "continuation": LINE["text"],
    "choices": (list, "a list of texts",
                lambda texts: texts and all(isinstance(text, str) for text in texts))}


def number(kind, rule: str, holds):
    """An argparse type: a number of that kind for which holds(number), which is the rule."""
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not holds(value):
            raise argparse.ArgumentTypeError(f"{text} must be {rule}")
        return value
    return parse


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.error = fail
    add = parser.add_argument
    count, natural = number(int, *COUNT), number(int, *NATURAL)
    finite = number(float, "a number of 0 or more", lambda x: 0 <= x < math.inf)
    fraction = number(float, "a number in (0, 1]", lambda x: 0 < x <= 1)
    add("prompt", nargs="?", default=None,
        help="text to continue, - for standard input; without it a demonstration")
    add("--prompt-file", type=Path, default=None, metavar="FILE",
        help="the prompt, or with the suffix .jsonl many: objects with text and, if wanted, "
             "max_new_tokens, seed and template; to score, with continuation or choices")
    add("--checkpoint", default=MINIATURE, metavar="DIR",
        help="config.json, tokenizer.json and safetensors, or a name on the Hugging Face Hub; "
             "default miniature/")
    add("--context-device", help="default cuda:0, or cpu without a GPU")
    add("--denoiser-device", help="default cuda:1 if the context's is cuda:0, else the context's")
    add("--dtype", choices=["bfloat16", "float16", "float32"],
        help="of all weights but the router's; default: each tensor's own")
    add("--backend", choices=["auto", "torch", "triton"], default="torch",
        help="triton: kernels.py, which no GPU has run yet; auto: that on GPUs, where triton is "
             "there; default torch")
    add("--graphs", action="store_true", default=False,
        help="with --backend triton: record the passes that repeat as CUDA graphs")
    add("--plan", action="store_true", default=False,
        help="print what would go where and how much memory it takes, and exit")
    add("--mode", choices=["mask_diffusion", "speculative", "mock_ar", "ar", "score"],
        default="mask_diffusion", help="speculative writes what ar does, sooner; score writes "
        "nothing but the log-likelihoods of given continuations")
    add("--max-new-tokens", type=count, default=None,
        help=f"default {NEW_TOKENS}, or the length of the template")
    add("--template", metavar="TEXT", help="what the new text must look like: ___ (three or more) "
        "is a hole of as many tokens, {{2}} one of two; the tokens of words bring their own space")
    add("--batch-size", type=count, default=16, help="prompts decoded together; default 16")
    add("--block-size", type=count, help="tokens denoised together")
    add("--draft-length", type=count, help="speculative: tokens verified together")
    add("--steps-per-block", type=count, help="denoiser passes a block may take")
    add("--confidence-threshold", type=finite, help="gamma: commit above it")
    add("--mask-token-id", type=natural, help="default: the config's")
    add("--temperature", type=finite, help="0 is greedy")
    add("--top-k", type=count, help="draw among the k most likely tokens")
    add("--top-p", type=fraction, help="draw among the most likely tokens holding p")
    add("--seed", type=natural, help="of the first prompt's draws, the next has the next seed; "
                                     "random if not given")
    add("--stop", action="append", default=[], metavar="STRING",
        help="end before this text; may be given again")
    add("--watch", action="store_true",
        help="on a terminal, show the block being denoised: fresh tokens bold and underlined")
    add("--json", action="store_true", default=False,
        help="one object a result on standard output instead of text")
    add("--output", type=Path, default=None, metavar="FILE",
        help="write results there, as with --json, each as soon as it is finished")
    add("--resume", action="store_true", default=False,
        help="go on after the results that --output holds already")
    add("--trace", type=Path, default=None, metavar="FILE",
        help="write every step there: tokens, confidences, t, commits; one object a line")
    args = parser.parse_args()
    check_flags(args)
    return args


def function(model: TwoTower | type[TwoTower], mode: str):
    return model.score if mode == "score" else getattr(model, f"generate_{mode}")


def given(args: argparse.Namespace, name: str) -> bool:
    value = getattr(args, name, None)
    return not (value is None or value is False or value == [])


def check_flags(args: argparse.Namespace):
    """Refuse flags that exclude each other or would do nothing."""
    flag = {name: "--" + name.replace("_", "-") for name in vars(args)}
    args.demonstrate = args.prompt is None and args.prompt_file is None and not args.plan
    if args.mode == "score" and not args.plan and (
            args.prompt_file is None or args.prompt_file.suffix != ".jsonl"):
        fail("--mode score needs --prompt-file with the suffix .jsonl")
    if args.demonstrate:
        if args.mode != "mask_diffusion":
            fail(f"--mode {args.mode} needs a prompt; the demonstration is of mask_diffusion")
        args.prompt = DEFAULT_PROMPT
    if args.prompt is not None and args.prompt_file is not None:
        fail("give a prompt or --prompt-file, not both")
    takes = inspect.signature(function(TwoTower, args.mode)).parameters
    useless = [name for name in KNOBS if name not in takes]
    useless += ["watch", "template"] if args.mode != "mask_diffusion" else []
    useless += ["graphs"] if args.mode not in ("mask_diffusion", "ar") else []
    useless += ["denoiser_device"] if args.mode in CONTEXT_ONLY else []
    useless += ["max_new_tokens", "stop", "trace", "json"] if args.mode == "score" else []
    for name in useless:
        if given(args, name):
            fail(f"{flag[name]} does nothing with --mode {args.mode}")
    for name in SAMPLING:
        if name in args and not getattr(args, "temperature", 0):
            fail(f"{flag[name]} does nothing without --temperature above 0")
    if args.graphs and args.backend != "triton":
        fail("--graphs needs --backend triton")
    if "" in args.stop:
        fail("--stop needs some text")
    if args.resume and args.output is None:
        fail("--resume needs --output, the file to go on with")
    if args.resume and args.trace is not None:
        fail("--trace cannot go on with --resume; it would hold some steps twice")
    if args.json and args.output is not None:
        fail("--json does nothing with --output, which has the same lines")
    if args.plan and "template" in args and args.prompt is None and args.prompt_file is None:
        fail("--template does nothing with --plan but beside a prompt")
    if "watch" in args and (args.json or args.output is not None):
        fail("--watch does nothing with --json or --output")
    for name in ("graphs", "watch", "stop", "json", "output", "resume", "trace"):
        if args.plan and given(args, name):
            fail(f"{flag[name]} does nothing with --plan")
    if args.resume and getattr(args, "temperature", 0) and "seed" not in args:
        fail("--resume of a sampled run needs its --seed; the results hold it")
    files = [path for path in (args.prompt_file, args.output, args.trace) if path is not None]
    if len({path.resolve() for path in files}) < len(files):
        fail("--prompt-file, --output and --trace must be different files")
    for path in (args.output, args.trace):
        if path is not None and not path.parent.is_dir():
            fail(f"{path}: its directory does not exist")
        if path is not None and path.exists() and not args.resume and path.stat().st_size:
            fail(f"{path} exists; give another name" + (", or --resume" * (path == args.output)))


# ---------------------------------------------------------------------------------------------
# 2. Prompts


@dataclass
class Row:
    """A prompt, and what has been written after it."""

    index: int
    prompt: str
    max_new_tokens: int | None = None   # None, until its length is known: that of the template
    seed: int | None = None
    template: str | None = None
    choices: list[str] = field(default_factory=list)        # to be scored
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
            piece = self.stream.step(tokenizer, token) or ""
            before, self.text = len(self.text), self.text + piece
            found = (self.text.find(stop, max(0, before - len(stop))) for stop in stops if piece)
            cuts = [cut for cut in found if cut >= 0]
            if cuts:
                self.text = self.text[:min(cuts)]
                self.ended = "stop"
                return
        if written.ended:
            self.ended = "eos" if self.tokens[-1] == eos else "length"
            shown = self.tokens[:-1] if self.ended == "eos" else self.tokens
            whole = tokenizer.decode(shown)         # with what the last bytes left unfinished
            self.text = whole if whole.startswith(self.text) else self.text

    def settings(self, common: dict) -> dict:
        if self.choices:
            return common | {"choices": self.choices}
        return common | {"max_new_tokens": self.max_new_tokens, "seed": self.seed,
                         "template": self.template}

    def result(self, common: dict) -> dict:
        if self.choices:
            return {"index": self.index, "prompt": self.prompt} | self.scores() | {
                "settings": self.settings(common)}
        return {"index": self.index, "prompt": self.prompt, "text": self.text,
                "tokens": self.tokens, "ended": self.ended, "nfe": self.nfe,
                "context_passes": self.context_passes, "settings": self.settings(common)}

    def scores(self) -> dict:
        """What a scored row is; "best" by its likelihood, and by that per byte."""
        counts = [len(ids) for ids in self.choice_ids]
        sizes = [len(text.encode()) for text in self.choices]
        per_byte = [score / size for score, size in zip(self.log_likelihoods, sizes)]
        per_token = [score / count for score, count in zip(self.log_likelihoods, counts)]
        choices = range(len(self.choices))
        return {"log_likelihoods": self.log_likelihoods, "token_counts": counts,
                "perplexity_per_token": [math.exp(min(-x, 700.0)) for x in per_token],
                "perplexity_per_byte": [math.exp(min(-x, 700.0)) for x in per_byte],
                "best": max(choices, key=self.log_likelihoods.__getitem__),
                "best_per_byte": max(choices, key=per_byte.__getitem__)}


def read_rows(args: argparse.Namespace, first_seed: int | None) -> list[Row]:
    """The prompts, none of them checked against a tokenizer yet."""
    if args.prompt_file is None:
        text = sys.stdin.buffer.read() if args.prompt == "-" else os.fsencode(args.prompt)
        what = "the prompt"
    else:
        text, what = args.prompt_file.read_bytes(), args.prompt_file
    try:
        text = text.decode()
    except UnicodeDecodeError:
        raise ValueError(f"{what} is not valid UTF-8") from None
    new, template = args.max_new_tokens, getattr(args, "template", None)
    if args.prompt_file is None or args.prompt_file.suffix != ".jsonl":
        return [Row(0, text, new, first_seed, template)]
    rows = []
    for n, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{args.prompt_file} line {n}"
        try:
            prompt = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON: {error}") from None
        check_line(prompt, where, args.mode)
        seed = None if first_seed is None else prompt.get("seed", first_seed + len(rows))
        choices = prompt.get("choices", [])
        if "continuation" in prompt:
            choices = [prompt["continuation"]]
        rows.append(Row(len(rows), prompt["text"], prompt.get("max_new_tokens", new), seed,
                        prompt.get("template", template), choices))
    if not rows:
        raise ValueError(f"{args.prompt_file} holds no prompt")
    return rows


def check_line(prompt, where: str, mode: str):
    kinds = LINE_TO_SCORE if mode == "score" else LINE
    if not isinstance(prompt, dict) or "text" not in prompt:
        raise ValueError(f"{where} must be an object with text")
    if mode == "score" and ("continuation" in prompt) == ("choices" in prompt):
        raise ValueError(f"{where} must have either continuation or choices")
    if "template" in prompt and mode not in ("mask_diffusion", "score"):
        raise ValueError(f"{where} has a template, which does nothing with --mode {mode}")
    for name, value in prompt.items():
        if name not in kinds:
            raise ValueError(f"{where} has {name!r}; known are {', '.join(kinds)}")
        kind, rule, holds = kinds[name]
        if type(value) is not kind or not holds(value):
            raise ValueError(f"{where}: {name} is {value!r:.40}, but it must be {rule}")


def ids_of(text: str, what: str, tokenizer: Tokenizer, config: TwoTowerConfig,
           whole: bool = False) -> list[int]:
    """whole: a text of its own, before which the tokenizer may put a token."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} is not valid UTF-8") from None
    ids = tokenizer.encode(text, add_special_tokens=whole).ids
    if ids and max(ids) >= config.vocab_size:
        raise ValueError(f"{what} has id {max(ids)}, but the model's vocab_size is "
                         f"{config.vocab_size}; tokenizer.json is not this model's")
    return ids


def encode(rows: list[Row], tokenizer: Tokenizer, config: TwoTowerConfig, mask_id: int):
    """Fill in ids and lengths. Raises: ValueError for a text without tokens, or too long a one."""
    for row in rows:
        which = f"prompt {row.index}" if len(rows) > 1 else "the prompt"
        row.ids = ids_of(row.prompt, which, tokenizer, config, whole=True)
        row.choice_ids = [ids_of(text, f"a choice of {which}", tokenizer, config)
                          for text in row.choices]
        if not row.ids or [] in row.choice_ids:
            raise ValueError(f"{which if not row.ids else f'a choice of {which}'} holds no token")
        if row.template is not None:
            for part in HOLE.split(row.template):
                if HOLE.fullmatch(part):
                    holes = len(part) if part[0] == "_" else int(part[2:-2])
                    row.template_ids += [mask_id] * min(holes, config.max_position_embeddings)
                else:
                    row.template_ids += ids_of(part, f"the template of {which}", tokenizer, config)
            if not row.template_ids:
                raise ValueError(f"the template of {which} holds no token and no hole")
        if row.max_new_tokens is None:
            row.max_new_tokens = (max(map(len, row.choice_ids)) if row.choices else
                                  len(row.template_ids) or NEW_TOKENS)
        if row.max_new_tokens < len(row.template_ids):
            raise ValueError(f"the template of {which} has {len(row.template_ids)} tokens, more "
                             f"than the {row.max_new_tokens} of --max-new-tokens")
        longest = config.max_position_embeddings
        if len(row.ids) + row.max_new_tokens > longest:
            raise ValueError(f"{which} has {len(row.ids)} tokens, which with {row.max_new_tokens} "
                             f"more is above max_position_embeddings {longest}; shorten it"
                             + ("" if row.choices else " or lower --max-new-tokens"))


# ---------------------------------------------------------------------------------------------
# 3. The checkpoint, and where it goes


def fetch(name: str, towers: str, plan: bool) -> Path:
    """The directory of a checkpoint: `name` itself, or what the Hub has under that name."""
    if os.path.isdir(name):
        return Path(name)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        hint = "; give --checkpoint (train.py makes one)" if name == MINIATURE else ""
        raise ValueError(f"--checkpoint {name} is not a directory{hint}")
    from huggingface_hub import snapshot_download
    small = ["config.json", "tokenizer.json", INDEX]
    try:
        path = Path(snapshot_download(name, allow_patterns=small, local_files_only=plan))
        shards = ["model.safetensors"]
        if (path / INDEX).exists():                 # only the files that are needed
            places = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"]
            shards = sorted({file for key, file in places.items()
                             if towers == "both" or not key.startswith(DENOISER_KEYS)})
        return Path(snapshot_download(name, allow_patterns=small + shards, local_files_only=plan))
    except Exception as error:              # of any of the libraries that reach for the network
        raise ValueError(
            f"--checkpoint {name} is not a directory, and "
            + ("--plan, which downloads nothing, does not find it among what was fetched before"
               if plan else "fetching it from the Hugging Face Hub failed")
            + f" ({type(error).__name__}); download config.json, tokenizer.json and the "
            f"safetensors files of https://huggingface.co/{name} where there is a connection, and "
            "give the directory that holds them") from None


def load_tokenizer(directory: Path) -> Tokenizer:
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:              # the package raises nothing more specific
        raise ValueError(f"{path} is no tokenizer: {error}") from None
    tokenizer.no_truncation()               # nothing of a prompt is left out, nothing added
    tokenizer.no_padding()
    return tokenizer


def devices(args: argparse.Namespace) -> list[str]:
    """The context tower's device, and the denoiser's in modes that have one."""
    gpus = torch.cuda.device_count()
    first = getattr(args, "context_device", "cuda:0" if gpus else "cpu")
    second = "cuda:1" if gpus > 1 and first in ("cuda", "cuda:0") else first
    chosen = [first]
    if args.mode not in CONTEXT_ONLY:
        chosen.append(getattr(args, "denoiser_device", second))
    for device, name in zip(chosen, ("context", "denoiser")):
        try:
            torch.zeros(1, device=device).item()            # fails on "meta" too
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"--{name}-device {device} cannot be used: {reason}") from None
    return [str(torch.empty(0, device=device).device) for device in chosen]


def memory(model: TwoTower, rows: int, length: int, width: int, places: list[str]) -> dict:
    """Bytes by device and purpose, for rows of `length` tokens and passes of `width` tokens.

    model is a skeleton, on the meta device: its states have sizes and no data.
    """
    context = [*model.context_tower.parameters(), *model.context_tower.buffers(),
               model.context_lm_head.weight]
    everything = [*model.parameters(), *model.buffers()]
    total = sum(tensor.nbytes for tensor in everything)
    first = sum(tensor.nbytes for tensor in context)
    states = dict.fromkeys(("KV cache", "SSM states", "conv states"), 0)
    for state in model.context_tower.empty_states(rows, length):
        if isinstance(state, KVCache):
            states["KV cache"] += state.key_cache.nbytes + state.value_cache.nbytes
        elif state is not None:
            states["SSM states"] += state.ssm_state.nbytes
            states["conv states"] += state.conv_state.nbytes
    table: dict[str, dict[str, int]] = {}
    for place, weights in zip(places, (first, total - first)):
        one = table.setdefault(place, {})
        one["weights"] = one.get("weights", 0) + weights
        one |= states                                   # held once where both towers are
        one["logits"] = rows * width * model.config.vocab_size * 4
    return table


def free_memory(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def readable(nbytes: int) -> str:
    power = min(max(nbytes.bit_length() - 1, 10) // 10, 3)
    return f"{nbytes / 2**(10 * power):.1f} {' KMG'[power]}iB"


def plan(model: TwoTower, rows: list[Row], batch: int, width: int, args: argparse.Namespace,
         places: list[str]):
    """Print what goes where, for `batch` rows at once in passes of `width` tokens.

    Raises: ValueError if it does not fit, naming what would.
    """
    prompt = max((len(row.ids) for row in rows), default=0)
    new = max((row.max_new_tokens for row in rows), default=args.max_new_tokens or NEW_TOKENS)
    length = prompt + -(-new // width) * width
    longest = model.config.max_position_embeddings
    if max(prompt + new, width) > longest:
        of_a_block = "--draft-length" if args.mode == "speculative" else "--block-size"
        raise ValueError(f"{prompt} + {new} tokens and blocks of {width} are too many for "
                         f"max_position_embeddings {longest}; lower --max-new-tokens or "
                         f"{of_a_block}")
    table = memory(model, batch, length, width, places)
    for place, parts in table.items():
        print(f"{place}: {towers_at(place, places)}: "
              + ", ".join(f"{what} {readable(nbytes)}" for what, nbytes in parts.items())
              + f"; together {readable(sum(parts.values()))} of {readable(free_memory(place))} "
              "free", file=sys.stderr)
    if args.plan:
        one = memory(model, 1, 1, width, places[:1])[places[0]]
        print(f"batch of {batch}, {length} tokens a row; a cached token takes {one['KV cache']} "
              f"bytes, a row's SSM states {one['SSM states']} and conv states "
              f"{one['conv states']}", file=sys.stderr)
    full = [place for place, parts in table.items() if sum(parts.values()) > free_memory(place)]
    if not full:
        return
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    pairs = [[first, second] for first in devices for second in devices if len(places) > 1]
    ways = [(f"--context-device {first} --denoiser-device {second}", batch, [first, second])
            for first, second in pairs]
    ways += [(f"--batch-size {n}", n, places) for n in (batch // 2, batch // 4, 1) if n]
    ways += [(f"--mode ar, the context tower alone on {place}", batch, [place])
             for place in [*places[:1], *devices, "cpu"] if len(places) > 1]
    for way, rows_at_once, where in ways:
        table = memory(model, rows_at_once, length, width, where)
        if all(sum(parts.values()) <= free_memory(place) for place, parts in table.items()):
            break
    else:
        way = "a device with more memory, or " + (
            "shorter texts" if args.mode == "score" else "fewer --max-new-tokens")
    raise ValueError(f"{towers_at(full[0], places)} on {full[0]} would not fit; what would: {way}")


def towers_at(place: str, places: list[str]) -> str:
    names = ("context tower", "denoiser tower")
    return " and ".join(name for name, at in zip(names, places) if at == place)


def load(model: TwoTower, files: dict[str, Path], places: list[str]):
    total = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    columns = "loading", BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True,
                  disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=total)
        model.fill(files, places[0], places[-1], lambda nbytes: bar.advance(task, nbytes))


# ---------------------------------------------------------------------------------------------
# 4. Outputs: each is told of steps, of text that grew, and of rows that ended, in input order


class Output:
    def step(self, step: Step, rows: list[Row]):
        pass

    def grow(self, row: Row):
        pass

    def end(self, row: Row):
        pass

    def interrupt(self, row: Row):
        """Ctrl-C: the row stays as it is."""
        self.end(row)

    def close(self):
        pass


class PlainText(Output):
    """One prompt: text as it comes. Many: each when its turn has come, under a line of its own."""

    def __init__(self, many: bool, stops: list[str]):
        self.many, self.started, self.printed = many, False, 0
        self.held_back = max(map(len, stops), default=1) - 1        # may turn out to be a stop

    def grow(self, row: Row):
        if self.many:
            return
        if not self.started:
            print(row.prompt, end="")
            self.started = True
        ready = row.text if row.ended else row.text[:max(0, len(row.text) - self.held_back)]
        print(ready[self.printed:], end="", flush=True)
        self.printed = max(self.printed, len(ready))

    def end(self, row: Row):
        if self.many:
            print(f"--- {row.index}\n{row.prompt}{row.text}", flush=True)
        else:
            self.grow(row)
            print(flush=True)


class Demonstration(Output):
    """The prompt, then for every denoiser pass a line: the block as it stands after it."""

    def __init__(self, tokenizer: Tokenizer, mask_id: int):
        self.tokenizer, self.mask_id, self.block_index = tokenizer, mask_id, None

    def step(self, step: Step, rows: list[Row]):
        if self.block_index is None:
            print(f"{rows[0].prompt}\n{MASKED} is a masked token; a line shows a block after one "
                  "denoiser pass")
        if step.block_index != self.block_index:
            self.block_index = step.block_index
            before = step._replace(after=step.before)
            print(f"\nblock {step.block_index}  " + self.line(before))
        print("         " + self.line(step), flush=True)

    def line(self, step: Step) -> str:
        line = "".join(text for _, text in pieces(step, 0, self.tokenizer, self.mask_id))
        return line.replace("\n", "\u21b5")

    def end(self, row: Row):
        print(f"\n{row.text}", flush=True)


class Watch(Output):
    """The text with the block being denoised, in place; the finished text stays."""

    def __init__(self, tokenizer: Tokenizer, mask_id: int):
        self.tokenizer, self.mask_id, self.live = tokenizer, mask_id, None

    def step(self, step: Step, rows: list[Row]):
        if self.live is None:
            self.live = Live(transient=True, auto_refresh=False)
            self.live.start()
        row, console = rows[step.rows[0]], self.live.console
        text = Text((row.prompt + row.text)[-console.width * console.height:])
        for kind, piece in pieces(step, 0, self.tokenizer, self.mask_id):
            text.append(piece, {"fresh": "bold underline", "masked": "dim"}.get(kind, ""))
        lines = text.wrap(console, console.width)
        self.live.update(Text("\n").join(lines[2 - console.height:]), refresh=True)

    def end(self, row: Row):
        self.close()
        print(row.prompt + row.text, flush=True)

    def close(self):
        if self.live is not None:
            self.live.stop()                        # which wipes it
            self.live = None


def pieces(step: Step, r: int, tokenizer: Tokenizer, mask_id: int):
    """The block of row r as (kind, text): masked, fresh (committed in this step) or settled."""
    kinds = ["masked" if token == mask_id else "fresh" if new else "settled"
             for token, new in zip(step.after[r].tolist(), step.committed[r].tolist())]
    for kind, group in groupby(zip(kinds, step.after[r].tolist()), lambda pair: pair[0]):
        tokens = [token for _, token in group]
        yield kind, MASKED * len(tokens) if kind == "masked" else tokenizer.decode(tokens)


class JsonLines(Output):
    """Results as JSON, one line each."""

    def __init__(self, common: dict):
        self.common = common

    def end(self, row: Row):
        print(json.dumps(row.result(self.common)), flush=True)


class ResultFile(Output):
    """The same lines in a file, after the `keep` bytes of an earlier run."""

    def __init__(self, path: Path, common: dict, keep: int):
        self.path, self.common = path, common
        self.file = open(path, "ab", buffering=0)
        if keep < self.file.tell():
            self.file.truncate(keep)                # half a line

    def end(self, row: Row):
        line = json.dumps(row.result(self.common)).encode() + b"\n"
        start = self.file.tell()
        try:
            while line:
                line = line[self.file.write(line):]
        except OSError as error:
            os.truncate(self.path, start)           # no half a line
            raise OSError(f"{self.path}: {error.strerror}; it holds the results of prompts before "
                          f"{row.index}, and --resume goes on after them") from None

    def interrupt(self, row: Row):
        pass                                        # it will be written again

    def close(self):
        self.file.close()


def finished(path: Path, rows: list[Row], common: dict) -> tuple[int, int]:
    """How many results an interrupted run left in the file, and their bytes.

    Raises: ValueError if they are not results of these prompts and settings.
    """
    data = path.read_bytes() if path.exists() else b""
    *lines, rest = data.split(b"\n")
    start = b'{"index": %d,' % len(lines)
    if rest[:len(start)] != start[:len(rest)]:
        raise ValueError(f"{path} line {len(lines) + 1} is not a result of sample.py")
    for n, line in enumerate(lines):
        where = f"{path} line {n + 1}"
        if n >= len(rows):
            raise ValueError(f"{where}: there are only {len(rows)} prompts")
        try:
            result = json.loads(line)
            made = {"prompt": result["prompt"]} | result["settings"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{where} is not a result of sample.py") from None
        wanted = {"prompt": rows[n].prompt} | rows[n].settings(common)
        for name in wanted:
            if made.get(name) != wanted[name]:
                raise ValueError(f"{where} was made with {name} {made.get(name)!r:.60}, not "
                                 f"{wanted[name]!r:.60}; --resume needs the same")
    return len(lines), len(data) - len(rest)


class Trace(Output):
    """Every step of every row as a line of JSON."""

    def __init__(self, path: Path):
        self.file = open(path, "w", encoding="utf-8")

    def step(self, step: Step, rows: list[Row]):
        for r, row in enumerate(step.rows):
            if step.committed[r].any():             # else this row's block was finished
                self.file.write(json.dumps({
                    "index": rows[row].index, "block": step.block_index, "step": step.step,
                    "t": float(step.t[r]), "before": step.before[r].tolist(),
                    "after": step.after[r].tolist(), "committed": step.committed[r].int().tolist(),
                    "confidence": step.confidence[r].tolist()}) + "\n")
        self.file.flush()

    def close(self):
        self.file.close()


# ---------------------------------------------------------------------------------------------
# 5. Decoding


class Interrupt:
    """Ctrl-C, to be noticed between two passes, so that no output is half done or done twice;
    pressed again it acts at once."""

    def __init__(self):
        self.pressed = False
        signal.signal(signal.SIGINT, self.press)

    def press(self, *_):
        self.pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def check(self):
        if self.pressed:
            raise KeyboardInterrupt


def decode(model: TwoTower, tokenizer: Tokenizer, rows: list[Row], args: argparse.Namespace,
           knobs: dict, outputs: list[Output]):
    """Write after every row, `batch_size` of them at a time."""
    interrupt = Interrupt()
    generate, eos = function(model, args.mode), model.config.eos_token_id
    for start in range(0, len(rows), args.batch_size):
        batch = rows[start:start + args.batch_size]
        waiting = list(batch)

        def on_tokens(written: Written) -> bool:
            interrupt.check()
            row = batch[written.row]
            row.take(written, tokenizer, eos, args.stop)
            for output in outputs:
                output.grow(row)
            while waiting and waiting[0].ended:
                for output in outputs:
                    output.end(waiting[0])
                waiting.pop(0)
            return row.ended == "stop"

        def on_step(step: Step):
            interrupt.check()
            for output in outputs:
                output.step(step, batch)

        generators = [torch.Generator().manual_seed(row.seed) for row in batch
                      if row.seed is not None]
        templates = [row.template_ids or None for row in batch]
        own = {"template": templates} if any(templates) else {}
        try:
            generate([torch.tensor(row.ids) for row in batch],
                     [row.max_new_tokens for row in batch], eos_token_id=eos,
                     generator=generators or None, on_step=on_step, on_tokens=on_tokens, **knobs,
                     **own)
        except KeyboardInterrupt:
            for row in waiting:
                row.ended = row.ended or "interrupted"
                for output in outputs:
                    output.interrupt(row)
            raise
        except ValueError as error:                 # its rows count from the batch's first
            which = f"prompts {batch[0].index} to {batch[-1].index}: " if len(rows) > 1 else ""
            raise ValueError(f"{which}{error}") from None


def score(model: TwoTower, rows: list[Row], args: argparse.Namespace, outputs: list[Output]):
    """Log-likelihoods of every row's choices, `batch_size` of them at a time."""
    interrupt = Interrupt()
    asked = [(row, ids) for row in rows for ids in row.choice_ids]
    for start in range(0, len(asked), args.batch_size):
        batch = asked[start:start + args.batch_size]
        interrupt.check()
        scores = model.score([torch.tensor(row.ids) for row, _ in batch],
                             [torch.tensor(ids) for _, ids in batch])
        for (row, ids), total in zip(batch, scores.total.tolist()):
            row.log_likelihoods.append(total)
            row.tokens += ids
            row.context_passes += -(-(len(row.ids) + len(ids) - 1) // SCORED_AT_ONCE)
            if len(row.log_likelihoods) == len(row.choices):
                row.ended = "scored"
                for output in outputs:
                    output.end(row)


def choose_knobs(args: argparse.Namespace, model: TwoTower) -> dict:
    """Every sampling knob of the mode: as given, or twotower.py's default."""
    takes = inspect.signature(function(model, args.mode)).parameters
    knobs = {name: getattr(args, name, takes[name].default) for name in KNOBS if name in takes}
    if "mask_token_id" in knobs:
        if knobs["mask_token_id"] is None:
            knobs["mask_token_id"] = model.config.mask_token_id
        if knobs["mask_token_id"] >= model.config.vocab_size:
            raise ValueError(f"--mask-token-id is {knobs['mask_token_id']}, but it must be below "
                             f"vocab_size {model.config.vocab_size}")
    return knobs


def open_outputs(args: argparse.Namespace, many: bool, common: dict, keep: int,
                 tokenizer: Tokenizer) -> list[Output]:
    if args.output is not None:
        outputs = [ResultFile(args.output, common, keep)]
    elif args.json or args.mode == "score":
        outputs = [JsonLines(common)]
    elif "watch" in args and sys.stdout.isatty():
        outputs = [Watch(tokenizer, common["mask_token_id"])]
    elif args.demonstrate:
        outputs = [Demonstration(tokenizer, common["mask_token_id"])]
    else:
        outputs = [PlainText(many, args.stop)]
    return outputs + ([] if args.trace is None else [Trace(args.trace)])


def run(args: argparse.Namespace) -> int:
    towers = "context" if args.mode in CONTEXT_ONLY else "both"
    first_seed, rows, tokenizer = None, [], None
    if getattr(args, "temperature", 0):
        first_seed = getattr(args, "seed", torch.Generator().seed() >> 1)
    places = devices(args)
    if args.graphs and len(set(places)) > 1:
        raise ValueError("--graphs needs both towers on one device; give --context-device and "
                         "--denoiser-device")
    if args.prompt is not None or args.prompt_file is not None:     # a plan can do without
        rows = read_rows(args, first_seed)
    directory = fetch(args.checkpoint, towers, args.plan)
    if rows:
        tokenizer = load_tokenizer(directory)
    dtype = getattr(torch, args.dtype) if "dtype" in args else None
    model, files = TwoTower.skeleton(directory, dtype=dtype, towers=towers)
    knobs = choose_knobs(args, model)
    encode(rows, tokenizer, model.config, knobs.get("mask_token_id"))
    common = {"checkpoint": args.checkpoint, "mode": args.mode, "stop": args.stop,
              "dtype": name_of(model.context_lm_head.weight.dtype), "backend": args.backend} | knobs
    many = len(rows) > 1
    if "watch" in args and min(len(rows), args.batch_size) > 1:
        raise ValueError("--watch shows one row at a time; give --batch-size 1")
    done, keep = finished(args.output, rows, common) if args.resume else (0, 0)
    if args.resume and done == len(rows):
        print(f"{args.output} is complete: {done} results", file=sys.stderr)
        return 0
    rows = rows[done:]
    at_once = sum(len(row.choices) or 1 for row in rows) or args.batch_size
    width = knobs.get("block_size", knobs.get("draft_length", 1))
    if args.mode == "score":
        longest = max((len(row.ids) + row.max_new_tokens for row in rows), default=SCORED_AT_ONCE)
        width = min(longest, SCORED_AT_ONCE)
    plan(model, rows, min(args.batch_size, at_once), width, args, places)
    if args.plan:
        return 0

    model.use(args.backend, args.graphs)    # what cannot be had is said before a tensor is read
    outputs = open_outputs(args, many, common, keep, tokenizer)
    start = time.perf_counter()
    load(model, files, places)
    model.use(args.backend, args.graphs)
    seconds = {"load": time.perf_counter() - start, "prefill": 0.0}
    if args.mode != "score":
        time_prefills(model, seconds)
    status, start = 0, time.perf_counter()
    try:
        if args.mode == "score":
            score(model, rows, args, outputs)
        else:
            decode(model, tokenizer, rows, args, knobs, outputs)
    except KeyboardInterrupt:
        status = 130
    finally:
        for output in outputs:
            output.close()
    seconds["decode"] = time.perf_counter() - start - seconds["prefill"]
    print(facts(rows, args, model, places, seconds, knobs, first_seed), file=sys.stderr)
    return status


def time_prefills(model: TwoTower, seconds: dict[str, float]):
    """Add up the time of the context passes that start from nothing."""
    began = 0.0

    def before(_, args):
        nonlocal began
        began = time.perf_counter()

    def after(_, args, output):
        if args[2].end == args[0].shape[1]:                 # nothing was cached: the prompt
            if model.context_tower.device.type == "cuda":
                torch.cuda.synchronize(model.context_tower.device)
            seconds["prefill"] += time.perf_counter() - began

    model.context_tower.register_forward_pre_hook(before)
    model.context_tower.register_forward_hook(after)


def peak_memory(places: list[str]) -> str:
    peaks = [f"{place} {readable(torch.cuda.max_memory_allocated(place))}"
             for place in dict.fromkeys(places) if place.startswith("cuda")]
    try:
        import resource
    except ImportError:                                     # not on Windows
        return ", ".join(peaks) or "unknown"
    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return ", ".join([*peaks, f"host {readable(host)}"])


def facts(rows: list[Row], args: argparse.Namespace, model: TwoTower, places: list[str],
          seconds: dict, knobs: dict, first_seed: int | None) -> str:
    rows = [row for row in rows if row.ended]           # all, unless interrupted
    tokens, nfe = sum(len(row.tokens) for row in rows), sum(row.nfe for row in rows)
    passes = sum(row.context_passes for row in rows)
    parts = [f"{args.mode} on {' and '.join(dict.fromkeys(places))}",
             f"{len(rows)} prompt{'s' * (len(rows) != 1)}",
             f"{tokens} tokens", f"{nfe} denoiser passes", f"{passes} context passes",
             f"{tokens / max(nfe or passes, 1):.2f} tokens per pass"]
    parts += [f"{name} {value:.2f} s" for name, value in seconds.items()]
    parts += [f"{tokens / max(seconds['decode'], 1e-9):.1f} tokens/s",
              f"peak memory {peak_memory(places)}",
              f"dtype {name_of(model.context_lm_head.weight.dtype)}",
              f"backend {model.backend}" + " with graphs" * args.graphs,
              f"batch_size {args.batch_size}",
              *(f"stop {stop!r}" for stop in args.stop)]
    if args.mode != "score":
        parts += [f"max_new_tokens {max((row.max_new_tokens for row in rows), default=0)}"]
    parts += [f"{name} {value}" for name, value in knobs.items() if value is not None]
    parts += [f"seed {first_seed}"] if first_seed is not None else []
    return ", ".join(parts)


def main():
    sys.stdout.reconfigure(errors="replace")                # "?" where a terminal lacks a letter
    status, message = 0, None
    try:
        status = run(parse_args())
        sys.stdout.flush()
    except BrokenPipeError:                                 # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, RuntimeError) as error:    # a RuntimeError is out of memory
        message = error
    except KeyboardInterrupt:
        print(file=sys.stderr)
        status = 130
    if message is not None:
        # what could not be written (a full disk) must not fail again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        fail(message)
    sys.exit(status)


if __name__ == "__main__":
    main()
