"""Write text with a TwoTower checkpoint; without one, with the miniature beside this file.

    python sample.py                            a short demonstration, every denoiser pass shown
    python sample.py "sort 2 red pens, 1 blue cup, 3 gray keys, 5 pink rugs, 4 red maps"
    python sample.py -i                         prompt after prompt; /mode ar and the like set flags
    python sample.py --checkpoint DIR --plan    what would go where, and how much memory it takes
    python sample.py --prompt-file prompts.jsonl --output results.jsonl --batch-size 32
    python sample.py --template "name:____ city:____" "..."      fill in what is left open
    python sample.py --mode score --prompt-file choices.jsonl   log-likelihoods of given texts

Text goes to standard output, a line of facts to standard error. A flag that is not given takes the
default of twotower.py's function of that name; one that would do nothing is an error. Errors are
one line and exit status 2, Ctrl-C is 130.
"""

import contextlib
import inspect
import json
import math
import os
import platform
import shutil
import signal
import sys
import textwrap
from argparse import ArgumentParser, Namespace
from difflib import get_close_matches
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import NamedTuple

if __name__ == "__main__":          # before torch, which takes seconds: Ctrl-C is no traceback
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    for name, mode in (("stdin", "r"), ("stdout", "r"), ("stderr", "w")):
        if getattr(sys, name) is None:      # closed; else the next file would get its number
            setattr(sys, name, open(os.devnull, mode))

import torch
from rich.console import Console
from rich.live import Live
from rich.progress import (BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn,
                           TimeRemainingColumn, TransferSpeedColumn)
from rich.text import Text
from tokenizers import Tokenizer

from placement import NEW_TOKENS, SCORED_AT_ONCE, asking, devices, in_words, look, plan, readable
from rows import (COUNT, DEFAULT_PROMPT, DENOISING, DRAFTS, MASKS, MODES, NATURAL, SCORE, TEXT,
                  WRITING, Kind, Row, finished, load_tokenizer, make_rows, read_prompts, text_of)
from twotower import (Context, Decoding, SafetensorError, Step, TwoTower, Written, eos_ids, fetch,
                      require)

MINIATURE = os.path.join(os.path.dirname(os.path.realpath(__file__)), "miniature")
MASKED = "\u2591"                                   # a shaded box

# ---------------------------------------------------------------------------------------- arguments

X = {"type": float, "metavar": "X"}
FINITE = Kind(X, "a number of 0 or more", lambda x: 0 <= x < math.inf)
FRACTION = Kind(X, "a number in (0, 1]", lambda x: 0 < x <= 1)
STOPS = Kind({"action": "append", "metavar": "TEXT"}, "some text", all)
FILE, SWITCH = Kind({"type": Path, "metavar": "FILE"}), Kind({"action": "store_true"})
NAME = Kind({"metavar": "NAME"})


def choice(name: str, *values: str) -> Kind:
    return Kind({"choices": values, "metavar": name})


class Flag(NamedTuple):
    """A row of the table of flags. One that would do nothing is refused."""

    names: str                          # ours first, then those that other programs use
    kind: Kind
    modes: tuple[str, ...]              # in which it means something
    help: str
    default: object = None
    needs: tuple = ("", lambda args: True)      # what it needs, and whether that is there
    bars: str = ""                      # flags beside which it does nothing

    @property
    def name(self) -> str:
        return self.names.split()[0]

    @property
    def dest(self) -> str:
        return self.name.lstrip("-").replace("-", "_")


