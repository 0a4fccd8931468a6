"""Write text with a TwoTower checkpoint; without one, with the miniature beside this file.

    python sample.py                            a short demonstration, every denoiser pass shown
    python sample.py "def main(args):"          continue a prompt
    python sample.py --checkpoint DIR --mode ar --max-new-tokens 64 "prompt"

Text appears as blocks are committed, on standard output; one line of facts follows on standard
error. A flag that is not given takes the default of twotower.py's function of that name; a flag
that would do nothing in the chosen mode is an error. Errors are one line and exit status 2.
"""

import argparse
import inspect
import os
import sys
import time
from itertools import groupby

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from twotower import TwoTower

MINIATURE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "miniature")
DEFAULT_PROMPT = "class Point label:str width:int height:int color:str\n"     # one of its tasks
DIFFUSION_ONLY = ("block_size", "steps_per_block", "confidence_threshold", "mask_token_id")
MASKED = "\u2591"                                   # a shaded box
SAMPLING = ("top_k", "top_p", "seed")               # mean something above temperature 0
KNOBS = DIFFUSION_ONLY + ("temperature", "top_k", "top_p")


def fail(message: str):
    print("sample.py: " + " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)


def seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**64:
        raise ValueError
    return value


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.error = fail
    parser.add_argument("prompt", nargs="?", default=None,
                        help="text to continue; without it a demonstration")
    parser.add_argument("--checkpoint", default=MINIATURE, metavar="DIR",
                        help="config.json, tokenizer.json and safetensors; default miniature/")
    parser.add_argument("--mode", choices=["mask_diffusion", "mock_ar", "ar"],
                        default="mask_diffusion")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="default 128")
    parser.add_argument("--block-size", type=int, help="tokens denoised together")
    parser.add_argument("--steps-per-block", type=int, help="denoiser passes a block may take")
    parser.add_argument("--confidence-threshold", type=float, help="gamma: commit above it")
    parser.add_argument("--mask-token-id", type=int)
    parser.add_argument("--temperature", type=float, help="0 is greedy")
    parser.add_argument("--top-k", type=int, help="draw among the k most likely tokens")
    parser.add_argument("--top-p", type=float, help="draw among the most likely tokens holding p")
    parser.add_argument("--seed", type=seed, help="of the draws; random if not given")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.demonstrate = args.prompt is None
    if args.demonstrate:
        if args.mode != "mask_diffusion":
            fail(f"--mode {args.mode} needs a prompt; the demonstration is of mask_diffusion")
        args.prompt = DEFAULT_PROMPT
    idle = [name for name in DIFFUSION_ONLY if args.mode != "mask_diffusion" and name in args]
    if idle:
        fail(f"--{idle[0].replace('_', '-')} does nothing with --mode {args.mode}")
    idle = [name for name in SAMPLING if not getattr(args, "temperature", 0) and name in args]
    if idle:
        fail(f"--{idle[0].replace('_', '-')} does nothing without --temperature above 0")
    return args


def load_tokenizer(directory: str) -> Tokenizer:
    if not os.path.isdir(directory):
        hint = "; give --checkpoint (train.py makes one)" if directory == MINIATURE else ""
        raise ValueError(f"--checkpoint {directory} is not a directory{hint}")
    path = os.path.join(directory, "tokenizer.json")
    if not os.path.isfile(path):
        raise ValueError(f"{path} is missing")
    try:
        return Tokenizer.from_file(path)
    except Exception as error:              # the package raises nothing more specific
        raise ValueError(f"{path} is no tokenizer: {error}") from None


class Demonstration:
    """Prints the prompt, then for every denoiser pass a line: the block as it stands after it."""

    def __init__(self, prompt: str, tokenizer: Tokenizer, mask_id: int):
        self.tokenizer, self.mask_id = tokenizer, mask_id
        print(f"{prompt}\n{MASKED} is a masked token; a line shows a block after one denoiser pass")

    def __call__(self, step):
        if step.step == 0:
            print(f"\nblock {step.block_index}  {MASKED * step.after.shape[1]}")
        print("         ", end="")
        for masked, tokens in groupby(step.after[0].tolist(), lambda token: token == self.mask_id):
            tokens = list(tokens)
            text = MASKED * len(tokens) if masked else self.tokenizer.decode(tokens)
            print(text.replace("\n", "\u21b5"), end="")
        print(flush=True)


class Printer:
    """Prints the prompt, then the text of each block as `on_step` reports it finished."""

    def __init__(self, prompt: str, tokenizer: Tokenizer, max_new_tokens: int,
                 eos_token_id: int | None, mask_id: int | None):
        self.prompt, self.tokenizer = prompt, tokenizer
        self.stream = DecodeStream(skip_special_tokens=True)
        self.left, self.eos_token_id, self.mask_id = max_new_tokens, eos_token_id, mask_id

    def __call__(self, step):
        print(self.prompt, end="", flush=True)
        self.prompt = ""
        if self.mask_id is not None and (step.after == self.mask_id).any():
            return                                      # this block has masks left
        for token in step.after[0].tolist()[:self.left]:
            self.left -= 1
            if token == self.eos_token_id:
                self.left = 0
                break
            print(self.stream.step(self.tokenizer, token) or "", end="", flush=True)


def run(args: argparse.Namespace):
    tokenizer = load_tokenizer(args.checkpoint)
    try:
        args.prompt.encode()
    except UnicodeEncodeError:
        raise ValueError("the prompt is not valid UTF-8") from None
    prompt = tokenizer.encode(args.prompt).ids
    if not prompt:
        raise ValueError("the prompt holds no token")
    try:
        torch.zeros(1, device=args.device).item()       # fails on "meta" too
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {args.device} cannot be used: {reason}") from None
    model = TwoTower.from_pretrained(args.checkpoint, context_device=args.device,
                                     towers="context" if args.mode == "ar" else "both")
    generate = getattr(model, f"generate_{args.mode}")
    takes = inspect.signature(generate).parameters
    knobs = {name: getattr(args, name, takes[name].default) for name in KNOBS if name in takes}
    if args.mode == "mask_diffusion" and knobs["mask_token_id"] is None:
        knobs["mask_token_id"] = model.config.mask_token_id
    generator = torch.Generator()
    seed = generator.manual_seed(args.seed).initial_seed() if "seed" in args else generator.seed()
    eos = model.config.eos_token_id
    mask_id = knobs.get("mask_token_id")
    printer = (Demonstration(args.prompt, tokenizer, mask_id) if args.demonstrate else
               Printer(args.prompt, tokenizer, args.max_new_tokens, eos, mask_id))

    start = time.perf_counter()
    result = generate([torch.tensor(prompt)], args.max_new_tokens, eos_token_id=eos,
                      generator=generator, on_step=printer, **knobs)
    seconds = time.perf_counter() - start
    print(flush=True)
    if args.demonstrate:
        print(tokenizer.decode(result.tokens[0].tolist()), flush=True)
    tokens, nfe, passes = len(result.tokens[0]), int(result.nfe), int(result.context_passes)
    facts = [f"{args.mode} on {args.device}", f"{tokens} tokens", f"{nfe} denoiser passes",
             f"{passes} context passes", f"{tokens / (nfe or passes):.2f} tokens per pass",
             f"{tokens / seconds:.1f} tokens/s"]
    facts += [f"{name} {value}" for name, value in knobs.items() if value is not None]
    facts += [f"seed {seed}"] if knobs["temperature"] else []
    print(", ".join(facts), file=sys.stderr)


def main():
    args = parse_args()
    try:
        run(args)
    except BrokenPipeError:                             # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        fail(error)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
