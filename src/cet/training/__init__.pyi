"""The public names of cet.training, and the modules that they come from."""

from .heads import train_heads as train_heads
from .lightning import MultiExitTraining as MultiExitTraining
from .recipes import CONSISTENT as CONSISTENT
from .recipes import JOINT as JOINT
from .recipes import Recipe as Recipe
from .recipes import build as build
from .recipes import perturbation as perturbation
from .recipes import train as train
from .sensor_net import EXITS as EXITS
from .sensor_net import SensorNet as SensorNet