KNOBS = "decoding, as in twotower.py"
FLAGS = {"what to write": [
    Flag("--prompt -p", TEXT, MODES, "text to continue, - for standard input; without any, what a "
         "pipe brings, or a demonstration", bars="--prompt-file"),
    Flag("--prompt-file -f --file", FILE, MODES, "the prompt, or as JSON lines many (.jsonl, "
         ".ndjson, or a first line that is such an object; - reads standard input): objects with "
         "text, if wanted max_new_tokens, seed, template; to score, continuation or choices"),
    Flag("--interactive -i", SWITCH, WRITING, "ask for prompt after prompt", False,
         bars="--prompt --prompt-file --output --json --num-samples --trace"),
    Flag("--literal", SWITCH, MODES, "in prompts and templates, </s> is four letters, not that "
         "special token", False),
    Flag("--template", TEXT, MASKS, r"the new text: ___ is a hole of 3 tokens, {{2}} of 2; \_ and "
         r"\{{ are none; tokens of words bring their own space"),
    Flag("--max-new-tokens -n --max-tokens", COUNT, WRITING,
         f"default {NEW_TOKENS}, or the template's length"),
    Flag("--stop", STOPS, WRITING, "end before any such text or special token", []),
    Flag("--mode", choice("MODE", *MODES), MODES, "mask_diffusion; speculative, what ar writes, "
         "sooner; mock_ar, for weights trained for it; ar; score, how likely texts are", MASKS[0]),
    Flag("--seed -s", NATURAL, WRITING, "of the first row, the next has the next; default random"),
    Flag("--num-samples", COUNT, WRITING, "texts for each prompt", 1,
         ("--temperature above 0", lambda args: args.temperature)),
    Flag("--batch-size", COUNT, MODES, "rows decoded at once; alters rounding", 16, bars="--watch"),
], KNOBS: [
    Flag("--block-size", COUNT, MASKS, "tokens denoised together"),
    Flag("--draft-length", COUNT, DRAFTS, "tokens verified together"),
    Flag("--steps-per-block", COUNT, MASKS + DRAFTS, "denoiser passes a block may take"),
    Flag("--confidence-threshold", FINITE, MASKS + DRAFTS, "gamma: commit above it"),
    Flag("--mask-token-id", NATURAL, MASKS + DRAFTS, "default: the config's"),
    Flag("--temperature --temp", FINITE, WRITING, "0 is greedy"),
    Flag("--top-k", NATURAL, WRITING, "draw among the k most likely tokens; 0: all"),
    Flag("--top-p", FRACTION, WRITING, "draw among the most likely tokens holding p"),
], "the model": [
    Flag("--checkpoint -m --model", NAME, MODES, "a directory of config.json, tokenizer.json and "
         "safetensors, or OWNER/NAME on the Hugging Face Hub; without it miniature/, and a prompt "
         "gets the newline at its end that its tasks need"),
    Flag("--revision", NAME, MODES, "on the Hub; default main", needs=(
         "--checkpoint OWNER/NAME", lambda a: a.checkpoint and not os.path.isdir(a.checkpoint))),
    Flag("--context-device", NAME, MODES, "default cuda:0, or cpu without a GPU"),
    Flag("--denoiser-device", NAME, DENOISING, "default: beside cuda:0 cuda:1, else the same"),
    Flag("--dtype", choice("DTYPE", "bfloat16", "float16", "float32"), MODES,
         "of all weights but the router's: bfloat16, float16, float32; default the checkpoint's"),
    Flag("--experts", choice("FORM", "int8", "int4"), MODES, "hold routed experts so: int8, int4"),
    Flag("--backend", choice("NAME", "auto", "torch", "triton"), MODES, "torch; triton: "
         "kernels.py; auto: that on GPUs, where triton is there", "torch"),
    Flag("--graphs", SWITCH, (*MASKS, *DRAFTS, "ar"), "record the passes that repeat as CUDA "
         "graphs", False, ("--backend triton", lambda args: args.backend == "triton")),
], "what comes out": [
    Flag("--watch", SWITCH, MASKS, "show the block being denoised on a terminal, fresh tokens bold",
         False, bars="--json --output"),
    Flag("--json", SWITCH, MODES, "objects, not text", False, bars="--output"),
    Flag("--output", FILE, MODES, "for results as of --json, each when it is done"),
    Flag("--resume", SWITCH, MODES, "go on after the results of --output, in other batches", False,
         ("--output, and with --temperature the --seed that the results hold",
          lambda a: a.output and (not a.temperature or a.seed is not None))),
    Flag("--logprobs", NATURAL, WRITING, "of each new token, and the K likeliest, given all before "
         "it under the context tower", needs=("--json or --output", lambda a: a.json or a.output)),
    Flag("--trace", FILE, WRITING, "for every step: tokens, confidences, t, commits; an object a "
         "line", bars="--resume"),
    Flag("--quiet -q", SWITCH, MODES, "nothing on standard error but errors", False),
    Flag("--verbose", SWITCH, MODES, "also devices, memory and settings", False, bars="--quiet"),
], "instead": [
    Flag("--plan", SWITCH, MODES, "print what goes where, and whether it fits the memory", False),
    Flag("--count", TEXT, MODES, "print how many tokens a text has, - for standard input"),
    Flag("--version", Kind({"action": "version", "version": f"torch {torch.__version__}, Python "
                            f"{platform.python_version()}"}), MODES, "print what this runs on"),
    Flag("--help -h", Kind({"action": "help"}), MODES, "print this"),
]}
ALL = [flag for flags in FLAGS.values() for flag in flags]


