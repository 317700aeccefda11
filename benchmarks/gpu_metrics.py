"""Metrics of pairs and calibration at paper size on the GPU, ours beside the best simple lines of torch there.

python benchmarks/gpu_metrics.py --out FOLDER [--simulate]

The column `line` holds the code that ran. `times_ours` above 1 means that ours is faster.
"""

import importlib.util

import gpu_shared
import torch
from torch import Tensor

import vitzoo_hf as vz
from vitzoo_hf.metrics.cka import both_cka

P, N, F, C = 250, 10_000, 384, 100
WEIGHTS = 22_050_664  # a ViT-S/16 of 1000 classes
SMALL = {"P": 5, "N": 40, "F": 6, "C": 4, "WEIGHTS": 300}

AGREEMENT = (
    "vz.agreement(codes)",
    "torch.stack([(row == small).sum(1) for row in small]) / N",
    "1 - torch.cdist(codes.float(), codes.float(), p=0) / N",
    "(h := functional.one_hot(codes, C).flatten(1).to(torch.float32)) @ h.T / N",
)
DIVERGENCE = (
    "vz.jensen_shannon(logits)",
    "(m := torch.stack([torch.special.entr((row + p) / 2).sum((1, 2)) for p in [logits.softmax(-1)] for row in p])"
    " / N) - (m.diagonal() + m.diagonal()[:, None]) / 2",
)
CALIBRATION = (
    "vz.expected_calibration_error(logits, labels)",
    "torch.zeros(P, 16, device=logits.device).scatter_add_(1, ((top := logits.softmax(-1).max(-1)).values * 15)"
    ".ceil().long(), (top.indices == labels).float() - top.values).abs().sum(1) / N",
)
CKA = (
    "vz.cka(x, debiased=False)",
    "(h := torch.stack([(m.T @ c).square().sum((1, 2)) for c in [x - x.mean(1, keepdim=True)] for m in c]))"
    " / torch.outer(h.diagonal(), h.diagonal()).sqrt()",
    "(h := ((y := (x - x.mean(1, keepdim=True)).transpose(0, 1).flatten(1)).T @ y).square_()"
    ".view(P, F, P, F).sum((1, 3))) / torch.outer(h.diagonal(), h.diagonal()).sqrt()",
)
DEBIASED = ("vz.cka(x)", "torch.stack(both_cka(x))[0]")
PYTORCH_CKA = "cka_from_features(x, x)"
DISTANCES = (
    "vz.weight_distances(w)",
    "torch.cdist(w, w)",
    "((g := (d := (w - w.mean(0)).double()) @ d.T).diagonal() + g.diagonal()[:, None] - 2 * g).clamp(min=0).sqrt()",
    "torch.stack([(w - row).norm(dim=1) for row in w])",
)


def main(figures: gpu_shared.Figures) -> None:
    if figures.simulated:
        globals().update(SMALL)
    random = torch.Generator("cuda").manual_seed(0)
    torch.randn(512, 512, device="cuda") @ torch.randn(512, 512, device="cuda")  # loads cuBLAS before any timing
    names: dict[str, object] = {"vz": vz, "both_cka": both_cka, "P": P, "N": N, "F": F, "C": C}
    similarity(figures, names, random)
    labels = torch.randint(C, (N,), device="cuda", generator=random)
    logits = 2 * torch.randn(P, N, C, device="cuda", generator=random) + 2 * torch.nn.functional.one_hot(labels, C)
    codes = logits.argmax(-1)
    names |= {"logits": logits, "labels": labels, "codes": codes, "small": codes.to(torch.uint8)}
    gpu_shared.compare(figures, f"agreement, {P} x {N}, {C} classes", AGREEMENT, names)
    gpu_shared.compare(figures, f"Jensen-Shannon divergence, {P} x {N} x {C}", DIVERGENCE, names)
    gpu_shared.compare(figures, f"calibration, {P} x {N} x {C}", CALIBRATION, names)
    for name in ("logits", "labels", "codes", "small"):
        del names[name]
    del logits, codes
    distances(figures, names, random)


def similarity(figures: gpu_shared.Figures, names: dict[str, object], random: torch.Generator) -> None:
    """CKA: models that share a signal, each in a basis and with noise of its own."""
    signal = torch.randn(N, F, device="cuda", generator=random)
    x = torch.randn(P, N, F, device="cuda", generator=random)
    for model in x:
        model += signal @ torch.randn(F, F, device="cuda", generator=random) / F**0.5
    task = f"CKA, {P} x {N} x {F}"
    gpu_shared.compare(figures, f"{task}, biased", CKA, names | {"x": x})
    lines, peers = DEBIASED, {}
    if importlib.util.find_spec("cka"):
        from cka import cka_from_features

        lines, peers = (*DEBIASED, PYTORCH_CKA), {"cka_from_features": cka_from_features}
    else:
        figures.add(task=f"{task}, debiased", line=PYTORCH_CKA, note="not measured: pytorch-cka is not installed")
    gpu_shared.compare(figures, f"{task}, debiased", lines, names | {"x": x} | peers)


def distances(figures: gpu_shared.Figures, names: dict[str, object], random: torch.Generator) -> None:
    """Distances of models that lie 1e-4 apart; their errors against differences in float64."""
    base = torch.randn(WEIGHTS, device="cuda", generator=random)
    w = torch.empty(P, WEIGHTS, device="cuda")
    for model in w:
        model.copy_(base + 1e-4 * torch.randn(WEIGHTS, device="cuda", generator=random))
    first = [torch.linalg.vector_norm(w[0].double() - w[other].double()) for other in range(1, 5)]

    def error(result: Tensor) -> float:
        return ((result[0, 1:5].double() - torch.stack(first)).abs() / torch.stack(first)).max().item()

    task = f"distances, {P} x {WEIGHTS / 1e6:.3g}M, models 1e-4 apart"
    gpu_shared.compare(figures, task, DISTANCES, names | {"w": w}, error)


if __name__ == "__main__":
    gpu_shared.main("metrics", __doc__, main)
