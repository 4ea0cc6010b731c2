"""The one place that knows torch's private loader, and how its releases differ.

Read in the sources of 2.6.0 to 2.15.0:

- ``_worker_loop`` takes 14 positional arguments of the same names and order; from 2.14 on the
  second is ``dataset_holder``, a one-item list that the worker empties.
- ``_MultiProcessingDataLoaderIter._process_data`` has a second argument, the worker, from 2.7 on.
- ``WorkerInfo`` is a frozen dataclass from 2.12 on.

What is used of torch beyond its public interface is imported here and checked when this module is
first imported; another shape raises `UnsupportedTorchError` instead of going wrong later.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from torch import _utils as torch_errors
from torch.utils.data import IterDataPipe
from torch.utils.data import _utils as torch_utils
from torch.utils.data import dataloader as torch_dataloader

from concurrent_dataloader.errors import UnsupportedTorchError

OLDEST_TESTED = (2, 6)
NEWEST_TESTED = (2, 15)
_TESTED = "{}.{} to {}.{}".format(*OLDEST_TESTED, *NEWEST_TESTED)

_WORKER_LOOP_PARAMETERS = (
    "dataset_kind",
    "dataset",
    "index_queue",
    "data_queue",
    "done_event",
    "auto_collation",
    "collate_fn",
    "drop_last",
    "base_seed",
    "init_fn",
    "worker_id",
    "num_workers",
    "persistent_workers",
    "shared_seed",
)

torch_worker_loop: Any = torch_utils.worker._worker_loop
"""torch's own loop, kept before a user may put ours in its place."""

ResumeIteration: Any = torch_utils.worker._ResumeIteration
SingleProcessIter: Any = torch_dataloader._SingleProcessDataLoaderIter
MultiProcessingIter: Any = torch_dataloader._MultiProcessingDataLoaderIter
DatasetKind: Any = torch_dataloader._DatasetKind
default_collate: Any = torch_utils.collate.default_collate
collate: Any = torch_utils.collate.collate
default_collate_fn_map: dict[Any, Any] = torch_utils.collate.default_collate_fn_map
collate_tensor_fn: Any = torch_utils.collate.collate_tensor_fn
ExceptionWrapper: Any = torch_errors.ExceptionWrapper


def _read_release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


RELEASE = _read_release(torch.__version__)


def _check_torch() -> bool:
    """Raise if torch's loader has another shape; say whether the dataset comes in a holder."""
    found = tuple(inspect.signature(torch_worker_loop).parameters)
    holder = ("dataset_holder" if name == "dataset" else name for name in _WORKER_LOOP_PARAMETERS)
    has_holder = found == tuple(holder)
    hooks = {
        MultiProcessingIter: ("_process_data", "_try_put_index", "_get_data", "_shutdown_workers"),
        SingleProcessIter: ("_next_index", "_next_data"),
    }
    missing = [
        f"{owner.__name__}.{name}"
        for owner, names in hooks.items()
        for name in names
        if not hasattr(owner, name)
    ]
    if missing or not (has_holder or found == _WORKER_LOOP_PARAMETERS):
        raise UnsupportedTorchError(
            f"torch {torch.__version__}: its loader is not as known from "
            f"{_TESTED}, got "
            f"_worker_loop{found} and missing {missing}; upgrade concurrent-dataloader, or install "
            "a torch of these releases"
        )
    if not OLDEST_TESTED <= RELEASE <= NEWEST_TESTED:
        warnings.warn(
            f"torch {torch.__version__}: not tested with concurrent-dataloader (tested: "
            f"{_TESTED}); its loader looks as known, and is used",
            stacklevel=2,
        )
    return has_holder


_HAS_DATASET_HOLDER = _check_torch()


def take_dataset(argument: Any) -> Any:
    """Take the dataset out of the second argument of ``_worker_loop``."""
    return argument.pop() if _HAS_DATASET_HOLDER else argument


def give_dataset(dataset: Any) -> Any:
    """Make the second argument of ``_worker_loop`` from a dataset."""
    return [dataset] if _HAS_DATASET_HOLDER else dataset


def show_dataset(dataset: Any) -> None:
    """Let ``torch.utils.data.get_worker_info()`` of this worker give ``dataset``."""
    info = torch_utils.worker._worker_info
    # Neither the frozen dataclass nor the older class may be assigned to in the usual way.
    object.__setattr__(info, "dataset", dataset)


def is_data_pipe(dataset: Any) -> bool:
    """Tell whether it is an iterable data pipe of torch's, which its loop treats specially."""
    return isinstance(dataset, IterDataPipe)


def unwrap_error(wrapper: Any) -> BaseException:
    """Make the error that a worker sent, as torch would raise it, but without torch's frames."""
    try:
        wrapper.reraise()
    except BaseException as error:  # noqa: BLE001 - it is what is asked for
        return error.with_traceback(None)
    raise AssertionError("torch did not raise what it had wrapped")
