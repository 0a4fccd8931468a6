"""Draw the figures of tutorial.md and README.md: `python figures/make.py` writes them here.

    idea.png        the whole method: two towers, a block being denoised, the next one
    chunks.png      which of a scan's matrix products carries what from token to token
    experts.png     tokens sorted by expert, so that each expert is read once
    towers.png      the two towers, layer by layer, and what crosses between them
    adaln.png       what the noise level does to a layer
    speculative.png a draft, what AR chose, what is kept
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

MINIATURE, MASK = HERE.parent / "miniature", 3
COLORS = {"M": "#8ecae6", "*": "#cdb4db", "E": "#d8e2dc"}
KINDS = {"M": "Mamba-2", "*": "attention", "E": "experts"}
NEW, MASKED, EDGE, TIME = "#ffb703", "#e9ecef", "#adb5bd", "#c1121f"     # of tokens; of t


def canvas(width: float, height: float):
    """Axes without ticks, 0 to width and 0 to height, that fill a picture 8 inches wide."""
    figure, ax = plt.subplots(figsize=(8, 8 * height / width), layout="constrained")
    ax.set(xlim=(0, width), ylim=(0, height))
    ax.axis("off")
    return figure, ax


def box(ax, x: float, y: float, width: float, height: float, text: str = "", face="white",
        edge="black", **style):
    ax.add_patch(Rectangle((x, y), width, height, facecolor=face, edgecolor=edge))
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", **style)


def arrow(ax, start: tuple[float, float], end: tuple[float, float], color="#333333"):
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="->", mutation_scale=14, color=color))


def idea():
    """A drawing, with a block of 8 for want of room."""
    figure, ax = canvas(16, 9.8)
    block = "lies on the Seine , and is old".split()
    passes = [set(), {1, 2, 4}, {0, 3, 5}, {6, 7}]
    box(ax, 0.2, 6.6, 4.6, 2.2, "context tower\nreads finished text,\nleft to right; frozen")
    box(ax, 9.6, 6.6, 6.2, 2.2, "denoiser tower\nguesses all masked tokens\n"
        "of a block at once; trained")
    arrow(ax, (4.85, 7.7), (9.55, 7.7))
    ax.text(7.2, 7.85, "what each layer keeps", ha="center", va="bottom")
    ax.text(7.2, 7.5, "keys and values, or\nMamba-2 states", ha="center", va="top", fontsize=9)
    ax.text(12.7, 9.35, "t: how much is masked", color=TIME, ha="center", va="center")
    arrow(ax, (12.7, 9.15), (12.7, 8.85), TIME)
    for i, token in enumerate("The capital of France is Paris . It".split()):
        box(ax, 0.2 + 1.15 * (i % 4), 5.0 - 0.85 * (i // 4), 1.1, 0.75, token, edge=EDGE,
            fontsize=9)
    ax.text(2.5, 3.85, "the prompt", ha="center", va="top")
    arrow(ax, (2.5, 5.85), (2.5, 6.55))
    arrow(ax, (12.7, 5.85), (12.7, 6.55))
    ax.text(12.9, 6.2, "in: the block as it is; out: guesses", va="center", fontsize=9)
    known = set()
    for step, new in enumerate(passes):
        y, known = 5.0 - 1.15 * step, known | new
        for i, token in enumerate(block):
            face = NEW if i in new else "white" if i in known else MASKED
            box(ax, 7.6 + 1.03 * i, y, 0.99, 0.75, token if i in known else "", face, EDGE,
                fontsize=9)
        label = f"after pass {step}" if step else "at first"
        ax.text(7.4, y + 0.37, f"{label}\nt = {1 - len(known) / 8:.2f}", ha="right", va="center",
                color=TIME if step < 3 else "black", fontsize=9)
    box(ax, 0.2, 0.25, 15.6, 0.75, "the finished block is read by the context tower, in one pass; "
        "the next block begins, all masks", fontsize=9)
    ax.add_patch(FancyArrowPatch((9.0, 1.5), (9.0, 1.05), arrowstyle="->", mutation_scale=14))
    ax.text(0.2, 2.6, "grey: masked\norange: committed in this pass\nwhite: committed before",
            va="center", fontsize=9)
    figure.savefig(OUT / "idea.png", dpi=150)


def chunks():
    """Who reads whom in a scan of 12 tokens by chunks of 4, and by which product."""
    figure, ax = canvas(16, 7.4)
    for token in range(12):
        for read in range(token + 1):
            same = token // 4 == read // 4
            ax.add_patch(Rectangle((1.4 + 0.5 * read, 6.2 - 0.5 * token), 0.46, 0.46,
                                   facecolor=COLORS["*" if same else "M"], edgecolor="none"))
    for chunk in range(3):
        ax.text(2.4 + 2 * chunk, 6.85, f"chunk {chunk}", ha="center", fontsize=9)
        ax.text(1.2, 5.7 - 2 * chunk, f"chunk {chunk}", ha="right", fontsize=9)
        box(ax, 9.4 + 2.3 * chunk, 4.4, 1.5, 1.1, f"chunk {chunk}", COLORS["*"])
        arrow(ax, (10.15 + 2.3 * chunk, 5.5), (10.15 + 2.3 * chunk, 6.3))
        ax.text(10.25 + 2.3 * chunk, 6.35, "y", ha="center")
        arrow(ax, (8.65 + 2.3 * chunk, 4.95), (9.35 + 2.3 * chunk, 4.95))
        ax.text(9.0 + 2.3 * chunk, 5.05, "h", ha="center")
    arrow(ax, (15.55, 4.95), (15.95, 4.95))
    ax.text(4.4, 0.15, "across: token that is read; down: token that reads", ha="center",
            fontsize=9)
    box(ax, 8.4, 2.55, 0.46, 0.46, face=COLORS["*"], edge="none")
    ax.text(9.1, 2.78, "products 1 and 2: tokens of the same chunk", va="center", fontsize=9)
    box(ax, 8.4, 1.75, 0.46, 0.46, face=COLORS["M"], edge="none")
    ax.text(9.1, 1.98, "product 3: older tokens, all through the state h", va="center", fontsize=9)
    ax.text(9.1, 1.2, "product 4: what a chunk adds to h", va="center", fontsize=9)
    ax.plot([8.4, 8.86], [1.2, 1.2], color="#333333")
    figure.savefig(OUT / "chunks.png", dpi=150)


def experts():
    """Three tokens, two experts each: six slots, sorted by expert and cut into tiles of two."""
    figure, ax = canvas(16, 8.6)
    chosen, faces = [0, 2, 0, 2, 2, 1], [COLORS["E"], "#b5cbbf", "#8fb3a0"]
    order = sorted(range(6), key=lambda slot: chosen[slot])
    ends, tiles = {0: 2, 1: 3, 2: 6}, [(0, [0, 2]), (1, [5, None]), (2, [1, 3]), (2, [4, None])]
    for y, text in ((7.2, "slots, by token"), (4.7, "sorted\nby expert"),
                    (3.1, "weights that\nare read"), (0.9, "tiles of 2 rows\n(a GPU kernel)")):
        ax.text(0.1, y + 0.45, text, va="center")
    for slot in range(6):
        x = 3.6 + 1.7 * slot
        if slot % 2 == 0:
            ax.text(x + 1.65, 8.3, f"token {slot // 2}", ha="center", va="center", weight="bold")
        place = 3.6 + 1.7 * order.index(slot)
        box(ax, x, 7.0, 1.6, 0.95, f"slot {slot}\nexpert {chosen[slot]}", faces[chosen[slot]],
            fontsize=9)
        box(ax, place, 4.5, 1.6, 0.95, f"slot {slot}\ntoken {slot // 2}", faces[chosen[slot]],
            fontsize=9)
        arrow(ax, (x + 0.8, 6.95), (place + 0.8, 5.5))
    for expert, first in ((0, 0), (1, 2), (2, 3)):
        x, width = 3.6 + 1.7 * first, 1.7 * (ends[expert] - first) - 0.1
        box(ax, x, 2.95, width, 0.95, f"expert {expert}", faces[expert])
        arrow(ax, (x + width / 2, 3.95), (x + width / 2, 4.45))
    box(ax, 14.0, 2.95, 1.7, 0.95, "expert 3:\nnot read", MASKED, EDGE, fontsize=9)
    for i, (expert, rows) in enumerate(tiles):
        x = 3.6 + 2.55 * i
        ax.text(x + 1.15, 2.2, f"tile {i}: expert {expert}", ha="center", fontsize=9)
        for row, slot in enumerate(rows):
            box(ax, x, 1.2 - 0.8 * row, 2.3, 0.75, "padding" if slot is None else f"slot {slot}",
                MASKED if slot is None else faces[expert], EDGE, fontsize=9)
    figure.savefig(OUT / "experts.png", dpi=150)


def adaln():
    """From t to a layer's shift, scale and gate, and where each kind of layer takes them."""
    figure, ax = canvas(16, 7.6)
    chain = ("t", "256 waves\ncos, sin of 1000 t", "t_embedder\n2 Linear", "t_block\n1 Linear",
             "+ table of\nthe layer", "shift\nscale\ngate")
    at, widths = 0.2, (0.8, 3.0, 2.2, 2.0, 2.2, 1.3)
    for i, (text, width) in enumerate(zip(chain, widths)):
        box(ax, at, 6.0, width, 1.25, text, edge=TIME, fontsize=9)
        if i:
            arrow(ax, (at - 0.8, 6.6), (at - 0.05, 6.6), TIME)
        at += width + 0.85
    ax.text(0.2, 5.7, "once a pass, for all layers", va="top", fontsize=9, color=TIME)
    ax.text(11.4, 5.7, "for each layer", va="top", fontsize=9, color=TIME)
    for y, kinds, names in ((3.3, "M*", ("modulate", "norm", "mixer")),
                            (0.7, "E", ("norm", "modulate", "mixer"))):
        ax.text(0.2, y + 1.55, "Mamba-2 and attention layers" if kinds == "M*" else
                "expert and MLP layers", weight="bold", fontsize=10)
        ax.text(0.2, y + 0.4, "x", va="center")
        for i, name in enumerate((*names, "times gate")):
            x, timed = 1.6 + 3.1 * i, name in ("modulate", "times gate")
            face = "white" if name != "mixer" else COLORS["E"] if kinds == "E" else COLORS["M"]
            box(ax, x, y, 2.3, 0.8, name, face, TIME if timed else "black", fontsize=10)
            if timed:
                arrow(ax, (x + 1.15, y + 1.35), (x + 1.15, y + 0.85), TIME)
                ax.text(x + 1.3, y + 1.15, "shift, scale" if name == "modulate" else "gate",
                        fontsize=9, color=TIME)
            arrow(ax, (x - 0.75 if i else 0.5, y + 0.4), (x - 0.05, y + 0.4))
        ax.text(14.5, y + 0.4, "+", ha="center", va="center", fontsize=14)
        arrow(ax, (13.25, y + 0.4), (14.25, y + 0.4))
        ax.plot([0.9, 0.9, 14.5, 14.5], [y + 0.4, y - 0.4, y - 0.4, y + 0.1], color="#333333", lw=1)
        arrow(ax, (14.75, y + 0.4), (15.8, y + 0.4))
    figure.savefig(OUT / "adaln.png", dpi=150)


