"""One self-contained HTML page that shows and explains the figures of a zoo."""

import base64
import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from vitzoo_hf.evaluation.evaluate import common_dataset, layer_similarity
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.report.factor_tables import VARIANCE
from vitzoo_hf.report.factors import final_models, require, varying_factors
from vitzoo_hf.report.figures import FIGURES, Entry, write_figures, write_file
from vitzoo_hf.report.pair_tables import SPACES
from vitzoo_hf.report.plot_factors import LEVEL_OF_TEST, MEASURES
from vitzoo_hf.zoo import Zoo

NAMED = 5


def write_report(
    index: pd.DataFrame,
    evaluations: pd.DataFrame,
    pairs: pd.DataFrame | None,
    folder: Path,
    *,
    title: str,
    facts: Mapping[str, str],
    layers: pd.DataFrame | None = None,
) -> Path:
    """Write `figures/*.png`, `data/*.csv` and `report.html`, a page that needs no other file and no network.

    Each figure is drawn from the CSV of its name, which `figures.figure_from_csv` draws again.

    Args:
        index: see `plot.learning_curves`.
        evaluations: see `plot.accuracy_by_factor`; `test_loss`, `test_ece` and so on are listed where present.
        pairs: see `write_figures`.
        folder: created where missing.
        title: the heading, plain text.
        facts: label -> value, plain text: what the zoo is, where it comes from.
        layers: of `layer_similarity`, for a few models; None: no figure of layers.

    Raises:
        ZooError: for a missing column, or an empty `index` or `evaluations`.
    """
    require(index, "index", ("model_id", "is_final"))
    models = final_models(evaluations)
    figures = write_figures(index, evaluations, pairs, folder, layers=layers)
    drawn = {path.stem for path in figures}
    tested = _read(folder, "factors") if "factors" in drawn else pd.DataFrame(columns=VARIANCE)
    missing = [entry.heading for name, entry in FIGURES.items() if name not in drawn]
    sections = [
        f"<header><h1>{_escape(title)}</h1><dl>{''.join(_fact(*fact) for fact in facts.items())}</dl></header>",
        "<section><h2>What drives the spread</h2>",
        *(f"<p>{sentence}</p>" for sentence in _sentences(models, evaluations, tested, pairs)),
        _variance(tested) if len(tested) else "",
        "</section><section><h2>Figures</h2>",
        *(_figure(path, FIGURES[path.stem]) for path in figures),
        _separation(folder) if "separation" in drawn else "",
        f"<p class=note>Not drawn, for lack of data: {_escape(', '.join(missing))}.</p>" if missing else "",
        "</section>",
        _model_section(models, index),
    ]
    page = _PAGE.format(title=_escape(title), style=_STYLE, script=_SCRIPT, body="\n".join(sections))
    return write_file(folder / "report.html", page.encode())


def _escape(text: Any) -> str:
    return html.escape(str(text))


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _fact(label: str, value: str) -> str:
    return f"<div><dt>{_escape(label)}</dt><dd>{_escape(value)}</dd></div>"


def _sentences(
    models: pd.DataFrame, evaluations: pd.DataFrame, tested: pd.DataFrame, pairs: pd.DataFrame | None
) -> Iterable[str]:
    """What the tables say, in words, as HTML; `tested` is the result of `variance_table`."""
    accuracy = models["test_accuracy"].astype(float)
    kind = "fine-tuned" if (models["stage"] == "finetune").all() else "pre-trained"
    yield (
        f"Test accuracy of the {len(models)} final {kind} models: from <b>{_percent(accuracy.min())}</b> to"
        f" <b>{_percent(accuracy.max())}</b>, median <b>{_percent(accuracy.median())}</b>."
    )
    lost = evaluations[evaluations["is_final"].astype(bool) & (evaluations["stage"] == "finetune")]
    lost = lost[lost["test_accuracy"].isna()]
    if len(lost):
        names = ", ".join(lost["model_id"].head(NAMED)) + ("…" if len(lost) > NAMED else "")
        yield f"Left out, without a test accuracy: {len(lost)} final fine-tuned models, {_escape(names)}."
    yield from _factor_sentences(models, tested)
    for value, words in (("agreement", "predict the same class for"), ("cka", "")):
        yield from _pair_sentence(pairs, value, words)


