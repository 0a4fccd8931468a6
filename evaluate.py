"""The quality of a checkpoint, by the field's own harness, EleutherAI's lm-evaluation-harness.

    python evaluate.py              the bundled miniature on its own tasks, offline
    python evaluate.py --checkpoint DIR --tasks gsm8k,race --confidence-threshold 0.8 0.95
    python evaluate.py --checkpoint DIR --suite card --cache FOLDER    the model card's eleven

Texts are written in every mode. What is only scored, as multiple choice, is scored once, by the
context tower whatever the modes, as in the published code. The last line printed is JSON.
"""

import argparse
import contextlib
import json
import os
import sys
import zlib
from collections import Counter
from fnmatch import filter as match
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from time import perf_counter

import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from bench import ALTERED, altered, count, fail, show, without_this_folder
from placement import asking, devices
from rows import WRITING, load_tokenizer, write_rows
from sample import ALL, MINIATURE, defaults
from twotower import SafetensorError, TwoTower, eos_ids, fetch, require

fail = partial(fail, program="evaluate.py")
try:
    with without_this_folder():         # whose evaluate.py is not Hugging Face's
        from lm_eval import simple_evaluate
        from lm_eval.api.model import TemplateLM, hash_args
        from lm_eval.models.utils import Collator, normalize_gen_kwargs
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as missing:
    fail(f"it measures with lm-evaluation-harness: pip install lm_eval ({missing})")

# names, shots (those of the backbone's card) and metrics; and what the model card, which has none
# of these, says of AR and of diffusion. Its MBPP is the sanitised one, not this: compare shares
CARD = {"MMLU": ("mmlu", 5, "acc,none", "78.56", "78.24"),
        "MMLU-Pro": ("mmlu_pro", 5, "exact_match,custom-extract", "62.59", "60.93"),
        "ARC-C": ("arc_challenge", 25, "acc_norm,none", "91.72", "92.66"),
        "WinoGrande": ("winogrande", 5, "acc,none", "76.09", "76.09"),
        "RACE": ("race", 0, "acc,none", "88.90", "88.90"),
        "HumanEval": ("humaneval", 0, "pass@1,create_test", "79.27", "75.58"),
        "MBPP": ("mbpp", 3, "pass_at_1,none", "74.71", "74.28"),
        "GSM8K": ("gsm8k", 8, "exact_match,flexible-extract", "92.49", "90.14"),
        "MATH-500": ("minerva_math500", 4, "math_verify,none", "84.40", "80.60"),
        "MMLU Global Lite": ("global_mmlu_??", 5, "acc,none", "73.97", "73.94"),
        "MGSM": ("mgsm_cot_native", 8, "exact_match,flexible-extract", "80.80", "80.40")}
SCORED = "context tower"                # in place of a mode
MASKED, KNOWN = ("mask_diffusion", *ALTERED), (*WRITING, *ALTERED)


def modes_of(args: argparse.Namespace) -> dict[str, tuple[str, dict]]:
    """By label the name and knobs of every mode, those with masks by gamma and block size."""
    size, gamma = map(defaults(MASKED[0]).get, ("block_size", "confidence_threshold"))
    sizes, gammas = args.block_size or [size], args.confidence_threshold or [gamma]
    plain = sorted({*args.modes} - {*MASKED})           # ar first, with which all are compared
    return {mode: (mode, {}) for mode in plain} | {
        f"{mode} {g:g}" + f" block {Q}" * (Q != size): (mode, {
            "confidence_threshold": g, "block_size": Q, "steps_per_block": Q})
        for mode, Q, g in product(args.modes, sizes, gammas) if mode in MASKED}


