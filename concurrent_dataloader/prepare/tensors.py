"""Is a packed tensor the one that was written? Nothing that its bytes ask for is executed."""

from __future__ import annotations

import io
import zipfile
import zlib

from typing_extensions import Buffer

from concurrent_dataloader.errors import MissingDependencyError, SampleDecodeError
from concurrent_dataloader.formats.fields import TENSOR_FIELD

_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError)


def check_tensor(content: Buffer) -> None:
    """Compare a tensor with the checksums that ``torch.save`` gave it, and decode it.

    torch itself compares no checksums. Those of its older, pickled files, and of files that were
    written with ``set_crc32_options(False)``, are not there.

    Args:
        content: Of a field ``pth``.

    Raises:
        SampleDecodeError: It is damaged, or no tensor that the loader takes for an image.
        MissingDependencyError: torch is not installed.
    """
    try:
        from concurrent_dataloader.datasets.fields import FieldDecoder
    except ImportError as error:
        raise MissingDependencyError(
            f"tensors: {error}; install torch to look into them"
        ) from error
    if bytes(memoryview(content)[:4]) == b"PK\3\4":
        _check_crcs(content)
    FieldDecoder("pillow").decode_image(TENSOR_FIELD, content)


def _check_crcs(content: Buffer) -> None:
    """Raise if an entry of the zip is not what its checksum says; 0 stands for none.

    Source: the CRC-32 of each entry in the central directory; APPNOTE.TXT of PKWARE, 4.4.7.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for entry in archive.infolist():
                if entry.CRC:
                    archive.read(entry)
    except _ZIP_ERRORS as error:
        raise SampleDecodeError(
            f"pth: {' '.join(str(error).split())}; the tensor is damaged, fetch or write it anew"
        ) from error
