"""The simulated device itself: what it refuses, what it counts, and that its results are the CPU's."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from simulated_cuda import SimulatedCuda
from simulated_kernels import DeviceTensor, NoValuesError, OverBudgetError
from torch import nn
from torch.nn import functional


def on(device, *shape, **options):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), **options).to(device)


MAKERS = {
    "zeros": lambda device: torch.zeros(3, device=device),
    "arange": lambda device: torch.arange(3, device=torch.device(device)),
    "tensor": lambda device: torch.tensor([1.0, 2.0], device=device),
    "as_tensor": lambda device: torch.as_tensor([1, 2], device=device),
    "to": lambda device: torch.ones(2).to(device),
    "to with dtype": lambda device: torch.ones(2).to(device, torch.float64),
    "to by name": lambda device: torch.ones(2).to(device=device, dtype=torch.float16, non_blocking=True),
    "to another's": lambda device: torch.ones(2).to(torch.zeros(1, device=device)),
    "new_tensor": lambda device: torch.ones(2).to(device).new_tensor([1, 2]),
    "new_zeros": lambda device: torch.ones(2).to(device).new_zeros(2),
    "generator": lambda device: torch.rand(3, device=device, generator=torch.Generator(device).manual_seed(5)),
    "module": lambda device: nn.utils.skip_init(nn.Linear, 2, 2).to(device).weight * 0,
    "context": lambda device: torch.full((2,), 7, device=device).double(),
}


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_every_way_to_make_a_tensor(simulated_cuda, maker):
    tensor, expected = maker("cuda"), maker("cpu")
    assert isinstance(tensor, DeviceTensor)
    assert (tensor.device, tensor.is_cuda, tensor.is_cpu) == (torch.device("cuda", 0), True, False)
    assert tensor.dtype == expected.dtype
    assert torch.equal(tensor.cpu(), expected)
    assert type(tensor.cpu()) in (torch.Tensor, nn.Parameter)
    assert simulated_cuda.d2h == 2  # each reading here


COMPUTED = {
    "product": lambda x: x @ x.T,
    "vector times matrix": lambda x: x[0] @ x.T.double().float(),
    "views in place": lambda x: x.clone().t_().unsqueeze_(0).squeeze_(),
    "data replaced": lambda x: replaced(x.clone().requires_grad_()),
    "softmax": lambda x: x.softmax(-1),
    "slices": lambda x: x[1:, ::2] + x[-4:, :3],
    "indices": lambda x: x[torch.tensor([2, 0], device=x.device), 1],
    "indices of the CPU": lambda x: x[torch.tensor([2, 0])],
    "lists": lambda x: x[[0, -1]] + x[:2, [5, 1, 2, 3, 4, 0]],
    "mask": lambda x: x[x > 0],
    "where": lambda x: torch.where(x > 0, x, torch.tensor(0.5)),
    "written": lambda x: x.clone().index_fill_(0, torch.tensor([1], device=x.device), 3.0),
    "assigned": lambda x: assigned(x.clone()),
    "out": lambda x: torch.sub(x, 1, out=torch.empty_like(x)),
    "sort": lambda x: x.sort(1).values,
    "bits": lambda x: x.view(torch.int32) & 255,
    "unique": lambda x: x.round().unique(),
    "vmap": lambda x: torch.func.vmap(lambda row: row.cumsum(0) * row[0])(x),
    "gradient": lambda x: torch.func.grad(lambda y: y.square().log1p().sum())(x),
    "gradients of examples": lambda x: torch.func.vmap(torch.func.grad(lambda y: y.sin().sum()))(x),
    "attention": lambda x: functional.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None]),
    "eigenvalues": lambda x: torch.linalg.eigvalsh(x @ x.T),
    "norm": lambda x: torch.linalg.vector_norm(x, dim=1, dtype=torch.float64),
    "einsum": lambda x: torch.einsum("pi,qi->pq", x, x),
    "inference": lambda x: inferred(x),
    "deep copy": lambda x: copy.deepcopy(x),
}


def assigned(x):
    x[0] = 1.0
    x[1, 1:] = torch.tensor(2.0)
    x[2, :2] = torch.tensor([3.0, 4.0], device=x.device)
    x[x > 2] = 0
    return x


def replaced(x):
    x.data = x.data * 2
    x.data += 1
    return x.detach()


@torch.inference_mode()
def inferred(x):
    y = x.to("cpu").to(x.device) if x.is_cuda else x
    return (y.mul(2).add_(1) @ x.T)[1:].type(torch.float64).reshape(-1, 2).sum()


@pytest.mark.parametrize("compute", COMPUTED.values(), ids=COMPUTED)
def test_results_are_those_of_the_cpu(simulated_cuda, compute):
    result, expected = compute(on("cuda", 5, 6)), compute(on("cpu", 5, 6))
    assert isinstance(result, DeviceTensor)
    torch.testing.assert_close(result.cpu(), expected)


def trained(device, precision=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for _ in range(2):
        with torch.autocast(device, precision, enabled=precision != torch.float32):
            loss = functional.cross_entropy(model(on(device, 5, 6)), torch.arange(5, device=device) % 3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return nn.utils.parameters_to_vector(model.parameters()).detach(), loss


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_model_trains_as_on_the_cpu(simulated_cuda, precision):
    (weights, loss), (expected, expected_loss) = trained("cuda", precision), trained("cpu", precision)
    assert isinstance(weights, DeviceTensor)
    assert loss.dtype == expected_loss.dtype
    torch.testing.assert_close(weights.cpu(), expected, atol=1e-3 if precision == torch.bfloat16 else 1e-6, rtol=0)


def test_autocast_multiplies_in_the_lower_precision(simulated_cuda):
    x = on("cuda", 4, 4)
    with torch.autocast("cuda", torch.bfloat16):
        assert (x @ x).dtype == functional.linear(x, x).dtype == torch.bfloat16
        assert (x @ x).softmax(0).dtype == torch.float32
    assert (x @ x).dtype == torch.float32


REFUSED = {
    "sum": lambda x: x + torch.ones(6),
    "product": lambda x: x @ torch.ones(6, 2),
    "in place": lambda x: torch.ones(5, 6).add_(x),
    "where": lambda x: torch.where(torch.ones(5, 6) > 0, x, x),
    "concatenation": lambda x: torch.cat([x, torch.ones(1, 6)]),
    "stack of single values": lambda x: torch.stack([x[0, 0], torch.tensor(1.0)]),
    "indices of the device into the CPU": lambda x: torch.ones(4)[torch.tensor([1], device=x.device)],
    "gather": lambda x: x.gather(1, torch.zeros(5, 1, dtype=torch.int64)),
    "out": lambda x: torch.sub(x, 1, out=torch.empty(5, 6)),
    "a single value written": lambda x: torch.tensor(1.0).add_(x[0, 0]),
    "values put": lambda x: x.index_put((torch.tensor([0], device=x.device),), torch.ones(1, 6)),
}


@pytest.mark.parametrize("compute", REFUSED.values(), ids=REFUSED)
def test_tensors_of_two_devices_do_not_meet(simulated_cuda, compute):
    x = on("cuda", 5, 6)
    with pytest.raises(RuntimeError, match=r"same device.*cuda:0 and cpu"):
        compute(x)


def test_numpy_and_foreign_generators_are_refused(simulated_cuda):
    with pytest.raises(TypeError, match="numpy"):
        on("cuda", 2).numpy()
    with pytest.raises(RuntimeError, match="'cuda' device type for generator but found 'cpu'"):
        torch.rand(2, device="cuda", generator=torch.Generator())
    with pytest.raises(RuntimeError, match="'cpu' device type for generator but found 'cuda'"):
        torch.randperm(2, generator=torch.Generator("cuda"))
    with pytest.raises(RuntimeError, match="'cuda' device type for generator but found 'cpu'"):
        on("cuda", 2).uniform_(generator=torch.Generator())


COUNTED = {  # kernels, syncs
    "view": (lambda x: x[1:].T.reshape(6, 4)[:, None].expand(6, 2, 4), 0, 0),
    "sum of two": (lambda x: x + x, 1, 0),
    "sum with a number of the CPU": (lambda x: x + torch.tensor(2.0), 1, 0),
    "copied layout": (lambda x: x.T.contiguous(), 1, 0),
    "same dtype": (lambda x: x.float(), 0, 0),
    "item": (lambda x: x[0, 0].item(), 0, 1),
    "float": (lambda x: float(x[0, 0]), 0, 1),
    "truth": (lambda x: bool(x.any()), 1, 1),
    "list": (lambda x: x.tolist(), 0, 1),
    "CPU": (lambda x: x.cpu(), 0, 1),
    "nonzero": (lambda x: x.nonzero(), 1, 1),
    "mask": (lambda x: x[x > 0], 2, 1),
    "mask of the CPU": (lambda x: x[torch.arange(5) > 2], 1, 0),
    "masked fill": (lambda x: x.masked_fill_(x > 0, 1), 2, 0),
    "number at a mask": (lambda x: x.__setitem__(x > 0, 1.0), 3, 0),
    "equal": (lambda x: torch.equal(x, x), 1, 1),
    "position of the device": (lambda x: x[torch.zeros((), dtype=torch.int64, device="cuda")], 1, 1),
    "attention": (lambda x: functional.scaled_dot_product_attention(*[x[None, None]] * 3), 1, 0),
    "synchronize": (lambda x: torch.cuda.synchronize(), 0, 1),
    "event": (lambda x: torch.cuda.current_stream().record_event().synchronize(), 0, 1),
}


@pytest.mark.parametrize(("compute", "kernels", "syncs"), COUNTED.values(), ids=COUNTED)
def test_kernels_and_syncs(simulated_cuda, compute, kernels, syncs):
    x = on("cuda", 5, 6)
    simulated_cuda.reset()
    compute(x)
    assert (simulated_cuda.kernels, simulated_cuda.syncs) == (kernels, syncs)


def test_bytes(simulated_cuda):
    x = torch.zeros(10, device="cuda")
    simulated_cuda.reset()
    x + x[0]
    assert simulated_cuda.bytes == 4 * (10 + 1 + 10)


def test_copies_and_whether_the_host_waits(simulated_cuda):
    host, target = torch.zeros(4), torch.zeros(4, device="cuda")
    simulated_cuda.reset()
    host.to("cuda")
    host.to("cuda", non_blocking=True)  # pageable memory
    assert (simulated_cuda.h2d, simulated_cuda.blocking_copies) == (2, 2)
    host.pin_memory()[1:].to("cuda", non_blocking=True)
    target.copy_(torch.empty(4, pin_memory=True), non_blocking=True)
    assert (simulated_cuda.h2d, simulated_cuda.blocking_copies, simulated_cuda.syncs) == (4, 2, 0)
    host.copy_(target)
    torch.empty(4, pin_memory=True).copy_(target, non_blocking=True)
    assert (simulated_cuda.d2h, simulated_cuda.syncs) == (2, 1)


def test_a_graph_overwrites_its_outputs(simulated_cuda):
    double = torch.compile(lambda x: 2 * x, mode="reduce-overhead")
    first = double(torch.ones(2, device="cuda"))
    assert first.tolist() == [2, 2]
    second = double(torch.ones(2, device="cuda"))
    assert second.tolist() == [2, 2]
    assert first.isnan().all()


def test_counts_name_the_line_of_the_package(simulated_cuda):
    from vitzoo_hf.metrics.behavior import accuracy

    accuracy(on("cuda", 2, 5, 3), torch.zeros(5, dtype=torch.int64, device="cuda"))
    assert sum(count for _, count in simulated_cuda.lines("kernel")) <= simulated_cuda.kernels
    assert all(line.startswith("metrics/") for line, _ in simulated_cuda.lines("sync"))


def test_threads_see_the_device(simulated_cuda):
    with ThreadPoolExecutor(1) as pool:
        tensor = pool.submit(torch.zeros, 2, device="cuda").result()
    assert isinstance(tensor, DeviceTensor)


def test_counting_without_values(simulated_cuda):
    with simulated_cuda.without_values():
        big = torch.empty(250, 10_000, 384, device="cuda")
        simulated_cuda.reset()
        assert (big @ big.transpose(1, 2)).shape == (250, 10_000, 10_000)
        assert simulated_cuda.kernels == 1
        with pytest.raises(NoValuesError, match="reads a value"):
            big.sum().item()
    with simulated_cuda.without_values(placeholder=3):
        assert (big.sum().item(), bool(big.any()), big[:2, 0, 0].tolist()) == (3, True, [3, 3])
        assert big[0].nonzero().shape == (0, 2)
        assert (big[0] + on("cuda", 384)).shape == (10_000, 384)


def test_a_budget_stops_at_the_first_kernel_or_sync_beyond(simulated_cuda):
    x = on("cuda", 5, 6)
    x + x
    with simulated_cuda.budget(kernels=2, syncs=1):
        (x + x + x)[0, 0].item()
    with pytest.raises(OverBudgetError, match="more than 2 kernels"), simulated_cuda.budget(kernels=2):
        x + x + x + x
    with pytest.raises(OverBudgetError, match="more than 0 syncs"), simulated_cuda.budget(syncs=0):
        x.tolist()
    x + x + x + x  # no budget any more


def test_everything_is_put_back():
    generator, compiler = torch.Generator, torch.compile
    with SimulatedCuda():
        assert torch.cuda.is_available()
        assert torch.cuda.mem_get_info()[0] > 0
    assert (torch.Generator, torch.compile) == (generator, compiler)
    assert torch.zeros(2).device.type == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises((RuntimeError, AssertionError)):
            torch.zeros(2, device="cuda")
