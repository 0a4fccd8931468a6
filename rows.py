"""The rows of sample.py: prompts as they are read and checked, and what is written after them."""

import contextlib
import json
import math
import os
import re
import stat
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from placement import NEW_TOKENS
from twotower import TwoTower, TwoTowerConfig, Written, check_file, eos_ids, require

# in a template: what is literal behind a backslash, a hole, a mistake, any other letter
TEMPLATE = re.compile(r"\\(_|\{\{)|(_{3,}|\{\{[1-9][0-9]*\}\})|(__|\{\{.{0,9})|(.)", re.DOTALL)
# ftplib.FTP.voidresp of Python's standard library, which the miniature has not been trained on
DEFAULT_PROMPT = '''\
rename resp,resp received,received
def voidresp(self):
    """Expect a response beginning with '2'."""
    resp = self.getresp()
    if resp[:1] != '2':
        raise error_reply(resp)
    return resp
---
'''


class Kind(NamedTuple):
    """What a value must be, in a prompt file or on the command line, as argparse is told."""

    argparse: dict
    rule: str = ""
    holds: Callable[..., bool] = lambda value: True

    def check(self, what: str, value):
        require(self.holds(value), f"{what} is {value!r:.40}, but it must be {self.rule}")


N = {"type": int, "metavar": "N"}
COUNT = Kind(N, "an integer of 1 or more", lambda n: type(n) is int and 1 <= n < 2**31)
NATURAL = Kind(N, "an integer in [0, 2**63)", lambda n: type(n) is int and 0 <= n < 2**63)
TEXT = Kind({"metavar": "TEXT"}, "text", lambda text: isinstance(text, str))
TEXTS = Kind({}, "a list of texts", lambda texts: isinstance(texts, list) and texts
             and all(isinstance(text, str) for text in texts))

MASKS, DRAFTS, SCORE = ("mask_diffusion",), ("speculative",), ("score",)        # modes
DENOISING = (*MASKS, *DRAFTS, "mock_ar")
WRITING = (*DENOISING, "ar")
MODES = (*WRITING, *SCORE)

# what a line of a prompt file may hold beside fields of its own, which the result has too
LINE = {"text": (TEXT, MODES), "max_new_tokens": (COUNT, WRITING), "seed": (NATURAL, WRITING),
        "template": (TEXT, MASKS), "continuation": (TEXT, SCORE), "choices": (TEXTS, SCORE)}

# ------------------------------------------------------------------------------------ what goes in


def piped() -> bool:
    """Whether standard input is a pipe or a file, not a terminal or nothing."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        kind = os.fstat(sys.stdin.fileno()).st_mode
        return stat.S_ISFIFO(kind) or stat.S_ISREG(kind)
    return False


def read_prompts(args: Namespace, flags: list[str]) -> list[dict]:
    """Objects with the names of LINE, none of them checked against a tokenizer yet."""
    text, where = args.prompt, str(args.prompt_file or "")
    asked = text is not None or where != "" or args.interactive
    if "-" in (text, where) or not asked and piped():
        text, where = sys.stdin.buffer.read(), "standard input"
    elif where:
        text = args.prompt_file.read_bytes()
    if isinstance(text, bytes):                     # what is not UTF-8 is refused with its prompt
        text = text.decode("utf-8-sig", "surrogateescape").replace("\r\n", "\n")
    args.demonstrate = not (asked or text or args.plan)
    require(args.mode in MASKS or not args.demonstrate,
            f"--mode {args.mode} needs a prompt; the demonstration is of mask_diffusion")
    many = bool(where) and holds_lines(where, text)
    require(many or args.mode not in SCORE or args.plan and not text, "--mode score needs prompts "
            "as JSON lines, by --prompt-file or on standard input")
    if many:
        prompts = [read_line(line, f"{where} line {n}", args.mode, flags)
                   for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        require(prompts, f"{where} holds no prompt")
        return prompts
    return [{"text": text}] if text or asked and not args.interactive else []


def holds_lines(where: str, text: str) -> bool:
    """Whether a text is JSON lines: by its name, or because the first line is such an object."""
    if where.lower().endswith((".jsonl", ".ndjson")):
        return True
    with contextlib.suppress(ValueError, RecursionError):
        first = json.loads(text.lstrip().split("\n")[0])
        return isinstance(first, dict) and bool({"text", "prompt", "messages"} & first.keys())
    return False


def read_line(line: str, where: str, mode: str, flags: list[str]) -> dict:
    """An object of a prompt file; a continuation becomes the only one of its choices. flags: of
    sample.py, whose names are no fields of a line's own."""
    try:
        given = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    require(isinstance(given, dict) and "text" in given, f"{where} must be an object with text")
    known = {name: kind for name, (kind, modes) in LINE.items() if mode in modes}
    given = {name: value for name, value in given.items() if value is not None or name == "text"}
    require(mode not in SCORE or ("continuation" in given) != ("choices" in given),
            f"{where} must have either continuation or choices")
    for name, value in given.items():
        if name in known:
            known[name].check(f"{where}: {name}", value)
        else:                                       # a misspelling is none of the line's own
            close = get_close_matches(name, [*LINE, *flags], 1, 0.8)
            require(not close, f"{where} has {name!r}; known with --mode {mode} are "
                    + ", ".join(known))
            require(name not in RESULT, f"{where} has {name!r}, which results have; rename it")
    return given | ({"choices": [given["continuation"]]} if "continuation" in given else {})


