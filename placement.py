"""Where a checkpoint goes, and how much memory that takes: worked out before a tensor is read, of a
checkpoint on the Hugging Face Hub before one is fetched."""

import contextlib
import errno
import inspect
import json
import shutil
from argparse import Namespace
from bisect import bisect_right
from dataclasses import replace
from itertools import product
from pathlib import Path

import psutil
import torch

from twotower import (LOGITS_PER_DRAW, TOKENS_PER_PASS, Context, TwoTower, TwoTowerConfig,
                      check_device, fetch, require, shard_names)

SCORED_AT_ONCE = inspect.signature(TwoTower.score).parameters["tokens_per_pass"].default
NEW_TOKENS = 128


def devices(args: Namespace, denoising: bool) -> list[str]:
    """The context tower's device, and the denoiser's in modes that have one."""
    first = args.context_device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    beside = torch.cuda.device_count() > 1 and first in ("cuda", "cuda:0")
    second = args.denoiser_device or ("cuda:1" if beside else first)
    places = [check_device(place) for place in [first, second][:1 + denoising]]
    require("meta" not in places, "device meta cannot be used: it holds no data")
    require(not args.graphs or len(set(places)) == 1, "--graphs needs both towers on one device; "
            "give --context-device and --denoiser-device")
    return places


def memory(model: TwoTower, rows: int, length: int, width: int, places: list[str],
           read: int | None = None, mode: str = "mask_diffusion", drawn: bool = False) -> dict:
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
    if mode == "score":       # a row's alone, and their log-softmax
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
    # one expert's integers, its weight in float32 and in the model's dtype
    moe += 8 * c.hidden_size * c.moe_intermediate_size * (c.experts is not None)
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


def plan(model: TwoTower, rows: list, args: Namespace, knobs: dict,
         places: list[str]) -> tuple[dict, str]:
    """What goes where, for a batch of the longest rows, by device: bytes by purpose, and in words;
    and what would fit, if that does not."""
    scoring, longest = args.mode == "score", model.config.max_position_embeddings
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

    table = {place: {"holds": " and ".join(f"{tower} tower" for tower, at in zip(
        ("context", "denoiser"), places) if at == place), **parts, "rows": batch, "length": length}
        for place, parts in needed(batch, places).items()}
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
        return table, f"{table[place]['holds']} on {place} would not fit; what would: {way}"
    return table, ""


def in_words(table: dict, disk: dict, model: TwoTower | None = None) -> list[str]:
    """A line for each device of a plan, one for the disk, and of a model its `on_one_gpu`."""
    def sizes(parts: dict) -> str:
        return ", ".join(f"{what} {readable(nbytes)}" for what, nbytes in parts.items()
                         if what not in ("holds", "rows", "length"))

    return [f"{place}: {parts['holds']}: {sizes(parts)} for {parts['rows']} rows of "
            f"{parts['length']} tokens" for place, parts in table.items()
            ] + ["disk: " + sizes(disk)] * bool(disk) + (on_one_gpu(model) if model else [])


def on_one_gpu(model: TwoTower) -> list[str]:
    """A line for each form of a large model's experts: what one GPU could hold beside it."""
    c, dtype, lines = model.config, model.context_lm_head.weight.dtype, []
    both, large = model.denoiser_tower is not None, 10**10 < sum(
        tensor.nbytes for tensor in model.state_dict().values())
    kinds = (None, "int8", "int4")[:2 + (c.hidden_size % 64 == c.moe_intermediate_size % 64 == 0)]
    for kind in kinds if large and "E" in c.hybrid_override_pattern else ():
        with torch.device("meta"):
            held = TwoTower(replace(c, experts=kind), towers="both" if both else "context")
            held.to(dtype)

        def needed(rows: int, length: int) -> int:
            return memory(held, rows, length, 16, ["cpu"] * (1 + both))["cpu"]["together"]

        line = f"experts in {kind or str(dtype)[6:]}: "
        for size in (80, 48):               # GB of 1e9 bytes, somewhat less than such a GPU has
            rows, length = (bisect_right(range(1, most + 1), size * 10**9, key=key)
                            for most, key in ((1024, lambda n: needed(n, 8192)),
                                              (c.max_position_embeddings, lambda n: needed(1, n))))
            line += f"a GPU of {size} GB " + (f"holds {rows} rows of 8192 tokens or one of {length}"
                                              if rows else "is too small") + ", " * (size == 80)
        lines.append(line)
    return lines


# ------------------------------------------------------------------------------------------ the Hub

CAUSES = {              # by the name of an exception or of a system's error
    "ENOSPC": "no space is left on the disk; HF_HOME may name another place",
    "GatedRepoError": "accept its terms there, make a token, and log in: hf auth login",
    "RepositoryNotFoundError": "there is no such name, or it is private: hf auth login",
    "RevisionNotFoundError": "it has no such --revision",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set, and not all of it is here",
    "LocalEntryNotFoundError": "the Hub cannot be reached, and not all of it is here",
    "ConnectError": "the Hub cannot be reached", "ConnectionError": "the Hub cannot be reached",
    "EntryNotFoundError": "it lacks a file that a checkpoint has"}


@contextlib.contextmanager
def asking(name: str):
    """Errors of the Hub, and of all libraries that reach for it, become a line with their cause."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        kinds, inner = set(), error
        while inner is not None:
            kinds |= {kind.__name__ for kind in type(inner).__mro__}
            kinds.add(errno.errorcode.get(getattr(inner, "errno", None)))
            inner = inner.__cause__ or inner.__context__
        cause = next((cause for kind, cause in CAUSES.items() if kind in kinds), error)
        raise ValueError(f"https://huggingface.co/{name}: {cause}") from None


def look(name: str, towers: str, revision: str | None, scratch: Path) -> tuple[Path, dict]:
    """The directory of a checkpoint, and nothing; or, of one on the Hub whose tensors are not all
    here, one made in scratch, with files of the right headers and sizes that hold no data, and how
    many bytes are here, to be fetched, and free for it."""
    with asking(name):
        directory = fetch(name, towers, revision=revision, weights=False)
        shards = shard_names(directory, towers) if directory != Path(name) else []
        if all((directory / shard).exists() for shard in shards):
            return directory, {}
        from huggingface_hub import HfApi
        disk = {"here": 0, "to fetch": 0, "free": shutil.disk_usage(directory).free}
        for path in directory.glob("*.json"):
            shutil.copy(path, scratch)
        for shard in shards:
            tensors = HfApi().parse_safetensors_file_metadata(
                name, shard, revision=directory.name).tensors       # a snapshot's is its commit
            header = json.dumps({key: {
                "dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": tensor.data_offsets}
                for key, tensor in tensors.items()}).encode()
            with open(scratch / shard, "wb") as file:
                file.write(len(header).to_bytes(8, "little") + header)
                size = file.truncate(8 + len(header) + max(
                    (tensor.data_offsets[1] for tensor in tensors.values()), default=0))
            disk["here" if (directory / shard).exists() else "to fetch"] += size
    return scratch, disk
