"""The record of a run: what is measured, in which unit, and the files that keep it."""
