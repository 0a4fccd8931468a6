"""Draw the figures of tutorial.md and README.md: `python figures/make.py` writes them here.

    towers.png      the two towers, layer by layer, and what crosses between them
    scan.png        how far back the heads of a trained Mamba-2 layer read
    masks.png       who attends to whom when all blocks of a text are trained in one pass
    denoising.png   the miniature filling blocks, pass by pass
    denoising.gif   the same as a moving picture
    cost.png        experts read by a pass, and the speed-up that bytes allow

These are computed from the bundled miniature or the released sizes, and the line numbers in the
tutorial's links to symbols are brought up to date. `python figures/make.py SOURCE` draws what was
measured:

    miniature.png   accuracy against speed; SOURCE is a file of what `evaluate.py` printed
    gpu.png         speed-up by denoiser passes; SOURCE is a file of what `bench.py gpu` printed
    training.png    validation losses; SOURCE is the folder that train.py wrote
"""

import ast
import json
import re
import sys
from pathlib import Path

import matplotlib
import torch
from tokenizers import Tokenizer

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.animation import FuncAnimation, PillowWriter  # noqa: E402
from matplotlib.colors import LogNorm  # noqa: E402
from matplotlib.patches import FancyArrowPatch, Rectangle  # noqa: E402

HERE = Path(__file__).resolve().parent
OUT = HERE
sys.path.insert(0, str(HERE.parent))
from bench import cost_of_pass  # noqa: E402
from sample import DEFAULT_PROMPT as PROMPT  # noqa: E402
from twotower import TwoTower, TwoTowerConfig, ssd_rates  # noqa: E402

MINIATURE = HERE.parent / "miniature"
COLORS = {"M": "#8ecae6", "*": "#ffb703", "E": "#d8e2dc"}
KINDS = {"M": "Mamba-2", "*": "attention", "E": "experts"}


def towers():
    """One period of the released pattern as two columns of boxes; arrows for what crosses."""
    figure, ax = plt.subplots(figsize=(7, 5.6), layout="constrained")
    pattern = TwoTowerConfig().hybrid_override_pattern[:6]
    crossing = {"M": "conv_state, ssm_state", "*": "keys, values"}
    for x, name in ((0, "context tower\n(frozen, causal)"), (6, "denoiser tower\n(trained)")):
        ax.text(x + 1.2, len(pattern) + 1.9, name, ha="center", weight="bold")
        head = "context_lm_head" if x == 0 else "lm_head"
        for y, text in ((-0.95, "embeddings"), (len(pattern) + 0.95, f"norm_f, {head}")):
            ax.add_patch(Rectangle((x, y), 2.4, 0.6, facecolor="white", edgecolor="black"))
            ax.text(x + 1.2, y + 0.3, text, ha="center", va="center", fontsize=8)
        for i, kind in enumerate(pattern):
            ax.add_patch(Rectangle((x, i), 2.4, 0.7, facecolor=COLORS[kind], edgecolor="black"))
            ax.text(x + 1.2, i + 0.35, f"{i}  {KINDS[kind]}", ha="center", va="center")
        ax.text(x + 1.2, len(pattern) + 0.35, "... 52 layers in all", ha="center", va="center")
    for i, kind in enumerate(pattern):
        if kind in crossing:
            ax.add_patch(FancyArrowPatch((2.45, i + 0.35), (5.95, i + 0.35), arrowstyle="->",
                                         mutation_scale=14, color="#333333"))
            ax.text(4.2, i + 0.47, crossing[kind], ha="center", fontsize=9)
        ax.add_patch(FancyArrowPatch((9.3, i + 0.35), (8.45, i + 0.35), arrowstyle="->",
                                     mutation_scale=10, color="#c1121f"))
    ax.text(9.4, 2.9, "t: shift,\nscale, gate\nfor every\nlayer", color="#c1121f", va="center")
    ax.text(1.2, -1.5, "clean text: prompt and\nfinished blocks", ha="center", va="top")
    ax.text(7.2, -1.5, "the block: 16 tokens,\nsome of them masks", ha="center", va="top")
    ax.set(xlim=(-0.3, 11), ylim=(-2.8, len(pattern) + 2.8))
    ax.axis("off")
    figure.savefig(OUT / "towers.png", dpi=150)


