"""The small runs of the training tests."""

from tests.train.conftest import batch, fit, fit_again, kept, run, small

__all__ = ['batch', 'fit', 'fit_again', 'kept', 'run', 'small']
