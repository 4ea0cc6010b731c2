"""Serve objects by hand: ``python -m concurrent_dataloader.testing --help``."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import pathlib
import shlex
import sys
from typing import Any

from concurrent_dataloader.testing._process import HOST, serve
from concurrent_dataloader.testing._server import Server, Settings
from concurrent_dataloader.testing.behaviour import Fault, Latency

_DESCRIPTION = """\
Serve objects by S3's interface on 127.0.0.1, with latency, bandwidth and faults set by hand.

Objects are held in RAM and gone at the end. This is for tests, demonstrations and benchmarks; it
listens on loopback only, and is no production server. Once it takes connections, it writes lines
that a shell can evaluate, with its address and its keys. Ctrl-C stops it.
"""
_EPILOG = """\
examples:
  python -m concurrent_dataloader.testing --folder photos --bucket photos --latency-median-s 0.1 \\
      --latency-sigma 0.3
  python -m concurrent_dataloader.testing --fault slow_down,rate=0.05 \\
      --fault stalled_body,key_pattern='7[.]jpg$',first_attempts=1
"""
_FAULT_NUMBERS = {"rate": float, "first_attempts": int, "max_count": int, "stall_s": float}


def _parse_fault(text: str) -> Fault:
    """Parse ``KIND[,name=value]...``, with the names of `Fault`."""
    kind, *rest = text.split(",")
    values: dict[str, Any] = {"kind": kind}
    names = {field.name for field in dataclasses.fields(Fault)} - {"kind"}
    try:
        for part in rest:
            name, equals, value = part.partition("=")
            if name not in names or not equals:
                raise ValueError(
                    f"got {part!r}, expected one of {', '.join(sorted(names))}, =value"
                )
            if name == "methods":
                values[name] = tuple(value.split("+"))
            elif name == "hits_listings":
                values[name] = value == "true"
            else:
                values[name] = _FAULT_NUMBERS.get(name, str)(value)
        return Fault(**values)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m concurrent_dataloader.testing",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    usual = Settings()
    add = parser.add_argument
    add("--port", type=int, default=0, help="port to listen on (default: a free one)")
    add("--bucket", default="demo", help="bucket that is made at the start (default: %(default)s)")
    add("--folder", type=pathlib.Path, help="store the files below this folder in the bucket")
    add("--prefix", default="", help="put this before the keys of the folder's files")
    add("--on-disk", action="store_true", help="read the folder's files at each GET, not into RAM")
    add("--public", action="store_true", help="let anybody read the bucket, without a signature")
    add("--access-key", default=usual.access_key, help="default: %(default)s")
    add("--secret-key", default=usual.secret_key, help="default: %(default)s")
    add("--session-token", help="requests have to carry this as well (default: none)")
    add("--region", default=usual.region, help="default: %(default)s")
    add("--latency-median-s", type=float, default=0.0, metavar="S", help="default: none")
    add(
        "--latency-sigma", type=float, default=0.0, metavar="SIGMA", help="lognormal, of this sigma"
    )
    add("--latency-spread-s", type=float, default=0.0, metavar="S", help="uniform, median +- this")
    add("--connection-bytes-per-s", type=float, metavar="N", help="bound of each connection")
    add("--total-bytes-per-s", type=float, metavar="N", help="bound of all connections together")
    add("--requests-per-s", type=float, metavar="N", help="beyond this, 503 SlowDown is answered")
    add(
        "--fault",
        type=_parse_fault,
        action="append",
        default=[],
        metavar="KIND[,NAME=VALUE]...",
        help="something to go wrong, such as slow_down,rate=0.1; may be given again; kinds and"
        " names are those of concurrent_dataloader.testing.Fault",
    )
    add("--seed", type=int, default=0, help="seed of latency and faults (default: %(default)s)")
    return parser


def _set_up(server: Server, arguments: argparse.Namespace, latency: Latency) -> None:
    tell = server.control.tell
    tell("create_bucket", {"bucket": arguments.bucket, "public": arguments.public})
    if arguments.folder is not None:
        told = tell(
            "put_folder",
            {
                "bucket": arguments.bucket,
                "folder": str(arguments.folder.resolve()),
                "prefix": arguments.prefix,
                "in_memory": not arguments.on_disk,
            },
        )
        sys.stderr.write(
            f"{told['num_objects']} objects, {told['num_bytes']} bytes in {arguments.bucket}\n"
        )
    tell("set_latency", dataclasses.asdict(latency))
    tell(
        "set_bandwidth",
        {
            "connection_bytes_per_s": arguments.connection_bytes_per_s,
            "total_bytes_per_s": arguments.total_bytes_per_s,
        },
    )
    tell("set_rate_limit", {"requests_per_s": arguments.requests_per_s, "burst": 1.0})
    server.set_faults(arguments.fault)


def main(argv: list[str] | None = None) -> int:
    """Serve until Ctrl-C, and give the exit status."""
    parser = _make_parser()
    arguments = parser.parse_args(argv)
    try:
        latency = Latency(
            arguments.latency_median_s, arguments.latency_sigma, arguments.latency_spread_s
        )
    except ValueError as error:
        parser.error(f"latency: {error}")
    for name in ("connection_bytes_per_s", "total_bytes_per_s", "requests_per_s"):
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            parser.error(f"--{name.replace('_', '-')}: got {value!r}, expected more than 0")
    if not 0 <= arguments.port < 65536:
        parser.error(f"--port: got {arguments.port!r}, expected 0 to 65535")
    if arguments.folder is not None and not arguments.folder.is_dir():
        parser.error(f"--folder: got {str(arguments.folder)!r}, expected a folder that is there")
    settings = Settings(
        port=arguments.port,
        access_key=arguments.access_key,
        secret_key=arguments.secret_key,
        session_token=arguments.session_token,
        region=arguments.region,
        seed=arguments.seed,
    )

    def on_ready(server: Server, port: int) -> None:
        _set_up(server, arguments, latency)
        variables = {
            "AWS_ENDPOINT_URL": f"http://{HOST}:{port}",
            "AWS_ACCESS_KEY_ID": settings.access_key,
            "AWS_SECRET_ACCESS_KEY": settings.secret_key,
            "AWS_SESSION_TOKEN": settings.session_token,
            "AWS_REGION": settings.region,
            "AWS_ALLOW_HTTP": "true",
        }
        for name, value in variables.items():
            if value is not None:
                sys.stdout.write(f"export {name}={shlex.quote(value)}\n")
        sys.stdout.flush()

    try:
        asyncio.run(serve(settings, on_ready))
    except OSError as error:
        sys.stderr.write(f"{parser.prog}: {error.strerror}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
