"""Task arithmetic and landscape slices on a zoo, measured; tables, figures and README into the folder beside this.

python experiments/arithmetic.py ZOO NAME

Scales are chosen on selection images and reported on test images.
"""

import itertools
import time

import pandas as pd
import torch
from harness import (
    RESULTS,
    WHOLE,
    ZOO_AND_NAME,
    gain_interval,
    markdown,
    parser,
    provenance,
    provenance_text,
    run_main,
    write_provenance,
    write_table,
)

from vitzoo_hf.apply.candidates import candidate_scores
from vitzoo_hf.apply.paths.arithmetic import (
    best_scale,
    edited_weights,
    random_change,
    scale_table,
    strongest_scale,
    task_vector,
)
from vitzoo_hf.apply.paths.landscape import landscape_slice
from vitzoo_hf.apply.paths.plot import draw_slice
from vitzoo_hf.zoo import Zoo

HERE = RESULTS / "arithmetic"
ADDED = [0.0, 0.25, 0.5, 0.75, 1.0, 1.25]
EXTENDED = [0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0]
NEGATED = [0.0, -0.05, -0.1, -0.2, -0.3, -0.4, -0.6, -0.8, -1.0]
CONTROL_IMAGES = 2000


def main() -> None:
    arguments = parser(__doc__, ZOO_AND_NAME).parse_args()
    zoo, start = Zoo(arguments.zoo), time.perf_counter()
    seeds = sorted(set(zoo.filter(stage="finetune").to_pandas()["factor_seed"]))
    # One head initialisation: task vectors that include two random heads have no common start.
    tuned = zoo.filter(stage="finetune", head="linear", factor_optimizer="adamw", factor_seed=seeds[0])
    write_table(pd.DataFrame(additions(zoo, tuned)), HERE / f"additions_{arguments.name}.csv", ["one", "two"])
    write_table(pd.DataFrame(extensions(zoo, tuned)), HERE / f"extensions_{arguments.name}.csv", ["run_id"])
    write_table(pd.DataFrame(negations(zoo, tuned)), HERE / f"negations_{arguments.name}.csv", ["child"])
    # One plane is one cell: points of two planes in one grid would be a landscape of neither.
    write_table(landscape(zoo, tuned, arguments.name), HERE / f"landscape_{arguments.name}.csv", WHOLE)
    record = provenance(zoo) | {"seconds": round(time.perf_counter() - start)}
    write_provenance(HERE / f"provenance_{arguments.name}.json", record, merged=True)
    write_readme()


def start_of(zoo: Zoo, run_id: str) -> dict:
    return zoo.row(f"{run_id}@0")


def accuracy(row: dict, weights: object, images: tuple) -> float:
    return float(candidate_scores(weights[None], row, *images).accuracy)


def of_pairs(tuned: Zoo):
    """Pairs of children of one parent with one head initialisation: neighbours in learning rate."""
    finals = tuned.filter(is_final=True).to_pandas().sort_values("factor_lr")
    for parent, runs in finals.groupby("parent_id", sort=False):
        ids = list(runs["run_id"])
        for one, two in itertools.pairwise(ids):
            yield parent, one, two, dict(zip(runs["run_id"], runs["model_id"], strict=True))


def additions(zoo: Zoo, tuned: Zoo):
    """Start + scale * (tau_1 + tau_2), every parameter, beside the better child by selection."""
    for parent, one, two, finals in of_pairs(tuned):
        start, children = start_of(zoo, one), [zoo.row(finals[run]) for run in (one, two)]
        selection, test = (zoo.probes(start["dataset"], role) for role in ("selection", "test"))
        first, second = (task_vector(child, start, head=True) for child in children)
        both = first + second
        scale = best_scale(scale_table(start, both, ADDED, *selection))
        on_selection = [accuracy(child, edited_weights(child, 0 * both), selection) for child in children]
        on_test = [accuracy(child, edited_weights(child, 0 * both), test) for child in children]
        reached = accuracy(start, edited_weights(start, scale * both), test)
        # Chosen on selection images as the scale is: the better child by test images would be an oracle.
        single = on_test[on_selection.index(max(on_selection))]
        cosine = float(first.values @ second.values / first.values.norm() / second.values.norm())
        yield {"parent": parent, "one": one, "two": two, "scale": scale, "cosine": cosine} | {
            "test_accuracy": reached,
            # Half of the sum is the mean of both children: their uniform soup.
            "half_test": accuracy(start, edited_weights(start, 0.5 * both), test),
            "better_child_test": single,
            "start_test": accuracy(start, edited_weights(start, 0 * both), test),
            "gain": reached - single,
        }