def speculative():
    """The tutorial's example: 5 is known, 6, 7, 8 are drafted, AR chose 6, 7, 9, 4."""
    figure, ax = canvas(16, 6.6)
    for text, y, tokens in (
            ("block: 5 is known, the\ndenoiser drafts the rest", 5.2, (5, 6, 7, 8)),
            ("AR's choice after each,\nby one causal pass", 3.1, (6, 7, 9, 4)),
            ("kept; 9 is known in\nthe next block", 0.9, (5, 6, 7, 9))):
        ax.text(0.1, y + 0.45, text, va="center")
        for i, token in enumerate(tokens):
            drafted, useless = y == 5.2 and i > 0, y == 3.1 and i == 3
            box(ax, 5.6 + 2.2 * i + 0.9 * (y == 0.9 and i == 3), y, 1.3, 0.9, str(token),
                NEW if drafted or y == 0.9 and i == 3 else MASKED if useless else "white")
    for i, text in enumerate(("same", "same", "differs")):
        color = TIME if text == "differs" else "#333333"
        arrow(ax, (6.25 + 2.2 * i, 4.05), (8.4 + 2.2 * i, 5.15), color)
        ax.text(7.75 + 2.2 * i, 4.4, text, fontsize=9, va="center", color=color)
    ax.text(13.7, 3.55, "after a wrong\ntoken: of no use", va="center", fontsize=9)
    arrow(ax, (10.9, 3.05), (13.4, 1.85), TIME)
    ax.text(5.6, 0.4, "the context tower goes back to the end of what is kept", fontsize=9,
            va="center")
    figure.savefig(OUT / "speculative.png", dpi=150)