def defaults(mode: str) -> dict:
    """Of every option of the mode, twotower.py's."""
    return {name: one.default for function in (
        Decoding, getattr(TwoTower, f"generate_{mode}", TwoTower.score))
        for name, one in inspect.signature(function).parameters.items()}


def help_text() -> str:
    width = min(max(shutil.get_terminal_size().columns, 60), 110)
    lines = ["usage: python sample.py [PROMPT] [flags]"]
    for title, flags in FLAGS.items():
        lines.append(f"\n{title}")
        for flag in flags:
            values = [flag.default] if title != KNOBS else dict.fromkeys(
                str(defaults(mode).get(flag.dest)) for mode in flag.modes)
            values = [value for value in values if value not in (None, "None", False, [])]
            text = flag.help + "; default " * bool(values) + ", else ".join(map(str, values))
            lines.append(textwrap.fill(text, width, subsequent_indent=" " * 30, initial_indent=(
                f"  {', '.join(flag.names.split())} {flag.kind.argparse.get('metavar', '')}"
            ).ljust(29) + " "))
    return "\n".join(lines) + "\n"


def parse(argv: list[str] | None) -> Namespace:
    """Raises: ValueError for what means nothing together, and for files that are in the way."""
    parser = ArgumentParser("sample.py", add_help=False, allow_abbrev=False)
    parser.error = lambda message: require(False, message)
    parser.format_help = help_text
    parser.set_defaults(demonstrate=False)
    parser.add_argument("words", nargs="?")
    for flag in ALL:
        parser.add_argument(*flag.names.split(), default=flag.default, dest=flag.dest,
                            **flag.kind.argparse)
    args, unknown = parser.parse_known_args(argv)
    names = [name for flag in ALL for name in flag.names.split()]
    close = get_close_matches((unknown or [""])[0].split("=")[0], names, 1)
    require(not unknown, f"unrecognized arguments: {' '.join(unknown)}"
            + "".join(f"; did you mean {name}?" for name in close)
            + "; a prompt of several words needs quotes" * (not "".join(unknown).startswith("-")))
    require(args.words is None or args.prompt is None, "PROMPT does nothing with --prompt")
    args.prompt = args.words if args.prompt is None else args.prompt
    if str(args.output) in ("-", "/dev/stdout"):
        args.output, args.json = None, True
    given = {flag.name: flag for flag in ALL if getattr(args, flag.dest) != flag.default}
    for name, flag in given.items():
        (needed, there), value = flag.needs, getattr(args, flag.dest)
        require(args.mode in flag.modes, f"{name} does nothing with --mode {args.mode}")
        require(there(args), f"{name} needs {needed}")
        for other in flag.bars.split():
            require(other not in given, f"{name} does nothing with {other}")
        flag.kind.check(name, value)
    args.top_k, args.batch_size = args.top_k or None, 1 if args.watch else args.batch_size
    require(args.output or sys.stdout.writable(), "standard output is closed; give --output FILE")
    files = [path.resolve() for path in (args.output, args.trace, args.prompt_file) if path]
    require(len({*files}) == len(files), "--prompt-file, --output and --trace must differ")
    for path in filter(None, (args.output, args.trace)):
        require(path.parent.is_dir(), f"{path}: its directory does not exist")
        require(path.is_file() or not path.exists() and path.name != "-", f"{path} is not a file")
        require(args.resume or not path.exists() or path.stat().st_size == 0,
                f"{path} exists; give another name" + ", or --resume" * (path == args.output))
    return args


