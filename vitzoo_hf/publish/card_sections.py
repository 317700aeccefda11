"""Write the tables and sentences of a zoo's card as Markdown."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from vitzoo_hf.format import schema
from vitzoo_hf.format.manifest import Manifest
from vitzoo_hf.publish.card_facts import Columns, Facts, value_counts
from vitzoo_hf.publish.markdown import block, code, listing, number, plain, shown, size, table
from vitzoo_hf.publish.viewer import columns_without_statistics

MOST_VALUES = 12
MOST_NAMED = 20
MOST_BLUEPRINT_LINES = 150

MEANINGS = {
    "model_id": "`<run>@<epoch>`, unique in the zoo",
    "run_id": "the training",
    "parent_id": "the row whose weights initialised it; none for pre-training",
    "stage": "pre-training or fine-tuning",
    "epoch": "epochs completed; 0 is the initial weights",
    "is_final": "whether it is the end of its training",
    "dataset": "images trained on",
    "architecture": "timm name",
    "architecture_args": "JSON: arguments of `timm.create_model`",
    "head": "linear, or mlp: Linear–ReLU–Linear",
    "head_hidden": "hidden width of an mlp head",
    "train_loss": "as recorded in training",
    "train_accuracy": "as recorded in training; none where a model has no classes",
    "test_loss": "as recorded in training, on test images",
    "test_accuracy": "as recorded in training, on test images; none where a model has no classes",
    "generalization_gap": "train accuracy − test accuracy",
    "num_parameters": "length of `weights`",
    "layout": "fingerprint of names and shapes, a key of `layouts.json`",
    "weights_sha256": "of the vector as little-endian float32",
    "dtype": "what `weights` is stored as",
    "provenance": "JSON: recipe or source, versions, fingerprints",
    "weights": "the flat vector, in timm's `state_dict` order, each tensor row-major",
}

CONFIG_MEANINGS = {
    "weights": "a checkpoint: factors, lineage, results, weights",
    "index": "the same row without its weights",
    "evaluations": "a checkpoint: loss, accuracy, calibration error, measured again from its weights",
    "pairs": "two final models: agreement, CKA, distance and cosine of their trunks",
    "probes": "a held-out image exactly as the models are fed it, lossless",
}


def inside(facts: Facts) -> dict[str, str]:
    """Write the counts of rows, runs, parameters, datasets and bytes."""
    parameters = [row["num_parameters"] for row in facts.rows]
    low, high = number(min(parameters)), number(max(parameters))
    stages = Counter(row["stage"] for row in facts.finals)
    weights = [file for file in facts.files if file.config == "weights"]
    return {
        "rows": number(len(facts.rows)),
        "runs": number(len(facts.runs)),
        "pretrained": number(stages["pretrain"]),
        "finetuned": number(stages["finetune"]),
        "parameters": low if low == high else f"{low} to {high}",
        "total": number(sum(parameters)),
        "parents": number(len({row["parent_id"] for row in facts.rows if row["parent_id"]})),
        "architectures": listing(code(name) for name, _ in value_counts(facts.rows, "architecture")),
        "layouts": number(len({row["layout"] for row in facts.rows})),
        "datasets": listing(code(name) for name, _ in value_counts(facts.rows, "dataset")),
        "heads": listing(f"{name} {number(count)}" for name, count in value_counts(facts.finals, "head")),
        "dtypes": listing(facts.dtypes),
        "shards": number(len(weights)),
        "weight_bytes": number(sum(file.size for file in weights)),
        "bytes": number(sum(file.size for file in facts.files)),
        "readable": size(sum(file.size for file in facts.files)),
    }


def configs(facts: Facts, opened: str) -> str:
    """Write a table of configs with their splits, rows and bytes."""
    rows = [
        [
            code(config) + (" (default)" if config == opened else ""),
            CONFIG_MEANINGS.get(config, "see its columns"),
            listing(f"{split} {number(count)}" for split, count in facts.split_rows(config).items()),
            number(sum(facts.split_rows(config).values())),
            number(sum(file.size for files in splits.values() for file in files)),
        ]
        for config, splits in facts.configs.items()
    ]
    return table(["config", "a row is", "splits and their rows", "rows", "bytes"], rows)


def columns(facts: Facts, manifest: Manifest) -> str:
    """Write a table of the columns of a whole row."""
    meanings = MEANINGS | {
        f"factor_{name}": "recorded in training" if name.startswith("trained_") else "generating factor"
        for name in manifest["factors"]
    }
    rows = [
        [code(name), plain(kind), meanings.get(name) or plain(name.replace("_", " "))]
        for name, kind in facts.column_types().items()
    ]
    return table(["column", "type", "meaning"], rows)


def recipe(facts: Facts) -> str | None:
    """Write a table of every setting of the recipes, a column a stage; None where no run has its recipe."""
    stages = {stage: recipes for stage in schema.STAGES if (recipes := facts.recipes(stage))}
    names = sorted({str(name) for recipes in stages.values() for entry in recipes for name in entry})
    rows = [
        [code(name), *(_values(entry.get(name) for entry in recipes) for recipes in stages.values())]
        for name in names
    ]
    return table(["setting", *stages], rows) if rows else None


def _values(values: Iterable[object]) -> str:
    """List the distinct values of a setting, or count them where there are many."""
    texts = {shown(value): value for value in values}
    # as text, 1e-05 would stand behind 0.1
    ordered = sorted(texts, key=lambda text: _size_then_text(texts[text], text))
    return listing(ordered) if len(ordered) <= MOST_VALUES else f"{number(len(ordered))} values"


def _size_then_text(value: object, text: str) -> tuple[int, float, str]:
    """Make a key that sorts numbers by size, and any other value behind them as text."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return 0, float(value), text
    return 1, 0.0, text


