"""Streams and models of a zoo on a CUDA device: the CPU's values, and copies that nothing waits for."""

import pytest
import torch
import weight_zoo
from simulated_kernels import DeviceTensor

from vitzoo_hf.zoo import Zoo


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return weight_zoo.write(tmp_path_factory.mktemp("zoo") / "zoo", weight_zoo.draw(6))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    "options",
    [{}, {"tensors": ["head.*"]}, {"shuffle": True}, {"reuse": True}],
    ids=["all", "head", "shuffled", "reused"],
)
def test_batches_are_those_of_the_cpu(simulated_cuda, zoo, num_workers, options):
    streams = [
        zoo.stream(batch_size=2, device=device, num_workers=num_workers, **options) for device in ("cuda", "cpu")
    ]
    batches = 0
    for batch, expected in zip(*streams, strict=True):
        batches += 1
        assert batch.keys() == expected.keys()
        for name, values in expected.items():
            if isinstance(values, torch.Tensor):
                assert isinstance(batch[name], DeviceTensor), name
                torch.testing.assert_close(batch[name].cpu(), values, rtol=0, atol=0, equal_nan=True)
            elif name == "tensors":
                assert all(torch.equal(batch[name][part].cpu(), tensor) for part, tensor in values.items())
            else:
                assert batch[name] == values
    assert batches == 3


def test_a_batch_is_one_copy_and_no_wait(simulated_cuda, zoo):
    simulated_cuda.reset()
    batches = sum(1 for _ in zoo.stream(batch_size=2, device="cuda", num_workers=0))
    assert simulated_cuda.blocking_copies == 0
    assert simulated_cuda.h2d <= 2 * batches


def test_weights_are_copied_without_a_wait(simulated_cuda, zoo):
    simulated_cuda.reset()
    for _ in zoo.stream(batch_size=2, device="cuda", num_workers=0):
        pass
    assert simulated_cuda.h2d - simulated_cuda.blocking_copies == 3
    assert simulated_cuda.kernels == 0


def test_one_stream_copies_all_batches(simulated_cuda, zoo, monkeypatch):
    made = []
    stream = torch.cuda.Stream
    monkeypatch.setattr(torch.cuda, "Stream", lambda *place: made.append(place) or stream(*place))
    for _ in zoo.stream(batch_size=2, device="cuda", num_workers=0):
        pass
    assert len(made) == 1


def test_a_model_runs_on_the_device(simulated_cuda):
    zoo = Zoo.sample()
    images = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    model_id = zoo.model_ids[0]
    with torch.inference_mode():
        result, expected = zoo.model(model_id, device="cuda")(images.to("cuda")), zoo.model(model_id)(images)
    assert isinstance(result, DeviceTensor)
    torch.testing.assert_close(result.cpu(), expected, rtol=1e-5, atol=1e-5)


def test_columns_of_weights_are_those_of_the_cpu(simulated_cuda, zoo):
    places = [zoo.weight_columns(device=device, block_bytes=4096) for device in ("cuda", "cpu")]
    for (columns, block), (expected_columns, expected) in zip(*places, strict=True):
        assert columns == expected_columns
        assert isinstance(block, DeviceTensor)
        assert torch.equal(block.cpu(), expected)
