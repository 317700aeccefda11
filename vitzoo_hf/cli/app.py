"""The `vitzoo` command: its app, the verbs that build a zoo, and exit statuses.

Costs: torch, timm, pandas and pyarrow are imported inside a verb, so that `vitzoo --help` answers at once.
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from cyclopts import App
from cyclopts.exceptions import CycloptsError

from vitzoo_hf.cli.attack import attack
from vitzoo_hf.cli.autoencoder import decode, encode, sample
from vitzoo_hf.cli.evaluate import evaluate
from vitzoo_hf.cli.lineage import lineage
from vitzoo_hf.cli.options import (
    Json,
    Quiet,
    Ray,
    Workers,
    format_bytes,
    format_duration,
    hint,
    join,
    open_zoo,
    print_json,
    print_table,
    say_without_statistics,
)
from vitzoo_hf.cli.properties import properties
from vitzoo_hf.cli.rebasin import rebasin
from vitzoo_hf.cli.soup import soup
from vitzoo_hf.cli.zoo import convert, export, get, info, list_rows, push, verify
from vitzoo_hf.format.schema import VERSION, ZooError

if TYPE_CHECKING:
    from vitzoo_hf.launch.local import Summary
    from vitzoo_hf.zoo.zoo import Zoo

# the interruption message promises this, so a verb must be resumable to stand here
CONTINUED = ("train", "evaluate", "pack", "convert", "push", "quickstart", "export", "encode")
"""Verbs that continue after an interruption when they are called again."""

app = App(
    name="vitzoo",
    help="Populations of vision transformers as a Hugging Face dataset. Start with `vitzoo quickstart`.",
    version=VERSION,
    # Ctrl-C reaches `run`, which says whether the same command continues
    suppress_keyboard_interrupt=False,
)
app.register_install_completion_command(
    help="Install shell completion: writes a script, and adds a line to the shell's start-up file."
)

app.command(list_rows, name="ls")
for verb in (
    info,
    get,
    export,
    convert,
    push,
    verify,
    evaluate,
    lineage,
    rebasin,
    properties,
    soup,
    encode,
    decode,
    sample,
    attack,
):
    app.command(verb)


@app.command
def quickstart(
    *,
    out: Path = Path("vitzoo-quickstart"),
    blueprint: str = "mini",
    workers: Workers = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a small zoo on real images, publish it as a dataset folder, measure it, and write its report.

    Args:
        out: Folder for the zoo, the report and the training checkpoints.
        blueprint: Blueprint of the zoo to build: a name such as `mini`, or a YAML file.
    """
    from vitzoo_hf.blueprint.blueprint import Blueprint
    from vitzoo_hf.cli.quickstart import quickstart as build
    from vitzoo_hf.cli.quickstart import summary_table
    from vitzoo_hf.zoo.zoo import Zoo

    start = time.perf_counter()
    say = (lambda line: None) if json or quiet else print
    outcome = build(out, blueprint=Blueprint.load(blueprint), workers=workers, progress=not (json or quiet), say=say)
    zoo = Zoo(outcome.zoo)
    table = summary_table(zoo)
    if json:
        print_json(
            {
                "zoo": str(outcome.zoo),
                "report": str(outcome.report),
                "already_done": outcome.already_done,
                "seconds": round(time.perf_counter() - start, 1),
                "rows": len(zoo),
                "table": table,
            }
        )
        return
    print_table(table)
    if outcome.already_done:
        print(f"\nAlready done: the zoo in {outcome.zoo} is complete and measured; nothing was trained.")
    else:
        print(f"\n{len(zoo)} rows in {outcome.zoo} after {time.perf_counter() - start:.0f} s.")
    if not quiet:
        hint(
            f"""Look at {outcome.report}, then open the zoo in Python:

    from datasets import load_dataset
    rows = load_dataset({str(outcome.zoo)!r}, split="train")      # weights and factors

    import vitzoo_hf as vz
    zoo = vz.Zoo({str(outcome.zoo)!r})
    model = zoo.model({_best_model(zoo)!r})      # a live timm ViT

or continue on the command line: vitzoo ls {outcome.zoo} --where factor_optimizer=adamw"""
        )


