"""Some cells of ViTs again with other draws of the pool: which images are the victim's, the adversary's and queries.

python experiments/distribution_inference/world_draws.py --folder FOLDER [--draws 3]

FOLDER is that of `world_cells.py`, whose zoos are the first draw; what is finished there is kept. Writes
`distribution_inference/draws.csv`: a row a cell and draw, and a row a cell over all draws, whose interval is nested.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import pandas as pd
import torch
from harness import WORLDS, parser, provenance_line, run_main, write_table

from distribution_inference.world_cells import HERE, zoo_of
from vitzoo_hf.apply.distribution_inference.metrics import nested_interval
from vitzoo_hf.apply.distribution_inference.zoo_attacks import Report, attack_zoo
from vitzoo_hf.blueprint.blueprint import BLUEPRINTS, Blueprint
from vitzoo_hf.launch.local import launch
from vitzoo_hf.progress import progress_bar
from vitzoo_hf.publish.pack import pack
from vitzoo_hf.zoo import Zoo

CELLS = {"null": "nominal", "label_ratio_few_images": "label_ratio", "dmi_erm": "last_environment"}
SMOKE = {"smoke": "label_ratio"}


def main() -> None:
    options = parser(__doc__, WORLDS)
    options.add_argument("--draws", type=int, default=3)
    given = options.parse_args()
    rows, cells = [], SMOKE if given.smoke else CELLS
    with progress_bar("draws", "zoo", shown=True, total=len(cells) * given.draws) as bar:
        for cell, secret in cells.items():
            hits = []
            for draw in range(given.draws):
                zoo = drawn(cell, draw, given.folder, given.workers).filter(is_final=True)
                report = attack_zoo(zoo, secret, access="probabilities", cache=given.folder / "outputs")
                chosen = report.table.set_index("attack").loc[lambda table: table["chosen"]].iloc[0]
                hits.append(hits_of(report, str(chosen.name)))
                told = {name: chosen[name] for name in ("value", "low", "high")}
                rows.append({"cell": cell, "draw": str(draw), "attack": chosen.name} | told)
                bar.update()
            # Draws are the outer level: targets of one draw share its pool and are not independent.
            mean, low, high = nested_interval(torch.stack(hits)[:, None])
            rows.append({"cell": cell, "draw": "all", "attack": "", "value": mean, "low": low, "high": high})
    table = pd.DataFrame(rows).assign(provenance=provenance_line())
    write_table(table, (given.folder if given.smoke else HERE) / "draws.csv", ["cell"], digits=4)
    print(table.drop(columns="provenance").to_string(index=False))


def drawn(cell: str, draw: int, folder: Path, workers: int) -> Zoo:
    """The zoo of a cell whose pool is parted by another seed; the first is that of the blueprint itself."""
    if draw == 0:
        return zoo_of(cell, folder, workers)
    place = folder / "draws" / f"{cell}-{draw}"
    if not (place / "zoo.json").is_file():
        text = (BLUEPRINTS / "distribution_inference" / f"{cell}.yaml").read_text(encoding="utf-8")
        # A blueprint in other words would pass unchanged, and be the first draw again.
        assert text.count("world: two-colour") == 1
        blueprint = Blueprint.parse(text.replace("world: two-colour", f"world: two-colour, split_seed: {draw}"))
        launch(blueprint, folder / "runs" / f"{cell}-draw{draw}", workers=workers, progress=False)
        pack(blueprint, folder / "runs" / f"{cell}-draw{draw}", place, progress=False)
    return Zoo(place)


def hits_of(report: Report, attack: str) -> torch.Tensor:
    """1 for each target that the attack's first seed guessed right."""
    truth = report.guesses[report.facts["secret"]]
    return torch.tensor((report.guesses[attack] == truth).tolist(), dtype=torch.float64)


if __name__ == "__main__":
    run_main(main)
