# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # How tokens find their experts, and what keeps experts busy
#
# Two papers disagree on whether softmax comes before or after top-k; they also scale weights differently, so the first
# sweep crosses both. The others ask what balancing, capacity limits and shared experts do to the loss. All arms of a
# sweep spend the same training FLOPs and are paired by seed.
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
NEMOTRON, LLAMA, AUX_FREE, GLOBAL = "arXiv 2410.07524", "arXiv 2412.09952", "arXiv 2408.15664", "arXiv 2501.11873"
HYPOTHESIS = "this sweep's hypothesis"

# %% [markdown]
# ## 1. Router order and weight scaling

# %%
names = {
    f"router_order={order} scaling={scaling}": f"{order}, {scaling}"
    for order in ("softmax_topk", "topk_softmax")
    for scaling in ("exact", "paper", "none", "down")
}
router_order = load_sweep(RECORDS, "router_order").renamed(names)
introduction(router_order)

# %%
draw_curves(router_order.runs, arms="arm")

# %%
compared = router_order.compare("softmax_topk, exact")
draw_comparison(compared)

# %% [markdown]
# **Answer.** Against softmax before top-k with exact scaling, at the end:

# %%
answer(compared)

# %% [markdown]
# And before the first step:

# %%
answer(router_order.compare("softmax_topk, exact", until=0))

# %%
judgement(
    judge(
        router_order,
        [
            Claim(
                source=NEMOTRON,
                says="softmax-then-topK is better, with weight scaling (the paper's)",
                arm="softmax_topk, paper",
                baseline="topk_softmax, paper",
                expected="lower",
            ),
            Claim(
                source=LLAMA,
                says="topK-then-softmax starts lower, without weight scaling",
                arm="topk_softmax, none",
                baseline="softmax_topk, none",
                expected="lower",
                until=0,
            ),
            Claim(
                source=LLAMA,
                says="and converges faster",
                arm="topk_softmax, none",
                baseline="softmax_topk, none",
                expected="lower",
            ),
            Claim(
                source=HYPOTHESIS,
                says="with exact scaling the order does not matter",
                arm="topk_softmax, exact",
                baseline="softmax_topk, exact",
                expected="same",
            ),
            Claim(
                source=NEMOTRON,
                says="scaling the weights lowers the loss",
                arm="softmax_topk, paper",
                baseline="softmax_topk, none",
                expected="lower",
            ),
            Claim(
                source=NEMOTRON,
                says="scaling W2 alone is worse",
                arm="softmax_topk, down",
                baseline="softmax_topk, paper",
                expected="higher",
            ),
            Claim(
                source=HYPOTHESIS,
                says="where an exact rule places the factor does not matter",
                arm="softmax_topk, down",
                baseline="softmax_topk, exact",
                expected="same",
            ),
        ],
    )
)

# %% [markdown]
# ## 2. Balancing

# %%
balancing = load_sweep(RECORDS, "balancing").renamed({"baseline": "aux_loss=0.01"})
introduction(balancing)

# %%
compared = balancing.compare("aux_loss=0.01")
draw_comparison(compared)

# %% [markdown]
# How unevenly experts are used in training (0 is even; 7 is one expert of eight for all tokens), and how many of them
# got no token between two rows of the record:

# %%
draw_curves(balancing.runs, arms="arm", metric="moe/max_vio", against="step")

# %%
draw_curves(balancing.runs, arms="arm", metric="moe/dead_experts", against="step")

# %% [markdown]
# **Answer.** Against an auxiliary loss of 0.01:

# %%
answer(compared)

# %%
judgement(
    judge(
        balancing,
        [
            Claim(
                source=NEMOTRON,
                says="without an auxiliary loss the loss ends higher",
                arm="aux_loss=0",
                baseline="aux_loss=0.01",
                expected="higher",
            ),
            Claim(
                source=NEMOTRON,
                says="because experts are not balanced",
                arm="aux_loss=0",
                baseline="aux_loss=0.01",
                expected="higher",
                metric="moe/max_vio",
            ),
            Claim(
                source=NEMOTRON,
                says="1e-3 is as good as 1e-2",
                arm="aux_loss=0.001",
                baseline="aux_loss=0.01",
                expected="same",
            ),
            Claim(
                source=NEMOTRON,
                says="z-loss has no effect",
                arm="z_loss=0.001",
                baseline="aux_loss=0.01",
                expected="same",
            ),
            Claim(
                source=AUX_FREE,
                says="a bias ends lower than the auxiliary loss",
                arm="bias 0.001",
                baseline="aux_loss=0.01",
                expected="lower",
            ),
            Claim(
                source=AUX_FREE,
                says="and balances better",
                arm="bias 0.001",
                baseline="aux_loss=0.01",
                expected="lower",
                metric="moe/max_vio",
            ),
        ],
    )
)

# %% [markdown]
# ## 3. Over what to balance

# %%
statistics = load_sweep(RECORDS, "balance_statistics")
introduction(statistics)

# %%
compared = statistics.compare("micro_batch, 0.01")
draw_comparison(compared)

# %% [markdown]
# **Answer.** `specialisation` has the other half of the question: what the experts take.

# %%
answer(compared)

# %%
judgement(
    judge(
        statistics,
        [
            Claim(
                source=GLOBAL,
                says=f"balancing the whole step ends lower (auxiliary loss {weight})",
                arm=f"global_batch, {weight}",
                baseline=f"micro_batch, {weight}",
                expected="lower",
            )
            for weight in (0.01, 0.1)
        ],
    )
)

# %% [markdown]
# ## 4. Capacity

# %%
capacity = load_sweep(RECORDS, "capacity").renamed({"baseline": "dropless"})
introduction(capacity)

# %%
compared = capacity.compare("dropless")
draw_comparison(compared)

# %% [markdown]
# **Answer.**

# %%
answer(compared)

# %%
judgement(
    judge(
        capacity,
        [
            Claim(
                source=HYPOTHESIS,
                says=f"a factor of {factor} {costs}",
                arm=f"capacity_factor={factor}",
                baseline="dropless",
                expected=expected,
            )
            for factor, costs, expected in ((1, "costs loss", "higher"), (4, "costs none", "same"))
        ],
    )
)

# %% [markdown]
# ## 5. Shared experts

# %%
shared = load_sweep(RECORDS, "shared_experts").renamed({"baseline": "routed alone"})
introduction(shared)

# %%
compared = shared.compare("routed alone")
draw_comparison(compared)

# %% [markdown]
# **Answer.**

# %%
answer(compared)

# %%
judgement(
    judge(
        shared,
        [
            Claim(
                source=NEMOTRON,
                says="shared experts are on par with routed ones",
                arm="shared_experts=1",
                baseline="routed alone",
                expected="same",
            ),
        ],
    )
)

# %% [markdown]
# ## Limits
#
# The published outcomes are of models four orders of magnitude larger than this one (two layers, a quarter of a million
# parameters, bytes) and of budgets where an expert that dies stays dead for long; a run here is a few million tokens.
# A verdict of `same` is about effects of 1 %; the published ones are hardly larger. MaxVio is that of the last rows of
# the record, not of held-out text. p values are adjusted within a figure, not across figures.