def towers():
    """One period of the released pattern as two columns of boxes; arrows for what crosses."""
    figure, ax = plt.subplots(figsize=(8, 6), layout="constrained")
    pattern = TwoTowerConfig().hybrid_override_pattern[:6]
    crossing = {"M": "conv_state, ssm_state", "*": "keys, values"}
    for x, name in ((0, "context tower\n(frozen, causal)"), (6, "denoiser tower\n(trained)")):
        ax.text(x + 1.2, len(pattern) + 1.9, name, ha="center", weight="bold")
        head = "context_lm_head" if x == 0 else "lm_head"
        for y, text in ((-0.95, "embeddings"), (len(pattern) + 0.95, f"norm_f, {head}")):
            box(ax, x, y, 2.4, 0.6, text, fontsize=9)
        for i, kind in enumerate(pattern):
            box(ax, x, i, 2.4, 0.7, f"{i}  {KINDS[kind]}", COLORS[kind])
        ax.text(x + 1.2, len(pattern) + 0.35, "... 52 layers in all", ha="center", va="center")
    for i, kind in enumerate(pattern):
        if kind in crossing:
            arrow(ax, (2.45, i + 0.35), (5.95, i + 0.35))
            ax.text(4.2, i + 0.47, crossing[kind], ha="center", fontsize=10)
        arrow(ax, (9.3, i + 0.35), (8.45, i + 0.35), TIME)
    ax.text(9.4, 2.9, "t: shift,\nscale, gate\nfor every\nlayer", color=TIME, va="center")
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
    figure, axes = plt.subplots(1, 3, figsize=(8, 3), layout="constrained")
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
    figure, ax = plt.subplots(figsize=(8, 4.4), layout="constrained")
    ax.imshow(seen[0][0, 0], cmap="Blues", vmin=0, vmax=1.4)
    for edge in range(16, 128, 16):
        ax.axvline(edge - 0.5, color="white", linewidth=0.8)
    for edge in range(16, 64, 16):
        ax.axhline(edge - 0.5, color="white", linewidth=0.8)
    ax.axvline(63.5, color=TIME, linewidth=1.5)
    ticks = [8, 24, 40, 56]
    names = [f"block {b}" for b in range(4)]
    ax.set_xticks(ticks + [64 + tick for tick in ticks], names * 2, fontsize=9)
    ax.set_yticks(ticks, names, fontsize=9)
    ax.set(xlabel="keys: clean blocks of the context tower | noisy blocks of the denoiser",
           ylabel="queries: noisy blocks", title="dark: visible")
    figure.savefig(OUT / "masks.png", dpi=150)


