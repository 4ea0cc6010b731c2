"""Make the packed form of a JSON index, which workers map into memory."""

from __future__ import annotations

import os

from concurrent_dataloader.errors import IndexFormatError
from concurrent_dataloader.index import Index, packed_path


def pack_index(json_path: str | os.PathLike[str]) -> Index:
    """Pack an index into ``<name>.packed`` beside it, however small it is, and read it back.

    One that is already there is kept if it was made of this file and is whole.

    Raises:
        FileNotFoundError: There is no such index.
        IndexFormatError: It is no index, or is packed already.
        PermissionError: The packed form cannot be written beside it, for want of a right or of
            room.
    """
    index = Index.load(json_path, pack_above_keys=0)
    packed = packed_path(json_path)
    if index.packed_file is None:
        raise PermissionError(
            f"{packed}: cannot be written, expected a right to and room for it; make room, or copy "
            "the index to another folder"
        )
    if index.packed_file != packed.absolute():
        raise IndexFormatError(f"{os.fspath(json_path)}: is packed already; give its JSON file")
    try:
        index.verify()
    except IndexFormatError:
        packed.unlink()
        index = Index.load(json_path, pack_above_keys=0)
        index.verify()
    return index
