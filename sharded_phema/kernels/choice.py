"""Choice: which kernel runs on which device, by a rule or by name. Made once; nothing is compiled later."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from subprocess import SubprocessError

import torch

from sharded_phema.errors import TargetError
from sharded_phema.kernels.contract import Kernel, Tensors
from sharded_phema.kernels.foreach import ForeachLerp
from sharded_phema.kernels.fused import FusedUpdate
from sharded_phema.kernels.library import Unavailable
from sharded_phema.kernels.offload import OffloadedUpdate
from sharded_phema.kernels.reference import Reference

__all__ = ["KERNELS", "kernels_for"]

_log = logging.getLogger(__name__)

Maker = Callable[[Sequence[Tensors], Tensors], Kernel]


def kernels_for(
    name: str, averages: Sequence[Tensors], params: Tensors, *, offload: bool = False
) -> tuple[Kernel, ...]:
    """The kernels that together update all averages, one for each device of the parameters.

    Args:
        name: "auto" takes ``fused`` on the CPU where there is a compiler or what it once made, ``triton`` on CUDA
            where Triton works, ``foreach`` elsewhere. A name takes that one, or refuses.
        averages: As of ``Kernel``, each on the device of its parameter.
        params: As of ``Kernel``, on any devices.
        offload: The averages are in host memory instead; so the kernel is one that runs on the CPU.

    Raises:
        TargetError: There is no such kernel, or it does not run here.
    """
    if name not in KERNELS:
        raise TargetError(f"kernel: expected one of {', '.join(KERNELS)}, found {name!r}", hint='try kernel="auto"')
    made = []
    for device in dict.fromkeys(param.device for param in params):
        here = [i for i, param in enumerate(params) if param.device == device]
        make = _offloaded(name) if offload else KERNELS[name](device)
        made.append(make([[average[i] for i in here] for average in averages], [params[i] for i in here]))
    return tuple(made)


def _offloaded(name: str) -> Maker:
    return partial(OffloadedUpdate, make=KERNELS[name](torch.device("cpu")))


def _automatic(device: torch.device) -> Maker:
    if device.type == "cpu":
        return _fused_or_foreach
    return _triton_or_foreach if device.type == "cuda" and find_spec("triton") else ForeachLerp


def _triton_or_foreach(averages: Sequence[Tensors], params: Tensors) -> Kernel:
    try:
        from sharded_phema.kernels.triton import TritonUpdate

        return TritonUpdate(averages, params)
    # What Triton raises where it finds no C compiler for its launcher, or one that fails.
    except (ImportError, OSError, RuntimeError, SubprocessError) as reason:
        _log.warning("averages are updated without Triton, which is faster; kernel='triton' tells all: %s", reason)
        return ForeachLerp(averages, params)


def _fused_or_foreach(averages: Sequence[Tensors], params: Tensors) -> Kernel:
    try:
        return FusedUpdate(averages, params)
    except Unavailable as reason:
        _log.info("averages are updated without the fused kernel, which is faster: %s", reason)
        return ForeachLerp(averages, params)


def _fused(device: torch.device) -> Maker:
    if device.type != "cpu":
        raise TargetError(f'kernel="fused" runs on the CPU, parameters are on {device}', hint='try kernel="auto"')
    return _fused_or_refused


def _fused_or_refused(averages: Sequence[Tensors], params: Tensors) -> Kernel:
    try:
        return FusedUpdate(averages, params)
    except Unavailable as reason:
        raise TargetError(
            f'kernel="fused" cannot be compiled here: {reason}',
            hint='install a C++ compiler (apt install g++), or kernel="auto", which does without',
        ) from reason


def _triton(device: torch.device) -> Maker:
    if not find_spec("triton"):
        raise TargetError('kernel="triton": Triton is not installed', hint="pip install triton, or kernel='auto'")
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise TargetError(f'kernel="triton" runs on CUDA, parameters are on {device}', hint='try kernel="auto"')
    from sharded_phema.kernels.triton import TritonUpdate

    return TritonUpdate


KERNELS: dict[str, Callable[[torch.device], Maker]] = {
    "auto": _automatic,
    "reference": lambda device: Reference,
    "foreach": lambda device: ForeachLerp,
    "fused": _fused,
    "triton": _triton,
}
"""What makes the kernel of a name on a device."""
