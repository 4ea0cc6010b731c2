"""What the documents import is there, and is at home where they say."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import concurrent_dataloader

HOMES = [
    ("benchmarking.misc.init_benchmarking", "get_dataset"),
    ("concurrent_dataloader.dataloader_mod.dataloader", "DataLoader"),
    ("concurrent_dataloader.dataloader_mod.worker", "_worker_loop"),
]
EXPORTED = [
    "DataLoader",
    "ElasticDistributedSampler",
    "ErrorBudget",
    "Index",
    "ImagenetLoader",
    "IndexedDataset",
    "LmdbDataset",
    "S3Dataset",
    "S3_Dataset",
    "ScratchDataset",
    "ShardDataset",
    "StagedDataset",
    "StreamedShards",
    "open_dataset",
    "open_store",
]
HEAVY = [
    "PIL",
    "aiobotocore",
    "aiohttp",
    "boto3",
    "botocore",
    "cv2",
    "lightning",
    "lmdb",
    "matplotlib",
    "numpy",
    "obstore",
    "pandas",
    "ray",
    "seaborn",
    "torch",
    "torchvision",
    "wandb",
]
NOT_OF_THE_LOADER = [name for name in HEAVY if name not in ("PIL", "numpy", "torch")]


def modules_after(statement: str) -> set[str]:
    """Top-level packages that a fresh interpreter holds after a statement."""
    script = f"{statement}\nimport sys\nprint(*sys.modules)"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.split()}


@pytest.mark.parametrize(("module", "name"), HOMES)
def test_a_documented_name_is_defined_where_it_is_documented(module: str, name: str) -> None:
    found = getattr(importlib.import_module(module), name)

    assert (found.__module__, found.__name__) == (module, name)


def test_the_package_exports_what_is_documented_and_no_more() -> None:
    assert sorted(concurrent_dataloader.__all__) == sorted(EXPORTED)


@pytest.mark.parametrize("name", EXPORTED)
def test_an_exported_name_can_be_imported_and_is_listed(name: str) -> None:
    assert getattr(concurrent_dataloader, name).__module__.startswith("concurrent_dataloader.")
    assert name in dir(concurrent_dataloader)


def test_an_unknown_name_of_the_package_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Dataloader'"):
        _ = concurrent_dataloader.Dataloader


def test_s3_dataset_with_underscore_is_an_alias() -> None:
    assert concurrent_dataloader.S3_Dataset is concurrent_dataloader.S3Dataset


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert modules_after("import concurrent_dataloader").isdisjoint(HEAVY)


def test_importing_the_loader_imports_no_client_and_no_plots() -> None:
    loaded = modules_after("from concurrent_dataloader import DataLoader")

    assert "torch" in loaded
    assert loaded.isdisjoint(NOT_OF_THE_LOADER)


def test_importing_the_data_sets_imports_no_client_and_no_plots() -> None:
    loaded = modules_after("from concurrent_dataloader import S3Dataset")

    assert loaded.isdisjoint(NOT_OF_THE_LOADER)


def test_opening_a_bucket_imports_one_client() -> None:
    loaded = modules_after(
        "from concurrent_dataloader import open_store\n"
        "open_store('s3://bucket', endpoint_url='http://127.0.0.1:1', anonymous=True)"
    )

    assert "obstore" in loaded
    assert loaded.isdisjoint({"boto3", "aiobotocore", "aiohttp", "torch"})


def test_importing_the_loader_leaves_torchs_own_alone() -> None:
    loop = "torch.utils.data._utils.worker._worker_loop"
    script = (
        f"import torch.utils.data\nbefore = {loop}, vars(torch.utils.data.DataLoader).copy()\n"
        "from concurrent_dataloader import DataLoader\n"
        f"assert before == ({loop}, vars(torch.utils.data.DataLoader).copy())"
    )

    subprocess.run([sys.executable, "-c", script], check=True)
