"""A CUDA device simulated on a CPU build of torch: what the package would launch, read back and copy on a GPU.

Inside `SimulatedCuda()` every call that asks for a CUDA device gets tensors of `simulated_kernels`. They refuse CPU
tensors of one dimension or more as CUDA does, and count kernels, bytes, copies and reads that the host waits for,
with the line of the package that caused each.

Three things differ from a GPU. A generator of the device draws the numbers of a CPU generator, so results can be
compared with the CPU. `torch.compile` runs eagerly, and under `reduce-overhead` a call overwrites the outputs of the
call before it with NaN, as a CUDA graph may. Autocast knows the operators of `LOWER` and `FLOAT32` only.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, ClassVar, Self

import numpy as np
import pytest
import torch
from simulated_kernels import CPU, CUDA, DeviceTensor, SimulatedKernels, is_pinned, pinned
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

# fmt: off
LOWER = frozenset([
    "linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "conv2d", "einsum",
    "scaled_dot_product_attention",
])
"""Functions that autocast computes in its lower precision."""
FLOAT32 = frozenset([
    "softmax", "log_softmax", "layer_norm", "cross_entropy", "nll_loss", "mse_loss", "exp", "log", "pow", "sum",
    "prod", "norm",
])
"""Functions that autocast computes in float32."""
# fmt: on


def on_device(device: object) -> bool:
    return device is not None and not isinstance(device, int) and torch.device(device).type == "cuda"  # type: ignore[arg-type]


class Calls(TorchFunctionMode):
    """Replaces calls that a CPU build refuses, or answers wrongly, before they reach C++."""

    def __init__(self, kernels: SimulatedKernels) -> None:
        super().__init__()
        self.kernels = kernels

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        check_generator(kwargs, args)
        if torch.is_autocast_enabled("cuda") and (name in LOWER or name in FLOAT32):
            dtype = torch.get_autocast_dtype("cuda") if name in LOWER else torch.float32
            args, kwargs = tree_map_only(DeviceTensor, lambda tensor: cast(tensor, dtype), (args, kwargs))
        if name in ("__getitem__", "__setitem__"):
            args = (args[0], index_of(args[1]), *args[2:])
        replacement = getattr(self, f"_{name}", None) if name in REPLACED else None
        return func(*args, **kwargs) if replacement is None else replacement(func, *args, **kwargs)

    def _to(self, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        is_device_first = bool(args) and isinstance(args[0], str | torch.device)
        if not on_device(args[0] if is_device_first else kwargs.get("device")):
            return func(tensor, *args, **kwargs)
        kwargs |= zip(("dtype", "non_blocking", "copy"), args[is_device_first:], strict=False)
        kwargs.pop("device", None)
        if isinstance(tensor, DeviceTensor):
            # not with the device, which C++ would take for another than the shell's
            return func(tensor, kwargs.pop("dtype", None) or tensor.dtype, **kwargs)
        # with an index, so that C++ does not ask the missing device guard for one
        return func(tensor, CUDA, **kwargs)

    def _cuda(self, func: Any, tensor: Tensor, device: Any = None, non_blocking: bool = False) -> Tensor:
        return self._to(torch.Tensor.to, tensor, CUDA, non_blocking=non_blocking)

    def _tensor(self, func: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        if not on_device(device):
            return func(*args, device=device, **kwargs)
        requires_grad = kwargs.pop("requires_grad", False)
        return self._to(torch.Tensor.to, func(*args, **kwargs), CUDA).requires_grad_(requires_grad)

    _as_tensor = _asarray = _tensor

    def _new_tensor(self, func: Any, tensor: Tensor, data: Any, *, dtype: Any = None, device: Any = None) -> Tensor:
        if not isinstance(tensor, DeviceTensor):
            return func(tensor, data, dtype=dtype, device=device)
        return self._to(torch.Tensor.to, torch.tensor(data, dtype=dtype or tensor.dtype), device or CUDA)

    def _empty(self, func: Any, *args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        return pinned(func(*args, **kwargs)) if pin_memory else func(*args, **kwargs)

    def _pin_memory(self, func: Any, tensor: Tensor, device: Any = None) -> Tensor:
        if isinstance(tensor, DeviceTensor):
            raise RuntimeError("cannot pin a CUDA tensor; only dense CPU tensors can be pinned")
        return tensor if is_pinned(tensor) else pinned(tensor.clone())

    def _is_pinned(self, func: Any, tensor: Tensor, device: Any = None) -> bool:
        return is_pinned(tensor)

    def _scaled_dot_product_attention(
        self, func: Any, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any
    ) -> Tensor:
        if not isinstance(query, DeviceTensor) or query.dim() != 4 or kwargs.keys() - {"scale"}:
            return func(query, key, value, **kwargs)
        # one kernel, as on a GPU; C++ would choose products and a softmax for a device that it does not know
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return fused(query, key, value, 0.0, False, **kwargs)[0]


REPLACED = frozenset(name[1:] for name in vars(Calls) if name.startswith("_") and not name.startswith("__"))


def index_of(index: Any) -> Any:
    """An index with tensors of the CPU for lists, which C++ would put on the shell's device, where they are lost."""
    if isinstance(index, tuple):
        return tuple(index_of(part) for part in index)
    return torch.as_tensor(index) if isinstance(index, list | range | np.ndarray) else index


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor


