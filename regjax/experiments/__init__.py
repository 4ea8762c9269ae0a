"""Data sets, training runs, and the runs of the command line, for use from Python."""

from regjax.experiments._compare import run_compare as run_compare
from regjax.experiments._data import DataError as DataError
from regjax.experiments._data import Dataset as Dataset
from regjax.experiments._data import load as load
from regjax.experiments._landscape_run import run_landscape as run_landscape
from regjax.experiments._options import UsageError as UsageError
from regjax.experiments._settings import LandscapeSettings as LandscapeSettings
from regjax.experiments._settings import SpectrumSettings as SpectrumSettings
from regjax.experiments._settings import TrainSettings as TrainSettings
from regjax.experiments._spectrum_run import run_spectrum as run_spectrum
from regjax.experiments._spectrum_run import run_train as run_train
from regjax.experiments._trained_model import load_model as load_model
from regjax.experiments._trained_model import scaled_inputs as scaled_inputs
from regjax.experiments._training import TrainingError as TrainingError
from regjax.experiments._training import TrainingResult as TrainingResult
from regjax.experiments._training import train as train

__all__ = [name for name in dir() if not name.startswith("_")]  # what help() lists
