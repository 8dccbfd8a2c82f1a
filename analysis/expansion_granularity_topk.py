# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # How many experts, how fine, and how many at a time
#
# A mixture `EeGgTt` has e·g experts, each 1/g of the dense FFN's width, of which t read a token; it costs as many FLOPs
# a token as the dense model where t = g. The sweep `egt` gives all shapes the same training FLOPs, so that shapes with
# more active width get fewer tokens.
#
# Everything below is computed from the records in `UPCYCLE_RECORDS` (by default those committed at laptop scale),
# the words of the answers too. Runs that have not finished are named and do not count.

# %%
import os

from upcycle.analysis import draw_comparison, draw_curves, draw_frontier, frontier
from upcycle.analysis.prose import answer, introduction, judgement
from upcycle.analysis.questions import Claim, judge, load_sweep

# %matplotlib inline
RECORDS = os.environ.get("UPCYCLE_RECORDS", "results/laptop")
NEMOTRON = "arXiv 2410.07524"
SHAPES = [(e, 1, 1) for e in (2, 4, 8, 16, 32)]
SHAPES += [(8, 2, 2), (4, 4, 4), (8, 4, 4), (16, 4, 4), (8, 8, 8), (8, 1, 2), (8, 4, 8)]

# %% [markdown]
# ## Groups that hold
#
# With g above 1, the start is the dense model's only as long as the selected experts make whole FFNs. The sweep
# `groups` asks how to choose them: one by one (`free`), with router rows that stay equal within a group (`tied`), whole
# groups (`whole`), or the best of each shard position (`positions`). E8 everywhere; a shape's name leaves it out.

# %%
groups = load_sweep(RECORDS, "groups")
introduction(groups)

# %%
WAYS = ("free", "tied", "whole", "positions")
eighths = [f"G8T8 softmax_topk {way}" for way in WAYS]
draw_curves(groups.only("dense", "E8G1T1", *eighths).runs, arms="arm")

# %% [markdown]
# Against the dense model that goes on, at equal FLOPs, shapes with as many active experts as a group has:

# %%
single = [f"{shape} softmax_topk {way}" for shape in ("G2T2", "G4T4", "G8T8") for way in WAYS]
compared = groups.only("dense", "E8G1T1", *single).compare("dense")
draw_comparison(compared)

# %%
answer(compared)

# %% [markdown]
# With twice as many, each shape beside the dense model:

# %%
answer(groups.only("dense", *(f"G4T8 softmax_topk {way}" for way in WAYS)).compare("dense"))

# %%
answer(groups.only("dense", *(f"G2T4 topk_softmax {way}" for way in WAYS)).compare("dense"))

# %%
answer(groups.only("dense", *(f"G4T8 topk_softmax {way}" for way in WAYS)).compare("dense"))

# %%
answer(groups.only("dense", *(f"G8T16 topk_softmax {way}" for way in WAYS)).compare("dense"))

# %% [markdown]
# Against coarse experts, E8G1T1, which is whether finer grains pay:

# %%
answer(groups.only("E8G1T1", *(shape for shape in single if "free" not in shape)).compare("E8G1T1"))

# %% [markdown]
# At half of the budget, and at twice it:

# %%
halves = [f"{shape} {way}, half" for shape in ("G8T8 softmax_topk", "G4T8 topk_softmax") for way in WAYS]
answer(groups.only("dense, half", "E8G1T1, half", *halves).compare("dense, half"))

# %%
answer(groups.only("dense, double", "E8G1T1, double", "G8T8 softmax_topk positions, double").compare("dense, double"))

# %% [markdown]
# Groups that hold for three tenths of the budget alone:

# %%
released = ("G8T8 softmax_topk whole, then free", "G8T8 softmax_topk tied, then positions")
answer(
    groups.only("G8T8 softmax_topk positions", "G8T8 softmax_topk free", *released).compare("G8T8 softmax_topk free")
)

# %%
judgement(
    judge(
        groups.only("dense", "E8G1T1", *single),
        [
            Claim(
                source="this sweep's hypothesis",
                says="chosen one by one, eighths end above the dense model",
                arm="G8T8 softmax_topk free",
                baseline="dense",
                expected="higher",
            ),
            *(
                Claim(
                    source="this sweep's hypothesis",
                    says=f"where groups hold ({way}), they end below it",
                    arm=f"G8T8 softmax_topk {way}",
                    baseline="dense",
                    expected="lower",
                )
                for way in WAYS[1:]
            ),
            Claim(
                source="this sweep's hypothesis",
                says="one expert of each shard position ends lowest",
                arm="G8T8 softmax_topk positions",
                baseline="G8T8 softmax_topk whole",
                expected="lower",
            ),
            Claim(
                source=NEMOTRON,
                says="64 experts, finer ones, are better than 8 at equal FLOPs",
                arm="G8T8 softmax_topk positions",
                baseline="E8G1T1",
                expected="lower",
            ),
        ],
    )
)

# %% [markdown]
# ## Shapes
#
# The sweep `egt`: experts chosen one by one, whose groups come apart in some ten steps, and again with one of each
# shard position ("positions"). With g = 1 there is no difference.

