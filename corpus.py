"""What the miniature reads: five tasks whose answers can be checked exactly (bills, sorting,
records to JSON, letters, classes), the standard library of the running Python, and a byte-level
BPE tokenizer of both, by which any text round-trips.

One prompt in 16, by its CRC, and one library file in 16, by the CRC of its name, are held out.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import platform
import random
import sysconfig
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from twotower import write

# ---------------------------------------------------------------------------------------------
# Tasks and library

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
    names = [path.relative_to(root).as_posix() for path in sorted(root.rglob("*.py"))]
    names = [name for name in names if not skip & set(name.split("/"))
             and (zlib.crc32(name.encode()) % 16 == 0) == held_out]
    return [(root / name).read_text(encoding="utf-8", errors="replace") for name in names[::every]]


# ---------------------------------------------------------------------------------------------
# The tokenizer

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


def prepare(path: Path, vocab_size: int, every_file: int):
    """Say what the corpus is; train and save the tokenizer if it is not there."""
    texts = library(every=every_file)
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    print(f"Python {platform.python_version()}: {len(texts)} library files, "
          f"{sum(map(len, texts))} characters, sha256 {digest[:16]}", flush=True)
    if not path.exists():
        items = [prompt + answer for task in TASKS
                 for prompt, answer in itertools.islice(task_items(task, "tokenizer"), 20000)]
        tokenizer = train_tokenizer(texts[::4] + items, vocab_size)
        write({path: lambda partial: partial.write_text(tokenizer.to_str(True), "utf-8")})


# ---------------------------------------------------------------------------------------------
# Held-out prompts and texts as token ids, to measure with


def task_prompts(tokenizer, task: str, count: int, seed: str = "bench") -> list:
    """(prompt ids, right answer, how many tokens to ask for) of each item."""
    return [(torch.tensor(tokenizer.encode(prompt).ids), text, 96)
            for prompt, text in itertools.islice(task_items(task, seed, held_out=True), count)]


def library_prompts(tokenizer, count: int) -> list:
    """Held-out source, cut within a line; right if the line's last quarter is written as it was."""
    rng, files, items = random.Random("library"), library(held_out=True), []
    while len(items) < count:
        text = rng.choice(files)
        start = rng.randrange(max(1, len(text) - 400))
        end = text.find("\n", start + 300)
        line = text[:end].rpartition("\n")[2]
        if end >= 0 and len(line.strip()) >= 20:
            cut = end - len(line.lstrip()) // 4
            prompt = tokenizer.encode(text[start:cut]).ids
            items.append((torch.tensor(prompt), text[cut:end + 1], 32))
    return items


def texts_with_holes(tokenizer, count: int) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """By kind of text (prompt, text) pairs of ids: answers to their prompts; records after another
    record in place of their prompt; library source."""
    def ids(text: str) -> Tensor:
        return torch.tensor(tokenizer.encode(text).ids)

    texts = {task: [(prompt, ids(text))
                    for prompt, text, _ in task_prompts(tokenizer, task, count, "templates")]
             for task in TASKS}
    records, eos = [record for _, record in texts["json"]], tokenizer.token_to_id(EOS)
    texts["json, no prompt"] = [(F.pad(other, (0, 16 - len(other) % 16), value=eos), record)
                                for other, record in zip(records[-1:] + records, records)]
    rng, source, texts["library"] = random.Random("templates"), library(held_out=True), []
    while len(texts["library"]) < count:
        text = rng.choice(source)
        start = rng.randrange(max(1, len(text) - 600))
        piece = ids(text[start:start + 600])
        if len(piece) >= 144:
            texts["library"].append(piece[:144].split([128, 16]))
    return texts


# ---------------------------------------------------------------------------------------------
# Rows to train on


class Data:
    """Rows of M tokens and which of them are targets: learned, and masked in phase 2.

    A library row is a window of source text, all of it targets. A task row holds items, each as
    prompt, answer and </s>. Every answer begins a block, as it does when decoding: as much library
    text as that takes is put before the prompt, random so that nothing can depend on it (but some
    rows begin with a prompt, as generation does, wherever that puts the answer), and </s> fills
    its last block. Targets are answers and the </s> after them. In phase 2 some rows leave out the
    prompts, so that what stands to the right of a mask is worth reading. `recipe`, a Recipe of
    train.py, says how many of each.
    """

    def __init__(self, tokenizer: Tokenizer, every_file: int, seed: int):
        self.tokenizer, self.seed = tokenizer, seed
        self.eos = tokenizer.token_to_id(EOS)
        self.streams, digest = {}, hashlib.sha256(tokenizer.to_str().encode())
        for held_out in (False, True):
            texts = library(held_out, every_file)
            digest.update("\0".join(texts).encode())
            files = tokenizer.encode_batch(texts)
            self.streams[held_out] = torch.tensor(
                [token for file in files for token in [*file.ids, self.eos]])
        self.digest = digest.hexdigest()

    def library_row(self, rng: random.Random, row: int, held_out: bool):
        stream = self.streams[held_out]
        start = rng.randrange(len(stream) - row)
        return stream[start:start + row], torch.ones(row, dtype=torch.bool)

    def task_row(self, recipe, rng: random.Random, items, held_out: bool):
        tokens, targets, Q = [], [], recipe.block_size
        draw = rng.random()
        aligned = draw >= recipe.unaligned
        prompted = held_out or draw < 1 - recipe.unprompted
        while len(tokens) <= recipe.row:
            prompt, answer = (self.tokenizer.encode(text).ids for text in next(items))
            prompt = prompt if prompted else []
            fill = -(len(tokens) + len(prompt)) % Q if tokens or aligned else 0
            rest = Q - (len(tokens) + fill + len(prompt) + len(answer)) % Q
            before = self.library_row(rng, recipe.row, held_out)[0][:fill].tolist()
            tokens += before + prompt + answer + [self.eos] * rest
            targets += [False] * (fill + len(prompt)) + [True] * (len(answer) + rest)
        # the item that did not fit is cut: what there is of it is learned all the same
        return torch.tensor(tokens[:recipe.row]), torch.tensor(targets[:recipe.row])

    def batch(self, recipe, step: int, held_out: bool = False,
              only: str | None = None) -> tuple[Tensor, Tensor]:
        """tokens (rows, M) int64 and targets (rows, M) bool; the same for the same step.

        only: a task, or "library", for all rows.
        """
        rng = random.Random(f"{self.seed} {recipe.phase} {step} {held_out}")
        turns = [turns for first, turns in recipe.turns if first <= step][-1]
        drawn = []
        for r in range(recipe.rows):
            kind = only or ("library" if r % recipe.library_every == 0 else
                            turns[(step * recipe.rows + r) % len(turns)])
            if kind == "library":
                drawn.append(self.library_row(rng, recipe.row, held_out))
            else:
                items = task_items(kind, str(rng.random()), held_out)
                drawn.append(self.task_row(recipe, rng, items, held_out))
        tokens, targets = zip(*drawn)
        return torch.stack(tokens), torch.stack(targets)
