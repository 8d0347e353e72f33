"""Training of multi-exit models, and the data, net and recipes of the demonstration."""

from cet.data.smartwatch import Split, Windows, find_dataset, load_windows, split_by_person
from cet.training.lightning import MultiExitTraining
from cet.training.recipes import CONSISTENT, JOINT, Recipe, build, perturbation, train
from cet.training.sensor_net import EXITS, SensorNet

__all__ = [
    "CONSISTENT",
    "EXITS",
    "JOINT",
    "MultiExitTraining",
    "Recipe",
    "SensorNet",
    "Split",
    "Windows",
    "build",
    "find_dataset",
    "load_windows",
    "perturbation",
    "split_by_person",
    "train",
]
