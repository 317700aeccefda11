"""Write the dataset card of a zoo: the YAML header that `load_dataset` and the viewer read, and a text.

The text is the template `cards/zoo_card.md.jinja`, filled with counts of the folder and entries of the manifest.
"""

import hashlib
import re
from pathlib import Path
from typing import Any

from vitzoo_hf.format import schema
from vitzoo_hf.format.atomic import json_text
from vitzoo_hf.format.gate.card import ROOT_HASH, card_header
from vitzoo_hf.format.manifest import Manifest
from vitzoo_hf.format.messages import did_you_mean
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.publish import card_results, card_sections
from vitzoo_hf.publish.card_facts import Facts
from vitzoo_hf.publish.markdown import one_line, plain
from vitzoo_hf.publish.viewer import default_config

TEMPLATE = "zoo_card.md.jinja"
LICENCE = "cc-by-4.0"

LICENCES = (
    *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "openrail", "unlicense", "gpl-3.0", "agpl-3.0", "cc0-1.0"),
    *("cc-by-2.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0"),
    *("cc-by-nc-nd-4.0", "cc-by-nd-4.0", "odc-by", "odbl", "pddl", "cdla-permissive-2.0"),
)
"""Licences that the Hub knows by name; any other becomes `other` in the header, with its name."""

SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def card_text(
    folder: Path,
    manifest: Manifest,
    *,
    repository: str | None = None,
    default: str | None = None,
    root: str | None = None,
) -> str:
    """Write the README.md of a zoo; equal files give equal text.

    Args:
        folder: the folder with the Parquet files; `zoo.json` and a card may be missing.
        manifest: content of `zoo.json`; `default_config` and `licence` are optional.
        repository: dataset id for the examples; by default `ORG/` and the zoo's name.
        default: config that `load_dataset` and the viewer open; by default the manifest's `default_config`, or
            `weights` if the viewer can show a page of whole rows, else `index`; a card that is written again keeps
            the one that it has.
        root: SHA-256 of `zoo.json`; by default that of the file in the folder, or of `manifest` as it is written.

    Raises:
        ZooError: if the folder has no readable index, `repository` is no dataset id, or `default` is not in the zoo.
    """
    # imported here: slow, and only needed for a card
    from huggingface_hub import DatasetCard, DatasetCardData

    if repository is not None and not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", repository, re.ASCII):
        raise ZooError(f"{repository!r} is no dataset id: expected ORG/NAME")
    facts = Facts.read(folder)
    if root is None:
        file = folder / schema.MANIFEST
        root = hashlib.sha256(file.read_bytes() if file.is_file() else json_text(manifest).encode()).hexdigest()
    opened = _default(facts, manifest, default)
    name = one_line(manifest["name"]) or "zoo"
    card = DatasetCard.from_template(
        card_data=DatasetCardData(**(_header(facts, manifest, name, opened) | {ROOT_HASH: root})),
        template_str=template(),
        **_sections(facts, manifest, opened),
        title=plain(name),
        repository=repository or card_sections.repository_name(name),
    )
    # one line break at the end, whatever the template ends with: equal files give equal text
    return card.content.rstrip("\n") + "\n"


def template(name: str = TEMPLATE) -> str:
    """Read a card's template from the installed package or from a checkout.

    Raises:
        ZooError: if neither has it.
    """
    package = Path(__file__).parents[1]
    # a wheel carries `cards` in the package; in a checkout it lies beside it
    for folder in (package, package.parent):
        if (folder / "cards" / name).is_file():
            return (folder / "cards" / name).read_text(encoding="utf-8")
    raise ZooError(f"the template {package / 'cards' / name} is missing: install vitzoo-hf again")


def _default(facts: Facts, manifest: Manifest, default: str | None) -> str:
    config = default or manifest.get("default_config") or _opened_before(facts)
    if config is None:
        # rows of several number formats: whole rows open only if a page of each fits the viewer
        fitting = {default_config(facts.largest, facts.encoding, dtype) for dtype in facts.dtypes}
        config = "weights" if fitting == {"weights"} else "index"
    if config not in facts.configs:
        raise ZooError(f"the default config {config!r} is not in the zoo: {did_you_mean(str(config), facts.configs)}")
    return str(config)


def _opened_before(facts: Facts) -> str | None:
    """The default config of the card that is in the folder, if the zoo has that config."""
    file = facts.folder / schema.CARD
    entries = card_header(file.read_bytes(), str(file)).get("configs") if file.is_file() else None
    names = [
        entry.get("config_name")
        for entry in (entries if isinstance(entries, list) else [])
        if isinstance(entry, dict) and entry.get("default") is True
    ]
    return names[0] if len(names) == 1 and names[0] in facts.configs else None


def _header(facts: Facts, manifest: Manifest, name: str, opened: str) -> dict[str, Any]:
    licence = one_line(manifest.get("licence") or LICENCE)
    header = {"license": licence.lower()}
    if licence.lower() not in LICENCES:
        header = {
            "license": "other",
            # one plain word for the header; the text of the card names the licence in full
            "license_name": re.sub(r"[^a-z0-9.]+", "-", licence.lower()).strip("-.") or "other",
        }
    label = next((label for limit, label in SIZES if len(facts.rows) < limit), "1M<n<10M")
    return header | {
        "pretty_name": name,
        "task_categories": ["image-classification"],
        "tags": ["model-zoo", "weight-space-learning", "vision-transformer", "vitzoo-hf"],
        "size_categories": [label],
        "configs": [_config_entry(facts, config, opened) for config in facts.configs],
    }


def _config_entry(facts: Facts, config: str, opened: str) -> dict[str, object]:
    """Describe a config for `configs` of the header."""
    files = [{"split": split, "path": f"{config}/{split}-*.parquet"} for split in facts.configs[config]]
    # `datasets` keys its cache of local folders on the header alone: without the digest it would serve old files
    entry: dict[str, object] = {
        "config_name": config,
        "description": f"files {facts.digest(config)}",
        "data_files": files,
    }
    return entry | {"default": True} if config == opened else entry


def _sections(facts: Facts, manifest: Manifest, opened: str) -> dict[str, Any]:
    """Return the values that fill the template, besides the names."""
    licence = one_line(manifest.get("licence") or LICENCE)
    return {
        "default": opened,
        "split": facts.rows[0]["split"],
        "index_file": card_sections.first_path(facts, "index"),
        "weights_file": card_sections.first_path(facts, "weights"),
        "encoding": facts.encoding,
        "dtype": facts.dtypes[0],
        "inside": card_sections.inside(facts),
        "config_table": card_sections.configs(facts, opened),
        "column_table": card_sections.columns(facts, manifest),
        "accuracy": card_results.accuracy(facts, manifest),
        "evaluations": card_results.evaluations(facts),
        "pairs": card_results.pairs(facts),
        "kept": card_sections.kept(facts),
        "recipe": card_sections.recipe(facts),
        "images": card_sections.images(facts, manifest),
        "versions": card_sections.versions(facts),
        "blueprint": card_sections.blueprint(facts),
        "subset": manifest.get("subset_of") is not None,
        "factors": card_sections.factors(facts, manifest),
        "splits": card_sections.splits(facts, manifest),
        "licence": plain(licence.upper() if licence.lower() in LICENCES else licence),
        "image_licences": card_sections.licences(manifest),
        "traps": card_sections.traps(facts, manifest),
        "shards": (facts.folder / schema.SHARDS).is_file(),
        "version": schema.VERSION,
    }