def _factor_sentences(models: pd.DataFrame, tested: pd.DataFrame) -> Iterable[str]:
    """The factors that explain most of the test accuracy, and those that no test tells from chance."""
    accuracy, levels = models["test_accuracy"].astype(float), varying_factors(models)
    found = tested[(tested["measure"] == "test_accuracy") & tested["factor"].isin(levels)].set_index("factor")
    found = found.dropna(subset=["share"])
    if found.empty:
        yield "No factor can be named: nothing varies among these models, or all have the same accuracy."
    testable = found["least_p"] <= LEVEL_OF_TEST
    weak = testable & (found["p"] > LEVEL_OF_TEST)
    for rank, (name, row) in enumerate(found[~weak].head(2).iterrows()):
        medians = accuracy.groupby(levels[str(name)], observed=True).median().sort_values()
        lead = "The strongest factor is" if rank == 0 else "Next comes"
        test = f"p = {row['p']:.3f}" if testable[name] else "too few models or parents for a test"
        yield (
            f"{lead} <b>{_escape(name)}</b>: η² = {row['share']:.2f} ({test}), so by itself it accounts for"
            f" {_percent(row['share'])} of the variance between models; the median goes from"
            f" {_percent(medians.iloc[0])} ({_escape(medians.index[0])}) to {_percent(medians.iloc[-1])}"
            f" ({_escape(medians.index[-1])})."
        )
    if weak.any():
        told = ", ".join(f"{name} (p = {p:.2f})" for name, p in found.loc[weak, "p"].items())
        yield f"Not told from chance: {_escape(told)}."


def _pair_sentence(pairs: pd.DataFrame | None, value: str, words: str) -> Iterable[str]:
    if pairs is None or not {value, "same_parent"} <= set(pairs):
        return
    known = pairs.dropna(subset=[value])
    medians = known[value].astype(float).groupby(known["same_parent"].astype(bool)).median()
    if not {True, False} <= set(medians.index):
        return
    same, other = float(medians[True]), float(medians[False])
    if words:
        yield (
            f"Two models of the same parent {words} {_percent(same)} of the test images, two of different parents"
            f" for {_percent(other)} (medians over pairs)."
        )
    else:
        yield f"Their features have a median CKA of {same:.2f} with the same parent and {other:.2f} with another."


def _read(folder: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(folder / "data" / f"{name}.csv", dtype={"factor": str}, keep_default_na=False, na_values=[""])


def _variance(table: pd.DataFrame) -> str:
    """What each factor explains of each measure, beside what chance gives."""
    shown = {"measure": "of", "factor": "factor", "levels": "levels", "share": "share", "unique": "only by it"}
    shown |= {"chance": "by chance", "p": "p", "permuted": "permuted"}
    table = table.assign(
        measure=table["measure"].map(lambda name: MEASURES[name].replace("-\n", "").replace("\n", " ")),
        p=table["p"].where(table["least_p"] <= LEVEL_OF_TEST),
        levels=table["levels"].astype("Int64"),
    )
    rows = zip(*(_rounded(table[name]) for name in shown), strict=True)
    note = (
        "<p class=note>Share: the variance between the levels of a factor over all variance, η² of accuracy and"
        " gap, PERMANOVA’s R² of distances. “Only by it”: what the additive model of all factors loses without this"
        " one, which is 0 for what other factors, such as the parent, tell too. “By chance”: the mean over 999"
        " permutations of the levels; p: how often they reach the share, no number where they are too few to get"
        " below 0.05. In a balanced grid the shares add up to at most 1; the rest is interaction and noise. Factors"
        " that always"
        ' change together cannot be told apart. <a href="data/factors.csv">data/factors.csv</a></p>'
    )
    return _table(list(shown.values()), rows, sortable=True) + note


def _separation(folder: Path) -> str:
    """How well each factor separates the models, beside what chance gives."""
    table = _read(folder, "separation")
    table["space"] = table["space"].map(SPACES)
    table["p"] = table["p"].where(table["least_p"] <= LEVEL_OF_TEST)
    shown = {"space": "distance", "factor": "factor", "levels": "levels", "silhouette": "silhouette"}
    shown |= {"chance": "by chance", "chance_95": "95 %", "p": "p", "permuted": "permuted"}
    rows = zip(*(_rounded(table[name]) for name in shown), strict=True)
    return _table(list(shown.values()), rows, sortable=True)


def _rounded(column: pd.Series) -> list[Any]:
    return (column.round(3) + 0.0 if pd.api.types.is_float_dtype(column) else column).tolist()


def _figure(path: Path, entry: Entry) -> str:
    image = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure id="{path.stem}"><h3>{_escape(entry.heading)}</h3><img alt="{_escape(entry.heading)}"'
        f' src="data:image/png;base64,{image}"><figcaption>{_escape(entry.caption)}'
        f' <a href="data/{path.stem}.csv">data/{path.stem}.csv</a></figcaption></figure>'
    )