# ----------------------------------------------------------------------------------- what comes out


def bar(shown: bool, *columns) -> Progress:
    """A progress bar on standard error, where that is a terminal."""
    return Progress(BarColumn(), *columns, console=Console(stderr=True), transient=True,
                    disable=not (shown and sys.stderr.isatty()))


class Output:
    """Takes what a model reports, and writes the trace and, in the order of the input, results."""

    def __init__(self, args: Namespace, model: TwoTower, tokenizer: Tokenizer, mask_id: int | None,
                 rows: list[Row], kept: tuple[int, int] = (0, 0)):
        """kept: bytes of --output in all, and of the whole lines an earlier run has written."""
        self.args, self.model, self.tokenizer, self.mask_id = args, model, tokenizer, mask_id
        self.eos = eos_ids(model.config.eos_token_id, model.config.vocab_size)
        self.many, terminal = len(rows) > 1, sys.stdout.isatty()
        self.form = ("json" if args.output or args.json or args.mode in SCORE else
                     "in place" if args.watch and terminal else
                     "steps" if args.demonstrate else "at end" if self.many else "stream")
        self.results = args.output and only_writer(args.output, kept[0])
        self.trace = args.trace and only_writer(args.trace, 0)
        if args.resume:
            self.results.truncate(kept[1])          # half a line goes
        self.live = Live(transient=True, auto_refresh=False)
        self.bar = bar(self.many and not args.quiet and (bool(args.output) or not terminal),
                       MofNCompleteColumn(), TextColumn("{task.fields[rate]:.0f} tokens/s"),
                       TimeRemainingColumn())
        self.task = self.bar.add_task("", total=len(rows), rate=0)
        self.held_back = max(map(len, args.stop), default=1) - 1    # may turn out to be a stop
        self.batch, self.waiting, self.printed, self.interrupted = [], [], 0, False
        self.start, self.prefill, self.first, self.tokens = perf_counter(), 0.0, None, 0

    def on_interrupt(self, *_):
        """Ctrl-C is noticed between passes, so that no output is half done; again, at once."""
        self.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def check(self):
        if self.interrupted:
            raise KeyboardInterrupt

    def shown(self, row: Row) -> str:
        return ("" if self.args.interactive else row.prompt) + row.text

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
            width, height = self.live.console.size
            text = Text(self.shown(self.batch[step.rows[0]])[-width * height:])
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
        self.first = self.first or perf_counter() - self.start
        self.tokens += len(written.new)
        self.bar.update(self.task, rate=self.tokens / (perf_counter() - self.start))
        row = self.batch[written.row]
        row.take(written, self.tokenizer, self.eos, self.args.stop)
        if self.form == "stream" and not row.ended:
            ready = self.shown(row)
            ready = ready[:max(len(ready) - self.held_back, len(ready) - len(row.text))]
            print(ready[self.printed:], end="", flush=True)
            self.printed = len(ready)
        while self.waiting and self.waiting[0].ended:
            self.end(self.waiting.pop(0))
        return row.ended == "stop"

    def end(self, row: Row):
        self.live.stop()                            # which wipes what it shows
        self.bar.advance(self.task)
        if self.args.logprobs is not None:
            row.logprobs = logprobs(self.model, row, self.args.logprobs)
        if self.results:
            write_line(self.results, row.result())
        elif self.form == "json":
            print(json.dumps(row.result()), flush=True)
        else:
            head = f"--- {row.index}\n" * self.many + "\n" * (self.form == "steps")
            print(head + self.shown(row)[self.printed:], flush=True)

    def close(self):
        self.live.stop()
        self.bar.stop()
        for file in filter(None, (self.results, self.trace)):
            file.close()


