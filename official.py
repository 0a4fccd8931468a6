"""What the published code beside a checkpoint computes, as a reference to compare ours with.

    python official.py DIR FILE     runs that code alone and saves what it gave as safetensors

`pytest --checkpoint=DIR` starts this in a process of its own before our model is loaded, so the two
never share memory, and under another interpreter if one is named. Nothing is imported here that
the published code does not need itself: torch, transformers (which brings safetensors and
tokenizers), mamba_ssm, causal_conv1d.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

CODE = "modeling_nemotron_twotower.py"
TEXT = ("The Seine flows through Paris. On its left bank stands the Eiffel Tower, which was built "
        "for the world fair of 1889; on its right bank stands the")
NOISE_LEVELS = (1.0, 0.5, 0.1875)
NEW_TOKENS, BLOCK_SIZE = 32, 16
# how the published code is asked to write in each of its modes
MODES = {"ar": {}, "mock_ar": {}, "mask_diffusion": dict(
    block_size=BLOCK_SIZE, steps_per_block=16, temperature=0.0, confidence_threshold=0.8)}


def read_config(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text(encoding="utf-8"))


def dtype_of(config: dict):
    import torch
    return getattr(torch, config.get("torch_dtype") or config.get("dtype") or "bfloat16")


def prompt_ids(directory: Path, config: dict) -> list[int]:
    from tokenizers import Tokenizer
    ids = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(TEXT).ids
    return [min(token, config["vocab_size"] - 1) for token in ids]


def noisy_block(prompt, t: float, mask_token_id: int):
    """A block that repeats the prompt's start, the last t of it masked. (1, BLOCK_SIZE)"""
    block = prompt[:, :BLOCK_SIZE].clone()
    block[:, BLOCK_SIZE - round(t * BLOCK_SIZE):] = mask_token_id
    return block


def check(directory: Path, file: Path | None):
    """Raises: ValueError saying what is missing, before anything is loaded."""
    have = file is not None and file.exists()
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory here; if it is a name on the Hugging "
                         "Face Hub, first: hf download NAME --local-dir DIR")
    if file is not None and not file.resolve().parent.is_dir():
        raise ValueError(f"no folder to write {file} to")
    for name in ("config.json", "tokenizer.json", *[CODE] * (not have)):
        if not (directory / name).is_file():
            raise ValueError(f"{directory} holds no {name}" + (
                ": the published code is meant to lie beside the weights" if name == CODE else ""))


def reference(directory: Path, file: Path, python: str = sys.executable) -> dict:
    """The tensors in file; if it is not there, python first runs the published code to write it.

    Raises: ValueError with the last words of that run, or saying that file is not readable.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    if not file.exists():
        try:
            run = subprocess.run([python, __file__, str(directory), str(file)],
                                 capture_output=True, text=True, errors="replace")
        except OSError as error:
            raise ValueError(f"{python} could not be started: {error}") from None
        if run.returncode:
            said = [line for line in run.stderr.splitlines() if line.strip()][-5:]
            raise ValueError("\n    ".join(
                ["the published code could not be run: "
                 + (said or [f"exit status {run.returncode}"])[-1],
                 f"by {python}; README.md says what the usual failures mean", *said]))
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is not a reference file: {error}") from None


def recorded(tower, prefix: str, run):
    """What run() returns, and {prefix + layer: (B, L, D)}: all outputs of each mixer, in order.

    The published prefill takes two passes: all tokens but the last, then the last.
    """
    import torch
    outputs: dict = {}

    def note(name):
        def hook(module, args, output):
            output = output[0] if isinstance(output, tuple) else output
            outputs.setdefault(name, []).append(output.detach().float().cpu())
        return hook

    hooks = [layer.mixer.register_forward_hook(note(f"{prefix}{i}"))
             for i, layer in enumerate(tower.layers)]
    result = run()
    for hook in hooks:
        hook.remove()
    return result, {name: torch.cat(calls, dim=1) for name, calls in outputs.items()}


def context_states(model, cache) -> dict:
    """The published cache of every layer that has one."""
    names = {"mamba": ("conv_state", "ssm_state"), "attention": ("key_cache", "value_cache")}
    return {f"context_state/{i}/{name}":
            getattr(cache, name + "s" * name.endswith("state"))[i].clone()
            for i, layer in enumerate(model.context_tower.layers)
            for name in names.get(layer.block_type, ())}


def run_published_code(directory: Path) -> dict:
    """Caches, states, mixers and logits after a prompt, denoiser passes, tokens in each mode."""
    from modeling_nemotron_twotower import NemotronHTwoTowerForCausalLM
    import torch

    config = read_config(directory)
    mask_id = config.get("mask_token_id", 3)
    model = NemotronHTwoTowerForCausalLM.from_pretrained(
        str(directory), torch_dtype=dtype_of(config), trust_remote_code=True).eval()
    gpus = torch.cuda.device_count()
    first, second = [f"cuda:{i}" if i < gpus else "cuda:0" if gpus else "cpu" for i in (0, 1)]
    model.place_towers_on_devices(first, second)
    prompt = torch.tensor([prompt_ids(directory, config)], device=first)
    with torch.no_grad():
        cache, out = recorded(model.context_tower, "context_mixer/",
                              lambda: model._build_context_cache(prompt))
        out |= context_states(model, cache["ctx_cache"])
        out |= {"ids/prompt": prompt, "context/logits": cache["logits"][:, -1]}
        for t in NOISE_LEVELS:
            block = noisy_block(prompt, t, mask_id).to(second)
            out[f"denoiser/{t}"], mixers = recorded(
                model.denoiser_tower, f"denoiser_mixer/{t}/",
                lambda: model._run_denoiser_step_diffusion(
                    block, cache, t=torch.tensor([t], device=second)))
            out |= mixers
        for mode, knobs in MODES.items():
            if mode == "mask_diffusion":
                knobs = knobs | {"mask_token_id": mask_id}
            tokens = getattr(model, f"generate_{mode}")(prompt, NEW_TOKENS, **knobs)
            out[f"{mode}/tokens"] = tokens[:, prompt.shape[1]:]
            # set by mask diffusion only; after the other modes an old value, or none
            out[f"{mode}/nfe"] = torch.tensor([getattr(model, "_last_nfe", 0) or 0])
    return {name: (x.float() if x.is_floating_point() else x).cpu().contiguous()
            for name, x in out.items()}


def main():
    parser = argparse.ArgumentParser(description="save what the published code beside a "
                                                 "checkpoint computes")
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("file", type=Path, metavar="FILE")
    args = parser.parse_args()
    directory, file = args.directory.resolve(), args.file.resolve()
    try:
        check(directory, file)
    except ValueError as error:
        parser.exit(2, f"official.py: {error}\n")
    # that folder instead of this one, whose kernels.py transformers would take for the package
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(directory)] + [path for path in sys.path if Path(path).resolve() != here]
    out = run_published_code(directory)
    from safetensors.torch import save_file
    partial = Path(f"{file}.{os.getpid()}.partial")
    try:
        save_file(out, partial)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