def pieces(template: str, what: str) -> list[str | int]:
    """Texts of a template, and between them lengths of holes."""
    parts = [""]
    for literal, hole, mistake, letter in TEMPLATE.findall(template):
        require(not mistake, f"{what} has {mistake!r}, but a hole is ___ (three or more) or "
                r"{{3}}; where none is meant write \_ and \{{")
        if hole:
            parts += [len(hole) if hole[0] == "_" else int(hole[2:-2]), ""]
        else:
            parts[-1] += literal or letter
    require(len(parts) > 1, f"{what} has no hole, ___ or {{{{3}}}}, to be filled")
    return parts


def load_tokenizer(directory: Path) -> Tokenizer:
    check_file(path := directory / "tokenizer.json")
    tokenizer = tokenized(f"{path} cannot be read as a tokenizer", Tokenizer.from_file, str(path))
    tokenizer.no_truncation()               # nothing of a prompt is left out, nothing added
    tokenizer.no_padding()
    return tokenizer


def tokenized(what: str, call: Callable, *args, **options):
    """A call of tokenizers, which raises bare Exceptions, and in panic BaseExceptions."""
    try:
        return call(*args, **options)
    except (KeyboardInterrupt, SystemExit):
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


# ----------------------------------------------------------------------------------- what comes out

RESULT = ("index", "prompt", "tokens", "ended", "nfe", "context_passes", "logprobs", "settings",
          "log_likelihoods", "token_counts", "perplexity_per_token", "perplexity_per_byte", "best",
          "best_per_byte")              # what a line of results has of its own


@dataclass
class Row:
    """A prompt, and what has been written after it."""

    index: int
    prompt: str
    ids: list[int] = field(default_factory=list)
    given: list[list[int | None]] = field(default_factory=list)     # template; or what to score
    max_new_tokens: int = NEW_TOKENS
    settings: dict = field(default_factory=dict)        # all that the result depends on
    own: dict = field(default_factory=dict)             # fields of its line that are passed through
    log_likelihoods: list[float] = field(default_factory=list)
    logprobs: list[dict] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    ended: str = ""                     # why: eos, length, stop, interrupted or scored
    nfe: int = 0
    context_passes: int = 0
    before: list[int] = field(default_factory=list)     # ids whose text is whole, and what follows,
    pending: list[int] = field(default_factory=list)    # whose text may end in half a letter
    seen: str = ""                      # the text with names of special tokens, for stops, and
    places: list[int] = field(default_factory=list)     # where in the text its letters stand

    def take(self, written: Written, tokenizer: Tokenizer, eos: list[int], stops: list[str]):
        """Add new tokens, up to a stop string, or a special token of that name."""
        self.nfe, self.context_passes = written.nfe, written.context_passes
        self.before = self.before or self.ids or tokenizer.encode(self.prompt).ids
        for n, token in enumerate(written.new, 1):
            self.tokens.append(token)
            self.pending += [token] * (token not in eos)    # the last one, or inside a template
            text = text_of(tokenizer, self.pending, self.before)
            if text and text[-1] != "\ufffd" or written.ended and n == len(written.new):
                self.places += range(len(self.text), len(self.text) + len(text))
                self.text, self.before, self.pending = self.text + text, self.pending, []
                self.seen += text
            if not (text_of(tokenizer, [token]) or text_of(tokenizer, [token], self.before)):
                self.seen += tokenizer.id_to_token(token) or ""
                self.places += [len(self.text)] * (len(self.seen) - len(self.places))
            found = [self.places[self.seen.index(stop)] for stop in stops if stop in self.seen]
            found += [self.text.index(stop) for stop in stops if stop in self.text]
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
        elif self.logprobs:
            made["logprobs"] = self.logprobs
        return {"index": self.index, "prompt": self.prompt, **self.own, **made,
                "settings": self.settings}


