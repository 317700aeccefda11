"""The plan of a zoo: YAML to runs, recipes, image sets, worlds, ids, lineage and splits. Loads no images."""
