"""The public API. Everything else in the package is private."""

from .commands.doctor import Check as Check
from .commands.doctor import doctor as doctor
from .commands.export import Exported as Exported
from .commands.export import export as export
from .commands.failures import failures as failures
from .commands.gc import Collected as Collected
from .commands.gc import gc as gc
from .commands.measure import Measured as Measured
from .commands.measure import measure as measure
from .commands.measure import style_distance as style_distance
from .commands.plan import plan as plan
from .commands.repair import Repaired as Repaired
from .commands.repair import repair as repair
from .commands.replay import Replayed as Replayed
from .commands.replay import replay as replay
from .commands.run import run as run
from .commands.status import TrainingStatus as TrainingStatus
from .commands.status import status as status
from .commands.verify import Verification as Verification
from .commands.verify import verify as verify
from .errors import (
    DriftError as DriftError,
)
from .errors import (
    ManifestError as ManifestError,
)
from .errors import (
    RequestError as RequestError,
)
from .errors import (
    RunError as RunError,
)
from .errors import (
    SampleError as SampleError,
)
from .errors import (
    SmsbatchError as SmsbatchError,
)
from .errors import (
    SourceError as SourceError,
)
from .errors import (
    StorageError as StorageError,
)
from .errors import (
    WeightsError as WeightsError,
)
from .generator.network import Generator as Generator
from .manifest import Manifest as Manifest
from .manifest.file import load as load
from .report.model import Report as Report
from .runs.plan import Plan as Plan
from .runs.plan import TrainingPlan as TrainingPlan
from .runs.snapshot import Problem as Problem
from .runs.status import Status as Status
from .training.log import TrainingProgress as TrainingProgress
from .training.result import Distilled as Distilled
from .workers.stylizer import Stylizer as Stylizer
