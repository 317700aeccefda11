"""The README of `distribution_inference/`: the game, how it was run, criteria, and tables of the cells."""

from collections.abc import Mapping

import pandas as pd

ATTACKS = {
    "threshold_test": "threshold",
    "per_point_threshold_test": "per point",
    "kl_test": "KL",
    "calibrated_kl_test": "KL, calibrated",
    "meta_classifier": "meta-classifier",
    "ridge_on_outputs": "ridge",
    "components": "components of weights",
    "set_encoder": "set encoder",
}
TITLE = """# Distribution inference: what models tell of the distribution they were trained on

Written by `experiments/distribution_inference/report.py` from the tables beside it.

```
python experiments/distribution_inference/replicate.py --tier smoke                  # 5 cells
python experiments/distribution_inference/replicate.py --tier standard --runs FOLDER # 64 cells
python experiments/distribution_inference/world_cells.py --folder FOLDER             # ViTs, or --only null
python experiments/distribution_inference/world_draws.py --folder FOLDER             # other draws of the pool
python experiments/distribution_inference/report.py
```

The second and third are resumable: a finished cell is kept in the folder and not run again. Tables:
`replication.csv`, `worlds.csv` (a row a cell and attack; one cell is called null, so that pandas wants
`keep_default_na=False`), `draws.csv`, `roc.csv`, `criteria.csv`; machine, versions and commit are in the column
`provenance` of the first and third, and in `worlds.json`. `cards/` holds the attack cards of two
cells, as `vitzoo attack ZOO --secret SECRET --out FOLDER` writes them.
"""

GAME = """## The game

A *secret* s, drawn from a prior π, names a training distribution P_s. A *target* is a model f that a learner
makes of n examples of P_s. An *adversary* has *access* to f (weights, probabilities, or predicted classes
alone) and *knowledge*: the candidates P_s and samples of them that share nothing with the targets' data, the
learner, perhaps the architecture; so it trains *shadow* models whose secrets it knows. Its guess ŝ has risk E
ℓ(s, ŝ), ℓ being 0–1 loss for classes and absolute error for numbers, one or several. The guess without the
model has risk R₀; *advantage* is 1 - risk / R₀: 0 for nothing learnt, 1 for no errors, 2·accuracy - 1 for a
balanced binary secret.

| secret | space | example |
|---|---|---|
| one of k classes | `ClassSecret` | label ratio 0.5 or 0.3; was the last environment trained on |
| a number, several numbers | `NumberSecret` | agreement of colour and label; share of a group |

Where leakage can come from, for a learner with hypotheses H and m_s(x) = E_s[Y | X = x]:

1. **Conditional distribution.** m_0 ≠ m_1 somewhere the adversary can ask. Any learner that fits both there
   tells the secret: this source goes only with the part of E[Y | X] that is not learnt.
2. **Inductive bias.** m_0 = m_1 = m, but the best hypotheses differ, because m is not in H, or training does
   not reach it: a misfit model is the projection of m under P_s(X), which depends on s.
3. **Finite data.** The best hypotheses agree, but the laws of trained models differ at finite n. No attack is
   better than ½ + ½ TV(P_0ⁿ, P_1ⁿ); nothing says that attacks on weights get worse as n grows.

With none of the three, outputs within the supports have the same law under every secret, so no attack on
outputs beats the prior. A learner restricted to causes of Y, whose mechanism is the same in every environment,
removes the first source for membership of environments; a learner of effects does not. What is no source:
numbers of examples and of optimiser steps, which tell by themselves. Guards refuse cells in which they differ
between secrets.

Code: `secrets.py` (s, π, ℓ, R₀), `game.py` (access, shadows, playing), `zoo_guards.py`, `black_box.py`,
`kl_tests.py`, `white_box.py`, `set_encoder.py`, `membership.py` (attacks), `metrics.py` (advantage, n_leaked,
nested bootstrap), `world.py` and `learners.py` (P_s of images, learners).
"""