def scan(model: TwoTower, tokens: list[int]):
    """The weights exp(sum of dt A) dt of `ssd_chunk`, over a prompt, for heads of layer 0."""
    mixer, seen = model.context_tower.layers[0].mixer, []
    scan_of_layer = mixer.ops.ssd
    mixer.ops = type(mixer.ops)(**vars(mixer.ops) | {
        "ssd": lambda *args: seen.append(args) or scan_of_layer(*args)})
    model.prefill([torch.tensor(tokens)])
    model.use("torch")
    _, dt, _, _, dt_bias, A_log, *_ = seen[0]
    dt, A = ssd_rates(dt, dt_bias.detach(), A_log.detach(), model.config.time_step_limit)
    log_decay = (dt * A)[0].T.cumsum(-1)                                         # (H, L)
    weight = (log_decay[:, :, None] - log_decay[:, None]).exp() * dt[0].T[:, None]
    order = A.argsort(descending=True)
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.2), layout="constrained")
    for ax, head in zip(axes, order[[0, len(order) // 2, -1]]):
        image = weight[head].tril()
        shown = ax.imshow((image / image.max()).clamp(min=1e-3), cmap="viridis",
                          norm=LogNorm(1e-3, 1))
        ax.set_xticks(range(0, len(tokens), 4))
        ax.set_yticks(range(0, len(tokens), 4))
        ax.set(title=f"head {head}, A = {A[head]:.2f}", xlabel="token s that is read")
    axes[0].set_ylabel("token l that reads")
    figure.colorbar(shown, ax=axes, label="of the panel's largest")
    figure.savefig(OUT / "scan.png", dpi=150)


def masks(model: TwoTower):
    """The mask that attention layers get in `diffusion_logits`, for 4 blocks of 16."""
    seen = []
    layer = next(layer for layer in model.denoiser_tower.layers if layer.kind == "*")
    hook = layer.mixer.register_forward_pre_hook(lambda _, args: seen.append(args[2].mask))
    tokens = torch.full((1, 64), 5)
    with torch.no_grad():
        model.diffusion_logits(tokens, tokens, torch.tensor([0.5]), 16)
    hook.remove()
    figure, ax = plt.subplots(figsize=(7, 3.9), layout="constrained")
    ax.imshow(seen[0][0, 0], cmap="Blues", vmin=0, vmax=1.4)
    for edge in range(16, 128, 16):
        ax.axvline(edge - 0.5, color="white", linewidth=0.8)
    for edge in range(16, 64, 16):
        ax.axhline(edge - 0.5, color="white", linewidth=0.8)
    ax.axvline(63.5, color="#c1121f", linewidth=1.5)
    ticks = [8, 24, 40, 56]
    names = [f"block {b}" for b in range(4)]
    ax.set_xticks(ticks + [64 + tick for tick in ticks], names * 2, fontsize=8)
    ax.set_yticks(ticks, names, fontsize=8)
    ax.set(xlabel="keys: clean blocks of the context tower | noisy blocks of the denoiser",
           ylabel="queries: noisy blocks", title="dark: visible")
    figure.savefig(OUT / "masks.png", dpi=150)


def denoising(model: TwoTower, tokenizer: Tokenizer):
    """Every denoiser pass over a prompt's answer: tokens as they stand, new commits in color."""
    steps = []
    model.generate_mask_diffusion([tokenizer.encode(PROMPT).ids], 64, eos_token_id=2,
                                  on_step=steps.append)
    figure, ax = plt.subplots(figsize=(13, 0.45 * len(steps) + 1), layout="constrained")
    for y, step in enumerate(steps):
        for x in range(16):
            token = int(step.after[0, x])
            masked, new = token == model.config.mask_token_id, bool(step.committed[0, x])
            face = "#e9ecef" if masked else "#ffb703" if new else "white"
            ax.add_patch(Rectangle((x, -y), 0.96, 0.86, facecolor=face, edgecolor="#adb5bd"))
            text = tokenizer.decode([token], skip_special_tokens=False)
            text = "" if masked else text.replace("\n", "↵").replace(" ", "␣")
            label = f"{text}\n{float(step.confidence[0, x]):.2f}"
            ax.text(x + 0.48, -y + 0.43, label, ha="center", va="center", fontsize=7)
        ax.text(-0.15, -y + 0.43, f"block {step.block_index}, pass {step.step}, "
                f"t = {float(step.t[0]):.2f}", ha="right", va="center", fontsize=9)
    ax.set(xlim=(-3.2, 16.1), ylim=(-len(steps) + 0.8, 1.5))
    ax.text(0, 1.05, "orange: committed in this pass; white: before; grey: still masked; below "
            "each token, the probability of the denoiser's best guess there", fontsize=9)
    ax.axis("off")
    figure.savefig(OUT / "denoising.png", dpi=150)


def film(model: TwoTower, tokenizer: Tokenizer):
    """The same passes as a moving picture: each block's tokens as they are committed."""
    steps = []
    model.generate_mask_diffusion([tokenizer.encode(PROMPT).ids], 64, eos_token_id=2,
                                  on_step=steps.append)
    blocks = 1 + steps[-1].block_index
    figure, ax = plt.subplots(figsize=(10, 0.62 * blocks + 1.1), layout="constrained")
    figure.get_layout_engine().set(w_pad=0, h_pad=0)
    ax.set(xlim=(0, 16), ylim=(-blocks + 0.95, 2.1))
    ax.axis("off")
    ax.text(0, 1.75, PROMPT.strip(), fontsize=10, family="monospace")
    caption = ax.text(0, 1.2, "", fontsize=10)
    cells = {}
    for y in range(blocks):
        for x in range(16):
            box = ax.add_patch(Rectangle((x, -y), 0.96, 0.86, facecolor="#e9ecef",
                                         edgecolor="#adb5bd"))
            cells[y, x] = box, ax.text(x + 0.48, -y + 0.43, "", ha="center", va="center",
                                       fontsize=9)

    def draw(frame: int):
        """Frame 0 is all masks; frame i is what stands after pass i-1."""
        step = steps[max(0, frame - 1)]
        for x in range(16 * (frame > 0)):
            token, (box, label) = int(step.after[0, x]), cells[step.block_index, x]
            if token != model.config.mask_token_id:
                text = tokenizer.decode([token], skip_special_tokens=False)
                label.set_text(text.replace("\n", "↵").replace(" ", "␣"))
                box.set_facecolor("#ffb703" if step.committed[0, x] else "white")
        for (y, _), (box, _) in cells.items():
            if y < step.block_index:
                box.set_facecolor("white")
        caption.set_text("grey: masked    orange: committed in this pass" + (
            f"    block {step.block_index}, pass {step.step}, t = {float(step.t[0]):.2f}"
            if frame else ""))

    frames = [0, *range(1, len(steps) + 1), *[len(steps)] * 3]
    FuncAnimation(figure, draw, frames).save(OUT / "denoising.gif", PillowWriter(fps=1.2), dpi=90)


def cost():
    """Distinct experts by tokens in a pass; speed-up over AR by passes a block, from bytes."""
    config = TwoTowerConfig()
    E, A = config.n_routed_experts, config.num_experts_per_tok
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    tokens = torch.arange(1, 129)
    left.plot(tokens, E * (1 - (1 - A / E) ** tokens), label="uniform routing")
    left.plot([16], [34], "o", color="#c1121f", label="reported of the release, 16 tokens")
    left.set(xlabel="tokens in a pass", ylabel="distinct experts a layer", xscale="log")
    left.set_xticks([1, 4, 16, 64, 128], [1, 4, 16, 64, 128])
    passes = torch.arange(1, 17)
    for hit, bits, style in ((34, 16, "-"), (34, 8, "-."), (34, 4.5, (0, (5, 1, 1, 1, 1, 1))),
                             (69, 16, "--"), (E, 16, ":")):          # 4.5: with the scales
        ar, block = (cost_of_pass(config, n, bits=bits).bytes for n in (A, hit))
        right.plot(passes, 16 * ar / ((passes + 1) * block), linestyle=style,
                   label=f"{hit} experts a layer" + f", in {bits:.0f} bits" * (hit == 34))
    right.plot(passes, 16 / (passes + 1), color="grey", label="every pass costs the same")
    right.axhline(2.42, color="#c1121f", linewidth=0.8)
    right.text(9, 2.5, "2.42", color="#c1121f", ha="right")
    right.axhline(1, color="black", linewidth=0.8)
    right.set(xlabel="denoiser passes a block of 16", ylabel="speed-up over AR", yscale="log")
    right.set_yticks([0.25, 0.5, 1, 2, 4, 8], [0.25, 0.5, 1, 2, 4, 8])
    for ax in (left, right):
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    figure.savefig(OUT / "cost.png", dpi=150)


def miniature(result: dict):
    """Accuracy of every mode against its speed."""
    figure, axes = plt.subplots(figsize=(7.6, 4.2), layout="constrained")
    rows = {row["mode"]: row for row in result["rows"] if row["task"] == "mean"}
    gammas = [row for mode, row in rows.items() if re.fullmatch("mask_diffusion [0-9.]+", mode)]
    axes.plot([row["speedup"] for row in gammas], [row["value"] for row in gammas], "o",
              label="diffusion, block 16, by gamma")
    axes.plot(1, rows["ar"]["value"], "s", color="tab:gray", label="AR")
    lossless = rows["speculative"]
    axes.plot(lossless["speedup"], lossless["value"], "D", color="tab:purple",
              label="speculative: AR's own text")
    for i, row in enumerate(gammas):
        axes.annotate(row["mode"].split()[1], (row["speedup"], row["value"]),
                      xytext=(3, 3) if i % 2 else (-3, -3), textcoords="offset points", fontsize=8,
                      rotation=45, ha="left" if i % 2 else "right", va="bottom" if i % 2 else "top")
    axes.axhline(0.987 * rows["ar"]["value"], color="tab:green", lw=0.8, ls="--",
                 label="98.7 % of AR's accuracy")
    axes.axvline(2.42, color="tab:red", lw=0.8, ls="--", label="2.42 x AR's tokens per second")
    axes.set_xlabel(f"speed, x AR in the same run (batches of {result['setting']['batch_size']})")
    axes.set_ylabel("exact match, mean of the tasks")
    axes.legend(loc="lower left", fontsize=8)
    axes.grid(alpha=0.3)
    axes.margins(y=0.1)
    figure.savefig(OUT / "miniature.png", dpi=150)


def gpu(result: dict):
    """Speed over AR by denoiser passes a block, for each way of routing and batch."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharey=True)
    for ax, kind in zip(axes, ("random", "concentrated")):
        for row in result[f"{kind}_speed_up"]:
            speeds = {int(key.split()[0]): x for key, x in row.items() if key.endswith(" passes")}
            ax.plot(speeds.keys(), speeds.values(), "o-", markersize=3,
                    label=f"batch {row['batch']}")
        ax.axhline(2.42, color="#c1121f", linewidth=0.8)
        ax.axhline(1, color="black", linewidth=0.8)
        ax.set(title=f"{kind} routing, {result['gpu']}", yscale="log",
               xlabel="denoiser passes a block (assumed)")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    axes[0].set_ylabel("speed over AR, from measured passes")
    figure.savefig(OUT / "gpu.png", dpi=150)


def training(folder: Path):
    """Validation losses of both phases, by source."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", sharey=True)
    titles = "phase 1: next token, context tower", "phase 2: masked tokens, denoiser tower"
    for phase, (ax, title) in enumerate(zip(axes, titles), 1):
        log = folder / f"phase{phase}" / "log.jsonl"
        log = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        for kind in log[0]["valid"]:
            ax.plot([line["step"] for line in log], [line["valid"][kind] for line in log],
                    label=kind)
        ax.set(title=title, xlabel="step", yscale="log")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("validation loss, nats a token")
    axes[1].legend(fontsize=8)
    figure.savefig(OUT / "training.png", dpi=150)


def measured(source: Path):
    """The figure of what was measured: of a folder of train.py, or of what a command printed."""
    if source.is_dir():
        return training(source)
    result = json.loads(source.read_text(encoding="utf-8").splitlines()[-1])
    return {"evaluate": miniature, "gpu": gpu}[result["setting"]["what"]](result)


def lines_of(path: Path) -> dict[str, int]:
    """The first line of every function, class and method of a file, by its qualified name."""
    def walk(body, prefix):
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                yield prefix + node.name, node.lineno
                yield from walk(node.body, prefix + node.name + ".")

    return dict(walk(ast.parse(path.read_text(encoding="utf-8")).body, ""))


def with_line_numbers(text: str) -> str:
    """Links like [`Tower`](twotower.py#L1), with the line where the symbol now begins.

    Raises: KeyError for a symbol that is not there.
    """
    def fresh(link: re.Match) -> str:
        symbol, file = link[1], link[2]
        return f"[`{symbol}`]({file}#L{lines_of(HERE.parent / file)[symbol]})"

    return re.sub(r"\[`([\w.]+)`\]\((\w+\.py)#L\d+\)", fresh, text)


def main():
    """All figures that need no measurement."""
    torch.set_num_threads(1)
    model = TwoTower.from_pretrained(MINIATURE)
    tokenizer = Tokenizer.from_file(str(MINIATURE / "tokenizer.json"))
    towers()
    scan(model, tokenizer.encode(PROMPT).ids)
    masks(model)
    denoising(model, tokenizer)
    film(model, tokenizer)
    cost()
    plt.close("all")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measured(Path(sys.argv[1]))
    else:
        main()
        tutorial = HERE.parent / "tutorial.md"
        text = tutorial.read_text(encoding="utf-8")
        tutorial.write_text(with_line_numbers(text), encoding="utf-8")
