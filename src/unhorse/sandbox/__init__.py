"""A process that can do no harm, and how work is handed to it."""