def make_rows(prompts: list[dict], args: Namespace, tokenizer: Tokenizer | None,
              config: TwoTowerConfig, settings: dict) -> list[Row]:
    """settings: those that all rows share. Raises: ValueError for no token, or too many."""
    longest, eos = config.max_position_embeddings, eos_ids(config.eos_token_id, config.vocab_size)

    def ids_of(text: str, what: str, whole: bool = False, holes: bool = False) -> list[int | None]:
        """whole: a text of its own, before which the tokenizer may put a token. None is a hole."""
        require(not re.search("[\ud800-\udfff]", text), f"{what} is not valid UTF-8")
        ids = []
        for part in pieces(text, what) if holes else [text]:
            ids += [None] * min(part, longest) if isinstance(part, int) else tokenized(
                f"{what} cannot be encoded by tokenizer.json",
                tokenizer.encode, part, add_special_tokens=whole).ids
        if whole and args.mode in SCORE:            # nothing is what stands before a first text
            ids = ids or eos[:1]
        require(ids, f"{what} holds no token")
        most = max(token or 0 for token in ids)
        require(most < config.vocab_size,
                f"{what} has id {most}, but the model's vocab_size is {config.vocab_size}; "
                "tokenizer.json is not this model's")
        return ids

    rows, copies = [], args.num_samples
    for n, prompt in enumerate(prompts):
        which = f"prompt {n}" if len(prompts) > 1 else "the prompt"
        text, choices = prompt["text"], prompt.get("choices", [])
        text += "\n" * (args.checkpoint is None and text != "" and text[-1] != "\n")
        template = prompt.get("template", args.template)
        ids = ids_of(text, which, whole=True)
        given = ([ids_of(one, f"a choice of {which}") for one in choices] or
                 [ids_of(one, f"the template of {which}", holes=True)
                  for one in [template] if one is not None])
        most = max(map(len, given), default=0)
        new = prompt.get("max_new_tokens", args.max_new_tokens) or most or NEW_TOKENS
        require(most <= new, f"the template of {which} has {most} tokens, more than the {new} of "
                "--max-new-tokens")
        require(len(ids) + new <= longest, f"{which} has {len(ids)} tokens, which with {new} more "
                f"is above max_position_embeddings {longest}; shorten it"
                + " or lower --max-new-tokens" * (not choices))
        own = {name: value for name, value in prompt.items() if name not in LINE}
        for copy in range(copies):
            seed = None if args.seed is None else prompt["seed"] + copy if "seed" in prompt else (
                args.seed + n * copies + copy)
            rows.append(Row(len(rows), text, ids, given, new, settings | (
                {"choices": choices} if choices else
                {"max_new_tokens": new, "seed": seed, "template": template}), own))
    return rows


def write_rows(model: TwoTower, tokenizer: Tokenizer, mode: str, prompts: list[list[int]],
               max_new_tokens: int, stops: Sequence[str] = (),
               on_end: Callable[[Row], None] = lambda row: None, **knobs) -> list[Row]:
    """What a mode writes after prompts of ids, each up to an EOS or before the first of the stops;
    on_end is told of each row when it is done. knobs: of the mode."""
    rows = [Row(index, "", list(ids)) for index, ids in enumerate(prompts)]
    eos = eos_ids(model.config.eos_token_id, model.config.vocab_size)

    def on_tokens(written: Written) -> bool:
        row = rows[written.row]
        row.take(written, tokenizer, eos, stops)
        if row.ended:
            on_end(row)
        return row.ended == "stop"

    getattr(model, f"generate_{mode}")(prompts, max_new_tokens, eos_token_id=eos or None,
                                       on_tokens=on_tokens, **knobs)
    return rows


def finished(path: Path, rows: list[Row]) -> tuple[int, tuple[int, int]]:
    """How many results an interrupted run left in the file, and the bytes of it and of them.

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
    return len(lines), (len(data), len(data) - len(rest))
