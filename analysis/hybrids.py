# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Hybrids of Mamba-2, attention and FFNs
#
# Nemotron-H and its successors are stacks of layers of three kinds. Here the FFNs of a small one
# (`models/stdlib-hybrid`) become its family's own mixtures: sigmoids that are divided by their sum, squared ReLU, a
# shared expert where one is asked for.
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

# %% [markdown]
# ## Does upcycling a hybrid pay?

# %%
hybrid = load_sweep(RECORDS, "hybrid")
introduction(hybrid)

# %%
upcycled = hybrid.only("dense", "E8G1T2", "E8G4T8", "E8G4T8, shared third")
draw_curves(upcycled.runs, arms="arm")

# %% [markdown]
# Against the dense hybrid that goes on, at equal FLOPs:

# %%
compared = upcycled.compare("dense")
draw_comparison(compared)

# %%
answer(compared)

# %% [markdown]
# The same mixture from random weights, against the upcycled one:

# %%
scratch = hybrid.only("E8G4T8", "E8G4T8, scratch")
draw_curves(scratch.runs, arms="arm")

# %%
answer(scratch.compare("E8G4T8", allow=["source"]))

# %%
judgement(
    judge(
        upcycled,
        [
            *(
                Claim(
                    source="this sweep's hypothesis",
                    says="a mixture that holds its start ends below the dense model",
                    arm=arm,
                    baseline="dense",
                    expected="lower",
                )
                for arm in ("E8G1T2", "E8G4T8", "E8G4T8, shared third")
            ),
            Claim(
                source="this sweep's hypothesis",
                says="a shared expert that takes a third of the neurons costs nothing",
                arm="E8G4T8, shared third",
                baseline="E8G4T8",
                expected="same",
            ),
        ],
    )
)

# %% [markdown]
# ## Multi-token prediction
#
# A block behind the last layer predicts the token after the next one, and applied again, the one after that.

# %%
mtp = load_sweep(RECORDS, "mtp")
introduction(mtp)

# %%
draw_curves(mtp.runs, arms="arm", metric="val/mtp_loss")

# %%
answer(mtp.compare("random"), metric="val/mtp_loss")

# %% [markdown]
# What the block costs the model itself, by its own held-out loss:

# %%
answer(mtp.compare("random", metric="val/loss"))

# %%
judgement(
    judge(
        mtp,
        [
            Claim(
                source="this sweep's hypothesis",
                says="layers that are trained already predict the second token better than random ones",
                arm="copy",
                baseline="random",
                expected="lower",
            ),
        ],
    )
)

# %% [markdown]
# ## Limits
#
# One small hybrid (Mamba-2, FFN, attention, FFN) that reads bytes, and a budget of about a million of them: which way
# is best may depend on both. FLOPs are counted, not timed.
