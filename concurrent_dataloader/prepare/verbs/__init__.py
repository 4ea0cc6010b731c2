"""The verbs of the command line, a module each: its arguments, and the call that does the work.

Each module has ``add_arguments(parser)`` and ``run(options)``; what ``run`` returns is the exit
status, None for 0. Where messages of the library call an argument otherwise than the command line,
``CALLED_IN_MESSAGES`` says so. `SUMMARIES` names the verbs, so that ``--help`` imports none but the
one asked for.
"""

RESUMABLE = frozenset({"copy", "distribute", "lmdb", "map", "reshard", "shard"})
"""Verbs that go on where they stopped when the command is repeated."""

SUMMARIES = {
    "advise": "say how many shards to make, how large, and why",
    "copy": "copy a data set between buckets and folders",
    "distribute": "cut left-over shards into equal parts, one for each instance",
    "folders": "sort images of any source into class folders",
    "index": "list a bucket or a folder and write an index",
    "lmdb": "write images to an LMDB database, for slow disks",
    "map": "put every sample of a set of shards through a function",
    "pack": "pack an index into the form that workers map into memory",
    "readspeed": "measure how fast an LMDB database is read, in order and at random",
    "reshard": "write shards of another size, count or order, made of shards",
    "shard": "pack images into tar or TFRecord shards",
    "validate": "say whether a data set is whole, and what is wrong",
}
