"""Tensors of a simulated CUDA device, and the operators on them: which devices may meet, what is counted.

A tensor says `cuda:0` and keeps its values in a CPU tensor, or in a meta tensor where only the counts are asked for.
"""

import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _device as device_context
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

CUDA, CPU, META = torch.device("cuda", 0), torch.device("cpu"), torch.device("meta")

# fmt: off
SIZES = frozenset([
    "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount", "repeat_interleave",
])
"""Operators whose results have a size that depends on values, which the host waits for."""
VALUES = frozenset(["_local_scalar_dense", "equal", "_linalg_check_errors"])
READS = SIZES | VALUES | frozenset(["histc", "_linalg_eigh", "_linalg_svd", "linalg_eig", "linalg_lstsq"])
"""Operators after which the host waits for a value or a size."""
NO_KERNEL = frozenset([
    "empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "resize_", "detach", "alias",
    "lift_fresh", "_unsafe_view", "_reshape_alias", "_local_scalar_dense", "_linalg_check_errors",
])
# fmt: on
INDEXING = frozenset({"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"})


class NoValuesError(RuntimeError):
    """A value was read from tensors that have none."""


class OverBudgetError(Exception):
    """More kernels or more syncs than a budget allows; no error that the package would catch."""


class DeviceTensor(torch.Tensor):
    """A tensor of the simulated device; `values` is a CPU tensor, or a meta tensor where nothing is computed."""

    values: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = is_meta = property(lambda self: False)  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, values: Tensor) -> "DeviceTensor":
        # C++ sees a meta tensor: a CPU build has no device guard for CUDA, which autograd would ask
        with torch.inference_mode(False):  # C++ refuses views of another kind than their base
            shell = torch.empty_strided(values.shape, values.stride(), dtype=values.dtype, device=META)
            tensor = torch.Tensor._make_subclass(cls, shell, False, device_for_backend_keys=CUDA)
        tensor.values = values
        return tensor

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, tensor: "DeviceTensor") -> None:
        torch.Tensor.data.__set__(self, tensor)  # type: ignore[attr-defined]
        self.values = tensor.values

    def get_device(self) -> int:
        return 0

    def data_ptr(self) -> int:
        return self.values.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it first.")

    __array__ = numpy

    def record_stream(self, stream: Any) -> None:
        pass

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            copied = self.detach().clone().requires_grad_(self.requires_grad)
            memo[id(self)] = torch.nn.Parameter(copied, self.requires_grad) if hasattr(self, "_is_param") else copied
        return memo[id(self)]

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"DeviceTensor({self.values!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on a tensor of a simulated device that is closed")