def kept(facts: Facts) -> str:
    """Write a table of stages with their runs, rows and stored epochs."""
    rows = []
    for stage in schema.STAGES:
        members = [row for row in facts.rows if row["stage"] == stage]
        epochs = [epoch for epoch, _ in value_counts(members, "epoch")]
        if epochs:
            text = listing(map(str, epochs)) if len(epochs) <= MOST_NAMED else f"{epochs[0]} to {epochs[-1]}"
            rows.append([stage, number(len({row["run_id"] for row in members})), number(len(members)), text])
    return table(["stage", "runs", "rows", "epochs kept"], rows)


def images(facts: Facts, manifest: Manifest) -> str | None:
    """Write a table of the training images with their preparation; None where the manifest has none."""
    rows = [
        [
            code(name),
            code(record.get("source") or name),
            _preparation(record),
            number(len(record["class_names"])) if record.get("class_names") else "not recorded",
            listing(f"{split} {number(counts[name])}" for split, counts in facts.probes.items() if name in counts)
            or "none",
        ]
        for name, record in manifest["images"].items()
    ]
    return table(["images", "source", "preparation", "classes", "held-out images here"], rows) if rows else None


def _preparation(record: Mapping[str, object]) -> str:
    """List the steps that prepare an image for the models."""
    steps = []
    if record.get("resize"):
        steps.append(f"shorter side to {plain(record['resize'])}")
    if record.get("crop"):
        steps.append(f"centre crop {plain(record['crop'])}")
    if record.get("size"):
        steps.append(f"resized to {plain(record['size'])}×{plain(record['size'])}")
    if record.get("interpolation"):
        steps.append(f"{plain(record['interpolation'])} interpolation")
    if record.get("channels"):
        steps.append(f"{plain(record['channels'])} channels" if record["channels"] != 1 else "1 channel")
    if record.get("mean") is not None and record.get("std") is not None:
        steps.append(f"(x / 255 − {plain(record['mean'])}) / {plain(record['std'])}")
    return listing(steps) or "not recorded"


def licences(manifest: Manifest) -> list[str]:
    """Write a sentence on the licence of the images of each dataset."""
    return [
        f"Images of {code(name)}: {plain(record.get('licence') or 'not recorded, see their source')}."
        for name, record in manifest["images"].items()
    ]


def versions(facts: Facts) -> str | None:
    """List the software that runs were trained with; None where it is not recorded."""
    versions = facts.versions().items()
    return listing(f"{plain(name)} {listing(map(plain, entries))}" for name, entries in versions) or None


def blueprint(facts: Facts) -> str | None:
    """Write the blueprint as a block of code; None if there is none or it is long."""
    file = facts.folder / "blueprint.yaml"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    return block(text, "yaml") if text.strip() and text.count("\n") <= MOST_BLUEPRINT_LINES else None


