# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # How experts and routers should begin
#
# An upcycled mixture starts from copies or shards of the dense FFN, scaled so that it computes what the dense model
# did, and from a random router. Four sweeps ask which of these choices still matter at the end of training. Each is a
# file of `sweeps/`; all their arms spend the same training FLOPs, and are paired by seed.
#
# Everything below is computed from the records in `UPCYCLE_RECORDS` (by default those committed at laptop scale),
# the words of the answers too. Runs that have not finished are named and do not count.

# %%
import os

from upcycle.analysis import draw_comparison, draw_curves
from upcycle.analysis.prose import answer, introduction, judgement
from upcycle.analysis.questions import Claim, judge, load_sweep

# %matplotlib inline
RECORDS = os.environ.get("UPCYCLE_RECORDS", "results/laptop")
NEMOTRON, DROP, SPARSE = "arXiv 2410.07524", "arXiv 2502.19261", "arXiv 2212.05055"

# %% [markdown]
# ## 1. Initialization of the experts

# %%
initialization = load_sweep(RECORDS, "initialization")
introduction(initialization)

# %% [markdown]
# The loss on held-out text against what was spent:

# %%
draw_curves(initialization.runs, arms="arm")

# %% [markdown]
# And where it ends, against `virtual_group`:

# %%
compared = initialization.compare("virtual_group")
draw_comparison(compared)

# %% [markdown]
# **Answer.**

# %%
answer(compared)

# %% [markdown]
# What each initialization costs before the first step:

# %%
answer(initialization.compare("virtual_group", until=0))

# %%
independent, coherent = "drop 0.5, independent", "drop 0.5, coherent"
judgement(
    judge(
        initialization,
        [
            Claim(
                source=NEMOTRON,
                says="virtual groups make fine-grained upcycling work: without them it is worse",
                arm="copy G2, groups not tied",
                baseline="virtual_group",
                expected="higher",
            ),
            Claim(
                source=NEMOTRON,
                says="re-initialising half gains nothing",
                arm=independent,
                baseline="virtual_group",
                expected="not lower",
            ),
            Claim(
                source=DROP,
                says="dropping half of the neurons outperforms copies in the long run",
                arm=coherent,
                baseline="copy G1",
                expected="lower",
            ),
            Claim(
                source="this sweep's hypothesis",
                says="random experts end higher than virtual groups",
                arm="random",
                baseline="virtual_group",
                expected="higher",
            ),
            Claim(
                source="this sweep's hypothesis",
                says="noise costs loss that a short budget does not win back",
                arm="noise 0.1",
                baseline="virtual_group",
                expected="higher",
            ),
        ],
    )
)

# %% [markdown]
# ## 2. The factor of weight scaling

# %%
weight_scale = load_sweep(RECORDS, "weight_scale")
introduction(weight_scale)

# %%
compared = weight_scale.compare("baseline")
draw_comparison(compared)

# %% [markdown]
# **Answer.** The baseline is `init.scaling=exact`.

# %%
answer(compared)

# %%
judgement(
    judge(
        weight_scale,
        [
            Claim(
                source=NEMOTRON,
                says="scaling the weights lowers the loss (1.5 % at 15 B)",
                arm="scaling=none",
                baseline="baseline",
                expected="higher",
            ),
            Claim(
                source=NEMOTRON,
                says="scaling W2 alone is worse",
                arm="scaling=down",
                baseline="scaling=paper",
                expected="higher",
            ),
        ],
    )
)

# %% [markdown]
# ## 3. The spread of the router

# %%
router_std = load_sweep(RECORDS, "router_std")
introduction(router_std)

# %%
compared = router_std.compare("baseline")
draw_comparison(compared)

# %% [markdown]
# **Answer.**

# %%
answer(compared)

# %% [markdown]
# ## 4. Which layers

# %%
layers = load_sweep(RECORDS, "layers")
introduction(layers)

# %%
compared = layers.compare("baseline")
draw_comparison(compared)

# %% [markdown]
# **Answer.** The baseline converts all layers.

# %%
answer(compared)

# %%
judgement(
    judge(
        layers,
        [
            Claim(
                source=SPARSE,
                says="half of the layers are enough",
                arm="layers=every_2",
                baseline="baseline",
                expected="same",
            ),
        ],
    )
)

# %% [markdown]
# ## Limits
#
# The dense model has two layers and a quarter of a million parameters, reads bytes, and continues on the text that it
# was pretrained on; the published outcomes are of models four orders of magnitude larger, trained on a hundred billion
# tokens. A verdict of `same` is about effects of 1 %; the published ones are hardly larger. p values are adjusted
# within a figure, not across figures.