def _model_section(models: pd.DataFrame, index: pd.DataFrame) -> str:
    """All final models, best first, with their factors and whatever was measured."""
    wanted = ("test_accuracy", "test_loss", "test_ece", "selection_accuracy", "generalization_gap")
    if "generalization_gap" in index and "generalization_gap" not in models:
        recorded = index.drop_duplicates("model_id").set_index("model_id")["generalization_gap"]
        models = models.assign(generalization_gap=models["model_id"].map(recorded))
    models = models.sort_values("test_accuracy", ascending=False, ignore_index=True)
    table = {"model": models["model_id"]}
    for name in varying_factors(models):
        column = f"factor_{name}" if f"factor_{name}" in models else name
        table[name] = models["parent_id" if column == "parent" else column]
    for name in wanted:
        if name in models and models[name].notna().any():
            table[name.replace("_", " ")] = models[name]
    rows = zip(*(column.tolist() for column in table.values()), strict=True)
    return (
        "<section><h2>Final models</h2><p class=note>Measured on the test images, best first; a click on a column's"
        f" name sorts by it.</p>{_table(list(table), rows, sortable=True)}</section>"
    )


def _table(names: Sequence[str], rows: Iterable[Sequence[Any]], *, sortable: bool = False) -> str:
    cells = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    label = '<button type="button">{}</button>' if sortable else "{}"
    head = "".join(f"<th>{label.format(_escape(name))}</th>" for name in names)
    kind = " class=sortable" if sortable else ""
    return f"<div class=scroll><table{kind}><thead><tr>{head}</tr></thead><tbody>{cells}</tbody></table></div>"


def _cell(value: Any) -> str:
    if pd.isna(value):
        return "<td class=null>–</td>"
    if isinstance(value, bool | str):
        return f"<td>{_escape(value)}</td>"
    shown = f"{value:.4g}" if isinstance(value, float) else str(value)
    return f'<td class=number data-value="{_escape(value)}">{_escape(shown)}</td>'


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
<script>{script}</script>
</body>
</html>
"""


_STYLE = """
:root { color-scheme: light dark; --ink: #1f2430; --muted: #5b6472; --line: #dde1e7; --page: #fff; --band: #f5f6f8;
  --accent: #0072b2 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --muted: #a3acba; --line: #363d49; --page: #14171c;
  --band: #1d2129; --accent: #56b4e9 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 4rem }
h1 { font-size: 1.8rem; line-height: 1.2; margin: .5rem 0 1rem }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--line) }
h3 { font-size: 1.05rem; margin: 0 0 .5rem }
h1, dd, td { overflow-wrap: anywhere }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .8rem 1.2rem; margin: 0;
  padding: 1rem; background: var(--band); border-radius: .6rem }
dt, .note, figcaption { color: var(--muted); font-size: .88rem }
dd { margin: 0; font-weight: 600 }
figure { margin: 2rem 0 }
figure img { display: block; width: 100%; max-width: 58rem; height: auto; background: #fff; border-radius: .5rem;
  border: 1px solid var(--line); padding: .4rem }