def only_writer(path: Path, size: int):
    """A file to append to, unbuffered, of that size still. Raises: ValueError if another run has
    it, or has written to it."""
    file, other = open(path, "ab", buffering=0), f"{path} is being written by another run"
    with contextlib.suppress(ImportError):          # on Windows
        import fcntl
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(other) from None
    require(os.fstat(file.fileno()).st_size == size, other)
    return file


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


# ----------------------------------------------------------------------------------------- decoding


@torch.no_grad()
def logprobs(model: TwoTower, row: Row, best: int) -> list[dict]:
    """Of each new token, and of the likeliest: log-probabilities given all before it under the
    context tower, at temperature 1."""
    ids, found = torch.tensor([row.ids + row.tokens]), []
    context, first = Context(model.context_tower, 1, ids.shape[1]), len(row.ids) - 1
    for start in range(0, ids.shape[1] - 1, 128):
        piece = ids[:, start:min(start + 128, ids.shape[1] - 1)]
        logs = model._extend(context, piece, "all")[0].log_softmax(-1)           # (L, V)
        for i in range(max(first - start, 0), piece.shape[1]):
            token, top = int(ids[0, start + i + 1]), logs[i].topk(min(best, logs.shape[1]))
            found.append({"token": token, "logprob": float(logs[i, token]),
                          "top": list(zip(top.indices.tolist(), top.values.tolist()))})
    return found


def decode(model: TwoTower, batch: list[Row], args: Namespace, knobs: dict, output: Output):
    """Write after every row."""
    start, longest = perf_counter(), max(len(row.ids) for row in batch) - (args.mode == "mock_ar")

    def on_prefill(_, inputs, hidden):
        if inputs[2].end >= longest:                        # of a `Pass`: its last piece
            hook.remove()
            hidden[0, 0, 0].item()                          # waits for a GPU
            output.prefill += perf_counter() - start

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
        raise ValueError(f"prompts from {batch[0].index}: " * output.many + str(error)) from None
    finally:
        hook.remove()


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


def write(model: TwoTower, rows: list[Row], args: Namespace, knobs: dict, output: Output) -> int:
    """Decode or score, `batch_size` at a time, up to the end or to Ctrl-C; the exit status."""
    asked = [(row, ids) for row in rows for ids in row.given] if args.mode in SCORE else rows
    before = signal.signal(signal.SIGINT, output.on_interrupt)
    output.bar.start()
    try:
        for i in range(0, len(asked), args.batch_size):
            output.check()
            batch = asked[i:i + args.batch_size]
            if args.mode in SCORE:
                score(model, batch, output)
            else:
                decode(model, batch, args, knobs, output)
        return 0
    except KeyboardInterrupt:
        for row in [] if output.results else output.waiting:        # there --resume writes them
            row.ended = row.ended or "interrupted"
            output.end(row)
        return 130
    finally:
        output.close()
        signal.signal(signal.SIGINT, before)


def prepare(prompts: list[dict], args: Namespace, tokenizer: Tokenizer | None,
            model: TwoTower) -> tuple[list[Row], dict]:
    """The rows, and every option of the mode: as given, or twotower.py's default."""
    if args.temperature and args.seed is None:
        args.seed = torch.Generator().seed() >> 1
    if tokenizer:
        tokenizer.encode_special_tokens = args.literal
    config, default = model.config, defaults(args.mode)
    default["mask_token_id"] = config.mask_token_id
    given = {name: value for name, value in vars(args).items() if value is not None}
    knobs = {flag.dest: (default | given)[flag.dest]
             for flag in FLAGS[KNOBS] if args.mode in flag.modes}
    require(knobs.get("mask_token_id", 0) < config.vocab_size, f"--mask-token-id is "
            f"{args.mask_token_id}, but it must be below vocab_size {config.vocab_size}")
    settings = {"checkpoint": args.checkpoint or MINIATURE, "mode": args.mode, "stop": args.stop,
                "dtype": str(model.context_lm_head.weight.dtype).removeprefix("torch."),
                "backend": args.backend, "experts": config.experts} | knobs
    return make_rows(prompts, args, tokenizer, config, settings), knobs


