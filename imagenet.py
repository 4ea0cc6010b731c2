"""Train and validate an image classifier, from an object store or a local folder.

    python imagenet.py /data/imagenet                       # train/ and val/, with class folders
    python imagenet.py s3://imagenet --endpoint-url http://127.0.0.1:9000
    python imagenet.py /data/imagenet-shards --stream       # tar shards, each read front to back
    torchrun --nnodes 4 ... imagenet.py s3://shards --stream --instances  # each node has its own
    torchrun --nproc-per-node 8 imagenet.py s3://imagenet --amp bf16 --channels-last

The flags of PyTorch's ImageNet example keep their names, meanings and defaults. ``--loader torch``
runs the same job with torch's own loader: the losses are the same, the time is not. It is read from
top to bottom, by its headings; the rest of a trainer is in ``concurrent_dataloader/training/``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TextIO

import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.multiprocessing.spawn import ProcessExitedException, spawn
from torchvision.transforms import v2

from benchmarking.misc.init_benchmarking import DATASETS, get_dataset
from concurrent_dataloader import DataLoader, core_files
from concurrent_dataloader.errors import LoaderError, MissingIndexError
from concurrent_dataloader.labels import LabelSpace
from concurrent_dataloader.training import arguments, checkpoint, data, processes, report, shares
from concurrent_dataloader.training.arguments import Args
from concurrent_dataloader.training.processes import Place, seed_epoch
from concurrent_dataloader.training.report import NO_SUMS, Report, Result, write_record
from concurrent_dataloader.training.shares import Loader, count_steps, set_epoch

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# --- settings -------------------------------------------------------------------------------------


def parse_arguments(argv: Sequence[str] | None = None) -> Args:
    """Read the command line; exits with status 2 where it is wrong."""
    description = (__doc__ or "").split("\n")[0]
    return arguments.read_arguments(argv, description=description, datasets=DATASETS)


# --- data -----------------------------------------------------------------------------------------


def open_split(args: Args, split: str | None, classes: Any = None) -> Any:
    """Open the "train" or the "val" images, with classes that are known; None: all, to train on."""
    random_crop = [v2.RandomResizedCrop(args.image_size), v2.RandomHorizontalFlip()]
    center_crop = [v2.Resize(round(args.image_size * 256 / 224)), v2.CenterCrop(args.image_size)]
    # Pixels stay bytes up to the device: a quarter of the memory to collate, share and copy.
    last = [v2.PILToTensor()] if args.dummy or args.decoder == "pillow" else []
    transform = v2.Compose([*(center_crop if split == "val" else random_crop), *last])
    if args.dummy:
        return data.make_noise(args, split or "train", transform)
    train = split != "val"
    classes_file = args.classes_file if train else args.val_classes_file
    if classes_file is None and classes is None:
        classes_file = args.classes_file
    try:
        dataset = get_dataset(
            args.dataset,
            split,  # pyright: ignore[reportArgumentType]: one of those above
            limit=args.dataset_limit,
            sample_seed=0,  # the head of an index that is sorted by class holds few classes
            index_file=args.index_file if train else args.val_index_file,
            classes_file=classes_file,
            classes=classes if classes_file is None else None,
            transform=transform,
            decode=args.decoder,
            **data.locate(args),
        )
    except MissingIndexError as error:
        return shares.open_bare_stream(args, split or "train", transform, classes_file, error)
    if dataset.classes is not None and dataset.classes.label_space is not LabelSpace.CUSTOM:
        dataset.convert_labels(LabelSpace.SORTED_WNID)  # as torchvision's weights count
    return dataset


def make_loader(args: Args, dataset: Any, place: Place, *, is_train: bool) -> Loader:
    """Make the loader of this process's share of a split: ours or torch's."""
    batch_size = max(1, args.batch_size // place.num_local)
    dataset, sampler = shares.take_share(args, dataset, place, batch_size, is_train=is_train)
    settings: dict[str, Any] = {
        "batch_size": batch_size,
        "num_workers": math.ceil(args.workers / place.num_local),
        "sampler": sampler,
        "pin_memory": place.device.type == "cuda" if args.pin_memory is None else args.pin_memory,
        "prefetch_factor": args.prefetch_factor,
    }
    if args.loader == "torch":
        return torch.utils.data.DataLoader(dataset, **settings)
    loader = DataLoader(
        dataset,
        fetch_impl=args.fetch_impl,
        num_fetch_workers=args.num_fetch_workers,
        batch_pool=args.batch_pool,
        on_error=shares.choose_on_error(args, place, is_train=is_train),
        quarantine_file=args.quarantine,
        **settings,
    )
    if is_train and args.checkpoint_steps:
        shares.check_steps_are_even(loader, place)
    return loader


class Batch(NamedTuple):
    """A batch on the device: images (B, 3, H, W) float32, normalised, and labels (B,) int64."""

    images: Tensor
    labels: Tensor
    wait_s: float
    """How long the loop had nothing to do but wait for it."""


def iter_batches(loader: Loader, args: Args, place: Place) -> Iterator[Batch]:
    """Take an epoch's batches to the device."""
    mean = 255 * torch.tensor(MEAN, device=place.device).view(3, 1, 1)
    std = 255 * torch.tensor(STD, device=place.device).view(3, 1, 1)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    began_s = time.perf_counter()
    for pixels, labels in loader:
        wait_s = time.perf_counter() - began_s
        pixels = pixels.to(place.device, non_blocking=True).contiguous(memory_format=layout)
        labels = labels.to(place.device, non_blocking=True)
        # A copy, also of pixels that are float32 already: the batch is not ours to change.
        images = pixels.to(torch.float32, copy=True)
        yield Batch(images.sub_(mean).div_(std), labels, wait_s)
        began_s = time.perf_counter()


