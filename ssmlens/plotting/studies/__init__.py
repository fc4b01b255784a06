"""Figures of the studies, one file per study; each reads results of `ssmlens.analyses` and computes nothing anew."""
