"""Samples from wherever they lie: folders, buckets, indexes, archives, shards.

```text
opening     open_source: finds out what is meant, and puts the parts together
layouts     what lies in a folder: splits, archives, ImageNet's and Kaggle's layouts
listing     samples that are objects;  archives  samples in tars, by read_ahead
tfrecords   samples in TFRecord shards
found       what was found: names, places, strays;  places  bytes by position
labeller    chooses what says the classes;  labelling  labels by it;  class_map  files of classes
box_files   bounding boxes in XML files
files       files that a user names, opened
table       the source that comes of it
```
"""

from __future__ import annotations

from concurrent_dataloader.annotations import AUTO_BOXES
from concurrent_dataloader.labelling import OnUnknown
from concurrent_dataloader.prepare.sources.found import IMAGE_SUFFIXES
from concurrent_dataloader.prepare.sources.labeller import NO_LABELS
from concurrent_dataloader.prepare.sources.opening import OnStray, open_source
from concurrent_dataloader.prepare.sources.table import SampleTable

__all__ = [
    "AUTO_BOXES",
    "IMAGE_SUFFIXES",
    "NO_LABELS",
    "OnStray",
    "OnUnknown",
    "SampleTable",
    "open_source",
]