# --- model ----------------------------------------------------------------------------------------


def make_model(args: Args, num_classes: int, place: Place) -> nn.Module:
    """Build the model on the device, with torchvision's weights if asked for."""
    model = torchvision.models.get_model(args.arch, weights=None, num_classes=num_classes)
    if args.pretrained:
        fresh = checkpoint.load_published(model, args.arch)
        if place.rank == 0 and fresh:
            print(f"{num_classes} classes, not 1000: {', '.join(fresh)} begin anew")
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    return model.to(place.device).to(memory_format=layout)


def wrap_model(model: nn.Module, args: Args, place: Place) -> nn.Module:
    """Compile the model, and join it to those of the other processes."""
    wrapped = model
    if place.world_size > 1:
        wrapped = nn.parallel.DistributedDataParallel(model)
    elif args.num_gpus > 1 and args.gpu is None:
        wrapped = nn.DataParallel(model)
    if args.compile:
        wrapped.compile()
    return wrapped


# --- optimiser ------------------------------------------------------------------------------------


def learning_rate(args: Args, epoch: float) -> float:
    """Rate at a time in epochs from 0: 1.5 is the middle of the second one."""
    if epoch < args.warmup_epochs:
        return args.lr * (0.01 + 0.99 * epoch / args.warmup_epochs)
    if args.scheduler == "cosine":
        return args.lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, epoch / args.epochs)))
    steps = {"step": int(epoch) // args.lr_step, "exponential": epoch / args.lr_step}
    return args.lr * args.lr_gamma ** steps.get(args.scheduler, 0)


@dataclasses.dataclass
class Job:
    """What an epoch needs."""

    args: Args
    place: Place
    classes: list[str]
    model: nn.Module
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    train_loader: Loader | None
    val_loader: Loader | None
    log: TextIO | None = None
    """Lines of JSON, of the first process."""
    copy_s: float = 0.0
    """How long it took to copy the data to this machine."""
    best_acc1: float = 0.0
    first_step: int = 0
    """Of the first epoch: the steps before it were done when the checkpoint was written."""
    first_sums: Tensor = NO_SUMS
    """What those steps came to, as `Report.add` sums it up."""


# --- one epoch ------------------------------------------------------------------------------------


def autocast(job: Job) -> torch.autocast:
    """Compute in the precision that was asked for."""
    dtype = torch.float16 if job.args.amp == "fp16" else torch.bfloat16
    return torch.autocast(job.place.device.type, dtype, enabled=job.args.amp != "off")


def train_epoch(job: Job, loader: Loader, epoch: int) -> Result:
    """Train for one epoch, or for the rest of one; the result is that of the whole."""
    args, place, num_steps = job.args, job.place, count_steps(loader, job.place)
    seed_epoch(args.seed, epoch, place)
    set_epoch(loader, epoch)
    job.wrapped.train()
    # A process that has no batch left takes part in the others' gradients until all have none.
    wrapped: Any = job.wrapped  # of several processes, DistributedDataParallel
    joined = Join([wrapped]) if shares.is_uneven(loader, place) else contextlib.nullcontext()
    first_step = job.first_step if epoch == args.start_epoch else 0
    told = Report(
        f"Epoch: [{epoch}]",
        place,
        num_steps,
        log=job.log,
        print_freq=args.print_freq,
        num_epochs_after=args.epochs - 1 - epoch,
        first_step=first_step,
        first_sums=job.first_sums if first_step else NO_SUMS,
    )
    with told, joined:
        for i, batch in enumerate(iter_batches(loader, args, place), first_step):
            share = 0.0 if num_steps is None else min(i, num_steps - 1) / num_steps
            for group in job.optimizer.param_groups:
                group["lr"] = learning_rate(args, epoch + share)
            with autocast(job):
                logits = job.wrapped(batch.images)
                loss = nn.functional.cross_entropy(
                    logits, batch.labels, label_smoothing=args.label_smoothing
                )
            job.optimizer.zero_grad()
            job.scaler.scale(loss).backward()
            job.scaler.step(job.optimizer)
            job.scaler.update()
            sums = told.add(i, loss, logits, batch.labels, batch.wait_s)
            is_middle = num_steps is None or i + 1 < num_steps
            if args.checkpoint_steps and (i + 1) % args.checkpoint_steps == 0 and is_middle:
                save(job, epoch, middle=checkpoint.describe_middle(place, loader, i + 1, sums))
    return told.result()


# --- validation -----------------------------------------------------------------------------------


@torch.no_grad()
def validate(job: Job, loader: Loader) -> Result:
    """Validate; each image counts once, whatever the number of processes."""
    # Not the wrapped model, which waits for all processes at each batch: one may have fewer.
    job.model.eval()
    if job.place.world_size > 1:
        for buffer in job.model.buffers():  # the running means that are saved
            dist.broadcast(buffer, src=0)
    args, place, num_steps = job.args, job.place, count_steps(loader, job.place)
    with Report("Test:", place, num_steps, log=job.log, print_freq=args.print_freq) as told:
        for i, batch in enumerate(iter_batches(loader, args, place)):
            with autocast(job):
                logits = job.model(batch.images)
                loss = nn.functional.cross_entropy(logits, batch.labels)
            told.add(i, loss, logits, batch.labels, batch.wait_s)
    return told.result()


# --- checkpoint -----------------------------------------------------------------------------------


def save(job: Job, num_epochs_done: int, *, is_best: bool = False, middle: Any = None) -> None:
    """Write what a run needs to go on, by the first process."""
    if job.place.rank > 0:
        return
    state = {
        "epoch": num_epochs_done,
        "arch": job.args.arch,
        "state_dict": job.model.state_dict(),
        "best_acc1": job.best_acc1,
        "optimizer": job.optimizer.state_dict(),
        "scaler": job.scaler.state_dict(),
        "seed": job.args.seed,
        "classes": job.classes,
        "middle": middle,
    }
    checkpoint.write_checkpoint(job.args.output_base_folder, state, is_best=is_best)


def restore(job: Job, state: dict[str, Any]) -> None:
    """Go on from a checkpoint, in the middle of an epoch if it was written there."""
    job.model.load_state_dict(state["state_dict"])
    job.args.start_epoch, job.best_acc1 = state["epoch"], float(state.get("best_acc1", 0.0))
    if job.train_loader is None:
        return
    job.optimizer.load_state_dict(state["optimizer"])
    job.scaler.load_state_dict(state.get("scaler", {}))
    if middle := state.get("middle"):
        job.first_step, job.first_sums = checkpoint.go_on_in_epoch(
            job.args, job.place, job.train_loader, middle
        )


# --- main -----------------------------------------------------------------------------------------


def set_up(args: Args, place: Place) -> Job:
    """Open the data and build the model, anew or from a checkpoint."""
    state = checkpoint.read_checkpoint(args.resume, args.arch) if args.resume else {}
    args.seed = processes.settle_seed(args, place, state.get("seed"))
    seed_epoch(args.seed, -1, place)
    copy_s = 0.0 if args.copy_to is None else data.copy_data(args, place)
    train, val = data.open_data(args, place, open_split)
    data.tell_baked(place, train=train, val=val)
    described = train if val is None or getattr(train, "classes", None) is not None else val
    classes = data.find_classes(args, described, state.get("classes"))
    model = make_model(args, len(classes), place)
    optimizer = torch.optim.SGD(
        model.parameters(), args.lr, momentum=args.momentum, weight_decay=args.weight_decay
    )
    scaler = torch.amp.GradScaler(place.device.type, enabled=args.amp == "fp16")
    train_loader = None if train is None else make_loader(args, train, place, is_train=True)
    val_loader = None if val is None else make_loader(args, val, place, is_train=False)
    if train_loader is not None:
        arguments.check_schedule(args, count_steps(train_loader, place))
    job = Job(args, place, classes, model, model, optimizer, scaler, train_loader, val_loader)
    if state:
        restore(job, state)
    job.wrapped = wrap_model(model, args, place)
    job.copy_s, job.log = copy_s, report.open_log(args.output_base_folder, place)
    return job


def run(local_rank: int, args: Args) -> None:
    """Do the whole job of one process."""
    # One that was spawned would spawn its workers too, each of which would import torch anew.
    torch.multiprocessing.set_start_method(args.start_method, force=True)
    with processes.join_processes(local_rank, args) as place, contextlib.ExitStack() as stack:
        try:
            job = set_up(args, place)
        except (LoaderError, ValueError, OSError) as error:
            print(f"imagenet.py: error: {error}", file=sys.stderr, flush=True)
            raise SystemExit(2) from error
        stack.enter_context(job.log or contextlib.nullcontext())
        stack.enter_context(report.data_errors_in_a_line(args))
        write_record(job.log, "settings", **{name: str(v) for name, v in vars(args).items()})
        if job.train_loader is None:
            if place.rank == 0 and not (args.resume or args.pretrained):
                print("warning: neither --resume nor --pretrained: the weights are random")
            assert job.val_loader is not None, "there is one of the two"
            report.tell_accuracy(validate(job, job.val_loader), place, job.log)
            return
        epochs = range(args.start_epoch, args.epochs)
        results = [run_epoch(job, job.train_loader, epoch) for epoch in epochs]
        if place.rank == 0:
            report.print_summary(results, best_acc1=job.best_acc1, copy_s=job.copy_s, log=job.log)


def run_epoch(job: Job, loader: Loader, epoch: int) -> tuple[int, Result, Result | None]:
    """Train for one epoch, validate if there is something to do it with, and save."""
    trained = train_epoch(job, loader, epoch)
    tested = None if job.val_loader is None else validate(job, job.val_loader)
    acc1 = 0.0 if tested is None else tested.acc1
    is_best, job.best_acc1 = acc1 > job.best_acc1, max(acc1, job.best_acc1)
    save(job, epoch + 1, is_best=is_best)
    val = tested and tested._asdict()
    write_record(job.log, "epoch", epoch=epoch, train=trained._asdict(), val=val)
    return epoch, trained, tested


def main(argv: Sequence[str] | None = None) -> int:
    """Run the trainer; gives the exit status."""
    if argv is None:  # a process of its own
        core_files.forbid()
    begun_s = time.time()
    args = parse_arguments(argv)
    try:
        if args.multiprocessing_distributed:
            spawn(run, (args,), max(args.num_gpus, 1))
        else:
            run(0, args)
    except ProcessExitedException as error:
        return error.exit_code
    except KeyboardInterrupt:
        advice = checkpoint.advise_resume(args.output_base_folder, begun_s)
        print(f"stopped by Ctrl-C; {advice}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