class Harness(TemplateLM):
    """A model in one mode, as the harness asks it, and what the texts of a task cost."""

    eot_token_id = prefix_token_id = None       # abstract there

    def __init__(self, model: TwoTower, tokenizer: Tokenizer, mode: str = "ar", knobs: dict = {},
                 batch_size: int = 16, task: str = ""):
        super().__init__()
        self.model, self.encoder, self.mode, self.knobs = model, tokenizer, mode, knobs
        self.batch_size, self.task, self.costs = batch_size, task, Counter()
        c, self.most = model.config, model.config.max_position_embeddings
        self.eot_token_id = next(iter(eos_ids(c.eos_token_id, c.vocab_size)), None)
        self.prefix_token_id = self.eot_token_id if c.bos_token_id is None else c.bos_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        if add_special_tokens is None:
            begin = self.encoder.id_to_token(self.prefix_token_id)
            add_special_tokens = not begin or not string.startswith(begin)
        return self.encoder.encode(string, add_special_tokens=add_special_tokens).ids

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **_) -> list[tuple[float, bool]]:
        order, found = Collator(requests, lambda asked: -len(asked[1] + asked[2])), []
        for batch in tqdm([*order.get_batched(self.batch_size)], disable=disable_tqdm):
            scores = self.model.score(*zip(*(
                (context[-max(1, self.most - len(new)):], new) for _, context, new in batch)))
            found += zip(scores.total.tolist(), scores.greedy.tolist())
            for (asked, *_), answer in zip(batch, found[-len(batch):]):
                if asked is not None:
                    self.cache_hook.add_partial("loglikelihood", asked, answer)
        return order.get_original(found)

    def loglikelihood_rolling(self, requests, disable_tqdm=False) -> list[float]:
        found = []
        for one in requests:
            found.append(sum(total for total, _ in self._loglikelihood_tokens([
                (None, *make_disjoint_window(window)) for window in get_rolling_token_windows(
                    self.tok_encode(*one.args), self.prefix_token_id, self.most - 1, 1)], True)))
            self.cache_hook.add_partial("loglikelihood_rolling", one.args, found[-1])
        return found

    def generate_until(self, requests, disable_tqdm=False) -> list[str]:
        order, found = Collator([request.args for request in requests], lambda asked: -len(
            self.tok_encode(asked[0])), lambda asked: asked[1], "gen_kwargs"), []
        for batch in tqdm([*order.get_batched(self.batch_size)], disable=disable_tqdm):
            given = normalize_gen_kwargs(batch[0][1])       # those of the whole batch
            new, self.costs = min(given["max_gen_toks"], self.most - 1), self.spent()
            prompts = [self.tok_encode(text)[new - self.most:] or [self.prefix_token_id]
                       for text, _ in batch]
            mode = MASKED[0] if self.mode in MASKED else self.mode
            write = partial(write_rows, self.model, self.encoder, mode, prompts, **self.knobs,
                            top_p=given.get("top_p"), top_k=given.get("top_k") or None,
                            temperature=given.get("temperature", float(given["do_sample"])))
            with altered(self.model, self.mode):
                if not self.costs:              # kernels are made, graphs recorded
                    write(min(new, 32))
                start = perf_counter()
                rows = write(new, [*filter(None, given["until"])], lambda row: self.cache_hook.
                             add_partial("generate_until", batch[row.index], row.text))
            self.costs.update(
                tokens=sum(len(row.tokens) for row in rows), seconds=perf_counter() - start,
                passes=sum(row.nfe or row.context_passes for row in rows))
            self.cache_hook.add_partial("cost", (self.task, self.batch_size), dict(self.costs))
            found += [row.text for row in rows]
        return order.get_original(found)

    def spent(self) -> Counter:
        """Tokens, passes (of the denoiser, or of AR) and seconds, with those of earlier runs."""
        kept, key = self.cache_hook.dbdict, hash_args("cost", (self.task, self.batch_size))
        return self.costs if kept is None else Counter(kept.get(key, {}))


def measure(lm: Harness, shots: int | None, manager: TaskManager, args) -> dict[str, dict]:
    """By metric its value, of several tasks the mean; answers are cached by what they hang on."""
    what = [lm.mode, lm.knobs, lm.batch_size, lm.encoder.to_str()]
    what += [[str(part.dtype), *part.flatten()[:16].tolist()] for part in (
        lm.model.context_tower if lm.mode == "ar" else lm.model).state_dict().values()]
    name = f"{lm.mode}-{zlib.crc32(json.dumps(what).encode()):08x}"
    results = simple_evaluate(
        lm, tasks=match(manager.all_tasks, lm.task), num_fewshot=shots, limit=args.limit,
        use_cache=args.cache and str(args.cache / name), log_samples=False, task_manager=manager,
        confirm_run_unsafe_code=args.confirm_run_unsafe_code)["results"]
    found = [results[name] for name in match(results, lm.task) or results]      # or of a tag all
    return {key: {"value": mean(one[key] for one in found)} | (
        {"stderr": found[0].get(key.replace(",", "_stderr,"))} if len(found) == 1 else {})
        for key in found[0] if "," in key and "_stderr," not in key}


