"""From a model file to a classifier, without running anything that the file brings along."""

from unhorse.loading.checks import LoadFailed, LoadRefused
from unhorse.loading.formats import load_model
from unhorse.loading.sniff import Format, sniff

__all__ = ["Format", "LoadFailed", "LoadRefused", "load_model", "sniff"]
