import pytest
import torch
from torch.utils.data import DataLoader

from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.timm_import import import_timm
from vitzoo_hf.zoo import Zoo


@pytest.fixture(scope="module")
def zoo(tiny_zoo):
    return Zoo(tiny_zoo)


def test_a_row_has_its_weights_and_columns(zoo):
    columns = ["model_id", "epoch", "test_accuracy", "parent_id", "split"]
    rows = zoo.torch_dataset(columns=columns, pad=True, dtype=torch.float64)
    assert len(rows) == len(zoo)
    for number, row in enumerate(zoo.rows()):
        item = rows[number]
        assert next(iter(item)) == "weights"
        assert item["lengths"] == row.num_parameters
        assert item["weights"][: row.num_parameters].numpy().tobytes() == row.weights.tobytes()
        assert not item["weights"][row.num_parameters :].any()
        assert (item["model_id"], int(item["epoch"])) == (row.model_id, row.epoch)
        assert item["parent_id"] == (row.parent_id or "")
        assert item["split"] == row["split"]
        accuracy = float("nan") if row["test_accuracy"] is None else row["test_accuracy"]
        torch.testing.assert_close(item["test_accuracy"].item(), accuracy, equal_nan=True)
    assert rows[-1]["model_id"] == rows[len(rows) - 1]["model_id"]
    with pytest.raises(IndexError):
        rows[len(rows)]
    for number in (slice(2), "a", 1.5):
        with pytest.raises(ZooError, match=r"expected a number; `torch.utils.data.Subset` takes several"):
            rows[number]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shuffling_loader_of_torch_takes_it(zoo, workers):
    loader = DataLoader(zoo.torch_dataset(tensors="trunk"), batch_size=4, shuffle=True, num_workers=workers)
    ids = []
    for batch in loader:
        ids += batch["model_id"]
        for model_id, vector in zip(batch["model_id"], batch["weights"], strict=True):
            row = zoo.row(model_id)
            assert torch.equal(vector, torch.from_numpy(row.weights)[zoo.layouts[row.layout].trunk()])
    assert sorted(ids) == sorted(zoo.model_ids)


def test_rows_of_different_lengths_are_explained(zoo):
    with pytest.raises(ZooError, match=r'do not stack: give tensors="trunk", pad=True, or filter'):
        zoo.torch_dataset()
    alike = zoo.filter(layout=zoo.row(zoo.model_ids[-1]).layout)
    assert alike.torch_dataset()[0]["weights"].shape == (alike.row(alike.model_ids[0]).num_parameters,)


class Regression(torch.nn.Module):
    """Test accuracy from the trunk."""

    def __init__(self, size):
        super().__init__()
        self.linear = torch.nn.Linear(size, 1)
        self.seen = []

    def forward(self, weights, test_accuracy):
        self.seen.append(len(weights))
        predicted = self.linear(weights)[:, 0]
        return {"loss": (predicted - test_accuracy.nan_to_num()).square().mean(), "predicted": predicted}


def test_the_trainer_of_transformers_counts_epochs(zoo, tmp_path):
    pytest.importorskip("accelerate")
    import_timm()  # transformers loads torchvision, which beside a CPU build of torch needs what this declares
    transformers = pytest.importorskip("transformers")

    rows = zoo.torch_dataset(columns=["test_accuracy", "model_id"], tensors="trunk")
    model = Regression(rows[0]["weights"].numel())
    arguments = transformers.TrainingArguments(
        str(tmp_path), num_train_epochs=2, per_device_train_batch_size=4, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    result = transformers.Trainer(model, arguments, train_dataset=rows).train()
    assert result.global_step == 2 * -(-len(zoo) // 4)
    assert sum(model.seen) == 2 * len(zoo)


def test_accelerate_takes_rows_and_streams(zoo):
    accelerate = pytest.importorskip("accelerate")

    # else older ones join batches of a stream themselves, and know no texts
    options = accelerate.utils.DataLoaderConfiguration(dispatch_batches=False)
    accelerator = accelerate.Accelerator(cpu=True, dataloader_config=options)
    loader = accelerator.prepare(DataLoader(zoo.torch_dataset(tensors="trunk"), batch_size=3))
    assert sum(len(batch["weights"]) for batch in loader) == len(zoo)
    # columns of text first in the index: the size of a batch is read off its first entry
    loader = accelerator.prepare(DataLoader(zoo.stream(batch_size=3), batch_size=None))
    assert sorted(name for batch in loader for name in batch["model_id"]) == sorted(zoo.model_ids)
