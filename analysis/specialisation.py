# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Which experts take which tokens and domains
#
# **Question.** Do upcycled experts specialise, on what, and does it depend on what is balanced?
#
# **Published.** arXiv 2501.11873: where the auxiliary loss balances every micro-batch, experts cannot specialise by
# domain; where it balances the whole step they do.
#
# **Method.** One dense model is upcycled to E8G1T1 and trained on three domains in equal parts: code, tables (the
# character maps of Python's `encodings`) and prose (the topics of its language reference). The two arms differ in what
# the auxiliary loss is computed over: each micro-batch, which is one sequence and so of one domain, or the whole step.
# For held-out text of each domain we note which expert takes each token, in every layer, and ask how many bits its
# index tells about the token's class and about the domain.
#
# A router that was never trained sends equal tokens to equal experts too. So what counts is what training adds to step
# 0, over pairs of the same seed, each after subtracting what chance gives (windows' labels permuted).
#
# The notebook trains the models that it needs into `UPCYCLE_RUNS`, a few minutes each, and goes on where it was
# interrupted; `UPCYCLE_SCALE` and `UPCYCLE_SEEDS` say how large and how many.

# %%
import json
import os
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from pydantic import TypeAdapter

from upcycle.analysis.figures import draw_explained, draw_shares
from upcycle.analysis.prose import Markdown, interval, table
from upcycle.analysis.specialisation import gains, information, shares, token_classes
from upcycle.evaluation.choices import held_out_choices
from upcycle.sweep.expand import literal
from upcycle.tracking.record import read_run
from upcycle.train.config import TrainConfig

# %matplotlib inline
warnings.filterwarnings("ignore", message="IProgress not found")  # there are no progress bars to be seen here
SCALE = os.environ.get("UPCYCLE_SCALE", "laptop")
SEEDS = range(int(os.environ.get("UPCYCLE_SEEDS", "3")))
RUNS = Path(os.environ.get("UPCYCLE_RUNS", "runs/specialisation")).resolve()
SOURCE = Path("../models/stdlib-250k").resolve()
MOE = ["moe.expansion=8", "moe.granularity=1", "moe.top_k=1"]
STEP_0, ARMS = "step 0", ["micro_batch", "global_batch"]

# %% [markdown]
# The text: a tenth of the documents of each domain is held out.

# %%
RUNS.mkdir(parents=True, exist_ok=True)
prose = RUNS / "topics.jsonl"
prose.write_text("".join(json.dumps({"text": text}) + "\n" for text in topics.values()))
library = sysconfig.get_path("stdlib")
packages = ("asyncio", "email", "http", "logging", "unittest", "xml/**")
domains = {
    "code": [f"{library}/{package}/*.py" for package in packages],
    "tables": [f"{library}/encodings/*.py"],
    "prose": [str(prose)],
}
data = {name: {"name": "text", "files": files, "weight": 1} for name, files in domains.items()}

# %% [markdown]
# The models: what `upcycle` would be told on the command line.


