"""What a zoo holds -> its dataset card: the YAML header that `load_dataset` and the viewer read, and a text."""

from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from vitzoo_hf import schema


def card_text(manifest: Mapping[str, Any], held: Iterable[tuple[str, str]]) -> str:
    """The README.md of a zoo.

    Args:
        manifest: what `zoo.json` says.
        held: `(config, split)` of every Parquet file. The header always lists them: without `configs:` the layout of
            the folder would be guessed.
    """
    splits: dict[str, list[str]] = {}
    for config, split in held:
        splits.setdefault(config, []).append(split)
    header = {
        "license": "cc-by-4.0",
        "pretty_name": manifest["name"],
        "tags": ["model-zoo", "weight-space", "vision-transformer"],
        "configs": [_config_entry(config, splits[config]) for config in schema.CONFIGS if config in splits],
    }
    return f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n{_body(manifest)}"


def _config_entry(config: str, splits: Iterable[str]) -> dict[str, Any]:
    known = [split for split in schema.SPLITS if split in set(splits)]
    known += sorted(set(splits) - set(known))
    entry: dict[str, Any] = {"config_name": config}
    entry["data_files"] = [{"split": split, "path": f"{config}/{split}-*.parquet"} for split in known]
    return entry | ({"default": True} if config == "weights" else {})


def _body(manifest: Mapping[str, Any]) -> str:
    images = "\n".join(f"- `{name}`: {record['licence']}" for name, record in manifest["images"].items())
    factors = ", ".join(f"`factor_{name}`" for name in manifest["factors"])
    return f"""# {manifest["name"]}: a population of vision transformers

Each row is one checkpoint: its flat float32 weights in the `state_dict` order of timm, its generating
factors ({factors}), its lineage (`parent_id`) and its results.

```python
from datasets import load_dataset

rows = load_dataset("PATH_OR_ID")            # weights and factors
index = load_dataset("PATH_OR_ID", "index")  # the same rows without weights
```

Splits are by {manifest["splits"]["by"]}: no run has epochs in two of them. `layouts.json` gives names, shapes
and offsets of the tensors in a vector; `blueprint.yaml` is what the zoo was made from; `probes` holds the
held-out images exactly as the models are fed them, before `(x / 255 − mean) / std` (see `{schema.MANIFEST}`).

Images trained on:

{images}
"""