def run(args: Namespace, argv: list[str]) -> int:
    """Everything in its order; returns the exit status."""
    os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1"} if args.quiet else {}
    name, towers = args.checkpoint or MINIATURE, "both" if args.mode in DENOISING else "context"
    if args.count is not None:
        with asking(name):
            directory = fetch(name, towers, revision=args.revision, weights=False)
        tokenizer = load_tokenizer(directory)
        tokenizer.encode_special_tokens = args.literal
        print(len(tokenizer.encode(sys.stdin.read() if args.count == "-" else args.count).ids))
        return 0
    prompts = read_prompts(args, [flag.dest for flag in ALL])
    prompts += [{"text": DEFAULT_PROMPT}] * args.demonstrate
    places = devices(args, args.mode in DENOISING)
    with TemporaryDirectory() as scratch:
        directory, disk = look(name, towers, args.revision, Path(scratch))
        require(directory.is_dir(), f"--checkpoint {name} is not a directory"
                + "; give --checkpoint (train.py makes one)" * (name == MINIATURE))
        tokenizer = load_tokenizer(directory) if prompts or args.interactive else None
        model, files = TwoTower.skeleton(
            directory, dtype=args.dtype and getattr(torch, args.dtype), towers=towers,
            layout="any" if towers == "context" else "released", experts=args.experts)
    rows, knobs = prepare(prompts, args, tokenizer, model)
    done, kept = finished(args.output, rows) if args.resume else (0, (0, 0))
    if args.resume and done == len(rows):
        print(f"{args.output} is complete: {done} results", file=sys.stderr)
        return 0
    rows = rows[done:]
    table, problem = plan(model, rows, args, knobs, places)
    if disk.get("to fetch", 0) > disk.get("free", 0):
        problem = problem or "the disk has no room for it; HF_HOME may name another place"
    if args.plan and args.json:
        print(json.dumps({"devices": table, "disk": disk, "problem": problem}))
    elif args.plan or args.verbose:
        print("\n".join(in_words(table, disk, args.plan and model)),
              file=None if args.plan else sys.stderr)
    require(not problem, problem)
    if args.plan:
        return 0
    model.use(args.backend, args.graphs)    # what cannot be had is said before a tensor is read
    if disk:
        with asking(name):
            directory = fetch(name, towers, revision=args.revision)
        files = {key: directory / path.name for key, path in files.items()}
    start = perf_counter()
    with bar(not args.quiet, DownloadColumn(), TransferSpeedColumn()) as loading:
        task = loading.add_task("", total=sum(x.nbytes for x in model.state_dict().values()))
        model.fill(files, places[0], places[-1], lambda nbytes: loading.advance(task, nbytes))
    model.use(args.backend, args.graphs)
    if args.verbose:
        print(f"loaded in {perf_counter() - start:.2f} s", file=sys.stderr)
    return (talk(args, argv, model, tokenizer) if args.interactive else
            answer(rows, args, knobs, model, tokenizer, kept))


def answer(rows: list[Row], args: Namespace, knobs: dict, model: TwoTower, tokenizer: Tokenizer,
           kept: tuple[int, int] = (0, 0)) -> int:
    """Write after the rows, and say how fast that was."""
    output = Output(args, model, tokenizer, knobs.get("mask_token_id"), rows, kept)
    status = write(model, rows, args, knobs, output)
    if not args.quiet:
        print(facts(rows, output), file=sys.stderr)
    if args.verbose:
        print(details(rows, output), file=sys.stderr)
    return status


def facts(rows: list[Row], output: Output) -> str:
    """How fast it was, in a line."""
    ended = [row for row in rows if row.ended]              # all, unless interrupted
    tokens, seconds = sum(len(row.tokens) for row in ended), perf_counter() - output.start
    nfe, passes = (sum(getattr(row, name) for row in ended) for name in ("nfe", "context_passes"))
    parts = [f"{tokens / max(seconds - output.prefill, 1e-9):.1f} tokens/s",
             f"{tokens / max(nfe or passes, 1):.2f} tokens a pass"]
    if output.first:
        parts.append(f"first token after {output.first:.2f} s")
    if output.prefill:
        read = sum(len(row.ids) for row in ended)
        parts.append(f"prefill {read / output.prefill:.0f} tokens/s")
    return ", ".join(parts)