# %%
names = {f"expansion={e} granularity={g} top_k={t}": f"E{e}G{g}T{t}" for e, g, t in SHAPES}
egt = load_sweep(RECORDS, "egt").renamed(names)
introduction(egt)

# %% [markdown]
# ## Expansion
#
# The number of whole FFNs, one active, at the dense model's FLOPs a token; first whole experts, then quarters, chosen
# one by one and by position:

# %%
expansion = egt.only("E2G1T1", "E4G1T1", "E8G1T1", "E16G1T1", "E32G1T1")
draw_curves(expansion.runs, arms="arm")

# %%
answer(expansion.compare("E8G1T1"))

# %%
quarters = egt.only("E4G4T4", "E8G4T4", "E16G4T4")
draw_curves(quarters.runs, arms="arm")

# %%
answer(quarters.compare("E8G4T4"))

# %%
held = egt.only("E4G4T4 positions", "E8G4T4 positions", "E16G4T4 positions")
draw_curves(held.runs, arms="arm")

# %%
answer(held.compare("E8G4T4 positions"))

# %% [markdown]
# ## Granularity
#
# The same width in total and active, cut finer; one by one, then by position:

# %%
granularity = egt.only("E8G1T1", "E8G2T2", "E8G4T4", "E8G8T8")
draw_curves(granularity.runs, arms="arm")

# %%
answer(granularity.compare("E8G1T1"))

# %%
held = egt.only("E8G1T1", "E8G2T2 positions", "E8G4T4 positions", "E8G8T8 positions")
draw_curves(held.runs, arms="arm")

# %%
answer(held.compare("E8G1T1"))

# %% [markdown]
# ## Top-k
#
# Twice the active width, paid with fewer tokens:

# %%
draw_curves(egt.only("E8G1T1", "E8G1T2", "E8G4T4", "E8G4T8").runs, arms="arm")

# %%
answer(egt.only("E8G4T4", "E8G4T8").compare("E8G4T4"))

# %%
answer(egt.only("E8G4T4 positions", "E8G4T8 positions").compare("E8G4T4 positions"))

# %% [markdown]
# ## All shapes

# %%
compared = egt.compare("E8G1T1")
draw_comparison(compared)

# %% [markdown]
# **Answer.** Against E8G1T1:

# %%
answer(compared)

# %%
judgement(
    judge(
        egt,
        [
            Claim(
                source=NEMOTRON,
                says="E8G1T2 ends below E8G1T1 (at more FLOPs a token; here at equal FLOPs in all)",
                arm="E8G1T2",
                baseline="E8G1T1",
                expected="lower",
            ),
            Claim(
                source=NEMOTRON,
                says="64 experts, finer ones, are better than 8 at equal FLOPs (here one by one)",
                arm="E8G8T8",
                baseline="E8G1T1",
                expected="lower",
            ),
            Claim(
                source=NEMOTRON,
                says="64 experts, finer ones, are better than 8 at equal FLOPs (here by position)",
                arm="E8G8T8 positions",
                baseline="E8G1T1",
                expected="lower",
            ),
            Claim(
                source="this sweep's hypothesis",
                says="finer experts need a larger budget than this one (one by one)",
                arm="E8G8T8",
                baseline="E8G1T1",
                expected="higher",
            ),
            Claim(
                source="this sweep's hypothesis",
                says="finer experts need a larger budget than this one (by position)",
                arm="E8G8T8 positions",
                baseline="E8G1T1",
                expected="higher",
            ),
            *(
                Claim(
                    source="the sweep `groups`",
                    says=f"{shape} ends lower by position than one by one",
                    arm=f"{shape} positions",
                    baseline=shape,
                    expected="lower",
                )
                for shape in names.values()
                if "G1T" not in shape
            ),
            Claim(
                source="this sweep's hypothesis",
                says="more experts help at first",
                arm="E8G1T1",
                baseline="E2G1T1",
                expected="lower",
            ),
            Claim(
                source="this sweep's hypothesis",
                says="and then split the text too thinly",
                arm="E16G1T1",
                baseline="E8G1T1",
                expected="higher",
            ),
            Claim(
                source="this sweep's hypothesis",
                says="32 even more so",
                arm="E32G1T1",
                baseline="E16G1T1",
                expected="higher",
            ),
        ],
    )
)

# %% [markdown]
# ## Against going on with the dense model
#
# The sweep `budget` has the dense model continued for the same FLOPs, with the same seeds, text and order:

# %%
names = [f"{model}, {size}" for model in ("dense", "upcycle", "scratch") for size in ("half", "whole", "double")]
budget = load_sweep(RECORDS, "budget").called(*names)
introduction(budget)

# %%
both = egt.beside(budget.only("dense, whole"))
compared = both.compare("dense, whole")
draw_comparison(compared)

# %%
answer(compared)

# %% [markdown]
# Loss against FLOPs, and the set of points that nothing cheaper beats:

# %%
draw_frontier(frontier(both.runs, arms="arm"))

# %% [markdown]
# ## Limits
#
# One size of dense model (two layers, a quarter of a million parameters, bytes) and one budget of a few million tokens:
# which shape is best is published to depend on both. An expert of E8G8T8 has 32 neurons here. Equal FLOPs are counted,
# not timed: fine experts run slower than their FLOPs on a CPU. Points before the end of a curve belong to an unfinished
# schedule.