def denoising(steps: list, tokenizer: Tokenizer):
    """Every denoiser pass over a prompt's answer: tokens as they stand, new commits in color."""
    figure, ax = plt.subplots(figsize=(8, 0.62 * len(steps) + 0.5), layout="constrained")
    for y, step in enumerate(steps):
        for x in range(16):
            token = int(step.after[0, x])
            masked, new = token == MASK, bool(step.committed[0, x])
            text = "" if masked else shown(tokenizer, token)
            box(ax, x, -y, 0.96, 0.62, f"{text}\n{float(step.confidence[0, x]):.2f}",
                MASKED if masked else NEW if new else "white", EDGE, fontsize=7.5)
        ax.text(0, -y + 0.66, f"block {step.block_index + 1}, pass {step.step + 1}, "
                f"t = {float(step.t[0]):.2f}", va="bottom", fontsize=9, color=TIME)
    ax.set(xlim=(0, 16), ylim=(-len(steps) + 0.95, 1.5))
    ax.text(0, 1.2, "orange: committed in this pass; white: before; grey: masked; below: how likely "
            "the best guess is; ␣·3: three spaces", fontsize=8)
    ax.axis("off")
    figure.savefig(OUT / "denoising.png", dpi=150)


def shown(tokenizer: Tokenizer, token: int) -> str:
    text = tokenizer.decode([token], skip_special_tokens=False)
    text = re.sub(" {3,}", lambda spaces: f"␣·{len(spaces[0])}", text)
    return text.replace("\n", "↵").replace(" ", "␣")


