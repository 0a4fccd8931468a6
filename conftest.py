"""What the published code beside a checkpoint computes, for pytest --checkpoint DIR.

    python conftest.py DIR FILE     runs that code alone and saves what it gave as safetensors

The two models never share memory: the published code runs in a process of its own, before ours is
loaded. It needs transformers, and for its fast paths mamba_ssm and causal_conv1d.
"""

import subprocess
import sys
from pathlib import Path

import pytest

TEXT = ("The Seine flows through Paris. On its left bank stands the Eiffel Tower, which was built "
        "for the world fair of 1889; on its right bank stands the")
NOISE_LEVELS = (1.0, 0.5, 0.1875)
NEW_TOKENS, BLOCK_SIZE = 32, 16


def pytest_addoption(parser):
    parser.addoption("--checkpoint", type=Path, metavar="DIR",
                     help="compare with the published code in this checkpoint directory")
    parser.addoption("--reference", type=Path, metavar="FILE",
                     help="what that code gave: used if it is there, else written")


@pytest.fixture(scope="session")
def official(request, tmp_path_factory) -> tuple[Path, dict]:
    """The checkpoint directory, and the tensors that the published code gave."""
    from safetensors.torch import load_file
    directory, file = map(request.config.getoption, ("checkpoint", "reference"))
    if directory is None and file is not None:
        pytest.fail("--reference needs --checkpoint", pytrace=False)
    if directory is None:
        pytest.skip("no published code and weights here; give --checkpoint DIR")
    file = file or tmp_path_factory.mktemp("official") / "reference.safetensors"
    if not file.exists():
        run = subprocess.run([sys.executable, __file__, str(directory.resolve()), str(file)],
                             capture_output=True, text=True)
        if run.returncode:
            pytest.fail("the published code could not be run: "
                        + "\n".join(run.stderr.splitlines()[-5:]), pytrace=False)
    return directory, load_file(file)


def prompt_ids(directory: Path, config: dict) -> list[int]:
    from tokenizers import Tokenizer
    ids = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(TEXT).ids
    return [min(token, config["vocab_size"] - 1) for token in ids]


def noisy_block(prompt, t: float, mask_token_id: int):
    """A block that repeats the prompt's start, the last t of it masked. (1, BLOCK_SIZE)"""
    block = prompt[:, :BLOCK_SIZE].clone()
    block[:, BLOCK_SIZE - round(t * BLOCK_SIZE):] = mask_token_id
    return block


def record_mixers(tower, into: dict, prefix: str) -> list:
    """Hooks that note the first output of every layer's mixer, as `{prefix}{layer}`."""
    def note(name):
        def hook(module, args, output):
            output = output[0] if isinstance(output, tuple) else output
            into.setdefault(name, output.detach().float().cpu().contiguous())
        return hook

    return [layer.mixer.register_forward_hook(note(f"{prefix}{i}"))
            for i, layer in enumerate(tower.layers)]


def run_official(directory: Path, file: Path):
    import json

    import torch
    from safetensors.torch import save_file
    # instead of this folder, whose kernels.py transformers would take for the package of that name
    sys.path[0] = str(directory)
    from modeling_nemotron_twotower import NemotronHTwoTowerForCausalLM

    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    dtype = getattr(torch, config.get("torch_dtype") or config.get("dtype") or "bfloat16")
    mask_id = config.get("mask_token_id", 3)
    model = NemotronHTwoTowerForCausalLM.from_pretrained(
        str(directory), torch_dtype=dtype, trust_remote_code=True).eval()
    gpus = torch.cuda.device_count()
    first, second = [f"cuda:{i}" if i < gpus else "cuda:0" if gpus else "cpu" for i in (0, 1)]
    model.place_towers_on_devices(first, second)
    prompt = torch.tensor([prompt_ids(directory, config)], device=first)
    out = {"ids/prompt": prompt.cpu()}
    with torch.no_grad():
        hooks = record_mixers(model.context_tower, out, "context_mixer/")
        cache = model._build_context_cache(prompt)
        for hook in hooks:
            hook.remove()
        out["context/logits"] = cache["logits"][:, -1]
        states = cache["ctx_cache"]
        for i, layer in enumerate(model.context_tower.layers):
            if layer.block_type == "mamba":
                out[f"context_state/{i}/conv_state"] = states.conv_states[i].clone()
                out[f"context_state/{i}/ssm_state"] = states.ssm_states[i].clone()
            elif layer.block_type == "attention":
                out[f"context_state/{i}/key_cache"] = states.key_cache[i].clone()
                out[f"context_state/{i}/value_cache"] = states.value_cache[i].clone()
        for t in NOISE_LEVELS:
            hooks = record_mixers(model.denoiser_tower, out, f"denoiser_mixer/{t}/")
            block = noisy_block(prompt, t, mask_id).to(second)
            out[f"denoiser/{t}"] = model._run_denoiser_step_diffusion(
                block, cache, t=torch.tensor([t], device=second))
            for hook in hooks:
                hook.remove()
        for mode, knobs in (("ar", {}), ("mock_ar", {}), ("mask_diffusion", dict(
                block_size=BLOCK_SIZE, steps_per_block=16, mask_token_id=mask_id,
                temperature=0.0, confidence_threshold=0.8))):
            tokens = getattr(model, f"generate_{mode}")(prompt, NEW_TOKENS, **knobs)
            out[f"{mode}/tokens"] = tokens[:, prompt.shape[1]:]
            out[f"{mode}/nfe"] = torch.tensor([getattr(model, "_last_nfe", 0) or 0])
    out = {name: (x.float() if x.is_floating_point() else x).cpu().contiguous()
           for name, x in out.items()}
    save_file(out, f"{file}.partial")
    Path(f"{file}.partial").replace(file)


if __name__ == "__main__":
    run_official(Path(sys.argv[1]), Path(sys.argv[2]))