def details(rows: list[Row], output: Output) -> str:
    """What was done, in which memory and with which settings."""
    ended = [row for row in rows if row.ended]
    peaks = {f"cuda:{i}": nbytes for i in range(torch.cuda.device_count())
             if (nbytes := torch.cuda.max_memory_allocated(i))}
    with contextlib.suppress(ImportError):                  # on Windows
        import resource
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss       # in bytes on macOS
        peaks["host"] = peak * (1 if sys.platform == "darwin" else 1024)
    made = {"rows": len(ended), "tokens": sum(len(row.tokens) for row in ended),
            "denoiser passes": sum(row.nfe for row in ended),
            "context passes": sum(row.context_passes for row in ended),
            "seconds": f"{perf_counter() - output.start:.2f}",
            "prefill seconds": f"{output.prefill:.2f}"}
    made |= {f"peak memory of {place}": readable(nbytes) for place, nbytes in peaks.items()}
    args, how = output.args, output.model.backend + " with graphs" * output.args.graphs
    made |= rows[0].settings | {"backend": how, "seed": args.seed, "batch_size": args.batch_size}
    return ", ".join(f"{name} {value}" for name, value in made.items()
                     if name not in ("checkpoint", "choices") and value not in (None, []))


# -------------------------------------------------------------------------------------- interactive


def talk(args: Namespace, argv: list[str], model: TwoTower, tokenizer: Tokenizer) -> int:
    """Prompt after prompt with one model, up to the end of the input."""
    with contextlib.suppress(ImportError):          # history and editing
        __import__("readline")
    changed = {}
    if not args.quiet:
        print("A prompt goes on after a \\ at the end of a line. /mode ar or /watch set a flag, "
              "/mode takes it back, /help names all. Ctrl-D or /quit ends.", file=sys.stderr)
    while True:
        try:
            line = input("> ")
            while line.endswith("\\"):
                line = line[:-1] + "\n" + input("  ")
            if line in ("/quit", "/exit"):
                raise EOFError
            if line.startswith("/"):
                new = setting(line[1:], changed)
                args, changed = parse([*argv, *new.values()]), new
            elif line:
                now = Namespace(**vars(args))       # a seed drawn for it is this answer's
                rows, knobs = prepare([{"text": line}], now, tokenizer, model)
                answer(rows, now, knobs, model, tokenizer)
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print()
        except (ValueError, RuntimeError) as error:
            print(*str(error).split(), file=sys.stderr)


def setting(line: str, changed: dict[str, str]) -> dict[str, str]:
    """The changed flags, as argparse reads them, after another one or, without a value, without."""
    word, *value = line.split(maxsplit=1) or [""]
    flags = FLAGS["what to write"][3:] + FLAGS[KNOBS] + [      # but for those of the prompt
        flag for flag in ALL if flag.name in ("--watch", "--verbose", "--quiet")]
    found = ([flag for flag in flags if {"-" + word, "--" + word} & {*flag.names.split()}] or
             [flag for flag in flags if word and word in flag.name])
    require(len(found) == 1, ("flags are " if word == "help" else f"/{word} is not one of ")
            + ", ".join("/" + flag.dest.replace("_", "-") for flag in flags))
    name, new = found[0].name, dict(changed)
    if new.pop(name, None) is None or value:
        new[name] = "=".join([name, *value])
    return new


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status; what is wrong is said in a line."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        status = run(parse(argv), argv)
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
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))     # bars give the cursor back
    sys.stdout.reconfigure(errors="replace")                # "?" where a terminal lacks a letter
    status = main()
    try:
        sys.stdout.flush()
    except OSError:                     # what cannot be written must not fail again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)