def extensions(zoo: Zoo, tuned: Zoo):
    """Start + scale * tau of one child: whether going further, or less far, helps."""
    for run_id in dict.fromkeys(tuned.index["run_id"]):
        final = tuned.filter(run_id=run_id, is_final=True).model_ids[0]
        start, child = start_of(zoo, run_id), zoo.row(final)
        selection, test = (zoo.probes(start["dataset"], role) for role in ("selection", "test"))
        change = task_vector(child, start, head=True)
        scale = best_scale(scale_table(start, change, EXTENDED, *selection))
        one, chosen = (accuracy(start, edited_weights(start, s * change), test) for s in (1.0, scale))
        yield {"run_id": run_id, "factor_lr": child["factor_lr"], "scale": scale} | {
            "child_test": one,
            "test_accuracy": chosen,
            "gain": chosen - one,
        }


def negations(zoo: Zoo, tuned: Zoo):
    """Child - scale * tau: forgetting digits, as far as the parent's task allows; own, a sibling's, and noise."""
    classifiers = set(zoo.filter(stage="pretrain", factor_regime="supervised").model_ids)
    finals = tuned.filter(is_final=True, factor_lr=1e-3).to_pandas()
    siblings = zoo.filter(stage="finetune", is_final=True, head="linear", factor_optimizer="adamw", factor_lr=1e-3)
    for model_id, parent_id in zip(finals["model_id"], finals["parent_id"], strict=True):
        # A contrastive parent has no head through which its own task could be read.
        if parent_id not in classifiers:
            continue
        child, parent = zoo.row(model_id), zoo.row(parent_id)
        # Two seeds a parent: unpacking refuses any other number rather than pick a sibling.
        (sibling,) = set(siblings.filter(parent_id=parent_id).model_ids) - {model_id}
        own = {role: tuple(part[:CONTROL_IMAGES] for part in zoo.probes(parent["dataset"], role)) for role in ROLES}
        target = zoo.probes(child["dataset"], "test")
        change = task_vector(child, parent)
        line = {"child": model_id, "parent": parent_id, "sibling": sibling}
        line |= {"child_target_test": accuracy(child, edited_weights(child, 0 * change), target)}
        line |= {"child_control_test": accuracy(parent, edited_weights(parent, change), own["test"])}
        line |= {"parent_control_test": accuracy(parent, edited_weights(parent, 0 * change), own["test"])}
        others = {"own": change, "sibling": task_vector(zoo.row(sibling), parent), "noise": random_change(change, 0)}
        line |= {"sibling_cosine": float(torch.cosine_similarity(change.values, others["sibling"].values, dim=0))}
        carrier = dict(parent, weights=edited_weights(parent, change).numpy(), weights_sha256=None)
        for kind, vector in others.items():  # the carrier is the child's trunk under the parent's head
            scale = strongest_scale(scale_table(carrier, vector, NEGATED, *own["selection"]))
            line |= {f"{kind}_scale": scale}
            line |= {f"{kind}_target_test": accuracy(child, edited_weights(child, scale * vector), target)}
            line |= {f"{kind}_control_test": accuracy(carrier, edited_weights(carrier, scale * vector), own["test"])}
        yield line


ROLES = ("selection", "test")


def landscape(zoo: Zoo, tuned: Zoo, name: str) -> pd.DataFrame:
    """The plane through a child's epoch 0 and two children of one parent."""
    _, one, two, finals = next(iter(reversed(list(of_pairs(tuned)))))
    rows = [start_of(zoo, one), zoo.row(finals[one]), zoo.row(finals[two])]
    images, labels = zoo.probes(rows[0]["dataset"], "test")
    # 441 points are as many models to run; with 500 images an image is still only 0.2 points of accuracy.
    found = landscape_slice(rows, images[:500], labels[:500], resolution=21)
    names = ["epoch 0", *(f"lr {row['factor_lr']:g}" for row in rows[1:])]
    title = f"Loss and accuracy on the plane through two children and their start, {name}"
    draw_slice(found, HERE / "figures" / f"landscape_{name}.png", title=title, names=names)
    grid = [(float(x), float(y)) for y in found.y for x in found.x]
    values = {"loss": found.loss.flatten().tolist(), "accuracy": found.accuracy.flatten().tolist()}
    return pd.DataFrame(grid, columns=["x", "y"]).assign(**values)


