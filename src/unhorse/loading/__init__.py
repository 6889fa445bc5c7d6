"""From a model file to a classifier, without running anything that the file brings along."""
