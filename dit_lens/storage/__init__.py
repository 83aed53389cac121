"""Files that outlive the process: written whole or not at all, and read only if no bit has changed.

Belongs here: how a file is written, sealed, locked, and held against a schema. Does not: what is in
it; the schemas are beside those who write it (`tracing`, `patching`, `report`, `model`).
"""

from .datasets import load_dataset, made_with, save_dataset
from .documents import load_document, save_document
from .locks import locked
from .provenance import device_name, made_by, made_of, versions, written
from .seals import check_seal, is_whole
from .tensors import load_tensors, mapped_tensors, save_tensors
from .writing import file_name, replacing, try_file, try_folder

__all__ = [
    "check_seal",
    "device_name",
    "file_name",
    "is_whole",
    "load_dataset",
    "load_document",
    "load_tensors",
    "locked",
    "made_by",
    "made_of",
    "made_with",
    "mapped_tensors",
    "replacing",
    "save_dataset",
    "save_document",
    "save_tensors",
    "try_file",
    "try_folder",
    "versions",
    "written",
]
