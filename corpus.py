"""What is learned from: text of one's own (`Text`), or what the miniature reads. That is tasks
whose answers can be checked exactly, three made from words (sorting, records to JSON, letters) and
two on real source (a variable renamed, a line edited); the standard library of the running Python;
and a byte-level BPE tokenizer, by which any text round-trips. Of the miniature's, one prompt in 16,
by its CRC, and one library file in 16, by the CRC of its name, are held out.
"""

from __future__ import annotations

import ast
import bisect
import functools
import hashlib
import itertools
import json
import keyword
import math
import platform
import random
import re
import sysconfig
import textwrap
import zlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from twotower import of_blocks, write

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


def sort(rng: random.Random, held_out: bool) -> tuple[str, str]:
    lines = [f"{number} {rng.choice(COLORS)} {item}"
             for number, item in enumerate(rng.sample(ITEMS, rng.randint(5, 8)), 1)]
    return ", ".join(rng.sample(lines, len(lines))), "\n".join(lines)


def to_json(rng: random.Random, held_out: bool) -> tuple[str, str]:
    record = {"name": rng.choice(NAMES), "age": rng.randrange(10, 100), "city": rng.choice(CITIES),
              "color": rng.choice(COLORS), "job": rng.choice(JOBS), "day": rng.choice(DAYS),
              "count": rng.randrange(10, 100), "item": rng.choice(ITEMS)}
    fields = rng.sample(sorted(record), rng.randint(4, 6))
    record = {field: record[field] for field in fields}
    return " ".join(f"{field}={value}" for field, value in record.items()), json.dumps(record)


def letter(rng: random.Random, held_out: bool) -> tuple[str, str]:
    name, city, day, item = (rng.choice(words) for words in (NAMES, CITIES, DAYS, ITEMS))
    count, code = rng.randrange(10, 100), rng.randrange(1000, 10000)
    return (f"code={code} count={count} item={item} name={name} city={city} day={day}",
            f"Dear {name},\nyour order {code} of {count} {item} will leave on {day}.\n"
            f"We send all {count} {item} to you in {city}.\n"
            f"If they are not there a week after {day}, call us and give the number {code}.")


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


WORD, NAME = re.compile(r"\w+"), re.compile(r"(?<![.\w])[a-zA-Z_]\w*")    # NAME: no attribute


class Function(NamedTuple):
    text: str                       # its source, not indented, without decorators
    variables: tuple[str, ...]      # of its parameters and variables, those that can be renamed


@functools.cache
def sources(held_out: bool) -> tuple[list[str], list[int], str]:
    """library(), its lengths summed, and, if held out, the text that it must not share."""
    files = library(held_out)
    return files, list(itertools.accumulate(map(len, files))), "".join(library() * held_out)


@functools.cache
def source_lines(file: int) -> list[str]:
    return sources(False)[0][file].split("\n")


@functools.cache
def functions(file: int, held_out: bool) -> list[Function]:
    """The functions of a library file that have LENGTHS characters and no copy on the other side of
    the split."""
    files, _, others = sources(held_out)
    lines, found = files[file].splitlines(keepends=True), []
    try:
        tree = ast.parse(files[file])
    except (SyntaxError, ValueError):
        return []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            source = "".join(lines[node.lineno - 1:node.end_lineno]).rstrip()
            text = textwrap.dedent(source)
            if len(text) in LENGTHS and text.isascii() and source not in others:
                found.append(Function(text, renamable(node, text)))
    return found


def renamable(node: ast.FunctionDef, text: str) -> tuple[str, ...]:
    """Parameters and variables, used at least once, that are all there is of their names in it: no
    attribute, keyword, string or comment has one of them."""
    names = Counter(name.arg if isinstance(name, ast.arg) else name.id for name in ast.walk(node)
                    if isinstance(name, (ast.arg, ast.Name)))
    own = {name.arg if isinstance(name, ast.arg) else name.id for name in ast.walk(node)
           if isinstance(name, ast.arg) or isinstance(getattr(name, "ctx", None), ast.Store)
           and isinstance(name, ast.Name)} - {"self", "cls"}
    words = Counter(WORD.findall(text))
    return tuple(name for name in sorted(own) if words[name] == names[name] > 1)


