"""A Ray cluster: start one here, or reach one that runs."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vitzoo_hf.format.schema import ZooError

PATIENCE = 10.0
LOCAL = "local"


def import_ray() -> Any:
    """The module `ray`.

    Raises:
        ZooError: if Ray is not installed.
    """
    try:
        import ray
    except ImportError:
        raise ZooError("Ray is not installed: run `pip install 'vitzoo-hf[ray]'`") from None
    return ray


@contextmanager
def cluster(address: str) -> Iterator[Any]:
    """The module `ray`, connected to a cluster; the connection ends with the context.

    A program that is connected already stays so, whatever the address.

    Args:
        address: `HOST:PORT` or `ray://HOST:PORT` of a cluster, `auto` for the one this machine belongs to, or `local`
            to start one on this machine.

    Raises:
        ZooError: if Ray is not installed, or the cluster does not answer.
    """
    ray = import_ray()
    started = not ray.is_initialized()
    if started:
        _start(ray, address)
    try:
        yield ray
    finally:
        if started:
            ray.shutdown()


def _start(ray: Any, address: str) -> None:
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), timeout=PATIENCE).close()
        except OSError as error:
            raise ZooError(f"no Ray cluster at {address!r} ({error}); `local` starts one here") from None
    options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    if address == LOCAL:
        options["include_dashboard"] = False
    try:
        ray.init(address=address, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ZooError(f"no Ray cluster at {address!r} ({reason}); `local` starts one here") from None