def check_generator(kwargs: dict[str, Any], args: Any) -> None:
    """A generator draws on its own device only."""
    generator = kwargs.get("generator")
    if generator is None:
        return
    places = [tensor.device.type for tensor in tree_leaves(args) if isinstance(tensor, Tensor)]
    wanted = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else (places or ["cpu"])[0]
    if generator.device.type != wanted:
        raise RuntimeError(f"Expected a '{wanted}' device type for generator but found '{generator.device.type}'")


class _AnyGenerator(type(torch._C.Generator)):
    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, torch._C.Generator)


class Generator(torch._C.Generator, metaclass=_AnyGenerator):
    """A generator that may say that it is of the device."""

    device = property(lambda self: self.place)  # type: ignore[assignment]

    def __new__(cls, device: Any = "cpu") -> Self:
        generator = super().__new__(cls, "cpu")
        generator.place = CUDA if on_device(device) else CPU  # type: ignore[attr-defined]
        return generator

    def __init__(self, device: Any = "cpu") -> None:
        pass


class Event(torch.cuda.Event):
    """An event, which has always come."""

    def __new__(cls, *_: Any, **__: Any) -> Self:
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0

    def synchronize(self) -> None:
        SimulatedCuda.active[-1].sync("event.synchronize")


class Stream(torch.cuda.Stream):
    """A stream; what is put on it runs at once."""

    device = CUDA

    def __new__(cls, *_: Any, **__: Any) -> Self:
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        return event or Event()

    def synchronize(self) -> None:
        SimulatedCuda.active[-1].sync("stream.synchronize")


def compiled(model: Any = None, *, mode: str | None = None, **_: Any) -> Any:
    """`torch.compile`: the function itself, with the outputs of CUDA graphs."""
    if model is None:
        return lambda function: compiled(function, mode=mode)
    if mode != "reduce-overhead" or isinstance(model, torch.nn.Module):
        return model
    outputs: list[Tensor] = []

    def run(*args: Any, **kwargs: Any) -> Any:
        for tensor in outputs:
            tensor.values.fill_(torch.nan if tensor.is_floating_point() else 0)
        result = model(*args, **kwargs)
        outputs[:] = [
            leaf for leaf in tree_leaves(result) if isinstance(leaf, DeviceTensor) and not leaf.requires_grad
        ]
        return result

    return run


class SimulatedCuda(SimulatedKernels):
    """The device, as a context manager; for the counts see `SimulatedKernels`.

    Args:
        memory: bytes that `torch.cuda.mem_get_info` calls free; 141 GiB are there in all.
    """

    active: ClassVar[list["SimulatedCuda"]] = []

    def __init__(self, memory: int = 130 * 2**30) -> None:
        super().__init__()
        self.memory = memory

    def __enter__(self) -> Self:
        self._stack = ExitStack()
        self.active.append(self)
        self._stack.callback(self.active.pop)
        patch = self._stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in self._runtime().items():
            patch.setattr(f"torch.cuda.{name}", value)
        patch.setattr(torch, "Generator", Generator)
        patch.setattr(torch, "compile", compiled)
        # a parameter moves by being replaced; by default torch would swap the C++ tensor behind the Python object
        patch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
        run = threading.Thread.run

        def run_on_device(thread: threading.Thread) -> None:
            with self._modes():
                run(thread)

        patch.setattr(threading.Thread, "run", run_on_device)
        self._stack.enter_context(self._modes())
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @contextmanager
    def _modes(self) -> Iterator[None]:
        """Turn the device on in this thread."""
        SimulatedKernels.__enter__(self)
        try:
            with Calls(self):
                yield
        finally:
            SimulatedKernels.__exit__(self, None, None, None)

    def _runtime(self) -> dict[str, Any]:
        """Stand-ins of `torch.cuda`."""
        total = 141 * 2**30
        properties = SimpleNamespace(name="simulated", total_memory=total, multi_processor_count=132)
        constants: dict[str, object] = {
            "is_available": True,
            "is_initialized": True,
            "is_bf16_supported": True,
            "device_count": 1,
            "current_device": 0,
            "get_device_name": "simulated",
            "get_device_properties": properties,
            "get_device_capability": (9, 0),
            "memory_allocated": 0,
            "max_memory_allocated": 0,
            "memory_reserved": 0,
            "mem_get_info": (self.memory, total),
            "is_current_stream_capturing": False,
        }
        nothing = ("_lazy_init", "_lazy_call", "set_device", "empty_cache", "reset_peak_memory_stats")
        constants |= dict.fromkeys((*nothing, "manual_seed", "manual_seed_all"))
        return {name: constant(value) for name, value in constants.items()} | {
            "Stream": Stream,
            "Event": Event,
            "synchronize": lambda *_: self.sync("synchronize"),
            "current_stream": lambda *_: Stream(),
            "stream": lambda *_: nullcontext(),
            "device": lambda *_: nullcontext(),
            # the device draws the numbers of the CPU
            "get_rng_state": lambda *_: torch.get_rng_state(),
            "set_rng_state": lambda state, *_: torch.set_rng_state(state),
        }


def constant(value: object) -> Callable[..., object]:
    return lambda *_, **__: value