# %%
def upcycle(*arguments: object) -> None:
    command = [Path(sys.executable).with_name("upcycle"), *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def checkpoint(arm: str, seed: int) -> Path:
    run, output = RUNS / f"{arm}-{seed}", RUNS / f"{arm}-{seed}-checkpoint"
    if output.exists():
        return output
    given = [f"source={SOURCE}", f"seed={seed}", *MOE]
    if arm == STEP_0:
        upcycle("convert", *given, f"output={output}")
        return output
    given += ["model=upcycle", f"scale={SCALE}", "batch.micro=1", f"balance.statistics={arm}"]
    given += ["progress=false", "resume=auto"]
    upcycle("train", *given, "data=mixture", "data.held_out=0.1", f"data.domains={literal(data)}", f"output={run}")
    upcycle("export", f"run={run}", f"output={output}")
    return output


checkpoints = {(arm, seed): checkpoint(arm, seed) for seed in SEEDS for arm in (STEP_0, *ARMS)}

# %%
record = read_run(RUNS / f"{ARMS[0]}-{SEEDS[0]}")
trained = TypeAdapter(TrainConfig).validate_python(record["config"])
tokens = record["steps"] * trained.batch.sequences * trained.sequence_length
settings = {
    "scale": f"{SCALE}: {record['steps']:,} steps, {tokens / 1e6:.3g} M tokens a run",
    "seeds": len(SEEDS),
    "auxiliary loss": f"{trained.balance.aux_loss}, over {trained.batch.micro} sequence or all "
    f"{trained.batch.sequences} of a step",
    "hardware": f"{record['hardware']['machine']}, {record['hardware']['threads']} threads a run",
    "versions": ", ".join(" ".join(each) for each in record["versions"].items()),
}
Markdown(table(["", ""], settings.items()))

# %% [markdown]
# ## What the experts take

# %%
choices = {
    at: held_out_choices(
        directory, trained.data, sequence_length=trained.sequence_length, windows=trained.validation.windows
    )
    for at, directory in checkpoints.items()
}


def labels(of: str, at: tuple[str, int]) -> np.ndarray:
    read = choices[at]
    if of == "token class":
        return token_classes(read.tokens_WS, read.texts)
    return np.broadcast_to(read.domain_W[:, None], read.tokens_WS.shape)


def draw(of: str) -> Figure:
    first = {arm: choices[arm, SEEDS[0]] for arm in (STEP_0, *ARMS)}
    tables = {
        f"{arm}, layer {layer}": shares(experts, labels(of, (arm, SEEDS[0])), experts=read.expert_count)
        for arm, read in first.items()
        for layer, experts in read.experts.items()
    }
    return draw_shares(tables, columns=len(first[STEP_0].experts))


# %% [markdown]
# Classes of tokens, before and after training, first seed. Experts are numbered as they come; what is to be seen is
# whether a column is spread or has one bright cell:

# %%
draw("token class")

# %% [markdown]
# Domains:

# %%
draw("domain")

# %% [markdown]
# ## How much that is

# %%
measured = {
    of: pd.DataFrame(
        {"arm": arm, "seed": seed, "layer": layer}
        | information(experts, labels(of, (arm, seed)), experts=choices[arm, seed].expert_count)
        for (arm, seed), read in choices.items()
        for layer, experts in read.experts.items()
    )
    for of in ("token class", "domain")
}
draw_explained(measured["token class"], of="token's class")

# %%
draw_explained(measured["domain"], of="domain")


# %%
def answer(of: str, baseline: str, arms: list[str]) -> Markdown:
    found = gains(measured[of][measured[of]["arm"].isin([baseline, *arms])], baseline=baseline)
    rows = [
        (
            each.arm,
            each.layer,
            f"{100 * each.baseline:.1f} %",
            f"{100 * each.value:.1f} %",
            f"{100 * each.difference:+.1f} %",
            interval(100 * each.low, 100 * each.high),
            each.pairs,
            f"**{each.verdict}**",
        )
        for each in found.itertuples()
    ]
    return Markdown(table(["arm", "layer", baseline, "arm", "difference", "95 % interval", "pairs", "verdict"], rows))


# %% [markdown]
# **Answer.** Classes of tokens, against step 0:

# %%
answer("token class", STEP_0, ARMS)

# %% [markdown]
# Domains, against step 0:

# %%
answer("domain", STEP_0, ARMS)

# %% [markdown]
# Domains, balancing the whole step against balancing micro-batches; the published outcome is `more`:

# %%
answer("domain", "micro_batch", ["global_batch"])

# %% [markdown]
# ## Limits
#
# A verdict is over seeds and adjusted over its table; with one seed nothing is decided. Held-out text was not trained
# on here, but the dense model may have seen it. Domains differ in their bytes, so an expert that takes a class takes a
# domain too: information about the two is not added. Mutual information says that experts differ in what they take,
# not that they compute something different with it.
