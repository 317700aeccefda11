"""Miniature copies of the original ViT model zoo's release, and a web server that lists folders as JSON."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import torch

from vitzoo_hf.models.vit import create

NAME = "vit_small_patch16_224"
ARGS = {"img_size": 16, "patch_size": 8, "in_chans": 3, "embed_dim": 12, "depth": 1, "num_heads": 2}
OVERRIDE = {"architecture": NAME, "architecture_args": {"num_heads": 2}}

PRETRAINED = (
    ("sl_vit_s_16_224_seed_6312_bs_256_lr_0.001_wd_0.0001_me_90", "sl", False, 6312),
    ("sl_ddp_vit_s_16_224_seed_6312", "sl", True, 6312),
    ("cl_vit_s_16_seed_42_bs_96_lr_0.001_wd_0.0001_me_90", "cl", False, 42),
)
FINETUNED = (
    ("sl_ft_SD_42_LR_0.001_WD_0_OM_adamw_HD_NA_FZ_False_FCMLP_False", 42, 0.001, "adamw", False),
    ("sl_ft_SD_6312_LR_0.003_WD_0_OM_sgd_HD_256_FZ_False_FCMLP_True", 6312, 0.003, "sgd", True),
)
FOLDERS = ("checkpoint_{}", "checkpoint_{:04d}", "checkpoint_{:06d}")


def model_of(key: str, classes: int, head: str = "linear") -> torch.nn.Module:
    """A tiny ViT that follows from its key."""
    seed = sum(ord(letter) * (7 + place) for place, letter in enumerate(key))
    hidden = 6 if head == "mlp" else None
    return create(NAME, ARGS | {"num_classes": classes}, head=head, head_hidden=hidden, seed=seed).eval()


def write_checkpoint(folder: Path, model: torch.nn.Module, wrapping: str = "vit") -> None:
    """A checkpoint as the release has it: a file without an extension, in one of the wrappings it was seen in."""
    folder.mkdir(parents=True)
    state = {f"vit.{name}": tensor for name, tensor in model.state_dict().items()}
    if wrapping == "ddp":
        state = {f"module.{name}": tensor for name, tensor in state.items()}
    elif wrapping == "lightning":
        state = {"state_dict": {f"model.{name}": tensor for name, tensor in state.items()}, "epoch": 3}
    torch.save(state, folder / "checkpoints")
    (folder / ".is_checkpoint").write_bytes(b"")
    (folder / "optimizer").write_bytes(b"of no interest")


def config_of(epochs: int, seed: int, outputs: int, **changes: Any) -> dict[str, Any]:
    """A config with the keys of the release."""
    return {
        "model::type": "vit_s_16",
        "model::o_dim": outputs,
        "dataset::name": "ImageNet1K",
        "dataset::dump": "/netscratch2/somebody/dataset.pt",
        "optim::lr": 0.001,
        "optim::optimizer": "adamw",
        "optim::wd": 0.0001,
        "seed": seed,
        "training::epochs_train": epochs,
        "training::mixup": 0.8,
        "training::cutmix": 1.0,
        "training::randerase": 0.25,
        "training::label_smoothing": 0.1,
    } | changes


def results_of(epochs: int) -> list[dict[str, Any]]:
    """Results of epochs 1 to `epochs`."""
    return [
        {
            "training_iteration": epoch,
            "train_loss": 2.0 / epoch,
            "train_acc": 0.5 + epoch / 100,
            "test_loss": 3.0 / epoch,
            "test_acc": 0.4 + epoch / 100,
            "hostname": "node17",
            "node_ip": "10.1.2.3",
        }
        for epoch in range(1, epochs + 1)
    ]


def write_release(
    root: Path, *, tops: tuple[str, str] = ("vit_imagenet_pretrained", "vit_cifar100_finetuned"), before: bool = False
) -> Path:
    """Three pre-trained runs of 3 epochs with two fine-tuned runs of 2 epochs each.

    Args:
        root: where.
        tops: names of the two folders.
        before: whether fine-tuned runs have a checkpoint 0 from before training, as ray's runner writes them.
    """
    pretrained, finetuned = root / tops[0], root / tops[1]
    for number, (name, mode, ddp, seed) in enumerate(PRETRAINED):
        run = pretrained / name
        for index in range(3):
            wrapping = ("vit", "lightning", "ddp")[number]
            write_checkpoint(run / FOLDERS[number].format(index), model_of(f"{name}{index}", 10), wrapping)
        changes = {"training::mode": mode, "training::ddp": ddp}
        if mode == "cl":
            changes |= {"training::mixup": None, "training::cutmix": None, "training::temperature": 0.07}
        (run / "config.json").write_text(json.dumps(config_of(3, seed, 10, **changes)))
        lines = results_of(3)
        text = ("\n".join(map(json.dumps, lines)), json.dumps(lines), json.dumps(lines[0]))[number]
        (run / "result.json").write_text(text)
        for child, head_seed, lr, optimizer, mlp in FINETUNED:
            write_finetuned(finetuned / name / child, name, head_seed, lr, optimizer, mlp, before=before)
    return root


def write_finetuned(run: Path, parent: str, seed: int, lr: float, optimizer: str, mlp: bool, *, before: bool) -> None:
    head = "mlp" if mlp else "linear"
    for index in range(3 if before else 2):
        model = model_of(f"{parent}{run.name}{index}", 5, head)
        if before and index == 0:
            trunk = {
                name: tensor for name, tensor in model_of(f"{parent}2", 10).state_dict().items() if "head" not in name
            }
            model.load_state_dict(trunk, strict=False)
        write_checkpoint(run / f"checkpoint_{index:05d}", model)
    changes = {
        "dataset::name": "CIFAR100",
        "optim::lr": lr,
        "optim::optimizer": optimizer,
        "optim::wd": 0,
        "model::head::mlp": mlp,
        "model::head::seed": seed,
        "pretraining::model::path": "/netscratch2/somebody/checkpoint_2/checkpoints",
    }
    (run / "config.json").write_text(json.dumps(config_of(2, seed, 5, **changes)))
    (run / "result.json").write_text("\n".join(map(json.dumps, results_of(2))))


class ListingServer(BaseHTTPRequestHandler):
    """Files with ranges, folders as JSON; can fail, cut and dawdle."""

    root: Path
    requests: list[str]
    extra: dict[str, list[Any]]
    faults: list[tuple[str, Any]]
    version = 1
    protocol_version = "HTTP/1.1"

    @staticmethod
    def watch() -> None:
        """Called when a checkpoint is asked for; tests put something else here."""

    def do_GET(self) -> None:
        path = unquote(self.path).strip("/")
        self.requests.append(path)
        if path.endswith("/checkpoints"):
            self.watch()
        kind, value = self.faults.pop(0) if self.faults else ("", None)
        if kind == "status":
            self._answer(int(value), b"")
            return
        file = self.root / path
        if file.is_dir():
            entries: list[Any] = [
                {"name": entry.name, "type": "directory"}
                if entry.is_dir()
                else {"name": entry.name, "type": "file", "size": entry.stat().st_size}
                for entry in file.iterdir()
            ]
            self._answer(200, json.dumps(entries + self.extra.get(path, [])).encode())
        elif file.is_file():
            data = file.read_bytes()
            is_part = "Range" in self.headers and self.headers.get("If-Range") in (None, f'"{self.version}"')
            told = self.headers["Range"] if is_part else "bytes=0-"
            start = int(told.removeprefix("bytes=").split("-")[0])
            self._answer(
                206 if is_part else 200,
                data[start:],
                start,
                len(data),
                value if kind == "cut" else None,
            )
        else:
            self._answer(404, b"")

    def _answer(self, status: int, body: bytes, start: int = 0, whole: int = 0, cut: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if whole:
            self.send_header("ETag", f'"{self.version}"')
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{whole - 1}/{whole}")
        self.end_headers()
        self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.close_connection = True

    def log_message(self, *arguments: Any) -> None:
        pass


@contextmanager
def served(root: Path) -> Iterator[tuple[str, type[ListingServer]]]:
    """A folder behind a web server: its address, and the class whose attributes steer it."""
    handler = type("Server", (ListingServer,), {"root": root, "requests": [], "extra": {}, "faults": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
