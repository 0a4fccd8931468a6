"""Measurements, each against a yardstick in the same run; the last line printed is JSON.

    python bench.py cpu         prefill, AR decoding and one denoiser step of a small random model,
                                beside transformers' NemotronH with the same weights

Timings are medians over rounds in which all contestants take turns, so that a machine that
slows down slows all of them; compare ratios, not milliseconds.
"""

import argparse
import json
import platform
import statistics
import sys
import time

import torch

from twotower import KVCache, MambaState, TwoTower, TwoTowerConfig

# golden/cfg1 four times as wide, with 16 experts and a vocabulary of 1024
SMALL = dict(
    hidden_size=256, hybrid_override_pattern="MEM*EMEM*E", num_hidden_layers=10, vocab_size=1024,
    layer_norm_epsilon=1e-5, mamba_num_heads=8, mamba_head_dim=64, n_groups=2, ssm_state_size=64,
    conv_kernel=4, chunk_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
    intermediate_size=192, n_routed_experts=16, num_experts_per_tok=2, moe_intermediate_size=96,
    moe_shared_expert_intermediate_size=160, norm_topk_prob=True, routed_scaling_factor=2.5,
    max_position_embeddings=16384)


def as_transformers(model: TwoTower):
    """transformers' NemotronHForCausalLM holding our context tower's weights."""
    from transformers import NemotronHConfig, NemotronHForCausalLM

    c = model.config
    same = ("hidden_size vocab_size layer_norm_epsilon mamba_num_heads mamba_head_dim n_groups "
            "ssm_state_size conv_kernel chunk_size num_attention_heads num_key_value_heads "
            "head_dim intermediate_size n_routed_experts num_experts_per_tok moe_intermediate_size "
            "moe_shared_expert_intermediate_size norm_topk_prob routed_scaling_factor n_group "
            "topk_group use_bias use_conv_bias attention_bias mlp_bias residual_in_fp32 "
            "max_position_embeddings").split()
    kinds = {"M": "linear_attention", "*": "full_attention", "E": "moe", "-": "mlp"}
    config = NemotronHConfig(**{name: getattr(c, name) for name in same},
                             layers_block_type=[kinds[k] for k in c.hybrid_override_pattern],
                             time_step_min=c.time_step_limit[0] or 1e-30,   # clamps dt
                             attn_implementation="sdpa")
    theirs = NemotronHForCausalLM(config).eval()
    ours = {"model." + name: tensor for name, tensor in model.context_tower.state_dict().items()}
    ours |= {"lm_head.weight": model.context_lm_head.weight}
    ours = {name.replace("experts.up_proj.weight", "experts.up_proj").replace(
        "experts.down_proj.weight", "experts.down_proj") if "shared" not in name else name: tensor
        for name, tensor in ours.items()}
    theirs.load_state_dict(ours)
    return theirs.to(model.context_lm_head.weight.dtype)


def take_turns(contestants: dict, rounds: int) -> dict[str, float]:
    """Median seconds of each callable over `rounds`, after one uncounted round."""
    seconds = {name: [] for name in contestants}
    for _ in range(rounds + 1):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def bytes_per_cached_token(states: list) -> int:
    return sum(2 * s.key_cache[0, :, 0].nbytes for s in states if isinstance(s, KVCache))


