"""The public names of cet, and the modules that they come from."""

from . import energy as energy
from . import ops as ops
from . import perturb as perturb
from .calibration.calibrate import Calibration as Calibration
from .calibration.calibrate import calibrate as calibrate
from .calibration.calibrate import calibrate_scores as calibrate_scores
from .calibration.cost import ExitCosts as ExitCosts
from .calibration.cost import exit_costs as exit_costs
from .calibration.metrics import BoundedLoss as BoundedLoss
from .calibration.report import CalibrationReport as CalibrationReport
from .calibration.report import Certificate as Certificate
from .deploy.compiled import CompiledModel as CompiledModel
from .deploy.compiled import compile as compile
from .deploy.description import ExportError as ExportError
from .deploy.export import export as export
from .deploy.loading import load_exported as load_exported
from .deploy.report import ExportReport as ExportReport
from .model.check import AnswerMismatchError as AnswerMismatchError
from .model.early_exit import EarlyExit as EarlyExit
from .model.heads import ExitHead as ExitHead
from .model.heads import HeadSpec as HeadSpec
from .model.loading import load as load
from .model.output import ExitOutput as ExitOutput
from .model.output import Explanation as Explanation
from .partition.cache import UncutWarning as UncutWarning
from .partition.stages import CutError as CutError
from .partition.stages import Stages as Stages
from .runtime.policy import ExitPolicy as ExitPolicy
from .runtime.scores import ScoreFunction as ScoreFunction
from .training.audit import LabelAudit as LabelAudit
from .training.audit import audit_labels as audit_labels
from .training.heads import train_heads as train_heads
from .training.loss import ConsistentExitLoss as ConsistentExitLoss

__version__: str