def table_of(lines: list[dict[str, str]]) -> str:
    return markdown(list(lines[0]), [list(line.values()) for line in lines])


def write_readme() -> None:
    sections = [
        "# Task arithmetic\n\nWritten by `experiments/arithmetic.py`; every number is from a CSV beside this file. "
        "AdamW children with a linear head and one seed; scales are chosen on selection images; intervals are 95 %"
        " bootstraps over runs or pairs, in points of test accuracy.",
        "The parents do not know digits, so negation is measured on children. A first version edited the parent and"
        " read digits through a child's head: 11 % before anything was negated, so nothing could be forgotten; it"
        " was replaced after its figures had been seen. The tables of `desk` but for negation are of the same run"
        " as its provenance; negation was run again by the same script.",
        "Two children of one parent do not add: both learnt the same task along different ways, and half of the sum,"
        " their mean, lies on a barrier. Going further or less far than training went is no gain either. A child's"
        " own task vector takes digits out and brings the parent's task back, which is only the way back to the"
        " parent; a sibling's, of another seed with another head to begin with, does little more than noise of the"
        " same norm per tensor and does not bring the parent's task back: `sibling_cosine` says how much they share."
        " With so few children, and scales that vary from one to the next, sibling and noise cannot be told apart for"
        " sure.",
    ]
    for name in sorted(file.stem.removeprefix("additions_") for file in HERE.glob("additions_*.csv")):
        added, extended, negated = (
            pd.read_csv(HERE / f"{part}_{name}.csv") for part in ("additions", "extensions", "negations")
        )
        sections += [f"## {name}", f"![Landscape](figures/landscape_{name}.png)", "Addition and extension."]
        lines = [
            {
                "what": "start + scale (τ₁ + τ₂), scale chosen, less the better child by selection",
                "of": f"{len(added)} pairs",
                "test accuracy": f"{added['test_accuracy'].mean():.3f}",
                "baseline": f"{added['better_child_test'].mean():.3f}",
                "gain": gain_interval(added["gain"]),
            },
            {
                "what": "start + ½ (τ₁ + τ₂), less the better child by selection",
                "of": f"{len(added)} pairs",
                "test accuracy": f"{added['half_test'].mean():.3f}",
                "baseline": f"{added['better_child_test'].mean():.3f}",
                "gain": gain_interval(added["half_test"] - added["better_child_test"]),
            },
        ]
        for lr, runs in extended.groupby("factor_lr"):
            lines.append(
                {
                    "what": f"start + scale τ of one child, lr {lr:g}, less scale 1"
                    f" (median scale {runs['scale'].median():g})",
                    "of": f"{len(runs)} runs",
                    "test accuracy": f"{runs['test_accuracy'].mean():.3f}",
                    "baseline": f"{runs['child_test'].mean():.3f}",
                    "gain": gain_interval(runs["gain"]),
                }
            )
        sections += [table_of(lines)]
        sections += [
            f"Negation: {len(negated)} children of supervised parents (AdamW, 1e-3) less a task vector, as far as"
            f" the parent's task keeps 95 % of the accuracy it has left, on up to {CONTROL_IMAGES} selection images;"
            " scales from 0 to -1. Digits are read through the child's head, the parent's task through the parent's"
            f" head on the same trunk. The parent itself has {negated['parent_control_test'].mean():.3f} on its task."
            " `own` at scale -1 is the parent's trunk."
        ]
        columns = ["child", "own", "sibling", "noise"]
        rows = [
            {"": told, **{kind: f"{negated[f'{kind}_{part}'].mean():.3f}" for kind in columns}}
            for told, part in (("digits, to forget", "target_test"), ("the parent's task, control", "control_test"))
        ]
        scales = {kind: f"{negated[f'{kind}_scale'].mean():.2f}" for kind in columns[1:]}
        rows.append({"": "mean scale", "child": "0", **scales})
        sections += [table_of(rows)]
        sections += ["Provenance: " + provenance_text(HERE / f"provenance_{name}.json")]
    (HERE / "README.md").write_text("\n\n".join(sections) + "\n")


if __name__ == "__main__":
    run_main(main)