def caller() -> tuple[str, str]:
    """The innermost line of the package that is running, `metrics/cka.py:80`, and its function; `?` outside."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/vitzoo_hf/" in name:
            return f"{name.rpartition('/vitzoo_hf/')[2]}:{frame.f_lineno}", frame.f_code.co_name
        frame = frame.f_back  # type: ignore[assignment]
    return "?", "?"


def tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def size_of(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class SimulatedKernels(TorchDispatchMode):
    """Runs the operators of the device and counts them.

    Attributes:
        kernels: operators launched; views launch none.
        bytes: bytes that kernels read and wrote.
        syncs: times that the host waited for a value, a size, a copy to the CPU, a stream or an event.
        h2d, d2h: copies from and to the CPU.
        blocking_copies: copies from the CPU that the host waits for: of pageable memory, or without `non_blocking`.
        where: counts by kind (`kernel`, `sync`, `h2d`, `d2h`), line of the package and operator.
    """

    def __init__(self) -> None:
        super().__init__()
        self.placeholder: float | None = None
        self.placeholders: Mapping[str, float] = {}
        self.has_values = True
        self._budget: dict[str, int] = {}
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        self.kernels = self.bytes = self.syncs = self.h2d = self.d2h = self.blocking_copies = 0
        self.where: Counter[tuple[str, str, str]] = Counter()

    def lines(self, kind: str) -> list[tuple[str, int]]:
        """Lines of the package that caused counts of this kind, the most first."""
        lines: Counter[str] = Counter()
        for (this, line, _), count in self.where.items():
            lines[line] += count if this == kind else 0
        return [(line, count) for line, count in lines.most_common() if count]

    @contextmanager
    def without_values(self, placeholder: float | None = None, **by_function: float) -> Iterator[None]:
        """Tensors made inside have shapes and no values, so counting costs nothing.

        Args:
            placeholder: what a read gives; without one a read raises `NoValuesError`. With one, sizes that depend
                on values are those of zeros.
            by_function: what reads in functions of the package give, by the name of the function.
        """
        before = self.has_values, self.placeholder, self.placeholders
        self.has_values, self.placeholder, self.placeholders = False, placeholder, by_function
        try:
            yield
        finally:
            self.has_values, self.placeholder, self.placeholders = before

    @contextmanager
    def budget(self, **most: int) -> Iterator[None]:
        """Count from 0, and stop what runs inside with `OverBudgetError` once a count is above `most`.

        Args:
            most: by the name of a count: `kernels=500, syncs=0`.
        """
        self.reset()
        self._budget = most
        try:
            yield
        finally:
            self._budget = {}

    def sync(self, operator: str) -> None:
        self._count("sync", operator, syncs=1)

    def _count(self, kind: str, operator: str, **counts: int) -> None:
        with self._lock:  # threads of the package share the device
            self.where[kind, caller()[0], operator] += 1
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)
        for name, most in self._budget.items():
            if getattr(self, name) > most:
                raise OverBudgetError(f"more than {most} {name}, most of them by {self.lines(name.rstrip('s'))[:4]}")

    def _read(self, operator: str) -> float:
        """The placeholder of a read."""
        value = self.placeholders.get(caller()[1], self.placeholder)
        if value is None:
            raise NoValuesError(f"{operator} at {caller()[0]} reads a value of a tensor that has none")
        return value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
            return self._decomposed(func, args, kwargs)
        name = func._schema.name.removeprefix("aten::")
        tensors = tensors_in((args, kwargs))
        ours = [tensor for tensor in tensors if isinstance(tensor, DeviceTensor)]
        wanted = kwargs.get("device")
        if wanted is None:
            makes_ours = bool(ours)
        else:  # C++ asks for the shell's device; a context of the meta device means it
            is_shell = wanted.type == "meta" and (bool(ours) or str(device_context.CURRENT_DEVICE) != "meta")
            makes_ours = wanted.type == "cuda" or is_shell
        if not ours and not makes_ours:
            return func(*args, **kwargs)
        if name == "_to_copy":
            return self._copied(func, args[0], makes_ours, kwargs)
        if name == "copy_":
            return self._copy(func, *args, **kwargs)
        self._check_devices(func, name, args, tensors)
        return self._run(func, name, args, kwargs, ours, makes_ours)

    def _decomposed(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operator made of others, which reaches this place whole where no gradient is recorded."""
        TorchDispatchMode.__enter__(self)
        try:
            return func.decompose(*args, **kwargs)
        finally:
            TorchDispatchMode.__exit__(self, None, None, None)

    def _check_devices(self, func: Any, name: str, args: Any, tensors: Sequence[Tensor]) -> None:
        host = [tensor for tensor in tensors if not isinstance(tensor, DeviceTensor)]
        refused = host
        if name in INDEXING:  # indices of the CPU are copied over, and a single value is read
            values = args[2] if len(args) > 2 else None
            refused = [tensor for tensor in host if tensor is args[0] or (tensor is values and tensor.dim())]
            for tensor in host:
                if tensor.dim() and not any(tensor is other for other in refused):
                    self._count("h2d", name, h2d=1, blocking_copies=1)
        elif torch.Tag.pointwise in func.tags or name == "fill_":
            is_written = func._schema.is_mutable and name != "fill_"
            refused = [tensor for tensor in host if tensor.dim() or (is_written and tensor is args[0])]
        if refused or any(tensor.is_meta for tensor in host):
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and "
                f"cpu! ({name} of {[list(tensor.shape) for tensor in refused]} on the CPU, at {caller()[0]})"
            )

    def _run(
        self, func: Any, name: str, args: Any, kwargs: Any, ours: Sequence[DeviceTensor], makes_ours: bool
    ) -> Any:
        has_values = self.has_values and all(tensor.values.device == CPU for tensor in ours)
        fills = name.startswith("index_put") and args[2].numel() == 1  # becomes masked_fill
        # the positions of a mask of the CPU are taken there
        masks = name in INDEXING and not fills and any(is_mask(index) for index in tensors_in(args[1]))
        if name in READS:
            self.sync(name)
        elif masks:
            self.sync(f"{name} by a mask")
        if name not in NO_KERNEL and not is_view(func):
            self._count("kernel", name, kernels=1, bytes=size_of(ours))
        if not has_values and (masks or name in SIZES or name in VALUES):
            return self._result_without_values(func, name, args, kwargs)
        given = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory")}
        if not has_values:
            given = {key: value for key, value in given.items() if key != "generator"}
            given |= {"device": META} if "device" in kwargs else {}
            args, given = tree_map_only(Tensor, self._without, (args, given))
        result = func(*tree_map_only(DeviceTensor, values_of, args), **tree_map_only(DeviceTensor, values_of, given))
        if not makes_ours:
            return result
        if func._schema.is_mutable:
            follows = torch.Tag.inplace_view in func.tags
            if not follows and any(tensor.shape != tensor.values.shape for tensor in ours):
                raise NotImplementedError(f"{name} changes a shape in place, which a simulated device cannot follow")
            wrapped = tree_map_only(Tensor, DeviceTensor, result)
            return return_and_correct_aliasing(func, args, kwargs, wrapped)
        if name not in NO_KERNEL and not is_view(func):
            self.bytes += size_of(tensors_in(result))
        return tree_map_only(Tensor, DeviceTensor, result)

    def _without(self, tensor: Tensor) -> Tensor:
        """A tensor of a call without values: one of the CPU, or one made before, loses them."""
        if not isinstance(tensor, DeviceTensor):
            return tensor.to(META) if tensor.dim() else tensor
        if tensor.values.device == CPU:
            tensor.values = tensor.values.to(META)
        return tensor

    def _result_without_values(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """What depends on values: the placeholder for a value, and for a size that of zeros."""
        value = self._read(name)
        if name == "_linalg_check_errors":
            return None
        if name in ("_local_scalar_dense", "equal"):
            return torch.tensor(value, dtype=torch.bool if name == "equal" else args[0].dtype).item()
        if name in INDEXING and func._schema.is_mutable:
            return args[0]
        result = func(*tree_map_only(DeviceTensor, zeros, args), **tree_map_only(DeviceTensor, zeros, kwargs))
        return tree_map_only(Tensor, lambda tensor: DeviceTensor(tensor.to(META)), result)

    def _copied(self, func: Any, source: Tensor, makes_ours: bool, kwargs: dict[str, Any]) -> Tensor:
        """`_to_copy`: a change of device, of dtype or of both."""
        given = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory", "non_blocking")}
        if isinstance(source, DeviceTensor) and not makes_ours:
            self._count("d2h", "to", d2h=1)
            if not kwargs.get("non_blocking"):
                self.sync("to the CPU")
            if source.values.device == CPU:
                return func(source.values, **given)
            return torch.full(source.shape, self._read("to the CPU"), dtype=given.get("dtype") or source.dtype)
        if isinstance(source, DeviceTensor):
            result = func(source.values, **given)
            self._count("kernel", "to", kernels=1, bytes=size_of([source, result]))
        else:
            self._sent("to", source, kwargs.get("non_blocking", False))
            result = func(source if self.has_values else source.to(META), **given)
        return DeviceTensor(result)

    def _copy(self, func: Any, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        """`copy_`, which any two devices may take part in."""
        if not isinstance(source, DeviceTensor):
            if source.dim() or isinstance(source, torch.nn.Parameter):
                self._sent("copy_", source, non_blocking)
            else:
                self._count("kernel", "copy_", kernels=1, bytes=size_of([target]))
        elif not isinstance(target, DeviceTensor):
            self._count("d2h", "copy_", d2h=1)
            if not (non_blocking and is_pinned(target)):
                self.sync("copy_ to the CPU")
        else:
            self._count("kernel", "copy_", kernels=1, bytes=size_of([target, source]))
        first, second = (values_of(tensor) for tensor in (target, source))
        if second.device == META and first.device == CPU:
            if isinstance(target, DeviceTensor):
                target.values = first = first.to(META)
            else:
                second = torch.full((), self._read("copy_ to the CPU"))
        func(first, second)
        return target

    def _sent(self, operator: str, source: Tensor, non_blocking: bool) -> None:
        self._count("h2d", operator, h2d=1, blocking_copies=int(not (non_blocking and is_pinned(source))))


def is_view(func: Any) -> bool:
    if torch.Tag.inplace_view in func.tags:
        return True
    arguments = func._schema.arguments
    return any(argument.alias_info is not None and not argument.alias_info.is_write for argument in arguments)


def is_mask(index: Tensor) -> bool:
    return isinstance(index, DeviceTensor) and index.dtype == torch.bool


def zeros(tensor: Tensor) -> Tensor:
    """Zeros of the shape, in the memory of one."""
    return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)


def values_of(tensor: Tensor) -> Tensor:
    return tensor.values if isinstance(tensor, DeviceTensor) else tensor


def is_pinned(tensor: Tensor) -> bool:
    return getattr(tensor.untyped_storage(), "is_pinned_here", False)


def pinned(tensor: Tensor) -> Tensor:
    tensor.untyped_storage().is_pinned_here = True  # type: ignore[attr-defined]
    return tensor
