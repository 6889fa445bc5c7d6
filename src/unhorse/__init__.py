"""Find, filter and remove Trojans in image classifiers."""