@app.command
def plan(
    blueprint: str,
    *,
    workers: Workers = None,
    device: str = "cpu",
    write: Path | None = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Estimate what a blueprint will cost: runs, rows, parameters, disk, time. Nothing is trained.

    Args:
        blueprint: A name such as `mini`, or a YAML file.
        device: Device on which a few training steps are timed: cpu or cuda.
        write: New file into which the blueprint is copied, as a start for a blueprint of your own. No cost is
            estimated then.
    """
    from vitzoo_hf.blueprint.blueprint import Blueprint

    if write is not None:
        # the text, not the parsed plan: comments of the blueprint stay
        _write_new(write, Blueprint.load(blueprint).text)
        hint(f"Next: edit {write}, then vitzoo plan {write}")
        return
    from vitzoo_hf.launch.cost import make_plan

    cost = make_plan(Blueprint.load(blueprint), workers=workers, device=device)
    if json:
        print_json(cost.to_json())
        return
    smallest, largest = cost.parameters
    # heads of several datasets give models of several sizes
    size = f"{smallest:,}" if smallest == largest else f"{smallest:,} to {largest:,}"
    print(f"blueprint   {cost.name}")
    print(f"models      {cost.models} ({', '.join(f'{n} {stage}' for stage, n in cost.stages.items())})")
    print(f"rows        {cost.rows} stored checkpoints")
    print(f"splits      {', '.join(f'{n} runs {split}' for split, n in cost.splits.items())}")
    print(f"parameters  {size} a model")
    print(f"disk        {format_bytes(cost.disk_bytes)} of weights, and as much again for training checkpoints")
    if cost.seconds is None:
        print(f"time        unknown: {cost.note}")
    else:
        # no more workers are busy than there are models
        hours = cost.seconds * min(cost.workers, cost.models) / 3600
        print(f"time        about {format_duration(cost.seconds)} of training on {cost.workers} worker(s)")
        print(f"            {hours:,.{0 if hours >= 10 else 2}f} hours of one {cost.device} worker")
        if cost.note:
            print(f"            {cost.note}")
    if not quiet:
        hint(f"Next: vitzoo train {quote(blueprint)} --out RUNS")


@app.command
def train(
    blueprint: str,
    *,
    out: Path,
    workers: Workers = None,
    stack: int | None = None,
    device: str = "cpu",
    ray: Ray = False,
    storage: str | None = None,
    cpus_per_run: int | None = None,
    gpus_per_run: float | None = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train every run of a blueprint. Finished runs are skipped, and interrupted runs continue.

    Args:
        blueprint: A name such as `mini`, or a YAML file.
        out: Folder for the checkpoints, one subfolder per run. With --ray and without --storage, all machines must
            share it.
        stack: Number of runs of one shape that a worker trains together. By default 1 on a CPU, and as many as fit,
            up to 32, on a GPU or for runs that are trained on a world. Runs with gradient accumulation, with autocast
            or with images decoded on demand are trained alone.
        device: cpu or cuda.
        storage: With --ray: where checkpoints are stored, s3://… or any fsspec URL that every machine can reach.
            Finished runs are copied into --out.
        cpus_per_run: With --ray: CPU cores for a run or a stack; by default 1.
        gpus_per_run: With --ray: GPUs for a run or a stack, possibly a fraction; by default 1 with --device cuda.
    """
    from vitzoo_hf.blueprint.blueprint import Blueprint

    zoo, progress = Blueprint.load(blueprint), not (json or quiet)
    # `--ray` without an address is True, so only False means that Ray was not requested
    if ray is False:
        from vitzoo_hf.launch.local import launch

        # refused rather than ignored: the user expects them to have an effect
        if (storage, cpus_per_run, gpus_per_run) != (None, None, None):
            raise ZooError(
                "--storage, --cpus-per-run and --gpus-per-run need --ray: give --ray too, or leave them out"
            )
        summary = launch(zoo, out, workers=workers, stack=stack, device=device, progress=progress)
    else:
        from vitzoo_hf.launch.ray import launch_on_ray

        if workers is not None:
            raise ZooError("--workers does not apply with --ray: give --cpus-per-run instead")
        summary = launch_on_ray(
            zoo,
            out,
            address="local" if ray is True else ray,
            device=device,
            num_cpus=1 if cpus_per_run is None else cpus_per_run,
            num_gpus=gpus_per_run,
            stack=stack,
            storage=storage,
            progress=progress,
        )
    _tell(summary, zoo.name, out, json=json)
    if not (quiet or json):
        hint(f"Next: vitzoo pack {quote(blueprint)} {quote(str(out))} --out ZOO")


@app.command
def pack(
    blueprint: str,
    runs: Path,
    *,
    out: Path,
    dtype: str = "float32",
    default_config: str | None = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Publish trained runs as a zoo, in a dataset folder.

    Args:
        blueprint: Blueprint by which the runs were trained: a name, or a YAML file.
        runs: Folder of the runs, as `vitzoo train` leaves it.
        out: Folder for the zoo. A zoo that is already there is replaced.
        dtype: Storage type of the weights: float32, or float16 or bfloat16 for half the size with rounded weights.
        default_config: What load_dataset and the Hub's viewer open, weights or index; by default by the models' size.
    """
    from vitzoo_hf.blueprint.blueprint import Blueprint
    from vitzoo_hf.publish.pack import pack as write
    from vitzoo_hf.zoo.zoo import Zoo

    design = Blueprint.load(blueprint)
    shown = not (json or quiet)
    zoo = Zoo(write(design, runs, out, dtype=dtype, default_config=default_config, progress=shown))
    if json:
        print_json({"zoo": str(out), "rows": len(zoo), "missing_runs": zoo.manifest["missing_runs"]})
        return
    print(f"{len(zoo)} rows in {out}")
    for run_id, reason in zoo.manifest["missing_runs"].items():
        print(f"left out: {run_id}: {reason}")
    say_without_statistics(out)
    if not quiet:
        # an attack needs both a secret and the column that tells targets from shadows
        secret = design.secrets[0] if design.secrets and "role" in design.factor_types else None
        zoo_name = quote(str(out))
        hint(f"Next: vitzoo attack {zoo_name} --secret {secret}" if secret else f"Next: vitzoo evaluate {zoo_name}")


@app.command
def plot(zoo: str, *, out: Path, json: Json = False, quiet: Quiet = False) -> None:
    """Draw the figures of an evaluated zoo, with a CSV file for each, and a self-contained report.html.

    Args:
        zoo: Folder, dataset id, or `sample`.
        out: Folder for the report.
    """
    from vitzoo_hf.report.html import write_zoo_report

    say = (lambda line: None) if json or quiet else print
    report = write_zoo_report(open_zoo(zoo, None), out, say=say)
    if json:
        print_json({"report": str(report)})
        return
    print(report)


@app.command
def env(*, json: Json = False, quiet: Quiet = False) -> None:
    """Describe this machine and the installed versions, to be pasted into a bug report."""
    from vitzoo_hf.environment import describe

    facts = describe()
    if json:
        print_json(facts)
        return
    for name, value in facts.items():
        print(f"{name:<18}{join(value)}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its status: 0, 1 for a failure, 2 for bad usage, 130 after Ctrl-C."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Run one verb and return its exit status; a mistake of the user becomes one line on standard error."""
    if {"--quiet", "--json"} & set(arguments):
        # `datasets` reads this variable when it is imported, so it must be set before the verb runs
        os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    try:
        # errors reach the clauses below, which give each its line and exit status
        app(list(arguments), exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        print(f"vitzoo: {' '.join(str(error).split())} See `vitzoo --help`.", file=sys.stderr)
        return 2
    except ZooError as error:
        print(f"vitzoo: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # the reader, such as `head`, has gone: without this Python fails again when it flushes stdout at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"vitzoo: {error.filename or 'the system says'}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        resumes = bool(arguments) and arguments[0] in CONTINUED
        outlook = "continues where it was" if resumes else "starts again from the beginning"
        print(f"\nvitzoo: interrupted; the same command {outlook}", file=sys.stderr)
        # 128 + 2, the number of SIGINT, as shells count
        return 130
    return 0


def _tell(summary: "Summary", name: str, out: Path, *, json: bool) -> None:
    if not summary.finished:
        raise ZooError(f"no run of {name!r} was finished: {next(iter(summary.diverged.values()))}")
    if json:
        print_json(vars(summary))
        return
    print(f"{len(summary.finished)} runs finished in {out}")
    for run_id, reason in summary.diverged.items():
        print(f"diverged: {run_id}: {reason}")
    if summary.orphaned:
        print(f"skipped, because the parent run diverged: {', '.join(summary.orphaned)}")


def _write_new(path: Path, text: str) -> None:
    try:
        # `x`: never overwrites a blueprint that somebody edited
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ZooError(f"cannot write {path}: {error.strerror}") from None


def _best_model(zoo: "Zoo") -> str:
    """Name the final model that is best on the selection images."""
    table = zoo.to_pandas("evaluations")
    # the last stage: a fine-tuned model where there is one
    table = table[table["is_final"] & (table["stage"] == table["stage"].iloc[-1])]
    # `idxmax` of a column without a number raises
    if table["selection_accuracy"].isna().all():
        return str(table["model_id"].iloc[-1])
    return str(table.loc[table["selection_accuracy"].idxmax(), "model_id"])


if __name__ == "__main__":
    main()
