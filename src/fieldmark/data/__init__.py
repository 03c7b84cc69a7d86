"""Labelled images: where they come from, how they are split, and how they become batches.

source.py opens a source and split.py divides it. Training reads batches from resident.py (decoded
images held on the device) or from loader.py (files, read by worker processes); augment.py changes
whole batches and photo.py single photos. Evaluation reads held_out.py. classes.py matches labels by
name, counts.py shows how many images each class has.
"""