def window(rng: random.Random, lines: list[str]) -> Function:
    """Some lines of a file, read as if they were a function: of those there are too few to learn
    from, and they would be learned by heart."""
    while True:
        at, size = rng.randrange(len(lines)), rng.randrange(50, LENGTHS[-1])
        piece = textwrap.dedent("\n".join(lines[at:at + 1 + size // 10])).strip("\n")
        piece = piece[:size].rpartition("\n")[0].rstrip()
        if len(piece) >= 40 and "\n" in piece and piece.isascii():
            words, names = Counter(WORD.findall(piece)), Counter(NAME.findall(piece))
            return Function(piece, tuple(sorted(
                name for name, count in names.items()
                if not keyword.iskeyword(name) and count == words[name] > 1)))


def draw_functions(rng: random.Random, held_out: bool) -> list[Function]:
    """Those of a file, drawn by its length; to train on, in half of the cases windows of it."""
    files, ends, _ = sources(held_out)
    while True:
        file = bisect.bisect(ends, rng.randrange(ends[-1]))
        if not held_out and len(files[file]) > 2000 and rng.random() < 0.5:
            lines = source_lines(file)
            return [window(rng, lines) for _ in range(3)]
        found = functions(file, held_out)
        if len(found) > 1:
            return found


def rename(rng: random.Random, held_out: bool) -> tuple[str, str]:
    """A variable of a function renamed to one that the file has elsewhere. The prompt has both
    names twice, after a space and without, since those are other tokens."""
    while True:
        found = draw_functions(rng, held_out)
        text, variables = rng.choice(found)
        names = sorted({name for function in found for name in function.variables}
                       - set(WORD.findall(text)))
        if variables and names:
            old, new = rng.choice(variables), rng.choice(names)
            return f"{old},{old} {new},{new}\n{text}\n---", re.sub(rf"\b{old}\b", new, text)


def edit(rng: random.Random, held_out: bool) -> tuple[str, str]:
    """A line of a function replaced by one of another function of the file, equally indented."""
    while True:
        found = draw_functions(rng, held_out)
        (text, _), (other, _) = rng.sample(found, 2)
        lines = text.split("\n")
        at = rng.randrange(1, len(lines))
        new = [line for line in other.split("\n")[1:] if line.strip() and indent(line) ==
               indent(lines[at]) and line not in lines]
        if new and lines[at].strip() and lines.count(lines[at]) == 1:
            line = rng.choice(new)
            return (f"@@\n-{lines[at]}\n+{line}\n{text}\n---",
                    "\n".join(lines[:at] + [line] + lines[at + 1:]))


def indent(line: str) -> int:
    return len(line) - len(line.lstrip())


LENGTHS = range(120, 401)           # characters of a function: about 40 to 160 tokens
FROM_WORDS = {"sort": sort, "json": to_json, "letter": letter}
FROM_SOURCE = {"rename": rename, "edit": edit}
TASKS = FROM_WORDS | FROM_SOURCE


def task_items(task: str, seed: str, held_out: bool = False):
    """Endless (prompt, answer) pairs. Held out from training are, of tasks made from words, one
    prompt in 16, by its CRC; of tasks on source, the files that `library` holds out."""
    rng = random.Random(f"{task} {seed}")
    while True:
        prompt, answer = TASKS[task](rng, held_out)
        prompt = f"{task} {prompt}\n"
        if task in FROM_SOURCE or (zlib.crc32(prompt.encode()) % 16 == 0) == held_out:
            yield prompt, answer


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
        items = [prompt + answer for task in FROM_WORDS
                 for prompt, answer in itertools.islice(task_items(task, "tokenizer"), 20000)]
        tokenizer = train_tokenizer(texts[::4] + items, vocab_size)
        write({path: lambda partial: partial.write_text(tokenizer.to_str(True), "utf-8")})


# ---------------------------------------------------------------------------------------------
# Held-out prompts and texts as token ids, to measure with


def task_prompts(tokenizer, task: str, count: int, seed: str = "bench") -> list:
    """(prompt ids, right answer, how many tokens to ask for) of each item."""
    most = 224 if task in FROM_SOURCE else 96
    return [(torch.tensor(tokenizer.encode(prompt).ids), text, most)
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


HARNESS_TASK = r"""task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {task}.jsonl          # read from this folder
test_split: test
output_type: generate_until
doc_to_text: prompt
doc_to_target: answer
target_delimiter: ""
generation_kwargs:
  until: ["{eos}"]
  max_gen_toks: {most}
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
# of a line of source only its end is compared, without white space around it
FIRST_LINE = r"""filter_list:
  - name: line
    filter:
      - function: regex
        regex_pattern: "^([^\n]*)"
      - function: take_first
"""


def write_tasks(folder: Path, tokenizer, tasks: Sequence[str], items: int = 200):
    """Held-out items of tasks, and of library source, as tasks of lm-evaluation-harness."""
    made = {task: task_prompts(tokenizer, task, items) for task in tasks}
    made["library"] = [(prompt, text.strip(), most)
                       for prompt, text, most in library_prompts(tokenizer, items)]
    files = {}
    for task, found in made.items():
        files[folder / f"{task}.yaml"] = FIRST_LINE * (task == "library") + HARNESS_TASK.format(
            task=task, eos=EOS, most=found[0][2])
        files[folder / f"{task}.jsonl"] = "".join(json.dumps(
            {"prompt": tokenizer.decode(prompt.tolist()), "answer": text}) + "\n"
            for prompt, text, _ in found)
    folder.mkdir(exist_ok=True)
    write({path: lambda partial, text=text: partial.write_text(text, "utf-8")
           for path, text in files.items()})


# ---------------------------------------------------------------------------------------------
# Rows to train on


class Data:
    """Rows of M tokens and which of them are targets: learned, and masked in phase 2.

    A library row is a window of source text, all of it targets. A task row holds items, each as
    prompt, answer and </s>, which fills the last block. Before the prompt stands random library
    text, so that nothing can depend on it: as much as makes the answer begin a block, as it does
    when decoding; in the recipe's `unaligned` share of the rows any number of tokens, since blocks
    of another size begin elsewhere. Targets are answers and the </s> after them. In phase 2 some
    rows leave out the prompts, so that what stands to the right of a mask is worth reading.
    `recipe`, a Recipe of train.py, says how many of each. workers: processes that make the rows of
    the next steps meanwhile.
    """

    def __init__(self, tokenizer: Tokenizer, every_file: int, seed: int, workers: int = 0):
        self.tokenizer, self.seed, self.workers, self.coming = tokenizer, seed, workers, None
        self.eos = tokenizer.token_to_id(EOS)
        self.streams, digest = {}, hashlib.sha256(tokenizer.to_str().encode())
        for held_out in (False, True):
            texts = library(held_out, every_file)
            digest.update("\0".join(texts).encode())
            files = tokenizer.encode_batch(texts)
            self.streams[held_out] = torch.tensor(
                [token for file in files for token in [*file.ids, self.eos]])
        self.digest = digest.hexdigest()

    def kinds(self, recipe) -> tuple[str, ...]:
        """Of held-out rows that are measured apart."""
        return "library", *recipe.tasks()

    def library_row(self, rng: random.Random, row: int, held_out: bool):
        stream = self.streams[held_out]
        start = rng.randrange(len(stream) - row)
        return stream[start:start + row], torch.ones(row, dtype=torch.bool)

    def task_row(self, recipe, rng: random.Random, items, held_out: bool):
        tokens, targets, Q = [], [], recipe.block_size
        draw = rng.random()
        aligned = draw >= recipe.unaligned
        prompted = held_out or draw < 1 - recipe.unprompted
        for prompt, answer in itertools.islice(items, 12):
            prompt, answer = self.tokenizer.encode(prompt).ids, self.tokenizer.encode(answer).ids
            prompt = prompt if prompted else []
            start = -len(prompt) % Q if aligned else rng.randrange(Q) if tokens else 0
            rest = Q - (start + len(prompt) + len(answer)) % Q
            if tokens and len(tokens) + start + len(prompt) + len(answer) + rest > recipe.row:
                continue
            before = self.library_row(rng, recipe.row, held_out)[0][:start].tolist()
            tokens += before + prompt + answer + [self.eos] * rest
            targets += [False] * (start + len(prompt)) + [True] * (len(answer) + rest)
        # the first item may be cut: what there is of it is learned all the same
        left = max(0, recipe.row - len(tokens))
        return (torch.tensor((tokens + [self.eos] * left)[:recipe.row]),
                torch.tensor((targets + [False] * left)[:recipe.row]))

    def batch(self, recipe, step: int, held_out: bool = False, only: str | None = None,
              mine: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """tokens (rows, M) int64 and targets (rows, M) bool; the same for the same step.

        only: one of `kinds`, for all rows. mine: the rows wanted.
        """
        if self.workers and not held_out:
            if self.coming is None or self.next != (recipe.phase, step):
                made = Ahead(self, recipe, mine)
                self.coming = iter(DataLoader(made, None, sampler=range(step, recipe.steps),
                                              num_workers=self.workers, prefetch_factor=4))
            self.next = recipe.phase, step + 1
            return next(self.coming)
        return self.make(recipe, step, held_out, only, mine)

    def make(self, recipe, step: int, held_out: bool, only: str | None, mine: slice):
        rng = random.Random(f"{self.seed} {recipe.phase} {step} {held_out}")
        words = [kind for kind in recipe.turns if kind in FROM_WORDS]
        drawn = []
        for r in range(step * recipe.rows, (step + 1) * recipe.rows):
            kind = only or ("library" if r % recipe.library_every == 0 else
                            recipe.turns[r % len(recipe.turns)])
            if kind == "library":
                drawn.append(self.library_row(rng, recipe.row, held_out))
            else:
                seed = str(rng.random())
                items = task_items(kind, seed, held_out)
                if kind in FROM_SOURCE and not only:        # of which few fill a row
                    others = *FROM_SOURCE, *FROM_SOURCE, rng.choice(words)
                    items = [next(items)] + [next(task_items(other, f"{seed} {i}", held_out))
                                             for i, other in enumerate(others)]
                drawn.append(self.task_row(recipe, rng, items, held_out))
        tokens, targets = zip(*drawn)
        return torch.stack(tokens)[mine], torch.stack(targets)[mine]


class Ahead(Dataset):
    """The batches of `Data` by step, for worker processes."""

    def __init__(self, data: Data, recipe, mine: slice):
        self.data, self.recipe, self.mine = data, recipe, mine

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        return self.data.make(self.recipe.at(step), step, False, None, self.mine)


# ---------------------------------------------------------------------------------------------
# Rows of one's own text


PIECE = 2**16                       # bytes: a text file is read as documents of about this size


def documents(path: Path):
    """(first byte, last byte + 1, CRC) of each document of a file: a line of JSONL, or a piece of
    text that ends with a line. Raises: ValueError naming the line that is no such thing."""
    start = end = crc = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                if line.strip() and path.suffix == ".jsonl":
                    parse_line(line)
                line.decode()
            except ValueError as error:
                what = "not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
                raise ValueError(f"{path} line {number}: {what}") from None
            end, crc = end + len(line), zlib.crc32(line, crc)
            if path.suffix == ".jsonl" or end - start >= PIECE:
                if line.strip():
                    yield start, end, crc
                start, crc = end, 0
    if end > start:
        yield start, end, crc


def parse_line(line: bytes) -> tuple[str, str]:
    """A prompt, empty for plain text, and what is to be learned."""
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    for names in (("text",), ("prompt", "answer")):
        if isinstance(found, dict) and all(isinstance(found.get(name), str) for name in names):
            return found.get("prompt", "") if len(names) > 1 else "", found[names[-1]]
    raise ValueError('not an object with "text", or with "prompt" and "answer"')


class Text:
    """Rows of M tokens packed from documents of one's own files, each closed by an end token, and
    which of them are targets: all of a text, of a prompt and its answer the answer.

    Row r of every step reads on where it was, through the documents that are its own in an epoch: a
    permutation by seed and epoch, dealt out in turn. So a process tokenises its rows alone, and
    where a row stands, `cursor` (rows, 3) int64 (epoch, document, token), is a function of the step
    however many processes there are. The next step's rows are made while this one's are used.

    valid: the files held out; without them one document in 32, by its CRC, or else that of the
    least CRC. Raises: ValueError for what cannot be read, or holds nothing.
    """

    def __init__(self, tokenizer: Tokenizer, eos: int, files: list[Path], valid: list[Path],
                 seed: int):
        self.tokenizer, self.eos, self.seed, self.paths = tokenizer, eos, seed, [*files, *valid]
        digest, found = hashlib.sha256(tokenizer.to_str().encode()), []
        for number, path in enumerate(self.paths):
            own = [(number, *place) for place in documents(path)]
            if not own:
                raise ValueError(f"{path} holds no text")
            found += own
        places = torch.tensor(found)                            # (documents, 4)
        self.digest = (digest.update(places.numpy().tobytes()), digest.hexdigest())[1]
        held = places[:, 0] >= len(files)
        if not valid:
            held = places[:, 3] % 32 == 0
            held[places[:, 3].argmin()] = True
            if held.all():
                raise ValueError(f"{files[0]} is a single document; give --valid another")
        self.places = {side: places[held == side, :3] for side in (False, True)}
        self.step, self.cursor, self.coming = 0, None, {}
        self.worker = ThreadPoolExecutor(1)                     # tokenizers work without the GIL

    def kinds(self, recipe) -> tuple[str, ...]:
        return ("text",)

    @functools.lru_cache(maxsize=8)
    def order(self, epoch: int, held_out: bool) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 10**6 + epoch)
        return torch.randperm(len(self.places[held_out]), generator=generator)

    @functools.lru_cache(maxsize=256)
    def document(self, number: int, held_out: bool) -> tuple[list[int], int]:
        """Its ids, and how many of them are its prompt's."""
        file, start, end = self.places[held_out][number].tolist()
        with open(self.paths[file], "rb") as source:
            source.seek(start)
            content = source.read(end - start)
        if self.paths[file].suffix != ".jsonl":
            return [*self.tokenizer.encode(content.decode()).ids, self.eos], 0
        prompt, text = parse_line(content)
        before = self.tokenizer.encode(prompt).ids if prompt else []
        after = self.tokenizer.encode(text, add_special_tokens=not prompt).ids
        return [*before, *after, self.eos], len(before)

    def row(self, r: int, rows: int, M: int, at: list[int], held_out: bool):
        """The next M tokens of row r, which are targets, and where it then stands."""
        (epoch, place, offset), tokens, targets = at, [], []
        while len(tokens) < M:
            order = self.order(epoch, held_out)
            index = (r - epoch) % rows + place * rows           # each epoch deals to another first
            if index >= len(order):
                epoch, place = epoch + 1, 0
                continue
            ids, prompt = self.document(int(order[index]), held_out)
            new = ids[offset:offset + M - len(tokens)]
            tokens += new
            targets += [token >= prompt for token in range(offset, offset + len(new))]
            offset += len(new)
            if offset == len(ids):
                place, offset = place + 1, 0
        return tokens, targets, [epoch, place, offset]

    def read(self, rows: int, M: int, mine: slice, cursor: Tensor, held_out: bool):
        drawn, cursor = [], cursor.clone()
        for r in range(rows)[mine]:
            *row, at = self.row(r, rows, M, cursor[r].tolist(), held_out)
            drawn.append(row)
            cursor[r] = torch.tensor(at)
        tokens, targets = zip(*drawn)
        return torch.tensor(tokens), torch.tensor(targets), cursor

    def batch(self, recipe, step: int, held_out: bool = False, only: str | None = None,
              mine: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """As of `Data`. Held-out rows begin at the same place whenever step is 0."""
        start, read = torch.zeros(recipe.rows, 3, dtype=torch.long), (recipe.rows, recipe.row, mine)
        if held_out:
            for _ in range(step + 1):
                tokens, targets, start = self.read(*read, start, True)
            return tokens, targets
        if self.cursor is None or self.step > step:
            self.step, self.cursor, self.coming = 0, start, {}
        while self.step <= step:                # all but once the next step is the one asked for
            coming = self.coming.pop(self.step, None) or self.worker.submit(
                self.read, *read, self.cursor, False)
            tokens, targets, self.cursor = coming.result()
            self.step += 1
        self.coming = {self.step: self.worker.submit(self.read, *read, self.cursor, False)}
        return tokens, targets


# ---------------------------------------------------------------------------------------------
# What of the rows is masked, and what is learned


def draw_noise(recipe, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which of a step's tokens to mask if they are targets, (B, M) bool, and t (B,) or, per block,
    (B, n)."""
    B, M, Q = recipe.rows, recipe.row, recipe.block_size
    t = 0.001 + 0.999 * torch.rand((B, M // Q) if recipe.t_per == "block" else B,
                                   generator=generator)
    if recipe.full_masks:
        t[torch.rand(t.shape, generator=generator) < recipe.full_masks] = 1.0
    p = per_token(t, M)
    if recipe.slope:        # later positions of a block are masked more often, for the same mean
        p = p + recipe.slope * p * (1 - p) * torch.linspace(-1, 1, Q).repeat(M // Q)
    return torch.rand(B, M, generator=generator) < p, t


def choose_blocks(masked: Tensor, Q: int, share: float, draw: Tensor) -> Tensor:
    """masked (B, M), draw (B, n) in [0, 1) -> (B, k) int64: a share of each row's blocks,
    preferably those with masks."""
    order = masked.view(len(masked), -1, Q).any(2) + draw
    return order.topk(math.ceil(share * order.shape[1])).indices.sort().values


def per_token(t: Tensor, M: int) -> Tensor:
    """t (B,) or (B, n) -> (B, M)."""
    t = t.view(len(t), -1)
    return t.repeat_interleave(M // t.shape[1], dim=1)


class Reading(NamedTuple):
    """One way to read a step's sequences: what a tower is given, and what it is to predict."""

    tokens: Tensor                  # (B, M) int64
    labels: Tensor                  # (B, L) int64, L of the blocks that are denoised, or M - 1
    wanted: Tensor                  # (B, L) bool: where a label is learned
    noisy: Tensor | None = None     # (B, M); None: the context tower reads, as AR
    t: Tensor | None = None         # (B,) or (B, n); None: no time conditioning, as mock-AR
    block_size: int = 1
    blocks: Tensor | None = None    # (B, k): those that are denoised
    weight: Tensor | None = None    # (B, L), of its loss

    def rows(self, rows: Tensor) -> Reading:
        return Reading(*(part[rows] if isinstance(part, Tensor) else part for part in self))


def readings(recipe, tokens: Tensor, targets: Tensor, step: int, seed: int, mask: int,
             mine: slice = slice(None)) -> dict[str, Reading]:
    """How a step's sequences are read. tokens, targets (B, M): this process's rows of the step,
    `mine`; everything is drawn for all rows, so that it does not depend on the processes."""
    found, generator = {}, torch.Generator().manual_seed(seed * 10**6 + step)
    weight = torch.ones(tokens.shape)
    weight[targets.all(1)] = recipe.library_weight              # no other row with prompts is
    if recipe.phase == 2:
        Q, M = recipe.block_size, recipe.row
        noise, t = draw_noise(recipe, generator)
        masked, t = targets & noise[mine], t[mine]
        draw = torch.rand(recipe.rows, M // Q, generator=generator)[mine]
        blocks = choose_blocks(masked, Q, recipe.denoised, draw)
        read = functools.partial(of_blocks, blocks=blocks, n=M // Q)
        found["masked"] = Reading(
            tokens, read(tokens), read(masked), tokens.masked_fill(masked, mask), t, Q, blocks,
            read(weight / per_token(t, M) if recipe.weight == "1/t" else weight))
        some = also_ar(recipe, step)
        if some.any():
            wanted = F.pad(targets[:, 1:], (0, 1)) & some[mine, None]       # token l predicts l + 1
            draw = torch.rand(recipe.rows, M, generator=generator)[mine]
            blocks = choose_blocks(wanted, 1, recipe.denoised / 2, draw)
            read = functools.partial(of_blocks, blocks=blocks, n=M)
            found["mock"] = Reading(tokens, read(tokens.roll(-1, 1)), read(wanted), tokens,
                                    blocks=blocks, weight=read(weight))
    if recipe.phase == 1 or recipe.tied or recipe.joint:
        found["ar"] = Reading(tokens, tokens[:, 1:], targets[:, 1:], weight=weight[:, 1:])
    return found


def also_ar(recipe, step: int) -> Tensor:
    """Which of a step's sequences (rows,) the denoiser also learns as an AR model: the share of
    them, evenly over all steps."""
    before = torch.arange(step * recipe.rows, (step + 1) * recipe.rows + 1) * recipe.mock_ar
    return before.double().round(decimals=9).ceil().diff() > 0