def add(rows: list[dict], row: dict):
    """Add a row, and to it what follows from it and from AR's."""
    row |= {f"tokens_per_{name}": row["tokens"] / row[of] for name, of in (
        ("pass", "passes"), ("second", "seconds")) if row.get(of)}
    rows.append(row)
    for ar in rows:
        if ar["mode"] in ("ar", SCORED) and all(ar[of] == row[of] for of in ("task", "metric")):
            row |= {name: row[of] / ar[of] for name, of in (
                ("share_of_ar", "value"), ("speedup", "tokens_per_second")) if ar.get(of)}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error, names = fail, {"type": lambda text: text.split(",")}
    flags = {"--tasks": names | {"help": "of the harness; default all of tasks/ in --checkpoint"},
             "--suite": {"choices": ["card"], "help": "the model card's tasks and shots"},
             "--modes": names | {"default": "ar,mask_diffusion", "help": f"of {', '.join(KNOWN)}"},
             "--confidence-threshold": {"type": float, "nargs": "+", "help": "each is a mode"},
             "--block-size": {"type": count, "nargs": "+", "help": "each is a mode"},
             "--limit": {"type": count, "help": "items a task"},
             "--batch-size": {"type": count, "default": 16, "help": "alters rounding"},
             "--cache": {"type": lambda name: Path(name).resolve(), "help": "a folder of answers"},
             "--confirm-run-unsafe-code": {"action": "store_true", "help": "of humaneval, mbpp"}}
    shared = "checkpoint context-device denoiser-device dtype experts backend graphs".split()
    flags |= {flag.name: flag.kind.argparse | {"default": flag.default, "help": flag.help}
              for flag in ALL if flag.name[2:] in shared}       # sample.py's
    for name, options in flags.items():
        parser.add_argument(name, **options)
    args = parser.parse_args(argv)
    require({*args.modes} <= {*KNOWN}, f"--modes: there are only {', '.join(KNOWN)}")
    require({*MASKED} & {*args.modes} or not (args.confidence_threshold or args.block_size),
            "--confidence-threshold and --block-size are of mask_diffusion alone")
    require(not (args.suite and args.tasks), "--tasks does nothing with --suite")
    return args


def run(args: argparse.Namespace):
    name, towers = args.checkpoint or MINIATURE, "context" if args.modes == ["ar"] else "both"
    with asking(name):
        directory = fetch(name, towers)
    folder = (directory / "tasks").resolve()
    manager = TaskManager(include_path=folder, include_defaults=bool(args.suite or args.tasks))
    tasks = CARD if args.suite else {n: (n, None, "") for n in args.tasks or manager.all_tasks}
    require(tasks, f"{folder} holds no tasks; give --tasks or --suite card")
    for names, *_ in tasks.values():
        require(match(manager.all_tasks, names), f"the harness has no task {names}")
    places, tokenizer = devices(args, towers == "both"), load_tokenizer(directory)
    model = TwoTower.from_pretrained(
        directory, context_device=places[0], denoiser_device=places[-1], experts=args.experts,
        towers=towers, dtype=getattr(torch, args.dtype or "", None)).use(args.backend, args.graphs)
    os.environ |= {"HF_ALLOW_CODE_EVAL": "1"} if args.confirm_run_unsafe_code else {}
    rows, modes = [], modes_of(args)
    # in the folder from which its tasks name their files
    with without_this_folder(), contextlib.chdir(folder if folder.is_dir() else "."):
        for task, (names, shots, metric, *published) in tasks.items():
            for label, mode in modes.items():
                lm = Harness(model, tokenizer, *mode, args.batch_size, names)
                scores = measure(lm, shots, manager, args)
                for key in [metric] if metric in scores else scores:
                    add(rows, {"task": task, "metric": key, "published": "/".join(published),
                               "mode": label if lm.spent() else SCORED} | scores[key] | lm.spent())
                if not lm.spent():
                    break
    for metric, mode in product({"all" if args.suite else row["metric"]: 0 for row in rows}, modes):
        own = [row for row in rows if row["mode"] in (mode, SCORED)
               and metric in ("all", row["metric"])]
        if len(own) > 1:
            add(rows, {"task": "mean", "metric": metric, "mode": mode,
                       "value": mean(row["value"] for row in own)} | {
                of: sum(row.get(of, 0) for row in own) for of in ("tokens", "passes", "seconds")})
    columns = ("task", "metric", "mode", "value", "stderr", "share_of_ar", "tokens_per_pass",
               "tokens_per_second", "speedup", "published")
    show("passes: the denoiser's or AR's; published: AR's/diffusion's, the mean 98.7 % at 2.42x",
         [{name: row.get(name, "") for name in columns} for row in rows])
    print(json.dumps({"setting": {"what": "evaluate", "torch": torch.__version__} | {
        name: str(value) for name, value in vars(args).items() if value}, "rows": rows}))


def main(argv: list[str] | None = None):
    try:
        run(parse(argv))
    except (ValueError, OSError, RuntimeError, ImportError, SafetensorError) as error:
        fail(error)
    except KeyboardInterrupt:
        print("\nevaluate.py: stopped; with --cache the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
