"""The public API. Everything else in the package is private."""

from .commands.doctor import Check as Check, doctor as doctor
from .commands.export import Exported as Exported, export as export
from .commands.failures import failures as failures
from .commands.gc import Collected as Collected, gc as gc
from .commands.measure import Measured as Measured, measure as measure, style_distance as style_distance
from .commands.plan import plan as plan
from .commands.repair import Repaired as Repaired, repair as repair
from .commands.replay import Replayed as Replayed, replay as replay
from .commands.run import run as run
from .commands.status import TrainingStatus as TrainingStatus, status as status
from .commands.verify import Verification as Verification, verify as verify
from .errors import (
    DriftError as DriftError,
    ManifestError as ManifestError,
    RequestError as RequestError,
    RunError as RunError,
    SampleError as SampleError,
    SmsbatchError as SmsbatchError,
    SourceError as SourceError,
    StorageError as StorageError,
    WeightsError as WeightsError,
)
from .generator.network import Generator as Generator
from .manifest import Manifest as Manifest
from .manifest.file import load as load
from .report.model import Report as Report
from .runs.plan import Plan as Plan, TrainingPlan as TrainingPlan
from .runs.snapshot import Problem as Problem
from .runs.status import Status as Status
from .training.log import TrainingProgress as TrainingProgress
from .training.result import Distilled as Distilled
from .workers.stylizer import Stylizer as Stylizer