@torch.inference_mode()
def bench_cpu(rounds: int) -> dict:
    """Prefill of 512, AR decoding, a denoiser step of 16; then an AR token over longer contexts."""
    torch.manual_seed(0)
    model = TwoTower(TwoTowerConfig(**SMALL)).eval()
    theirs = as_transformers(model)
    prompt = torch.randint(4, 1024, (1, 512))
    new, block = 64, torch.full((1, 16), 3)

    ours_512, theirs_512 = model.prefill(prompt), theirs(prompt, use_cache=True, logits_to_keep=1)
    gap = (ours_512.logits - theirs_512.logits[:, -1]).abs().max() / theirs_512.logits.std()
    if gap > 1e-3:
        sys.exit(f"bench: the two context towers differ by {gap:.1e}; no speed is reported")

    def ar_ours():
        model.generate_ar(prompt, new)

    def ar_theirs():
        theirs.generate(prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False,
                        attention_mask=torch.ones_like(prompt), pad_token_id=0)

    def loop_theirs():          # their model without their generate()
        out = theirs(prompt, use_cache=True, logits_to_keep=1)
        for _ in range(new - 1):
            token = out.logits[:, -1:].argmax(-1)
            out = theirs(token, past_key_values=out.past_key_values, use_cache=True)

    t = take_turns({
        "prefill": lambda: model.prefill(prompt),
        "prefill_transformers": lambda: theirs(prompt, use_cache=True, logits_to_keep=1),
        "ar": ar_ours, "ar_transformers": ar_theirs, "ar_transformers_loop": loop_theirs,
        "denoise": lambda: model.denoise(block, ours_512, 1.0)}, rounds)
    decode = {name: (t[name] - t["prefill" + ("_transformers" if "tr" in name else "")]) / (new - 1)
              for name in ("ar", "ar_transformers", "ar_transformers_loop")}
    result = {
        "prefill_512_speedup": t["prefill_transformers"] / t["prefill"],
        "ar_token_speedup": decode["ar_transformers"] / decode["ar"],
        "ar_token_speedup_over_bare_loop": decode["ar_transformers_loop"] / decode["ar"],
        "denoise_16_in_ar_tokens": t["denoise"] / decode["ar"],
        "prefill_512_in_ar_tokens": t["prefill"] / decode["ar"]}
    rows = (("prefill of 512 tokens", "prefill_512_speedup", "x transformers' speed"),
            ("AR token", "ar_token_speedup", "x transformers' generate()"),
            ("AR token", "ar_token_speedup_over_bare_loop", "x a bare loop over its model"),
            ("denoiser step of 16 tokens", "denoise_16_in_ar_tokens", "AR tokens of time"),
            ("prefill of 512 tokens", "prefill_512_in_ar_tokens", "AR tokens of time"))
    for what, name, unit in rows:
        print(f"{what:28} {result[name]:6.2f} {unit}")

    pattern = SMALL["hybrid_override_pattern"].replace("*", "")
    bare = TwoTower(TwoTowerConfig(**SMALL | dict(
        hybrid_override_pattern=pattern, num_hidden_layers=len(pattern))), towers="context").eval()
    token = torch.tensor([[5]])

    def sixteen_tokens_after(model, context):
        def run():
            for _ in range(16):
                model.extend(context, token)
        return run

    lengths = (256, 512, 1024, 2048, 4096, 8192)
    contexts = {(m, n): m.prefill(torch.randint(4, 1024, (1, n)), reserve=16 * (rounds + 1))
                for m in (model, bare) for n in lengths}
    t = take_turns({key: sixteen_tokens_after(key[0], c) for key, c in contexts.items()}, rounds)
    print("\ncontext   AR token / at 256   without attention layers   KV bytes/token   Mamba bytes")
    result["growth"] = []
    for n in lengths:
        states = contexts[model, n].states
        mamba = sum(s.ssm_state.nbytes for s in states if isinstance(s, MambaState))
        row = {"context": n, "token": t[model, n] / t[model, 256],
               "token_without_attention": t[bare, n] / t[bare, 256],
               "kv_bytes_per_token": bytes_per_cached_token(states), "mamba_bytes": mamba}
        result["growth"].append(row)
        print(f"{n:7}   {row['token']:17.2f}   {row['token_without_attention']:24.2f}   "
              f"{row['kv_bytes_per_token']:14}   {mamba:11}")
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["cpu"])
    parser.add_argument("--rounds", type=int, default=15, help="rounds of turns (default 15)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    if args.rounds < 1 or args.threads < 1:
        parser.error("--rounds and --threads must be 1 or more")
    torch.set_num_threads(args.threads)
    import transformers
    setting = {"torch": torch.__version__, "transformers": transformers.__version__,
               "python": platform.python_version(), "processor": platform.machine(),
               "threads": args.threads, "rounds": args.rounds, "dtype": "float32", "batch": 1}
    print("  ".join(f"{name} {value}" for name, value in setting.items()) + "\n")
    print(json.dumps({"setting": setting} | bench_cpu(args.rounds)))


if __name__ == "__main__":
    main()
