"""Results of any kind, computed on two devices."""

from dataclasses import fields, is_dataclass

import numpy as np
import pandas as pd
import pytest
import torch


def assert_same(result, expected):
    """Compare results of any kind, part by part."""
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(result.cpu(), expected, rtol=1e-3, atol=1e-4, equal_nan=True)
    elif isinstance(expected, pd.DataFrame):
        pd.testing.assert_frame_equal(result, expected, rtol=1e-3, atol=1e-4)
    elif isinstance(expected, np.ndarray):
        np.testing.assert_allclose(result, expected, rtol=1e-3, atol=1e-4)
    elif is_dataclass(expected):
        for field in fields(expected):
            assert_same(getattr(result, field.name), getattr(expected, field.name))
    elif isinstance(expected, dict):
        assert result.keys() == expected.keys()
        for name, value in expected.items():
            assert_same(result[name], value)
    elif isinstance(expected, list | tuple):
        for one, other in zip(result, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, float):
        assert result == pytest.approx(expected, rel=1e-3, abs=1e-4, nan_ok=True)
    elif isinstance(expected, str | int | None):
        assert result == expected
