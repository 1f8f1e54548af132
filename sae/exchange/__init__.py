"""Dictionaries of other libraries: read eight formats, write three, through one model-independent container.

    weights = read("path/to/folder")             # the files say which format
    write(weights, "path/to/other", "sparsify")

The formats and what each can hold are in docs/formats.md.
"""

from .registry import FORMATS, READABLE, WRITABLE, detect, read, write
from .weights import ARCHITECTURES, FORMS, DictionaryWeights, ExchangeError

__all__ = [
    "ARCHITECTURES",
    "FORMATS",
    "FORMS",
    "READABLE",
    "WRITABLE",
    "DictionaryWeights",
    "ExchangeError",
    "detect",
    "read",
    "write",
]