def factors(facts: Facts, manifest: Manifest) -> str | None:
    """Write a table of factors with the number of runs for each value; None where there is no factor."""
    rows = []
    for name, kind in manifest["factors"].items():
        counts = value_counts(facts.finals, f"factor_{name}")
        values = [value for value, _ in counts if value is not None]
        if len(counts) <= MOST_VALUES:
            text = listing(f"{shown(value)} × {number(count)}" for value, count in counts)
        else:
            text = f"{number(len(values))} values from {shown(values[0])} to {shown(values[-1])}"
        rows.append([code(f"factor_{name}"), plain(kind), text])
    return table(["factor", "type", "values × runs"], rows) if rows else None


def splits(facts: Facts, manifest: Manifest) -> dict[str, str]:
    """Write a table of splits, and sentences on which rows they keep together."""
    members: dict[str, list[Columns]] = {}
    for row in facts.rows:
        members.setdefault(row["split"], []).append(row)
    runs = {split: {row["run_id"] for row in rows} for split, rows in members.items()}
    # a run counts once in every split that has a row of it
    torn = sum(map(len, runs.values())) - len(facts.runs)
    groups = Counter(
        parent for _, parent in {(row["split"], row["parent_id"]) for row in facts.rows if row["parent_id"]}
    )
    apart = sum(count > 1 for count in groups.values())
    by = (manifest.get("splits") or {}).get("by")
    rules = {
        "run": "Splits are by run.",
        "lineage": "Splits are by lineage: a parent and all its children are together.",
    }
    sentences = [rules.get(str(by), "How splits were drawn is not recorded.")]
    sentences.append(
        f"{number(torn)} runs have rows in two splits."
        if torn
        else f"Each of the {number(len(facts.runs))} runs is in one of them."
    )
    if apart:
        sentences.append(f"The children of {number(apart)} parents are in more than one split: siblings are alike.")
    rows = [[code(split), number(len(runs[split])), number(len(rows))] for split, rows in members.items()]
    return {"table": table(["split", "runs", "rows"], rows), "text": " ".join(sentences)}


def traps(facts: Facts, manifest: Manifest) -> list[str]:
    """Write sentences on facts of the zoo that lead to wrong results if they are overlooked."""
    sentences = []
    if facts.encoding == "binary":
        sentences.append(
            '`with_format("torch")` and `"numpy"` of `datasets` cut trailing zero bytes off binary columns: read'
            " `weights` without a format or as `arrow`, and compare the length with `num_parameters`."
        )
    if facts.dtypes != ["float32"]:
        sentences.append(
            f"Weights were rounded to {listing(facts.dtypes)}; `weights_sha256` is of what a reader gets."
        )
    unmeasured = [row for row in facts.rows if row["test_accuracy"] is None]
    if unmeasured:
        sentences.append(
            f"`test_accuracy` is null in {number(len(unmeasured))} of {number(len(facts.rows))} rows: the head of a"
            " contrastive model is a projection without classes, and a source may not have recorded it."
        )
    ends = [row["num_parameters"] for row in facts.rows]
    # heads of other sizes give vectors of other lengths
    if min(ends) < max(ends):
        sentences.append(
            "Heads differ in size: compare weights of different heads over the trunk only (see `layouts.json`)."
        )
    sentences += columns_without_statistics(facts.folder)
    sentences += _named("runs of the blueprint are missing", manifest.get("missing_runs"))
    sentences += _named("checkpoints of the source were refused", manifest.get("refused"))
    notes = manifest.get("notes") or []
    return sentences + [plain(note) for note in ([notes] if isinstance(notes, str) else notes)]


def _named(what: str, entries: Mapping[str, str] | Sequence[str] | None) -> list[str]:
    """Write a sentence that counts and names missing entries, with reasons; none without entries."""
    if not entries:
        return []
    if isinstance(entries, Mapping):
        texts = [f"{code(name)} ({plain(reason)})" if reason else code(name) for name, reason in entries.items()]
    else:
        texts = [code(entry) for entry in entries]
    more = f" and {number(len(texts) - MOST_NAMED)} more, in `{schema.MANIFEST}`" if len(texts) > MOST_NAMED else ""
    return [f"{number(len(texts))} {what}: {'; '.join(texts[:MOST_NAMED])}{more}."]


def repository_name(name: str) -> str:
    """Make the placeholder of a dataset id for the examples of a zoo that is not published yet.

    >>> repository_name("my zoo")
    'ORG/my-zoo'
    """
    return f"ORG/{re.sub(r'[^A-Za-z0-9_]+', '-', name).strip('-')[:90] or 'zoo'}"


def first_path(facts: Facts, config: str) -> str:
    """Return the path of a config's first file."""
    return next(file.path for file in facts.files if file.config == config)