figcaption { margin-top: .5rem; max-width: 46rem }
p { max-width: 46rem }
.scroll { overflow: auto; max-height: 34rem; border: 1px solid var(--line); border-radius: .5rem }
table { border-collapse: collapse; width: 100%; font-size: .86rem; font-variant-numeric: tabular-nums }
th { position: sticky; top: 0; background: var(--band); text-align: left; white-space: nowrap }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line) }
td { white-space: nowrap; overflow-wrap: normal }
td.null { color: var(--muted) }
th button { all: unset; cursor: pointer; font-weight: 600 }
th button:focus-visible { outline: 2px solid var(--accent) }
th[aria-sort] button { color: var(--accent) }
th[aria-sort=ascending] button::after { content: " \\2191" }
th[aria-sort=descending] button::after { content: " \\2193" }
"""
_SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, i) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = row => row.cells[i].dataset.value ?? row.cells[i].textContent;
    const order = (a, b) => {
      const x = key(a), y = key(b);
      if (x === "–" || y === "–") return (x === "–") - (y === "–");
      return (down ? -1 : 1) * (isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y);
    };
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort(order));
  }));
}
"""
LAYER_MODELS = 4
LAYER_IMAGES = 500


def write_zoo_report(zoo: Zoo, folder: Path, *, say: Callable[[str], None] = print) -> Path:
    """Figures, their data and a self-contained `report.html` of an evaluated zoo.

    Blocks are compared for up to 4 models on up to 500 test images that the zoo carries.

    Args:
        zoo: an evaluated zoo.
        folder: created where missing.
        say: told why blocks are not compared.

    Raises:
        ZooError: if the zoo is not evaluated, or the folder cannot be written.
    """
    index, evaluations = zoo.to_pandas(), zoo.to_pandas("evaluations")
    final = index[index["is_final"]]
    facts = {
        "models": f"{len(final)} ({(final['stage'] == 'pretrain').sum()} pre-trained)",
        "rows": f"{len(index)} checkpoints",
        "parameters": f"{index['num_parameters'].min():,}–{index['num_parameters'].max():,}",
        "architecture": ", ".join(sorted(set(index["architecture"]))),
        "images": ", ".join(dict.fromkeys(index["dataset"])),
    }
    return write_report(
        index,
        evaluations,
        zoo.to_pandas("pairs"),
        folder,
        title=zoo.manifest["name"],
        facts=facts,
        layers=_layers(zoo, evaluations, say),
    )


def models_to_compare(evaluations: pd.DataFrame) -> pd.DataFrame:
    """The best final model of each of up to 4 parents: by selection accuracy, else the first in the zoo.

    Fine-tuned models where there are any, on the dataset that most of them have; a model without a parent counts as
    a lineage of its own. Fine-tuned models that have no test accuracy, since their training diverged, are left out.

    Args:
        evaluations: columns `model_id`, `parent_id`, `stage`, `is_final`, `dataset`, `selection_accuracy`,
            `test_accuracy`.

    Returns:
        Rows of `evaluations`, in their order.
    """
    final = evaluations[evaluations["is_final"]]
    tuned = final[(final["stage"] == "finetune") & final["test_accuracy"].notna()]
    final = final[final["stage"] != "finetune"] if tuned.empty else tuned
    final = final[final["dataset"] == common_dataset(final)] if len(final) else final
    lineage = final["parent_id"].fillna(final["model_id"])
    order = final.sort_values("selection_accuracy", ascending=False, kind="stable", na_position="last").index
    return final.loc[order][~lineage[order].duplicated()].head(LAYER_MODELS).sort_index()


def _layers(zoo: Zoo, evaluations: pd.DataFrame, say: Callable[[str], None]) -> pd.DataFrame | None:
    chosen = models_to_compare(evaluations[evaluations["model_id"].isin(zoo.model_ids)])
    if chosen.empty:
        say("blocks are not compared layer by layer: no final model has finite outputs")
        return None
    try:
        images, _ = zoo.probes(str(chosen["dataset"].iloc[0]))
    except ZooError as error:
        say(f"blocks are not compared layer by layer: {error}")
        return None
    return layer_similarity(zoo.filter(model_id=list(chosen["model_id"])), images[:LAYER_IMAGES])