REPLICATION = """## The published synthetic tasks

Hartmann et al., "Distribution Inference Risks: Identifying and Mitigating Sources of Leakage" (SaTML 2023),
written again from its settings: small MLPs on normal inputs labelled by a teacher (A, A-bis, B, C), and on
environments of a structural causal model (DMI). As published, and mended: equal numbers of examples and of
steps (DMI), steps fixed while n grows (C), a student too narrow rather than stopped early (B). Three teachers,
five seeds of attacks, intervals over worlds, seeds and targets. Set-ups as published (R2 to R6) are attacked as
published, by an MLP on raw outputs that learns from half of the shadows; mended ones by the same on standardised
outputs of all shadows, whose figures stand beside the former's. Diverged models are counted and left out, never set
to zero.

![replication](replication.png)
"""

WORLDS = """## ViTs on worlds whose distribution is controlled

Fashion-MNIST at 8×8 in one of two colours, two classes; ViTs of 4,226 parameters (the ladder and source 3 use
others), 128 targets or more and 256 shadows a cell, equal numbers of images and steps; one draw of the pool but
where others are told, so that intervals are over targets and seeds of attacks. *Outputs* is the attack on
probabilities that is best on held-out shadows; targets choose nothing.

![cells](worlds.png)

![ROC](roc.png)
"""


REASONS = {
    "Z5": "The other way round. Steps are fixed, so models of few images memorise them and differ by"
    " chance more than by the share; models of many images agree, and the share shows. Nothing forbids it: the bound"
    " on every attack, by the total variation of all n images, grows with n.",
    "Z11": "DP-SGD relies on colour more than any, and its noise hides much of it. Both orders are nearly the same,"
    " as what relies on colour pays for it on flipped colours.",
}
"""Why a criterion is missed; of those met it says nothing."""


def readme(
    criteria: pd.DataFrame, worlds: pd.DataFrame, draws: pd.DataFrame, learners: Mapping[str, str], findings: str
) -> str:
    """All of it."""
    replicated = criteria["criterion"].str.startswith("R")
    parts = [TITLE, GAME, REPLICATION, _criteria(criteria[replicated]), WORLDS, _criteria(criteria[~replicated])]
    parts += ["### Learners, and what each costs\n", _learners(worlds, learners), _draws(draws), findings]
    return "\n".join(parts).rstrip("\n") + "\n"


def _criteria(rows: pd.DataFrame) -> str:
    lines = ["| | expected | found | |", "|---|---|---|---|"]
    for row in rows.itertuples():
        lines.append(
            f"| {row.criterion} | {row.expected} | {row.found} | {row.verdict} |".replace("E[Y|X]", "E[Y\\|X]")
        )
    return "\n".join(lines) + "\n"


def _draws(draws: pd.DataFrame) -> str:
    """Accuracy of the attack on outputs that shadows choose, in each draw of the pool and over all."""
    columns = list(dict.fromkeys(draws["draw"]))
    lines = ["### Other draws of the pool\n", "| cell | " + " | ".join(f"draw {name}" for name in columns) + " |"]
    lines[1] = lines[1].replace("draw all", "all, interval over draws and targets")
    lines.append("|---" * (len(columns) + 1) + "|")
    for cell, rows in draws.groupby("cell", sort=False):
        told = [f"{row.value:.3f} ({row.low:.3f} to {row.high:.3f})" for row in rows.itertuples()]
        lines.append("| " + " | ".join([str(cell).replace("_", " "), *told]) + " |")
    lines += [
        "",
        "A draw parts images into the victim's, the adversary's and queries; draw 0 is that of all other cells.",
    ]
    return "\n".join(lines) + "\n"


def _learners(worlds: pd.DataFrame, learners: Mapping[str, str]) -> str:
    """Of the membership of the last environment: accuracy of attacks, and of targets."""
    head = ["learner", *ATTACKS.values(), "accuracy", "in other colours", "colour reliance", "diverged"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    seen = worlds[worlds["access"] != "labels"]
    for cell, name in learners.items():
        rows = seen[seen["cell"] == cell].set_index("attack")
        if rows.empty:
            continue
        # Measures of the targets stand in the row of every attack.
        first = rows.iloc[0]
        values = [f"{rows.loc[attack, 'value']:.3f}" for attack in ATTACKS]
        values += [f"{first[each]:.3f}" for each in ("accuracy", "flipped_accuracy", "colour_reliance")]
        lines.append("| " + " | ".join([name, *values, str(int(first["diverged"]))]) + " |")
    # 0.087 = 1.96 · sqrt(0.25 / 128).
    return "\n".join(lines) + "\n\nAccuracy of attacks at chance: 0.5, 95 % of draws within 0.087 at 128 targets.\n"