def film(steps: list, tokenizer: Tokenizer):
    """The same passes as a moving picture: each block's tokens as they are committed."""
    blocks = 1 + steps[-1].block_index
    top = 1.7 + 0.33 * PROMPT.count("\n")
    figure, ax = plt.subplots(figsize=(10, 0.62 * (blocks + top - 1)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0, h_pad=0)
    ax.set(xlim=(0, 16), ylim=(-blocks + 0.95, top))
    ax.axis("off")
    ax.text(0, top - 0.1, PROMPT.strip(), fontsize=10, family="monospace", va="top")
    caption = ax.text(0, 1.2, "", fontsize=10)
    cells = {}
    for y in range(blocks):
        for x in range(16):
            cell = ax.add_patch(Rectangle((x, -y), 0.96, 0.86, facecolor=MASKED, edgecolor=EDGE))
            cells[y, x] = cell, ax.text(x + 0.48, -y + 0.43, "", ha="center", va="center",
                                        fontsize=9)

    def draw(frame: int):
        """Frame 0 is all masks; frame i is what stands after pass i-1."""
        step = steps[max(0, frame - 1)]
        for x in range(16 * (frame > 0)):
            token, (cell, label) = int(step.after[0, x]), cells[step.block_index, x]
            if token != MASK:
                label.set_text(shown(tokenizer, token))
                cell.set_facecolor(NEW if step.committed[0, x] else "white")
        for (y, _), (cell, _) in cells.items():
            if y < step.block_index:
                cell.set_facecolor("white")
        caption.set_text("grey: masked    orange: committed in this pass" + (
            f"    block {step.block_index + 1}, pass {step.step + 1}, t = {float(step.t[0]):.2f}"
            if frame else ""))

    frames = [0, *range(1, len(steps) + 1), *[len(steps)] * 3]
    FuncAnimation(figure, draw, frames).save(OUT / "denoising.gif", PillowWriter(fps=1.2), dpi=90)


def cost():
    """Distinct experts by tokens in a pass; speed-up over AR by passes a block, from bytes."""
    config = TwoTowerConfig()
    E, A = config.n_routed_experts, config.num_experts_per_tok
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.8), layout="constrained")
    tokens = torch.arange(1, 129)
    left.plot(tokens, E * (1 - (1 - A / E) ** tokens), label="uniform routing")
    left.plot([16], [34], "o", color="#c1121f", label="reported of the release, 16 tokens")
    left.set(xlabel="tokens in a pass", ylabel="distinct experts a layer", xscale="log")
    left.set_xticks([1, 4, 16, 64, 128], [1, 4, 16, 64, 128])
    passes = torch.arange(1, 17)
    for hit, bits, style in ((34, 16, "-"), (34, 8, "--"), (34, 4.5, ":"), (69, 16, "-.")):
        ar, block = (cost_of_pass(config, n, bits=bits).bytes for n in (A, hit))
        right.plot(passes, 16 * ar / ((passes + 1) * block), style,     # 4.5 bits: with the scales
                   label=f"{hit} experts a layer, {int(bits)} bits")
    right.plot(passes, 16 / (passes + 1), color="grey", label="every pass costs the same")
    right.axhline(2.42, color="#c1121f", linewidth=0.8)
    right.text(9, 2.5, "2.42", color="#c1121f", ha="right")
    right.axhline(1, color="black", linewidth=0.8)
    right.set(xlabel="denoiser passes a block of 16", ylabel="speed-up over AR", yscale="log")
    right.set_xticks([1, 4, 8, 12, 16])
    right.minorticks_off()
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
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.8), layout="constrained", sharey=True)
    for ax, kind in zip(axes, ("random", "concentrated")):
        for row in result[f"{kind}_speed_up"]:
            speeds = {int(key.split()[0]): x for key, x in row.items() if key.endswith(" passes")}
            ax.plot(speeds.keys(), speeds.values(), "o-", markersize=3,
                    label=f"batch {row['batch']}")
        ax.axhline(2.42, color="#c1121f", linewidth=0.8)
        ax.axhline(1, color="black", linewidth=0.8)
        ax.set(title=f"{kind} routing, {result['gpu']}", yscale="log",
               xlabel="denoiser passes a block (assumed)")
        ax.set_xticks([1, 2, 4, 6, 8, 12, 16])
        ax.set_yticks([0.5, 1, 2, 2.42, 4], ["0.5", "1", "2", "2.42", "4"])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
        ax.legend()
    axes[0].set_ylabel("speed over AR, from measured passes")
    figure.savefig(OUT / "gpu.png", dpi=150)


def measured(source: Path):
    """The figure of what a command printed."""
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
    for draw in (idea, chunks, experts, towers, adaln, speculative):
        draw()
    scan(model, tokenizer.encode(PROMPT).ids[:40])
    masks(model)
    steps = []
    model.generate_mask_diffusion([tokenizer.encode(PROMPT).ids], 128, eos_token_id=2,
                                  on_step=steps.append)
    denoising(steps, tokenizer)
    film(steps, tokenizer)
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
